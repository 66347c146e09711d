"""The packed store: the bundle's weights as this CPU's kernels want them, made once and checked ever after.

``<bundle>/packed-<kernel>/`` holds ``layer-III.bin`` (one record per expert: gate_up, then down at the next
multiple of 64), ``dense.bin`` (one record per dense unit, embedding and head) and ``index.json`` (place and
SHA-256 of every record, bound to the weights that the manifest names). Records start and end at multiples of
4096, so that they can be read past the page cache. The folder appears whole or not at all; whoever builds holds
a lock on the bundle, others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from edgeflex.errors import BundleError, DeviceError, EdgeflexError, InputError
from edgeflex.files import explain_os_error, sha256_file, write_atomic
from edgeflex.runtimes.movers import BLOCK_BYTES, Record
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

    from edgeflex.progress import Progress
    from edgeflex.schema import FileEntry, Precision
    from edgeflex.schema_moe import DecoderManifest, MatrixRecord

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"
STAMPS_NAME = "raw.json"
DENSE_NAME = "dense.bin"
ALIGNMENT = 64  # of each matrix within its record
_VERSION = 1
_SMALL = ("norm", "qkv_bias", "router", "shared_gate")  # last parts of the names of fp32 tensors
_REBUILD = "Delete this folder, it is made again."
_REEXPORT = "Copy the bundle again, or export it again with `edgeflex export`."


class Packer(Protocol):
    """What turns raw weights into the kernels' layout."""

    def packed_bytes(self, precision: Precision, rows: int, columns: int) -> int:
        """Return the bytes of a packed matrix."""

    def pack(
        self,
        precision: Precision,
        rows: int,
        columns: int,
        codes: NDArray[np.uint8],
        scales: NDArray[np.uint8] | None,
        out: NDArray[np.uint8],
    ) -> None:
        """Write the packed matrix to ``out``."""


class Piece(NamedTuple):
    """One matrix or small tensor within a record.

    Attributes:
        matrix: Its raw form in the bundle.
        packed: In the kernels' layout; else as it is in the bundle, codes first, scales at the next multiple of 64.
        offset: Bytes from the record's start.
        size_bytes: Length here.
    """

    matrix: MatrixRecord
    packed: bool
    offset: int
    size_bytes: int


class Unit(NamedTuple):
    """What is read together: an expert, or the dense part of a layer, or embedding, head or last norm.

    Attributes:
        name: ``layers.3.experts.17``, ``layers.3``, ``embedding``, ``head``, ``norm``.
        pieces: In the order in which they lie.
        size_bytes: A multiple of 4096.
    """

    name: str
    pieces: tuple[Piece, ...]
    size_bytes: int


class Expert(NamedTuple):
    """An expert in the store."""

    record: Record
    precision: Precision


