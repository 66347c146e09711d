"""Replays a routing trace through the expert cache itself, and through a future that is known.

Prompts warm the cache; hit rates are of decoding only. An event that is larger than the cache is split as the
runtime splits it. ``belady`` is the bound: with every expert of the same size, forced admission (an event's
experts all enter, as in the real cache) makes the fewest misses that any policy can, and with bypass (an expert
may be used without being kept) fewer still. With different sizes the fewest misses are hard to find and the
furthest next use is a good rule, not a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import InputError
from edgeflex.runtimes.expert_cache import ExpertCache, split_event
from edgeflex.runtimes.policies import DEFAULT_POLICY, POLICIES, NextUsePolicy, Policy, make_policy
from edgeflex.runtimes.stays import Occupancy
from edgeflex.schema_moe import MissPoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.trace import Trace, TraceEvent

    Int64 = NDArray[np.int64]

BELADY = "belady"
BELADY_BYPASS = "belady-bypass"
REPLAYED = (*POLICIES, BELADY, BELADY_BYPASS)
_NEVER_USED = 2.0**60  # finite, since the ranks of absent experts are minus infinity


@dataclass(frozen=True)
class ReplayResult:
    """What one replay counted; plain names are of decoding, ``prefill_`` ones of prompts.

    Attributes:
        policy: Its name.
        capacity_bytes: Of the cache.
        decode_tokens: Tokens decoded.
        hits: Lookups that found their expert resident.
        misses: The others.
        read_bytes: Bytes of the misses.
        prefill_hits: As ``hits``, in prompts.
        prefill_misses: As ``misses``, in prompts.
        prefill_bytes: As ``read_bytes``, in prompts.
        first_prefill_bytes: The first prompt's part of it, which meets an empty cache.
        layer_hits: ``[layers]``, while decoding.
        layer_misses: ``[layers]``, while decoding.
        evictions: In all.
        peak_bytes: Most bytes resident at once.
        occupancy: How long each expert was resident while decoding.
    """

    policy: str
    capacity_bytes: int
    decode_tokens: int
    hits: int
    misses: int
    read_bytes: int
    prefill_hits: int
    prefill_misses: int
    prefill_bytes: int
    first_prefill_bytes: int
    layer_hits: tuple[int, ...]
    layer_misses: tuple[int, ...]
    evictions: int
    peak_bytes: int
    occupancy: Occupancy

    @property
    def hit_rate(self) -> float:
        """Share of decode lookups that hit; 0 when nothing was decoded."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def bytes_per_token(self) -> float:
        """Bytes read per decoded token; 0 when nothing was decoded."""
        return self.read_bytes / max(1, self.decode_tokens)


def replay(
    trace: Trace,
    capacity_bytes: int,
    policy: str | Policy = DEFAULT_POLICY,
    *,
    sizes: Int64 | None = None,
    seed: int = 0,
    static: Sequence[tuple[int, int]] | None = None,
) -> ReplayResult:
    """Replay ``trace`` through an ``ExpertCache``.

    Args:
        trace: What was used.
        capacity_bytes: Of the cache.
        policy: A name of ``POLICIES``, ``belady``, ``belady-bypass``, or a policy that has served no cache yet.
        sizes: ``[layers, experts]`` bytes; None takes the trace's own.
        seed: For ``random``.
        static: For ``static``; None orders by the trace's own counts, which no real run can know.

    Raises:
        InputError: The policy is unknown, sizes do not fit the trace, or one expert is larger than the cache.
    """
    if policy in {BELADY, BELADY_BYPASS}:
        return belady(trace, capacity_bytes, bypass=policy == BELADY_BYPASS, sizes=sizes)
    known = _sizes(trace, sizes)
    if isinstance(policy, str):
        order = static_order(trace) if policy == "static" and static is None else static
        layers, experts = known.shape
        policy = make_policy(policy, layers=layers, experts=experts, top_k=trace.top_k, seed=seed, static=order)
    return _through_cache(trace, ExpertCache(capacity_bytes, known, policy), known)


def static_order(trace: Trace) -> list[tuple[int, int]]:
    """Return (layer, expert) pairs by falling number of tokens that used them, ties by (layer, expert)."""
    uses = trace.uses()
    order = np.argsort(-uses, axis=None, kind="stable")
    return [divmod(int(key), trace.experts) for key in order[: int((uses > 0).sum())]]


