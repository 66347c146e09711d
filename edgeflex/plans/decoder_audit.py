"""An independent recount of decoder plans: plain sums, matrix by matrix, sharing no code with the planner.

What is recounted: that every unit has one known precision; KL; bytes of every part of memory, and of the disk;
T; seconds of a token and of the first token; hits, misses and bytes from a replay of the plan's own sizes; that
every limit is kept; that verdict and proof agree with each other. What stays unproven here is only that the
bound is as high as claimed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgeflex.errors import CheckFailedError
from edgeflex.schema import Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from edgeflex.schema_moe import (
        DecoderCalibration,
        DecoderGraph,
        DecoderLayer,
        DecoderPlan,
        DecoderRates,
        MissPoint,
    )

_RELATIVE = 1e-6
_LIMIT = 1e-9


@dataclass(frozen=True)
class Recount:
    """What a plan costs by plain sums."""

    kl: float
    dense_bytes: int
    experts_bytes: int
    cycle_bytes: int
    disk_bytes: int
    compute_s: float
    token_s: float
    first_token_s: float
    bytes_per_token: float
    hit_rate: float
    sizes: NDArray[np.int64]


class Uses(Protocol):
    """What both kinds of plans are counted against."""

    @property
    def calibration(self) -> DecoderCalibration:
        """Of the plan's decoder."""

    @property
    def rates(self) -> DecoderRates:
        """Of the computer that calibrated."""

    @property
    def uses(self) -> NDArray[np.float64] | None:
        """Share of decoded tokens that use each expert, [layers, experts], or None for even use."""


@dataclass(frozen=True)
class Ground:
    """What a plan is counted against; as given to the planner.

    Attributes:
        calibration: Of the plan's decoder.
        rates: Of the plan's machine.
        misses: Replays sizes [layers, experts], cache bytes and policy.
        packed_bytes: Precision, rows and columns to bytes.
        uses: Share of decoded tokens that use each expert, [layers, experts], or None for even use.
        prefill_bytes: Sizes, cache bytes, policy and chunk to bytes that the prompt reads, or None.
        kv_bytes: Context tokens to bytes, or None where the plan's own figure is taken as given.
        activations_bytes: Chunk to bytes, or None likewise.
        overlap: Share of experts' work that hides reading.
    """

    calibration: DecoderCalibration
    rates: DecoderRates
    misses: Callable[[NDArray[np.int64], int, str], MissPoint]
    packed_bytes: Callable[[Precision, int, int], int]
    uses: NDArray[np.float64] | None = None
    prefill_bytes: Callable[[NDArray[np.int64], int, str, int], int] | None = None
    kv_bytes: Callable[[int], int] | None = None
    activations_bytes: Callable[[int], int] | None = None
    overlap: float = 0.0


def check_decoder_plan(plan: DecoderPlan, ground: Ground) -> Recount:
    """Return the recount of ``plan`` if everything that it says holds.

    Raises:
        CheckFailedError: A unit lacks a precision or has an unknown one, a figure differs from the recount, a
            limit is broken, or verdict and proof contradict the figures; all of it is listed.
    """
    where = f"plan of decoder {ground.calibration.graph.name!r}"
    strange = [] if plan.threads in {one.threads for one in ground.rates.matrices} else [plan.threads]
    refuse_all(where, [*misfits(plan, ground), *(f"{threads} threads were never measured" for threads in strange)])
    counted = recount(plan, ground)
    faults = [*_differences(plan, ground, counted), *_broken(plan), *_contradictions(plan, counted)]
    refuse_all(where, faults)
    return counted


def refuse_all(where: str, faults: list[str]) -> None:
    """Raise ``CheckFailedError`` if there is a fault; all of them are listed."""
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise CheckFailedError(f"{where} does not hold; plan again:{listed}")


# --- the decoder, matrix by matrix ------------------------------------------------------------------------


