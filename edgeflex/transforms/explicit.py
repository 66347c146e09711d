"""A dynamic model and a precision per layer become modules with the numbers of ONNX's own operators.

The prepared segments are the reference, and what the ONNX exporter reads its graphs from: every rounding that
QuantizeLinear will do stands in them as a pair of ``to_int8`` and ``from_int8``, every layer that is not fp32 as an
``ExplicitLayer``. Int8 is placed as for XNNPACK (see ``prepare``), on grids around zero; activations cross a cut as
floats.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn import functional

from edgeflex.errors import UnsupportedError
from edgeflex.schema import Precision
from edgeflex.transforms.prepare import PreparedModel, Ranges, StaticRewrite, finish, range_of, require_known
from edgeflex.transforms.quantize import (
    HALF_LIMIT,
    QuantizedWeight,
    as_half,
    fp8_scale,
    from_fp8,
    from_int8,
    quantize_weight,
    symmetric_scale,
    to_fp8,
    to_int8,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgeflex.models import DynamicModel

_CONVOLUTION = {Precision.FP16, Precision.INT8_STATIC}
_LINEAR = {*_CONVOLUTION, Precision.INT4_BLOCK64, Precision.INT4_BLOCK128, Precision.FP8}


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; each pair is height, width."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def geometry_of(layer: nn.Module) -> Geometry | None:
    """Return the geometry of a convolution, and None for a linear layer.

    Raises:
        UnsupportedError: The convolution pads with something else than zeros.
    """
    if isinstance(layer, ExplicitLayer):
        return layer.geometry
    if not isinstance(layer, nn.Conv2d):
        return None
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UnsupportedError(
            f"a convolution pads with {layer.padding_mode!r} ({layer.padding}); ONNX's pads with a number of zeros. "
            "Pad before the layer, in a step of its own."
        )
    first, second = layer.padding
    return Geometry(
        (layer.stride[0], layer.stride[1]), (first, second), (layer.dilation[0], layer.dilation[1]), layer.groups
    )


class ExplicitLayer(nn.Module):
    """A convolution or linear layer with the numbers of one precision.

    Attributes:
        precision: Which.
        stored: What the file keeps of the weight; None for fp16, where that is ``weight``.
        weight: What the layer multiplies by, [out, in, ...].
        bias: [out] or None.
        half_precision: The layer computes in half precision, as fused kernels do: inputs, weight and bias are
            rounded to it, sums are kept in fp32, and the result is rounded once.
        activation_scale: The E4M3 grid of its input, or None.
        geometry: None for a linear layer.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        precision: Precision,
        stored: QuantizedWeight | None,
        *,
        half: bool,
        activation_scale: float | None,
    ) -> None:
        super().__init__()
        weight = as_half(layer.weight.detach()) if stored is None else stored.dequantize()
        bias = None if layer.bias is None else layer.bias.detach()
        self.precision = precision
        self.stored = stored
        self.half_precision = half
        self.activation_scale = activation_scale
        self.geometry = geometry_of(layer)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", as_half(bias) if half and bias is not None else bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to float32 inputs; the result is float32 too."""
        x = as_half(x) if self.half_precision else x
        if self.activation_scale is not None:
            x = from_fp8(to_fp8(x, self.activation_scale), self.activation_scale)
        y = self._product(x)
        return as_half(y) if self.half_precision else y

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.geometry is None:
            return functional.linear(x, self.weight, self.bias)
        way = self.geometry
        return functional.conv2d(x, self.weight, self.bias, way.stride, way.padding, way.dilation, way.groups)


class _SymmetricRewrite(StaticRewrite):
    """Int8 on grids around zero, by division as QuantizeLinear does it."""

    quantize: Callable[..., Any] = staticmethod(to_int8)
    dequantize: Callable[..., Any] = staticmethod(from_int8)

    def grid(self, low: float, high: float) -> tuple[Any, ...]:
        """Return the scale alone."""
        return (symmetric_scale(low, high),)


def rounded_source(node: fx.Node) -> tuple[fx.Node, float | None]:
    """Return the node whose value an argument holds, and the int8 scale if it was rounded on the way."""
    if node.op == "call_function" and node.target is from_int8:
        rounded = node.all_input_nodes[0]
        return rounded.all_input_nodes[0], float(node.args[1])  # type: ignore[arg-type]
    return node, None


def is_rounding(node: fx.Node) -> bool:
    """Say whether a node only rounds to int8 or restores from it."""
    return node.op == "call_function" and node.target in {to_int8, from_int8}


