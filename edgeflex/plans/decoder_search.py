"""The decoder planner's search: which mix, cache, policy, threads and chunk keep all limits and are best.

A scenario is a cache of the ladder, a policy, threads and a chunk; a mix comes from the pool of ``mixes``, which
does not depend on the memory budget, so that a larger budget only adds combinations. Combinations are walked
best optimistic value first; the optimistic value takes the misses of the smallest expert sizes at the same cache,
so that most are ruled out without a replay. The best is then improved by the exact knapsack.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeflex.errors import EdgeflexError
from edgeflex.plans.decoder_costs import PAGE_BYTES
from edgeflex.plans.decoder_mixes import EXACT_PICKS, Room, Scene, mixes_at_all, pool, relaxed_bound, smallest
from edgeflex.plans.decoder_predict import Setting, TooManyReplaysError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgeflex.plans.decoder_mixes import Goal, Knapsack, Mix
    from edgeflex.plans.decoder_predict import Predictor

_STEPS = 8  # cache sizes per doubling
_COARSE = 2  # cache sizes per doubling at which the smallest sizes are replayed
_FINE = 64  # cache sizes per doubling for the last touch
_ROUNDS = 2
_PATIENCE = 6  # mixes replayed in vain after which the rest, less likely still, is left
_LIKELY = 1.05  # how much worse than the best an estimate may be and still be replayed
_CLOSE = 1.02  # how far an estimate may break a limit and still be replayed


@dataclass(frozen=True)
class Limits:
    """What a plan must keep; None is no limit."""

    memory_bytes: int | None = None
    token_s: float | None = None
    first_token_s: float | None = None
    disk_bytes: int | None = None
    kl: float | None = None

    def without(self, name: str) -> Limits:
        """Return these limits but one."""
        return replace(self, **{name: None})

    @property
    def set_names(self) -> tuple[str, ...]:
        """Names of the limits that are set."""
        return tuple(name for name in LIMIT_GOALS if getattr(self, name) is not None)


LIMIT_GOALS: dict[str, Goal] = {
    "memory_bytes": "memory",
    "token_s": "latency",
    "first_token_s": "first",
    "disk_bytes": "disk",
    "kl": "kl",
}


@dataclass(frozen=True)
class Found:
    """A combination that keeps all limits; smaller ``order`` is better, its first value is the goal's."""

    mix: Mix
    setting: Setting
    order: tuple[float, ...]

    @property
    def value(self) -> float:
        """What was to be least."""
        return self.order[0]


def ladder_floor(size_bytes: float, steps: int = _STEPS) -> int:
    """Return the largest cache size of the ladder that is at most ``size_bytes``; sizes are whole pages."""
    if size_bytes < PAGE_BYTES:
        return 0
    step = math.floor(steps * math.log2(size_bytes) + 1e-9) + 1
    while (found := _rung(step, steps)) > size_bytes:
        step -= 1
    return found


def ladder_ceiling(size_bytes: float, steps: int = _STEPS) -> int:
    """Return the smallest cache size of the ladder that is at least ``size_bytes``."""
    step = math.floor(steps * math.log2(size_bytes)) - 1
    while (found := _rung(step, steps)) < size_bytes:
        step += 1
    return found


def _rung(step: int, steps: int = _STEPS) -> int:
    return int(2.0 ** (step / steps)) // PAGE_BYTES * PAGE_BYTES


