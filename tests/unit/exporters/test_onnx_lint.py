"""One planted fault a rule: caught for the versions that it concerns and no other; clean graphs pass everywhere."""

from __future__ import annotations

import contextlib
import random
import warnings
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.exporters.onnx_lint import RULES, lint, lint_model, lint_versions, require_clean
from edgeflex.exporters.onnx_view import stored_bytes
from edgeflex.schema_trt import SUPPORTED_VERSIONS

EVERY = set(SUPPORTED_VERSIONS)
K, N = 128, 8


def before(*version: int) -> set[tuple[int, ...]]:
    return {one for one in EVERY if one < version}


@dataclass
class Draft:
    """A graph that can still be changed."""

    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    opsets: dict[str, int] = field(default_factory=lambda: {"": 20})

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{output}", domain=domain, **attributes))

    def named(self, output: str) -> Any:
        return next(node for node in self.nodes if output in node.output)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "planted",
            self.inputs,
            self.outputs,
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def int8_linear() -> Draft:
    """Static int8: activations per tensor, weights per channel."""
    draft = Draft(inputs=[value("x", [1, K])], outputs=[value("y", [1, N])])
    draft.constants = {
        "scale": np.asarray(0.1, np.float32),
        "zero": np.asarray(0, np.int8),
        "w": np.ones((K, N), np.int8),
        "w_scale": np.full(N, 0.01, np.float32),
    }
    draft.node("QuantizeLinear", ["x", "scale", "zero"], "x_q")
    draft.node("DequantizeLinear", ["x_q", "scale", "zero"], "x_dq")
    draft.node("DequantizeLinear", ["w", "w_scale"], "w_dq", axis=1)
    draft.node("MatMul", ["x_dq", "w_dq"], "y")
    return draft


