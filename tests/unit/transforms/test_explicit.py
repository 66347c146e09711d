"""The numbers that ONNX's operators compute with, against slow readings of the definitions, and modules by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import fx, nn
from torch.nn import functional

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.schema import Precision
from edgeflex.transforms import outputs, prepare, prepare_explicit, prepare_explicit_segment, quantize_weight
from edgeflex.transforms.explicit import is_rounding, rounded_source
from edgeflex.transforms.quantize import fp8_scale, from_fp8, from_int8, symmetric_scale, to_fp8, to_int8
from tests.small_nets import chain_model, images, ranges_of, residual_model

STATIC, FP8, FP16 = Precision.INT8_STATIC, Precision.FP8, Precision.FP16
BLOCKS = (Precision.INT4_BLOCK64, Precision.INT4_BLOCK128)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- activations -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(low=st.floats(-1e4, 1e4), high=st.floats(-1e4, 1e4))
def test_a_symmetric_grid_covers_the_range_with_steps_up_to_127(low: float, high: float):
    scale = symmetric_scale(low, high)
    assert scale == float(np.float32(scale))
    assert scale >= 0.99e-4
    assert 127 * scale == pytest.approx(max(abs(low), abs(high), 127e-4), rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    x=arrays(np.float32, 32, elements=st.floats(-300, 300, width=32)),
    scale=st.floats(2.0**-10, 2.0, width=32),
)
def test_int8_steps_are_the_quotient_in_float32_rounded_half_to_even_and_saturated(x, scale: float):
    steps = to_int8(torch.from_numpy(x), scale)
    expected = [max(-128, min(127, round(float(one / np.float32(scale))))) for one in x]
    assert steps.tolist() == expected
    restored = from_int8(steps, scale)
    assert restored.tolist() == [float(np.float32(step) * np.float32(scale)) for step in expected]


def test_ties_go_to_the_even_step():
    assert to_int8(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, -129.0]), 1.0).tolist() == [
        0,
        2,
        2,
        0,
        -2,
        127,
        -128,
    ]


def test_rounding_twice_is_rounding_once():
    x = weights(4096) * 3
    for scale in (0.1, 0.0237, 1e-4):
        once = from_int8(to_int8(x, scale), scale)
        assert torch.equal(from_int8(to_int8(once, scale), scale), once)


def every_fp8() -> np.ndarray:
    """Return all finite numbers of E4M3, and what lies halfway between neighbours."""
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = np.sort(np.unique(numbers[np.isfinite(numbers)]))
    between = (finite[1:] + finite[:-1]) / 2
    return np.concatenate(
        [finite, between, np.nextafter(between, np.float32(1e9)), np.nextafter(between, -np.float32(1e9))]
    )


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0371])
def test_fp8_rounds_as_ml_dtypes_does_and_saturates(scale: float):
    x = np.concatenate([every_fp8() * np.float32(scale), np.random.default_rng(0).normal(size=4000).astype(np.float32)])
    found = to_fp8(torch.from_numpy(x), scale).view(torch.uint8).numpy()
    expected = np.clip(x / np.float32(scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found, expected.view(np.uint8))
    assert from_fp8(to_fp8(torch.tensor([1e6, -1e6]), scale), scale).tolist() == pytest.approx(
        [448 * scale, -448 * scale]
    )


@pytest.mark.parametrize("half", [False, True])
def test_an_fp8_grid_ends_at_the_range_and_its_scale_fits_its_type(half: bool):
    scale = fp8_scale(-3.0, 1.0, half=half)
    assert scale == pytest.approx(3 / 448, rel=1e-3 if half else 1e-7)
    assert scale == float(np.float16(scale) if half else np.float32(scale))
    assert fp8_scale(0.0, 0.0, half=half) > 0


# --- weights -----------------------------------------------------------------------------------------------


def slow_block(row: np.ndarray, *, half: bool) -> tuple[float, list[int]]:
    """Try the ranges one by one in plain Python; return the scale and the codes of the first best."""
    widest = max(max(row) / np.float32(7), min(row) / np.float32(-8), max(abs(row)) / np.float32(8), np.float32(1e-8))
    best: tuple[float, float, list[int]] | None = None
    for step in range(17):
        scale = np.float32(widest) * np.float32(1.0 - 0.025 * step)
        scale = max(np.float32(np.float16(scale)), np.float32(2.0**-24)) if half else scale
        codes = [max(-8, min(7, round(float(one / scale)))) for one in row]
        error = sum((float(one) - code * float(scale)) ** 2 for one, code in zip(row, codes, strict=True))
        if best is None or error < best[0] * (1 - 1e-6):
            best = (error, float(scale), codes)
    assert best is not None
    return best[1], best[2]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("precision", BLOCKS)
def test_int4_blocks_are_what_a_slow_search_finds(precision: Precision, half: bool):
    weight = weights(3, 256) * 0.05
    found = quantize_weight(weight, precision, half=half)
    block = precision.group_size or 0
    assert found.scales.shape == (3, 256 // block)
    codes = found.values.reshape(3, -1, block)
    for channel in range(3):
        for number, row in enumerate(weight[channel].reshape(-1, block).numpy()):
            scale, expected = slow_block(row, half=half)
            assert float(found.scales[channel, number]) == pytest.approx(scale, rel=1e-6)
            assert codes[channel, number].tolist() == expected


@pytest.mark.parametrize("precision", [*BLOCKS, FP8])
def test_half_scales_and_restored_weights_are_numbers_that_half_precision_holds(precision: Precision):
    found = quantize_weight(weights(8, 256) * 0.03, precision, half=True)
    assert torch.equal(found.scales, found.scales.half().float())
    assert torch.equal(found.dequantize(), found.dequantize().half().float())
    plain = quantize_weight(weights(8, 256) * 0.03, precision)
    assert not torch.equal(plain.scales, plain.scales.half().float())
    assert float((found.dequantize() - plain.dequantize()).abs().mean()) < 0.1 * float(plain.dequantize().abs().mean())


def test_fp8_weights_are_ml_dtypes_rounding_of_the_largest_put_on_448():
    weight = weights(16, 3, 3, 3) * 0.2
    found = quantize_weight(weight, FP8)
    scale = np.float32(weight.abs().max()) / np.float32(448)
    expected = np.clip(weight.numpy() / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert found.scales.tolist() == [float(scale)]
    np.testing.assert_array_equal(found.values.view(torch.uint8).numpy(), expected.view(np.uint8))
    np.testing.assert_array_equal(found.dequantize().numpy(), expected.astype(np.float32) * scale)


@pytest.mark.parametrize("precision", [*BLOCKS, FP8])
@pytest.mark.parametrize("half", [False, True])
def test_zeros_stay_zeros_on_a_positive_scale(precision: Precision, half: bool):
    found = quantize_weight(torch.zeros(2, 128), precision, half=half)
    assert torch.equal(found.dequantize(), torch.zeros(2, 128))
    assert bool((found.scales > 0).all())


@pytest.mark.parametrize("precision", [*BLOCKS, FP8])
@pytest.mark.parametrize("size", [1e-7, 1e9])
def test_a_layer_whose_scale_half_precision_does_not_hold_is_refused(precision: Precision, size: float):
    weight = weights(2, 128) * size
    quantize_weight(weight, precision)
    with pytest.raises(UnsupportedError, match=r"half precision needs scales from 9\.5e-07 to 65504"):
        quantize_weight(weight, precision, half=True)


def test_a_dead_block_in_a_living_layer_is_no_reason_to_refuse_it():
    weight = weights(2, 128)
    weight[0, :64] = 1e-12
    found = quantize_weight(weight, Precision.INT4_BLOCK64, half=True)
    assert float(found.dequantize()[0, :64].abs().max()) == 0.0
    assert float(found.scales.min()) > 0


@pytest.mark.parametrize("shape", [(4, 96), (4, 64, 1, 1)])
def test_blocks_need_a_matrix_whose_inputs_they_divide(shape: tuple[int, ...]):
    with pytest.raises(UnsupportedError, match="multiples of 64"):
        quantize_weight(weights(*shape), Precision.INT4_BLOCK64)


# --- modules -----------------------------------------------------------------------------------------------


def fake(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Round to the symmetric int8 grid of a range and back, in float32."""
    scale = torch.tensor(max(abs(low), abs(high)) / 127, dtype=torch.float32)
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


