"""A device in virtual time: a routing trace through cache, scheduler and curves, without the hardware.

The very ``TieredCache`` and schedules of the runtime are driven; only the clock is made up, by the rules of
``timeline``. Nothing is drawn at random, so that the same trace on the same machine takes the same time to the bit.

A layer of a pass is its dense part on the GPU, during which the link is free, and then its event. The host decides
between the two. A *strategy* says which schedule rule is followed, which policy rules VRAM and what enters it:

    ours       schedule of least span; what enters VRAM must be likelier to be used than what leaves for it; the link
               copies likely experts ahead whenever no upload is waiting, if that pays
    hybrimoe   HybriMoE's rule with its published constants, MRS, slots shared out over the layers
    fiddler    a static list of popular experts, 7 n against 70
    lru        every miss is uploaded, one global LRU (llama.cpp's expert cache)
    static     a static list of popular experts, the rest on the CPU (KTransformers)

Copies ahead go in chunks, and one expert's copy that has begun holds the link for a chunk when an upload comes. They
and the uploads that stay out of VRAM need slots of their own, which are taken off the budget. Copies from VRAM back
to RAM (exclusive tiers) use the link's other direction and cost nothing here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from math import ceil, fsum
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from edgeflex.errors import InputError
from edgeflex.runtimes.curves import RESOURCES, Curve, Curves
from edgeflex.runtimes.policies import make_policy
from edgeflex.runtimes.reuse import ReusePolicy
from edgeflex.runtimes.schedule import Scheduler, all_upload, fiddler, hybrimoe, static
from edgeflex.runtimes.tiers import TieredCache, part_weights
from edgeflex.runtimes.timeline import Active, Schedule, Work, contend, cost_of
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.curves import Resource
    from edgeflex.runtimes.replacement import Policy
    from edgeflex.runtimes.timeline import Cost, Key
    from edgeflex.runtimes.trace import Trace, TraceEvent

    Int64 = NDArray[np.int64]

StrategyName = Literal["ours", "hybrimoe", "fiddler", "lru", "static"]
BASELINES: tuple[StrategyName, ...] = ("hybrimoe", "fiddler", "lru", "static")

# Two for uploads in passing, so that a copy and a computation overlap, and one for the copy ahead.
STAGING_SLOTS = 3
# A static placement must be quicker than the cache by this on the calibration's part: it cannot follow a change.
_STATIC_GAIN = 0.03
HORIZONS = (2.0, 8.0, 32.0)


@dataclass(frozen=True)
class Machine:
    """A machine that a trace is run on.

    Args:
        curves: Of experts.
        dense: Seconds of a layer's other work over the pass's tokens, on the GPU.
        token_s: What a pass costs beside its layers.
        chunk_bytes: Of copies ahead; an upload waits for one at most.
    """

    curves: Curves
    dense: Curve = field(default_factory=lambda: Curve(((1, 0.0),)))
    token_s: float = 0.0
    chunk_bytes: int = 1 << 18

    def scaled(self, factor: float) -> Machine:
        """Return a machine whose every second is multiplied by ``factor``."""
        curves = self.curves.scaled(gpu=factor, cpu=factor, link=factor, disk=factor)
        return replace(self, curves=curves, dense=self.dense.scaled(factor), token_s=self.token_s * factor)


@dataclass(frozen=True)
class Strategy:
    """How misses are served and VRAM is used.

    Args:
        name: See the module.
        static: Whether VRAM keeps the list it was filled with.
        horizon: ``ours`` without ``static``: passes over which an expert's better chance is counted as gain when a
            copy ahead is weighed against its cost; 0: none is made.
    """

    name: StrategyName
    static: bool = False
    horizon: float = 0.0


@dataclass(frozen=True)
class VirtualRun:
    """What a trace came to.

    Attributes:
        strategy: As run.
        token_s: Seconds of each decoded token that is judged, in order.
        prompt_s: Seconds of the judged prompts, in all.
        waited: Share of all judged decoding time in which each resource had nothing to do.
        upload_bytes: Uploads that an event waited for, per decoded token.
        ahead_bytes: Copies ahead, per decoded token.
        flash_bytes: Reads from flash, per decoded token.
        lookups: Experts used by the judged decoded tokens.
        gpu_hits: Of those, found in VRAM.
        peak_vram_bytes: Most bytes of experts in VRAM, staging slots included.
    """

    strategy: Strategy
    token_s: tuple[float, ...]
    prompt_s: float
    waited: Mapping[Resource, float]
    upload_bytes: float
    ahead_bytes: float
    flash_bytes: float
    lookups: int
    gpu_hits: int
    peak_vram_bytes: int

    @property
    def mean_s(self) -> float:
        """Seconds per decoded token; 0 when none is judged."""
        return fsum(self.token_s) / max(1, len(self.token_s))

    @property
    def hit_rate(self) -> float:
        """Share of lookups found in VRAM."""
        return self.gpu_hits / max(1, self.lookups)


class EventTime(NamedTuple):
    """One event in time, copies ahead included.

    Attributes:
        span_s: From its start to the end of its last work.
        busy_s: By resource, in the order of ``RESOURCES``.
        ahead_s: Seconds of link work done for each copy ahead, at most what was asked.
    """

    span_s: float
    busy_s: tuple[float, float, float, float]
    ahead_s: tuple[float, ...]


def event_time(
    plan: Schedule, costs: Mapping[Key, Cost], curves: Curves, ahead_s: Sequence[float] = (), held_s: float = 0.0
) -> EventTime:
    """Return what a schedule comes to when the link, after its uploads, goes on copying ahead.

    Without copies ahead it is ``simulate``. A copy ahead never makes an upload wait beyond ``held_s``, ends with the
    event and slows the CPU as uploads do.

    Args:
        plan: Of the event.
        costs: Of its experts.
        curves: What is true.
        ahead_s: Link work left of each copy ahead, in order.
        held_s: How long a chunk that is under way holds the link at the event's start.
    """
    read_s: dict[Key, float] = {}
    disk_end_s = 0.0
    for key in plan.read:
        disk_end_s += costs[key].disk
        read_s[key] = disk_end_s
    cpu = [Work(read_s.get(key, 0.0), costs[key].cpu) for key in plan.on_cpu]
    if cpu and curves.cpu_start_s > 0.0:
        cpu.insert(0, Work(0.0, curves.cpu_start_s))
    link = [Work(max(held_s, read_s.get(key, 0.0)), costs[key].link) for key in plan.uploaded]
    link += [Work(0.0, work_s) for work_s in ahead_s]
    cpu_spans, link_spans = contend(cpu, link, curves.cpu_beside_link, curves.link_beside_cpu)
    gpu_end_s = gpu_busy_s = sum([costs[key].gpu for key in plan.on_gpu])
    for key, (_, arrived_s) in zip(plan.uploaded, link_spans, strict=False):
        gpu_end_s = max(gpu_end_s, arrived_s) + costs[key].gpu
        gpu_busy_s += costs[key].gpu
    cpu_end_s = cpu_spans[-1][1] if cpu_spans else 0.0
    span_s = max(gpu_end_s, cpu_end_s, disk_end_s)
    link_busy_s = sum([max(0.0, min(end, span_s) - start) for start, end in link_spans if start < span_s])
    done = tuple(
        [
            _part_done(start, end, span_s) * work_s
            for work_s, (start, end) in zip(ahead_s, link_spans[len(plan.uploaded) :], strict=True)
        ]
    )
    cpu_busy_s = sum([end - start for start, end in cpu_spans])
    return EventTime(span_s, (gpu_busy_s, cpu_busy_s, link_busy_s, disk_end_s), done)


def _part_done(start_s: float, end_s: float, now_s: float) -> float:
    if now_s >= end_s:
        return 1.0
    return (now_s - start_s) / (end_s - start_s) if now_s > start_s else 0.0


def event_rows(trace: Trace) -> list[tuple[int, ...]]:
    """Return, for each event, how many of its tokens use each of its experts, in the order of its experts."""
    at_step = np.where(trace.phase == 1, trace.step, 0)
    keys = np.stack([trace.turn, trace.phase, at_step, trace.iter, trace.layer, trace.expert])
    order = np.lexsort(keys[::-1])
    sorted_keys = keys[:, order]
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(sorted_keys, axis=1) != 0).any(axis=0)]))
    counts = np.diff(np.append(starts, sorted_keys.shape[1])).tolist()
    found, at = [], 0
    for event in trace.events:
        found.append(tuple(counts[at : at + len(event.experts)]))
        at += len(event.experts)
    return found


def run_virtual(
    trace: Trace,
    machine: Machine,
    strategy: Strategy,
    *,
    vram_bytes: int,
    ram_bytes: int | None = None,
    exclusive: bool = False,
    sizes: Int64 | None = None,
    order: Sequence[Key] = (),
    first_step: int = 0,
    last_step: int | None = None,
) -> VirtualRun:
    """Run a trace in virtual time.

    Args:
        trace: What is used.
        machine: What it runs on.
        strategy: How.
        vram_bytes: Of experts.
        ram_bytes: Of experts; None: all of them.
        exclusive: Whether RAM keeps no copy of what VRAM holds.
        sizes: ``[layers, experts]`` bytes; None takes the trace's own.
        order: (layer, expert), the most valuable first: what VRAM, then RAM is filled with before the first event.
        first_step: Passes before it (see ``TraceEvent.step``) are run and not judged.
        last_step: Passes from it on are not run.

    Raises:
        InputError: Budgets are too small, or sizes do not fit the trace.
    """
    known = trace.sizes() if sizes is None else sizes
    ram = int(known.sum()) if ram_bytes is None else ram_bytes
    host = _host_of(strategy, trace, machine, known, vram_bytes, ram, order, exclusive=exclusive)
    clock = _Clock(machine, first_step)
    for event, rows in zip(trace.events, event_rows(trace), strict=True):
        if last_step is not None and event.step >= last_step:
            break
        clock.start_layer(event, host)
        for part in host.parts(event):
            clock.run_event(event, part, rows, host)
    return clock.result(strategy, host.peak_bytes)


class _Clock:
    """Virtual time of one run, and what is counted in it."""

    def __init__(self, machine: Machine, first_step: int) -> None:
        self._machine = machine
        self._first_step = first_step
        self._spent_s: dict[tuple[bool, int], float] = defaultdict(float)
        self._busy_s = [0.0] * len(RESOURCES)
        self._bytes = {"upload": 0, "ahead": 0, "flash": 0}
        self._lookups = self._gpu_hits = 0

    def start_layer(self, event: TraceEvent, host: _Host) -> None:
        """Pass the time of the layer's dense part, in which the link copies ahead."""
        dense_s = self._machine.dense(event.tokens)
        judged = event.step >= self._first_step
        if judged and (event.decoding, event.step) not in self._spent_s:
            self._spent_s[event.decoding, event.step] = self._machine.token_s
        copied_s, ahead_bytes = host.copy_ahead(event.layer, dense_s)
        self._count(event, dense_s, (dense_s, 0.0, copied_s, 0.0))
        if judged and event.decoding:
            self._bytes["ahead"] += ahead_bytes

    def run_event(self, event: TraceEvent, part: Sequence[int], rows: Sequence[int], host: _Host) -> None:
        """Pass the time of an event, or of one part of it."""
        rows_of = dict(zip(event.experts, rows, strict=True))
        active, plan, time, ahead_bytes = host.serve(event, part, rows_of)
        self._count(event, time.span_s, time.busy_s)
        if event.step < self._first_step or not event.decoding:
            return
        size_of = {one.key: one.size_bytes for one in active}
        self._bytes["ahead"] += ahead_bytes
        self._bytes["upload"] += sum([size_of[key] for key in plan.uploaded])
        self._bytes["flash"] += sum([size_of[key] for key in plan.read])
        self._lookups += len(active)
        self._gpu_hits += sum([one.place == "gpu" for one in active])

    def _count(self, event: TraceEvent, span_s: float, busy_s: Sequence[float]) -> None:
        if event.step < self._first_step:
            return
        self._spent_s[event.decoding, event.step] += span_s
        if event.decoding:
            self._busy_s = [total + more for total, more in zip(self._busy_s, busy_s, strict=True)]

    def result(self, strategy: Strategy, peak_bytes: int) -> VirtualRun:
        """Return what was counted."""
        token_s = tuple([spent for (decoding, _), spent in sorted(self._spent_s.items()) if decoding])
        total_s, tokens = fsum(token_s), max(1, len(token_s))
        waited = {
            resource: 1.0 - busy / total_s if total_s else 1.0
            for resource, busy in zip(RESOURCES, self._busy_s, strict=True)
        }
        return VirtualRun(
            strategy=strategy,
            token_s=token_s,
            prompt_s=fsum(spent for (decoding, _), spent in self._spent_s.items() if not decoding),
            waited=waited,
            upload_bytes=self._bytes["upload"] / tokens,
            ahead_bytes=self._bytes["ahead"] / tokens,
            flash_bytes=self._bytes["flash"] / tokens,
            lookups=self._lookups,
            gpu_hits=self._gpu_hits,
            peak_vram_bytes=peak_bytes,
        )


