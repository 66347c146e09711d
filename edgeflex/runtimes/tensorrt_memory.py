"""A decoder's memory on a device that TensorRT drives: weights that stay, keys and values, experts, and seconds.

Addresses are plain integers. All work is queued on one stream; only copies of experts to a device with memory of its
own have another, so that they run beside the computing.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex.errors import BundleError, DeviceError
from edgeflex.runtimes.cuda_driver import host_view
from edgeflex.runtimes.onnx_stages import past_rows
from edgeflex.runtimes.raw_store import EMBEDDING
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.runtimes.cuda_driver import CudaContext
    from edgeflex.schema import FileEntry
    from edgeflex.schema_moe import DecoderGraph, DecoderManifest, MatrixRecord

    Key = tuple[int, int]

FLOAT_BYTES = 4
_ALIGNMENT = 256  # of what is handed to TensorRT
_STEP_BYTES = 4 << 20  # of a file on its way to the device
_REMEDY = "Copy the bundle again, or export it again with `edgeflex export`."


class Region(NamedTuple):
    """Bytes on the device."""

    address: int
    size_bytes: int


def aligned(size_bytes: int) -> int:
    """Return ``size_bytes`` rounded up so that what follows may be handed to TensorRT."""
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


# --- weights that stay ---------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Codes or scales of a matrix: where they lie in a file, and where on the device."""

    name: str
    offset: int
    region: Region


def pieces_of(record: MatrixRecord) -> list[tuple[str, int, int]]:
    """Return name, offset in its file and bytes of a matrix's codes, and of its scales where it has some."""
    found = [(record.name, record.offset, record.weights_bytes)]
    if record.scales_offset is not None:
        found.append((f"{record.name}_scales", record.scales_offset, record.scales_bytes))
    return found


def upload_dense(cuda: CudaContext, stream: int, folder: Path, manifest: DecoderManifest) -> dict[str, Region]:
    """Bring all weights outside experts to the device, as they lie in their files, and return where each piece is.

    Files are read once, some megabytes at a time, and hashed on the way. The embedding stays with the host.

    Args:
        cuda: The device's context.
        stream: Where copies are queued; they have ended when this returns.
        folder: The bundle.
        manifest: Its manifest.

    Raises:
        BundleError: A file is missing, too short or damaged.
        DeviceError: The device refused, or the disk failed.
    """
    entries = {entry.path: entry for entry in manifest.files}
    records = [one for one in manifest.matrices if ".experts." not in one.name and one.name != EMBEDDING]
    wanted = [(one.file, name, offset, size) for one in records for name, offset, size in pieces_of(one)]
    address = cuda.allocate(max(sum(aligned(size) for *_, size in wanted), _ALIGNMENT))
    by_file: dict[str, list[_Piece]] = {}
    for file, name, offset, size in wanted:
        by_file.setdefault(file, []).append(_Piece(name, offset, Region(address, size)))
        address += aligned(size)
    staging = cuda.allocate_pinned(_STEP_BYTES)
    for file, pieces in by_file.items():
        entry = entries.get(file)
        if entry is None:
            raise BundleError(f"{folder}: the manifest does not list {file!r}. {_REMEDY}")
        _upload_file(cuda, stream, staging, folder / file, entry, pieces)
    cuda.free(staging)
    return {one.name: one.region for pieces in by_file.values() for one in pieces}


def _upload_file(
    cuda: CudaContext, stream: int, staging: int, path: Path, entry: FileEntry, pieces: Sequence[_Piece]
) -> None:
    buffer = host_view(staging, (_STEP_BYTES,), np.uint8)
    digest, start = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer.data) or 0:
                digest.update(buffer[:size].data)
                for piece in pieces:
                    _upload_part(cuda, stream, staging, (start, start + size), piece)
                cuda.synchronize(stream)  # the buffer is written again
                start += size
            with suppress(AttributeError, OSError):  # not on every system; only spares memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}. {_REMEDY}") from None
    if digest.hexdigest() != entry.sha256:
        raise BundleError(f"{path}: the content differs from the manifest's SHA-256. {_REMEDY}")


def _upload_part(cuda: CudaContext, stream: int, staging: int, held: tuple[int, int], piece: _Piece) -> None:
    """Copy what of a piece lies in the bytes ``held`` of its file, which begin at ``staging``."""
    first = max(held[0], piece.offset)
    last = min(held[1], piece.offset + piece.region.size_bytes)
    if first < last:
        cuda.upload(piece.region.address + first - piece.offset, staging + first - held[0], last - first, stream)


# --- keys and values -----------------------------------------------------------------------------------


