"""The expert cache: which experts are resident, under a hard limit of bytes.

It holds ids and sizes, not weights; the runtime reads what it names and the simulator only counts, so both see
the same hits. Its unit is the *event*: the union of experts that one layer uses in one forward pass. An event is
atomic: all it needs is resident together, and nothing it needs leaves while it is present. Room is made before
anything enters, so that resident bytes never pass the limit, not even for a moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum, inf
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex.errors import InputError
from edgeflex.runtimes.replacement import RankedPolicy
from edgeflex.runtimes.stays import Stays
from edgeflex.schema_moe import DecoderCacheStats
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.policies import Policy
    from edgeflex.runtimes.stays import Occupancy

# A prefetched expert is settled when it was used or had to leave; before so many are, no rate is believed.
_PREFETCH_TRIAL = 64


class Outcome(NamedTuple):
    """What an event found.

    Attributes:
        hits: Experts that were resident, ascending.
        misses: Experts to be read, in this order; they count as resident from now on.
        evicted: (layer, expert) pairs that left, in order; their bytes may be overwritten.
    """

    hits: tuple[int, ...]
    misses: tuple[int, ...]
    evicted: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayerCounts:
    """Lookups per layer, ``[layers]`` each."""

    hits: tuple[int, ...]
    misses: tuple[int, ...]


class ExpertCache:
    """Keeps experts within ``capacity_bytes``; not safe to share between threads.

    Args:
        capacity_bytes: The limit, at least 1.
        sizes: ``[layers, experts]`` bytes that each expert takes when resident; 0 where there is none.
        policy: Chooses what leaves; serves this cache only.
        prefetch_worth: Least share of settled prefetched bytes that must have been used; below it prefetching stops.

    Raises:
        InputError: A size or the limit is impossible.
    """

    def __init__(
        self, capacity_bytes: int, sizes: NDArray[np.int64], policy: Policy, *, prefetch_worth: float = 0.5
    ) -> None:
        _check_sizes(capacity_bytes, sizes)
        self._capacity_bytes = capacity_bytes
        self._layers, self._experts = sizes.shape
        self._sizes: list[list[int]] = sizes.tolist()
        self._policy = policy
        policy.start(capacity_bytes, sizes)
        self._resident: list[set[int]] = [set() for _ in range(self._layers)]
        self._resident_bytes = 0
        self._learning_bytes = _learning_bytes(policy, capacity_bytes, int(sizes.sum()))
        self._peak_bytes = 0
        self._present: tuple[int, Sequence[int]] = (0, ())
        # [decoding][layer]; an all-hit event must cost no more than a few additions
        self._hits = [[0] * self._layers, [0] * self._layers]
        self._misses = [[0] * self._layers, [0] * self._layers]
        self._missed_bytes = [0, 0]
        self._evictions = 0
        self._stays = Stays(self._layers, self._experts)
        self._prefetch_worth = prefetch_worth
        self._prefetched: dict[int, int] = {}
        self._fetched_bytes = 0
        self._useful_bytes = 0
        self._settled_bytes = 0
        self._settled = 0
        self._stopped = False

    def event(
        self, step: int, layer: int, experts: Sequence[int], weights: Sequence[float] | None = None, *, decoding: bool
    ) -> Outcome:
        """Serve one event: say what is resident, make room for the rest and admit it.

        Args:
            step: Number of the forward pass, growing by one; the sub-events of a split event share it.
            layer: The layer.
            experts: The union that the pass's tokens use, ascending, each once.
            weights: Each expert's part of the router's weight (see ``union_of``), for policies that look at it.
            decoding: Whether the pass decodes; passes of a prompt are counted apart.

        Raises:
            InputError: An expert does not exist, or the event is larger than the cache (see ``split_event``).
        """
        resident = self._resident[layer]
        misses = [expert for expert in experts if expert not in resident]
        if misses:
            self._check_event(layer, experts)
        self._present = (layer, experts)
        self._stays.event(decoding=decoding)
        if self.learns:
            self._policy.use(step, layer, experts, weights, misses)
        if self._prefetched:
            self._settle_hits(layer, experts)
        self._hits[decoding][layer] += len(experts) - len(misses)
        if not misses:
            return Outcome(tuple(experts), (), ())
        self._misses[decoding][layer] += len(misses)
        sizes = self._sizes[layer]
        needed_bytes = sum([sizes[expert] for expert in misses])
        self._missed_bytes[decoding] += needed_bytes
        hits = tuple([expert for expert in experts if expert in resident])
        evicted = self._make_room(layer, experts, (), needed_bytes)
        self._admit(layer, misses, needed_bytes)
        return Outcome(hits, tuple(misses), evicted)

    def prefetch(self, step: int, layer: int, experts: Sequence[int]) -> Outcome:
        """Admit experts that may be needed soon, as far as room can be made.

        Nothing leaves that the present event or an earlier, still unused prefetch needs. An expert that does not
        fit is left out. Does nothing once prefetching has stopped because too little of it was used.

        Args:
            step: As in ``event``.
            layer: The layer that may need them.
            experts: In falling order of likelihood.

        Returns:
            What is resident already, what is to be read (ascending), and what left for it.

        Raises:
            InputError: An expert does not exist.
        """
        del step
        resident = self._resident[layer]
        wanted = [expert for expert in experts if expert not in resident]
        hits = tuple(sorted(expert for expert in experts if expert in resident))
        if self._stopped or not wanted:
            return Outcome(hits, (), ())
        self._check_known(layer, wanted)
        kept = [*self._keys(layer, hits), *self._prefetched]
        chosen = sorted(self._fitting(layer, wanted, kept))
        if not chosen:
            return Outcome(hits, (), ())
        needed_bytes = sum(self._sizes[layer][expert] for expert in chosen)
        evicted = self._make_room(self._present[0], self._present[1], kept, needed_bytes)
        self._admit(layer, chosen, needed_bytes)
        self._fetched_bytes += needed_bytes
        for expert in chosen:
            self._prefetched[layer * self._experts + expert] = self._sizes[layer][expert]
        return Outcome(hits, tuple(chosen), evicted)

    def __contains__(self, expert: tuple[int, int]) -> bool:
        """Whether (layer, expert) is resident."""
        return expert[1] in self._resident[expert[0]]

    def resident(self) -> Iterator[tuple[int, int]]:
        """Give every resident (layer, expert), ascending."""
        for layer, held in enumerate(self._resident):
            for expert in sorted(held):
                yield layer, expert

    @property
    def capacity_bytes(self) -> int:
        """The limit."""
        return self._capacity_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of what is resident now, never above the limit."""
        return self._resident_bytes

    @property
    def learns(self) -> bool:
        """Whether the policy is told of events that find all they need."""
        return self._resident_bytes < self._learning_bytes

    @property
    def prefetch_stopped(self) -> bool:
        """Whether prefetching has ended because too little of what it fetched was used."""
        return self._stopped

    def layer_counts(self, *, decoding: bool) -> LayerCounts:
        """Return the lookups of decoding, or of prompts, by layer."""
        return LayerCounts(tuple(self._hits[decoding]), tuple(self._misses[decoding]))

    def missed_bytes(self, *, decoding: bool) -> int:
        """Return the bytes that missed lookups had to read while decoding, or in prompts."""
        return self._missed_bytes[decoding]

    def occupancy(self) -> Occupancy:
        """Return how long each expert was resident while decoding, up to the last event."""
        return self._stays.read()

    def stats(self) -> DecoderCacheStats:
        """Return the counters so far. Layer counts and totals are of prompts and decoding together."""
        layer_hits = tuple(map(sum, zip(*self._hits, strict=True)))
        layer_misses = tuple(map(sum, zip(*self._misses, strict=True)))
        return DecoderCacheStats(
            policy=self._policy.name,
            capacity_bytes=self._capacity_bytes,
            peak_bytes=self._peak_bytes,
            hits=sum(layer_hits),
            misses=sum(layer_misses),
            evictions=self._evictions,
            read_bytes=sum(self._missed_bytes) + self._fetched_bytes,
            prefetch_fetched_bytes=self._fetched_bytes,
            prefetch_useful_bytes=self._useful_bytes,
            prefetch_stopped=self._stopped,
            decode_hits=sum(self._hits[True]),
            decode_misses=sum(self._misses[True]),
            decode_read_bytes=self._missed_bytes[True],
            layer_hits=layer_hits,
            layer_misses=layer_misses,
        )

    # --- inside ---------------------------------------------------------------------------------------

    def _keys(self, layer: int, experts: Sequence[int]) -> list[int]:
        base = layer * self._experts
        return [base + expert for expert in experts]

    def _make_room(
        self, layer: int, present: Sequence[int], kept: Sequence[int], needed_bytes: int
    ) -> tuple[tuple[int, int], ...]:
        """Evict until ``needed_bytes`` fit beside the ``present`` experts of ``layer`` and the ``kept`` keys."""
        excess_bytes = self._resident_bytes + needed_bytes - self._capacity_bytes
        if excess_bytes <= 0:
            return ()
        keys = self._policy.evict(layer, [*self._keys(layer, present), *kept], excess_bytes)
        evicted = tuple([divmod(key, self._experts) for key in keys])
        for of, expert in evicted:
            self._resident[of].remove(expert)
            self._resident_bytes -= self._sizes[of][expert]
        self._stays.left(keys)
        self._evictions += len(evicted)
        if self._prefetched:
            self._settle(keys, useful=False)
        return evicted

    def _admit(self, layer: int, experts: Sequence[int], needed_bytes: int) -> None:
        self._resident[layer].update(experts)
        self._stays.entered(self._keys(layer, experts))
        self._policy.insert(layer, experts)
        self._resident_bytes += needed_bytes
        self._peak_bytes = max(self._peak_bytes, self._resident_bytes)

    def _settle_hits(self, layer: int, experts: Sequence[int]) -> None:
        self._settle([key for key in self._keys(layer, experts) if key in self._prefetched], useful=True)

    def _settle(self, keys: Sequence[int], *, useful: bool) -> None:
        """Count what became of prefetched experts, and stop prefetching when too few of their bytes were used."""
        for key in keys:
            size = self._prefetched.pop(key, 0)
            self._settled_bytes += size
            self._settled += bool(size)
            self._useful_bytes += size * useful
        if self._settled >= _PREFETCH_TRIAL and self._useful_bytes < self._prefetch_worth * self._settled_bytes:
            self._stopped = True

    def _fitting(self, layer: int, wanted: Sequence[int], kept: Sequence[int]) -> list[int]:
        """Return those of ``wanted`` for which room can be made beside what stays, the likeliest first."""
        flat = {*self._keys(*self._present), *kept}
        room = self._capacity_bytes - sum(
            self._sizes[key // self._experts][key % self._experts] for key in flat if divmod(key, self._experts) in self
        )
        chosen = []
        for expert in dict.fromkeys(wanted):
            if self._sizes[layer][expert] <= room:
                chosen.append(expert)
                room -= self._sizes[layer][expert]
        return chosen

    def _check_known(self, layer: int, experts: Sequence[int]) -> None:
        sizes = self._sizes[layer]
        unknown = [expert for expert in experts if not 0 <= expert < self._experts or not sizes[expert]]
        if unknown:
            raise InputError(
                f"layer {layer} has no experts {unknown}; it has {sum(map(bool, sizes))} of {self._experts}. "
                "Replay a trace of the decoder that the sizes are of."
            )

    def _check_event(self, layer: int, experts: Sequence[int]) -> None:
        self._check_known(layer, experts)
        sizes = self._sizes[layer]
        total = sum([sizes[expert] for expert in experts])
        if total > self._capacity_bytes:
            raise InputError(
                f"an event of layer {layer} needs {len(experts)} experts, {format_bytes(total)}, at once and the cache "
                f"holds {format_bytes(self._capacity_bytes)}. Split it with split_event, or give the cache more."
            )


def _learning_bytes(policy: Policy, capacity_bytes: int, total_bytes: int) -> float:
    """Return below how many resident bytes a policy is told of events; queues are always, to know what they hold.

    Where nothing will leave, ranks are of no use; a policy that is asked by others too learns until all is there.
    """
    if not isinstance(policy, RankedPolicy):
        return inf
    return 0 if capacity_bytes >= total_bytes and not policy.foretells else total_bytes


def _check_sizes(capacity_bytes: int, sizes: NDArray[np.int64]) -> None:
    if sizes.ndim != 2 or not np.issubdtype(sizes.dtype, np.integer) or sizes.size == 0:
        raise InputError(
            f"expert sizes have the shape {sizes.shape} and type {sizes.dtype}; whole bytes [layers, experts] are "
            "needed."
        )
    if (sizes < 0).any():
        raise InputError(f"expert sizes reach down to {sizes.min()} bytes; none may be below 0.")
    if capacity_bytes < 1:
        raise InputError(f"expert cache of {capacity_bytes} bytes: at least 1 is needed. Give it room for one event.")


def split_event(
    experts: Sequence[int], sizes_of_layer: Sequence[int] | NDArray[np.int64], capacity_bytes: int
) -> list[tuple[int, ...]]:
    """Cut an event into the fewest runs of ascending experts that each fit the cache, each as large as fits.

    Args:
        experts: The event's union, ascending.
        sizes_of_layer: ``[experts]`` bytes of every expert of the layer.
        capacity_bytes: Of the cache.

    Raises:
        InputError: One expert alone is larger than the cache.
    """
    parts: list[list[int]] = []
    room = -1
    for expert in experts:
        size = int(sizes_of_layer[expert])
        if size > capacity_bytes:
            raise InputError(
                f"expert {expert} has {format_bytes(size)} and the cache {format_bytes(capacity_bytes)}: not even one "
                "fits. Give the cache more, or fewer bits to the experts."
            )
        if size > room:
            parts.append([])
            room = capacity_bytes
        parts[-1].append(expert)
        room -= size
    return [tuple(part) for part in parts]


def union_of(
    experts: NDArray[np.integer], weights: NDArray[np.floating] | None
) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """Return the union that an event uses, ascending, and each expert's part of the router's weight.

    Args:
        experts: ``[tokens, top_k]`` ids.
        weights: ``[tokens, top_k]``, or None when unknown.
    """
    if len(experts) == 1 and weights is None:
        return tuple(sorted(experts[0].tolist())), None
    if len(experts) == 1 and weights is not None:  # a decoded token: a tenth of the time, and the same bits
        union, parts = zip(*sorted(zip(experts[0].tolist(), weights[0].tolist(), strict=True)), strict=True)
        return union, parts_of_weight(parts)
    used = np.unique(experts)
    if weights is None:
        return tuple(used.tolist()), None
    # bincount adds in the order of tokens, so that engine and simulator get the same bits
    sums = np.bincount(experts.ravel(), weights=weights.ravel().astype(np.float64))
    return tuple(used.tolist()), parts_of_weight(sums[used].tolist())


def parts_of_weight(sums: Sequence[float]) -> tuple[float, ...] | None:
    """Return what part of the total each sum is, or None when the total is not a positive number."""
    total = fsum(sums)
    return tuple([one / total for one in sums]) if 0.0 < total < inf else None
