"""The store of a bundle whose weights are used as they lie in it: nothing is packed, each expert is a file.

Its hash in the manifest is checked when an expert is first read, by whoever moves it into the arena.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex.errors import BundleError, InputError
from edgeflex.runtimes.movers import BLOCK_BYTES, Record
from edgeflex.runtimes.packed import Expert, PackedStore, Piece, Unit
from edgeflex.schema import Precision

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.schema import FileEntry
    from edgeflex.schema_moe import DecoderManifest, MatrixRecord

    Key = tuple[int, int]

EMBEDDING = "embedding"
ALIGNMENT = 64  # of each piece within its file
_GROUP = 32  # inputs that share a scale in four bits
_INT4_ZERO = 8  # codes are stored as value + 8
_REMEDY = "Copy the bundle again, or export it again with `edgeflex export`."


class Pair(NamedTuple):
    """The two matrices of an expert."""

    gate_up: MatrixRecord
    down: MatrixRecord


def expert_pairs(manifest: DecoderManifest) -> dict[Key, Pair]:
    """Return the matrices of every expert by layer and number, ascending.

    Raises:
        BundleError: An expert lacks a matrix, or has them in several files or precisions.
    """
    found: dict[Key, dict[str, MatrixRecord]] = {}
    for one in manifest.matrices:
        parts = one.name.split(".")
        if len(parts) == 5 and parts[2] == "experts":
            found.setdefault((int(parts[1]), int(parts[3])), {})[parts[4]] = one
    return {key: _pair(key, found[key]) for key in sorted(found)}


def _pair(key: Key, matrices: Mapping[str, MatrixRecord]) -> Pair:
    alike = {(one.file, one.precision) for one in matrices.values()}
    if set(matrices) != {"gate_up", "down"} or len(alike) != 1:
        raise BundleError(
            f"expert {key[1]} of layer {key[0]}: gate_up and down in one file and precision are needed, the manifest "
            f"names {', '.join(one.name for one in matrices.values())}. {_REMEDY}"
        )
    return Pair(matrices["gate_up"], matrices["down"])


def open_raw(folder: Path, manifest: DecoderManifest) -> PackedStore:
    """Return the bundle's own weight files as a store: experts, and the embedding as its only dense part.

    Args:
        folder: The bundle.
        manifest: Its manifest.

    Raises:
        BundleError: An expert's file does not hold one whole expert in blocks of 4096 bytes, or a matrix is not
            where its reader looks for it; all such faults stand in one error.
    """
    entries = {entry.path: entry for entry in manifest.files}
    pairs = expert_pairs(manifest)
    embedding = [one for one in manifest.matrices if one.name == EMBEDDING]
    faults = list(_faults(pairs, embedding, entries))
    if faults:
        rest = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise BundleError(f"{folder}: {'; '.join(faults[:5])}{rest}. {_REMEDY}")
    experts = {
        key: Expert(_record(folder, entries[pair.down.file], _expert_name(key)), pair.down.precision)
        for key, pair in pairs.items()
    }
    dense = tuple(_dense(folder, one, entries[one.file]) for one in embedding)
    return PackedStore(folder, _sizes(experts, len(manifest.graph.layers)), experts, dense)


def _expert_name(key: Key) -> str:
    return f"layers.{key[0]}.experts.{key[1]}"


def _record(folder: Path, entry: FileEntry, name: str) -> Record:
    return Record(name, folder / entry.path, 0, entry.size_bytes, entry.sha256, _REMEDY)


def _dense(folder: Path, matrix: MatrixRecord, entry: FileEntry) -> tuple[Record, Unit]:
    # codes and scales lie in the file as in a packed store's unpacked pieces
    size_bytes = _aligned(matrix.weights_bytes) + matrix.scales_bytes
    piece = Piece(matrix, packed=False, offset=matrix.offset, size_bytes=size_bytes)
    return _record(folder, entry, matrix.name), Unit(matrix.name, (piece,), entry.size_bytes)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def _faults(
    pairs: Mapping[Key, Pair], embedding: list[MatrixRecord], entries: Mapping[str, FileEntry]
) -> Iterator[str]:
    if len(embedding) != 1:
        yield f"the manifest names {len(embedding)} embeddings instead of one"
    users: dict[str, Key] = {}
    for key, pair in pairs.items():
        file = pair.down.file
        if users.setdefault(file, key) != key:
            yield f"{file} holds several experts"
        for one in pair:
            yield from _piece_faults(one, entries)
    for one in embedding:
        yield from _piece_faults(one, entries)
        after = one.offset + _aligned(one.weights_bytes)
        if one.scales_offset not in {None, after}:
            yield f"{one.name}: its scales are at {one.scales_offset} instead of {after}"


def _piece_faults(one: MatrixRecord, entries: Mapping[str, FileEntry]) -> Iterator[str]:
    entry = entries.get(one.file)
    if entry is None or entry.size_bytes % BLOCK_BYTES or not entry.size_bytes:
        held = "is not listed" if entry is None else f"has {entry.size_bytes} bytes, no multiple of {BLOCK_BYTES}"
        yield f"{one.file} {held}"
    if one.offset % ALIGNMENT or (one.scales_offset or 0) % ALIGNMENT:
        yield f"{one.name} does not begin at a multiple of {ALIGNMENT}"


def _sizes(experts: Mapping[Key, Expert], layers: int) -> NDArray[np.int64]:
    count = 1 + max((expert for _, expert in experts), default=-1)
    sizes = np.zeros((layers, count), dtype=np.int64)
    for key, known in experts.items():
        sizes[key] = known.record.size_bytes
    return sizes


# --- numbers -------------------------------------------------------------------------------------------


class RawRows:
    """A raw matrix of which rows are read as float32.

    Args:
        matrix: Its precision and shape.
        codes: Its weights in the form of ``MatrixRecord``, used where they lie.
        scales: Its scales likewise; None for fp32.

    Raises:
        InputError: The precision has no raw form.
    """

    def __init__(self, matrix: MatrixRecord, codes: NDArray[np.uint8], scales: NDArray[np.uint8] | None) -> None:
        self._precision = matrix.precision
        shape = (matrix.rows, matrix.columns)
        self._codes: NDArray[np.generic]
        self._scales: NDArray[np.generic] | None = None
        if matrix.precision is Precision.FP32:
            self._codes = codes.view(np.float32).reshape(shape)
        elif matrix.precision is Precision.INT8_DYNAMIC and scales is not None:
            self._codes = codes.view(np.int8).reshape(shape)
            self._scales = scales.view(np.float32)
        elif matrix.precision is Precision.INT4_GROUP32 and scales is not None:
            self._codes = codes.reshape(matrix.rows, matrix.columns // 2)
            self._scales = scales.view(np.uint16).reshape(matrix.rows, matrix.columns // _GROUP)
        else:
            raise InputError(f"{matrix.name}: {matrix.precision.value} has no raw form. {_REMEDY}")

    def __call__(self, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return ``[count, columns]`` of these rows; the numbers of ``transforms.decoder_weights.dequantize``."""
        codes = self._codes[rows]
        if self._scales is None:
            return codes.astype(np.float32, copy=False)
        scales = self._scales[rows]
        if self._precision is Precision.INT8_DYNAMIC:
            return np.multiply(codes, scales[:, None], dtype=np.float32)
        values = np.empty((codes.shape[0], 2 * codes.shape[1]), dtype=np.float32)
        bits = codes.view(np.uint8)
        values[:, ::2] = bits & 15
        values[:, 1::2] = bits >> 4
        values -= _INT4_ZERO
        wide = (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)
        grouped = values.reshape(-1, _GROUP)
        grouped *= wide.reshape(-1, 1)
        return values
