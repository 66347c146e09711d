"""Background readers: from files straight into the arena, several reads in flight, every record checked.

Where the file system takes ``O_DIRECT``, bytes go from the disk into the arena and no copy stays in the page
cache. Where it does not, the cache's copy is dropped after each record. Either way what the arena does not hold
is not in memory, so that the cache's budget is the whole truth. A fault of a read is kept and raised where the
record is waited for.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import mmap
import os
import queue
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, NamedTuple

from edgeflex.errors import BundleError, DeviceError, EdgeflexError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    OpenFile = Callable[[str, int], int]
    ReadInto = Callable[[int, Sequence[memoryview], int], int]

logger = logging.getLogger(__name__)

BLOCK_BYTES = 4096  # what O_DIRECT wants offsets, lengths and addresses to be multiples of
READERS = 4  # threads; enough for the queue of a flash disk, few enough not to take the core that computes
CHUNK_BYTES = 1 << 20
_LONG_CHUNKS = 8  # so many times longer are the parts of records that wait behind others
_MOST_OPEN = 12  # files kept open between reads; the process needs descriptors for other things
_DIRECT = getattr(os, "O_DIRECT", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_REMEDY = "Delete the folder of packed weights, it is made again; if that fails too, copy the bundle again."


class Record(NamedTuple):
    """Where the bytes of one expert (or of the dense part) lie in the packed store.

    Attributes:
        name: For messages.
        file: The file.
        offset: Bytes from its start, a multiple of 4096.
        size_bytes: Length, a multiple of 4096.
        sha256: Of these bytes.
        remedy: What to do when they are damaged.
    """

    name: str
    file: Path
    offset: int
    size_bytes: int
    sha256: str
    remedy: str = _REMEDY


def takes_direct(file: Path) -> bool:
    """Return whether ``file`` can be read past the page cache."""
    if not _DIRECT:
        return False
    try:
        fd = os.open(file, os.O_RDONLY | _DIRECT | _CLOEXEC)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            return os.preadv(fd, [block], 0) >= 0
    except OSError as error:
        if error.errno == errno.EIO:
            raise DeviceError(f"{file}: read error ({error.strerror}). Check the disk.") from None
        return False
    finally:
        os.close(fd)


class Read:
    """One record on its way. ``wait`` returns when all of it is in place and is what it should be.

    Attributes:
        begun_s: When it was asked for, by the mover's clock.
        ended_s: When the last byte of it came; 0 before.
    """

    def __init__(self, record: Record, target: memoryview, *, check: bool, parts: int) -> None:
        self.record = record
        self._target = target
        self._check = check
        self._left = parts
        self._guard = threading.Lock()
        self._landed = threading.Lock()
        self._landed.acquire()
        self._over = False
        self._fault: BaseException | None = None
        self.begun_s = self.ended_s = 0.0

    @property
    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._over or not self._landed.locked()

    def settle(self) -> None:
        """Block until nothing is written into the target any more, whatever came of it."""
        if not self._over:
            with self._landed:
                self._over = True

    def wait(self) -> None:
        """Block until the record is in place.

        Raises:
            DeviceError: The disk failed.
            BundleError: The record is shorter than it should be, or not the one that was packed.
        """
        self.settle()
        if self._fault is not None:
            raise self._fault

    def must_check(self) -> None:
        """Compare the SHA-256 of what comes, asked for or not; call it before the last part has ended."""
        self._check = True

    def _part_ended(self, fault: BaseException | None, ended_s: float) -> None:
        """Count one part; the last one checks the whole and lets the waiting go on."""
        with self._guard:
            self._fault = self._fault or fault
            self._left -= 1
            last = self._left == 0
        if not last:
            return
        self.ended_s = ended_s
        if self._fault is None and self._check:
            self._fault = _differs(self.record, self._target)
        self._landed.release()


def _differs(record: Record, found: memoryview) -> EdgeflexError | None:
    if hashlib.sha256(found).hexdigest() == record.sha256:
        return None
    return BundleError(
        f"{record.file}: {record.name} (bytes {record.offset} to {record.offset + record.size_bytes}) is not what was "
        f"packed: its SHA-256 differs. {record.remedy}"
    )


class _Files:
    """Open files, so many at most; what is being read stays open."""

    def __init__(self, opened: OpenFile, flags: int) -> None:
        self._open = opened
        self._flags = flags
        self._guard = threading.Lock()
        self._held: dict[Path, list[int]] = {}  # [descriptor, reads]; the least recently used first
        self._first: dict[Path, tuple[int, ...]] = {}  # how each file was when it was first read

    def take(self, file: Path) -> tuple[int, bool]:
        """Return a descriptor, to be given back, and whether the file is as it was when it was first read."""
        with self._guard:
            entry = self._held.pop(file, None)
            if entry is None:
                self._make_room()
                entry = [self._open(str(file), self._flags), 0]
            entry[1] += 1
            self._held[file] = entry
            found = os.fstat(entry[0])
            now = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            return entry[0], self._first.setdefault(file, now) == now

    def give(self, file: Path) -> None:
        with self._guard:
            self._held[file][1] -= 1

    def _make_room(self) -> None:
        idle = [file for file, (_, reads) in self._held.items() if not reads]
        for file in idle[: max(0, len(self._held) - _MOST_OPEN + 1)]:
            os.close(self._held.pop(file)[0])

    def close(self) -> None:
        with self._guard:
            for descriptor, _ in self._held.values():
                os.close(descriptor)
            self._held.clear()


class _Part(NamedTuple):
    read: Read
    start: int
    end: int
    target: memoryview


class Mover:
    """A few threads that read records into memory.

    Args:
        arena: Where records go; page-aligned, or ``direct`` reads fail.
        direct: Read past the page cache (ask ``takes_direct``); else what was read is dropped from it.
        readers: Threads.
        chunk_bytes: A record that no other waits before is read in parts of so many bytes, so that it keeps several
            threads busy; a multiple of 4096.
        opened: ``os.open`` or what stands for it in a test of faults.
        read_into: ``os.preadv`` or what stands for it.
        clock: Seconds, rising.

    Raises:
        InputError: No readers, or parts that are no whole blocks.
        DeviceError: The system starts no more threads.
    """

    def __init__(
        self,
        arena: NDArray[np.uint8],
        *,
        direct: bool,
        readers: int = READERS,
        chunk_bytes: int = CHUNK_BYTES,
        opened: OpenFile = os.open,
        read_into: ReadInto = os.preadv,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if readers < 1 or chunk_bytes < BLOCK_BYTES or chunk_bytes % BLOCK_BYTES:
            raise InputError(f"{readers} readers of {chunk_bytes} bytes: at least 1 reader, and multiples of 4096.")
        self.mode: Literal["direct", "buffered"] = "direct" if direct else "buffered"
        self.read_bytes = 0
        self._arena = arena.data
        self._files = _Files(opened, os.O_RDONLY | _CLOEXEC | (_DIRECT if direct else 0))
        self._read_into = read_into
        self._chunk_bytes = chunk_bytes
        self._clock = clock
        self._parts: queue.SimpleQueue[_Part | threading.Barrier | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"reader-{n}", daemon=True) for n in range(readers)]
        self._start()
        logger.debug("%d readers, %s reads, parts of %d bytes", readers, self.mode, chunk_bytes)

    def __enter__(self) -> Self:
        """Return itself; leaving closes."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def _start(self) -> None:
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self.close()
            raise DeviceError(
                f"no thread to read weights with could be started: {error}. Raise the limit on processes "
                "(`ulimit -u`, or the container's), or end other programs."
            ) from None

    def submit(self, record: Record, offset: int, *, check: bool) -> Read:
        """Start reading ``record`` to ``offset`` of the arena and return at once.

        Args:
            record: What to read.
            offset: A multiple of 4096; until the read is over, nothing else may use these bytes.
            check: Compare the SHA-256 of what came; where the file changed since its first read, that happens anyhow.
        """
        target = self._arena[offset : offset + record.size_bytes]
        # what is read next is split, to come soon; what waits behind it is read at one go, which disks do faster
        waiting = self._parts.qsize() >= len(self._threads)
        step = self._chunk_bytes * (_LONG_CHUNKS if waiting else 1)
        starts = range(0, record.size_bytes, step)
        read = Read(record, target, check=check, parts=len(starts))
        read.begun_s = self._clock()
        for start in starts:
            end = min(start + step, record.size_bytes)
            self._parts.put(_Part(read, start, end, target[start:end]))
        self.read_bytes += record.size_bytes
        return read

    def drain(self) -> None:
        """Block until nothing is written any more of what was submitted so far, waited for or not."""
        meeting = threading.Barrier(len(self._threads) + 1)
        try:
            for _ in self._threads:
                self._parts.put(meeting)
            meeting.wait()
        except BaseException:  # Ctrl-C: readers that came already would wait for ever
            meeting.abort()
            raise

    def close(self) -> None:
        """Finish what was submitted, stop the threads and close the files; a second call does nothing."""
        for _ in self._threads:
            self._parts.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._files.close()

    def _work(self) -> None:
        while (part := self._parts.get()) is not None:
            if isinstance(part, threading.Barrier):
                with suppress(threading.BrokenBarrierError):  # whoever drains was interrupted
                    part.wait()
                continue
            fault: BaseException | None = None
            try:
                self._read(part)
            except EdgeflexError as error:
                fault = error
            except OSError as error:
                fault = _system_fault(part.read.record, error)
            except BaseException as error:  # noqa: BLE001 - a bug must reach whoever waits, not end this thread
                fault = error
            part.read._part_ended(fault, self._clock())  # noqa: SLF001 - the two classes are one thing seen from two sides
            del part, fault

    def _read(self, part: _Part) -> None:
        record = part.read.record
        descriptor, unchanged = self._files.take(record.file)
        if not unchanged:
            part.read.must_check()
        try:
            _fill(part.target, lambda view, at: self._read_into(descriptor, [view], at), record, part.start)
            if self.mode == "buffered":
                with suppress(AttributeError):  # not on every system
                    os.posix_fadvise(
                        descriptor, record.offset + part.start, part.end - part.start, os.POSIX_FADV_DONTNEED
                    )
        finally:
            self._files.give(record.file)


def _fill(target: memoryview, read: Callable[[memoryview, int], int], record: Record, start: int) -> None:
    """Fill ``target`` from the record's byte ``start`` on; a read may bring less than was asked for.

    Raises:
        BundleError: The file ends before the record does.
        OSError: The disk failed.
    """
    done = 0
    while done < len(target):
        count = read(target[done:], record.offset + start + done)
        rest = len(target) - done - count
        done += count if rest == 0 else count - count % BLOCK_BYTES  # the next read must start at a block
        if count < BLOCK_BYTES and rest:
            raise BundleError(
                f"{record.file}: ends {rest} bytes before {record.name} does (bytes {record.offset} to "
                f"{record.offset + record.size_bytes}): the file is truncated. {record.remedy}"
            )


def _system_fault(record: Record, error: OSError) -> EdgeflexError:
    reason = error.strerror or str(error)
    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}:
        return BundleError(f"{record.file}: {reason}, and {record.name} should be in it. {record.remedy}")
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return DeviceError(f"{record.file}: {reason}. Raise the limit on open files (`ulimit -n`).")
    return DeviceError(f"{record.file}: reading {record.name} failed: {reason}. Check the disk and its cable or card.")