# --- hosts: who decides ----------------------------------------------------------------------------------


class _Host:
    """Serves events by a rule, from a cache whose policy decides what leaves."""

    def __init__(self, machine: Machine, sizes: Int64, ram_bytes: int, rule: Rule) -> None:
        self._machine = machine
        self._curves = machine.curves
        self._sizes: list[list[int]] = sizes.tolist()
        self._all_in_ram = ram_bytes >= int(sizes.sum())
        self._rule = rule
        self._costs: dict[tuple[int, int, str], Cost] = {}
        self.peak_bytes = 0

    def cache(self, layer: int) -> TieredCache | None:
        """Return the cache that serves a layer; None: its experts have no slot."""
        raise NotImplementedError

    def keeps(self, plan: Schedule, found: Sequence[Active]) -> list[Key]:
        """Return which of the uploaded experts should stay in VRAM, the most valuable first."""
        raise NotImplementedError

    def copy_ahead(self, layer: int, seconds: float) -> tuple[float, int]:
        """Let the link copy ahead for some seconds; return the seconds it did, and the bytes that arrived."""
        del layer, seconds
        return 0.0, 0

    def parts(self, event: TraceEvent) -> Sequence[Sequence[int]]:
        """Return the event whole where RAM holds everything, else in parts that fit."""
        cache = self.cache(event.layer)
        if self._all_in_ram or cache is None:
            return (event.experts,)
        return cache.parts(event.layer, event.experts)

    def serve(
        self, event: TraceEvent, part: Sequence[int], rows_of: Mapping[int, int]
    ) -> tuple[list[Active], Schedule, EventTime, int]:
        """Serve an event; return its experts as found, the schedule, its time, and bytes copied ahead."""
        active = self._find(event, part, rows_of)
        plan = self._rule(active, self._curves, event.decoding)
        time, ahead_bytes = self._pass(event, plan, active)
        self._admit(event.layer, plan, active)
        return active, plan, time, ahead_bytes

    def _pass(self, event: TraceEvent, plan: Schedule, active: Sequence[Active]) -> tuple[EventTime, int]:
        del event
        return event_time(plan, self._costs_of(active), self._curves), 0

    def _find(self, event: TraceEvent, part: Sequence[int], rows_of: Mapping[int, int]) -> list[Active]:
        cache, sizes = self.cache(event.layer), self._sizes[event.layer]
        hits: frozenset[int] = frozenset()
        flash: frozenset[int] = frozenset()
        if cache is not None:
            weights = part_weights(event, part)
            found = cache.event(event.step, event.layer, part, weights, decoding=event.decoding)
            hits, flash = frozenset(found.gpu_hits), frozenset(found.flash_misses)
        return [
            Active(
                key=(event.layer, expert),
                rows=rows_of[expert],
                size_bytes=sizes[expert],
                place="gpu" if expert in hits else "flash" if expert in flash else "ram",
            )
            for expert in part
        ]

    def _costs_of(self, active: Sequence[Active]) -> dict[Key, Cost]:
        costs = {}
        for one in active:
            shape = (one.rows, one.size_bytes, one.place)
            if shape not in self._costs:
                self._costs[shape] = cost_of(one, self._curves)
            costs[one.key] = self._costs[shape]
        return costs

    def _admit(self, layer: int, plan: Schedule, active: Sequence[Active]) -> None:
        cache = self.cache(layer)
        if cache is None:
            return
        size_of = {one.key: one.size_bytes for one in active}
        room = cache.vram.capacity_bytes - sum([one.size_bytes for one in active if one.place == "gpu"])
        chosen = []
        for key in self.keeps(plan, active):
            if size_of[key] <= room:
                chosen.append(key[1])
                room -= size_of[key]
        cache.admit(chosen)
        self._note_peak(cache)

    def _note_peak(self, cache: TieredCache) -> None:
        self.peak_bytes = max(self.peak_bytes, cache.vram.resident_bytes)


