"""A decoder's stages as modules: what the stock programs are lowered from and what they are checked against.

One module per kind of program: embedding, attention with its router, SwiGLU feed-forward (expert, shared or
dense), head. The same module with dequantised weights, run eagerly, is the reference of its program. Inputs are
rows of tokens ``[T, hidden]`` without a batch; caches are buffers, so that a program keeps its own sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from edgeflex.schema import Precision
from edgeflex.transforms.decoder_weights import GROUP, INT4_LOW, StoredMatrix, dequantize, float_from_bfloat16

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.schema_moe import Attention, DecoderGraph, DecoderLayer, Routing

    Smalls = Mapping[str, NDArray[np.float32]]
    Linears = Mapping[str, nn.Module]

_NEVER = float("-inf")


def eager_linear(stored: StoredMatrix) -> nn.Linear:
    """Return a float32 layer of the numbers that ``stored`` stands for."""
    layer = nn.Linear(stored.columns, stored.rows, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.from_numpy(dequantize(stored)), requires_grad=False)
    return layer


def kernel_linear(stored: StoredMatrix) -> nn.Linear:
    """Return a layer in the form that XNNPACK's partitioner knows for this precision."""
    if stored.precision is Precision.FP32 or stored.scales is None:
        return eager_linear(stored)
    from torchao.quantization import IntxUnpackedToInt8Tensor

    four = stored.precision is Precision.INT4_GROUP32
    codes, scales = torch.from_numpy(stored.codes), torch.from_numpy(_float_scales(stored))
    if four:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).to(torch.int8).reshape(stored.rows, -1) + INT4_LOW
    scales = scales.reshape(stored.rows, -1)
    layer = nn.Linear(stored.columns, stored.rows, bias=False, device="meta")
    tensor = IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=scales,
        zero_point=torch.zeros_like(scales, dtype=torch.int8),
        target_dtype=torch.int4 if four else torch.int8,  # type: ignore[attr-defined]
        block_size=(1, GROUP if four else stored.columns),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    return layer


def _float_scales(stored: StoredMatrix) -> NDArray[np.float32]:
    if stored.scales is None or stored.precision is Precision.INT8_DYNAMIC:
        return stored.scales  # type: ignore[return-value]
    return float_from_bfloat16(stored.scales)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Normalise the last dimension (Zhang & Sennrich, 2019)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


class _Stage(nn.Module):
    """Holds a stage's small tensors as buffers."""

    def _keep(self, smalls: Smalls) -> None:
        for name, values in smalls.items():
            self.register_buffer(name, torch.from_numpy(values))


