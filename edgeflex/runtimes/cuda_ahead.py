"""What uploads are worth beyond the event that asks for them, and copies made ahead of any.

A policy that foretells uses says how often each expert will be used in the next passes. An expert that is
likelier than the one that would leave for it saves the processor's time later; the scheduler counts that as the worth
of its upload. Between events the link copies what gains most, so that room on the device does not stay empty.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.curves import Curves
    from edgeflex.runtimes.reuse import ReusePolicy
    from edgeflex.runtimes.schedule import Active
    from edgeflex.runtimes.strategies import AheadCache

    Key = tuple[int, int]

HORIZON = 4.0  # passes over which an expert's higher rate of use counts
MOST_AHEAD = 4  # copies between two events; demand waits behind them
_STEPS, _MOST_STEPS = 3, 6  # worth in parts of what a hit saves, so coarse that few shapes of events differ


class Ahead:
    """Worth and order of uploads, and what to copy next; of tiers whose upper policy is ``policy``.

    Args:
        cache: The tiers.
        policy: Of the upper one.
        sizes: ``[layers, experts]`` bytes.
    """

    def __init__(self, cache: AheadCache, policy: ReusePolicy, sizes: NDArray[np.int64]) -> None:
        self._cache = cache
        self._policy = policy
        self._experts = sizes.shape[1]
        self._largest = int(sizes.max())
        self._sizes: dict[Key, int] = {
            (layer, expert): int(sizes[layer, expert]) for layer, expert in np.ndindex(*sizes.shape)
        }
        self._victims: list[float] = []

    def ranked(self, layer: int, active: Sequence[Active], curves: Curves) -> list[Active]:
        """Return an event's experts, the likeliest to be used again first, each with the worth of its upload."""
        rates = self._policy.rates
        found = sorted(active, key=lambda one: (-rates[one.key], one.key))
        missing = [one for one in found if one.place != "gpu"]
        count = len(missing) + MOST_AHEAD
        free_bytes = self._cache.vram.capacity_bytes - self._cache.vram.resident_bytes
        self._victims = [0.0] * min(count, free_bytes // self._largest)
        if len(self._victims) < count:
            pinned = [self._number(one.key) for one in found]
            self._victims += [rate for _, rate in self._policy.next_victims(layer, count, pinned)]
        saved_s = curves.cpu_s(1)
        worth = {
            one.key: _worth_s(rates[one.key] - victim, saved_s)
            for one, victim in zip(missing, self._victims, strict=False)
        }
        return [replace(one, worth_s=worth.get(one.key, 0.0)) for one in found]

    def wanted(self, uploaded: Sequence[Key], seconds: float, curves: Curves) -> list[Key]:
        """Return experts in RAM that are worth a copy now, the likeliest first.

        Args:
            uploaded: What the event uploads.
            seconds: Until the next event wants the link.
            curves: Costs.
        """
        copy_s = curves.link_s(self._largest)
        count = min(MOST_AHEAD, int(seconds / copy_s) + 1)
        # what the processor loses beside a copy, over what a hit saves it
        beside_s = copy_s * (1.0 - 1.0 / curves.cpu_beside_link)
        least = beside_s / (HORIZON * max(curves.cpu_s(1), 1e-9))
        likely = self._policy.likeliest_absent(count, [self._number(key) for key in uploaded])
        found = []
        for (number, rate), victim in zip(likely, self._victims[len(uploaded) :], strict=False):
            key = divmod(number, self._experts)
            if rate - victim > least and self._cache.place(*key) == "ram":
                found.append(key)
        return found

    def fits(self, key: Key, present: Collection[Key]) -> bool:
        """Return whether room can be made for an expert beside those of ``present`` that are on the device."""
        held = sum(self._sizes[one] for one in present if one in self._cache.vram)
        return self._sizes[key] + held <= self._cache.vram.capacity_bytes

    def bring(self, layer: int, key: Key, present: Collection[Key]) -> tuple[Key, ...]:
        """Count an expert as copied, and return what leaves the device for it; ``present`` stays, and it fits."""
        return self._cache.bring(layer, key, self._policy, [self._number(one) for one in present])

    def _number(self, key: Key) -> int:
        return key[0] * self._experts + key[1]


def _worth_s(gain: float, saved_s: float) -> float:
    return saved_s / _STEPS * min(int(max(0.0, gain) * HORIZON * _STEPS), _MOST_STEPS)
