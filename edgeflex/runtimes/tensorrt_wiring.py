"""Where a decoder's stages find what they read and write: buffers of activations, and weights by their names.

Every stage has its addresses once and for all; a run replaces those few that change with the layer's event.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex.errors import BundleError
from edgeflex.runtimes.stage_engine import REMEDY
from edgeflex.runtimes.tensorrt_graphs import Span, Watched
from edgeflex.runtimes.tensorrt_memory import FLOAT_BYTES, Staging

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgeflex.runtimes.cuda_driver import CudaContext
    from edgeflex.runtimes.onnx_stages import Programs
    from edgeflex.runtimes.tensorrt_memory import DeviceKeyValues, Region
    from edgeflex.runtimes.tensorrt_stages import Engines, EngineStage
    from edgeflex.schema_moe import DecoderGraph

_INT_BYTES = 4


class BoundStage(NamedTuple):
    """A stage with the addresses of its inputs and outputs; of an expert's, those of its pieces alone."""

    stage: EngineStage
    places: Mapping[str, int]


@dataclass(frozen=True)
class Buffers:
    """Addresses of what is computed, each as large as a whole chunk makes it; most are named as stages name them.

    Attributes:
        hidden: ``[tokens, hidden]``, what a layer is given and leaves.
        residual: ``[tokens, hidden]`` after attention.
        normed: ``[tokens, hidden]`` that experts and dense parts see.
        dense: ``[tokens, hidden]`` of a dense part.
        grouped: ``[choices, hidden]``: ``normed`` by expert, for several tokens.
        outputs: ``[choices, hidden]`` of experts; by expert, for a single token by slot.
        keys: New ones ``[heads, tokens, dim]``.
        values: Likewise.
        positions: ``[tokens]`` int32.
        weights: ``[tokens, top_k]``.
        experts: ``[tokens, top_k]`` int32.
        rows: ``[choices]`` int32, which token each row of ``grouped`` is.
        places: ``[tokens, top_k]`` int32, which row of ``outputs`` each choice is.
        identity: ``[top_k]`` int32: ``places`` of a single token.
        logits: ``[vocabulary]``.
    """

    hidden: int
    residual: int
    normed: int
    dense: int
    grouped: int
    outputs: int
    keys: int
    values: int
    positions: int
    weights: int
    experts: int
    rows: int
    places: int
    identity: int
    logits: int

    def by_name(self) -> dict[str, int]:
        """Return every address under the names that stages use."""
        found = {one.name: int(getattr(self, one.name)) for one in fields(self)}
        return {**found, "x": self.hidden, "y": self.normed}


def most_choices(graph: DecoderGraph) -> int:
    """Return how many experts a token chooses at most; 0 where nothing routes."""
    return max((layer.routing.top_k for layer in graph.layers if layer.routing), default=0)


def take_buffers(cuda: CudaContext, graph: DecoderGraph, chunk_tokens: int) -> Buffers:
    """Take device memory for what passes of up to ``chunk_tokens`` compute.

    Raises:
        DeviceError: There is too little.
    """
    attention, top_k = graph.attention, max(most_choices(graph), 1)
    choices = chunk_tokens * top_k
    row_bytes = graph.hidden_dim * FLOAT_BYTES
    heads_bytes = chunk_tokens * attention.kv_heads * FLOAT_BYTES
    sizes = {
        **dict.fromkeys(("hidden", "residual", "normed", "dense"), chunk_tokens * row_bytes),
        "grouped": choices * row_bytes if chunk_tokens > 1 else row_bytes,
        "outputs": choices * row_bytes,
        "keys": heads_bytes * attention.head_dim,
        "values": heads_bytes * attention.value_dim,
        "positions": chunk_tokens * _INT_BYTES,
        "weights": choices * FLOAT_BYTES,
        **dict.fromkeys(("experts", "rows", "places"), choices * _INT_BYTES),
        "identity": top_k * _INT_BYTES,
        "logits": graph.vocabulary * FLOAT_BYTES,
    }
    return Buffers(**{name: cuda.allocate(size) for name, size in sizes.items()})


def take_staging(cuda: CudaContext, graph: DecoderGraph, chunk_tokens: int) -> Staging:
    """Take pinned memory for what goes up and comes back.

    Raises:
        DeviceError: There is too little.
    """
    choices = chunk_tokens * max(most_choices(graph), 1)
    return Staging(
        cuda,
        {
            "hidden": (chunk_tokens * graph.hidden_dim, np.float32),
            "positions": (chunk_tokens, np.int32),
            "rows": (choices, np.int32),
            "places": (choices, np.int32),
            "weights": (choices, np.float32),
            "experts": (choices, np.int32),
            "logits": (graph.vocabulary, np.float32),
        },
    )


@dataclass(frozen=True)
class DecoderStages:
    """What runs.

    Attributes:
        attention: By layer.
        dense: By layer, where there is one.
        sums: By layer.
        head: The last one.
        gather: Groups rows by expert.
        templates: Of experts, by the name of the graph's file.
    """

    attention: tuple[BoundStage, ...]
    dense: Mapping[int, BoundStage]
    sums: tuple[BoundStage, ...]
    head: BoundStage
    gather: BoundStage | None
    templates: Mapping[str, EngineStage]


class DecodeSpans(NamedTuple):
    """What runs between two waits while single tokens are decoded, with places that never change.

    Experts are in none: their places do.

    Attributes:
        attention: By layer; with the way back of the router's choice where the layer has one.
        ends: By layer: the dense part, where there is one, and the sum.
        head: With the way back of the logits.
    """

    attention: tuple[Span, ...]
    ends: tuple[Span, ...]
    head: Span


