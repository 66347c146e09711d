"""Time of a layer and of a segment on a device: measured kernels, fitted to measured programs.

Kernels measured alone miss what surrounds them in a program (format conversions, additions, pooling, caches
that are warm or not). Where whole programs were measured, a small non-negative fit takes that in; where none
were, the figures stand as they are, with a wide interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.registry import GPU_BACKENDS
from edgeflex.schema import DeviceProfile, Format, FormatEdge, LayerShape, ModelGraph, Precision, Tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeflex.schema import Kernel

Engine = Literal["cpu", "gpu"]

# How far a figure may be off, as a fraction, by how it was come by.
MEASURED_ERROR = 0.05
INTERPOLATED_ERROR = 0.30
ROOFLINE_ERROR = 0.60
# A peak rate says little about a layer that does not fill the GPU: from nothing to twice as long.
GPU_ROOFLINE_ERROR = 1.0
# An empty kernel on Jetson Thor, replayed from a graph or not: 4.8 us (https://github.com/thomas-hiddenpeak/thor-bench).
LAUNCH_S = 5e-6
# Starting a segment's graph, testing its exit, copying the flag back and waiting for it.
_SEGMENT_LAUNCHES = 4
# What a layer computes in: 4-bit weights are unpacked to halves first.
_GPU_ARITHMETIC = {
    Precision.FP32: "fp32",
    Precision.FP16: "fp16",
    Precision.INT8_STATIC: "int8",
    Precision.INT4_BLOCK64: "fp16",
    Precision.INT4_BLOCK128: "fp16",
    Precision.FP8: "fp8",
}
_ARITHMETIC_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "fp8": 1}
# Where no source gives a rate, that of a wider arithmetic, which no GPU does faster; nothing stands in for fp32.
_STANDS_IN = {"int8": "fp16", "fp8": "fp16", "fp16": "fp32"}
# Weights alone in 4 bits, arithmetic in floats: where their kernels were not timed, those of fp32 tell more than none.
_WEIGHT_ONLY = frozenset({Precision.INT4_BLOCK64, Precision.INT4_BLOCK128})
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


def layer_time(
    profile: DeviceProfile, shape: LayerShape, precision: Precision, threads: int, *, engine: Engine = "cpu"
) -> LayerTime:
    """Return the time of a layer on a device: measured, interpolated, or from the data sheet's roofline.

    Args:
        profile: The device. Its kernels are the processor's, so that the GPU's times are always a roofline.
        shape: The layer.
        precision: What it is stored and computed in.
        threads: Of the processor.
        engine: What computes it.

    Raises:
        InputError: The profile has neither kernels of this kind nor the rates for a roofline.
        UnsupportedError: The GPU's backend has no such layers.
    """
    if engine == "gpu":
        return _gpu_time(profile, shape, precision)
    timed = _kernels(profile, shape, precision, threads)
    stands_in = not timed and precision in _WEIGHT_ONLY
    kernels = _kernels(profile, shape, Precision.FP32, threads) if stands_in else timed
    if not kernels:
        return LayerTime(_roofline_s(profile, shape, precision), ROOFLINE_ERROR)
    for kernel in kernels:
        if kernel.shape == shape:
            return LayerTime(kernel.seconds.value, ROOFLINE_ERROR if stands_in else MEASURED_ERROR)
    return LayerTime(_interpolated_s(kernels, shape), ROOFLINE_ERROR if stands_in else INTERPOLATED_ERROR)


def _kernels(profile: DeviceProfile, shape: LayerShape, precision: Precision, threads: int) -> list[Kernel]:
    return [
        kernel
        for kernel in profile.kernels
        if kernel.precision is precision and kernel.threads == threads and kernel.shape.kind is shape.kind
    ]


def _interpolated_s(kernels: Sequence[Kernel], shape: LayerShape) -> float:
    """Return the time at the nearest kernels' rate, the nearer counting more."""
    here = np.array(_features(shape))
    distances = np.array([np.linalg.norm(np.array(_features(kernel.shape)) - here) for kernel in kernels])
    nearest = np.argsort(distances, kind="stable")[:_NEIGHBOURS]
    weights = 1.0 / np.maximum(distances[nearest], 1e-3)
    rates = np.array([math.log(kernels[i].seconds.value / kernels[i].shape.macs) for i in nearest])
    return shape.macs * math.exp(float(np.average(rates, weights=weights)))


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


# --- NVIDIA GPUs ---------------------------------------------------------------------------------------


