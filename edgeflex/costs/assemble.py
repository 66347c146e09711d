"""A calibration folder becomes a cost table and its measured candidates; which mixes to measure. No torch."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.costs.latency import (
    LatencyModel,
    Observation,
    conversion_s,
    engine_of,
    fit_latency,
    layer_time,
    predicted_segments_s,
    segment_call_s,
)
from edgeflex.costs.policies import anchored, exit_outputs, judge, policy_pool
from edgeflex.costs.store import CANDIDATE_ROLE, Mix, mix_digest
from edgeflex.costs.table import (
    Sensitivity,
    TableParts,
    build_table,
    disk_bytes,
    fit_memory,
    layer_options,
    loss_scale,
    matched_losses,
    scenario_of,
)
from edgeflex.errors import InputError
from edgeflex.schema import (
    Candidate,
    Candidates,
    Capabilities,
    Choice,
    Conditions,
    CostTable,
    DeviceProfile,
    LayerKind,
    ModelGraph,
    Precision,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeflex.costs.policies import ExitOutputs, Policy
    from edgeflex.costs.store import Calibration

    Precisions = dict[str, Precision]

_PAGE_BYTES = 4096
_STEADY = 0.1
# Room for what the file format adds per program, found on no layer; export fills it exactly.
_PROGRAM_SLACK_BYTES = 4096
_SMALL_SHARE = 0.05
_INT8_ORDER = (Precision.INT8_STATIC, Precision.INT8_DYNAMIC)


def uniform_mixes(graph: ModelGraph, options: Mapping[str, Sequence[Precision]]) -> tuple[tuple[str, Precisions], ...]:
    """Return fp32 and one mix per precision of the linear layers, convolutions in static int8 beside them.

    Where linear layers hold almost no weights, only their first int8 form is tried.
    """
    linear = [layer for layer in graph.layers if layer.shape.kind is LayerKind.LINEAR]
    share = sum(one.shape.weight_count for one in linear) / sum(one.shape.weight_count for one in graph.layers)
    forms = dict.fromkeys(one for layer in graph.layers for one in options[layer.name] if one is not Precision.FP32)
    if share < _SMALL_SHARE:
        forms = dict.fromkeys(one for one in forms if one is Precision.INT8_STATIC)
    mixes: list[tuple[str, Precisions]] = [("fp32", {layer.name: Precision.FP32 for layer in graph.layers})]
    for form in forms:
        mix = {}
        for layer in graph.layers:
            allowed = options[layer.name]
            fallback = next((one for one in _INT8_ORDER if one in allowed), Precision.FP32)
            mix[layer.name] = form if form in allowed else fallback
        mixes.append((form.value, mix))
    return tuple(mixes)


def random_mix(graph: ModelGraph, options: Mapping[str, Sequence[Precision]], seed: int) -> Precisions:
    """Return a mix drawn uniformly, layer by layer; it tells the latency fit what conversions cost."""
    rng = np.random.default_rng(seed)
    return {layer.name: options[layer.name][int(rng.integers(len(options[layer.name])))] for layer in graph.layers}


def mix_of(choices: Sequence[Choice]) -> Precisions:
    """Return the precisions that a solution chose.

    Raises:
        InputError: An option is no precision; all such choices are named.
    """
    known = {one.value: one for one in Precision}
    if faults := [f"{one.subject} takes {one.option!r}" for one in choices if one.option not in known]:
        faults.append(f"known precisions are {', '.join(known)}")
        raise InputError.collect("the plan's choices", faults)
    return {choice.subject: known[choice.option] for choice in choices}


def _latency_model(
    graph: ModelGraph,
    device: DeviceProfile,
    options: Mapping[str, Sequence[Precision]],
    mixes: Sequence[Mix],
    threads: int,
    *,
    backend: str,
    here: bool,
) -> LatencyModel:
    engine = engine_of(backend)
    times = {
        (layer.name, precision): layer_time(device, layer.shape, precision, threads, engine=engine)
        for layer in graph.layers
        for precision in options[layer.name]
    }
    observations = _observations(mixes) if here else []
    return fit_latency(
        graph,
        {key: time.seconds for key, time in times.items()},
        observations,
        call_s=segment_call_s(device, engine),
        layer_error=max(time.relative_error for time in times.values()),
        conversion_s_per_element=conversion_s(device, engine),
        cuts_in_int8=backend == "executorch",
    )


def _runs(precisions: Mapping[str, Precision], options: Mapping[str, Sequence[Precision]]) -> bool:
    """Say whether a device has every precision of a mix; another device than the calibration's may have fewer."""
    return all(one in options[layer] for layer, one in precisions.items())


