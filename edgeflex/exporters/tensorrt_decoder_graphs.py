"""How a raw weight enters a graph for TensorRT: as an engine's input, unpacked by arithmetic that its importer takes.

TensorRT dequantises constants alone, and decoders' weights come and go. So each matrix is an input in the very bytes
of its file, and the graph turns them into numbers with ``Cast``, ``Floor`` and products. UINT8 exists at the border of
an engine only, and is cast to floats at once (``NvInfer.h``, ``DataType::kUINT8``).

    fp32           FLOAT [rows, columns]: the product as it was
    int8-dynamic   UINT8 [rows, columns], FLOAT [rows]:
                   b / 128 - 2 floor(b / 128) is the signed code / 128; scales are applied to what the product gives
    int4-group32   UINT8 [rows, columns / 2], BFLOAT16 [rows, columns / 32]:
                   floor(b / 16) and b - 16 floor(b / 16), less 8, times the scale of their group

With ``half``, quantised matrices multiply in fp16, everything else stays fp32. All weights are exact in fp16: int8
codes / 128 have 7 bits and a sign; an int4 weight has 3 bits of a code times 8 of a bfloat16 scale, 11 together, as
long as the scale lies between 8e-6 and 8e3. Each row of activations is divided by its largest number before it is
rounded to fp16, and the product multiplied by it after, so that neither overflows, whatever the residual holds. Weights
that would do so nevertheless are refused (``require_half``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgeflex.errors import UnsupportedError
from edgeflex.exporters.onnx_decoder_graphs import (
    constant_tensor,
    operator,
    replace_input,
    replace_nodes,
    sole_product,
)
from edgeflex.schema import Precision
from edgeflex.transforms.decoder_weights import GROUP, INT4_LOW, float_from_bfloat16

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgeflex.transforms.decoder_weights import StoredMatrix

_SIGN = 128.0  # bytes from here on are negative codes
_NIBBLE = 16.0
_LONG = "_long"  # what INT32 at the border is inside, where ONNX's own operators want INT64
_HALF_GROUP = GROUP // 2
_MOST_HALF = 65504.0
_LEAST_SCALE = 2.0**-17  # of 8 bits: the last is then 2^-24, the least number of fp16
_LEAST_ROW = 1e-30  # so that a row of zeros is divided by something

# element type and shape of each piece of a weight, by its name
Pieces = dict[str, tuple[int, tuple[int, ...]]]


class Weight(NamedTuple):
    """A matrix, or a small tensor, that enters a stage.

    Attributes:
        name: Its local name, the input's.
        precision: How it is stored.
        shape: ``[rows, columns]`` of a matrix, a small tensor's own.
    """

    name: str
    precision: Precision
    shape: tuple[int, ...]

    def pieces(self) -> Pieces:
        """Return the inputs that it becomes."""
        name, shape = self.name, self.shape
        if self.precision is Precision.INT8_DYNAMIC:
            return {name: (TensorProto.UINT8, shape), f"{name}_scales": (TensorProto.FLOAT, shape[:1])}
        if self.precision is Precision.INT4_GROUP32:
            rows, columns = shape
            scales = (TensorProto.BFLOAT16, (rows, columns // GROUP))
            return {name: (TensorProto.UINT8, (rows, columns // 2)), f"{name}_scales": scales}
        return {name: (TensorProto.FLOAT, shape)}


def require_half(name: str, stored: StoredMatrix) -> None:
    """Refuse a matrix that fp16 does not hold, or whose products with rows of at most 1 could overflow it.

    Raises:
        UnsupportedError: It is of four bits, and its largest scale is too small or too large.
    """
    if stored.precision is not Precision.INT4_GROUP32 or stored.scales is None:
        return
    largest = float(float_from_bfloat16(stored.scales.max(keepdims=True)).max())
    most = _MOST_HALF / (-INT4_LOW * stored.columns)
    if not _LEAST_SCALE <= largest <= most:
        raise UnsupportedError(
            f"{name}: its largest scale is {largest:.3g}; in half precision {_LEAST_SCALE:.3g} to {most:.3g} are exact "
            f"and safe for {stored.columns} columns. Export for executorch or onnx instead."
        )


def engine_stage(template: ModelProto, weights: Sequence[Weight], *, half: bool) -> ModelProto:
    """Return a stage whose weights are inputs in their raw form and whose integers at the border are INT32.

    Args:
        template: With every weight as an fp32 input; left as it is.
        weights: What enters it.
        half: Quantised matrices multiply in fp16.

    Raises:
        UnsupportedError: The template uses a quantised matrix otherwise than in one product.
    """
    model = ModelProto()
    model.CopyFrom(template)
    for weight in weights:
        if weight.precision is not Precision.FP32:
            _enter(model, weight, half=half)
    _narrow_borders(model)
    return model


def border_faults(model: ModelProto, weights: Sequence[Weight]) -> Iterator[str]:
    """Yield every weight that a written stage does not take in the form that its bytes have, or holds itself."""
    given = {one.name: one.type.tensor_type for one in model.graph.input}
    held = {one.name for one in model.graph.initializer}
    for weight in weights:
        for name, (kind, shape) in weight.pieces().items():
            if name in held:
                yield f"{name} is a constant of the graph"
            elif name not in given:
                yield f"there is no input {name}"
            else:
                found = given[name].elem_type, tuple(axis.dim_value for axis in given[name].shape.dim)
                if found != (kind, shape):
                    wanted = f"{_form(kind, shape)}, as {weight.precision.value} lies on disk"
                    yield f"{name} is {_form(*found)} instead of {wanted}"


def _form(kind: int, shape: tuple[int, ...]) -> str:
    return f"{TensorProto.DataType.Name(kind)} {list(shape)}"


def widened(model: ModelProto) -> ModelProto:
    """Return a stage in which everything that is fp16 is fp32, and which takes any number of a weight's rows."""
    wide = ModelProto()
    wide.CopyFrom(model)
    for given in wide.graph.input:
        sizes = given.type.tensor_type.shape.dim
        if all(axis.dim_value for axis in sizes):
            sizes[0].dim_param = f"{given.name}_rows"
    for node in wide.graph.node:
        for one in node.attribute:
            if node.op_type == "Cast" and one.name == "to" and one.i == TensorProto.FLOAT16:
                one.i = TensorProto.FLOAT
    for held in wide.graph.initializer:
        if held.data_type == TensorProto.FLOAT16:
            held.CopyFrom(constant_tensor(numpy_helper.to_array(held).astype(np.float32), held.name))
    return wide


