"""Who decides about an event: ours and the published rules, each over the same cache class and the same curves.

    ours       schedule of least span; what enters VRAM must be likelier to be used than what leaves for it; the link
               copies likely experts ahead whenever no upload is waiting, if that pays; one missing expert of an event
               may be divided between CPU and GPU
    hybrimoe   HybriMoE's rule with its published constants, MRS, slots shared out over the layers
    fiddler    a static list of popular experts, 7 n against 70
    lru        every miss is uploaded, one global LRU (llama.cpp's expert cache)
    static     a static list of popular experts, the rest on the CPU (KTransformers)

A ``Host`` serves one event after another and says how long each took. Copies ahead go in chunks, and one that has
begun holds the link for a chunk at most when an upload comes; from its beginning it takes the slot of what leaves for
it. Copies from VRAM back to RAM (exclusive tiers) use the link's other direction and cost nothing here.

What ours asks of a runtime: one stream of copies beside the stream that computes; an event at the end of each copy,
which the GPU waits for before it computes that expert; copies ahead behind the uploads in the same stream, in chunks
so that an upload is not held up; the set of an event known to the host before anything of it starts. ``cuda_experts``
does all that but for the chunks (it copies whole experts ahead). Experts are divided where that is asked for
(``Machine.part_s`` finite, which it is not by default) and a run divides them (``staged_bytes``). Nothing here looks at
what comes: rates are learned from events gone by.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, inf
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from edgeflex.errors import InputError
from edgeflex.runtimes.ahead_time import EventTime, Worth, event_time
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.division import SLICES, Divider, pays, staged_bytes
from edgeflex.runtimes.reuse import ReusePolicy
from edgeflex.runtimes.schedule import Scheduler, all_upload, fiddler, hybrimoe, static
from edgeflex.runtimes.tiers import AheadCache, TieredCache, part_weights
from edgeflex.runtimes.timeline import Active, Schedule, cost_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.division import Division
    from edgeflex.runtimes.replacement import Policy
    from edgeflex.runtimes.timeline import Cost, Key, Place
    from edgeflex.runtimes.trace import TraceEvent

    Int64 = NDArray[np.int64]
    Rule = Callable[[Sequence[Active], Curves, bool], Schedule]

__all__ = ["BASELINES", "AheadCache", "Host", "Machine", "Served", "Setup", "Strategy", "StrategyName"]

StrategyName = Literal["ours", "hybrimoe", "fiddler", "lru", "static"]
BASELINES: tuple[StrategyName, ...] = ("hybrimoe", "fiddler", "lru", "static")

_MOST_AHEAD = 4  # copies ahead that one event looks for; more rarely fit into its time


@dataclass(frozen=True)
class Machine:
    """A machine that a trace is run on.

    Args:
        curves: Of experts.
        dense: Seconds of a layer's other work over the pass's tokens, on the GPU.
        token_s: What a pass costs beside its layers.
        chunk_bytes: Of copies ahead; an upload waits for one at most.
        part_s: What the second launch costs where an expert is divided between CPU and GPU (see ``division``);
            infinite: none is.
        slices: In which experts lie, so that they are divided there only.
    """

    curves: Curves
    dense: Curve = field(default_factory=lambda: Curve(((1, 0.0),)))
    token_s: float = 0.0
    chunk_bytes: int = 1 << 18
    part_s: float = inf
    slices: int = SLICES

    def scaled(self, factor: float) -> Machine:
        """Return a machine whose every second is multiplied by ``factor``."""
        curves = self.curves.scaled(gpu=factor, cpu=factor, link=factor, disk=factor)
        dense, part_s = self.dense.scaled(factor), self.part_s * factor
        return replace(self, curves=curves, dense=dense, token_s=self.token_s * factor, part_s=part_s)


@dataclass(frozen=True)
class Strategy:
    """How misses are served and VRAM is used.

    Args:
        name: See the module.
        static: Whether VRAM keeps the list it was filled with.
        horizon: ``ours`` without ``static``: passes over which an expert's coming uses are foretold, and counted as
            gain of an upload or a copy ahead; 0: the next pass, and no copies ahead.
    """

    name: StrategyName
    static: bool = False
    horizon: float = 0.0


# --- hosts: who decides ----------------------------------------------------------------------------------


class Host:
    """Serves events by a rule, from a cache whose policy decides what leaves. One host serves one run."""

    def __init__(self, machine: Machine, sizes: Int64, rule: Rule, *, all_in_ram: bool) -> None:
        self._machine = machine
        self._curves = machine.curves
        self._sizes: list[list[int]] = sizes.tolist()
        self._rule = rule
        self._all_in_ram = all_in_ram
        self._costs: dict[tuple[int, int, str], Cost] = {}
        self._plans: dict[tuple[object, ...], Schedule] = {}
        self._times: dict[tuple[object, ...], EventTime] = {}
        self._shape: tuple[object, ...] = ()
        self.peak_bytes = 0

    def cache(self, layer: int) -> TieredCache | None:
        """Return the cache that serves a layer; None: its experts have no slot."""
        raise NotImplementedError

    def keeps(self, plan: Schedule, active: Sequence[Active]) -> Sequence[Key]:
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

    def serve(self, event: TraceEvent, part: Sequence[int], rows_of: Mapping[int, int]) -> Served:
        """Serve an event, or one part of it.

        Args:
            event: Of the trace.
            part: Which of its experts, ascending.
            rows_of: Tokens that use each.
        """
        active = self._find(event, part, rows_of)
        costs = self._costs_of(active)
        plan, division = self._divided(self._planned(active, decoding=event.decoding), active, costs)
        if division is not None:
            costs[division.key] = division.cost
        time, ahead_bytes = self._pass(event.layer, plan, active, costs)
        self._admit(event.layer, plan, active, division)
        return Served(active, plan, time, ahead_bytes, division)

    def _divided(
        self, plan: Schedule, active: Sequence[Active], costs: Mapping[Key, Cost]
    ) -> tuple[Schedule, Division | None]:
        """Return the schedule with what it divides; published rules divide nothing."""
        del active, costs
        return plan, None

    def _planned(self, active: Sequence[Active], *, decoding: bool) -> Schedule:
        """Follow the rule, once for each shape of event: it looks at places, rows and sizes in their order only."""
        shape = self._shape = (decoding, *[(one.place, one.rows, one.size_bytes) for one in active])
        if shape not in self._plans:
            numbered = [replace(one, key=(0, number)) for number, one in enumerate(active)]
            self._plans[shape] = self._rule(numbered, self._curves, decoding)
        plan = self._plans[shape]
        keys = [one.key for one in active]

        def named(order: Sequence[Key]) -> tuple[Key, ...]:
            return tuple([keys[number] for _, number in order])

        return replace(
            plan,
            on_gpu=named(plan.on_gpu),
            uploaded=named(plan.uploaded),
            on_cpu=named(plan.on_cpu),
            read=named(plan.read),
        )

    def _pass(
        self, layer: int, plan: Schedule, active: Sequence[Active], costs: Mapping[Key, Cost]
    ) -> tuple[EventTime, int]:
        """Return the event's time, which its shape decides, and the bytes that were copied ahead in it."""
        del layer, active
        if self._shape not in self._times:
            self._times[self._shape] = event_time(plan, costs, self._curves)
        return self._times[self._shape], 0

    def _find(self, event: TraceEvent, part: Sequence[int], rows_of: Mapping[int, int]) -> list[Active]:
        cache, sizes = self.cache(event.layer), self._sizes[event.layer]
        places: dict[int, Place] = {}
        if cache is not None:
            weights = part_weights(event, part)
            found = cache.event(event.step, event.layer, part, weights, decoding=event.decoding)
            places.update((expert, "gpu") for expert in found.gpu_hits)
            places.update((expert, "flash") for expert in found.flash_misses)
        return [
            Active((event.layer, expert), rows_of[expert], sizes[expert], places.get(expert, "ram")) for expert in part
        ]

    def _costs_of(self, active: Sequence[Active]) -> dict[Key, Cost]:
        costs = {}
        for one in active:
            shape = (one.rows, one.size_bytes, one.place + "+ram" * one.ram_copy)
            if shape not in self._costs:
                self._costs[shape] = cost_of(one, self._curves)
            costs[one.key] = self._costs[shape]
        return costs

    def _admit(self, layer: int, plan: Schedule, active: Sequence[Active], division: Division | None) -> None:
        """Let into VRAM what is to stay there, as far as it fits beside the event's hits."""
        cache = self.cache(layer)
        if cache is None:
            return
        size_of = {one.key: one.size_bytes for one in active}
        room = cache.vram.capacity_bytes - sum([one.size_bytes for one in active if one.key in cache.vram])
        chosen = []
        for key in self.keeps(plan, active):
            if size_of[key] <= room and (division is None or key != division.key):
                chosen.append(key[1])
                room -= size_of[key]
        cache.admit(chosen)
        self._note_peak(cache)

    def _note_peak(self, cache: TieredCache) -> None:
        self.peak_bytes = max(self.peak_bytes, cache.vram.resident_bytes)


