"""Exit policies: thresholds per exit, searched on the outputs of a calibrated model. Pure NumPy.

A policy leaves at the first exit whose greatest probability is at least its threshold; None never leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Thresholds = tuple[float | None, ...]

_CUTS = 96  # candidate thresholds an exit: finer cuts fit noise of a few thousand images
_SWEEPS = 6


@dataclass(frozen=True)
class ExitOutputs:
    """What every exit says about every image.

    Attributes:
        confidence: Greatest probability, float64 [n, exits].
        correct: Whether the most probable class is the label, bool [n, exits].
    """

    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]

    @property
    def exits(self) -> int:
        """Number of exits, the last included."""
        return int(self.confidence.shape[1])


@dataclass(frozen=True)
class Policy:
    """Thresholds with what they do on the images they were judged on.

    Attributes:
        thresholds: One per exit but the last.
        reach: Probability of running each segment, [exits].
        error: Share of wrong answers.
        cost: Mean cost in the unit of the costs given.
    """

    thresholds: Thresholds
    reach: tuple[float, ...]
    error: float
    cost: float


def exit_outputs(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> ExitOutputs:
    """Return confidence and correctness from probabilities [n, exits, classes] and labels [n]."""
    return ExitOutputs(
        confidence=probabilities.max(axis=-1).astype(np.float64),
        correct=probabilities.argmax(axis=-1) == labels[:, None],
    )


def exits_taken(outputs: ExitOutputs, thresholds: Thresholds) -> NDArray[np.int64]:
    """Return the exit [n] at which each image leaves."""
    taken = np.full(len(outputs.confidence), outputs.exits - 1, dtype=np.int64)
    for exit_index in range(outputs.exits - 2, -1, -1):
        threshold = thresholds[exit_index]
        if threshold is not None:
            taken[outputs.confidence[:, exit_index] >= threshold] = exit_index
    return taken


def reach_of(taken: NDArray[np.int64], exits: int) -> tuple[float, ...]:
    """Return the share of images that run each segment."""
    return tuple(float(np.mean(taken >= index)) for index in range(exits))


def judge(outputs: ExitOutputs, thresholds: Thresholds, block_cost: Sequence[float]) -> Policy:
    """Return the policy with its reach, error and mean cost on ``outputs``."""
    taken = exits_taken(outputs, thresholds)
    # what no image here reached, another may, unless an earlier exit lets everything leave
    least = 1.0 / (len(taken) + 1)
    reach = tuple(
        share if share > 0 or 0.0 in thresholds[:index] else least
        for index, share in enumerate(reach_of(taken, outputs.exits))
    )
    right = outputs.correct[np.arange(len(taken)), taken]
    cost = float(np.dot(reach, np.asarray(block_cost)))
    return Policy(thresholds, reach, float(1.0 - right.mean()), cost)


def _cut(confidence: NDArray[np.float64], leave: NDArray[np.float64], stay: NDArray[np.float64]) -> float | None:
    """Return the threshold that costs least: those at or above pay ``leave``, those below ``stay``."""
    order = np.argsort(-confidence, kind="stable")
    gain = np.concatenate([[0.0], np.cumsum((leave - stay)[order])])
    ranked = confidence[order]
    # a cut between equal confidences is no cut
    possible = np.concatenate([[True], ranked[1:] < ranked[:-1], [True]])
    step = max(1, len(order) // _CUTS)
    possible[1:-1] &= np.arange(1, len(order)) % step == 0
    best = int(np.argmin(np.where(possible, gain, np.inf)))
    if best == 0:
        return None
    return 0.0 if best == len(order) else float((ranked[best - 1] + ranked[best]) / 2)


def _descend(outputs: ExitOutputs, start: Thresholds, costs: NDArray[np.float64], price: float) -> Thresholds:
    """Improve thresholds one exit at a time, exactly, from the last to the first, until none changes."""
    thresholds = list(start)
    paid = (~outputs.correct) + price * costs[None, :]  # [n, exits]
    for _ in range(_SWEEPS):
        before = list(thresholds)
        later = paid[:, -1].copy()
        for index in range(outputs.exits - 2, -1, -1):
            inside = np.ones(len(later), dtype=bool)
            for earlier in range(index):
                threshold = thresholds[earlier]
                if threshold is not None:
                    inside &= outputs.confidence[:, earlier] < threshold
            here = outputs.confidence[:, index]
            thresholds[index] = _cut(here[inside], paid[inside, index], later[inside]) if inside.any() else None
            threshold = thresholds[index]
            if threshold is not None:
                later = np.where(here >= threshold, paid[:, index], later)
        if thresholds == before:
            break
    return tuple(thresholds)


def _rank_cut(outputs: ExitOutputs, ratio: float) -> Thresholds:
    """Return thresholds that spread the exits geometrically (MSDNet, Huang et al. 2018, section 4)."""
    shares = ratio ** np.arange(outputs.exits)
    shares = shares / shares.sum()
    inside = np.ones(len(outputs.confidence), dtype=bool)
    thresholds: list[float | None] = []
    left = 1.0
    for index in range(outputs.exits - 1):
        share = min(1.0, shares[index] / max(left, 1e-12))
        here = outputs.confidence[inside, index]
        threshold = float(np.quantile(here, 1.0 - share)) if len(here) else None
        thresholds.append(threshold)
        if threshold is not None:
            inside &= outputs.confidence[:, index] < threshold
        left -= shares[index]
    return tuple(thresholds)


def _non_dominated(policies: Sequence[Policy]) -> tuple[Policy, ...]:
    """Keep the policies that no other beats in mean cost and error at the same or lesser depth."""
    kept: list[Policy] = []
    for policy in sorted(set(policies), key=lambda one: (one.cost, one.error, _depth(one))):
        if all(other.error > policy.error or _depth(other) > _depth(policy) for other in kept):
            kept.append(policy)
    return tuple(kept)


def _depth(policy: Policy) -> int:
    return max(index for index, share in enumerate(policy.reach) if share > 0)


def policy_pool(outputs: ExitOutputs, block_cost: Sequence[float], *, prices: int = 28) -> tuple[Policy, ...]:
    """Return non-dominated policies from cheapest to most accurate; full depth competes with the rest.

    For each depth the search minimises error + price · cost over a sweep of prices by exact coordinate
    descent, started from geometric rank cuts and a single threshold for all exits.

    Args:
        outputs: Of the model that will run, on images kept for choosing.
        block_cost: Cost of each segment, any unit.
        prices: Prices to try.
    """
    cumulative = np.cumsum(np.asarray(block_cost, dtype=np.float64))
    scale = cumulative[-1]
    found = [judge(outputs, (None,) * (outputs.exits - 1), block_cost)]
    for depth in range(outputs.exits):
        part = ExitOutputs(outputs.confidence[:, : depth + 1], outputs.correct[:, : depth + 1])
        ending: Thresholds = () if depth == outputs.exits - 1 else (0.0,)
        padding: Thresholds = (None,) * max(0, outputs.exits - 2 - depth)
        starts = [_rank_cut(part, ratio) for ratio in (0.5, 1.0, 2.0)] + [(0.9,) * depth]
        for price in np.geomspace(0.005, 2.0, prices):
            best: Policy | None = None
            for start in starts:
                thresholds = _descend(part, start, cumulative[: depth + 1] / scale, float(price))
                policy = judge(outputs, (*thresholds, *ending, *padding), block_cost)
                worth = policy.error + price * policy.cost / scale
                if best is None or worth < best.error + price * best.cost / scale:
                    best = policy
            if best is not None:
                found.append(best)
    return _non_dominated(found)


def anchored(outputs: ExitOutputs, reach: Sequence[float]) -> Thresholds:
    """Return the thresholds that give ``reach`` on ``outputs``: the same exit rates, front to back.

    Quantisation moves confidence; keeping the rates instead of the thresholds keeps the mean cost, so that
    a loss of accuracy cannot hide as a gain in depth.
    """
    inside = np.ones(len(outputs.confidence), dtype=bool)
    thresholds: list[float | None] = []
    for index in range(outputs.exits - 1):
        rate = 1.0 - reach[index + 1] / reach[index] if reach[index] > 0 else 0.0
        here = outputs.confidence[inside, index]
        if rate <= 0 or not len(here):
            thresholds.append(None)
            continue
        threshold = 0.0 if rate >= 1 else float(np.quantile(here, 1.0 - rate))
        thresholds.append(threshold)
        inside &= outputs.confidence[:, index] < threshold
    return tuple(thresholds)


def safety_path(thresholds: Thresholds, steps: int = 8) -> tuple[Thresholds, ...]:
    """Return thresholds that lead from full depth to nearly ``thresholds``, each step bolder than the last."""
    path: list[Thresholds] = [(None,) * len(thresholds)]
    for step in range(steps):
        caution = 1.0 - (step + 1) / (steps + 1)
        path.append(tuple(None if one is None else one + (1.0 - one) * caution for one in thresholds))
    return tuple(path)


def paired_losses(
    outputs: ExitOutputs, reference: ExitOutputs, thresholds: Sequence[Thresholds]
) -> NDArray[np.float64]:
    """Return [plans, n] losses against full depth: 1 where only the reference is right, -1 where only the plan."""
    wrong = [(~outputs.correct[np.arange(len(outputs.correct)), exits_taken(outputs, one)]) for one in thresholds]
    return np.stack(wrong).astype(np.float64) - (~reference.correct[:, -1]).astype(np.float64)
