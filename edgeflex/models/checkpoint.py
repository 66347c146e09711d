"""Safetensors checkpoints, of one file or many, read by offset into float32.

Opening reads headers only; afterwards exactly the bytes that are asked for are read, in blocks, so that a
checkpoint of any size needs the memory of one tensor. No torch: bfloat16 is the upper half of a float32.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflex.errors import InputError
from edgeflex.files import explain_os_error, read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMED_FAULTS = 4

_RAW: Mapping[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
# The format's own limit, so that a damaged length does not ask for all memory.
_MOST_HEADER_BYTES = 100_000_000
# Small enough to be converted and checked in the CPU's cache.
_BLOCK_VALUES = 1 << 18
_PROBES = 256
_PROBE_BYTES = 4096


@dataclass(frozen=True)
class Shard:
    """One file: ``data`` is where its numbers begin, ``state`` its size and time when its header was read."""

    path: Path
    data: int
    state: tuple[int, int]
    header_digest: str


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: ``offset`` in bytes from the start of its shard's file."""

    shard: Shard
    dtype: str
    shape: tuple[int, ...]
    offset: int


def named(what: str, found: Sequence[str]) -> list[str]:
    """Return a fault that names the first few of ``found``, or none when there is nothing."""
    if not found:
        return []
    more = f" and {len(found) - NAMED_FAULTS} more" if len(found) > NAMED_FAULTS else ""
    return [f"{what}: {', '.join(found[:NAMED_FAULTS])}{more}"]


