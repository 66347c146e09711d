"""What an expert costs on each resource, as measured curves, and how the curves follow a run.

Four resources: ``gpu`` computes what lies in its memory, ``cpu`` computes what lies in RAM, ``link`` copies from
RAM to the GPU's memory, ``disk`` reads from flash into RAM. Published systems fix their costs in the code; here
every number is a measurement, and ``Refit`` scales it while the program runs and says how wrong it was.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from edgeflex.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["RESOURCES", "Curve", "Curves", "ErrorStatistics", "Refit", "Resource"]

Resource = Literal["gpu", "cpu", "link", "disk"]
RESOURCES: tuple[Resource, ...] = ("gpu", "cpu", "link", "disk")


@dataclass(frozen=True)
class Curve:
    """Seconds of one expert over its rows (tokens): piecewise linear, never falling.

    Below the first point it is flat, since a launch costs the same for fewer rows; beyond the last it goes on with
    the last slope, or in proportion where there is only one point.

    Attributes:
        points: (rows, seconds), rows rising from at least 1, seconds not falling.

    Raises:
        InputError: There is no point, or the points do not rise.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        faults = [
            f"point {point} is not finite, or below 1 row or 0 seconds"
            for point in self.points
            if not (math.isfinite(point[0]) and math.isfinite(point[1]) and point[0] >= 1 and point[1] >= 0)
        ]
        faults += [
            f"point {right} after {left} must have more rows and no fewer seconds"
            for left, right in pairwise(self.points)
            if not (right[0] > left[0] and right[1] >= left[1])
        ]
        if not self.points:
            faults.append("it has no point; give at least one (rows, seconds)")
        if faults:
            raise InputError.collect("cost curve", faults)

    def __call__(self, rows: float) -> float:
        """Return seconds for ``rows``."""
        points = self.points
        if rows <= points[0][0]:
            return points[0][1]
        if len(points) == 1:
            return points[0][1] * rows / points[0][0]
        after = min(bisect_right(points, (rows, math.inf)), len(points) - 1)
        (left, low), (right, high) = points[after - 1], points[after]
        return low + (high - low) * (rows - left) / (right - left)

    def scaled(self, factor: float) -> Curve:
        """Return the curve with every second multiplied by ``factor``."""
        return Curve(tuple((rows, seconds * factor) for rows, seconds in self.points))

    @classmethod
    def fitted(cls, samples: Iterable[tuple[float, float]]) -> Curve:
        """Return the never-falling curve nearest to measured (rows, seconds) pairs.

        The median of each row count, so that an interrupted sample counts little, then least squares under
        monotony by pooling adjacent violators (Ayer et al., Annals of Mathematical Statistics 1955), each row
        count weighted by its number of samples.

        Raises:
            InputError: There is no sample, or one is not finite.
        """
        by_rows: dict[float, list[float]] = {}
        for rows, seconds in samples:
            by_rows.setdefault(rows, []).append(seconds)
        blocks: list[tuple[float, list[tuple[float, int]]]] = []  # mean, its (rows, weight) members
        for rows in sorted(by_rows):
            mean, members = statistics.median(by_rows[rows]), [(rows, len(by_rows[rows]))]
            while blocks and blocks[-1][0] > mean:
                other, merged = blocks.pop()
                mine, theirs = sum(weight for _, weight in members), sum(weight for _, weight in merged)
                mean, members = (mean * mine + other * theirs) / (mine + theirs), merged + members
            blocks.append((mean, members))
        return cls(tuple((rows, mean) for mean, members in blocks for rows, _ in members))


