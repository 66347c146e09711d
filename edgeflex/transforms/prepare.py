"""A dynamic model and a precision per layer become modules ready to export.

The prepared segments are at once the export source and the reference: the same scales, the same rounding.
Static int8 is written as explicit quantise and dequantise nodes around each operation, which is the form
that XNNPACK's partitioner takes whole (one delegate a segment, and full control of which layer is what;
the stock quantiser cannot choose per convolution).
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx, nn
from torch.nn import functional

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.schema import Precision
from edgeflex.transforms.quantize import QuantizedWeight, activation_grid, quantize_weight

if TYPE_CHECKING:
    from edgeflex.models import DynamicModel

Ranges = Mapping[str, tuple[float, float]]

# Operations that XNNPACK also runs on int8, so that a chain of int8 layers is not broken by them.
_ARITHMETIC = {operator.add, torch.add, operator.iadd}
_JOINS = {torch.cat, torch.concat, torch.concatenate}
_SAME_GRID = {
    torch.flatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
    functional.pad,
    functional.max_pool2d,
}
_SAME_GRID_METHODS = {"view", "reshape", "flatten", "permute", "transpose", "contiguous"}
_SAME_GRID_MODULES = (nn.Flatten, nn.MaxPool2d, nn.Identity, nn.Dropout)
_POOL_MODULES = (nn.AdaptiveAvgPool2d,)
_POOLS = {functional.adaptive_avg_pool2d, functional.avg_pool2d, torch.mean}
_RELUS = {functional.relu, torch.relu}
# What XNNPACK runs with activations that are rounded row by row.
_DYNAMIC = {Precision.INT8_DYNAMIC, Precision.INT4_CHANNEL, Precision.INT4_GROUP32}


@dataclass(frozen=True)
class PreparedModel:
    """Modules ready to export: segment k maps [n, ...] to (activations, probabilities).

    The last segment returns probabilities [n, classes] alone. ``examples`` holds an input [1, ...] of each
    segment; where int8 layers meet at a cut, activations are handed over as the int8 values themselves.
    """

    segments: tuple[nn.Module, ...]
    precisions: Mapping[str, Precision]
    examples: tuple[torch.Tensor, ...]


class StaticLayer(nn.Module):
    """A convolution or linear layer with int8 weights, dequantised in the graph for the backend to fuse."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight: QuantizedWeight) -> None:
        super().__init__()
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", torch.zeros(len(weight.scales), dtype=torch.int64))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.geometry: tuple[Any, ...] | None = None
        if isinstance(layer, nn.Conv2d):
            self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to dequantised activations."""
        ops = torch.ops.quantized_decomposed
        weight = ops.dequantize_per_channel(self.values, self.scales, self.zeros, 0, -127, 127, torch.int8)
        if self.geometry is None:
            return functional.linear(x, weight, self.bias)
        return functional.conv2d(x, weight, self.bias, *self.geometry)


class WithProbabilities(nn.Module):
    """A segment that ends in probabilities, so that the host compares one number with a threshold."""

    def __init__(self, body: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.body = body
        self.last = last

    def forward(self, x: torch.Tensor) -> Any:
        """Return (activations, probabilities), or probabilities alone at the end."""
        if self.last:
            return torch.softmax(self.body(x), dim=-1)
        activations, logits = self.body(x)
        return activations, torch.softmax(logits, dim=-1)


class _RangeRecorder(fx.Interpreter):
    """Runs a segment and widens the range of every tensor that it sees."""

    def __init__(self, module: fx.GraphModule, segment: int, ranges: dict[str, tuple[float, float]]) -> None:
        super().__init__(module)
        self.segment = segment
        self.ranges = ranges

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note its range."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            key = f"{self.segment}:{n.name}"
            low, high = self.ranges.get(key, (0.0, 0.0))
            self.ranges[key] = (min(low, float(value.min())), max(high, float(value.max())))
        return value


def record_ranges(model: DynamicModel, batches: Iterable[torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Return the least and greatest value of every tensor over ``batches`` of [n, ...] inputs.

    Keys are ``segment:node``; static int8 takes its activation grids from here.
    """
    ranges: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for batch in batches:
            x = batch
            for index, segment in enumerate(model.segments):
                value = _RangeRecorder(segment, index, ranges).run(x)
                x = value[0] if isinstance(value, tuple) else value
    return ranges


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.ReLU)
    return (node.op == "call_function" and node.target in _RELUS) or (
        node.op == "call_method" and node.target == "relu"
    )