class EmbeddingStage(_Stage):
    """Token ids ``[T]`` int64 to rows ``[T, hidden]``, looked up in their stored form."""

    embedding: torch.Tensor
    embedding_scales: torch.Tensor

    def __init__(self, stored: StoredMatrix) -> None:
        super().__init__()
        self.precision = stored.precision
        self.register_buffer("embedding", torch.from_numpy(stored.codes))
        if stored.scales is not None:
            scales = torch.from_numpy(stored.scales)
            four = self.precision is Precision.INT4_GROUP32
            self.register_buffer("embedding_scales", scales.view(torch.bfloat16) if four else scales)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows, dequantised."""
        rows = torch.index_select(self.embedding, 0, tokens)
        if self.precision is Precision.FP32:
            return rows
        scales = torch.index_select(self.embedding_scales, 0, tokens).float()
        values = rows.float()
        if self.precision is Precision.INT8_DYNAMIC:
            return values * scales.unsqueeze(-1)
        high = torch.floor(values * 0.0625)
        pairs = torch.stack((values - high * 16.0, high), dim=-1)
        groups = pairs.reshape(tokens.shape[0], -1, GROUP) + float(INT4_LOW)
        return (groups * scales.unsqueeze(-1)).reshape(tokens.shape[0], -1)


class AttentionStage(_Stage):
    """Norm, attention over a static cache, residual, second norm and, where the layer has experts, the router.

    ``forward(x [T, hidden], positions [T] int64)`` returns the sum with the residual and its normalised form,
    then weights and indices ``[T, top_k]`` of the chosen experts.
    """

    inverse_frequencies: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    qkv: nn.Module
    q: nn.Module
    kv_a: nn.Module
    kv_b: nn.Module
    o: nn.Module

    def __init__(
        self, graph: DecoderGraph, layer: DecoderLayer, linears: Linears, smalls: Smalls, context: int
    ) -> None:
        super().__init__()
        attention = graph.attention
        self.attention: Attention = attention
        self.routing: Routing | None = layer.routing
        self.epsilon = graph.norm_epsilon
        for name, linear in linears.items():
            self.add_module(name, linear)
        self._keep(smalls)
        self.register_buffer("inverse_frequencies", torch.tensor(attention.inverse_frequencies))
        heads = attention.kv_heads
        self.register_buffer("key_cache", torch.zeros(heads, context, attention.head_dim))
        self.register_buffer("value_cache", torch.zeros(heads, context, attention.value_dim))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Append the rows' keys and values to the cache and attend."""
        y = _rms_norm(x, self._small("input_norm"), self.epsilon)
        latent = self.attention.kind == "latent"
        query, key, value = self._latent(y, positions) if latent else self._grouped(y, positions)
        self.key_cache.index_copy_(1, positions, key.transpose(0, 1))
        self.value_cache.index_copy_(1, positions, value.transpose(0, 1))
        x = x + self.o(self._attend(query, positions))
        y = _rms_norm(x, self._small("post_norm"), self.epsilon)
        return (x, y) if self.routing is None else (x, y, *self.route(y))

    def route(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and indices ``[T, top_k]`` of the experts for normalised rows ``[T, hidden]``."""
        weights, indices = torch.topk(self.shares(y), self.routing.top_k if self.routing else 1, dim=-1)
        return self.scaled(weights), indices

    def shares(self, y: torch.Tensor) -> torch.Tensor:
        """Return the router's probabilities ``[T, experts]``."""
        return torch.softmax(functional.linear(y, self._small("router")), dim=-1)

    def scaled(self, weights: torch.Tensor) -> torch.Tensor:
        """Return chosen probabilities ``[T, top_k]`` as the weights that experts are summed with."""
        if self.routing is None:
            return weights
        if self.routing.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights if self.routing.scale == 1.0 else weights * self.routing.scale

    def _small(self, name: str) -> torch.Tensor:
        return self.get_buffer(name)

    def _grouped(self, y: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a, rows = self.attention, y.shape[0]
        stacked = self.qkv(y)
        if a.bias:
            stacked = stacked + self._small("qkv_bias")
        # by heads first: slices of heads keep their rows whole, which the exporter can follow for any T
        by_head = stacked.reshape(rows, a.heads + 2 * a.kv_heads, a.head_dim)
        query, key, value = by_head.split((a.heads, a.kv_heads, a.kv_heads), 1)
        if a.query_key_norm != "none":
            query, key = self._normed(query, "q_norm"), self._normed(key, "k_norm")
        return self._rotated(query, positions, 0), self._rotated(key, positions, 0), value

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Normalise ``[T, heads, head_dim]`` per head, or over all heads at once."""
        weight = self._small(name)
        if self.attention.query_key_norm == "head":
            return _rms_norm(x, weight, self.epsilon)
        scale = torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + self.epsilon)
        return x * scale * weight.reshape(x.shape[1], x.shape[2])

    def _latent(self, y: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values from a compressed row (DeepSeek-V2, section 2.1)."""
        a, rows = self.attention, y.shape[0]
        plain = a.head_dim - a.rotary_dim
        query = self._rotated(self.q(y).reshape(rows, a.heads, a.head_dim), positions, plain)
        compressed, shared = self.kv_a(y).split((a.latent_dim, a.rotary_dim), -1)
        expanded = self.kv_b(_rms_norm(compressed, self._small("kv_norm"), self.epsilon))
        key, value = expanded.reshape(rows, a.heads, plain + a.value_dim).split((plain, a.value_dim), -1)
        shared = self._rotated(shared.unsqueeze(1), positions, 0).expand(rows, a.heads, a.rotary_dim)
        return query, torch.cat((key, shared), -1), value

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor, start: int) -> torch.Tensor:
        """Rotate ``rotary_dim`` dimensions of ``[T, heads, dim]`` from ``start`` on (Su et al., 2021)."""
        a = self.attention
        angles = positions.unsqueeze(-1).float() * self.inverse_frequencies
        cos, sin = ((one * a.rotary_scale).unsqueeze(1) for one in (torch.cos(angles), torch.sin(angles)))
        half = a.rotary_dim // 2
        before, after = x[..., :start], x[..., start + a.rotary_dim :]
        first, second = x[..., start : start + half], x[..., start + half : start + a.rotary_dim]
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat([part for part in (before, *turned, after) if part.shape[-1]], -1)

    def _attend(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        a, rows, context = self.attention, query.shape[0], self.key_cache.shape[1]
        # heads that share keys are stacked below each row, so that the cache is not repeated for them
        shared = a.heads // a.kv_heads
        stacked = query.reshape(rows, a.kv_heads, shared * a.head_dim).transpose(0, 1)
        stacked = stacked.reshape(a.kv_heads, rows * shared, a.head_dim)
        scores = torch.bmm(stacked, self.key_cache.transpose(1, 2)) * a.softmax_scale
        later = torch.arange(context).unsqueeze(0) > positions.unsqueeze(-1)
        scores = scores.reshape(a.kv_heads, rows, shared, context).masked_fill(later.unsqueeze(1), _NEVER)
        shares = torch.softmax(scores, -1).reshape(a.kv_heads, rows * shared, context)
        mixed = torch.bmm(shares, self.value_cache).reshape(a.kv_heads, rows, shared * a.value_dim)
        return mixed.transpose(0, 1).reshape(rows, a.heads * a.value_dim)


class FeedForwardStage(_Stage):
    """SwiGLU (Shazeer, 2020) on rows ``[T, hidden]``: an expert, the shared experts, or a dense layer's.

    With ``shared_gate`` the result is multiplied by the sigmoid of a learned product.
    """

    def __init__(self, linears: Linears, smalls: Smalls | None = None) -> None:
        super().__init__()
        self.gate_up, self.down = linears["gate_up"], linears["down"]
        self.gated = bool(smalls)
        self._keep(smalls or {})

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Return ``[T, hidden]``."""
        gate, up = self.gate_up(y).chunk(2, -1)
        out: torch.Tensor = self.down(functional.silu(gate) * up)
        if not self.gated:
            return out
        return out * torch.sigmoid(functional.linear(y, self.get_buffer("shared_gate")))


class HeadStage(_Stage):
    """Final norm and head: one row ``[1, hidden]`` to logits ``[1, vocabulary]``."""

    def __init__(self, graph: DecoderGraph, linears: Linears, smalls: Smalls) -> None:
        super().__init__()
        self.epsilon = graph.norm_epsilon
        self.head = linears["head"]
        self._keep(smalls)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.head(_rms_norm(x, self.get_buffer("norm"), self.epsilon))
        return logits
