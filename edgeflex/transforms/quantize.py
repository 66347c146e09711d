"""The one definition of our numbers: how weights and activations become integers.

What the exporters write, what the reference computes and what calibration judges all come from here.
Every format is one that XNNPACK runs: symmetric int8 per output channel, symmetric int4 per output channel
or per group of 32 inputs, and asymmetric int8 activations per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgeflex.errors import UnsupportedError
from edgeflex.schema import Precision

INT8_LIMIT = 127
INT4_LOW, INT4_HIGH = -8, 7
INT4_INPUT_MULTIPLE = 32
_ACTIVATION_LOW, _ACTIVATION_HIGH = -128, 127
_SMALLEST_SCALE = 1e-8
# An activation that was 0 on every calibration image still needs a grid that XNNPACK can requantise from.
_SMALLEST_ACTIVATION_SCALE = 1e-4
# Shrinking a 4-bit range trades rare large weights for a finer grid; 8 bits gain nothing measurable.
_INT4_SHRINKS = tuple(1.0 - 0.025 * step for step in range(17))


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer weights with their scales.

    Attributes:
        values: int8, the weight's own shape.
        scales: float32, [out] per channel or [out, in / group_size].
        group_size: Inputs that share a scale, or None for one scale a channel.
    """

    values: torch.Tensor
    scales: torch.Tensor
    group_size: int | None

    def dequantize(self) -> torch.Tensor:
        """Return the float32 weight that the kernels compute with."""
        if self.group_size is None:
            return self.values.float() * self.scales.reshape(-1, *[1] * (self.values.dim() - 1))
        grouped = self.values.float().reshape(*self.scales.shape, self.group_size)
        return (grouped * self.scales.unsqueeze(-1)).reshape(self.values.shape)


def _round(rows: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return torch.clamp(torch.round(rows / scales), low, high)


def _int4_scales(rows: torch.Tensor) -> torch.Tensor:
    """Return the scale of each row that leaves the least squared error over a few shrunk ranges."""
    # the grid reaches -8 but only +7: the side with the larger weight may use the longer half
    widest = torch.maximum(rows.amax(-1, keepdim=True) / INT4_HIGH, rows.amin(-1, keepdim=True) / INT4_LOW)
    widest = torch.maximum(widest, rows.abs().amax(-1, keepdim=True) / -INT4_LOW).clamp_min(_SMALLEST_SCALE)
    best = widest.clone()
    least = torch.full_like(widest, torch.inf)
    for shrink in _INT4_SHRINKS:
        scales = (widest * shrink).to(torch.bfloat16).float()  # XNNPACK keeps group scales in bf16
        error = (_round(rows, scales, INT4_LOW, INT4_HIGH) * scales - rows).square().sum(-1, keepdim=True)
        better = error < least
        best = torch.where(better, scales, best)
        least = torch.where(better, error, least)
    return best


def quantize_weight(weight: torch.Tensor, precision: Precision) -> QuantizedWeight:
    """Round ``weight`` [out, in, ...] to nearest in the grid of ``precision``.

    Raises:
        UnsupportedError: The precision stores no integers, or the inputs do not divide into groups.
    """
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
    scales = _int4_scales(rows)
    values = _round(rows, scales, INT4_LOW, INT4_HIGH).to(torch.int8).reshape(weight.shape)
    shape = (weight.shape[0],) if group_size is None else (weight.shape[0], width // group_size)
    return QuantizedWeight(values, scales.reshape(shape), group_size)


def activation_grid(low: float, high: float) -> tuple[float, int]:
    """Return scale and zero point of the int8 grid that covers ``low`` to ``high`` and holds 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (_ACTIVATION_HIGH - _ACTIVATION_LOW), _SMALLEST_ACTIVATION_SCALE)
    zero_point = round(_ACTIVATION_LOW - low / scale)
    return scale, max(_ACTIVATION_LOW, min(_ACTIVATION_HIGH, zero_point))