def test_static_int8_is_the_forward_pass_worked_out_by_hand():
    model = chain_model()
    ranges, x = ranges_of(model), images(16, seed=9)
    layers = dict(model.segments[0].named_modules())
    first, second, last = layers["first"], layers["second"], layers["last"]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert isinstance(last, nn.Linear)
    weight = {name: quantize_weight(layers[name].weight, STATIC).dequantize() for name in ("first", "second", "last")}
    y = fake(x, *ranges["0:x"])
    y = fake(functional.relu(functional.conv2d(y, weight["first"], first.bias, padding=1)), *ranges["0:relu"])
    y = functional.relu(functional.conv2d(y, weight["second"], second.bias, stride=2, padding=1))
    y = fake(y, *ranges["0:relu_1"])
    y = fake(torch.mean(y, (2, 3), keepdim=True).flatten(1), *ranges["0:mean"])
    logits = fake(functional.linear(y, weight["last"], last.bias), *ranges["0:last"])
    prepared = prepare_explicit(model, dict.fromkeys(("first", "second", "last"), STATIC), ranges)
    assert torch.equal(outputs(prepared, x)[:, 0], torch.softmax(logits, dim=-1))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("precision", [Precision.INT4_BLOCK64, FP8, FP16])
def test_a_float_layer_is_the_product_worked_out_by_hand(precision: Precision, half: bool):
    model = residual_model()
    ranges = ranges_of(model)
    prepared = prepare_explicit_segment(model.segments[1], 1, {"wide": precision}, ranges, half=half)
    layer = model.segments[1].get_submodule("wide")
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer.bias, torch.Tensor)
    x, weight, bias = weights(6, 64, seed=3), layer.weight, layer.bias
    half = half or precision is FP16

    def short(value: torch.Tensor) -> torch.Tensor:
        return value.half().float() if half else value

    y = short(x)
    if precision is FP8:
        scale = fp8_scale(*ranges["1:flatten"], half=half)
        y = from_fp8(to_fp8(y, scale), scale)
    weight = short(weight) if precision is FP16 else quantize_weight(weight, precision, half=half).dequantize()
    expected = short(functional.linear(y, weight, short(bias)))
    assert torch.equal(prepared.get_submodule("wide")(x), expected)