def belady(trace: Trace, capacity_bytes: int, *, bypass: bool = False, sizes: Int64 | None = None) -> ReplayResult:
    """Replay ``trace`` with its future known.

    Args:
        trace: What was used.
        capacity_bytes: Of the cache.
        bypass: Whether an expert may be used without being kept.
        sizes: ``[layers, experts]`` bytes; None takes the trace's own.

    Raises:
        InputError: Sizes do not fit the trace, or one expert is larger than the cache.
    """
    known = _sizes(trace, sizes)
    parts = list(_parts(trace, known, capacity_bytes))
    if bypass:
        return _bypass(trace, parts, known, capacity_bytes)
    layers, experts = known.shape
    policy = NextUsePolicy(layers, experts, _next_uses(parts, known.shape))
    return _through_cache(trace, ExpertCache(capacity_bytes, known, policy), known)


def miss_point(
    trace: Trace,
    capacity_bytes: int,
    policy: str = DEFAULT_POLICY,
    *,
    sizes: Int64 | None = None,
    with_belady: bool = False,
) -> MissPoint:
    """Return one point of a miss curve.

    ``prefill_bytes`` is what the first prompt reads into an empty cache.

    Raises:
        InputError: As ``replay``, or nothing was decoded in the trace.
    """
    if not trace.decode_tokens:
        raise InputError("the trace has no decoded token, so it says nothing about misses while decoding. Record some.")
    result = replay(trace, capacity_bytes, policy, sizes=sizes)
    return MissPoint(
        policy=result.policy,
        cache_bytes=capacity_bytes,
        hits=result.hits,
        misses=result.misses,
        decode_tokens=result.decode_tokens,
        decode_bytes=result.read_bytes,
        prefill_bytes=result.first_prefill_bytes,
        belady_misses=belady(trace, capacity_bytes, sizes=sizes).misses if with_belady else None,
    )


def miss_points(
    trace: Trace,
    capacities_bytes: Sequence[int],
    policies: Sequence[str] = (DEFAULT_POLICY,),
    *,
    sizes: Int64 | None = None,
    with_belady: bool = False,
) -> tuple[MissPoint, ...]:
    """Return ``miss_point`` for every policy at every size, policies outermost.

    Raises:
        InputError: As ``miss_point``.
    """
    return tuple(
        miss_point(trace, capacity, policy, sizes=sizes, with_belady=with_belady)
        for policy in policies
        for capacity in capacities_bytes
    )


# --- inside --------------------------------------------------------------------------------------------


def _sizes(trace: Trace, sizes: Int64 | None) -> Int64:
    if sizes is None:
        return trace.sizes()
    if sizes.ndim != 2 or sizes.shape[0] < trace.layers or sizes.shape[1] < trace.experts:
        raise InputError(
            f"expert sizes are {list(sizes.shape)} and the trace has {trace.layers} layers of {trace.experts} experts. "
            "Replay a trace of the decoder that the sizes are of."
        )
    missing = np.argwhere((sizes[: trace.layers, : trace.experts] <= 0) & (trace.uses() > 0))
    if len(missing):
        raise InputError(
            f"the trace uses expert {missing[0, 1]} of layer {missing[0, 0]}, which has no size, and {len(missing)} "
            "like it in all. Replay a trace of the decoder that the sizes are of."
        )
    return sizes


def _parts(trace: Trace, sizes: Int64, capacity_bytes: int) -> Iterator[tuple[TraceEvent, Sequence[int]]]:
    """Give each event, or the parts of one that is larger than the cache, with the experts it needs."""
    largest = int(sizes.max())
    by_layer = sizes.tolist()
    for event in trace.events:
        # the exact sum is only needed where the crude bound does not settle it
        if len(event.experts) * largest <= capacity_bytes:
            yield event, event.experts
        else:
            for part in split_event(event.experts, by_layer[event.layer], capacity_bytes):
                yield event, part


