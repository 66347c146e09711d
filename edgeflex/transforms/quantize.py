"""The one definition of our numbers: how weights and activations become integers.

What the exporters write, what the reference computes and what calibration judges all come from here.
XNNPACK runs symmetric int8 per output channel, symmetric int4 per output channel or per group of 32 inputs,
and asymmetric int8 activations per tensor. ONNX Runtime and TensorRT run what ONNX's QuantizeLinear and
DequantizeLinear say (ONNX operators, versions 19 and 21): the same int8 weights with symmetric int8 activations
per tensor, symmetric int4 in blocks of 64 or 128 inputs, and E4M3 (Micikevicius et al. 2022, arXiv:2209.05433)
per tensor. TensorRT's kernels for the last two compute in half precision; their scales are then numbers that
half precision holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.schema import Precision

if TYPE_CHECKING:
    from collections.abc import Callable

INT8_LIMIT = 127
INT4_LOW, INT4_HIGH = -8, 7
INT4_INPUT_MULTIPLE = 32
_ACTIVATION_LOW, _ACTIVATION_HIGH = -128, 127
_SMALLEST_SCALE = 1e-8
# An activation that was 0 on every calibration image still needs a grid that XNNPACK can requantise from.
_SMALLEST_ACTIVATION_SCALE = 1e-4
# Shrinking a 4-bit range trades rare large weights for a finer grid; 8 bits gain nothing measurable.
_INT4_SHRINKS = tuple(1.0 - 0.025 * step for step in range(17))
# The largest finite number of E4M3 (arXiv:2209.05433, table 1), and of IEEE 754 half precision.
FP8_LIMIT = 448.0
HALF_LIMIT = 65504.0
# The least positive number of half precision; a block of weights far smaller than its layer's gets this scale.
_LEAST_HALF = 2.0**-24
# Half precision still holds four digits of a scale here; what needs less would be rounded away.
_SMALLEST_HALF_SCALE = 2.0**-20
_BLOCKS = {Precision.INT4_BLOCK64, Precision.INT4_BLOCK128}


@dataclass(frozen=True)
class QuantizedWeight:
    """Weights on a grid, with their scales.

    Attributes:
        values: int8 or float8_e4m3fn, the weight's own shape.
        scales: float32, [out] per channel, [out, in / group_size], or [1] for all.
        group_size: Inputs that share a scale, or None for one scale a channel or tensor.
        half: The kernels restore it in half precision, which rounds once more.
    """

    values: torch.Tensor
    scales: torch.Tensor
    group_size: int | None
    half: bool = False

    def dequantize(self) -> torch.Tensor:
        """Return the weight that the kernels compute with, as float32."""
        if self.group_size is None:
            restored = self.values.float() * self.scales.reshape(-1, *[1] * (self.values.dim() - 1))
        else:
            grouped = self.values.float().reshape(*self.scales.shape, self.group_size)
            restored = (grouped * self.scales.unsqueeze(-1)).reshape(self.values.shape)
        return as_half(restored) if self.half else restored


def as_half(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` rounded to half precision, as float32."""
    return x.half().float()


