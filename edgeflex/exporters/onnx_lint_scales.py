"""The lint's rules on QuantizeLinear and DequantizeLinear: scales, zero points, channels and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from edgeflex.exporters.onnx_view import (
    FLOATS,
    QUANTIZED,
    View,
    dequantizes,
    input_name,
    integer,
    label,
    quantizes,
    type_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import onnx
    from numpy.typing import NDArray

    from edgeflex.schema_trt import Version

# Blocks of other types and of weights of other ranks came with 10.8.
_FREE_BLOCKS_SINCE: Version = (10, 8)
# Until 11, scales are build-time constants too; zero points always are.
_FREE_SCALES_SINCE: Version = (11, 0)
_FLOAT4_SINCE: Version = (10, 8)
_INT4_BLOCKS = (64, 128)
_UNSIGNED = frozenset({TensorProto.UINT8, TensorProto.UINT4, TensorProto.UINT16, TensorProto.UINT2})
_PER_TENSOR = "Give the activation one scale"

SCALE_RULES: Mapping[str, str] = {
    "quantized-type": "codes are int8, int4, float8e4m3fn, or float4e2m1 from 10.8",
    "zero-point-missing": "QuantizeLinear has a zero point or an output_dtype, else ONNX means uint8",
    "zero-point-unsigned": "zero points are signed",
    "zero-point-type": "the zero point has the type of the codes",
    "zero-point-constant": "the zero point is a build-time constant",
    "zero-point-not-zero": "quantisation is symmetric: every zero point is 0",
    "zero-point-shape": "there are as many zero points as scales",
    "scale-constant": "scales are build-time constants (before 11)",
    "scale-type": "scales are float32, float16 or bfloat16, as the floats that they scale",
    "scale-positive": "scales are above 0",
    "scale-underflow": "no float16 scale has become 0",
    "scale-finite": "scales are finite",
    "scale-count": "one scale, or one for each channel of the axis",
    "activation-per-tensor": "what is not constant has one scale",
    "int4-weight-only": "only constants are INT4",
    "int4-even": "the last dimension of INT4 codes is even, since two share a byte",
    "block-rank": "scales by blocks have the rank of the codes",
    "block-one-dimension": "exactly one dimension is blocked",
    "block-divides": "the block divides its dimension; padding is refused",
    "block-axis": "the blocked dimension is the last or the last but one",
    "block-size": "INT4 blocks have 64 or 128 values",
    "block-type": "only INT4 has blocks before 10.8",
    "block-two-dimensions": "only 2-D constants have blocks before 10.8",
}

# What a rule found: rule, what with its values and limit, remedy.
Fault = tuple[str, str, str]


@dataclass(frozen=True)
class _Link:
    """A Q or DQ node with what the rules ask of it; ``codes`` is the quantised type, None where unknown."""

    node: onnx.NodeProto
    view: View
    dequantizes: bool
    constant: TensorProto | None
    codes: int | None
    scale_name: str
    scale_constant: bool
    scales: NDArray[Any] | None
    scale_shape: tuple[int, ...] | None
    scale_type: int | None
    zero_name: str
    axis: int
    block: int

    @property
    def source(self) -> str:
        return input_name(self.node, 0)

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(self.constant.dims) if self.constant is not None else ()

    @property
    def blocked(self) -> bool:
        return self.scale_shape is not None and (
            len(self.scale_shape) > 1 or (self.block > 0 and self.scale_shape != ())
        )

    @property
    def count(self) -> int:
        """How many scales there are; -1 where an axis of theirs is not fixed."""
        shape = self.scale_shape or (1,)
        return -1 if -1 in shape else int(np.prod(shape))

    @property
    def many(self) -> str:
        return "scales" if self.count < 0 else f"{self.count} scales"


def scale_findings(view: View, version: Version) -> Iterator[tuple[str, str, str, str]]:
    """Yield node, rule, message and remedy of every fault of a Q or DQ node."""
    for node in view.nodes:
        if not quantizes(node) and not dequantizes(node):
            continue
        link = _link(node, view)
        for check in _CHECKS:
            for rule, message, remedy in check(link, version):
                yield label(node), rule, message, remedy


def _link(node: onnx.NodeProto, view: View) -> _Link:
    scale_name, zero_name = input_name(node, 1), input_name(node, 2)
    return _Link(
        node=node,
        view=view,
        dequantizes=dequantizes(node),
        constant=view.source(input_name(node, 0)),
        codes=_codes(node, view, zero_name),
        scale_name=scale_name,
        scale_constant=scale_name in view.constants,
        scales=view.array(scale_name),
        scale_shape=view.shapes.get(scale_name),
        scale_type=view.types.get(scale_name),
        zero_name=zero_name,
        axis=integer(node, "axis", 1),
        block=integer(node, "block_size", 0),
    )


def _codes(node: onnx.NodeProto, view: View, zero_name: str) -> int | None:
    if dequantizes(node):
        return view.types.get(input_name(node, 0))
    if zero_name:
        return view.types.get(zero_name)
    return integer(node, "output_dtype", 0) or None


# --- codes and zero points ---------------------------------------------------------------------------


def _types(link: _Link, version: Version) -> Iterator[Fault]:
    too_new = link.codes == TensorProto.FLOAT4E2M1 and version < _FLOAT4_SINCE
    unsigned_zero = bool(link.zero_name) and link.view.types.get(link.zero_name) in _UNSIGNED
    if link.codes is not None and (link.codes not in QUANTIZED or too_new) and not unsigned_zero:
        message = f"codes are {type_name(link.codes)}; known are int8, int4, float8e4m3fn, and float4e2m1 from 10.8"
        yield "quantized-type", message, "Store a bias as floats; quantise to int8, int4 or float8e4m3fn"
    if link.codes != TensorProto.INT4:
        return
    if link.constant is None:
        message = f"{link.source} is no constant, and INT4 is for weights alone"
        yield "int4-weight-only", message, "Plan the activation in int8 or as floats"
    elif link.dims and link.dims[-1] % 2:
        message = f"INT4 codes of shape {list(link.dims)} have an odd last dimension, and two share a byte"
        yield "int4-even", message, "Transpose the weight, or plan this layer in int8-static"


def _zero_points(link: _Link, _version: Version) -> Iterator[Fault]:
    if not link.zero_name:
        if not link.dequantizes and link.codes is None and link.node.domain != "trt":
            message = "there is neither a zero point nor an output_dtype, which is uint8 to ONNX and int8 to TensorRT"
            yield "zero-point-missing", message, "Write an explicit zero point of int8 or float8e4m3fn"
        return
    kind, tensor = link.view.types.get(link.zero_name), link.view.constants.get(link.zero_name)
    if kind in _UNSIGNED:
        message = f"the zero point {link.zero_name} is {type_name(kind)}; signed types only"
        yield "zero-point-unsigned", message, "Quantise symmetrically to int8 with zero point 0"
    elif link.dequantizes and None not in {kind, link.codes} and kind != link.codes:
        message = f"the zero point is {type_name(kind)}, the codes are {type_name(link.codes)}"
        yield "zero-point-type", message, "Give the zero point the type of the codes"
    if tensor is None:
        message = f"the zero point {link.zero_name} is no constant"
        yield "zero-point-constant", message, "Make it an initialiser of zeros"
        return
    if link.scale_shape is not None and tuple(tensor.dims) != link.scale_shape:
        message = f"the zero point has shape {list(tensor.dims)}, the scale {list(link.scale_shape)}"
        yield "zero-point-shape", message, "Give both the same shape"
    yield from _not_zero(link)


def _not_zero(link: _Link) -> Iterator[Fault]:
    zeros = link.view.array(link.zero_name)
    if zeros is None:
        return
    values = zeros.astype(np.float32)
    if values.size and np.any(values != 0):
        worst = values.flat[int(np.abs(values).argmax())]
        message = f"the zero point is {worst:g}; only symmetric quantisation (0) is known"
        yield "zero-point-not-zero", message, "Quantise symmetrically: scale = max |x| / 127"


# --- scales ------------------------------------------------------------------------------------------


def _scale_values(link: _Link, version: Version) -> Iterator[Fault]:
    if not link.scale_constant and version < _FREE_SCALES_SINCE:
        message = f"the scale {link.scale_name} is no constant, and must be one before TensorRT 11"
        yield "scale-constant", message, "Make it an initialiser"
    if link.scales is None:
        return
    values = link.scales.astype(np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        yield "scale-finite", f"{bad} of {values.size} scales are not finite", "Calibrate again without such values"
        values = values[np.isfinite(values)]
    zero, negative = int((values == 0).sum()), int((values < 0).sum())
    if zero and link.scale_type == TensorProto.FLOAT16:
        message = f"{zero} of {values.size} float16 scales are 0; below 6e-8 they vanish"
        yield "scale-underflow", message, "Keep this layer in fp32, or its scales in float32"
    elif zero or negative:
        message = f"{zero + negative} of {values.size} scales are not above 0 (least {values.min():g})"
        yield "scale-positive", message, "Use |scale|, and a smallest scale where a channel is all zeros"


def _scale_type(link: _Link, _version: Version) -> Iterator[Fault]:
    kind = link.scale_type
    if kind is None:
        return
    if kind not in FLOATS:
        yield "scale-type", f"scales are {type_name(kind)}; floats of 16 or 32 bits only", "Store them as float32"
    elif not link.dequantizes:
        given = link.view.types.get(link.source)
        if given is not None and given != kind:
            message = f"scales are {type_name(kind)}, what they scale is {type_name(given)}"
            yield "scale-type", message, f"Store the scales as {type_name(given)}"


def _scale_count(link: _Link, _version: Version) -> Iterator[Fault]:
    if link.scale_shape is None or link.count == 1 or link.blocked:
        return
    if link.constant is None:
        message = f"{link.many} by channel for {link.source}, which is no constant"
        yield "activation-per-tensor", message, _PER_TENSOR
        return
    dims = link.dims
    if link.count < 0:
        return
    axis = link.axis + len(dims) if link.axis < 0 else link.axis
    channels = dims[axis] if 0 <= axis < len(dims) else None
    if channels != link.count:
        held = "which the codes lack" if channels is None else f"which has {channels}"
        message = f"{link.count} scales for the channels of axis {link.axis} of shape {list(dims)}, {held}"
        yield "scale-count", message, "Give one scale for each channel, and their axis"


# --- blocks ------------------------------------------------------------------------------------------


def _blocks(link: _Link, version: Version) -> Iterator[Fault]:
    shape = link.scale_shape
    if not link.blocked or shape is None:
        return
    if link.constant is None:
        message = f"scales of shape {list(shape)} for {link.source}, which is no constant"
        yield "activation-per-tensor", message, _PER_TENSOR
        return
    if link.count < 0:
        return
    if version < _FREE_BLOCKS_SINCE:
        yield from _old_blocks(link)
    dims = link.dims
    if len(shape) != len(dims):
        message = f"scales of shape {list(shape)} for codes of shape {list(dims)}; the rank must be equal"
        yield "block-rank", message, "Write scales of shape [.., K / block, ..]"
        return
    axes = [axis for axis, (many, few) in enumerate(zip(dims, shape, strict=True)) if many != few]
    if len(axes) != 1:
        message = f"scales of shape {list(shape)} block {len(axes)} dimensions of {list(dims)}, and must block one"
        yield "block-one-dimension", message, "Give each other dimension its own scales"
        return
    yield from _one_block(link, axes[0], dims[axes[0]], shape[axes[0]])


def _old_blocks(link: _Link) -> Iterator[Fault]:
    if link.codes != TensorProto.INT4:
        message = f"{type_name(link.codes)} codes have blocks, which came with TensorRT 10.8; before, INT4 alone has"
        yield "block-type", message, "Plan this layer per channel, or in INT4"
    if len(link.dims) != 2:
        message = f"codes of shape {list(link.dims)} have blocks; before TensorRT 10.8 only 2-D constants do"
        yield "block-two-dimensions", message, "Store one matrix for each layer and expert"


def _one_block(link: _Link, axis: int, size: int, count: int) -> Iterator[Fault]:
    block = link.block or (size // count if count else 0)
    if not count or not block or block * count != size:
        said = f"block size {block}" if link.block else f"{count} blocks"
        message = f"{said} does not divide dimension {axis}, which has {size} (scales: {count}); no padding is taken"
        yield "block-divides", message, "Choose a block that divides it, or plan this layer in int8-static"
        return
    if axis < len(link.dims) - 2:
        message = f"dimension {axis} of {list(link.dims)} is blocked; it must be the last or the last but one"
        yield "block-axis", message, "Block along the inputs of a matrix"
    if link.codes == TensorProto.INT4 and block not in _INT4_BLOCKS:
        message = f"INT4 blocks of {block} values; the sizes are {' and '.join(map(str, _INT4_BLOCKS))}"
        yield "block-size", message, "Plan this layer in int4-block64 or int4-block128"


_CHECKS: tuple[Callable[[_Link, Version], Iterator[Fault]], ...] = (
    _types,
    _zero_points,
    _scale_values,
    _scale_type,
    _scale_count,
    _blocks,
)
