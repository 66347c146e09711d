"""The exact search over scenarios: bounds first, then integer programs, best bound first.

Each scenario is a multiple-choice knapsack. It is walked in three steps, each dearer and sharper than the
one before, and only while its bound is below the best plan found: the sum of every pick's least cost; the
linear relaxation (HiGHS), whose vertex has at most one fractional pick a budget; the integer program. On
large tables the integer program is first solved over a *core*, the options of least reduced cost, which
repairs the few fractional picks; every option whose reduced cost exceeds the gap left is then out for good
(reduced-cost fixing), and what remains is solved whole. All bounds are proven by HiGHS's own duals.
"""

from __future__ import annotations

import ctypes
import heapq
import logging
import math
import os
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from edgeflex.plans.program import Floats, Ints, Limit, Measure, Program, Quantity

_log = logging.getLogger(__name__)

_NOISE = 2e-6  # what HiGHS may be off by in a row whose largest coefficient is 1
_ZOOM = 100.0  # the largest cost that HiGHS sees, so that its absolute gap of 1e-6 is 1e-8 of it
_ZOOM_MOST = 1e6  # where one cost dwarfs the sum, as a penalty does
_INTERIOR = 4000  # variables from which HiGHS's interior point (with crossover) beats its simplex
_CORE = 600  # variables that an integer program takes without a core
_CORE_EXTRA = 300  # variables of a core beside one a pick, on large tables
_FEW_PICKS = 1000  # picks up to which a core is smaller and solved less sharply: it only has to fix the rest
_FEW_EXTRA = 60
_FEW_GAP = 16.0
_CORE_SHARE = 0.4  # of the time left
_LARGE = 12_000  # variables above which closing the last 0.1 % can take HiGHS hours; the gap is told instead
_LARGE_GAP = 1e-3
_LARGE_CORE_S = 2.0
_DOMINANCE_WIDTH = 64  # options of a pick up to which each is held against each
_CUTS = 8  # plans that rounding let through, cut off one by one, before the budgets are tightened
_FEW_CUTS = 64  # the same where an integer program takes milliseconds
_ROUNDING = 1e-12  # of sums, as a share of what is summed
_SHARP = 2e-6  # of a plan's cost above the floor: what HiGHS is trusted to tell apart

_STDOUT = threading.Lock()  # one solve at a time may hold the process's stdout


@dataclass(frozen=True)
class Question:
    """What is asked of a program: least ``objective`` within ``limits``, in some scenarios."""

    program: Program
    objective: Quantity
    limits: tuple[Limit, ...]
    scenarios: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """The best plan found and what is proven.

    ``chosen`` is None when none was found; then none exists if ``complete``. ``bound`` holds over all
    scenarios asked about.
    """

    scenario: int
    chosen: Ints | None
    objective: float
    bound: float
    complete: bool
    solved: int


@dataclass(frozen=True)
class _Instance:
    """One scenario after presolve: kept variables, costs above each pick's least, scaled."""

    kept: Ints  # [kept] variables of the program
    pick: Ints  # [kept]
    cost: Floats  # [kept + links]
    constant: float
    unit: float  # objective = constant + unit * (cost @ x)
    rows: Any  # csr [rows, kept + links]
    most: Floats  # [rows]
    budgets: int  # the first rows, those of the limits
    measures: tuple[tuple[Limit, Measure], ...]
    objective: Measure

    @property
    def links(self) -> int:
        return len(self.cost) - len(self.kept)

    def room(self, more: float) -> Floats:
        """Return what the rows may add up to, the limits ``more`` in their own scale than they are."""
        return self.most + more * (np.arange(len(self.most)) < self.budgets)


@dataclass(frozen=True)
class _Relaxed:
    instance: _Instance
    least: float  # in the instance's unit
    x: Floats
    reduced: Floats  # [kept]

    @property
    def bound(self) -> float:
        return self.instance.constant + self.instance.unit * self.least

    @property
    def zoom(self) -> float:
        """What costs are multiplied by for HiGHS, whose absolute gap is fixed."""
        return min(max(_ZOOM, 1.0 / max(self.least, 1e-30)), _ZOOM_MOST)


