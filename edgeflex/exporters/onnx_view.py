"""An ONNX graph as the lint asks about it: who makes a name, who reads it, which constants there are, of which type.

Weights are never read: only shapes, types and where external data lies; scales and zero points are, each by itself.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, external_data_helper, numpy_helper, shape_inference

from edgeflex.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

# Types that TensorRT calls quantised: there is no arithmetic on them, only Q/DQ.
INTEGER_CODES = frozenset({TensorProto.INT8, TensorProto.INT4})
FLOAT_CODES = frozenset({TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1})
QUANTIZED = INTEGER_CODES | FLOAT_CODES
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_DEFAULT_DOMAINS = frozenset({"", "ai.onnx"})
_HALF_BYTE = frozenset({TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1})


def type_name(data_type: int | None) -> str:
    """Return an ONNX type in words, ``float16`` or ``float8e4m3fn``."""
    if data_type is None or data_type not in TensorProto.DataType.values():
        return "unknown" if data_type is None else f"type {data_type}"
    return TensorProto.DataType.Name(data_type).lower()


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute, or ``default``."""
    for one in node.attribute:
        if one.name == name:
            return onnx.helper.get_attribute_value(one)
    return default


def integer(node: onnx.NodeProto, name: str, default: int) -> int:
    """Return the value of a node's attribute if it is one integer, else ``default``."""
    value = attribute(node, name, default)
    return value if isinstance(value, int) else default


def input_name(node: onnx.NodeProto, index: int) -> str:
    """Return the name of an input, empty where it is left out."""
    return node.input[index] if index < len(node.input) else ""


def in_default_domain(node: onnx.NodeProto) -> bool:
    """Say whether an operator is ONNX's own."""
    return node.domain in _DEFAULT_DOMAINS


def quantizes(node: onnx.NodeProto) -> bool:
    """Say whether a node goes from floats to codes; TensorRT's own names in domain ``trt`` count."""
    if node.domain == "trt":
        return node.op_type.endswith("QuantizeLinear") and "Dynamic" not in node.op_type
    return in_default_domain(node) and node.op_type == "QuantizeLinear"


def dequantizes(node: onnx.NodeProto) -> bool:
    """Say whether a node goes from codes to floats."""
    if node.domain == "trt":
        return node.op_type.endswith("DequantizeLinear")
    return in_default_domain(node) and node.op_type == "DequantizeLinear"


def label(node: onnx.NodeProto) -> str:
    """Return what a person finds the node by: its name, else what it makes."""
    return node.name or next((name for name in node.output if name), "") or f"({node.op_type})"