def _enter(model: ModelProto, weight: Weight, *, half: bool) -> None:
    """Put the weight's pieces where its input stands, and its operators around the product."""
    place, product = sole_product(model, weight.name)
    chain = _Chain(model, weight.name)
    eight = weight.precision is Precision.INT8_DYNAMIC
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    matrix = _eight_bits(chain, kind) if eight else _four_bits(chain, kind, weight.shape[1])
    activations = product.input[0] if eight else _by_halves(chain, product.input[0], weight.shape[1])
    factors = []
    if half:
        largest = chain.add("ReduceMax", chain.add("Abs", activations), chain.sizes(-1), keepdims=1)
        factors.append(chain.add("Max", largest, chain.number(_LEAST_ROW)))
        activations = chain.add("Cast", chain.add("Div", activations, factors[0]), to=kind)
    if eight:
        factors.append(chain.add("Mul", f"{weight.name}_scales", chain.number(_SIGN)))
    found = chain.add("Gemm", activations, matrix, transB=1)
    if half:
        found = chain.add("Cast", found, to=TensorProto.FLOAT)
    for factor in factors:
        found = chain.add("Mul", found, factor)
    inputs = [helper.make_tensor_value_info(name, *form) for name, form in weight.pieces().items()]
    replace_input(model, weight.name, *inputs)
    replace_nodes(model, place, chain.ending_in(product.output[0]))


