"""The recount against sums made by hand, and every kind of tampering."""

from __future__ import annotations

import random
from typing import Any

import pytest

from edgeflex.errors import CheckFailedError
from edgeflex.plans import check, check_plan, footprint, shortfalls, solve
from edgeflex.schema import (
    Boundary,
    Budget,
    Choice,
    CostTable,
    Format,
    LatencyLimit,
    MemoryBreakdown,
    Plan,
    Proof,
    Rule,
    Solution,
    Tier,
)
from tests.builders import decision, option, scenario, table

CHOICES = (Choice(subject="a", option="big"), Choice(subject="b", option="small"), Choice(subject="e", option="ram"))
BUDGET = Budget(
    memory_bytes={Tier.HOST: 2000}, latency=(LatencyLimit(limit_s=0.0066),), max_drop=0.2, minimize="latency"
)


def known() -> CostTable:
    """Two blocks; the second is reached by a tenth, and holds an expert that misses half the time."""
    return table(
        decision(
            "a",
            option("big", loss=0.01, latency_s=0.003, host=400, disk=40),
            option("small", loss=(0.02, 0.03), latency_s=0.001, host=100, disk=10, format=Format.Q8),
            tie="stem",
        ),
        decision(
            "b",
            option("small", loss=(0.04, 0.05), latency_s=0.002, host=200, disk=20, format=Format.Q8),
            option("big", loss=0.005, latency_s=0.005, host=800, disk=80),
            block=1,
        ),
        decision(
            "e", option("ram", host=50, device=7, latency_s=0.001, miss_latency_s=0.008), block=1, group="experts"
        ),
        scenarios=(
            scenario(1.0, 1.0, name="all", experts=0.25),
            scenario(1.0, 0.1, name="early", loss=0.1, experts=0.5),
        ),
        boundaries=(
            Boundary(source="a", target="b", block=1, latency_s=0.0005),
            Boundary(source="", target="a", block=0, latency_s=0.0002),
            Boundary(source="b", target="", block=1, latency_s=0.0001),
        ),
        rules=(Rule(subjects=("a", "b"), option="big", at_most=1),),
        fixed_latency_s=(0.0001, 0.0003),
    ).model_copy(update={"fixed_memory_bytes": {Tier.HOST: 1000}, "fixed_disk_bytes": 5})


def test_footprint_equals_the_sum_made_by_hand():
    counted = footprint(known(), 1, CHOICES)
    # block 0: 0.1 + 3 ms; block 1: 0.3 + 2 + 1 + half of 8 + crossings 0.5 and 0.1 ms
    assert counted.block_latency_s == pytest.approx((0.0031, 0.0079))
    assert counted.latency_s["mean"] == pytest.approx(0.0031 + 0.1 * 0.0079)
    assert counted.latency_s["p50"] == pytest.approx(0.0031)
    assert counted.latency_s["p95"] == pytest.approx(0.0110)
    assert counted.latency_s["p99"] == pytest.approx(0.0110)
    assert counted.latency_s["worst"] == pytest.approx(0.0110)
    assert counted.memory_bytes == {Tier.HOST: 1650, Tier.DEVICE: 7}
    assert counted.disk_bytes == 65
    assert counted.loss == pytest.approx(0.1 + 0.01 + 0.05)


@pytest.mark.parametrize(
    ("deep", "expected"),
    [
        (0.05, ("p99", "worst")),
        (0.051, ("p95", "p99", "worst")),
        (0.01, ("worst",)),
        (0.0, ()),
        (0.5, ("p95", "p99", "worst")),
    ],
)
def test_a_percentile_counts_the_blocks_that_more_than_the_rest_reach(deep: float, expected: tuple[str, ...]):
    counted = footprint(table(scenarios=(scenario(1.0, deep),), fixed_latency_s=(1.0, 2.0)), 0, ())
    slow = [name for name in ("p50", "p95", "p99", "worst") if counted.latency_s[name] == 3.0]
    assert tuple(slow) == expected


