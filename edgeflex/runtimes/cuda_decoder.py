"""A decoder on a CUDA device through PyTorch: dense parts resident, experts where they are told to lie.

The interface is that of ``runtimes.engines.DecoderEngine``, the loop of a pass ``runtimes.stage_engine``'s, with two
memories for experts instead of one: the host's arena, which readers fill from flash and copies start from, and the
device's. What the layers compute, and in which order it is summed, is ``models.decoder_reference``'s; a token's experts
are summed by falling router weight, whatever was resident. Hidden rows, norms, routers and sums are fp32 always,
products run in ``dtype``.

A pass computes layer after layer without asking anybody as long as all experts of an event lie on the device; else it
returns what the event uses. The router's choice is the one thing that the processor waits for in a layer.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import linear

from edgeflex.errors import InputError
from edgeflex.runtimes.cuda_attention import DeviceAttention
from edgeflex.runtimes.cuda_memory import BATCH, ExpertMemory, device_bytes
from edgeflex.runtimes.cuda_slices import first_slices, rest_of
from edgeflex.runtimes.cuda_streams import explained
from edgeflex.runtimes.cuda_weights import feed_forward, load_dense, restored, run_expert
from edgeflex.runtimes.engines import not_finite
from edgeflex.runtimes.stage_engine import DENSE, EXPERTS, Attended, LayerEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from edgeflex.runtimes.cuda_host import HostExperts
    from edgeflex.runtimes.cuda_streams import Streams
    from edgeflex.runtimes.cuda_weights import Dense, Kind, Weight
    from edgeflex.runtimes.stage_engine import Pass, Waiting
    from edgeflex.schema import Precision
    from edgeflex.schema_moe import DecoderManifest, Routing

    Float32 = NDArray[np.float32]
    Key = tuple[int, int]

_NOWHERE = torch.empty(0, dtype=torch.int64)


@dataclass
class _Kept:
    """What is kept of the present event beside what every engine keeps.

    Attributes:
        weights: ``[tokens, top_k]`` on the device.
        rows: What experts see, on the host; None until an expert is computed there.
        outputs: ``[tokens * top_k, hidden]`` of what is computed.
        places: ``[tokens * top_k]`` on the device: choices grouped by expert, each expert's by token.
        shared: What the shared experts add.
        begun: Experts of which a part is computed.
    """

    weights: Tensor
    rows: Float32 | None
    outputs: Tensor
    places: Tensor = _NOWHERE
    shared: Tensor | None = None
    begun: set[int] = field(default_factory=set)


class DeviceEngine(LayerEngine["Tensor"]):
    """A decoder on a device; ``load`` comes before everything but arenas and places. Not for several threads.

    ``times`` gives the processor's seconds. A device that runs by itself is waited for where the router's choice is
    read, which is the dense parts' share.

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
        super().__init__(folder, manifest, context_tokens=context_tokens, chunk_tokens=chunk_tokens, clock=clock)
        self.streams = streams
        self.memory = ExpertMemory(streams, kinds)
        self.ended_s = 0.0
        self._kinds = kinds
        self._host = host
        self._dtype = dtype
        self._dense: Dense | None = None
        self._attention: DeviceAttention | None = None
        self._kept: _Kept | None = None

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

    def lay(self, kinds: Mapping[Key, Kind]) -> None:
        """Take experts for laid out as ``kinds`` say, from before the first one is bound."""
        self._kinds = self.memory.kinds = kinds

    def bind(self, layer: int, expert: int, precision: Precision, offset: int) -> None:
        """Say where an expert lies in the host's arena; see ``ExpertMemory.bind``."""
        self.memory.bind(layer, expert, precision, offset)

    def unbind(self, layer: int, expert: int) -> None:
        """Forget where an expert lies on the host; see ``ExpertMemory.unbind``."""
        self.memory.unbind(layer, expert)

    def _holds(self, key: Key) -> bool:
        return key in self.memory

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
        super().close()
        self._dense = self._attention = self._kept = None
        self.memory.close()
        self._host.close()

    # --- experts that stay with the processor ---------------------------------------------------------

    def bring_rows(self) -> None:
        """Bring what experts of the waiting event see to the host, before the device has other work to wait for.

        Raises:
            InputError: Nothing waits.
            DeviceError: The device failed.
        """
        with self._guard():
            self._host_rows(self._event())

    def compute_on_host(self, experts: Sequence[int]) -> None:
        """Compute these experts of the waiting event with the processor, from the host's arena.

        Raises:
            InputError: Nothing waits, or one is not in the event or not on the host.
            DeviceError: The device failed.
        """
        with self._guard():
            waiting = self._event()
            self._refuse_absent(waiting, experts, self.memory.on_host)
            rows = self._host_rows(waiting)
            start = self._clock()
            for expert in experts:
                if expert in waiting.open:
                    self._compute_on_host(waiting, rows, expert)
                    waiting.open.discard(expert)
            self._seconds[EXPERTS] += self._clock() - start

    def _host_rows(self, waiting: Waiting[Tensor]) -> Float32:
        kept = self._event_kept()
        if kept.rows is None:
            kept.rows = waiting.normed.cpu().numpy()
        return kept.rows

    def _compute_on_host(self, waiting: Waiting[Tensor], rows: Float32, expert: int) -> None:
        found = self._on_host(waiting, rows, expert, self._kinds[waiting.layer, expert])
        first, last = waiting.spans[expert]
        kept = self._event_kept()
        kept.outputs.index_copy_(0, kept.places[first:last], found)

    def _on_host(self, waiting: Waiting[Tensor], rows: Float32, expert: int, kind: Kind) -> Tensor:
        tokens, _ = waiting.chosen(expert)
        record = self.memory.host_record(waiting.layer, expert)
        found = self._host(kind, record, np.ascontiguousarray(rows[tokens]))
        return torch.from_numpy(found).to(self.streams.device)

    # --- experts that are divided -----------------------------------------------------------------------

    def compute_share(self, expert: int, slices: int) -> None:
        """Let the device compute the first slices of an expert of the waiting event, after their copy has landed.

        The expert is computed once ``compute_rest_on_host`` has added the others; the order is free.

        Raises:
            InputError: Nothing waits, the expert is not in the event, or its share was not copied.
            DeviceError: The device failed.
        """
        with self._guard():
            waiting, kept = self._event(), self._event_kept()
            self._refuse_absent(waiting, [expert], self.memory.on_host)
            start = self._clock()
            first, last = waiting.spans[expert]
            rows = waiting.normed.index_select(0, kept.places[first:last] // kept.weights.shape[1])
            kind = first_slices(self._kinds[waiting.layer, expert], slices)
            self._add(waiting, expert, run_expert(self.memory.share(waiting.layer, expert), kind, rows, self._dtype))
            self._seconds[EXPERTS] += self._clock() - start

    def compute_rest_on_host(self, expert: int, slices: int) -> None:
        """Compute all but the first slices of an expert of the waiting event with the processor, where it lies.

        Raises:
            InputError: Nothing waits, or the expert is not in the event or not on the host.
            DeviceError: The device failed.
        """
        with self._guard():
            waiting = self._event()
            self._refuse_absent(waiting, [expert], self.memory.on_host)
            rows = self._host_rows(waiting)
            start = self._clock()
            kind = rest_of(self._kinds[waiting.layer, expert], slices)
            self._add(waiting, expert, self._on_host(waiting, rows, expert, kind))
            self._seconds[EXPERTS] += self._clock() - start

    def _add(self, waiting: Waiting[Tensor], expert: int, found: Tensor) -> None:
        """Take one of the two parts of an expert's rows."""
        kept = self._event_kept()
        first, last = waiting.spans[expert]
        if expert not in kept.begun:
            kept.begun.add(expert)
            kept.outputs.index_copy_(0, kept.places[first:last], found)
            return
        kept.outputs.index_add_(0, kept.places[first:last], found)
        waiting.open.discard(expert)

    # --- layers ---------------------------------------------------------------------------------------

    @contextmanager
    def _guard(self) -> Iterator[None]:
        with explained("the decoder's device failed while running"), torch.inference_mode():
            yield

    def _embed(self, tokens: NDArray[np.int32], position: int) -> Tensor:
        del position
        self._kept = None  # of an event that was given up
        rows = np.ascontiguousarray(self._loaded().embedding(tokens))
        return torch.from_numpy(rows).to(self.streams.device)

    def _attend(self, running: Pass[Tensor], layer: int) -> Attended[Tensor]:
        start = self._clock()
        residual = running.hidden + self._attending()(layer, running.hidden, running.position)
        normed = self._norm(residual, f"layers.{layer}.post_norm")
        routing = self._graph.layers[layer].routing
        found = Attended(residual, normed) if routing is None else self._routed(layer, routing, residual, normed)
        self._seconds[DENSE] += self._clock() - start
        return found

    def _routed(self, layer: int, routing: Routing, residual: Tensor, normed: Tensor) -> Attended[Tensor]:
        """Read the router's choice; with one token, also the row that experts on the host would need."""
        weights, experts = self._choose(layer, routing, normed)
        one = len(normed) == 1
        sent = (weights, experts.float(), normed) if one else (weights, experts.float())
        found = torch.cat(sent, dim=-1).cpu().numpy()
        top_k = routing.top_k
        outputs = torch.empty((experts.numel(), normed.shape[1]), dtype=torch.float32, device=normed.device)
        self._kept = _Kept(weights, found[:, 2 * top_k :] if one else None, outputs)
        ids = found[:, top_k : 2 * top_k].astype(np.int32)
        return Attended(residual, normed, np.ascontiguousarray(found[:, :top_k]), ids)

    def _choose(self, layer: int, routing: Routing, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and ids ``[tokens, top_k]`` by falling weight, ties to the lower id."""
        shares = torch.softmax(linear(normed, self._loaded().small[f"layers.{layer}.router"]), dim=-1)
        order = torch.sort(shares, dim=-1, descending=True, stable=True)
        weights, experts = order.values[:, : routing.top_k], order.indices[:, : routing.top_k]
        if routing.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights * routing.scale if routing.scale != 1.0 else weights), experts

    def _guessed(self, layer: int, routing: Routing, rows: Tensor, tokens: int) -> NDArray[np.integer]:
        del tokens
        _, experts = self._choose(layer, routing, self._norm(rows, f"layers.{layer}.post_norm"))
        found: NDArray[np.integer] = experts.cpu().numpy()
        return found

    def _feed_forward(self, running: Pass[Tensor], layer: int, attended: Attended[Tensor]) -> Tensor:
        del running
        start = self._clock()
        left = attended.residual + self._swiglu(f"layers.{layer}.mlp", attended.normed)
        self._seconds[DENSE] += self._clock() - start
        return left

    def _begin_event(self, waiting: Waiting[Tensor]) -> None:
        start, kept = self._clock(), self._event_kept()
        # the processor waits for this copy: it stands before the shared experts, which then run beside what follows
        kept.places = torch.from_numpy(waiting.order).to(kept.outputs.device)
        kept.shared = self._shared(waiting.layer, waiting.normed)
        self._seconds[DENSE] += self._clock() - start

    def _shared(self, layer: int, normed: Tensor) -> Tensor | None:
        known = self._graph.layers[layer]
        if not known.shared_dim:
            return None
        output = self._swiglu(f"layers.{layer}.shared", normed)
        if not known.shared_gate:
            return output
        return torch.sigmoid(linear(normed, self._loaded().small[f"layers.{layer}.shared_gate"])) * output

    def _sum(self, waiting: Waiting[Tensor]) -> Tensor:
        kept = self._event_kept()
        outputs = kept.outputs.view(*kept.weights.shape, -1)
        total = outputs[:, 0] * kept.weights[:, :1]
        for slot in range(1, kept.weights.shape[1]):
            total = total + outputs[:, slot] * kept.weights[:, slot : slot + 1]
        if kept.shared is not None:
            total = total + kept.shared
        self._kept = None
        return waiting.residual + total

    def _head(self, running: Pass[Tensor]) -> Float32:
        start = self._clock()
        rows = running.hidden if running.every_logit else running.hidden[-1:]
        found: Float32 = self._loaded().matrices["head"](self._norm(rows, "norm")).cpu().numpy()
        self.ended_s = self._clock()
        self._seconds[DENSE] += self.ended_s - start
        if not np.isfinite(found).all():
            raise not_finite(len(self._graph.layers) - 1)
        return found

    def _norm(self, rows: Tensor, name: str) -> Tensor:
        return self._attending().norm(rows, name)

    def _swiglu(self, prefix: str, rows: Tensor) -> Tensor:
        matrices = self._loaded().matrices
        return matrices[f"{prefix}.down"](feed_forward(matrices[f"{prefix}.gate_up"](rows)))

    # --- experts on the device ------------------------------------------------------------------------

    def _compute(self, waiting: Waiting[Tensor], experts: Sequence[int]) -> None:
        """Let the device compute experts, each after its copy: those of one kind together, a few at a time.

        Returns at once on a device that runs by itself.
        """
        start = self._clock()
        kinds: dict[Kind, list[int]] = {}
        for expert in experts:
            kinds.setdefault(self._kinds[waiting.layer, expert], []).append(expert)
        for kind, members in kinds.items():
            for first in range(0, len(members), BATCH):
                self._compute_batch(waiting, kind, members[first : first + BATCH])
        self._seconds[EXPERTS] += self._clock() - start

    def _compute_batch(self, waiting: Waiting[Tensor], kind: Kind, experts: Sequence[int]) -> None:
        data, kept = self.memory.records(waiting.layer, experts), self._event_kept()
        spans = [waiting.spans[expert] for expert in experts]
        gate_up = restored(data, kind.gate_up, self._dtype)
        if len(waiting.normed) == 1:
            inner = feed_forward(gate_up.each(waiting.normed.expand(len(experts), -1)))
            del gate_up
            out = restored(data, kind.down, self._dtype).each(inner)
            kept.outputs.index_copy_(0, torch.cat([kept.places[first:last] for first, last in spans]), out)
            return
        down = restored(data, kind.down, self._dtype)
        if self.streams.grouped and self._dtype is torch.bfloat16:
            self._compute_grouped(waiting, kept, gate_up, down, spans)
            return
        for index, (first, last) in enumerate(spans):
            places = kept.places[first:last]
            rows = waiting.normed.index_select(0, places // kept.weights.shape[1])
            out = down.one(index)(feed_forward(gate_up.one(index)(rows)))
            kept.outputs.index_copy_(0, places, out)

    @staticmethod
    def _compute_grouped(
        waiting: Waiting[Tensor], kept: _Kept, gate_up: Weight, down: Weight, spans: Sequence[tuple[int, int]]
    ) -> None:
        """Compute the rows of several experts with one kernel for each matrix."""
        device = waiting.normed.device
        places = torch.cat([kept.places[first:last] for first, last in spans])
        counts = torch.tensor([last - first for first, last in spans])
        ends = counts.cumsum(0).to(torch.int32).to(device)
        owners = torch.repeat_interleave(torch.arange(len(spans)), counts).to(device)
        rows = waiting.normed.index_select(0, places // kept.weights.shape[1])
        inner = feed_forward(gate_up.grouped(rows, ends, owners))
        kept.outputs.index_copy_(0, places, down.grouped(inner, ends, owners))

    # --- refusals -------------------------------------------------------------------------------------

    def _require_loaded(self) -> None:
        self._loaded()

    def _loaded(self) -> Dense:
        if self._dense is None:
            raise _nothing_loaded()
        return self._dense

    def _attending(self) -> DeviceAttention:
        if self._attention is None:
            raise _nothing_loaded()
        return self._attention

    def _event_kept(self) -> _Kept:
        if self._kept is None:
            raise InputError("no event waits for experts. Mend the caller.")
        return self._kept


def _nothing_loaded() -> InputError:
    return InputError("the decoder's weights are not loaded, or it was closed. Load them first.")
