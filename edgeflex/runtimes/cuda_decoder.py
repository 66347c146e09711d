"""A decoder on a CUDA device through PyTorch: dense parts resident, experts where they are told to lie.

The interface is that of ``runtimes.engines.DecoderEngine``, with two memories for experts instead of one: the host's
arena, which readers fill from flash and copies start from, and the device's. What the layers compute, and in which
order it is summed, is ``models.decoder_reference``'s; a token's experts are summed by falling router weight, whatever
was resident. Hidden rows, norms, routers and sums are fp32 always, products run in ``dtype``.

A pass computes layer after layer without asking anybody as long as all experts of an event lie on the device; else it
returns what the event uses. The router's choice is the one thing that the processor waits for in a layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from edgeflex.errors import DeviceError, InputError
from edgeflex.runtimes.cuda_streams import explained
from edgeflex.runtimes.cuda_weights import Dense, Kind, dense_bytes, feed_forward, load_dense, restored
from edgeflex.runtimes.native import Chosen, Missing, Times
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from edgeflex.runtimes.cuda_host import HostExperts
    from edgeflex.runtimes.cuda_streams import Streams
    from edgeflex.schema import Precision
    from edgeflex.schema_moe import DecoderManifest

    Float32 = NDArray[np.float32]
    Key = tuple[int, int]

ALIGNMENT_BYTES = 4096  # of experts in both arenas
_RUNNING = explained("the decoder's device failed while running")
_BATCH = 8  # experts whose numbers are restored at once, at most


class DeviceBytes(NamedTuple):
    """Bytes on the device beside the experts' arena.

    Attributes:
        dense: Weights that stay.
        key_values: Keys and values of a full context.
        work: Activations, experts' restored numbers, and what libraries keep.
    """

    dense: int
    key_values: int
    work: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.dense + self.key_values + self.work


def device_bytes(
    manifest: DecoderManifest,
    kinds: Mapping[Key, Kind],
    dtype: torch.dtype,
    *,
    context_tokens: int,
    chunk_tokens: int,
    library_bytes: int,
) -> DeviceBytes:
    """Return what a decoder takes on a device beside its experts' arena.

    Args:
        manifest: Of the bundle.
        kinds: Of all experts.
        dtype: Products run in it.
        context_tokens: Positions that the key/value cache holds.
        chunk_tokens: Most tokens of one forward pass.
        library_bytes: What libraries take.
    """
    graph, attention = manifest.graph, manifest.graph.attention
    width = attention.kv_heads * (attention.head_dim + attention.value_dim)
    top_k = max((layer.routing.top_k for layer in graph.layers if layer.routing), default=0)
    inner = max((max(layer.dense_dim, layer.shared_dim, layer.expert_dim) for layer in graph.layers), default=0)
    projected = attention.heads * (attention.head_dim + attention.value_dim) + width
    # residual, norm and their copies in dtype, projections and their turned copies, feed-forwards, experts' outputs
    floats = chunk_tokens * ((top_k + 8) * graph.hidden_dim + 4 * projected + 6 * inner * max(top_k, 1))
    floats += 3 * attention.heads * chunk_tokens * context_tokens  # scores, where no kernel fuses them
    floats += chunk_tokens * graph.vocabulary
    restoring = max((_restoring_bytes(kind, dtype) for kind in set(kinds.values())), default=0)
    largest = max((_largest_dense(manifest, dtype), min(_BATCH, max(top_k, 1)) * restoring))
    return DeviceBytes(
        dense_bytes(manifest, dtype),
        len(graph.layers) * width * context_tokens * dtype.itemsize,
        4 * floats + largest + library_bytes,
    )


def _restoring_bytes(kind: Kind, dtype: torch.dtype) -> int:
    """Return the bytes of one expert's codes, gathered, and its two matrices with what they are made through."""
    return kind.size_bytes + (dtype.itemsize + 1) * (kind.gate_up.numbers + kind.down.numbers)


def _largest_dense(manifest: DecoderManifest, dtype: torch.dtype) -> int:
    """Return the bytes of the largest dense matrix's codes, and of its halves, while it is being restored."""
    dense = (one for one in manifest.matrices if ".experts." not in one.name)
    return max((2 * one.weights_bytes + one.scales_bytes + one.rows * one.columns * dtype.itemsize for one in dense), default=0)