@dataclass(frozen=True)
class Curves:
    """The costs of one machine, by which events are scheduled.

    Attributes:
        gpu: Seconds of an expert's rows on the GPU, its weights resident.
        cpu: Seconds of an expert's rows on the CPU, its weights in RAM, nothing else running.
        link_bytes_per_s: Of copies from RAM to the GPU's memory, nothing else running.
        link_latency_s: That each such copy costs before its first byte.
        disk_bytes_per_s: Of reads from flash; infinite where there is no flash tier.
        disk_latency_s: That each such read costs before its first byte.
        cpu_beside_link: How much longer the CPU takes while the link copies, since both use the RAM; at least 1.
        link_beside_cpu: How much longer a copy takes while the CPU computes; at least 1.
        cpu_start_s: What it costs once per event that anything is computed on the CPU: activations there and back,
            and the synchronisation. Counts as work of the CPU.
        kinds: (gpu, cpu) curves by kind of expert, where they differ (bit-width, shape); others take the two above.
        cpu_in_slices: How much longer the CPU takes over experts that lie in slices (see ``division``) than over whole
            ones, which the curves are of; less than 1 where it reads them quicker.

    Raises:
        InputError: A rate, latency or factor is out of range.
    """

    gpu: Curve
    cpu: Curve
    link_bytes_per_s: float
    link_latency_s: float = 0.0
    disk_bytes_per_s: float = math.inf
    disk_latency_s: float = 0.0
    cpu_beside_link: float = 1.0
    link_beside_cpu: float = 1.0
    cpu_start_s: float = 0.0
    kinds: Mapping[str, tuple[Curve, Curve]] = field(default_factory=dict)
    cpu_in_slices: float = 1.0

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}; it must be positive"
            for name in ("link_bytes_per_s", "disk_bytes_per_s")
            if not getattr(self, name) > 0
        ]
        faults += [
            f"{name} is {getattr(self, name)}; it must be finite and at least {least}"
            for name, least in (
                ("link_latency_s", 0),
                ("disk_latency_s", 0),
                ("cpu_start_s", 0),
                ("cpu_beside_link", 1),
                ("link_beside_cpu", 1),
            )
            if not least <= getattr(self, name) < math.inf
        ]
        if not 0 < self.cpu_in_slices < math.inf:
            faults.append(f"cpu_in_slices is {self.cpu_in_slices}; it must be finite and positive")
        if faults:
            raise InputError.collect("cost curves", faults)

    def gpu_s(self, rows: float, kind: str = "") -> float:
        """Return seconds of a resident expert's ``rows`` on the GPU."""
        return (self.kinds[kind][0] if kind in self.kinds else self.gpu)(rows)

    def cpu_s(self, rows: float, kind: str = "") -> float:
        """Return seconds of an expert's ``rows`` on the CPU, alone."""
        return (self.kinds[kind][1] if kind in self.kinds else self.cpu)(rows)

    def link_s(self, size_bytes: int) -> float:
        """Return seconds of one copy to the GPU, alone."""
        return self.link_latency_s + size_bytes / self.link_bytes_per_s

    def disk_s(self, size_bytes: int) -> float:
        """Return seconds of one read from flash."""
        return self.disk_latency_s + size_bytes / self.disk_bytes_per_s

    def in_slices(self) -> Curves:
        """Return the costs of the same experts where they lie in slices."""
        factor = self.cpu_in_slices
        kinds = {kind: (on_gpu, on_cpu.scaled(factor)) for kind, (on_gpu, on_cpu) in self.kinds.items()}
        return replace(self, cpu=self.cpu.scaled(factor), kinds=kinds, cpu_in_slices=1.0)

    def scaled(self, *, gpu: float = 1.0, cpu: float = 1.0, link: float = 1.0, disk: float = 1.0) -> Curves:
        """Return the same machine with each resource's seconds multiplied by a factor."""
        return replace(
            self,
            gpu=self.gpu.scaled(gpu),
            cpu=self.cpu.scaled(cpu),
            link_bytes_per_s=self.link_bytes_per_s / link,
            link_latency_s=self.link_latency_s * link,
            disk_bytes_per_s=self.disk_bytes_per_s / disk,
            disk_latency_s=self.disk_latency_s * disk,
            cpu_start_s=self.cpu_start_s * cpu,
            kinds={kind: (on_gpu.scaled(gpu), on_cpu.scaled(cpu)) for kind, (on_gpu, on_cpu) in self.kinds.items()},
        )


