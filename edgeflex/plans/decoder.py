"""The decoder planner's door: precisions of all units, cache, policy, threads and chunk, decided together.

Costs are in ``decoder_costs``, the time and memory model in ``decoder_predict``, the search in
``decoder_search``, reasons why nothing fits in ``decoder_verdict``; ``decoder_audit`` recounts what comes out
of here and shares no code with it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from edgeflex.errors import InputError
from edgeflex.plans import decoder_costs as costs
from edgeflex.plans.decoder_mixes import Knapsack
from edgeflex.plans.decoder_predict import Doubts, Predictor
from edgeflex.plans.decoder_search import Found, Limits, Search
from edgeflex.plans.decoder_verdict import DeclinedError, explain
from edgeflex.schema import Choice, Proof
from edgeflex.schema_moe import DECODER_PRECISIONS, DecoderPlan
from edgeflex.units import format_bytes, format_share

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgeflex.plans.decoder_costs import Floats, PackedBytes, Space
    from edgeflex.plans.decoder_mixes import Goal, Mix
    from edgeflex.plans.decoder_predict import Misses, PrefillBytes
    from edgeflex.schema import Precision
    from edgeflex.schema_moe import DecoderBudget, DecoderCalibration, DecoderGraph, DecoderRates

__all__ = ["DeclinedError", "Doubts", "plan_decoder"]

CHUNKS = (16, 32, 64, 128, 256)
_TOLERANCE = 1e-4
_TINY = 1e-12


def plan_decoder(
    calibration: DecoderCalibration,
    rates: DecoderRates,
    budget: DecoderBudget,
    misses: Misses,
    *,
    packed_bytes: PackedBytes,
    prefill_bytes: PrefillBytes | None = None,
    uses: Floats | None = None,
    policies: Sequence[str] = ("enu",),
    threads: Sequence[int] | None = None,
    chunks: Sequence[int] = CHUNKS,
    kv_bytes: Callable[[int], int] | None = None,
    activations_bytes: Callable[[int], int] | None = None,
    precisions: Sequence[Precision] = DECODER_PRECISIONS,
    doubts: Doubts | None = None,
    most_replays: int = 300,
    enumerate_up_to: int = 4096,
    time_limit_s: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> DecoderPlan:
    """Return the plan of least ``budget.minimize`` that keeps every limit of ``budget``.

    The dense part always lies in memory. Experts lie there too if they all fit (verdict ``fits``), else in a
    cache of a size from a fixed ladder (``offload``). The proof's bound holds for resident plans over all mixes;
    for cached ones it also rests on larger experts never missing less often than smaller ones in the same cache,
    and on the policies tried, so that only resident plans are ever called ``optimal``.

    Args:
        calibration: KL of every unit and precision, and the graph.
        rates: Measured seconds of the graph's shapes, and of reading.
        budget: Limits and what is to be least.
        misses: Replays the routing trace through the real cache: sizes [layers, experts] in bytes, cache bytes and
            policy to a ``MissPoint`` whose ``prefill_bytes`` are those of a prompt of ``budget.prompt_tokens``.
        packed_bytes: Bytes of one matrix as the kernels want it.
        prefill_bytes: The same sizes, cache and policy, and a chunk, to the bytes that the prompt reads; by default
            those of ``misses``, whatever the chunk.
        uses: Share of decoded tokens that use each expert, [layers, experts]; even use by default.
        policies: Names to choose among, the preferred one first.
        threads: Numbers to choose among; all that ``rates`` holds by default.
        chunks: Tokens per prefill step to choose among.
        kv_bytes: Context tokens to bytes of keys and values; fp32 of all heads by default.
        activations_bytes: Chunk to bytes of buffers; an estimate from the shapes by default.
        precisions: Options to consider.
        doubts: Stated uncertainties of the predictions.
        most_replays: Replays of the trace that may be asked for.
        enumerate_up_to: Mixes up to which every single one is looked at.
        time_limit_s: Of each exact search.
        clock: Gives seconds; only differences count.

    Raises:
        InputError: Settings contradict the graph, or a unit was neither calibrated nor measured.
        InfeasibleError: No plan keeps every limit; ``DeclinedError`` where streaming experts is what fails.
        EdgeflexError: The allowed replays were used up before a plan was found.
    """
    began = clock()
    graph = calibration.graph
    space = costs.build_space(calibration, rates, packed_bytes, uses=uses, precisions=precisions)
    numbers = tuple(threads or space.threads)
    _refuse(graph, space, budget, numbers, policies, chunks)
    predictor = Predictor(
        space,
        misses,
        prompt_tokens=budget.prompt_tokens,
        kv_bytes=(kv_bytes or (lambda tokens: costs.kv_bytes(graph, tokens)))(budget.context_tokens),
        activations_bytes=activations_bytes or (lambda chunk: costs.activations_bytes(graph, chunk)),
        prefill_bytes=prefill_bytes,
        doubts=doubts or Doubts(),
        most_replays=most_replays,
    )
    knapsack = Knapsack(space, time_limit_s=time_limit_s, clock=clock)
    search = Search(
        predictor,
        knapsack,
        policies=tuple(policies),
        threads=numbers,
        chunks=_useful(chunks, budget),
        enumerate_up_to=enumerate_up_to,
    )
    limits = Limits(
        memory_bytes=budget.memory_bytes,
        token_s=budget.token_s,
        first_token_s=budget.first_token_s,
        disk_bytes=budget.disk_bytes,
        kl=budget.kl_limit,
    )
    found = search.best(limits, budget.minimize)
    if found is None:
        raise explain(search, limits)
    proof = _proof(search, found, limits, budget.minimize, lambda: clock() - began)
    return _plan(graph, search, found, budget, proof)


def _useful(chunks: Sequence[int], budget: DecoderBudget) -> tuple[int, ...]:
    """Return the chunks up to the first that holds the whole prompt."""
    ordered = sorted(set(chunks))
    whole = next((one for one in ordered if one >= budget.prompt_tokens), ordered[-1])
    return tuple(one for one in ordered if one <= whole)


def _refuse(
    graph: DecoderGraph,
    space: Space,
    budget: DecoderBudget,
    threads: Sequence[int],
    policies: Sequence[str],
    chunks: Sequence[int],
) -> None:
    faults = [
        f"{name} of {value:g} must be above zero; give a limit or leave it out."
        for name, value in (
            ("memory", budget.memory_bytes),
            ("time per token", budget.token_s),
            ("time to first token", budget.first_token_s),
            ("disk", budget.disk_bytes),
        )
        if value is not None and value <= 0
    ]
    if budget.max_perplexity_rise is not None and budget.max_perplexity_rise < 0:
        faults.append(f"perplexity rise of {budget.max_perplexity_rise:g} is below zero; give at least 0.")
    if budget.max_kl is not None and budget.max_kl < 0:
        faults.append(f"max KL of {budget.max_kl:g} is below zero; give nats per token of at least 0.")
    if not 0 < budget.prompt_tokens < budget.context_tokens:
        faults.append(
            f"a prompt of {budget.prompt_tokens} tokens does not fit a context of {budget.context_tokens} with room "
            "for an answer; give 1 or more tokens and a larger context."
        )
    if budget.context_tokens > graph.context_tokens:
        faults.append(
            f"a context of {budget.context_tokens} tokens is more than the {graph.context_tokens} that "
            f"{graph.name!r} knows; give a smaller one."
        )
    unknown = sorted(set(threads) - set(space.threads))
    if unknown or not threads:
        faults.append(f"rates hold {list(space.threads)} threads, not {unknown or 'none'}; measure or name those.")
    if not policies or not chunks or min(chunks) < 1:
        faults.append("no policy or no chunk to choose from; name at least one of each, chunks of at least 1 token.")
    if faults:
        raise InputError.collect("decoder plan request", faults)


def _proof(search: Search, found: Found, limits: Limits, goal: Goal, wall_s: Callable[[], float]) -> Proof:
    bound = min(search.bound(limits, goal), found.value)
    gap = max(0.0, found.value - bound) / max(abs(found.value), _TINY)
    # a cached plan's bound rests on the trace and on what was tried; only a resident one is compared with all mixes
    proven = found.setting.resident and gap <= _TOLERANCE and not search.stopped
    minimize: Literal["latency", "memory", "drop"] = "latency"
    if goal == "memory":
        minimize = "memory"
    elif goal == "kl":
        minimize = "drop"
    return Proof(
        solver=f"pool of priced mixes, replay, then HiGHS; {search.predictor.replays} replays"
        + (", stopped at their limit" if search.stopped else ""),
        status="optimal" if proven else "feasible",
        minimize=minimize,
        objective=found.value,
        bound=bound,
        gap=gap,
        tolerance=_TOLERANCE,
        wall_s=wall_s(),
        scenarios=len(search.tried),
        scenarios_solved=len(search.tried),
    )


def _plan(graph: DecoderGraph, search: Search, found: Found, budget: DecoderBudget, proof: Proof) -> DecoderPlan:
    mix, setting = found.mix, found.setting
    verdict: Literal["fits", "offload"] = "fits" if setting.resident else "offload"
    return DecoderPlan(
        graph_digest=graph.digest(),
        budget=budget,
        verdict=verdict,
        reasons=_reasons(search, found, budget),
        choices=_choices(search.space, mix),
        cache_bytes=setting.cache_bytes,
        cycle_bytes=mix.cycle_bytes,
        policy=setting.policy,
        threads=setting.threads,
        context_tokens=budget.context_tokens,
        prefill_chunk_tokens=setting.chunk_tokens,
        predicted=search.predictor.predict(mix, setting),
        proof=proof,
        conditions=search.space.rates.conditions,
    )


def _choices(space: Space, mix: Mix) -> tuple[Choice, ...]:
    return tuple(
        Choice(subject=unit, option=space.options[column].value)
        for pick, column in zip(space.picks, mix.columns.tolist(), strict=True)
        for unit in pick.units
    )


def _reasons(search: Search, found: Found, budget: DecoderBudget) -> tuple[str, ...]:
    mix, setting = found.mix, found.setting
    total = search.predictor.memory(mix, setting).total_bytes
    limit = "no memory limit" if budget.memory_bytes is None else f"a limit of {format_bytes(budget.memory_bytes)}"
    if setting.resident:
        return (
            f"everything fits: {format_bytes(total)} with all experts in memory, {limit}",
            "nothing is read while decoding",
        )
    share = setting.cache_bytes / max(1, mix.experts_bytes)
    held = (
        f"experts take {format_bytes(mix.experts_bytes)}; the cache holds {format_bytes(setting.cache_bytes)} "
        f"({format_share(share, 0)}) of them{'' if budget.memory_bytes is None else f' within {limit}'}"
    )
    cycles = setting.cache_bytes / max(1, mix.cycle_bytes)
    return held, f"one token uses {format_bytes(mix.cycle_bytes)} of experts (T); the cache is {cycles:.2f} T"