def test_memory_of_a_block_that_nobody_reaches_still_counts():
    never = known().model_copy(update={"scenarios": (scenario(1.0, 0.0, experts=0.0),) * 2})
    assert footprint(never, 0, CHOICES).memory_bytes[Tier.HOST] == 1650
    assert footprint(never, 0, CHOICES).latency_s["worst"] == pytest.approx(0.0031)


def test_shortfalls_name_each_broken_limit():
    budget = Budget(
        memory_bytes={Tier.HOST: 1649, Tier.DEVICE: 7},
        latency=(LatencyLimit(limit_s=0.002), LatencyLimit(limit_s=0.02, statistic="worst")),
        disk_bytes=64,
        max_drop=0.15,
    )
    broken = shortfalls(footprint(known(), 1, CHOICES), budget)
    assert list(broken) == ["memory", "latency mean", "disk", "max drop"]
    assert broken["memory"] == (1649.0, 1650.0)


def solved() -> Solution:
    return solve(known(), BUDGET, tolerance=0.0)


def test_an_honest_solution_passes():
    assert check(known(), BUDGET, solved()).latency_s["mean"] == pytest.approx(solved().proof.objective)


def altered(solution: Solution, **proof: Any) -> Solution:
    return solution.model_copy(update={"proof": solution.proof.model_copy(update=proof)})


@pytest.mark.parametrize(
    ("tampering", "reason"),
    [
        (lambda s: s.model_copy(update={"choices": s.choices[:-1]}), "is missing"),
        (lambda s: s.model_copy(update={"choices": (*s.choices, s.choices[0])}), "taken twice"),
        (lambda s: s.model_copy(update={"choices": (*s.choices, Choice(subject="x", option="y"))}), "not in the table"),
        (
            lambda s: s.model_copy(update={"choices": (Choice(subject="a", option="x"), *s.choices[1:])}),
            "no option 'x'",
        ),
        (lambda s: s.model_copy(update={"scenario": 9}), "scenario 9"),
        (lambda s: s.model_copy(update={"scenario": -1}), "scenario -1"),
        (lambda s: altered(s, objective=s.proof.objective * 1.001), "is counted"),
        (lambda s: altered(s, bound=s.proof.objective * 1.001), "above objective"),
        (lambda s: altered(s, bound=s.proof.objective * 0.9), "follows from objective and bound"),
        (lambda s: altered(s, bound=s.proof.objective * 0.9, gap=0.1), "needs a gap"),
        (lambda s: altered(s, gap=0.5), "gap"),
        (lambda s: altered(s, bound=float("nan")), "gap"),
        (lambda s: altered(s, objective=float("inf")), "is counted"),
        (lambda s: altered(s, minimize="drop"), "about least"),
        (lambda s: altered(s, scenarios=3), "3 scenarios were looked at"),
        (lambda s: altered(s, scenarios_solved=7), "cannot be"),
    ],
)
def test_each_tampering_is_caught(tampering: Any, reason: str):
    with pytest.raises(CheckFailedError, match=reason):
        check(known(), BUDGET, tampering(solved()))


def test_a_worse_plan_with_a_proof_made_up_to_fit_is_contradicted_by_its_neighbour():
    worse = (Choice(subject="a", option="big"), *solved().choices[1:])
    counted = footprint(known(), solved().scenario, worse)
    claim = {"objective": counted.latency_s["mean"], "bound": counted.latency_s["mean"], "gap": 0.0}
    with pytest.raises(CheckFailedError, match="contradicted"):
        check(known(), BUDGET, altered(solved().model_copy(update={"choices": worse}), **claim))


@pytest.mark.parametrize("beyond", [6e-10, 9e-10])
def test_a_neighbour_that_breaks_a_limit_by_rounding_contradicts_no_bound(beyond: float):
    """The solver gives sums half the room for rounding that the audit gives it: between them nothing is claimed."""
    layers = table(decision("a", option("x", latency_s=1.0, host=9), option("y", latency_s=1.0 + beyond, host=1)))
    budget = Budget(latency=(LatencyLimit(limit_s=1.0),), minimize="memory")
    solution = solve(layers, budget, tolerance=0.0)
    assert solution.proof.objective == 9.0
    check(layers, budget, solution)


