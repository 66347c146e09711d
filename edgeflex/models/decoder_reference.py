"""The decoder in fp32 torch, layer by layer: what calibration, parity and KL are measured against.

One layer runs over all tokens before the next is looked at, and experts are read one at a time, so that the
peak is one expert, one layer's dense part and the activations, whatever the model's size. Any matrix can be
replaced by other numbers (dequantised ones) without touching the source.

The order of sums is that of the runtime: a token's experts by descending router weight, then the shared one.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax, rms_norm, scaled_dot_product_attention, silu, softmax

from edgeflex.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from edgeflex.models.decoders import DecoderSource
    from edgeflex.schema_moe import DecoderLayer

# How much the experts' outputs of one block of tokens may take before they are summed.
_BLOCK_BYTES = 1 << 27
_HEAD_BLOCK_BYTES = 1 << 27


@dataclass(frozen=True)
class Routed:
    """What the router of one layer chose.

    Attributes:
        experts: ``[tokens, top_k]`` int64, by descending weight, ties to the lower index.
        weights: ``[tokens, top_k]`` float32, as multiplied with the experts' outputs.
    """

    experts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Passed:
    """A forward pass up to the final norm, which is not applied yet.

    Attributes:
        hidden: ``[sequences, tokens, hidden]``.
        routed: One per layer over all ``sequences * tokens``, in this order; None for dense layers.
    """

    hidden: Tensor
    routed: tuple[Routed | None, ...]


@dataclass
class KeyValues:
    """The keys ``[sequences, heads, tokens, head_dim]`` and values of every layer so far."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extended(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``keys`` and ``values`` of ``layer`` and return all of them."""
        if layer in self.layers:
            before = self.layers[layer]
            keys, values = torch.cat((before[0], keys), dim=2), torch.cat((before[1], values), dim=2)
        self.layers[layer] = (keys, values)
        return keys, values


@dataclass
class _Kept:
    """Source tensors held in memory: those ``asked`` for, and others, first come, up to ``most_bytes``."""

    most_bytes: int
    held_bytes: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    asked: dict[str, Tensor | None] = field(default_factory=dict)

    def may_hold(self, name: str) -> bool:
        return name in self.asked or self.most_bytes > 0

    def find(self, name: str) -> Tensor | None:
        found = self.tensors.get(name)
        return self.asked.get(name) if found is None else found

    def keep(self, name: str, tensor: Tensor) -> None:
        if name in self.asked:
            self.asked[name] = tensor
        elif self.held_bytes + tensor.nbytes <= self.most_bytes:
            self.tensors[name] = tensor
            self.held_bytes += tensor.nbytes


class Mixing:
    """What experts give a set of rows: taken expert by expert, in any order, and summed as the runtime sums them.

    Args:
        normed: ``[tokens, hidden]``, what the experts see.
        routed: What the router chose for them.
    """

    def __init__(self, normed: Tensor, routed: Routed) -> None:
        self._normed = normed
        self._routed = routed
        self._outputs = torch.empty(*routed.experts.shape, normed.shape[1])

    def take(self, expert: int, feed: Callable[[Tensor], Tensor]) -> None:
        """Let ``feed`` compute an expert's outputs ``[n, hidden]`` of the rows that chose it, if any did."""
        tokens, places = torch.where(self._routed.experts == expert)
        if len(tokens):
            self._outputs[tokens, places] = feed(self._normed.index_select(0, tokens))

    def summed(self) -> Tensor:
        """Return the weighted sum ``[tokens, hidden]``, by descending router weight; all experts were taken."""
        weights = self._routed.weights
        total = self._outputs[:, 0] * weights[:, :1]
        for place in range(1, weights.shape[1]):
            total = total + self._outputs[:, place] * weights[:, place : place + 1]
        return total