def _round(rows: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return torch.clamp(torch.round(rows / scales), low, high)


def _bfloat16_scales(scales: torch.Tensor) -> torch.Tensor:
    return scales.to(torch.bfloat16).float()  # XNNPACK keeps group scales in bf16


def _half_scales(scales: torch.Tensor) -> torch.Tensor:
    return as_half(scales).clamp_min(_LEAST_HALF)


def _float_scales(scales: torch.Tensor) -> torch.Tensor:
    return scales


def _int4_scales(rows: torch.Tensor, stored: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the scale of each row that leaves the least squared error over a few shrunk ranges.

    ``stored`` rounds a scale to what the file keeps of it.
    """
    # the grid reaches -8 but only +7: the side with the larger weight may use the longer half
    widest = torch.maximum(rows.amax(-1, keepdim=True) / INT4_HIGH, rows.amin(-1, keepdim=True) / INT4_LOW)
    widest = torch.maximum(widest, rows.abs().amax(-1, keepdim=True) / -INT4_LOW).clamp_min(_SMALLEST_SCALE)
    best = stored(widest)  # kept where squares of huge weights leave what float32 holds
    least = torch.full_like(widest, torch.inf)
    for shrink in _INT4_SHRINKS:
        scales = stored(widest * shrink)
        error = (_round(rows, scales, INT4_LOW, INT4_HIGH) * scales - rows).square().sum(-1, keepdim=True)
        better = error < least
        best = torch.where(better, scales, best)
        least = torch.where(better, error, least)
    return best


def quantize_weight(weight: torch.Tensor, precision: Precision, *, half: bool = False) -> QuantizedWeight:
    """Round ``weight`` [out, in, ...] to nearest in the grid of ``precision``.

    Args:
        weight: What a layer was trained to.
        precision: The grid.
        half: Whether kernels compute in half precision; only int4 blocks and fp8 have such kernels.

    Raises:
        UnsupportedError: The precision stores no integers, the inputs do not divide into groups, or half
            precision does not hold the scales.
        InputError: The weight holds NaN or infinity, which would become zeros without a word.
    """
    if not bool(torch.isfinite(weight.detach()).all()):
        raise InputError("a weight holds NaN or infinity. Train or download the model again.")
    if precision is Precision.FP8:
        return _fp8_weight(weight, half=half)
    if precision in _BLOCKS:
        return _block_weight(weight, precision, half=half)
    if precision in {Precision.INT8_STATIC, Precision.INT8_DYNAMIC}:
        rows = weight.detach().float().reshape(weight.shape[0], -1)
        scales = (rows.abs().amax(-1, keepdim=True) / INT8_LIMIT).clamp_min(_SMALLEST_SCALE)
        values = _round(rows, scales, -INT8_LIMIT, INT8_LIMIT)
        return QuantizedWeight(values.to(torch.int8).reshape(weight.shape), scales.squeeze(-1), None)
    if precision not in {Precision.INT4_CHANNEL, Precision.INT4_GROUP32}:
        raise UnsupportedError(f"{precision.value} stores no integers. Choose one of the int8 or int4 precisions.")
    group_size = precision.group_size
    width = weight[0].numel()
    if width % INT4_INPUT_MULTIPLE:
        raise UnsupportedError(
            f"{precision.value} needs inputs in multiples of {INT4_INPUT_MULTIPLE}; a weight has {width}. "
            "Choose int8-dynamic for it."
        )
    rows = weight.detach().float().reshape(-1, group_size or width)
    scales = _int4_scales(rows, _bfloat16_scales)
    values = _round(rows, scales, INT4_LOW, INT4_HIGH).to(torch.int8).reshape(weight.shape)
    shape = (weight.shape[0],) if group_size is None else (weight.shape[0], width // group_size)
    return QuantizedWeight(values, scales.reshape(shape), group_size)


def _block_weight(weight: torch.Tensor, precision: Precision, *, half: bool) -> QuantizedWeight:
    """Return int4 codes with a scale for each block of inputs of a linear layer's weight [out, in]."""
    block = precision.group_size or 0
    if weight.dim() != 2 or weight.shape[1] % block:
        raise UnsupportedError(
            f"{precision.value} needs a linear layer with inputs in multiples of {block}; a weight has shape "
            f"{tuple(weight.shape)}. Choose int8-static for it."
        )
    rows = weight.detach().float().reshape(-1, block)
    scales = _int4_scales(rows, _half_scales if half else _float_scales)
    if half:
        _require_half_scale(precision, weight, float(scales.max()))
    values = _round(rows, scales, INT4_LOW, INT4_HIGH).to(torch.int8).reshape(weight.shape)
    return QuantizedWeight(values, scales.reshape(len(weight), -1), block, half)


def _fp8_weight(weight: torch.Tensor, *, half: bool) -> QuantizedWeight:
    """Return E4M3 codes under one scale, which puts the largest weight on the largest number."""
    rows = weight.detach().float()
    scale = (rows.abs().amax() / FP8_LIMIT).clamp_min(_SMALLEST_SCALE).reshape(1)
    if half:
        scale = _half_scales(scale)
        _require_half_scale(Precision.FP8, weight, float(scale))
    return QuantizedWeight(to_fp8(rows, float(scale)), scale, None, half)


def _require_half_scale(precision: Precision, weight: torch.Tensor, scale: float) -> None:
    """Refuse a weight whose scale half precision does not hold; zeros lie on every grid."""
    largest = float(weight.detach().abs().amax())
    if largest and not _SMALLEST_HALF_SCALE <= scale <= HALF_LIMIT:
        raise UnsupportedError(
            f"{precision.value} in half precision needs scales from {_SMALLEST_HALF_SCALE:.2g} to {HALF_LIMIT:.0f}; "
            f"the largest weight of a layer is {largest:.3g}, which gives {scale:.3g}. Leave that layer in fp32."
        )


def activation_grid(low: float, high: float) -> tuple[float, int]:
    """Return scale and zero point of the int8 grid that covers ``low`` to ``high`` and holds 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (_ACTIVATION_HIGH - _ACTIVATION_LOW), _SMALLEST_ACTIVATION_SCALE)
    zero_point = round(_ACTIVATION_LOW - low / scale)
    return scale, max(_ACTIVATION_LOW, min(_ACTIVATION_HIGH, zero_point))


def symmetric_scale(low: float, high: float) -> float:
    """Return the float32 scale of the int8 grid around 0 that covers ``low`` to ``high`` with its steps -127 to 127.

    TensorRT takes no zero point but 0 (Developer Guide, "Explicit Quantization").
    """
    widest = max(abs(low), abs(high))
    return float(np.float32(max(widest / INT8_LIMIT, _SMALLEST_ACTIVATION_SCALE)))


def to_int8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the steps of ``x`` on a symmetric int8 grid, as QuantizeLinear computes them: divide, round half to even.

    What lies beyond the range saturates, at -128 below.
    """
    return torch.clamp(torch.round(x / scale), _ACTIVATION_LOW, _ACTIVATION_HIGH).to(torch.int8)


def from_int8(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the float32 numbers of int8 steps, as DequantizeLinear computes them."""
    return values.float() * scale


def fp8_scale(low: float, high: float, *, half: bool = False) -> float:
    """Return the scale that puts the largest of ``low`` to ``high`` on E4M3's largest number, as float32 or half."""
    scale = max(max(abs(low), abs(high)) / FP8_LIMIT, _SMALLEST_ACTIVATION_SCALE)
    return float(np.float16(scale) if half else np.float32(scale))


def to_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``x`` divided by ``scale`` in E4M3, rounded half to even and saturated, as QuantizeLinear computes it."""
    return torch.clamp(x / scale, -FP8_LIMIT, FP8_LIMIT).to(torch.float8_e4m3fn)


def from_fp8(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the float32 numbers of E4M3 values, as DequantizeLinear computes them."""
    return values.float() * scale
