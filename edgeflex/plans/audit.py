"""An independent recount of plans: what one costs, whether it keeps its word, whether its proof can hold.

Nothing here is shared with the solver, neither code nor arithmetic: plain sums over the table, decision
by decision. The rules that both follow are those of ``schema.CostTable``:

* latency of block b = fixed + options of its decisions (+ miss rate x miss latency) + boundaries whose two
  ends differ in format;
* mean = sum of reach x block; worst = sum over blocks with any reach; a percentile = sum over blocks that
  more than 1 - q of the inputs reach, the first always;
* bytes = fixed + options, in every block, reached or not; loss = scenario's + options'.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeflex.errors import CheckFailedError
from edgeflex.schema import Footprint, Format, Tier
from edgeflex.units import format_exact_bytes, format_share, format_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgeflex.schema import (
        Boundary,
        Budget,
        Choice,
        CostTable,
        Decision,
        Option,
        Plan,
        Proof,
        Scenario,
        Solution,
        Statistic,
    )

_RELATIVE = 1e-6  # claimed against recounted figures
_LIMIT = 1e-9  # rounding of sums, as a share of the limit
_TINY = 1e-12
_SWAP_WORK = 2_000_000  # additions that the search for a cheaper neighbour may cost


def footprint(table: CostTable, scenario_index: int, choices: Sequence[Choice]) -> Footprint:
    """Return what ``choices`` cost in one scenario, with latency in all five statistics.

    Args:
        table: Scenarios, decisions and options.
        scenario_index: Which scenario, from 0.
        choices: One option for every decision, in any order.

    Raises:
        CheckFailedError: The scenario does not exist, or the choices do not fit the decisions.
    """
    _refuse(f"a plan of table {table.name!r}", list(_misfits(table, scenario_index, choices)))
    taken = _taken(table, choices)
    return _count(table, scenario_index, taken)


def shortfalls(counted: Footprint, budget: Budget, *, rounding: float = _LIMIT) -> dict[str, tuple[float, float]]:
    """Return each limit that ``counted`` breaks: name to (limit, value), in bytes, seconds or a share.

    Args:
        counted: What a plan costs.
        budget: Its limits.
        rounding: Share of a limit that rounding of sums may add; sizes are whole numbers and get none.
    """
    rows: list[tuple[str, float, float, bool]] = [
        (tier.budget_name, most, counted.memory_bytes.get(tier, 0), True) for tier, most in budget.memory_bytes.items()
    ]
    rows += [
        (f"latency {limit.statistic}", limit.limit_s, counted.latency_s[limit.statistic], False)
        for limit in budget.latency
    ]
    if budget.disk_bytes is not None:
        rows.append(("disk", budget.disk_bytes, counted.disk_bytes, True))
    if budget.max_drop is not None:
        rows.append(("max drop", budget.max_drop, counted.loss, False))
    broken: dict[str, tuple[float, float]] = {}
    for name, most, value, whole in rows:
        allowance = 0.0 if whole or not rounding else rounding * abs(most) + _TINY
        if value > most + allowance and (name not in broken or most < broken[name][0]):
            broken[name] = (float(most), float(value))
    return broken


def check(table: CostTable, budget: Budget, solution: Solution) -> Footprint:
    """Return the recounted footprint of ``solution`` if everything that it says holds.

    Beside the choices and the budgets this checks the proof: the objective is recounted, bound, gap and
    status must agree with each other, and no bound may exceed a plan that this recount can find by swapping
    one decision. What remains unproven here is only that the bound is as high as claimed.

    Raises:
        CheckFailedError: Something is missing, unknown, broken or claimed wrongly; all of it is listed.
    """
    where = f"solution of table {table.name!r}"
    _refuse(where, list(_misfits(table, solution.scenario, solution.choices)))
    taken = _taken(table, solution.choices)
    counted = _count(table, solution.scenario, taken)
    _refuse(where, [*_broken(table, budget, taken, counted), *_proof_faults(table, budget, solution, counted)])
    return counted


def check_plan(table: CostTable, plan: Plan) -> Footprint:
    """Return the recounted footprint of ``plan`` if it is a plan of ``table`` and foretells it rightly.

    Raises:
        CheckFailedError: Another table, another scenario, choices that do not fit, a broken budget, or
            predicted figures that differ from the recount; all of it is listed.
    """
    where = f"plan {plan.name!r}"
    if plan.table_digest != table.digest():
        _refuse(where, [f"is of table {plan.table_digest[:12] or 'none'}, not {table.digest()[:12]}; give its own."])
    if plan.scenario not in table.scenarios:
        _refuse(where, [f"has scenario {plan.scenario.name!r}, which the table does not hold as written."])
    index = table.scenarios.index(plan.scenario)
    _refuse(where, list(_misfits(table, index, plan.choices)))
    taken = _taken(table, plan.choices)
    counted = _count(table, index, taken)
    faults = [
        *_origin_faults(table, plan),
        *_broken(table, plan.budget, taken, counted),
        *_prediction_faults(plan.predicted, counted),
        *_claim_faults(plan.budget, plan.proof, counted),
    ]
    _refuse(where, faults)
    return counted


def _refuse(where: str, faults: Sequence[str]) -> None:
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise CheckFailedError(f"{where} does not hold, {len(faults)} faults. Plan again from the table.{listed}")


# --- counting ------------------------------------------------------------------------------------------


def _misfits(table: CostTable, scenario_index: int, choices: Sequence[Choice]) -> Iterator[str]:
    if not 0 <= scenario_index < len(table.scenarios):
        yield f"scenario {scenario_index} is not one of 0 to {len(table.scenarios) - 1}."
    options = {decision.subject: {one.name for one in decision.options} for decision in table.decisions}
    seen: set[str] = set()
    for choice in choices:
        if choice.subject in seen:
            yield f"decision {choice.subject!r} is taken twice."
        seen.add(choice.subject)
        if choice.subject not in options:
            yield f"decision {choice.subject!r} is not in the table."
        elif choice.option not in options[choice.subject]:
            yield f"decision {choice.subject!r} has no option {choice.option!r}."
    for subject in options:
        if subject not in seen:
            yield f"decision {subject!r} is missing."


def _taken(table: CostTable, choices: Sequence[Choice]) -> dict[str, Option]:
    named = {choice.subject: choice.option for choice in choices}
    return {
        decision.subject: next(one for one in decision.options if one.name == named[decision.subject])
        for decision in table.decisions
    }


def _count(table: CostTable, scenario_index: int, taken: Mapping[str, Option]) -> Footprint:
    scenario = table.scenarios[scenario_index]
    blocks = list(table.fixed_latency_s)
    memory = dict(table.fixed_memory_bytes)
    disk_bytes = table.fixed_disk_bytes
    losses = [scenario.loss]
    for decision in table.decisions:
        option = taken[decision.subject]
        blocks[decision.block] += _option_latency_s(scenario, decision, option)
        for tier, size in option.memory_bytes.items():
            memory[tier] = memory.get(tier, 0) + size
        disk_bytes += option.disk_bytes
        losses.append(option.loss[scenario_index] if len(option.loss) > 1 else option.loss[0])
    for edge in table.boundaries:
        blocks[edge.block] += _crossing_s(edge, taken)
    return Footprint(
        loss=math.fsum(losses),
        latency_s=_statistics(scenario, blocks),
        block_latency_s=tuple(blocks),
        memory_bytes=memory,
        disk_bytes=disk_bytes,
    )


def _option_latency_s(scenario: Scenario, decision: Decision, option: Option) -> float:
    if decision.group is None:
        return option.latency_s
    return option.latency_s + scenario.miss_rate.get(decision.group, 0.0) * option.miss_latency_s


def _crossing_s(edge: Boundary, taken: Mapping[str, Option]) -> float:
    source = taken[edge.source].format if edge.source else Format.FLOAT
    target = taken[edge.target].format if edge.target else Format.FLOAT
    return 0.0 if source is target else edge.latency_s


def _statistics(scenario: Scenario, blocks: Sequence[float]) -> dict[Statistic, float]:
    pairs = list(zip(scenario.reach, blocks, strict=True))

    def deepest(share: float) -> float:
        return math.fsum(s for place, (reach, s) in enumerate(pairs) if place == 0 or reach > share)

    return {
        "mean": math.fsum(reach * seconds for reach, seconds in pairs),
        "p50": deepest(1 - 0.50 + 1e-12),
        "p95": deepest(1 - 0.95 + 1e-12),
        "p99": deepest(1 - 0.99 + 1e-12),
        "worst": deepest(0.0),
    }


def _objective(budget: Budget, counted: Footprint) -> float:
    if budget.minimize == "latency":
        return counted.latency_s[budget.statistic]
    if budget.minimize == "drop":
        return counted.loss
    tiers = list(budget.memory_bytes) or list(Tier)
    return float(sum(counted.memory_bytes.get(tier, 0) for tier in tiers))


# --- what can be wrong ---------------------------------------------------------------------------------


def _broken(
    table: CostTable, budget: Budget, taken: Mapping[str, Option], counted: Footprint, *, rounding: float = _LIMIT
) -> Iterator[str]:
    tied: dict[str, tuple[str, str]] = {}
    for decision in table.decisions:
        if decision.tie is None:
            continue
        name = taken[decision.subject].name
        first, option = tied.setdefault(decision.tie, (decision.subject, name))
        if option != name:
            yield f"tie {decision.tie!r} is broken: {first} takes {option!r}, {decision.subject} takes {name!r}."
    for rule in table.rules:
        count = sum(1 for subject in rule.subjects if taken[subject].name == rule.option)
        most = len(rule.subjects) if rule.at_most is None else rule.at_most
        if not rule.at_least <= count <= most:
            yield f"{count} decisions take {rule.option!r}; the rule says {rule.at_least} to {most}."
    for name, (limit, value) in shortfalls(counted, budget, rounding=rounding).items():
        yield f"{name} is {_show(name, value)}, above its limit {_show(name, limit)}."


def _show(name: str, value: float) -> str:
    if name.startswith("latency"):
        return format_time(value)
    return format_share(value, 4) if name == "max drop" else format_exact_bytes(value)


def _near(claimed: float, counted: float) -> bool:
    return math.isfinite(claimed) and abs(claimed - counted) <= _RELATIVE * max(abs(claimed), abs(counted)) + _TINY


def _claim_faults(budget: Budget, proof: Proof, counted: Footprint) -> Iterator[str]:
    """Hold the proof against the recount and against itself."""
    if proof.minimize != budget.minimize:
        yield f"the proof is about least {proof.minimize}, the budget about least {budget.minimize}."
        return
    objective = _objective(budget, counted)
    if not _near(proof.objective, objective):
        yield f"objective {proof.objective!r} is claimed, {objective!r} is counted."
    if proof.bound > proof.objective + _RELATIVE * abs(proof.objective):
        yield f"bound {proof.bound!r} lies above objective {proof.objective!r}."
    gap = (proof.objective - proof.bound) / max(abs(proof.objective), _TINY)
    if not abs(proof.gap - gap) <= _RELATIVE * max(1.0, abs(gap)):  # so that nan is a fault
        yield f"gap {proof.gap!r} is claimed, {gap!r} follows from objective and bound."
    if proof.status == "optimal" and max(gap, proof.gap) > proof.tolerance * (1 + _LIMIT) + _TINY:
        yield f"status 'optimal' needs a gap of at most {proof.tolerance!r}; it is {max(gap, proof.gap)!r}."
    if not 0 <= proof.scenarios_solved <= proof.scenarios or proof.scenarios < 1:
        yield f"{proof.scenarios_solved} of {proof.scenarios} scenarios were solved, it says; that cannot be."


def _proof_faults(table: CostTable, budget: Budget, solution: Solution, counted: Footprint) -> Iterator[str]:
    yield from _claim_faults(budget, solution.proof, counted)
    # a plan's proof is about the whole cost table, of which its own table holds one mix: only here do they meet
    if solution.proof.scenarios > len(table.scenarios):
        yield f"{solution.proof.scenarios} scenarios were looked at, it says; the table has {len(table.scenarios)}."
    floor = min(_floor(table, budget, index) for index in range(len(table.scenarios)))
    if solution.proof.objective < floor - _RELATIVE * abs(floor) - _TINY:
        yield f"objective {solution.proof.objective!r} lies below {floor!r}, the sum of every decision's least."
    cheaper = _cheaper_neighbour(table, budget, solution)
    claimed = solution.proof.bound
    if cheaper is not None and cheaper < claimed - _RELATIVE * abs(claimed) - _TINY:
        yield f"bound {claimed!r} is contradicted by a plan of {cheaper!r} that changes one decision."


def _origin_faults(table: CostTable, plan: Plan) -> Iterator[str]:
    if plan.thresholds != plan.scenario.thresholds:
        yield f"thresholds {plan.thresholds} are not those of its scenario, {plan.scenario.thresholds}."
    for name in ("backend", "graph_digest", "device_digest", "calibration_digest"):
        claimed, known = getattr(plan, name), getattr(table, name)
        if known and claimed != known:
            yield f"{name} is {claimed!r}, the table's is {known!r}."
    shares = plan.exit_shares
    if shares and (min(shares) < 0 or abs(math.fsum(shares) - 1.0) > 1e-6):
        yield f"exit shares {shares} do not sum to 1."


def _prediction_faults(predicted: Footprint, counted: Footprint) -> Iterator[str]:
    pairs = [("loss", predicted.loss, counted.loss)]
    pairs += [(f"latency {name}", predicted.latency_s.get(name, math.inf), s) for name, s in counted.latency_s.items()]
    if len(predicted.block_latency_s) != len(counted.block_latency_s):
        yield f"{len(predicted.block_latency_s)} block latencies are predicted for {len(counted.block_latency_s)}."
    else:
        both = zip(predicted.block_latency_s, counted.block_latency_s, strict=True)
        pairs += [(f"latency of block {block}", *pair) for block, pair in enumerate(both)]
    for name, claimed, known in pairs:
        if not _near(claimed, known):
            yield f"{name} is predicted as {claimed!r}, counted as {known!r}."
    for tier in Tier:
        claimed_bytes, known_bytes = predicted.memory_bytes.get(tier, 0), counted.memory_bytes.get(tier, 0)
        if claimed_bytes != known_bytes:
            yield f"{tier.budget_name} is predicted as {claimed_bytes} bytes, counted as {known_bytes}."
    if predicted.disk_bytes != counted.disk_bytes:
        yield f"disk is predicted as {predicted.disk_bytes} bytes, counted as {counted.disk_bytes}."


# --- bounds of our own ---------------------------------------------------------------------------------


def _floor(table: CostTable, budget: Budget, scenario_index: int) -> float:
    """Return a value that no plan of the scenario can be below: each decision's least, boundaries free."""
    bare = table.model_copy(update={"boundaries": ()})
    if budget.minimize == "latency":
        scenario = table.scenarios[scenario_index]
        cheapest = {
            decision.subject: min(decision.options, key=lambda one: _option_latency_s(scenario, decision, one))
            for decision in table.decisions
        }
    elif budget.minimize == "drop":
        place = scenario_index
        cheapest = {
            decision.subject: min(decision.options, key=lambda one: one.loss[place if len(one.loss) > 1 else 0])
            for decision in table.decisions
        }
    else:
        tiers = list(budget.memory_bytes) or list(Tier)
        cheapest = {
            decision.subject: min(
                decision.options, key=lambda one: sum(one.memory_bytes.get(tier, 0) for tier in tiers)
            )
            for decision in table.decisions
        }
    return _objective(budget, _count(bare, scenario_index, cheapest))


