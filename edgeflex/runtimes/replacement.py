"""What the expert cache asks of a replacement policy, and the two ways to answer: by rank and by queue.

An expert's *key* is ``layer * experts + expert``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Ids = Sequence[int]
    Weights = Sequence[float] | None
    Keys = Sequence[int] | NDArray[np.intp]

ABSENT = -np.inf  # rank of what is not resident


class Policy(ABC):
    """What the cache asks. One object serves one cache; ``start`` is called once, before anything else."""

    name: ClassVar[str]
    foretells: ClassVar[bool] = False  # whether others ask it too, beside the cache that it serves

    def __init__(self, layers: int, experts: int) -> None:
        self._layers = layers
        self._experts = experts
        self._sizes: list[int] = []
        self._capacity_bytes = 0

    def start(self, capacity_bytes: int, sizes: NDArray[np.int64]) -> None:
        """Learn the cache's bytes and each expert's, ``sizes`` being ``[layers, experts]``."""
        self._capacity_bytes = capacity_bytes
        self._sizes = [int(size) for size in sizes.ravel()]

    @abstractmethod
    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Note an event before room is made for it.

        Args:
            step: Number of the forward pass; the sub-events of a split event share it.
            layer: The layer.
            experts: What the event uses, ascending.
            weights: Each expert's part of the router's weight in the whole event (see ``union_of``), or None.
            misses: Those of ``experts`` that are not resident.
        """

    @abstractmethod
    def insert(self, layer: int, experts: Sequence[int]) -> None:
        """Note that these experts, ascending, are resident from now on."""

    @abstractmethod
    def evict(self, layer: int, pinned: Keys, excess_bytes: int) -> list[int]:
        """Choose what leaves and forget that it was resident.

        Args:
            layer: Where the decoder is.
            pinned: Keys that stay whatever happens.
            excess_bytes: How much must leave at least; the caller has made sure that so much may.

        Returns:
            Keys in the order of leaving; no shorter head of them frees enough.
        """


class RankedPolicy(Policy):
    """Evicts the largest rank first. ``_rank`` ``[layers, experts]`` holds every expert's, ``_held`` the residents'."""

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._rank = np.zeros((layers, experts))
        self._mask = np.full((layers, experts), ABSENT)
        self._held = np.full((layers, experts), ABSENT)
        self._scores = np.empty((layers, experts))
        # views made once: indexing a matrix by row costs as much as the arithmetic on the row
        self._rows = [tuple(rows) for rows in zip(self._rank, self._mask, self._held, strict=True)]

    def insert(self, layer: int, experts: Sequence[int]) -> None:
        """Let these compete from now on."""
        chosen = list(experts)
        rank, mask, held = self._rows[layer]
        mask[chosen] = 0.0
        held[chosen] = rank[chosen]

    def _rerank(self, layer: int) -> None:
        """Show a layer's changed ranks to the next choice."""
        rank, mask, held = self._rows[layer]
        np.add(rank, mask, out=held)

    def _score(self, layer: int) -> None:
        """Fill ``_scores`` with the ranks of residents as seen from ``layer``, -inf elsewhere."""
        del layer
        np.copyto(self._scores, self._held)

    def evict(self, layer: int, pinned: Keys, excess_bytes: int) -> list[int]:
        """Choose the largest ranks; see ``Policy.evict``."""
        self._score(layer)
        scores = self._scores.reshape(-1)
        scores[pinned] = ABSENT
        victims: list[int] = []
        while excess_bytes > 0:
            # the first of equal ranks is the lowest (layer, expert)
            victim = int(scores.argmax())
            scores[victim] = ABSENT
            victims.append(victim)
            excess_bytes -= self._sizes[victim]
        self.release(victims)
        return victims

    def release(self, keys: Ids) -> None:
        """Forget that these are resident; somebody else chose them."""
        chosen = list(keys)
        self._mask.reshape(-1)[chosen] = ABSENT
        self._held.reshape(-1)[chosen] = ABSENT

    def residents(self) -> NDArray[np.intp]:
        """Return the keys of all residents, ascending."""
        return np.flatnonzero(self._mask.reshape(-1) == 0.0)


class QueuePolicy(Policy):
    """Evicts one victim after another until enough bytes are free."""

    def evict(self, layer: int, pinned: Keys, excess_bytes: int) -> list[int]:
        """Ask for victims one by one; see ``Policy.evict``."""
        del layer
        kept = frozenset(pinned)
        victims: list[int] = []
        while excess_bytes > 0:
            victim = self._victim(kept)
            victims.append(victim)
            excess_bytes -= self._sizes[victim]
        return victims

    @abstractmethod
    def _victim(self, pinned: frozenset[int]) -> int:
        """Take one resident key that is not pinned out of the queues."""
