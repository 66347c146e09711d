"""Times on an NVIDIA GPU before anything ran there: rooflines by hand, what stands in, what is refused."""

from __future__ import annotations

import pytest

from edgeflex import profiles
from edgeflex.costs.latency import (
    GPU_ROOFLINE_ERROR,
    LAUNCH_S,
    ROOFLINE_ERROR,
    conversion_s,
    engine_of,
    fit_latency,
    layer_time,
    plan_notes,
    predicted_segments_s,
    segment_call_s,
)
from edgeflex.errors import InputError, UnsupportedError
from edgeflex.registry import EXPORTERS, NVIDIA_DEVICES, capabilities_for
from edgeflex.schema import ComputeRate, DeviceProfile, LayerShape, Precision, Tier, TierSpec
from tests.small_graphs import DYNAMIC, FP32, STATIC, conv, device, figure, graph, kernel, linear

INT4, INT4_WIDE = Precision.INT4_BLOCK64, Precision.INT4_BLOCK128
FP16, FP8 = Precision.FP16, Precision.FP8
WORD = LayerShape(kind=linear(1, 1).kind, in_channels=1024, out_channels=4096)
MANY = WORD.model_copy(update={"rows": 4096})


def board(
    rates: dict[str, float], *, unified: bool = True, host: float | None = 100e9, own: float | None = None
) -> DeviceProfile:
    """A device with these dense GPU rates and read speeds of its memories; its processor is very fast."""
    reads = {Tier.HOST: host, Tier.DEVICE: own}
    return DeviceProfile(
        name="a-board",
        title="A board",
        origin="datasheet",
        unified_memory=unified,
        compute=(
            *(ComputeRate(engine="gpu", precision=name, ops_per_s=figure(rate)) for name, rate in rates.items()),
            *(ComputeRate(engine="gpu", precision=name, ops_per_s=figure(1e30), sparse=True) for name in rates),
            *(ComputeRate(engine="cpu", precision=name, ops_per_s=figure(1e30)) for name in ("fp32", "int8")),
        ),
        tiers=tuple(TierSpec(tier=tier, read_bytes_per_s=figure(speed)) for tier, speed in reads.items() if speed),
    )


ORIN = board({"fp32": 1e12, "fp16": 10e12, "int8": 20e12})


def seconds(device: DeviceProfile, shape: LayerShape, precision: Precision) -> float:
    return layer_time(device, shape, precision, 1, engine="gpu").seconds - LAUNCH_S


def test_one_token_waits_for_its_weights_and_many_for_the_arithmetic():
    weights, ops = 1024 * 4096, 2.0 * 1024 * 4096
    # one row: 5,120 activations beside the weights
    assert seconds(ORIN, WORD, FP32) == pytest.approx((4 * weights + 4 * 5120) / 100e9)
    assert seconds(ORIN, WORD, FP16) == pytest.approx((2 * weights + 2 * 5120) / 100e9)
    assert seconds(ORIN, WORD, STATIC) == pytest.approx((weights + 5120) / 100e9)
    for precision, rate in ((FP32, 1e12), (FP16, 10e12), (STATIC, 20e12)):
        assert seconds(ORIN, MANY, precision) == pytest.approx(4096 * ops / rate)


def test_four_bit_weights_are_read_in_half_a_byte_and_computed_in_halves():
    for precision in (INT4, INT4_WIDE):
        assert seconds(ORIN, WORD, precision) == pytest.approx((1024 * 4096 / 2 + 2 * 5120) / 100e9)
        assert seconds(ORIN, MANY, precision) == seconds(ORIN, MANY, FP16)


def test_a_convolution_moves_its_image_in_and_out():
    shape = conv(64, 128, 56, stride=2)
    moved = 64 * 56 * 56 + 128 * 28 * 28 + shape.weight_count
    slow = board({"fp32": 1e18, "fp16": 1e18, "int8": 1e18}, host=1e9)
    assert seconds(slow, shape, STATIC) == pytest.approx(moved / 1e9)


def test_the_interval_reaches_from_nothing_to_twice_the_time():
    found = layer_time(ORIN, linear(8, 8), FP32, 1, engine="gpu")
    assert found.relative_error == GPU_ROOFLINE_ERROR >= 1.0
    assert found.seconds == pytest.approx(LAUNCH_S, rel=0.01)


def test_the_processor_and_its_kernels_say_nothing_about_the_gpu():
    timed = board({"fp32": 1e12}).model_copy(update={"kernels": (kernel(WORD, FP32, 1e-9),)})
    assert layer_time(timed, WORD, FP32, 1, engine="gpu") == layer_time(
        board({"fp32": 1e12}), WORD, FP32, 1, engine="gpu"
    )


def test_a_card_reads_its_own_memory_and_a_shared_one_the_host():
    card = board({"fp32": 1e30}, unified=False, host=1e9, own=1000e9)
    assert seconds(card, WORD, FP32) == pytest.approx((4 * 1024 * 4096 + 4 * 5120) / 1000e9)
    with pytest.raises(InputError, match="no read bandwidth of the GPU's memory"):
        layer_time(board({"fp32": 1e12}, unified=False), WORD, FP32, 1, engine="gpu")


