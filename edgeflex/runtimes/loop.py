"""The exit rule: leave at the first exit whose confidence reaches its threshold.

Confidence is the largest probability. A threshold of None never leaves, and the last exit always does.
``leaves`` is the one definition; ``walk`` applies it while segments run, ``exits_for`` to probabilities
that are already at hand.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from edgeflex.errors import DeviceError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]

T = TypeVar("T")


class Outcome(NamedTuple):
    """One answered input.

    Attributes:
        exit: Where it left, counted from 0.
        probabilities: ``[classes]``, of the exit where it left.
        confidence: The largest of them.
    """

    exit: int
    probabilities: Float32
    confidence: float


def leaves(confidence: Any, threshold: float | None) -> Any:
    """Return whether ``confidence``, a number or an array, leaves at an exit with ``threshold``.

    Confidences must be Python floats or float64: NumPy would round the threshold to float32 beside float32.
    """
    return confidence >= (inf if threshold is None else threshold)


def walk(
    step: Callable[[int, Any], tuple[Any, T, float]], first: Any, thresholds: Sequence[float | None]
) -> tuple[int, T, float]:
    """Run segments until one may be left.

    Args:
        step: Given a segment's index and its input, returns (activations, probabilities, confidence).
        first: The input of segment 0.
        thresholds: One per segment.

    Returns:
        The exit, its probabilities and their largest.

    Raises:
        InputError: There are no thresholds.
        DeviceError: The answer's confidence is not a number.
    """
    x = first
    last = len(thresholds) - 1
    for index, threshold in enumerate(thresholds):
        x, probabilities, confidence = step(index, x)
        if leaves(confidence, threshold) or index == last:
            if not confidence >= 0.0:  # also true of NaN
                raise DeviceError(
                    f"segment {index} gave the confidence {confidence}, which is no probability. "
                    "Check the input for NaN or infinity, then export again."
                )
            return index, probabilities, confidence
    raise InputError("no thresholds: there is no segment to run. Give one per segment.")


def exits_for(probabilities: NDArray[Any], thresholds: Sequence[float | None]) -> NDArray[np.intp]:
    """Return the exit of every input, from the probabilities at all exits.

    Args:
        probabilities: ``[n, exits, classes]``.
        thresholds: One per exit.

    Returns:
        ``[n]`` exit indices.

    Raises:
        InputError: The numbers of exits differ.
    """
    count = probabilities.shape[1]
    check_thresholds(thresholds, count)
    confidence = probabilities.max(axis=2).astype(np.float64)  # [n, exits]
    left = np.stack([leaves(confidence[:, k], thresholds[k]) for k in range(count)], axis=1)
    left[:, -1] = True
    return left.argmax(axis=1)


def check_thresholds(thresholds: Sequence[float | None], count: int) -> None:
    """Refuse thresholds that are not one per segment.

    Raises:
        InputError: There are more or fewer than ``count``.
    """
    if len(thresholds) != count:
        raise InputError(
            f"{len(thresholds)} thresholds for {count} segments. Give one per segment; None never leaves there."
        )


def check_input(x: NDArray[Any], shape: Sequence[int], what: str, dtype: str = "float32") -> None:
    """Refuse an input of another shape or type than a segment takes.

    Raises:
        InputError: It is; ``what`` names the input.
    """
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype:
        raise InputError(
            f"{what} is {x.dtype} {list(x.shape)}; {dtype} {list(shape)} is needed. "
            "Prepare it with the bundle's preprocessing."
        )
