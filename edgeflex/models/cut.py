"""Cutting a network into condition-free segments.

A network is traced once with ``torch.fx``, its BatchNorms are folded into the convolutions before them, and
the graph is cut where exactly one tensor is alive. Every segment is an ``fx.GraphModule`` from one tensor
to one tensor, whose layers keep the names that they have in the whole network.
"""

from __future__ import annotations

import copy
import difflib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.schema import FormatEdge, Layer, LayerKind, LayerShape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FUNCTIONAL_WEIGHTS = {
    torch.nn.functional.linear,
    torch.nn.functional.conv2d,
    torch.nn.functional.conv1d,
    torch.conv2d,
    torch.conv1d,
    torch.addmm,
}
_ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.BatchNorm2d, nn.Dropout, nn.Identity)
_ELEMENTWISE_NAMES = {"relu", "relu_", "gelu", "silu", "hardswish", "dropout", "contiguous"}


@dataclass(frozen=True)
class Stage:
    """A place where the network can be cut: the end of the module ``name``.

    Attributes:
        name: Module name, as in ``named_modules``.
        node: Name of the graph node whose value is the only one alive there.
        mac_share: Share of all multiply-accumulates that are done by then, 0 to 1.
        output_shape: Shape of that value without the batch.
        natural: False right before a parameter-free elementwise operation, where a cut only splits a
            layer from its activation.
    """

    name: str
    node: str
    mac_share: float
    output_shape: tuple[int, ...]
    natural: bool


@dataclass(frozen=True)
class Traced:
    """A traced network in eval mode with shapes in its nodes' ``meta``."""

    graph_module: fx.GraphModule
    input_shape: tuple[int, ...]
    ends: Mapping[str, str]


def trace(module: nn.Module, input_shape: Sequence[int], *, fold: bool = True) -> Traced:
    """Return ``module`` as a graph; torch's own modules are leaves, everything else is traced through.

    Args:
        module: The network; it is copied, not changed.
        input_shape: Shape of one input without the batch.
        fold: Fold BatchNorm into the convolution or linear layer before it. The folded network is compared
            with the original on one input (relative 1e-4).

    Raises:
        UnsupportedError: The network cannot be traced, applies weights by function calls, or folding
            changed its outputs.
        InputError: The network does not take inputs of this shape.
    """
    source = copy.deepcopy(module).eval() if fold else module
    graph_module = _symbolic(source)
    example = _example(input_shape)
    expected = _run(source, example, input_shape)
    ends = _module_ends(graph_module)
    _refuse_functional_weights(graph_module)
    if fold:
        ends = _fold(graph_module, ends)
        _compare(graph_module, example, expected)
    _propagate(graph_module, example)
    return Traced(graph_module, tuple(input_shape), ends)


def stages(traced: Traced) -> tuple[Stage, ...]:
    """Return the clean cuts in execution order: module ends where exactly one tensor is alive.

    Cuts before the first or after the last layer with weights are left out. Of modules that end at the
    same place, the outermost comes first.
    """
    clean = _clean_nodes(traced.graph_module)
    shares = _mac_shares(traced.graph_module)
    position = {node.name: index for index, node in enumerate(traced.graph_module.graph.nodes)}
    nodes = {node.name: node for node in traced.graph_module.graph.nodes}
    found = [
        Stage(name, end, shares[end], _shape(nodes[end]), _natural(nodes[end]))
        for name, end in traced.ends.items()
        if end in clean and 0.0 < shares[end] < 1.0
    ]
    return tuple(sorted(found, key=lambda stage: (position[stage.node], stage.name.count("."), stage.name)))


def default_stages(available: Sequence[Stage], count: int) -> tuple[str, ...]:
    """Return ``count`` stage names, spread evenly over the multiply-accumulates.

    Raises:
        InputError: ``count`` is below 1 or there are fewer places to cut.
    """
    distinct: dict[str, Stage] = {}
    for stage in available:
        if stage.natural and len(stage.output_shape) > 1:
            distinct.setdefault(stage.node, stage)
    places = list(distinct.values())
    if not 1 <= count <= len(places):
        raise InputError(
            f"{count} exits were asked for; the network has {len(places)} places to cut. Name them with --stages."
        )
    chosen: list[Stage] = []
    for number in range(count):
        later = places[places.index(chosen[-1]) + 1 :] if chosen else places
        room = later[: len(later) - (count - number - 1)]
        goal = (number + 1) / (count + 1)
        chosen.append(min(room, key=lambda stage: abs(stage.mac_share - goal)))
    return tuple(stage.name for stage in chosen)


