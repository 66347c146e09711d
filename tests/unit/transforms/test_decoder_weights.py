from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.schema import Precision
from edgeflex.schema_moe import DECODER_PRECISIONS
from edgeflex.transforms import decoder_weights
from edgeflex.transforms.decoder_weights import (
    GROUP,
    bfloat16_from_float,
    dequantize,
    float_from_bfloat16,
    matrix_from_bytes,
    quantize_matrix,
    require_runnable,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeflex.transforms.decoder_weights import StoredMatrix

FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32
SAMPLES = {
    "normal": lambda draw, shape: draw.standard_normal(shape),
    "heavy": lambda draw, shape: draw.standard_t(3, shape),
    "laplace": lambda draw, shape: draw.laplace(size=shape),
    "uniform": lambda draw, shape: draw.uniform(-1, 1, shape),
    "positive": lambda draw, shape: draw.uniform(0, 1, shape),
}


def sample(kind: str, *shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.asarray(SAMPLES[kind](np.random.default_rng(seed), shape) * 0.02, dtype=np.float32)


def matrices(columns: int = 64) -> st.SearchStrategy[NDArray[np.float32]]:
    """Weights of any size that fp32 holds, few enough that a loop in Python may check each."""
    numbers = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
    return arrays(np.float32, st.tuples(st.integers(1, 3), st.just(columns)), elements=numbers)


def codes_of(stored: StoredMatrix) -> NDArray[np.int64]:
    """Return the integers, unpacked one by one."""
    if stored.precision is INT8:
        return stored.codes.astype(np.int64)
    out = np.zeros((stored.rows, stored.columns), dtype=np.int64)
    for row in range(stored.rows):
        for column in range(stored.columns):
            byte = int(stored.codes[row, column // 2])
            out[row, column] = (byte >> 4 if column % 2 else byte & 15) - 8
    return out


def scale_of(stored: StoredMatrix, row: int, column: int) -> float:
    if stored.scales is None:
        return 1.0
    if stored.precision is INT8:
        return float(stored.scales[row])
    bits = int(stored.scales[row, column // GROUP]) << 16
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


def slow_dequantized(stored: StoredMatrix) -> NDArray[np.float64]:
    codes = codes_of(stored)
    return np.array(
        [
            [codes[row, column] * scale_of(stored, row, column) for column in range(stored.columns)]
            for row in range(stored.rows)
        ]
    )


@pytest.mark.parametrize("precision", [INT8, INT4])
@settings(deadline=None, max_examples=40)
@given(weights=matrices())
def test_codes_are_the_nearest_of_their_grid_and_dequantise_as_counted_by_hand(precision, weights):
    stored = quantize_matrix(weights, precision)
    low, high = (-127, 127) if precision is INT8 else (-8, 7)
    codes = codes_of(stored)
    for (row, column), weight in np.ndenumerate(weights):
        quotient = np.float32(weight) / np.float32(scale_of(stored, row, column))
        assert codes[row, column] == min(max(round(float(quotient)), low), high)  # round: half to even
    np.testing.assert_allclose(dequantize(stored), slow_dequantized(stored), rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(weights=matrices())
def test_eight_bits_err_by_at_most_half_a_step(weights):
    restored = dequantize(quantize_matrix(weights, INT8))
    step = np.maximum(np.abs(weights).max(axis=1, keepdims=True) / 127, 1e-8)
    assert np.all(np.abs(restored - weights) <= step * (0.5 + 1e-4))


@settings(deadline=None, max_examples=60)
@given(weights=matrices())
def test_four_bits_err_by_less_than_the_plain_range_would(weights):
    restored = dequantize(quantize_matrix(weights, INT4)).reshape(-1, GROUP).astype(np.float64)
    groups = weights.reshape(-1, GROUP).astype(np.float64)
    error = np.square(restored - groups).sum(axis=1)
    # the range that puts the largest weight on code 7.9, in bfloat16, is among what was tried
    scales = np.maximum(np.abs(groups).max(axis=1, keepdims=True) / 7.9, 1e-8)
    plain = np.square(np.clip(np.rint(groups / scales), -8, 7) * scales - groups).sum(axis=1)
    assert np.all(error <= plain * 1.02 + 32 * 1e-16)


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_search_for_four_bits_is_close_to_trying_everything(kind):
    weights = sample(kind, 64, 256)
    groups = weights.reshape(-1, GROUP).astype(np.float64)
    found = np.square(dequantize(quantize_matrix(weights, INT4)).reshape(-1, GROUP) - groups).sum()
    widest, best = np.abs(groups).max(axis=1, keepdims=True), np.full(len(groups), np.inf)
    for divisor in np.linspace(5, 14, 400):
        scales = float_from_bfloat16(bfloat16_from_float((widest / divisor).astype(np.float32))).astype(np.float64)
        errors = np.square(np.clip(np.rint(groups / scales), -8, 7) * scales - groups).sum(axis=1)
        best = np.minimum(best, errors)
    assert found <= 1.03 * best.sum()


@pytest.mark.parametrize("precision", DECODER_PRECISIONS)
def test_bytes_make_the_same_matrix_again(precision):
    stored = quantize_matrix(sample("normal", 12, 96), precision)
    scales = None if stored.scales is None else stored.scales.tobytes()
    again = matrix_from_bytes(precision, 12, 96, stored.codes.tobytes(), scales)
    np.testing.assert_array_equal(dequantize(again), dequantize(stored))
    assert again.codes.dtype == stored.codes.dtype
    with pytest.raises(InputError, match="do not make"):
        matrix_from_bytes(precision, 12, 96, stored.codes.tobytes()[:-1], scales)
    if scales is not None:
        with pytest.raises(InputError, match="do not make"):
            matrix_from_bytes(precision, 12, 96, stored.codes.tobytes(), scales[:-2])


@settings(deadline=None, max_examples=60)
@given(weights=arrays(np.int8, (4, 64), elements=st.integers(-8, 7)))
def test_numbers_that_are_on_a_grid_already_stay(weights):
    # every group reaches -8, so that no coarser grid fits as well
    weights[:, ::GROUP] = -8
    values = weights.astype(np.float32) * np.float32(0.375)
    np.testing.assert_array_equal(dequantize(quantize_matrix(values, INT4)), values)


@pytest.mark.parametrize("precision", DECODER_PRECISIONS)
def test_zeros_and_tiny_numbers_have_scales_that_kernels_take(precision):
    weights = np.zeros((3, 64), dtype=np.float32)
    weights[1] = 1e-30
    stored = quantize_matrix(weights, precision)
    assert np.abs(dequantize(stored)).max() <= 1e-30
    if stored.scales is not None:
        scales = stored.scales if precision is INT8 else float_from_bfloat16(stored.scales)
        assert scales.min() >= 0.99e-8


@pytest.mark.parametrize("precision", DECODER_PRECISIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(precision, value):
    weights = sample("normal", 5, 64)
    weights[4, 63] = value
    with pytest.raises(InputError, match="not finite"):
        quantize_matrix(weights, precision)


@pytest.mark.parametrize("precision", DECODER_PRECISIONS)
def test_blocks_leave_no_seam(precision, monkeypatch):
    weights = sample("laplace", 37, 96)
    whole = quantize_matrix(weights, precision)
    monkeypatch.setattr(decoder_weights, "_BLOCK_WEIGHTS", 3 * GROUP)
    parts = quantize_matrix(weights, precision)
    np.testing.assert_array_equal(parts.codes, whole.codes)
    np.testing.assert_array_equal(dequantize(parts), dequantize(whole))


def test_the_callers_weights_are_not_touched():
    weights = sample("normal", 8, 64)
    before = weights.copy()
    for precision in DECODER_PRECISIONS:
        dequantize(quantize_matrix(weights, precision))
    np.testing.assert_array_equal(weights, before)


@settings(deadline=None, max_examples=200)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120))
def test_bfloat16_rounds_as_torch_does(value):
    bits = bfloat16_from_float(np.array([value], dtype=np.float32))
    wanted = torch.tensor([value], dtype=torch.float32).to(torch.bfloat16)
    assert float(float_from_bfloat16(bits)[0]) == float(wanted.float()[0])


def test_what_decoders_do_not_run_is_refused():
    with pytest.raises(UnsupportedError, match="do not run fp16"):
        quantize_matrix(sample("normal", 2, 64), Precision.FP16)
    with pytest.raises(UnsupportedError, match="router: int4-group32 needs columns in multiples of 32; it has 40"):
        require_runnable(INT4, 40, "router")
    require_runnable(INT8, 40)
    with pytest.raises(InputError, match="a matrix"):
        quantize_matrix(sample("normal", 64), INT8)
