"""How much two kinds of work slow each other: each timed alone, and each while the other runs over and over.

Copies to a GPU, its products and the processor's reads share memory and buses. What they lose side by side decides
whether a copy beside computing is worth it. The arithmetic is by itself, so that it can be checked by hand.
"""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from edgeflex.errors import DeviceError
from edgeflex.profiles.samples import summarise
from edgeflex.schema import Figure, Overlap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Work = Callable[[], object]

_REPEATS = 9
_WARM_UP = 2
_LONGEST_S = 30.0  # until the other work has begun, or has ended


class Slowdown(NamedTuple):
    """Of two kinds of work, how many times longer each takes beside the other; at least 1."""

    one: Figure
    other: Figure


def slowdown(alone_s: Sequence[float], beside_s: Sequence[float], source: str) -> Figure:
    """Return how many times longer work takes beside other work: the quotient of the medians, at least 1.

    Its spread is that of a quotient of independent values to the first order: the root of the sum of the squares of
    both samples' spreads, each an interquartile range over its median.

    Args:
        alone_s: Seconds with nothing else running.
        beside_s: Seconds while the other work ran.
        source: What was timed.

    Raises:
        DeviceError: A sample is missing, or not above zero.
    """
    alone, beside = summarise(alone_s, f"{source}, alone"), summarise(beside_s, source)
    spread = math.hypot(alone.spread or 0.0, beside.spread or 0.0)
    told = None if alone.spread is None and beside.spread is None else spread
    return Figure(value=max(1.0, beside.value / alone.value), origin="measured", source=source, spread=told)


def timed(work: Work, repeats: int = _REPEATS, *, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Return the seconds of each of ``repeats`` turns of ``work``, after two that do not count."""
    seconds = []
    for turn in range(_WARM_UP + repeats):
        start = clock()
        work()
        if turn >= _WARM_UP:
            seconds.append(clock() - start)
    return seconds


def timed_beside(
    work: Work, other: Work, repeats: int = _REPEATS, *, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return the seconds of ``work``'s turns while another thread does ``other`` without a pause.

    The first turn begins after the other work has been done once, and that ends after the last turn.

    Raises:
        DeviceError: The other work failed, or did not end.
    """
    running, over = threading.Event(), threading.Event()
    faults: list[BaseException] = []

    def keep_on() -> None:
        try:
            while not over.is_set():
                other()
                running.set()
        except BaseException as error:  # noqa: BLE001 - told by whoever waits
            faults.append(error)
            running.set()

    thread = threading.Thread(target=keep_on, name="beside", daemon=True)
    thread.start()
    try:
        begun = running.wait(_LONGEST_S)
        seconds = timed(work, repeats, clock=clock) if begun and not faults else []
    finally:
        over.set()
        thread.join(_LONGEST_S)
    if faults or thread.is_alive() or not begun:
        reason = str(faults[0]) if faults else f"it took longer than {_LONGEST_S:.0f} s"
        raise DeviceError(f"work beside the measured one failed: {reason}. Measure again on a quieter machine.")
    return seconds


def side_by_side(
    one: Work,
    other: Work,
    names: tuple[str, str],
    *,
    repeats: int = _REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> Slowdown:
    """Return how two kinds of work slow each other.

    Args:
        one: Does its work once and returns when it is done.
        other: Likewise, without using what ``one`` uses.
        names: What both are, for the source of the figures.
        repeats: Turns of each, alone and beside the other.
        clock: Seconds, rising.

    Raises:
        DeviceError: Work failed, or gave nothing usable.
    """
    alone = [timed(work, repeats, clock=clock) for work in (one, other)]
    first = timed_beside(one, other, repeats, clock=clock)
    second = timed_beside(other, one, repeats, clock=clock)
    words = f"median of {repeats} turns over that alone"
    return Slowdown(
        slowdown(alone[0], first, f"{names[0]} beside {names[1]}, {words}"),
        slowdown(alone[1], second, f"{names[1]} beside {names[0]}, {words}"),
    )


def overlap_of(
    copy: Work, multiply: Work, read: Work, *, repeats: int = _REPEATS, clock: Callable[[], float] = time.perf_counter
) -> Overlap:
    """Return how copies to a GPU, its products and the processor's reads slow each other.

    Args:
        copy: Copies host memory to the GPU's, and waits for the end.
        multiply: Lets the GPU multiply, on a queue of its own, and waits for the end.
        read: Reads host memory with the processor.
        repeats: Turns of each.
        clock: Seconds, rising.

    Raises:
        DeviceError: Work failed, or gave nothing usable.
    """
    names = ("copies to the GPU", "products of the GPU", "reads of memory by the CPU")
    link_gpu = side_by_side(copy, multiply, names[:2], repeats=repeats, clock=clock)
    link_cpu = side_by_side(copy, read, (names[0], names[2]), repeats=repeats, clock=clock)
    return Overlap(
        link_beside_gpu=link_gpu.one,
        gpu_beside_link=link_gpu.other,
        link_beside_cpu=link_cpu.one,
        cpu_beside_link=link_cpu.other,
    )
