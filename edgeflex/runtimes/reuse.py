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
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.runtimes.replacement import ABSENT, RankedPolicy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Float64 = NDArray[np.float64]
    Ids = Sequence[int]
    Weights = Sequence[float] | None

HALF_LIVES = (0.5, 3.0, 16.0, 64.0, inf)
_MOST_AGE = 512  # steps since the last use; longer ago, and never, count alike
_LEAST = 1e-3  # of the average rate of use; nobody is taken for useless
_FADE = 0.9995  # of what was learned, each event
_PRIOR = 4.0  # events that what is assumed before anything is learned counts for


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
        self._later = 1.0 - 1.0 / max(1.0, horizon)
        self._keep = np.array([2.0 ** (-1.0 / half_life) for half_life in half_lives])[:, None]
        self._uses = np.zeros((layers, len(half_lives), experts))
        self._mass = np.zeros((layers, len(half_lives), 1))
        self._age = np.full((layers, experts), _MOST_AGE)
        self._aged = np.zeros((2, _MOST_AGE + 1))  # how often an age was met, and how often with a use
        count = len(half_lives) + 2
        self._weights = np.append(np.full(count - 1, 1.0 / (count - 1)), 0.0)
        self._products = _PRIOR * experts * np.eye(count)
        self._products[-1, -1] *= 1e-3  # the level is soon known, and must not be held down
        self._targets = self._products @ self._weights
        self._inputs = np.ones((layers, count, experts))
        self.rates: Float64 = np.full((layers, experts), self._base)
        for layer in range(layers):
            self._foretell(layer)

    def note(self, layer: int, experts: Ids, weights: Weights) -> None:
        """Learn from one event of a layer: what was used, and how it was foretold."""
        used = np.zeros(self.rates.shape[1])
        used[list(experts)] = self._amount(experts, weights)
        decayed = self._uses[layer]
        decayed *= self._keep
        decayed += used
        self._mass[layer] = self._mass[layer] * self._keep + 1.0
        self._grow_older(layer, used)
        before = self._inputs[layer].copy()
        self._describe(layer)
        self._products *= _FADE
        self._products += before @ (before - self._later * self._inputs[layer]).T
        self._targets *= _FADE
        self._targets += before @ used * ((1.0 - self._later) / self._base)
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

    def _grow_older(self, layer: int, used: Float64) -> None:
        """Count how often experts come again at their age (Beckmann et al., LHD, NSDI 2018), all layers together."""
        age = self._age[layer]
        self._aged[0] += np.bincount(age, minlength=_MOST_AGE + 1)
        self._aged[1] += np.bincount(age, weights=used, minlength=_MOST_AGE + 1)
        np.minimum(age + 1, _MOST_AGE, out=age)
        age[used > 0.0] = 0

    def _describe(self, layer: int) -> None:
        """Set the layer's inputs, in average rates of use: 1 is what the average expert has."""
        inputs, age = self._inputs[layer], self._age[layer]
        # as if one more step of average use had been seen
        np.divide(self._uses[layer] / self._base + 1.0, self._mass[layer] + 1.0, out=inputs[:-2])
        np.divide(self._aged[1, age] / self._base + 2.0, self._aged[0, age] + 2.0, out=inputs[-2])

    def _foretell(self, layer: int) -> None:
        foretold = self._weights @ self._inputs[layer]
        np.multiply(np.clip(foretold, _LEAST, 1.0 / self._base), self._base, out=self.rates[layer])


class ReusePolicy(RankedPolicy):
    """Evicts the expert with the fewest uses before it, nearer layers counted in; see ``ReuseForecast``, ``EnuPolicy``.

    Args:
        layers: Of the decoder.
        experts: Of a layer, at most.
        top_k: Experts that a token uses in a layer.
        horizon: Steps over which uses are foretold.
    """

    name = "reuse"

    def __init__(self, layers: int, experts: int, *, top_k: int, horizon: float = 8.0) -> None:
        super().__init__(layers, experts)
        self._forecast = ReuseForecast(layers, experts, top_k, horizon=horizon)
        self._count = 1.0
        self._ahead = np.zeros((layers, layers, 1))
        self._exists = np.ones((layers, experts), dtype=bool)

    def start(self, capacity_bytes: int, sizes: NDArray[np.int64]) -> None:
        """Learn which layers have experts; see ``Policy.start``."""
        super().start(capacity_bytes, sizes)
        self._exists = sizes > 0
        order = np.cumsum(sizes.any(axis=1)) - 1
        self._count = max(1.0, float(order[-1] + 1))
        self._ahead = ((order[None, :] - order[:, None] - 1) % self._count + 1.0)[:, :, None]
        self._rank[:] = self._count / self._forecast.rates

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
        wanted = np.where((self._mask == ABSENT) & self._exists, self._forecast.rates, -1.0).ravel()
        wanted[list(barred)] = -1.0
        count = min(count, wanted.size)
        best = np.argpartition(-wanted, count - 1)[:count]
        best = best[np.argsort(-wanted[best], kind="stable")]
        return [(int(key), float(wanted[key])) for key in best if wanted[key] > 0.0]

    def next_victims(self, layer: int, count: int, pinned: Ids = ()) -> list[tuple[int, float]]:
        """Return (key, rate) of the residents that would leave next, in this order; nothing leaves.

        Args:
            layer: Where the decoder is.
            count: How many.
            pinned: Keys that stay whatever happens.
        """
        self._score(layer)
        scores = self._scores.reshape(-1)
        scores[list(pinned)] = ABSENT
        count = min(count, scores.size)
        worst = np.argpartition(-scores, count - 1)[:count]
        worst = worst[np.argsort(-scores[worst], kind="stable")]
        rates = self._forecast.rates.reshape(-1)
        return [(int(key), float(rates[key])) for key in worst if scores[key] > ABSENT]

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Learn from the event; see ``Policy.use``."""
        del step, misses
        self._forecast.note(layer, experts, weights)
        np.divide(self._count, self._forecast.rates[layer], out=self._rows[layer][0])
        self._rerank(layer)

    def _score(self, layer: int) -> None:
        np.add(self._held, self._ahead[layer], out=self._scores)