@dataclass
class _Best:
    """The best plan so far."""

    objective: float = math.inf
    scenario: int = -1
    chosen: Ints | None = None

    def offer(self, objective: float, scenario: int, chosen: Ints) -> None:
        if objective < self.objective:
            self.objective, self.scenario, self.chosen = objective, scenario, chosen

    def closed_by(self, bound: float, tolerance: float) -> bool:
        return math.isfinite(self.objective) and bound >= self.objective - tolerance * abs(self.objective)


@dataclass
class _Clock:
    now: Callable[[], float]
    deadline: float

    @property
    def left_s(self) -> float:
        return self.deadline - self.now()


@dataclass
class _State:
    tolerance: float
    clock: _Clock
    best: _Best = field(default_factory=_Best)
    least_proven: float = math.inf
    complete: bool = True
    solved: int = 0


def search(question: Question, *, tolerance: float, time_limit_s: float, now: Callable[[], float]) -> Answer:
    """Return the best plan over the scenarios of ``question``, with its proof."""
    state = _State(tolerance, _Clock(now, now() + time_limit_s))
    heap: list[tuple[float, int, int, _Relaxed | None]] = []
    for order, scenario in enumerate(question.scenarios):
        bound = _first_bound(question, scenario)
        if math.isfinite(bound):
            heapq.heappush(heap, (bound, order, scenario, None))
    while heap and not state.best.closed_by(heap[0][0], tolerance):
        if state.clock.left_s <= 0:
            state.complete = False
            break
        _, order, scenario, relaxed = heapq.heappop(heap)
        if relaxed is not None:
            state.solved += 1
            _solve_scenario(question, scenario, relaxed, state)
            continue
        relaxed = _relax(question, scenario, state.best.objective)
        if relaxed is not None:
            heapq.heappush(heap, (relaxed.bound, order, scenario, relaxed))
    rest = heap[0][0] if heap else math.inf
    bound = min(state.least_proven, rest, state.best.objective)
    best = state.best
    return Answer(best.scenario, best.chosen, best.objective, bound, state.complete, state.solved)


def _first_bound(question: Question, scenario: int) -> float:
    """Return the sum of least costs, or infinity if a single budget is already out of reach."""
    program = question.program
    for limit in question.limits:
        measure = program.measure(limit.quantity, scenario)
        if _least(program, measure.values).sum() + measure.constant > limit.most + limit.slack:
            return math.inf
    measure = program.measure(question.objective, scenario)
    return float(_least(program, measure.values).sum()) + measure.constant


def _least(program: Program, values: Floats) -> Floats:
    if program.picks == 0:
        return np.zeros(0)
    least: Floats = np.minimum.reduceat(values, program.start[:-1])
    return least


# --- presolve ------------------------------------------------------------------------------------------


def _presolve(question: Question, scenario: int, roof: float) -> _Instance | None:
    """Return the scenario without options that no best plan needs, or None if no plan below ``roof`` fits."""
    program = question.program
    objective = program.measure(question.objective, scenario)
    measures = tuple((limit, program.measure(limit.quantity, scenario)) for limit in question.limits)
    table = np.array([objective.values, *(measure.values for _, measure in measures)])
    most = np.array([limit.most + limit.slack - measure.constant for limit, measure in measures])
    below = roof + _ROUNDING * (abs(roof) + abs(objective.constant)) - objective.constant
    light = _drop_heavy(program, table, np.array([below, *most]))
    if light is None:
        return None
    table = _drop_dominated(program, light)
    kept = np.flatnonzero(np.isfinite(table[0]))
    least = np.array([_least(program, row) for row in table]).reshape(len(table), program.picks)
    above = table[:, kept] - least[:, program.pick[kept]]
    slack = _whole_slack(question.limits, above[1:], most - least[1:].sum(axis=1))
    links = np.array([measure.links for _, measure in measures]).reshape(len(measures), len(objective.links))
    cost = np.concatenate([above[0], objective.links])
    unit = float(cost.max(initial=0.0)) or 1.0
    rows, bounds = _budget_rows(np.hstack([above[1:], links]), slack, program.pick[kept], program.picks)
    extra, extra_most = _side_rows(program, kept)
    return _Instance(
        kept=kept,
        pick=program.pick[kept],
        cost=cost / unit,
        constant=objective.constant + float(least[0].sum()),
        unit=unit,
        rows=_stack(rows, extra),
        most=np.concatenate([bounds, extra_most]),
        budgets=len(bounds),
        measures=measures,
        objective=objective,
    )


