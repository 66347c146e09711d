"""The search for a placement of experts over a GPU's memory, RAM and flash, by runs of the trace in virtual time.

A *division* is bytes of experts in both memories; a *serving* is what becomes of misses. A mix's arenas come from a
ladder that is anchored at all of its experts, so that a larger budget only adds divisions. What a run in virtual time
costs is counted: where all combinations are few enough every one is run, else they are walked from the likeliest on,
by an estimate from the use counts that decides nothing but the order, and the plan says how many were tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.plans.decoder_costs import PAGE_BYTES
from edgeflex.plans.decoder_device import Division, Serving
from edgeflex.plans.decoder_mixes import make_mix, pool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from edgeflex.plans.decoder_costs import Space
    from edgeflex.plans.decoder_device import DevicePoint, VirtualDevice
    from edgeflex.plans.decoder_gpu_memory import Holdings
    from edgeflex.plans.decoder_mixes import Mix
    from edgeflex.schema import Interval
    from edgeflex.schema_gpu import GpuMemory
    from edgeflex.schema_moe import DecoderBudget, DecoderMemory

    Ints = NDArray[np.int64]

RUNGS = 16  # arenas per doubling
_LIKELY_MIXES = 3
_PATIENCE = 3  # divisions in a row that better nothing
_HOPELESS = 1.25  # a serving that is so much slower where it is tried first is left out below
_SIMPLER = 1.15  # how much slower it may be to keep every expert on the GPU than to let the processor help
_EQUAL = 1.005  # how much slower a fixed list may be and still be as quick as a cache, which it is simpler than
_CLOSE = 1.02  # how far an estimate, corrected by what was found, may break a limit and still be run


RESIDENT = Serving("resident", "reuse", "auto")
SERVINGS = (
    Serving("cache", "reuse", "auto"),
    Serving("static", "static", "auto"),
    Serving("cpu", "static", "static"),
    Serving("cache", "lru", "upload"),
)


@dataclass(frozen=True)
class Tried:
    """A combination that was run and keeps all limits; smaller ``order`` is better."""

    mix: Mix
    division: Division
    serving: Serving
    chunk_tokens: int
    point: DevicePoint
    order: tuple[float, ...]


@dataclass
class GpuSearch:
    """Searches one budget.

    Args:
        holdings: What is held beside experts.
        device: Runs the trace.
        budget: Limits, and what is to be least.
        chunks: Tokens per prefill step to choose among, ascending.
        one_memory: Whether the GPU's memory is the processor's, so that a RAM tier gains nothing.
        servings: To choose among.
    """

    holdings: Holdings
    device: VirtualDevice
    budget: DecoderBudget
    chunks: Sequence[int]
    one_memory: bool = False
    servings: Sequence[Serving] = SERVINGS
    runs: set[tuple[bytes, Division, Serving]] = field(default_factory=set)
    quickest: Tried | None = None  # whatever the time limits
    exhaustive: bool = True
    passed_over: Tried | None = None  # what is quicker by less than the figures can tell

    # --- what fits -------------------------------------------------------------------------------------

    def memories(self, mix: Mix, division: Division, chunk_tokens: int) -> tuple[GpuMemory, DecoderMemory]:
        """Return what is held on the GPU and beside it."""
        gpu = self.holdings.gpu(division.vram_bytes, chunk_tokens)
        return gpu, self.holdings.host(mix, division.ram_bytes, chunk_tokens)

    def fits(self, mix: Mix, division: Division, chunk_tokens: int) -> bool:
        """Return whether both memories hold their parts."""
        gpu, host = self.memories(mix, division, chunk_tokens)
        held = host.total_bytes + (gpu.total_bytes if self.one_memory else 0)
        return gpu.total_bytes <= _most(self.budget.vram_bytes) and held <= _most(self.budget.memory_bytes)

    def divisions(self, mix: Mix) -> list[Division]:
        """Return the divisions that fit, the largest arenas first."""
        chunk = self.chunks[0]
        found: dict[Division, None] = {}
        for arena in arenas(mix):
            for division in self._beside(mix, arena):
                if self.fits(mix, division, chunk):
                    found[division] = None
        return list(found)

    def _beside(self, mix: Mix, arena: int) -> Iterator[Division]:
        """Give the RAM tiers that may stand below an arena, the largest first."""
        total, largest = mix.experts_bytes, int(mix.sizes.max(initial=0))
        if arena >= total or self.one_memory:
            yield Division(arena, 0)
            return
        room = _most(self.budget.memory_bytes) - self.holdings.host(mix, 1, self.chunks[0]).total_bytes + 1
        tiers = [total] if room >= total else [int(max(0.0, room)) // PAGE_BYTES * PAGE_BYTES]
        if self.budget.minimize == "memory":
            rungs = [total >> step for step in range(1, 40) if largest <= total >> step < tiers[0]]
            tiers = list(dict.fromkeys([*tiers, *rungs, min(tiers[0], largest)]))
        for size in tiers:
            ram = size if size == total else size // PAGE_BYTES * PAGE_BYTES
            if ram >= min(total, arena + largest):
                yield Division(arena, ram)
            if largest <= ram < total:
                yield Division(arena, ram, exclusive=True)
        if tiers[0] < total or self.budget.minimize == "memory":
            yield Division(arena, 0)

    # --- the walk --------------------------------------------------------------------------------------

    def best(self) -> Tried | None:
        """Return the best combination that keeps every limit, or None if none of those tried does."""
        combinations = self._combinations()
        self.exhaustive = len(combinations) * len(self.servings) <= self.device.most_runs
        if self.budget.minimize != "latency":
            return self._first(combinations)
        quickest = self._quickest(combinations)
        return None if quickest is None else self._simplest(quickest, combinations)

    def _simplest(self, quickest: Tried, combinations: Sequence[tuple[Mix, Division]]) -> Tried:
        """Return the quickest with every expert on the GPU where that fits and costs no more than figures can tell."""
        whole = [(mix, one) for mix, one in combinations if one.vram_bytes >= mix.experts_bytes]
        tried = [self._try(mix, one, RESIDENT) for mix, one in whole]
        found = min((one for one in tried if one is not None), key=lambda one: one.order, default=None)
        if found is None or found.point.token_s > _SIMPLER * quickest.point.token_s:
            return quickest
        self.passed_over = None if quickest.serving is RESIDENT else quickest
        return found

    def _combinations(self) -> list[tuple[Mix, Division]]:
        """Return mixes and divisions in the order in which they are tried."""
        minimize = self.budget.minimize
        rows: list[tuple[tuple[float, ...], Mix, Division]] = []
        for mix, divisions in self.likely_mixes():
            for division in divisions:
                seconds = self._estimate_s(mix, division)
                value = {"latency": seconds, "kl": mix.kl, "memory": float(self._held(mix, division))}[minimize]
                # the largest arena of each mix is tried first whatever the estimate
                later = float(minimize == "latency" and division is not divisions[0])
                rows.append(((later, value, seconds, mix.kl, -division.vram_bytes, division.exclusive), mix, division))
        return [(mix, division) for _, mix, division in sorted(rows, key=lambda row: row[0])]

    def likely_mixes(self) -> list[tuple[Mix, list[Division]]]:
        """Return the mixes that may be best, with their divisions: few with all, or all with their largest arena's."""
        found = []
        for mix in self._mixes():
            divisions = self.divisions(mix) if mix.disk_bytes <= _most(self.budget.disk_bytes) else []
            if divisions and self.budget.minimize == "kl":
                divisions = [one for one in divisions if one.vram_bytes == divisions[0].vram_bytes]
            if divisions:
                seconds = min(self._estimate_s(mix, one) for one in divisions[:3])
                held = self._held(mix, divisions[-1]) if self.budget.minimize == "memory" else 0
                found.append(((held, seconds, mix.kl), mix, divisions))
        found.sort(key=lambda row: row[0])
        ranked = [(mix, divisions) for _, mix, divisions in found]
        if self.budget.minimize == "kl":
            return ranked
        if self.budget.minimize == "latency":
            # of mixes that differ in dense parts alone, which cost no time, the first is the most exact
            alike: dict[tuple[bytes, tuple[Division, ...]], tuple[Mix, list[Division]]] = {}
            for mix, divisions in ranked:
                alike.setdefault((mix.sizes.tobytes(), tuple(divisions)), (mix, divisions))
            ranked = list(alike.values())
        return ranked[:_LIKELY_MIXES]

    def _estimate_s(self, mix: Mix, division: Division) -> float:
        return float(f"{self.device.estimate_s(mix.sizes, division):.6g}")

    def _mixes(self) -> list[Mix]:
        return mixes_of(self.holdings.space, self.budget.kl_limit)

    def _held(self, mix: Mix, division: Division) -> int:
        gpu, host = self.memories(mix, division, self.chunks[0])
        return gpu.total_bytes + host.total_bytes

    def _quickest(self, combinations: Sequence[tuple[Mix, Division]]) -> Tried | None:
        best: Tried | None = None
        vain = 0
        for mix, division in combinations:
            former = best
            for serving in self._hopeful(mix, division):
                found = self._try(mix, division, serving)
                if found is not None and (best is None or found.order < best.order):
                    best = found
            vain = 0 if best is not former else vain + 1
            if not self.exhaustive and (len(self.runs) >= self.device.most_runs or (best and vain >= _PATIENCE)):
                break
        return best

    def _first(self, combinations: Sequence[tuple[Mix, Division]]) -> Tried | None:
        """Return the first combination that keeps the limits, in order of what is to be least.

        Where not all are run, the estimate is corrected by what the last run measured, and the walk begun anew.
        """
        wrong = [1.0]
        best, before = None, len(combinations)
        while best is None or before:
            place = self._first_before(combinations[:before], wrong)
            if place is None:
                return best
            before, best = place
            if self.exhaustive or len(self.runs) >= 2 * self.device.most_runs:
                return best
        return best

    def _first_before(
        self, combinations: Sequence[tuple[Mix, Division]], wrong: list[float]
    ) -> tuple[int, Tried] | None:
        """Return the place of the first of ``combinations`` that keeps the limits, and what was run there.

        ``wrong`` holds what the best serving took over its estimate, as last measured.
        """
        limit = _most(self.budget.token_s) * _CLOSE
        for place, (mix, division) in enumerate(combinations):
            estimate_s = self._estimate_s(mix, division)
            known = (mix.sizes.tobytes(), division, self.servings[0]) in self.runs
            if not self.exhaustive and (known or estimate_s * wrong[0] > limit):
                continue
            servings = self._hopeful(mix, division)
            tried = [one for one in (self._try(mix, division, serving) for serving in servings) if one is not None]
            least = min(self._point(mix, division, serving).token_s for serving in servings)
            wrong[0] = least / max(estimate_s, 1e-12)
            if tried:
                return place, min(tried, key=lambda one: one.order)
            if not self.exhaustive and len(self.runs) >= 2 * self.device.most_runs:
                return None
        return None

    def _hopeful(self, mix: Mix, division: Division) -> list[Serving]:
        """Return the servings to run: all where there is time, else those that did well where all were."""
        if division.vram_bytes >= mix.experts_bytes:
            return [RESIDENT]
        if self.exhaustive or self.quickest is None or self.quickest.serving is RESIDENT:
            return list(self.servings)
        at = self.quickest
        known = [one for one in self.servings if (at.mix.sizes.tobytes(), at.division, one) in self.runs]
        seconds = {one: self._point(at.mix, at.division, one).token_s for one in known}
        return [one for one in known if seconds[one] <= _HOPELESS * at.point.token_s] or list(self.servings)

    def _point(self, mix: Mix, division: Division, serving: Serving) -> DevicePoint:
        self.runs.add((mix.sizes.tobytes(), division, serving))
        return self.device.point(mix.sizes, division, serving)

    def _try(self, mix: Mix, division: Division, serving: Serving) -> Tried | None:
        """Run a combination and return it if it keeps every limit."""
        point = self._point(mix, division, serving)
        held = float(self._held(mix, division))
        value = {"latency": point.token_s, "kl": mix.kl, "memory": held}[self.budget.minimize]
        order = (float(f"{value:.12g}"), float(f"{point.token_s:.12g}"), mix.kl, held)
        tried = Tried(mix, division, serving, self.chunks[0], point, order)
        if self.quickest is None or point.token_s < self.quickest.point.token_s:
            self.quickest = tried
        return tried if point.token_s <= _most(self.budget.token_s) and self.chunk_for(tried) is not None else None

    def chunk_for(self, tried: Tried) -> int | None:
        """Return the tokens per prefill step of the soonest first token, or None if every one is too late.

        Without a limit on it the largest that fits is taken, unrun: it brings every expert the fewest times.
        """
        fitting = [one for one in self.chunks if self.fits(tried.mix, tried.division, one)]
        if self.budget.minimize == "memory":
            fitting = fitting[:1]
        limit = self.budget.first_token_s
        if limit is None:
            return fitting[-1]
        for chunk in reversed(fitting):
            if self.first_token(tried, chunk).value <= limit:
                return chunk
        return None

    def first_token(self, tried: Tried, chunk_tokens: int) -> Interval:
        """Return the seconds to the first token."""
        return self.device.first_token(tried.mix.sizes, tried.division, tried.serving, chunk_tokens)

    # --- beside the answer -------------------------------------------------------------------------------

    def trials(self, chosen: Tried) -> dict[Serving, DevicePoint]:
        """Return every serving at the chosen division; those not run yet are run now."""
        if chosen.serving is RESIDENT:
            return {RESIDENT: chosen.point}
        return {one: self._point(chosen.mix, chosen.division, one) for one in self.servings}