def _attention_matrices(graph: DecoderGraph) -> list[tuple[int, int]]:
    a = graph.attention
    if a.kind == "latent":
        return [
            (a.heads * a.head_dim, graph.hidden_dim),
            (a.latent_dim + a.rotary_dim, graph.hidden_dim),
            (a.heads * (a.head_dim - a.rotary_dim + a.value_dim), a.latent_dim),
            (graph.hidden_dim, a.heads * a.value_dim),
        ]
    stacked = a.heads * a.head_dim + a.kv_heads * a.head_dim + a.kv_heads * a.value_dim
    return [(stacked, graph.hidden_dim), (graph.hidden_dim, a.heads * a.value_dim)]


def layer_matrices(graph: DecoderGraph, layer: DecoderLayer) -> list[tuple[int, int]]:
    """Return (rows, columns) of every matrix of a layer's dense part."""
    found = _attention_matrices(graph)
    for inner in (0 if layer.routing else layer.dense_dim, layer.shared_dim):
        if inner:
            found += [(2 * inner, graph.hidden_dim), (graph.hidden_dim, inner)]
    return found


def fp32_bytes(graph: DecoderGraph) -> int:
    """Return the bytes of all that stays in fp32."""
    a, total = graph.attention, graph.hidden_dim
    for layer in graph.layers:
        total += 2 * graph.hidden_dim
        if a.query_key_norm == "projection":
            total += a.heads * a.head_dim + a.kv_heads * a.head_dim
        elif a.query_key_norm == "head":
            total += 2 * a.head_dim
        if a.kind == "latent":
            total += a.latent_dim
        if a.bias:
            total += _attention_matrices(graph)[0][0]
        if layer.routing:
            total += layer.routing.experts * graph.hidden_dim
        if layer.shared_gate:
            total += graph.hidden_dim
    return 4 * total


def _units(graph: DecoderGraph) -> Iterator[str]:
    yield from ("embedding", "head")
    for layer in graph.layers:
        yield f"layers.{layer.index}"
        for expert in range(layer.routing.experts if layer.routing else 0):
            yield f"layers.{layer.index}.experts.{expert}"


def raw_matrix_bytes(precision: Precision, rows: int, columns: int) -> int:
    """Return the bytes of a matrix in the bundle."""
    if precision is Precision.INT4_GROUP32:
        return rows * columns // 2 + 2 * rows * columns // 32
    return rows * columns + 4 * rows if precision is Precision.INT8_DYNAMIC else 4 * rows * columns


# --- counting --------------------------------------------------------------------------------------------


def recount(plan: DecoderPlan, ground: Ground) -> Recount:
    """Return what the choices of ``plan`` cost in its cache, counted one matrix after another."""
    graph, rates = ground.calibration.graph, ground.rates
    chosen = {choice.subject: Precision(choice.option) for choice in plan.choices}
    dense = disk = fp32_bytes(graph)
    compute, table = rates.other_token_s, (graph.vocabulary, graph.hidden_dim)
    prompt = _Prompt(plan, ground)
    head = chosen["head"]
    dense += raw_matrix_bytes(chosen["embedding"], *table) + ground.packed_bytes(head, *table)
    disk += raw_matrix_bytes(chosen["embedding"], *table) + ground.packed_bytes(head, *table)
    disk += 0 if graph.tied_embedding else raw_matrix_bytes(head, *table)
    compute += _seconds(rates, table, head, plan.threads, 1.0)
    first = prompt.last_rows(table, head)
    for layer in graph.layers:
        precision = chosen[f"layers.{layer.index}"]
        for shape in layer_matrices(graph, layer):
            packed = ground.packed_bytes(precision, *shape)
            dense += packed
            disk += packed + raw_matrix_bytes(precision, *shape)
            compute += _seconds(rates, shape, precision, plan.threads, 1.0)
            first += prompt.all_rows(shape, precision)
    most = max((layer.routing.experts for layer in graph.layers if layer.routing), default=0)
    sizes, cycle = np.zeros((len(graph.layers), most), dtype=np.int64), 0.0
    expert_s = 0.0
    for place, layer in enumerate(graph.layers):
        shapes = [(2 * layer.expert_dim, graph.hidden_dim), (graph.hidden_dim, layer.expert_dim)]
        for expert, use in enumerate(uses_of(ground, place, layer)):
            precision = chosen[f"layers.{layer.index}.experts.{expert}"]
            gate_up, down = (ground.packed_bytes(precision, *shape) for shape in shapes)
            slot = math.ceil((math.ceil(gate_up / 64) * 64 + down) / 4096) * 4096
            sizes[place, expert] = slot
            cycle += use * slot
            disk += slot + sum(raw_matrix_bytes(precision, *shape) for shape in shapes)
            expert_s += use * sum(_seconds(rates, shape, precision, plan.threads, 1.0, expert=True) for shape in shapes)
            first += sum(prompt.routed_rows(shape, precision, use) for shape in shapes)
    compute += expert_s
    return _with_traffic(plan, ground, (dense, disk, cycle, compute, expert_s, first), sizes, chosen)


