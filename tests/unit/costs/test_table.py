"""The cost table: bytes counted by hand, losses that noise cannot turn round, and a table that the planner takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.costs.latency import LatencyModel, predicted_segments_s
from edgeflex.costs.policies import exit_outputs, judge, policy_pool
from edgeflex.costs.table import (
    MemoryModel,
    Sensitivity,
    TableParts,
    build_table,
    disk_bytes,
    fit_memory,
    layer_options,
    loss_scale,
    matched_losses,
    scenario_of,
    stored_bytes,
)
from edgeflex.plans import check, footprint, solve
from edgeflex.schema import Budget, Choice, Format, Layer, Precision, Tier
from tests.small_graphs import (
    CAPABILITIES,
    CHANNEL,
    DYNAMIC,
    FP32,
    GROUP,
    RATES,
    STATIC,
    changed,
    conv,
    graph,
    linear,
    probabilities,
)

OPTIONS = layer_options(graph(), CAPABILITIES)
LAYERS = {layer.name: layer for layer in graph().layers}

# --- bytes -----------------------------------------------------------------------------------------------


def test_options_are_what_the_backend_runs_and_the_width_allows():
    assert OPTIONS["stem"] == (FP32, STATIC)
    assert OPTIONS["wide"] == (FP32, STATIC, DYNAMIC, CHANNEL, GROUP)
    # 16 inputs make no group of 32, so neither 4-bit form exists
    assert OPTIONS["exit0.linear"] == (FP32, STATIC, DYNAMIC)


@pytest.mark.parametrize(
    ("precision", "size"),
    [
        (FP32, 64 * 96 * 4 + 64 * 4),
        (Precision.FP16, 64 * 96 * 2 + 64 * 4),
        (STATIC, 64 * 96 + 64 * 4 + 64 * 4),
        (DYNAMIC, 64 * 96 + 64 * 4 + 64 * 4),
        (CHANNEL, 64 * 48 + 64 * 2 + 64 * 4),
        (GROUP, 64 * 48 + 64 * 3 * 2 + 64 * 4),
    ],
)
def test_bytes_of_a_linear_layer_by_hand(precision: Precision, size: int):
    layer = Layer(name="a", shape=linear(96, 64), segment=0, bias=True)
    assert stored_bytes(layer, precision) == size
    assert stored_bytes(layer.model_copy(update={"bias": False}), precision) == size - 64 * 4


def test_bytes_of_a_depthwise_convolution_count_one_input_a_channel():
    layer = Layer(name="a", shape=conv(32, 32, 8, groups=32), segment=0, bias=False)
    assert stored_bytes(layer, FP32) == 32 * 9 * 4
    assert stored_bytes(layer, STATIC) == 32 * 9 + 32 * 4


def test_on_disk_a_layer_takes_whole_blocks_and_its_entry():
    layer = Layer(name="a", shape=linear(32, 3), segment=0, bias=True)
    assert stored_bytes(layer, DYNAMIC) == 96 + 12 + 12
    assert disk_bytes(layer, DYNAMIC) == 128 + 832


def test_memory_is_a_line_through_measured_peaks():
    mixes = [dict.fromkeys(LAYERS, FP32), dict.fromkeys(LAYERS, STATIC), {**dict.fromkeys(LAYERS, FP32), "wide": GROUP}]
    stored = [sum(stored_bytes(LAYERS[name], one) for name, one in mix.items()) for mix in mixes]
    measured = [(mix, round(1.2 * size + 70_000)) for mix, size in zip(mixes, stored, strict=True)]
    found = fit_memory(graph(), measured)
    assert found.scale == pytest.approx(1.2, rel=1e-3)
    assert found.fixed_bytes == pytest.approx(70_000, rel=1e-3)


def test_memory_without_measurements_is_the_stored_bytes_and_two_largest_activations():
    assert fit_memory(graph(), []) == MemoryModel(2 * 4 * 4096, 1.0)


def test_memory_from_one_measurement_keeps_the_slope_of_the_stored_bytes():
    stored = sum(stored_bytes(layer, FP32) for layer in LAYERS.values())
    assert fit_memory(graph(), [({}, stored + 5_000)]) == MemoryModel(5_000, 1.0)


def test_a_slope_beyond_belief_is_held_back():
    measured = [({}, 10**7), (dict.fromkeys(LAYERS, STATIC), 10)]
    assert fit_memory(graph(), measured).scale == 1.5


# --- losses ------------------------------------------------------------------------------------------------


def sensitivity(amounts: dict[tuple[str, Precision], float], count: int = 120, seed: int = 0) -> Sensitivity:
    labels, base = probabilities(count, seed)
    disturbed = {key: changed(base, number, amount) for number, (key, amount) in enumerate(amounts.items())}
    return Sensitivity(baseline=base, labels=labels, changed=disturbed)


def pool(given_sensitivity: Sensitivity):
    return policy_pool(exit_outputs(given_sensitivity.baseline, given_sensitivity.labels), (1.0, 1.0, 1.0), prices=6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), first=st.floats(0.0, 1.0), second=st.floats(0.0, 1.0))
def test_losses_are_never_negative_and_never_fall_with_the_bits(seed: int, first: float, second: float):
    amounts = {("wide", STATIC): first, ("wide", DYNAMIC): second, ("wide", CHANNEL): 0.1, ("wide", GROUP): 0.0}
    known = sensitivity(amounts, seed=seed)
    losses = matched_losses(known, pool(known))
    for index in range(len(pool(known))):
        assert min(row[index] for row in losses.values()) >= 0.0
        least8 = min(losses["wide", one][index] for one in (STATIC, DYNAMIC))
        assert min(losses["wide", one][index] for one in (CHANNEL, GROUP)) >= least8


def test_a_layer_that_changes_nothing_loses_nothing_and_a_ruined_one_loses_most():
    known = sensitivity({("stem", STATIC): 0.0, ("body", STATIC): 0.3, ("wide", STATIC): 3.0})
    losses = matched_losses(known, pool(known))
    assert max(losses["stem", STATIC]) < 1e-6
    assert all(a < b for a, b in zip(losses["body", STATIC], losses["wide", STATIC], strict=True))


def test_a_layer_that_lowers_confidence_is_not_paid_for_the_depth_it_causes():
    draw = np.random.default_rng(3)
    # calibrated exits: an answer given with confidence c is right with probability c
    sure = np.stack(
        [draw.uniform(0.4, 0.99, 2000), draw.uniform(0.95, 0.999, 2000), draw.uniform(0.95, 0.999, 2000)], 1
    )
    labels = draw.integers(0, 3, 2000)
    answers = np.where(draw.random((2000, 3)) < sure, labels[:, None], (labels[:, None] + 1) % 3)
    base = np.repeat((1 - sure)[:, :, None] / 2, 3, axis=2)
    np.put_along_axis(base, answers[:, :, None], sure[:, :, None], axis=2)
    flat = base.copy()
    flat[:, 0] = 0.7 * base[:, 0] + 0.1  # the same answers, given with less confidence
    known = Sensitivity(
        baseline=base.astype(np.float32), labels=labels, changed={("stem", STATIC): flat.astype(np.float32)}
    )
    policy = judge(exit_outputs(base, labels), (0.7, 0.0), (1.0, 1.0, 1.0))
    # at fixed thresholds fewer leave early and accuracy rises; at matched reach it is a loss
    fixed = judge(exit_outputs(flat, labels), policy.thresholds, (1.0, 1.0, 1.0))
    assert fixed.error < policy.error - 0.02
    assert matched_losses(known, [policy])["stem", STATIC][0] > 0.01


def test_losses_by_hand_at_full_depth():
    labels, base = probabilities(50, 1)
    other = changed(base, 2, 0.5)
    known = Sensitivity(baseline=base, labels=labels, changed={("wide", GROUP): other})
    policy = judge(exit_outputs(base, labels), (None, None), (1.0, 1.0, 1.0))
    rows = np.arange(50)
    right, before = (np.maximum(one[rows, -1, labels].astype(np.float64), 1e-6) for one in (other, base))
    rise = np.mean(np.log(before) - np.log(right))
    assert matched_losses(known, [policy])["wide", GROUP] == pytest.approx((max(0.0, rise),), rel=1e-4)


def test_the_scale_is_the_planted_points_of_accuracy_a_unit_of_loss():
    losses = {("stem", STATIC): (0.1, 0.2), ("body", STATIC): (0.3, 0.1), ("wide", GROUP): (0.5, 0.4)}
    mixes = [{"stem": STATIC}, {"stem": STATIC, "body": STATIC}, {"wide": GROUP, "stem": STATIC, "body": FP32}]
    measured = [
        (mix, [0.25 * sum(losses[key][index] for key in mix.items() if key in losses) for index in range(2)])
        for mix in mixes
    ]
    assert loss_scale(losses, measured) == pytest.approx(0.25)


def test_the_scale_is_one_without_measurements_and_stays_within_reason():
    losses = {("stem", STATIC): (0.1,)}
    assert loss_scale(losses, []) == 1.0
    assert loss_scale(losses, [({}, [0.3])]) == 1.0
    assert loss_scale(losses, [({"stem": STATIC}, [50.0])]) == 3.0
    assert loss_scale(losses, [({"stem": STATIC}, [-50.0])]) == 0.02


# --- the table -----------------------------------------------------------------------------------------------


def parts(count: int = 200) -> TableParts:
    amounts = {
        (layer, precision): 0.05 * (number + 1) * (4 if precision.bits == 4 else 1)
        for number, layer in enumerate(OPTIONS)
        for precision in OPTIONS[layer]
        if precision is not FP32
    }
    known = sensitivity(amounts, count)
    policies = pool(known)
    times = {(name, one): 1e-6 + LAYERS[name].shape.macs * RATES[one] for name in OPTIONS for one in OPTIONS[name]}
    return TableParts(
        graph=graph(),
        options=OPTIONS,
        latency=LatencyModel(times, (3e-6, 2e-6, 1e-6), dict.fromkeys(RATES, 1.25), 5e-10, 0.08),
        memory=MemoryModel(12_345, 1.1),
        policies=policies,
        reference_error=0.1,
        losses=matched_losses(known, policies),
        loss_scale=0.5,
        fixed_disk_bytes=8192,
        backend="executorch",
        device_digest="d" * 64,
        calibration_digest="c" * 64,
    )


def test_the_planner_takes_the_table_and_its_answer_recounts():
    table = build_table(parts())
    for budget in (Budget(), Budget(minimize="memory"), Budget(minimize="drop"), Budget(max_drop=0.2)):
        solution = solve(table, budget)
        check(table, budget, solution)
        assert solution.proof.status == "optimal"


def test_block_latencies_of_the_table_are_those_of_the_latency_model():
    given_parts = parts()
    table = build_table(given_parts)
    draw = np.random.default_rng(0)
    for _ in range(20):
        mix = {name: row[int(draw.integers(len(row)))] for name, row in OPTIONS.items()}
        choices = tuple(Choice(subject=name, option=one.value) for name, one in mix.items())
        counted = footprint(table, 0, choices)
        assert counted.block_latency_s == pytest.approx(predicted_segments_s(given_parts.latency, graph(), mix))


def test_bytes_of_the_table_are_the_sum_over_layers():
    table = build_table(parts())
    choices = tuple(Choice(subject=name, option=row[-1].value) for name, row in OPTIONS.items())
    counted = footprint(table, 0, choices)
    stored = [stored_bytes(LAYERS[name], row[-1]) for name, row in OPTIONS.items()]
    assert counted.memory_bytes == {Tier.HOST: 12_345 + sum(round(1.1 * size) for size in stored)}
    assert counted.disk_bytes == 8192 + sum(disk_bytes(LAYERS[name], row[-1]) for name, row in OPTIONS.items())


def test_float_layers_lose_nothing_and_int8_ones_carry_their_format():
    given_parts = parts()
    table = build_table(given_parts)
    for row in table.decisions:
        for one in row.options:
            precision = Precision(one.name)
            assert one.format is (Format.Q8 if precision is STATIC else Format.FLOAT)
            if precision is FP32:
                assert one.loss == (0.0,)
            else:
                assert one.loss == tuple(0.5 * value for value in given_parts.losses[row.subject, precision])


def test_a_scenario_is_its_policy_with_the_drop_against_the_reference():
    policy = parts().policies[0]
    made = scenario_of(policy, 0.1, "p")
    assert made.thresholds == (*policy.thresholds, None)
    assert made.reach == policy.reach
    assert made.loss == pytest.approx(policy.error - 0.1)


def test_the_table_says_what_it_was_made_from():
    table = build_table(parts())
    assert (table.graph_digest, table.device_digest, table.calibration_digest) == (
        graph().digest(),
        "d" * 64,
        "c" * 64,
    )
    assert (table.latency_relative_error, table.backend) == (0.08, "executorch")
    assert type(table).parse(table.canonical_json(), "table.json").digest() == table.digest()
