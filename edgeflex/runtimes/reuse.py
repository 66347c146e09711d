"""Foretells how often each expert will be used in the coming steps, and ranks experts by it.

Decoders differ in how they route: some keep their experts from token to token, some have favourites, some change
them with the subject, some come round to them. Here running means of several half-lives, and the rate of use at each
age since the last use, are weighed so that they foretell the uses to come, later ones counted less: a value learned
by least squares from temporal differences (Bradtke and Barto, Machine Learning 22, 1996). A value over a horizon, and
not the chance of the next step, is what an expert's place in the cache is worth. Nothing is trained beforehand, and
nothing but the past is used.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex.errors import InputError
from edgeflex.runtimes.replacement import ABSENT, RankedPolicy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]
    Ids = Sequence[int]
    Weights = Sequence[float] | None
    Keys = Sequence[int] | NDArray[np.intp]

HALF_LIVES = (0.5, 3.0, 16.0, 64.0, inf)
_MOST_AGE = 512  # steps since the last use; longer ago, and never, count alike
_LEAST = np.array(1e-3)  # of the average rate of use; nobody is taken for useless
_FADE = np.array(0.9995)  # of what was learned, each event
_PRIOR = 4.0  # events that what is assumed before anything is learned counts for
_ONE, _TWO, _STEP, _OLDEST = np.array(1.0), np.array(2.0), np.array(1), np.array(_MOST_AGE)


class _Layer(NamedTuple):
    """One layer's part of the forecast's matrices; views made once, since indexing costs as much as the arithmetic.

    ``mass`` is as wide as ``uses``, though its columns are alike: arrays of one shape are computed in half the time.
    """

    uses: Float64
    mass: Float64
    age: NDArray[np.int64]
    rates: Float64


class _Inputs(NamedTuple):
    """What a layer's experts are foretold from, ``[inputs, experts]``, and its parts."""

    matrix: Float64
    means: Float64
    at_age: Float64