def engine_of(backend: str) -> Engine:
    """Return what a backend computes on."""
    return "gpu" if backend in GPU_BACKENDS else "cpu"


def _gpu_rate(profile: DeviceProfile, arithmetic: str) -> tuple[str, float] | None:
    """Return the dense rate of an arithmetic in operations a second, or that of what stands in for it, by name."""
    name: str | None = arithmetic
    while name is not None:
        rates = [
            rate.ops_per_s.value
            for rate in profile.compute
            if rate.engine == "gpu" and not rate.sparse and rate.precision == name
        ]
        if rates:
            return name, max(rates)
        name = _STANDS_IN.get(name)
    return None


def _gpu_read(profile: DeviceProfile) -> float | None:
    """Return how fast the GPU reads memory, in bytes a second: its own, or the one that it shares."""
    own = Tier.HOST if profile.unified_memory else Tier.DEVICE
    rates = [
        tier.read_bytes_per_s.value for tier in profile.tiers if tier.tier is own and tier.read_bytes_per_s is not None
    ]
    return max(rates, default=None)


def _gpu_figures(profile: DeviceProfile, arithmetic: str) -> tuple[float, float]:
    """Return operations a second and bytes a second.

    Raises:
        InputError: The profile lacks one of them.
    """
    rate, read = _gpu_rate(profile, arithmetic), _gpu_read(profile)
    if rate is not None and read is not None:
        return rate[1], read
    missing = [f"dense GPU rate for {arithmetic}"] if rate is None else []
    if read is None:
        missing.append("read bandwidth of the GPU's memory")
    raise InputError(
        f"device profile {profile.name!r} has no {' and no '.join(missing)}; its sources do not give them. Run "
        "`edgeflex profile` on the device, where PyTorch reaches its GPU, and plan with that file."
    )


def _gpu_time(profile: DeviceProfile, shape: LayerShape, precision: Precision) -> LayerTime:
    """Return the roofline of a layer on a GPU, and the launch of its kernel.

    The larger of compute time and the time to read its weights and activations and write its result once
    (Williams et al. 2009). What TensorRT fuses and what its caches keep makes it faster; a layer too small to fill
    the GPU is slower than its share of the peak.
    """
    arithmetic = _GPU_ARITHMETIC.get(precision)
    if arithmetic is None:
        raise UnsupportedError(
            f"TensorRT has no {precision.value} layers; it takes {', '.join(one.value for one in _GPU_ARITHMETIC)}. "
            "Calibrate with --target tensorrt."
        )
    ops_per_s, bytes_per_s = _gpu_figures(profile, arithmetic)
    elements = shape.rows * shape.in_channels * shape.height * shape.width + shape.out_channels * shape.out_positions
    moved_bytes = shape.weight_count * precision.bits / 8 + elements * _ARITHMETIC_BYTES[arithmetic]
    seconds = LAUNCH_S + max(2.0 * shape.macs / ops_per_s, moved_bytes / bytes_per_s)
    return LayerTime(seconds, GPU_ROOFLINE_ERROR)


def segment_call_s(profile: DeviceProfile, engine: Engine) -> float:
    """Return the fixed seconds of running one segment: on a GPU, its start and the answer that the host waits for."""
    if engine == "gpu":
        return _SEGMENT_LAUNCHES * LAUNCH_S
    return profile.call_s.value if profile.call_s else 0.0


def conversion_s(profile: DeviceProfile, engine: Engine) -> float:
    """Return the seconds per element of changing between float and int8: 4 bytes read, 1 written, or back.

    Raises:
        InputError: The profile does not say how fast its GPU reads memory.
    """
    if engine == "cpu":
        return _CONVERSION_S_PER_ELEMENT
    return 5.0 / _gpu_figures(profile, "fp32")[1]


def plan_notes(profile: DeviceProfile, backend: str, precisions: Iterable[Precision]) -> tuple[str, ...]:
    """Return what a reader of a plan for ``profile`` must know about where its times come from.

    Args:
        profile: The device planned for.
        backend: Of the plan.
        precisions: That it uses.
    """
    notes = []
    if engine_of(backend) == "gpu":
        notes.append(
            f"times are the roofline of {profile.name!r} (rates, memory bandwidth, {LAUNCH_S * 1e6:.0f} µs a launch), "
            "not measurements; small layers are slower than their share of the peak. Run edgeflex bench on the device"
        )
        notes.append(
            "memory is that of weights and activations; what CUDA and TensorRT hold for themselves, some hundreds of "
            "MiB, is not in it"
        )
        used = dict.fromkeys(_GPU_ARITHMETIC[one] for one in precisions if one in _GPU_ARITHMETIC)
        notes += [
            f"no source gives the dense {name} rate of this GPU; its {rate[0]} rate stands in, which is not faster"
            for name in used
            if (rate := _gpu_rate(profile, name)) is not None and rate[0] != name
        ]
        if profile.unified_memory:
            notes.append(
                "processor and GPU of this device share one memory: offloading from the GPU to RAM gains nothing, and "
                "the operating system takes its part of the same bytes"
            )
    return tuple(notes)


