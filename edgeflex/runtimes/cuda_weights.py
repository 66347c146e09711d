"""A decoder's numbers on a device: from the bundle's raw codes and scales to matrices that PyTorch multiplies with.

The numbers are those of ``transforms.decoder_weights.dequantize``. In fp32 they are the same to the last bit. In bf16
a matrix of int8 keeps its codes, which bf16 holds exactly, and its scales multiply what comes out; one of int4 rounds
each number once more.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import linear, silu

from edgeflex.errors import BundleError, DeviceError, UnsupportedError
from edgeflex.runtimes.movers import BLOCK_BYTES, Record
from edgeflex.runtimes.packed import Expert, PackedStore, is_small
from edgeflex.runtimes.raw_store import EMBEDDING, RawRows, expert_pairs
from edgeflex.schema import Precision
from edgeflex.schema_moe import DECODER_PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from edgeflex.runtimes.cuda_streams import Streams
    from edgeflex.runtimes.raw_store import Pair
    from edgeflex.schema import FileEntry
    from edgeflex.schema_moe import DecoderGraph, DecoderManifest, MatrixRecord

    Key = tuple[int, int]

_GROUP = 32  # inputs that share a scale in four bits
_INT4_ZERO = 8  # codes are stored as value + 8
_REMEDY = "Copy the bundle again, or export it again with `edgeflex export`."


class Weight(NamedTuple):
    """Matrices on the device.

    Attributes:
        values: ``[..., rows, columns]``.
        scales: What the outputs are multiplied with, ``[..., rows]`` float32; None where it is in the values.
    """

    values: Tensor
    scales: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        """Return ``rows`` ``[n, columns]`` times one matrix, as float32 ``[n, rows]``."""
        out = linear(rows.to(self.values.dtype), self.values).float()
        return out if self.scales is None else out * self.scales

    def one(self, index: int) -> Weight:
        """Return one of several matrices."""
        return Weight(self.values[index], None if self.scales is None else self.scales[index])

    def each(self, rows: Tensor) -> Tensor:
        """Return row ``i`` of ``rows`` ``[matrices, columns]`` times matrix ``i``, as float32 ``[matrices, rows]``."""
        out = torch.bmm(self.values, rows.to(self.values.dtype).unsqueeze(-1)).squeeze(-1).float()
        return out if self.scales is None else out * self.scales

    def grouped(self, rows: Tensor, ends: Tensor, owners: Tensor) -> Tensor:
        """Return rows up to ``ends[0]`` times matrix 0, from there to ``ends[1]`` times matrix 1 and so on.

        Args:
            rows: ``[n, columns]``.
            ends: ``[matrices]`` int32.
            owners: ``[n]``, each row's matrix.
        """
        values = self.values.transpose(-2, -1)
        out = torch._grouped_mm(rows.to(values.dtype), values, offs=ends).float()  # noqa: SLF001 - the public name is newer
        return out if self.scales is None else out * self.scales[owners]


class Kind(NamedTuple):
    """What experts that can be computed together have in common: precision, and where their pieces lie in a record."""

    gate_up: Shape
    down: Shape
    size_bytes: int


class Shape(NamedTuple):
    """One matrix within a record.

    Attributes:
        precision: Of its codes.
        rows: Outputs.
        columns: Inputs.
        offset: Of the codes.
        scales_offset: Of the scales; 0 for fp32.
        slices: In which it lies, each a matrix of its own in the bundle's form (see ``cuda_slices``).
        pitch: Bytes from one slice's codes to the next one's, and from scales to scales.
        across: Slices are columns; else each is rows of the upper half and the same ones of the lower.
    """

    precision: Precision
    rows: int
    columns: int
    offset: int
    scales_offset: int
    slices: int = 1
    pitch: int = 0
    across: bool = False

    @property
    def numbers(self) -> int:
        """How many weights."""
        return self.rows * self.columns

    @property
    def weights_bytes(self) -> int:
        """Bytes of the codes."""
        return self.numbers * self.precision.bits // 8


def shape_of(matrix: MatrixRecord) -> Shape:
    """Return where a matrix lies in its file.

    Raises:
        UnsupportedError: Decoders do not run its precision.
        BundleError: It has no scales and needs them.
    """
    if matrix.precision not in DECODER_PRECISIONS:
        known = ", ".join(one.value for one in DECODER_PRECISIONS)
        raise UnsupportedError(f"{matrix.name}: decoders do not run {matrix.precision.value}. Choose one of {known}.")
    if matrix.scales_bytes and matrix.scales_offset is None:
        raise BundleError(f"{matrix.name}: {matrix.precision.value} without scales. {_REMEDY}")
    return Shape(matrix.precision, matrix.rows, matrix.columns, matrix.offset, matrix.scales_offset or 0)


def kind_of(pair: Pair, size_bytes: int) -> Kind:
    """Return the kind of an expert whose record has ``size_bytes``."""
    return Kind(shape_of(pair.gate_up), shape_of(pair.down), size_bytes)


# --- numbers -------------------------------------------------------------------------------------------


def restored(data: Tensor, shape: Shape, dtype: torch.dtype) -> Weight:
    """Return the matrices whose raw bytes lie in ``data`` ``[n, bytes]`` (or ``[bytes]``: one matrix) on the device."""
    if shape.slices > 1:
        return _joined(data, shape, dtype)
    size = (*data.shape[:-1], shape.rows, shape.columns)
    codes = data[..., shape.offset : shape.offset + shape.weights_bytes]
    if shape.precision is Precision.FP32:
        return Weight(codes.view(torch.float32).unflatten(-1, size[-2:]).to(dtype), None)
    if shape.precision is Precision.INT8_DYNAMIC:
        found = data[..., shape.scales_offset : shape.scales_offset + 4 * shape.rows].view(torch.float32)
        values = codes.view(torch.int8).unflatten(-1, size[-2:]).to(dtype)
        return Weight(values.mul_(found.unsqueeze(-1)), None) if dtype is torch.float32 else Weight(values, found)
    return Weight(_int4(data, codes, shape, dtype).view(size), None)


def _int4(data: Tensor, codes: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Return ``[..., numbers]``; the even column of a byte is in its low half."""
    values = torch.empty((*codes.shape, 2), dtype=dtype, device=data.device)
    values[..., 0] = codes & 15
    values[..., 1] = codes >> 4
    count = shape.numbers // _GROUP
    scales = data[..., shape.scales_offset : shape.scales_offset + 2 * count].view(torch.bfloat16)
    grouped = values.view(*data.shape[:-1], count, _GROUP)
    return grouped.sub_(_INT4_ZERO).mul_(scales.unsqueeze(-1).to(dtype))


