"""Time of a layer and of a segment on a device: measured kernels, fitted to measured programs.

Kernels measured alone miss what surrounds them in a program (format conversions, additions, pooling, caches
that are warm or not). Where whole programs were measured, a small non-negative fit takes that in; where none
were, the figures stand as they are, with a wide interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import InputError
from edgeflex.schema import DeviceProfile, Format, FormatEdge, LayerShape, ModelGraph, Precision, Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

# How far a figure may be off, as a fraction, by how it was come by.
MEASURED_ERROR = 0.05
INTERPOLATED_ERROR = 0.30
ROOFLINE_ERROR = 0.60
_NEIGHBOURS = 3
# Conversions between float and int8 activations run at memory speed; the fit corrects this start value.
_CONVERSION_S_PER_ELEMENT = 2.5e-10
_PRIOR_WEIGHT = 0.05
_SHORTEST_SHARE = 0.01
# Nine of ten: a single program timed in a slow spell of the machine must not widen every promise.
_ERROR_QUANTILE = 0.9


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer call, and how far they may be off as a fraction."""

    seconds: float
    relative_error: float


def _features(shape: LayerShape) -> tuple[float, ...]:
    return (
        math.log(shape.macs),
        math.log(shape.weight_count),
        math.log(shape.out_positions),
        2.0 * (shape.groups > 1),
        1.0 * (shape.stride > 1),
        0.5 * shape.kernel,
    )


def layer_time(profile: DeviceProfile, shape: LayerShape, precision: Precision, threads: int) -> LayerTime:
    """Return the time of a layer on a device: measured, interpolated, or from the data sheet's roofline.

    Raises:
        InputError: The profile has neither kernels of this kind nor the rates for a roofline.
    """
    kernels = [
        kernel
        for kernel in profile.kernels
        if kernel.precision is precision and kernel.threads == threads and kernel.shape.kind is shape.kind
    ]
    for kernel in kernels:
        if kernel.shape == shape:
            return LayerTime(kernel.seconds.value, MEASURED_ERROR)
    if kernels:
        here = np.array(_features(shape))
        distances = np.array([np.linalg.norm(np.array(_features(kernel.shape)) - here) for kernel in kernels])
        nearest = np.argsort(distances, kind="stable")[:_NEIGHBOURS]
        weights = 1.0 / np.maximum(distances[nearest], 1e-3)
        rates = np.array([math.log(kernels[i].seconds.value / kernels[i].shape.macs) for i in nearest])
        seconds = shape.macs * math.exp(float(np.average(rates, weights=weights)))
        return LayerTime(seconds, INTERPOLATED_ERROR)
    return LayerTime(_roofline_s(profile, shape, precision), ROOFLINE_ERROR)


def _roofline_s(profile: DeviceProfile, shape: LayerShape, precision: Precision) -> float:
    """Return the larger of compute time and weight-reading time (Williams et al. 2009)."""
    rates = [
        rate.ops_per_s.value
        for rate in profile.compute
        if rate.engine == "cpu" and not rate.sparse and rate.precision.startswith(precision.value.split("-")[0])
    ]
    bandwidths = [
        tier.read_bytes_per_s.value
        for tier in profile.tiers
        if tier.tier is Tier.HOST and tier.read_bytes_per_s is not None
    ]
    missing = []
    if not rates:
        missing.append(f"CPU rate or kernel times for {precision.value} {shape.kind.value} layers")
    if not bandwidths:
        missing.append("memory read bandwidth")
    if missing:
        raise InputError(
            f"device profile {profile.name!r} has no {' and no '.join(missing)}; its sources do not give them. "
            "Run `edgeflex profile` on the device and plan with that file."
        )
    return max(2.0 * shape.macs / max(rates), shape.weight_count * precision.bits / 8 / max(bandwidths))


@dataclass(frozen=True)
class Observation:
    """A measured program: the precision of every layer and the seconds of each segment."""

    precisions: Mapping[str, Precision]
    segment_s: tuple[float, ...]


@dataclass(frozen=True)
class LatencyModel:
    """Additive time: fixed per segment + scale per precision · kernel + conversions.

    Attributes:
        fixed_s: Per segment: call, additions, pooling.
        scales: Per precision, what a kernel's lone time is multiplied by inside a program.
        conversion_s: Seconds an element for a change of activation format.
        relative_error: What the time to an exit was off by in nine of ten cases, relatively, on the programs
            that were fitted; at least 5 %.
    """

    layer_s: Mapping[tuple[str, Precision], float]
    fixed_s: tuple[float, ...]
    scales: Mapping[Precision, float]
    conversion_s: float
    relative_error: float

    def option_s(self, layer: str, precision: Precision) -> float:
        """Return the seconds of a layer in a precision, inside a program."""
        return self.layer_s[layer, precision] * self.scales.get(precision, 1.0)