class ReuseForecast:
    """Rates of use to come, ``[layers, experts]``, uses per step.

    Args:
        layers: Of the decoder.
        experts: Of a layer, at most.
        top_k: Experts that a token uses in a layer.
        horizon: In steps: a use ``n`` steps from now counts ``(1 - 1 / horizon) ** (n - 1)``; 1 looks at the next only.
        half_lives: In steps, of the running means; infinity is the plain mean.
    """

    def __init__(
        self, layers: int, experts: int, top_k: int, *, horizon: float = 8.0, half_lives: Sequence[float] = HALF_LIVES
    ) -> None:
        self._top_k = max(1, top_k)
        self._base = min(0.5, self._top_k / experts)
        later = 1.0 - 1.0 / max(1.0, horizon)
        # numbers as arrays, which spares their conversion in each of a thousand events a second
        self._per_base, self._later = np.array(self._base), np.array(later)
        self._gain, self._most = np.array((1.0 - later) / self._base), np.array(1.0 / self._base)
        keep = [2.0 ** (-1.0 / half_life) for half_life in half_lives]
        self._keep = np.repeat(np.array(keep)[:, None], experts, axis=1)
        self._aged = np.zeros((2, _MOST_AGE + 1))  # how often an age was met, and how often with a use
        self._met, self._met_used = self._aged
        count = len(half_lives) + 2
        self._weights = np.append(np.full(count - 1, 1.0 / (count - 1)), 0.0)
        self._products = _PRIOR * experts * np.eye(count)
        self._products[-1, -1] *= 1e-3  # the level is soon known, and must not be held down
        self._targets = self._products @ self._weights
        self.rates: Float64 = np.full((layers, experts), self._base)
        uses, mass = np.zeros((2, layers, len(half_lives), experts))
        age = np.full((layers, experts), _MOST_AGE)
        self._layers = [_Layer(*parts) for parts in zip(uses, mass, age, self.rates, strict=True)]
        # one more than there are layers: what is foretold next is written where the layer before it was
        self._inputs = [_Inputs(one, one[:-2], one[-2]) for one in np.ones((layers + 1, count, experts))]
        self._ones, self._total = np.ones(experts), np.empty((len(half_lives), experts))
        self._used = np.zeros(experts)
        self._change = np.empty((count, experts))
        for layer in range(layers):
            self._foretell(layer)

    def note(self, layer: int, experts: Ids, weights: Weights) -> None:
        """Learn from one event of a layer: what was used, and how it was foretold.

        Called for every event of a decoder, so that it makes few arrays and no views.
        """
        chosen, amount, used = np.array(experts, dtype=np.intp), self._amount(experts, weights), self._used
        used.fill(0.0)
        used[chosen] = amount
        uses, mass, age, _ = self._layers[layer]
        np.multiply(uses, self._keep, uses)
        np.add(uses, used, uses)
        np.multiply(mass, self._keep, mass)
        np.add(mass, _ONE, mass)
        self._grow_older(age, chosen, whole=len(experts) <= self._top_k)
        before = self._inputs[layer].matrix
        self._describe(layer)
        change, products, targets = self._change, self._products, self._targets
        np.multiply(self._inputs[layer].matrix, self._later, change)
        np.subtract(before, change, change)
        np.multiply(products, _FADE, products)
        np.add(products, before.dot(change.T), products)
        np.multiply(targets, _FADE, targets)
        np.add(targets, before.dot(used) * self._gain, targets)
        if layer == 0:
            self._weights = np.linalg.solve(self._products, self._targets)
        self._foretell(layer)

    def _amount(self, experts: Ids, weights: Weights) -> float | Float64:
        """Return the share of the event's tokens that used each expert, as far as it is known."""
        if len(experts) <= self._top_k:
            return 1.0
        if weights is None:
            return self._top_k / len(experts)
        return np.minimum(1.0, self._top_k * np.array(weights))

    def _grow_older(self, age: NDArray[np.int64], chosen: NDArray[np.intp], *, whole: bool) -> None:
        """Count how often experts come again at their age (Beckmann et al., LHD, NSDI 2018), all layers together."""
        used = self._used
        np.add(self._met, np.bincount(age, self._ones, _MOST_AGE + 1), self._met)
        if whole:  # sums of ones are exact in any order
            for at in age[chosen].tolist():
                self._met_used[at] += 1.0
        else:
            self._met_used += np.bincount(age, used, _MOST_AGE + 1)
            chosen = np.flatnonzero(used)
        np.add(age, _STEP, age)
        np.minimum(age, _OLDEST, out=age)
        age[chosen] = 0

    def _describe(self, layer: int) -> None:
        """Set the layer's inputs, in average rates of use: 1 is what the average expert has; the old ones are spare."""
        found, self._inputs[layer] = self._inputs[layer], self._inputs[-1]
        self._inputs[-1] = found
        uses, mass, age, _ = self._layers[layer]
        _, means, at_age = self._inputs[layer]
        # as if one more step of average use had been seen
        np.divide(uses, self._per_base, means)
        np.add(means, _ONE, means)
        np.add(mass, _ONE, self._total)
        np.divide(means, self._total, means)
        met = self._met[age]
        np.add(met, _TWO, met)
        np.divide(self._met_used[age], self._per_base, at_age)
        np.add(at_age, _TWO, at_age)
        np.divide(at_age, met, at_age)

    def _foretell(self, layer: int) -> None:
        rates = self._layers[layer].rates
        self._weights.dot(self._inputs[layer].matrix, rates)
        np.maximum(rates, _LEAST, out=rates)
        np.minimum(rates, self._most, out=rates)
        np.multiply(rates, self._per_base, rates)


class _Row(NamedTuple):
    """One layer's part of the policy's matrices."""

    rank: Float64
    mask: Float64
    held: Float64
    rates: Float64
    outside: Float64
    absent: Float64
    idle: Float64


