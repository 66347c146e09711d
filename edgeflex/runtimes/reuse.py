"""Foretells how likely each expert is to be used when its layer comes again, and ranks experts by it.

Decoders differ in how they route: some keep their experts from token to token, some have favourites, some change
them with the subject. One half-life fits one of them. Here running means of several half-lives are mixed in the
logistic domain with weights that learn from every event how well each mean foretold it (Mahoney, *Adaptive Weighing
of Context Models*, 2005). Nothing is trained beforehand, and nothing but the past is used.
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
_LEAST = 1e-4  # no chance is ever taken for nothing or for certain


class ReuseForecast:
    """Chances of use, ``[layers, experts]``.

    Args:
        layers: Of the decoder.
        experts: Of a layer, at most.
        top_k: Experts that a token uses in a layer.
        half_lives: In steps, of the running means; infinity is the plain mean.
        rate: How fast the mixture learns (AdaGrad's step; Duchi et al., JMLR 2011).
    """

    def __init__(
        self, layers: int, experts: int, top_k: int, *, half_lives: Sequence[float] = HALF_LIVES, rate: float = 0.05
    ) -> None:
        self._top_k = max(1, top_k)
        base = min(0.5, self._top_k / experts)
        self._keep = np.array([2.0 ** (-1.0 / half_life) for half_life in half_lives])[:, None]
        self._uses = np.zeros((layers, len(half_lives), experts))
        self._mass = np.zeros((layers, len(half_lives), 1))
        self._base = base
        self._weights = np.full(len(half_lives) + 1, 1.0 / len(half_lives))
        self._weights[-1] = 0.0
        self._slopes = np.full(len(half_lives) + 1, 1.0)
        self._rate = rate
        self._inputs = np.ones((layers, len(half_lives) + 1, experts))
        self.chances: Float64 = np.full((layers, experts), base)
        for layer in range(layers):
            self._foretell(layer)

    def note(self, layer: int, experts: Ids, weights: Weights) -> None:
        """Learn from one event: first how good the forecast was, then what was used."""
        used = np.zeros(self.chances.shape[1])
        used[list(experts)] = self._amount(experts, weights)
        self._learn(layer, used)
        decayed = self._uses[layer]
        decayed *= self._keep
        decayed += used
        self._mass[layer] = self._mass[layer] * self._keep + 1.0
        self._foretell(layer)

    def _amount(self, experts: Ids, weights: Weights) -> float | Float64:
        """Return the share of the event's tokens that used each expert, as far as it is known."""
        if len(experts) <= self._top_k:
            return 1.0
        if weights is None:
            return self._top_k / len(experts)
        return np.minimum(1.0, self._top_k * np.array(weights))

    def _learn(self, layer: int, used: Float64) -> None:
        inputs = self._inputs[layer]
        slope = inputs @ (used - self.chances[layer])
        self._slopes += slope * slope
        self._weights += self._rate * slope / np.sqrt(self._slopes)

    def _foretell(self, layer: int) -> None:
        # as if one more step of average use had been seen, so that the unused are not taken for useless
        means = np.clip((self._uses[layer] + self._base) / (self._mass[layer] + 1.0), _LEAST, 1.0 - _LEAST)
        inputs = self._inputs[layer]
        np.log(means / (1.0 - means), out=inputs[:-1])
        odds = np.exp(np.clip(self._weights @ inputs, -9.0, 9.0))
        np.divide(odds, 1.0 + odds, out=self.chances[layer])


class ReusePolicy(RankedPolicy):
    """Evicts the expert whose next use is foretold to be the furthest; see ``ReuseForecast`` and ``EnuPolicy``.

    Args:
        layers: Of the decoder.
        experts: Of a layer, at most.
        top_k: Experts that a token uses in a layer.
    """

    name = "reuse"

    def __init__(self, layers: int, experts: int, *, top_k: int) -> None:
        super().__init__(layers, experts)
        self._forecast = ReuseForecast(layers, experts, top_k)
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
        self._rank[:] = self._count / self._forecast.chances

    @property
    def chances(self) -> Float64:
        """``[layers, experts]``: how likely each is used when its layer comes again; not to be written."""
        return self._forecast.chances

    def likeliest_absent(self, count: int, barred: Ids = ()) -> list[tuple[int, float]]:
        """Return (key, chance) of the absent experts that are the likeliest to be used, the likeliest first.

        Args:
            count: How many.
            barred: Keys to leave out.
        """
        wanted = np.where((self._mask == ABSENT) & self._exists, self._forecast.chances, -1.0).ravel()
        wanted[list(barred)] = -1.0
        count = min(count, wanted.size)
        best = np.argpartition(-wanted, count - 1)[:count]
        best = best[np.argsort(-wanted[best], kind="stable")]
        return [(int(key), float(wanted[key])) for key in best if wanted[key] > 0.0]

    def next_victims(self, layer: int, count: int, pinned: Ids = ()) -> list[float]:
        """Return the chances of the residents that would leave next, in this order; nothing leaves.

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
        return [float(self._forecast.chances.reshape(-1)[key]) for key in worst if scores[key] > ABSENT]

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Learn from the event; see ``Policy.use``."""
        del step, misses
        self._forecast.note(layer, experts, weights)
        np.divide(self._count, self._forecast.chances[layer], out=self._rows[layer][0])
        self._rerank(layer)

    def _score(self, layer: int) -> None:
        np.add(self._held, self._ahead[layer], out=self._scores)
