"""Calibration, device and capabilities become one cost table: all that the solver sees. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.costs.latency import crossings
from edgeflex.costs.policies import ExitOutputs, Policy, anchored, exit_outputs, exits_taken
from edgeflex.schema import (
    Boundary,
    Capabilities,
    CostTable,
    Decision,
    Layer,
    ModelGraph,
    Option,
    Precision,
    Scenario,
    Tier,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgeflex.costs.latency import LatencyModel
    from edgeflex.schema import Conditions

_FLOAT_BYTES = 4
_DISK_ALIGNMENT_BYTES = 16
# What one layer adds to the program's text (nodes, grids, names of its constants), rounded up.
_PROGRAM_BYTES = {
    Precision.FP32: 640,
    Precision.FP16: 640,
    Precision.INT8_STATIC: 1024,
    Precision.INT8_DYNAMIC: 832,
    Precision.INT4_CHANNEL: 832,
    Precision.INT4_GROUP32: 832,
    Precision.INT4_BLOCK64: 1024,
    Precision.INT4_BLOCK128: 1024,
    Precision.FP8: 1536,
}
_SMALLEST_PROBABILITY = 1e-6
_BLOCKS = {Precision.INT4_BLOCK64, Precision.INT4_BLOCK128}


def layer_options(graph: ModelGraph, capabilities: Capabilities) -> dict[str, tuple[Precision, ...]]:
    """Return the precisions that the backend really runs for each layer, fp32 first."""
    found = {}
    for layer in graph.layers:
        allowed = capabilities.precisions.get(layer.shape.kind, (Precision.FP32,))
        multiples = {one: one.group_size or capabilities.group_multiple for one in allowed if one.bits == 4}
        # blocks are stored with the outputs innermost, two codes a byte
        odd = {one for one in multiples if one in _BLOCKS and layer.shape.out_channels % 2}
        found[layer.name] = tuple(
            one for one in allowed if layer.shape.in_channels % multiples.get(one, 1) == 0 and one not in odd
        )
    return found


def stored_bytes(layer: Layer, precision: Precision) -> int:
    """Return the bytes of a layer's weights, scales and bias as stored."""
    shape = layer.shape
    weights = (shape.weight_count * precision.bits + 7) // 8
    scales = 0
    if precision.bits == 8:
        scales = _FLOAT_BYTES * shape.out_channels
    elif precision.bits == 4:
        # group scales are bf16
        scales = 2 * shape.out_channels * (shape.in_channels // (precision.group_size or shape.in_channels))
    return weights + scales + _FLOAT_BYTES * shape.out_channels * layer.bias


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _DISK_ALIGNMENT_BYTES) * _DISK_ALIGNMENT_BYTES


def disk_bytes(layer: Layer, precision: Precision) -> int:
    """Return the room that a layer takes in the program file, its entry in the program included."""
    return _aligned(stored_bytes(layer, precision)) + _PROGRAM_BYTES[precision]


@dataclass(frozen=True)
class MemoryModel:
    """Peak bytes that a program adds: ``scale`` · stored bytes + ``fixed_bytes``."""

    fixed_bytes: int
    scale: float


def fit_memory(graph: ModelGraph, measured: Sequence[tuple[Mapping[str, Precision], int]]) -> MemoryModel:
    """Return the line through the measured peaks; packing adds a share, arenas and programs a constant."""
    activations = _largest_activations_bytes(graph)
    if not measured:
        return MemoryModel(activations, 1.0)
    stored = np.array(
        [
            sum(stored_bytes(layer, mix.get(layer.name, Precision.FP32)) for layer in graph.layers)
            for mix, _ in measured
        ],
        dtype=np.float64,
    )
    peaks = np.array([peak for _, peak in measured], dtype=np.float64)
    if len(measured) > 1 and np.ptp(stored) > 0:
        slope, constant = np.polyfit(stored, peaks, 1)
        slope = float(np.clip(slope, 0.9, 1.5))
    else:
        slope = 1.0
    constant = float((peaks - slope * stored).max())  # a plan must not need more than it says
    return MemoryModel(max(0, round(constant)), slope)


def _largest_activations_bytes(graph: ModelGraph) -> int:
    return 2 * _FLOAT_BYTES * max((edge.elements for edge in graph.edges), default=0)


@dataclass(frozen=True)
class Sensitivity:
    """Outputs with one layer quantised, beside the unquantised ones, on the same images.

    Attributes:
        baseline: Probabilities [n, exits, classes].
        labels: [n].
        changed: By layer and precision, probabilities [n, exits, classes].
    """

    baseline: NDArray[np.float32]
    labels: NDArray[np.int64]
    changed: Mapping[tuple[str, Precision], NDArray[np.float32]]