@dataclass
class _Pass:
    """One forward pass.

    Attributes:
        position: Of its first token.
        hidden: ``[tokens, hidden]``, as layers leave it, on the device.
        every_logit: Whether all tokens' logits are wanted.
    """

    position: int
    hidden: Tensor
    every_logit: bool
    ended: bool = False
    logits: Float32 | None = None


@dataclass
class _Waiting:
    """An event whose experts are not all computed.

    Attributes:
        layer: Where.
        residual: ``[tokens, hidden]`` after attention.
        normed: What experts see.
        rows: The same on the host; None until an expert is computed there.
        weights: ``[tokens, top_k]`` on the device.
        outputs: ``[tokens * top_k, hidden]`` of what is computed.
        shared: What the shared experts add.
        order: ``[tokens * top_k]`` on the host: choices grouped by expert, each expert's by token.
        places: The same on the device.
        spans: Each expert's first and last place in ``order``.
        open: What is not computed.
    """

    layer: int
    residual: Tensor
    normed: Tensor
    rows: Float32 | None
    weights: Tensor
    outputs: Tensor
    shared: Tensor | None
    order: NDArray[np.int64]
    places: Tensor
    spans: Mapping[int, tuple[int, int]]
    open: set[int]

    @property
    def union(self) -> tuple[int, ...]:
        """Its experts, ascending."""
        return tuple(self.spans)