def _whole_slack(limits: Sequence[Limit], above: Floats, slack: Floats) -> Floats:
    """Round the room of byte budgets down to what their options can fill: a multiple of their common divisor.

    Experts of one shape come in few sizes; without this the relaxation spends bytes that no plan can.
    """
    slack = slack.copy()
    for place, limit in enumerate(limits):
        if limit.quantity.kind in {"memory", "disk"}:
            divisor = int(np.gcd.reduce(above[place].astype(np.int64), initial=0))
            slack[place] = math.floor(slack[place] / divisor) * divisor if divisor else slack[place]
    return slack


def _drop_heavy(program: Program, table: Floats, most: Floats) -> Floats | None:
    """Drop options that break a budget, or cost too much, even beside the lightest others, until none is left."""
    table = table.copy()
    while True:
        least = np.array([_least(program, row) for row in table])
        slack = most - least.sum(axis=1) if program.picks else most
        # ``most`` already carries the rounding allowance; sums of sizes are exact
        if not np.all(slack >= 0.0):
            return None
        if program.picks == 0:
            break
        heavy = np.any(table - least[:, program.pick] > slack[:, None] * (1 + _ROUNDING), axis=0)
        heavy &= np.isfinite(table[0])
        if not heavy.any():
            break
        table[:, heavy] = np.inf
        if not np.all(np.isfinite(_least(program, table[0]))):
            return None
    return table


def _drop_dominated(program: Program, table: Floats) -> Floats:
    """Drop options that another of the same pick and signature beats or equals everywhere."""
    counts = np.diff(program.start)
    width = int(counts.max(initial=0))
    if not 2 <= width <= _DOMINANCE_WIDTH:
        return table
    place = np.arange(len(program.pick)) - program.start[program.pick]
    grid = np.full((len(table), program.picks, width), np.inf)
    grid[:, program.pick, place] = table
    signature = np.full((program.picks, width), -1, dtype=np.int64)
    signature[program.pick, place] = program.signature
    dominated = np.zeros((program.picks, width), dtype=bool)
    for rival in range(width):
        other = grid[:, :, rival : rival + 1]
        beats = np.all(other <= grid, axis=0) & (signature[:, rival : rival + 1] == signature)
        beats &= np.isfinite(other[0])
        strict = np.any(other < grid, axis=0) | (np.arange(width) > rival)
        dominated |= beats & strict
    table = table.copy()
    table[:, dominated[program.pick, place]] = np.inf
    return table


def _budget_rows(rows: Floats, slack: Floats, pick: Ints, picks: int) -> tuple[Floats, Floats]:
    """Scale the budgets and leave out those that no combination can break."""
    kept_rows, bounds = [], []
    for row, most in zip(rows, slack, strict=True):
        heaviest = np.zeros(picks)
        np.maximum.at(heaviest, pick, row[: len(pick)])
        if heaviest.sum() + row[len(pick) :].sum() <= most:
            continue
        scale = 1.0 / row.max()
        kept_rows.append(row * scale)
        bounds.append(most * scale)
    return np.array(kept_rows).reshape(len(kept_rows), rows.shape[1]), np.array(bounds)


