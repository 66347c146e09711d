"""One forward pass over a decoder, layer by layer, until an expert is missing: what all engines in Python share.

``LayerEngine`` keeps the order of layers, the event that waits, and the rules of ``runtimes.engines.DecoderEngine``; a
subclass says where rows and experts lie and how the parts of a layer are computed. Experts' outputs are kept apart and
summed in falling order of the router's weight, in whichever order experts come.

``StageEngine`` is what engines over a bundle's stages share beside: experts bound to places of one arena, and routers
that the host guesses with. There an expert computes all its tokens of an event in one call: no bit of the result
depends on what is in memory.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from edgeflex.errors import BundleError, InputError
from edgeflex.files import sha256_file
from edgeflex.runtimes.engines import check_pass, not_finite
from edgeflex.runtimes.native import ALIGNMENT_BYTES, Chosen, Missing, Times
from edgeflex.runtimes.raw_store import expert_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.runtimes.raw_store import Pair
    from edgeflex.schema import Precision
    from edgeflex.schema_moe import DecoderManifest, Routing

    Float32 = NDArray[np.float32]
    Key = tuple[int, int]

REMEDY = "Copy the bundle again, or export it again with `edgeflex export`."
DENSE, EXPERTS, OTHER = range(3)  # places of ``Times``

Rows = TypeVar("Rows")  # float32 rows [tokens, hidden], wherever they lie
Bound = TypeVar("Bound")  # how an expert that has its place is kept
_UNGUARDED = nullcontext()


@dataclass
class Pass(Generic[Rows]):
    """One forward pass.

    Attributes:
        position: Of its first token.
        tokens: How many.
        hidden: As the last layer left them.
        every_logit: Whether all tokens' logits are wanted.
    """

    position: int
    tokens: int
    hidden: Rows
    every_logit: bool
    ended: bool = False
    logits: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Attended(Generic[Rows]):
    """What a layer's attention gives; the router's choice where the layer has one.

    Attributes:
        residual: Rows after attention.
        normed: What experts and dense parts see.
        weights: ``[tokens, top_k]``, on the host.
        experts: ``[tokens, top_k]`` ids, on the host.
    """

    residual: Rows
    normed: Rows
    weights: NDArray[np.float32] | None = None
    experts: NDArray[np.int32] | None = None


@dataclass
class Waiting(Generic[Rows]):
    """An event whose experts are not all computed.

    Attributes:
        layer: Where.
        residual: Rows after attention.
        normed: What experts see.
        weights: ``[tokens, top_k]``.
        experts: ``[tokens, top_k]`` ids.
        order: ``[tokens * top_k]`` flat choices grouped by expert, each expert's by token.
        spans: Each expert's first and last place in ``order``, ascending by expert.
        open: What is not computed.
    """

    layer: int
    residual: Rows
    normed: Rows
    weights: NDArray[np.float32]
    experts: NDArray[np.int32]
    order: NDArray[np.int64]
    spans: Mapping[int, tuple[int, int]]
    open: set[int]

    @property
    def union(self) -> tuple[int, ...]:
        """Its experts, ascending."""
        return tuple(self.spans)

    def chosen(self, expert: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return tokens and slots that chose an expert, by token."""
        first, last = self.spans[expert]
        tokens, slots = np.divmod(self.order[first:last], self.experts.shape[1])
        return tokens, slots


def grouped_choices(experts: NDArray[np.int32]) -> tuple[NDArray[np.int64], dict[int, tuple[int, int]]]:
    """Return the flat places of choices grouped by expert, and each expert's stretch of them, ascending."""
    flat = experts.reshape(-1)
    order = np.argsort(flat, kind="stable")
    ids, starts = np.unique(flat[order], return_index=True)
    ends = [*starts[1:].tolist(), flat.size]
    return order, dict(zip(ids.tolist(), zip(starts.tolist(), ends, strict=True), strict=True))


