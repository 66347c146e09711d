"""The rules of published systems, each giving a schedule of the same form as ours, to be judged on the same curves.

A rule decides by its own numbers; what its decision costs is told by the true curves. Those systems know no flash
tier: what lies there is to them an expert in RAM, and is read first, in the order of use that ``arrange`` gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgeflex.runtimes.schedule_search import Event

__all__ = ["PointerCosts", "fiddler_uploads", "hybrimoe_costs", "pointer_uploads"]


class PointerCosts(NamedTuple):
    """What the two-pointer rule weighs, per job: GPU, CPU and move, in any common unit."""

    gpu: Callable[[int], float]
    cpu: Callable[[int], float]
    move: Callable[[int], float]


def hybrimoe_costs(rows: Sequence[int]) -> PointerCosts:
    """Return HybriMoE's published constants (its code: cpu 1 · tokens + 0.79, gpu 0.5, move 0.41791011235117914)."""
    return PointerCosts(lambda _: 0.5, lambda i: 1.0 * rows[i] + 0.79, lambda _: 0.41791011235117914)


def pointer_uploads(event: Event, rows: Sequence[int], costs: PointerCosts) -> list[int]:
    """Return which free jobs the two-pointer rule gives to the GPU (HybriMoE, DAC 2025, section 3).

    Residents by falling rows, then the others by falling rows; the GPU takes from the head while it would be done
    no later than the CPU with the tail, which the CPU takes otherwise. A head that is not resident waits for its
    copy. A tail that only the GPU's memory holds cannot go to the CPU, and goes to the GPU.
    """
    jobs, free = event.jobs, set(event.free)
    line = sorted(range(len(jobs)), key=lambda i: (jobs[i].place != "gpu", -rows[i], i))
    gpu, cpu, moved, chosen = 0.0, 0.0, 0.0, list[int]()
    while line:
        head, tail = line[0], line[-1]
        resident = jobs[head].place == "gpu"
        move = 0.0 if resident else costs.move(head)
        gpu_after = gpu + costs.gpu(head) + (0.0 if resident else max(0.0, moved + move - gpu))
        if gpu_after <= cpu + costs.cpu(tail) or tail not in free:
            chosen.append(line.pop(0))
            gpu, moved = gpu_after, moved + move
        else:
            cpu += costs.cpu(line.pop())
    return [i for i in chosen if i in free]


def fiddler_uploads(event: Event, rows: Sequence[int]) -> list[int]:
    """Return which free jobs Fiddler gives to the GPU: resident ones, and those with 7 · rows above 70.

    Its code sums the costs, so that each expert decides for itself; an expert of 10 rows stays on the CPU.
    """
    return [i for i in event.free if event.jobs[i].place == "gpu" or 7 * rows[i] > 70]
