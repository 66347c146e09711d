"""Runs a decoder's ONNX stages layer by layer, and stops where an expert is missing.

The interface and its meaning are those of ``runtimes.native.Engine``. Embeddings are looked up by NumPy; attention,
dense parts, experts and head are sessions of ONNX Runtime. An expert computes all its tokens of an event in one
call, its outputs are kept apart and summed in falling order of the router's weight: no bit of the result depends on
what is in memory, or on the order in which experts come.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.files import sha256_file
from edgeflex.runtimes.dense import read_dense
from edgeflex.runtimes.engines import check_pass, not_finite
from edgeflex.runtimes.native import ALIGNMENT_BYTES, Chosen, Missing, Times
from edgeflex.runtimes.onnx_stages import ExpertTemplate, KeyValues, Stage, check_files, onnxruntime, programs_of
from edgeflex.runtimes.packed import raw_parts
from edgeflex.runtimes.pages import private_pages
from edgeflex.runtimes.raw_store import RawRows, expert_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.runtimes.packed import PackedStore, Piece
    from edgeflex.runtimes.raw_store import Pair
    from edgeflex.schema import Precision
    from edgeflex.schema_moe import DecoderManifest

    Float32 = NDArray[np.float32]
    Key = tuple[int, int]

_REMEDY = "Copy the bundle again, or export it again with `edgeflex export`."
_ATTENTION_OUTPUTS = ("residual", "normed", "keys", "values")
_ROUTER_OUTPUTS = ("weights", "experts")


@dataclass
class _Pass:
    """One forward pass."""

    position: int
    hidden: Float32  # [tokens, hidden], as layers leave it
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
        weights: ``[tokens, top_k]``.
        experts: ``[tokens, top_k]`` ids.
        outputs: ``[tokens, top_k, hidden]`` of what is computed.
        open: What is not.
    """

    layer: int
    residual: Float32
    normed: Float32
    weights: Float32
    experts: NDArray[np.int32]
    outputs: Float32
    union: tuple[int, ...]
    open: set[int]


@dataclass
class _Stages:
    """What is loaded."""

    embedding: RawRows
    attention: list[Stage]
    dense: dict[int, Stage]
    head: Stage
    cache: list[KeyValues]
    templates: dict[str, ExpertTemplate] = field(default_factory=dict)


