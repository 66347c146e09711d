"""The weight files of a decoder's bundle: which there are, what stands in them, and writing them.

A file is read back as soon as it is written: its bytes are compared at the offsets that the manifest will state,
and its hash is taken from what was read.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from edgeflex.errors import DeviceError
from edgeflex.exporters.flat_tensor import DataFront, DataKey, DataPiece, data_front
from edgeflex.schema import FileEntry, Precision
from edgeflex.schema_moe import MatrixRecord
from edgeflex.transforms.decoder_weights import (
    GROUP,
    StoredMatrix,
    dequantize,
    float_from_bfloat16,
    matrix_from_bytes,
    quantize_matrix,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.models.decoders import DecoderSource
    from edgeflex.progress import Progress
    from edgeflex.schema_moe import DecoderLayer

    # for each kind of file, under which names its pieces are asked for
    Asked = Mapping[str, Mapping[str, tuple[DataKey, ...]]]

EMBEDDING_FILE = "weights/embedding.ptd"
HEAD_FILE = "weights/head.ptd"
_MATRICES = frozenset({"qkv", "o", "q", "kv_a", "kv_b", "gate_up", "down", "embedding", "head"})
_READ_BYTES = 1 << 20
_MOST_THREADS = 4


@dataclass(frozen=True)
class DataFile:
    """One ``.ptd`` to be.

    Attributes:
        path: Relative to the bundle.
        kind: Files of one kind are asked for the same names: the path, or what experts share.
        names: Its tensors.
    """

    path: str
    kind: str
    names: tuple[str, ...]


def is_matrix(name: str) -> bool:
    """Say whether a tensor of a decoder has a precision; all others stay fp32."""
    return name.rpartition(".")[2] in _MATRICES


def unit_of(name: str) -> str | None:
    """Return the unit whose precision a matrix has, or None for a small tensor.

    >>> unit_of("layers.3.experts.17.down"), unit_of("layers.3.qkv"), unit_of("layers.3.router")
    ('layers.3.experts.17', 'layers.3', None)
    """
    if not is_matrix(name):
        return None
    parts = name.split(".")
    if len(parts) == 1:
        return name
    return ".".join(parts[:4] if parts[2] == "experts" else parts[:2])


def local_name(name: str) -> str:
    """Return a tensor's name inside its file, which is the same for all layers and experts.

    >>> local_name("layers.3.experts.17.down"), local_name("layers.3.shared.down"), local_name("norm")
    ('down', 'shared.down', 'norm')
    """
    parts = name.split(".")
    if parts[0] != "layers":
        return name
    return ".".join(parts[4:] if parts[2] == "experts" else parts[2:])


def dense_path(layer: int) -> str:
    """Return where the dense part of a layer lies."""
    return f"weights/layers.{layer}/dense.ptd"


def expert_kind(width: int, precision: Precision) -> str:
    """Return the kind of the files of experts with this inner width and precision."""
    return f"expert {width} {precision.value}"


def data_files(source: DecoderSource, precisions: Mapping[str, Precision]) -> Iterator[DataFile]:
    """Yield every weight file of the bundle: embedding, head unless tied, then layer by layer."""
    ends = ("embedding", "norm") if source.graph.tied_embedding else ("embedding",)
    yield DataFile(EMBEDDING_FILE, EMBEDDING_FILE, ends)
    if not source.graph.tied_embedding:
        yield DataFile(HEAD_FILE, HEAD_FILE, ("head", "norm"))
    for layer in source.graph.layers:
        path = dense_path(layer.index)
        yield DataFile(path, path, tuple(source.layer_tensors(layer.index)))
        yield from _expert_files(source, layer, precisions)


def _expert_files(
    source: DecoderSource, layer: DecoderLayer, precisions: Mapping[str, Precision]
) -> Iterator[DataFile]:
    for expert in range(layer.routing.experts if layer.routing else 0):
        kind = expert_kind(layer.expert_dim, precisions[f"layers.{layer.index}.experts.{expert}"])
        path = f"weights/layers.{layer.index}/expert.{expert}.ptd"
        yield DataFile(path, kind, tuple(source.expert_tensors(layer.index, expert)))


def pieces_of(name: str, stored: StoredMatrix) -> dict[str, NDArray[Any]]:
    """Return the pieces of data that a matrix or small tensor becomes in a file, by name.

    A 4-bit matrix of 32 columns has one group a row. XNNPACK then takes its scales as float32 per row, which are
    the same numbers once more.
    """
    pieces: dict[str, NDArray[Any]] = {name: stored.codes}
    if stored.scales is not None:
        pieces[f"{name}.scales"] = stored.scales
        if stored.precision is Precision.INT4_GROUP32 and stored.columns == GROUP:
            pieces[f"{name}.row_scales"] = float_from_bfloat16(stored.scales)
    return pieces


class WeightFiles:
    """Writes the weight files into a folder.

    Args:
        folder: The bundle to be.
        source: The decoder.
        precisions: Of every unit.
        asked: Under which names programs ask for the pieces of each kind of file, beside their own names.
    """

    def __init__(self, folder: Path, source: DecoderSource, precisions: Mapping[str, Precision], asked: Asked) -> None:
        self._folder = folder
        self._source = source
        self._precisions = precisions
        self._asked = asked
        self._fronts: dict[Any, DataFront] = {}
        self._lock = threading.Lock()

    def write(self, told: Progress) -> tuple[tuple[FileEntry, ...], tuple[MatrixRecord, ...]]:
        """Write all files and return their entries and every tensor's place.

        A few threads share the files of experts, most of which is NumPy and hashing; each holds one file's numbers.
        """
        files = tuple(data_files(self._source, self._precisions))
        entries: list[FileEntry] = []
        records: list[MatrixRecord] = []
        for file in files:
            # not by the threads: one that Ctrl-C left behind would bring back the folder after it was removed
            (self._folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        workers = min(_MOST_THREADS, os.cpu_count() or 1)
        with told.task("weights", len(files)) as advance, ThreadPoolExecutor(workers) as pool:
            experts = [file for file in files if file.kind != file.path]
            others = (self._write(file) for file in files if file.kind == file.path)
            try:
                for entry, places in itertools.chain(others, pool.map(self._write, experts)):
                    entries.append(entry)
                    records.extend(places)
                    advance(1)
            except BaseException:
                # else leaving the pool would first write every expert that waits there, for minutes after Ctrl-C
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if self._source.graph.tied_embedding:
            embedding = next(record for record in records if record.name == "embedding")
            records.append(embedding.model_copy(update={"name": "head"}))
        return tuple(entries), tuple(records)

    def _write(self, file: DataFile) -> tuple[FileEntry, tuple[MatrixRecord, ...]]:
        stored = {name: self._stored(name) for name in file.names}
        pieces = {
            piece: values for name, one in stored.items() for piece, values in pieces_of(local_name(name), one).items()
        }
        asked = self._asked.get(file.kind, {})
        front = self._front(tuple(_data_piece(name, one.nbytes, asked.get(name, ())) for name, one in pieces.items()))
        places = dict(zip(pieces, front.offsets, strict=True))
        path = self._folder / file.path
        _write_pieces(path, front, tuple(pieces.values()))
        digest = _read_back(path, front, tuple(pieces.values()))
        entry = FileEntry(path=file.path, role=file.path, size_bytes=front.size_bytes, sha256=digest)
        return entry, tuple(_record(name, one, file.path, places) for name, one in stored.items())

    def _stored(self, name: str) -> StoredMatrix:
        unit = unit_of(name)
        values = self._source.tensor(name)
        precision = self._precisions[unit] if unit else Precision.FP32
        return quantize_matrix(values.reshape(-1, values.shape[-1]), precision)

    def _front(self, pieces: tuple[DataPiece, ...]) -> DataFront:
        kind = tuple((piece.name, piece.size_bytes, str(piece.keys)) for piece in pieces)
        with self._lock:
            if kind not in self._fronts:
                self._fronts[kind] = data_front(pieces)
            return self._fronts[kind]


def _data_piece(name: str, size_bytes: int, asked: tuple[DataKey, ...]) -> DataPiece:
    """Return a piece under the names that programs ask for, and under its own, so that the file explains itself."""
    keys = {name: DataKey(name)}
    keys.update((one.key, one) for one in asked)
    return DataPiece(name, size_bytes, tuple(keys.values()))


def _record(name: str, stored: StoredMatrix, path: str, places: Mapping[str, int]) -> MatrixRecord:
    piece = local_name(name)
    return MatrixRecord(
        name=name,
        precision=stored.precision,
        rows=stored.rows,
        columns=stored.columns,
        file=path,
        offset=places[piece],
        scales_offset=places.get(f"{piece}.scales"),
    )


def _write_pieces(path: Path, front: DataFront, pieces: Sequence[NDArray[Any]]) -> None:
    with path.open("wb") as file:
        file.write(front.head)
        for offset, piece in zip(front.offsets, pieces, strict=True):
            file.write(bytes(offset - file.tell()))
            file.write(piece.data.cast("B"))


def _read_back(path: Path, front: DataFront, pieces: Sequence[NDArray[Any]]) -> str:
    """Return the SHA-256 of a file after comparing every piece with what lies at its offset.

    Raises:
        DeviceError: The disk gives back something else.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset, piece in zip(front.offsets, pieces, strict=True):
            digest.update(file.read(offset - file.tell()))
            wanted = piece.reshape(-1).view(np.uint8)
            for start in range(0, len(wanted), _READ_BYTES):
                block = file.read(min(_READ_BYTES, len(wanted) - start))
                digest.update(block)
                if not np.array_equal(np.frombuffer(block, np.uint8), wanted[start : start + _READ_BYTES]):
                    raise DeviceError(
                        f"{path.name}: the disk gives back other bytes than were written. Check the disk."
                    )
        if file.tell() != front.size_bytes or file.read(1):
            raise DeviceError(f"{path.name}: the file has another size than was written. Check the disk.")
    return digest.hexdigest()


