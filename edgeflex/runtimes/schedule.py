"""Where to compute each active expert of a layer: resident on the GPU, uploaded to it, or on the CPU.

An event is one layer's set of distinct active experts in one forward pass. Its schedule is to end as early as
possible, that is to minimise max(T_gpu, T_cpu), the GPU fed by the link, on curves measured on this machine; the
rules in time stand in ``timeline``. HybriMoE's two-pointer rule is where the search starts; small events are then
searched to the end, large ones locally, and each answer says how far it may be from the best.

Two experts of the same size, rows and kind cost the same: the one named earlier in ``active`` is uploaded first and
goes to the CPU last, so a caller lists first what it would rather have in the GPU's memory.
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING

from edgeflex.errors import InputError
from edgeflex.runtimes.curves import Curve, Curves, ErrorStatistics, Refit, Resource
from edgeflex.runtimes.schedule_rules import PointerCosts, fiddler_uploads, hybrimoe_costs, pointer_uploads
from edgeflex.runtimes.schedule_search import Event, Found, Job, arrange, ends_of, search
from edgeflex.runtimes.timeline import (
    Active,
    Cost,
    Key,
    Lane,
    Place,
    Schedule,
    Timeline,
    Use,
    contend,
    cost_of,
    simulate,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "Active",
    "Curve",
    "Curves",
    "ErrorStatistics",
    "Key",
    "Lane",
    "Place",
    "Refit",
    "Resource",
    "Schedule",
    "Scheduler",
    "Timeline",
    "Use",
    "all_cpu",
    "all_upload",
    "contend",
    "fiddler",
    "hybrimoe",
    "schedule",
    "simulate",
    "static",
    "two_pointer",
]

_EFFORT = 1500  # nodes of the exact search: a few milliseconds at most


def schedule(active: Sequence[Active], curves: Curves, *, effort: int = _EFFORT) -> Schedule:
    """Return the schedule of one event with the least span, less the worth of what it uploads.

    Args:
        active: The event's distinct experts; of equal ones the earlier is uploaded first.
        curves: Of this machine.
        effort: Nodes that the exact search of a small event may visit before it gives what it has, not proven.

    Raises:
        InputError: An expert is named twice, or has no rows, a negative size or an unknown place.
    """
    event = _event(active, curves)
    found = search(event, effort=effort, starts=[_pointer_choice(active, event)])
    return _scheduled([one.key for one in active], event, found)


class Scheduler:
    """``schedule`` with a memory: events of one shape (decode has few) are searched once.

    Attributes:
        curves: In force; after a refit make a new scheduler.
    """

    def __init__(self, curves: Curves, *, effort: int = _EFFORT, shapes: int = 4096) -> None:
        """Start with no memory.

        Args:
            curves: Of this machine.
            effort: As of ``schedule``.
            shapes: Remembered at most; then all are forgotten.
        """
        self.curves, self._effort, self._limit = curves, effort, shapes
        self._known: dict[tuple[object, ...], Schedule] = {}  # of experts named (0, place in the order of shapes)
        self._costs: dict[tuple[object, ...], Cost] = {}

    def schedule(self, active: Sequence[Active]) -> Schedule:
        """Return what ``schedule(active, curves)`` gives, up to the choice among equally good ones.

        Raises:
            InputError: As of ``schedule``.
        """
        shapes = [*map(_shape, active)]
        order = sorted(range(len(shapes)), key=shapes.__getitem__)  # stable: equal experts keep the caller's order
        shape = tuple([shapes[i] for i in order])
        keys = [active[i].key for i in order]
        plan = self._known.get(shape)
        if plan is None or len(set(keys)) < len(keys):
            plan = self._search(shape, [active[i] for i in order])
        return Schedule(
            tuple([keys[i] for _, i in plan.on_gpu]),
            tuple([keys[i] for _, i in plan.uploaded]),
            tuple([keys[i] for _, i in plan.on_cpu]),
            tuple([keys[i] for _, i in plan.read]),
            plan.gpu_s,
            plan.cpu_s,
            plan.link_s,
            plan.disk_s,
            plan.span_s,
            plan.bound_s,
            plan.proven,
        )

    def costs(self, active: Sequence[Active]) -> dict[Key, Cost]:
        """Return what each expert costs, as ``cost_of`` does."""
        return dict(zip([one.key for one in active], self._costs_of(active), strict=True))

    def _costs_of(self, active: Sequence[Active]) -> list[Cost]:
        known, shapes = self._costs, [*map(_cost_shape, active)]
        for one, shape in zip(active, shapes, strict=True):
            if shape not in known:
                known[shape] = cost_of(one, self.curves)
        return [known[shape] for shape in shapes]

    def _search(self, shape: tuple[object, ...], line: Sequence[Active]) -> Schedule:
        """Search an event's schedule and remember it, its experts named by their places."""
        if len(self._known) >= self._limit:
            self._known.clear()
            self._costs.clear()
        event = _event(line, self.curves, self._costs_of(line))
        found = search(event, effort=self._effort, starts=[_pointer_choice(line, event)])
        plan = _scheduled([(0, place) for place in range(len(line))], event, found)
        self._known[shape] = plan
        return plan