def _joined(data: Tensor, shape: Shape, dtype: torch.dtype) -> Weight:
    """Return matrices that lie in slices, as if they did not: the same numbers in the same places."""
    values = torch.empty((*data.shape[:-1], shape.rows, shape.columns), dtype=dtype, device=data.device)
    room = _slices(values, shape)
    one = room.shape[data.dim() :]  # of a slice: [rows, columns], or [2, rows, columns]
    codes = _pieces(data, shape.offset, shape.weights_bytes // shape.slices, shape)
    if shape.precision is Precision.FP32:
        room.copy_(codes.view(torch.float32).unflatten(-1, one))
        return Weight(values, None)
    if shape.precision is Precision.INT8_DYNAMIC:
        room.copy_(codes.view(torch.int8).unflatten(-1, one))
        found = _row_scales(data, shape)
        return Weight(values.mul_(found.unsqueeze(-1)), None) if dtype is torch.float32 else Weight(values, found)
    pairs, halves = room.unflatten(-1, (-1, 2)), codes.unflatten(-1, (*one[:-1], one[-1] // 2))
    pairs[..., 0] = halves & 15
    pairs[..., 1] = halves >> 4
    groups = one[-1] // _GROUP
    size_bytes = 2 * shape.numbers // _GROUP // shape.slices
    scales = _pieces(data, shape.scales_offset, size_bytes, shape).view(torch.bfloat16)
    scales = scales.unflatten(-1, (*one[:-1], groups)).unsqueeze(-1).to(dtype)
    room.unflatten(-1, (groups, _GROUP)).sub_(_INT4_ZERO).mul_(scales)
    return Weight(values, None)


def _slices(values: Tensor, shape: Shape) -> Tensor:
    """Return a view ``[..., slices, rows, columns]`` of matrices, or ``[..., slices, 2, rows, columns]`` of halves."""
    if shape.across:
        return values.unflatten(-1, (shape.slices, -1)).transpose(-3, -2)
    return values.unflatten(-2, (2, shape.slices, -1)).transpose(-4, -3)


def _pieces(data: Tensor, offset: int, size_bytes: int, shape: Shape) -> Tensor:
    """Return a view ``[..., slices, size_bytes]`` of what each slice has at ``offset`` of it."""
    return data[..., offset:].unfold(-1, size_bytes, shape.pitch)[..., : shape.slices, :]


def _row_scales(data: Tensor, shape: Shape) -> Tensor:
    if shape.across:  # a row's scale is that of all slices
        return data[..., shape.scales_offset : shape.scales_offset + 4 * shape.rows].view(torch.float32)
    found = _pieces(data, shape.scales_offset, 4 * shape.rows // shape.slices, shape).view(torch.float32)
    return found.unflatten(-1, (2, -1)).transpose(-3, -2).flatten(-3)


def feed_forward(gate_up: Tensor) -> Tensor:
    """Return ``[n, inner]`` of ``[n, 2 * inner]``: the gate's SiLU times the upper half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def run_expert(data: Tensor, kind: Kind, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the expert whose record is ``data`` ``[bytes]`` makes of ``rows`` ``[n, hidden]``, in float32."""
    inner = feed_forward(restored(data, kind.gate_up, dtype)(rows))
    return restored(data, kind.down, dtype)(inner)


# --- the bundle ----------------------------------------------------------------------------------------


def open_experts(folder: Path, manifest: DecoderManifest) -> tuple[PackedStore, Mapping[Key, Kind]]:
    """Return the bundle's own experts as a store, and each one's kind; nothing is packed.

    Sizes are in whole blocks, as arenas lay them out; a file that ends before its last block is read past the page
    cache only where its file system allows it.

    Args:
        folder: The bundle.
        manifest: Its manifest.

    Raises:
        BundleError: An expert does not lie alone in a file that the manifest lists; all such faults stand in one error.
    """
    entries = {entry.path: entry for entry in manifest.files}
    pairs = expert_pairs(manifest)
    faults = list(_faults(pairs, entries))
    if faults:
        rest = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise BundleError(f"{folder}: {'; '.join(faults[:5])}{rest}. {_REMEDY}")
    experts: dict[Key, Expert] = {}
    kinds: dict[Key, Kind] = {}
    for key, pair in pairs.items():
        entry = entries[pair.down.file]
        name = f"layers.{key[0]}.experts.{key[1]}"
        record = Record(name, folder / entry.path, 0, entry.size_bytes, entry.sha256, _REMEDY)
        experts[key] = Expert(record, pair.down.precision)
        kinds[key] = kind_of(pair, blocks(entry.size_bytes))
    return PackedStore(folder, _sizes(experts, len(manifest.graph.layers)), experts, ()), kinds


def blocks(size_bytes: int) -> int:
    """Return ``size_bytes`` rounded up to whole blocks."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _faults(pairs: Mapping[Key, Pair], entries: Mapping[str, FileEntry]) -> Iterator[str]:
    users: dict[str, Key] = {}
    for key, pair in pairs.items():
        file = pair.down.file
        if users.setdefault(file, key) != key:
            yield f"{file} holds several experts"
        held = entries[file].size_bytes if file in entries else 0
        for one in pair:
            shape = shape_of(one)
            end = max(shape.offset + one.weights_bytes, shape.scales_offset + one.scales_bytes)
            if end > held or shape.offset % 4 or shape.scales_offset % 4:
                yield f"{one.name} reaches to byte {end} of {held} in {file}, or is not at a multiple of 4"


def _sizes(experts: Mapping[Key, Expert], layers: int) -> NDArray[np.int64]:
    count = 1 + max((expert for _, expert in experts), default=-1)
    sizes = np.zeros((layers, count), dtype=np.int64)
    for key, known in experts.items():
        sizes[key] = blocks(known.record.size_bytes)
    return sizes


class Dense(NamedTuple):
    """What stays on the device, and the embedding, which stays with the processor.

    Attributes:
        matrices: By name.
        small: Norms, biases, routers and gates by name, float32.
        embedding: Rows are looked up here.
    """

    matrices: Mapping[str, Weight]
    small: Mapping[str, Tensor]
    embedding: RawRows


def load_dense(folder: Path, manifest: DecoderManifest, streams: Streams, dtype: torch.dtype) -> Dense:
    """Check and load every file that holds no expert.

    Raises:
        BundleError: A file is missing or damaged, or the manifest names no embedding.
        DeviceError: The disk failed, or memory is short.
    """
    entries = {entry.path: entry for entry in manifest.files}
    by_file: dict[str, list[MatrixRecord]] = {}
    for one in _dense(manifest.matrices):
        by_file.setdefault(one.file, []).append(one)
    matrices: dict[str, Weight] = {}
    small: dict[str, Tensor] = {}
    embedding: RawRows | None = None
    for file, members in by_file.items():
        data = _read(folder, file, entries)
        for one in members:
            if one.name == EMBEDDING:
                embedding = _rows(data, one)
            elif is_small(one.name):
                small[one.name] = _small(data, one, streams)
            else:
                matrices[one.name] = _matrix(data, one, streams, dtype)
    if embedding is None:
        raise BundleError(f"{folder}: the manifest names no embedding. {_REMEDY}")
    _refuse_absent(folder, manifest.graph, matrices, small)
    return Dense(matrices, small, embedding)


def dense_bytes(manifest: DecoderManifest, dtype: torch.dtype) -> int:
    """Return the bytes on the device of what ``load_dense`` loads there."""
    total = 0
    for one in _dense(manifest.matrices):
        if one.name == EMBEDDING:
            continue
        number_bytes = 4 if is_small(one.name) else dtype.itemsize
        total += one.rows * one.columns * number_bytes
        if one.precision is Precision.INT8_DYNAMIC and dtype is not torch.float32:
            total += one.scales_bytes
    return total


def _dense(matrices: Sequence[MatrixRecord]) -> Iterator[MatrixRecord]:
    return (one for one in matrices if ".experts." not in one.name)


def _refuse_absent(
    folder: Path, graph: DecoderGraph, matrices: Mapping[str, Weight], small: Mapping[str, Tensor]
) -> None:
    wanted = [name for name in graph.matrix_shapes() if ".experts." not in name and name != EMBEDDING]
    absent = [name for name in wanted if name not in matrices]
    absent += [name for name in graph.small_shapes() if name not in small]
    if absent:
        raise BundleError(f"{folder}: the manifest names no {', '.join(absent[:5])}. {_REMEDY}")


def _read(folder: Path, file: str, entries: Mapping[str, FileEntry]) -> NDArray[np.uint8]:
    path, entry = folder / file, entries.get(file)
    if entry is None:
        raise BundleError(f"{folder}: the manifest does not list {file!r}. {_REMEDY}")
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}. {_REMEDY}") from None
    except MemoryError as error:
        raise DeviceError(f"no memory to read {path}: {error}. Close other programs.") from None
    if hashlib.sha256(data.data).hexdigest() != entry.sha256:
        raise BundleError(f"{path}: the content differs from the manifest's SHA-256. {_REMEDY}")
    return data


def _part(data: NDArray[np.uint8], one: MatrixRecord, offset: int, size_bytes: int) -> NDArray[np.uint8]:
    """Return bytes of a file in memory of their own, whose address suits every type."""
    found = data[offset : offset + size_bytes].copy()
    if found.size != size_bytes:
        raise BundleError(
            f"{one.name}: bytes {offset} to {offset + size_bytes} lie outside {one.file} ({data.size}). {_REMEDY}"
        )
    return found


def _rows(data: NDArray[np.uint8], one: MatrixRecord) -> RawRows:
    shape = shape_of(one)
    scales = _part(data, one, shape.scales_offset, one.scales_bytes) if one.scales_bytes else None
    return RawRows(one, _part(data, one, shape.offset, one.weights_bytes), scales)


def _small(data: NDArray[np.uint8], one: MatrixRecord, streams: Streams) -> Tensor:
    values = _part(data, one, one.offset, one.weights_bytes).view(np.float32)
    held = streams.empty((one.rows, one.columns), torch.float32)
    held.copy_(torch.from_numpy(values.reshape(one.rows, one.columns)))
    return held if one.name.endswith(("router", "shared_gate")) else held.reshape(-1)


def _matrix(data: NDArray[np.uint8], one: MatrixRecord, streams: Streams, dtype: torch.dtype) -> Weight:
    """Return a matrix on the device, restored there from its codes."""
    shape = shape_of(one)
    codes = _part(data, one, shape.offset, one.weights_bytes)
    scales = _part(data, one, shape.scales_offset, one.scales_bytes) if one.scales_bytes else np.empty(0, np.uint8)
    start = -(-codes.size // 4) * 4
    raw = np.zeros(start + scales.size, dtype=np.uint8)
    raw[: codes.size], raw[start:] = codes, scales
    held = streams.empty((raw.size,), torch.uint8)
    held.copy_(torch.from_numpy(raw))
    return restored(held, shape._replace(offset=0, scales_offset=start), dtype)