def _through_cache(trace: Trace, cache: ExpertCache, sizes: Int64) -> ReplayResult:
    first_turn = trace.events[0].turn
    first_prefill_bytes = 0
    for event, experts in _parts(trace, sizes, cache.capacity_bytes):
        weights = event.weights
        if weights is not None and len(experts) != len(event.experts):
            weights = tuple([weights[event.experts.index(expert)] for expert in experts])
        cache.event(event.step, event.layer, experts, weights, decoding=event.decoding)
        if not event.decoding and event.turn == first_turn:
            first_prefill_bytes = cache.missed_bytes(decoding=False)
    stats = cache.stats()
    layers = cache.layer_counts(decoding=True)
    return ReplayResult(
        policy=stats.policy,
        capacity_bytes=cache.capacity_bytes,
        decode_tokens=trace.decode_tokens,
        hits=stats.decode_hits,
        misses=stats.decode_misses,
        read_bytes=stats.decode_read_bytes,
        prefill_hits=stats.hits - stats.decode_hits,
        prefill_misses=stats.misses - stats.decode_misses,
        prefill_bytes=cache.missed_bytes(decoding=False),
        first_prefill_bytes=first_prefill_bytes,
        layer_hits=layers.hits,
        layer_misses=layers.misses,
        evictions=stats.evictions,
        peak_bytes=stats.peak_bytes,
        occupancy=cache.occupancy(),
    )


def _next_uses(parts: Sequence[tuple[TraceEvent, Sequence[int]]], shape: tuple[int, ...]) -> list[NDArray[np.float64]]:
    """Return, for each event, the number of the next event that uses each of its experts."""
    coming = np.full(shape, _NEVER_USED)
    found: list[NDArray[np.float64]] = []
    for number in range(len(parts) - 1, -1, -1):
        event, experts = parts[number]
        chosen = list(experts)
        found.append(coming[event.layer, chosen])
        coming[event.layer, chosen] = number
    found.reverse()
    return found


def _bypass(
    trace: Trace, parts: Sequence[tuple[TraceEvent, Sequence[int]]], sizes: Int64, capacity_bytes: int
) -> ReplayResult:
    """Count the misses of keeping, after each event, what is used soonest among residents and the event's experts."""
    layers, experts = sizes.shape
    flat = sizes.ravel().tolist()
    coming = np.full(layers * experts, -1.0)  # next use of residents; -1 for the rest
    next_uses = _next_uses(parts, sizes.shape)
    lookups = np.zeros((2, 2, layers), dtype=np.int64)  # [decoding][missed][layer]
    read_bytes = [0, 0]
    resident = np.zeros(layers * experts, dtype=np.int64)
    first_prefill_bytes = resident_bytes = peak_bytes = evictions = 0
    for (event, used), again in zip(parts, next_uses, strict=True):
        keys = [event.layer * experts + expert for expert in used]
        missed = [key for key in keys if coming[key] < 0]
        missed_bytes = sum(flat[key] for key in missed)
        lookups[int(event.decoding), :, event.layer] += (len(keys) - len(missed), len(missed))
        read_bytes[event.decoding] += missed_bytes
        if not event.decoding and event.turn == trace.events[0].turn:
            first_prefill_bytes = read_bytes[False]
        coming[keys] = again
        resident_bytes += missed_bytes
        while resident_bytes > capacity_bytes:
            victim = int(coming.argmax())
            coming[victim] = -1.0
            resident_bytes -= flat[victim]
            evictions += 1
        peak_bytes = max(peak_bytes, resident_bytes)
        if event.decoding:
            resident += coming >= 0
    (prompt_hits, prompt_misses), (hits, misses) = lookups.sum(axis=2).tolist()
    return ReplayResult(
        policy=BELADY_BYPASS,
        capacity_bytes=capacity_bytes,
        decode_tokens=trace.decode_tokens,
        hits=hits,
        misses=misses,
        read_bytes=read_bytes[True],
        prefill_hits=prompt_hits,
        prefill_misses=prompt_misses,
        prefill_bytes=read_bytes[False],
        first_prefill_bytes=first_prefill_bytes,
        layer_hits=tuple(lookups[1, 0].tolist()),
        layer_misses=tuple(lookups[1, 1].tolist()),
        evictions=evictions,
        peak_bytes=peak_bytes,
        occupancy=Occupancy(
            sum(event.decoding for event, _ in parts), tuple(map(tuple, resident.reshape(layers, experts).tolist()))
        ),
    )
