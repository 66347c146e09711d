"""From raw samples to ``RunStats``, with the clock and the memory reading handed in; and that reading itself.

The bytes that a model adds are counted by the C library's own books (``mallinfo2``), since resident pages move
with page rounding, touched-once buffers and lazily read code. Where there are no such books, anonymous resident
bytes stand in.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.progress import Silent
from edgeflex.registry import runtime_of
from edgeflex.runtimes import open_session
from edgeflex.schema import Conditions, RequestStats, RunStats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgeflex.bundle import Bundle
    from edgeflex.images import ImageFolder
    from edgeflex.progress import Progress
    from edgeflex.runtimes import Session
    from edgeflex.runtimes.loop import Outcome

_PROC = Path("/proc/self")
_BATCH = 64


@dataclass(frozen=True)
class MemoryReading:
    """What this process holds now.

    Attributes:
        allocated_bytes: Bytes handed out by the C library and not given back; None where it does not tell.
        anonymous_bytes: Resident bytes that no file backs.
        resident_bytes: All resident bytes.
        peak_resident_bytes: The most that was ever resident; None where the system does not tell.
    """

    allocated_bytes: int | None
    anonymous_bytes: int
    resident_bytes: int
    peak_resident_bytes: int | None

    def above(self, base: MemoryReading) -> int:
        """Return the bytes added since ``base``: allocated ones where known, else anonymous ones."""
        if self.allocated_bytes is not None and base.allocated_bytes is not None:
            return max(0, self.allocated_bytes - base.allocated_bytes)
        return max(0, self.anonymous_bytes - base.anonymous_bytes)


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later (malloc.h)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def memory_now() -> MemoryReading:
    """Return what this process holds, after freed pages were given back to the system.

    Raises:
        DeviceError: The system tells nothing about this process's memory.
    """
    allocated_bytes = _allocated_bytes()
    try:
        rollup = _kib_fields(_PROC / "smaps_rollup")
        status = _kib_fields(_PROC / "status")
        return MemoryReading(allocated_bytes, rollup["Anonymous"], rollup["Rss"], status["VmHWM"])
    except (OSError, KeyError):
        return _memory_from_psutil(allocated_bytes)


def reset_peak() -> bool:
    """Start ``peak_resident_bytes`` anew; return whether the system allows it (proc(5), clear_refs).

    Freed pages are given back first: what was freed before is no part of the peak that starts here.
    """
    _give_freed_pages_back()
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _give_freed_pages_back() -> None:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _allocated_bytes() -> int | None:
    _give_freed_pages_back()
    try:
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _Mallinfo2
        books = libc.mallinfo2()
    except (AttributeError, OSError):
        return None
    return int(books.uordblks + books.hblkhd)


def _kib_fields(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def _memory_from_psutil(allocated_bytes: int | None) -> MemoryReading:
    import psutil

    try:
        full = psutil.Process().memory_full_info()
    except psutil.Error as error:
        raise DeviceError(f"this process's memory cannot be read: {error}. Measure on a system with /proc.") from None
    return MemoryReading(allocated_bytes, int(full.uss), int(full.rss), None)


class Recorder:
    """Answers inputs through a session and keeps every raw sample.

    Make it before the session is entered: what it finds then is the runtime's own memory.
    """

    def __init__(
        self,
        session: Session,
        thresholds: Sequence[float | None],
        *,
        clock: Callable[[], float] = time.perf_counter,
        memory: Callable[[], MemoryReading] = memory_now,
    ) -> None:
        self._session = session
        self._thresholds = tuple(thresholds)
        self._clock = clock
        self._memory = memory
        self._base = memory()
        self._held: MemoryReading | None = None
        self._requests: list[RequestStats] = []

    def warm(self, x: NDArray[np.float32]) -> None:
        """Run every segment once, unrecorded, and read the memory that the model now holds.

        Raises:
            InputError: The shape of ``x`` is wrong.
            DeviceError: The backend failed.
        """
        self._session.infer(x, (None,) * self._session.segment_count)
        self._held = self._memory()

    def infer(self, name: str, x: NDArray[np.float32], label: int | None = None) -> Outcome:
        """Answer one input and record it.

        Args:
            name: What the input is called in the record.
            x: ``[1, C, H, W]``.
            label: The right class, where known.

        Raises:
            InputError: The shape is wrong.
            DeviceError: The backend failed.
        """
        start = self._clock()
        outcome = self._session.infer(x, self._thresholds)
        latency_s = self._clock() - start
        self._requests.append(
            RequestStats(
                input=name,
                exit=outcome.exit,
                prediction=int(outcome.probabilities.argmax()),
                confidence=outcome.confidence,
                latency_s=latency_s,
                label=label,
            )
        )
        return outcome

    def stats(
        self,
        *,
        manifest_digest: str,
        runtime: str,
        device: str,
        threads: int,
        before: Conditions | None = None,
        after: Conditions | None = None,
    ) -> RunStats:
        """Return the record so far; call it while the session is open.

        ``peak_memory_bytes`` is what was added between the making of this recorder and ``warm`` (or now, if it
        was not called), ``runtime_memory_bytes`` the anonymous bytes that were there before.
        """
        held = self._held or self._memory()
        return RunStats(
            manifest_digest=manifest_digest,
            runtime=runtime,
            device=device,
            threads=threads,
            requests=tuple(self._requests),
            load_s=self._session.load_s,
            peak_memory_bytes=held.above(self._base),
            runtime_memory_bytes=self._base.anonymous_bytes,
            before=before or Conditions(),
            after=after or Conditions(),
        )


def run_images(
    bundle: Bundle,
    images: ImageFolder,
    *,
    runtime: str | None = None,
    threads: int = 1,
    limit: int | None = None,
    device: str = "this machine",
    conditions: Callable[[], Conditions] = Conditions,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> RunStats:
    """Answer the images of a folder one by one with the plan's thresholds, and return the raw samples.

    Args:
        bundle: A checked bundle.
        images: In their order; a folder whose class the network does not know gives images without label.
        runtime: What runs the bundle; that of its backend by default.
        threads: Threads of the pool.
        limit: At most so many images, from the start.
        device: What the machine is called in the record.
        conditions: Reads the machine's state, before and after.
        clock: Seconds, rising.
        progress: Told about images.

    Raises:
        InputError: ``limit`` is below 1, the runtime is unknown, or images are corrupt.
        BundleError: The manifest does not say how images are prepared.
        DeviceError: The backend failed.
    """
    manifest = bundle.manifest
    preprocessing = manifest.graph.preprocessing
    if preprocessing is None:
        raise BundleError("the manifest does not say how images are prepared. Export the bundle again.")
    if limit is not None and limit < 1:
        raise InputError(f"at most {limit} images: at least 1 is needed.")
    count = min(len(images.items), limit or len(images.items))
    numbers = {name: number for number, name in enumerate(manifest.graph.classes or images.classes)}
    before = conditions()
    zeros = np.zeros(manifest.segments[0].input_shape, dtype=np.float32)
    session = open_session(bundle, runtime, threads)
    gc.collect()  # garbage that is freed while the model loads would hide as many of its bytes
    recorder = Recorder(session, manifest.plan.thresholds, clock=clock)
    with session, (progress or Silent()).task("run", count) as advance:
        recorder.warm(zeros)
        for start in range(0, count, _BATCH):
            batch = range(start, min(start + _BATCH, count))
            x = images.load(batch, preprocessing)
            for row, index in enumerate(batch):
                item = images.items[index]
                recorder.infer(item.path, x[row : row + 1], numbers.get(images.classes[item.label]))
            advance(len(batch))
        return recorder.stats(
            manifest_digest=manifest.digest(),
            runtime=runtime or runtime_of(manifest.backend),
            device=device,
            threads=threads,
            before=before,
            after=conditions(),
        )
