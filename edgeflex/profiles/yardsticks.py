"""Two fixed pieces of work, timed to tell how fast this machine is now: arithmetic in cache, and reading memory.

Both run on one thread and are the same on every call, so that their times on two days can be held against each other
(see ``edgeflex.pace``). They take turns, and means stand, neither minima nor medians: a neighbour on the same core has
it for milliseconds at a time, which most short samples never see.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Clock = Callable[[], float]
    Work = Callable[[], object]

_VALUES = 1 << 15  # 128 KiB of float32: in the second cache of every board, and long beside the cost of a call
_LINE_BYTES = 64
_ROUNDS = 800
_BUFFER_BYTES = 64 << 20
_TURNS = 4


def speed(clock: Clock = time.perf_counter) -> tuple[float | None, float | None]:
    """Return mean seconds of 800 multiplications and additions of 32768 float32, and mean bytes read per second.

    The reading is that of ``probe.memory_read``, of 64 MiB on the calling thread. None where there is no room for so
    much, or where the clock is too coarse to tell. Nothing stays allocated.

    Args:
        clock: Gives seconds.
    """
    arithmetic, reading = _arithmetic(), _reading()
    computed, read = [], []
    for _ in range(_TURNS + 1):
        if reading is not None:
            read.append(_timed(reading, clock))
        computed.append(_timed(arithmetic, clock))
    # the first turn fills the caches, and wakes a processor whose clock was low
    arithmetic_s, read_s = _mean(computed[1:]), _mean(read[1:])
    return arithmetic_s, None if read_s is None else _BUFFER_BYTES / read_s


def _arithmetic() -> Work:
    import numpy as np

    room = np.full(_VALUES + _LINE_BYTES // 4, 1.5, dtype=np.float32)
    # Loads across two lines of the cache would take a third longer, and NumPy aligns as it happens.
    start = -room.ctypes.data % _LINE_BYTES // 4
    values = room[start : start + _VALUES]
    # Values come nearer to 1: none ever becomes subnormal, which would be slower.
    factor, summand = np.float32(0.5), np.float32(0.5)

    def work() -> None:
        for _ in range(_ROUNDS):
            np.multiply(values, factor, out=values)
            np.add(values, summand, out=values)

    return work


def _reading() -> Work | None:
    import numpy as np

    try:
        # distinct numbers, since pages of zeros share one page and would be read from cache
        buffer = np.arange(_BUFFER_BYTES // 4, dtype=np.int32)
    except MemoryError:
        return None
    return lambda: np.max(buffer)


def _timed(work: Work, clock: Clock) -> float:
    start = clock()
    work()
    return clock() - start


def _mean(seconds: list[float]) -> float | None:
    """Return the mean, None where nothing was measured or the clock stood still."""
    total_s = math.fsum(seconds)
    return total_s / len(seconds) if total_s > 0 else None