class _Chain:
    """Operators in a row, which are named after a weight and their place."""

    def __init__(self, model: ModelProto, name: str) -> None:
        self.name = name
        self._constants = model.graph.initializer
        self._nodes: list[NodeProto] = []

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append an operator and return what it makes."""
        output = f"{self.name}_{len(self._nodes)}_{kind.lower()}"
        self._nodes.append(operator(kind, inputs, [output], **attributes))
        return output

    def number(self, value: float, kind: int = TensorProto.FLOAT) -> str:
        """Return the name of a constant of the type ``kind``."""
        name = f"{self.name}_number_{len(self._nodes)}"
        real = np.float16 if kind == TensorProto.FLOAT16 else np.float32
        self._constants.append(constant_tensor(real(value), name))
        return name

    def sizes(self, *values: int) -> str:
        """Return the name of a constant shape, or of axes."""
        name = f"{self.name}_sizes_{len(self._nodes)}"
        self._constants.append(constant_tensor(np.array(values, np.int64), name))
        return name

    def ending_in(self, name: str) -> list[NodeProto]:
        """Return the operators, the last of which makes ``name``."""
        self._nodes[-1].output[0] = name
        return self._nodes


def _eight_bits(chain: _Chain, kind: int) -> str:
    """Return signed codes / 128, made from bytes."""
    turns = chain.add("Mul", chain.add("Cast", chain.name, to=kind), chain.number(1 / _SIGN, kind))
    wraps = chain.add("Mul", chain.add("Floor", turns), chain.number(2.0, kind))
    return chain.add("Sub", turns, wraps)


def _four_bits(chain: _Chain, kind: int, columns: int) -> str:
    """Return the matrix with each group's even columns first, then its odd ones, made from nibbles."""
    groups = columns // GROUP
    pairs = chain.add("Reshape", chain.add("Cast", chain.name, to=kind), chain.sizes(-1, groups, _HALF_GROUP))
    high = chain.add("Floor", chain.add("Mul", pairs, chain.number(1 / _NIBBLE, kind)))
    low = chain.add("Sub", pairs, chain.add("Mul", high, chain.number(_NIBBLE, kind)))
    nibbles = chain.add("Concat", low, high, axis=2)
    codes = chain.add("Add", nibbles, chain.number(float(INT4_LOW), kind))
    scales = chain.add("Cast", f"{chain.name}_scales", to=kind)
    values = chain.add("Mul", codes, chain.add("Reshape", scales, chain.sizes(-1, groups, 1)))
    return chain.add("Reshape", values, chain.sizes(-1, columns))


def _by_halves(chain: _Chain, activations: str, columns: int) -> str:
    """Return activations with the columns of each group in the order of ``_four_bits``: they are far fewer numbers."""
    paired = chain.add("Reshape", activations, chain.sizes(-1, columns // GROUP, _HALF_GROUP, 2))
    return chain.add("Reshape", chain.add("Transpose", paired, perm=[0, 1, 3, 2]), chain.sizes(-1, columns))


def _narrow_borders(model: ModelProto) -> None:
    """Make INT64 inputs and outputs INT32, cast at once."""
    graph = model.graph
    given = [one for one in graph.input if one.type.tensor_type.elem_type == TensorProto.INT64]
    made = [one for one in graph.output if one.type.tensor_type.elem_type == TensorProto.INT64]
    renamed = {one.name: one.name + _LONG for one in (*given, *made)}
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    before = [operator("Cast", [one.name], [renamed[one.name]], to=TensorProto.INT64) for one in given]
    after = [operator("Cast", [renamed[one.name]], [one.name], to=TensorProto.INT32) for one in made]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    for one in (*given, *made):
        one.type.tensor_type.elem_type = TensorProto.INT32