def _cheaper_neighbour(table: CostTable, budget: Budget, solution: Solution) -> float | None:
    """Return the least objective among feasible plans that swap one decision (or tie), if one is cheaper.

    Large tables are left out: a whole recount of each swap would take longer than the plan itself.
    """
    swaps = sum(len(decision.options) for decision in table.decisions)
    if swaps * len(table.decisions) > _SWAP_WORK:
        return None
    taken = _taken(table, solution.choices)
    best: float | None = None
    for swapped in _swaps(table, taken):
        counted = _count(table, solution.scenario, swapped)
        objective = _objective(budget, counted)
        cheaper = best is None or objective < best
        # only a plan that keeps every limit to the letter contradicts a bound
        if cheaper and not any(_broken(table, budget, swapped, counted, rounding=0.0)):
            best = objective
    return best


def _swaps(table: CostTable, taken: Mapping[str, Option]) -> Iterator[dict[str, Option]]:
    together: dict[tuple[bool, str], list[Decision]] = {}
    for decision in table.decisions:
        key = (False, decision.subject) if decision.tie is None else (True, decision.tie)
        together.setdefault(key, []).append(decision)
    for decisions in together.values():
        for option in decisions[0].options:
            if option.name == taken[decisions[0].subject].name:
                continue
            swapped = {
                one.subject: next(other for other in one.options if other.name == option.name) for one in decisions
            }
            yield {**taken, **swapped}