def _side_rows(program: Program, kept: Ints) -> tuple[Any, Floats]:
    """Return the rows that make link variables at least |difference|, and the rules, all as ``<=``."""
    from scipy.sparse import block_array, csr_array, eye_array

    links = len(program.link_block)
    bounded = np.isfinite(program.at_most)
    needed = program.at_least > 0
    rules = program.rules[:, kept]
    blocks = [[-rules[needed], csr_array((int(needed.sum()), links))]]
    blocks += [[rules[bounded], csr_array((int(bounded.sum()), links))]]
    if links:
        differ, one = program.differ[:, kept], csr_array(eye_array(links))
        blocks += [[differ, -one], [-differ, -one]]
        stacked = block_array(blocks, format="csr")
    else:
        stacked = block_array([[rows[0]] for rows in blocks], format="csr")
    most = [-program.at_least[needed], program.at_most[bounded], np.zeros(2 * links)]
    return stacked, np.concatenate(most)


def _stack(dense: Floats, sparse: Any) -> Any:
    from scipy.sparse import csr_array, vstack

    return vstack([csr_array(dense), sparse], format="csr")


# --- one scenario --------------------------------------------------------------------------------------


def _one_each(instance: _Instance, kept: npt.NDArray[np.bool_] | None = None) -> Any:
    """Return the rows that take exactly one variable of each pick."""
    from scipy.sparse import csr_array

    pick = instance.pick if kept is None else instance.pick[kept]
    _, row = np.unique(pick, return_inverse=True)
    shape = (int(row.max(initial=-1)) + 1, len(pick) + instance.links)
    return csr_array((np.ones(len(pick)), (row, np.arange(len(pick)))), shape=shape)


def _relax(question: Question, scenario: int, roof: float) -> _Relaxed | None:
    """Return the linear relaxation's bound and reduced costs, or None if even it has no solution below ``roof``."""
    from scipy.optimize import linprog

    instance = _presolve(question, scenario, roof)
    if instance is None:
        return None
    size = len(instance.kept)
    if size == 0:
        return _Relaxed(instance, 0.0, np.zeros(0), np.zeros(0))
    equal = _one_each(instance)
    bounded = instance.rows.shape[0] > 0
    result = linprog(
        instance.cost,
        A_ub=instance.rows if bounded else None,
        b_ub=instance.room(_NOISE) if bounded else None,
        A_eq=equal,
        b_eq=np.ones(equal.shape[0]),
        bounds=(0, None),
        method="highs-ipm" if size > _INTERIOR else "highs-ds",
    )
    if result.status == 2:
        return None
    if result.x is None:
        _log.warning("HiGHS could not relax scenario %d: %s", scenario, result.message)
        return _priced(instance, np.zeros(len(instance.most)), np.zeros(len(instance.cost)))
    prices = -np.asarray(result.ineqlin.marginals) if bounded else np.zeros(0)
    return _priced(instance, np.maximum(prices, 0.0), np.asarray(result.x, dtype=np.float64))


def _priced(instance: _Instance, prices: Floats, x: Floats) -> _Relaxed:
    """Return the Lagrangian bound and reduced costs at ``prices`` of the rows.

    Any prices of at least 0 give a valid bound (weak duality), so that HiGHS's rounding cannot harm it; the
    relaxation's own duals give its value.
    """
    size = len(instance.kept)
    cost = instance.cost + instance.rows.T @ prices
    picks = np.flatnonzero(np.diff(instance.pick, prepend=-1))
    cheapest = np.minimum.reduceat(cost[:size], picks)
    sizes = np.diff(np.append(picks, size))
    least = float(cheapest.sum() + np.minimum(cost[size:], 0.0).sum() - prices @ instance.most)
    return _Relaxed(instance, least, x, cost[:size] - np.repeat(cheapest, sizes))