def _with_traffic(
    plan: DecoderPlan,
    ground: Ground,
    sums: tuple[int, int, float, float, float, float],
    sizes: NDArray[np.int64],
    chosen: dict[str, Precision],
) -> Recount:
    dense, disk, cycle, compute, expert_s, first = sums
    graph, rates = ground.calibration.graph, ground.rates
    first += rates.other_prefill_token_s * plan.budget.prompt_tokens
    missed = rate = wait = 0.0
    prefill = 0
    counts = [layer.routing.top_k for layer in graph.layers if layer.routing]
    if plan.verdict != "fits":
        point = ground.misses(sizes, plan.cache_bytes, plan.policy)
        rate = point.misses / max(1, point.hits + point.misses)
        missed = point.decode_bytes / point.decode_tokens
        chance = 1.0 - (1.0 - rate) ** (sum(counts) / len(counts)) if counts else 0.0
        hidden = ground.overlap * (1.0 - rate) * expert_s
        if missed > 0:
            wait = max(0.0, missed / rates.read_bytes_per_s - hidden) + rates.read_latency_s * len(counts) * chance
        prefill = point.prefill_bytes
    if ground.prefill_bytes is not None:
        prefill = ground.prefill_bytes(sizes, plan.cache_bytes, plan.policy, plan.prefill_chunk_tokens)
    if prefill:
        steps = math.ceil(plan.budget.prompt_tokens / plan.prefill_chunk_tokens)
        checked = rates.read_bytes_per_s if rates.first_read_bytes_per_s is None else rates.first_read_bytes_per_s
        first += prefill / checked + steps * len(counts) * rates.read_latency_s
    losses: dict[tuple[str, Precision], float] = {}
    for one in ground.calibration.losses:
        losses[one.unit, one.precision] = max(0.0, one.kl)
    return Recount(
        kl=sum(losses.get((unit, precision), 0.0) for unit, precision in chosen.items()),
        dense_bytes=dense,
        experts_bytes=int(sizes.sum()),
        cycle_bytes=round(cycle),
        disk_bytes=disk,
        compute_s=compute,
        token_s=compute + wait,
        first_token_s=first,
        bytes_per_token=missed,
        hit_rate=1.0 - rate,
        sizes=sizes,
    )


def uses_of(ground: Uses, place: int, layer: DecoderLayer) -> list[float]:
    """Return the share of decoded tokens that use each expert of a layer."""
    if layer.routing is None:
        return []
    count = layer.routing.experts
    row = [1.0] * count if ground.uses is None else [float(one) for one in ground.uses[place, :count]]
    if sum(row) <= 0:
        row = [1.0] * count
    least = 0.1 * sum(row) / count  # nobody counts for less than a tenth of even use
    row = [max(one, least) for one in row]
    return [one * layer.routing.top_k / sum(row) for one in row]