def mixes_of(space: Space, most_kl: float | None) -> list[Mix]:
    """Return the mixes that some prices make best, and the one of the least bytes on the disk."""
    found = pool(space, most_kl)
    cost = np.where(np.isfinite(space.kl), space.disk_bytes.astype(np.float64), np.inf)
    leanest = make_mix(space, cost.argmin(axis=1))
    if any((leanest.columns == one.columns).all() for one in found) or leanest.kl > _most(most_kl):
        return found
    return [*found, leanest]


def arenas(mix: Mix) -> list[int]:
    """Return the arenas to choose among: all experts, then sixteen sizes a halving, down to one expert."""
    total, largest = mix.experts_bytes, int(mix.sizes.max(initial=0))
    found, step = [total], 1
    while largest and (size := int(total * 2.0 ** (-step / RUNGS)) // PAGE_BYTES * PAGE_BYTES) >= largest:
        if size < found[-1]:
            found.append(size)
        step += 1
    if largest and largest < found[-1]:
        found.append(largest)
    return found


def crossing(
    device: VirtualDevice, sizes: Ints, ram_bytes: int, shares: Sequence[float] = (0.3, 0.5, 0.7, 0.9)
) -> float | None:
    """Return the least of ``shares`` in the GPU's memory from which on a fixed list is as quick as a cache, or None.

    Both are run in virtual time at every share, RAM holding every expert; half a percent counts as equal.

    Args:
        device: Runs the trace.
        sizes: ``[layers, experts]`` bytes.
        ram_bytes: Of experts in RAM.
        shares: Of the experts' bytes, ascending.
    """
    total, largest = int(sizes.sum()), int(sizes.max())
    dynamic, fixed = SERVINGS[0], SERVINGS[1]
    found = None
    for share in reversed(shares):
        arena = max(largest, int(share * total) // PAGE_BYTES * PAGE_BYTES)
        division = Division(arena, ram_bytes)
        if device.point(sizes, division, fixed).token_s > _EQUAL * device.point(sizes, division, dynamic).token_s:
            break
        found = share
    return found


def _most(limit: float | None) -> float:
    return math.inf if limit is None else limit + 5e-10 * abs(limit) + 5e-13