def check_stages(traced: Traced, names: Sequence[str]) -> tuple[Stage, ...]:
    """Return the stages called ``names``.

    Raises:
        InputError: Names are unknown (near ones are given), no clean cuts (with the reason), repeated, or
            out of order; all faults at once.
    """
    available = {stage.name: stage for stage in stages(traced)}
    faults = [_stage_fault(traced, name, available) for name in names if name not in available]
    if not names:
        faults = ["no stage is named"]
    if faults:
        raise InputError.collect("stages cannot be used", faults)
    chosen = tuple(available[name] for name in names)
    shares = [list(available).index(name) for name in names]
    if shares != sorted(shares) or len({stage.node for stage in chosen}) < len(chosen):
        raise InputError(f"stages {', '.join(names)} must be different places, in the order of execution.")
    return chosen


def cut(traced: Traced, stage_names: Sequence[str]) -> tuple[fx.GraphModule, ...]:
    """Return one graph per segment: up to each stage, and from the last stage to the output.

    Segments share their layers with ``traced``. With no names the whole network is one segment.

    Raises:
        InputError: As ``check_stages``.
    """
    boundaries = [stage.node for stage in check_stages(traced, stage_names)] if stage_names else []
    nodes = list(traced.graph_module.graph.nodes)
    output = nodes[-1].args[0]
    if not isinstance(output, fx.Node):
        raise UnsupportedError("the network returns several values; one tensor of logits is needed.")
    ends = [*boundaries, output.name]
    segments, start = [], None
    for end in ends:
        segments.append(_segment(traced.graph_module, nodes, start, end))
        start = end
    example = _example(traced.input_shape)
    for segment in segments:
        example = _propagate(segment, example)
    return tuple(segments)


def describe(
    segment: fx.GraphModule, number: int, *, head_prefix: str = ""
) -> tuple[tuple[Layer, ...], tuple[FormatEdge, ...]]:
    """Return layers and format edges of a segment whose nodes carry shapes (as ``cut`` leaves them).

    An edge goes from the layer whose precision decides a tensor's format to each layer that reads the
    tensor. Operations without weights stand in the format of the last layer that feeds them; what else
    they read crosses over to that format (the skip of a residual, say). Elements are those of the tensor
    that crosses, without the batch.

    Raises:
        UnsupportedError: A layer is of a kind or shape that the planner does not know.
    """
    layers: list[Layer] = []
    owner: dict[fx.Node, str] = {}
    rank: dict[str, int] = {"": -1}
    crossings: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for node in segment.graph.nodes:
        sources = [source for source in node.all_input_nodes if source in owner]
        if node.op == "placeholder":
            owner[node] = ""
            continue
        layer = _layer(segment, node, number, head_prefix)
        if layer is not None:
            layers.append(layer)
            rank[layer.name] = len(layers)
            target = layer.name
        elif node.op == "output":
            target = ""
        elif not sources:
            continue  # a constant
        else:
            target = max((owner[source] for source in sources), key=rank.__getitem__)
        for source in sources:
            if layer is not None or node.op == "output" or owner[source] != target:
                crossings[owner[source], target][source.name] = _elements(source)
        owner[node] = target
    edges = tuple(
        FormatEdge(source=source, target=target, segment=number, elements=sum(tensors.values()))
        for (source, target), tensors in crossings.items()
        if (source, target) != ("", "")
    )
    return tuple(layers), edges


def final_linear(segment: fx.GraphModule) -> str:
    """Return the name of the linear layer whose output is the segment's output.

    Raises:
        UnsupportedError: The network ends with something else.
    """
    last = list(segment.graph.nodes)[-1].args[0]
    if isinstance(last, fx.Node) and isinstance(_module_of(segment, last), nn.Linear):
        return str(last.target)
    raise UnsupportedError(f"the network ends with {last}; a Linear layer that gives the logits is needed.")


def propagate(segment: fx.GraphModule, example: Tensor) -> object:
    """Run ``example`` [1, …] through ``segment``, note every node's shape, and return the outputs."""
    return _propagate(segment, example)


# --- tracing and folding -------------------------------------------------------------------------------


def _symbolic(module: nn.Module) -> fx.GraphModule:
    tracer = fx.Tracer()
    try:
        graph = tracer.trace(module)
    except Exception as error:  # noqa: BLE001 - tracing runs the user's forward, which may raise anything
        raise UnsupportedError(
            f"the network cannot be traced by torch.fx: {str(error).splitlines()[0]} "
            "Its forward must not branch on values of tensors."
        ) from None
    return fx.GraphModule(tracer.root, graph)


