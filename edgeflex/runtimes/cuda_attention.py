"""Attention on a device, with keys and values in memory that is taken once; the formulas of the fp32 reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

    from edgeflex.runtimes.cuda_streams import Streams
    from edgeflex.runtimes.cuda_weights import Dense
    from edgeflex.schema_moe import DecoderGraph


class DeviceAttention:
    """Norms and attention of all layers, and their keys and values.

    Args:
        graph: The decoder.
        dense: Its weights.
        streams: The device.
        dtype: Of products, keys and values.
        context_tokens: Positions that are held.
    """

    def __init__(
        self, graph: DecoderGraph, dense: Dense, streams: Streams, dtype: torch.dtype, context_tokens: int
    ) -> None:
        self._shape = graph.attention
        self._epsilon = graph.norm_epsilon
        self._dense = dense
        self._streams = streams
        self._dtype = dtype
        self._turned_for = (0, 0)  # one pass turns all layers by the same angles
        self._turn = self._rotation(*self._turned_for)
        heads = (self._shape.kv_heads, context_tokens)
        self._keys = [streams.empty((*heads, self._shape.head_dim), dtype) for _ in graph.layers]
        self._values = [streams.empty((*heads, self._shape.value_dim), dtype) for _ in graph.layers]

    def norm(self, rows: Tensor, name: str) -> Tensor:
        """Return ``rows`` under the root-mean-square norm of this name (Zhang and Sennrich 2019, eq. 4)."""
        weight = self._dense.small[name]
        return rms_norm(rows, weight.shape, weight, self._epsilon)

    def __call__(self, layer: int, hidden: Tensor, first: int) -> Tensor:
        """Return what attention adds to ``hidden`` ``[tokens, hidden]``, and store keys and values at ``first``."""
        start, count = f"layers.{layer}.", len(hidden)
        normed = self.norm(hidden, start + "input_norm")
        if self._turned_for != (first, count):
            self._turned_for, self._turn = (first, count), self._rotation(first, count)
        turn = self._turn
        project = self._latent if self._shape.kind == "latent" else self._grouped
        queries, keys, values = project(start, normed, turn)
        held_keys, held_values, end = self._keys[layer], self._values[layer], first + count
        held_keys[:, first:end], held_values[:, first:end] = keys, values
        mixed = scaled_dot_product_attention(
            queries.to(self._dtype).unsqueeze(0),
            held_keys[:, :end].unsqueeze(0),
            held_values[:, :end].unsqueeze(0),
            attn_mask=self._mask(first, count),
            is_causal=not first,
            scale=self._shape.softmax_scale,
            enable_gqa=queries.shape[0] != keys.shape[0],
        )
        return self._dense.matrices[start + "o"](mixed[0].transpose(0, 1).flatten(1))

    def _mask(self, first: int, count: int) -> Tensor | None:
        """Return which of the keys so far each of several later tokens sees; None where a kernel's own way does."""
        if not first or count == 1:
            return None
        device = self._streams.device
        return torch.arange(first + count, device=device) <= torch.arange(first, first + count, device=device)[:, None]

    def _rotation(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine ``[count, rotary_dim / 2]``, from angles in fp32 as trained."""
        attention = self._shape
        inverse = torch.tensor(attention.inverse_frequencies, dtype=torch.float32)
        angles = torch.arange(first, first + count, dtype=torch.float32)[:, None] * inverse
        both = torch.stack((angles.cos(), angles.sin())) * attention.rotary_scale
        cosine, sine = both.to(self._streams.device)
        return cosine, sine

    def _grouped(self, start: str, normed: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[heads, tokens, dim]`` with positions turned in."""
        shape, dense = self._shape, self._dense
        widths = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.value_dim)
        mixed = dense.matrices[start + "qkv"](normed)
        if shape.bias:
            mixed = mixed + dense.small[start + "qkv_bias"]
        queries, keys, values = mixed.split(widths, dim=-1)
        if shape.query_key_norm == "projection":
            queries, keys = self.norm(queries, start + "q_norm"), self.norm(keys, start + "k_norm")
        queries, keys = _heads(queries, shape.heads), _heads(keys, shape.kv_heads)
        if shape.query_key_norm == "head":
            queries, keys = self.norm(queries, start + "q_norm"), self.norm(keys, start + "k_norm")
        return _turned(queries, *turn), _turned(keys, *turn), _heads(values, shape.kv_heads)

    def _latent(self, start: str, normed: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of latent attention, keys and values expanded per head."""
        shape, matrices = self._shape, self._dense.matrices
        plain = shape.head_dim - shape.rotary_dim
        queries = _heads(matrices[start + "q"](normed), shape.heads)
        queries = torch.cat((queries[..., :plain], _turned(queries[..., plain:], *turn)), dim=-1)
        down = matrices[start + "kv_a"](normed)
        latent = self.norm(down[..., : shape.latent_dim], start + "kv_norm")
        shared = _turned(down[..., shape.latent_dim :].unsqueeze(0), *turn)
        both = _heads(matrices[start + "kv_b"](latent), shape.heads)
        keys = torch.cat((both[..., :plain], shared.expand(shape.heads, -1, -1)), dim=-1)
        return queries, keys, both[..., plain:]


def _heads(rows: Tensor, heads: int) -> Tensor:
    """Return ``[tokens, heads * dim]`` as ``[heads, tokens, dim]``."""
    return rows.unflatten(-1, (heads, -1)).transpose(0, 1)


def _turned(rows: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate ``[..., tokens, dim]``, half-split, by angles ``[tokens, dim / 2]`` (RoFormer, arXiv 2104.09864)."""
    first, second = rows.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
