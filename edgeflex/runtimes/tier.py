"""One tier of several: the expert cache, asked and filled in two steps, handing experts up and down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import InputError
from edgeflex.runtimes.expert_cache import ExpertCache
from edgeflex.runtimes.replacement import RankedPolicy
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.replacement import Policy

    Int64 = NDArray[np.int64]
    Pair = tuple[int, int]
    Keys = Sequence[int] | NDArray[np.intp]


class Tier(ExpertCache):
    """An expert cache whose misses enter when it is told, and which may hand experts to another."""

    def __init__(self, capacity_bytes: int, sizes: Int64, policy: Policy) -> None:
        super().__init__(capacity_bytes, sizes, policy)
        self._ranked = isinstance(policy, RankedPolicy)
        self._step = 0
        self._decoding = False
        self._found: list[int] = []

    def look(
        self,
        step: int,
        layer: int,
        experts: Sequence[int],
        weights: Sequence[float] | None,
        *,
        decoding: bool,
        above: Sequence[int] = (),
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return hits and misses of an event; ``above``, what the tier above has, counts as neither."""
        resident = self._resident[layer]
        found = [expert for expert in experts if expert in resident]
        lacking = [expert for expert in experts if expert not in resident] if len(found) < len(experts) else []
        if lacking:
            self._check_known(layer, lacking)
        hits = tuple([expert for expert in found if expert not in above] if above else found)
        misses = tuple([expert for expert in lacking if expert not in above] if above else lacking)
        self._step, self._decoding, self._present = step, decoding, (layer, experts)
        self._stays.event(decoding=decoding)
        self._found = found
        if self._ranked and self._resident_bytes < self._learning_bytes:
            self._policy.use(step, layer, experts, weights, misses)
        self._hits[decoding][layer] += len(hits)
        self._misses[decoding][layer] += len(misses)
        return hits, misses

    def admit(self, experts: Sequence[int], kept: Tier | tuple[()] = ()) -> tuple[Pair, ...]:
        """Let some misses of the last look in, ascending; ``kept`` holds what must not leave. Return what left."""
        if not experts and self._ranked:
            return ()
        layer = self._present[0]
        sizes = self._sizes[layer]
        needed_bytes = sum([sizes[expert] for expert in experts])
        excess_bytes = self._resident_bytes + needed_bytes - self._capacity_bytes
        pinned: Keys = self._pinned(experts, kept) if excess_bytes > 0 else []
        if not self._ranked:
            # a queue holds residents only, so that it is told what enters before it is told of the event
            self._policy.use(self._step, layer, sorted((*self._found, *experts)), None, experts)
        if not experts:
            return ()
        evicted: tuple[Pair, ...] = ()
        if excess_bytes > 0:
            evicted = self._drop(self._policy.evict(layer, pinned, excess_bytes))
            self._evictions += len(evicted)
        self._missed_bytes[self._decoding] += needed_bytes
        self._admit(layer, experts, needed_bytes)
        return evicted

    def load(self, layer: int, expert: int) -> bool:
        """Let one in if there is room without eviction, and say whether there was."""
        self._check_known(layer, (expert,))
        size = self._sizes[layer][expert]
        if self._resident_bytes + size > self._capacity_bytes:
            return False
        self._admit(layer, (expert,), size)
        return True

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """Let go of residents that move to the tier above; a policy lets go only of what it may choose."""
        if not experts:
            return
        leaving = self._keys(layer, experts)
        if isinstance(self._policy, RankedPolicy):
            self._policy.release(leaving)
        else:
            staying = [key for key in self._resident_keys() if key not in leaving]
            self._policy.evict(layer, staying, sum([self._sizes[layer][expert] for expert in experts]))
        self._drop(leaving)

    def take(self, pairs: Sequence[Pair]) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
        """Take in what the tier above gives back, as far as the policy prefers it to what is here.

        Returns:
            What entered, and what left for it.
        """
        layer, experts = self._present
        for of, expert in pairs:
            self._policy.insert(of, (expert,))
        given_bytes = sum([self._sizes[of][expert] for of, expert in pairs])
        excess_bytes = self._resident_bytes + given_bytes - self._capacity_bytes
        leaving = self._policy.evict(layer, self._keys(layer, experts), excess_bytes) if excess_bytes > 0 else []
        refused = set(leaving) & {of * self._experts + expert for of, expert in pairs}
        evicted = self._drop([key for key in leaving if key not in refused])
        self._evictions += len(evicted)
        entered = tuple([(of, expert) for of, expert in pairs if of * self._experts + expert not in refused])
        for of, expert in entered:
            self._resident[of].add(expert)
            self._resident_bytes += self._sizes[of][expert]
        self._stays.entered([of * self._experts + expert for of, expert in entered])
        self._peak_bytes = max(self._peak_bytes, self._resident_bytes)
        return entered, evicted

    def _pinned(self, experts: Sequence[int], kept: Tier | tuple[()]) -> Keys:
        """Return the keys of the event and of ``kept``, having checked that there is room for these together."""
        layer, present = self._present
        sizes, keys = self._sizes[layer], self._keys(layer, present)
        pinned: Keys = keys
        if isinstance(kept, tuple):
            total = sum([sizes[expert] for expert in {*self._found, *experts}])
        else:
            beside = [expert for expert in {*self._found, *experts} if (layer, expert) not in kept]
            total = kept.resident_bytes + sum([sizes[expert] for expert in beside])
            # ranks are masked by an array at once; queues look every key up
            pinned = np.append(kept.keys(), keys) if self._ranked else [*kept.keys().tolist(), *keys]
        if total > self._capacity_bytes:
            raise InputError(
                f"an event of layer {layer} with {len(present)} experts needs {format_bytes(total)} in one tier at "
                f"once and that holds {format_bytes(self._capacity_bytes)}. Split the event, or give the tier more."
            )
        return pinned

    def keys(self) -> NDArray[np.intp]:
        """Return ``layer * experts + expert`` of every resident, in any order."""
        if isinstance(self._policy, RankedPolicy):
            return self._policy.residents()
        return np.array(self._resident_keys(), dtype=np.intp)

    def _drop(self, keys: Sequence[int]) -> tuple[Pair, ...]:
        pairs = tuple([divmod(key, self._experts) for key in keys])
        for of, expert in pairs:
            self._resident[of].remove(expert)
            self._resident_bytes -= self._sizes[of][expert]
        self._stays.left(keys)
        return pairs

    def _resident_keys(self) -> list[int]:
        return [of * self._experts + expert for of, held in enumerate(self._resident) for expert in held]
