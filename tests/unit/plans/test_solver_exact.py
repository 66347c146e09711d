"""The solver against exhaustive search, which sums through the audit's own recount."""

from __future__ import annotations

import itertools
import math

import pytest

from edgeflex.errors import InfeasibleError
from edgeflex.plans.audit import check, footprint, shortfalls
from edgeflex.plans.solver import solve
from edgeflex.schema import Budget, Choice, CostTable, Footprint, Tier
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
