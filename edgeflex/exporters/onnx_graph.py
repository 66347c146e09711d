"""From a prepared segment to an ONNX graph.

What lies between the layers (activations, pooling, attention's products, reshapes) is exported by torch once, as a
*skeleton* that holds no layer: each layer is one node ``edgeflex::Layer``, and each way that a float tensor takes from
one operation to the next passes one node ``edgeflex::Edge``. The skeleton is the same for every choice of precisions,
so that calibration, which writes tens of mixes, exports once. Filling it in (``fill``) is plain data: an edge becomes
nothing or a quantise-dequantise pair, a layer becomes its convolution or product with the very numbers that the
prepared module computes with.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import fx, nn

from edgeflex.errors import UnsupportedError
from edgeflex.exporters.executorch import quiet_exporter
from edgeflex.schema import Precision
from edgeflex.transforms.explicit import ExplicitLayer, geometry_of, is_rounding, rounded_source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Shapes = Mapping[str, tuple[int, ...]]

INPUT, ACTIVATIONS, PROBABILITIES = "x", "activations", "probabilities"
# Opset 20 is the newest that every TensorRT from 10.3 on reads; int4 came with 21. IR 10 is what both belong to.
OPSET, INT4_OPSET, IR_VERSION = 20, 21, 10
_DOMAIN = "edgeflex"
_LAYER, _EDGE = "Layer", "Edge"
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_INT8, _INT4, _FP8 = ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN
_ZEROS = {_INT8: np.int8, _FP8: ml_dtypes.float8_e4m3fn}


# --- the skeleton ------------------------------------------------------------------------------------------


def _edge(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.onnx.ops.symbolic(f"{_DOMAIN}::{_EDGE}", (x,), {"of": name}, dtype=x.dtype, shape=x.shape, version=1)


def _layer(x: torch.Tensor, name: str, shape: Sequence[int]) -> torch.Tensor:
    return torch.onnx.ops.symbolic(f"{_DOMAIN}::{_LAYER}", (x,), {"of": name}, dtype=x.dtype, shape=shape, version=1)


def _edge_name(source: fx.Node, reader: fx.Node) -> str:
    return f"{source.name}>{reader.name}"


class _ShapeRecorder(fx.Interpreter):
    """Runs a segment and notes the shape of every float tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            self.shapes[n.name] = tuple(value.shape)
        return value


def _shapes(body: fx.GraphModule, example: torch.Tensor) -> dict[str, tuple[int, ...]]:
    recorder = _ShapeRecorder(body)
    with torch.no_grad():
        recorder.run(example)
    return recorder.shapes