def crossings(graph: ModelGraph) -> tuple[FormatEdge, ...]:
    """Return where activations may change format, each counted once, in the segment that pays for it.

    At a cut the layer before it feeds the segment behind it directly: int8 activations are handed over as they
    are when both sides compute in int8, and a conversion, if any, is paid with the later segment.
    """
    heads = {layer.name for layer in graph.layers if layer.head}
    feeders = {edge.segment: edge.source for edge in graph.edges if not edge.target and edge.source not in heads}
    found: list[FormatEdge] = []
    entered: set[int] = set()
    for edge in graph.edges:
        last = edge.segment == graph.segment_count - 1
        if not edge.target and edge.source not in heads and not last:
            continue
        if not edge.source and edge.segment > 0:
            if edge.segment in entered:
                continue
            entered.add(edge.segment)
            found.append(edge.model_copy(update={"source": feeders.get(edge.segment - 1, "")}))
        else:
            found.append(edge)
    return tuple(found)


def _format_changes(graph: ModelGraph, precisions: Mapping[str, Precision], segment: int) -> int:
    def form(name: str) -> Format:
        return precisions.get(name, Precision.FP32).activation_format if name else Format.FLOAT

    return sum(
        edge.elements
        for edge in crossings(graph)
        if edge.segment == segment and form(edge.source) is not form(edge.target)
    )


def _design_row(
    graph: ModelGraph,
    layer_s: Mapping[tuple[str, Precision], float],
    observation: Observation,
    segment: int,
    present: Sequence[Precision],
) -> NDArray[np.float64]:
    """Return what one segment's time is made of: its fixed part, seconds per precision, conversions."""
    row = np.zeros(graph.segment_count + len(present) + 1)
    row[segment] = 1.0
    for layer in graph.layers:
        if layer.segment == segment:
            precision = observation.precisions.get(layer.name, Precision.FP32)
            row[graph.segment_count + present.index(precision)] += layer_s[layer.name, precision]
    row[-1] = _format_changes(graph, observation.precisions, segment) * _CONVERSION_S_PER_ELEMENT
    return row


def fit_latency(
    graph: ModelGraph,
    layer_s: Mapping[tuple[str, Precision], float],
    observations: Sequence[Observation],
    *,
    call_s: float,
    layer_error: float,
) -> LatencyModel:
    """Return the additive model that explains the measured programs best.

    Non-negative least squares on relative errors, held weakly to the lone kernel times (scales 1) so that
    a few programs cannot turn it over.
    """
    present = sorted({precision for _, precision in layer_s}, key=lambda one: one.value)
    if not observations:
        fixed = (call_s,) * graph.segment_count
        return LatencyModel(layer_s, fixed, dict.fromkeys(present, 1.0), _CONVERSION_S_PER_ELEMENT, layer_error)
    columns = graph.segment_count + len(present) + 1
    raw = [
        _design_row(graph, layer_s, observation, segment, present)
        for observation in observations
        for segment in range(graph.segment_count)
    ]
    measured = np.array([observation.segment_s for observation in observations])  # [programs, segments]
    # relative errors, but a segment too short to time (a difference of two medians) must not outweigh the rest
    floor_s = np.maximum(call_s, _SHORTEST_SHARE * measured.sum(axis=1, keepdims=True))
    weight_s = np.maximum(measured, floor_s).ravel()
    rows = [row / weight for row, weight in zip(raw, weight_s, strict=True)]
    targets = list(measured.ravel() / weight_s)
    for index in range(graph.segment_count, columns):  # priors: scale 1
        prior = np.zeros(columns)
        prior[index] = _PRIOR_WEIGHT
        rows.append(prior)
        targets.append(_PRIOR_WEIGHT)
    from scipy.optimize import nnls

    solution, _ = nnls(np.array(rows), np.array(targets))
    scales = {precision: float(solution[graph.segment_count + index]) for index, precision in enumerate(present)}
    fitted = (np.array(raw) @ solution).reshape(measured.shape)
    # judged at every exit, not at full depth alone: a plan's mean is mostly about the first ones
    errors = np.abs(np.cumsum(fitted, axis=1) / np.cumsum(measured, axis=1) - 1.0)
    error = np.quantile(errors, _ERROR_QUANTILE)
    return LatencyModel(
        layer_s=layer_s,
        fixed_s=tuple(float(value) for value in solution[: graph.segment_count]),
        scales=scales,
        conversion_s=float(solution[-1]) * _CONVERSION_S_PER_ELEMENT,
        relative_error=max(MEASURED_ERROR, float(error)),
    )


def predicted_segments_s(
    model: LatencyModel, graph: ModelGraph, precisions: Mapping[str, Precision]
) -> tuple[float, ...]:
    """Return the predicted seconds of each segment in the given precisions."""
    return tuple(
        model.fixed_s[segment]
        + sum(
            model.option_s(layer.name, precisions.get(layer.name, Precision.FP32))
            for layer in graph.layers
            if layer.segment == segment
        )
        + _format_changes(graph, precisions, segment) * model.conversion_s
        for segment in range(graph.segment_count)
    )
