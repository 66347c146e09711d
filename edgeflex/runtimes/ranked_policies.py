"""Policies that rank every expert by one number and evict the largest rank first."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex.errors import InputError
from edgeflex.runtimes.replacement import RankedPolicy

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from numpy.typing import NDArray

    Ids = Sequence[int]
    Weights = Sequence[float] | None


_MOST_NOTED = 4096  # events; bounds the memory of a run that never evicts


class LfuPolicy(RankedPolicy):
    """Evicts what was used in the fewest events, resident or not at the time."""

    name = "lfu"

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Count; see ``Policy.use``."""
        del step, weights, misses
        self._rows[layer][0][list(experts)] -= 1.0
        self._rerank(layer)


class DecayedLfuPolicy(RankedPolicy):
    """Evicts the smallest sum of uses that halve every ``half_life`` steps.

    Counts grow by ``2 ** (step / half_life)`` instead of fading, which ranks alike and touches only what is used.
    """

    name = "decayed-lfu"
    _RESCALE = 512.0

    def __init__(self, layers: int, experts: int, half_life: float = 32.0) -> None:
        super().__init__(layers, experts)
        self._half_life = half_life
        self._base_step = 0.0

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Count; see ``Policy.use``."""
        del weights, misses
        exponent = (step - self._base_step) / self._half_life
        while exponent > self._RESCALE:  # a power of two changes no order
            self._rank *= 2.0**-self._RESCALE
            np.add(self._rank, self._mask, out=self._held)
            self._base_step += self._RESCALE * self._half_life
            exponent -= self._RESCALE
        self._rows[layer][0][list(experts)] -= 2.0**exponent
        self._rerank(layer)


class LfruPolicy(RankedPolicy):
    """Evicts the smallest ``uses / (steps since the last + 1)`` (tinyserve; vLLM #37190)."""

    name = "lfru"

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._uses = np.zeros((layers, experts))
        self._last = np.full((layers, experts), -1.0)
        self._step = 0

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Count and stamp; see ``Policy.use``."""
        del weights, misses
        self._step = max(self._step, step)  # so that no age is ever negative
        chosen = list(experts)
        self._uses[layer, chosen] += 1.0
        self._last[layer, chosen] = self._step

    def _score(self, layer: int) -> None:
        del layer
        np.subtract(self._last, self._step + 1.0, out=self._scores)
        np.divide(self._uses, self._scores, out=self._scores)
        np.add(self._scores, self._mask, out=self._scores)


class Lru2Policy(RankedPolicy):
    """Evicts the oldest second-last use; what was used once goes first, the longest unused before others."""

    name = "lru-2"
    _ONCE = 2.0**50

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._rank.fill(2 * self._ONCE)
        self._last = np.full((layers, experts), -self._ONCE)
        self._event = 0

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Shift the last use to second last; see ``Policy.use``."""
        del step, weights, misses
        chosen = list(experts)
        before = self._last[layer, chosen]
        # once used: above every second-last use, ordered by that one use
        self._rank[layer, chosen] = np.where(before < 0, self._ONCE - self._event, -before)
        self._last[layer, chosen] = self._event
        self._event += 1
        self._rerank(layer)


class MrsPolicy(RankedPolicy):
    """Evicts the smallest ``S``, where ``S <- alpha * top(s) + (1 - alpha) * S`` each step (HybriMoE, section 4).

    ``s`` is each chosen expert's part of the router's weight; where it is unknown all have the same.
    """

    name = "mrs"

    def __init__(self, layers: int, experts: int, alpha: float = 0.5) -> None:
        super().__init__(layers, experts)
        self._alpha = alpha
        self._steps = [-1] * layers

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Fade the layer's scores and add the event's; see ``Policy.use``."""
        del misses
        rank = self._rows[layer][0]
        if step != self._steps[layer]:  # the parts of a split event fade the layer once
            self._steps[layer] = step
            rank *= 1.0 - self._alpha
        scores = np.full(len(experts), 1.0 / len(experts)) if weights is None else np.asarray(weights)
        rank[list(experts)] -= self._alpha * scores
        self._rerank(layer)


class _Noted(NamedTuple):
    """One event that the means have not been moved by yet."""

    step: int
    layer: int
    experts: Ids
    weights: Weights


class EnuPolicy(RankedPolicy):
    """Evicts the expert whose next use is estimated to be the furthest.

    ``next(e) = d + n * (1 - p) / p`` layers from now: ``d`` counts until the expert's layer comes again (1..n, n
    layers with experts), and ``p``, the chance to be used when it does, is ``mix`` of a fast and the rest of a slow
    running mean of its use per step. It needs no training, and stands in for Belady's knowledge of the future with
    the one part of it that is always known: the order of the layers.

    A step with one token counts as a use ``1 - tilt + tilt * top_k * share``, ``share`` being the expert's part of
    the router's weight: who was chosen clearly is likelier to be chosen again. A step with more experts than
    ``top_k`` had many tokens and counts as the mean of them, about ``top_k * share``.

    Args:
        layers: Of the decoder.
        experts: Of a layer, at most.
        top_k: Experts that a token uses in a layer; 0 when unknown: then every step counts as one token.
        half_lives: In steps, of the fast and the slow mean.
        mix: Part of the fast mean.
        prior: Where both means start.
        tilt: How much the router's weight counts.
    """

    name = "enu"

    def __init__(
        self,
        layers: int,
        experts: int,
        *,
        top_k: int = 0,
        half_lives: tuple[float, float] = (4.0, 64.0),
        mix: float = 0.3,
        prior: float = 0.03,
        tilt: float = 0.4,
    ) -> None:
        super().__init__(layers, experts)
        self._top_k = top_k
        self._tilt = tilt
        self._prior = prior
        keep = [2.0 ** (-1.0 / half_life) for half_life in half_lives]
        self._keep = keep[0], keep[1]
        self._gain = mix * (1.0 - keep[0]), (1.0 - mix) * (1.0 - keep[1])
        # both means are kept multiplied with their part of p, so that p is their sum
        both = np.full((layers, experts), mix * prior), np.full((layers, experts), (1.0 - mix) * prior)
        self._flat_means = [means.reshape(-1) for means in both]
        self._means = list(zip(*both, strict=True))
        self._steps = [-1] * layers
        self._noted: list[_Noted] = []
        self._ahead = np.zeros((layers, layers, 1))
        self._count = 1.0

    def start(self, capacity_bytes: int, sizes: NDArray[np.int64]) -> None:
        """Learn which layers have experts; see ``Policy.start``."""
        super().start(capacity_bytes, sizes)
        order = np.cumsum(sizes.any(axis=1)) - 1
        self._count = max(1.0, float(order[-1] + 1))
        # [now, of, 1]: one column of distances per present layer, ready to be added to the ranks
        self._ahead = ((order[None, :] - order[:, None] - 1) % self._count + 1.0)[:, :, None]
        self._rank.fill(self._count / self._prior)

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Note the event; the means move when they are asked for, so that hits cost next to nothing."""
        del misses
        self._noted.append(_Noted(step, layer, experts, weights))
        if len(self._noted) >= _MOST_NOTED:
            self._catch_up()

    def _catch_up(self) -> None:
        """Move the means by what was noted, in order, and rank the layers concerned anew."""
        together: dict[int, _Noted] = {}
        for noted in self._noted:
            if noted.layer in together:  # events of different layers do not touch each other
                self._move(together.values())
                together = {}
            together[noted.layer] = noted
        self._move(together.values())
        # n (1 - p) / p without its constant -n, which changes no order
        for layer in {noted.layer for noted in self._noted}:
            fast, slow = self._means[layer]
            rank, mask, held = self._rows[layer]
            np.add(fast, slow, out=rank)
            np.divide(self._count, rank, out=rank)
            np.add(rank, mask, out=held)
        self._noted.clear()

    def _move(self, events: Collection[_Noted]) -> None:
        """Move the means of some layers by one event each."""
        keys: list[int] = []
        amounts: list[float] = []
        for step, layer, experts, weights in events:
            if step != self._steps[layer]:  # the parts of a split event fade the layer once
                self._steps[layer] = step
                for means, keep in zip(self._means[layer], self._keep, strict=True):
                    np.multiply(means, keep, means)
            keys += [layer * self._experts + expert for expert in experts]
            amounts += self._uses(experts, weights)
        where, uses = np.array(keys, dtype=np.intp), np.array(amounts)
        for means, gain in zip(self._flat_means, self._gain, strict=True):
            means[where] += gain * uses

    def _uses(self, experts: Ids, weights: Weights) -> list[float]:
        """Return how much of a use this step is, for each expert."""
        top_k = self._top_k or len(experts)
        if weights is None:
            return [top_k / len(experts) if len(experts) > top_k else 1.0] * len(experts)
        if len(experts) > top_k:
            return [min(1.0, top_k * weight) for weight in weights]
        tilt, rest = self._tilt * top_k, 1.0 - self._tilt
        return [tilt * weight + rest for weight in weights]

    def _score(self, layer: int) -> None:
        self._catch_up()
        np.add(self._held, self._ahead[layer], out=self._scores)


