"""Bytes become the very numbers that they stand for, in half precision too, and products bear any activations."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edgeflex.errors import UnsupportedError
from edgeflex.exporters.onnx_lint import lint_model
from edgeflex.exporters.tensorrt_decoder_graphs import Weight, border_faults, engine_stage, require_half
from edgeflex.exporters.tensorrt_decoder_rows import gather_stage, sum_stage
from edgeflex.schema import Precision
from edgeflex.schema_trt import SUPPORTED_VERSIONS
from edgeflex.transforms.decoder_weights import StoredMatrix, bfloat16_from_float, dequantize, quantize_matrix

FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def template(rows: int, columns: int) -> onnx.ModelProto:
    """A stage of one product."""
    node = helper.make_node("Gemm", ["x", "w"], ["out"], transB=1)
    inputs = [value("x", ["tokens", columns]), value("w", [rows, columns])]
    graph = helper.make_graph([node], "stage", inputs, [value("out", ["tokens", rows])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def product(stored: StoredMatrix, x: np.ndarray, *, half: bool) -> np.ndarray:
    """Return what the stage makes of raw bytes, each operator rounded to its type, as ONNX Runtime does not."""
    weight = Weight("w", stored.precision, (stored.rows, stored.columns))
    model = engine_stage(template(*weight.shape), [weight], half=half)
    onnx.checker.check_model(model, full_check=True)
    codes = np.ascontiguousarray(stored.codes)
    feeds = {"x": x, "w": codes if stored.precision is FP32 else codes.view(np.uint8)}
    if stored.scales is not None:
        feeds["w_scales"] = stored.scales.view(ml_dtypes.bfloat16) if stored.precision is INT4 else stored.scales
    return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])


def every_code(precision: Precision, scale: float) -> StoredMatrix:
    """A matrix with every byte that there can be, in rows of one scale."""
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    if precision is INT8:
        return StoredMatrix(INT8, 4, 64, codes.view(np.int8), np.full(4, scale, np.float32))
    return StoredMatrix(INT4, 4, 128, codes, bfloat16_from_float(np.full((4, 4), scale, np.float32)))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("precision", [INT8, INT4])
@settings(deadline=None, max_examples=15)
@given(scale=st.floats(8e-6, 8e3))
def test_every_byte_becomes_its_number_bit_by_bit(half, precision, scale):
    stored = every_code(precision, scale)
    one_by_one = np.eye(stored.columns, dtype=np.float32)
    np.testing.assert_array_equal(product(stored, one_by_one, half=half).T, dequantize(stored))


@pytest.mark.parametrize("precision", [FP32, INT8, INT4])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), size=st.floats(-30, 30))
def test_products_are_those_of_the_numbers_at_any_size(precision, seed, size):
    draw = np.random.default_rng(seed)
    stored = quantize_matrix(draw.standard_normal((48, 96), dtype=np.float32), precision)
    x = draw.standard_normal((3, 96), dtype=np.float32) * np.float32(10.0**size)
    wanted = x.astype(np.float64) @ dequantize(stored).astype(np.float64).T
    for half, limit in ((False, 1e-5), (True, 1e-5 if precision is FP32 else 2e-3)):
        error = np.abs(product(stored, x, half=half) - wanted).max() / np.abs(wanted).max()
        assert error <= limit
        assert (error > 1e-5) == (half and precision is not FP32)  # rounded where it is said to be


@pytest.mark.parametrize("precision", [INT8, INT4])
def test_rows_of_zeros_stay_zeros_and_do_not_disturb_others(precision):
    draw = np.random.default_rng(0)
    stored = quantize_matrix(draw.standard_normal((32, 64), dtype=np.float32), precision)
    x = draw.standard_normal((3, 64), dtype=np.float32)
    x[1] = 0
    found = product(stored, x, half=True)
    np.testing.assert_array_equal(found[1], 0)
    alone = product(stored, x[2:], half=True)
    np.testing.assert_array_equal(found[2:], alone)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("precision", [FP32, INT8, INT4])
def test_every_version_takes_the_graphs(precision, half):
    model = engine_stage(template(64, 128), [Weight("w", precision, (64, 128))], half=half)
    stages = [model, gather_stage(64), sum_stage(64, 1, dense=False), sum_stage(64, 8, dense=True)]
    for stage in (*stages, sum_stage(64, 0, dense=True)):
        onnx.checker.check_model(stage, full_check=True)
        for version in SUPPORTED_VERSIONS:
            assert [str(one) for one in lint_model(stage, version)] == []


def test_bytes_that_are_cast_to_integers_are_found_by_the_rules():
    model = engine_stage(template(64, 128), [Weight("w", INT4, (64, 128))], half=True)
    cast = next(node for node in model.graph.node if list(node.input) == ["w"])
    cast.attribute[0].i = TensorProto.INT32
    rules = {one.rule for one in lint_model(model, (10, 3))}
    assert "uint8-cast" in rules


def test_a_template_is_left_as_it_is_and_other_uses_are_refused():
    held = template(64, 128)
    before = held.SerializeToString()
    engine_stage(held, [Weight("w", INT8, (64, 128))], half=True)
    assert held.SerializeToString() == before
    held.graph.node.append(helper.make_node("Identity", ["w"], ["again"]))
    with pytest.raises(UnsupportedError, match="w: the exported graph does not multiply with it once"):
        engine_stage(held, [Weight("w", INT8, (64, 128))], half=True)


@pytest.mark.parametrize(("scale", "kept"), [(7e-6, False), (8e-6, True), (60.0, True), (70.0, False)])
def test_four_bits_that_half_precision_cannot_hold_are_refused(scale, kept):
    stored = every_code(INT4, scale)
    if kept:
        require_half("w", stored)
        assert np.isfinite(product(stored, np.ones((1, 128), np.float32), half=True)).all()
    else:
        with pytest.raises(UnsupportedError, match=r"w: its largest scale is .* safe for 128 columns"):
            require_half("w", stored)
    require_half("w", every_code(INT8, scale))  # whose scales are applied in fp32


def test_integers_at_the_border_are_narrow_and_wide_inside():
    nodes = [helper.make_node("Add", ["positions", "positions"], ["experts"])]
    graph = helper.make_graph(
        nodes, "stage", [value("positions", ["tokens"], TensorProto.INT64)], [value("experts", ["tokens"], 7)]
    )
    held = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = engine_stage(held, [], half=True)
    onnx.checker.check_model(model, full_check=True)
    assert [one.type.tensor_type.elem_type for one in (*model.graph.input, *model.graph.output)] == [6, 6]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"positions": np.array([3, 4], np.int32)})[0].tolist() == [6, 8]


def test_what_a_stage_takes_is_read_from_it():
    weight = Weight("w", INT4, (64, 128))
    model = engine_stage(template(64, 128), [weight], half=True)
    assert list(border_faults(model, [weight])) == []
    assert list(border_faults(model, [weight._replace(precision=INT8)])) == [
        "w is UINT8 [64, 64] instead of UINT8 [64, 128], as int8-dynamic lies on disk",
        "w_scales is BFLOAT16 [64, 4] instead of FLOAT [64], as int8-dynamic lies on disk",
    ]
    assert list(border_faults(model, [Weight("v", FP32, (2,))])) == ["there is no input v"]
