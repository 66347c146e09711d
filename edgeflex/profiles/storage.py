"""How fast this machine reads flash: sequential and random, small and large blocks, one and many at a time.

A file of random bytes is written once and read back around the page cache (``O_DIRECT``), since an expert
that is fetched was, by definition, not in memory. Where the file system refuses ``O_DIRECT`` the cached
pages are dropped before every sample instead, and the figure says ``direct=False``.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from edgeflex import files
from edgeflex.errors import DeviceError
from edgeflex.profiles.samples import summarise
from edgeflex.progress import Progress, Silent
from edgeflex.schema import StorageRead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Pattern = Literal["sequential", "random"]

_KIB, _MIB = 1 << 10, 1 << 20
_QUEUE_DEPTHS = (1, 8)
_METHOD = "preadv of a {size} MiB file of random bytes in {samples} windows of {window} s, queue depth as threads"


@dataclass(frozen=True)
class _Effort:
    file_bytes: int
    blocks: tuple[int, ...]
    samples: int
    window_s: float


_FULL = _Effort(256 * _MIB, (4 * _KIB, 16 * _KIB, 64 * _KIB, 256 * _KIB, _MIB, 8 * _MIB), 5, 0.2)
_QUICK = _Effort(64 * _MIB, (4 * _KIB, _MIB), 3, 0.1)


@dataclass(frozen=True)
class _Case:
    pattern: Pattern
    block_bytes: int
    queue_depth: int
    seed: int

    def offsets(self, size_bytes: int) -> list[int]:
        found = list(range(0, size_bytes, self.block_bytes))
        if self.pattern == "random":
            random.Random(self.seed).shuffle(found)  # noqa: S311 - an order, not a secret
        return found


@dataclass(frozen=True)
class _TestFile:
    descriptors: tuple[int, ...]
    size_bytes: int
    direct: bool


def storage(
    folder: Path | None = None,
    *,
    quick: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[StorageRead, ...]:
    """Measure reads of the storage behind ``folder``.

    Args:
        folder: Where the temporary file goes (removed again, on Ctrl-C too); by default the user's cache.
        quick: A file of 64 MiB and blocks of 4 KiB and 1 MiB; otherwise 256 MiB and 4 KiB to 8 MiB.
        seed: Of the file's bytes and of the random order.
        progress: Who hears of every finished pattern.
        clock: Seconds, never backwards.

    Returns:
        One figure per pattern, block and queue depth, in bytes per second.

    Raises:
        DeviceError: The disk is full.
        InputError: The folder cannot be written.
    """
    effort = _QUICK if quick else _FULL
    place = folder if folder is not None else default_folder()
    cases = [
        _Case(pattern, block, depth, seed)
        for pattern, block, depth in itertools.product(get_args(Pattern), effort.blocks, _QUEUE_DEPTHS)
    ]
    with (
        (progress or Silent()).task("storage", len(cases)) as advance,
        _test_file(place, effort.file_bytes, seed) as file,
    ):
        reads = []
        for case in cases:
            reads.append(_measure_case(file, case, effort, clock))
            advance(1)
    return tuple(reads)


def default_folder() -> Path:
    """Return the user's cache folder for edgeflex."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgeflex"))


@contextmanager
def _test_file(folder: Path, size_bytes: int, seed: int) -> Iterator[_TestFile]:
    path = folder / "edgeflex-storage-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="edgeflex-storage-", dir=folder)
    except OSError as error:
        raise files.explain_os_error(error, path) from None
    path = Path(name)
    with ExitStack() as stack:
        try:
            stack.callback(path.unlink, missing_ok=True)
            _fill(descriptor, size_bytes, seed)
            descriptors, direct = _open_for_reading(path)
            for opened in descriptors:
                stack.callback(os.close, opened)
        except OSError as error:
            raise files.explain_os_error(error, path) from None
        # Open files live on without a name, so from here on not even a kill leaves anything behind.
        path.unlink(missing_ok=True)
        yield _TestFile(descriptors, size_bytes, direct)


def _fill(descriptor: int, size_bytes: int, seed: int) -> None:
    """Write random bytes, which no file system compresses or shares, and push them to the device."""
    rng = random.Random(seed)  # noqa: S311 - filler, not a secret
    try:
        for _ in range(size_bytes // _MIB):
            chunk = memoryview(rng.randbytes(_MIB))
            while chunk:
                chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_for_reading(path: Path) -> tuple[tuple[int, ...], bool]:
    """Return a descriptor per reader, and whether they bypass the page cache."""
    flag = getattr(os, "O_DIRECT", 0)
    direct = bool(flag) and _takes_direct(path, flag)
    flags = os.O_RDONLY | (flag if direct else 0)
    return tuple(os.open(path, flags) for _ in range(max(_QUEUE_DEPTHS))), direct


def _takes_direct(path: Path, flag: int) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | flag)
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.EOPNOTSUPP}:
            return False
        raise
    try:
        # Some file systems open with the flag and refuse the read.
        with mmap.mmap(-1, 4 * _KIB) as buffer:
            return os.preadv(descriptor, [buffer], 0) > 0
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(descriptor)


def _measure_case(file: _TestFile, case: _Case, effort: _Effort, clock: Callable[[], float]) -> StorageRead:
    rates = []
    with ThreadPoolExecutor(case.queue_depth) as pool:
        # next() of a cycle is one step of the interpreter, so that threads may share it.
        offsets = itertools.cycle(case.offsets(file.size_bytes))
        for _ in range(effort.samples):
            if not file.direct:
                _drop_cache(file)
            rates.append(_window(pool, file, case, offsets, effort.window_s, clock=clock))
    method = _METHOD.format(size=file.size_bytes // _MIB, samples=effort.samples, window=effort.window_s)
    return StorageRead(
        pattern=case.pattern,
        block_bytes=case.block_bytes,
        queue_depth=case.queue_depth,
        direct=file.direct,
        bytes_per_s=summarise(rates, method),
    )


def _drop_cache(file: _TestFile) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.descriptors[0], 0, 0, os.POSIX_FADV_DONTNEED)


def _window(
    pool: ThreadPoolExecutor,
    file: _TestFile,
    case: _Case,
    offsets: Iterator[int],
    window_s: float,
    *,
    clock: Callable[[], float],
) -> float:
    """Return bytes per second over one window: all bytes that arrived over the time to the last of them."""
    start = clock()

    def read(descriptor: int) -> int:
        total = 0
        # Anonymous maps start on a page, which is what O_DIRECT asks of the buffer.
        with mmap.mmap(-1, case.block_bytes) as buffer:
            while True:
                total += os.preadv(descriptor, [buffer], next(offsets))
                if clock() - start >= window_s:
                    return total

    total = sum(pool.map(read, file.descriptors[: case.queue_depth]))
    elapsed = clock() - start
    if total <= 0 or elapsed <= 0:
        raise DeviceError(f"storage: {total} bytes read in {elapsed} s, so no rate can be formed. Try another folder.")
    return total / elapsed
