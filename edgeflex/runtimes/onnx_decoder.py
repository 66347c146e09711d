"""Runs a decoder's ONNX stages layer by layer, and stops where an expert is missing.

The interface and its meaning are those of ``runtimes.native.Engine``, its order ``runtimes.stage_engine``'s. Embeddings
are looked up by NumPy; attention, dense parts, experts and head are sessions of ONNX Runtime.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.runtimes.dense import read_dense
from edgeflex.runtimes.engines import not_finite
from edgeflex.runtimes.onnx_stages import ExpertTemplate, KeyValues, Stage, check_files, onnxruntime, programs_of
from edgeflex.runtimes.packed import raw_parts
from edgeflex.runtimes.pages import private_pages
from edgeflex.runtimes.raw_store import RawRows
from edgeflex.runtimes.stage_engine import DENSE, EXPERTS, OTHER, REMEDY, Attended, StageEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.runtimes.packed import PackedStore, Piece
    from edgeflex.runtimes.raw_store import Pair
    from edgeflex.runtimes.stage_engine import Pass, Waiting
    from edgeflex.schema import Precision
    from edgeflex.schema_moe import DecoderManifest

    Float32 = NDArray[np.float32]

_ATTENTION_OUTPUTS = ("residual", "normed", "keys", "values")
_ROUTER_OUTPUTS = ("weights", "experts")


@dataclass
class _Stages:
    """What is loaded."""

    embedding: RawRows
    attention: list[Stage]
    dense: dict[int, Stage]
    head: Stage
    cache: list[KeyValues]
    templates: dict[str, ExpertTemplate] = field(default_factory=dict)


class OnnxEngine(StageEngine["Float32", "tuple[ExpertTemplate, Mapping[str, Any]]"]):
    """A decoder in ONNX Runtime on the processor; ``load`` comes before everything but ``arena`` and ``bind``.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        context_tokens: Positions that the key/value cache holds.
        chunk_tokens: Most tokens of one forward pass.
        threads: Threads that compute.
        clock: Seconds, rising.

    Raises:
        BundleError: The manifest lacks a stage.
        MissingDependencyError: ONNX Runtime is absent.
    """

    def __init__(
        self,
        folder: Path,
        manifest: DecoderManifest,
        *,
        context_tokens: int,
        chunk_tokens: int,
        threads: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        onnxruntime()
        super().__init__(folder, manifest, context_tokens=context_tokens, chunk_tokens=chunk_tokens, clock=clock)
        self._threads = threads
        self._programs = programs_of(folder, manifest)
        self._stages: _Stages | None = None
        self._outputs: Float32 = np.empty((0, 0, 0), dtype=np.float32)  # [tokens, top_k, hidden] of the event

    # --- weights --------------------------------------------------------------------------------------

    def load(self, store: PackedStore) -> NDArray[np.uint8]:
        """Check and load every stage and the embedding, and return the memory that holds the embedding.

        Args:
            store: Whose only dense part is the embedding.

        Raises:
            BundleError: A file is damaged, or is not what the contract of stages says.
            DeviceError: The disk failed, or memory is short.
        """
        programs = self._programs
        parts = (*programs.attention.values(), *programs.dense.values(), *programs.experts.values(), programs.head)
        self._sound = check_files(self._folder, self._manifest, parts)
        rows: list[RawRows] = []

        def take(piece: Piece, data: NDArray[np.uint8]) -> None:
            rows.append(RawRows(piece.matrix, *raw_parts(piece, data)))

        memory = read_dense(store, take)
        attention = [self._stage(programs.attention[layer.index].path) for layer in self._graph.layers]
        self._stages = _Stages(
            embedding=rows[0],
            attention=attention,
            dense={layer: self._stage(one.path) for layer, one in programs.dense.items()},
            head=self._stage(programs.head.path),
            cache=[self._key_values(stage) for stage in attention],
            templates={name: ExpertTemplate(self._stage(one.path)) for name, one in programs.experts.items()},
        )
        return memory

    def _stage(self, path: str) -> Stage:
        return Stage(self._folder / path, self._threads)

    def _key_values(self, stage: Stage) -> KeyValues:
        return KeyValues(
            stage.static("key_cache", 0),
            stage.static("key_cache", 2),
            stage.static("value_cache", 2),
            self._context_tokens,
        )

    def _loaded(self) -> _Stages:
        if self._stages is None:
            raise InputError("the decoder's stages are not loaded, or it was closed. Load them first.")
        return self._stages

    def _require_loaded(self) -> None:
        self._loaded()

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys, values and activations at most; neither the arena nor stages."""
        top_k = max((layer.routing.top_k for layer in self._graph.layers if layer.routing), default=0)
        rows = (top_k + 4) * self._chunk_tokens * self._graph.hidden_dim * 4
        return rows + sum(one.size_bytes for one in (self._stages.cache if self._stages else ()))

    def close(self) -> None:
        """Give the memory back; a second call does nothing, and nothing runs afterwards."""
        super().close()
        self._stages = None
        self._outputs = np.empty((0, 0, 0), dtype=np.float32)

    # --- experts --------------------------------------------------------------------------------------

    def arena(self, capacity_bytes: int) -> NDArray[np.uint8]:
        """Return zeroed, page-aligned memory for experts; an earlier arena is given up, its experts unbound.

        Raises:
            DeviceError: No memory.
        """
        try:
            whole = private_pages(max(capacity_bytes, 1))
        except (OSError, ValueError, OverflowError) as error:
            raise DeviceError(
                f"no memory for an expert cache of {capacity_bytes} bytes: {error}. All of it is taken at once. "
                "Give a smaller cache."
            ) from error
        self._bound.clear()
        self._arena = whole[:capacity_bytes]
        return self._arena

    def _place(
        self, layer: int, expert: int, pair: Pair, offset: int, size_bytes: int
    ) -> tuple[ExpertTemplate, Mapping[str, Any]]:
        """Return an expert's program and its pieces, views of the arena; nothing is read."""
        del expert
        template = self._template(layer, pair.down.precision)
        data = self._arena[offset : offset + size_bytes] if self._arena is not None else np.empty(0, np.uint8)
        return template, template.bound(data, pair)

    def _template(self, layer: int, precision: Precision) -> ExpertTemplate:
        name = f"expert-{self._graph.layers[layer].expert_dim}.{precision.value}.onnx"
        template = self._loaded().templates.get(name)
        if template is None:
            raise BundleError(f"{self._folder}: no stage {name!r} runs the experts of layer {layer}. {REMEDY}")
        return template

    def _begin_event(self, waiting: Waiting[Float32]) -> None:
        self._outputs = np.empty((*waiting.experts.shape, waiting.residual.shape[1]), dtype=np.float32)

    def _compute(self, waiting: Waiting[Float32], experts: Sequence[int]) -> None:
        start = self._clock()
        for expert in experts:
            template, pieces = self._bound[waiting.layer, expert]
            tokens, slots = waiting.chosen(expert)
            self._outputs[tokens, slots] = template(waiting.normed[tokens], pieces)
        self._seconds[EXPERTS] += self._clock() - start

    def _sum(self, waiting: Waiting[Float32]) -> Float32:
        start = self._clock()
        total = self._outputs[:, 0] * waiting.weights[:, :1]
        for slot in range(1, waiting.weights.shape[1]):
            total += self._outputs[:, slot] * waiting.weights[:, slot : slot + 1]
        self._seconds[OTHER] += self._clock() - start
        if self._graph.layers[waiting.layer].shared_dim:
            stage = self._loaded().dense[waiting.layer]
            total += self._timed(stage, {"y": waiting.normed}, ("out",))[0]
        summed: Float32 = waiting.residual + total
        return summed

    # --- running --------------------------------------------------------------------------------------

    def _embed(self, tokens: NDArray[np.int32], position: int) -> Float32:
        del position
        return self._loaded().embedding(tokens)

    def _attend(self, running: Pass[Float32], layer: int) -> Attended[Float32]:
        stages = self._loaded()
        cache, end = stages.cache[layer], running.position + running.tokens
        keys, values = cache.past(running.position)
        feeds: dict[str, NDArray[Any]] = {
            "x": running.hidden,
            "positions": np.arange(running.position, end, dtype=np.int64),
            "key_cache": keys,
            "value_cache": values,
        }
        routed = self._graph.layers[layer].routing is not None
        names = (*_ATTENTION_OUTPUTS, *_ROUTER_OUTPUTS) if routed else _ATTENTION_OUTPUTS
        residual, normed, new_keys, new_values, *chosen = self._timed(stages.attention[layer], feeds, names)
        cache.write(running.position, new_keys, new_values)
        if not routed:
            return Attended(residual, normed)
        return Attended(residual, normed, chosen[0], chosen[1].astype(np.int32))

    def _feed_forward(self, running: Pass[Float32], layer: int, attended: Attended[Float32]) -> Float32:
        del running
        added = self._timed(self._loaded().dense[layer], {"y": attended.normed}, ("out",))[0]
        left: Float32 = attended.residual + added
        return left

    def _mend_past(self, position: int) -> None:
        del position
        for cache in self._loaded().cache:
            cache.mend()

    def _check_rows(self, running: Pass[Float32]) -> None:
        if not np.isfinite(running.hidden).all():
            raise not_finite(len(self._graph.layers) - 1)

    def _head(self, running: Pass[Float32]) -> Float32:
        head = self._loaded().head
        rows = running.hidden if running.every_logit else running.hidden[-1:]
        found = [self._timed(head, {"x": rows[i : i + 1]}, ("logits",))[0] for i in range(len(rows))]
        return np.concatenate(found)

    def _on_host(self, rows: Float32, tokens: int) -> Float32:
        del tokens
        return rows

    def _timed(self, stage: Stage, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        start = self._clock()
        found = stage(feeds, outputs)
        self._seconds[DENSE] += self._clock() - start
        return found
