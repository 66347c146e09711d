"""What no schedule of an event can beat: linear-programming duals, over indices and seconds only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.schedule_search import Event, Job

__all__ = ["Bounds", "Weights"]

_FEW = 16  # up to so many jobs plain numbers are quicker than arrays


class Weights(NamedTuple):
    """A dual bound: span ≥ cpu · (CPU seconds) + other · (seconds of link or GPU)."""

    cpu: float
    other: float

    def least(self, cost_cpu_s: float, cost_other_s: float, worth_s: float) -> float:
        """Return what one undecided job adds at least."""
        return min(self.cpu * cost_cpu_s, self.other * cost_other_s - worth_s)


class _Sides(NamedTuple):
    """Undecided jobs by their seconds on the CPU and on one other resource, and the worth of their upload."""

    cpu: Sequence[float]
    other: Sequence[float]
    worth: Sequence[float]


class Bounds:
    """Dual weights of an event, what each undecided job adds to them, and the event's own bound.

    The weights are put on clocks, which idle where there is flash; so there they leave contention out.
    """

    def __init__(self, event: Event) -> None:
        """Weigh the free jobs of an event."""
        jobs = [event.jobs[i] for i in event.free]
        costs = [job.cost for job in jobs]
        cpu, worth = [cost.cpu for cost in costs], [job.worth_s for job in jobs]
        link_sides = _Sides(cpu, [cost.link for cost in costs], worth)
        gpu_sides = _Sides(cpu, [cost.gpu for cost in costs], worth)
        self.link, link_s = _dual(event, link_sides, 0.0, contended=event.contended and not event.flash)
        self.gpu, gpu_s = _dual(event, gpu_sides, event.gpu_s, contended=False)
        if event.contended and event.flash:
            link_s = max(link_s, _dual(event, link_sides, 0.0, contended=True)[1])
        self.link_adds = {i: self.link.least(*side) for i, *side in zip(event.free, *link_sides, strict=True)}
        self.gpu_adds = {i: self.gpu.least(*side) for i, *side in zip(event.free, *gpu_sides, strict=True)}
        self.event_s = max(link_s, gpu_s, _plain_s(event, jobs))


def _plain_s(event: Event, jobs: Sequence[Job]) -> float:
    """Return the bound beside the duals: what is pinned, all reads and the shortest work after one, each job alone."""
    costs = [job.cost for job in jobs]
    single_s = [cost.disk + min(cost.cpu, cost.link + cost.gpu) for cost in costs]
    flash = [event.costs[i] for i in event.flash]
    tail_s = min([min(cost.cpu, cost.link + cost.gpu) for cost in flash], default=0.0)
    read_s = sum([cost.disk for cost in costs]) + tail_s
    return max([event.gpu_s, read_s, *single_s]) - sum([job.worth_s for job in jobs])


def _dual(event: Event, sides: _Sides, given_s: float, *, contended: bool) -> tuple[Weights, float]:
    """Return the weights of CPU and another resource that bound the event best, and that bound.

    For u, v ≥ 0 every span T obeys uC + vL ≤ T · max(u, v, u / a + v / b), C and L the work of CPU and link and
    a, b their factors when both work (that maximum is at most u + v, which holds of idle time too); the best u : v
    of the relaxation equals the ratio of some job, or a kink of that maximum.
    """
    a, b = 1 / event.cpu_factor, 1 / event.link_factor
    shares = [0.0, 1.0]
    if contended:
        shares += [b / (1 - a + b), (1 - b) / (1 - b + a)]
    weigh = _dual_of_few if len(sides.cpu) <= _FEW else _dual_of_many
    return weigh(sides, shares, given_s, (a, b) if contended else None)


def _dual_of_many(
    sides: _Sides, shares: Sequence[float], given_s: float, factors: tuple[float, float] | None
) -> tuple[Weights, float]:
    cpu, other, worth = np.array(sides.cpu), np.array(sides.other), np.array(sides.worth)
    u = np.unique([*shares, *(other / np.maximum(cpu + other, 1e-300))])
    norm = np.ones_like(u)
    if factors is not None:
        a, b = factors
        norm = np.maximum(a * u + b * (1 - u), np.maximum(u, 1 - u))
    left, right = (u / norm)[:, None], ((1 - u) / norm)[:, None]
    values: NDArray[np.float64] = np.minimum(left * cpu, right * other - worth).sum(axis=1) + right[:, 0] * given_s
    best = int(values.argmax())
    return Weights(float(left[best, 0]), float(right[best, 0])), float(values[best])


def _dual_of_few(
    sides: _Sides, shares: Sequence[float], given_s: float, factors: tuple[float, float] | None
) -> tuple[Weights, float]:
    """Return what ``_dual_of_many`` returns, to the bit."""
    jobs = list(zip(*sides, strict=True))
    best, best_s = Weights(0.0, 0.0), -math.inf
    for u in sorted({*shares, *[other / max(cpu + other, 1e-300) for cpu, other, _ in jobs]}):
        norm = 1.0
        if factors is not None:
            norm = max(factors[0] * u + factors[1] * (1 - u), u, 1 - u)
        left, right = u / norm, (1 - u) / norm
        value_s = _added([min(left * cpu, right * other - worth) for cpu, other, worth in jobs]) + right * given_s
        if value_s > best_s:
            best, best_s = Weights(left, right), value_s
    return best, best_s


def _added(numbers: Sequence[float]) -> float:
    """Return the sum of at most ``_FEW`` numbers in the order in which arrays are summed, which rounds alike."""
    total, rest = 0.0, numbers
    if len(numbers) >= 8:
        one, two, three, four, five, six, seven, eight = numbers[:8]
        if len(numbers) == 16:
            one, two, three, four, five, six, seven, eight = map(float.__add__, numbers[:8], numbers[8:])
        total, rest = ((one + two) + (three + four)) + ((five + six) + (seven + eight)), numbers[8:]
        if len(numbers) == 16:
            return total
    for number in rest:
        total += number
    return total