class Search:
    """Searches combinations under different limits and goals, sharing pools and replays."""

    def __init__(
        self,
        predictor: Predictor,
        knapsack: Knapsack,
        *,
        policies: tuple[str, ...],
        threads: tuple[int, ...],
        chunks: tuple[int, ...],
        enumerate_up_to: int,
    ) -> None:
        self.predictor = predictor
        self.space = predictor.space
        self.smallest = smallest(self.space)
        self.stopped = False
        self.tried: set[Setting] = set()
        self._knapsack = knapsack
        self._enumerate_up_to = enumerate_up_to
        self._enumerated = mixes_at_all(self.space) <= enumerate_up_to
        self._policies = policies
        self._threads = threads
        self._chunks = tuple(sorted(chunks))
        self._pools: dict[float | None, list[Mix]] = {}

    # --- the walk ----------------------------------------------------------------------------------------

    def best(self, limits: Limits, goal: Goal) -> Found | None:
        """Return the best combination within ``limits``, or None if none is found.

        Raises:
            EdgeflexError: The replays that were allowed are used up before one was found.
        """
        try:
            best = self._walk(limits, goal)
        except TooManyReplaysError:
            raise EdgeflexError(
                f"no plan was found within {self.predictor.most_replays} replays of the trace, and none is ruled out. "
                "Allow more replays or loosen a budget."
            ) from None
        return self._improved(best, limits, goal)

    def _walk(self, limits: Limits, goal: Goal) -> Found | None:
        """Look at the likeliest mixes first; only if none of them keeps the limits, at all that could."""
        mixes = self._pool(limits.kl)
        start = self._resident(mixes, limits, goal)
        most = math.inf if start is None else start.value
        # what cannot beat a plan without misses needs no replay to be left out
        least = [
            self._optimistic(mix, limits, goal) if self._without_wait(mix, goal) <= most else math.inf for mix in mixes
        ]
        places = [place for place, value in enumerate(least) if math.isfinite(value)]
        likely = [(self._estimated(mixes[place], limits, goal), place) for place in places]
        likely = [one for one in sorted(likely) if math.isfinite(one[0])]
        best = None if self._enumerated else self._walk_in(likely, least, limits, goal, _PATIENCE, start)
        if best is None and places:
            best = self._walk_in(sorted((least[place], place) for place in places), least, limits, goal, None, start)
        return best or start

    def _resident(self, mixes: list[Mix], limits: Limits, goal: Goal) -> Found | None:
        """Return the best of the mixes whose experts all fit; it takes no replay."""
        best: Found | None = None
        chunk = self._least_chunk()
        for mix in mixes if goal != "memory" else ():
            if self.room_bytes(mix, chunk, limits.memory_bytes) < mix.experts_bytes:
                continue
            if best is None or self._without_wait(mix, goal) <= best.value:
                best = self._better(best, mix, limits, goal, resident_only=True)
        return best

    def _without_wait(self, mix: Mix, goal: Goal) -> float:
        """Return what a mix costs at least where nothing is ever waited for."""
        if goal == "latency":
            return min(self.predictor.compute_s(mix, threads) for threads in self._threads) * (1.0 - 1e-11)
        return {"kl": mix.kl, "disk": float(mix.disk_bytes)}.get(goal, 0.0)

    def _walk_in(
        self,
        order: list[tuple[float, int]],
        least: list[float],
        limits: Limits,
        goal: Goal,
        patience: int | None,
        best: Found | None,
    ) -> Found | None:
        """Return the best of ``order``, giving up after ``patience`` mixes whose replays bettered nothing."""
        vain = 0
        for expected, place in order:
            unlikely = patience is not None and best is not None and expected > best.value * _LIKELY
            if unlikely or (best is not None and least[place] > best.value * (1.0 + 1e-12)):
                continue
            former, replays = best, self.predictor.replays
            try:
                best = self._better(best, self._pool(limits.kl)[place], limits, goal)
            except TooManyReplaysError:
                self.stopped = True
                if best is None:
                    raise
                return best
            if best is not former:
                vain = 0
            elif self.predictor.replays > replays:
                vain += 1
            if patience is not None and best is not None and vain >= patience:
                break
        return best

    def _pool(self, most_kl: float | None) -> list[Mix]:
        if most_kl not in self._pools:
            self._pools[most_kl] = pool(self.space, most_kl, enumerate_up_to=self._enumerate_up_to)
        return self._pools[most_kl]

    def _better(
        self, best: Found | None, mix: Mix, limits: Limits, goal: Goal, *, resident_only: bool = False
    ) -> Found | None:
        if mix.disk_bytes > (limits.disk_bytes or math.inf) or mix.kl > _most(limits.kl):
            return best
        for setting in self._settings(mix, limits, goal, best):
            if resident_only and not setting.resident:
                continue
            found = self._measure(mix, setting, limits, goal)
            if found is not None and (best is None or found.order < best.order):
                best = found
        return best

    def _measure(self, mix: Mix, setting: Setting, limits: Limits, goal: Goal) -> Found | None:
        """Return the combination if it keeps every limit."""
        self.tried.add(setting)
        token_s = self.predictor.token_s(mix, setting)
        first_s = self.predictor.first_token_s(mix, setting)
        memory = self.predictor.memory(mix, setting).total_bytes
        kept = (
            token_s <= _most(limits.token_s)
            and first_s <= _most(limits.first_token_s)
            and memory <= (limits.memory_bytes or math.inf)
        )
        value = {"latency": token_s, "kl": mix.kl, "memory": memory, "first": first_s, "disk": mix.disk_bytes}[goal]
        # equal in what is asked for, the faster, the sooner, the more faithful, then the smaller is better
        order = (float(f"{value:.12g}"), float(f"{token_s:.12g}"), float(f"{first_s:.12g}"), mix.kl, memory)
        return Found(mix, setting, order) if kept else None

    # --- settings of one mix -------------------------------------------------------------------------------

    def _settings(self, mix: Mix, limits: Limits, goal: Goal, best: Found | None) -> Iterator[Setting]:
        for threads in self._by_speed(mix, limits):
            for chunk in self._chunks:
                if self.predictor.first_compute_s(mix, threads, chunk) > _most(limits.first_token_s):
                    continue
                if goal == "memory":
                    yield from self._leanest(mix, threads, chunk, limits, best)
                    continue
                cache = self.cache_for(mix, chunk, limits.memory_bytes)
                if cache is not None and self._hopeful(mix, threads, cache, limits, goal, best):
                    yield self._setting(mix, threads, chunk, cache)

    def _by_speed(self, mix: Mix, limits: Limits) -> list[int]:
        """Return numbers of threads, fastest first; the others only where the first token could need them."""
        ordered = sorted(self._threads, key=lambda n: mix.token_s[n])
        return ordered if limits.first_token_s is not None else ordered[:1]

    def _setting(self, mix: Mix, threads: int, chunk: int, cache_bytes: int) -> Setting:
        resident = cache_bytes >= mix.experts_bytes
        policy = self._policies[0] if resident else self._policy_for(cache_bytes)
        return Setting(threads, min(cache_bytes, mix.experts_bytes), policy, chunk, resident)

    def room_bytes(self, mix: Mix, chunk: int, memory_bytes: int | None) -> float:
        """Return the bytes that a budget leaves for experts."""
        if memory_bytes is None:
            return math.inf
        return memory_bytes - mix.memory_bytes - self.predictor.fixed_bytes(chunk)

    def least_cache(self, mix: Mix) -> int:
        """Return the smallest cache that a plan may have: one token cycle, in whole pages."""
        return min(-(-mix.cycle_bytes // PAGE_BYTES) * PAGE_BYTES, mix.experts_bytes)

    def cache_for(self, mix: Mix, chunk: int, memory_bytes: int | None, steps: int = _STEPS) -> int | None:
        """Return the largest cache of the ladder that fits, all experts if they do, or None below T."""
        room = self.room_bytes(mix, chunk, memory_bytes)
        if room >= mix.experts_bytes:
            return mix.experts_bytes
        least = self.least_cache(mix)
        return None if room < least else max(least, ladder_floor(room, steps))

    def _leanest(self, mix: Mix, threads: int, chunk: int, limits: Limits, best: Found | None) -> Iterator[Setting]:
        """Give the smallest cache of the ladder at which the time limits hold, by halving."""
        most = self.room_bytes(mix, chunk, limits.memory_bytes)
        if best is not None:
            most = min(most, self.room_bytes(mix, chunk, int(best.value)))
        caches = [one for one in self._caches(mix) if one <= most]
        if not caches or not self._hopeful(mix, threads, caches[-1], limits, "latency", None):
            return
        low, high = -1, len(caches)
        while high - low > 1:
            middle = (low + high) // 2
            setting = self._setting(mix, threads, chunk, caches[middle])
            if self._measure(mix, setting, limits, "memory") is None:
                low = middle
            else:
                high = middle
                yield setting

    def _caches(self, mix: Mix) -> list[int]:
        least, most = self.least_cache(mix), mix.experts_bytes
        if least <= 0:
            return [most]
        first = math.ceil(_STEPS * math.log2(least))
        rungs = [_rung(step) for step in range(first, first + 40 * _STEPS) if least < _rung(step) < most]
        return sorted({least, *rungs, most})

    # --- what cannot be beaten ---------------------------------------------------------------------------

    def _optimistic(self, mix: Mix, limits: Limits, goal: Goal) -> float:
        """Return a value that no setting of ``mix`` beats, or infinity if none keeps the limits."""
        chunk = self._least_chunk()
        room = self.room_bytes(mix, chunk, limits.memory_bytes)
        token_s = self._least_token_s(mix, min(room, mix.experts_bytes))
        least = self.least_cache(mix)
        if room < least or token_s > _most(limits.token_s) or mix.disk_bytes > (limits.disk_bytes or math.inf):
            return math.inf
        if goal == "memory":
            return float(mix.memory_bytes + self.predictor.fixed_bytes(chunk) + least)
        if goal == "first":
            return min(self.predictor.first_compute_s(mix, n, one) for n in self._threads for one in self._chunks)
        return {"latency": token_s, "kl": mix.kl, "disk": float(mix.disk_bytes)}[goal]

    def _least_chunk(self) -> int:
        return min(self._chunks, key=self.predictor.fixed_bytes)

    def _hopeful(
        self, mix: Mix, threads: int, cache_bytes: int, limits: Limits, goal: Goal, best: Found | None
    ) -> bool:
        wait = self.least_wait_s(mix, cache_bytes)
        token_s = self.predictor.compute_s(mix, threads) + wait
        if token_s > _most(limits.token_s) * (1.0 + 1e-12):
            return False
        return goal != "latency" or best is None or token_s <= best.value * (1.0 + 1e-9)

    def _least_token_s(self, mix: Mix, cache_bytes: float) -> float:
        compute = min(self.predictor.compute_s(mix, threads) for threads in self._threads)
        return compute + self.least_wait_s(mix, cache_bytes)

    def least_wait_s(self, mix: Mix, cache_bytes: float, *, steps: int = _COARSE) -> float:
        """Return a wait below that of ``mix``, if experts of more bytes never miss less often.

        The misses are those of the smallest sizes at the next larger cache of a ladder of ``steps`` per doubling,
        each of the smallest bytes.
        """
        small = self.smallest
        if cache_bytes >= mix.experts_bytes or cache_bytes < PAGE_BYTES:
            return 0.0
        cache = ladder_ceiling(cache_bytes, steps)
        if cache >= small.experts_bytes:
            return 0.0
        points = [self.predictor.point(small, cache, policy) for policy in self._policies]
        misses = min(one.misses / one.decode_tokens for one in points)
        least = float(small.sizes[small.sizes > 0].min())
        return max(0.0, misses * least / self.space.rates.read_bytes_per_s - self.predictor.most_hidden_s)

    def _estimated(self, mix: Mix, limits: Limits, goal: Goal) -> float:
        """Return the value that a mix probably has, or infinity if it probably breaks a limit."""
        chunk = self._least_chunk()
        if goal == "memory":
            room = self.room_bytes(mix, chunk, limits.memory_bytes)
            caches = [one for one in self._caches(mix) if one <= room]
            most = _most(limits.token_s)
            place = bisect_left(caches, True, key=lambda one: self._estimated_token_s(mix, one) <= most)
            if place == len(caches):
                return math.inf
            return float(mix.memory_bytes + self.predictor.fixed_bytes(chunk) + caches[place])
        cache = self.cache_for(mix, chunk, limits.memory_bytes)
        if cache is None:
            return math.inf
        token_s = self._estimated_token_s(mix, cache)
        if token_s > _most(limits.token_s) * _CLOSE:
            return math.inf
        return token_s if goal == "latency" else self._optimistic(mix, limits, goal)

    def _estimated_token_s(self, mix: Mix, cache_bytes: int) -> float:
        """Return a guess: a cache holds as many experts as one for the smallest sizes, smaller in proportion."""
        compute = min(self.predictor.compute_s(mix, threads) for threads in self._threads)
        small = self.smallest
        if cache_bytes >= mix.experts_bytes or cache_bytes < PAGE_BYTES:
            return compute
        alike = cache_bytes * small.cycle_bytes / max(1, mix.cycle_bytes)
        high = ladder_ceiling(alike, _COARSE)
        low = max(ladder_floor(alike, _COARSE), PAGE_BYTES)
        share = 0.0 if high <= low else math.log(alike / low) / math.log(high / low)
        rate = (1.0 - share) * self._small_rate(low) + share * self._small_rate(high)
        return compute + self.predictor.latency_s(rate) + rate * mix.cycle_bytes / self.space.rates.read_bytes_per_s

    def _small_rate(self, cache_bytes: int) -> float:
        if cache_bytes >= self.smallest.experts_bytes:
            return 0.0
        points = [self.predictor.point(self.smallest, cache_bytes, policy) for policy in self._policies]
        return min(one.misses / max(1, one.hits + one.misses) for one in points)

    def _policy_for(self, cache_bytes: int) -> str:
        """Return the policy that reads least with the smallest sizes at a coarse cache."""
        cache = ladder_ceiling(cache_bytes, _COARSE)
        if len(self._policies) == 1 or cache >= self.smallest.experts_bytes:
            return self._policies[0]
        return min(self._policies, key=lambda one: self.predictor.point(self.smallest, cache, one).decode_bytes)

    # --- the last touch ------------------------------------------------------------------------------------

    def _improved(self, best: Found | None, limits: Limits, goal: Goal) -> Found | None:
        if best is None or goal in {"first", "disk"}:
            return best
        with suppress(TooManyReplaysError):
            for _ in range(_ROUNDS if len(self.space.picks) <= EXACT_PICKS else 0):
                former = best
                for mix in self._exact_mixes(best, limits, goal):
                    best = self._better(best, mix, limits, goal) or best
                if best is former:
                    break
            best = self._touched(best, limits, goal)
        return best

    def _exact_mixes(self, best: Found, limits: Limits, goal: Goal) -> Iterator[Mix]:
        setting, traffic = best.setting, self.predictor.traffic(best.mix, best.setting)
        fixed = self.predictor.fixed_bytes(setting.chunk_tokens)
        used = float((self.space.use[:, None] * self.space.expert_bytes)[_rows(best.mix), best.mix.columns].sum())
        rate = traffic.bytes / used if used else 0.0
        memory = limits.memory_bytes
        scenes = []
        if not setting.resident:
            other_s = self.space.rates.other_token_s + self.predictor.latency_s(traffic.miss_rate)
            room = None if memory is None else memory - fixed - setting.cache_bytes
            scenes.append((Scene(setting.threads, rate, False, other_s), room))
        if memory is None or memory >= fixed + self.smallest.memory_bytes + self.smallest.experts_bytes:
            room = None if memory is None else memory - fixed
            scenes.append((Scene(setting.threads, 0.0, True, self.space.rates.other_token_s), room))
        for scene, room in scenes:
            answer = self._knapsack.solve(scene, goal, Room(limits.token_s, room, limits.disk_bytes, limits.kl))
            if answer.mix is not None:
                yield answer.mix

    def _touched(self, best: Found, limits: Limits, goal: Goal) -> Found:
        """Try the other policies and a cache that fills the budget more closely."""
        if best.setting.resident:
            return best
        settings = [replace(best.setting, policy=policy) for policy in self._policies]
        cache = self.cache_for(best.mix, best.setting.chunk_tokens, limits.memory_bytes, _FINE)
        if goal != "memory" and cache is not None and cache < best.mix.experts_bytes:
            settings.append(replace(best.setting, cache_bytes=cache))
        for setting in settings:
            found = self._measure(best.mix, setting, limits, goal)
            if found is not None and found.order < best.order:
                best = found
        return best

    # --- the proof -----------------------------------------------------------------------------------------

    def bound(self, limits: Limits, goal: Goal) -> float:
        """Return what no combination beats, over all threads: resident, or cached with the least wait.

        The cached half takes the smallest experts' misses at the largest cache that any mix leaves, so it rests
        on experts of more bytes never missing less often, and on the policies that were tried.
        """
        return min(self._bound_of(threads, limits, goal) for threads in self._threads)

    def _bound_of(self, threads: int, limits: Limits, goal: Goal) -> float:
        fixed = self.predictor.fixed_bytes(self._least_chunk())
        small, memory = self.smallest, limits.memory_bytes
        # no mix leaves more for experts than the smallest, but only one that leaves experts out waits at all
        room = math.inf if memory is None else memory - fixed - small.memory_bytes
        wait = 0.0
        if room < small.experts_bytes:
            with suppress(TooManyReplaysError):
                wait = self.least_wait_s(small, room, steps=_FINE)
        other_s = self.space.rates.other_token_s + wait
        cycle = self._least_needed_cache(threads, limits, goal)
        dense = None if memory is None else memory - fixed - cycle
        asked = Room(limits.token_s, dense, limits.disk_bytes, limits.kl)
        bound = relaxed_bound(self.space, threads, goal, asked, other_s)
        if len(self.space.picks) <= EXACT_PICKS:
            scene = Scene(threads, 0.0, False, other_s)
            bound = max(bound, self._knapsack.solve(scene, goal, asked).bound)
        return bound + fixed + cycle if goal == "memory" else bound

    def _least_needed_cache(self, threads: int, limits: Limits, goal: Goal) -> int:
        """Return a cache below which no mix keeps the time limit; at least one token cycle."""
        small = self.smallest
        caches = self._caches(small)
        if goal != "memory" or limits.token_s is None:
            return caches[0]
        other_s = self.space.rates.other_token_s
        compute = relaxed_bound(self.space, threads, "latency", Room(kl=limits.kl), other_s)
        with suppress(TooManyReplaysError):
            for cache in caches:
                if compute + self.least_wait_s(small, cache) <= _most(limits.token_s):
                    return cache
        return caches[0]


def _rows(mix: Mix) -> list[int]:
    return list(range(len(mix.columns)))


def _most(limit: float | None) -> float:
    return math.inf if limit is None else limit + 5e-10 * abs(limit) + 5e-13
