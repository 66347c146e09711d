"""From a table, its measured candidates and a budget to a plan: what ships must have been run for real.

The solver answers for the whole table; here the mixes that were measured are held against the budget with the
accuracy that they really had, the best is taken, and its thresholds are certified on images that chose nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NoReturn

from edgeflex.errors import InfeasibleError
from edgeflex.plans.audit import footprint
from edgeflex.plans.guarantee import certify, samples_needed, upper_bound
from edgeflex.schema import (
    Budget,
    Candidate,
    Certificate,
    Choice,
    CostTable,
    CurvePoint,
    Footprint,
    Interval,
    Proof,
    Scenario,
    Solution,
    Statistic,
    Tier,
)
from edgeflex.units import format_bytes, format_share, format_time

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.plans.program import Quantity

STATISTICS: tuple[Statistic, ...] = ("mean", "p50", "p95", "p99", "worst")
_QUANTILES: Mapping[Statistic, float] = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_TINY = 1e-12
# How far the same program may be from itself on another day of the same machine, as a fraction.
MEASURED_DRIFT = 0.10
_MOST_TESTED = 24


@dataclass(frozen=True)
class Pick:
    """A candidate with the scenario to ship last in ``chain``, and safer ones before it."""

    candidate: Candidate
    costs: Footprint
    chain: tuple[Scenario, ...]
    objective: float
    table: CostTable

    @property
    def mean_s(self) -> float:
        """Mean latency of the scenario to ship."""
        return latency_statistics(self.costs.block_latency_s, self.chain[-1].reach)["mean"]


def shipping_table(table: CostTable, candidate: Candidate) -> CostTable:
    """Return the table of one measured mix: its own scenarios, whose drops already hold what precision costs."""
    free = tuple(
        decision.model_copy(
            update={"options": tuple(one.model_copy(update={"loss": (0.0,)}) for one in decision.options)}
        )
        for decision in table.decisions
    )
    own = table.model_copy(update={"scenarios": candidate.scenarios, "decisions": free})
    if not candidate.segment_s:
        return own
    # the additive model has done its work in the search; what ran is promised as it ran
    counted = footprint(own, 0, candidate.choices)
    fixed_s = tuple(
        fixed + ran - sum_s
        for fixed, ran, sum_s in zip(own.fixed_latency_s, candidate.segment_s, counted.block_latency_s, strict=True)
    )
    memory = dict(own.fixed_memory_bytes)
    if candidate.memory_bytes is not None:
        beyond_weights = candidate.memory_bytes - counted.memory_bytes[Tier.HOST] + memory.get(Tier.HOST, 0)
        memory[Tier.HOST] = max(0, beyond_weights)
    return own.model_copy(
        update={
            "fixed_latency_s": fixed_s,
            "fixed_memory_bytes": memory,
            "latency_relative_error": MEASURED_DRIFT,
        }
    )


def latency_statistics(block_s: Sequence[float], reach: Sequence[float]) -> dict[Statistic, float]:
    """Return mean, percentiles and worst case of a cascade whose block b runs with probability reach[b]."""
    found: dict[Statistic, float] = {"mean": sum(t * r for t, r in zip(block_s, reach, strict=True))}
    for statistic, quantile in _QUANTILES.items():
        found[statistic] = sum(
            seconds
            for index, (seconds, share) in enumerate(zip(block_s, reach, strict=True))
            if index == 0 or share > 1.0 - quantile + _TINY
        )
    found["worst"] = sum(t for t, r in zip(block_s, reach, strict=True) if r > 0)
    return found


def _within(costs: Footprint, latency: Mapping[Statistic, float], budget: Budget) -> bool:
    if any(costs.memory_bytes.get(tier, 0) > limit for tier, limit in budget.memory_bytes.items()):
        return False
    if budget.disk_bytes is not None and costs.disk_bytes > budget.disk_bytes:
        return False
    return all(latency[limit.statistic] <= limit.limit_s for limit in budget.latency)


def _objective(costs: Footprint, latency: Mapping[Statistic, float], drop: float, budget: Budget) -> float:
    if budget.minimize == "latency":
        return latency[budget.statistic]
    if budget.minimize == "drop":
        return drop
    tiers = budget.memory_bytes or costs.memory_bytes
    return float(sum(costs.memory_bytes.get(tier, 0) for tier in tiers))


def _latency(block_s: Sequence[float], reach: Sequence[float], samples: int | None) -> dict[Statistic, float]:
    """Return the statistics to hold against limits: percentiles as of a reach that sampling may have hidden."""
    found = latency_statistics(block_s, reach)
    if samples is not None:
        raised = latency_statistics(block_s, shifted(reach, samples, 1.0))
        found.update({name: raised[name] for name in _QUANTILES})
    return found


def pick(
    table: CostTable, candidates: Sequence[Candidate], budget: Budget, *, samples: int | None = None
) -> Pick | None:
    """Return the best measured candidate within every budget, or None.

    With ``samples``, the number of choosing images, percentile limits are held with the sampling error of reach.

    ``chain`` ends with the scenario of best objective whose drop on the choosing images is within ``max_drop``;
    before it stand slower scenarios of less drop, safest first and each faster than the one before, all within
    the other budgets.
    """
    best: Pick | None = None
    best_worth = (math.inf, math.inf)
    for candidate in candidates:
        own = shipping_table(table, candidate)
        costs = footprint(own, 0, candidate.choices)
        ranked = []
        for scenario in candidate.scenarios:
            latency = _latency(costs.block_latency_s, scenario.reach, samples)
            if _within(costs, latency, budget):
                ranked.append((_objective(costs, latency, scenario.loss, budget), scenario, latency["mean"]))
        allowed = [one for one in ranked if budget.max_drop is None or one[1].loss <= budget.max_drop]
        if not allowed:
            continue
        # equal objectives (memory is the same for every scenario of a mix) go to the faster scenario
        objective, scenario, mean_s = min(allowed, key=lambda one: (one[0], one[2]))
        worth = _worth(allowed, budget, samples)
        if best is None or worth < best_worth:
            slower = [(one.loss, mean, one) for _, one, mean in ranked if one.loss < scenario.loss and mean > mean_s]
            best = Pick(candidate, costs, (*_staircase(slower), scenario), objective, own)
            best_worth = worth
    return best


def explain(
    table: CostTable,
    candidates: Sequence[Candidate],
    budget: Budget,
    *,
    samples: int | None = None,
    hint: str = "",
) -> InfeasibleError:
    """Return the error that says why ``pick`` finds nothing: what measured plans need, and the cheapest way out.

    Args:
        table: As for ``pick``.
        candidates: At least one.
        budget: With at least one limit.
        samples: As for ``pick``.
        hint: What else may help, as a sentence.
    """
    from edgeflex.plans.program import limits_of
    from edgeflex.plans.verdict import explain_points

    limits = limits_of(budget)
    points = []
    for candidate in candidates:
        costs = footprint(shipping_table(table, candidate), 0, candidate.choices)
        for scenario in candidate.scenarios:
            latency = _latency(costs.block_latency_s, scenario.reach, samples)
            points.append([_taken(limit.quantity, costs, latency, scenario.loss) for limit in limits])
    return explain_points(limits, points, hint)


def _taken(quantity: Quantity, costs: Footprint, latency: Mapping[Statistic, float], drop: float) -> float:
    """Return how much of a quantity a measured plan takes."""
    if quantity.kind == "latency":
        return latency[quantity.statistic]
    if quantity.kind == "drop":
        return drop
    return float(
        costs.disk_bytes if quantity.kind == "disk" else sum(costs.memory_bytes.get(one, 0) for one in quantity.tiers)
    )


def _worth(
    allowed: Sequence[tuple[float, Scenario, float]], budget: Budget, samples: int | None
) -> tuple[float, float]:
    """Return what a mix is ranked by: objective and mean latency of the scenario that it will likely ship.

    Certification gives up part of the allowed drop to sampling error; mixes are held against each other at half
    of it, where they will end up, and not at a boldness that none is certified for.
    """
    likely = allowed
    if samples is not None and budget.max_drop is not None:
        half = budget.max_drop / 2
        likely = [one for one in allowed if one[1].loss <= half] or allowed
    objective, _, mean_s = min(likely, key=lambda one: (one[0], one[2]))
    return objective, mean_s


def _staircase(slower: Sequence[tuple[float, float, Scenario]]) -> list[Scenario]:
    """Return of (drop, mean latency, scenario) those that no other beats in both, least drop first."""
    kept: list[Scenario] = []
    least_s = math.inf
    for _, mean_s, scenario in sorted(slower, key=lambda one: one[:2]):
        if mean_s < least_s:
            kept.append(scenario)
            least_s = mean_s
    return kept[-_MOST_TESTED:]


def lengthened(chosen: Pick, safer: Sequence[Scenario], budget: Budget, *, samples: int | None = None) -> Pick:
    """Return the pick with still safer scenarios before its chain, as far as they are within the budgets."""
    fits = [
        one
        for one in safer
        if _within(chosen.costs, _latency(chosen.costs.block_latency_s, one.reach, samples), budget)
    ]
    table = chosen.table.model_copy(update={"scenarios": (*chosen.table.scenarios, *fits)})
    return Pick(chosen.candidate, chosen.costs, (*fits, *chosen.chain), chosen.objective, table)


def certified(
    chosen: Pick,
    budget: Budget,
    losses: Callable[[Sequence[Scenario]], NDArray[np.float64]],
) -> tuple[Scenario, Certificate]:
    """Return the last scenario of the chain whose accuracy promise holds, with its certificate.

    Fixed-sequence testing from the safest scenario on (Angelopoulos et al. 2021, Learn then Test, section 3.2)
    with betting p-values (Waudby-Smith and Ramdas 2024). Without ``max_drop`` the shipped scenario is the
    chain's last, and the certificate states the least drop that can be promised for it.

    Args:
        chosen: From ``pick``.
        budget: With max_drop and confidence.
        losses: Gives the paired losses [scenarios, samples] in -1, 0, 1 on images that chose nothing.

    Raises:
        InfeasibleError: Not even the safest scenario can be certified.
    """
    matrix = losses(chosen.chain)
    index: int | None = len(chosen.chain) - 1
    if budget.max_drop is not None:
        # no finite sample shows that nothing at all is lost
        index = certify(matrix, budget.max_drop, budget.confidence) if budget.max_drop > 0 else None
    if index is None:
        _refuse(chosen, budget, matrix)
    row = matrix[index]
    bound = upper_bound(row, budget.confidence)
    limit = budget.max_drop or bound
    return chosen.chain[index], Certificate(
        test="fixed-sequence testing with betting p-values on paired 0/1 losses",
        drop_limit=limit,
        confidence=budget.confidence,
        samples=matrix.shape[1],
        candidates=len(chosen.chain),
        certified_index=index,
        drop=float(row.mean()),
        drop_upper_bound=limit,
    )


def _refuse(chosen: Pick, budget: Budget, matrix: NDArray[np.float64]) -> NoReturn:
    # only the first row was fixed before any was looked at; rounded up, so that it passes when it is asked for
    least = math.ceil(upper_bound(matrix[0], budget.confidence) * 1e4) / 1e4
    mean_s = latency_statistics(chosen.costs.block_latency_s, chosen.chain[0].reach)["mean"]
    limit = budget.max_drop or 0.0
    needed = samples_needed(matrix[0], limit, budget.confidence) if limit > 0 else None
    more = f" or give calibrate about {needed / matrix.shape[1]:.1f} times as many images" if needed else ""
    raise InfeasibleError(
        f"a drop of at most {format_share(limit)} cannot be promised with {format_share(budget.confidence, 0)} "
        f"confidence from {matrix.shape[1]} images: the safest plan can promise {format_share(least)}, at "
        f"{format_time(mean_s)} and {format_bytes(sum(chosen.costs.memory_bytes.values()))}. "
        f"Pass --max-drop {least * 100:.2f}%{more}.",
        binding=("max drop",),
        least={"max drop": least},
        relaxation=f"--max-drop {least * 100:.2f}%",
    )


def exit_shares(reach: Sequence[float]) -> tuple[float, ...]:
    """Return the share of inputs that leave at each exit."""
    later = [*reach[1:], 0.0]
    return tuple(max(0.0, here - after) for here, after in zip(reach, later, strict=True))


def latency_intervals(
    predicted: Footprint, reach: Sequence[float], relative_error: float, samples: int
) -> dict[Statistic, Interval]:
    """Return each latency statistic with its range.

    The range holds the error of the latency model and that of the exit shares, which come from ``samples``
    images: twice the standard error, for the mean of the mean, for percentiles of the share that goes on.
    """
    block_s = predicted.block_latency_s
    cumulative = list(accumulate(block_s))
    mean_s = predicted.latency_s["mean"]
    shares = exit_shares(reach)
    variance = sum(share * (seconds - mean_s) ** 2 for share, seconds in zip(shares, cumulative, strict=True))
    sampling_s = 2.0 * math.sqrt(variance / max(1, samples))
    fewer = latency_statistics(block_s, shifted(reach, samples, -1.0))
    more = latency_statistics(block_s, shifted(reach, samples, 1.0))
    found: dict[Statistic, Interval] = {}
    for statistic, value in predicted.latency_s.items():
        low_s, high_s, extra = (value, value, sampling_s) if statistic == "mean" else (value, value, 0.0)
        if statistic in _QUANTILES:
            low_s, high_s = fewer[statistic], more[statistic]
        low, high = low_s * (1.0 - relative_error) - extra, high_s * (1.0 + relative_error) + extra
        found[statistic] = Interval(value=value, low=max(0.0, low), high=high)
    return found


def shifted(reach: Sequence[float], samples: int, by: float) -> tuple[float, ...]:
    """Return the reach moved to the end of its interval on ``samples`` images: up for ``by`` of 1, down for -1.

    A percentile jumps where reach crosses its share; a plan that stands at the edge would break it half the time.
    The interval is Wilson's (1927) at twice the standard error: percentiles turn on shares that few images make, where
    the standard error of what was seen is too small. A share below that of one image stands for none (``judge`` in
    ``costs.policies``); 0 and 1 were fixed by thresholds, not sampled.
    """
    return tuple(share if share in {0.0, 1.0} else _wilson_end(share, max(1, samples), 2.0 * by) for share in reach)


def _wilson_end(share: float, samples: int, errors: float) -> float:
    least = 1.0 - 0.5 / (samples + 1)  # images: between one and what stands for none
    seen = share if share * samples > least else 0.0
    square = errors * errors / samples
    half = errors * math.sqrt((seen * (1.0 - seen) + square / 4.0) / samples)
    return min(1.0, max(0.0, (seen + square / 2.0 + half) / (1.0 + square)))


def objective_of(predicted: Footprint, budget: Budget) -> float:
    """Return what the budget minimises, as the footprint has it."""
    return _objective(predicted, predicted.latency_s, predicted.loss, budget)


def curve_points(table: CostTable, candidates: Sequence[Candidate], budget: Budget) -> tuple[CurvePoint, ...]:
    """Return the measured plans that no other beats in latency and drop, within the memory and disk budgets."""
    free = budget.model_copy(update={"latency": (), "max_drop": None})
    found = []
    for candidate in candidates:
        costs = footprint(shipping_table(table, candidate), 0, candidate.choices)
        for scenario in candidate.scenarios:
            latency = latency_statistics(costs.block_latency_s, scenario.reach)
            if _within(costs, latency, free):
                memory_bytes = sum(costs.memory_bytes.values())
                found.append((latency[budget.statistic], scenario.loss, memory_bytes, _counted(candidate)))
    kept: list[CurvePoint] = []
    for seconds, drop, memory_bytes, label in sorted(found):
        if not kept or drop < kept[-1].drop:
            kept.append(CurvePoint(label=label, latency_s=seconds, memory_bytes=memory_bytes, drop=drop))
    return tuple(kept)


def static_points(table: CostTable, candidates: Sequence[Candidate], reference: float) -> tuple[CurvePoint, ...]:
    """Return each measured mix run to full depth, for the early exits to be held against."""
    points = []
    for candidate in candidates:
        costs = footprint(shipping_table(table, candidate), 0, candidate.choices)
        points.append(
            CurvePoint(
                label=_label(candidate),
                latency_s=sum(costs.block_latency_s),
                memory_bytes=sum(costs.memory_bytes.values()),
                drop=reference - candidate.accuracy,
            )
        )
    return tuple(points)


def _counted(candidate: Candidate) -> str:
    """Return a mix as people read it: how many layers have which precision."""
    counts = Counter(choice.option for choice in candidate.choices)
    if len(counts) == 1:
        return f"all {next(iter(counts))}"
    return " + ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def _label(candidate: Candidate) -> str:
    names = sorted({choice.option for choice in candidate.choices})
    return f"full depth, {names[0]}" if len(names) == 1 else "full depth, " + " + ".join(names)


def layer_losses(table: CostTable, choices: Sequence[Choice], reach: Sequence[float]) -> dict[str, float]:
    """Return what each decision's option costs in the table's scenario whose reach is nearest to ``reach``."""
    distances = [sum(abs(a - b) for a, b in zip(one.reach, reach, strict=True)) for one in table.scenarios]
    nearest = distances.index(min(distances))
    chosen = {choice.subject: choice.option for choice in choices}
    found = {}
    for decision in table.decisions:
        loss = next(one.loss for one in decision.options if one.name == chosen[decision.subject])
        found[decision.subject] = loss[nearest] if len(loss) > 1 else loss[0]
    return found


def restated(solution: Solution, objective: float) -> Proof:
    """Return the solver's proof for what ships instead: the table's bound, the shipped objective.

    The bound says that no combination of precisions and policies in the table does better by the table's own
    additive losses. What ships was measured, with policies of its own, and may do better than the table
    thought possible; then nothing is proven about it, and the bound given is its own objective.
    """
    proof = solution.proof
    bound = min(proof.bound, objective)
    gap = (objective - bound) / max(abs(objective), _TINY)
    proven = proof.bound <= objective and gap <= proof.tolerance and proof.status == "optimal"
    status: Literal["optimal", "feasible"] = "optimal" if proven else "feasible"
    return proof.model_copy(update={"objective": objective, "bound": bound, "gap": gap, "status": status})