def prepare_explicit_segment(
    segment: fx.GraphModule, index: int, precisions: Mapping[str, Precision], ranges: Ranges, *, half: bool = False
) -> fx.GraphModule:
    """Return a copy of one segment in the given precisions; layers not named stay fp32.

    Args:
        segment: In fp32.
        index: Which segment of the model.
        precisions: By the layer's name.
        ranges: What ``record_ranges`` found.
        half: Whether int4 blocks and fp8 compute in half precision, as TensorRT's kernels do.

    Raises:
        UnsupportedError: A precision does not exist for the kind of its layer, or half precision does not hold its
            numbers.
        InputError: An int8 or fp8 layer has no recorded activation range.
    """
    prepared = copy.deepcopy(segment)
    modules = dict(prepared.named_modules())
    nodes = {str(node.target): node for node in prepared.graph.nodes if node.op == "call_module"}
    wanted = {name: one for name, one in precisions.items() if name in nodes and one is not Precision.FP32}
    replaced: dict[str, ExplicitLayer] = {}
    for name, precision in wanted.items():
        layer = modules[name]
        _require_kind(name, layer, precision)
        replaced[name] = _explicit(layer, precision, index, nodes[name], ranges, half=half)
    static = {name for name, precision in wanted.items() if precision is Precision.INT8_STATIC}
    if static:
        _SymmetricRewrite(prepared, index, static, ranges).apply()
    for name, explicit in replaced.items():
        prepared.set_submodule(name, explicit)
    prepared.recompile()
    return prepared.eval()


def _require_kind(name: str, layer: nn.Module, precision: Precision) -> None:
    allowed = {nn.Conv2d: _CONVOLUTION, nn.Linear: _LINEAR}.get(type(layer), set())
    if precision not in allowed:
        raise UnsupportedError(
            f"layer {name!r} is a {type(layer).__name__}; {precision.value} does not exist for it in ONNX. "
            "Plan again with the capabilities of this backend."
        )


def _explicit(
    layer: nn.Module, precision: Precision, segment: int, node: fx.Node, ranges: Ranges, *, half: bool
) -> ExplicitLayer:
    """Return the layer with its numbers; ``node`` calls it in a segment that is still fp32."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise UnsupportedError(f"{node.target} is a {type(layer).__name__}. Plan only Conv2d and Linear layers.")
    # int8 kernels take fp32 around them everywhere
    half = precision is Precision.FP16 or (half and precision is not Precision.INT8_STATIC)
    source = node.all_input_nodes[0]
    if half:
        _require_half_values(str(node.target), layer, segment, (source, node), ranges)
    scale = None
    if precision is Precision.FP8:
        scale = fp8_scale(*range_of(ranges, segment, source.name), half=half)
    try:
        stored = None if precision is Precision.FP16 else quantize_weight(layer.weight, precision, half=half)
    except UnsupportedError as error:
        raise UnsupportedError(f"layer {str(node.target)!r}: {error}") from None
    return ExplicitLayer(layer, precision, stored, half=half, activation_scale=scale)


def _require_half_values(
    name: str, layer: nn.Conv2d | nn.Linear, segment: int, around: tuple[fx.Node, ...], ranges: Ranges
) -> None:
    """Refuse weights and recorded activations that half precision does not reach."""
    found = [ranges.get(f"{segment}:{node.name}", (0.0, 0.0)) for node in around]
    largest = max(float(layer.weight.detach().abs().max()), *(max(-low, high) for low, high in found))
    if not largest <= HALF_LIMIT:
        raise UnsupportedError(
            f"layer {name!r} has weights or activations up to {largest:.3g}; half precision ends at {HALF_LIMIT:.0f}. "
            "Leave it in fp32."
        )


def prepare_explicit(
    model: DynamicModel, precisions: Mapping[str, Precision], ranges: Ranges, *, half: bool = False
) -> PreparedModel:
    """Return the model's segments in the given precisions, each ending in probabilities; see the module.

    Args:
        model: What to prepare.
        precisions: By the layer's name; layers not named stay fp32.
        ranges: What ``record_ranges`` found.
        half: Whether int4 blocks and fp8 compute in half precision, as TensorRT's kernels do.

    Raises:
        InputError: ``precisions`` names a layer that the model lacks, or a range is missing.
        UnsupportedError: A precision does not exist for its layer, or half precision does not hold its numbers.
    """
    require_known(model, precisions)
    bodies = [
        prepare_explicit_segment(segment, index, precisions, ranges, half=half)
        for index, segment in enumerate(model.segments)
    ]
    return finish(model, bodies, precisions)
