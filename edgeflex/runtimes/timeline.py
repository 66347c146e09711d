"""One layer event in time: what runs where, in which order, and how long each resource worked and waited.

The rules, which the scheduler, the simulator and the runtime share (a list schedule):

* The disk reads the experts that lie in flash into RAM, one after the other, in the order of ``Schedule.read``.
* The link copies one expert at a time, in the order of ``Schedule.uploaded``; one from flash not before it is read.
* The CPU computes one expert at a time, in the order of ``Schedule.on_cpu``; one from flash not before it is read.
  The first one pays ``Curves.cpu_start_s`` once.
* The GPU computes one expert at a time: first the resident ones, then the uploaded in the order of their upload,
  each not before its copy has ended.
* No resource waits on purpose. While the CPU computes and the link copies, the CPU goes on at
  1 / ``cpu_beside_link`` and the link at 1 / ``link_beside_cpu`` of its speed; alone, each at its full speed.
* An uploaded expert needs room in the GPU's memory, at least in passing; that is the caller's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from edgeflex.errors import InputError
from edgeflex.runtimes.curves import RESOURCES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgeflex.runtimes.curves import Curves, Resource

__all__ = ["Active", "Cost", "Key", "Lane", "Place", "Schedule", "Timeline", "Use", "contend", "cost_of", "simulate"]

Key = tuple[int, int]
Place = Literal["gpu", "ram", "flash"]


@dataclass(frozen=True, slots=True)
class Active:
    """One expert that an event uses.

    Attributes:
        key: (layer, expert).
        rows: Tokens routed to it, at least 1.
        size_bytes: What a copy or a read of it moves.
        place: The quickest tier that holds it now.
        kind: Which curves of ``Curves.kinds`` it takes.
        ram_copy: A resident one also lies in RAM (inclusive tiers), so that the CPU may compute it.
        worth_s: Seconds of later events that its upload is expected to save; taken off the objective when it is
            uploaded. 0 looks at this event alone.
    """

    key: Key
    rows: int
    size_bytes: int
    place: Place
    kind: str = ""
    ram_copy: bool = False
    worth_s: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Where each expert of an event is computed, in which order, and when that is predicted to end.

    Attributes:
        on_gpu: Resident experts that the GPU computes, first.
        uploaded: Experts copied to the GPU and computed there, in the order of their copies.
        on_cpu: Experts that the CPU computes, in order.
        read: Experts read from flash, in order.
        gpu_s: When the GPU ends; 0 where it has nothing to do. The same for ``cpu_s``, ``link_s``, ``disk_s``.
        span_s: When the event ends: the last of them.
        bound_s: No schedule ends earlier (0: not computed).
        proven: No list schedule of this event has a better ``span_s`` (less the worth of what it uploads).
    """

    on_gpu: tuple[Key, ...]
    uploaded: tuple[Key, ...]
    on_cpu: tuple[Key, ...]
    read: tuple[Key, ...]
    gpu_s: float
    cpu_s: float
    link_s: float
    disk_s: float
    span_s: float
    bound_s: float = 0.0
    proven: bool = False


class Use(NamedTuple):
    """One expert's stay on one resource, in seconds from the event's start."""

    key: Key
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Lane:
    """One resource during an event.

    Attributes:
        busy_s: Seconds at work.
        waited_s: The event's seconds less those.
        end_s: When its last work ended; 0 without work.
        uses: In order.
    """

    busy_s: float
    waited_s: float
    end_s: float
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Timeline:
    """What an event's schedule comes to on given curves."""

    span_s: float
    gpu: Lane
    cpu: Lane
    link: Lane
    disk: Lane

    def lane(self, resource: Resource) -> Lane:
        """Return one resource's share."""
        lane: Lane = getattr(self, resource)
        return lane

    @property
    def busy_s(self) -> dict[Resource, float]:
        """Seconds at work by resource."""
        return {resource: self.lane(resource).busy_s for resource in RESOURCES}

    @property
    def waited_s(self) -> dict[Resource, float]:
        """Seconds without work by resource; with ``busy_s`` they sum to the span."""
        return {resource: self.lane(resource).waited_s for resource in RESOURCES}

    @property
    def hidden_upload_s(self) -> float:
        """Seconds of copying during which the GPU or the CPU computed."""
        return _common_s(self.link.uses, _union((*self.gpu.uses, *self.cpu.uses)))


