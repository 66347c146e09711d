"""What the disk gives a decoder: reads through the runtime's own readers, in records as large as an expert.

They are taken in batches such as events miss them, with a decoder's computing between.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import tempfile
import time
from contextlib import ExitStack, contextmanager
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import DeviceError
from edgeflex.files import explain_os_error
from edgeflex.runtimes.movers import Mover, Record, takes_direct
from edgeflex.runtimes.pages import private_pages
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from edgeflex.errors import EdgeflexError

    Clock = Callable[[], float]

_READ_BYTES = 256 << 20  # larger than what a disk's own cache gives back at once
_BATCHES = (1, 2, 4)  # experts that one event of a layer misses
_CHECKED_BATCHES = (2, 8)  # and that one of a prompt does, at their first use
_LEAST_CHECKED = 3  # batches of a number, for a median
_LEAST_TURNS, _MOST_TURNS = 3, 240
_LEAST_SLOPE = 0.01  # of the mean time of a record in the largest batch; less is the rounding of sums
_PAUSE_S = 2e-4  # about what a layer computes between two reads


class ReadTimes:
    """Times records read from a file on the disk, in batches such as events miss them; a context.

    A disk's speed, and how soon an idle thread awakes, change within seconds. So turns are taken one by one,
    wherever the caller has time between other work, and the medians of all stand.

    Args:
        folder: On the disk; a file is written there and removed.
        record_bytes: Of one read.
        clock: Gives seconds.

    Raises:
        DeviceError: The disk is full or fails.
        InputError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, record_bytes: int, clock: Clock = time.perf_counter) -> None:
        self._record_bytes, self._clock = record_bytes, clock
        turn_bytes = sum(_BATCHES) * record_bytes
        self.turns = int(np.clip(2 * _READ_BYTES // turn_bytes, _LEAST_TURNS, _MOST_TURNS))
        self._seconds: dict[int, list[float]] = {count: [] for count in _BATCHES}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain_os_error(error, folder) from None
        with ExitStack() as kept:
            count = max(4, _READ_BYTES // record_bytes)
            self._path = kept.enter_context(_written(folder, count, record_bytes))
            order = np.random.default_rng(1).permutation(count)
            self._places, self._checked = cycle(order[: count // 2].tolist()), order[count // 2 :]
            most = max(*_BATCHES, min(max(_CHECKED_BATCHES), len(self._checked)))
            memory = private_pages(most * record_bytes)
            self._mover = kept.enter_context(Mover(memory, direct=takes_direct(self._path)))
            self._kept = kept.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    def turn(self) -> None:
        """Read one batch of each size, with a decoder's computing before each."""
        for count in _BATCHES:
            places = islice(self._places, count)
            records = [_record(self._path, place, self._record_bytes) for place in places]
            _compute(_PAUSE_S)
            self._seconds[count].append(_read_s(self._mover, records, self._clock))

    def line(self) -> tuple[float, float]:
        """Return latency in seconds and bytes per second, as all turns so far have it."""
        medians = {count: float(np.median(took)) for count, took in self._seconds.items()}
        return read_line(medians, self._record_bytes)

    def checked_rate(self) -> float:
        """Return bytes per second of records that were not read before and are checked as they come.

        Latency is not in it: records are taken in smaller and larger batches, and the rate is of what these read more.
        """
        digests = _digests(self._path, self._checked, self._record_bytes)
        with self._path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        records = [_record(self._path, place, self._record_bytes, digest) for place, digest in digests.items()]
        seconds: dict[int, list[float]] = {}
        first = 0
        for count in cycle(_CHECKED_BATCHES):
            batch = records[first : first + count]
            first += count
            if not batch:
                break
            seconds.setdefault(len(batch), []).append(_read_s(self._mover, batch, self._clock))
        if any(len(seconds.get(count, ())) < _LEAST_CHECKED for count in _CHECKED_BATCHES):
            # few and large records: latency is little beside them, and no median holds
            return sum(one.size_bytes for one in records) / math.fsum(chain.from_iterable(seconds.values()))
        medians = {count: float(np.median(seconds[count])) for count in _CHECKED_BATCHES}
        return read_line(medians, self._record_bytes)[1]


@contextmanager
def _written(folder: Path, count: int, record_bytes: int) -> Iterator[Path]:
    """Write records of random bytes, which no disk can fold, and keep them out of the page cache."""
    block = np.random.default_rng(0).bytes(1 << 20)
    with ExitStack() as kept:
        try:
            file = kept.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".edgeflex-", suffix=".reads"))
            left = count * record_bytes
            while left > 0:
                left -= file.write(block[: min(left, len(block))])
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise _no_room(error, folder, count * record_bytes) from None
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(file.name)


def _no_room(error: OSError, folder: Path, size_bytes: int) -> EdgeflexError:
    """Return what was wrong with a file to read from."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DeviceError(
            f"{folder}: the disk is full. Reads are measured on a file of {format_bytes(size_bytes)} there, which is "
            "removed afterwards; free so much, or copy the folder to another disk."
        )
    return explain_os_error(error, folder)


def _compute(seconds: float) -> None:
    """Keep this core busy: one that sleeps falls idle, and then its first read costs what awaking does."""
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass


def _digests(path: Path, places: NDArray[np.intp], record_bytes: int) -> dict[int, str]:
    found = {}
    with path.open("rb") as file:
        for place in places.tolist():
            file.seek(place * record_bytes)
            found[place] = hashlib.sha256(file.read(record_bytes)).hexdigest()
    return found


def read_line(seconds: Mapping[int, float], record_bytes: int) -> tuple[float, float]:
    """Return latency in seconds and bytes per second of the line through what batches of records took.

    Args:
        seconds: By number of records read at once, at least two numbers.
        record_bytes: Of one record.
    """
    counts, took = np.array(list(seconds), float), np.array(list(seconds.values()))
    slope, latency_s = np.polyfit(counts, took, 1)
    # noise, or reads that wait for each other no more: the line through no latency at all
    if latency_s < 0.0 or slope < _LEAST_SLOPE * took.max() / counts.max():
        return 0.0, record_bytes * float(counts @ counts) / float(counts @ took)
    return float(latency_s), record_bytes / float(slope)


def _read_s(mover: Mover, batch: Sequence[Record], clock: Clock) -> float:
    """Return the seconds of reading records at once."""
    start = clock()
    reads = [
        mover.submit(record, slot * record.size_bytes, check=bool(record.sha256)) for slot, record in enumerate(batch)
    ]
    for read in reads:
        read.wait()
    return clock() - start


def _record(path: Path, place: int, record_bytes: int, sha256: str = "") -> Record:
    return Record("record", path, place * record_bytes, record_bytes, sha256)
