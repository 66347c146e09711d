"""Times of layers and segments: measured, interpolated, rooflined, and fitted to programs that were planted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.costs.latency import (
    INTERPOLATED_ERROR,
    MEASURED_ERROR,
    ROOFLINE_ERROR,
    LatencyModel,
    Observation,
    crossings,
    fit_latency,
    layer_time,
    predicted_segments_s,
)
from edgeflex.errors import InputError
from edgeflex.schema import LayerKind, Precision, Tier
from tests.small_graphs import (
    CAPABILITIES,
    CHANNEL,
    DYNAMIC,
    FP32,
    GROUP,
    RATES,
    STATIC,
    conv,
    device,
    graph,
    kernel,
    kernels,
    linear,
)

# --- a layer -------------------------------------------------------------------------------------------


def test_a_kernel_of_this_very_layer_wins_over_every_neighbour():
    near = [kernel(linear(64, 64, rows), FP32, 1e-9) for rows in (2, 3, 4)]
    board = device(*near, kernel(linear(64, 64), FP32, 7e-6), cpu=[("fp32", 1e12, False)], read=[(Tier.HOST, 1e12)])
    found = layer_time(board, linear(64, 64), FP32, 1)
    assert (found.seconds, found.relative_error) == (7e-6, MEASURED_ERROR)


def test_kernels_of_one_rate_give_that_rate_in_between():
    board = device(*(kernel(linear(n, n), FP32, n * n * 2e-9) for n in (32, 128, 256)))
    found = layer_time(board, linear(64, 64), FP32, 1)
    assert found.seconds == pytest.approx(64 * 64 * 2e-9)
    assert found.relative_error == INTERPOLATED_ERROR


@settings(max_examples=50, deadline=None)
@given(
    inputs=st.integers(16, 512),
    outputs=st.integers(16, 512),
    rates=st.lists(st.floats(1e-11, 1e-8), min_size=4, max_size=4),
)
def test_an_interpolated_rate_lies_between_those_of_the_nearest(inputs: int, outputs: int, rates: list[float]):
    shapes = [linear(17, 33), linear(64, 64), linear(100, 400), linear(511, 511)]
    board = device(
        *(kernel(shape, FP32, shape.macs * rate) for shape, rate in zip(shapes, rates, strict=True) if shape.macs)
    )
    shape = linear(inputs, outputs)
    rate = layer_time(board, shape, FP32, 1).seconds / shape.macs
    assert min(rates) * (1 - 1e-9) <= rate <= max(rates) * (1 + 1e-9)


def test_the_nearer_kernel_counts_more():
    slow, fast = kernel(linear(64, 64), FP32, 64 * 64 * 1e-8), kernel(linear(512, 512), FP32, 512 * 512 * 1e-9)
    near_slow = layer_time(device(slow, fast), linear(72, 72), FP32, 1).seconds / 72**2
    near_fast = layer_time(device(slow, fast), linear(480, 480), FP32, 1).seconds / 480**2
    assert near_slow > 5e-9 > 2e-9 > near_fast


def test_kernels_of_another_kind_precision_or_thread_count_say_nothing():
    others = (
        kernel(conv(16, 16, 8), FP32, 1e-6),
        kernel(linear(64, 64), DYNAMIC, 1e-6),
        kernel(linear(64, 64), FP32, 1e-6, threads=4),
    )
    with pytest.raises(InputError, match="kernel times for fp32 linear layers"):
        layer_time(device(*others), linear(64, 64), FP32, 1)


def test_a_roofline_is_the_slower_of_computing_and_reading():
    board = device(cpu=[("fp32", 1e9, False), ("int8", 4e9, False)], read=[(Tier.HOST, 1e9)])
    # 4,096 weights: 8,192 operations take 8.192 us; 16,384 bytes take 16.384 us
    assert layer_time(board, linear(64, 64), FP32, 1).seconds == pytest.approx(16.384e-6)
    # 4 rows: 32,768 operations take 32.768 us
    assert layer_time(board, linear(64, 64, 4), FP32, 1).seconds == pytest.approx(32.768e-6)
    # 8 bits: 2.048 us of operations, 4.096 us of reading
    found = layer_time(board, linear(64, 64), DYNAMIC, 1)
    assert found.seconds == pytest.approx(4.096e-6)
    assert found.relative_error == ROOFLINE_ERROR


def test_a_roofline_takes_dense_rates_and_the_memory_that_weights_lie_in():
    board = device(cpu=[("int8", 1e9, False), ("int8", 1e15, True)], read=[(Tier.HOST, 1e9), (Tier.DEVICE, 1e15)])
    assert layer_time(board, linear(64, 64, 64), STATIC, 1).seconds == pytest.approx(2 * 64**3 / 1e9)
    assert layer_time(board, linear(64, 64), STATIC, 1).seconds == pytest.approx(8.192e-6)


@pytest.mark.parametrize(
    ("cpu", "read", "missing"),
    [
        ([], [], ["CPU rate or kernel times for int4-group32 linear layers", "memory read bandwidth"]),
        ([("int8", 1e9, False)], [(Tier.HOST, 1e9)], ["CPU rate or kernel times for int4-group32 linear layers"]),
        ([("int4", 1e9, False)], [(Tier.FLASH, 1e9)], ["memory read bandwidth"]),
        ([("int4", 1e9, True)], [(Tier.HOST, 1e9)], ["CPU rate"]),
    ],
)
def test_what_no_source_gives_is_named(
    cpu: list[tuple[str, float, bool]], read: list[tuple[Tier, float]], missing: list[str]
):
    with pytest.raises(InputError, match="bench-board") as raised:
        layer_time(device(cpu=cpu, read=read), linear(64, 64), GROUP, 1)
    for part in missing:
        assert f"no {part}" in str(raised.value)
    assert "edgeflex profile" in str(raised.value)


# --- a program -----------------------------------------------------------------------------------------


def lone_times() -> dict[tuple[str, Precision], float]:
    known = graph()
    board = device(*kernels(known))
    return {
        (layer.name, precision): layer_time(board, layer.shape, precision, 1).seconds
        for layer in known.layers
        for precision in CAPABILITIES.precisions[layer.shape.kind]
    }


def random_mixes(count: int, seed: int = 0) -> list[dict[str, Precision]]:
    draw = np.random.default_rng(seed)
    choices = {layer.name: CAPABILITIES.precisions[layer.shape.kind] for layer in graph().layers}
    return [{name: row[int(draw.integers(len(row)))] for name, row in choices.items()} for _ in range(count)]


def planted(scales: dict[Precision, float], fixed: tuple[float, ...], conversion_s: float) -> LatencyModel:
    return LatencyModel(lone_times(), fixed, scales, conversion_s, 0.05)


SCALES = {FP32: 1.1, STATIC: 0.7, DYNAMIC: 1.4, CHANNEL: 0.9, GROUP: 1.2}
FIXED = (5e-5, 8e-5, 2e-5)


def test_the_fit_finds_planted_times_again():
    truth = planted(SCALES, FIXED, 4e-10)
    mixes = random_mixes(60)
    observations = [Observation(mix, predicted_segments_s(truth, graph(), mix)) for mix in mixes]
    found = fit_latency(graph(), lone_times(), observations, call_s=0.0, layer_error=0.5)
    for mix in random_mixes(40, seed=1):
        assert predicted_segments_s(found, graph(), mix) == pytest.approx(
            predicted_segments_s(truth, graph(), mix), rel=0.02
        )
    # a fixed cost is told from the layers beside it up to a twentieth of the segment
    segments = predicted_segments_s(truth, graph(), {})
    assert all(abs(a - b) < 0.05 * s for a, b, s in zip(found.fixed_s, FIXED, segments, strict=True))
    # the precisions that take most of the time stand out clearest
    for precision in (FP32, STATIC):
        assert found.scales[precision] == pytest.approx(SCALES[precision], rel=0.1)
    assert found.conversion_s == pytest.approx(4e-10, rel=0.5)
    assert found.relative_error == MEASURED_ERROR


def test_the_fit_lives_with_noise_and_says_how_far_it_is_off():
    truth = planted(SCALES, FIXED, 8e-10)
    draw = np.random.default_rng(4)
    observations = [
        Observation(mix, tuple(s * draw.normal(1.0, 0.08) for s in predicted_segments_s(truth, graph(), mix)))
        for mix in random_mixes(40)
    ]
    found = fit_latency(graph(), lone_times(), observations, call_s=0.0, layer_error=0.5)
    errors = sorted(
        abs(sum(predicted_segments_s(found, graph(), one.precisions)[:depth]) / sum(one.segment_s[:depth]) - 1.0)
        for one in observations
        for depth in range(1, graph().segment_count + 1)
    )
    assert np.mean([error <= found.relative_error for error in errors]) == pytest.approx(0.9, abs=0.02)
    assert 0.05 < found.relative_error < 0.3


def test_nothing_in_the_fit_is_negative_even_where_kernels_overstate():
    mixes = random_mixes(12)
    observations = [Observation(mix, (1e-6, 1e-6, 1e-6)) for mix in mixes]
    found = fit_latency(graph(), lone_times(), observations, call_s=0.0, layer_error=0.5)
    assert min((*found.fixed_s, *found.scales.values(), found.conversion_s)) >= 0.0


def test_one_program_does_not_turn_the_kernels_over():
    mix = dict.fromkeys((layer.name for layer in graph().layers), FP32)
    truth = planted(dict.fromkeys(RATES, 1.0), FIXED, 2.5e-10)
    found = fit_latency(
        graph(), lone_times(), [Observation(mix, predicted_segments_s(truth, graph(), mix))], call_s=0, layer_error=0.5
    )
    # what was not seen stays where the lone kernels put it
    assert found.scales[GROUP] == pytest.approx(1.0, abs=1e-6)
    assert predicted_segments_s(found, graph(), mix) == pytest.approx(
        predicted_segments_s(truth, graph(), mix), rel=0.05
    )


def test_without_programs_kernels_stand_as_they_are_with_their_own_error():
    found = fit_latency(graph(), lone_times(), [], call_s=3e-6, layer_error=0.42)
    assert found.fixed_s == (3e-6,) * 3
    assert set(found.scales.values()) == {1.0}
    assert found.relative_error == 0.42
    times = lone_times()
    assert predicted_segments_s(found, graph(), {})[2] == pytest.approx(
        3e-6 + times["wide", FP32] + times["last", FP32]
    )


def test_formats_are_converted_where_they_meet_and_nowhere_else():
    bare = LatencyModel(lone_times(), (0.0,) * 3, dict.fromkeys(RATES, 0.0), 1.0, 0.05)

    def converted(mix: dict[str, Precision]) -> tuple[float, ...]:
        return predicted_segments_s(bare, graph(), mix)

    assert converted({}) == (0.0, 0.0, 0.0)
    assert converted({"wide": DYNAMIC, "last": GROUP}) == (0.0, 0.0, 0.0)  # float at both ends
    # int8 activations cross the cut behind the stem, and the segment that wants them in float pays
    assert converted({"stem": STATIC}) == (768 + 16, 4096, 0.0)
    assert converted({"stem": STATIC, "exit0.linear": STATIC}) == (768 + 3, 4096, 0.0)
    assert converted({"stem": STATIC, "body": STATIC}) == (768 + 16, 32, 2048)
    assert converted({"wide": STATIC, "last": STATIC}) == (0.0, 0.0, 2048 + 3)
    assert converted({"wide": STATIC}) == (0.0, 0.0, 2048 + 64)


def test_every_crossing_is_counted_once():
    assert [(one.source, one.target, one.segment, one.elements) for one in crossings(graph())] == [
        ("", "stem", 0, 768),
        ("stem", "exit0.linear", 0, 16),
        ("exit0.linear", "", 0, 3),
        ("stem", "body", 1, 4096),
        ("body", "exit1.linear", 1, 32),
        ("body", "wide", 2, 2048),
        ("wide", "last", 2, 64),
        ("last", "", 2, 3),
    ]


def test_predictions_add_up_over_layers():
    truth = planted(SCALES, FIXED, 0.0)
    parts = {layer.name: CAPABILITIES.precisions[layer.shape.kind] for layer in graph().layers}
    assert LayerKind.LINEAR in {layer.shape.kind for layer in graph().layers}
    for wide, last in itertools.product(parts["wide"], parts["last"]):
        segment = predicted_segments_s(truth, graph(), {"wide": wide, "last": last})[2]
        times = lone_times()
        expected = FIXED[2] + times["wide", wide] * SCALES[wide] + times["last", last] * SCALES[last]
        assert segment == pytest.approx(expected)


def test_a_segment_too_short_to_time_does_not_turn_the_fit_over():
    truth = planted(SCALES, FIXED, 8e-10)
    observations = [Observation(mix, predicted_segments_s(truth, graph(), mix)) for mix in random_mixes(20)]
    torn = observations[0].segment_s
    observations[0] = Observation(observations[0].precisions, (*torn[:-1], 1e-7))
    found = fit_latency(graph(), lone_times(), observations, call_s=1e-6, layer_error=0.5)
    for one in observations[1:]:
        predicted = sum(predicted_segments_s(found, graph(), one.precisions))
        assert predicted == pytest.approx(sum(one.segment_s), rel=0.1)
