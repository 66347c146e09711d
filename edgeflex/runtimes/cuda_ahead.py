"""What uploads are worth beyond the event that asks for them, and copies made ahead of any.

A policy that foretells uses says how often each expert will be used in the next passes. An expert that is
likelier than the one that would leave for it saves the processor's time later; the scheduler counts that as the worth
of its upload. Between events the link copies what gains most, so that room on the device does not stay empty.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.runtimes.ahead_time import Worth
from edgeflex.runtimes.timeline import Active
from edgeflex.runtimes.virtual import HORIZON

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.curves import Curves
    from edgeflex.runtimes.reuse import ReusePolicy
    from edgeflex.runtimes.strategies import AheadCache

    Key = tuple[int, int]

MOST_AHEAD = 4  # copies between two events; demand waits behind them


class Ahead:
    """Worth and order of uploads, and what to copy next; of tiers whose upper policy is ``policy``.

    Args:
        cache: The tiers.
        policy: Of the upper one.
        sizes: ``[layers, experts]`` bytes.

    Attributes:
        link_price: Later seconds that each second of the link saves if it copies ahead, as ``wanted`` last found.
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
        self._worth: tuple[Curves, Worth] | None = None
        self.link_price = 0.0

    def ranked(self, layer: int, active: Sequence[Active], curves: Curves) -> list[Active]:
        """Return an event's experts, the likeliest to be used again first, each with the worth of its upload.

        Args:
            layer: Of the event.
            active: Its experts, worth nothing yet.
            curves: Costs.
        """
        rate_of, keys = self._policy.rates[layer].item, [one.key for one in active]
        order = sorted([(-rate_of(key[1]), key, i) for i, key in enumerate(keys)])
        found = [active[i] for _, _, i in order]
        missing = [(i, -rate) for i, (rate, _, _) in enumerate(order) if found[i].place != "gpu"]
        count = len(missing) + MOST_AHEAD
        free_bytes = self._cache.vram.capacity_bytes - self._cache.vram.resident_bytes
        self._victims = [0.0] * min(count, free_bytes // self._largest)
        if len(self._victims) < count:
            pinned = [self._number(key) for key in keys]
            self._victims += [rate for _, rate in self._policy.next_victims(layer, count, pinned)]
        worth = self._worth_on(curves)
        for (i, rate), victim in zip(missing, self._victims, strict=False):
            worth_s = worth.seconds(rate - victim)
            if worth_s:
                one = found[i]
                found[i] = Active(one.key, one.rows, one.size_bytes, one.place, one.kind, one.ram_copy, worth_s)
        return found

    def wanted(self, uploaded: Sequence[Key], seconds: float, curves: Curves) -> list[Key]:
        """Return experts in RAM that are worth a copy now, the likeliest first.

        Args:
            uploaded: What the event uploads.
            seconds: Until the next event wants the link.
            curves: Costs.
        """
        worth, victims = self._worth_on(curves), self._victims[len(uploaded) :]
        count = min(MOST_AHEAD, int(seconds / worth.copy_s) + 1)
        if self._policy.likeliest_rate() - min(victims, default=inf) <= worth.least_gain:
            self.link_price = 0.0
            return []  # none gains more than the likeliest over the least of the victims
        likely = self._policy.likeliest_absent(count, [self._number(key) for key in uploaded])
        found, gains = [], []
        for (number, rate), victim in zip(likely, victims, strict=False):
            key = divmod(number, self._experts)
            if rate - victim > worth.least_gain and self._cache.place(*key) == "ram":
                found.append(key)
                gains.append(rate - victim)
        self.link_price = worth.link_price(gains)
        return found

    def fits(self, key: Key, present: Collection[Key]) -> bool:
        """Return whether room can be made for an expert beside those of ``present`` that are on the device."""
        vram = self._cache.vram
        if self._largest * (len(present) + 1) <= vram.capacity_bytes:
            return True
        held = sum([self._sizes[one] for one in present if one in vram])
        return self._sizes[key] + held <= vram.capacity_bytes

    def bring(self, layer: int, key: Key, present: Collection[Key]) -> tuple[Key, ...]:
        """Count an expert as copied, and return what leaves the device for it; ``present`` stays, and it fits."""
        return self._cache.bring(layer, key, self._policy, [self._number(one) for one in present])

    def _worth_on(self, curves: Curves) -> Worth:
        """Return what experts are worth on these curves, which seldom change."""
        if self._worth is None or self._worth[0] is not curves:
            self._worth = curves, Worth.of(curves, self._largest, HORIZON)
        return self._worth[1]

    def _number(self, key: Key) -> int:
        return key[0] * self._experts + key[1]