class Cost(NamedTuple):
    """Seconds of one expert on each resource, alone; infinite where it cannot run, 0 where nothing is to do."""

    gpu: float
    cpu: float
    link: float
    disk: float


class Work(NamedTuple):
    """One turn of the CPU or the link: not before ``release_s``, ``work_s`` at full speed."""

    release_s: float
    work_s: float


def cost_of(active: Active, curves: Curves) -> Cost:
    """Return what one expert costs on each resource; what is resident only cannot go to the CPU."""
    on_gpu = curves.gpu_s(active.rows, active.kind)
    on_cpu = curves.cpu_s(active.rows, active.kind)
    if active.place == "gpu":
        return Cost(on_gpu, on_cpu if active.ram_copy else math.inf, 0.0, 0.0)
    read_s = curves.disk_s(active.size_bytes) if active.place == "flash" else 0.0
    return Cost(on_gpu, on_cpu, curves.link_s(active.size_bytes), read_s)


def contend(
    cpu: Sequence[Work], link: Sequence[Work], cpu_factor: float, link_factor: float
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return (start, end) of each turn of CPU and link, which slow each other while both work.

    Args:
        cpu: Turns in order.
        link: Turns in order.
        cpu_factor: How much longer the CPU takes beside the link, at least 1.
        link_factor: How much longer the link takes beside the CPU, at least 1.
    """
    if not cpu or not link or cpu_factor == link_factor == 1.0:
        return _serial(cpu), _serial(link)
    cpu_spans: list[tuple[float, float]] = []
    link_spans: list[tuple[float, float]] = []
    now, (cpu_start, cpu_left), (link_start, link_left) = 0.0, cpu[0], link[0]
    while len(cpu_spans) < len(cpu) and len(link_spans) < len(link):
        cpu_on, link_on = cpu_start <= now, link_start <= now
        cpu_slow, link_slow = (cpu_factor, link_factor) if cpu_on and link_on else (1.0, 1.0)
        cpu_next = now + cpu_left * cpu_slow if cpu_on else cpu_start
        link_next = now + link_left * link_slow if link_on else link_start
        then = min(cpu_next, link_next)
        cpu_left = max(0.0, cpu_left - (then - now) / cpu_slow) if cpu_on else cpu_left
        link_left = max(0.0, link_left - (then - now) / link_slow) if link_on else link_left
        if cpu_on and cpu_next == then:
            cpu_spans.append((cpu_start, then))
            cpu_start, cpu_left = _turn(cpu, len(cpu_spans), then)
        if link_on and link_next == then:
            link_spans.append((link_start, then))
            link_start, link_left = _turn(link, len(link_spans), then)
        now = then
    return _alone(cpu, cpu_spans, cpu_start, now, cpu_left), _alone(link, link_spans, link_start, now, link_left)


def simulate(schedule: Schedule, active: Sequence[Active], curves: Curves) -> Timeline:
    """Run a schedule on ``curves``, which need not be those it was made by.

    Args:
        schedule: Of this event.
        active: The event's experts, in any order.
        curves: What is taken for true.

    Raises:
        InputError: The schedule is not one of these experts: one is missing, named twice, or put where it cannot run.
    """
    costs = {one.key: cost_of(one, curves) for one in active}
    _check(schedule, active, costs)
    disk = _chain(schedule.read, (Work(0.0, costs[key].disk) for key in schedule.read))
    read_s = {use.key: use.end_s for use in disk}
    on_cpu = [Work(read_s.get(key, 0.0), costs[key].cpu) for key in schedule.on_cpu]
    on_link = [Work(read_s.get(key, 0.0), costs[key].link) for key in schedule.uploaded]
    if on_cpu and curves.cpu_start_s > 0:
        on_cpu.insert(0, Work(0.0, curves.cpu_start_s))
    cpu_spans, link_spans = contend(on_cpu, on_link, curves.cpu_beside_link, curves.link_beside_cpu)
    cpu = _uses(schedule.on_cpu, cpu_spans[len(cpu_spans) - len(schedule.on_cpu) :])
    link = _uses(schedule.uploaded, link_spans)
    on_gpu = (*schedule.on_gpu, *schedule.uploaded)
    ready = [0.0] * len(schedule.on_gpu) + [use.end_s for use in link]
    gpu = _chain(on_gpu, (Work(at, costs[key].gpu) for key, at in zip(on_gpu, ready, strict=True)))
    span_s = max((uses[-1].end_s for uses in (gpu, cpu, link, disk) if uses), default=0.0)
    cpu_busy_s = sum(end - begin for begin, end in cpu_spans)
    return Timeline(
        span_s, _lane(gpu, span_s), _lane(cpu, span_s, cpu_busy_s), _lane(link, span_s), _lane(disk, span_s)
    )


def _turn(turns: Sequence[Work], index: int, free_s: float) -> tuple[float, float]:
    """Return when the next turn starts, and its work; there may be none left."""
    if index == len(turns):
        return math.inf, 0.0
    return max(free_s, turns[index].release_s), turns[index].work_s


def _alone(
    turns: Sequence[Work], spans: list[tuple[float, float]], start_s: float, now: float, left_s: float
) -> list[tuple[float, float]]:
    """Return the spans of all turns, the present one with ``left_s`` to go, the other resource being done."""
    if len(spans) == len(turns):
        return spans
    end_s = max(now, start_s) + left_s
    rest = [Work(max(end_s, turn.release_s), turn.work_s) for turn in turns[len(spans) + 1 :]]
    return [*spans, (start_s, end_s), *_serial(rest)]


def _serial(turns: Sequence[Work]) -> list[tuple[float, float]]:
    spans, free_s = [], 0.0
    for release_s, work_s in turns:
        start_s = max(free_s, release_s)
        free_s = start_s + work_s
        spans.append((start_s, free_s))
    return spans


def _uses(keys: Sequence[Key], spans: Sequence[tuple[float, float]]) -> tuple[Use, ...]:
    return tuple(Use(key, *span) for key, span in zip(keys, spans, strict=True))


def _chain(keys: Sequence[Key], turns: Iterable[Work]) -> tuple[Use, ...]:
    return _uses(keys, _serial(list(turns)))


def _lane(uses: tuple[Use, ...], span_s: float, busy_s: float | None = None) -> Lane:
    busy = sum(use.end_s - use.start_s for use in uses) if busy_s is None else busy_s
    return Lane(busy, max(0.0, span_s - busy), uses[-1].end_s if uses else 0.0, uses)


def _check(schedule: Schedule, active: Sequence[Active], costs: Mapping[Key, Cost]) -> None:
    """Raise unless the schedule puts each of these experts in one place where it can run."""
    named = sorted((*schedule.on_gpu, *schedule.uploaded, *schedule.on_cpu))
    faults = []
    if named != sorted(costs) or len(costs) != len(active):
        faults.append(f"it names {named}, the event has {sorted(one.key for one in active)}; name each once")
    places = {one.key: one.place for one in active}
    faults += [f"{key} is not resident; upload it first" for key in schedule.on_gpu if places.get(key) != "gpu"]
    faults += [f"{key} is resident; do not upload it" for key in schedule.uploaded if places.get(key) == "gpu"]
    faults += [
        f"{key} lies in the GPU's memory only; compute it there"
        for key in schedule.on_cpu
        if key in costs and costs[key].cpu == math.inf
    ]
    if sorted(schedule.read) != sorted(key for key, place in places.items() if place == "flash"):
        faults.append(f"it reads {sorted(schedule.read)}; read what lies in flash, each once")
    if faults:
        raise InputError.collect("schedule of an event", faults)


def _union(uses: Iterable[Use]) -> list[Use]:
    """Return the uses' times as disjoint spans in order."""
    spans: list[Use] = []
    for use in sorted(uses, key=lambda use: use.start_s):
        if spans and use.start_s <= spans[-1].end_s:
            spans[-1] = spans[-1]._replace(end_s=max(spans[-1].end_s, use.end_s))
        else:
            spans.append(use)
    return spans


def _common_s(ones: Iterable[Use], others: Sequence[Use]) -> float:
    return sum(
        max(0.0, min(one.end_s, other.end_s) - max(one.start_s, other.start_s)) for one in ones for other in others
    )
