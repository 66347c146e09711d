"""Temperatures, default thresholds and calibration error; arrays in, numbers out.

Temperature scaling follows Guo et al. 2017 (arXiv:1706.04599, section 4.2), fitted here per exit on the
samples that leave there, since those are the ones whose confidence is believed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_LOG_RANGE = math.log(20.0)
_ROUNDS = 2


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log-probabilities of logits [n, classes]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def confidences(logits: Sequence[NDArray[np.float64]], temperatures: Sequence[float]) -> NDArray[np.float64]:
    """Return the largest probability of each sample at each exit, [n, exits]."""
    return np.stack(
        [np.exp(log_softmax(part / t)).max(axis=-1) for part, t in zip(logits, temperatures, strict=True)],
        axis=1,
    )


def equal_share_thresholds(confidence: NDArray[np.float64]) -> tuple[float | None, ...]:
    """Return thresholds with which every exit takes an equal share of the samples; None at the last."""
    remaining = np.ones(len(confidence), dtype=bool)
    thresholds: list[float | None] = []
    exits = confidence.shape[1]
    for number in range(exits - 1):
        here = confidence[remaining, number]
        threshold = float(np.quantile(here, 1.0 - 1.0 / (exits - number))) if here.size else 1.0
        remaining &= confidence[:, number] < threshold
        thresholds.append(threshold)
    return (*thresholds, None)


def exits_taken(confidence: NDArray[np.float64], thresholds: Sequence[float | None]) -> NDArray[np.int64]:
    """Return the first exit whose threshold each sample's confidence reaches, else the last, [n]."""
    taken = np.full(len(confidence), confidence.shape[1] - 1, dtype=np.int64)
    for number in range(confidence.shape[1] - 2, -1, -1):
        threshold = thresholds[number]
        if threshold is not None:
            taken[confidence[:, number] >= threshold] = number
    return taken


def fit_temperature(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the temperature with the least negative log-likelihood on logits [n, classes].

    One pseudo-observation, a standard normal on log T, keeps it finite where every sample is right; the
    likelihood is unimodal in T, so golden-section search on log T finds it. No samples give 1.
    """
    rows = np.arange(len(labels))

    def loss(log_t: float) -> float:
        return float(-log_softmax(logits / math.exp(log_t))[rows, labels].sum() + 0.5 * log_t**2)

    low, high = -_LOG_RANGE, _LOG_RANGE
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    loss_left, loss_right = loss(left), loss(right)
    while high - low > 1e-4:
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - _GOLDEN * (high - low)
            loss_left = loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + _GOLDEN * (high - low)
            loss_right = loss(right)
    return math.exp((low + high) / 2.0)


def fit_temperatures(
    logits: Sequence[NDArray[np.float64]], labels: NDArray[np.int64]
) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """Return a temperature per exit, fitted on the samples that leave there, and the thresholds used.

    Who leaves depends on the temperatures, so thresholds and temperatures are found in turn, twice.
    """
    temperatures: tuple[float, ...] = (1.0,) * len(logits)
    for _ in range(_ROUNDS):
        confidence = confidences(logits, temperatures)
        taken = exits_taken(confidence, equal_share_thresholds(confidence))
        temperatures = tuple(
            fit_temperature(part[taken == number], labels[taken == number]) for number, part in enumerate(logits)
        )
    return temperatures, equal_share_thresholds(confidences(logits, temperatures))


def calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = 15) -> float:
    """Return the expected calibration error over equal-width bins (Guo et al. 2017, equation 3).

    Args:
        confidence: Claimed probability per sample, [n].
        correct: Whether each sample is right, [n].
        bins: Number of bins.
    """
    if len(confidence) == 0:
        return 0.0
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(index, weights=confidence - correct.astype(np.float64), minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