class _GlobalHost(_Host):
    """One cache over all layers. ``keeping``: whether uploads enter it."""

    def __init__(
        self, machine: Machine, sizes: Int64, ram_bytes: int, rule: Rule, cache: TieredCache, *, keeping: bool
    ) -> None:
        super().__init__(machine, sizes, ram_bytes, rule)
        self._cache = cache
        self._keeping = keeping
        self._note_peak(cache)

    def cache(self, layer: int) -> TieredCache | None:
        """Return the one."""
        del layer
        return self._cache

    def keeps(self, plan: Schedule, found: Sequence[Active]) -> list[Key]:
        """Keep all, or none; the last uploads where not all fit."""
        del found
        return list(reversed(plan.uploaded)) if self._keeping else []


class _LayerHost(_Host):
    """Whole slots shared out evenly over the layers, each with its own cache (HybriMoE)."""

    def __init__(self, machine: Machine, sizes: Int64, ram_bytes: int, rule: Rule, caches: dict[int, TieredCache]):
        super().__init__(machine, sizes, ram_bytes, rule)
        self._caches = caches
        self.peak_bytes = sum(cache.vram.capacity_bytes for cache in caches.values())

    def cache(self, layer: int) -> TieredCache | None:
        """Return the layer's."""
        return self._caches.get(layer)

    def keeps(self, plan: Schedule, found: Sequence[Active]) -> list[Key]:
        """Keep every upload."""
        del found
        return list(reversed(plan.uploaded))

    def _note_peak(self, cache: TieredCache) -> None:
        """The slots are all taken from the start."""