def test_int8_stands_where_xnnpack_has_it_on_grids_around_zero():
    model = residual_model()
    static, ranges = dict.fromkeys(("stem", "block.conv1", "block.conv2"), STATIC), ranges_of(model)
    theirs = prepare(model, static, ranges).segments[0].get_submodule("body")
    ours = prepare_explicit_segment(model.segments[0], 0, static, ranges)
    assert isinstance(theirs, fx.GraphModule)
    kept = [node.name for node in ours.graph.nodes if not is_rounding(node)]
    assert kept == [node.name for node in model.segments[0].graph.nodes]
    rounded = {rounded_source(node) for node in ours.graph.nodes if rounded_source(node)[1] is not None}
    assert {node.name for node, _ in rounded} == {"x", "relu", "relu_1", "block_conv2", "relu_2", "mean", "flatten"}
    for node, scale in rounded:
        grid_of = "mean" if node.name == "flatten" else node.name
        low, high = ranges[f"0:{grid_of}"]
        assert scale == pytest.approx(max(-low, high) / 127, rel=1e-2 if node.name in {"mean", "flatten"} else 1e-6)


def test_activations_cross_a_cut_as_floats():
    model = residual_model()
    prepared = prepare_explicit(model, {layer.name: STATIC for layer in model.graph.layers}, ranges_of(model))
    assert {one.dtype for one in prepared.examples} == {torch.float32}


def test_what_is_not_named_stays_float_to_the_bit():
    model, x = residual_model(), images(4)
    logits = model.exit_logits(x)
    assert torch.equal(
        outputs(prepare_explicit(model, {}, {}), x), torch.stack([torch.softmax(one, -1) for one in logits], dim=1)
    )


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        ("block.conv1", Precision.INT4_BLOCK64),
        ("block.conv1", FP8),
        ("wide", Precision.INT8_DYNAMIC),
        ("wide", Precision.INT4_GROUP32),
        ("narrow", Precision.INT4_BLOCK128),
    ],
)
def test_what_onnx_has_not_or_a_layer_cannot_have_is_refused_by_its_name(layer: str, precision: Precision):
    model = residual_model()
    with pytest.raises(UnsupportedError, match=layer):
        prepare_explicit(model, {layer: precision}, ranges_of(model))


def test_values_beyond_half_precision_are_refused():
    model = residual_model()
    ranges = {**ranges_of(model), "1:wide": (0.0, 7e4)}
    with pytest.raises(UnsupportedError, match="'wide' has weights or activations up to 7e\\+04"):
        prepare_explicit(model, {"wide": FP16}, ranges)


@pytest.mark.parametrize("precision", [STATIC, FP8])
def test_a_missing_range_is_named(precision: Precision):
    with pytest.raises(InputError, match="1:flatten"):
        prepare_explicit(residual_model(), {"wide": precision}, {})


def test_a_layer_that_the_model_lacks_is_named():
    with pytest.raises(InputError, match="no layer nothing"):
        prepare_explicit(residual_model(), {"nothing": STATIC}, {})