class PackedStore(NamedTuple):
    """A store that matches its bundle; its records are not read yet.

    Attributes:
        folder: Where it lies.
        sizes: ``[layers, experts]`` bytes of each record, zeros where a layer has fewer experts.
        experts: By layer and number.
        dense: Record and unit of all that stays in memory.
    """

    folder: Path
    sizes: NDArray[np.int64]
    experts: Mapping[tuple[int, int], Expert]
    dense: tuple[tuple[Record, Unit], ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes of all dense records together."""
        return sum(record.size_bytes for record, _ in self.dense)


def open_packed(
    folder: Path, manifest: DecoderManifest, packer: Packer, kernel_id: str, progress: Progress
) -> PackedStore:
    """Return the packed store of a bundle, made now if there is none for this CPU.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        packer: Packs for this CPU.
        kernel_id: Names that layout; letters, digits, ``-``, ``_`` and ``.``.
        progress: Told about units while packing.

    Raises:
        BundleError: A weight file is missing or changed, or the store is damaged.
        DeviceError: The disk is full.
        InputError: The bundle's folder cannot be written.
    """
    units = _units(manifest.matrices, packer)
    place = folder / f"packed-{check_kernel_id(kernel_id)}"
    digest = weights_digest(manifest)
    if _is_stale(place, digest):
        with _locked(folder):
            if _is_stale(place, digest):  # another process may have made it while this one waited
                _build(folder, place, manifest, units, packer, digest, progress)
    else:
        _check_raw(folder, place, manifest)
    return _opened(place, units, digest)


def weights_digest(manifest: DecoderManifest) -> str:
    """Return the SHA-256 of all that the store depends on: where every matrix lies, and its file's hash."""
    digest = hashlib.sha256()
    hashes = {entry.path: entry.sha256 for entry in manifest.files}
    for one in manifest.matrices:
        line = (one.name, one.precision.value, one.rows, one.columns, one.file, one.offset, one.scales_offset)
        digest.update(f"{line!r} {hashes.get(one.file)}\n".encode())
    return digest.hexdigest()


# --- what lies where -----------------------------------------------------------------------------------


def index_of(matrices: Sequence[MatrixRecord], packer: Packer) -> tuple[dict[str, Unit], dict[str, Record]]:
    """Return every unit of a store and its record, with nothing behind them: what an open store holds in memory."""
    units = _units(matrices, packer)
    digest = "0" * 64
    records = {
        name: Record(name, Path("store") / _file_of(name), 0, unit.size_bytes, f"{digest}{number}"[-64:])
        for number, (name, unit) in enumerate(units.items())
    }
    return units, records


def unit_of(name: str) -> str:
    """Return the unit of a matrix or small tensor."""
    parts = name.split(".")
    if parts[0] != "layers" or len(parts) < 3:
        return parts[0]
    return ".".join(parts[:4] if parts[2] == "experts" else parts[:2])


def is_small(name: str) -> bool:
    """Return whether ``name`` is one of the tensors that stay in fp32 and are never packed."""
    last = name.rpartition(".")[2]
    return last in _SMALL or last.endswith("_norm")


def _aligned(size_bytes: int, to: int) -> int:
    return -(-size_bytes // to) * to


def _units(listed: Sequence[MatrixRecord], packer: Packer) -> dict[str, Unit]:
    """Return every unit with its layout, in the order of the manifest."""
    grouped: dict[str, list[MatrixRecord]] = {}
    for one in listed:
        grouped.setdefault(unit_of(one.name), []).append(one)
    known: dict[tuple[Precision, int, int], int] = {}
    return {name: _unit(name, matrices, packer, known) for name, matrices in grouped.items()}


def _unit(
    name: str, matrices: Sequence[MatrixRecord], packer: Packer, known: dict[tuple[Precision, int, int], int]
) -> Unit:
    pieces: list[Piece] = []
    end = 0
    if ".experts." in name:
        matrices = _expert_matrices(name, matrices)
    for one in matrices:
        packed = not is_small(one.name) and name != "embedding"
        shape = (one.precision, one.rows, one.columns)
        if packed and shape not in known:
            known[shape] = packer.packed_bytes(*shape)
        size_bytes = known[shape] if packed else _aligned(one.weights_bytes, ALIGNMENT) + one.scales_bytes
        pieces.append(Piece(one, packed, end, size_bytes))
        end = _aligned(end + size_bytes, ALIGNMENT)
    return Unit(name, tuple(pieces), _aligned(end, BLOCK_BYTES))


def _expert_matrices(name: str, matrices: Sequence[MatrixRecord]) -> tuple[MatrixRecord, ...]:
    by_name = {one.name: one for one in matrices}
    wanted = (f"{name}.gate_up", f"{name}.down")
    if set(by_name) != set(wanted) or len({one.precision for one in matrices}) != 1:
        listed = ", ".join(f"{one.name} ({one.precision.value})" for one in matrices)
        raise BundleError(f"{name}: gate_up and down in one precision are needed, the manifest names {listed}.")
    return tuple(by_name[one] for one in wanted)


def _expert_of(name: str) -> tuple[int, int] | None:
    parts = name.split(".")
    return (int(parts[1]), int(parts[3])) if len(parts) == 4 else None


def _file_of(name: str) -> str:
    expert = _expert_of(name)
    return DENSE_NAME if expert is None else f"layer-{expert[0]:03d}.bin"


# --- opening -------------------------------------------------------------------------------------------


def _is_stale(place: Path, digest: str) -> bool:
    """Return whether there is no store, or one of other weights."""
    if not place.is_dir():
        return True
    return bool(_index(place)["weights"] != digest)


def _index(place: Path) -> dict[str, Any]:
    path = place / INDEX_NAME
    try:
        document = json.loads(path.read_bytes())
        body, seal = document["body"], document["sha256"]
        if seal != _seal(body) or body["version"] != _VERSION:
            raise BundleError(f"{path}: changed after it was written, or of another version. {_REBUILD}")
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}. {_REBUILD}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: no index of packed weights ({error}). {_REBUILD}") from None
    known: dict[str, Any] = body
    return known


def _seal(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _opened(place: Path, units: Mapping[str, Unit], digest: str) -> PackedStore:
    index = _index(place)
    if index["weights"] != digest:
        raise BundleError(f"{place}: packed from other weights than the manifest names. {_REBUILD}")
    records = {
        name: Record(name, place / file, offset, size_bytes, sha256)
        for name, file, offset, size_bytes, sha256 in index["records"]
    }
    faults = [
        f"{name} has {held} bytes, these kernels need {unit.size_bytes}"
        for name, unit in units.items()
        if (held := records[name].size_bytes if name in records else 0) != unit.size_bytes
    ]
    faults += _file_faults(records.values())
    if faults:
        raise BundleError(f"{place} is damaged: {'; '.join(faults[:5])}. {_REBUILD}")
    experts = {
        key: Expert(records[name], unit.pieces[0].matrix.precision)
        for name, unit in units.items()
        if (key := _expert_of(name)) is not None
    }
    dense = tuple((records[name], unit) for name, unit in units.items() if _expert_of(name) is None)
    return PackedStore(place, _sizes(experts, units), experts, dense)


def _file_faults(records: Any) -> list[str]:
    ends: dict[Path, int] = {}
    for record in records:
        ends[record.file] = max(ends.get(record.file, 0), record.offset + record.size_bytes)
    faults = []
    for file, end in ends.items():
        try:
            size_bytes = file.stat().st_size
        except OSError as error:
            faults.append(f"{file.name}: {error.strerror}")
            continue
        if size_bytes != end:
            faults.append(f"{file.name} has {size_bytes} bytes, its index says {end}")
    return faults


def _sizes(experts: Mapping[tuple[int, int], Expert], units: Mapping[str, Unit]) -> NDArray[np.int64]:
    layers = 1 + max((int(name.split(".")[1]) for name in units if name.startswith("layers.")), default=-1)
    count = 1 + max((expert for _, expert in experts), default=-1)
    sizes = np.zeros((layers, count), dtype=np.int64)
    for (layer, expert), known in experts.items():
        sizes[layer, expert] = known.record.size_bytes
    return sizes


# --- the bundle's own files ----------------------------------------------------------------------------


def _check_raw(folder: Path, place: Path, manifest: DecoderManifest) -> None:
    """Refuse a bundle whose weight files changed since they were packed, though the packed ones may be whole.

    A file with the size and time of change that it had then is not read again; another one is hashed.

    Raises:
        BundleError: A file is missing, or is not what the manifest says.
    """
    entries = _weight_files(manifest)
    try:
        stamps = json.loads((place / STAMPS_NAME).read_bytes())
    except (OSError, ValueError):
        stamps = {}
    fresh = {entry.path: _stamp(folder, entry) for entry in entries}
    if not isinstance(stamps, dict) or fresh == stamps:
        if fresh == stamps:
            return
        stamps = {}
    for entry in entries:
        if stamps.get(entry.path) != fresh[entry.path]:
            _checked_raw(folder, entry)
    with suppress(EdgeflexError):  # a bundle on a read-only disk is hashed each time
        write_atomic(place / STAMPS_NAME, json.dumps(fresh))


def _weight_files(manifest: DecoderManifest) -> tuple[FileEntry, ...]:
    needed = {one.file for one in manifest.matrices}
    entries = tuple(entry for entry in manifest.files if entry.path in needed)
    unnamed = sorted(needed - {entry.path for entry in entries})
    if unnamed:
        raise BundleError(f"the manifest has matrices in {unnamed[0]!r}, which it does not list. {_REEXPORT}")
    return entries


def _raw_path(folder: Path, entry: FileEntry) -> Path:
    path = folder / entry.path
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        inside = False
    if not inside:
        raise BundleError(f"{entry.path!r} lies outside the bundle {str(folder)!r}. {_REEXPORT}")
    return path


def _stamp(folder: Path, entry: FileEntry) -> list[int]:
    """Return size and time of change of a file, refusing a wrong size."""
    path = folder / entry.path
    try:
        found = path.stat()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}. {_REEXPORT}") from None
    if found.st_size != entry.size_bytes:
        raise BundleError(f"{path}: {found.st_size} bytes, the manifest says {entry.size_bytes}. {_REEXPORT}")
    return [found.st_size, found.st_mtime_ns]


def _checked_raw(folder: Path, entry: FileEntry) -> Path:
    path = _raw_path(folder, entry)
    _stamp(folder, entry)
    try:
        matches = sha256_file(path) == entry.sha256
    except OSError as error:
        raise DeviceError(f"{path}: reading failed: {error.strerror}. Check the disk.") from None
    if not matches:
        raise BundleError(f"{path}: the content differs from the manifest's SHA-256. {_REEXPORT}")
    return path


# --- building ------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the bundle's lock; a process that ends in any way gives it back."""
    try:
        import fcntl
    except ImportError:  # no such locks here; the last rename wins, and all write the same
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise explain_os_error(error, folder) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _build(
    folder: Path,
    place: Path,
    manifest: DecoderManifest,
    units: Mapping[str, Unit],
    packer: Packer,
    digest: str,
    progress: Progress,
) -> None:
    """Pack everything into a folder beside ``place`` and put it there; on any failure nothing is left."""
    for left in folder.glob(".packed-*.partial"):  # of killed runs; the lock says that nobody is writing there
        shutil.rmtree(left, ignore_errors=True)
    _refuse_full_disk(folder, sum(unit.size_bytes for unit in units.values()))
    staging = folder / f".{place.name}.{os.getpid()}.partial"
    try:
        staging.mkdir()
        with progress.task("pack weights for this processor", len(units)) as advance:
            records = _pack_units(folder, staging, manifest, units, packer, advance)
        stamps = {entry.path: _stamp(folder, entry) for entry in _weight_files(manifest)}
        body = {"version": _VERSION, "weights": digest, "records": records}
        write_atomic(staging / STAMPS_NAME, json.dumps(stamps))
        write_atomic(staging / INDEX_NAME, json.dumps({"body": body, "sha256": _seal(body)}))
        shutil.rmtree(place, ignore_errors=True)  # of other weights
        staging.replace(place)
    except OSError as error:
        raise explain_os_error(error, place) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.debug("packed %d units into %s", len(units), place)


def _refuse_full_disk(folder: Path, needed_bytes: int) -> None:
    with suppress(OSError):
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < needed_bytes:
            raise DeviceError(
                f"{folder}: packing the weights needs {format_bytes(needed_bytes)}, and {format_bytes(free_bytes)} are "
                "free. Free some space, or move the bundle to a larger disk."
            )


def _pack_units(
    folder: Path,
    staging: Path,
    manifest: DecoderManifest,
    units: Mapping[str, Unit],
    packer: Packer,
    advance: Any,
) -> list[tuple[str, str, int, int, str]]:
    """Write every unit; return (name, file, offset, bytes, SHA-256) of each."""
    raw = _RawFiles(folder, {entry.path: entry for entry in _weight_files(manifest)})
    by_file: dict[str, list[Unit]] = {}
    for unit in units.values():
        by_file.setdefault(_file_of(unit.name), []).append(unit)
    records = []
    for file, members in by_file.items():
        offset = 0
        with (staging / file).open("wb") as out:
            for unit in members:
                records.append((unit.name, file, offset, unit.size_bytes, _write_unit(out, unit, raw, packer)))
                offset += unit.size_bytes
                advance(1)
            _leave_cache(out)
    return records


class _RawFiles:
    """The bundle's weight files, each hashed before its first use; the last one stays mapped."""

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        self._folder = folder
        self._entries = entries
        self._name = ""
        self._bytes: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._checked: set[str] = set()

    def slice(self, matrix: MatrixRecord, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """Return so many bytes of a matrix's file."""
        if matrix.file != self._name:
            self._bytes = self._map(matrix.file)
            self._name = matrix.file
        found = self._bytes[offset : offset + size_bytes]
        if offset < 0 or found.size != size_bytes:
            raise BundleError(
                f"{matrix.name}: bytes {offset} to {offset + size_bytes} lie outside {matrix.file} "
                f"({self._bytes.size} bytes). {_REEXPORT}"
            )
        return found

    def _map(self, name: str) -> NDArray[np.uint8]:
        entry = self._entries[name]
        path = _raw_path(self._folder, entry) if name in self._checked else _checked_raw(self._folder, entry)
        self._checked.add(name)
        if not entry.size_bytes:
            return np.empty(0, dtype=np.uint8)
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def _write_unit(out: BinaryIO, unit: Unit, raw: _RawFiles, packer: Packer) -> str:
    digest = hashlib.sha256()
    written = 0
    for piece in unit.pieces:
        for offset, data in _piece_bytes(piece, raw, packer):
            gap = bytes(offset - written)
            for part in (gap, data):
                digest.update(part)
                out.write(part)
            written = offset + len(data)
    rest = bytes(unit.size_bytes - written)
    digest.update(rest)
    out.write(rest)
    return digest.hexdigest()


def _piece_bytes(piece: Piece, raw: _RawFiles, packer: Packer) -> Iterator[tuple[int, Any]]:
    """Yield (offset within the record, bytes) of a piece."""
    matrix = piece.matrix
    codes = raw.slice(matrix, matrix.offset, matrix.weights_bytes)
    scales = None
    if matrix.scales_bytes:
        if matrix.scales_offset is None:
            raise BundleError(f"{matrix.name}: {matrix.precision.value} without scales. {_REEXPORT}")
        scales = raw.slice(matrix, matrix.scales_offset, matrix.scales_bytes)
    if piece.packed:
        packed = np.zeros(piece.size_bytes, dtype=np.uint8)
        packer.pack(matrix.precision, matrix.rows, matrix.columns, codes, scales, packed)
        yield piece.offset, packed.data
        return
    yield piece.offset, codes.data
    if scales is not None:
        yield piece.offset + _aligned(matrix.weights_bytes, ALIGNMENT), scales.data


def raw_parts(piece: Piece, data: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Return codes and scales of a piece that is not packed, as views of its bytes ``data``."""
    matrix = piece.matrix
    codes = data[: matrix.weights_bytes]
    if not matrix.scales_bytes:
        return codes, None
    start = _aligned(matrix.weights_bytes, ALIGNMENT)
    return codes, data[start : start + matrix.scales_bytes]


def _leave_cache(out: BinaryIO) -> None:
    """Bring a file to the disk and out of the page cache, which is not ours to fill."""
    out.flush()
    os.fsync(out.fileno())
    with suppress(AttributeError, OSError):
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_kernel_id(kernel_id: str) -> str:
    """Return ``kernel_id`` if it can be part of a folder's name.

    Raises:
        InputError: It cannot.
    """
    if not kernel_id or not all(letter.isalnum() or letter in "-_." for letter in kernel_id):
        raise InputError(f"kernel id {kernel_id!r} cannot name a folder. Please report this.")
    return kernel_id
