"""Runs a decoder's stages in TensorRT layer by layer, and stops where an expert is missing.

The interface is that of ``runtimes.engines.DecoderEngine``, its order ``runtimes.stage_engine``'s. One engine serves
all layers and experts of one structure, since weights are its inputs: the dense ones lie on the device for good, an
expert's are wherever its slot is. Rows never leave the device; what comes back is the router's choice, which says what
to read, and the logits. A chunk of a prompt is grouped by expert with one call, so that each expert finds its rows
together; for a single token nothing is grouped.

While single tokens are decoded, attention, dense parts, sums and the head stay in the same places, and their shapes
change only when the past outgrows a power of two: attention with its router, what ends a layer, and the head are each
a CUDA graph. Outside stay new keys and values, which go to another row each time, and experts, which enter an engine
from whatever slot they are in: a graph of one would hold for that slot alone.

Importing this loads neither TensorRT nor anything that needs a driver; ``load`` does, once the driver has answered.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex.bundle_moe import DecoderBundle
from edgeflex.errors import BundleError, DeviceError, InputError, UnsupportedError
from edgeflex.runtimes.cuda_driver import CudaContext
from edgeflex.runtimes.dense import read_dense
from edgeflex.runtimes.engines import not_finite
from edgeflex.runtimes.native import Times
from edgeflex.runtimes.onnx_stages import programs_of
from edgeflex.runtimes.packed import raw_parts
from edgeflex.runtimes.raw_store import RawRows
from edgeflex.runtimes.stage_engine import DENSE, EXPERTS, REMEDY, Attended, StageEngine
from edgeflex.runtimes.tensorrt_build import engines_for, messages_of, open_machine, read_recipe
from edgeflex.runtimes.tensorrt_graphs import DecodeGraphs
from edgeflex.runtimes.tensorrt_memory import (
    FLOAT_BYTES,
    DeviceClock,
    DeviceKeyValues,
    ExpertArena,
    pieces_of,
    upload_dense,
)
from edgeflex.runtimes.tensorrt_stages import ADDRESS_ALIGNMENT, Engines
from edgeflex.runtimes.tensorrt_wiring import (
    BoundStage,
    Fetching,
    Wiring,
    decode_spans,
    most_choices,
    take_buffers,
    take_staging,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from edgeflex.runtimes.packed import PackedStore, Piece
    from edgeflex.runtimes.raw_store import Pair
    from edgeflex.runtimes.stage_engine import Pass, Waiting
    from edgeflex.runtimes.tensorrt_memory import Staging
    from edgeflex.runtimes.tensorrt_wiring import Buffers, DecoderStages, DecodeSpans
    from edgeflex.schema_moe import DecoderManifest

    Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class _Device:
    """All that is on the device, and what reaches it."""

    cuda: CudaContext
    stream: int
    clock: DeviceClock
    engines: Engines
    graphs: DecodeGraphs
    buffers: Buffers
    staging: Staging
    fetching: Fetching
    cache: DeviceKeyValues
    experts: ExpertArena
    dense_bytes: int
    integrated: bool


class _Ready(NamedTuple):
    """What runs: stages for any number of tokens, and what is recorded for one."""

    stages: DecoderStages
    single: DecodeSpans


class TensorrtEngine(StageEngine[int, BoundStage]):
    """A decoder in TensorRT; ``load`` comes before everything else. Rows are addresses on the device.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        context_tokens: Positions that the key/value cache holds.
        chunk_tokens: Most tokens of one forward pass.
        library: What to ask instead of the driver's own library.
        clock: Seconds, rising.

    Raises:
        BundleError: The manifest lacks a stage.
        UnsupportedError: Its rows cannot be handed to TensorRT.
    """

    def __init__(
        self,
        folder: Path,
        manifest: DecoderManifest,
        *,
        context_tokens: int,
        chunk_tokens: int,
        library: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(folder, manifest, context_tokens=context_tokens, chunk_tokens=chunk_tokens, clock=clock)
        self._programs = programs_of(folder, manifest)
        self._row_bytes = self._graph.hidden_dim * FLOAT_BYTES
        self._library = library
        self._top_k = most_choices(self._graph)
        self._device: _Device | None = None
        self._ready: _Ready | None = None
        self._embedding: RawRows | None = None
        lacking = [one.index for one in self._graph.layers if one.index not in self._programs.sums]
        if lacking or (self._top_k and self._programs.gather is None):
            named = f"sum of layer {lacking[0]}" if lacking else "gathering of rows"
            raise BundleError(f"{folder}: the manifest names no stage for the {named}. {REMEDY}")
        if self._row_bytes % ADDRESS_ALIGNMENT:
            raise UnsupportedError(
                f"{folder}: hidden rows of {self._row_bytes} bytes; TensorRT is handed only what begins at multiples "
                f"of {ADDRESS_ALIGNMENT}. Export the decoder for onnx."
            )

    # --- loading --------------------------------------------------------------------------------------

    def load(self, store: PackedStore) -> NDArray[np.uint8]:
        """Load engines and dense weights, take all memory but the experts', and return what holds the embedding.

        Args:
            store: Whose only dense part is the embedding.

        Raises:
            MissingDependencyError: TensorRT is absent.
            DeviceError: There is no usable device, no engine for it, or too little memory; or the disk failed.
            BundleError: A file is damaged, or an engine not of this bundle.
            InputError: The engines were built for fewer tokens.
        """
        self.close()
        try:
            return self._load(store)
        except BaseException:
            self.close()
            raise

    def _load(self, store: PackedStore) -> NDArray[np.uint8]:
        recipe = read_recipe(DecoderBundle(self._folder, self._manifest))
        machine = open_machine(self._library)
        index = engines_for(self._folder, recipe, machine)
        rows: list[RawRows] = []

        def take(piece: Piece, data: NDArray[np.uint8]) -> None:
            rows.append(RawRows(piece.matrix, *raw_parts(piece, data)))

        memory = read_dense(store, take)
        cuda = CudaContext(self._library)
        try:
            stream = cuda.new_stream()
            engines = Engines(cuda, stream, machine, self._folder, recipe, index)
            self._check_limits(engines)
            held_bytes = cuda.allocated_bytes
            weights = upload_dense(cuda, stream, self._folder, self._manifest)
            dense_bytes = cuda.allocated_bytes - held_bytes
            buffers = take_buffers(cuda, self._graph, self._chunk_tokens)
            staging = take_staging(cuda, self._graph, self._chunk_tokens)
            device = _Device(
                cuda=cuda,
                stream=stream,
                clock=DeviceClock(cuda, stream, places=3),
                engines=engines,
                graphs=DecodeGraphs(cuda, stream, messages_of(machine.trt)),
                dense_bytes=dense_bytes,
                buffers=buffers,
                staging=staging,
                fetching=Fetching(cuda, stream, buffers, staging),
                cache=DeviceKeyValues(cuda, stream, self._graph, self._context_tokens),
                experts=ExpertArena(cuda, stream, integrated=machine.device.integrated),
                integrated=machine.device.integrated,
            )
            self._prepare(device)
        except BaseException:
            cuda.close()
            raise
        self._device = device
        self._embedding = rows[0]
        stages = Wiring(self._graph, engines, buffers, device.cache, weights).stages(self._programs)
        self._ready = _Ready(stages, decode_spans(self._graph, stages, buffers, staging, device.fetching))
        return memory

    def _prepare(self, device: _Device) -> None:
        """Put what never changes on the device: the places of a single token's choices."""
        choices = np.arange(self._top_k, dtype=np.int32)
        device.staging.up(device.cuda, device.stream, "places", choices, device.buffers.identity)
        device.cuda.synchronize(device.stream)

    def _check_limits(self, engines: Engines) -> None:
        faults = []
        stage = engines.stage(self._programs.attention[self._graph.layers[0].index].path)
        for what, asked, most in (
            ("tokens of context", self._context_tokens, stage.most("key_cache", 1)),
            ("tokens of a prompt's chunk", self._chunk_tokens, stage.most("x", 0)),
        ):
            if asked > most:
                faults.append(f"{asked} {what}; its engines were built for {most}")
        if faults:
            raise InputError.collect(f"the run of {self._folder}", faults)

    # --- memory ---------------------------------------------------------------------------------------

    def arena(self, capacity_bytes: int) -> NDArray[np.uint8]:
        """Return zeroed, page-aligned memory for experts; an earlier arena is given up, its experts unbound.

        Raises:
            InputError: Nothing is loaded.
            DeviceError: No memory.
        """
        device = self._on_device()
        self._bound.clear()
        self._arena = device.experts.take(capacity_bytes)
        return self._arena

    @property
    def memory_bytes(self) -> int:
        """Bytes on the device of keys, values, activations and what engines hold, and of a second arena; 0 unloaded."""
        device = self._device
        if device is None:
            return 0
        return device.cuda.allocated_bytes - device.dense_bytes + device.engines.weights_bytes

    @property
    def unseen_bytes(self) -> int:
        """Bytes of the machine's own memory that the system does not count as this process's."""
        device = self._device
        if device is None:
            return 0
        return device.experts.uncounted_bytes + (device.cuda.allocated_bytes if device.integrated else 0)

    def close(self) -> None:
        """Give everything back; a second call does nothing, and nothing runs afterwards."""
        super().close()
        # contexts and engines go before the memory that they point into
        self._ready = self._embedding = None
        device, self._device = self._device, None
        if device is not None:
            cuda = device.cuda
            with suppress(DeviceError):  # a lost device has nothing under way
                cuda.make_current()
                device.experts.wait()
            del device
            cuda.close()

    def _on_device(self) -> _Device:
        if self._device is None:
            raise _closed()
        self._device.cuda.make_current()
        return self._device

    def _require_loaded(self) -> None:
        self._on_device()

    def _loaded(self) -> _Ready:
        if self._ready is None:
            raise _closed()
        return self._ready

    def _wait(self, device: _Device) -> None:
        """Wait until all that was queued is done."""
        device.clock.switch(None)
        device.cuda.synchronize(device.stream)
        device.experts.settled()

    # --- experts --------------------------------------------------------------------------------------

    def _place(self, layer: int, expert: int, pair: Pair, offset: int, size_bytes: int) -> BoundStage:
        device = self._on_device()
        name = f"expert-{self._graph.layers[layer].expert_dim}.{pair.down.precision.value}.onnx"
        stage = self._loaded().stages.templates.get(name)
        if stage is None:
            raise BundleError(f"{self._folder}: no engine of {name!r} runs the experts of layer {layer}. {REMEDY}")
        starts = {}
        for local, record in zip(("gate_up", "down"), pair, strict=True):
            for piece, start, held_bytes in pieces_of(record):
                given = local + piece[len(record.name) :]
                stage.require_bytes(given, held_bytes, piece)
                if (offset + start) % ADDRESS_ALIGNMENT:
                    raise BundleError(
                        f"{record.file}: {piece} would begin at byte {offset + start} of the cache, and TensorRT is "
                        f"handed only what begins at multiples of {ADDRESS_ALIGNMENT}. {REMEDY}"
                    )
                starts[given] = start
        address = device.experts.place((layer, expert), offset, size_bytes)
        return BoundStage(stage, {name: address + start for name, start in starts.items()})

    def _forget(self, key: tuple[int, int]) -> None:
        self._on_device().experts.release(key)

    def _begin_event(self, waiting: Waiting[int]) -> None:
        """Group the rows of several tokens by expert, and say where each choice's output will be."""
        tokens, top_k = waiting.experts.shape
        gather = self._loaded().stages.gather
        if tokens == 1 or gather is None:
            return
        device = self._on_device()
        places = np.empty(waiting.order.size, dtype=np.int32)
        places[waiting.order] = np.arange(waiting.order.size, dtype=np.int32)
        rows = (waiting.order // top_k).astype(np.int32)
        device.staging.up(device.cuda, device.stream, "places", places, device.buffers.places)
        device.staging.up(device.cuda, device.stream, "rows", rows, device.buffers.rows)
        device.clock.switch(EXPERTS)
        gather.stage(gather.places, {"y": (tokens, self._graph.hidden_dim), "rows": (rows.size,)})
        device.clock.switch(None)

    def _compute(self, waiting: Waiting[int], experts: Sequence[int]) -> None:
        device, hidden = self._on_device(), self._graph.hidden_dim
        device.clock.switch(EXPERTS)
        buffers, single = device.buffers, waiting.experts.shape[0] == 1
        for expert in experts:
            first, last = waiting.spans[expert]
            target = int(waiting.order[first]) if single else first
            source = waiting.normed if single else buffers.grouped + first * self._row_bytes
            bound = self._bound[waiting.layer, expert]
            device.experts.use((waiting.layer, expert))
            places = {**bound.places, "y": source, "out": buffers.outputs + target * self._row_bytes}
            bound.stage(places, {"y": (last - first, hidden)})
        device.clock.switch(None)  # what comes next may wait for the disk

    def _sum(self, waiting: Waiting[int]) -> int:
        tokens, top_k = waiting.experts.shape
        return self._end_layer(waiting.layer, tokens, top_k)

    # --- running --------------------------------------------------------------------------------------

    def _embed(self, tokens: NDArray[np.int32], position: int) -> int:
        device, embedding = self._on_device(), self._embedding
        if embedding is None:
            raise _closed()
        rows = embedding(tokens)
        self._wait(device)  # what is still on its way up is overwritten now
        positions = np.arange(position, position + tokens.size, dtype=np.int32)
        device.staging.up(device.cuda, device.stream, "hidden", rows, device.buffers.hidden)
        device.staging.up(device.cuda, device.stream, "positions", positions, device.buffers.positions)
        return device.buffers.hidden

    def _mend_past(self, position: int) -> None:
        self._on_device().cache.clear(position)

    def _attend(self, running: Pass[int], layer: int) -> Attended[int]:
        device, attention, tokens = self._on_device(), self._graph.attention, running.tokens
        buffers, past = device.buffers, device.cache.past(layer, running.position)
        routing = self._graph.layers[layer].routing
        shapes = {
            "x": (tokens, self._graph.hidden_dim),
            "positions": (tokens,),
            "key_cache": (attention.kv_heads, past, attention.head_dim),
            "value_cache": (attention.kv_heads, past, attention.value_dim),
        }
        device.clock.switch(DENSE)
        if tokens == 1:
            device.graphs.run(self._loaded().single.attention[layer], shapes)
        else:
            bound = self._loaded().stages.attention[layer]
            bound.stage(bound.places, shapes)
            if routing is not None:
                device.fetching.choice(tokens * routing.top_k)
        device.cache.write(layer, running.position, tokens, (buffers.keys, buffers.values))
        if routing is None:
            return Attended(buffers.residual, buffers.normed)
        shape = (tokens, routing.top_k)
        count = tokens * routing.top_k
        self._wait(device)
        weights = np.array(device.staging.arrays["weights"][:count], dtype=np.float32).reshape(shape)
        experts = np.array(device.staging.arrays["experts"][:count], dtype=np.int32).reshape(shape)
        if not 0 <= int(experts.min()) <= int(experts.max()) < routing.experts:
            raise not_finite(layer)  # rows that are no numbers choose anything
        return Attended(buffers.residual, buffers.normed, weights, experts)

    def _feed_forward(self, running: Pass[int], layer: int, attended: Attended[int]) -> int:
        del attended
        return self._end_layer(layer, running.tokens, 0)

    def _end_layer(self, layer: int, tokens: int, top_k: int) -> int:
        """Run a layer's dense part, where there is one, and add everything up."""
        device, hidden = self._on_device(), self._graph.hidden_dim
        rows, choice = (tokens, hidden), (tokens, top_k)
        shapes = {
            **dict.fromkeys(("y", "residual", "dense"), rows),
            "outputs": (tokens * top_k, hidden),
            **dict.fromkeys(("places", "weights"), choice),
        }
        device.clock.switch(DENSE)
        if tokens == 1:
            device.graphs.run(self._loaded().single.ends[layer], shapes)
        else:
            stages = self._loaded().stages
            for bound in (stages.dense.get(layer), stages.sums[layer]):
                if bound is not None:
                    bound.stage(bound.places, shapes)
        return device.buffers.hidden

    def _head(self, running: Pass[int]) -> Float32:
        device, bound = self._on_device(), self._loaded().stages.head
        shapes = {"x": (1, self._graph.hidden_dim)}
        first = 0 if running.every_logit else running.tokens - 1
        found = np.empty((running.tokens - first, self._graph.vocabulary), dtype=np.float32)
        for row in range(first, running.tokens):
            device.clock.switch(DENSE)
            if running.tokens == 1:
                device.graphs.run(self._loaded().single.head, shapes)
            else:
                bound.stage({**bound.places, "x": running.hidden + row * self._row_bytes}, shapes)
                device.fetching.logits()
            self._wait(device)
            found[row - first] = device.staging.arrays["logits"]
        if not np.isfinite(found).all():
            raise not_finite(len(self._graph.layers) - 1)
        return found

    def _on_host(self, rows: int, tokens: int) -> Float32:
        device, hidden = self._on_device(), self._graph.hidden_dim
        device.staging.down(device.cuda, device.stream, "hidden", tokens * hidden, rows)
        self._wait(device)
        found: Float32 = np.array(device.staging.arrays["hidden"][: tokens * hidden], dtype=np.float32)
        return found.reshape(tokens, hidden)

    def times(self) -> Times:
        """Return the device's seconds since the last call: stages with attention, experts, all else.

        Raises:
            DeviceError: The device failed at what it was still computing.
        """
        device = self._device
        if device is None:
            return Times(0.0, 0.0, 0.0)
        device.cuda.make_current()
        self._wait(device)
        device.clock.collect()
        return Times(*device.clock.take())


def _closed() -> InputError:
    return InputError("the decoder's engines are not loaded, or it was closed. Load them first.")
