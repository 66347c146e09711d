"""What no cache over three tiers, and no scheduler, can beat on a trace: least bytes by tier, least seconds.

**Bytes.** A policy that knows the future and may pass an expert by keeps what is used soonest (Belady, IBM Systems
Journal 1966; with bypass). With experts of several sizes that choice is hard (Berger et al., SIGMETRICS 2018); here
experts may then also be kept in part, byte by byte, so that every byte is a page of its own, the greedy choice is
optimal for them, and the result is a bound for whole experts. With one size it is what whole experts attain.

VRAM alone bounds what must be uploaded or computed on the CPU, since an expert is in VRAM at a use only if it was
kept since the use before, or was uploaded. Both tiers together (RAM alone, where it keeps copies) bound what must be
read from flash.

**What counts.** Decoding only. A prompt may leave anything in the tiers, for nothing: between prompts' ends and the
decoding after them the best contents are taken. A trace that starts with decoding starts cold.

**Seconds.** All resources work all the time, on work that was known beforehand, none slows another, and experts can
be divided between GPU and CPU: what is left is a linear programme of total work, bounded from below by its dual.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.curves import Curves
    from edgeflex.runtimes.trace import Trace, TraceEvent

    Int64 = NDArray[np.int64]
    Float64 = NDArray[np.float64]

_NEVER_USED = 2.0**60
_GOLDEN = (5.0**0.5 - 1.0) / 2.0
_SEARCH_STEPS = 32  # of each of two golden sections; any point they visit gives a bound


@dataclass(frozen=True)
class TierBound:
    """Least traffic of decoding a trace.

    Attributes:
        decode_tokens: Passes that decoded, one token each.
        lookups: Experts looked up while decoding.
        lookup_bytes: Their bytes.
        gpu_missed_bytes: That must be uploaded, or belong to experts that the CPU computes.
        flash_bytes: That must be read from flash.
        gpu_misses: ``gpu_missed_bytes`` in lookups; None where experts differ in size.
        flash_misses: ``flash_bytes`` in lookups; None where experts differ in size.
    """

    decode_tokens: int
    lookups: int
    lookup_bytes: int
    gpu_missed_bytes: int
    flash_bytes: int
    gpu_misses: int | None
    flash_misses: int | None


@dataclass(frozen=True)
class TimeBound:
    """Least seconds of decoding a trace, per token.

    Attributes:
        token_s: No policy and no schedule needs less.
        disk_s: What reading from flash takes alone.
        compute_s: What GPU, CPU and link take at best together, flash not counted.
        traffic: The bytes behind both.
    """

    token_s: float
    disk_s: float
    compute_s: float
    traffic: TierBound


def multi_tier_belady(
    trace: Trace,
    vram_bytes: int,
    ram_bytes: int,
    *,
    exclusive: bool = False,
    sizes: Int64 | None = None,
    first_step: int = 0,
) -> TierBound:
    """Return the least bytes between tiers that any policy can reach while decoding.

    Args:
        trace: What was used.
        vram_bytes: Limit of VRAM.
        ram_bytes: Limit of RAM; 0: there is no RAM tier.
        exclusive: Whether RAM keeps no copy of what VRAM holds; the bound for it holds for inclusive tiers too.
        sizes: ``[layers, experts]`` bytes; None takes the trace's own.
        first_step: Passes before it (see ``TraceEvent.step``) are not counted; like prompts, they may leave anything.

    Raises:
        InputError: A limit is below 0, or a used expert has no size.
    """
    if min(vram_bytes, ram_bytes) < 0:
        raise InputError(f"tiers of {vram_bytes} and {ram_bytes} bytes: none may be below 0.")
    known = trace.sizes() if sizes is None else sizes
    uses = _Uses.of(trace, known, first_step)
    both_bytes = vram_bytes + ram_bytes if exclusive else max(vram_bytes, ram_bytes)
    gpu = uses.least_missed_bytes(vram_bytes)
    flash = gpu if both_bytes == vram_bytes else uses.least_missed_bytes(both_bytes)
    one = uses.one_size
    return TierBound(
        decode_tokens=uses.passes,
        lookups=sum(map(len, uses.keys)),
        lookup_bytes=uses.total_bytes,
        gpu_missed_bytes=gpu,
        flash_bytes=flash,
        gpu_misses=gpu // one if one else None,
        flash_misses=flash // one if one else None,
    )


def time_bound(
    trace: Trace,
    curves: Curves,
    vram_bytes: int,
    ram_bytes: int,
    *,
    exclusive: bool = False,
    sizes: Int64 | None = None,
    kind_of: Callable[[int, int], str] | None = None,
    dense_s: float = 0.0,
    first_step: int = 0,
) -> TimeBound:
    """Return the seconds per decoded token that no policy and no schedule can beat.

    With ``x`` the share of the lookups that the CPU computes, ``g`` and ``c`` an expert's seconds on GPU and CPU,
    ``r`` the link's seconds per byte, ``s`` bytes and ``M`` the bytes that miss in VRAM: the least ``T`` with
    ``sum (1 - x) g + D <= T``, ``sum x c + D <= T`` and ``r (M - sum x s) <= T``, ``D`` being the dense parts; and
    not below what flash needs. Every expert is counted with one row, the least it can have.

    Args:
        trace: What was used; only decoding counts.
        curves: Of the machine.
        vram_bytes: Limit of VRAM.
        ram_bytes: Limit of RAM; 0: there is no RAM tier.
        exclusive: Whether RAM keeps no copy of what VRAM holds.
        sizes: ``[layers, experts]`` bytes; None takes the trace's own.
        kind_of: Kind of (layer, expert), by which ``curves.kinds`` are chosen; None: all are of the kind ``""``.
        dense_s: Seconds per token in which neither GPU nor CPU can compute experts.
        first_step: As in ``multi_tier_belady``.

    Raises:
        InputError: As ``multi_tier_belady``, or nothing was decoded in the trace.
    """
    known = trace.sizes() if sizes is None else sizes
    traffic = multi_tier_belady(trace, vram_bytes, ram_bytes, exclusive=exclusive, sizes=known, first_step=first_step)
    tokens = traffic.decode_tokens
    if not tokens:
        raise InputError(
            f"the trace has no decoded token from pass {first_step} on, so it bounds no time per token. Record some."
        )
    groups = _groups(_counted(trace, first_step), known, curves, kind_of)
    # rates with the latency of the largest expert, which no copy or read undercuts per byte
    link_s = traffic.gpu_missed_bytes * min(curves.link_s(size) / size for _, size, _, _ in groups)
    disk_s = traffic.flash_bytes * min(curves.disk_s(size) / size for _, size, _, _ in groups)
    rate_s = link_s / max(1, traffic.gpu_missed_bytes)
    compute_s = _least_span_s(groups, rate_s, link_s, dense_s * tokens)
    return TimeBound(max(disk_s, compute_s) / tokens, disk_s / tokens, compute_s / tokens, traffic)


def time_bound_s(
    trace: Trace,
    curves: Curves,
    vram_bytes: int,
    ram_bytes: int,
    *,
    exclusive: bool = False,
    sizes: Int64 | None = None,
    kind_of: Callable[[int, int], str] | None = None,
    dense_s: float = 0.0,
    first_step: int = 0,
) -> float:
    """Return ``time_bound(...).token_s``.

    Raises:
        InputError: As ``time_bound``.
    """
    return time_bound(
        trace, curves, vram_bytes, ram_bytes,
        exclusive=exclusive, sizes=sizes, kind_of=kind_of, dense_s=dense_s, first_step=first_step,
    ).token_s  # fmt: skip


# --- bytes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Uses:
    """What decoding uses, in order.

    Attributes:
        keys: Flat ids per decoding event.
        next_uses: Per event, for each of its keys the number of the next event that uses it.
        refills: By event before which a prompt came: for every key, the number of the next event that uses it.
        sizes: ``[layers * experts]`` bytes.
        passes: Forward passes that decode.
    """

    keys: Sequence[Int64]
    next_uses: Sequence[Float64]
    refills: dict[int, Float64]
    sizes: Int64
    passes: int

    @classmethod
    def of(cls, trace: Trace, sizes: Int64, first_step: int) -> _Uses:
        if sizes.ndim != 2 or sizes.shape[0] < trace.layers or sizes.shape[1] < trace.experts:
            raise InputError(
                f"expert sizes are {list(sizes.shape)} and the trace has {trace.layers} layers of {trace.experts} "
                "experts. Give those of the trace's decoder."
            )
        keys, after_prompts = _decoded(trace.events, sizes.shape[1], first_step)
        flat = sizes.ravel()
        if any((flat[used] <= 0).any() for used in keys):
            raise InputError("the trace uses experts that have no size. Give the sizes of the trace's decoder.")
        coming = np.full(flat.shape, _NEVER_USED)
        next_uses: list[Float64] = []
        refills: dict[int, Float64] = {}
        for number in range(len(keys) - 1, -1, -1):
            next_uses.append(coming[keys[number]])
            coming[keys[number]] = number
            if number in after_prompts:
                refills[number] = coming.copy()
        next_uses.reverse()
        passes = len({event.step for event in _counted(trace, first_step)})
        return cls(keys, next_uses, refills, flat, passes)

    @property
    def total_bytes(self) -> int:
        return sum(int(self.sizes[used].sum()) for used in self.keys)

    @property
    def one_size(self) -> int:
        """The size of every expert used; 0 where they differ."""
        used = self._used_sizes()
        return int(used[0]) if len(used) == 1 else 0

    def _used_sizes(self) -> Int64:
        return np.unique(self.sizes[np.unique(np.concatenate([*self.keys, np.zeros(0, dtype=np.int64)]))])

    def least_missed_bytes(self, capacity_bytes: int) -> int:
        """Return the bytes that the best choice of what to keep, byte by byte, must fetch."""
        # whole experts always come to a multiple of the sizes' common divisor
        capacity_bytes -= capacity_bytes % max(1, int(np.gcd.reduce(self._used_sizes())))
        kept = _Kept(self.sizes, capacity_bytes)
        missed_bytes = 0
        for number, (used, again) in enumerate(zip(self.keys, self.next_uses, strict=True)):
            if number in self.refills:
                kept.refill(self.refills[number])
            missed_bytes += kept.use(used, again)
        return missed_bytes


class _Kept:
    """How many bytes of each expert are kept: those that are used soonest."""

    def __init__(self, sizes: Int64, capacity_bytes: int) -> None:
        self._sizes = sizes
        self._capacity_bytes = capacity_bytes
        self._held = np.zeros_like(sizes)
        self._total = 0
        self._coming = np.full(sizes.shape, -1.0)  # next use of what is held in part at least

    def use(self, used: Int64, again: Float64) -> int:
        """Use these, whose next uses are ``again``; return the bytes that had to be fetched."""
        missed_bytes = int((self._sizes[used] - self._held[used]).sum())
        self._held[used] = self._sizes[used]
        self._coming[used] = again
        self._total += missed_bytes
        while self._total > self._capacity_bytes:
            furthest = int(self._coming.argmax())
            cut = min(int(self._held[furthest]), self._total - self._capacity_bytes)
            self._held[furthest] -= cut
            self._total -= cut
            if not self._held[furthest]:
                self._coming[furthest] = -1.0
        return missed_bytes

    def refill(self, coming: Float64) -> None:
        """Take the best contents for what comes."""
        order = np.argsort(coming, kind="stable")
        ends = np.minimum(np.cumsum(self._sizes[order]), self._capacity_bytes)
        self._held[order] = np.diff(ends, prepend=0)
        self._total = int(self._held.sum())
        self._coming = np.where(self._held > 0, coming, -1.0)


def _counted(trace: Trace, first_step: int) -> list[TraceEvent]:
    """Return the events that bounds count."""
    return [event for event in trace.events if event.decoding and event.step >= first_step]


def _decoded(events: Sequence[TraceEvent], experts: int, first_step: int) -> tuple[list[Int64], set[int]]:
    """Return the keys of each event that counts, and the numbers of those that came after one that does not."""
    keys: list[Int64] = []
    after_prompts: set[int] = set()
    for event in events:
        if event.decoding and event.step >= first_step:
            keys.append(np.array(event.experts, dtype=np.int64) + event.layer * experts)
        else:
            after_prompts.add(len(keys))
    return keys, after_prompts


# --- seconds -------------------------------------------------------------------------------------------

_Group = tuple[int, int, float, float]  # lookups, bytes, seconds on the GPU, seconds on the CPU


def _groups(
    events: Sequence[TraceEvent], sizes: Int64, curves: Curves, kind_of: Callable[[int, int], str] | None
) -> list[_Group]:
    """Gather the lookups of decoding that cost the same."""
    lookups = Counter((event.layer, expert) for event in events for expert in event.experts)
    found: Counter[tuple[int, str]] = Counter()
    for (layer, expert), count in lookups.items():
        found[int(sizes[layer, expert]), kind_of(layer, expert) if kind_of is not None else ""] += count
    return [
        (count, size, curves.gpu_s(1, kind), curves.cpu_s(1, kind)) for (size, kind), count in sorted(found.items())
    ]


def _least_span_s(groups: Sequence[_Group], rate_s: float, link_s: float, dense_s: float) -> float:
    """Return the least seconds of GPU, CPU and link together: the dual of the linear programme, maximised.

    For weights of the three resources that sum to 1, ``T`` is at least the weighted sum of their work, whatever the
    division; the best division takes for each lookup the smaller term. Every point of the search gives a bound.
    """
    count, size, on_gpu, on_cpu = (np.array(column, dtype=np.float64) for column in zip(*groups, strict=True))

    def dual(link: float, gpu: float) -> float:
        gpu_weight, cpu_weight = (1.0 - link) * gpu, (1.0 - link) * (1.0 - gpu)
        best = np.minimum(gpu_weight * on_gpu, cpu_weight * on_cpu - link * rate_s * size)
        return float(count @ best) + link * link_s + (1.0 - link) * dense_s

    return max(_highest(lambda link: _highest(lambda gpu: dual(link, gpu))), dense_s)


def _highest(function: Callable[[float], float]) -> float:
    """Return the largest value of a concave function on [0, 1] that a golden section meets, its ends included."""
    low, high = 0.0, 1.0
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    best = max(function(low), function(high), at_left, at_right)
    for _ in range(_SEARCH_STEPS):
        if at_left < at_right:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
        else:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        best = max(best, at_left, at_right)
    return best