def _example(input_shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *input_shape, generator=generator)


def _run(module: nn.Module, example: Tensor, input_shape: Sequence[int]) -> Tensor:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            out = module(example)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the network does not take inputs of shape {tuple(input_shape)}: {error}.") from None
    finally:
        for part in training:
            part.training = True
    if not isinstance(out, Tensor):
        raise UnsupportedError(f"the network returns a {type(out).__name__}; one tensor of logits is needed.")
    return out


def _module_ends(graph_module: fx.GraphModule) -> dict[str, str]:
    """Return, per module name, its last node."""
    ends: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        for key, value in (node.meta.get("nn_module_stack") or {}).items():
            name = value[0] if isinstance(value, tuple) else key
            if name:
                ends[str(name)] = node.name
        if node.op == "call_module":
            ends[str(node.target)] = node.name
    return ends


def _refuse_functional_weights(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node.target not in _FUNCTIONAL_WEIGHTS:
            continue
        raise UnsupportedError(
            f"node {node.name!r} applies weights by a function call ({_call_name(node)}); "
            "use an nn.Linear or nn.Conv2d module, so that the layer has a name and a precision."
        )


def _fold(graph_module: fx.GraphModule, ends: Mapping[str, str]) -> dict[str, str]:
    """Fold BatchNorms in place; return the module ends with the removed nodes replaced."""
    moved: dict[str, str] = {}
    for node in list(graph_module.graph.nodes):
        if not isinstance(_module_of(graph_module, node), (nn.BatchNorm1d, nn.BatchNorm2d)):
            continue
        before = node.args[0]
        fused = _fused(graph_module, before, node)
        if fused is None:
            continue
        _replace_module(graph_module, str(before.target), fused)
        node.replace_all_uses_with(before)
        graph_module.graph.erase_node(node)
        moved[node.name] = before.name
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return {name: moved.get(end, end) for name, end in ends.items()}


def _fused(graph_module: fx.GraphModule, before: fx.Node, norm_node: fx.Node) -> nn.Module | None:
    layer, norm = _module_of(graph_module, before), _module_of(graph_module, norm_node)
    if len(before.users) > 1 or norm is None or norm.running_mean is None:
        return None
    if sum(other.target == before.target for other in graph_module.graph.nodes) > 1:
        return None  # the layer is called again elsewhere, without this norm
    if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        return fuse_conv_bn_eval(layer, norm)
    if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d) and len(_raw_shape(before)) in {0, 2}:
        return fuse_linear_bn_eval(layer, norm)
    return None