class OnnxEngine:
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
        self._folder = folder
        self._manifest = manifest
        self._graph = manifest.graph
        self._context_tokens = context_tokens
        self._chunk_tokens = chunk_tokens
        self._threads = threads
        self._clock = clock
        self._programs = programs_of(folder, manifest)
        self._pairs = expert_pairs(manifest)
        self._stages: _Stages | None = None
        self._arena: NDArray[np.uint8] | None = None
        self._bound: dict[Key, tuple[ExpertTemplate, Mapping[str, Any]]] = {}
        self._routers: dict[int, tuple[Float32, Float32]] = {}
        self._sound: frozenset[str] = frozenset()  # files whose hash was checked
        self._pass: _Pass | None = None
        self._waiting: _Waiting | None = None
        self._log: list[Chosen] = []
        self._filled = 0
        self._seconds = [0.0, 0.0, 0.0]

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

    def bind(self, layer: int, expert: int, precision: Precision, offset: int) -> None:
        """Say that the bytes of an expert's file lie at ``offset`` of the arena; nothing is read.

        Raises:
            InputError: No such expert, or it does not lie in the arena at a multiple of 64.
            BundleError: No stage runs it.
        """
        pair = self._pair(layer, expert)
        size_bytes = max(one.offset + one.weights_bytes for one in pair)
        size_bytes = max(size_bytes, *((one.scales_offset or 0) + one.scales_bytes for one in pair))
        held = 0 if self._arena is None else self._arena.size
        if precision is not pair.down.precision or offset % ALIGNMENT_BYTES or not 0 <= offset <= held - size_bytes:
            raise InputError(
                f"expert {expert} of layer {layer}: {size_bytes} bytes of {pair.down.precision.value} bound as "
                f"{precision.value} at offset {offset} of {held}; multiples of {ALIGNMENT_BYTES} inside the arena are "
                "needed. Mend the caller."
            )
        template = self._template(layer, precision)
        data = self._arena[offset : offset + size_bytes] if self._arena is not None else np.empty(0, np.uint8)
        self._bound[layer, expert] = (template, template.bound(data, pair))

    def unbind(self, layer: int, expert: int) -> None:
        """Forget where an expert lies.

        Raises:
            InputError: No such expert.
        """
        self._pair(layer, expert)
        self._bound.pop((layer, expert), None)

    def _pair(self, layer: int, expert: int) -> Pair:
        pair = self._pairs.get((layer, expert))
        if pair is None:
            raise InputError(f"layer {layer} has no expert {expert}. Mend the caller.")
        return pair

    def _template(self, layer: int, precision: Precision) -> ExpertTemplate:
        name = f"expert-{self._graph.layers[layer].expert_dim}.{precision.value}.onnx"
        template = self._loaded().templates.get(name)
        if template is None:
            raise BundleError(f"{self._folder}: no stage {name!r} runs the experts of layer {layer}. {_REMEDY}")
        return template

    # --- running --------------------------------------------------------------------------------------

    def forward(self, tokens: NDArray[np.int32], position: int, *, every_logit: bool = False) -> Missing | None:
        """Run tokens at ``position``, until done (None) or an expert is missing. A waiting pass is given up.

        Args:
            tokens: ``[count]`` ids, at most ``chunk_tokens``.
            position: Of the first; at most the number of tokens run so far. A smaller one goes back there.
            every_logit: ``logits`` gives all tokens' rows, not only the last one's.

        Raises:
            InputError: Weights are not loaded, the tokens do not fit the context or the vocabulary, or leave a gap.
            DeviceError: ONNX Runtime failed, or the weights give numbers that are not finite.
        """
        stages = self._loaded()
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
        self._pass = _Pass(position, stages.embedding(flat), every_logit)
        return self._advance(self._pass, 0)

    def compute(self, experts: Sequence[int]) -> None:
        """Compute these experts of the waiting event now; they may be unbound afterwards.

        Raises:
            InputError: Nothing waits, or one is not in the event or not bound.
        """
        waiting = self._event()
        wrong = [
            expert for expert in experts if expert not in waiting.union or (waiting.layer, expert) not in self._bound
        ]
        if wrong:
            raise InputError(
                f"layer {waiting.layer}: experts {wrong} are not in the event or not bound; it uses {waiting.union}. "
                "Mend the caller."
            )
        for expert in experts:
            if expert in waiting.open:
                self._compute(waiting, expert)

    def resume(self) -> Missing | None:
        """Compute the waiting event's bound experts and go on; the same event again if some are still missing.

        Raises:
            InputError: Nothing waits.
            DeviceError: ONNX Runtime failed.
        """
        waiting, running = self._event(), self._running()
        for expert in sorted(waiting.open):
            if (waiting.layer, expert) in self._bound:
                self._compute(waiting, expert)
        if waiting.open:
            return self._missing(waiting)
        self._end_event(running, waiting)
        return self._advance(running, waiting.layer + 1)

    def take_events(self) -> list[Chosen]:
        """Return what was routed since the last call, in order; a waiting event stands last, once."""
        taken, self._log = self._log, []
        return taken

    def logits(self) -> Float32:
        """Return a copy of the logits: ``[vocabulary]`` of the last token, ``[tokens, vocabulary]`` if all were asked.

        They are computed when first asked for.

        Raises:
            InputError: No pass has ended.
            DeviceError: ONNX Runtime failed.
        """
        running = self._running()
        if not running.ended:
            raise InputError("there are no logits: the pass waits for experts. Mend the caller.")
        if running.logits is None:
            head = self._loaded().head
            rows = running.hidden if running.every_logit else running.hidden[-1:]
            found = [self._timed(0, head, {"x": rows[i : i + 1]}, ("logits",))[0] for i in range(len(rows))]
            running.logits = np.concatenate(found)
        return running.logits.copy() if running.every_logit else running.logits[0].copy()

    def guess(self, layer: int) -> tuple[int, ...]:
        """Return the experts that ``layer`` would choose for the tokens as they are now, ascending.

        While an event waits, its experts are not yet added (Eliseev and Mazur 2023, section 3.2).

        Raises:
            InputError: The layer has no experts, or no pass is under way.
            BundleError: The bundle lacks the router's numbers, or they are damaged.
        """
        known = self._graph.layers[layer].routing if 0 <= layer < len(self._graph.layers) else None
        if known is None:
            raise InputError(f"layer {layer} has no experts to guess. Mend the caller.")
        rows = self._running().hidden if self._waiting is None else self._waiting.residual
        norm, router = self._router(layer)
        scale = np.sqrt(np.mean(rows * rows, axis=1, keepdims=True) + np.float32(self._graph.norm_epsilon))
        scores = (rows / scale * norm) @ router.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, : known.top_k]
        return tuple(np.unique(best).tolist())

    def times(self) -> Times:
        """Return the seconds of computing since the last call: stages with attention, experts, all else."""
        taken, self._seconds = self._seconds, [0.0, 0.0, 0.0]
        return Times(*taken)

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys, values and activations at most; neither the arena nor stages."""
        top_k = max((layer.routing.top_k for layer in self._graph.layers if layer.routing), default=0)
        rows = (top_k + 4) * self._chunk_tokens * self._graph.hidden_dim * 4
        return rows + sum(one.size_bytes for one in (self._stages.cache if self._stages else ()))

    def close(self) -> None:
        """Give the memory back; a second call does nothing, and nothing runs afterwards."""
        self._bound.clear()
        self._routers.clear()
        self._stages = self._arena = self._pass = self._waiting = None

    # --- inside ---------------------------------------------------------------------------------------

    def _advance(self, running: _Pass, start: int) -> Missing | None:
        """Run the layers from ``start`` on."""
        for layer in range(start, len(self._graph.layers)):
            waiting = self._attend(running, layer)
            if waiting is None:
                continue
            if any((layer, expert) not in self._bound for expert in waiting.union):
                self._waiting = waiting
                return self._missing(waiting)
            for expert in waiting.union:
                self._compute(waiting, expert)
            self._end_event(running, waiting)
        if not np.isfinite(running.hidden).all():
            raise not_finite(len(self._graph.layers) - 1)
        running.ended = True
        self._filled = running.position + len(running.hidden)
        return None

    def _attend(self, running: _Pass, layer: int) -> _Waiting | None:
        """Run attention, and what follows it in a dense layer; return the event of one with experts."""
        stages = self._loaded()
        routed = self._graph.layers[layer].routing is not None
        cache, tokens = stages.cache[layer], len(running.hidden)
        keys, values = cache.past(running.position)
        feeds: dict[str, NDArray[Any]] = {
            "x": running.hidden,
            "positions": np.arange(running.position, running.position + tokens, dtype=np.int64),
            "key_cache": keys,
            "value_cache": values,
        }
        names = (*_ATTENTION_OUTPUTS, *_ROUTER_OUTPUTS) if routed else _ATTENTION_OUTPUTS
        residual, normed, new_keys, new_values, *chosen = self._timed(0, stages.attention[layer], feeds, names)
        cache.write(running.position, new_keys, new_values)
        if not routed:
            running.hidden = residual + self._timed(0, stages.dense[layer], {"y": normed}, ("out",))[0]
            return None
        return self._route(layer, residual, normed, *chosen)

    def _route(
        self, layer: int, residual: Float32, normed: Float32, weights: Float32, chosen: NDArray[np.int64]
    ) -> _Waiting:
        if not np.isfinite(weights).all():
            raise not_finite(layer)
        experts = chosen.astype(np.int32)
        union = tuple(np.unique(experts).tolist())
        self._log.append(Chosen(layer, experts, weights))
        outputs = np.empty((*experts.shape, residual.shape[1]), dtype=np.float32)
        return _Waiting(layer, residual, normed, weights, experts, outputs, union, set(union))

    def _compute(self, waiting: _Waiting, expert: int) -> None:
        """Compute one bound expert for all tokens that chose it."""
        start = self._clock()
        template, pieces = self._bound[waiting.layer, expert]
        tokens, slots = np.nonzero(waiting.experts == expert)
        waiting.outputs[tokens, slots] = template(waiting.normed[tokens], pieces)
        waiting.open.discard(expert)
        self._seconds[1] += self._clock() - start

    def _end_event(self, running: _Pass, waiting: _Waiting) -> None:
        """Sum what experts gave, the largest weight first, then add the shared experts."""
        start = self._clock()
        total = waiting.outputs[:, 0] * waiting.weights[:, :1]
        for slot in range(1, waiting.weights.shape[1]):
            total += waiting.outputs[:, slot] * waiting.weights[:, slot : slot + 1]
        self._seconds[2] += self._clock() - start
        if self._graph.layers[waiting.layer].shared_dim:
            stage = self._loaded().dense[waiting.layer]
            total += self._timed(0, stage, {"y": waiting.normed}, ("out",))[0]
        running.hidden = waiting.residual + total
        self._waiting = None

    def _timed(
        self, place: int, stage: Stage, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]
    ) -> list[NDArray[Any]]:
        start = self._clock()
        found = stage(feeds, outputs)
        self._seconds[place] += self._clock() - start
        return found

    def _missing(self, waiting: _Waiting) -> Missing:
        lacking = [one for one in waiting.union if one in waiting.open and (waiting.layer, one) not in self._bound]
        return Missing(waiting.layer, waiting.union, tuple(lacking))

    def _loaded(self) -> _Stages:
        if self._stages is None:
            raise InputError("the decoder's stages are not loaded, or it was closed. Load them first.")
        return self._stages

    def _running(self) -> _Pass:
        if self._pass is None:
            raise InputError("no forward pass was begun. Begin one first.")
        return self._pass

    def _event(self) -> _Waiting:
        if self._waiting is None:
            raise InputError("no event waits for experts. Mend the caller.")
        return self._waiting

    def _router(self, layer: int) -> tuple[Float32, Float32]:
        """Return a layer's norm ``[hidden]`` and router ``[experts, hidden]``, read when first needed."""
        if layer not in self._routers:
            norm, router = (self._small(f"layers.{layer}.{name}") for name in ("post_norm", "router"))
            self._routers[layer] = (norm.reshape(-1), router)
        return self._routers[layer]

    def _small(self, name: str) -> Float32:
        matrix = next((one for one in self._manifest.matrices if one.name == name), None)
        entry = next((one for one in self._manifest.files if matrix and one.path == matrix.file), None)
        if matrix is None or entry is None:
            raise BundleError(f"{self._folder}: the bundle holds no {name!r}. {_REMEDY}")
        path = self._folder / entry.path
        try:
            if entry.path not in self._sound and sha256_file(path) != entry.sha256:
                raise BundleError(f"{path}: the content differs from the manifest's SHA-256. {_REMEDY}")
            values = np.fromfile(path, np.float32, matrix.rows * matrix.columns, offset=matrix.offset)
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror or error}. {_REMEDY}") from None
        return values.reshape(matrix.rows, matrix.columns)