class LayerEngine(ABC, Generic[Rows]):
    """The loop of a pass. Not for several threads at once, except that arenas may be written meanwhile.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        context_tokens: Positions that the key/value cache holds.
        chunk_tokens: Most tokens of one forward pass.
        clock: Seconds, rising.
    """

    def __init__(
        self,
        folder: Path,
        manifest: DecoderManifest,
        *,
        context_tokens: int,
        chunk_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._graph = manifest.graph
        self._context_tokens = context_tokens
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._pass: Pass[Rows] | None = None
        self._waiting: Waiting[Rows] | None = None
        self._log: list[Chosen] = []
        self._filled = 0
        self._broken = False  # a pass ended in a fault: what it left of keys and values may be no numbers
        self._seconds = [0.0, 0.0, 0.0]

    # --- what a subclass gives ------------------------------------------------------------------------

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes allocated for keys, values and activations."""

    @abstractmethod
    def arena(self, capacity_bytes: int) -> NDArray[np.uint8]:
        """Return page-aligned memory for experts; an earlier arena is given up, its experts unbound."""

    @abstractmethod
    def bind(self, layer: int, expert: int, precision: Precision, offset: int) -> None:
        """Say that the bytes of an expert's file lie at ``offset`` of the arena."""

    @abstractmethod
    def unbind(self, layer: int, expert: int) -> None:
        """Forget where in the arena an expert lies."""

    def _guard(self) -> AbstractContextManager[object]:
        """Return what everything that computes happens inside of; it is never entered twice at once."""
        return _UNGUARDED

    @abstractmethod
    def _require_loaded(self) -> None:
        """Refuse to run before everything is loaded, or after closing."""

    @abstractmethod
    def _holds(self, key: Key) -> bool:
        """Return whether an expert lies where ``_compute`` finds it."""

    @abstractmethod
    def _embed(self, tokens: NDArray[np.int32], position: int) -> Rows:
        """Return the rows of tokens that stand from ``position`` on."""

    @abstractmethod
    def _attend(self, running: Pass[Rows], layer: int) -> Attended[Rows]:
        """Run attention, and the router where there is one; keep keys and values."""

    @abstractmethod
    def _feed_forward(self, running: Pass[Rows], layer: int, attended: Attended[Rows]) -> Rows:
        """Return what a layer without experts leaves."""

    @abstractmethod
    def _begin_event(self, waiting: Waiting[Rows]) -> None:
        """Make room for the outputs of the experts of what was just attended."""

    @abstractmethod
    def _compute(self, waiting: Waiting[Rows], experts: Sequence[int]) -> None:
        """Compute experts that are held, each for all tokens that chose it."""

    @abstractmethod
    def _sum(self, waiting: Waiting[Rows]) -> Rows:
        """Return what a layer leaves: experts by falling weight, then shared experts, then the residual."""

    @abstractmethod
    def _head(self, running: Pass[Rows]) -> Float32:
        """Return the logits ``[rows, vocabulary]`` of the last token, or of all if all were asked for."""

    @abstractmethod
    def _guessed(self, layer: int, routing: Routing, rows: Rows, tokens: int) -> NDArray[np.integer]:
        """Return the ids that a layer's router chooses for rows that attention has not changed yet."""

    def _check_rows(self, running: Pass[Rows]) -> None:
        """Refuse what a pass ended with, where that can be told without waiting."""

    def _mend_past(self, position: int) -> None:
        """Make keys and values from ``position`` on numbers again, where masked ones count as 0 times themselves."""

    # --- running --------------------------------------------------------------------------------------

    def forward(self, tokens: NDArray[np.int32], position: int, *, every_logit: bool = False) -> Missing | None:
        """Run tokens at ``position``, until done (None) or an expert is missing. A waiting pass is given up.

        Args:
            tokens: ``[count]`` ids, at most ``chunk_tokens``.
            position: Of the first; at most the number of tokens run so far. A smaller one goes back there.
            every_logit: ``logits`` gives all tokens' rows, not only the last one's.

        Raises:
            InputError: Weights are not loaded, the tokens do not fit the context or the vocabulary, or leave a gap.
            DeviceError: The device failed, or the weights give numbers that are not finite.
        """
        with self._guard():
            self._require_loaded()
            flat = np.ascontiguousarray(tokens, dtype=np.int32).reshape(-1)
            check_pass(
                flat,
                position,
                vocabulary=self._graph.vocabulary,
                chunk_tokens=self._chunk_tokens,
                context_tokens=self._context_tokens,
                filled=self._filled,
            )
            if self._broken:
                self._mend_past(position)
            self._waiting, self._broken = None, True  # until this pass waits or ends
            self._filled = position  # until the pass is through, its keys do not count
            self._pass = Pass(position, flat.size, self._embed(flat, position), every_logit)
            return self._advance(self._pass, 0)

    def compute(self, experts: Sequence[int]) -> None:
        """Compute these experts of the waiting event now; they may leave their places afterwards.

        Raises:
            InputError: Nothing waits, or one is not in the event or not where it is computed.
            DeviceError: The device failed.
        """
        with self._guard():
            waiting = self._event()
            self._refuse_absent(waiting, experts, self._holds)
            self._compute_open(waiting, experts)

    def resume(self) -> Missing | None:
        """Compute what of the waiting event is there and go on; the same event again if some are still missing.

        Raises:
            InputError: Nothing waits.
            DeviceError: The device failed, or the weights give numbers that are not finite.
        """
        with self._guard():
            waiting, running = self._event(), self._running()
            self._compute_open(waiting, [one for one in sorted(waiting.open) if self._holds((waiting.layer, one))])
            if waiting.open:
                return self._missing(waiting)
            self._broken = True
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
            DeviceError: The device failed, or the weights give numbers that are not finite.
        """
        running = self._running()
        if not running.ended:
            raise InputError("there are no logits: the pass waits for experts. Mend the caller.")
        with self._guard():
            self._require_loaded()
            if running.logits is None:
                running.logits = self._head(running)
        return running.logits.copy() if running.every_logit else running.logits[0].copy()

    def guess(self, layer: int) -> tuple[int, ...]:
        """Return the experts that ``layer`` would choose for the tokens as they are now, ascending.

        While an event waits, its experts are not yet added (Eliseev and Mazur 2023, section 3.2).

        Raises:
            InputError: The layer has no experts, or no pass is under way.
            BundleError: The bundle lacks the router's numbers, or they are damaged.
            DeviceError: The device failed.
        """
        routing = self._graph.layers[layer].routing if 0 <= layer < len(self._graph.layers) else None
        if routing is None:
            raise InputError(f"layer {layer} has no experts to guess. Mend the caller.")
        running = self._running()
        rows = running.hidden if self._waiting is None else self._waiting.residual
        with self._guard():
            return tuple(np.unique(self._guessed(layer, routing, rows, running.tokens)).tolist())

    def times(self) -> Times:
        """Return the seconds of computing since the last call: stages with attention, experts, all else."""
        taken, self._seconds = self._seconds, [0.0, 0.0, 0.0]
        return Times(*taken)

    def close(self) -> None:
        """Give the memory back; a second call does nothing, and nothing runs afterwards."""
        self._pass = self._waiting = None

    # --- inside ---------------------------------------------------------------------------------------

    def _advance(self, running: Pass[Rows], start: int) -> Missing | None:
        """Run the layers from ``start`` on."""
        for layer in range(start, len(self._graph.layers)):
            attended = self._attend(running, layer)
            if attended.weights is None or attended.experts is None:
                running.hidden = self._feed_forward(running, layer, attended)
                continue
            waiting = self._route(layer, attended, attended.weights, attended.experts)
            if not all(self._holds((layer, expert)) for expert in waiting.spans):
                self._waiting, self._broken = waiting, False
                return self._missing(waiting)
            self._compute_open(waiting, waiting.union)
            self._end_event(running, waiting)
        self._check_rows(running)
        running.ended, self._broken = True, False
        self._filled = running.position + running.tokens
        return None

    def _route(
        self, layer: int, attended: Attended[Rows], weights: Float32, experts: NDArray[np.int32]
    ) -> Waiting[Rows]:
        if not np.isfinite(weights).all():
            raise not_finite(layer)
        self._log.append(Chosen(layer, experts, weights))
        order, spans = grouped_choices(experts)
        waiting = Waiting(layer, attended.residual, attended.normed, weights, experts, order, spans, set(spans))
        self._begin_event(waiting)
        return waiting

    def _compute_open(self, waiting: Waiting[Rows], experts: Sequence[int]) -> None:
        wanted = [expert for expert in experts if expert in waiting.open]
        if wanted:
            self._compute(waiting, wanted)
            waiting.open.difference_update(wanted)

    def _end_event(self, running: Pass[Rows], waiting: Waiting[Rows]) -> None:
        running.hidden = self._sum(waiting)
        self._waiting = None

    def _missing(self, waiting: Waiting[Rows]) -> Missing:
        lacking = [one for one in waiting.spans if one in waiting.open and not self._holds((waiting.layer, one))]
        return Missing(waiting.layer, waiting.union, tuple(lacking))

    @staticmethod
    def _refuse_absent(waiting: Waiting[Rows], experts: Sequence[int], holds: Callable[[Key], bool]) -> None:
        wrong = [one for one in experts if one not in waiting.spans or not holds((waiting.layer, one))]
        if wrong:
            raise InputError(
                f"layer {waiting.layer}: experts {wrong} are not in the event or not where they are computed; it uses "
                f"{waiting.union}. Mend the caller."
            )

    def _running(self) -> Pass[Rows]:
        if self._pass is None:
            raise InputError("no forward pass was begun. Begin one first.")
        return self._pass

    def _event(self) -> Waiting[Rows]:
        if self._waiting is None:
            raise InputError("no event waits for experts. Mend the caller.")
        self._require_loaded()
        return self._waiting


class StageEngine(LayerEngine[Rows], Generic[Rows, Bound]):
    """A decoder in stages, whose experts lie in one arena.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        context_tokens: Positions that the key/value cache holds.
        chunk_tokens: Most tokens of one forward pass.
        clock: Seconds, rising.

    Raises:
        BundleError: An expert lacks a matrix.
    """

    def __init__(
        self,
        folder: Path,
        manifest: DecoderManifest,
        *,
        context_tokens: int,
        chunk_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(folder, manifest, context_tokens=context_tokens, chunk_tokens=chunk_tokens, clock=clock)
        self._pairs = expert_pairs(manifest)
        self._arena: NDArray[np.uint8] | None = None
        self._bound: dict[Key, Bound] = {}
        self._routers: dict[int, tuple[Float32, Float32]] = {}
        self._sound: frozenset[str] = frozenset()  # files whose hash was checked

    # --- what a subclass gives ------------------------------------------------------------------------

    @abstractmethod
    def _place(self, layer: int, expert: int, pair: Pair, offset: int, size_bytes: int) -> Bound:
        """Return what computing an expert needs whose file lies at ``offset`` of the arena."""

    @abstractmethod
    def _on_host(self, rows: Rows, tokens: int) -> Float32:
        """Return rows ``[tokens, hidden]`` where NumPy reads them."""

    def _forget(self, key: Key) -> None:
        """Let go of an expert that is about to leave its place."""

    # --- experts --------------------------------------------------------------------------------------

    def bind(self, layer: int, expert: int, precision: Precision, offset: int) -> None:
        """Say that the bytes of an expert's file lie at ``offset`` of the arena.

        Raises:
            InputError: No such expert, or it does not lie in the arena at a multiple of 64.
            BundleError: No stage runs it.
            DeviceError: The device refused.
        """
        pair = self._pair(layer, expert)
        size_bytes = max(
            max(one.offset + one.weights_bytes, (one.scales_offset or 0) + one.scales_bytes) for one in pair
        )
        held = 0 if self._arena is None else self._arena.size
        if precision is not pair.down.precision or offset % ALIGNMENT_BYTES or not 0 <= offset <= held - size_bytes:
            raise InputError(
                f"expert {expert} of layer {layer}: {size_bytes} bytes of {pair.down.precision.value} bound as "
                f"{precision.value} at offset {offset} of {held}; multiples of {ALIGNMENT_BYTES} inside the arena are "
                "needed. Mend the caller."
            )
        self._bound[layer, expert] = self._place(layer, expert, pair, offset, size_bytes)

    def unbind(self, layer: int, expert: int) -> None:
        """Forget where an expert lies.

        Raises:
            InputError: No such expert.
            DeviceError: The device failed at what it still did with the expert.
        """
        self._pair(layer, expert)
        if self._bound.pop((layer, expert), None) is not None:
            self._forget((layer, expert))

    def _pair(self, layer: int, expert: int) -> Pair:
        pair = self._pairs.get((layer, expert))
        if pair is None:
            raise InputError(f"layer {layer} has no expert {expert}. Mend the caller.")
        return pair

    def _holds(self, key: Key) -> bool:
        return key in self._bound

    def close(self) -> None:
        """Give the memory back; a second call does nothing, and nothing runs afterwards."""
        super().close()
        self._bound.clear()
        self._routers.clear()
        self._arena = None

    # --- routers on the host --------------------------------------------------------------------------

    def _guessed(self, layer: int, routing: Routing, rows: Rows, tokens: int) -> NDArray[np.integer]:
        hidden = self._on_host(rows, tokens)
        norm, router = self._router(layer)
        scale = np.sqrt(np.mean(hidden * hidden, axis=1, keepdims=True) + np.float32(self._graph.norm_epsilon))
        scores = (hidden / scale * norm) @ router.T
        return np.argsort(-scores, axis=1, kind="stable")[:, : routing.top_k]

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
            raise BundleError(f"{self._folder}: the bundle holds no {name!r}. {REMEDY}")
        path = self._folder / entry.path
        try:
            if entry.path not in self._sound and sha256_file(path) != entry.sha256:
                raise BundleError(f"{path}: the content differs from the manifest's SHA-256. {REMEDY}")
            values = np.fromfile(path, np.float32, matrix.rows * matrix.columns, offset=matrix.offset)
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror or error}. {REMEDY}") from None
        return values.reshape(matrix.rows, matrix.columns)