class BundleWeights:
    """The numbers that a written bundle stands for, read from its files when asked for; safe in threads.

    Args:
        folder: The bundle, finished or not.
        records: Its matrices.
        source: Gives small tensors their shape.
    """

    def __init__(self, folder: Path, records: Sequence[MatrixRecord], source: DecoderSource) -> None:
        self.folder = folder
        self._records = {record.name: record for record in records}
        self._source = source

    def __call__(self, name: str) -> NDArray[np.float32]:
        """Return a matrix ``[rows, columns]`` or small tensor, dequantised."""
        return dequantize(self.stored(name)).reshape(self._source.shape(name))

    def record(self, name: str) -> MatrixRecord:
        """Return where a matrix or small tensor lies."""
        return self._records[name]

    def expert_bytes(self, layer: int) -> int:
        """Return the bytes of all experts of a layer."""
        start = f"layers.{layer}.experts."
        return sum(one.weights_bytes + one.scales_bytes for one in self._records.values() if one.name.startswith(start))

    def stored(self, name: str) -> StoredMatrix:
        """Return a matrix or small tensor as it is stored."""
        return self._part(self._records[name], 0, self._records[name].rows)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` of a matrix, dequantised; only their bytes are read."""
        return dequantize(self._part(self._records[name], start, stop))

    def _part(self, record: MatrixRecord, start: int, stop: int) -> StoredMatrix:
        count = stop - start
        with (self.folder / record.file).open("rb") as file:
            codes = _read_rows(file, record.offset, record.weights_bytes // record.rows, start, count)
            scales = None
            if record.scales_offset is not None:
                scales = _read_rows(file, record.scales_offset, record.scales_bytes // record.rows, start, count)
        return matrix_from_bytes(record.precision, count, record.columns, codes, scales)


def _read_rows(file: BinaryIO, offset: int, row_bytes: int, start: int, count: int) -> bytearray:
    raw = bytearray(count * row_bytes)  # torch takes only what may be written to
    file.seek(offset + start * row_bytes)
    return raw[: file.readinto(raw)]  # type: ignore[attr-defined]  # every raw or buffered file has it
