"""Policies that keep residents in queues and evict from their old ends."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from edgeflex.runtimes.replacement import QueuePolicy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Ids = Sequence[int]
    Weights = Sequence[float] | None


def _oldest(queue: Iterable[int], pinned: frozenset[int]) -> int | None:
    """Return the first key that may leave."""
    return next((key for key in queue if key not in pinned), None)


class _ByteQueue:
    """Keys from old to young, and how many bytes they have."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[int, int] = OrderedDict()
        self.total = 0

    def add(self, key: int, size: int) -> None:
        if key not in self.sizes:
            self.sizes[key] = size
            self.total += size

    def remove(self, key: int) -> None:
        self.total -= self.sizes.pop(key)

    def pop(self) -> int:
        key, size = self.sizes.popitem(last=False)
        self.total -= size
        return key


class LruPolicy(QueuePolicy):
    """Evicts what was used the longest ago, over all layers."""

    name = "lru"

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._queue: OrderedDict[int, None] = OrderedDict()

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Move the event to the young end, ascending, misses among the hits; see ``Policy.use``."""
        del step, weights, misses
        base = layer * self._experts
        queue = self._queue
        for expert in experts:
            queue[base + expert] = None
            queue.move_to_end(base + expert)

    def insert(self, layer: int, experts: Ids) -> None:
        """Add what no event has put there yet; see ``Policy.insert``."""
        base = layer * self._experts
        for expert in experts:
            self._queue[base + expert] = None

    def _victim(self, pinned: frozenset[int]) -> int:
        key = next(key for key in self._queue if key not in pinned)
        del self._queue[key]
        return key


class LayerLruPolicy(QueuePolicy):
    """Evicts the least recently used expert of the layer that holds the most bytes, pinned ones not counted."""

    name = "lru-layer"

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._queues = [_ByteQueue() for _ in range(layers)]

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Move the event to the young end of its layer, ascending; see ``Policy.use``."""
        del step, weights, misses
        base = layer * self._experts
        queue = self._queues[layer]
        for key in (base + expert for expert in experts):
            queue.add(key, self._sizes[key])
            queue.sizes.move_to_end(key)

    def insert(self, layer: int, experts: Ids) -> None:
        """Add what no event has put there yet; see ``Policy.insert``."""
        base = layer * self._experts
        for key in (base + expert for expert in experts):
            self._queues[layer].add(key, self._sizes[key])

    def _victim(self, pinned: frozenset[int]) -> int:
        free = [queue.total for queue in self._queues]
        for key in pinned:
            if key in self._queues[key // self._experts].sizes:
                free[key // self._experts] -= self._sizes[key]
        fullest = self._queues[free.index(max(free))]
        key = next(key for key in fullest.sizes if key not in pinned)
        fullest.remove(key)
        return key


class ArcPolicy(QueuePolicy):
    """Adaptive replacement: once-used and often-used residents, and ghosts of both that move the line between.

    Lists are measured in bytes, since experts differ in size; with equal sizes it is the published algorithm,
    except that an event's misses are all noted before any of them enters.
    """

    name = "arc"

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._once = _ByteQueue()
        self._often = _ByteQueue()
        self._once_ghosts = _ByteQueue()
        self._often_ghosts = _ByteQueue()
        self._target_bytes = 0.0
        self._returned: set[int] = set()

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Promote hits and learn from ghosts; see ``Policy.use``."""
        del step, weights
        base = layer * self._experts
        absent = set(misses)
        for expert in experts:
            if expert in absent:
                self._learn(base + expert)
            else:
                self._promote(base + expert)

    def _promote(self, key: int) -> None:
        if key in self._once.sizes:
            self._once.remove(key)
        else:
            self._often.remove(key)
        self._often.add(key, self._sizes[key])

    def _learn(self, key: int) -> None:
        """Move the line towards the list whose ghost was wanted."""
        once, often, size = self._once_ghosts, self._often_ghosts, self._sizes[key]
        if key in once.sizes:
            step = size * max(1.0, often.total / once.total)
            self._target_bytes = min(float(self._capacity_bytes), self._target_bytes + step)
            once.remove(key)
            self._returned.add(key)
        elif key in often.sizes:
            step = size * max(1.0, once.total / often.total)
            self._target_bytes = max(0.0, self._target_bytes - step)
            often.remove(key)
            self._returned.add(key)

    def insert(self, layer: int, experts: Sequence[int]) -> None:
        """Enter the often-used list if a ghost came back, else the other; see ``Policy.insert``."""
        base = layer * self._experts
        for key in (base + expert for expert in experts):
            known = key in self._returned
            self._returned.discard(key)
            for ghosts in (self._once_ghosts, self._often_ghosts):  # a prefetched expert was not learnt from
                if key in ghosts.sizes:
                    ghosts.remove(key)
            (self._often if known else self._once).add(key, self._sizes[key])
        self._trim()

    def _trim(self) -> None:
        """Keep once-used residents and ghosts within the capacity, and all four lists within twice that."""
        capacity = self._capacity_bytes
        while self._once_ghosts.sizes and self._once.total + self._once_ghosts.total > capacity:
            self._once_ghosts.pop()
        while self._often_ghosts.sizes and self._all_bytes() > 2 * capacity:
            self._often_ghosts.pop()

    def _all_bytes(self) -> int:
        return self._once.total + self._often.total + self._once_ghosts.total + self._often_ghosts.total

    def _victim(self, pinned: frozenset[int]) -> int:
        once, often = _oldest(self._once.sizes, pinned), _oldest(self._often.sizes, pinned)
        if often is None or (once is not None and self._once.total > self._target_bytes):
            source, ghosts, key = self._once, self._once_ghosts, once
        else:
            source, ghosts, key = self._often, self._often_ghosts, often
        key = _found(key)
        source.remove(key)
        ghosts.add(key, self._sizes[key])
        return key


def _found(key: int | None) -> int:
    if key is None:
        raise LookupError("no resident expert may leave; the cache promised that one does")
    return key


class S3FifoPolicy(QueuePolicy):
    """A small queue for newcomers, a main one for what was used twice more, ghosts of what left the small one.

    The small queue has a tenth of the bytes; ghosts have at most as many bytes as the main queue may.
    """

    name = "s3-fifo"
    _SMALL_SHARE = 0.1
    _MOST_USES = 3

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._small = _ByteQueue()
        self._main = _ByteQueue()
        self._ghosts = _ByteQueue()
        self._uses: dict[int, int] = {}

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Count uses of residents up to three; see ``Policy.use``."""
        del step, weights, misses
        base = layer * self._experts
        for key in (base + expert for expert in experts):
            if key in self._uses:
                self._uses[key] = min(self._MOST_USES, self._uses[key] + 1)

    def insert(self, layer: int, experts: Sequence[int]) -> None:
        """Enter the small queue, or the main one if a ghost came back; see ``Policy.insert``."""
        base = layer * self._experts
        for key in (base + expert for expert in experts):
            returned = key in self._ghosts.sizes
            if returned:
                self._ghosts.remove(key)
            (self._main if returned else self._small).add(key, self._sizes[key])
            self._uses[key] = 0

    def _victim(self, pinned: frozenset[int]) -> int:
        # every round either evicts, moves a key from small to main, or lowers a count: this ends
        while True:
            small, main = _oldest(self._small.sizes, pinned), _oldest(self._main.sizes, pinned)
            crowded = self._small.total >= self._SMALL_SHARE * self._capacity_bytes
            if main is None or (small is not None and crowded):
                victim = self._leave_small(_found(small))
            else:
                victim = self._leave_main(main)
            if victim is not None:
                return victim

    def _leave_small(self, key: int) -> int | None:
        self._small.remove(key)
        if self._uses[key] > 1:
            self._uses[key] = 0
            self._main.add(key, self._sizes[key])
            return None
        self._ghosts.add(key, self._sizes[key])
        while self._ghosts.total > (1.0 - self._SMALL_SHARE) * self._capacity_bytes:
            self._ghosts.pop()
        del self._uses[key]
        return key

    def _leave_main(self, key: int) -> int | None:
        self._main.remove(key)
        if self._uses[key] > 0:
            self._uses[key] -= 1
            self._main.add(key, self._sizes[key])
            return None
        del self._uses[key]
        return key


class SievePolicy(QueuePolicy):
    """One queue; a hand moves from old to young, spares what was used since it came by, evicts the first other."""

    name = "sieve"

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        # neighbours of each key, the end marker being the last place: next is younger, previous is older
        self._end = layers * experts
        self._younger = [self._end] * (self._end + 1)
        self._older = [self._end] * (self._end + 1)
        self._hand = self._end
        self._used: dict[int, bool] = {}

    def use(self, step: int, layer: int, experts: Ids, weights: Weights, misses: Ids) -> None:
        """Mark residents as used; see ``Policy.use``."""
        del step, weights, misses
        base = layer * self._experts
        for expert in experts:
            if base + expert in self._used:
                self._used[base + expert] = True

    def insert(self, layer: int, experts: Sequence[int]) -> None:
        """Add at the young end; see ``Policy.insert``."""
        base = layer * self._experts
        for key in (base + expert for expert in experts):
            youngest = self._older[self._end]
            self._younger[youngest] = self._older[self._end] = key
            self._older[key], self._younger[key] = youngest, self._end
            self._used[key] = False

    def _victim(self, pinned: frozenset[int]) -> int:
        key = self._hand
        while True:
            if key == self._end:
                key = self._younger[self._end]
            if key not in pinned:
                if not self._used[key]:
                    break
                self._used[key] = False
            key = self._younger[key]
        older, younger = self._older[key], self._younger[key]
        self._younger[older], self._older[younger] = younger, older
        self._hand = younger
        del self._used[key]
        return key
