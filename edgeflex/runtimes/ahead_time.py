"""One event in time where the link goes on copying ahead once its uploads are done, and what copies are worth."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, NamedTuple

from edgeflex.runtimes.timeline import Work, contend

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgeflex.runtimes.curves import Curves
    from edgeflex.runtimes.timeline import Cost, Key, Schedule


# Worth is counted in parts of what one hit saves, and not beyond so many parts, so that few shapes of events differ.
_WORTH_STEPS, _MOST_WORTH = 3, 6


class Worth(NamedTuple):
    """What it is worth to have an expert on the GPU that is likelier used than the one that leaves for it.

    Attributes:
        horizon: Passes over which its higher rate of use counts.
        copy_s: What its copy takes.
        saved_s: What one hit saves, a miss being served by CPU and link together.
        beside_s: What the CPU loses while it shares the RAM with one copy.
        least_gain: Uses a pass below which a copy ahead costs the CPU more than its hits save.
    """

    horizon: float
    copy_s: float
    saved_s: float
    beside_s: float
    least_gain: float

    @classmethod
    def of(cls, curves: Curves, size_bytes: int, horizon: float) -> Worth:
        """Return the worth of experts of a size on a machine."""
        copy_s, cpu_s = curves.link_s(size_bytes), curves.cpu_s(1)
        beside_s = copy_s * (1.0 - 1.0 / curves.cpu_beside_link)
        # costs of 0 stand in tests only
        saved_s = 1.0 / (1.0 / cpu_s + 1.0 / copy_s) if cpu_s > 0.0 < copy_s else 0.0
        least_gain = beside_s / (horizon * cpu_s) if horizon and cpu_s > 0.0 else inf
        return cls(horizon, copy_s, saved_s, beside_s, least_gain)

    def seconds(self, gain: float) -> float:
        """Return the later seconds that ``gain`` uses a pass more save."""
        steps = min(int(max(0.0, gain) * self.horizon * _WORTH_STEPS), _MOST_WORTH)
        return self.saved_s / _WORTH_STEPS * steps

    def link_price(self, gains: Iterable[float]) -> float:
        """Return the later seconds that each of the link's saves where it copies the best of some experts ahead."""
        return max(0.0, self.seconds(max(gains, default=0.0)) - self.beside_s) / self.copy_s if self.copy_s else 0.0


class EventTime(NamedTuple):
    """One event in time, copies ahead included.

    Attributes:
        span_s: From its start to the end of its last work.
        busy_s: By resource, in the order of ``RESOURCES``.
        ahead_s: Seconds of link work done for each copy ahead, at most what was asked.
    """

    span_s: float
    busy_s: tuple[float, float, float, float]
    ahead_s: tuple[float, ...]


def event_time(
    plan: Schedule, costs: Mapping[Key, Cost], curves: Curves, ahead_s: Sequence[float] = (), held_s: float = 0.0
) -> EventTime:
    """Return what a schedule comes to when the link, after its uploads, goes on copying ahead.

    Without copies ahead it is ``simulate``. A copy ahead never makes an upload wait beyond ``held_s``, ends with the
    event and slows the CPU as uploads do.

    Args:
        plan: Of the event.
        costs: Of its experts.
        curves: What is true.
        ahead_s: Link work left of each copy ahead, in order.
        held_s: How long a chunk that is under way holds the link at the event's start.
    """
    read_s: dict[Key, float] = {}
    disk_end_s = 0.0
    for key in plan.read:
        disk_end_s += costs[key].disk
        read_s[key] = disk_end_s
    cpu = [Work(read_s.get(key, 0.0), costs[key].cpu) for key in plan.on_cpu]
    if cpu and curves.cpu_start_s > 0.0:
        cpu.insert(0, Work(0.0, curves.cpu_start_s))
    link = [Work(max(held_s, read_s.get(key, 0.0)), costs[key].link) for key in plan.uploaded]
    link += [Work(0.0, work_s) for work_s in ahead_s]
    cpu_spans, link_spans = contend(cpu, link, curves.cpu_beside_link, curves.link_beside_cpu)
    gpu_end_s = gpu_busy_s = sum([costs[key].gpu for key in plan.on_gpu])
    for key, (_, arrived_s) in zip(plan.uploaded, link_spans, strict=False):
        gpu_end_s = max(gpu_end_s, arrived_s) + costs[key].gpu
        gpu_busy_s += costs[key].gpu
    cpu_end_s = cpu_spans[-1][1] if cpu_spans else 0.0
    span_s = max(gpu_end_s, cpu_end_s, disk_end_s)
    link_busy_s = sum([max(0.0, min(end, span_s) - start) for start, end in link_spans if start < span_s])
    done = tuple(
        [
            _part_done(start, end, span_s) * work_s
            for work_s, (start, end) in zip(ahead_s, link_spans[len(plan.uploaded) :], strict=True)
        ]
    )
    cpu_busy_s = sum([end - start for start, end in cpu_spans])
    return EventTime(span_s, (gpu_busy_s, cpu_busy_s, link_busy_s, disk_end_s), done)


def _part_done(start_s: float, end_s: float, now_s: float) -> float:
    if now_s >= end_s:
        return 1.0
    return (now_s - start_s) / (end_s - start_s) if now_s > start_s else 0.0
