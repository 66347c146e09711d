"""Verdicts, sweeps, bad tables and the honesty of the proof."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeflex.errors import EdgeflexError, InfeasibleError, InputError
from edgeflex.plans import check, footprint, frontier, solve
from edgeflex.plans.program import Limit, Quantity
from edgeflex.plans.verdict import explain_points
from edgeflex.schema import Boundary, Budget, CostTable, Format, LatencyLimit, Rule, Tier
from edgeflex.units import parse_time_s
from tests.builders import decision, option, random_budget, random_table, scenario, synthetic_table, table

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "table.json"


def small(**changes: object) -> CostTable:
    """Two layers, each small and slow or large and fast: 100 or 400 bytes, 2 or 1 ms."""
    layers = tuple(
        decision(
            name,
            option("int4", loss=0.02, latency_s=0.002, host=100, disk=10),
            option("int8", loss=0.01, latency_s=0.001, host=400, disk=40),
        )
        for name in ("a", "b")
    )
    return table(*layers).model_copy(update=changes)


def memory(size: int) -> Budget:
    return Budget(memory_bytes={Tier.HOST: size})


def test_plan_of_a_hand_summed_table():
    solution = solve(small(), memory(500))
    assert sorted(choice.option for choice in solution.choices) == ["int4", "int8"]
    assert solution.proof.objective == pytest.approx(0.003)
    assert solution.proof.status == "optimal"
    assert solution.proof.scenarios_solved == 1


def test_a_memory_limit_met_to_the_byte_is_kept_and_one_byte_less_is_not():
    assert solve(small(), memory(800)).proof.objective == pytest.approx(0.002)
    assert solve(small(), memory(799)).proof.objective == pytest.approx(0.003)


def test_the_byte_counts_beside_gigabytes():
    huge = 4 * 10**9
    layers = (
        decision("a", option("x", loss=0.1, host=huge), option("y", loss=0.0, host=2 * huge + 1)),
        decision("b", option("x", loss=0.1, host=huge), option("y", loss=0.05, host=huge + 7)),
    )
    budget = Budget(memory_bytes={Tier.HOST: 3 * huge}, minimize="drop")
    solution = solve(table(*layers), budget, tolerance=0.0)
    assert check(table(*layers), budget, solution).memory_bytes[Tier.HOST] <= 3 * huge
    assert solution.proof.objective == pytest.approx(0.15)
    assert solution.proof.status == "optimal"


@pytest.mark.parametrize("penalty", [1e6, 1e9, 1e12])
def test_a_penalty_does_not_blur_small_losses(penalty: float):
    layers = tuple(
        decision(
            f"d{n}", option("x", loss=1e-6 * n, host=3), option("y", loss=2e-6 * n, host=2), option("z", loss=penalty)
        )
        for n in range(1, 6)
    )
    budget = Budget(memory_bytes={Tier.HOST: 12}, minimize="drop")
    solution = solve(table(*layers), budget, tolerance=0.0)
    # x everywhere takes 15 bytes; the three least go to y
    assert solution.proof.objective == pytest.approx(21e-6)
    assert solution.proof.status == "optimal"


def test_without_a_budget_each_decision_takes_its_best():
    assert solve(small(), Budget(minimize="drop")).proof.objective == pytest.approx(0.02)


def test_a_table_without_decisions_still_chooses_its_scenario():
    empty = table(
        scenarios=(scenario(1.0, 1.0, name="deep"), scenario(1.0, 0.2, name="early", loss=0.01)),
        fixed_latency_s=(0.001, 0.001),
    )
    assert solve(empty, Budget()).scenario == 1
    assert solve(empty, Budget(max_drop=0.005)).scenario == 0


def test_only_the_named_scenarios_are_chosen_from():
    known = small(scenarios=(scenario(name="bad", loss=0.5), scenario(name="good")))
    assert solve(known, Budget(minimize="drop")).scenario == 1
    limited = solve(known, Budget(minimize="drop"), scenarios=[0])
    assert (limited.scenario, limited.proof.scenarios) == (0, 1)


def test_a_dear_boundary_keeps_formats_together():
    layers = tuple(
        decision(name, option("f", latency_s=fast), option("q", latency_s=0.001, format=Format.Q8))
        for name, fast in (("a", 0.0021), ("b", 0.0005), ("c", 0.0021))
    )
    edges = tuple(Boundary(source=s, target=t, block=0, latency_s=0.0004) for s, t in (("a", "b"), ("b", "c")))
    # alone: q f q = 2.5 ms, but two crossings cost 0.8 ms; q q q = 3.0 ms
    solution = solve(table(*layers, boundaries=edges), Budget(), tolerance=0.0)
    assert [choice.option for choice in solution.choices] == ["q", "q", "q"]


@pytest.mark.parametrize(
    ("budget", "binding", "least"),
    [
        (memory(150), ("memory",), {"memory": 200.0}),
        (Budget(latency=(LatencyLimit(limit_s=0.001),)), ("latency mean",), {"latency mean": 0.002}),
        (Budget(max_drop=0.001), ("max drop",), {"max drop": 0.02}),
        (Budget(disk_bytes=15), ("disk",), {"disk": 20.0}),
        (
            Budget(memory_bytes={Tier.HOST: 500}, latency=(LatencyLimit(limit_s=0.0025),), max_drop=0.5),
            ("memory", "latency mean"),
            {"memory": 800.0, "latency mean": 0.003, "max drop": 0.02},
        ),
    ],
)
def test_an_impossible_budget_is_named_with_the_least_that_works(
    budget: Budget, binding: tuple[str, ...], least: dict[str, float]
):
    with pytest.raises(InfeasibleError) as raised:
        solve(small(), budget)
    assert raised.value.binding == binding
    for name, value in least.items():
        if name in binding:
            assert raised.value.least[name] == pytest.approx(value)
    assert raised.value.relaxation in str(raised.value)


def test_the_cheapest_relaxation_is_the_least_relative_one_and_works():
    budget = Budget(memory_bytes={Tier.HOST: 500}, latency=(LatencyLimit(limit_s=0.0025),))
    with pytest.raises(InfeasibleError, match=r"Raise latency mean from 2.50 ms to 3.00 ms, \+20.0 %"):
        solve(small(), budget)
    solve(small(), budget.model_copy(update={"latency": (LatencyLimit(limit_s=0.003),)}))


@pytest.mark.parametrize("fast", [0.0020004, 0.00200041, 0.0006543217])
def test_the_least_that_is_told_works_when_it_is_typed(fast: float):
    slow = table(decision("a", option("f", latency_s=fast)))
    with pytest.raises(InfeasibleError) as raised:
        solve(slow, Budget(latency=(LatencyLimit(limit_s=fast / 2),)))
    told = re.search(r"least ([\d.]+ \w+)\.", str(raised.value))
    assert told is not None
    solve(slow, Budget(latency=(LatencyLimit(limit_s=parse_time_s(told[1])),)))


def test_two_budgets_that_each_fail_alone_are_raised_together():
    budget = Budget(memory_bytes={Tier.HOST: 150}, latency=(LatencyLimit(limit_s=0.0015),))
    with pytest.raises(InfeasibleError, match=r"No single budget helps; raise memory .* and latency mean") as raised:
        solve(small(), budget)
    assert raised.value.least == {"memory": 200.0, "latency mean": pytest.approx(0.002)}


def test_budgets_that_nothing_keeps_are_all_named_and_raised_to_what_works():
    budget = Budget(memory_bytes={Tier.HOST: 150}, latency=(LatencyLimit(limit_s=0.001),), max_drop=0.5)
    with pytest.raises(InfeasibleError) as raised:
        solve(small(), budget)
    assert raised.value.binding == ("memory", "latency mean"), "each is impossible by itself"
    assert "no plan meets memory and latency mean: " in str(raised.value)


LIMITS = (Limit(Quantity("memory", (Tier.HOST,)), 150.0), Limit(Quantity("latency"), 0.002))


def test_of_known_plans_the_cheapest_single_budget_is_raised():
    error = explain_points(LIMITS, [(200.0, 0.003), (300.0, 0.001)])
    assert error.binding == ("memory",)
    assert error.least == {"memory": 300.0, "latency mean": 0.001}
    assert error.relaxation == "Raise memory from 150 B to 300 B, +100.0 %."
    assert "latency mean is limited to 2.00 ms, least 1.00 ms with all other budgets left aside" in str(error)


def test_of_known_plans_the_nearest_is_told_where_no_single_budget_helps():
    tight = (LIMITS[0], replace(LIMITS[1], most=0.0005))
    error = explain_points(tight, [(200.0, 0.003), (300.0, 0.001)], "Or measure more.")
    assert error.binding == ("memory", "latency mean")
    raised = "raise memory from 150 B to 300 B, +100.0 % and latency mean from 500.0 µs to 1.00 ms, +100.0 %"
    assert error.relaxation == f"No single budget helps; {raised}. Or measure more."


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=1, max_size=6), st.floats(1, 9), st.floats(1, 9))
def test_of_known_plans_the_least_with_the_others_kept_is_a_plan(
    points: list[tuple[float, float]], memory_most: float, latency_most: float
):
    limits = (replace(LIMITS[0], most=memory_most), replace(LIMITS[1], most=latency_most))
    if any(one <= memory_most and two <= latency_most for one, two in points):
        return
    error = explain_points(limits, points)
    kept = [one for one, two in points if two <= latency_most]
    assert error.least["memory"] == min(kept or [one for one, _ in points])
    assert error.binding


def test_rules_that_cannot_be_met_are_told_from_budgets():
    known = small(
        rules=(Rule(subjects=("a",), option="int8", at_least=1), Rule(subjects=("a",), option="int4", at_least=1))
    )
    with pytest.raises(InfeasibleError, match="rules") as raised:
        solve(known, memory(10**6))
    assert raised.value.binding == ("rules",)


def test_every_fault_of_a_table_is_listed_at_once():
    bad = table(
        decision("a", option("x", loss=(0.0, 0.0, 0.0)), block=7),
        decision("a", option("x"), option("x")),
        decision("c", option("p"), tie="t"),
        decision("d", option("q"), tie="t"),
        scenarios=(scenario(0.9, 0.95), scenario(1.0, 1.2)),
        boundaries=(Boundary(source="a", target="nowhere", block=0, latency_s=-1.0),),
        rules=(Rule(subjects=("ghost",), option="x"), Rule(subjects=("c",), option="zz", at_least=1)),
        fixed_latency_s=(0.0, 0.0),
    )
    with pytest.raises(InputError) as raised:
        solve(bad, Budget())
    for part in (
        "3 losses", "block 7", "2 times", "two options of one name", "tie 't'", "starts with reach 0.9",
        "outside 0 to 1", "'nowhere'", "costs -1.0 s", "ghost", "'zz'",
    ):  # fmt: skip
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"scenarios": (scenario(1.0, 0.5),)},
        {"scenarios": (scenario(1.0, 0.5, 0.6),), "fixed_latency_s": (0.0, 0.0, 0.0)},
        {"scenarios": (scenario(),), "fixed_latency_s": ()},
        {"scenarios": (scenario(experts=1.5),)},
        {"fixed_disk_bytes": -1},
        {"decisions": (decision("a"),)},
        {"decisions": (decision("a", option("x").model_copy(update={"latency_s": float("nan")})),)},
        {"decisions": (decision("a", option("x", miss_latency_s=1.0)),)},
        {"decisions": (decision("a", option("x", miss_latency_s=1.0), group="experts"),)},
    ],
)  # fmt: skip
def test_a_table_that_contradicts_itself_is_refused(changes: dict[str, object]):
    with pytest.raises(InputError):
        solve(small(**changes), Budget())


@pytest.mark.parametrize(
    "request_", [{"scenarios": [3]}, {"scenarios": []}, {"tolerance": -1.0}, {"time_limit_s": 0.0}]
)
def test_a_request_out_of_range_is_refused(request_: dict[str, object]):
    with pytest.raises(InputError):
        solve(small(), Budget(), **request_)  # type: ignore[arg-type]


def test_no_time_means_no_verdict():
    ticks = iter(range(10**6))
    with pytest.raises(EdgeflexError, match="none is ruled out"):
        solve(small(), memory(500), time_limit_s=0.5, clock=lambda: float(next(ticks)))


def test_a_stopped_search_says_feasible_with_its_true_gap():
    known = table(
        *synthetic_table(8, 0, bits=(2, 4, 8)).decisions,
        scenarios=(scenario(name="good"), scenario(name="other", loss=1e-6)),
    )
    ticks = iter([0.0, 0.0, *[0.1] * 4, *[99.0] * 1000])
    budget = Budget(memory_bytes={Tier.HOST: 5 * 10**6}, minimize="drop")
    stopped = solve(known, budget, time_limit_s=1.0, tolerance=0.0, clock=lambda: next(ticks))
    proof = stopped.proof
    assert proof.bound <= proof.objective
    assert proof.status == "feasible" or proof.gap == 0.0


def test_loosening_a_budget_never_hurts_and_the_order_of_decisions_does_not_matter():
    known = synthetic_table(12, 3, bits=(2, 4, 8))
    sizes = [5 * 10**6, 6 * 10**6, 7 * 10**6, 9 * 10**6]
    budgets = [Budget(memory_bytes={Tier.HOST: size}, minimize="drop") for size in sizes]
    losses = [solve(known, budget, tolerance=0.0).proof.objective for budget in budgets]
    assert losses == sorted(losses, reverse=True)
    turned = known.model_copy(update={"decisions": known.decisions[::-1]})
    assert solve(turned, budgets[1], tolerance=0.0).proof.objective == pytest.approx(losses[1], rel=1e-9)


def test_a_tolerance_is_kept_at_the_true_gap():
    known = synthetic_table(60, 5, bits=(2, 3, 4, 6, 8))
    budget = Budget(memory_bytes={Tier.HOST: 30 * 10**6}, minimize="drop")
    exact = solve(known, budget, tolerance=0.0).proof
    rough = solve(known, budget, tolerance=0.05).proof
    assert rough.bound <= exact.objective * (1 + 1e-9)
    assert exact.objective <= rough.objective <= exact.objective * 1.05 / 0.95
    assert rough.gap <= 0.05


def test_scenarios_whose_bound_is_worse_are_never_solved():
    many = tuple(scenario(name=f"s{n}", loss=0.01 * n) for n in range(40))
    known = table(*synthetic_table(10, 1, bits=(2, 4, 8)).decisions, scenarios=many)
    proof = solve(known, Budget(memory_bytes={Tier.HOST: 6 * 10**6}, minimize="drop")).proof
    assert proof.scenarios == 40
    assert proof.scenarios_solved <= 2


def test_a_frontier_is_non_dominated_and_each_point_is_solved():
    known = synthetic_table(12, 2, bits=(2, 4, 8))
    plans = frontier(known, Budget(minimize="drop"), over="memory", points=6)
    costs = [footprint(known, plan.scenario, plan.choices) for plan in plans]
    assert 3 <= len(plans) <= 7
    for before, after in pairwise(costs):
        assert before.memory_bytes[Tier.HOST] < after.memory_bytes[Tier.HOST]
        assert before.loss > after.loss
    assert costs[0].memory_bytes[Tier.HOST] == sum(
        min(one.memory_bytes[Tier.HOST] for one in layer.options) for layer in known.decisions
    )
    for plan in plans:
        check(
            known,
            Budget(minimize="drop"),
            plan.model_copy(
                update={"proof": plan.proof.model_copy(update={"bound": 0.0, "gap": 1.0, "status": "feasible"})}
            ),
        )


@pytest.mark.parametrize("over", ["latency", "drop"])
def test_a_frontier_keeps_the_other_budgets(over: str):
    budget = Budget(memory_bytes={Tier.HOST: 7 * 10**6}, minimize="drop" if over == "latency" else "latency")
    known = synthetic_table(10, 2, bits=(2, 4, 8))
    for plan in frontier(known, budget, over=over, points=4):  # type: ignore[arg-type]
        assert footprint(known, plan.scenario, plan.choices).memory_bytes[Tier.HOST] <= 7 * 10**6


def test_a_sweep_over_what_is_minimised_is_refused():
    with pytest.raises(InputError, match="sweep"):
        frontier(small(), Budget(minimize="drop"), over="drop", points=5)


def test_large_tables_are_solved_close_to_the_bound():
    known = synthetic_table(2000, 4, tiers=(Tier.DEVICE, Tier.HOST, Tier.FLASH), bits=(2, 4, 8))
    total = sum(max(max(o.memory_bytes.values()) for o in d.options) for d in known.decisions)
    budget = Budget(
        memory_bytes={Tier.DEVICE: total // 5, Tier.HOST: total // 5},
        latency=(LatencyLimit(limit_s=total * 2e-10),),
        minimize="drop",
    )
    solution = solve(known, budget)
    check(known, budget, solution)
    assert solution.proof.gap <= 0.001


def test_the_example_table_is_read_solved_and_recounted():
    known = CostTable.parse(EXAMPLE.read_bytes(), str(EXAMPLE))
    budget = Budget(
        memory_bytes={Tier.HOST: 120_000}, latency=(LatencyLimit(limit_s=0.0011),), max_drop=0.02, minimize="latency"
    )
    solution = solve(known, budget)
    check(known, budget, solution)
    assert solution.proof.status == "optimal"
    assert CostTable.parse(known.canonical_json(), "again") == known


def test_solving_writes_nothing_to_stdout():
    code = (
        "from tests.builders import synthetic_table\n"
        "from edgeflex.plans import solve\n"
        "from edgeflex.schema import Budget, LatencyLimit, Tier\n"
        "for seed in range(3):\n"
        "    table = synthetic_table(80, seed, bits=(2, 3, 4, 6, 8))\n"
        "    budget = Budget(memory_bytes={Tier.HOST: 45 * 10**6}, "
        "latency=(LatencyLimit(limit_s=1.2e-2),), minimize='drop')\n"
        "    solve(table, budget)\n"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""


def test_importing_the_room_loads_neither_scipy_nor_torch():
    code = "import sys, edgeflex.plans; sys.exit(int(bool({'scipy', 'torch'} & set(sys.modules))))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def verdict(seed: int) -> InfeasibleError | None:
    try:
        solve(random_table(seed), random_budget(seed))
    except InfeasibleError as error:
        return error
    except InputError:
        pass
    return None


def test_meeting_the_least_of_one_budget_makes_a_plan_possible():
    mended = 0
    for seed in range(60):
        error = verdict(seed)
        budget = random_budget(seed)
        if error is None or "latency mean" not in error.relaxation or "No single" in error.relaxation:
            continue
        limit = LatencyLimit(limit_s=error.least["latency mean"] * (1 + 1e-9))
        others = tuple(one for one in budget.latency if one.statistic != "mean")
        solve(random_table(seed), budget.model_copy(update={"latency": (*others, limit)}))
        mended += 1
    assert mended
