"""Which experts the next layers will likely want.

Two ways of guessing: from what layers before them wanted together so far, or by running the next layers' routers
early, on the hidden state as it is now (Eliseev and Mazur 2023, section 3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from numpy.typing import NDArray

    class Guesser(Protocol):
        """Whom to ask what to read early."""

        def learn(self, layer: int, experts: NDArray[np.int32]) -> None:
            """Take notice of an event: ``[tokens, top_k]`` ids; events of a pass come in the order of the layers."""

        def predict(self, layer: int, experts: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
            """Return (layer, experts, the likeliest first) of layers after ``layer``, which uses ``experts``."""


class EarlyRouter:
    """Runs the routers of the next ``depth`` layers on what the present layer has.

    Args:
        layers: Numbers of the layers with experts, ascending.
        depth: How many layers ahead.
        guess: Returns the experts that a layer's router would choose now.
    """

    def __init__(self, layers: Sequence[int], depth: int, guess: Callable[[int], Sequence[int]]) -> None:
        self._layers = tuple(layers)
        self._depth = depth
        self._guess = guess

    def learn(self, layer: int, experts: NDArray[np.int32]) -> None:
        """Do nothing: routers know."""

    def predict(self, layer: int, experts: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        """Return (layer, experts) of the next layers; see ``Guesser``."""
        del experts
        place = self._layers.index(layer)
        return [(other, tuple(self._guess(other))) for other in self._layers[place + 1 : place + 1 + self._depth]]


class Predictor:
    """Counts of experts used together, ``depth`` layers ahead at most.

    Counts how often a token that used expert ``a`` in one layer used expert ``b`` so many layers later, and adds these
    counts up over the experts that the present token uses. Learned while running, prompts included.

    Args:
        layers: Numbers of the layers with experts, ascending.
        experts: Of a layer, at most.
        top_k: How many are predicted per layer.
        depth: How many layers ahead.
    """

    def __init__(self, layers: Sequence[int], experts: int, top_k: int, depth: int) -> None:
        self.depth = depth
        self._layers = tuple(layers)
        self._place = {layer: place for place, layer in enumerate(self._layers)}
        self._top_k = top_k
        # [distance - 1][place of the earlier layer, its expert, the later layer's expert]
        self._counts = [np.zeros((len(self._layers), experts, experts), dtype=np.float32) for _ in range(depth)]
        self._recent: list[NDArray[np.int32]] = []  # of this pass, the latest last

    def learn(self, layer: int, experts: NDArray[np.int32]) -> None:
        """Count one event; events of a pass come in the order of the layers.

        Args:
            layer: Its layer.
            experts: ``[tokens, top_k]`` ids.
        """
        place = self._place[layer]
        if place == 0 or len(self._recent) < min(place, self.depth):
            self._recent.clear()
        for distance, before in enumerate(reversed(self._recent), start=1):
            counts = self._counts[distance - 1][place - distance]
            np.add.at(counts, (before[:, :, None], experts[:, None, :]), 1.0)
        self._recent = [*self._recent[-(self.depth - 1) :], experts] if self.depth > 1 else [experts]

    def predict(self, layer: int, experts: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        """Return (layer, experts in falling order of likelihood) of the next layers.

        Args:
            layer: The present layer.
            experts: What it uses.
        """
        place = self._place[layer]
        found = []
        for distance in range(1, min(self.depth, len(self._layers) - 1 - place) + 1):
            score = self._counts[distance - 1][place][list(experts)].sum(axis=0)
            order = np.argsort(-score, kind="stable")[: self._top_k]
            likely = tuple(int(expert) for expert in order if score[expert] > 0)
            if likely:
                found.append((self._layers[place + distance], likely))
        return found
