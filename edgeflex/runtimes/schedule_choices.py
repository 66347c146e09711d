"""Exact search for an event without flash: only who computes what is open, since Johnson's order is best for all.

The same branch and bound as ``schedule_search`` makes with reads, without the clocks of the disk, and quicker by far:
most events of decoding read nothing, and one is searched while the device waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from edgeflex.runtimes.schedule_bounds import Bounds
    from edgeflex.runtimes.schedule_search import Best

__all__ = ["ChoiceSearch"]


class _Choice(NamedTuple):
    """One job to be decided."""

    job: int
    cpu_s: float
    link_s: float
    gpu_s: float
    resident: bool
    worth_s: float
    group: int


class _Rest(NamedTuple):
    """What the jobs not yet decided add to each bound."""

    link_s: float
    gpu_s: float
    worth_s: float


class ChoiceSearch:
    """Depth-first branch and bound over the sides of the free jobs, in Johnson's order.

    Args:
        best: What was found so far; better orders are offered to it.
        bounds: Of the same event, which has no flash.
        effort: Nodes at most.
    """

    def __init__(self, best: Best, bounds: Bounds, effort: int) -> None:
        event = best.event
        self._best, self._left, self._start_s = best, effort, event.cpu_start_s
        self._slack_s = best.slack_s
        self._line: list[_Choice] = []
        worths = [event.jobs[i].worth_s for i in event.free]
        self._rest = [_Rest(sum(bounds.link_adds.values()), sum(bounds.gpu_adds.values()), sum(worths))]
        for i in event.free:
            cost, place, worth_s = event.jobs[i]
            self._line.append(_Choice(i, cost.cpu, cost.link, cost.gpu, place == "gpu", worth_s, event.group[i]))
            link_s, gpu_s, rest_s = self._rest[-1]
            self._rest.append(_Rest(link_s - bounds.link_adds[i], gpu_s - bounds.gpu_adds[i], rest_s - worth_s))
        self._weights = (*bounds.link, *bounds.gpu)
        self._path: list[tuple[int, bool]] = []  # (job, whether uploaded)

    def run(self) -> bool:
        """Search; return whether the effort sufficed."""
        self._choose(0, 0.0, 0.0, self._best.event.gpu_s, 0.0, -1)
        return self._left > 0

    def _choose(self, position: int, cpu_s: float, link_s: float, gpu_s: float, worth_s: float, barred: int) -> None:
        """Decide one job, the earlier done on their resources at these times; of equal ones the uploaded come first.

        Args:
            position: In the line.
            cpu_s: When the CPU is free; ``link_s`` and ``gpu_s`` likewise.
            link_s: See ``cpu_s``.
            gpu_s: See ``cpu_s``.
            worth_s: Of what was uploaded.
            barred: Group of which one went to the CPU.
        """
        self._left -= 1
        link_cpu, link_other, gpu_cpu, gpu_other = self._weights
        rest = self._rest[position]
        bound_s = max(
            max(cpu_s, gpu_s) - rest.worth_s,
            link_cpu * cpu_s + link_other * link_s + rest.link_s,
            gpu_cpu * cpu_s + gpu_other * gpu_s + rest.gpu_s,
        )
        if self._left <= 0 or bound_s - worth_s >= self._best.objective_s - self._slack_s:
            return
        if position == len(self._line):
            self._best.offer_path(self._path)
            return
        i, cpu_cost, link_cost, gpu_cost, resident, worth, group = self._line[position]
        cpu_after = (cpu_s if cpu_s > 0 else self._start_s) + cpu_cost
        link_after = link_s + link_cost
        gpu_after = (gpu_s if resident or gpu_s > link_after else link_after) + gpu_cost
        # the side that leaves the later resource free earlier goes first
        sides = (False, True) if max(cpu_after, gpu_s) <= max(cpu_s, gpu_after) else (True, False)
        for up in sides:
            if up and group == barred:
                continue
            self._path.append((i, up))
            if up:
                self._choose(position + 1, cpu_s, link_after, gpu_after, worth_s + worth, barred)
            else:
                self._choose(position + 1, cpu_after, link_s, gpu_s, worth_s, group)
            self._path.pop()