class Fetching:
    """Queues the way back of what a pass made.

    Args:
        cuda: The device's context.
        stream: Where copies are queued.
        buffers: What is fetched.
        staging: Where it arrives.
    """

    def __init__(self, cuda: CudaContext, stream: int, buffers: Buffers, staging: Staging) -> None:
        self._cuda = cuda
        self._stream = stream
        self._buffers = buffers
        self._staging = staging

    def choice(self, count: int) -> None:
        """Queue ``count`` choices of experts, and their weights."""
        self._staging.down(self._cuda, self._stream, "weights", count, self._buffers.weights)
        self._staging.down(self._cuda, self._stream, "experts", count, self._buffers.experts)

    def logits(self) -> None:
        """Queue a row of logits."""
        count = self._staging.arrays["logits"].size
        self._staging.down(self._cuda, self._stream, "logits", count, self._buffers.logits)


def decode_spans(
    graph: DecoderGraph, stages: DecoderStages, buffers: Buffers, staging: Staging, fetching: Fetching
) -> DecodeSpans:
    """Return the spans of single tokens; layers that end alike, without weights of their own, share one."""
    arrays = staging.arrays
    row = arrays["hidden"][: graph.hidden_dim]
    attention: list[Span] = []
    ends: list[Span] = []
    bare: dict[str, Span] = {}
    for layer in graph.layers:
        top_k = layer.routing.top_k if layer.routing else 0
        watched = [Watched(buffers.residual, row, fetched=False)]
        if top_k:
            watched.append(Watched(buffers.weights, arrays["weights"][:top_k], fetched=True))
            watched.append(Watched(buffers.experts, arrays["experts"][:top_k], fetched=True))
        fetch = partial(fetching.choice, top_k) if top_k else None
        attention.append(Span([stages.attention[layer.index]], watched, fetch))
        stage, places = stages.sums[layer.index]
        sums = BoundStage(stage, {**places, "places": buffers.identity} if top_k else places)
        dense = stages.dense.get(layer.index)
        end = bare.get(stage.name) if dense is None else None
        if end is None:
            calls = [sums] if dense is None else [dense, sums]
            end = Span(calls, [Watched(buffers.hidden, row, fetched=False)])
        if dense is None:
            bare[stage.name] = end
        ends.append(end)
    head = Span([stages.head], [Watched(buffers.logits, arrays["logits"], fetched=True)], fetching.logits)
    return DecodeSpans(tuple(attention), tuple(ends), head)


class Wiring:
    """Gives every stage its addresses.

    Args:
        graph: The decoder.
        engines: What is loaded.
        buffers: Of activations.
        cache: Of keys and values.
        weights: Pieces of the dense weights, by the manifest's names; scales end in ``_scales``.
    """

    def __init__(
        self,
        graph: DecoderGraph,
        engines: Engines,
        buffers: Buffers,
        cache: DeviceKeyValues,
        weights: Mapping[str, Region],
    ) -> None:
        self._graph = graph
        self._engines = engines
        self._buffers = buffers
        self._cache = cache
        self._weights = weights
        self._values = buffers.by_name()

    def stages(self, programs: Programs) -> DecoderStages:
        """Return all stages.

        Raises:
            BundleError: A stage wants something that the bundle does not have, or in another size.
        """
        layers = [layer.index for layer in self._graph.layers]
        grouped = {"out": self._buffers.grouped}
        return DecoderStages(
            attention=tuple(self._attention(programs.attention[index].path, index) for index in layers),
            dense={index: self._dense(one.path, index) for index, one in programs.dense.items()},
            sums=tuple(self._bound(programs.sums[index].path, {}, {}) for index in layers),
            head=self._bound(programs.head.path, self._named(""), {}),
            gather=None if programs.gather is None else self._bound(programs.gather.path, {}, grouped),
            templates={name: self._engines.stage(one.path) for name, one in programs.experts.items()},
        )

    def _named(self, start: str) -> dict[str, Region]:
        """Return the weights whose names begin so, by the rest of their names."""
        return {name[len(start) :]: one for name, one in self._weights.items() if name.startswith(start)}

    def _attention(self, path: str, index: int) -> BoundStage:
        keys, values = self._cache.places(index)
        return self._bound(path, self._named(f"layers.{index}."), {"key_cache": keys, "value_cache": values})

    def _dense(self, path: str, index: int) -> BoundStage:
        start = f"layers.{index}."
        inner = "mlp." if self._graph.layers[index].routing is None else "shared."
        known = {**self._named(start), **self._named(start + inner)}
        return self._bound(path, known, {"out": self._buffers.dense})

    def _bound(self, path: str, weights: Mapping[str, Region], values: Mapping[str, int]) -> BoundStage:
        """Return a stage with a place for every input and output."""
        stage = self._engines.stage(path)
        known = {**self._values, **values}
        places = {name: known[name] for name in (*stage.inputs, *stage.outputs) if name in known}
        for name in stage.inputs:
            if name in weights and name not in values:
                stage.require_bytes(name, weights[name].size_bytes, f"the bundle's {name}")
                places[name] = weights[name].address
        absent = [name for name in (*stage.inputs, *stage.outputs) if name not in places]
        if absent:
            raise BundleError(f"{path} wants {', '.join(absent)}, which nothing gives. {REMEDY}")
        return BoundStage(stage, places)