class Served(NamedTuple):
    """What serving an event came to: experts as found, schedule, time, bytes copied ahead, and what was divided."""

    active: list[Active]
    plan: Schedule
    time: EventTime
    ahead_bytes: int
    division: Division | None


class _GlobalHost(Host):
    """One cache over all layers. ``keeping``: whether uploads enter it."""

    def __init__(
        self,
        machine: Machine,
        sizes: Int64,
        rule: Rule,
        cache: TieredCache,
        *,
        all_in_ram: bool,
        keeping: bool,
        staged_bytes: int = 0,
    ) -> None:
        super().__init__(machine, sizes, rule, all_in_ram=all_in_ram)
        self._cache = cache
        self._keeping = keeping
        self._divider = Divider(self._curves, machine.part_s, self._slices) if staged_bytes else None
        self._staged_bytes = staged_bytes
        self._link_price = 0.0  # seconds saved later for each that the link copies ahead
        self._note_peak(cache)

    def cache(self, layer: int) -> TieredCache | None:
        """Return the one."""
        del layer
        return self._cache

    def _divided(
        self, plan: Schedule, active: Sequence[Active], costs: Mapping[Key, Cost]
    ) -> tuple[Schedule, Division | None]:
        if self._divider is None:
            return plan, None
        return self._divider.divide(plan, active, costs, self._whole(), self._link_price)

    def _slices(self, key: Key) -> int:
        del key
        return self._machine.slices

    def _whole(self) -> Collection[Key]:
        """Return what must not be divided."""
        return ()

    def keeps(self, plan: Schedule, active: Sequence[Active]) -> Sequence[Key]:
        """Keep all, or none."""
        del active
        return plan.uploaded if self._keeping else ()

    def _note_peak(self, cache: TieredCache) -> None:
        self.peak_bytes = max(self.peak_bytes, cache.vram.resident_bytes + self._staged_bytes)