@dataclass(frozen=True)
class ErrorStatistics:
    """How far a resource's predictions were from what was measured, over the last samples.

    Attributes:
        samples: Number since the start.
        scale: Measured over predicted by the curves as given, as fitted now.
        bias: Mean of (predicted − measured) / measured; positive where predictions are too long.
        mean_error: Mean of its absolute value.
        p90_error: 90th percentile of its absolute value (nearest rank).
    """

    samples: int
    scale: float
    bias: float
    mean_error: float
    p90_error: float


class _Fit:
    """Sums of one resource's exponentially weighted least squares through the origin."""

    def __init__(self, window: int) -> None:
        self.scale, self.squares, self.products, self.samples = 1.0, 0.0, 0.0, 0
        self.errors: deque[float] = deque(maxlen=window)

    def add(self, base_s: float, actual_s: float, keep: float) -> None:
        self.squares = keep * self.squares + base_s * base_s
        self.products = keep * self.products + base_s * actual_s
        self.samples += 1

    def statistics(self) -> ErrorStatistics:
        if not self.errors:
            return ErrorStatistics(0, self.scale, 0.0, 0.0, 0.0)
        sizes = sorted(abs(error) for error in self.errors)
        p90 = sizes[math.ceil(0.9 * len(sizes)) - 1]
        return ErrorStatistics(self.samples, self.scale, statistics.fmean(self.errors), statistics.fmean(sizes), p90)


class Refit:
    """Scales the curves to what the run measures, and keeps how wrong each prediction was.

    For each resource the scale s minimises Σ w (measured − s · predicted)², where a sample's weight w halves every
    ``half_life`` samples. The errors kept are those of the curves in force when the sample came, so they are errors
    on data not yet used to fit. Give ``observe`` busy seconds (of ``Timeline``), predicted by ``self.curves``.

    Attributes:
        curves: In force; changed only by ``refit``, so that a plan and its measurement speak of the same curves.
    """

    def __init__(self, curves: Curves, *, half_life: float = 64.0, least_samples: int = 8, clip: float = 8.0) -> None:
        """Start from measured curves.

        Args:
            curves: Of the profile.
            half_life: Samples after which a sample counts half.
            least_samples: Below it a resource keeps its curve.
            clip: A measurement this many times above or below its prediction is fitted as if it were that far
                and no farther, so that one page fault does not turn the plan. Its error is kept as it was.

        Raises:
            InputError: ``half_life`` or ``clip`` is out of range.
        """
        if not (half_life > 0 and clip > 1):
            raise InputError(f"half_life {half_life} must be above 0 and clip {clip} above 1. Give such values.")
        self._base, self.curves = curves, curves
        self._keep, self._least, self._clip = 0.5 ** (1.0 / half_life), least_samples, clip
        self._fits: dict[Resource, _Fit] = {resource: _Fit(window=1024) for resource in RESOURCES}

    def observe(self, resource: Resource, predicted_s: float, actual_s: float) -> None:
        """Take one sample; where nothing was predicted or measured (0 seconds) nothing is learned.

        Raises:
            InputError: A value is negative or not finite.
        """
        if not (0 <= predicted_s < math.inf and 0 <= actual_s < math.inf):
            raise InputError(
                f"{resource}: predicted {predicted_s} s and measured {actual_s} s must be finite and not negative. "
                "Check the clock."
            )
        if predicted_s == 0 or actual_s == 0:
            return
        fit = self._fits[resource]
        fit.errors.append((predicted_s - actual_s) / actual_s)
        fitted_s = min(max(actual_s, predicted_s / self._clip), predicted_s * self._clip)
        fit.add(predicted_s / fit.scale, fitted_s, self._keep)

    def refit(self) -> Curves:
        """Put the newest scales in force and return the curves."""
        for fit in self._fits.values():
            if fit.samples >= self._least:
                fit.scale = fit.products / fit.squares
        self.curves = self._base.scaled(**{resource: fit.scale for resource, fit in self._fits.items()})
        return self.curves

    def statistics(self) -> dict[Resource, ErrorStatistics]:
        """Return each resource's errors."""
        return {resource: fit.statistics() for resource, fit in self._fits.items()}