def test_broken_ties_rules_and_budgets_are_caught():
    tied = known().model_copy(
        update={
            "decisions": tuple(
                one.model_copy(update={"tie": "stem"}) if one.subject == "b" else one for one in known().decisions
            ),
        }
    )
    with pytest.raises(CheckFailedError, match="tie 'stem' is broken"):
        check(tied, BUDGET, solved().model_copy(update={"choices": CHOICES}))
    both = (Choice(subject="a", option="big"), Choice(subject="b", option="big"), CHOICES[2])
    with pytest.raises(CheckFailedError, match="the rule says 0 to 1"):
        check(known(), BUDGET, solved().model_copy(update={"choices": both}))
    with pytest.raises(CheckFailedError, match="above its limit"):
        check(known(), BUDGET.model_copy(update={"memory_bytes": {Tier.HOST: 1200}}), solved())


def test_any_changed_choice_or_figure_of_the_claim_is_caught():
    honest = solved()
    draw = random.Random(0)
    for _ in range(100):
        field = draw.choice(["choice", "scenario", "objective", "bound", "gap"])
        if field == "choice":
            index = draw.randrange(2)
            other = {"big": "small", "small": "big"}[honest.choices[index].option]
            choices = list(honest.choices)
            choices[index] = Choice(subject=choices[index].subject, option=other)
            forged = honest.model_copy(update={"choices": tuple(choices)})
        elif field == "scenario":
            forged = honest.model_copy(update={"scenario": 1 - honest.scenario})
        else:
            value = getattr(honest.proof, field) + draw.choice([-1, 1]) * 10 ** draw.uniform(-5, 1)
            forged = altered(honest, **{field: value})
        with pytest.raises(CheckFailedError):
            check(known(), BUDGET, forged)


# --- plans ---------------------------------------------------------------------------------------------


def made() -> Plan:
    solution, own = solved(), known()
    counted = footprint(own, solution.scenario, solution.choices)
    return Plan(
        name="p",
        backend="",
        budget=BUDGET,
        scenario=own.scenarios[solution.scenario],
        thresholds=own.scenarios[solution.scenario].thresholds,
        choices=solution.choices,
        exit_shares=(0.9, 0.1),
        predicted=counted,
        latency_interval_s={},
        memory=MemoryBreakdown(weights_bytes=650, activation_bytes=0, overhead_bytes=1000),
        proof=solution.proof,
        table_digest=own.digest(),
    )


def test_an_honest_plan_passes():
    check_plan(known(), made())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"table_digest": "0" * 64}, "is of table"),
        ({"scenario": scenario(1.0, 0.3, experts=0.5)}, "does not hold"),
        ({"thresholds": (0.5, None)}, "thresholds"),
        ({"exit_shares": (0.5, 0.1)}, "exit shares"),
        ({"choices": CHOICES[:2]}, "is missing"),
        ({"choices": (Choice(subject="a", option="big"), *CHOICES[1:])}, "predicted"),
        ({"budget": BUDGET.model_copy(update={"max_drop": 0.001})}, "above its limit"),
    ],
)
def test_a_tampered_plan_is_caught(changes: dict[str, Any], reason: str):
    with pytest.raises(CheckFailedError, match=reason):
        check_plan(known(), made().model_copy(update=changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": 0.0},
        {"latency_s": {}},
        {"block_latency_s": (0.0,)},
        {"block_latency_s": (0.5, 0.5)},
        {"memory_bytes": {Tier.HOST: 1}},
        {"disk_bytes": 1},
    ],
)
def test_a_predicted_figure_that_differs_from_the_recount_is_caught(changes: dict[str, Any]):
    forged = made().predicted.model_copy(update=changes)
    with pytest.raises(CheckFailedError, match="predicted"):
        check_plan(known(), made().model_copy(update={"predicted": forged}))


def test_a_plan_whose_proof_is_about_another_objective_is_caught():
    proof = Proof(**{**made().proof.model_dump(), "objective": 1.0})
    with pytest.raises(CheckFailedError, match="is counted"):
        check_plan(known(), made().model_copy(update={"proof": proof}))