class DeviceKeyValues:
    """Keys and values of all layers on the device; what ``onnx_stages.KeyValues`` is on the host.

    Attention takes a contiguous ``[heads, rows, dim]``, whose rows are a power of two that depends on the position
    alone. Where they become more or fewer, each head's rows move by way of a buffer, since places would overlap. All
    numbers are finite always, also those that attention masks out.

    Args:
        cuda: The device's context.
        stream: Where copies are queued.
        graph: The decoder.
        context_tokens: Most rows.
    """

    def __init__(self, cuda: CudaContext, stream: int, graph: DecoderGraph, context_tokens: int) -> None:
        attention, layers = graph.attention, len(graph.layers)
        self._cuda = cuda
        self._stream = stream
        self._heads = attention.kv_heads
        self._dims = (attention.head_dim, attention.value_dim)
        self._context_tokens = context_tokens
        sizes = [self._heads * context_tokens * dim * FLOAT_BYTES for dim in self._dims]
        self._places = [(cuda.allocate(sizes[0]), cuda.allocate(sizes[1])) for _ in range(layers)]
        self._rows = [0] * layers
        self._between = cuda.allocate(max(sizes))
        for pair in self._places:
            for address, size in zip(pair, sizes, strict=True):
                cuda.fill_zeros(address, size, stream)

    def places(self, layer: int) -> tuple[int, int]:
        """Return where a layer's keys and values lie; they never move as a whole."""
        return self._places[layer]

    def past(self, layer: int, position: int) -> int:
        """Return how many rows attention is handed, of which the first ``position`` are the past."""
        return self._arrange(layer, position)

    def write(self, layer: int, position: int, tokens: int, new: tuple[int, int]) -> None:
        """Queue the copy of new keys and values ``[heads, tokens, dim]`` to ``position``."""
        rows = self._arrange(layer, position + tokens)
        for address, source, dim in zip(self._places[layer], new, self._dims, strict=True):
            row_bytes = dim * FLOAT_BYTES
            width = tokens * row_bytes
            target = (address + position * row_bytes, rows * row_bytes)
            self._cuda.copy_rows(target, (source, width), width, self._heads, self._stream)

    def clear(self, position: int) -> None:
        """Queue zeros for everything from ``position`` on."""
        for layer, pair in enumerate(self._places):
            rows = self._arrange(layer, position)
            for address, dim in zip(pair, self._dims, strict=True):
                row_bytes = dim * FLOAT_BYTES
                heads = [address + head * rows * row_bytes for head in range(self._heads)]
                ends = [*heads[1:], address + self._heads * self._context_tokens * row_bytes]
                for start, end in zip(heads, ends, strict=True):
                    first = start + position * row_bytes
                    if first < end:
                        self._cuda.fill_zeros(first, end - first, self._stream)

    def _arrange(self, layer: int, filled: int) -> int:
        """Give each head as many rows as ``filled`` of them ask for, and return how many."""
        before, rows = self._rows[layer], past_rows(filled, self._context_tokens)
        if before and rows != before and self._heads > 1:
            for address, dim in zip(self._places[layer], self._dims, strict=True):
                row_bytes = dim * FLOAT_BYTES
                kept = min(before, rows) * row_bytes
                between = (self._between, kept)
                self._cuda.copy_rows(between, (address, before * row_bytes), kept, self._heads, self._stream)
                self._cuda.copy_rows((address, rows * row_bytes), between, kept, self._heads, self._stream)
        self._rows[layer] = rows
        return rows


# --- experts -------------------------------------------------------------------------------------------