class DeviceEngine:
    """A decoder on a device; ``load`` comes before everything but arenas and places. Not for several threads.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        kinds: Of all experts.
        streams: The device.
        host: Computes experts that stay with the processor.
        dtype: Products run in it.
        context_tokens: Positions that the key/value cache holds.
        chunk_tokens: Most tokens of one forward pass.
        clock: Seconds, rising.
    """

    def __init__(
        self,
        folder: Path,
        manifest: DecoderManifest,
        kinds: Mapping[Key, Kind],
        streams: Streams,
        host: HostExperts,
        *,
        dtype: torch.dtype,
        context_tokens: int,
        chunk_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.streams = streams
        self.host_memory_problem = ""
        self._folder = folder
        self._manifest = manifest
        self._graph = manifest.graph
        self._kinds = kinds
        self._host = host
        self._dtype = dtype
        self._context_tokens = context_tokens
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._dense: Dense | None = None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._host_arena: NDArray[np.uint8] | None = None
        self._arena: Tensor | None = None
        self._host_places: dict[Key, int] = {}
        self._places: dict[Key, int] = {}
        self._uploads: dict[Key, Any] = {}
        self._pass: _Pass | None = None
        self._waiting: _Waiting | None = None
        self._log: list[Chosen] = []
        self._filled = 0
        self._seconds = [0.0, 0.0, 0.0]

    # --- memory ---------------------------------------------------------------------------------------

    def load(self) -> None:
        """Check the bundle's dense files, bring them to the device, and take memory for keys and values.

        On a fault everything is given back.

        Raises:
            BundleError: A file is missing or damaged.
            DeviceError: The device refused, or the disk failed.
        """
        attention, context = self._graph.attention, self._context_tokens
        try:
            with torch.inference_mode(), explained("the device takes no dense weights, keys and values"):
                self._dense = load_dense(self._folder, self._manifest, self.streams, self._dtype)
                for _ in self._graph.layers:
                    shape = (attention.kv_heads, context)
                    self._keys.append(self.streams.empty((*shape, attention.head_dim), self._dtype))
                    self._values.append(self.streams.empty((*shape, attention.value_dim), self._dtype))
        except BaseException:
            self.close()
            raise

    def arena(self, capacity_bytes: int) -> NDArray[np.uint8]:
        """Return page-aligned memory of the host for experts, pinned where the driver allows it.

        Where it does not, ``host_memory_problem`` says why, and copies take a detour through the driver's buffers.

        Raises:
            DeviceError: No memory.
        """
        try:
            found = self.streams.host(capacity_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise DeviceError(
                f"no memory for {format_bytes(capacity_bytes)} of experts beside the device: {error}. "
                "All of it is taken at once. Give a smaller RAM tier."
            ) from error
        self.host_memory_problem = found.problem
        self._host_places.clear()
        self._host_arena = found.data
        return found.data

    def device_arena(self, capacity_bytes: int) -> None:
        """Take memory of the device for experts, all at once; it is never taken again or moved.

        Raises:
            DeviceError: The device refused.
        """
        self._places.clear()
        self._arena = None
        with explained(f"the device gives no {format_bytes(capacity_bytes)} for experts"):
            self._arena = self.streams.empty((capacity_bytes,), torch.uint8)

    def bind(self, layer: int, expert: int, precision: Precision, offset: int) -> None:
        """Say that an expert's record lies at ``offset`` of the host's arena.

        Raises:
            InputError: No such expert, or it does not lie in the arena.
        """
        held = 0 if self._host_arena is None else self._host_arena.size
        self._check_place(layer, expert, offset, held)
        if precision is not self._kinds[layer, expert].down.precision:
            raise InputError(f"expert {expert} of layer {layer} is not {precision.value}. Mend the caller.")
        self._host_places[layer, expert] = offset

    def unbind(self, layer: int, expert: int) -> None:
        """Forget where an expert lies on the host.

        Raises:
            InputError: No such expert.
        """
        self._kind(layer, expert)
        self._host_places.pop((layer, expert), None)

    @_RUNNING
    def upload(self, layer: int, expert: int, offset: int, after: Any) -> None:
        """Start copying an expert from the host's arena to ``offset`` of the device's, where it lies from now on.

        Args:
            layer: Its layer.
            expert: Its number, bound.
            offset: A multiple of 4096.
            after: A mark of ``streams.fence``: what still uses these bytes stands before it.

        Raises:
            InputError: No such expert, it is not on the host, or it does not fit there.
            DeviceError: The device failed.
        """
        arena = self._device_arena()
        self._check_place(layer, expert, offset, arena.numel())
        source = torch.from_numpy(self._host_bytes(layer, expert))
        mark = self.streams.upload(arena[offset : offset + source.numel()], source, after)
        self._places[layer, expert] = offset
        self._uploads[layer, expert] = mark

    def drop(self, layer: int, expert: int) -> None:
        """Forget where an expert lies on the device."""
        self._places.pop((layer, expert), None)
        self._uploads.pop((layer, expert), None)

    @_RUNNING
    def slide(self, layer: int, expert: int, target: int) -> None:
        """Move an expert within the device's arena; what lies at ``target`` is lost, also its own old bytes.

        Raises:
            InputError: It is not there.
            DeviceError: The device failed.
        """
        arena, source = self._device_arena(), self._places.get((layer, expert))
        if source is None:
            raise InputError(f"expert {expert} of layer {layer} is not on the device. Mend the caller.")
        self._await(layer, expert)
        size_bytes = self._kinds[layer, expert].size_bytes
        arena[target : target + size_bytes] = arena[source : source + size_bytes].clone()
        self._places[layer, expert] = target

    @_RUNNING
    def fetch(self, layer: int, expert: int) -> NDArray[np.uint8]:
        """Return a copy of an expert's record from the device.

        Raises:
            InputError: It is not there.
            DeviceError: The device failed.
        """
        offset = self._places.get((layer, expert))
        if offset is None:
            raise InputError(f"expert {expert} of layer {layer} is not on the device. Mend the caller.")
        self._await(layer, expert)
        size_bytes = self._kinds[layer, expert].size_bytes
        found: NDArray[np.uint8] = self._device_arena()[offset : offset + size_bytes].cpu().numpy().copy()
        return found

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys, values and activations on the device; neither arenas nor weights."""
        known = device_bytes(
            self._manifest,
            self._kinds,
            self._dtype,
            context_tokens=self._context_tokens,
            chunk_tokens=self._chunk_tokens,
            library_bytes=self.streams.library_bytes,
        )
        return known.key_values + known.work

    def close(self) -> None:
        """Give all memory back; a second call does nothing, and nothing runs afterwards."""
        self._dense = self._arena = self._pass = self._waiting = None
        self._keys, self._values = [], []
        self._places.clear()
        self._uploads.clear()
        self._host_places.clear()
        self.streams.close()
        self._host_arena = None

    # --- running --------------------------------------------------------------------------------------

    @_RUNNING
    @torch.inference_mode()
    def forward(self, tokens: NDArray[np.int32], position: int, *, every_logit: bool = False) -> Missing | None:
        """Run tokens at ``position``, until done (None) or an expert is not on the device.

        Args:
            tokens: ``[count]`` ids, at most ``chunk_tokens``.
            position: Of the first; at most the number of tokens run so far. A smaller one goes back there.
            every_logit: ``logits`` gives all tokens' rows, not only the last one's.

        Raises:
            InputError: Weights are not loaded, the tokens do not fit the context or the vocabulary, or leave a gap.
            DeviceError: The device failed, or the weights give numbers that are not finite.
        """
        dense = self._loaded()
        flat = np.ascontiguousarray(tokens, dtype=np.int32).reshape(-1)
        self._check_tokens(flat, position)
        self._waiting = None
        self._filled = position  # until the pass is through, its keys do not count
        rows = np.ascontiguousarray(dense.embedding(flat))
        self._pass = _Pass(position, torch.from_numpy(rows).to(self.streams.device), every_logit)
        return self._advance(self._pass, 0)

    @_RUNNING
    @torch.inference_mode()
    def compute(self, experts: Sequence[int]) -> None:
        """Let the device compute these experts of the waiting event, each after its copy has landed.

        Returns at once on a device that runs by itself.

        Raises:
            InputError: Nothing waits, or one is not in the event or not on the device.
            DeviceError: The device failed.
        """
        waiting = self._event()
        self._refuse_absent(waiting, experts, self._places)
        self._compute(waiting, [expert for expert in experts if expert in waiting.open])

    @_RUNNING
    @torch.inference_mode()
    def compute_on_host(self, experts: Sequence[int]) -> None:
        """Compute these experts of the waiting event with the processor, from the host's arena.

        Raises:
            InputError: Nothing waits, or one is not in the event or not on the host.
            DeviceError: The device failed.
        """
        waiting = self._event()
        self._refuse_absent(waiting, experts, self._host_places)
        if waiting.rows is None:
            waiting.rows = waiting.normed.cpu().numpy()
        start = self._clock()
        for expert in experts:
            if expert in waiting.open:
                self._compute_on_host(waiting, waiting.rows, expert)
        self._seconds[1] += self._clock() - start

    @_RUNNING
    @torch.inference_mode()
    def resume(self) -> Missing | None:
        """Compute what of the waiting event lies on the device and go on; the event again if some is missing.

        Raises:
            InputError: Nothing waits.
            DeviceError: The device failed.
        """
        waiting, running = self._event(), self._running()
        self._compute(waiting, [one for one in sorted(waiting.open) if (waiting.layer, one) in self._places])
        if waiting.open:
            return self._missing(waiting)
        self._end_event(running, waiting)
        return self._advance(running, waiting.layer + 1)

    def take_events(self) -> list[Chosen]:
        """Return what was routed since the last call, in order; a waiting event stands last, once."""
        taken, self._log = self._log, []
        return taken

    @_RUNNING
    @torch.inference_mode()
    def logits(self) -> Float32:
        """Return a copy of the logits: ``[vocabulary]`` of the last token, ``[tokens, vocabulary]`` if all were asked.

        Raises:
            InputError: No pass has ended.
            DeviceError: The device failed, or the weights give numbers that are not finite.
        """
        running, dense = self._running(), self._loaded()
        if not running.ended:
            raise InputError("there are no logits: the pass waits for experts. Mend the caller.")
        if running.logits is None:
            start = self._clock()
            rows = running.hidden if running.every_logit else running.hidden[-1:]
            running.logits = dense.matrices["head"](self._norm(rows, "norm")).cpu().numpy()
            self._seconds[0] += self._clock() - start
            if not np.isfinite(running.logits).all():
                raise _not_finite(len(self._graph.layers) - 1)
        return running.logits.copy() if running.every_logit else running.logits[0].copy()

    @_RUNNING
    @torch.inference_mode()
    def guess(self, layer: int) -> tuple[int, ...]:
        """Return the experts that ``layer`` would choose for the tokens as they are now, ascending.

        Raises:
            InputError: The layer has no experts, or no pass is under way.
            DeviceError: The device failed.
        """
        known = self._graph.layers[layer].routing if 0 <= layer < len(self._graph.layers) else None
        if known is None:
            raise InputError(f"layer {layer} has no experts to guess. Mend the caller.")
        rows = self._running().hidden if self._waiting is None else self._waiting.residual
        _, experts = self._choose(layer, self._norm(rows, f"layers.{layer}.post_norm"))
        return tuple(np.unique(experts.cpu().numpy()).tolist())

    def times(self) -> Times:
        """Return the processor's seconds since the last call: dense parts, experts, all else.

        A device that runs by itself is waited for where the router's choice is read, which is the dense parts' share.
        """
        taken, self._seconds = self._seconds, [0.0, 0.0, 0.0]
        return Times(*taken)

    def upload_seconds(self) -> float:
        """Return the seconds that ended uploads took since the last call, and forget them; nothing may be under way."""
        total = sum(self.streams.seconds(mark) for mark in self._uploads.values())
        self._uploads.clear()
        return total

    # --- layers ---------------------------------------------------------------------------------------

    def _advance(self, running: _Pass, start: int) -> Missing | None:
        """Run the layers from ``start`` on."""
        for layer in range(start, len(self._graph.layers)):
            begun = self._clock()
            residual = running.hidden + self._attention(running, layer)
            normed = self._norm(residual, f"layers.{layer}.post_norm")
            if self._graph.layers[layer].routing is None:
                running.hidden = residual + self._swiglu(f"layers.{layer}.mlp", normed)
                continue
            waiting = self._route(layer, residual, normed)
            self._seconds[0] += self._clock() - begun
            if any((layer, expert) not in self._places for expert in waiting.spans):
                self._waiting = waiting
                return self._missing(waiting)
            self._compute(waiting, waiting.union)
            self._end_event(running, waiting)
        running.ended = True
        self._filled = running.position + len(running.hidden)
        return None

    def _norm(self, rows: Tensor, name: str) -> Tensor:
        weight = self._loaded().small[name]
        return rms_norm(rows, weight.shape, weight, self._graph.norm_epsilon)

    def _swiglu(self, prefix: str, rows: Tensor) -> Tensor:
        matrices = self._loaded().matrices
        return matrices[f"{prefix}.down"](feed_forward(matrices[f"{prefix}.gate_up"](rows)))

    def _attention(self, running: _Pass, layer: int) -> Tensor:
        """Return what attention adds, ``[tokens, hidden]``, having stored keys and values."""
        start, first, count = f"layers.{layer}.", running.position, len(running.hidden)
        normed = self._norm(running.hidden, start + "input_norm")
        turn = self._rotation(first, count)
        project = self._latent if self._graph.attention.kind == "latent" else self._grouped
        queries, keys, values = project(start, normed, turn)
        held_keys, held_values, end = self._keys[layer], self._values[layer], first + count
        held_keys[:, first:end], held_values[:, first:end] = keys, values
        mixed = scaled_dot_product_attention(
            queries.to(self._dtype).unsqueeze(0),
            held_keys[:, :end].unsqueeze(0),
            held_values[:, :end].unsqueeze(0),
            attn_mask=self._mask(first, count),
            is_causal=not first,
            scale=self._graph.attention.softmax_scale,
            enable_gqa=queries.shape[0] != keys.shape[0],
        )
        return self._loaded().matrices[start + "o"](mixed[0].transpose(0, 1).flatten(1))

    def _mask(self, first: int, count: int) -> Tensor | None:
        """Return which of the keys so far each of several later tokens sees; None where a kernel's own way does."""
        if not first or count == 1:
            return None
        device = self.streams.device
        return torch.arange(first + count, device=device) <= torch.arange(first, first + count, device=device)[:, None]

    def _rotation(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine ``[count, rotary_dim / 2]``, from angles in fp32 as trained."""
        attention = self._graph.attention
        inverse = torch.tensor(attention.inverse_frequencies, dtype=torch.float32)
        angles = torch.arange(first, first + count, dtype=torch.float32)[:, None] * inverse
        both = torch.stack((angles.cos(), angles.sin())) * attention.rotary_scale
        cosine, sine = both.to(self.streams.device)
        return cosine, sine

    def _grouped(self, start: str, normed: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[heads, tokens, dim]`` with positions turned in."""
        shape, dense = self._graph.attention, self._loaded()
        widths = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.value_dim)
        mixed = dense.matrices[start + "qkv"](normed)
        if shape.bias:
            mixed = mixed + dense.small[start + "qkv_bias"]
        queries, keys, values = mixed.split(widths, dim=-1)
        if shape.query_key_norm == "projection":
            queries, keys = self._norm(queries, start + "q_norm"), self._norm(keys, start + "k_norm")
        queries, keys = _heads(queries, shape.heads), _heads(keys, shape.kv_heads)
        if shape.query_key_norm == "head":
            queries, keys = self._norm(queries, start + "q_norm"), self._norm(keys, start + "k_norm")
        return _turned(queries, *turn), _turned(keys, *turn), _heads(values, shape.kv_heads)

    def _latent(self, start: str, normed: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of latent attention, keys and values expanded per head."""
        shape, matrices = self._graph.attention, self._loaded().matrices
        plain = shape.head_dim - shape.rotary_dim
        queries = _heads(matrices[start + "q"](normed), shape.heads)
        queries = torch.cat((queries[..., :plain], _turned(queries[..., plain:], *turn)), dim=-1)
        down = matrices[start + "kv_a"](normed)
        latent = self._norm(down[..., : shape.latent_dim], start + "kv_norm")
        shared = _turned(down[..., shape.latent_dim :].unsqueeze(0), *turn)
        both = _heads(matrices[start + "kv_b"](latent), shape.heads)
        keys = torch.cat((both[..., :plain], shared.expand(shape.heads, -1, -1)), dim=-1)
        return queries, keys, both[..., plain:]

    # --- experts --------------------------------------------------------------------------------------

    def _choose(self, layer: int, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and ids ``[tokens, top_k]`` by falling weight, ties to the lower id."""
        routing = self._graph.layers[layer].routing
        if routing is None:
            raise InputError(f"layer {layer} has no experts. Mend the caller.")
        shares = torch.softmax(linear(normed, self._loaded().small[f"layers.{layer}.router"]), dim=-1)
        order = torch.sort(shares, dim=-1, descending=True, stable=True)
        weights, experts = order.values[:, : routing.top_k], order.indices[:, : routing.top_k]
        if routing.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights * routing.scale if routing.scale != 1.0 else weights), experts

    def _route(self, layer: int, residual: Tensor, normed: Tensor) -> _Waiting:
        """Read the router's choice; with one token, also the row that experts on the host would need."""
        weights, chosen = self._choose(layer, normed)
        one = len(normed) == 1
        found = torch.cat((weights, chosen.float(), normed) if one else (weights, chosen.float()), dim=-1).cpu().numpy()
        top_k = weights.shape[1]
        told, experts = found[:, :top_k], found[:, top_k : 2 * top_k].astype(np.int32)
        if not np.isfinite(told).all():
            raise _not_finite(layer)
        self._log.append(Chosen(layer, experts, np.ascontiguousarray(told)))
        order, spans = _grouped_choices(experts)
        return _Waiting(
            layer,
            residual,
            normed,
            found[:, 2 * top_k :] if one else None,
            weights,
            torch.empty((order.size, normed.shape[1]), dtype=torch.float32, device=normed.device),
            self._shared(layer, normed),
            order,
            torch.from_numpy(order).to(normed.device),
            spans,
            set(spans),
        )

    def _shared(self, layer: int, normed: Tensor) -> Tensor | None:
        known = self._graph.layers[layer]
        if not known.shared_dim:
            return None
        output = self._swiglu(f"layers.{layer}.shared", normed)
        if not known.shared_gate:
            return output
        return torch.sigmoid(linear(normed, self._loaded().small[f"layers.{layer}.shared_gate"])) * output

    def _compute(self, waiting: _Waiting, experts: Sequence[int]) -> None:
        """Let the device compute experts, those of one kind together, a few at a time."""
        start = self._clock()
        kinds: dict[Kind, list[int]] = {}
        for expert in experts:
            self._await(waiting.layer, expert)
            kinds.setdefault(self._kinds[waiting.layer, expert], []).append(expert)
        for kind, members in kinds.items():
            for first in range(0, len(members), _BATCH):
                self._compute_batch(waiting, kind, members[first : first + _BATCH])
        waiting.open.difference_update(experts)
        self._seconds[1] += self._clock() - start

    def _compute_batch(self, waiting: _Waiting, kind: Kind, experts: Sequence[int]) -> None:
        data = self._gathered(waiting.layer, experts, kind.size_bytes)
        spans = [waiting.spans[expert] for expert in experts]
        gate_up = restored(data, kind.gate_up, self._dtype)
        if len(waiting.normed) == 1:
            inner = feed_forward(gate_up.each(waiting.normed.expand(len(experts), -1)))
            del gate_up
            out = restored(data, kind.down, self._dtype).each(inner)
            places = torch.cat([waiting.places[first:last] for first, last in spans])
            waiting.outputs.index_copy_(0, places, out)
            return
        down = restored(data, kind.down, self._dtype)
        if self.streams.grouped and self._dtype is torch.bfloat16:
            self._compute_grouped(waiting, gate_up, down, spans)
            return
        for index, (first, last) in enumerate(spans):
            places = waiting.places[first:last]
            rows = waiting.normed.index_select(0, places // waiting.weights.shape[1])
            out = down.one(index)(feed_forward(gate_up.one(index)(rows)))
            waiting.outputs.index_copy_(0, places, out)

    def _compute_grouped(self, waiting: _Waiting, gate_up: Any, down: Any, spans: Sequence[tuple[int, int]]) -> None:
        """Compute the rows of several experts with one kernel for each matrix."""
        device = waiting.normed.device
        places = torch.cat([waiting.places[first:last] for first, last in spans])
        counts = torch.tensor([last - first for first, last in spans])
        ends = counts.cumsum(0).to(torch.int32).to(device)
        owners = torch.repeat_interleave(torch.arange(len(spans)), counts).to(device)
        rows = waiting.normed.index_select(0, places // waiting.weights.shape[1])
        inner = feed_forward(gate_up.grouped(rows, ends, owners))
        waiting.outputs.index_copy_(0, places, down.grouped(inner, ends, owners))

    def _gathered(self, layer: int, experts: Sequence[int], size_bytes: int) -> Tensor:
        """Return experts' records ``[experts, bytes]``: a view of one, a copy of several."""
        arena = self._device_arena()
        offsets = [self._places[layer, expert] for expert in experts]
        if len(offsets) == 1:
            return arena[offsets[0] : offsets[0] + size_bytes].unsqueeze(0)
        return torch.stack([arena[offset : offset + size_bytes] for offset in offsets])

    def _compute_on_host(self, waiting: _Waiting, rows: Float32, expert: int) -> None:
        first, last = waiting.spans[expert]
        tokens = waiting.order[first:last] // waiting.weights.shape[1]
        found = self._host(
            self._kinds[waiting.layer, expert], self._host_bytes(waiting.layer, expert), np.ascontiguousarray(rows[tokens])
        )
        out = torch.from_numpy(found).to(waiting.outputs.device)
        waiting.outputs.index_copy_(0, waiting.places[first:last], out)
        waiting.open.discard(expert)

    def _await(self, layer: int, expert: int) -> None:
        """Let the device's computing wait for an expert's copy."""
        mark = self._uploads.get((layer, expert))
        if mark is not None:
            self.streams.wait(mark)

    def _end_event(self, running: _Pass, waiting: _Waiting) -> None:
        """Sum what experts gave, the largest weight first, then add the shared experts."""
        outputs = waiting.outputs.view(*waiting.weights.shape, -1)
        total = outputs[:, 0] * waiting.weights[:, :1]
        for slot in range(1, waiting.weights.shape[1]):
            total = total + outputs[:, slot] * waiting.weights[:, slot : slot + 1]
        if waiting.shared is not None:
            total = total + waiting.shared
        running.hidden = waiting.residual + total
        self._waiting = None

    # --- refusals -------------------------------------------------------------------------------------

    def _missing(self, waiting: _Waiting) -> Missing:
        lacking = [one for one in waiting.union if one in waiting.open and (waiting.layer, one) not in self._places]
        return Missing(waiting.layer, waiting.union, tuple(lacking))

    def _refuse_absent(self, waiting: _Waiting, experts: Sequence[int], places: Mapping[Key, int]) -> None:
        wrong = [one for one in experts if one not in waiting.spans or (waiting.layer, one) not in places]
        if wrong:
            raise InputError(
                f"layer {waiting.layer}: experts {wrong} are not in the event or not where they are to be computed; it "
                f"uses {waiting.union}. Mend the caller."
            )

    def _host_bytes(self, layer: int, expert: int) -> NDArray[np.uint8]:
        offset = self._host_places.get((layer, expert))
        if offset is None or self._host_arena is None:
            raise InputError(f"expert {expert} of layer {layer} is not in the host's arena. Mend the caller.")
        return self._host_arena[offset : offset + self._kinds[layer, expert].size_bytes]

    def _check_place(self, layer: int, expert: int, offset: int, held: int) -> None:
        size_bytes = self._kind(layer, expert).size_bytes
        if offset % ALIGNMENT_BYTES or not 0 <= offset <= held - size_bytes:
            raise InputError(
                f"expert {expert} of layer {layer}: {size_bytes} bytes at offset {offset} of {held}; multiples of "
                f"{ALIGNMENT_BYTES} inside the arena are needed. Mend the caller."
            )

    def _kind(self, layer: int, expert: int) -> Kind:
        kind = self._kinds.get((layer, expert))
        if kind is None:
            raise InputError(f"layer {layer} has no expert {expert}. Mend the caller.")
        return kind

    def _check_tokens(self, tokens: NDArray[np.int32], position: int) -> None:
        vocabulary = self._graph.vocabulary
        faults = []
        if not 0 < tokens.size <= self._chunk_tokens:
            faults.append(f"{tokens.size} tokens at once; 1 to {self._chunk_tokens} are possible")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            faults.append(f"tokens {tokens.min()} to {tokens.max()}; there are {vocabulary}")
        if not 0 <= position <= self._filled:
            faults.append(f"position {position} leaves a gap: the cache holds {self._filled} tokens")
        if position + tokens.size > self._context_tokens:
            faults.append(f"tokens up to position {position + tokens.size}; the context holds {self._context_tokens}")
        if faults:
            raise InputError.collect("the forward pass", faults)

    def _loaded(self) -> Dense:
        if self._dense is None:
            raise InputError("the decoder's weights are not loaded, or it was closed. Load them first.")
        return self._dense

    def _device_arena(self) -> Tensor:
        if self._arena is None:
            raise InputError("the device has no memory for experts. Take it first.")
        return self._arena

    def _running(self) -> _Pass:
        if self._pass is None:
            raise InputError("no forward pass was begun. Begin one first.")
        return self._pass

    def _event(self) -> _Waiting:
        if self._waiting is None:
            raise InputError("no event waits for experts. Mend the caller.")
        return self._waiting


def _grouped_choices(experts: NDArray[np.int32]) -> tuple[NDArray[np.int64], dict[int, tuple[int, int]]]:
    """Return the flat places of choices grouped by expert, and each expert's stretch of them, ascending."""
    flat = experts.reshape(-1)
    order = np.argsort(flat, kind="stable")
    ids, starts = np.unique(flat[order], return_index=True)
    ends = [*starts[1:].tolist(), flat.size]
    return order, dict(zip(ids.tolist(), zip(starts.tolist(), ends, strict=True), strict=True))


def _heads(rows: Tensor, heads: int) -> Tensor:
    """Return ``[tokens, heads * dim]`` as ``[heads, tokens, dim]``."""
    return rows.unflatten(-1, (heads, -1)).transpose(0, 1)


def _turned(rows: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate ``[..., tokens, dim]``, half-split, by angles ``[tokens, dim / 2]`` (RoFormer, arXiv 2104.09864)."""
    first, second = rows.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def _not_finite(layer: int) -> DeviceError:
    return DeviceError(
        f"the weights give numbers that are not finite (layer {layer}). Check the bundle with `edgeflex verify`."
    )