def all_cpu(active: Sequence[Active], curves: Curves) -> Schedule:
    """Return everything on the CPU, but for what only the GPU's memory holds.

    Raises:
        InputError: As of ``schedule``.
    """
    return _ruled(active, _event(active, curves), [])


def all_upload(active: Sequence[Active], curves: Curves) -> Schedule:
    """Return every missing expert uploaded, nothing on the CPU (llama.cpp's expert cache).

    Raises:
        InputError: As of ``schedule``.
    """
    event = _event(active, curves)
    return _ruled(active, event, event.free)


def static(active: Sequence[Active], curves: Curves) -> Schedule:
    """Return residents on the GPU, all others on the CPU (KTransformers' masks).

    Raises:
        InputError: As of ``schedule``.
    """
    event = _event(active, curves)
    return _ruled(active, event, [i for i in event.free if active[i].place == "gpu"])


def two_pointer(active: Sequence[Active], curves: Curves) -> Schedule:
    """Return HybriMoE's two-pointer rule on the measured curves.

    Raises:
        InputError: As of ``schedule``.
    """
    event = _event(active, curves)
    return _ruled(active, event, _pointer_choice(active, event))


def hybrimoe(active: Sequence[Active], curves: Curves, *, decoding: bool = True) -> Schedule:
    """Return HybriMoE's rule with its published constants; in prefill, everything on the GPU.

    Raises:
        InputError: As of ``schedule``.
    """
    event, rows = _event(active, curves), [one.rows for one in active]
    return _ruled(active, event, pointer_uploads(event, rows, hybrimoe_costs(rows)) if decoding else event.free)


def fiddler(active: Sequence[Active], curves: Curves) -> Schedule:
    """Return Fiddler's rule: a missing expert of n rows costs 7 n on the CPU or 70 on the GPU, the less is taken.

    Raises:
        InputError: As of ``schedule``.
    """
    event = _event(active, curves)
    return _ruled(active, event, fiddler_uploads(event, [one.rows for one in active]))


# all that a schedule depends on
_shape = attrgetter("place", "size_bytes", "rows", "kind", "ram_copy", "worth_s")
_cost_shape = attrgetter("place", "size_bytes", "rows", "kind", "ram_copy")


def _event(active: Sequence[Active], curves: Curves, known: Sequence[Cost] | None = None) -> Event:
    """Return the event in seconds; ``known`` costs are those of these experts on the same curves."""
    faults = [
        f"{one.key} has {one.rows} rows, {one.size_bytes} bytes, place {one.place!r}, worth {one.worth_s} s; give at "
        "least 1 row, no negative size or worth, and gpu, ram or flash"
        for one in active
        if not (
            one.rows >= 1
            and one.size_bytes >= 0
            and one.place in {"gpu", "ram", "flash"}
            and 0 <= one.worth_s < math.inf
        )
    ]
    if len({one.key for one in active}) < len(active):
        faults.append(f"an expert stands twice in {sorted(one.key for one in active)}; sum its rows")
    if faults:
        raise InputError.collect("event", faults)
    costs = [cost_of(one, curves) for one in active] if known is None else known
    # what is resident is not uploaded, and so brings nothing more later
    jobs = [
        Job(cost, one.place, 0.0 if one.place == "gpu" else one.worth_s)
        for one, cost in zip(active, costs, strict=True)
    ]
    return Event(
        jobs,
        cpu_factor=curves.cpu_beside_link,
        link_factor=curves.link_beside_cpu,
        cpu_start_s=curves.cpu_start_s,
    )


def _pointer_choice(active: Sequence[Active], event: Event) -> list[int]:
    """Return what the two-pointer rule gives to the GPU on the event's own seconds."""
    jobs = event.jobs
    costs = PointerCosts(
        lambda i: jobs[i].cost.gpu, lambda i: jobs[i].cost.cpu, lambda i: jobs[i].cost.disk + jobs[i].cost.link
    )
    return pointer_uploads(event, [one.rows for one in active], costs)


def _ruled(active: Sequence[Active], event: Event, uploads: Iterable[int]) -> Schedule:
    """Return a rule's choice as a schedule; nothing is claimed of it."""
    found = Found(arrange(event, uploads), 0.0, 0.0, proven=False)
    return _scheduled([one.key for one in active], event, found)


def _scheduled(keys: Sequence[Key], event: Event, found: Found) -> Schedule:
    """Return what was found in terms of keys, which are in the order of the event's jobs."""
    order, ends = found.order, ends_of(event, found.order)
    kept = [i for i in order.uploaded if event.jobs[i].place == "gpu"]
    return Schedule(
        on_gpu=tuple(keys[i] for i in sorted([*event.pinned, *kept])),
        uploaded=tuple(keys[i] for i in order.uploaded if event.jobs[i].place != "gpu"),
        on_cpu=tuple(keys[i] for i in order.on_cpu),
        read=tuple(keys[i] for i in order.read),
        gpu_s=ends.gpu,
        cpu_s=ends.cpu,
        link_s=ends.link,
        disk_s=ends.disk,
        span_s=max(ends),
        bound_s=found.bound_s,
        proven=found.proven,
    )
