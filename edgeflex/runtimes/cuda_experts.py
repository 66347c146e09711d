"""Serves the events of a decoder on a device: which experts are computed there, which are copied first, which stay.

The tiers say where each expert of an event is, the scheduler which of the missing ones are copied and which the
processor computes, and this module makes it true: places in both arenas, reads from flash, copies beside computing.
What the device already has is computed first, copies run meanwhile, and the processor computes its part after it has
handed the device all of its own. One missing expert of an event may be divided between both (see ``division``).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflex.errors import DeviceError
from edgeflex.runtimes.cuda_slices import arrange, first_slices
from edgeflex.runtimes.cuda_streams import explained
from edgeflex.runtimes.cuda_watch import EventWatch
from edgeflex.runtimes.curves import Refit
from edgeflex.runtimes.division import Divider
from edgeflex.runtimes.engines import DeviceStats
from edgeflex.runtimes.expert_cache import union_of
from edgeflex.runtimes.movers import Mover, takes_direct
from edgeflex.runtimes.residency import Pass, Residency
from edgeflex.runtimes.schedule import Active, Scheduler, all_cpu, all_upload, static
from edgeflex.runtimes.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.cuda_ahead import Ahead
    from edgeflex.runtimes.cuda_decoder import DeviceEngine
    from edgeflex.runtimes.cuda_slices import Dividing
    from edgeflex.runtimes.cuda_watch import WatchedEvent
    from edgeflex.runtimes.curves import Curves
    from edgeflex.runtimes.division import Division
    from edgeflex.runtimes.expert_cache import ExpertCache
    from edgeflex.runtimes.movers import Read
    from edgeflex.runtimes.native import Missing
    from edgeflex.runtimes.packed import PackedStore
    from edgeflex.runtimes.residency import Event
    from edgeflex.runtimes.schedule import Schedule
    from edgeflex.runtimes.tiers import Admission, TieredCache, TierOutcome

    Key = tuple[int, int]
    Choosing = Callable[[Sequence[Active], Curves], Schedule]

# How misses are dealt with, by name; ``auto`` searches the quickest mix on the measured curves.
RULES: Mapping[str, Choosing | None] = {"auto": None, "upload": all_upload, "cpu": all_cpu, "static": static}
LANDING_EXPERTS = 4  # places where reads land when no RAM tier keeps them: two in use while two more are filled
_REFIT_PASSES = 16
_SERVING = explained("the device failed while it was served with experts")


@dataclass
class _Sums:
    host_experts: int = 0
    ahead: int = 0
    ahead_bytes: int = 0
    divided: int = 0
    divided_bytes: int = 0
    host_s: float = 0.0
    upload_s: float = 0.0
    predicted_s: float = 0.0
    predicted_link_s: float = 0.0  # since the last pass began
    stamps: list[tuple[float, Any, Any]] = field(default_factory=list)  # predicted seconds, begin, end on the device


class DeviceExperts(Residency):
    """The experts of a decoder in three tiers; ``Residency`` for an engine with a memory of its own.

    Args:
        engine: Computes; its dense parts are loaded.
        store: Where experts are read from.
        tiers: Makes the books of the tiers, empty, and what looks ahead in them; called again after a pass that did
            not end.
        layers: Numbers of the layers with experts, ascending.
        curves: What experts cost on this machine.
        rule: A name of ``RULES``.
        dividing: How experts are divided; None keeps them whole.
        record: Keep every event.
        mover: Makes the readers of the host's arena; a test of faults gives its own.
        clock: Seconds, rising.

    Raises:
        DeviceError: An arena was refused; nothing is kept of the other.
    """

    def __init__(  # the parent's own would take one arena for one cache
        self,
        engine: DeviceEngine,
        store: PackedStore,
        tiers: Callable[[], tuple[TieredCache, Ahead | None]],
        layers: Sequence[int],
        curves: Curves,
        *,
        rule: str = "auto",
        dividing: Dividing | None = None,
        record: bool = False,
        mover: Callable[..., Mover] = Mover,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.events: list[Event] = []
        self.wait_s = 0.0
        layer_count, expert_count = store.sizes.shape
        self._uses = [[0] * expert_count for _ in range(layer_count)]
        self._engine: DeviceEngine = engine
        self._memory = engine.memory
        self._store = store
        self._sizes = store.sizes.tolist()
        self._layers = tuple(layers)
        self._predictor = None
        self._record = record
        self._clock = clock
        self._early: deque[Key] = deque()
        self._reads: dict[Key, Read] = {}
        self._verified: set[Key] = set()
        self._step, self._ahead = -1, 0
        self._begun: deque[Pass] = deque()
        self._make_tiers = tiers
        self._rule = RULES[rule]
        self._refit = Refit(curves)
        self._dividing = dividing if self._rule is None else None
        self._decide_by(curves)
        self._passes = 0
        self._watch = EventWatch(engine.streams, clock=clock)
        self._watched: WatchedEvent | None = None  # the present event's notes
        self._landed: list[tuple[float, float]] = []  # its reads, (begun, ended)
        self._between_s = 0.0  # from one event to the next, as decoding took last
        self._pass_start_s = clock()
        self._sums = _Sums()
        self._empty_tiers()
        staged = 0 if self._dividing is None else self._dividing.staged_bytes
        self._memory.device_arena(self._tiers.vram.capacity_bytes, staged)
        self._arena = engine.arena(self._host_bytes())
        records = [expert.record for expert in store.experts.values()]
        whole = all(one.size_bytes % 4096 == 0 for one in records)
        direct = whole and bool(records) and all(takes_direct(file) for file in {one.file for one in records})
        self._mover = mover(self._arena, direct=direct, clock=clock)

    def _empty_tiers(self) -> None:
        """Begin with nothing resident."""
        self._tiers, self._ahead_of = self._make_tiers()
        self.cache: ExpertCache = self._tiers.vram
        ram = self._tiers.ram
        small = self._small_bytes()
        self._vram_slots = Slots(self._tiers.vram.capacity_bytes, small)
        self._slots = Slots(ram.capacity_bytes if ram is not None else 0, small)

    def _decide_by(self, curves: Curves) -> None:
        self._scheduler = Scheduler(curves)
        part_s = inf if self._dividing is None else self._dividing.part_s
        self._divider = Divider(curves, part_s, lambda key: self._memory.kinds[key].down.slices)

    def _small_bytes(self) -> int:
        sizes = np.unique(self._store.sizes[self._store.sizes > 0])
        return int(sizes[0]) if sizes.size > 1 else 0

    def _host_bytes(self) -> int:
        ram = self._tiers.ram
        return ram.capacity_bytes if ram is not None else LANDING_EXPERTS * int(self._store.sizes.max())

    # --- what the session calls -----------------------------------------------------------------------

    @_SERVING
    def begin(self, of: Pass) -> None:
        """Say which forward pass comes now, and learn from what the last one took."""
        self._begun.append(of)
        self._learn()
        self._watch.begin_pass(decoding=of.decoding)

    @_SERVING
    def serve(self, missing: Missing) -> None:
        """Bring what the present event lacks, or compute it where it is, and compute the rest.

        Raises:
            DeviceError: The disk or the device failed.
            BundleError: An expert's bytes are not what the manifest says.
        """
        events = self._take()
        present = events.pop()
        self._account(events)
        union, weights = union_of(present.experts, present.weights)
        if union != tuple(missing.experts):
            raise DeviceError(
                f"layer {present.layer}: the engine waits for experts {missing.experts} and logged {union}. "
                "Please report this."
            )
        self._note(present)
        rows = np.bincount(present.experts.ravel())
        for index, part in enumerate(self._tiers.parts(present.layer, union)):
            if index:
                self._engine.streams.synchronize()  # copies of the part before still read what may leave now
            chosen = None if weights is None else tuple(weights[union.index(expert)] for expert in part)
            self._serve_part(present, part, chosen, rows)

    def reset(self, cache: ExpertCache | None = None) -> None:
        """Forget everything after a pass that did not end.

        Raises:
            DeviceError: The device failed for good.
        """
        del cache  # the tiers are made anew
        self._mover.drain()
        self._memory.forget()
        self._reads.clear()
        self._engine.take_events()
        self._empty_tiers()
        self.events.clear()
        self._begun.clear()
        self._step, self._ahead = -1, 0
        self._watch.forget()
        self._watched = None
        self._sums = replace(self._sums, predicted_link_s=0.0, stamps=[])

    @_SERVING
    def warm(self, order: Iterable[Key]) -> None:
        """Read experts into both memories before the first event, the most valuable first, as far as there is room.

        Raises:
            DeviceError: The disk or the device failed.
            BundleError: An expert's bytes are not what the manifest says.
        """
        wanted = [key for key in dict.fromkeys(order) if key not in self._tiers]
        self._tiers.warm(wanted)
        fence = self._engine.streams.fence()
        # those that RAM does not keep come first: they pass through places that others then take
        for key in sorted((key for key in wanted if key in self._tiers), key=self._in_ram):
            offset = self._slots.place(key, self._size(key))[0] if self._in_ram(key) else 0
            self._reads[key] = self._submit_at(key, offset)
            self._land_one(key, offset)
            if self._tiers.place(*key) == "gpu":
                self._memory.upload(*key, self._vram_slots.place(key, self._size(key))[0], fence)
            if not self._in_ram(key):
                self._engine.streams.synchronize()
                self._memory.unbind(*key)

    @_SERVING
    def stats(self) -> DeviceStats:
        """Return what was counted since the start; no pass is under way."""
        self.settle()
        self._learn()
        tiers, ram = self._tiers, self._tiers.ram
        return DeviceStats(
            device=self._engine.streams.name,
            vram_bytes=tiers.vram.capacity_bytes,
            ram_bytes=0 if ram is None else ram.capacity_bytes,
            exclusive=tiers.exclusive,
            pinned=self._memory.pinned,
            decoding=tiers.counts(decoding=True),
            prompts=tiers.counts(decoding=False),
            host_experts=self._sums.host_experts,
            copied_ahead=self._sums.ahead,
            ahead_bytes=self._sums.ahead_bytes,
            divided=self._sums.divided,
            divided_bytes=self._sums.divided_bytes,
            staged_bytes=0 if self._dividing is None else self._dividing.staged_bytes,
            host_s=self._sums.host_s,
            upload_s=self._sums.upload_s,
            predicted_s=self._sums.predicted_s,
            errors=self._refit.statistics(),
            curves=self._refit.curves,
            watched=self._watch.watched(),
        )

    # --- one event ------------------------------------------------------------------------------------

    def _account(self, events: Sequence[Event]) -> None:
        """Tell the tiers events whose experts the device had."""
        for event in events:
            union, weights = union_of(event.experts, event.weights)
            outcome = self._tiers.event(event.step, event.layer, union, weights, decoding=event.of.decoding)
            if outcome.misses:
                raise DeviceError(
                    f"layer {event.layer}: experts {outcome.misses} were computed and are not in the tiers' books. "
                    "Please report this."
                )
            self._note(event)

    def _serve_part(
        self, present: Event, part: Sequence[int], weights: Sequence[float] | None, rows: NDArray[np.int64]
    ) -> None:
        layer = present.layer
        self._watched = self._watch.begin_event(layer)
        self._landed = []
        found = self._tiers.event(present.step, layer, part, weights, decoding=present.of.decoding)
        plan, division = self._planned(layer, part, found, rows)
        if found.evicted_ram and self._memory.copying:
            self._engine.streams.synchronize()  # a copy ahead may still read what leaves
        self._leave_ram(found.evicted_ram)
        ram = self._tiers.ram is not None
        if ram:
            self._read(found.flash_misses, layer)
        admission = self._tiers.admit(expert for _, expert in plan.uploaded)
        demoted = {key: self._memory.fetch(*key) for key in admission.demoted}
        self._make_room(admission, plan)
        if plan.on_cpu or division is not None:
            self._engine.bring_rows()
        fence = self._engine.streams.fence()
        ready = [key for key in plan.uploaded if self._memory.on_host(key)]
        marks = [self._upload(key, fence) for key in ready]
        share = None if division is None else self._upload_share(division, fence)
        self._compute_resident(plan)
        for key, mark in zip(ready, marks, strict=True):
            self._compute_uploaded(key, mark)
        if division is not None:
            self._compute_uploaded(division.key, share, division)
        self._compute_on_host([key for key in plan.on_cpu if self._memory.on_host(key)], division)
        if ram:
            self._serve_read(plan, fence)
        else:
            self._serve_landing(plan, fence)
        self._end_event(present, plan)
        if self._tiers.exclusive:
            self._exchange(plan, admission, demoted)
        elif ram and present.of.decoding and self._rule is None:
            self._copy_ahead(layer, part, plan)

    def _end_event(self, present: Event, plan: Schedule) -> None:
        """Learn of the reads, which are over, and note when the rest is."""
        if self._landed and present.of.decoding:
            begun_s, ended_s = min(one for one, _ in self._landed), max(one for _, one in self._landed)
            self._refit.observe("disk", plan.disk_s, max(0.0, ended_s - begun_s))
        if self._watched is not None:
            self._watched.reads = self._landed
        self._watch.end_event(self._watched)
        self._watched = None

    def _copy_ahead(self, layer: int, part: Sequence[int], plan: Schedule) -> None:
        """Let the link bring what will likely be wanted while the device goes on to the next event."""
        if self._ahead_of is None:
            return
        present = [(layer, expert) for expert in part]
        keys = self._ahead_of.wanted(plan.uploaded, self._between_s, self._refit.curves)
        for key in keys:
            if not (self._memory.on_host(key) and self._ahead_of.fits(key, present)):
                continue
            for victim in self._ahead_of.bring(layer, key, present):
                self._memory.drop(*victim)
                self._vram_slots.remove(victim)
            self._place_on_device(key)
            mark = self._memory.upload(*key, self._vram_slots.offset(key), self._engine.streams.fence())
            self._watch.copied_ahead(mark)
            self._sums.predicted_link_s += self._refit.curves.link_s(self._size(key))
            self._sums.ahead += 1
            self._sums.ahead_bytes += self._size(key)

    def _planned(
        self, layer: int, part: Sequence[int], found: TierOutcome, rows: NDArray[np.int64]
    ) -> tuple[Schedule, Division | None]:
        """Return what becomes of whole experts, and what is divided beside them."""
        flash, hits = frozenset(found.flash_misses), frozenset(found.gpu_hits)
        active = [
            Active(
                (layer, expert),
                int(rows[expert]),
                self._sizes[layer][expert],
                "gpu" if expert in hits else "flash" if expert in flash else "ram",
                kind=self._store.experts[layer, expert].precision.value,
                ram_copy=self._memory.on_host((layer, expert)),
            )
            for expert in part
        ]
        if self._ahead_of is not None and self._rule is None:
            active = self._ahead_of.ranked(layer, active, self._refit.curves)
        plan = self._scheduler.schedule(active) if self._rule is None else self._rule(active, self._refit.curves)
        plan, division = self._divided(plan, active)
        if self._watched is not None:
            self._watched.planned, self._watched.division = (plan, active, self._refit.curves), division
        self._sums.predicted_s += plan.span_s
        if division is not None:
            self._sums.predicted_link_s += division.cost.link
            plan = _without(plan, division.key)
        self._sums.predicted_link_s += sum(self._refit.curves.link_s(self._size(key)) for key in plan.uploaded)
        return plan, division

    def _divided(self, plan: Schedule, active: Sequence[Active]) -> tuple[Schedule, Division | None]:
        if self._dividing is None:
            return plan, None
        costs = self._scheduler.costs(active)
        price = 0.0 if self._ahead_of is None else self._ahead_of.link_price
        return self._divider.divide(plan, active, costs, link_price=price)

    def _compute_resident(self, plan: Schedule) -> None:
        if not plan.on_gpu:
            return
        streams = self._engine.streams
        begin = streams.stamp()
        self._engine.compute([expert for _, expert in plan.on_gpu])
        if self._watched is not None:
            self._watched.gpu.append((begin, None, streams.stamp()))
        if len(self._begun) == 1 and self._begun[0].decoding:
            kinds = [self._store.experts[key].precision.value for key in plan.on_gpu]
            predicted_s = sum(self._refit.curves.gpu_s(1, kind) for kind in kinds)
            self._sums.stamps.append((predicted_s, begin, streams.stamp()))

    def _upload(self, key: Key, fence: Any) -> Any:
        """Start the copy of an expert that the event asks for, and return its mark."""
        mark = self._memory.upload(*key, self._vram_slots.offset(key), fence)
        if self._watched is not None:
            self._watched.uploads.append(mark)
        return mark

    def _upload_share(self, division: Division, fence: Any) -> Any:
        """Start the copy of what the device computes of a divided expert, and return its mark."""
        kind = first_slices(self._memory.kinds[division.key], division.slices)
        mark = self._memory.upload_share(*division.key, kind.size_bytes, fence)
        self._sums.divided += 1
        if self._begun and self._begun[0].decoding:
            self._sums.divided_bytes += kind.size_bytes
        if self._watched is not None:
            self._watched.uploads.append(mark)
        return mark

    def _compute_uploaded(self, key: Key, mark: Any, division: Division | None = None) -> None:
        streams, watched = self._engine.streams, self._watched
        begin = None if watched is None else streams.stamp()
        if division is None:
            self._engine.compute([key[1]])
        else:
            self._engine.compute_share(key[1], division.slices)
        if watched is not None:
            watched.gpu.append((begin, mark, streams.stamp()))

    def _compute_on_host(self, keys: Sequence[Key], division: Division | None = None) -> None:
        if not keys and division is None:
            return
        start = self._clock()
        self._engine.compute_on_host([expert for _, expert in keys])
        if division is not None:
            self._engine.compute_rest_on_host(division.key[1], division.slices)
        end = self._clock()
        taken_s = end - start
        if self._watched is not None:
            self._watched.cpu.append((start, end))
        self._sums.host_experts += len(keys)
        self._sums.host_s += taken_s
        if self._begun and self._begun[0].decoding:
            curves = self._refit.curves
            kinds = [self._store.experts[key].precision.value for key in keys]
            predicted_s = curves.cpu_start_s + sum(curves.cpu_s(1, kind) for kind in kinds)
            predicted_s += 0.0 if division is None else division.cost.cpu
            self._refit.observe("cpu", predicted_s, taken_s)

    # --- places and reads -----------------------------------------------------------------------------

    def _size(self, key: Key) -> int:
        return int(self._sizes[key[0]][key[1]])

    def _in_ram(self, key: Key) -> bool:
        return self._tiers.ram is not None and key in self._tiers.ram

    def _leave_ram(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._memory.unbind(*key)
            self._slots.remove(key)

    def _make_room(self, admission: Admission, plan: Schedule) -> None:
        """Find places on the device; what must move for that moves before anything is copied there."""
        for key in admission.evicted_vram:
            self._memory.drop(*key)
            self._vram_slots.remove(key)
        for key in plan.uploaded:
            self._place_on_device(key)

    def _place_on_device(self, key: Key) -> None:
        _, moves = self._vram_slots.place(key, self._size(key))
        for move in moves:
            if move.key in self._memory:
                self._memory.slide(*move.key, move.target)

    def _read(self, experts: Sequence[int], layer: int) -> None:
        """Find places in RAM, then start reading; moving first, since reads pin their places."""
        keys = [(layer, expert) for expert in experts]
        for key in keys:
            self._place(key)
        for key in keys:
            self._reads[key] = self._submit_at(key, self._slots.offset(key))

    def _place(self, key: Key) -> None:
        _, moves = self._slots.place(key, self._size(key))
        for move in moves:
            if self._memory.on_host(move.key):
                data = self._arena[move.source : move.source + move.size_bytes].copy()
                self._arena[move.target : move.target + move.size_bytes] = data
                self._memory.bind(*move.key, self._store.experts[move.key].precision, move.target)

    def _submit_at(self, key: Key, offset: int) -> Read:
        return self._mover.submit(self._store.experts[key].record, offset, check=key not in self._verified)

    def _land_one(self, key: Key, offset: int) -> None:
        """Wait for a read and say where it lies."""
        start, read = self._clock(), self._reads[key]
        read.wait()
        self.wait_s += self._clock() - start
        self._landed.append((read.begun_s, read.ended_s))
        del self._reads[key]
        self._verified.add(key)
        if self._dividing is not None:
            kind = self._memory.kinds[key]
            arrange(self._arena[offset : offset + kind.size_bytes], self._dividing.stored[key], kind)
        self._memory.bind(*key, self._store.experts[key].precision, offset)

    def _serve_read(self, plan: Schedule, fence: Any) -> None:
        """Compute experts as they come from flash into RAM."""
        uploaded = frozenset(plan.uploaded)
        for key in plan.read:
            self._land_one(key, self._slots.offset(key))
            self._take_up(key, fence, upload=key in uploaded)

    def _take_up(self, key: Key, fence: Any, *, upload: bool) -> None:
        """Compute an expert that has just come."""
        if upload:
            self._compute_uploaded(key, self._upload(key, fence))
        else:
            self._compute_on_host([key])

    def _serve_landing(self, plan: Schedule, fence: Any) -> None:
        """Compute experts as they come from flash into a few places that they leave again."""
        uploaded = frozenset(plan.uploaded)
        step = self._arena.size // LANDING_EXPERTS
        for first in range(0, len(plan.read), LANDING_EXPERTS):
            group = plan.read[first : first + LANDING_EXPERTS]
            if first:
                self._engine.streams.synchronize()  # copies of the group before have left its places
            for place, key in enumerate(group):
                self._reads[key] = self._submit_at(key, place * step)
            for place, key in enumerate(group):
                self._land_one(key, place * step)
                self._take_up(key, fence, upload=key in uploaded)
            for key in group:
                self._memory.unbind(*key)
        if plan.read:
            self._engine.streams.synchronize()

    def _exchange(self, plan: Schedule, admission: Admission, demoted: Mapping[Key, NDArray[np.uint8]]) -> None:
        """Let what was uploaded leave RAM, and what left the device for it come back."""
        if not (plan.uploaded or demoted or admission.evicted_ram):
            return
        self._engine.streams.synchronize()
        self._leave_ram([key for key in plan.uploaded if key in self._slots])
        self._leave_ram(admission.evicted_ram)
        for key, data in demoted.items():
            self._place(key)
            offset = self._slots.offset(key)
            self._arena[offset : offset + data.size] = data
            self._memory.bind(*key, self._store.experts[key].precision, offset)

    # --- learning -------------------------------------------------------------------------------------

    def _learn(self) -> None:
        """Compare the last pass with what was predicted."""
        sums = self._sums
        self._engine.streams.synchronize()  # a prompt's chunk may still be computed: nobody read its logits
        upload_s = self._memory.upload_seconds()
        sums.upload_s += upload_s
        self._refit.observe("link", sums.predicted_link_s, upload_s)
        for predicted_s, begin, end in sums.stamps:
            self._refit.observe("gpu", predicted_s, self._engine.streams.between(begin, end))
        now = self._clock()
        self._between_s, self._pass_start_s = (now - self._pass_start_s) / max(1, len(self._layers)), now
        self._watch.collect(self._engine.ended_s)
        sums.predicted_link_s = 0.0
        sums.stamps.clear()
        self._passes += 1
        if self._passes % _REFIT_PASSES == 0:
            self._decide_by(self._refit.refit())


def _without(plan: Schedule, divided: Key) -> Schedule:
    """Return what a schedule does with the experts that stay whole."""
    uploaded, on_cpu = (tuple(key for key in side if key != divided) for side in (plan.uploaded, plan.on_cpu))
    return replace(plan, uploaded=uploaded, on_cpu=on_cpu)