def _keeps_grid(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _SAME_GRID_MODULES)
    if node.op == "call_method":
        return node.target in _SAME_GRID_METHODS
    return node.op == "call_function" and node.target in _SAME_GRID


def _takes_int8(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Say whether an operation without weights has an int8 kernel."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _POOL_MODULES) or _keeps_grid(node, modules)
    if node.op == "call_function" and node.target in _ARITHMETIC | _POOLS | _JOINS:
        return True
    return _keeps_grid(node, modules)


def _tail(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """Return the node after which the value is rounded: a sole following ReLU belongs to the operation."""
    users = list(node.users)
    return users[0] if len(users) == 1 and _is_relu(users[0], modules) else node


def _int8_values(graph: fx.Graph, modules: Mapping[str, nn.Module], static: set[str]) -> dict[fx.Node, fx.Node]:
    """Return the values that travel as int8, each with the node whose grid it uses."""
    carried: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and any(user.op == "call_module" and user.target in static for user in node.users):
            # rounded for the layer anyway; left float for a residual branch, it would keep every later sum float
            carried[node] = node
        elif node.op == "call_module" and node.target in static:
            carried[_tail(node, modules)] = _tail(node, modules)
        elif node not in carried and _takes_int8(node, modules):
            inputs = [source for source in node.all_input_nodes if source.op != "get_attr"]
            if not inputs or not all(source in carried for source in inputs):
                continue
            if node.target in _JOINS:
                _share_grid(carried, node, inputs)
            else:
                tail = node if _keeps_grid(node, modules) else _tail(node, modules)
                carried[tail] = carried[inputs[0]] if _keeps_grid(node, modules) else tail
    return carried


def _share_grid(carried: dict[fx.Node, fx.Node], join: fx.Node, inputs: list[fx.Node]) -> None:
    """Put everything that a concatenation joins on its own grid: its kernel copies integers, whatever they mean."""
    shared = {carried[source] for source in inputs}
    carried[join] = join
    for node, grid_of in carried.items():
        if grid_of in shared:
            carried[node] = join


def range_of(ranges: Ranges, segment: int, node: str) -> tuple[float, float]:
    """Return the range that was recorded for a node.

    Raises:
        InputError: None was, or it is endless.
    """
    key = f"{segment}:{node}"
    if key not in ranges:
        raise InputError(
            f"no activation range was recorded for {key!r}. Calibrate this very model: edgeflex calibrate."
        )
    low, high = ranges[key]
    if not math.isfinite(high - low):
        raise InputError(
            f"the activations of {key!r} reached {low:g} to {high:g} on the calibration images, which no 8-bit grid "
            "covers. Check the weights, or write that operation without infinity."
        )
    return low, high


class StaticRewrite:
    """Puts quantise and dequantise nodes around the int8 part of one segment.

    What a node is quantised by, and on which grid, is the backend's: here XNNPACK's, asymmetric.
    """

    quantize: Callable[..., Any] = torch.ops.quantized_decomposed.quantize_per_tensor.default
    dequantize: Callable[..., Any] = torch.ops.quantized_decomposed.dequantize_per_tensor.default

    def __init__(self, module: fx.GraphModule, segment: int, static: set[str], ranges: Ranges) -> None:
        self.module = module
        self.graph = module.graph
        self.segment = segment
        self.static = static
        self.ranges = ranges
        self.modules = dict(module.named_modules())
        self.sharing: dict[fx.Node, list[fx.Node]] = {}

    def apply(self) -> None:
        """Rewrite the graph in place."""
        carried = _int8_values(self.graph, self.modules, self.static)
        for node, grid_of in carried.items():
            self.sharing.setdefault(grid_of, []).append(node)
        arithmetic = [node for node in self.graph.nodes if node.op == "call_module" and node.target in self.static]
        inputs = dict.fromkeys(node.all_input_nodes[0] for node in arithmetic)
        for node in inputs:
            if node in carried:
                continue
            readers = [user for user in node.users if user in arithmetic]
            self._round(node, node, readers)
        for node, grid_of in carried.items():
            self._round(node, grid_of, list(node.users))
        self.graph.lint()
        self.module.recompile()

    def grid(self, low: float, high: float) -> tuple[Any, ...]:
        """Return the arguments of ``quantize`` and ``dequantize`` that cover ``low`` to ``high``."""
        scale, zero_point = activation_grid(low, high)
        return scale, zero_point, -128, 127, torch.int8

    def _grid_of(self, node: fx.Node) -> tuple[Any, ...]:
        """Return the grid of a node: it covers everything that lives on it."""
        members = dict.fromkeys((node, *self.sharing.get(node, ())))
        found = [range_of(self.ranges, self.segment, member.name) for member in members]
        return self.grid(min(low for low, _ in found), max(high for _, high in found))

    def _round(self, node: fx.Node, grid_of: fx.Node, readers: list[fx.Node]) -> None:
        grid = self._grid_of(grid_of)
        with self.graph.inserting_after(node):
            rounded = self.graph.call_function(self.quantize, (node, *grid))
        for reader in readers:
            # one dequantise a reader: the backend fuses each with its own operation
            with self.graph.inserting_before(reader):
                restored = self.graph.call_function(self.dequantize, (rounded, *grid))
            reader.replace_input_with(node, restored)


def _dynamic_linear(layer: nn.Linear, precision: Precision) -> nn.Linear:
    """Return ``layer`` with our integers in torchao's tensor, whose form XNNPACK's partitioner knows."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    quantized = quantize_weight(layer.weight, precision)
    bits4 = precision.bits == 4
    scales = quantized.scales if quantized.group_size else quantized.scales.reshape(-1, 1)
    tensor = IntxUnpackedToInt8Tensor(
        qdata=quantized.values,
        scale=scales,
        zero_point=torch.zeros_like(scales, dtype=torch.int8),
        target_dtype=torch.int4 if bits4 else torch.int8,  # type: ignore[attr-defined]
        block_size=(1, quantized.group_size or layer.in_features),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
    replaced = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    replaced.weight = nn.Parameter(tensor, requires_grad=False)
    if layer.bias is not None:
        replaced.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return replaced


def prepare_segment(
    segment: fx.GraphModule, index: int, precisions: Mapping[str, Precision], ranges: Ranges
) -> fx.GraphModule:
    """Return a copy of one segment in the given precisions; layers not named stay fp32.

    Raises:
        UnsupportedError: A precision does not exist for the kind of its layer.
        InputError: A static layer has no recorded activation range.
    """
    prepared = copy.deepcopy(segment)
    modules = dict(prepared.named_modules())
    targets = {str(node.target) for node in prepared.graph.nodes if node.op == "call_module"}
    static: set[str] = set()
    for name, precision in precisions.items():
        if name not in targets or precision is Precision.FP32:
            continue
        layer = modules[name]
        if precision is Precision.INT8_STATIC and isinstance(layer, nn.Conv2d | nn.Linear):
            static.add(name)
        elif isinstance(layer, nn.Linear) and precision in _DYNAMIC:
            prepared.set_submodule(name, _dynamic_linear(layer, precision))
        else:
            raise UnsupportedError(
                f"layer {name!r} is a {type(layer).__name__}; {precision.value} does not exist for it. "
                "Plan again with the capabilities of this backend."
            )
    if static:
        StaticRewrite(prepared, index, static, ranges).apply()
    for name in static:
        layer = modules[name]
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = quantize_weight(layer.weight, Precision.INT8_STATIC)
            prepared.set_submodule(name, StaticLayer(layer, weight))
    prepared.recompile()
    return prepared.eval()


class _Lone(nn.Module):
    """One layer in a graph of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return self.layer(x)


def quantized_layer(layer: nn.Module, precision: Precision) -> nn.Module:
    """Return ``layer`` alone in ``precision``, float at both ends, for measuring its kernel."""
    if precision is Precision.FP16:
        return layer.half()
    traced = fx.symbolic_trace(_Lone(layer).eval())
    ranges = {f"0:{node.name}": (-4.0, 4.0) for node in traced.graph.nodes}
    return prepare_segment(traced, 0, {"layer": precision}, ranges)


def prepare(model: DynamicModel, precisions: Mapping[str, Precision], ranges: Ranges) -> PreparedModel:
    """Return the model's segments in the given precisions, each ending in probabilities.

    Raises:
        InputError: ``precisions`` names a layer that the model lacks, or a range is missing.
        UnsupportedError: A precision does not exist for the kind of its layer.
    """
    require_known(model, precisions)
    bodies = [prepare_segment(segment, index, precisions, ranges) for index, segment in enumerate(model.segments)]
    for earlier, later in pairwise(bodies):
        _hand_over(earlier, later)
    return finish(model, bodies, precisions)


def require_known(model: DynamicModel, precisions: Mapping[str, Precision]) -> None:
    """Refuse names of layers that the model lacks.

    Raises:
        InputError: There are such names.
    """
    known = {layer.name for layer in model.graph.layers}
    if unknown := sorted(set(precisions) - known):
        raise InputError(f"the model has no layer {', '.join(unknown[:5])}. Plan again for this model.")


def finish(model: DynamicModel, bodies: Sequence[fx.GraphModule], precisions: Mapping[str, Precision]) -> PreparedModel:
    """Return segments that end in logits as a prepared model, whose segments end in probabilities."""
    last = len(bodies) - 1
    segments = tuple(WithProbabilities(body, last=index == last).eval() for index, body in enumerate(bodies))
    chosen = {layer.name: precisions.get(layer.name, Precision.FP32) for layer in model.graph.layers}
    return PreparedModel(segments, chosen, _examples(segments, model.graph.input_shape))


def _hand_over(earlier: fx.GraphModule, later: fx.GraphModule) -> None:
    """Let int8 activations cross a cut as they are, if both sides have them in int8.

    Restoring floats on one side only to round them again on the other would cost two passes over the map.
    """
    ops = torch.ops.quantized_decomposed
    result = next(node for node in earlier.graph.nodes if node.op == "output")
    features, logits = result.args[0]
    entry = next(node for node in later.graph.nodes if node.op == "placeholder")
    readers = list(entry.users)
    restored = features.op == "call_function" and features.target is ops.dequantize_per_tensor.default
    rounded = len(readers) == 1 and readers[0].target is ops.quantize_per_tensor.default
    if not (restored and rounded) or tuple(features.args[1:]) != tuple(readers[0].args[1:]):
        return  # a later concatenation or pool fixes a grid of its own; only equal grids may cross as integers
    values, *grid = features.args
    result.args = ((values, logits),)
    earlier.graph.eliminate_dead_code()
    for user in list(readers[0].users):
        user.args = (entry, *grid)
    later.graph.eliminate_dead_code()
    earlier.recompile()
    later.recompile()


def _examples(segments: tuple[nn.Module, ...], input_shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Return an input [1, ...] of each segment."""
    x = torch.zeros(1, *input_shape)
    found = [x]
    with torch.no_grad():
        for segment in segments[:-1]:
            x = segment(x)[0]
            found.append(x)
    return tuple(found)


def outputs(prepared: PreparedModel, images: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """Return the probabilities [n, exits, classes] that the prepared model gives at every exit."""
    rows = []
    with torch.no_grad():
        for start in range(0, len(images), batch):
            x = images[start : start + batch]
            exits = []
            for segment in prepared.segments[:-1]:
                x, probabilities = segment(x)
                exits.append(probabilities)
            exits.append(prepared.segments[-1](x))
            rows.append(torch.stack(exits, dim=1))
    return torch.cat(rows)