def _cross_entropy(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the cross-entropy of each image at each exit, [n, exits]."""
    right = np.take_along_axis(probabilities, labels[:, None, None], axis=2)[..., 0]
    return -np.log(np.maximum(right, _SMALLEST_PROBABILITY)).astype(np.float64)


def _mean_at_exits(losses: NDArray[np.float64], outputs: ExitOutputs, policy: Policy) -> float:
    """Return the mean loss where images leave, the exit rates being those of the policy."""
    taken = exits_taken(outputs, anchored(outputs, policy.reach))
    return float(losses[np.arange(len(taken)), taken].mean())


def matched_losses(
    sensitivity: Sensitivity, policies: Sequence[Policy]
) -> dict[tuple[str, Precision], tuple[float, ...]]:
    """Return the rise of cross-entropy for each layer and precision under each policy.

    Reach-matched: thresholds are re-anchored to the policy's exit rates on the changed outputs, so that a
    layer that lowers confidence is not credited with the depth this buys. Never negative, and never
    falling as bits fall.
    """
    base_outputs = exit_outputs(sensitivity.baseline, sensitivity.labels)
    base_losses = _cross_entropy(sensitivity.baseline, sensitivity.labels)
    base = [_mean_at_exits(base_losses, base_outputs, policy) for policy in policies]
    found = {}
    for key, probabilities in sensitivity.changed.items():
        outputs = exit_outputs(probabilities, sensitivity.labels)
        losses = _cross_entropy(probabilities, sensitivity.labels)
        found[key] = tuple(
            max(0.0, _mean_at_exits(losses, outputs, policy) - start)
            for policy, start in zip(policies, base, strict=True)
        )
    return _monotone(found)


def _monotone(losses: dict[tuple[str, Precision], tuple[float, ...]]) -> dict[tuple[str, Precision], tuple[float, ...]]:
    """Make a layer's 4-bit losses at least the least of its 8-bit losses: noise must not reward fewer bits."""
    floors: dict[str, NDArray[np.float64]] = {}
    for (layer, precision), values in losses.items():
        if precision.bits == 8:
            here = np.array(values)
            floors[layer] = np.minimum(floors.get(layer, here), here)
    return {
        (layer, precision): tuple(np.maximum(values, floors[layer]))
        if precision.bits < 8 and layer in floors
        else values
        for (layer, precision), values in losses.items()
    }


def loss_scale(
    losses: Mapping[tuple[str, Precision], Sequence[float]],
    measured: Sequence[tuple[Mapping[str, Precision], Sequence[float]]],
) -> float:
    """Return accuracy drop per unit of summed loss, from mixes whose extra drop under each policy was measured.

    Least squares through the origin; 1 when nothing was measured. It is what makes the additive prediction
    speak in points of accuracy.
    """
    top = bottom = 0.0
    for precisions, drops in measured:
        for index, drop in enumerate(drops):
            added = sum(
                losses[layer, precision][index]
                for layer, precision in precisions.items()
                if precision is not Precision.FP32 and (layer, precision) in losses
            )
            top += added * max(0.0, drop)
            bottom += added * added
    if bottom <= 0:
        return 1.0
    return float(np.clip(top / bottom, 0.02, 3.0))


@dataclass(frozen=True)
class TableParts:
    """Everything that a table is built from."""

    graph: ModelGraph
    options: Mapping[str, Sequence[Precision]]
    latency: LatencyModel
    memory: MemoryModel
    policies: Sequence[Policy]
    reference_error: float
    losses: Mapping[tuple[str, Precision], Sequence[float]]
    loss_scale: float
    fixed_disk_bytes: int
    backend: str
    device_digest: str
    calibration_digest: str
    conditions: Conditions | None = None


def _decision(parts: TableParts, layer: Layer) -> Decision:
    options = []
    for precision in parts.options[layer.name]:
        if precision is Precision.FP32:
            loss: tuple[float, ...] = (0.0,)
        else:
            loss = tuple(parts.loss_scale * value for value in parts.losses[layer.name, precision])
        options.append(
            Option(
                name=precision.value,
                loss=loss,
                latency_s=parts.latency.option_s(layer.name, precision),
                memory_bytes={Tier.HOST: round(parts.memory.scale * stored_bytes(layer, precision))},
                disk_bytes=disk_bytes(layer, precision),
                format=precision.activation_format,
            )
        )
    return Decision(subject=layer.name, block=layer.segment, options=tuple(options), tie=layer.tie)


def scenario_of(policy: Policy, reference_error: float, name: str) -> Scenario:
    """Return the policy as a scenario: its loss is the drop against the reference."""
    return Scenario(
        name=name,
        thresholds=(*policy.thresholds, None),
        reach=policy.reach,
        loss=policy.error - reference_error,
    )


def build_table(parts: TableParts) -> CostTable:
    """Return the cost table of a model on a device."""
    graph = parts.graph
    return CostTable(
        name=graph.name,
        scenarios=tuple(
            scenario_of(policy, parts.reference_error, f"policy {index}") for index, policy in enumerate(parts.policies)
        ),
        decisions=tuple(_decision(parts, layer) for layer in graph.layers),
        boundaries=tuple(
            Boundary(
                source=edge.source,
                target=edge.target,
                block=edge.segment,
                latency_s=edge.elements * parts.latency.conversion_s,
            )
            for edge in crossings(graph, cuts_in_int8=parts.latency.cuts_in_int8)
            if edge.source or edge.target
        ),
        fixed_latency_s=parts.latency.fixed_s,
        fixed_memory_bytes={Tier.HOST: parts.memory.fixed_bytes},
        fixed_disk_bytes=parts.fixed_disk_bytes,
        latency_relative_error=parts.latency.relative_error,
        graph_digest=graph.digest(),
        device_digest=parts.device_digest,
        calibration_digest=parts.calibration_digest,
        backend=parts.backend,
        conditions=parts.conditions,
    )
