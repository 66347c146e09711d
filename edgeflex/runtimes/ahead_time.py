"""One event in time where the link goes on copying experts ahead once its uploads are done."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edgeflex.runtimes.timeline import Work, contend

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeflex.runtimes.curves import Curves
    from edgeflex.runtimes.timeline import Cost, Key, Schedule


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
