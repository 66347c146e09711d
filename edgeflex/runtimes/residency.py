"""Serves a forward pass that lacks experts: asks the cache, finds places, reads, binds, computes meanwhile.

The cache alone decides what is resident, from the sequence of events; this module makes it true. Events that were
all hits are told to the cache late, but always in order and before the next decision, so that engine and
simulator see the same sequence.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex.errors import DeviceError, InputError
from edgeflex.runtimes.expert_cache import split_event, union_of
from edgeflex.runtimes.movers import BLOCK_BYTES, Mover, takes_direct
from edgeflex.runtimes.slots import Slots
from edgeflex.runtimes.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.engines import DecoderEngine
    from edgeflex.runtimes.expert_cache import ExpertCache, Outcome
    from edgeflex.runtimes.movers import Read
    from edgeflex.runtimes.native import Missing
    from edgeflex.runtimes.packed import PackedStore
    from edgeflex.runtimes.prefetch import Guesser

    Key = tuple[int, int]


# Bytes in flight of experts that nobody waits for yet: enough to keep a disk busy, few enough to wait behind.
_EARLY_BYTES = 16 << 20


class Pass(NamedTuple):
    """One forward pass.

    Attributes:
        turn: Number of the generation.
        position: Of its first token in the context.
        chunk: Number of the prompt's chunk; 0 while decoding.
        decoding: Whether it decodes; else it reads a prompt.
    """

    turn: int
    position: int
    chunk: int
    decoding: bool


class Event(NamedTuple):
    """What one layer's tokens chose in one forward pass.

    Attributes:
        step: Number of the pass.
        of: The pass.
        layer: The layer.
        experts: ``[tokens, top_k]`` ids, in falling order of weight.
        weights: ``[tokens, top_k]`` router weights.
    """

    step: int
    of: Pass
    layer: int
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]


def cache_limit(store: PackedStore, asked_bytes: int) -> int:
    """Return the bytes that an expert cache gets: whole blocks, and no more than all experts need.

    Raises:
        InputError: Not even the largest expert fits.
    """
    largest = int(store.sizes.max(initial=0))
    limit = min(asked_bytes // BLOCK_BYTES * BLOCK_BYTES, int(store.sizes.sum()))
    if limit < largest:
        raise InputError(
            f"an expert cache of {asked_bytes} bytes does not hold the largest expert ({largest} bytes with padding). "
            f"Give it at least {largest} bytes, better several times that."
        )
    return limit


class Residency:
    """The experts in the arena; what it holds is what the cache says, once reads have landed.

    Where the arena has room for all experts, they are read one after the other from the first pass on, beside the
    computing; the cache counts each at its first use all the same.

    Args:
        engine: Computes; its arena holds the experts.
        store: Where experts are read from.
        cache: Decides; not used by anybody else.
        layers: Numbers of the layers with experts, ascending.
        predictor: Whom to ask for experts worth prefetching; None prefetches nothing.
        record: Keep every event.
        mover: Makes the readers of an arena; a test of faults gives its own.
        clock: Seconds, rising.
    """

    def __init__(
        self,
        engine: DecoderEngine,
        store: PackedStore,
        cache: ExpertCache,
        layers: Sequence[int],
        *,
        predictor: Guesser | None = None,
        record: bool = False,
        mover: Callable[..., Mover] = Mover,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.cache = cache
        self.events: list[Event] = []
        layer_count, expert_count = store.sizes.shape
        self._uses = [[0] * expert_count for _ in range(layer_count)]
        self.wait_s = 0.0
        self._engine = engine
        self._store = store
        self._sizes = store.sizes.tolist()
        self._layers = tuple(layers)
        self._predictor = predictor
        self._record = record
        self._clock = clock
        self._arena: NDArray[np.uint8] = engine.arena(cache.capacity_bytes)
        sizes = np.unique(store.sizes[store.sizes > 0])
        self._slots = Slots(cache.capacity_bytes, int(sizes[0]) if sizes.size > 1 else 0)
        files = {expert.record.file for expert in store.experts.values()}
        self._mover = mover(self._arena, direct=bool(files) and all(takes_direct(file) for file in files))
        self._reads: dict[Key, Read] = {}
        self._bound: set[Key] = set()
        self._verified: set[Key] = set()
        self._early: deque[Key] = deque()
        self._early_reads: list[Read] = []
        self._plan_early_reads()
        self._step = -1
        self._begun: deque[Pass] = deque()  # passes of which not all events were taken
        self._ahead = 0  # events taken of the first of them

    @property
    def reading(self) -> str:
        """How the disk is read: ``direct`` or ``buffered``."""
        return self._mover.mode

    def uses(self) -> NDArray[np.int64]:
        """Return ``[layers, experts]``: how many tokens used each expert so far."""
        return np.array(self._uses, dtype=np.int64)

    def begin(self, of: Pass) -> None:
        """Say which forward pass comes now."""
        self._begun.append(of)
        if self._early:
            self._read_early()

    def serve(self, missing: Missing) -> None:
        """Bring what the present event lacks and compute all of it.

        Raises:
            DeviceError: The disk failed.
            BundleError: An expert's bytes are not what was packed.
        """
        events = self._take()
        present = events.pop()
        self._account(events)
        union, weights = union_of(present.experts, present.weights)
        self._note(present)
        for group in split_event(union, self._sizes[present.layer], self.cache.capacity_bytes):
            chosen = None if weights is None else tuple(weights[union.index(expert)] for expert in group)
            outcome = self.cache.event(present.step, present.layer, group, chosen, decoding=present.of.decoding)
            self._evict(outcome.evicted)
            self._admit(present.layer, outcome.misses)
            if self._predictor is not None and present.of.decoding:
                self._prefetch(present, union)
            self._compute(present.layer, outcome)
        if union != tuple(missing.experts):
            raise DeviceError(
                f"layer {present.layer}: the engine waits for experts {missing.experts} and logged {union}. "
                "Please report this."
            )

    def settle(self) -> None:
        """Tell the cache all events so far; call it before the kind of passes changes, and before counting."""
        self._account(self._take())

    def reset(self, cache: ExpertCache) -> None:
        """Forget everything after a pass that did not end; ``cache`` is new and has the same limit."""
        self._mover.drain()
        for key in tuple(self._bound):
            self._unbind(key)
        self._reads.clear()
        self._engine.take_events()
        self._slots = Slots(self._slots.capacity_bytes, self._slots.small_bytes)
        self.cache = cache
        self._plan_early_reads()
        self.events.clear()
        self._begun.clear()
        self._step, self._ahead = -1, 0

    def close(self) -> None:
        """Wait for what is being read and stop the readers."""
        self._mover.close()

    # --- events ---------------------------------------------------------------------------------------

    def _take(self) -> list[Event]:
        """Return the events since the last call, the present one last."""
        taken = []
        for layer, experts, weights in self._engine.take_events():
            if not self._ahead:
                self._step += 1
            taken.append(Event(self._step, self._begun[0], layer, experts, weights))
            self._ahead += 1
            if self._ahead == len(self._layers):
                self._begun.popleft()
                self._ahead = 0
        return taken

    def _account(self, events: Sequence[Event]) -> None:
        """Tell the cache events that found all they needed."""
        for event in events:
            # nobody looks at the weights where nothing will leave
            union, weights = union_of(event.experts, event.weights if self.cache.learns else None)
            outcome = self.cache.event(event.step, event.layer, union, weights, decoding=event.of.decoding)
            if outcome.misses:
                raise DeviceError(
                    f"layer {event.layer}: experts {outcome.misses} were computed and are not in the cache's books. "
                    "Please report this."
                )
            self._note(event)

    def _note(self, event: Event) -> None:
        uses = self._uses[event.layer]
        for expert in event.experts.ravel().tolist():
            uses[expert] += 1
        if self._predictor is not None:
            self._predictor.learn(event.layer, event.experts)
        if self._record:
            self.events.append(event)

    # --- places and reads -----------------------------------------------------------------------------

    def _evict(self, keys: Sequence[Key]) -> None:
        for key in keys:
            read = self._reads.pop(key, None)
            if read is not None:  # prefetched and never used; its bytes may still be coming
                read.wait()
            self._unbind(key)
            self._slots.remove(key)

    def _unbind(self, key: Key) -> None:
        if key in self._bound:
            self._bound.remove(key)
            self._engine.unbind(*key)

    def _bind(self, key: Key) -> None:
        self._engine.bind(*key, self._store.experts[key].precision, self._slots.offset(key))
        self._bound.add(key)

    def _admit(self, layer: int, experts: Sequence[int]) -> None:
        """Find places for experts, then start reading them; moving first, since reads pin their places."""
        lacking = [key for key in ((layer, expert) for expert in experts) if key not in self._reads]
        for key in lacking:
            self._place(key)
        for key in lacking:
            self._reads[key] = self._submit(key)
        if self._early:
            self._read_early()

    def _submit(self, key: Key) -> Read:
        record = self._store.experts[key].record
        return self._mover.submit(record, self._slots.offset(key), check=key not in self._verified)

    def _plan_early_reads(self) -> None:
        """List all experts, in the order in which layers come, if all of them have a place."""
        self._early_reads.clear()
        self._early.clear()
        if self.cache.capacity_bytes >= int(self._store.sizes.sum()):
            self._early.extend(sorted(self._store.experts))

    def _read_early(self) -> None:
        """Start reading the next experts that nobody asked for yet, so many that one asked for comes soon after."""
        self._early_reads = [read for read in self._early_reads if not read.done]
        flying_bytes = sum(read.record.size_bytes for read in self._early_reads)
        while self._early and flying_bytes < _EARLY_BYTES:
            key = self._early.popleft()
            if key not in self._reads and key not in self._bound:
                self._place(key)
                self._reads[key] = self._submit(key)
                self._early_reads.append(self._reads[key])
                flying_bytes += self._reads[key].record.size_bytes

    def _place(self, key: Key) -> None:
        _, moves = self._slots.place(key, self._store.experts[key].record.size_bytes)
        for moved, source, target, size_bytes in moves:
            read = self._reads.get(moved)
            if read is not None:
                read.wait()
            if read is None and moved not in self._bound:
                continue  # placed just now, still empty
            base = self._arena.ctypes.data
            bound = moved in self._bound
            self._unbind(moved)
            ctypes.memmove(base + target, base + source, size_bytes)
            if bound:
                self._bind(moved)

    def _prefetch(self, present: Event, union: Sequence[int]) -> None:
        if self._predictor is None or self.cache.prefetch_stopped:
            return
        for layer, experts in self._predictor.predict(present.layer, union):
            outcome = self.cache.prefetch(present.step, layer, experts)
            self._evict(outcome.evicted)
            self._admit(layer, outcome.misses)

    # --- computing ------------------------------------------------------------------------------------

    def _compute(self, layer: int, outcome: Outcome) -> None:
        """Compute an event: first what is there, then each expert as it comes."""
        coming = [expert for expert in (*outcome.hits, *outcome.misses) if (layer, expert) in self._reads]
        here = [expert for expert in outcome.hits if (layer, expert) in self._bound]
        if len(here) + len(coming) != len(outcome.hits) + len(outcome.misses):
            raise DeviceError(f"layer {layer}: a resident expert has no place in memory. Please report this.")
        if here:
            self._engine.compute(here)
        while coming:
            count = self._land(layer, coming)
            self._engine.compute(coming[:count])
            del coming[:count]

    def _land(self, layer: int, coming: Sequence[int]) -> int:
        """Wait for the first of ``coming``, bind it and what came with it; return how many."""
        count = 0
        for expert in coming:
            key = (layer, expert)
            read = self._reads[key]
            if count and not read.done:
                break
            start = self._clock()
            read.wait()
            self.wait_s += self._clock() - start
            del self._reads[key]
            self._verified.add(key)
            self._bind(key)
            count += 1
        return count


def trace_of(events: Sequence[Event], store: PackedStore, name: str) -> Trace:
    """Return recorded events as a trace; every expert of a layer is taken to be as large as its largest.

    Raises:
        InputError: There are no events.
    """
    if not events:
        raise InputError("no event was recorded. Open the session with Settings(record=True) and generate first.")
    top_k = max(event.experts.shape[1] for event in events)
    rows = [_rows(event) for event in events]
    turn, phase, step, layer, chunk, slot, expert = (np.concatenate(column) for column in zip(*rows, strict=True))
    layers, experts = store.sizes.shape
    return Trace(
        turn=turn,
        phase=phase,
        step=step,
        layer=layer,
        iter=chunk,
        slot=slot,
        expert=expert,
        weight=np.concatenate([event.weights.ravel() for event in events]),
        layers=layers,
        experts=experts,
        top_k=top_k,
        expert_bytes=store.sizes.max(axis=1),
        name=name,
    )


def _rows(event: Event) -> tuple[NDArray[np.int64], ...]:
    """Return turn, phase, step, layer, iter, slot and expert of every row of an event."""
    tokens, top_k = event.experts.shape
    count = tokens * top_k
    step = np.repeat(np.arange(event.of.position, event.of.position + tokens), top_k)
    slot = np.tile(np.arange(top_k), tokens)
    turn, phase, layer, chunk = (
        np.full(count, value, dtype=np.int64)
        for value in (event.of.turn, int(event.of.decoding), event.layer, event.of.chunk)
    )
    return (
        turn,
        phase,
        step.astype(np.int64),
        layer,
        chunk,
        slot.astype(np.int64),
        event.experts.ravel().astype(np.int64),
    )
