"""The solver against exhaustive search, which sums through the audit's own recount."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from edgeflex.errors import InfeasibleError
from edgeflex.plans.audit import check, footprint, shortfalls
from edgeflex.plans.solver import solve
from edgeflex.schema import Budget, Choice, CostTable, Footprint, LatencyLimit, Tier
from tests.builders import random_budget, random_table


def objective(table: CostTable, budget: Budget, counted: Footprint) -> float:
    if budget.minimize == "latency":
        return counted.latency_s[budget.statistic]
    if budget.minimize == "drop":
        return counted.loss
    return float(sum(counted.memory_bytes.get(tier, 0) for tier in (budget.memory_bytes or Tier)))


def allowed(table: CostTable, choices: tuple[Choice, ...]) -> bool:
    named = {choice.subject: choice.option for choice in choices}
    ties: dict[str, str] = {}
    for decision in table.decisions:
        if decision.tie and ties.setdefault(decision.tie, named[decision.subject]) != named[decision.subject]:
            return False
    counts = [sum(named[subject] == rule.option for subject in rule.subjects) for rule in table.rules]
    return all(
        rule.at_least <= count <= (math.inf if rule.at_most is None else rule.at_most)
        for rule, count in zip(table.rules, counts, strict=True)
    )


def exhaustive(table: CostTable, budget: Budget) -> float | None:
    best = math.inf
    names = [[one.name for one in decision.options] for decision in table.decisions]
    for combination in itertools.product(*names):
        choices = tuple(
            Choice(subject=decision.subject, option=name)
            for decision, name in zip(table.decisions, combination, strict=True)
        )
        if not allowed(table, choices):
            continue
        for index in range(len(table.scenarios)):
            counted = footprint(table, index, choices)
            if not shortfalls(counted, budget):
                best = min(best, objective(table, budget, counted))
    return None if math.isinf(best) else best


def has_rule_fault(table: CostTable) -> bool:
    options = {decision.subject: {one.name for one in decision.options} for decision in table.decisions}
    return any(not any(rule.option in options[subject] for subject in rule.subjects) for rule in table.rules)


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_equals_exhaustive_search_with_its_infeasibility_verdict(start: int):
    verdicts = []
    for seed in range(start, start + 50):
        table, budget = random_table(seed), random_budget(seed)
        if has_rule_fault(table):
            continue
        best = exhaustive(table, budget)
        verdicts.append(best is None)
        if best is None:
            with pytest.raises(InfeasibleError):
                solve(table, budget, tolerance=0.0)
            continue
        solution = solve(table, budget, tolerance=0.0)
        counted = check(table, budget, solution)
        assert objective(table, budget, counted) == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        assert solution.proof.status == "optimal"
    assert any(verdicts)
    assert not all(verdicts)


def stretched(seed: int) -> tuple[CostTable, Budget]:
    """Return a small table whose figures span 24 decades, and a budget that one of its plans meets exactly."""
    draw = random.Random(seed)

    def far(value: float) -> float:
        return float(value * 10.0 ** draw.uniform(-12, 12))

    plain = random_table(seed)
    quantity = draw.choice(["loss", "latency_s"])
    decisions = tuple(
        decision.model_copy(
            update={
                "options": tuple(
                    one.model_copy(
                        update={"loss": tuple(map(far, one.loss))}
                        if quantity == "loss"
                        else {"latency_s": far(one.latency_s)}
                    )
                    for one in decision.options
                ),
            }
        )
        for decision in plain.decisions
    )
    table = plain.model_copy(update={"decisions": decisions, "rules": ()})
    chosen = {decision.tie or decision.subject: draw.choice(decision.options).name for decision in decisions}
    choices = tuple(Choice(subject=one.subject, option=chosen[one.tie or one.subject]) for one in decisions)
    known = footprint(table, draw.randrange(len(table.scenarios)), choices)
    limits: dict[str, object] = {
        "memory_bytes": {Tier.HOST: known.memory_bytes.get(Tier.HOST, 0)},
        "latency": (LatencyLimit(limit_s=known.latency_s["worst"] or 1.0, statistic="worst"),),
        "max_drop": known.loss,
    }
    kept = {name: limits[name] for name in draw.sample(sorted(limits), draw.randint(1, 3))}
    return table, Budget.model_validate({**kept, "minimize": draw.choice(["latency", "drop", "memory"])})


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_what_numbers_of_any_size_allow_is_found_and_what_is_proven_is_true(start: int):
    optimal = 0
    for seed in range(start, start + 50):
        table, budget = stretched(seed)
        best = exhaustive(table, budget)
        assert best is not None
        solution = solve(table, budget)
        check(table, budget, solution)
        proof = solution.proof
        assert proof.bound <= best + 1e-8 * abs(best) + 1e-12, seed
        if proof.status == "optimal":
            optimal += 1
            assert proof.objective <= best + (1e-4 + 1e-8) * abs(best) + 1e-12, seed
    assert optimal > 40