@dataclass(frozen=True)
class View:
    """A model with its look-ups.

    Attributes:
        model: The model, external data unread.
        folder: Where its external data lies; None where it is in memory alone.
        nodes: Of the main graph and of the graphs inside its nodes.
        function_nodes: Inside local functions.
        constants: Initialisers and Constant nodes by name.
        producers: The node that makes a name.
        consumers: The nodes that read a name.
        types: Element types by name, as far as they follow.
        shapes: Shapes by name, as far as they follow; an axis that is not fixed is -1.
    """

    model: onnx.ModelProto
    folder: Path | None
    nodes: tuple[onnx.NodeProto, ...]
    function_nodes: tuple[onnx.NodeProto, ...]
    constants: Mapping[str, TensorProto]
    producers: Mapping[str, onnx.NodeProto]
    consumers: Mapping[str, tuple[onnx.NodeProto, ...]]
    types: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    _read: dict[str, NDArray[Any] | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def opset(self) -> int | None:
        """The version of ONNX's own operators, or None where the model names none."""
        versions = [one.version for one in self.model.opset_import if one.domain in _DEFAULT_DOMAINS]
        return max(versions, default=None)

    @property
    def functions(self) -> frozenset[tuple[str, str]]:
        """Domain and name of the local functions."""
        return frozenset((one.domain, one.name) for one in self.model.functions)

    def source(self, name: str) -> TensorProto | None:
        """Return the constant that a name holds, also through a QuantizeLinear of one."""
        found = self.constants.get(name)
        producer = self.producers.get(name)
        if found is None and producer is not None and quantizes(producer):
            return self.constants.get(input_name(producer, 0))
        return found

    def array(self, name: str) -> NDArray[Any] | None:
        """Return a constant's values, or None where it is no constant or its data cannot be read."""
        if name not in self._read:
            self._read[name] = self._load(name)
        return self._read[name]

    def _load(self, name: str) -> NDArray[Any] | None:
        tensor = self.constants.get(name)
        if tensor is None:
            return None
        try:
            if external_data_helper.uses_external_data(tensor):
                if self.folder is None or place_of(tensor) is None:
                    return None
                loaded = TensorProto()
                loaded.CopyFrom(tensor)
                external_data_helper.load_external_data_for_tensor(loaded, str(self.folder))
                tensor = loaded
            return np.asarray(numpy_helper.to_array(tensor))
        except (OSError, ValueError, TypeError, KeyError, onnx.checker.ValidationError):
            return None  # the rule on external data says what is wrong


def stored_bytes(tensor: TensorProto) -> int | None:
    """Return the bytes that a tensor takes on disk, two 4-bit values sharing one; None for what is no number."""
    count = prod(tensor.dims)
    if tensor.data_type in _HALF_BYTE:
        return (count + 1) // 2
    try:
        return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Place:
    """Where external data lies: in which file beside or below, from which byte, how many; None where it is not said."""

    location: str
    offset: int
    length: int | None


def place_of(tensor: TensorProto) -> Place | None:
    """Return where a tensor's external data lies, or None where what is said makes no sense."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    numbers = [said.get("offset", "0"), said.get("length", "")]
    if not all(isinstance(text, str) and (text == "" or (text.isascii() and text.isdecimal())) for text in numbers):
        return None
    location = said.get("location", "")
    if not isinstance(location, str) or {"\\", "\0"} & set(location) or {"", ".", ".."} & set(location.split("/")):
        return None
    return Place(location, int(numbers[0] or 0), int(numbers[1]) if numbers[1] else None)


def view_of(model: onnx.ModelProto, folder: Path | None = None) -> View:
    """Return the look-ups of a model."""
    nodes = tuple(_nodes(model.graph))
    graphs = tuple(_graphs(model.graph))
    constants = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    for node in nodes:
        value = attribute(node, "value") if node.op_type == "Constant" else None
        if isinstance(value, TensorProto):
            constants.update(dict.fromkeys(node.output, value))
    types, shapes = _followed(model, constants)
    consumers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in dict.fromkeys(node.input):
            consumers[name].append(node)
    return View(
        model=model,
        folder=folder,
        nodes=nodes,
        function_nodes=tuple(node for function in model.functions for node in function.node),
        constants=constants,
        producers={name: node for node in nodes for name in node.output if name},
        consumers={name: tuple(found) for name, found in consumers.items()},
        types=types,
        shapes=shapes,
    )


def open_view(path: Path) -> View:
    """Return the look-ups of a file.

    Raises:
        InputError: It is absent or no ONNX model.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise InputError(f"ONNX graph {str(path)!r} does not exist. Check the path.") from None
    except Exception as error:  # noqa: BLE001 - protobuf's own errors share no base class across its versions
        raise InputError(f"{str(path)!r} is not an ONNX model ({type(error).__name__}). Export it again.") from None
    if not model.graph.node:
        raise InputError(f"{str(path)!r} is an ONNX model without a node. Export it again.")
    if not all(isinstance(text, str) for text in _texts(model)):
        raise InputError(f"{str(path)!r} holds names that are no text. Export it again.")
    return view_of(model, path.parent)


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    """Yield every name; protobuf hands out bytes where one is no text."""
    for function in model.functions:
        yield from (function.name, function.domain)
    for node in (*_nodes(model.graph), *(node for function in model.functions for node in function.node)):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (one.name for one in node.attribute)
    for graph in _graphs(model.graph):
        yield from (graph.name, *(one.name for one in (*graph.initializer, *graph.input, *graph.output)))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in _inner(node):
            yield from _graphs(inner)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for one in _graphs(graph):
        yield from one.node


def _inner(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    for one in node.attribute:
        if one.type == AttributeProto.GRAPH:
            yield one.g
        elif one.type == AttributeProto.GRAPHS:
            yield from one.graphs


def _followed(
    model: onnx.ModelProto, constants: Mapping[str, TensorProto]
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Return types and shapes by name."""
    try:
        inferred = shape_inference.infer_shapes(model)
    except Exception:  # noqa: BLE001 - inference is a help; a graph that it cannot follow is judged by what it says
        inferred = model
    types: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for graph in _graphs(inferred.graph):
        for value in (*graph.value_info, *graph.input, *graph.output):
            tensor = value.type.tensor_type
            if tensor.elem_type:
                types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                dims = tensor.shape.dim
                shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
    types.update({name: tensor.data_type for name, tensor in constants.items()})
    shapes.update({name: tuple(tensor.dims) for name, tensor in constants.items()})
    return types, shapes
