"""One expert cache over three tiers: VRAM above RAM above flash, each with a hard limit of bytes.

Both tiers are the ``ExpertCache`` with its policies; what is new is that a miss of VRAM need not enter. A scheduler
decides for each event which missing experts are uploaded and which the CPU computes where they are, so an event has
two halves: ``event`` says where each expert is and brings those on flash into RAM, ``admit`` tells VRAM what comes in.
Everything stays event-atomic: nothing that the event needs leaves a tier before the next event.

    inclusive   RAM keeps a copy of all that VRAM holds. Leaving VRAM moves no bytes; RAM must be larger than VRAM.
    exclusive   an uploaded expert leaves RAM, and what leaves VRAM goes back to RAM if RAM's policy wants to keep it.
                Both tiers together hold different experts, for the price of copies back to the host.

Without a RAM tier (0 bytes) misses of VRAM are read from flash straight into it, and the cache is that of two tiers:
the same counters as ``replay``. Uploads and copies back go through transfer buffers that no budget here counts.

Policies that rank every expert (``enu``, ``lfu`` ...) are told of all that an event uses in every tier; those that
keep queues (``lru``, ``arc`` ...) of what is in their own tier only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from edgeflex.errors import InputError
from edgeflex.runtimes.expert_cache import split_event
from edgeflex.runtimes.policies import DEFAULT_POLICY, Policy, make_policy
from edgeflex.runtimes.replay import static_order
from edgeflex.runtimes.tier import Tier
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.runtimes.expert_cache import ExpertCache
    from edgeflex.runtimes.reuse import ReusePolicy
    from edgeflex.runtimes.timeline import Place
    from edgeflex.runtimes.trace import Trace, TraceEvent
    from edgeflex.schema_moe import DecoderCacheStats

    Int64 = NDArray[np.int64]
    Pair = tuple[int, int]


class TierOutcome(NamedTuple):
    """Where an event's experts are; ids of its layer, ascending unless said.

    Attributes:
        gpu_hits: In VRAM.
        ram_hits: Not in VRAM, in RAM.
        flash_misses: In neither: to be read from flash, into RAM where there is a RAM tier (they count as resident
            there from now on).
        to_vram: Those of the misses that VRAM can take in together, the largest weights first where not all fit.
        evicted_ram: (layer, expert) pairs that left RAM for the flash misses, in order.
    """

    gpu_hits: tuple[int, ...]
    ram_hits: tuple[int, ...]
    flash_misses: tuple[int, ...]
    to_vram: tuple[int, ...]
    evicted_ram: tuple[Pair, ...]

    @property
    def misses(self) -> tuple[int, ...]:
        """Experts that are not in VRAM, ascending."""
        return tuple(sorted((*self.ram_hits, *self.flash_misses)))


class Admission(NamedTuple):
    """What uploads of an event changed; (layer, expert) pairs in order.

    Attributes:
        evicted_vram: Left VRAM; their bytes may be overwritten, after the copies back of ``demoted``.
        demoted: Those of ``evicted_vram`` that entered RAM, exclusive tiers only.
        evicted_ram: Left RAM for ``demoted``.
    """

    evicted_vram: tuple[Pair, ...]
    demoted: tuple[Pair, ...]
    evicted_ram: tuple[Pair, ...]


@dataclass(frozen=True)
class TierCounts:
    """Lookups by where the expert was found, and what moved between tiers.

    Attributes:
        gpu_hits: Lookups that found their expert in VRAM.
        ram_hits: In RAM.
        flash_misses: In neither.
        flash_bytes: Read from flash.
        uploads: Experts that entered VRAM.
        upload_bytes: Their bytes.
        demotions: Experts copied from VRAM back to RAM.
        demoted_bytes: Their bytes.
    """

    gpu_hits: int = 0
    ram_hits: int = 0
    flash_misses: int = 0
    flash_bytes: int = 0
    uploads: int = 0
    upload_bytes: int = 0
    demotions: int = 0
    demoted_bytes: int = 0

    @property
    def lookups(self) -> int:
        """In all."""
        return self.gpu_hits + self.ram_hits + self.flash_misses


class TieredCache:
    """Where every expert is; not safe to share between threads.

    Args:
        vram_bytes: Limit of VRAM, at least 1.
        ram_bytes: Limit of RAM; 0: there is no RAM tier.
        sizes: ``[layers, experts]`` bytes, in every tier alike; 0 where there is no expert.
        policy: Of VRAM: a name of ``POLICIES``, or a policy that has served no cache yet.
        ram_policy: Of RAM, likewise; None takes the same name as VRAM's, or the default where that is no name.
        exclusive: Whether RAM keeps no copy of what VRAM holds.
        top_k: Experts that a token uses in a layer; see ``make_policy``.
        seed: For ``random``.
        static: For ``static``.

    Raises:
        InputError: A size or a limit is impossible, a policy unknown, or an inclusive RAM too small for its copies.
    """

    def __init__(
        self,
        vram_bytes: int,
        ram_bytes: int,
        sizes: Int64,
        policy: str | Policy = DEFAULT_POLICY,
        ram_policy: str | Policy | None = None,
        *,
        exclusive: bool = False,
        top_k: int = 0,
        seed: int = 0,
        static: Sequence[Pair] | None = None,
    ) -> None:
        def tier(capacity_bytes: int, chosen: str | Policy) -> Tier:
            if isinstance(chosen, str):
                layers, experts = sizes.shape
                chosen = make_policy(chosen, layers=layers, experts=experts, top_k=top_k, seed=seed, static=static)
            return Tier(capacity_bytes, sizes, chosen)

        _check_budgets(vram_bytes, ram_bytes, sizes, exclusive=exclusive)
        same = policy if isinstance(policy, str) else DEFAULT_POLICY
        self._vram = tier(vram_bytes, policy)
        self._ram = tier(ram_bytes, ram_policy or same) if ram_bytes else None
        self._sizes: list[list[int]] = sizes.tolist()
        self._exclusive = exclusive
        self._part_bytes = _part_bytes(vram_bytes, ram_bytes, int(sizes.sum()), exclusive=exclusive)
        # [decoding][field of TierCounts]; plain additions, since this is on the way of every event
        self._tally = [[0] * 8, [0] * 8]
        # the event that admit belongs to: its layer, what it misses in VRAM, whether it decodes
        self._open: tuple[int, frozenset[int], bool] | None = None

    def event(
        self, step: int, layer: int, experts: Sequence[int], weights: Sequence[float] | None = None, *, decoding: bool
    ) -> TierOutcome:
        """Say where an event's experts are, and make those on flash resident in RAM.

        An earlier event that no ``admit`` has closed had nothing uploaded.

        Args:
            step: Number of the forward pass, growing by one; the sub-events of a split event share it.
            layer: The layer.
            experts: The union that the pass's tokens use, ascending, each once.
            weights: Each expert's part of the router's weight (see ``union_of``), or None.
            decoding: Whether the pass decodes; passes of a prompt are counted apart.

        Raises:
            InputError: An expert does not exist, or RAM cannot hold what the event needs (see ``parts``).
        """
        if self._open is not None:
            self._close()
        gpu_hits, misses = self._vram.look(step, layer, experts, weights, decoding=decoding)
        ram_hits, flash, evicted = self._below(step, layer, experts, weights, gpu_hits, misses, decoding=decoding)
        tally = self._tally[decoding]
        tally[0] += len(gpu_hits)
        tally[1] += len(ram_hits)
        if flash:
            sizes = self._sizes[layer]
            tally[2] += len(flash)
            tally[3] += sum([sizes[expert] for expert in flash])
        self._open = (layer, frozenset(misses), decoding)
        return TierOutcome(gpu_hits, ram_hits, flash, self._fitting(layer, experts, weights, misses), evicted)

    def admit(self, experts: Iterable[int]) -> Admission:
        """Tell VRAM which misses of the last event come in; to be called before the copies start, once an event.

        Args:
            experts: Ids of the event's layer; a scheduler may choose any of its misses that fit together.

        Raises:
            InputError: There is no open event, an expert is no miss of it, or VRAM cannot hold them beside its hits.
        """
        chosen = tuple(sorted(set(experts)))
        layer, decoding = self._opened(chosen)
        evicted = self._vram.admit(chosen)
        self._open = None
        demoted, evicted_ram = self._exchange(layer, chosen, evicted)
        if chosen:
            tally = self._tally[decoding]
            tally[4] += len(chosen)
            tally[5] += sum([self._sizes[layer][expert] for expert in chosen])
            tally[6] += len(demoted)
            tally[7] += sum([self._sizes[of][expert] for of, expert in demoted])
        return Admission(evicted, demoted, evicted_ram)

    def warm(self, order: Iterable[Pair]) -> None:
        """Fill VRAM, then RAM, before the first event, as a placement from a calibration trace does; nothing counts.

        Queues are filled from their old end to their young one, so that what is worth most leaves last.

        Args:
            order: (layer, expert) pairs, the most valuable first; each goes as high as there is room left.

        Raises:
            InputError: An expert does not exist.
        """
        rooms = [tier.capacity_bytes - tier.resident_bytes if tier is not None else 0 for tier in self._tiers]
        filled: tuple[list[Pair], list[Pair]] = [], []
        copied = self._ram is not None and not self._exclusive
        for pair in dict.fromkeys(order):
            size = self._size(pair)
            highest = next((place for place, room in enumerate(rooms) if size <= room), None)
            if pair in self or highest is None or (copied and size > rooms[1]):
                continue
            for place in {highest, 1} if copied else {highest}:
                filled[place].append(pair)
                rooms[place] -= size
        for tier, pairs in zip(self._tiers, filled, strict=True):
            for layer, expert in reversed(pairs):
                if tier is not None:
                    tier.load(layer, expert)

    def parts(self, layer: int, experts: Sequence[int]) -> list[tuple[int, ...]]:
        """Cut an event into the fewest runs that each fit whatever is resident and however they are computed.

        Raises:
            InputError: One expert alone is larger than a tier.
        """
        return split_event(experts, self._sizes[layer], self._part_bytes)

    def place(self, layer: int, expert: int) -> Place:
        """Return the highest tier that holds an expert."""
        if (layer, expert) in self._vram:
            return "gpu"
        return "ram" if self._ram is not None and (layer, expert) in self._ram else "flash"

    def __contains__(self, pair: Pair) -> bool:
        """Whether (layer, expert) is in VRAM or RAM."""
        return self.place(*pair) != "flash"

    @property
    def vram(self) -> ExpertCache:
        """The upper tier, to be looked at only."""
        return self._vram

    @property
    def ram(self) -> ExpertCache | None:
        """The lower tier, to be looked at only; None where there is none."""
        return self._ram

    @property
    def exclusive(self) -> bool:
        """Whether RAM keeps no copy of what VRAM holds."""
        return self._exclusive

    @property
    def part_bytes(self) -> int:
        """Bytes of the largest event that always fits."""
        return self._part_bytes

    def counts(self, *, decoding: bool) -> TierCounts:
        """Return what was counted while decoding, or in prompts."""
        return TierCounts(*self._tally[decoding])

    # --- inside ---------------------------------------------------------------------------------------

    @property
    def _tiers(self) -> tuple[Tier, Tier | None]:
        return self._vram, self._ram

    def _size(self, pair: Pair) -> int:
        layer, expert = pair
        known = 0 <= layer < len(self._sizes) and 0 <= expert < len(self._sizes[0])
        size = self._sizes[layer][expert] if known else 0
        if not size:
            raise InputError(f"there is no expert {expert} of layer {layer}. Give experts of the sizes' decoder.")
        return size

    def _below(
        self,
        step: int,
        layer: int,
        experts: Sequence[int],
        weights: Sequence[float] | None,
        gpu_hits: tuple[int, ...],
        misses: tuple[int, ...],
        *,
        decoding: bool,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Pair, ...]]:
        """Look in RAM and bring in what it lacks; return its hits, its misses and what left."""
        if self._ram is None:
            return (), misses, ()
        ram_hits, flash = self._ram.look(step, layer, experts, weights, decoding=decoding, above=gpu_hits)
        copies = () if self._exclusive else self._vram
        return ram_hits, flash, self._ram.admit(flash, kept=copies)

    def _fitting(
        self, layer: int, experts: Sequence[int], weights: Sequence[float] | None, misses: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return the misses that VRAM can take beside the event's hits."""
        if not misses:
            return ()
        sizes = self._sizes[layer]
        room = self._vram.capacity_bytes - sum([sizes[expert] for expert in experts])
        if room >= 0:
            return misses
        room += sum([sizes[expert] for expert in misses])
        worth = dict(zip(experts, weights, strict=True)) if weights is not None else {}
        chosen = []
        for expert in sorted(misses, key=lambda one: (-worth.get(one, 0.0), one)):
            if sizes[expert] <= room:
                chosen.append(expert)
                room -= sizes[expert]
        return tuple(chosen)

    def _opened(self, chosen: Sequence[int]) -> tuple[int, bool]:
        if self._open is None:
            raise InputError("no event is open, so nothing can be admitted. Call event first, and admit once for each.")
        layer, misses, decoding = self._open
        strange = sorted(set(chosen) - misses)
        if strange:
            raise InputError(
                f"experts {strange} of layer {layer} are no misses of the open event, which has {sorted(misses)}. "
                "Upload only what it misses."
            )
        return layer, decoding

    def _close(self) -> None:
        """End an event of which nothing was uploaded: queues are told of it only now."""
        self._vram.admit(())
        self._open = None

    def _exchange(
        self, layer: int, uploaded: tuple[int, ...], evicted: tuple[Pair, ...]
    ) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
        """Move between exclusive tiers; return what entered RAM and what left it for that."""
        if self._ram is None or not self._exclusive:
            return (), ()
        self._ram.release(layer, uploaded)
        return self._ram.take(evicted)


