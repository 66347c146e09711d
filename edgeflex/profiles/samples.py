"""Samples to a figure: the median, and how far the middle half spreads around it."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from edgeflex.errors import DeviceError
from edgeflex.schema import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence


def summarise(samples: Sequence[float], source: str) -> Figure:
    """Return the median with its spread: interquartile range over median, None for a single sample.

    Quartiles interpolate linearly between order statistics (Hyndman and Fan 1996, type 7).

    Raises:
        DeviceError: There is no sample, or one is not a positive finite number.
    """
    wrong = [value for value in samples if not (math.isfinite(value) and value > 0)]
    if wrong or not samples:
        raise DeviceError(
            f"{source}: {len(samples)} samples, {len(wrong)} of them not above zero {wrong[:3]}; a measurement "
            "needs at least one, and all positive. Measure again on a quieter machine."
        )
    median = statistics.median(samples)
    spread = None
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        spread = (high - low) / median
    return Figure(value=median, origin="measured", source=source, spread=spread)
