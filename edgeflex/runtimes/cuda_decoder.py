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
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import linear

from edgeflex.errors import InputError
from edgeflex.runtimes.cuda_attention import DeviceAttention
from edgeflex.runtimes.cuda_memory import BATCH, ExpertMemory, device_bytes
from edgeflex.runtimes.cuda_streams import explained
from edgeflex.runtimes.cuda_weights import feed_forward, load_dense, restored
from edgeflex.runtimes.engines import check_pass, not_finite
from edgeflex.runtimes.native import Chosen, Missing, Times
from edgeflex.runtimes.stage_engine import grouped_choices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from edgeflex.runtimes.cuda_host import HostExperts
    from edgeflex.runtimes.cuda_streams import Streams
    from edgeflex.runtimes.cuda_weights import Dense, Kind, Weight
    from edgeflex.schema import Precision
    from edgeflex.schema_moe import DecoderManifest

    Float32 = NDArray[np.float32]
    Key = tuple[int, int]

_RUNNING = explained("the decoder's device failed while running")


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

    Attributes:
        streams: The device.
        memory: Where its experts lie.
        ended_s: When logits came last, by the clock.
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
        self.memory = ExpertMemory(streams, kinds)
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
        self._attention: DeviceAttention | None = None
        self._pass: _Pass | None = None
        self._waiting: _Waiting | None = None
        self._log: list[Chosen] = []
        self._filled = 0
        self._seconds = [0.0, 0.0, 0.0]
        self.ended_s = 0.0

    # --- memory ---------------------------------------------------------------------------------------

    def load(self) -> None:
        """Check the bundle's dense files, bring them to the device, and take memory for keys and values.

        On a fault everything is given back.

        Raises:
            BundleError: A file is missing or damaged.
            DeviceError: The device refused, or the disk failed.
        """
        context = self._context_tokens
        try:
            with torch.inference_mode(), explained("the device takes no dense weights, keys and values"):
                self._dense = load_dense(self._folder, self._manifest, self.streams, self._dtype)
                self._attention = DeviceAttention(self._graph, self._dense, self.streams, self._dtype, context)
        except BaseException:
            self.close()
            raise

    def arena(self, capacity_bytes: int) -> NDArray[np.uint8]:
        """Return the host's arena; see ``ExpertMemory.arena``."""
        return self.memory.arena(capacity_bytes)

    def bind(self, layer: int, expert: int, precision: Precision, offset: int) -> None:
        """Say where an expert lies in the host's arena; see ``ExpertMemory.bind``."""
        self.memory.bind(layer, expert, precision, offset)

    def unbind(self, layer: int, expert: int) -> None:
        """Forget where an expert lies on the host; see ``ExpertMemory.unbind``."""
        self.memory.unbind(layer, expert)

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
        self._dense = self._attention = self._pass = self._waiting = None
        self.memory.close()
        self._host.close()

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
        check_pass(
            flat,
            position,
            vocabulary=self._graph.vocabulary,
            chunk_tokens=self._chunk_tokens,
            context_tokens=self._context_tokens,
            filled=self._filled,
        )
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
        self._refuse_absent(waiting, [one for one in experts if (waiting.layer, one) not in self.memory], experts)
        self._compute(waiting, [expert for expert in experts if expert in waiting.open])

    @_RUNNING
    @torch.inference_mode()
    def bring_rows(self) -> None:
        """Bring what experts of the waiting event see to the host, before the device has other work to wait for.

        Raises:
            InputError: Nothing waits.
            DeviceError: The device failed.
        """
        waiting = self._event()
        if waiting.rows is None:
            waiting.rows = waiting.normed.cpu().numpy()

    @_RUNNING
    @torch.inference_mode()
    def compute_on_host(self, experts: Sequence[int]) -> None:
        """Compute these experts of the waiting event with the processor, from the host's arena.

        Raises:
            InputError: Nothing waits, or one is not in the event or not on the host.
            DeviceError: The device failed.
        """
        waiting = self._event()
        self._refuse_absent(waiting, [one for one in experts if not self.memory.on_host((waiting.layer, one))], experts)
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
        self._compute(waiting, [one for one in sorted(waiting.open) if (waiting.layer, one) in self.memory])
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
            self.ended_s = self._clock()
            self._seconds[0] += self.ended_s - start
            if not np.isfinite(running.logits).all():
                raise not_finite(len(self._graph.layers) - 1)
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

    # --- layers ---------------------------------------------------------------------------------------

    def _advance(self, running: _Pass, start: int) -> Missing | None:
        """Run the layers from ``start`` on."""
        for layer in range(start, len(self._graph.layers)):
            begun = self._clock()
            residual = running.hidden + self._attending()(layer, running.hidden, running.position)
            normed = self._norm(residual, f"layers.{layer}.post_norm")
            if self._graph.layers[layer].routing is None:
                running.hidden = residual + self._swiglu(f"layers.{layer}.mlp", normed)
                continue
            waiting = self._route(layer, residual, normed)
            self._seconds[0] += self._clock() - begun
            if any((layer, expert) not in self.memory for expert in waiting.spans):
                self._waiting = waiting
                return self._missing(waiting)
            self._compute(waiting, waiting.union)
            self._end_event(running, waiting)
        running.ended = True
        self._filled = running.position + len(running.hidden)
        return None

    def _norm(self, rows: Tensor, name: str) -> Tensor:
        return self._attending().norm(rows, name)

    def _swiglu(self, prefix: str, rows: Tensor) -> Tensor:
        matrices = self._loaded().matrices
        return matrices[f"{prefix}.down"](feed_forward(matrices[f"{prefix}.gate_up"](rows)))

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
            raise not_finite(layer)
        self._log.append(Chosen(layer, experts, np.ascontiguousarray(told)))
        order, spans = grouped_choices(experts)
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
            kinds.setdefault(self._kinds[waiting.layer, expert], []).append(expert)
        for kind, members in kinds.items():
            for first in range(0, len(members), BATCH):
                self._compute_batch(waiting, kind, members[first : first + BATCH])
        waiting.open.difference_update(experts)
        self._seconds[1] += self._clock() - start

    def _compute_batch(self, waiting: _Waiting, kind: Kind, experts: Sequence[int]) -> None:
        data = self.memory.records(waiting.layer, experts)
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

    def _compute_grouped(
        self, waiting: _Waiting, gate_up: Weight, down: Weight, spans: Sequence[tuple[int, int]]
    ) -> None:
        """Compute the rows of several experts with one kernel for each matrix."""
        device = waiting.normed.device
        places = torch.cat([waiting.places[first:last] for first, last in spans])
        counts = torch.tensor([last - first for first, last in spans])
        ends = counts.cumsum(0).to(torch.int32).to(device)
        owners = torch.repeat_interleave(torch.arange(len(spans)), counts).to(device)
        rows = waiting.normed.index_select(0, places // waiting.weights.shape[1])
        inner = feed_forward(gate_up.grouped(rows, ends, owners))
        waiting.outputs.index_copy_(0, places, down.grouped(inner, ends, owners))

    def _compute_on_host(self, waiting: _Waiting, rows: Float32, expert: int) -> None:
        first, last = waiting.spans[expert]
        tokens = waiting.order[first:last] // waiting.weights.shape[1]
        record = self.memory.host_record(waiting.layer, expert)
        found = self._host(self._kinds[waiting.layer, expert], record, np.ascontiguousarray(rows[tokens]))
        out = torch.from_numpy(found).to(waiting.outputs.device)
        waiting.outputs.index_copy_(0, waiting.places[first:last], out)
        waiting.open.discard(expert)

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
        lacking = [one for one in waiting.union if one in waiting.open and (waiting.layer, one) not in self.memory]
        return Missing(waiting.layer, waiting.union, tuple(lacking))

    @staticmethod
    def _refuse_absent(waiting: _Waiting, elsewhere: Sequence[int], experts: Sequence[int]) -> None:
        wrong = sorted({*elsewhere, *(one for one in experts if one not in waiting.spans)})
        if wrong:
            raise InputError(
                f"layer {waiting.layer}: experts {wrong} are not in the event or not where they are to be computed; it "
                f"uses {waiting.union}. Mend the caller."
            )

    def _loaded(self) -> Dense:
        if self._dense is None:
            raise InputError("the decoder's weights are not loaded, or it was closed. Load them first.")
        return self._dense

    def _attending(self) -> DeviceAttention:
        if self._attention is None:
            raise InputError("the decoder's weights are not loaded, or it was closed. Load them first.")
        return self._attention

    def _running(self) -> _Pass:
        if self._pass is None:
            raise InputError("no forward pass was begun. Begin one first.")
        return self._pass

    def _event(self) -> _Waiting:
        if self._waiting is None:
            raise InputError("no event waits for experts. Mend the caller.")
        return self._waiting