class AheadCache(TieredCache):
    """Tiers into whose VRAM experts also come between events, copied ahead."""

    def bring(self, layer: int, key: Pair, policy: ReusePolicy, pinned: Sequence[int] = ()) -> tuple[Pair, ...]:
        """Let an expert that lies in RAM into VRAM, and return what left VRAM for it.

        Args:
            layer: Where the decoder is.
            key: The expert, whose copy begins.
            policy: VRAM's.
            pinned: Keys (``layer * experts + expert``) that must stay.
        """
        experts = len(self._sizes[0])
        excess = self._vram.resident_bytes + self._sizes[key[0]][key[1]] - self._vram.capacity_bytes
        evicted = []
        while excess > 0:
            victim, _ = policy.next_victims(layer, 1, pinned)[0]
            evicted.append(divmod(victim, experts))
            self._vram.release(evicted[-1][0], (evicted[-1][1],))
            excess -= self._sizes[evicted[-1][0]][evicted[-1][1]]
        self._vram.load(*key)
        if self._ram is not None and self._exclusive:
            self._ram.release(key[0], (key[1],))
            self._ram.take(evicted)
        return tuple(evicted)


def _check_budgets(vram_bytes: int, ram_bytes: int, sizes: Int64, *, exclusive: bool) -> None:
    if sizes.ndim != 2 or not sizes.size:
        raise InputError(f"expert sizes have the shape {sizes.shape}; bytes [layers, experts] are needed.")
    if ram_bytes < 0:
        raise InputError(f"RAM tier of {ram_bytes} bytes: none may be below 0. Give 0 for no RAM tier.")
    total = int(sizes.sum())
    needed = min(total, vram_bytes + int(sizes.max()))
    if not exclusive and 0 < ram_bytes < needed:
        raise InputError(
            f"an inclusive RAM tier of {format_bytes(ram_bytes)} cannot hold copies of a VRAM tier of "
            f"{format_bytes(vram_bytes)} and one expert more, {format_bytes(needed)}. Make the tiers exclusive, or "
            "give RAM more."
        )


