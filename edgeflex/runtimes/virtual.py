"""A device in virtual time: a routing trace through cache, scheduler and curves, without the hardware.

The very ``TieredCache`` and schedules of the runtime are driven; only the clock is made up, by the rules of
``timeline``. Nothing is drawn at random, so that the same trace on the same machine takes the same time to the bit.
A layer of a pass is its dense part on the GPU, during which the link is free, and then its event. What decides
between them is a strategy, see ``strategies``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from math import fsum
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.runtimes.curves import RESOURCES
from edgeflex.runtimes.division import copied_share
from edgeflex.runtimes.strategies import Machine, Setup, Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.curves import Resource
    from edgeflex.runtimes.strategies import Host, Served
    from edgeflex.runtimes.timeline import Key
    from edgeflex.runtimes.trace import Trace, TraceEvent

    Int64 = NDArray[np.int64]

# A cache follows a change of the text, which the calibration's part may not show, and risks little: a static placement,
# which cannot follow at all, must be quicker there by this.
HORIZON = 8.0  # passes that a cache looks ahead, in a run too
_STATIC_GAIN = 0.03


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
        peak_vram_bytes: Most bytes of experts in VRAM, the slots of copies under way included.
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
    host = Setup(machine, known, trace.top_k, vram_bytes, ram, order, exclusive).host(strategy)
    clock = _Clock(machine, first_step)
    for event, rows in zip(trace.events, event_rows(trace), strict=True):
        if last_step is not None and event.step >= last_step:
            break
        clock.start_layer(event, host)
        rows_of = dict(zip(event.experts, rows, strict=True))
        for part in host.parts(event):
            clock.add(event, host.serve(event, part, rows_of))
    return clock.result(strategy, host.peak_bytes)


def first_judged_step(trace: Trace, share: float = 0.25) -> int:
    """Return the pass from which on a run is judged: after every prompt before it, and a share of the decoding."""
    decoded = [step for step, decoding in sorted({(event.step, event.decoding) for event in trace.events}) if decoding]
    return decoded[int(len(decoded) * share)] if decoded else 0


def judged_part(trace: Trace, first_step: int) -> Trace:
    """Return the trace with the decoding before ``first_step`` made part of its prompts, for bounds on the rest."""
    rows = trace.phase == 1
    passes = np.unique(np.stack([trace.turn[rows], trace.step[rows], trace.iter[rows]]), axis=1)
    early = {event.step for event in trace.events if event.decoding and event.step < first_step}
    before = {tuple(key) for key in passes[:, : len(early)].T.tolist()}
    keys = zip(trace.turn.tolist(), trace.step.tolist(), trace.iter.tolist(), strict=True)
    phase = [now if key not in before else 0 for now, key in zip(trace.phase.tolist(), keys, strict=True)]
    return replace(trace, phase=np.array(phase, dtype=np.int64))


def popular(trace: Trace, first_step: int) -> list[Key]:
    """Return (layer, expert) by falling use in the passes before ``first_step``, ties by number."""
    uses: Counter[Key] = Counter()
    for event, rows in zip(trace.events, event_rows(trace), strict=True):
        if event.step < first_step:
            uses.update({(event.layer, expert): count for expert, count in zip(event.experts, rows, strict=True)})
    return sorted(uses, key=lambda key: (-uses[key], key))


def choose_strategy(
    trace: Trace,
    machine: Machine,
    *,
    vram_bytes: int,
    ram_bytes: int | None = None,
    sizes: Int64 | None = None,
    first_step: int,
) -> Strategy:
    """Return ours as it did best on the passes before ``first_step``; what comes later is not looked at.

    The first half of those passes tells what is popular, the second half judges. What follows a
    change of the text less is taken only where it is clearly quicker.

    Args:
        trace: Of which the passes before ``first_step`` are used.
        machine: What it runs on.
        vram_bytes: Of experts.
        ram_bytes: Of experts; None: all of them.
        sizes: ``[layers, experts]`` bytes; None takes the trace's own.
        first_step: See ``first_judged_step``.

    Raises:
        InputError: As ``run_virtual``.
    """
    half = first_step // 2
    order = popular(trace, half)

    def token_s(strategy: Strategy) -> float:
        found = run_virtual(
            trace,
            machine,
            strategy,
            vram_bytes=vram_bytes,
            ram_bytes=ram_bytes,
            sizes=sizes,
            order=order,
            first_step=half,
            last_step=first_step,
        )
        return found.mean_s

    follows, listed = Strategy("ours", horizon=HORIZON), Strategy("ours", static=True)
    return listed if token_s(listed) < token_s(follows) * (1.0 - _STATIC_GAIN) else follows


class _Clock:
    """Virtual time of one run, and what is counted in it."""

    def __init__(self, machine: Machine, first_step: int) -> None:
        self._machine = machine
        self._first_step = first_step
        self._spent_s: dict[tuple[bool, int], float] = defaultdict(float)
        self._busy_s = [0.0] * len(RESOURCES)
        self._bytes = {"upload": 0, "ahead": 0, "flash": 0}
        self._lookups = self._gpu_hits = 0

    def start_layer(self, event: TraceEvent, host: Host) -> None:
        """Pass the time of the layer's dense part, in which the link copies ahead."""
        dense_s = self._machine.dense(event.tokens)
        judged = event.step >= self._first_step
        if judged and (event.decoding, event.step) not in self._spent_s:
            self._spent_s[event.decoding, event.step] = self._machine.token_s
        copied_s, ahead_bytes = host.copy_ahead(event.layer, dense_s)
        self._count(event, dense_s, (dense_s, 0.0, copied_s, 0.0))
        if judged and event.decoding:
            self._bytes["ahead"] += ahead_bytes

    def add(self, event: TraceEvent, served: Served) -> None:
        """Pass the time of an event, or of one part of it."""
        self._count(event, served.time.span_s, served.time.busy_s)
        if event.step < self._first_step or not event.decoding:
            return
        size_of = {one.key: one.size_bytes for one in served.active}
        self._bytes["ahead"] += served.ahead_bytes
        self._bytes["upload"] += sum([size_of[key] for key in served.plan.uploaded])
        if served.division is not None:
            size_bytes = size_of[served.division.key]
            self._bytes["upload"] -= size_bytes - int(copied_share(served.division.share) * size_bytes)
        self._bytes["flash"] += sum([size_of[key] for key in served.plan.read])
        self._lookups += len(served.active)
        self._gpu_hits += sum([one.place == "gpu" for one in served.active])

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