class _LayerHost(Host):
    """Whole slots shared out over the layers, each layer with a cache of its own (HybriMoE)."""

    def __init__(
        self, machine: Machine, sizes: Int64, rule: Rule, caches: Mapping[int, TieredCache], *, all_in_ram: bool
    ) -> None:
        super().__init__(machine, sizes, rule, all_in_ram=all_in_ram)
        self._caches = caches
        self.peak_bytes = sum(cache.vram.capacity_bytes for cache in caches.values())

    def cache(self, layer: int) -> TieredCache | None:
        """Return the layer's."""
        return self._caches.get(layer)

    def keeps(self, plan: Schedule, active: Sequence[Active]) -> Sequence[Key]:
        """Keep every upload."""
        del active
        return plan.uploaded

    def _note_peak(self, cache: TieredCache) -> None:
        """Do nothing: the slots are all taken from the start."""


class _OurHost(_GlobalHost):
    """Ours with a cache that changes: uploads stay for less likely experts only, and the link copies ahead."""

    def __init__(
        self,
        machine: Machine,
        sizes: Int64,
        rule: Rule,
        cache: AheadCache,
        policy: ReusePolicy,
        horizon: float,
        *,
        all_in_ram: bool,
        exclusive: bool,
        staged_bytes: int,
    ) -> None:
        super().__init__(machine, sizes, rule, cache, all_in_ram=all_in_ram, keeping=True, staged_bytes=staged_bytes)
        self._ahead_cache = cache
        self._policy = policy
        self._experts = sizes.shape[1]
        self._largest = int(sizes.max())
        self._worth = Worth.of(self._curves, self._largest, horizon)
        self._victims: list[float] = []
        self._copies = not exclusive
        self._under_way: list[tuple[Key, float]] = []
        self._next: list[Key] = []

    def _find(self, event: TraceEvent, part: Sequence[int], rows_of: Mapping[int, int]) -> list[Active]:
        """List the likeliest to be used again first: of equal experts the scheduler uploads those."""
        rates = self._policy.rates
        found = sorted(super()._find(event, part, rows_of), key=lambda one: (-rates[one.key], one.key))
        # a copy under way has its slot already, and cannot be used there yet
        begun = {key for key, _ in self._under_way}
        found = [replace(one, place="ram") if one.key in begun else one for one in found]
        missing = [one for one in found if one.place != "gpu"]
        free_bytes = self._cache.vram.capacity_bytes - self._cache.vram.resident_bytes
        self._victims = [0.0] * min(len(missing) + _MOST_AHEAD, free_bytes // self._largest)
        if len(self._victims) < len(missing) + _MOST_AHEAD:
            next_ones = self._policy.next_victims(event.layer, len(missing) + _MOST_AHEAD, self._keys(found))
            self._victims += [rate for _, rate in next_ones]
        worth = {
            one.key: self._worth.seconds(rates[one.key] - victim)
            for one, victim in zip(missing, self._victims, strict=False)
        }
        # copies in RAM matter only where the GPU's part is long enough for the CPU to help; of an event that lacks
        # nothing the runtime's GPU computes all, since nobody asks the scheduler
        hits = len(found) - len(missing)
        shared = self._copies and bool(missing) and hits * self._curves.gpu_s(1) > self._worth.saved_s
        return [replace(one, ram_copy=shared, worth_s=worth.get(one.key, 0.0)) for one in found]

    def keeps(self, plan: Schedule, active: Sequence[Active]) -> Sequence[Key]:
        """Keep every upload; one that a copy under way had begun has its slot already."""
        del active
        return [key for key in plan.uploaded if key not in self._cache.vram]

    def _pass(
        self, layer: int, plan: Schedule, active: Sequence[Active], costs: Mapping[Key, Cost]
    ) -> tuple[EventTime, int]:
        uploaded = set(plan.uploaded)
        self._look_ahead(plan)
        queue = [one for one in self._queue() if one[0] not in uploaded]
        chunk_s = self._machine.chunk_bytes / self._curves.link_bytes_per_s
        held_s = min(chunk_s, self._under_way[0][1]) if self._under_way else 0.0
        work_s = [left_s for _, left_s in queue]
        time = event_time(plan, costs, self._curves, work_s, held_s)
        return time, self._arrive(layer, queue, time.ahead_s, self._keys(active))

    def _whole(self) -> Collection[Key]:
        return [key for key, _ in self._under_way]

    def _planned(self, active: Sequence[Active], *, decoding: bool) -> Schedule:
        """Ask the scheduler, which has a memory of its own."""
        return self._rule(active, self._curves, decoding)

    def copy_ahead(self, layer: int, seconds: float) -> tuple[float, int]:
        """Copy while the GPU is at the dense part."""
        queue, left_s, done_s = self._queue(), seconds, []
        for _, work_s in queue:
            done_s.append(min(work_s, left_s))
            left_s -= done_s[-1]
        return seconds - left_s, self._arrive(layer, queue, done_s, ())

    def _keys(self, active: Sequence[Active]) -> list[int]:
        return [one.key[0] * self._experts + one.key[1] for one in active]

    def _queue(self) -> list[tuple[Key, float]]:
        """Return the copies to be made next and the link's work left of each; what is under way goes first."""
        begun = [one for one in self._under_way if one[0] in self._cache.vram]
        keys = {key for key, _ in begun}
        return begun + [(key, self._worth.copy_s) for key in self._next if key not in keys]

    def _look_ahead(self, plan: Schedule) -> None:
        """Choose what to copy from now until the next event: what gains more hits than its copy costs the CPU."""
        seconds = plan.span_s + self._machine.dense(1)
        count = min(_MOST_AHEAD, ceil(seconds / self._worth.copy_s) + 1)
        barred = [key[0] * self._experts + key[1] for key in (*plan.uploaded, *(key for key, _ in self._under_way))]
        candidates = self._policy.likeliest_absent(count, barred)
        self._next, gains = [], []
        for (key, rate), victim in zip(candidates, self._victims[len(plan.uploaded) :], strict=False):
            pair = divmod(key, self._experts)
            if rate - victim > self._worth.least_gain and self._cache.place(*pair) == "ram":
                self._next.append(pair)
                gains.append(rate - victim)
        self._link_price = self._worth.link_price(gains)

    def _arrive(
        self, layer: int, queue: Sequence[tuple[Key, float]], done_s: Sequence[float], pinned: Sequence[int]
    ) -> int:
        """Give slots to copies that have begun, remember what is under way, and return the bytes that arrived."""
        arrived_bytes = 0
        self._under_way = []
        for (key, left_s), did_s in zip(queue, done_s, strict=True):
            if did_s > 0.0 and key not in self._cache.vram:
                self._ahead_cache.bring(layer, key, self._policy, pinned)
            if did_s >= left_s:
                arrived_bytes += self._sizes[key[0]][key[1]]
                self._next = [other for other in self._next if other != key]
            elif did_s > 0.0:
                self._under_way = [(key, left_s - did_s)]
        self._note_peak(self._cache)
        return arrived_bytes


# --- making hosts --------------------------------------------------------------------------------------


def _upload_rule(active: Sequence[Active], curves: Curves, decoding: bool) -> Schedule:
    del decoding
    return all_upload(active, curves)


def _hybrimoe_rule(active: Sequence[Active], curves: Curves, decoding: bool) -> Schedule:
    return hybrimoe(active, curves, decoding=decoding)


def _static_rule(active: Sequence[Active], curves: Curves, decoding: bool) -> Schedule:
    del decoding
    return static(active, curves)


def _fiddler_rule(active: Sequence[Active], curves: Curves, decoding: bool) -> Schedule:
    del decoding
    return fiddler(active, curves)


@dataclass(frozen=True)
class Setup:
    """What a host is made for.

    Args:
        machine: What it runs on.
        sizes: ``[layers, experts]`` bytes.
        top_k: Experts that a token uses in a layer.
        vram_bytes: Of experts.
        ram_bytes: Of experts.
        order: (layer, expert), the most valuable first, what the tiers are filled with; the rest follow by number.
        exclusive: Whether RAM keeps no copy of what VRAM holds.
    """

    machine: Machine
    sizes: Int64
    top_k: int
    vram_bytes: int
    ram_bytes: int
    order: Sequence[Key] = ()
    exclusive: bool = False

    def host(self, strategy: Strategy) -> Host:
        """Return a new host for a strategy, its tiers filled.

        Raises:
            InputError: Budgets are too small, or the strategy is unknown.
        """
        if strategy.name == "fiddler":
            return self._plain(_fiddler_rule, "static", keeping=False)
        if strategy.name == "static":
            return self._plain(_static_rule, "static", keeping=False)
        if strategy.name == "lru":
            return self._plain(_upload_rule, "lru", keeping=True)
        if strategy.name == "hybrimoe":
            return self._by_layer(_hybrimoe_rule, "mrs")
        if strategy.name == "ours":
            return self._ours(strategy)
        raise InputError(f"strategy {strategy.name!r} is unknown. Name one of: ours, {', '.join(BASELINES)}.")

    @property
    def all_in_ram(self) -> bool:
        """Whether every expert lies in RAM."""
        return self.ram_bytes >= int(self.sizes.sum())

    @cached_property
    def _worth(self) -> list[Key]:
        layers, experts = self.sizes.shape
        by_number = ((layer, expert) for layer in range(layers) for expert in range(experts))
        return [key for key in dict.fromkeys([*self.order, *by_number]) if self.sizes[key] > 0]

    def _tiers(self, vram_bytes: int, policy: str | Policy, sizes: Int64 | None = None) -> AheadCache:
        of = self.sizes if sizes is None else sizes
        worth = [key for key in self._worth if of[key] > 0]
        cache = AheadCache(
            vram_bytes,
            int(of.sum()) if self.all_in_ram else self.ram_bytes,
            of,
            policy,
            "static" if self.all_in_ram else "enu",
            exclusive=self.exclusive,
            top_k=self.top_k,
            static=worth,
        )
        # least recently used goes first, so that a queue is to end with the most valuable
        cache.warm(worth)
        return cache

    def _plain(
        self, rule: Rule, policy: str, *, keeping: bool, machine: Machine | None = None, staged_bytes: int = 0
    ) -> Host:
        cache = self._tiers(self.vram_bytes - staged_bytes, policy)
        kept = {"all_in_ram": self.all_in_ram, "keeping": keeping}
        return _GlobalHost(machine or self.machine, self.sizes, rule, cache, **kept, staged_bytes=staged_bytes)

    @cached_property
    def _staged_bytes(self) -> int:
        """What ours takes off residents for shares of experts."""
        largest, on = int(self.sizes.max()), self.machine
        of = {"total_bytes": int(self.sizes.sum()), "largest_bytes": largest}
        found = staged_bytes(self.vram_bytes, self.ram_bytes, **of, exclusive=self.exclusive)
        return found if found and pays(on.curves, on.part_s, size_bytes=largest, slices=on.slices) else 0

    def _by_layer(self, rule: Rule, policy: str) -> Host:
        """Share whole slots out over the layers, one more to the first where they do not come out even."""
        if not self.all_in_ram:
            raise InputError("HybriMoE knows no flash tier. Give RAM for every expert, or leave it out.")
        layers = [int(layer) for layer in np.flatnonzero(self.sizes.any(axis=1))]
        slot_bytes = int(self.sizes.max())
        share, more = divmod(self.vram_bytes // slot_bytes, len(layers))
        caches = {}
        for place, layer in enumerate(layers):
            slots = share + (place < more)
            if slots:
                of = np.zeros_like(self.sizes)
                of[layer] = self.sizes[layer]
                caches[layer] = self._tiers(slots * slot_bytes, policy, of)
        return _LayerHost(self.machine, self.sizes, rule, caches, all_in_ram=True)

    def _ours(self, strategy: Strategy) -> Host:
        staged = self._staged_bytes
        machine = replace(self.machine, curves=self.machine.curves.in_slices()) if staged else self.machine
        scheduler = Scheduler(machine.curves)

        def rule(active: Sequence[Active], curves: Curves, decoding: bool) -> Schedule:
            del curves, decoding
            return scheduler.schedule(active)

        if strategy.static:
            return self._plain(rule, "static", keeping=True, machine=machine, staged_bytes=staged)
        policy = ReusePolicy(*self.sizes.shape, top_k=self.top_k, horizon=max(1.0, strategy.horizon))
        cache = self._tiers(self.vram_bytes - staged, policy)
        return _OurHost(
            machine,
            self.sizes,
            rule,
            cache,
            policy,
            strategy.horizon,
            all_in_ram=self.all_in_ram,
            exclusive=self.exclusive,
            staged_bytes=staged,
        )