def _solve_scenario(question: Question, scenario: int, relaxed: _Relaxed, state: _State) -> None:
    """Solve one scenario's integer program and note plan and bound in ``state``."""
    instance = relaxed.instance
    most_cuts = _FEW_CUTS if len(instance.kept) <= _CORE else _CUTS
    cuts: list[Ints] = []
    # budgets a little wider than they are, so that HiGHS's rounding hides no plan; what breaks one is cut off
    room = _NOISE
    bound = relaxed.bound
    while True:
        found, proven, ended = _integer(relaxed, state, cuts, room)
        if room > 0.0:
            bound = max(bound, instance.constant + instance.unit * proven)
        if found is None or _keep(question, scenario, instance, found, state.best):
            break
        cuts.append(found)
        if len(cuts) > most_cuts:
            if room < 0.0:
                ended = False
                break
            room = -_NOISE
    # tightened budgets may hide a plan, so that finding none there rules nothing out
    state.complete = state.complete and ended and not (room < 0.0 and found is None)
    if found is not None:
        finer = _finer(question, scenario, relaxed, state.best)
        if finer is not None:
            _solve_scenario(question, scenario, finer, state)
            return
        bound = _told(bound, relaxed, state.best.objective)
    state.least_proven = min(state.least_proven, bound)


def _blur(relaxed: _Relaxed) -> float:
    """Return how far apart two costs must be for HiGHS to tell them apart."""
    return _NOISE * relaxed.instance.unit / relaxed.zoom


def _finer(question: Question, scenario: int, relaxed: _Relaxed, best: _Best) -> _Relaxed | None:
    """Return the scenario in a finer scale, where one option that no best plan takes hides what others differ by."""
    told_apart = _blur(relaxed) <= _SHARP * abs(best.objective - relaxed.instance.constant)
    if told_apart or best.closed_by(relaxed.bound, _SHARP):
        return None
    finer = _relax(question, scenario, best.objective)
    return finer if finer is not None and len(finer.instance.kept) < len(relaxed.instance.kept) else None


def _told(bound: float, relaxed: _Relaxed, objective: float) -> float:
    """Return what HiGHS's bound proves: the objective where they differ by no more than rounding, else less than it."""
    blur = _blur(relaxed)
    if blur > _SHARP * abs(objective - relaxed.instance.constant):
        return max(min(bound, objective) - blur, relaxed.bound)
    return objective if abs(objective - bound) <= blur else bound


def _keep(question: Question, scenario: int, instance: _Instance, found: Ints, best: _Best) -> bool:
    """Offer ``found`` to ``best`` if it keeps every limit when summed anew without scaling."""
    program = question.program
    chosen = instance.kept[found]
    for limit, measure in instance.measures:
        if program.value(measure, chosen) > limit.most + limit.slack:
            return False
    best.offer(program.value(instance.objective, chosen), scenario, chosen)
    return True


def _integer(relaxed: _Relaxed, state: _State, cuts: Sequence[Ints], room: float) -> tuple[Ints | None, float, bool]:
    """Return (kept variables set to 1 or None, proven least in the instance's unit, whether it ended)."""
    instance = relaxed.instance
    if len(instance.kept) == 0:
        return np.zeros(0, dtype=np.int64), 0.0, True
    roof = (state.best.objective - instance.constant) / instance.unit
    mask = relaxed.reduced <= roof - relaxed.least + _NOISE
    gap = state.tolerance * abs(relaxed.bound) / instance.unit
    run = _Run(relaxed, tuple(cuts), room, gap)
    if mask.sum() <= _CORE:
        return run.solve(mask, state.clock.left_s, roof)
    picks = len(np.unique(instance.pick))
    few = picks <= _FEW_PICKS
    width = min(picks + (_FEW_EXTRA if few else _CORE_EXTRA), int(mask.sum()) - 1)
    core = mask & (relaxed.reduced <= np.partition(relaxed.reduced[mask], width)[width])
    core |= relaxed.x[: len(mask)] > 0
    large = len(instance.kept) > _LARGE
    enough = max(gap, _LARGE_GAP * abs(relaxed.bound) / instance.unit) if large else gap
    core_s = _CORE_SHARE * state.clock.left_s
    rough = replace(run, gap=gap * _FEW_GAP if few else gap)
    found, _, _ = rough.solve(core, min(core_s, _LARGE_CORE_S) if large else core_s, roof)
    if found is None:
        return run.solve(mask, state.clock.left_s, roof)
    height = float(run.height(found))
    if height - relaxed.least <= enough:
        return found, relaxed.least, True
    run = replace(run, gap=enough)
    mask = relaxed.reduced <= min(roof, height) - relaxed.least + _NOISE
    better, proven, ended = run.solve(mask, state.clock.left_s, min(roof, height))
    if better is None or run.height(better) > height:
        better = found
    return better, min(proven, height), ended


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drop what HiGHS's own code prints: scipy cannot silence its repair notes, and stdout is the result's."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    with _STDOUT, open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a descriptor is needed, not a path
        sys.stdout.flush()
        try:
            kept = os.dup(1)
        except OSError:  # no stdout: nothing to protect
            yield
            return
        try:
            os.dup2(nowhere.fileno(), 1)
            yield
        finally:
            if libc is not None:
                libc.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