def _compare(graph_module: fx.GraphModule, example: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        got = graph_module(example)
    off = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not off <= 1e-4:
        raise UnsupportedError(
            f"folding BatchNorm changed the outputs by {off:.1e} of their size; at most 1e-4 is accepted. "
            "Check the running statistics of the BatchNorm layers."
        )


def _propagate(graph_module: fx.GraphModule, example: Tensor) -> Tensor:
    with torch.no_grad():
        return ShapeProp(graph_module).propagate(example)


def _replace_module(graph_module: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(graph_module.get_submodule(parent), last, module)


# --- cutting ---------------------------------------------------------------------------------------------


def _clean_nodes(graph_module: fx.GraphModule) -> set[str]:
    """Return names of nodes after which their value alone is alive; constants never count."""
    nodes = list(graph_module.graph.nodes)
    constant = _constants(nodes)
    last_use = {node: max((nodes.index(user) for user in node.users), default=-1) for node in nodes}
    clean: set[str] = set()
    for index, node in enumerate(nodes):
        alive = [other for other in nodes[: index + 1] if last_use[other] > index and other not in constant]
        if alive == [node] and node.op in {"call_module", "call_function", "call_method"} and _shape(node):
            clean.add(node.name)
    return clean


def _constants(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return nodes that follow from parameters alone."""
    constant: set[fx.Node] = set()
    for node in nodes:
        computed = node.op in {"call_module", "call_function", "call_method"}
        if node.op == "get_attr" or (computed and all(source in constant for source in node.all_input_nodes)):
            constant.add(node)
    return constant


def _segment(root: fx.GraphModule, nodes: Sequence[fx.Node], start: str | None, end: str) -> fx.GraphModule:
    by_name = {node.name: node for node in nodes}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    if start is not None:
        copied[by_name[start]] = graph.placeholder("x")
    needed = _needed(by_name[end], by_name[start] if start is not None else None)
    for node in nodes:
        if node in needed:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[by_name[end]])
    graph.lint()
    return fx.GraphModule(root, graph)


def _needed(end: fx.Node, start: fx.Node | None) -> set[fx.Node]:
    """Return the nodes that ``end`` is computed from, back to but without ``start``."""
    needed, waiting = set[fx.Node](), [end]
    while waiting:
        node = waiting.pop()
        if node is not start and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return needed


def _stage_fault(traced: Traced, name: str, available: Mapping[str, Stage]) -> str:
    if name not in traced.ends:
        near = difflib.get_close_matches(name, available, n=3, cutoff=0.5) or list(available)[:5]
        return f"{name!r} is no module of the network; near or possible: {', '.join(near)}"
    share = _mac_shares(traced.graph_module)[traced.ends[name]]
    if traced.ends[name] in _clean_nodes(traced.graph_module) or share >= 1.0:
        side = "before the first" if share <= 0.0 else "after the last"
        return f"{name!r} ends {side} layer with weights, so a cut there would leave a segment empty"
    return f"{name!r} ends where more than one tensor is alive (inside a residual, say); cut around it"


def _natural(node: fx.Node) -> bool:
    users = list(node.users)
    if len(users) != 1:
        return True
    user = users[0]
    if user.op == "call_module":
        owner = user.graph.owning_module
        return not isinstance(_module_of(owner, user) if owner is not None else None, _ELEMENTWISE)
    return _call_name(user) not in _ELEMENTWISE_NAMES


# --- shapes and layers -----------------------------------------------------------------------------------


def _mac_shares(graph_module: fx.GraphModule) -> dict[str, float]:
    """Return the share of multiply-accumulates done once each node is done."""
    done, running = {}, 0
    for node in graph_module.graph.nodes:
        layer = _layer(graph_module, node, 0, "")
        running += layer.shape.macs if layer is not None else 0
        done[node.name] = running
    if running == 0:
        raise UnsupportedError("the network has no Linear or Conv2d layer, so there is nothing to plan.")
    return {name: value / running for name, value in done.items()}


def _layer(graph_module: fx.GraphModule, node: fx.Node, segment: int, head_prefix: str) -> Layer | None:
    module = _module_of(graph_module, node)
    if isinstance(module, nn.Linear):
        shape = _linear_shape(module, node)
    elif isinstance(module, nn.Conv2d):
        shape = _conv_shape(module, node)
    elif isinstance(module, (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d, nn.LSTM, nn.GRU, nn.MultiheadAttention)):
        raise UnsupportedError(
            f"layer {node.target!r} is a {type(module).__name__}; only Linear and Conv2d are planned."
        )
    else:
        return None
    name = str(node.target)
    head = bool(head_prefix) and name.startswith(f"{head_prefix}.")
    return Layer(name=name, shape=shape, segment=segment, bias=module.bias is not None, head=head)


def _linear_shape(module: nn.Linear, node: fx.Node) -> LayerShape:
    rows = 1
    for size in _raw_shape(node)[1:-1]:
        rows *= size
    return LayerShape(
        kind=LayerKind.LINEAR, in_channels=module.in_features, out_channels=module.out_features, rows=rows
    )


def _conv_shape(module: nn.Conv2d, node: fx.Node) -> LayerShape:
    squares = {"kernel": module.kernel_size, "stride": module.stride, "padding": module.padding}
    for what, value in squares.items():
        if isinstance(value, str) or value[0] != value[1]:
            raise UnsupportedError(
                f"layer {node.target!r} has {what} {value}; only equal height and width are planned."
            )
    if module.dilation != (1, 1):
        raise UnsupportedError(f"layer {node.target!r} has dilation {module.dilation}; only 1 is planned.")
    height, width = _raw_shape(node.all_input_nodes[0])[-2:]
    return LayerShape(
        kind=LayerKind.CONV2D,
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel=int(module.kernel_size[0]),
        stride=int(module.stride[0]),
        padding=int(module.padding[0]),
        groups=module.groups,
        height=height,
        width=width,
    )


def _module_of(graph_module: nn.Module, node: fx.Node | object) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return graph_module.get_submodule(str(node.target))
    return None


def _call_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _raw_shape(node: fx.Node) -> tuple[int, ...]:
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return tuple(int(size) for size in shape) if shape is not None else ()


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's value without the batch; empty for what is no tensor."""
    return _raw_shape(node)[1:]


def _elements(node: fx.Node) -> int:
    count = 1
    for size in _shape(node):
        count *= size
    return count