class StaticPolicy(RankedPolicy):
    """Evicts by a fixed order of worth, what is not in it first.

    Args:
        layers: Of the decoder.
        experts: Of a layer, at most.
        order: (layer, expert) pairs, the most valuable first.
    """

    name = "static"

    def __init__(self, layers: int, experts: int, order: Iterable[tuple[int, int]]) -> None:
        super().__init__(layers, experts)
        self._rank.fill(float(layers * experts))
        for place, (layer, expert) in enumerate(order):
            if not (0 <= layer < layers and 0 <= expert < experts):
                raise InputError(
                    f"static order: expert ({layer}, {expert}) at place {place} is outside {layers} layers of "
                    f"{experts} experts. Give (layer, expert) pairs of this decoder."
                )
            self._rank[layer, expert] = place

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Learn nothing."""


class RandomPolicy(RankedPolicy):
    """Evicts at random, every resident equally likely."""

    name = "random"

    def __init__(self, layers: int, experts: int, seed: int = 0) -> None:
        super().__init__(layers, experts)
        self._draw = np.random.default_rng(seed)

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Learn nothing."""

    def _score(self, layer: int) -> None:
        del layer
        self._draw.random(out=self._scores)
        np.add(self._scores, self._mask, out=self._scores)


class NextUsePolicy(RankedPolicy):
    """Belady's forced admission: evicts the next use that is furthest away, for a future that is known.

    Args:
        layers: Of the decoder.
        experts: Of a layer, at most.
        next_uses: Per event of the replay, for each of its experts the number of the next event that uses it
            (infinity: none), in the order of the events.
    """

    name = "belady"

    def __init__(self, layers: int, experts: int, next_uses: Iterable[NDArray[np.float64]]) -> None:
        super().__init__(layers, experts)
        self._next_uses = iter(next_uses)

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Look up when these come again; see ``Policy.use``."""
        del step, weights, misses
        self._rows[layer][0][list(experts)] = next(self._next_uses)
        self._rerank(layer)
