"""One missing expert of an event computed by two: some of its inner columns on the GPU, the others on the CPU.

What an expert returns is a sum over its inner dimension (rows of gate and up, columns of down), so that its slices
can be computed in different places and their results added up. An event of decoding misses few, and one copy takes
as long as the CPU needs for two or three of them, so that whole experts leave the link or the CPU idle. Dividing one
closes that gap; two machines need no second division (McNaughton, Management Science 1959).

Experts lie in RAM slice by slice (see ``cuda_slices``), so that the first slices of one are one copy, and the CPU reads
the rest where it lies. The copy goes to a place of VRAM that belongs to no resident (``staged_bytes``). The GPU waits
for the copy's event as for any upload's, and both sides pay a launch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING

from edgeflex.runtimes.ahead_time import event_time
from edgeflex.runtimes.schedule import Scheduler
from edgeflex.runtimes.timeline import Active, cost_of
from edgeflex.schema import Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from edgeflex.runtimes.curves import Curves
    from edgeflex.runtimes.timeline import Cost, Key, Schedule

__all__ = [
    "CPU_IN_SLICES",
    "HEAD_SHARE",
    "SLICES",
    "Divider",
    "Division",
    "copied_share",
    "cpu_in_slices",
    "pays",
    "slices_of",
    "staged_bytes",
]

SLICES = 16  # that a record lies in, at most
GROUP = 32  # inner columns that a slice is a multiple of: four bits share a scale over so many
LEAST_COLUMNS = 128  # of a slice: of fewer the CPU's kernel reads too short pieces, and takes up to a fifth longer
HEAD_SHARE = 1 / 256  # of a record, at most, what every share needs beside its slices (scales of down in int8)
# How much longer the CPU's kernels take over an expert in slices than over a whole one, as measured by
# benchmarks/sliced_experts.py: means over the experts of six decoders, read from memory by an AMD EPYC of 2024 (Zen 5,
# AVX-512); the larger of those with one thread and with two. For simulations; a run measures its own machine.
CPU_IN_SLICES: Mapping[Precision, float] = {
    Precision.FP32: 1.033,
    Precision.INT8_DYNAMIC: 1.050,
    Precision.INT4_GROUP32: 1.032,
}
_LACKING = (1, 2, 3, 4)  # experts that an event of decoding lacks, mostly
_SAME = 1e-9


def slices_of(inner: int) -> int:
    """Return how many equal slices an expert of ``inner`` columns lies in; 1: it stays whole."""
    groups, rest = divmod(inner, GROUP)
    most = max(1, min(SLICES, inner // LEAST_COLUMNS))
    return 1 if rest else max(count for count in range(1, most + 1) if groups % count == 0)


def cpu_in_slices(precision: Precision) -> float:
    """Return how much longer a CPU takes over experts in slices where none was measured; see ``Curves``.

    Args:
        precision: Of the experts; one that was not measured is taken for the one of as many bits, or for floats.
    """
    like = {8: Precision.INT8_DYNAMIC, 4: Precision.INT4_GROUP32}.get(precision.bits, Precision.FP32)
    return CPU_IN_SLICES[like]


def copied_share(share: float) -> float:
    """Return what of a record is copied, at most, where a share of it is."""
    return share + (1.0 - share) * HEAD_SHARE


def staged_bytes(vram_bytes: int, ram_bytes: int, *, total_bytes: int, largest_bytes: int, exclusive: bool) -> int:
    """Return the bytes of VRAM, off those for experts, where a share arrives; 0: nothing is divided.

    Experts that come from flash are slow for another reason, and sliced only when they have come; so nothing is divided
    unless RAM holds all of them.

    Args:
        vram_bytes: Of experts.
        ram_bytes: Of experts.
        total_bytes: Of all experts.
        largest_bytes: Of the largest.
        exclusive: Whether RAM keeps no copy of what VRAM holds.
    """
    divides = not exclusive and ram_bytes >= total_bytes and 2 * largest_bytes < vram_bytes < total_bytes
    return largest_bytes if divides else 0


def pays(curves: Curves, part_s: float, *, size_bytes: int, slices: int) -> bool:
    """Return whether events that lack a few experts end earlier with one divided, though slices slow the CPU.

    Args:
        curves: Of whole experts.
        part_s: As of ``Divider``.
        size_bytes: Of an expert.
        slices: In which it lies.
    """
    if slices == 1 or part_s == inf:
        return False
    laid = curves.in_slices()
    divider, gained_s = Divider(laid, part_s, lambda _: slices), 0.0
    for count in _LACKING:
        active = [Active((0, number), 1, size_bytes, "ram") for number in range(count)]
        costs = {one.key: cost_of(one, laid) for one in active}
        plan, _ = divider.divide(Scheduler(laid).schedule(active), active, costs)
        gained_s += Scheduler(curves).schedule(active).span_s - plan.span_s
    return gained_s > 0.0


@dataclass(frozen=True)
class Division:
    """What is divided: it stands in ``uploaded`` and in ``on_cpu`` of the schedule.

    Attributes:
        key: The expert.
        slices: Of it that are copied and computed on the GPU, the first ones.
        share: What that is of the whole.
        cost: Of the two parts together: link and GPU of one, CPU of the other.
    """

    key: Key
    slices: int
    share: float
    cost: Cost


class Divider:
    """Divides one expert of a schedule where that ends earlier by more than the worth it loses.

    Args:
        curves: Of the machine.
        part_s: What the second launch costs on either side; infinite: nothing is divided.
        slices: That an expert lies in; None: ``SLICES`` for all.
    """

    def __init__(self, curves: Curves, part_s: float, slices: Callable[[Key], int] | None = None) -> None:
        self._curves, self._part_s, self._slices = curves, part_s, slices
        self._known: dict[tuple[object, ...], tuple[int, int, Cost, float] | None] = {}

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
        candidates = _candidates(plan, active, whole)
        slices = [SLICES if self._slices is None else self._slices(key) for key in candidates]
        keys = [one.key for one in active]
        shape = tuple(map(_shape, active)), tuple(map(keys.index, candidates)), tuple(slices), link_price
        if shape not in self._known:
            self._known[shape] = self._best(plan, active, costs, candidates, slices, link_price)
        found = self._known[shape]
        if found is None:
            return plan, None
        number, part, cost, span_s = found
        key = candidates[number]
        return replace(_shared(plan, key), span_s=span_s), Division(key, part, part / slices[number], cost)

    def _best(
        self,
        plan: Schedule,
        active: Sequence[Active],
        costs: Mapping[Key, Cost],
        candidates: Sequence[Key],
        slices: Sequence[int],
        link_price: float,
    ) -> tuple[int, int, Cost, float] | None:
        one_of = {one.key: one for one in active}
        least_s, found = plan.span_s * (1.0 - _SAME), None
        for number, key in enumerate(candidates):
            other = _shared(plan, key)
            uploaded, shared = key in plan.uploaded, dict(costs)
            cpu_s = sum([costs[one].cpu for one in other.on_cpu if one != key])
            link_s = sum([costs[one].link for one in other.uploaded if one != key])
            for part in range(1, slices[number]):
                cost = shared[key] = self._cost(costs[key], one_of[key].size_bytes, part / slices[number])
                lost_s = one_of[key].worth_s * uploaded + link_price * (cost.link - costs[key].link * uploaded)
                # no event ends before the work of either resource; most parts are ruled out so, and need no timeline
                if max(cpu_s + cost.cpu, link_s + cost.link) * (1.0 - _SAME) + lost_s >= least_s:
                    continue
                span_s = event_time(other, shared, self._curves).span_s
                if span_s + lost_s < least_s:
                    least_s, found = span_s + lost_s, (number, part, cost, span_s)
        return found

    def _cost(self, whole: Cost, size_bytes: int, share: float) -> Cost:
        return whole._replace(
            gpu=share * whole.gpu + self._part_s,
            cpu=(1.0 - share) * whole.cpu + self._part_s,
            link=self._curves.link_s(int(copied_share(share) * size_bytes)),
        )


# all that a division depends on
_shape = attrgetter("place", "rows", "size_bytes", "kind", "ram_copy", "worth_s")


def _candidates(plan: Schedule, active: Sequence[Active], whole: Collection[Key]) -> list[Key]:
    """Return the last expert of either side that may be divided."""
    missing = {one.key for one in active if one.place == "ram" and one.key not in whole}
    sides = [[key for key in keys if key in missing] for keys in (plan.on_cpu, plan.uploaded)]
    return [side[-1] for side in sides if side]


def _shared(plan: Schedule, key: Key) -> Schedule:
    """Return the schedule in which both sides have an expert, last."""
    uploaded, on_cpu = ((*[one for one in side if one != key], key) for side in (plan.uploaded, plan.on_cpu))
    return replace(plan, uploaded=uploaded, on_cpu=on_cpu, proven=False)
