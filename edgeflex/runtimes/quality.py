"""How good answers are: calibration, ranking, the oracle, and the error of a sample. NumPy in, numbers out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeflex.schema import ExitQuality

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Bools = NDArray[np.bool_]
    Ints = NDArray[np.intp]
    Floats = NDArray[np.float64]


def expected_calibration_error(confidence: Floats, correct: Bools, bins: int = 15) -> float:
    """Return the mean |accuracy − confidence| over equal-width bins, weighted by their samples.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3; bins are (low, high].
    """
    which = np.clip(np.ceil(confidence * bins).astype(np.intp) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def auroc(score: Floats, positive: Bools) -> float | None:
    """Return the probability that a positive outranks a negative, ties counting half; None without both.

    Source: Hanley and McNeil, Radiology 143 (1982): the area equals the Wilcoxon statistic.
    """
    negatives = np.sort(score[~positive])
    positives = score[positive]
    if len(negatives) == 0 or len(positives) == 0:
        return None
    below = np.searchsorted(negatives, positives, side="left")
    up_to = np.searchsorted(negatives, positives, side="right")
    return float((below + up_to).sum() / 2.0 / (len(positives) * len(negatives)))


def exit_qualities(names: Sequence[str], confidence: Floats, correct: Bools, exits: Ints) -> tuple[ExitQuality, ...]:
    """Return the quality of every exit on all images.

    Args:
        names: Of the exits.
        confidence: ``[n, exits]``.
        correct: ``[n, exits]``.
        exits: ``[n]``, where each image left.
    """
    qualities: list[ExitQuality] = []
    for k, name in enumerate(names):
        left = exits == k
        qualities.append(
            ExitQuality(
                name=name,
                accuracy=float(correct[:, k].mean()),
                ece=expected_calibration_error(confidence[:, k], correct[:, k]),
                auroc=auroc(confidence[:, k], correct[:, k]),
                share=float(left.mean()),
                accuracy_of_leavers=float(correct[left, k].mean()) if left.any() else None,
            )
        )
    return tuple(qualities)


def oracle_exits(correct: Bools) -> Ints:
    """Return the first exit that is right for each image, else the last; ``correct`` is ``[n, exits]``."""
    first: Ints = correct.argmax(axis=1)
    return np.where(correct.any(axis=1), first, correct.shape[1] - 1)


def proportion_bounds(successes: int, samples: int, level: float) -> tuple[float, float]:
    """Return the two-sided Clopper–Pearson interval of a proportion.

    Source: Clopper and Pearson, Biometrika 26 (1934); bounds as beta quantiles.
    """
    from scipy.stats import beta

    tail = (1.0 - level) / 2.0
    failures = samples - successes
    low = float(beta.ppf(tail, successes, failures + 1)) if successes else 0.0
    high = float(beta.ppf(1.0 - tail, successes + 1, failures)) if failures else 1.0
    return low, high


def paired_drop_bounds(reference: Bools, answer: Bools, level: float) -> tuple[float, float]:
    """Return an interval of the accuracy drop from answers to the same images, ``[n]`` each.

    The drop is P(reference right, answer wrong) − P(reference wrong, answer right). Each gets a
    Clopper–Pearson interval that fails with half the probability, so that the difference holds at ``level``
    (union bound).
    """
    half = 1.0 - (1.0 - level) / 2.0
    lost = proportion_bounds(int((reference & ~answer).sum()), len(answer), half)
    won = proportion_bounds(int((~reference & answer).sum()), len(answer), half)
    return lost[0] - won[1], lost[1] - won[0]