# --- programs ------------------------------------------------------------------------------------------


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
        cuts_in_int8: Whether int8 activations cross from segment to segment as they are.
    """

    layer_s: Mapping[tuple[str, Precision], float]
    fixed_s: tuple[float, ...]
    scales: Mapping[Precision, float]
    conversion_s: float
    relative_error: float
    cuts_in_int8: bool = True

    def option_s(self, layer: str, precision: Precision) -> float:
        """Return the seconds of a layer in a precision, inside a program."""
        return self.layer_s[layer, precision] * self.scales.get(precision, 1.0)


def crossings(graph: ModelGraph, *, cuts_in_int8: bool = True) -> tuple[FormatEdge, ...]:
    """Return where activations may change format, each counted once, in the segment that pays for it.

    With ``cuts_in_int8`` the layer before a cut feeds the segment behind it directly: int8 activations are handed over
    as they are when both sides compute in int8, and a conversion, if any, is paid with the later segment. Without, what
    crosses is float, and each side pays for its own.
    """
    if not cuts_in_int8:
        return tuple(graph.edges)
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


def _format_changes(graph: ModelGraph, precisions: Mapping[str, Precision], segment: int, *, cuts_in_int8: bool) -> int:
    def form(name: str) -> Format:
        return precisions.get(name, Precision.FP32).activation_format if name else Format.FLOAT

    return sum(
        edge.elements
        for edge in crossings(graph, cuts_in_int8=cuts_in_int8)
        if edge.segment == segment and form(edge.source) is not form(edge.target)
    )


def _design_row(
    graph: ModelGraph,
    layer_s: Mapping[tuple[str, Precision], float],
    observation: Observation,
    segment: int,
    present: Sequence[Precision],
    *,
    cuts_in_int8: bool,
) -> NDArray[np.float64]:
    """Return what one segment's time is made of: its fixed part, seconds per precision, conversions."""
    row = np.zeros(graph.segment_count + len(present) + 1)
    row[segment] = 1.0
    for layer in graph.layers:
        if layer.segment == segment:
            precision = observation.precisions.get(layer.name, Precision.FP32)
            row[graph.segment_count + present.index(precision)] += layer_s[layer.name, precision]
    changed = _format_changes(graph, observation.precisions, segment, cuts_in_int8=cuts_in_int8)
    row[-1] = changed * _CONVERSION_S_PER_ELEMENT
    return row


def fit_latency(
    graph: ModelGraph,
    layer_s: Mapping[tuple[str, Precision], float],
    observations: Sequence[Observation],
    *,
    call_s: float,
    layer_error: float,
    conversion_s_per_element: float = _CONVERSION_S_PER_ELEMENT,
    cuts_in_int8: bool = True,
) -> LatencyModel:
    """Return the additive model that explains the measured programs best.

    Non-negative least squares on relative errors, held weakly to the lone kernel times (scales 1) so that
    a few programs cannot turn it over.

    Args:
        graph: The network.
        layer_s: The lone time of each layer in each precision.
        observations: Measured programs; without any, the lone times stand.
        call_s: Fixed seconds of a segment.
        layer_error: How far the lone times may be off, where no program was measured.
        conversion_s_per_element: Of a change of activation format, where no program was measured.
        cuts_in_int8: Whether int8 activations cross from segment to segment as they are.
    """
    present = sorted({precision for _, precision in layer_s}, key=lambda one: one.value)
    if not observations:
        fixed = (call_s,) * graph.segment_count
        scales = dict.fromkeys(present, 1.0)
        return LatencyModel(layer_s, fixed, scales, conversion_s_per_element, layer_error, cuts_in_int8)
    columns = graph.segment_count + len(present) + 1
    raw = [
        _design_row(graph, layer_s, observation, segment, present, cuts_in_int8=cuts_in_int8)
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
        cuts_in_int8=cuts_in_int8,
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
        + _format_changes(graph, precisions, segment, cuts_in_int8=model.cuts_in_int8) * model.conversion_s
        for segment in range(graph.segment_count)
    )