def test_a_wider_arithmetic_stands_in_for_a_rate_that_no_source_gives_and_the_notes_say_so():
    half_only = board({"fp32": 1e12, "fp16": 10e12})
    assert seconds(half_only, MANY, STATIC) == seconds(half_only, MANY, FP16)
    assert seconds(half_only, MANY, FP8) == seconds(half_only, MANY, FP16)
    single = board({"fp32": 1e12})
    assert seconds(single, MANY, FP16) == seconds(single, MANY, FP32)
    notes = " ".join(plan_notes(half_only, "tensorrt", (FP32, STATIC)))
    assert "the dense int8 rate of this GPU; its fp16 rate stands in" in notes
    assert "fp8" not in notes
    assert "stands in" not in " ".join(plan_notes(ORIN, "tensorrt", (FP32, FP16, STATIC)))


def test_nothing_stands_in_for_fp32_and_all_that_is_missing_is_named():
    with pytest.raises(InputError, match=r"'a-board' has no dense GPU rate for fp32; .*edgeflex profile"):
        layer_time(board({"fp16": 10e12, "int8": 20e12}), WORD, FP32, 1, engine="gpu")
    with pytest.raises(InputError, match="no dense GPU rate for fp16 and no read bandwidth of the GPU's memory"):
        layer_time(board({}, host=None), WORD, INT4, 1, engine="gpu")


def test_sparse_rates_are_not_planned_with():
    only_sparse = ComputeRate(engine="gpu", precision="fp32", ops_per_s=figure(1e12), sparse=True)
    with pytest.raises(InputError, match="no dense GPU rate for fp32"):
        layer_time(board({}).model_copy(update={"compute": (only_sparse,)}), WORD, FP32, 1, engine="gpu")


@pytest.mark.parametrize("precision", [DYNAMIC, Precision.INT4_CHANNEL, Precision.INT4_GROUP32])
def test_what_tensorrt_has_no_layers_for_is_refused(precision: Precision):
    with pytest.raises(UnsupportedError, match=f"no {precision.value} layers.*--target tensorrt"):
        layer_time(ORIN, WORD, precision, 1, engine="gpu")


def test_only_tensorrt_computes_on_the_gpu():
    assert engine_of("tensorrt") == "gpu"
    assert {engine_of(name) for name in ("executorch", "onnx", "reference", "a-plugin")} == {"cpu"}


def test_notes_say_that_offloading_gains_nothing_where_memory_is_shared_and_only_there():
    assert any("offloading from the GPU to RAM gains nothing" in note for note in plan_notes(ORIN, "tensorrt", (FP32,)))
    card = board({"fp32": 1e12, "fp16": 1e12, "int8": 1e12, "fp8": 1e12}, unified=False, own=1e12)
    assert not any("offloading" in note for note in plan_notes(card, "tensorrt", (FP32, FP8)))
    assert plan_notes(ORIN, "executorch", (FP32,)) == ()


def test_a_segment_costs_its_launches_and_conversions_run_at_memory_speed():
    assert segment_call_s(ORIN, "gpu") == pytest.approx(4 * LAUNCH_S)
    assert conversion_s(ORIN, "gpu") == pytest.approx(5 / 100e9)
    here = device()
    assert here.call_s is not None
    assert segment_call_s(here, "cpu") == here.call_s.value
    assert segment_call_s(ORIN, "cpu") == 0.0


def test_a_program_without_observations_adds_layers_launches_and_conversions():
    times = {
        (layer.name, precision): layer_time(ORIN, layer.shape, precision, 1, engine="gpu").seconds
        for layer in graph().layers
        for precision in (FP32, STATIC)
    }
    model = fit_latency(
        graph(),
        times,
        [],
        call_s=segment_call_s(ORIN, "gpu"),
        layer_error=GPU_ROOFLINE_ERROR,
        conversion_s_per_element=conversion_s(ORIN, "gpu"),
    )
    plain = predicted_segments_s(model, graph(), {})
    assert plain[2] == pytest.approx(4 * LAUNCH_S + times["wide", FP32] + times["last", FP32])
    mixed = predicted_segments_s(model, graph(), {"wide": STATIC})
    expected = 4 * LAUNCH_S + times["wide", STATIC] + times["last", FP32] + (2048 + 64) * 5 / 100e9
    assert mixed[2] == pytest.approx(expected)


@pytest.mark.parametrize("name", NVIDIA_DEVICES)
def test_every_shipped_nvidia_device_can_be_planned_for(name: str):
    profile = profiles.load(name)
    for kind, precisions in capabilities_for(EXPORTERS, "tensorrt", profile).precisions.items():
        shape = WORD if kind is WORD.kind else conv(64, 64, 56)
        times = {one: layer_time(profile, shape, one, 1, engine="gpu").seconds for one in precisions}
        assert times[FP32] > times[FP16] >= times[STATIC] > LAUNCH_S
    assert conversion_s(profile, "gpu") > 0


# --- what ONNX Runtime adds on the processor ---------------------------------------------------------------


def test_weight_only_blocks_take_the_kernels_of_floats_until_their_own_were_timed():
    timed = device(kernel(linear(128, 128), FP32, 5e-6), kernel(linear(64, 64), FP32, 1e-6))
    found = layer_time(timed, linear(128, 128), INT4, 1)
    assert (found.seconds, found.relative_error) == (5e-6, ROOFLINE_ERROR)
    assert layer_time(timed, linear(96, 96), INT4_WIDE, 1).relative_error == ROOFLINE_ERROR
    own = device(kernel(linear(128, 128), FP32, 5e-6), kernel(linear(128, 128), INT4, 2e-6))
    assert layer_time(own, linear(128, 128), INT4, 1).seconds == 2e-6