class Reference:
    """Runs a decoder in fp32.

    Args:
        source: The decoder.
        weights: Called with a name of ``schema_moe``; returns the numbers to use, or None for the source's.
        keep_bytes: Source tensors that are kept after their first reading, up to this many bytes, so that a small
            decoder is read once; 0 reads every tensor each time.
    """

    def __init__(
        self,
        source: DecoderSource,
        weights: Callable[[str], NDArray[np.float32] | None] | None = None,
        *,
        keep_bytes: int = 0,
    ) -> None:
        self.source = source
        self.graph = source.graph
        self._weights = weights
        self._kept = _Kept(keep_bytes)

    def replaced(self, weights: Callable[[str], NDArray[np.float32] | None] | None) -> Reference:
        """Return a reference with other replacements that shares the source and what is kept of it."""
        other = Reference(self.source, weights)
        other._kept = self._kept
        return other

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """Keep these tensors of the source in memory inside ``with``, each from its first use on.

        It holds for all references that share the source with this one (``replaced``).
        """
        new = {self._key(name) for name in names} - self._kept.asked.keys()
        self._kept.asked.update(dict.fromkeys(new))
        try:
            yield
        finally:
            for name in new:
                del self._kept.asked[name]

    # --- parts ---

    def weight(self, name: str) -> Tensor:
        """Return a matrix or small tensor, replaced or the source's.

        Raises:
            InputError: A replacement has another shape, or the source cannot be read.
        """
        numbers = None if self._weights is None else self._weights(name)
        if numbers is None:
            return self._own(name)
        if numbers.shape != self.source.shape(name):
            raise InputError(f"replacement of {name} is {numbers.shape} instead of {self.source.shape(name)}")
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32))

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings ``[sequences, tokens, hidden]`` of ``tokens`` ``[sequences, tokens]``.

        Raises:
            InputError: A token is not in the vocabulary.
        """
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.graph.vocabulary:
            raise InputError(
                f"tokens run from {int(tokens.min())} to {int(tokens.max())}, "
                f"and the vocabulary has {self.graph.vocabulary}. Use this decoder's own tokenizer."
            )
        replaced = None if self._weights is None else self._weights("embedding")
        if replaced is None and not self._kept.may_hold("embedding"):
            rows = torch.from_numpy(self.source.gather("embedding", tokens.reshape(-1).numpy()))
        else:
            rows = self.weight("embedding")[tokens.reshape(-1)]
        return rows.reshape(*tokens.shape, self.graph.hidden_dim)

    def attention(self, index: int, hidden: Tensor, past: KeyValues | None = None) -> Tensor:
        """Return ``hidden`` ``[sequences, tokens, hidden]`` plus the attention of layer ``index``.

        Causal; with ``past`` the tokens follow those in it, and their keys and values are added to it.
        """
        start = f"layers.{index}."
        known = past.layers.get(index) if past is not None else None
        first = 0 if known is None else known[0].shape[2]
        normed = self._norm(hidden, start + "input_norm")
        turn = self._rotation(first, hidden.shape[1])
        project = self._latent if self.graph.attention.kind == "latent" else self._grouped
        queries, keys, values = project(start, normed, turn)
        if past is not None:
            keys, values = past.extended(index, keys, values)
        mixed = self._attend(queries, keys, values, first)
        return hidden + linear(mixed.transpose(1, 2).flatten(2), self.weight(start + "o"))

    def normed(self, index: int, hidden: Tensor) -> Tensor:
        """Return what router and experts of layer ``index`` see: ``hidden`` after attention, normed."""
        return self._norm(hidden, f"layers.{index}.post_norm")

    def route(self, index: int, normed: Tensor) -> Routed:
        """Return what the router of layer ``index`` chooses for ``normed`` ``[tokens, hidden]``."""
        routing = self.graph.layers[index].routing
        if routing is None:
            raise InputError(f"layer {index} is dense and has no router")
        shares = softmax(linear(normed, self.weight(f"layers.{index}.router")), dim=-1)
        # a stable sort, unlike topk, says who wins a tie
        order = torch.sort(shares, dim=-1, descending=True, stable=True)
        weights, experts = order.values[:, : routing.top_k], order.indices[:, : routing.top_k]
        if routing.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routed(experts, weights * routing.scale if routing.scale != 1.0 else weights)

    def swiglu(self, prefix: str, rows: Tensor) -> Tensor:
        """Return the feed-forward with matrices ``prefix.gate_up`` and ``prefix.down`` of ``rows`` ``[n, hidden]``."""
        gate, up = linear(rows, self.weight(prefix + ".gate_up")).chunk(2, dim=-1)
        return linear(silu(gate) * up, self.weight(prefix + ".down"))

    def mixture(self, index: int, normed: Tensor, routed: Routed) -> Tensor:
        """Return what experts and shared experts of layer ``index`` add for ``normed`` ``[tokens, hidden]``."""
        block = max(1, _BLOCK_BYTES // (routed.experts.shape[1] * normed.shape[1] * 4))
        parts = zip(normed.split(block), routed.experts.split(block), routed.weights.split(block), strict=True)
        summed = torch.cat([self._experts(index, *part) for part in parts]) if len(normed) else normed
        return self.with_shared(index, normed, summed)

    def with_shared(self, index: int, normed: Tensor, summed: Tensor) -> Tensor:
        """Return ``summed``, what the experts of layer ``index`` give for ``normed``, with the shared ones' output."""
        layer = self.graph.layers[index]
        return summed + self._shared(layer, normed) if layer.shared_dim else summed

    def run_layer(self, index: int, hidden: Tensor, past: KeyValues | None = None) -> tuple[Tensor, Routed | None]:
        """Return ``hidden`` ``[sequences, tokens, hidden]`` after layer ``index``, and what its router chose."""
        hidden = self.attention(index, hidden, past)
        normed = self.normed(index, hidden).flatten(0, 1)
        if self.graph.layers[index].routing is None:
            return hidden + self.swiglu(f"layers.{index}.mlp", normed).reshape(hidden.shape), None
        routed = self.route(index, normed)
        return hidden + self.mixture(index, normed, routed).reshape(hidden.shape), routed

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[..., vocabulary]`` of ``hidden`` ``[..., hidden]``: final norm and head."""
        return linear(self._norm(hidden, "norm"), self.weight("head"))

    def head_blocks(self, hidden: Tensor) -> Iterator[Tensor]:
        """Yield the logits ``[some, vocabulary]`` of ``hidden`` flattened to rows, in blocks of bounded size."""
        head, rows = self.weight("head"), hidden.reshape(-1, self.graph.hidden_dim)
        for part in rows.split(max(1, _HEAD_BLOCK_BYTES // (self.graph.vocabulary * 4))):
            yield linear(self._norm(part, "norm"), head)

    # --- wholes ---

    def forward(
        self,
        tokens: Tensor,
        *,
        past: KeyValues | None = None,
        on_layer: Callable[[int, Tensor], object] | None = None,
    ) -> Passed:
        """Run ``tokens`` ``[sequences, tokens]`` int64 through all layers.

        Shorter sequences may be padded behind with any token: attention is causal, so what stands before is not
        touched; leave the padding out of what is made of ``routed``.

        Args:
            tokens: Token numbers.
            past: What came before; extended.
            on_layer: Called with a layer's number and what goes into it, before it runs.

        Raises:
            InputError: A token is not in the vocabulary, or the weights cannot be read.
        """
        hidden = self.embed(tokens)
        routed: list[Routed | None] = []
        for index in range(len(self.graph.layers)):
            if on_layer is not None:
                on_layer(index, hidden)
            hidden, chosen = self.run_layer(index, hidden, past)
            routed.append(chosen)
        return Passed(hidden, tuple(routed))

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[sequences, tokens, vocabulary]`` of ``tokens`` ``[sequences, tokens]``."""
        return self.head(self.forward(tokens).hidden)

    def losses(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the cross entropy ``[sequences, tokens - 1]`` in nats of each next token, given ``hidden``."""
        wanted = tokens[:, 1:].reshape(-1)
        found, done = [], 0
        for block in self.head_blocks(hidden[:, :-1]):
            part = wanted[done : done + len(block)]
            found.append(-log_softmax(block, dim=-1).gather(1, part[:, None])[:, 0])
            done += len(block)
        return torch.cat(found).reshape(len(tokens), -1)

    def generate(self, prompt: Sequence[int], most: int) -> tuple[int, ...]:
        """Return up to ``most`` tokens that follow ``prompt``, greedily; the end token, if reached, is the last.

        Raises:
            InputError: The prompt is empty or longer than the context.
        """
        if not 0 < len(prompt) <= self.graph.context_tokens:
            raise InputError(f"prompt has {len(prompt)} tokens; 1 to {self.graph.context_tokens} are possible")
        past = KeyValues()
        step, found = list(prompt), list[int]()
        while len(found) < min(most, self.graph.context_tokens - len(prompt)):
            hidden = self.forward(torch.tensor([step]), past=past).hidden[0, -1]
            # numpy's argmax takes the first of equals; torch promises nothing
            step = [int(np.argmax(self.head(hidden).numpy()))]
            found += step
            if step[0] in self.graph.end_tokens:
                break
        return tuple(found)

    # --- inner ---

    def _own(self, name: str) -> Tensor:
        key = self._key(name)
        kept = self._kept.find(key)
        if kept is not None:
            return kept
        tensor = torch.from_numpy(self.source.tensor(key))
        self._kept.keep(key, tensor)
        return tensor

    def _key(self, name: str) -> str:
        # a tied head is the embedding, and is kept once
        return "embedding" if name == "head" and self.graph.tied_embedding else name

    def _norm(self, rows: Tensor, name: str) -> Tensor:
        weight = self.weight(name)
        return rms_norm(rows, weight.shape, weight, self.graph.norm_epsilon)

    def _rotation(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine ``[count, rotary_dim / 2]`` from position ``first`` on."""
        inverse = torch.tensor(self.graph.attention.inverse_frequencies, dtype=torch.float32)
        angles = torch.arange(first, first + count, dtype=torch.float32)[:, None] * inverse
        scale = self.graph.attention.rotary_scale
        return angles.cos() * scale, angles.sin() * scale

    def _grouped(self, start: str, normed: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[sequences, heads, tokens, dim]`` with positions turned in."""
        shape = self.graph.attention
        bias = self.weight(start + "qkv_bias") if shape.bias else None
        widths = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.value_dim)
        queries, keys, values = linear(normed, self.weight(start + "qkv"), bias).split(widths, dim=-1)
        if shape.query_key_norm == "projection":
            queries, keys = self._norm(queries, start + "q_norm"), self._norm(keys, start + "k_norm")
        queries, keys, values = (
            _heads(queries, shape.heads),
            _heads(keys, shape.kv_heads),
            _heads(values, shape.kv_heads),
        )
        if shape.query_key_norm == "head":
            queries, keys = self._norm(queries, start + "q_norm"), self._norm(keys, start + "k_norm")
        return _turned(queries, *turn), _turned(keys, *turn), values

    def _latent(self, start: str, normed: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of latent attention, keys and values expanded per head."""
        shape = self.graph.attention
        plain = shape.head_dim - shape.rotary_dim
        queries = _heads(linear(normed, self.weight(start + "q")), shape.heads)
        queries = torch.cat((queries[..., :plain], _turned(queries[..., plain:], *turn)), dim=-1)
        down = linear(normed, self.weight(start + "kv_a"))
        latent = self._norm(down[..., : shape.latent_dim], start + "kv_norm")
        shared = _turned(down[..., shape.latent_dim :].unsqueeze(1), *turn)
        both = _heads(linear(latent, self.weight(start + "kv_b")), shape.heads)
        keys = torch.cat((both[..., :plain], shared.expand(-1, shape.heads, -1, -1)), dim=-1)
        return queries, keys, both[..., plain:]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        """Return ``[sequences, heads, tokens, value_dim]``; query i sees keys 0 to ``first + i``."""
        count, total = queries.shape[2], keys.shape[2]
        mask = None
        if first and count > 1:
            mask = torch.arange(total)[None, :] <= torch.arange(first, first + count)[:, None]
        return scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=not first,
            scale=self.graph.attention.softmax_scale,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )

    def _experts(self, index: int, normed: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs for a block of tokens."""
        mixing = Mixing(normed, Routed(experts, weights))
        for expert in torch.unique(experts).tolist():
            mixing.take(expert, partial(self.swiglu, f"layers.{index}.experts.{expert}"))
        return mixing.summed()

    def _shared(self, layer: DecoderLayer, normed: Tensor) -> Tensor:
        output = self.swiglu(f"layers.{layer.index}.shared", normed)
        if not layer.shared_gate:
            return output
        return torch.sigmoid(linear(normed, self.weight(f"layers.{layer.index}.shared_gate"))) * output


def divergence(true: Reference, true_hidden: Tensor, other: Reference, other_hidden: Tensor) -> Tensor:
    """Return the KL divergence ``[rows]`` in nats of ``other``'s next-token distributions from ``true``'s.

    KL(p‖q) = Σ p (log p - log q), p of ``true``. The logits are made in blocks and never held whole.

    Args:
        true: Whose head gives p.
        true_hidden: ``[..., hidden]`` before the final norm.
        other: Whose head gives q.
        other_hidden: Of the same shape.
    """
    (found,) = divergences(true, true_hidden, other, (other_hidden,))
    return found


def divergences(true: Reference, true_hidden: Tensor, other: Reference, hidden: Sequence[Tensor]) -> list[Tensor]:
    """Return ``divergence`` of each of ``hidden``; the logits of ``true_hidden`` are made once for all of them."""
    theirs = [other.head_blocks(one) for one in hidden]
    found: list[list[Tensor]] = [[] for _ in hidden]
    for block in true.head_blocks(true_hidden):
        log_p = log_softmax(block, dim=-1)
        p = log_p.exp()
        for parts, blocks in zip(found, theirs, strict=True):
            log_q = log_softmax(next(blocks), dim=-1)
            parts.append((p * (log_p - log_q)).sum(dim=-1))
    return [torch.cat(parts) for parts in found]


def _heads(rows: Tensor, heads: int) -> Tensor:
    """Return ``[sequences, tokens, heads * dim]`` as ``[sequences, heads, tokens, dim]``."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def _turned(rows: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate ``[..., tokens, dim]``, half-split, by angles ``[tokens, dim / 2]`` (RoFormer, arXiv 2104.09864)."""
    first, second = rows.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