@dataclass(frozen=True)
class _Run:
    """Integer programs over subsets of one instance's variables."""

    relaxed: _Relaxed
    cuts: tuple[Ints, ...]
    room: float
    gap: float

    def height(self, found: Ints) -> float:
        """Return the cost of ``found`` with its links, in the instance's unit."""
        instance = self.relaxed.instance
        total = float(instance.cost[found].sum())
        if instance.links == 0:
            return total
        x = np.zeros(len(instance.kept))
        x[found] = 1.0
        size = len(instance.kept)
        differ = instance.rows[instance.rows.shape[0] - 2 * instance.links : -instance.links, :size] @ x
        return total + float(instance.cost[size:] @ np.abs(differ))

    def solve(self, mask: npt.NDArray[np.bool_], time_limit_s: float, roof: float) -> tuple[Ints | None, float, bool]:
        """Solve over the variables of ``mask``; whatever lies outside costs at least ``roof``."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        instance = self.relaxed.instance
        picks = np.unique(instance.pick[mask])
        if len(picks) < len(np.unique(instance.pick)):
            return None, roof, True
        columns = np.concatenate([np.flatnonzero(mask), len(mask) + np.arange(instance.links)])
        rules = [LinearConstraint(_one_each(instance, mask), 1.0, 1.0)]
        if instance.rows.shape[0]:
            rules.append(LinearConstraint(instance.rows[:, columns], -np.inf, instance.room(self.room)))
        rules += [self._cut(cut, mask, len(columns)) for cut in self.cuts]
        whole = np.zeros(len(columns), dtype=np.int64)
        whole[: int(mask.sum())] = 1
        with _silent_stdout():
            result = milp(
                instance.cost[columns] * self.relaxed.zoom,
                integrality=whole,
                bounds=Bounds(0.0, 1.0),
                constraints=rules,
                options={"mip_rel_gap": self._relative_gap(), "time_limit": max(time_limit_s, 0.01)},
            )
        return self._read(result, mask, columns, roof)

    def _relative_gap(self) -> float:
        """Return HiGHS's gap, which is about the shifted cost, for the gap asked for on the whole."""
        return min(0.5 * self.gap / max(self.relaxed.least, 1e-9), 0.5)

    def _cut(self, cut: Ints, mask: npt.NDArray[np.bool_], columns: int) -> Any:
        from scipy.optimize import LinearConstraint

        row = np.zeros(len(mask))
        row[cut] = 1.0
        padded = np.zeros(columns)
        padded[: int(mask.sum())] = row[mask]
        return LinearConstraint(padded[None, :], -np.inf, len(cut) - 1.0)

    def _read(
        self, result: Any, mask: npt.NDArray[np.bool_], columns: Ints, roof: float
    ) -> tuple[Ints | None, float, bool]:
        if result.status == 2:
            return None, roof, True
        proven = (
            self.relaxed.least if result.mip_dual_bound is None else float(result.mip_dual_bound) / self.relaxed.zoom
        )
        proven = min(max(proven, self.relaxed.least), roof)
        if result.x is None:
            return None, proven, False
        chosen = columns[: int(mask.sum())][result.x[: int(mask.sum())] > 0.5]
        return chosen, proven, result.status == 0