def _part_bytes(vram_bytes: int, ram_bytes: int, total_bytes: int, *, exclusive: bool) -> int:
    if not ram_bytes or ram_bytes >= total_bytes:
        return vram_bytes
    return min(vram_bytes, ram_bytes if exclusive else ram_bytes - vram_bytes)


# --- replay --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TierReplay:
    """What one replay over three tiers counted.

    Attributes:
        policy: Of VRAM.
        ram_policy: Of RAM; empty where there is none.
        vram_bytes: Limit of VRAM.
        ram_bytes: Limit of RAM.
        exclusive: Whether RAM kept no copies.
        decode_tokens: Tokens decoded.
        decoding: Counted while decoding.
        prompts: Counted in prompts.
        vram: VRAM's own statistics.
        ram: RAM's; its lookups are those that missed in VRAM.
    """

    policy: str
    ram_policy: str
    vram_bytes: int
    ram_bytes: int
    exclusive: bool
    decode_tokens: int
    decoding: TierCounts
    prompts: TierCounts
    vram: DecoderCacheStats
    ram: DecoderCacheStats | None

    @property
    def gpu_hit_rate(self) -> float:
        """Share of decode lookups that VRAM had; 0 when nothing was decoded."""
        return self.decoding.gpu_hits / max(1, self.decoding.lookups)

    @property
    def flash_bytes_per_token(self) -> float:
        """Bytes read from flash per decoded token; 0 when nothing was decoded."""
        return self.decoding.flash_bytes / max(1, self.decode_tokens)

    @property
    def upload_bytes_per_token(self) -> float:
        """Bytes uploaded per decoded token; 0 when nothing was decoded."""
        return self.decoding.upload_bytes / max(1, self.decode_tokens)