def _seconds(
    rates: DecoderRates,
    shape: tuple[int, int],
    precision: Precision,
    threads: int,
    rows_in: float,
    *,
    expert: bool = False,
) -> float:
    """Return the measured seconds, on the straight line between the two nearest numbers of rows."""
    curve = sorted(
        {
            one.rows_in: one.seconds
            for one in rates.matrices
            if (one.rows, one.columns) == shape and one.precision is precision and one.threads == threads
        }.items()
    )
    for ratio in rates.token_ratios:
        if (ratio.precision, ratio.threads) == (precision, threads) and curve[0][0] == 1:
            curve[0] = (1, curve[0][1] * (ratio.experts if expert else ratio.dense))
    if rows_in >= curve[-1][0]:
        return curve[-1][1] * rows_in / curve[-1][0]
    for (low, low_s), (high, high_s) in itertools.pairwise(curve):
        if low <= rows_in <= high:
            return low_s + (high_s - low_s) * (rows_in - low) / (high - low)
    return curve[0][1]


class _Prompt:
    """Seconds of a matrix over the whole prompt."""

    def __init__(self, plan: DecoderPlan, ground: Ground) -> None:
        whole, rest = divmod(plan.budget.prompt_tokens, plan.prefill_chunk_tokens)
        self._steps = [plan.prefill_chunk_tokens] * whole + ([rest] if rest else [])
        self._rates, self._threads = ground.rates, plan.threads

    def last_rows(self, shape: tuple[int, int], precision: Precision) -> float:
        return len(self._steps) * _seconds(self._rates, shape, precision, self._threads, 1.0)

    def all_rows(self, shape: tuple[int, int], precision: Precision) -> float:
        return sum(_seconds(self._rates, shape, precision, self._threads, float(n)) for n in self._steps)

    def routed_rows(self, shape: tuple[int, int], precision: Precision, use: float) -> float:
        total = 0.0
        for tokens in self._steps:
            chance = 1.0 - (1.0 - min(use, 1.0)) ** tokens
            if chance > 0:
                rows = max(1.0, tokens * use / chance)
                total += chance * _seconds(self._rates, shape, precision, self._threads, rows, expert=True)
        return total


# --- what can be wrong ---------------------------------------------------------------------------------------


def misfits(plan: DecoderPlan, ground: Uses) -> Iterator[str]:
    """Yield every unit without one known precision, and other signs that the plan is of something else."""
    graph = ground.calibration.graph
    if plan.graph_digest != graph.digest():
        yield f"it is of another decoder ({plan.graph_digest[:12]}, not {graph.digest()[:12]})"
    subjects = [choice.subject for choice in plan.choices]
    wanted = set(_units(graph))
    for unit in sorted(wanted - set(subjects)):
        yield f"unit {unit!r} has no precision"
    for unit in sorted({one for one in subjects if one not in wanted or subjects.count(one) > 1}):
        yield f"unit {unit!r} is unknown or stands there twice"
    known = {(one.unit, one.precision) for one in ground.calibration.losses}
    values = {precision.value for precision in Precision}
    chosen = {choice.subject: choice.option for choice in plan.choices}
    if graph.tied_embedding and chosen.get("embedding") != chosen.get("head"):
        yield "embedding and head are tied, but differ in precision"
    for choice in plan.choices:
        if choice.option not in values:
            yield f"unit {choice.subject!r} has the unknown precision {choice.option!r}"
        elif Precision(choice.option) is not Precision.FP32 and (choice.subject, Precision(choice.option)) not in known:
            together = graph.tied_embedding and choice.subject in {"embedding", "head"}
            if not together:
                yield f"unit {choice.subject!r} was never calibrated in {choice.option}"