class Peaks:
    """The largest numbers of a matrix whose rows change one at a time; its owner says which.

    The largest of each row is kept, so that only rows that matter are looked at, one after the other. Of equal numbers
    the first of the lowest row counts as larger, whatever the machine.

    Args:
        values: ``[rows, columns]``; kept, not copied.
    """

    def __init__(self, values: Float64) -> None:
        self._values = values
        self._flat = values.reshape(-1)
        self._rows = list(values)
        self._best = values.max(axis=1)
        self._stale: set[int] = set()
        self._width = values.shape[1]

    def change(self, row: int) -> None:
        """Say that a row is not what it was."""
        self._stale.add(row)

    def largest(self, count: int, barred: Ids = (), added: Float64 | None = None) -> tuple[list[int], list[float]]:
        """Return flat places and numbers of the ``count`` largest that are not ``ABSENT``, the largest first.

        Args:
            count: How many, at least 1.
            barred: Flat places to leave out.
            added: ``[rows]``, added to every number of a row.
        """
        best = self._current()
        heads = best.copy() if added is None else best + added
        seen: dict[int, Float64] = {}
        for place in barred:
            if self._flat.item(place) > ABSENT:
                row, at = divmod(place, self._width)
                if row not in seen:
                    seen[row] = self._seen(row, added)
                seen[row][at] = ABSENT
        for row, numbers in seen.items():
            heads[row] = numbers.item(numbers.argmax())
        places, found = list[int](), list[float]()
        while len(found) < count:
            row = int(heads.argmax())
            number = heads.item(row)
            if number == ABSENT:
                break
            if row not in seen:
                seen[row] = self._seen(row, added)
            numbers = seen[row]
            at = int(numbers.argmax())
            places.append(row * self._width + at)
            found.append(number)
            numbers[at] = ABSENT
            heads[row] = numbers.item(numbers.argmax())
        return places, found

    def top(self) -> float:
        """Return the largest of all."""
        best = self._current()
        return best.item(best.argmax())

    def _seen(self, row: int, added: Float64 | None) -> Float64:
        """Return a row as it is asked for, to be written."""
        return self._rows[row].copy() if added is None else self._rows[row] + added[row]

    def _current(self) -> Float64:
        if self._stale:
            for row in self._stale:
                numbers = self._rows[row]
                self._best[row] = numbers.item(numbers.argmax())  # a sixth of the time of max
            self._stale.clear()
        return self._best


