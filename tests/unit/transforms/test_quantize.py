"""Rounding of weights and grids of activations, against a slow reading of the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.schema import Precision
from edgeflex.transforms import activation_grid, quantize_weight

INT8 = (Precision.INT8_STATIC, Precision.INT8_DYNAMIC)
INT4 = (Precision.INT4_CHANNEL, Precision.INT4_GROUP32)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(value: float, scale: float, low: int, high: int) -> int:
    """Divide in float32, round half to even, clamp."""
    return max(low, min(high, round(float(np.float32(value) / np.float32(scale)))))


@pytest.mark.parametrize("precision", INT8)
def test_int8_weights_are_the_slow_rounding_of_each_number(precision: Precision):
    weight = weights(3, 2, 3, 3)
    weight[1] *= 0.01
    weight[2, 0, 0, 0] = -5.0
    quantized = quantize_weight(weight, precision)
    assert quantized.values.dtype == torch.int8
    assert quantized.values.shape == weight.shape
    for channel in range(3):
        scale = float(np.float32(max(abs(float(value)) for value in weight[channel].flatten())) / np.float32(127))
        assert float(quantized.scales[channel]) == pytest.approx(scale, rel=1e-6)
        expected = [rounded(float(v), float(quantized.scales[channel]), -127, 127) for v in weight[channel].flatten()]
        assert quantized.values[channel].flatten().tolist() == expected
    assert int(quantized.values[2, 0, 0, 0]) == -127


@pytest.mark.parametrize("precision", INT4)
def test_int4_weights_are_the_slow_rounding_under_the_scale_that_was_chosen(precision: Precision):
    weight = weights(2, 64)
    quantized = quantize_weight(weight, precision)
    groups = 2 if precision is Precision.INT4_GROUP32 else 1
    scales = quantized.scales.reshape(2, groups)
    for channel in range(2):
        for place in range(64):
            scale = float(scales[channel, place * groups // 64])
            assert int(quantized.values[channel, place]) == rounded(float(weight[channel, place]), scale, -8, 7)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(1e-4, 1e4), precision=st.sampled_from((*INT8, *INT4)))
def test_the_error_is_at_most_half_a_step_inside_the_range(seed: int, size: float, precision: Precision):
    weight = weights(3, 64, seed=seed) * size
    quantized = quantize_weight(weight, precision)
    limits = (-8, 7) if precision.bits == 4 else (-127, 127)
    scales = quantized.scales.reshape(3, -1).repeat_interleave(64 // quantized.scales.reshape(3, -1).shape[1], dim=1)
    inside = (weight >= limits[0] * scales) & (weight <= limits[1] * scales)
    error = (quantized.dequantize() - weight).abs()
    assert bool((error <= scales * (0.5 + 1e-5))[inside].all())
    assert inside.float().mean() > 0.5


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), tail=st.floats(0.0, 3.0), precision=st.sampled_from(INT4))
def test_searching_the_clip_is_never_worse_than_the_full_range(seed: int, tail: float, precision: Precision):
    weight = weights(4, 64, seed=seed)
    weight = weight * (1.0 + tail * weight.abs())
    rows = weight.reshape(-1, 32 if precision is Precision.INT4_GROUP32 else 64)
    widest = torch.maximum(rows.amax(1) / 7, rows.amin(1) / -8).to(torch.bfloat16).float()[:, None]
    plain = torch.clamp(torch.round(rows / widest), -8, 7) * widest
    found = quantize_weight(weight, precision).dequantize().reshape(rows.shape)
    plain_error, error = (plain - rows).square().sum(1), (found - rows).square().sum(1)
    assert bool((error <= plain_error * (1 + 1e-6)).all())


def test_searching_the_clip_pays_on_wide_channels():
    weight = weights(8, 256)
    widest = torch.maximum(weight.amax(1) / 7, weight.amin(1) / -8)[:, None]
    plain = torch.clamp(torch.round(weight / widest), -8, 7) * widest
    found = quantize_weight(weight, Precision.INT4_CHANNEL).dequantize()
    assert float((found - weight).square().sum()) < 0.9 * float((plain - weight).square().sum())


def test_group_scales_are_numbers_that_bfloat16_holds():
    scales = quantize_weight(weights(8, 128), Precision.INT4_GROUP32).scales
    assert scales.shape == (8, 4)
    assert torch.equal(scales, scales.to(torch.bfloat16).float())


@pytest.mark.parametrize("precision", [*INT8, *INT4])
def test_zero_weights_stay_exactly_zero(precision: Precision):
    quantized = quantize_weight(torch.zeros(4, 64), precision)
    assert bool((quantized.values == 0).all())
    assert torch.equal(quantized.dequantize(), torch.zeros(4, 64))
    assert bool((quantized.scales > 0).all())


@pytest.mark.parametrize("precision", [*INT8, *INT4])
def test_the_weight_itself_is_left_as_it_was(precision: Precision):
    weight = weights(2, 64)
    kept = weight.clone()
    quantize_weight(weight, precision)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("precision", INT4)
def test_inputs_that_do_not_divide_into_groups_are_refused_with_both_numbers(precision: Precision):
    with pytest.raises(UnsupportedError, match=r"multiples of 32; a weight has 48") as raised:
        quantize_weight(weights(4, 48), precision)
    assert "int8-dynamic" in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", [*INT8, *INT4, Precision.INT4_BLOCK64, Precision.FP8])
def test_weights_that_are_no_numbers_are_refused_and_not_zero(precision: Precision, value: float):
    weight = weights(4, 64)
    weight[1, 3] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        quantize_weight(weight, precision)


@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e19, 1e30])
@pytest.mark.parametrize("precision", INT4)
def test_scales_of_very_small_and_very_large_weights_are_stored_numbers_too(precision: Precision, size: float):
    quantized = quantize_weight(weights(4, 64) * size, precision)
    assert torch.equal(quantized.scales, quantized.scales.to(torch.bfloat16).float())
    assert bool(torch.isfinite(quantized.dequantize()).all())


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_float_precision_stores_no_integers(precision: Precision):
    with pytest.raises(UnsupportedError, match=precision.value):
        quantize_weight(weights(4, 32), precision)


@settings(max_examples=200, deadline=None)
@given(low=st.floats(-1e6, 1e6), width=st.floats(0.0, 1e6))
def test_an_activation_grid_holds_zero_and_covers_the_range_within_half_a_step(low: float, width: float):
    high = low + width
    scale, zero_point = activation_grid(low, high)
    assert scale > 0
    assert -128 <= zero_point <= 127  # 0.0 is the integer zero_point, exactly
    least, most = (-128 - zero_point) * scale, (127 - zero_point) * scale
    slack = scale * (0.5 + 1e-6)
    assert least <= min(low, 0.0) + slack
    assert most >= max(high, 0.0) - slack


def test_activation_grids_by_hand():
    assert activation_grid(0.0, 2.55) == pytest.approx((0.01, -128))
    assert activation_grid(-2.55, 0.0) == pytest.approx((0.01, 127))
    assert activation_grid(-1.0, 1.0) == pytest.approx((2 / 255, 0))
    # a range above zero is widened down to zero
    assert activation_grid(1.0, 2.55) == activation_grid(0.0, 2.55)
    assert activation_grid(0.0, 0.0)[0] > 0