def int4_linear(block: int = 64, kind: Any = np.float16, shape: tuple[int, ...] = (K, N)) -> Draft:
    """INT4 weights in blocks along the inputs, arithmetic in ``kind``."""
    proto = TensorProto.FLOAT16 if kind is np.float16 else TensorProto.FLOAT
    draft = Draft(inputs=[value("x", [1, shape[-2]], proto)], outputs=[value("y", [1, shape[-1]], proto)])
    draft.opsets = {"": 21}
    scales = (*shape[:-2], shape[-2] // block, shape[-1])
    draft.constants = {"w": np.ones(shape, ml_dtypes.int4), "w_scale": np.full(scales, 0.5, kind)}
    draft.node("DequantizeLinear", ["w", "w_scale"], "w_dq", axis=len(shape) - 2, block_size=block)
    draft.node("MatMul", ["x", "w_dq"], "y")
    if len(shape) == 3:
        draft.outputs = [value("y", [shape[0], 1, shape[-1]], proto)]
    return draft


def fp8_linear() -> Draft:
    """E4M3 weights and activations, one scale a tensor."""
    draft = Draft(inputs=[value("x", [1, K])], outputs=[value("y", [1, N])])
    draft.constants = {
        "scale": np.asarray(0.1, np.float16),
        "zero": np.zeros((), ml_dtypes.float8_e4m3fn),
        "w": np.ones((K, N), ml_dtypes.float8_e4m3fn),
    }
    draft.node("Cast", ["x"], "x_half", to=TensorProto.FLOAT16)
    draft.node("QuantizeLinear", ["x_half", "scale", "zero"], "x_q")
    draft.node("DequantizeLinear", ["x_q", "scale", "zero"], "x_dq")
    draft.node("DequantizeLinear", ["w", "scale"], "w_dq")
    draft.node("MatMul", ["x_dq", "w_dq"], "y_half")
    draft.node("Cast", ["y_half"], "y", to=TensorProto.FLOAT)
    return draft


def fp8_convolution(kernel: int = 3, groups: int = 1) -> Draft:
    draft = Draft(inputs=[value("x", [1, 16, 16, 16])], outputs=[value("y", [1, 16, None, None])])
    draft.outputs = [value("y", [1, 16, 17 - kernel, 17 - kernel])]
    draft.constants = {
        "scale": np.asarray(0.1, np.float32),
        "zero": np.zeros((), ml_dtypes.float8_e4m3fn),
        "w": np.ones((16, 16 // groups, kernel, kernel), ml_dtypes.float8_e4m3fn),
    }
    draft.node("QuantizeLinear", ["x", "scale", "zero"], "x_q")
    draft.node("DequantizeLinear", ["x_q", "scale", "zero"], "x_dq")
    draft.node("DequantizeLinear", ["w", "scale"], "w_dq")
    draft.node("Conv", ["x_dq", "w_dq"], "y", group=groups)
    return draft


def mixed() -> Draft:
    """INT8, INT4, FP8 and plain float16 layers in one graph."""
    draft = Draft(inputs=[value("x", ["T", K])], outputs=[value("y", ["T", K])])
    draft.opsets = {"": 21}
    draft.constants = {
        "scale": np.asarray(0.1, np.float32),
        "zero": np.asarray(0, np.int8),
        "w8": np.ones((K, K), np.int8),
        "w8_scale": np.full(K, 0.01, np.float32),
        "w4": np.ones((K, K), ml_dtypes.int4),
        "w4_scale": np.full((1, K), 0.5, np.float16),
        "half_scale": np.asarray(0.1, np.float16),
        "zero8": np.zeros((), ml_dtypes.float8_e4m3fn),
        "wf": np.ones((K, K), ml_dtypes.float8_e4m3fn),
        "wh": np.ones((K, K), np.float16),
    }
    draft.node("QuantizeLinear", ["x", "scale", "zero"], "x_q")
    draft.node("DequantizeLinear", ["x_q", "scale", "zero"], "x_dq")
    draft.node("DequantizeLinear", ["w8", "w8_scale"], "w8_dq", axis=-1)
    draft.node("MatMul", ["x_dq", "w8_dq"], "a")
    draft.node("Cast", ["a"], "a_half", to=TensorProto.FLOAT16)
    draft.node("DequantizeLinear", ["w4", "w4_scale"], "w4_dq", axis=0, block_size=128)
    draft.node("MatMul", ["a_half", "w4_dq"], "b")
    draft.node("QuantizeLinear", ["b", "half_scale", "zero8"], "b_q")
    draft.node("DequantizeLinear", ["b_q", "half_scale", "zero8"], "b_dq")
    draft.node("DequantizeLinear", ["wf", "half_scale"], "wf_dq")
    draft.node("MatMul", ["b_dq", "wf_dq"], "c")
    draft.node("MatMul", ["c", "wh"], "d")
    draft.node("Cast", ["d"], "y", to=TensorProto.FLOAT)
    return draft


def operator(kind: str, shape: tuple[Any, ...] = (1, 4, 8, 8), **attributes: Any) -> Draft:
    """One operator from ``x`` to ``y``."""
    draft = Draft(inputs=[value("x", list(shape))], outputs=[value("y", list(shape))])
    draft.node(kind, ["x"], "y", **attributes)
    return draft


def changed(draft: Draft, **constants: Any) -> Draft:
    draft.constants.update({name: np.asarray(array) for name, array in constants.items()})
    return draft


def tweaked(draft: Draft, output: str, **attributes: Any) -> Draft:
    node = draft.named(output)
    kept = [one for one in node.attribute if one.name not in attributes]
    del node.attribute[:]
    made = [helper.make_attribute(name, one) for name, one in attributes.items() if one is not None]
    node.attribute.extend([*kept, *made])
    return draft


def rewired(draft: Draft, output: str, *inputs: str) -> Draft:
    node = draft.named(output)
    del node.input[:]
    node.input.extend(inputs)
    return draft


def at_opset(draft: Draft, version: int) -> Draft:
    draft.opsets = {"": version}
    return draft


def with_domain(draft: Draft, domain: str) -> Draft:
    draft.opsets[domain] = 1
    return draft


def with_input(draft: Draft, *more: Any) -> Draft:
    draft.inputs.extend(more)
    return draft


def computed_scale() -> Draft:
    draft = with_input(int8_linear(), value("s", []))
    draft.node("Abs", ["s"], "scale")
    draft.nodes.insert(0, draft.nodes.pop())
    del draft.constants["scale"]
    return draft


def computed_zero() -> Draft:
    draft = with_input(int8_linear(), value("zero", [], TensorProto.INT8))
    del draft.constants["zero"]
    return draft


def uint8_activation() -> Draft:
    return changed(int8_linear(), zero=np.uint8(0))


def int4_activation() -> Draft:
    return at_opset(changed(int8_linear(), zero=np.zeros((), ml_dtypes.int4)), 21)


def per_channel_activation() -> Draft:
    draft = changed(int8_linear(), scale=np.full(K, 0.1, np.float32), zero=np.zeros(K, np.int8))
    return tweaked(tweaked(draft, "x_q", axis=1), "x_dq", axis=1)


def blocked_int8() -> Draft:
    draft = changed(at_opset(int8_linear(), 21), w_scale=np.full((2, N), 0.01, np.float32))
    return tweaked(draft, "w_dq", axis=0, block_size=64)


def padded_block() -> Draft:
    """100 inputs in blocks of 64: legal ONNX, whose last block is padded; TensorRT would take blocks of 50."""
    draft = int4_linear(50, shape=(100, N))
    return tweaked(draft, "w_dq", block_size=64)


def two_blocked() -> Draft:
    return changed(int4_linear(), w_scale=np.full((2, N // 2), 0.5, np.float16))


def first_blocked() -> Draft:
    draft = int4_linear(64, shape=(64, 4, N))
    draft.constants["w_scale"] = np.full((1, 4, N), 0.5, np.float16)
    draft.inputs = [value("x", [1, 4], TensorProto.FLOAT16)]
    return tweaked(draft, "w_dq", axis=0)


def computed_axes() -> Draft:
    draft = Draft(inputs=[value("x", [2, 3]), value("axes", [1], TensorProto.INT64)], outputs=[value("y", [2, 1])])
    draft.node("ReduceMean", ["x", "axes"], "y")
    return draft


def top_k(count: int, **attributes: Any) -> Draft:
    draft = Draft(inputs=[value("x", [1, 5000])], outputs=[value("y", [1, count])])
    draft.constants = {"k": np.asarray([count], np.int64)}
    draft.nodes = [helper.make_node("TopK", ["x", "k"], ["y", "places"], name="node_y", **attributes)]
    return draft


def two_pool_outputs() -> Draft:
    draft = operator("MaxPool", kernel_shape=[1, 1])
    draft.nodes[0].output.append("places")
    return draft


def pad_with_axes() -> Draft:
    draft = Draft(inputs=[value("x", [1, 4])], outputs=[value("y", [1, 6])])
    draft.constants = {"pads": np.asarray([1, 1], np.int64), "axes": np.asarray([1], np.int64)}
    draft.node("Pad", ["x", "pads", "", "axes"], "y")
    return draft


def group_norm() -> Draft:
    draft = Draft(inputs=[value("x", [1, 4, 8, 8])], outputs=[value("y", [1, 4, 8, 8])])
    draft.opsets = {"": 21}
    draft.constants = {"s": np.ones(4, np.float32), "b": np.zeros(4, np.float32)}
    draft.node("GroupNormalization", ["x", "s", "b"], "y", num_groups=2)
    return draft


def attention(*more: str, **attributes: Any) -> Draft:
    draft = Draft(outputs=[value("y", [1, 2, 4, 8])])
    draft.inputs = [value(name, [1, 2, 4, 8]) for name in ("q", "k", "v", *(one for one in more if one))]
    draft.opsets = {"": 23}
    draft.node("Attention", ["q", "k", "v", *more], "y", **attributes)
    return draft


def uint8_weights() -> Draft:
    draft = Draft(inputs=[value("x", [4])], outputs=[value("y", [4])])
    draft.constants = {"w": np.ones(4, np.uint8)}
    draft.node("Cast", ["w"], "w_float", to=TensorProto.FLOAT)
    draft.node("Add", ["x", "w_float"], "y")
    return draft


def uint8_border(kind: int = TensorProto.FLOAT16, back: int = TensorProto.FLOAT16) -> Draft:
    """Bytes in and bytes out, in floats between: as TensorRT takes them."""
    draft = Draft(inputs=[value("b", [4], TensorProto.UINT8)], outputs=[value("y", [4], TensorProto.UINT8)])
    draft.node("Cast", ["b"], "whole", to=kind)
    draft.node("Abs", ["whole"], "positive")
    draft.node("Cast", ["positive"], "rounded", to=back)
    draft.node("Cast", ["rounded"], "y", to=TensorProto.UINT8)
    return draft


def uint8_reshaped() -> Draft:
    draft = Draft(inputs=[value("b", [4], TensorProto.UINT8)], outputs=[value("y", [2, 2])])
    draft.constants = {"shape": np.asarray([2, 2], np.int64)}
    draft.node("Reshape", ["b", "shape"], "square")
    draft.node("Cast", ["square"], "y", to=TensorProto.FLOAT)
    return draft


def uint8_inside() -> Draft:
    draft = Draft(inputs=[value("x", [4])], outputs=[value("y", [4])])
    draft.node("Cast", ["x"], "bytes", to=TensorProto.UINT8)
    draft.node("Cast", ["bytes"], "y", to=TensorProto.FLOAT)
    return draft


def fp4_weights() -> Draft:
    draft = int4_linear()
    draft.opsets = {"": 23}
    draft.constants["w"] = np.ones((K, N), ml_dtypes.float4_e2m1fn)
    return draft


def int8_cast(kind: str = "Cast") -> Draft:
    """What weight-only exporters write: codes that are cast and scaled by hand."""
    draft = Draft(inputs=[value("x", [1, K])], outputs=[value("y", [1, N])])
    draft.constants = {"w": np.ones((K, N), np.int8), "shape": np.asarray([K, N], np.int64)}
    if kind == "Cast":
        draft.node("Cast", ["w"], "w_float", to=TensorProto.FLOAT)
    else:
        draft.node("Reshape", ["w", "shape"], "w_codes")
        draft.constants["s"] = np.asarray(0.1, np.float32)
        draft.node("DequantizeLinear", ["w_codes", "s"], "w_float")
    draft.node("MatMul", ["x", "w_float"], "y")
    return draft


def int8_pool() -> Draft:
    draft = Draft(inputs=[value("x", [1, 4, 8, 8])], outputs=[value("y", [1, 4, 7, 7])])
    draft.constants = {"scale": np.asarray(0.1, np.float32), "zero": np.asarray(0, np.int8)}
    draft.node("QuantizeLinear", ["x", "scale", "zero"], "x_q")
    draft.node("MaxPool", ["x_q"], "pooled", kernel_shape=[2, 2])
    draft.node("DequantizeLinear", ["pooled", "scale", "zero"], "y")
    return draft


def int32_bias() -> Draft:
    draft = int8_linear()
    draft.outputs = [value("z", [1, N])]
    draft.constants |= {"b": np.ones(N, np.int32), "b_scale": np.full(N, 0.001, np.float32)}
    draft.node("DequantizeLinear", ["b", "b_scale"], "b_dq", axis=0)
    draft.node("Add", ["y", "b_dq"], "z")
    return draft


def half_and_full() -> Draft:
    return changed(int8_linear(), w_scale=np.full(N, 0.01, np.float16))


def scale_of_other_type() -> Draft:
    draft = int8_linear()
    draft.inputs = [value("x", [1, K], TensorProto.FLOAT16)]
    return draft


def inside_a_branch() -> Draft:
    """The fault lies in the graph of an If."""
    branch = helper.make_graph(
        [helper.make_node("Unique", ["x"], ["inner"], name="node_inner")], "then", [], [value("inner", [4])]
    )
    other = helper.make_graph([helper.make_node("Abs", ["x"], ["other"])], "else", [], [value("other", [4])])
    draft = Draft(inputs=[value("x", [4]), value("c", [], TensorProto.BOOL)], outputs=[value("y", [4])])
    draft.node("If", ["c"], "y", then_branch=branch, else_branch=other)
    return draft


# name: (graph, rule, versions that refuse)
PLANTS: dict[str, tuple[Any, str, set[Any]]] = {
    "opset 8": (lambda: at_opset(operator("Relu"), 8), "opset", EVERY),
    "opset 22": (lambda: at_opset(operator("Relu"), 22), "opset", before(10, 14)),
    "opset 24": (lambda: at_opset(operator("Relu"), 24), "opset", before(10, 15)),
    "opset 25": (lambda: at_opset(operator("Relu"), 25), "opset", before(11, 4)),
    "dynamic quantisation": (lambda: operator("DynamicQuantizeLinear"), "operator-unsupported", EVERY),
    "MatMulInteger": (lambda: operator("MatMulInteger"), "operator-unsupported", EVERY),
    "ConvInteger": (lambda: operator("ConvInteger"), "operator-unsupported", EVERY),
    "QLinearConv": (lambda: operator("QLinearConv"), "operator-unsupported", EVERY),
    "QLinearMatMul": (lambda: operator("QLinearMatMul"), "operator-unsupported", EVERY),
    "MatMulNBits": (
        lambda: with_domain(operator("MatMulNBits", domain="com.microsoft"), "com.microsoft"),
        "operator-unsupported",
        EVERY,
    ),
    "in a branch": (inside_a_branch, "operator-unsupported", EVERY),
    "contrib": (
        lambda: with_domain(operator("BiasGelu", domain="com.microsoft"), "com.microsoft"),
        "operator-domain",
        EVERY,
    ),
    "Swish": (lambda: at_opset(operator("Swish"), 20), "operator-too-new", before(11, 0)),
    "RMSNormalization": (lambda: operator("RMSNormalization"), "operator-too-new", before(10, 15)),
    "RotaryEmbedding": (lambda: operator("RotaryEmbedding"), "operator-too-new", before(10, 15)),
    "TensorScatter": (lambda: operator("TensorScatter"), "operator-too-new", before(10, 15)),
    "attention": (lambda: at_opset(attention(), 20), "operator-too-new", before(10, 14)),
    "STFT": (lambda: operator("STFT"), "operator-too-new", before(10, 5)),
    "dilated pool": (
        lambda: operator("MaxPool", kernel_shape=[1, 1], dilations=[2, 2]),
        "operator-form",
        EVERY,
    ),
    "pool with places": (two_pool_outputs, "operator-form", EVERY),
    "computed axes": (computed_axes, "operator-form", EVERY),
    "too many of top k": (lambda: top_k(4000), "operator-form", EVERY),
    "unsorted top k": (lambda: top_k(3, sorted=0), "operator-form", EVERY),
    "pad by axes": (pad_with_axes, "operator-form", before(10, 4)),
    "group norm of opset 21": (group_norm, "operator-form", before(10, 9)),
    "uint8 weights": (uint8_weights, "tensor-type", EVERY),
    "double input": (lambda: with_input(operator("Relu"), value("d", [1], TensorProto.DOUBLE)), "border-type", EVERY),
    "uint16 input": (lambda: with_input(operator("Relu"), value("d", [1], TensorProto.UINT16)), "border-type", EVERY),
    "bytes that are reshaped": (uint8_reshaped, "uint8-cast", EVERY),
    "bytes cast to int32": (
        lambda: uint8_border(TensorProto.INT32, TensorProto.FLOAT),
        "uint8-cast",
        EVERY,
    ),
    "bytes cast to bfloat16": (lambda: uint8_border(TensorProto.BFLOAT16), "uint8-cast", EVERY),
    "bytes made from int32": (lambda: uint8_border(back=TensorProto.INT32), "uint8-cast", EVERY),
    "bytes inside": (uint8_inside, "uint8-cast", EVERY),
    "bare axis": (lambda: with_input(operator("Relu"), value("d", [1, None])), "axis-named", EVERY),
    "no shape": (
        lambda: with_input(operator("Relu"), helper.make_tensor_value_info("d", TensorProto.FLOAT, None)),
        "axis-named",
        EVERY,
    ),
    "empty axis": (lambda: with_input(operator("Relu"), value("d", [0])), "axis-named", EVERY),
    "half weights, full activations": (half_and_full, "operand-types", EVERY),
    "cast of codes": (int8_cast, "quantized-consumer", EVERY),
    "reshape of codes": (lambda: int8_cast("Reshape"), "quantized-consumer", EVERY),
    "pool of codes": (int8_pool, "quantized-consumer", EVERY),
    "large fp8 kernel": (lambda: fp8_convolution(kernel=7), "fp8-convolution", EVERY),
    "grouped fp8 convolution": (lambda: fp8_convolution(groups=4), "fp8-convolution", EVERY),
    "int32 bias": (int32_bias, "quantized-type", EVERY),
    "no zero point": (lambda: rewired(int8_linear(), "x_q", "x", "scale"), "zero-point-missing", EVERY),
    "unsigned": (uint8_activation, "zero-point-unsigned", EVERY),
    "other zero type": (
        lambda: rewired(changed(int8_linear(), odd=np.zeros((), np.int32)), "x_dq", "x_q", "scale", "odd"),
        "zero-point-type",
        EVERY,
    ),
    "computed zero point": (computed_zero, "zero-point-constant", EVERY),
    "asymmetric": (lambda: changed(int8_linear(), zero=np.int8(3)), "zero-point-not-zero", EVERY),
    "asymmetric fp8": (
        lambda: changed(fp8_linear(), zero=np.ones((), ml_dtypes.float8_e4m3fn)),
        "zero-point-not-zero",
        EVERY,
    ),
    "zero points for one scale": (lambda: changed(int8_linear(), zero=np.zeros(4, np.int8)), "zero-point-shape", EVERY),
    "computed scale": (computed_scale, "scale-constant", before(11, 0)),
    "other scale type": (scale_of_other_type, "scale-type", EVERY),
    "double scale": (lambda: changed(int8_linear(), scale=np.float64(0.1)), "scale-type", EVERY),
    "negative scale": (lambda: changed(int8_linear(), w_scale=-np.ones(N, np.float32)), "scale-positive", EVERY),
    "zero scale": (lambda: changed(int8_linear(), scale=np.float32(0)), "scale-positive", EVERY),
    "underflowed scale": (
        lambda: changed(int4_linear(), w_scale=np.full((2, N), 1e-9, np.float16)),
        "scale-underflow",
        EVERY,
    ),
    "infinite scale": (lambda: changed(int8_linear(), scale=np.float32(np.inf)), "scale-finite", EVERY),
    "not a number": (
        lambda: changed(int8_linear(), w_scale=np.asarray([np.nan] + [1] * (N - 1), np.float32)),
        "scale-finite",
        EVERY,
    ),
    "too few scales": (lambda: changed(int8_linear(), w_scale=np.full(4, 0.1, np.float32)), "scale-count", EVERY),
    "axis that is not there": (lambda: tweaked(int8_linear(), "w_dq", axis=5), "scale-count", EVERY),
    "scales for activations": (per_channel_activation, "activation-per-tensor", EVERY),
    "int4 activations": (int4_activation, "int4-weight-only", EVERY),
    "odd int4": (lambda: int4_linear(shape=(K, 7)), "int4-even", EVERY),
    "flat block scales": (lambda: changed(int4_linear(), w_scale=np.ones(16, np.float16)), "block-rank", EVERY),
    "two blocked dimensions": (two_blocked, "block-one-dimension", EVERY),
    "padded block": (padded_block, "block-divides", EVERY),
    "first of three blocked": (first_blocked, "block-axis", EVERY),
    "block of 32": (lambda: int4_linear(32), "block-size", EVERY),
    "block of 16 that is inferred": (
        lambda: tweaked(int4_linear(16), "w_dq", block_size=None),
        "block-size",
        EVERY,
    ),
    "int8 blocks": (blocked_int8, "block-type", before(10, 8)),
    "stacked int4 experts": (lambda: int4_linear(shape=(4, K, N)), "block-two-dimensions", before(10, 8)),
}
# What else a plant breaks on the way.
ASIDE = {
    "int4 activations": {"operand-types"},
    "no zero point": {"quantized-type", "zero-point-type"},  # what ONNX then means is uint8
    "double scale": {"tensor-type", "operand-types"},
    "other scale type": {"operand-types"},
    "first of three blocked": {"block-two-dimensions"},
}
CLEAN = {
    "int8": int8_linear,
    "int4 in float16": int4_linear,
    "int4 in float32": lambda: int4_linear(128, np.float32),
    "fp8": fp8_linear,
    "fp8 convolution": fp8_convolution,
    "all together": mixed,
    "plain": lambda: operator("Relu"),
    "bytes at the border": uint8_border,
}


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_clean_graphs_pass_every_version(name, version):
    model = CLEAN[name]().model()
    onnx.checker.check_model(model, full_check=True)
    assert [str(one) for one in lint_model(model, version)] == []


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_caught_for_the_versions_that_it_concerns(name):
    make, rule, versions = PLANTS[name]
    model = make().model()
    for version in SUPPORTED_VERSIONS:
        found = {one.rule for one in lint_model(model, version)}
        assert (rule in found) == (version in versions), (version, found)
        assert found <= {rule} | ASIDE.get(name, set()), (version, found)


def test_every_rule_has_a_plant():
    planted = {rule for _, rule, _ in PLANTS.values()} | {"external-data"}  # planted below, in files
    assert planted == set(RULES)


@pytest.mark.parametrize("name", PLANTS)
def test_a_violation_names_node_rule_and_remedy(name):
    make, rule, versions = PLANTS[name]
    draft = make()
    version = min(versions)
    found = next(one for one in lint_model(draft.model(), version) if one.rule == rule)
    names = {node.name for node in draft.nodes} | {one.name for one in draft.inputs} | {"planted", "node_inner"}
    assert found.node in names
    text = str(found)
    assert found.rule in RULES
    assert text == f"{found.node} [{rule}]: {found.message}. {found.remedy}."
    assert len(found.message) > 15
    assert len(found.remedy) > 8


def test_messages_give_values_and_limits():
    def message(name: str) -> str:
        make, rule, _ = PLANTS[name]
        return next(one.message for one in lint_model(make().model(), (10, 3)) if one.rule == rule)

    assert "block size 64" in message("padded block")
    assert "100" in message("padded block")
    assert "32" in message("block of 32")
    assert "64 and 128" in message("block of 32")
    assert "4 scales" in message("too few scales")
    assert "8" in message("too few scales")
    assert "is 3" in message("asymmetric")
    assert "10.15" in message("RMSNormalization")
    assert "22 lies outside 9 to 21" in message("opset 22")


@pytest.mark.parametrize(
    ("draft", "fault"),
    [
        (lambda: attention("", "p", "p2"), "past"),
        (lambda: attention(softcap=5.0), "softcap"),
    ],
)
def test_forms_of_attention_that_the_importer_lacks_are_refused_where_it_has_attention(draft, fault):
    found = lint_model(draft().model(), (10, 15))
    assert [one.rule for one in found] == ["operator-form"]
    assert fault in found[0].message
    assert lint_model(attention().model(), (10, 15)) == ()


def test_a_scatter_that_reduces_is_refused():
    draft = Draft(inputs=[value("x", [4]), value("u", [1])], outputs=[value("y", [4])])
    draft.constants = {"i": np.asarray([[1]], np.int64)}
    draft.node("ScatterND", ["x", "i", "u"], "y", reduction="add")
    assert {one.rule for one in lint_model(draft.model(), (10, 3))} == {"operator-form"}


def test_fp4_is_known_from_10_8():
    rules = {
        version: {one.rule for one in lint_model(fp4_weights().model(), version)} for version in SUPPORTED_VERSIONS
    }
    assert {"tensor-type", "quantized-type"} <= rules[(10, 3)]
    assert "quantized-type" not in rules[(10, 15)]


def test_tensorrts_own_quantisers_and_local_functions_pass():
    draft = with_domain(int8_linear(), "trt")
    for output in ("x_q", "x_dq"):
        draft.named(output).domain = "trt"
    draft.named("x_q").op_type = "TRT_INT8QuantizeLinear"
    draft.named("x_dq").op_type = "TRT_INT8DequantizeLinear"
    assert lint_model(draft.model(), (10, 3)) == ()

    model = with_domain(operator("Half", domain="own"), "own").model()
    body = [helper.make_node("Identity", ["a"], ["b"])]
    model.functions.append(helper.make_function("own", "Half", ["a"], ["b"], body, [helper.make_opsetid("", 20)]))
    assert lint_model(model, (10, 3)) == ()


def test_constants_may_be_nodes():
    draft = int8_linear()
    for name in ("scale", "zero", "w_scale", "w"):
        tensor = numpy_helper.from_array(draft.constants.pop(name), name)
        draft.nodes.insert(0, helper.make_node("Constant", [], [name], name=f"node_{name}", value=tensor))
    assert lint_model(draft.model(), (10, 3)) == ()
    tensor = numpy_helper.from_array(np.asarray(-1, np.float32), "scale")
    node = draft.named("scale")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("value", tensor))
    assert {one.rule for one in lint_model(draft.model(), (10, 3))} == {"scale-positive"}


def test_weights_that_are_quantised_in_the_graph_may_have_a_scale_a_channel():
    draft = changed(int8_linear(), w=np.ones((K, N), np.float32), w_zero=np.zeros(N, np.int8))
    draft.nodes = [node for node in draft.nodes if "w_dq" not in node.output]
    draft.nodes.insert(0, helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w_dq"], axis=1))
    draft.nodes.insert(0, helper.make_node("QuantizeLinear", ["w", "w_scale", "w_zero"], ["w_q"], axis=1))
    assert lint_model(draft.model(), (10, 3)) == ()


def test_codes_that_come_as_an_input_may_not_have_a_scale_a_channel_even_in_11():
    for scales in (value("w_scale", [N]), value("w_scale", ["N"])):
        draft = with_input(int8_linear(), value("w", [K, N], TensorProto.INT8), scales)
        del draft.constants["w"], draft.constants["w_scale"]
        rules = {version: {one.rule for one in lint_model(draft.model(), version)} for version in SUPPORTED_VERSIONS}
        assert rules[(10, 16)] == {"scale-constant", "activation-per-tensor"}
        assert rules[(11, 4)] == {"activation-per-tensor"}


def test_faults_of_one_graph_are_all_found():
    draft = changed(int8_linear(), scale=np.float32(-1), zero=np.int8(1), w_scale=np.ones(3, np.float32))
    rules = [one.rule for one in lint_model(draft.model(), (10, 3))]
    assert set(rules) == {"scale-positive", "zero-point-not-zero", "scale-count"}


def saved(draft: Draft, folder, name: str = "segment0") -> Any:
    """Write a graph whose constants lie beside it."""
    path = folder / f"{name}.onnx"
    onnx.save(draft.model(), str(path), save_as_external_data=True, location=f"{name}.data", size_threshold=0)
    return path


def test_external_data_is_read_for_scales_and_measured_for_weights(tmp_path):
    path = saved(int4_linear(), tmp_path)
    assert path.stat().st_size < 2000
    assert lint(path, (10, 3)) == ()
    bad = saved(changed(int8_linear(), scale=np.float32(-1)), tmp_path, "segment1")
    assert {one.rule for one in lint(bad, (10, 3))} == {"scale-positive"}


def test_int4_takes_half_a_byte_a_weight():
    tensor = next(one for one in int4_linear().model().graph.initializer if one.name == "w")
    assert stored_bytes(tensor) == K * N // 2 == len(tensor.raw_data)


def test_external_data_may_lie_below_the_graph_and_never_above(tmp_path):
    path = saved(int8_linear(), tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "segment0.data").rename(tmp_path / "below" / "segment0.data")
    model = onnx.load(str(path), load_external_data=False)
    for location, faults in (
        ("below/segment0.data", 0),
        ("below/../segment0.data", 1),
        ("./below/segment0.data", 1),
        (str(tmp_path / "below" / "segment0.data"), 1),
        ("below//segment0.data", 1),
    ):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        path.write_bytes(model.SerializeToString())
        assert len({one.rule for one in lint(path, (11, 4))}) == faults, location


@pytest.mark.parametrize("harm", ["missing", "cut", "elsewhere"])
def test_harmed_external_data_is_a_violation(tmp_path, harm):
    path = saved(int8_linear(), tmp_path)
    data = tmp_path / "segment0.data"
    if harm == "missing":
        data.unlink()
    elif harm == "cut":
        data.write_bytes(data.read_bytes()[:100])
    else:
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "../segment0.data" if entry.key == "location" else entry.value
        path.write_bytes(model.SerializeToString())
    found = lint(path, (11, 4))
    assert {one.rule for one in found} == {"external-data"}
    assert all("segment0.data" in one.message for one in found)


def test_what_is_no_model_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.onnx.*does not exist"):
        lint(tmp_path / "nothing.onnx", (10, 3))
    for content in (b"", b"this is text", bytes(range(200))):
        path = tmp_path / "bad.onnx"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.onnx"):
            lint(path, (10, 3))


def test_harmed_models_are_refused_or_judged_and_never_break_the_lint(tmp_path):
    paths = [saved(mixed(), tmp_path, "mixed"), saved(int4_linear(), tmp_path, "int4")]
    draw = random.Random(0)
    harmed = tmp_path / "harmed.onnx"
    for path in paths:
        whole = path.read_bytes()
        for turn in range(300):
            content = bytearray(whole[: draw.randrange(len(whole))] if turn % 3 == 0 else whole)
            for _ in range(draw.randrange(1, 4) if content else 0):
                content[draw.randrange(len(content))] = draw.randrange(256)
            harmed.write_bytes(bytes(content))
            with contextlib.suppress(InputError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # onnx tells about unknown fields
                lint(harmed, (10, 3))


def test_versions_older_than_supported_are_refused_and_newer_ones_take_the_last_rules():
    with pytest.raises(InputError, match=r"8\.6 is older than 10\.3"):
        lint_model(int8_linear().model(), (8, 6))
    assert lint_model(int8_linear().model(), (10, 9)) == ()
    assert lint_model(int8_linear().model(), (12, 0)) == ()


def test_require_clean_lists_everything_with_the_versions_concerned(tmp_path):
    clean, stacked = saved(mixed(), tmp_path, "good"), saved(int4_linear(shape=(4, K, N)), tmp_path, "stacked")
    negative = saved(changed(int8_linear(), scale=np.float32(-1)), tmp_path, "negative")
    require_clean([clean], SUPPORTED_VERSIONS)
    require_clean([clean, stacked], [(10, 8), (11, 4)])
    with pytest.raises(UnsupportedError) as error:
        require_clean([clean, stacked, negative], SUPPORTED_VERSIONS)
    text = str(error.value)
    assert "good.onnx" not in text
    assert "stacked.onnx: node_w_dq [block-two-dimensions]" in text
    assert "(TensorRT: 10.3, 10.7)" in text
    assert "negative.onnx: node_x_q [scale-positive]" in text
    assert "(TensorRT: all versions)" in text
    assert "Store one matrix" in text


def test_a_file_is_opened_once_for_all_versions(tmp_path):
    path = saved(int4_linear(shape=(4, K, N)), tmp_path)
    found = lint_versions(path, SUPPORTED_VERSIONS)
    assert {version for version, faults in found.items() if faults} == before(10, 8)
