"""One missing expert of an event computed by two: some of its inner columns on the GPU, the others on the CPU.

What an expert returns is a sum over its inner dimension (rows of gate and up, columns of down), so that its slices
can be computed in different places and their results added up. An event of decoding misses few, and one copy takes
as long as the CPU needs for two or three of them, so that whole experts leave the link or the CPU idle. Dividing one
closes that gap; two machines need no second division (McNaughton, Management Science 1959).

What a runtime needs for it: records packed slice by slice, so that a share of one is one copy; a slot of VRAM that
belongs to no resident, where the share arrives. The GPU waits for the copy's event as for any upload's, and both sides
pay a launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from edgeflex.runtimes.ahead_time import event_time

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from edgeflex.runtimes.curves import Curves
    from edgeflex.runtimes.timeline import Active, Cost, Key, Schedule

__all__ = ["PARTS", "Divider", "Division"]

PARTS = 16  # slices that a record is packed in
_SAME = 1e-9


@dataclass(frozen=True)
class Division:
    """What is divided: it stands in ``uploaded`` and in ``on_cpu`` of the schedule.

    Attributes:
        key: The expert.
        share: Of it that is copied and computed on the GPU.
        cost: Of the two parts together: link and GPU of one, CPU of the other.
    """

    key: Key
    share: float
    cost: Cost


class Divider:
    """Divides one expert of a schedule where that ends earlier by more than the worth it loses.

    Args:
        curves: Of the machine.
        part_s: What the second launch costs on either side; infinite: nothing is divided.
    """

    def __init__(self, curves: Curves, part_s: float) -> None:
        self._curves, self._part_s = curves, part_s
        self._known: dict[tuple[object, ...], tuple[int, float, Cost, float] | None] = {}

    def divide(
        self,
        plan: Schedule,
        active: Sequence[Active],
        costs: Mapping[Key, Cost],
        whole: Collection[Key] = (),
        link_price: float = 0.0,
    ) -> tuple[Schedule, Division | None]:
        """Return the schedule, and what it divides; of its times ``span_s`` is kept true.

        Args:
            plan: Of whole experts.
            active: The event's; the schedule depends on their order and shapes only.
            costs: Of each.
            whole: What must not be divided.
            link_price: Later seconds that each of the link's would save if it copied ahead instead.
        """
        if (not plan.on_cpu and not plan.uploaded) or self._part_s == inf:
            return plan, None
        candidates = _candidates(plan, {one.key: one for one in active}, whole)
        shape = (
            tuple([(one.place, one.rows, one.size_bytes, one.ram_copy, one.worth_s) for one in active]),
            tuple([[one.key for one in active].index(key) for key, _ in candidates]),
            link_price,
        )
        if shape not in self._known:
            self._known[shape] = self._best(plan, active, costs, candidates, link_price)
        found = self._known[shape]
        if found is None:
            return plan, None
        number, share, cost, span_s = found
        key, other = candidates[number]
        return replace(other, span_s=span_s), Division(key, share, cost)

    def _best(
        self,
        plan: Schedule,
        active: Sequence[Active],
        costs: Mapping[Key, Cost],
        candidates: Sequence[tuple[Key, Schedule]],
        link_price: float,
    ) -> tuple[int, float, Cost, float] | None:
        one_of = {one.key: one for one in active}
        least_s, found = plan.span_s * (1.0 - _SAME), None
        for number, (key, other) in enumerate(candidates):
            uploaded = key in plan.uploaded
            for part in range(1, PARTS):
                cost = self._cost(costs[key], one_of[key].size_bytes, part / PARTS)
                span_s = event_time(other, {**costs, key: cost}, self._curves).span_s
                lost_s = one_of[key].worth_s * uploaded + link_price * (cost.link - costs[key].link * uploaded)
                if span_s + lost_s < least_s:
                    least_s, found = span_s + lost_s, (number, part / PARTS, cost, span_s)
        return found

    def _cost(self, whole: Cost, size_bytes: int, share: float) -> Cost:
        return whole._replace(
            gpu=share * whole.gpu + self._part_s,
            cpu=(1.0 - share) * whole.cpu + self._part_s,
            link=self._curves.link_s(int(share * size_bytes)),
        )


def _candidates(plan: Schedule, one_of: Mapping[Key, Active], whole: Collection[Key]) -> list[tuple[Key, Schedule]]:
    """Return the last expert of either side, with the schedule in which both have it, last."""
    found = []
    for keys in (plan.on_cpu, plan.uploaded):
        missing = [key for key in keys if one_of[key].place == "ram" and key not in whole]
        if missing:
            key = missing[-1]
            uploaded, on_cpu = ((*[one for one in side if one != key], key) for side in (plan.uploaded, plan.on_cpu))
            found.append((key, replace(plan, uploaded=uploaded, on_cpu=on_cpu, proven=False)))
    return found