def read_json_object(raw: bytes, source: str) -> dict[str, object]:
    """Return the JSON object in ``raw``.

    Raises:
        InputError: It is not JSON, or not an object.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not valid JSON ({error}). It is damaged; fetch it again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{source} holds a JSON {type(value).__name__}, and an object is needed.")
    return value


class Checkpoint:
    """The tensors of a folder's safetensors files.

    Attributes:
        folder: Where it lies.
        tensors: Every tensor by name.
        shards: The files, in the order of their names.
        data_bytes_read: Bytes of numbers read so far; 0 after opening, since headers are not numbers.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], tensors: Mapping[str, TensorPlace]) -> None:
        self.folder = folder
        self.shards = tuple(shards)
        self.tensors = tensors
        self.data_bytes_read = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(shard.state[0] for shard in self.shards)

    def read_into(self, name: str, start: int, out: NDArray[np.float32]) -> None:
        """Fill ``out`` (flat) with the values of tensor ``name`` from flat position ``start`` on.

        Raises:
            InputError: The file changed since it was opened, cannot be read, or holds NaN or infinity here.
        """
        place = self.tensors[name]
        raw = _RAW[place.dtype]
        with _open(place.shard) as file:
            for first in range(0, len(out), _BLOCK_VALUES):
                block = out[first : first + _BLOCK_VALUES]
                _read_block(file, place, place.offset + (start + first) * raw.itemsize, block)
                if not np.isfinite(block).all():
                    raise InputError(
                        f"tensor {name!r} in {str(place.shard.path)!r} holds NaN or infinite values; "
                        "the checkpoint is damaged or its training failed. Use another."
                    )
        self.data_bytes_read += len(out) * raw.itemsize

    def fingerprint(self, *, sampled: bool) -> str:
        """Return an identity that costs next to nothing.

        It covers the name, size and header of every file and, where ``sampled``, 256 pages of 4 KiB evenly spaced
        over all numbers (everything in a checkpoint below 1 MiB). Without samples two trainings of one architecture
        have the same identity; with them a change of a few tensors can still go unseen. ``content_digest`` sees all.
        """
        digest = hashlib.sha256(b"sampled\n" if sampled else b"headers\n")
        for shard in self.shards:
            digest.update(f"{shard.path.name}\n{shard.state[0]}\n{shard.header_digest}\n".encode())
        if sampled:
            for shard, offset, size in self._probes():
                with _open(shard) as file:
                    page = bytearray(size)
                    _fill(file, shard, offset, memoryview(page))
                self.data_bytes_read += size
                digest.update(page)
        return digest.hexdigest()

    def content_digest(self, heard: Callable[[int], object] | None = None) -> str:
        """Return the SHA-256 over every file's name and bytes; ``heard`` is told of each block's bytes."""
        digest = hashlib.sha256()
        block = memoryview(bytearray(1 << 20))
        for shard in self.shards:
            digest.update(f"{shard.path.name}\n{shard.state[0]}\n".encode())
            with _open(shard) as file:
                for offset in range(0, shard.state[0], len(block)):
                    part = block[: min(len(block), shard.state[0] - offset)]
                    _fill(file, shard, offset, part)
                    digest.update(part)
                    if heard is not None:
                        heard(len(part))
        return digest.hexdigest()

    def _probes(self) -> Iterable[tuple[Shard, int, int]]:
        """Yield shard, offset and size of evenly spaced pages of all numbers; a page may go on in the next file."""
        total = sum(shard.state[0] - shard.data for shard in self.shards)
        each = max(1, min(_PROBES, math.ceil(total / _PROBE_BYTES)))
        starts = [total * probe // each for probe in range(each)]
        above = 0
        for shard in self.shards:
            held = shard.state[0] - shard.data
            for start in starts:
                first, last = max(start - above, 0), min(start - above + _PROBE_BYTES, held)
                if first < last:
                    yield shard, shard.data + first, last - first
            above += held


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of the safetensors files in ``folder``: ``model.safetensors``, or those in its index.

    Raises:
        InputError: No such files, an index or header that is damaged, a file that is truncated, or one that lies
            outside ``folder``; all faults at once.
    """
    expected = _expected(folder)
    roots = _roots(folder)
    faults: list[str] = []
    shards: list[Shard] = []
    tensors: dict[str, TensorPlace] = {}
    for file in sorted(expected):
        try:
            shard, found = _read_header(_contained(folder, file, roots))
        except InputError as error:
            faults.append(str(error))
            continue
        shards.append(shard)
        faults += named(f"file {file!r} repeats tensors of another file", sorted(found.keys() & tensors.keys()))
        faults += named(f"file {file!r} lacks tensors that the index promises", sorted(expected[file] - found.keys()))
        tensors.update(found)
    if faults:
        raise InputError.collect(f"checkpoint {str(folder)!r}", faults)
    return Checkpoint(folder, shards, tensors)


def _expected(folder: Path) -> dict[str, set[str]]:
    """Return the files of a checkpoint with the tensors that an index promises in each."""
    if (folder / SINGLE).exists():
        return {SINGLE: set()}
    if not (folder / INDEX).exists():
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = " It holds PyTorch pickles, which can run code: save it as safetensors." if pickles else ""
        raise InputError(f"{str(folder)!r} holds neither {SINGLE} nor {INDEX}.{hint or ' Check the folder.'}")
    index = read_json_object(read_bytes(folder / INDEX, "index"), str(folder / INDEX))
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{str(folder / INDEX)!r} has no 'weight_map' from tensors to files. Fetch it again.")
    files: dict[str, set[str]] = {}
    for tensor, file in places.items():
        files.setdefault(file, set()).add(tensor)
    return files


def _roots(folder: Path) -> tuple[Path, ...]:
    """Return where files may lie: the folder, and the blobs beside a snapshot in the Hugging Face cache."""
    real = folder.resolve()
    blobs = real.parent.parent / "blobs"
    is_snapshot = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return (real, blobs.resolve()) if is_snapshot else (real,)


def _contained(folder: Path, file: str, roots: Sequence[Path]) -> Path:
    """Return the path of ``file``, which must be a plain relative name below ``folder``."""
    relative = Path(file)
    if "\0" in file or "\\" in file or relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"index names {file!r}, which is not a plain name inside the folder; do not trust this index")
    path = folder / relative
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise InputError(f"file {file!r} is missing; fetch the checkpoint again") from None
    if not any(real.is_relative_to(root) for root in roots):
        raise InputError(f"file {file!r} is a link to {str(real)!r}, outside the folder; copy it in instead")
    if not real.is_file():
        raise InputError(f"{file!r} is not a file")
    return path


def _read_header(path: Path) -> tuple[Shard, dict[str, TensorPlace]]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            state = (size, os.fstat(file.fileno()).st_mtime_ns)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
                raise InputError(f"file {path.name!r} ({size} bytes) has no safetensors header; fetch it again")
            raw = file.read(length)
    except OSError as error:
        raise explain_os_error(error, path) from None
    shard = Shard(path, 8 + length, state, hashlib.sha256(raw).hexdigest())
    return shard, _places(read_json_object(raw, f"header of {path.name!r}"), shard)


def _places(header: Mapping[str, object], shard: Shard) -> dict[str, TensorPlace]:
    """Return the tensors of a header after checking that they fill the file exactly, without overlap."""
    held = shard.state[0] - shard.data
    spans: list[tuple[int, int]] = []
    places: dict[str, TensorPlace] = {}
    damaged: list[str] = []
    strange: list[str] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        parsed = _entry(entry)
        if parsed is None:
            damaged.append(name)
            continue
        dtype, shape, begin, end = parsed
        spans.append((begin, end))
        if dtype not in _RAW:
            strange.append(f"{name} ({dtype})")
        elif end - begin != math.prod(shape) * _RAW[dtype].itemsize:
            damaged.append(name)
        else:
            places[name] = TensorPlace(shard, dtype, shape, shard.data + begin)
    faults = [
        *named("tensors whose entry is damaged", damaged),
        *named(f"tensors in other formats than {', '.join(_RAW)}, such as quantised ones", strange),
        *_span_faults(sorted(spans), held),
    ]
    if faults:
        raise InputError(f"file {shard.path.name!r}: {'; '.join(faults)}")
    return places


def _span_faults(spans: Sequence[tuple[int, int]], held: int) -> list[str]:
    promised = max((end for _, end in spans), default=0)
    if promised != held:
        kind = "truncated" if promised > held else "damaged"
        return [f"its header promises {promised} bytes of numbers and {held} are there: it is {kind}; fetch it again"]
    reached = 0
    for begin, end in spans:
        if begin != reached:
            return [f"its tensors overlap or leave a gap at byte {begin}; fetch it again"]
        reached = end
    return []


def _entry(entry: object) -> tuple[str, tuple[int, ...], int, int] | None:
    """Return dtype, shape and span of a header's entry, or None where it is malformed."""
    if not isinstance(entry, dict):
        return None
    dtype, shape, span = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or span is None or len(span) != 2 or span[0] > span[1]:
        return None
    return dtype, shape, span[0], span[1]


def _counts(value: object) -> tuple[int, ...] | None:
    """Return a list of whole numbers from zero on, or None where it is something else."""
    if isinstance(value, list) and all(type(one) is int and one >= 0 for one in value):
        return tuple(value)
    return None


def _open(shard: Shard) -> BinaryIO:
    try:
        file = shard.path.open("rb", buffering=0)
    except OSError as error:
        raise explain_os_error(error, shard.path) from None
    now = os.fstat(file.fileno())
    if (now.st_size, now.st_mtime_ns) != shard.state:
        file.close()
        raise InputError(f"{str(shard.path)!r} was changed after it was opened. Start again when it is whole.")
    return file


def _read_block(file: BinaryIO, place: TensorPlace, offset: int, out: NDArray[np.float32]) -> None:
    """Fill ``out`` with values from ``offset`` on, converted to float32."""
    dtype = _RAW[place.dtype]
    raw = out if dtype == out.dtype else np.empty(len(out), dtype)
    _fill(file, place.shard, offset, raw.data.cast("B"))
    if place.dtype == "BF16":
        np.left_shift(raw, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    elif place.dtype == "F16":
        out[:] = raw


def _fill(file: BinaryIO, shard: Shard, offset: int, into: memoryview) -> None:
    try:
        file.seek(offset)
        done = 0
        while done < len(into):
            count = file.readinto(into[done:])  # type: ignore[attr-defined] # typeshed knows it of raw files only
            if not count:
                raise InputError(
                    f"{str(shard.path)!r} ends early at byte {offset + done}. It is truncated; fetch it again."
                )
            done += count
    except OSError as error:
        raise explain_os_error(error, shard.path) from None