def _differences(plan: DecoderPlan, ground: Ground, counted: Recount) -> Iterator[str]:
    said = plan.predicted
    pairs: list[tuple[str, float, float]] = [
        ("KL", said.kl, counted.kl),
        ("dense bytes", said.memory.dense_bytes, counted.dense_bytes),
        ("cache bytes", said.memory.cache_bytes, plan.cache_bytes),
        ("runtime bytes", said.memory.runtime_bytes, ground.rates.runtime_bytes),
        ("disk bytes", said.disk_bytes, counted.disk_bytes),
        ("cycle bytes", plan.cycle_bytes, counted.cycle_bytes),
        ("seconds per token", said.token_s.value, counted.token_s),
        ("seconds to the first token", said.first_token_s.value, counted.first_token_s),
        ("bytes per token", said.bytes_per_token, counted.bytes_per_token),
        ("hit rate", said.hit_rate, counted.hit_rate),
    ]
    if ground.kv_bytes is not None:
        pairs.append(("bytes of keys and values", said.memory.kv_bytes, ground.kv_bytes(plan.context_tokens)))
    if ground.activations_bytes is not None:
        most = ground.activations_bytes(plan.prefill_chunk_tokens)
        pairs.append(("activations bytes", said.memory.activations_bytes, most))
    for name, claimed, found in pairs:
        whole = isinstance(claimed, int) and isinstance(found, int)
        allowed = (1 if name == "cycle bytes" else 0) if whole else _RELATIVE * abs(found) + 1e-12
        if abs(claimed - found) > allowed:
            yield f"{name}: {claimed:.9g} is claimed, {found:.9g} counted"
    for name, interval in (("token", said.token_s), ("first token", said.first_token_s)):
        if not interval.low <= interval.value <= interval.high:
            yield f"interval of the {name}: {interval.value:.6g} lies outside {interval.low:.6g} to {interval.high:.6g}"
    if said.bound_token_s > said.token_s.value * (1 + _RELATIVE):
        yield f"bound of the token: {said.bound_token_s:.6g} s exceeds the prediction of {said.token_s.value:.6g} s"


def _broken(plan: DecoderPlan) -> Iterator[str]:
    said, budget = plan.predicted, plan.budget
    rows = (
        ("memory", budget.memory_bytes, said.memory.total_bytes),
        ("time per token", budget.token_s, said.token_s.value),
        ("time to first token", budget.first_token_s, said.first_token_s.value),
        ("disk", budget.disk_bytes, said.disk_bytes),
        ("max KL", budget.kl_limit, said.kl),
    )
    for name, most, value in rows:
        rounding = 0.0 if isinstance(value, int) or most is None else _LIMIT * abs(most) + 1e-12
        if most is not None and value > most + rounding:
            yield f"{name} is limited to {most:.9g}, and the plan takes {value:.9g}"


def _contradictions(plan: DecoderPlan, counted: Recount) -> Iterator[str]:
    if plan.verdict == "decline":
        yield "a declined request has no plan"
    if plan.verdict == "fits" and plan.cache_bytes != counted.experts_bytes:
        yield f"everything is said to fit, but the cache is {plan.cache_bytes}, and all take {counted.experts_bytes}"
    if plan.verdict == "offload" and plan.cache_bytes < counted.cycle_bytes:
        yield f"the cache of {plan.cache_bytes} holds less than one token's {counted.cycle_bytes}"
    proof = plan.proof
    if proof is None:
        return
    said = plan.predicted
    value = {"latency": said.token_s.value, "kl": said.kl, "memory": said.memory.total_bytes}[plan.budget.minimize]
    if abs(proof.objective - value) > _RELATIVE * abs(value) + 1e-12:
        yield f"the proof's objective {proof.objective:.9g} is not the plan's {value:.9g}"
    if proof.bound > proof.objective * (1 + _RELATIVE) + 1e-12:
        yield f"the proof's bound {proof.bound:.9g} exceeds its objective {proof.objective:.9g}"
    gap = max(0.0, proof.objective - proof.bound) / max(abs(proof.objective), 1e-12)
    if abs(gap - proof.gap) > _RELATIVE:
        yield f"the proof's gap {proof.gap:.6g} is not {gap:.6g}"
    if proof.status == "optimal" and (gap > proof.tolerance + _RELATIVE or plan.verdict != "fits"):
        yield f"the proof says optimal with a gap of {gap:.6g} and verdict {plan.verdict}"
