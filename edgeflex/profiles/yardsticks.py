"""Two fixed pieces of work, timed to tell how fast this machine is now: arithmetic in cache, and reading memory.

Both run on one thread and are the same on every call, so that their times on two days can be held against each other
(see ``edgeflex.pace``). Medians stand, not minima: that a neighbour takes a share of a core or of the memory is what
they are to show.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Clock = Callable[[], float]

_VALUES = 1 << 15  # 128 KiB of float32: in the second cache of every board, and long beside the cost of a call
_ROUNDS = 100
_SAMPLES = 15
_BUFFER_BYTES = 64 << 20
_PASSES = 3


def arithmetic_seconds(clock: Clock = time.perf_counter) -> float | None:
    """Return the median seconds of 100 multiplications and additions of 32768 float32, which stay in the cache.

    None where the clock is too coarse to tell.
    """
    import numpy as np

    values = np.linspace(0.5, 1.5, _VALUES, dtype=np.float32)
    # Nothing leaves the range around 1 and no number becomes subnormal, which would be slower.
    factor, summand = np.float32(0.5), np.float32(0.5)
    taken = []
    for _ in range(_SAMPLES + 1):
        start = clock()
        for _ in range(_ROUNDS):
            np.multiply(values, factor, out=values)
            np.add(values, summand, out=values)
        taken.append(clock() - start)
    return _positive(statistics.median(taken[1:]))  # the first fetches the values into the cache


def memory_rate(clock: Clock = time.perf_counter) -> float | None:
    """Return the median rate in bytes per second at which one thread reads 64 MiB, given back before this returns.

    The reading is that of ``probe.memory_read``, on the calling thread. None where there is no room for so much, or
    where the clock is too coarse to tell.
    """
    import numpy as np

    try:
        # distinct numbers, since pages of zeros share one page and would be read from cache
        buffer = np.arange(_BUFFER_BYTES // 4, dtype=np.int32)
    except MemoryError:
        return None
    taken = []
    for _ in range(_PASSES + 1):
        start = clock()
        np.max(buffer)
        taken.append(clock() - start)
    seconds = _positive(statistics.median(taken[1:]))
    return None if seconds is None else _BUFFER_BYTES / seconds


def _positive(seconds: float) -> float | None:
    return seconds if seconds > 0 else None