def _observations(mixes: Sequence[Mix]) -> list[Observation]:
    """Return the measured programs as if all had been timed at the machine's median speed among them.

    Mixes are timed minutes apart; on a shared or throttling machine its speed drifts in between, by far more
    than mixes differ. The yardstick that ran beside each tells by how much, where it is much.
    """
    steady = [mix.record.yardstick_s for mix in mixes if mix.record.yardstick_s]
    usual_s = float(np.median(steady)) if steady else 0.0
    found = []
    for mix in mixes:
        slower = mix.record.yardstick_s / usual_s if mix.record.yardstick_s and usual_s else 1.0
        if abs(slower - 1.0) < _STEADY:
            slower = 1.0  # within its own noise the yardstick would only add to the programs'
        found.append(Observation(mix.record.precisions, tuple(seconds / slower for seconds in mix.record.segment_s)))
    return found


def _conditions(mixes: Sequence[Mix]) -> Conditions | None:
    """Return the machine's median speed among the programs, at which ``_observations`` tells their times.

    What is not known of every program is left out: the others may have run at another speed.
    """
    states = [mix.record.conditions or Conditions() for mix in mixes]
    arithmetic_s = _known_median([one.arithmetic_s for one in states])
    rate = _known_median([one.memory_bytes_per_s for one in states])
    if arithmetic_s is None and rate is None:
        return None
    machines = {one.machine for one in states}
    machine = machines.pop() if len(machines) == 1 else None
    return Conditions(arithmetic_s=arithmetic_s, memory_bytes_per_s=rate, machine=machine)


def _known_median(figures: Sequence[float | None]) -> float | None:
    known = [one for one in figures if one is not None]
    return median(known) if known and len(known) == len(figures) else None


def _pools(
    mixes: Sequence[Mix], outputs: Mapping[str, ExitOutputs], block_s: Mapping[str, Sequence[float]]
) -> dict[str, tuple[Policy, ...]]:
    return {mix.digest: policy_pool(outputs[mix.digest], block_s[mix.digest]) for mix in mixes}


