"""How a weight enters an ONNX graph: operators between its stored form and the product that uses it.

A template takes a matrix as fp32 input ``NAME [rows, columns]`` and multiplies by it in a ``Gemm`` with ``transB``.
``enter_weight`` replaces this input by the pieces of ``MatrixRecord``'s raw form, ``NAME`` and ``NAME_scales``, and
``seal_weights`` makes pieces constants in an external file; what is not sealed (an expert's) stays an input.

    fp32           Gemm
    int8-dynamic   DequantizeLinear per row, Gemm
    int4-group32   constants: MatMulNBits; inputs: nibbles by bit operators, DequantizeLinear per group, two Gemms

What is dequantised in the graph is so in blocks of rows: constants NAME_0, NAME_1, ... or an input cut there.
Blocks bound what stands in memory: a whole dequantised head would take four bytes a weight beside its own one.
Weights only: activations stay fp32 in all of them.

ONNX Runtime's processor kernels take ``MatMulNBits`` (its own domain) over the raw bytes as they are, ten to thirty
times as fast as what it does not fuse and at every optimisation level; the one form that it fuses stores weights
transposed, in which the host could not look rows up, and computes with 8-bit activations unless told otherwise. Every
such model carries the operator's meaning in plain ONNX as a local function, so other tools run the file too. Over
inputs, which cannot be packed ahead, ``MatMulNBits`` is four times as slow as bit operators, and ONNX Runtime binds no
UINT4 input from packed bytes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edgeflex.errors import UnsupportedError
from edgeflex.schema import Precision
from edgeflex.transforms.decoder_weights import GROUP, INT4_LOW

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnx import FunctionProto, GraphProto

    from edgeflex.schema_moe import MatrixRecord

_BLOCK_OPSET = 21  # the first whose DequantizeLinear has blocks
_CONTRIB = "com.microsoft"
_HALF = GROUP // 2
_MOST_WEIGHTS = 1 << 20  # of a block: 4 MiB dequantised, and twice as fast as blocks of 16 MiB
_FLOAT_ACTIVATIONS = 1  # MatMulNBits' accuracy_level
_KINDS = {
    TensorProto.FLOAT: Precision.FP32,
    TensorProto.INT8: Precision.INT8_DYNAMIC,
    TensorProto.UINT8: Precision.INT4_GROUP32,
}


@dataclass(frozen=True)
class Place:
    """Bytes of an external file."""

    offset: int
    size_bytes: int


def enter_weight(
    model: ModelProto, name: str, precision: Precision, rows: int, columns: int, *, constant: bool
) -> None:
    """Replace the fp32 input ``name`` by the pieces of ``precision`` and the operators that multiply with them.

    Args:
        model: Changed in place.
        name: Of a matrix.
        precision: How it is stored.
        rows: Of the matrix.
        columns: Of the matrix.
        constant: It will be sealed, which kernels can use.

    Raises:
        UnsupportedError: The graph uses the matrix otherwise than in one product.
    """
    graph = model.graph
    place, product = sole_product(model, name)
    if precision is Precision.FP32:
        return
    nodes: list[NodeProto] = []
    if precision is Precision.INT4_GROUP32 and constant:
        nodes += _four_bits_constant(product, name, rows, columns)
        replace_input(model, name, *_four_bit_pieces(name, (rows, columns // GROUP, _HALF), rows, columns))
        _add_function(model)
    else:
        blocks = row_blocks(name, rows, columns)
        if not constant and len(blocks) > 1:
            nodes += _cut(graph, name, blocks)
        names = tuple(one for one, _, _ in blocks)
        if precision is Precision.INT8_DYNAMIC:
            nodes += _in_blocks(product, names, partial(_eight_bits, product.input[0]))
            whole = blocks if constant else ((name, 0, rows),)
            replace_input(model, name, *itertools.chain(*(_eight_bit_pieces(*one, columns) for one in whole)))
        else:
            nodes += _halves(graph, product, name, columns)
            nodes += _in_blocks(product, names, partial(_four_bits, name))
            replace_input(model, name, *_four_bit_pieces(name, (rows, columns // 2), rows, columns))
    replace_nodes(model, place, nodes)


def seal_weights(model: ModelProto, places: Mapping[str, Place], data: str) -> None:
    """Make inputs constants that lie in the file ``data`` beside the graph."""
    graph = model.graph
    for given in [one for one in graph.input if one.name in places]:
        kind = given.type.tensor_type
        place = places[given.name]
        tensor = TensorProto(name=given.name, data_type=kind.elem_type, data_location=TensorProto.EXTERNAL)
        tensor.dims.extend(size.dim_value for size in kind.shape.dim)
        for key, value in (("location", data), ("offset", place.offset), ("length", place.size_bytes)):
            tensor.external_data.add(key=key, value=str(value))
        graph.initializer.append(tensor)
        graph.input.remove(given)


def row_blocks(name: str, rows: int, columns: int) -> tuple[tuple[str, int, int], ...]:
    """Return name, first row and rows of the blocks of a matrix; a small one is one block, of its own name."""
    count = -(-rows * columns // _MOST_WEIGHTS)
    if count <= 1:
        return ((name, 0, rows),)
    most = -(-rows // count)
    starts = range(0, rows, most)
    return tuple((f"{name}_{place}", start, min(most, rows - start)) for place, start in enumerate(starts))


def weight_places(name: str, record: MatrixRecord) -> dict[str, Place]:
    """Return where each piece of a constant lies; pieces that end in ``_scales`` belong to that before."""
    eight = record.precision is Precision.INT8_DYNAMIC
    blocks = row_blocks(name, record.rows, record.columns) if eight else ((name, 0, record.rows),)
    places = {}
    for piece, start, count in blocks:
        for ending, offset, whole in (
            ("", record.offset, record.weights_bytes),
            ("_scales", record.scales_offset, record.scales_bytes),
        ):
            if offset is not None:
                row_bytes = whole // record.rows
                places[piece + ending] = Place(offset + start * row_bytes, count * row_bytes)
    return places


def stored_precision(model: ModelProto, name: str) -> Precision | None:
    """Return how a graph holds a weight, constant or input, or None where it is nothing known."""
    kinds = {one.name: one.data_type for one in model.graph.initializer}
    kinds |= {one.name: one.type.tensor_type.elem_type for one in model.graph.input}
    return _KINDS.get(kinds.get(name, TensorProto.UNDEFINED))


def sealed_place(model: ModelProto, name: str) -> tuple[str, Place] | None:
    """Return the file and bytes of a sealed weight, or None where it is none."""
    for tensor in model.graph.initializer:
        if tensor.name == name and tensor.data_location == TensorProto.EXTERNAL:
            said = {one.key: one.value for one in tensor.external_data}
            return said["location"], Place(int(said["offset"]), int(said["length"]))
    return None


def sole_product(model: ModelProto, name: str) -> tuple[int, NodeProto]:
    """Return the place and the node of the one product that a template multiplies a matrix in.

    Raises:
        UnsupportedError: The graph uses the matrix otherwise.
    """
    users = [(place, node) for place, node in enumerate(model.graph.node) if name in node.input]
    if len(users) != 1 or not _is_product(users[0][1], name):
        raise UnsupportedError(f"{name}: the exported graph does not multiply with it once. Export for executorch.")
    return users[0]


def replace_nodes(model: ModelProto, place: int, nodes: Sequence[NodeProto]) -> None:
    """Put ``nodes`` where one node stands."""
    after = [*model.graph.node[:place], *nodes, *model.graph.node[place + 1 :]]
    del model.graph.node[:]
    model.graph.node.extend(after)


def _is_product(node: NodeProto, name: str) -> bool:
    said = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    plain = (said.get("alpha", 1.0), said.get("beta", 1.0), said.get("transA", 0), said.get("transB", 0))
    return node.op_type == "Gemm" and list(node.input[1:]) == [name] and plain == (1.0, 1.0, 0, 1)


def replace_input(model: ModelProto, name: str, *pieces: ValueInfoProto) -> None:
    """Put inputs where the input ``name`` stands."""
    inputs = model.graph.input
    place = next(place for place, one in enumerate(inputs) if one.name == name)
    after = [*inputs[:place], *pieces, *inputs[place + 1 :]]
    del inputs[:]
    inputs.extend(after)


def _eight_bit_pieces(name: str, _start: int, rows: int, columns: int) -> tuple[ValueInfoProto, ValueInfoProto]:
    scales = helper.make_tensor_value_info(f"{name}_scales", TensorProto.FLOAT, (rows,))
    return helper.make_tensor_value_info(name, TensorProto.INT8, (rows, columns)), scales


def _four_bit_pieces(name: str, shape: Sequence[int], rows: int, columns: int) -> tuple[ValueInfoProto, ValueInfoProto]:
    scales = helper.make_tensor_value_info(f"{name}_scales", TensorProto.BFLOAT16, (rows, columns // GROUP))
    return helper.make_tensor_value_info(name, TensorProto.UINT8, shape), scales


def operator(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
    """Return a node that is named after what it makes."""
    return helper.make_node(kind, list(inputs), list(outputs), name=f"node_{outputs[0]}", **attributes)


def _in_blocks(
    product: NodeProto, names: Sequence[str], multiplied: Callable[[str, str], list[NodeProto]]
) -> list[NodeProto]:
    """Return the product with each block of rows (its name, its output), and what joins the outputs."""
    if len(names) == 1:
        return multiplied(names[0], product.output[0])
    outputs = [f"{name}_product" for name in names]
    nodes = [node for name, output in zip(names, outputs, strict=True) for node in multiplied(name, output)]
    return [*nodes, operator("Concat", outputs, product.output, axis=-1)]


def _cut(graph: GraphProto, name: str, blocks: Sequence[tuple[str, int, int]]) -> list[NodeProto]:
    """Cut the pieces of an input into blocks of rows."""
    graph.initializer.append(constant_tensor(np.array([count for _, _, count in blocks], np.int64), f"{name}_rows"))
    return [
        operator("Split", (name + ending, f"{name}_rows"), [one + ending for one, _, _ in blocks], axis=0)
        for ending in ("", "_scales")
    ]


def _eight_bits(activations: str, name: str, output: str) -> list[NodeProto]:
    opened = operator("DequantizeLinear", (name, f"{name}_scales"), (f"{name}_values",), axis=0)
    return [opened, operator("Gemm", (activations, f"{name}_values"), (output,), transB=1)]


def _four_bits_constant(product: NodeProto, name: str, rows: int, columns: int) -> list[NodeProto]:
    wide = operator("Cast", (f"{name}_scales",), (f"{name}_scales_float",), to=TensorProto.FLOAT)
    multiplied = operator(
        "MatMulNBits",
        (product.input[0], name, f"{name}_scales_float"),
        product.output,
        domain=_CONTRIB,
        K=columns,
        N=rows,
        bits=4,
        block_size=GROUP,
        accuracy_level=_FLOAT_ACTIVATIONS,
    )
    return [wide, multiplied]


def _add_function(model: ModelProto) -> None:
    """Say once what ``MatMulNBits`` means; ONNX Runtime takes its kernel nevertheless."""
    if model.functions:
        return
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = _BLOCK_OPSET
    model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    model.functions.append(_meaning())


def _meaning() -> FunctionProto:
    """Return ``MatMulNBits`` for 4 bits in groups of 32 with zero points of 8 in plain ONNX."""
    values: dict[str, Any] = {
        "fifteen": np.uint8(15),
        "four": np.uint8(4),
        "eight": np.array([-INT4_LOW], np.uint8),
        "behind": np.array([3], np.int64),
        "rest": np.array([-1], np.int64),
    }
    body = [
        helper.make_node("Constant", [], [name], value=constant_tensor(value, name)) for name, value in values.items()
    ]
    body += [
        operator("BitwiseAnd", ("B", "fifteen"), ("low",)),
        operator("BitShift", ("B", "four"), ("high",), direction="RIGHT"),
        operator("Unsqueeze", ("low", "behind"), ("even",)),
        operator("Unsqueeze", ("high", "behind"), ("odd",)),
        operator("Concat", ("even", "odd"), ("pairs",), axis=3),
        operator("Shape", ("B",), ("rows",), start=0, end=1),
        operator("Concat", ("rows", "rest"), ("flat",), axis=0),
        operator("Reshape", ("pairs", "flat"), ("codes",)),
        operator("Shape", ("scales",), ("groups",)),
        operator("Expand", ("eight", "groups"), ("zeros",)),
        operator("DequantizeLinear", ("codes", "scales", "zeros"), ("values",), axis=1, block_size=GROUP),
        operator("Gemm", ("A", "values"), ("Y",), transB=1),
    ]
    attributes = ["K", "N", "bits", "block_size", "accuracy_level"]
    opsets = [helper.make_opsetid("", _BLOCK_OPSET)]
    return helper.make_function(
        _CONTRIB, "MatMulNBits", ["A", "B", "scales"], ["Y"], body, opsets, attributes=attributes
    )


def _halves(graph: GraphProto, product: NodeProto, name: str, columns: int) -> list[NodeProto]:
    """Split activations into those of even and of odd columns, and add the constants that blocks share."""
    constants: dict[str, Any] = {
        "as_pairs": np.array((-1, columns // 2, 2), np.int64),
        "as_halves": np.array((-1, columns // 2), np.int64),
        "as_groups": np.array((-1, _HALF), np.int64),
        "as_steps": np.array((-1,), np.int64),
        "fifteen": np.uint8(15),
        "four": np.uint8(4),
    }
    graph.initializer.extend(constant_tensor(value, f"{name}_{one}") for one, value in constants.items())
    return [
        operator("Reshape", (product.input[0], f"{name}_as_pairs"), (f"{name}_pairs",)),
        operator("Split", (f"{name}_pairs",), (f"{name}_even_pairs", f"{name}_odd_pairs"), axis=2, num_outputs=2),
        operator("Reshape", (f"{name}_even_pairs", f"{name}_as_halves"), (f"{name}_evens",)),
        operator("Reshape", (f"{name}_odd_pairs", f"{name}_as_halves"), (f"{name}_odds",)),
    ]


def _four_bits(whole: str, name: str, output: str) -> list[NodeProto]:
    """Return the product of even columns with low nibbles plus that of odd ones with high ones.

    Splitting the activations spares the graph from putting the nibbles in a row: they are many more numbers.
    """
    eight = helper.make_tensor("value", TensorProto.UINT8, (1,), [-INT4_LOW])
    nodes = [
        operator("Cast", (f"{name}_scales",), (f"{name}_scales_float",), to=TensorProto.FLOAT),
        operator("Reshape", (f"{name}_scales_float", f"{whole}_as_steps"), (f"{name}_steps",)),
        operator("Shape", (f"{name}_steps",), (f"{name}_groups",)),
        operator("ConstantOfShape", (f"{name}_groups",), (f"{name}_zeros",), value=eight),
        operator("Reshape", (name, f"{whole}_as_groups"), (f"{name}_bytes",)),
        operator("BitwiseAnd", (f"{name}_bytes", f"{whole}_fifteen"), (f"{name}_low",)),
        operator("BitShift", (f"{name}_bytes", f"{whole}_four"), (f"{name}_high",), direction="RIGHT"),
    ]
    for one in ("low", "high"):
        opened = (f"{name}_{one}", f"{name}_steps", f"{name}_zeros")
        nodes.append(operator("DequantizeLinear", opened, (f"{name}_{one}_values",), axis=0))
        nodes.append(operator("Reshape", (f"{name}_{one}_values", f"{whole}_as_halves"), (f"{name}_{one}_rows",)))
    nodes.append(operator("Gemm", (f"{whole}_evens", f"{name}_low_rows"), (f"{name}_half",), transB=1))
    nodes.append(operator("Gemm", (f"{whole}_odds", f"{name}_high_rows", f"{name}_half"), (output,), transB=1))
    return nodes


def constant_tensor(value: Any, name: str) -> TensorProto:
    """Return a constant."""
    return numpy_helper.from_array(np.asarray(value), name)