class _OurHost(_Host):
    """Ours: uploads stay only for less likely experts, and the link copies ahead."""

    def __init__(
        self, machine: Machine, sizes: Int64, ram_bytes: int, cache: AheadCache, policy: ReusePolicy, horizon: float
    ) -> None:
        scheduler = Scheduler(machine.curves)
        super().__init__(machine, sizes, ram_bytes, lambda active, _curves, _decoding: scheduler.schedule(active))
        self._cache = cache
        self._policy = policy
        self._horizon = horizon
        self._experts = sizes.shape[1]
        self._staging_bytes = STAGING_SLOTS * int(sizes.max())
        self._under_way: tuple[Key, float] | None = None
        self._note_peak(cache)

    def cache(self, layer: int) -> TieredCache | None:
        """Return the one."""
        del layer
        return self._cache

    def keeps(self, plan: Schedule, found: Sequence[Active]) -> list[Key]:
        """Keep an upload where it is likelier to be used again than what would leave for it."""
        if not plan.uploaded:
            return []
        chances = self._policy.chances
        ranked = sorted(plan.uploaded, key=lambda key: (-chances[key], key))
        free = self._cache.vram.capacity_bytes - self._cache.vram.resident_bytes
        count = len(ranked) - free // max(1, max(one.size_bytes for one in found))
        if count <= 0:
            return ranked
        layer = ranked[0][0]
        present = [layer * self._experts + one.key[1] for one in found]
        victims = [chance for _, chance in self._policy.next_victims(layer, count, present)]
        sure = ranked[: len(ranked) - count]
        rest = zip(ranked[len(sure) :], victims, strict=False)
        return sure + [key for key, victim in rest if chances[key] > victim]

    def serve(
        self, event: TraceEvent, part: Sequence[int], rows_of: Mapping[int, int]
    ) -> tuple[list[Active], Schedule, EventTime, int]:
        """Serve as others do, after giving equal uploads to the likeliest experts."""
        active, plan, time, ahead_bytes = super().serve(event, part, rows_of)
        return active, plan, time, ahead_bytes

    def _pass(self, event: TraceEvent, plan: Schedule, active: Sequence[Active]) -> tuple[EventTime, int]:
        costs = self._costs_of(active)
        used = {one.key for one in active}
        wanted = [one for one in self._wanted(event.layer, plan.span_s) if one[0] not in used or one[0] in plan.on_cpu]
        chunk_s = self._machine.chunk_bytes / self._curves.link_bytes_per_s
        held_s = min(chunk_s, self._under_way[1]) if self._under_way else 0.0
        time = event_time(plan, costs, self._curves, [left_s for _, left_s in wanted], held_s)
        return time, self._arrive(event.layer, wanted, time.ahead_s, used)

    def copy_ahead(self, layer: int, seconds: float) -> tuple[float, int]:
        """Copy while the GPU is at the dense part."""
        wanted = self._wanted(layer, seconds)
        left_s, done = seconds, []
        for _, work_s in wanted:
            done.append(min(work_s, left_s))
            left_s -= done[-1]
        return seconds - left_s, self._arrive(layer, wanted, done, ())

    def _arrive(
        self, layer: int, wanted: Sequence[tuple[Key, float]], done_s: Sequence[float], pinned: Iterable[Key]
    ) -> int:
        """Take in what has arrived, remember what is under way, and return the bytes that arrived."""
        arrived = 0
        self._under_way = None
        for (key, left_s), did_s in zip(wanted, done_s, strict=True):
            if did_s >= left_s:
                arrived += self._take_in(layer, key, pinned)
            elif did_s > 0.0:
                self._under_way = (key, left_s - did_s)
        return arrived

    def _take_in(self, layer: int, key: Key, pinned: Iterable[Key]) -> int:
        size = self._sizes[key[0]][key[1]]
        if self._cache.place(*key) == "ram":
            held = [of * self._experts + expert for of, expert in pinned]
            self._cache.bring(layer, key, self._policy, held)
            self._note_peak(self._cache)
        return size

    def _wanted(self, layer: int, seconds: float) -> list[tuple[Key, float]]:
        """Return the copies that are worth being made next, with the link work left of each."""
        raise NotImplementedError