def tier_replay(
    trace: Trace,
    vram_bytes: int,
    ram_bytes: int,
    policy: str | Policy = DEFAULT_POLICY,
    ram_policy: str | Policy | None = None,
    *,
    exclusive: bool = False,
    sizes: Int64 | None = None,
    seed: int = 0,
    static: Sequence[Pair] | None = None,
    warm: Iterable[Pair] = (),
    upload: Callable[[TraceEvent, TierOutcome], Iterable[int]] | None = None,
) -> TierReplay:
    """Replay ``trace`` through a ``TieredCache``; an event that may not fit is split (see ``TieredCache.parts``).

    Args:
        trace: What was used.
        vram_bytes: Limit of VRAM.
        ram_bytes: Limit of RAM; 0: there is no RAM tier.
        policy: Of VRAM; a name of ``POLICIES``, or a policy that has served no cache yet.
        ram_policy: Of RAM; None as in ``TieredCache``.
        exclusive: Whether RAM keeps no copy of what VRAM holds.
        sizes: ``[layers, experts]`` bytes; None takes the trace's own.
        seed: For ``random``.
        static: For ``static``; None orders by the trace's own counts, which no real run can know.
        warm: What the tiers are filled with before the first event, see ``TieredCache.warm``.
        upload: Chooses which misses of an event (or of a part of it) enter VRAM; None uploads all.

    Raises:
        InputError: As ``TieredCache``, or sizes do not fit the trace.
    """
    known = trace.sizes() if sizes is None else sizes
    if known.ndim != 2 or known.shape[0] < trace.layers or known.shape[1] < trace.experts:
        raise InputError(
            f"expert sizes are {list(known.shape)} and the trace has {trace.layers} layers of {trace.experts} experts. "
            "Replay a trace of the decoder that the sizes are of."
        )
    if static is None and "static" in {policy, ram_policy}:
        static = static_order(trace)
    cache = TieredCache(
        vram_bytes, ram_bytes, known, policy, ram_policy,
        exclusive=exclusive, top_k=trace.top_k, seed=seed, static=static,
    )  # fmt: skip
    cache.warm(warm)
    for event in trace.events:
        for part in cache.parts(event.layer, event.experts):
            weights = part_weights(event, part)
            found = cache.event(event.step, event.layer, part, weights, decoding=event.decoding)
            cache.admit(found.misses if upload is None else upload(event, found))
    return _result(trace, cache, ram_bytes)


def part_weights(event: TraceEvent, part: Sequence[int]) -> tuple[float, ...] | None:
    """Return the weights of some of an event's experts, as parts of the whole event's; None when unknown."""
    if event.weights is None or len(part) == len(event.experts):
        return event.weights
    by_expert = dict(zip(event.experts, event.weights, strict=True))
    return tuple([by_expert[expert] for expert in part])


def _result(trace: Trace, cache: TieredCache, ram_bytes: int) -> TierReplay:
    vram = cache.vram.stats()
    ram = cache.ram.stats() if cache.ram is not None else None
    return TierReplay(
        policy=vram.policy,
        ram_policy=ram.policy if ram is not None else "",
        vram_bytes=cache.vram.capacity_bytes,
        ram_bytes=ram_bytes,
        exclusive=cache.exclusive,
        decode_tokens=trace.decode_tokens,
        decoding=cache.counts(decoding=True),
        prompts=cache.counts(decoding=False),
        vram=vram,
        ram=ram,
    )