class ExpertArena:
    """Memory for experts: pages that readers fill, and where the device finds them.

    A device that shares the machine's memory computes from these pages themselves. One with memory of its own has a
    second arena there, as large, and each expert is copied to the same offset when it is bound.

    Args:
        cuda: The device's context.
        stream: Where experts are computed.
        integrated: The device shares the machine's memory.
    """

    def __init__(self, cuda: CudaContext, stream: int, *, integrated: bool) -> None:
        self._cuda = cuda
        self._stream = stream
        self._copies = 0 if integrated else cuda.new_stream()
        self._integrated = integrated
        self._pages = 0
        self._host = 0
        self._device = 0
        self._landing: dict[Key, int] = {}  # copies that computing does not wait for yet
        self._events: list[int] = []
        self._used: set[Key] = set()  # what computing that was queued may still read
        self.uncounted_bytes = 0

    def take(self, capacity_bytes: int) -> NDArray[np.uint8]:
        """Return pages for experts; an earlier arena is given up, and nothing of it may be used any more.

        Raises:
            DeviceError: No memory, or the device failed.
        """
        self.wait()
        self._events.extend(self._landing.values())
        self._landing.clear()
        for address in (self._device, self._pages):
            self._cuda.free(address)
        self._device = self._pages = self.uncounted_bytes = 0
        pages = self._cuda.host_pages(capacity_bytes)
        self._pages, self._host = pages.address, pages.data.ctypes.data
        self.uncounted_bytes = 0 if pages.counted else capacity_bytes
        if not self._integrated:
            try:
                self._device = self._cuda.allocate(max(capacity_bytes, 1))
            except DeviceError as error:
                raise DeviceError(
                    f"the device gives no {format_bytes(capacity_bytes)} for experts: {error} Or give a smaller cache."
                ) from None
        return pages.data

    def place(self, key: Key, offset: int, size_bytes: int) -> int:
        """Return where the device finds the expert at ``offset``; where it needs a copy, that is begun."""
        if self._integrated:
            return self._pages + offset
        event = self._landing.pop(key, 0) or (self._events.pop() if self._events else self._cuda.new_event())
        self._cuda.upload(self._device + offset, self._host + offset, size_bytes, self._copies)
        self._cuda.record(event, self._copies)
        self._landing[key] = event
        return self._device + offset

    def use(self, key: Key) -> None:
        """Let computing that is queued from now on wait for an expert's copy."""
        event = self._landing.pop(key, None)
        if event is not None:
            self._cuda.order_after(event, self._stream)
            self._events.append(event)
        self._used.add(key)

    def wait(self) -> None:
        """Wait until nothing is under way, neither computing nor copies."""
        self._cuda.synchronize(self._stream)
        if self._copies:
            self._cuda.synchronize(self._copies)
        self._used.clear()

    def settled(self) -> None:
        """Say that all computing has ended."""
        self._used.clear()

    def release(self, key: Key) -> None:
        """Wait until nothing reads an expert's bytes any more, on the host or on the device."""
        event = self._landing.pop(key, None)
        if event is not None:
            self._cuda.wait_for(event)
            self._events.append(event)
        if key in self._used:
            self._cuda.synchronize(self._stream)
            self._used.clear()


# --- seconds -------------------------------------------------------------------------------------------


class DeviceClock:
    """The device's own seconds of what is queued, by place.

    Args:
        cuda: The device's context.
        stream: Whose work is timed.
        places: How many places there are.
    """

    def __init__(self, cuda: CudaContext, stream: int, places: int) -> None:
        self._cuda = cuda
        self._stream = stream
        self._seconds = [0.0] * places
        self._open: tuple[int, int] | None = None  # place, and the event with which it began
        self._spans: list[tuple[int, int, int]] = []
        self._idle: list[int] = []

    def switch(self, place: int | None) -> None:
        """Count what is queued from now on for ``place``, or for none."""
        if (None if self._open is None else self._open[0]) == place:
            return
        now = self._idle.pop() if self._idle else self._cuda.new_event(timing=True)
        self._cuda.record(now, self._stream)
        if self._open is not None:
            self._spans.append((*self._open, now))
        self._open = None if place is None else (place, now)

    def collect(self) -> None:
        """Read the events of all that has ended; call it when nothing is under way."""
        for place, start, end in self._spans:
            self._seconds[place] += self._cuda.elapsed_s(start, end)
        used = {event for _, start, end in self._spans for event in (start, end)}
        used.discard(0 if self._open is None else self._open[1])
        self._idle.extend(used)
        self._spans.clear()

    def take(self) -> list[float]:
        """Return the seconds since the last call."""
        taken, self._seconds = self._seconds, [0.0] * len(self._seconds)
        return taken


class Staging:
    """Pinned memory by name, where numbers wait on their way to the device or back.

    Args:
        cuda: The device's context.
        arrays: Shape and type by name.

    Raises:
        DeviceError: No memory.
    """

    def __init__(self, cuda: CudaContext, arrays: Mapping[str, tuple[int, type[np.generic]]]) -> None:
        sizes = {name: aligned(count * np.dtype(kind).itemsize) for name, (count, kind) in arrays.items()}
        address = cuda.allocate_pinned(max(sum(sizes.values()), _ALIGNMENT))
        self.arrays: dict[str, NDArray[np.generic]] = {}
        self._addresses: dict[str, int] = {}
        for name, (count, kind) in arrays.items():
            self.arrays[name] = host_view(address, (count,), kind)
            self._addresses[name] = address
            address += sizes[name]

    def up(self, cuda: CudaContext, stream: int, name: str, values: NDArray[np.generic], target: int) -> None:
        """Queue the way of ``values`` to the device; nothing of this name may be on its way already."""
        flat = values.reshape(-1)
        self.arrays[name][: flat.size] = flat
        cuda.upload(target, self._addresses[name], flat.nbytes, stream)

    def down(self, cuda: CudaContext, stream: int, name: str, count: int, source: int) -> None:
        """Queue the way of ``count`` numbers from the device; they are in ``arrays`` once that was waited for."""
        held = self.arrays[name]
        cuda.download(self._addresses[name], source, count * held.itemsize, stream)