def _fixed_disk_bytes(graph: ModelGraph, mixes: Sequence[Mix]) -> int:
    """Return what the largest measured program needs beyond its layers, rounded up to pages."""
    spare = [
        mix.record.program_bytes
        - sum(disk_bytes(layer, mix.record.precisions.get(layer.name, Precision.FP32)) for layer in graph.layers)
        for mix in mixes
    ]
    return -(-max(0, *spare, 0) // _PAGE_BYTES) * _PAGE_BYTES + _PROGRAM_SLACK_BYTES


def _sensitivity(calibration: Calibration, options: Mapping[str, Sequence[Precision]]) -> Sensitivity:
    return Sensitivity(
        baseline=calibration.baseline(),
        labels=calibration.sensitivity_labels(),
        changed={
            (layer, precision): calibration.sensitivity(layer, precision)
            for layer, precisions in options.items()
            for precision in precisions
            if precision is not Precision.FP32
        },
    )


def assemble(
    calibration: Calibration,
    graph: ModelGraph,
    device: DeviceProfile,
    capabilities: Capabilities,
    *,
    threads: int,
    here: bool,
    seeds_only: bool = False,
) -> tuple[CostTable, Candidates]:
    """Return the cost table and the measured candidates of what the folder holds so far.

    Args:
        calibration: With ranges, sensitivities and at least the fp32 mix measured.
        graph: Of the calibrated model.
        device: To plan for.
        capabilities: Of the backend.
        threads: Of the runtime.
        here: Whether the mixes were timed on this very device, so that the fit may use their times.
        seeds_only: Leave out the mixes that an earlier table asked for, so that what is measured next does not
            depend on how often calibration was resumed.
    """
    options = layer_options(graph, capabilities)
    mixes = tuple(
        mix
        for mix in calibration.mixes()
        if not (seeds_only and mix.record.role == CANDIDATE_ROLE) and _runs(mix.record.precisions, options)
    )
    labels = calibration.labels("choose")
    latency = _latency_model(graph, device, options, mixes, threads, backend=capabilities.backend, here=here)
    outputs = {mix.digest: exit_outputs(mix.choose, labels) for mix in mixes}
    measured = {mix.digest: one.segment_s if here else () for mix, one in zip(mixes, _observations(mixes), strict=True)}
    block_s = {
        mix.digest: measured[mix.digest] or predicted_segments_s(latency, graph, mix.record.precisions) for mix in mixes
    }
    pools = _pools(mixes, outputs, block_s)
    float_mix = mix_digest({})
    reference_error = 1.0 - float(outputs[float_mix].correct[:, -1].mean())
    policies = pools[float_mix]
    losses = matched_losses(_sensitivity(calibration, options), policies)
    scale = loss_scale(losses, [_extra_drops(mix, outputs[mix.digest], policies, graph) for mix in mixes])
    # what ONNX Runtime took on another machine says nothing about engines: weights and activations are counted
    taken = () if engine_of(capabilities.backend) == "gpu" else mixes
    memory = fit_memory(
        graph,
        [(mix.record.precisions, mix.record.memory_bytes) for mix in taken if mix.record.memory_bytes is not None],
    )
    table = build_table(
        TableParts(
            graph=graph,
            options=options,
            latency=latency,
            memory=memory,
            policies=policies,
            reference_error=reference_error,
            losses=losses,
            loss_scale=scale,
            fixed_disk_bytes=_fixed_disk_bytes(graph, mixes),
            backend=capabilities.backend,
            device_digest=device.digest(),
            calibration_digest=calibration.digest(),
            conditions=_conditions(mixes) if here else None,
        )
    )
    return table, Candidates(
        reference_accuracy=1.0 - reference_error,
        candidates=tuple(
            _candidate(mix, pools[mix.digest], outputs[mix.digest], reference_error, graph, measured[mix.digest])
            for mix in mixes
        ),
        table_digest=table.digest(),
    )


def _extra_drops(
    mix: Mix, outputs: ExitOutputs, policies: Sequence[Policy], graph: ModelGraph
) -> tuple[Mapping[str, Precision], tuple[float, ...]]:
    """Return how much more a mix errs than fp32 under each policy's exit rates."""
    unit = (1.0,) * graph.segment_count
    return mix.record.precisions, tuple(
        judge(outputs, anchored(outputs, policy.reach), unit).error - policy.error for policy in policies
    )


def _candidate(
    mix: Mix,
    pool: Sequence[Policy],
    outputs: ExitOutputs,
    reference_error: float,
    graph: ModelGraph,
    segment_s: tuple[float, ...],
) -> Candidate:
    return Candidate(
        mix=mix.digest,
        choices=tuple(
            Choice(subject=layer.name, option=mix.record.precisions.get(layer.name, Precision.FP32).value)
            for layer in graph.layers
        ),
        scenarios=tuple(
            scenario_of(policy, reference_error, f"{mix.digest} policy {index}") for index, policy in enumerate(pool)
        ),
        segment_s=segment_s,
        memory_bytes=mix.record.memory_bytes if segment_s else None,
        accuracy=float(outputs.correct[:, -1].mean()),
    )