class ReusePolicy(RankedPolicy):
    """Evicts the expert with the fewest uses before it, nearer layers counted in; see ``ReuseForecast``, ``EnuPolicy``.

    Args:
        layers: Of the decoder.
        experts: Of a layer, at most.
        top_k: Experts that a token uses in a layer.
        horizon: Steps over which uses are foretold.
    """

    name = "reuse"
    foretells = True

    def __init__(self, layers: int, experts: int, *, top_k: int, horizon: float = 8.0) -> None:
        super().__init__(layers, experts)
        self._forecast = ReuseForecast(layers, experts, top_k, horizon=horizon)
        self._count = np.array(1.0)
        self._distances = list(np.zeros((layers, layers)))
        self._largest_bytes = 1
        self._compete(np.ones((layers, experts), dtype=bool))

    def start(self, capacity_bytes: int, sizes: NDArray[np.int64]) -> None:
        """Learn which layers have experts; see ``Policy.start``."""
        super().start(capacity_bytes, sizes)
        order = np.cumsum(sizes.any(axis=1)) - 1
        self._count = np.array(max(1.0, float(order[-1] + 1)))
        self._distances = list((order[None, :] - order[:, None] - 1) % self._count + 1.0)
        self._rank[:] = self._count / self._forecast.rates
        self._largest_bytes = int(sizes.max())
        self._compete(sizes > 0)

    def _compete(self, exists: NDArray[np.bool_]) -> None:
        """Begin with nothing resident: who may leave, and who may come."""
        self._outside = np.where(exists, 0.0, ABSENT)  # 0 where an absent expert is
        self._absent = self._forecast.rates + self._outside
        # ranks of residents without those that the present event uses, which all who ask would leave out
        self._idle = np.full_like(self._held, ABSENT)
        self._present, self._present_layer = frozenset[int](), -1
        self._leaving, self._coming = Peaks(self._idle), Peaks(self._absent)
        self._parts = [
            _Row(*ranks, *rest)
            for ranks, *rest in zip(
                self._rows, self._forecast.rates, self._outside, self._absent, self._idle, strict=True
            )
        ]

    @property
    def rates(self) -> Float64:
        """``[layers, experts]``: uses per step that each has before it; not to be written."""
        return self._forecast.rates

    def likeliest_absent(self, count: int, barred: Ids = ()) -> list[tuple[int, float]]:
        """Return (key, rate) of the absent experts that are the likeliest to be used, the likeliest first.

        Args:
            count: How many.
            barred: Keys to leave out.
        """
        return list(zip(*self._coming.largest(count, barred), strict=True))

    def likeliest_rate(self) -> float:
        """Return the rate of the likeliest absent expert; ``ABSENT`` where all are resident."""
        return self._coming.top()

    def next_victims(self, layer: int, count: int, pinned: Ids = ()) -> list[tuple[int, float]]:
        """Return (key, rate) of the residents that would leave next, in this order; nothing leaves.

        Args:
            layer: Where the decoder is.
            count: How many.
            pinned: Keys that stay whatever happens.
        """
        keys, _ = self._leavers(pinned).largest(count, pinned, self._distances[layer])
        return list(zip(keys, self._forecast.rates.take(keys).tolist(), strict=True)) if keys else []

    def evict(self, layer: int, pinned: Keys, excess_bytes: int) -> list[int]:
        """Choose the largest ranks; see ``Policy.evict``."""
        victims: list[int] = []
        kept = pinned if isinstance(pinned, list) else [*map(int, pinned)]
        while excess_bytes > 0:
            least = -(-excess_bytes // self._largest_bytes)
            found, _ = self._leavers(kept).largest(least, [*kept, *victims], self._distances[layer])
            if not found:
                raise InputError(f"{excess_bytes} bytes more must leave and nothing may. Keep fewer experts in place.")
            victims += found
            excess_bytes -= sum([self._sizes[key] for key in found])
        self.release(victims)
        return victims

    def _leavers(self, pinned: Ids) -> Peaks:
        """Return who may leave, for somebody who keeps ``pinned``."""
        if self._present and not self._present.issubset(pinned):
            self._pass()
        return self._leaving

    def _pass(self) -> None:
        """Let what the last event used compete again."""
        row = self._parts[self._present_layer]
        row.idle[:] = row.held
        self._leaving.change(self._present_layer)
        self._present = frozenset()

    def insert(self, layer: int, experts: Ids) -> None:
        """Let these compete from now on; see ``Policy.insert``."""
        row, base = self._parts[layer], layer * self._experts
        for expert in experts:  # few: one number after the other is quicker than arrays of them
            row.mask[expert] = 0.0
            row.held[expert] = row.rank[expert]
            row.outside[expert] = row.absent[expert] = ABSENT
            if base + expert not in self._present:
                row.idle[expert] = row.held[expert]
        self._leaving.change(layer)
        self._coming.change(layer)

    def release(self, keys: Ids) -> None:
        """Forget that these are resident; see ``RankedPolicy.release``."""
        for key in keys:
            layer, expert = divmod(key, self._experts)
            row = self._parts[layer]
            row.mask[expert] = row.held[expert] = row.idle[expert] = ABSENT
            row.outside[expert] = 0.0
            row.absent[expert] = row.rates[expert]
            self._leaving.change(layer)
            self._coming.change(layer)

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Learn from the event; see ``Policy.use``."""
        del step, misses
        self._forecast.note(layer, experts, weights)
        if self._present:
            self._pass()
        row, base = self._parts[layer], layer * self._experts
        np.divide(self._count, row.rates, row.rank)
        np.add(row.rank, row.mask, row.held)
        np.add(row.rates, row.outside, row.absent)
        row.idle[:] = row.held
        for expert in experts:
            row.idle[expert] = ABSENT
        self._present, self._present_layer = frozenset([base + expert for expert in experts]), layer
        self._leaving.change(layer)
        self._coming.change(layer)

    def _score(self, layer: int) -> None:
        np.add(self._held, self._distances[layer][:, None], out=self._scores)