def _layer_of(body: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the layer that a node calls, or None if it calls something without a precision."""
    module = body.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, nn.Conv2d | nn.Linear | ExplicitLayer) else None


def _skeleton_module(body: fx.GraphModule, shapes: Shapes) -> fx.GraphModule:
    """Return the segment with marks for its layers and edges, ending in probabilities."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        if is_rounding(node):
            continue
        marks: dict[fx.Node, fx.Node] = {}

        def through(argument: fx.Node, reader: fx.Node = node, marks: dict[fx.Node, fx.Node] = marks) -> fx.Node:
            source, _ = rounded_source(argument)
            if source.name not in shapes:
                return copied[source]
            if source not in marks:
                marks[source] = graph.call_function(_edge, (copied[source], _edge_name(source, reader)))
            return marks[source]

        if node.op == "output":
            result: Any = fx.map_arg(node.args[0], through)
            *features, logits = result if isinstance(result, tuple) else (result,)
            graph.output((*features, graph.call_function(torch.softmax, (logits, -1))))
        elif _layer_of(body, node) is not None:
            x = through(node.all_input_nodes[0])
            copied[node] = graph.call_function(_layer, (x, str(node.target), shapes[node.name]))
        else:
            copied[node] = graph.node_copy(node, through)
    return fx.GraphModule(body, graph).eval()


def _refuse_in_place(body: fx.GraphModule) -> None:
    """Refuse an operation that changes a value which another reads later: a graph cannot say that."""
    order = {node: index for index, node in enumerate(body.graph.nodes)}
    for node in body.graph.nodes:
        changes = bool(node.kwargs.get("inplace")) or (node.op == "call_method" and str(node.target).endswith("_"))
        if node.op == "call_module":
            module = body.get_submodule(str(node.target))
            changes = bool(getattr(module, "inplace", False)) and not isinstance(module, nn.Dropout)
        for source in node.all_input_nodes[:1] if changes else ():
            if late := [user.name for user in source.users if order[user] > order[node]]:
                raise UnsupportedError(
                    f"{node.name!r} changes {source.name!r} in place, which {', '.join(late)} reads afterwards. "
                    "Pass inplace=False to that operation."
                )


def _digest(module: fx.GraphModule, example: torch.Tensor) -> str:
    """Return what two skeletons must share to be the same graph, within one process."""
    digest = hashlib.sha256(f"{tuple(example.shape)}\n".encode())
    for node in module.graph.nodes:
        digest.update(f"{node.name} {node.op} {node.target!r} {node.args} {node.kwargs}\n".encode())
    for name, part in sorted(module.named_modules()):
        plain = sorted((key, repr(value)) for key, value in vars(part).items() if not key.startswith("_"))
        digest.update(f"{name} {type(part).__qualname__} {plain if name else ''}\n".encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _exported(module: fx.GraphModule, example: torch.Tensor, names: list[str], segment: str) -> bytes:
    with quiet_exporter():
        try:
            program = torch.export.export(module, (example,), strict=False)
            found = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=names,
                external_data=False,
                verbose=False,
            )
        except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines() or ["no reason given"]
            raise UnsupportedError(
                f"torch.onnx cannot export {segment}: {type(error).__name__}: {reason[0]} "
                "Leave the operation out of the model, or choose another target."
            ) from error
    if found is None:
        raise UnsupportedError(f"torch.onnx gave no program for {segment}. Choose another target.")
    proto: onnx.ModelProto = found.model_proto
    foreign = sorted(
        {f"{node.domain}::{node.op_type}" for node in proto.graph.node if node.domain not in {"", _DOMAIN}}
    )
    if foreign or proto.functions:
        raise UnsupportedError(
            f"{segment} needs operators that are not ONNX's own: {', '.join(foreign) or 'local functions'}. "
            "Leave the operation out of the model, or choose another target."
        )
    return proto.SerializeToString(deterministic=True)


class Skeletons:
    """Skeletons that were exported already; the oldest leave when there are too many."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._kept: dict[str, bytes] = {}

    def get(self, body: fx.GraphModule, example: torch.Tensor, *, segment: str) -> onnx.ModelProto:
        """Return the skeleton of a prepared segment that ends in logits.

        Args:
            body: The segment; its roundings and the numbers of its layers do not matter.
            example: An input [1, ...].
            segment: Its name, for messages.

        Raises:
            UnsupportedError: torch.onnx cannot export it, or not in ONNX's own operators.
        """
        _refuse_in_place(body)
        module = _skeleton_module(body, _shapes(body, example))
        result = next(node for node in module.graph.nodes if node.op == "output")
        names = [ACTIVATIONS, PROBABILITIES] if len(result.all_input_nodes) > 1 else [PROBABILITIES]
        key = _digest(module, example)
        if key not in self._kept:
            self._kept[key] = _exported(module, example, names, segment)
            while len(self._kept) > self._limit:
                del self._kept[next(iter(self._kept))]
        return onnx.ModelProto.FromString(self._kept[key])


# --- filling it in -------------------------------------------------------------------------------------------


def fill(skeleton: onnx.ModelProto, body: fx.GraphModule, name: str) -> ir.Model:
    """Return the graph of a prepared segment: ``skeleton`` with its layers and roundings.

    Args:
        skeleton: What ``Skeletons.get`` returned for this segment.
        body: The prepared segment.
        name: Of the graph.
    """
    model = ir.from_proto(skeleton)
    filling = _Filling(model.graph, body)
    for node in list(model.graph):
        if node.domain == _DOMAIN:
            filling.replace(node)
    filling.remove_unused()
    int4 = any(value.dtype is _INT4 for value in model.graph.initializers.values())
    model.opset_imports.clear()
    model.opset_imports[""] = INT4_OPSET if int4 else OPSET
    model.ir_version = IR_VERSION
    model.graph.name = name
    return model


def add_confidence(model: ir.Model) -> None:
    """Give a segment's graph a third output ``confidence`` float [1]: the largest probability.

    A host that runs the graph elsewhere decides on an exit by these four bytes.
    """
    probabilities = next(value for value in model.graph.outputs if value.name == "probabilities")
    axes = ir.Value(name="confidence_axes", const_value=ir.tensor([1], dtype=ir.DataType.INT64, name="confidence_axes"))
    axes.shape, axes.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
    model.graph.initializers["confidence_axes"] = axes
    node = ir.node("ReduceMax", [probabilities, axes], {"keepdims": 0}, name="confidence")
    (confidence,) = node.outputs
    confidence.name, confidence.shape = "confidence", ir.Shape([1])
    confidence.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(node)
    model.graph.outputs.append(confidence)


@dataclass(frozen=True)
class _Numbers:
    """A grid of activations."""

    kind: ir.DataType
    scale: float
    half: bool


class _Filling:
    """Replaces marks, node by node in the order of the graph; what was made for one reader serves the next."""

    def __init__(self, graph: ir.Graph, body: fx.GraphModule) -> None:
        self.graph = graph
        self.body = body
        self.roundings = _roundings(body.graph)
        self.made: dict[tuple[int, object], ir.Value] = {}
        self.taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)

    def replace(self, node: ir.Node) -> None:
        """Put what a mark stands for in its place."""
        of = node.attributes["of"].as_string()
        x = node.inputs[0]
        if x is None:
            raise UnsupportedError(f"the mark of {of!r} lost its input. Report the model.")
        made = self._layer(node, of, x) if node.op_type == _LAYER else self._edge(node, of, x)
        old = node.outputs[0]
        is_result, name = old.is_graph_output(), old.name
        if is_result and (made.is_graph_input() or made.is_graph_output() or made.producer() is None):
            made = self._add(node, "Identity", [made], f"{name}.copy")
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        if is_result:
            made.name, made.type, made.shape = name, old.type, old.shape

    def remove_unused(self) -> None:
        """Remove initialisers that nothing reads, and operations without readers."""
        for node in reversed(list(self.graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    # --- pieces

    def _fresh(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self.taken:
            candidate, number = f"{name}.{number}", number + 1
        self.taken.add(candidate)
        return candidate

    def _add(self, before: ir.Node, kind: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        fresh = self._fresh(name)
        node = ir.node(kind, inputs, attributes, name=fresh)
        node.outputs[0].name = fresh
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        fresh = self._fresh(name)
        tensor = ir.Tensor(array, name=fresh)
        value = ir.Value(name=fresh, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _zero(self, kind: ir.DataType) -> ir.Value:
        """Return the zero point of a grid, without which QuantizeLinear would mean uint8."""
        key = (0, kind)
        if key not in self.made:
            self.made[key] = self._constant(f"zero.{kind.name.lower()}", np.zeros((), _ZEROS[kind]))
        return self.made[key]

    def _rounded(self, before: ir.Node, x: ir.Value, base: str, numbers: _Numbers) -> ir.Value:
        """Return ``x`` on a grid and back; all readers of a tensor share one pair."""
        key = (id(x), numbers)
        if key not in self.made:
            kind = np.float16 if numbers.half else np.float32
            scale = self._constant(f"{base}.scale", np.asarray(numbers.scale, kind))
            grid = [scale, self._zero(numbers.kind)]
            steps = self._add(before, "QuantizeLinear", [x, *grid], f"{base}.q")
            self.made[key] = self._add(before, "DequantizeLinear", [steps, *grid], f"{base}.dq")
        return self.made[key]

    def _as_half(self, before: ir.Node, x: ir.Value) -> ir.Value:
        key = (id(x), _HALF)
        if key not in self.made:
            self.made[key] = self._add(before, "Cast", [x], f"{x.name}.half", to=int(_HALF))
        return self.made[key]

    def _edge(self, node: ir.Node, of: str, x: ir.Value) -> ir.Value:
        scale = self.roundings.get(of)
        if scale is None:
            return x
        return self._rounded(node, x, of.partition(">")[0], _Numbers(_INT8, scale, half=False))

    # --- layers

    def _layer(self, node: ir.Node, name: str, x: ir.Value) -> ir.Value:
        layer = self.body.get_submodule(name)
        half = isinstance(layer, ExplicitLayer) and layer.half_precision
        if half:
            x = self._as_half(node, x)
        if isinstance(layer, ExplicitLayer) and layer.activation_scale is not None:
            x = self._rounded(node, x, f"{x.name}.fp8", _Numbers(_FP8, layer.activation_scale, half))
        weight = self._weight(node, name, layer)
        bias = layer.bias
        constant = None
        if isinstance(bias, torch.Tensor):
            constant = self._constant(f"{name}.bias", _array(bias, half=half))
        y = self._product(node, name, layer, x, weight, constant)
        return self._add(node, "Cast", [y], f"{name}.float", to=int(_FLOAT)) if half else y

    def _product(
        self, node: ir.Node, name: str, layer: nn.Module, x: ir.Value, weight: ir.Value, bias: ir.Value | None
    ) -> ir.Value:
        way = geometry_of(layer)
        if way is None:
            y = self._add(node, "MatMul", [x, weight], f"{name}.y" if bias else name)
            return self._add(node, "Add", [y, bias], name) if bias else y
        attributes = {
            "strides": way.stride,
            "pads": (*way.padding, *way.padding),
            "dilations": way.dilation,
            "group": way.groups,
        }
        return self._add(node, "Conv", [x, weight, *([bias] if bias else [])], name, **attributes)

    def _weight(self, node: ir.Node, name: str, layer: nn.Module) -> ir.Value:
        """Return the weight as its operation reads it: [out, in, ...] of a convolution, [in, out] of a product."""
        turned = geometry_of(layer) is None
        if not isinstance(layer, ExplicitLayer) or layer.stored is None:
            weight = _parameter(layer, name)
            half = isinstance(layer, ExplicitLayer)
            return self._constant(f"{name}.weight", _array(weight.T if turned else weight, half=half))
        stored = layer.stored
        codes = stored.values.T if turned else stored.values
        inputs = [self._constant(f"{name}.weight", _codes(codes, layer.precision))]
        scales = _array(stored.scales, half=stored.half)
        attributes: dict[str, int] = {}
        if stored.group_size is not None:
            scales = np.ascontiguousarray(scales.T)
            attributes = {"axis": 0, "block_size": stored.group_size}
        elif layer.precision is Precision.FP8:
            scales = scales.reshape(())
        else:
            attributes = {"axis": 1 if turned else 0}
        inputs.append(self._constant(f"{name}.weight.scale", scales))
        if layer.precision is Precision.FP8:
            inputs.append(self._zero(_FP8))
        return self._add(node, "DequantizeLinear", inputs, f"{name}.weight.dq", **attributes)


def _roundings(graph: fx.Graph) -> dict[str, float]:
    """Return the int8 scale of each edge that is rounded, by the edge's name."""
    found: dict[str, float] = {}
    for reader in graph.nodes:
        if is_rounding(reader):
            continue
        for argument in reader.all_input_nodes:
            source, scale = rounded_source(argument)
            if scale is not None:
                found[_edge_name(source, reader)] = scale
    return found


def _parameter(layer: nn.Module, name: str) -> torch.Tensor:
    weight = layer.weight
    if not isinstance(weight, torch.Tensor):
        raise UnsupportedError(f"layer {name!r} has no weight. Report the model.")
    return weight


def _array(values: torch.Tensor, *, half: bool) -> NDArray[Any]:
    array = values.detach().contiguous().numpy()
    return array.astype(np.float16) if half else array.astype(np.float32)


def _codes(values: torch.Tensor, precision: Precision) -> NDArray[Any]:
    """Return codes in the type that is stored; int4 becomes two codes a byte when it is written."""
    values = values.detach().contiguous()
    if precision is Precision.FP8:
        return values.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return values.numpy().astype(ml_dtypes.int4) if precision.bits == 4 else values.numpy()


# --- files -----------------------------------------------------------------------------------------------------


def serialise(model: ir.Model, location: str) -> tuple[bytes, bytes]:
    """Return the bytes of the ``.onnx`` and of the file beside it that holds the weights.

    Scalars and shapes stay in the ``.onnx``, where shape inference reads them. Nothing in it tells when, where or from
    which source lines it was made, so that equal models are equal bytes.

    Args:
        model: What ``fill`` returned.
        location: Name of the second file.
    """
    data = bytearray()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype is ir.DataType.INT64 or len(tensor.shape) == 0:
            continue
        data.extend(bytes(-len(data) % 16))
        raw = tensor.tobytes()
        value.const_value = ir.ExternalTensor(
            location, len(data), len(raw), tensor.dtype, shape=tensor.shape, name=name or ""
        )
        data.extend(raw)
    proto = ir.to_proto(model)
    _strip(proto)
    return proto.SerializeToString(deterministic=True), bytes(data)


def _strip(proto: onnx.ModelProto) -> None:
    """Remove names of places, source lines and versions, and what shape inference finds again."""
    graph = proto.graph
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output, graph, proto):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    graph.ClearField("value_info")
    proto.ClearField("producer_version")
    proto.producer_name = "edgeflex"
