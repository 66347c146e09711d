"""The planner's door to the search: one best plan with its proof, or a sweep of plans.

The exact method is in ``search``; ``audit`` recounts what comes out of here and shares no code with it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from edgeflex.errors import EdgeflexError, InputError
from edgeflex.plans import program as programs
from edgeflex.plans.program import Limit, Quantity
from edgeflex.plans.search import Answer, Question, search
from edgeflex.plans.verdict import explain
from edgeflex.schema import Choice, Proof, Solution

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgeflex.plans.program import Program
    from edgeflex.schema import Budget, CostTable

_TINY = 1e-12


def solve(
    table: CostTable,
    budget: Budget,
    *,
    time_limit_s: float = 60.0,
    tolerance: float = 1e-4,
    scenarios: Sequence[int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Solution:
    """Return the plan of least ``budget.minimize`` that keeps every limit of ``budget``.

    Costs add within a scenario, so each is a multiple-choice knapsack with several budgets; scenarios are
    searched best bound first, and those whose bound exceeds the best plan are never solved. The status is
    ``optimal`` only when the proven gap is at most ``tolerance``. Above 12,000 variables left by presolve a
    scenario's search ends at 0.1 %, and the plan is ``feasible`` with the gap that is proven.

    Args:
        table: Scenarios, decisions and options.
        budget: Limits, and what is to be least.
        time_limit_s: Seconds after which the best plan so far is returned with its true gap.
        tolerance: Relative gap at which the search stops.
        scenarios: Indices to choose among; all by default.
        clock: Gives seconds; only differences count.

    Raises:
        InputError: The table contradicts itself, or a scenario or setting is out of range.
        InfeasibleError: No plan keeps every limit; it names the budgets in the way and what would help.
        EdgeflexError: Time ran out before a plan was found or ruled out.
    """
    began = clock()
    question = _ask(programs.build(table), budget, scenarios, tolerance, time_limit_s)
    return _solve(question, budget, tolerance=tolerance, time_limit_s=time_limit_s, began=began, clock=clock)


def frontier(
    table: CostTable,
    budget: Budget,
    *,
    over: Literal["memory", "latency", "drop"],
    points: int,
    time_limit_s: float = 60.0,
    tolerance: float = 1e-4,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Solution, ...]:
    """Return non-dominated plans from the least ``over`` to the best ``budget.minimize``.

    The limits that ``budget`` sets on ``over`` itself are replaced by ``points`` evenly spaced ones between
    the least reachable value and the one at which the objective is best; all others hold throughout. Memory
    is summed over the tiers that ``budget`` limits, or all; latency is that of ``budget.statistic``.

    Args:
        table: Scenarios, decisions and options.
        budget: The limits that stay, and what is to be least at each point.
        over: What is swept; it must differ from ``budget.minimize``.
        points: Limits to try, at least 1 (the loosest); fewer plans may come back.
        time_limit_s: For all points together.
        tolerance: Relative gap of each point.
        clock: Gives seconds; only differences count.

    Raises:
        InputError: ``over`` is what is minimised, ``points`` is below 1, or the table contradicts itself.
        InfeasibleError: The other limits leave no plan.
        EdgeflexError: Time ran out before a point was solved.
    """
    if over == budget.minimize or points < 1:
        raise InputError(
            f"sweep of {points} points over {over!r} while {budget.minimize!r} is minimised: "
            "sweep at least 1 point over one of the other two of memory, latency and drop."
        )
    swept = _swept(table, budget, over)
    free = _without(budget, over)
    question = _ask(programs.build(table), free, None, tolerance, time_limit_s)
    ends = [question, replace(question, objective=swept)]
    share_s = time_limit_s / (points + 2)
    widest, tightest = (
        _solve(one, free, tolerance=tolerance, time_limit_s=share_s, began=clock(), clock=clock) for one in ends
    )
    low, high = (_measured(question.program, swept, one) for one in (tightest, widest))
    found = [(high, widest)]
    for step in range(points - 1):
        most = low + (high - low) * step / (points - 1)
        limit = Limit(swept, _rounded(swept, most))
        bounded = replace(question, limits=(*question.limits, limit))
        began = clock()
        answer = search(bounded, tolerance=tolerance, time_limit_s=share_s, now=clock)
        if answer.chosen is not None:
            solution = _solution(bounded, answer, budget, tolerance, clock() - began)
            found.append((_measured(question.program, swept, solution), solution))
    return _non_dominated(found)


def _ask(
    program: Program, budget: Budget, scenarios: Sequence[int] | None, tolerance: float, time_limit_s: float
) -> Question:
    count = len(program.table.scenarios)
    asked = tuple(range(count)) if scenarios is None else tuple(dict.fromkeys(scenarios))
    faults = [
        f"scenario {one} is not one of 0 to {count - 1}; name those of the table."
        for one in asked
        if not 0 <= one < count
    ]
    if not asked:
        faults.append("no scenario is left to choose; name at least one.")
    if not 0.0 <= tolerance < 1.0:
        faults.append(f"tolerance {tolerance} is outside 0 to 1; give a relative gap such as 1e-4.")
    if not time_limit_s > 0.0:
        faults.append(f"time limit {time_limit_s} s must be above zero; give seconds.")
    if faults:
        raise InputError.collect("plan request", faults)
    objective = programs.objective_of(program.table, budget)
    return Question(program, objective, programs.limits_of(budget), asked)


def _solve(
    question: Question,
    budget: Budget,
    *,
    tolerance: float,
    time_limit_s: float,
    began: float,
    clock: Callable[[], float],
) -> Solution:
    answer = search(question, tolerance=tolerance, time_limit_s=time_limit_s, now=clock)
    if answer.chosen is not None:
        return _solution(question, answer, budget, tolerance, clock() - began)
    if answer.complete:
        raise explain(question, time_limit_s=time_limit_s, now=clock)
    searched = f"({answer.solved} of {len(question.scenarios)} scenarios searched)"
    if clock() - began < time_limit_s:
        raise EdgeflexError(
            f"no plan was found, and none is ruled out {searched}: plans lie closer to a budget than the solver can "
            "tell apart. Loosen a budget a little."
        )
    raise EdgeflexError(
        f"no plan was found within {time_limit_s:g} s, and none is ruled out yet {searched}. Allow more time or loosen "
        "a budget."
    )


def _solution(question: Question, answer: Answer, budget: Budget, tolerance: float, wall_s: float) -> Solution:
    gap = (answer.objective - answer.bound) / max(abs(answer.objective), _TINY)
    proof = Proof(
        solver=_solver_name(),
        status="optimal" if answer.complete and gap <= tolerance else "feasible",
        minimize=budget.minimize,
        objective=answer.objective,
        bound=answer.bound,
        gap=gap,
        tolerance=tolerance,
        wall_s=wall_s,
        scenarios=len(question.scenarios),
        scenarios_solved=answer.solved,
    )
    return Solution(scenario=answer.scenario, choices=_choices(question.program, answer), proof=proof)


def _choices(program: Program, answer: Answer) -> tuple[Choice, ...]:
    name_of = {} if answer.chosen is None else {int(program.pick[one]): program.names[one] for one in answer.chosen}
    option = {index: name_of[pick] for pick, members in enumerate(program.members) for index in members}
    return tuple(
        Choice(subject=decision.subject, option=option[index]) for index, decision in enumerate(program.table.decisions)
    )


def _solver_name() -> str:
    import scipy

    return f"HiGHS in scipy {scipy.__version__}, best bound first"


def _swept(table: CostTable, budget: Budget, over: Literal["memory", "latency", "drop"]) -> Quantity:
    if over == "memory":
        return Quantity("memory", programs.measured_tiers(table, budget))
    return Quantity("latency", statistic=budget.statistic) if over == "latency" else Quantity("drop")


def _without(budget: Budget, over: str) -> Budget:
    if over == "memory":
        return budget.model_copy(update={"memory_bytes": {}})
    if over == "latency":
        others = tuple(limit for limit in budget.latency if limit.statistic != budget.statistic)
        return budget.model_copy(update={"latency": others})
    return budget.model_copy(update={"max_drop": None})


def _rounded(quantity: Quantity, most: float) -> float:
    return float(int(most)) if quantity.kind == "memory" else most


def _measured(program: Program, quantity: Quantity, solution: Solution) -> float:
    import numpy as np

    option = {choice.subject: choice.option for choice in solution.choices}
    place = {
        (int(pick), name): variable
        for variable, (pick, name) in enumerate(zip(program.pick, program.names, strict=True))
    }
    chosen = [
        place[pick, option[program.table.decisions[members[0]].subject]] for pick, members in enumerate(program.members)
    ]
    measure = program.measure(quantity, solution.scenario)
    return program.value(measure, np.array(chosen, dtype=np.int64))


def _non_dominated(found: Sequence[tuple[float, Solution]]) -> tuple[Solution, ...]:
    kept: list[Solution] = []
    for _, solution in sorted(found, key=lambda one: (one[0], one[1].proof.objective)):
        if not kept or solution.proof.objective < kept[-1].proof.objective:
            kept.append(solution)
    return tuple(kept)
