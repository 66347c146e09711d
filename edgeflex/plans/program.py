"""A cost table as arrays: the 0/1 program that the solver walks.

Every decision, or set of tied decisions, is a *pick*: exactly one of its variables is 1. Whatever a plan
is asked for (bytes, seconds, drop) is then linear in the variables, plus one term for each *link*: a
boundary between two picks, paid when their formats differ. Boundaries with one free end are part of
that end's own latency.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeflex.errors import InputError
from edgeflex.schema import Format, Tier
from edgeflex.units import format_exact_bytes, format_share, format_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt
    from scipy.sparse import csr_array

    from edgeflex.schema import Budget, CostTable, Decision, Scenario, Statistic

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

_PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_SHARE_TOLERANCE = 1e-12
_REACH_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Quantity:
    """Something that a plan can be asked for: what is limited or minimised."""

    kind: Literal["memory", "latency", "disk", "drop"]
    tiers: tuple[Tier, ...] = ()
    statistic: Statistic = "mean"

    @property
    def name(self) -> str:
        """The name that users meet in messages, as ``memory`` or ``latency p95``; two memories as ``memory + vram``."""
        if self.kind == "memory":
            return " + ".join(tier.budget_name for tier in self.tiers) or "memory"
        return {"latency": f"latency {self.statistic}", "disk": "disk", "drop": "max drop"}[self.kind]

    def show(self, value: float, *, up: bool = False) -> str:
        """Return ``value`` with its unit, sizes exactly; with ``up`` no less, so that it can be given as a limit."""
        if self.kind in {"memory", "disk"}:
            return format_exact_bytes(value)
        if self.kind == "latency":
            return format_time(value, up=up)
        per_cent = format_share(value, 4, up=up).removesuffix(" %")
        return f"{per_cent.rstrip('0').rstrip('.')} %"


@dataclass(frozen=True)
class Limit:
    """A quantity and the most that it may be, in bytes, seconds or a share."""

    quantity: Quantity
    most: float

    @property
    def slack(self) -> float:
        """What rounding of sums may add; sizes are whole numbers and get none."""
        if self.quantity.kind in {"memory", "disk"}:
            return 0.0
        return 5e-10 * abs(self.most) + 5e-13


@dataclass(frozen=True)
class Measure:
    """A quantity in one scenario: ``constant + values · x + links · |differ x|``."""

    values: Floats  # [variables]
    links: Floats  # [links]
    constant: float


def limits_of(budget: Budget) -> tuple[Limit, ...]:
    """Return the limits that ``budget`` sets, the least of those about the same quantity.

    Raises:
        InputError: A limit is negative.
    """
    limits = [Limit(Quantity("memory", (tier,)), float(most)) for tier, most in budget.memory_bytes.items()]
    limits += [Limit(Quantity("latency", statistic=row.statistic), row.limit_s) for row in budget.latency]
    if budget.disk_bytes is not None:
        limits.append(Limit(Quantity("disk"), float(budget.disk_bytes)))
    if budget.max_drop is not None:
        limits.append(Limit(Quantity("drop"), budget.max_drop))
    faults = [
        f"{limit.quantity.name} of {limit.quantity.show(limit.most)} is below zero. Give a limit of at least 0."
        for limit in limits
        if limit.most < 0 and limit.quantity.kind != "drop"
    ]
    if faults:
        raise InputError.collect("budget", faults)
    least: dict[Quantity, Limit] = {}
    for limit in limits:
        known = least.get(limit.quantity)
        least[limit.quantity] = limit if known is None or limit.most < known.most else known
    return tuple(least.values())


def measured_tiers(table: CostTable, budget: Budget) -> tuple[Tier, ...]:
    """Return the tiers that count when memory is minimised: those budgeted, or all in use."""
    if budget.memory_bytes:
        return tuple(budget.memory_bytes)
    used = {tier for decision in table.decisions for option in decision.options for tier in option.memory_bytes}
    return tuple(tier for tier in Tier if tier in used | set(table.fixed_memory_bytes))


def objective_of(table: CostTable, budget: Budget) -> Quantity:
    """Return what ``budget`` asks to be least."""
    if budget.minimize == "memory":
        return Quantity("memory", measured_tiers(table, budget))
    if budget.minimize == "latency":
        return Quantity("latency", statistic=budget.statistic)
    return Quantity("drop")


def block_weights(reach: Sequence[float], statistic: Statistic) -> Floats:
    """Return how much each block's latency counts, [blocks].

    A percentile counts the blocks that more than ``1 - q`` of the inputs reach: latency only grows with
    depth, so the q-th input leaves at the end of the last of them.
    """
    reached = np.asarray(reach, dtype=np.float64)
    if statistic == "mean":
        return reached
    share = 0.0 if statistic == "worst" else 1.0 - _PERCENTILES[statistic] + _SHARE_TOLERANCE
    weights = (reached > share).astype(np.float64)
    weights[:1] = 1.0
    return weights


@dataclass(frozen=True)
class Items:
    """Latencies by item: one per decision and option, then one per option that pays at a free end."""

    variable: Ints  # [items]
    block: Ints  # [items]
    group: Ints  # [items] 1 + index into groups, 0 for none
    latency: Floats  # [items]
    miss: Floats  # [items]


@dataclass(frozen=True)
class Program:
    """All scenarios of a table over one set of variables, each a pick's option by name."""

    table: CostTable
    names: tuple[str, ...]  # [variables] option names
    pick: Ints  # [variables] the pick that a variable belongs to
    start: Ints  # [picks + 1] first variable of each pick
    members: tuple[tuple[int, ...], ...]  # [picks] decisions that take the option together
    signature: Ints  # [variables] only equal ones of a pick may replace each other
    loss: Floats  # [1 or scenarios, variables]
    memory: dict[Tier, Floats]  # [variables] each
    disk: Floats  # [variables]
    items: Items
    groups: tuple[str, ...]
    differ: csr_array  # [links, variables] +1 and -1 on the Q8 options of the two ends
    link_block: Ints  # [links]
    link_latency: Floats  # [links]
    rules: csr_array  # [rules, variables]
    at_least: Floats  # [rules]
    at_most: Floats  # [rules]

    @property
    def picks(self) -> int:
        """How many picks there are."""
        return len(self.members)

    def measure(self, quantity: Quantity, scenario: int) -> Measure:
        """Return ``quantity`` in ``scenario`` as a linear function of the variables."""
        if quantity.kind == "latency":
            return self._latency(quantity.statistic, self.table.scenarios[scenario])
        no_links = np.zeros(len(self.link_block))
        if quantity.kind == "drop":
            row = self.loss[scenario if len(self.loss) > 1 else 0]
            return Measure(row, no_links, self.table.scenarios[scenario].loss)
        if quantity.kind == "disk":
            return Measure(self.disk, no_links, float(self.table.fixed_disk_bytes))
        values = np.zeros(len(self.names))
        for tier in quantity.tiers:
            values = values + self.memory.get(tier, 0.0)
        fixed_bytes = sum(self.table.fixed_memory_bytes.get(tier, 0) for tier in quantity.tiers)
        return Measure(values, no_links, float(fixed_bytes))

    def _latency(self, statistic: Statistic, scenario: Scenario) -> Measure:
        weights = block_weights(scenario.reach, statistic)
        rates = np.array([0.0] + [scenario.miss_rate.get(group, 0.0) for group in self.groups])
        items = self.items
        seconds = weights[items.block] * (items.latency + rates[items.group] * items.miss)
        values = _added(items.variable, seconds, len(self.names))
        constant = float(weights @ np.asarray(self.table.fixed_latency_s, dtype=np.float64))
        return Measure(values, weights[self.link_block] * self.link_latency, constant)

    def value(self, measure: Measure, chosen: Ints) -> float:
        """Return ``measure`` of the plan that sets the variables ``chosen`` (one a pick) to 1."""
        total = measure.constant + float(measure.values[chosen].sum())
        if len(self.link_block) == 0:
            return total
        x = np.zeros(len(self.names))
        x[chosen] = 1.0
        return total + float(measure.links @ np.abs(self.differ @ x))


# --- building ----------------------------------------------------------------------------------------


def build(table: CostTable) -> Program:
    """Return the program of ``table``.

    Raises:
        InputError: The table contradicts itself; every fault is listed.
    """
    faults = list(_faults(table))
    if faults:
        raise InputError.collect(f"cost table {table.name!r}", faults)
    members = _members(table.decisions)
    names, variable_of = _variables(table, members)
    counts = [len(table.decisions[first].options) for first, *_ in members]
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    items = _items(table, variable_of)
    differ, link_block, link_latency = _links(table, variable_of, len(names))
    rules, at_least, at_most = _rules(table, variable_of, len(names))
    options = [option for decision in table.decisions for option in decision.options]
    own = items.variable[: len(options)]
    tiers = [tier for tier in Tier if any(tier in option.memory_bytes for option in options)]

    def add(values: Sequence[float]) -> Floats:
        return _added(own, np.asarray(values, dtype=np.float64), len(names))

    width = max((len(option.loss) for option in options), default=1)
    rows = [[option.loss[min(row, len(option.loss) - 1)] for option in options] for row in range(width)]
    return Program(
        table=table,
        names=tuple(names),
        pick=np.repeat(np.arange(len(members), dtype=np.int64), counts),
        start=start,
        members=members,
        signature=_signature(differ, rules),
        loss=np.array([add(row) for row in rows]),
        memory={tier: add([option.memory_bytes.get(tier, 0) for option in options]) for tier in tiers},
        disk=add([option.disk_bytes for option in options]),
        items=items,
        groups=_groups(table),
        differ=differ,
        link_block=link_block,
        link_latency=link_latency,
        rules=rules,
        at_least=at_least,
        at_most=at_most,
    )


def _added(variable: Ints, values: Floats, size: int) -> Floats:
    """Return the sum of ``values`` by variable; counting nothing would otherwise give integers."""
    return np.bincount(variable, values, size).astype(np.float64)


def _members(decisions: Sequence[Decision]) -> tuple[tuple[int, ...], ...]:
    picks: dict[str | int, list[int]] = {}
    for index, decision in enumerate(decisions):
        picks.setdefault(index if decision.tie is None else decision.tie, []).append(index)
    return tuple(tuple(pick) for pick in picks.values())


def _variables(table: CostTable, members: tuple[tuple[int, ...], ...]) -> tuple[list[str], dict[str, dict[str, int]]]:
    names: list[str] = []
    variable_of: dict[str, dict[str, int]] = {}
    for pick in members:
        options = [option.name for option in table.decisions[pick[0]].options]
        of_name = {name: len(names) + place for place, name in enumerate(options)}
        variable_of.update((table.decisions[index].subject, of_name) for index in pick)
        names += options
    return names, variable_of


def _groups(table: CostTable) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.group for one in table.decisions if one.group is not None))


def _items(table: CostTable, variable_of: dict[str, dict[str, int]]) -> Items:
    group_index = {group: place for place, group in enumerate(_groups(table), start=1)}
    rows = [
        (
            variable_of[decision.subject][option.name],
            decision.block,
            0 if decision.group is None else group_index[decision.group],
            option.latency_s,
            option.miss_latency_s,
        )
        for decision in table.decisions
        for option in decision.options
    ]
    rows += list(_free_ends(table, variable_of))
    variable, block, group, latency, miss = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return Items(
        variable=np.array(variable, dtype=np.int64),
        block=np.array(block, dtype=np.int64),
        group=np.array(group, dtype=np.int64),
        latency=np.array(latency, dtype=np.float64),
        miss=np.array(miss, dtype=np.float64),
    )


def _free_ends(
    table: CostTable, variable_of: dict[str, dict[str, int]]
) -> Iterator[tuple[int, int, int, float, float]]:
    """Give boundaries that one pick decides alone as latency of its options."""
    options = {decision.subject: decision.options for decision in table.decisions}
    for edge in table.boundaries:
        ends = [end for end in (edge.source, edge.target) if end]
        if len({id(variable_of[end]) for end in ends}) != 1:
            continue
        formats = [{option.name: option.format for option in options[end]} for end in ends]
        for name, variable in variable_of[ends[0]].items():
            first = formats[0][name]
            other = formats[1][name] if len(formats) > 1 else Format.FLOAT
            if first is not other:
                yield variable, edge.block, 0, edge.latency_s, 0.0


def _links(table: CostTable, variable_of: dict[str, dict[str, int]], size: int) -> tuple[csr_array, Ints, Floats]:
    options = {decision.subject: decision.options for decision in table.decisions}
    links = [
        edge
        for edge in table.boundaries
        if edge.source and edge.target and variable_of[edge.source] is not variable_of[edge.target]
    ]
    cells = [
        (row, variable_of[end][option.name], sign)
        for row, edge in enumerate(links)
        for end, sign in ((edge.source, 1.0), (edge.target, -1.0))
        for option in options[end]
        if option.format is Format.Q8
    ]
    blocks = np.array([edge.block for edge in links], dtype=np.int64)
    return _sparse(cells, len(links), size), blocks, np.array([edge.latency_s for edge in links], dtype=np.float64)


def _rules(table: CostTable, variable_of: dict[str, dict[str, int]], size: int) -> tuple[csr_array, Floats, Floats]:
    cells = [
        (row, variable_of[subject][rule.option], 1.0)
        for row, rule in enumerate(table.rules)
        for subject in rule.subjects
        if rule.option in variable_of[subject]
    ]
    at_least = np.array([rule.at_least for rule in table.rules], dtype=np.float64)
    most = [math.inf if rule.at_most is None else float(rule.at_most) for rule in table.rules]
    return _sparse(cells, len(table.rules), size), at_least, np.array(most, dtype=np.float64)


def _sparse(cells: list[tuple[int, int, float]], rows: int, columns: int) -> csr_array:
    from scipy.sparse import coo_array

    row, column, value = zip(*cells, strict=True) if cells else ((), (), ())
    shape = (rows, columns)
    return coo_array((np.array(value, float), (np.array(row, int), np.array(column, int))), shape=shape).tocsr()


def _signature(differ: csr_array, rules: csr_array) -> Ints:
    """Number the variables by their columns in links and rules; the common empty column is 0."""
    from scipy.sparse import vstack

    columns = vstack([differ, rules]).tocsc()
    seen: dict[tuple[bytes, bytes], int] = {(b"", b""): 0}
    signature = np.zeros(columns.shape[1], dtype=np.int64)
    for variable in np.flatnonzero(np.diff(columns.indptr)):
        cells = slice(columns.indptr[variable], columns.indptr[variable + 1])
        key = (columns.indices[cells].tobytes(), columns.data[cells].tobytes())
        signature[variable] = seen.setdefault(key, len(seen))
    return signature


# --- what can be wrong with a table --------------------------------------------------------------------


def _faults(table: CostTable) -> Iterator[str]:
    blocks = len(table.fixed_latency_s)
    if blocks == 0:
        yield "fixed_latency_s is empty; a table has at least one block. Give one value a block."
    paying = dict.fromkeys(
        decision.group
        for decision in table.decisions
        if decision.group is not None and any(option.miss_latency_s for option in decision.options)
    )
    yield from itertools.chain(
        _plain_faults(table),
        *(_scenario_faults(scenario, blocks, paying) for scenario in table.scenarios),
        *(_decision_faults(decision, blocks, len(table.scenarios)) for decision in table.decisions),
        _tie_faults(table),
        _boundary_faults(table, blocks),
        _rule_faults(table),
    )


def _plain_faults(table: CostTable) -> Iterator[str]:
    subjects = [decision.subject for decision in table.decisions]
    for subject in dict.fromkeys(one for one in subjects if subjects.count(one) > 1) if _repeats(subjects) else ():
        yield f"decision {subject!r} stands there {subjects.count(subject)} times; keep one."
    if "" in subjects:
        yield "a decision has an empty subject; name it."
    if not all(math.isfinite(value) for value in table.fixed_latency_s):
        yield "fixed_latency_s holds a value that is not a number; give seconds."
    if table.fixed_disk_bytes < 0 or any(size < 0 for size in table.fixed_memory_bytes.values()):
        yield "a fixed size is below zero; give bytes of at least 0."


def _repeats(values: Sequence[str]) -> bool:
    return len(set(values)) != len(values)


def _scenario_faults(scenario: Scenario, blocks: int, paying: Iterable[str]) -> Iterator[str]:
    where = f"scenario {scenario.name!r}"
    reach = scenario.reach
    if len(reach) != blocks:
        yield f"{where} has {len(reach)} reach values for {blocks} blocks (fixed_latency_s); give one a block."
    if not all(math.isfinite(share) and -_REACH_TOLERANCE <= share <= 1 + _REACH_TOLERANCE for share in reach):
        yield f"{where} has a reach outside 0 to 1: {reach}; give probabilities."
    elif reach and abs(reach[0] - 1.0) > _REACH_TOLERANCE:
        yield f"{where} starts with reach {reach[0]}; the first block is always reached, so give 1."
    elif any(after > before + _REACH_TOLERANCE for before, after in itertools.pairwise(reach)):
        yield f"{where} has a reach that rises: {reach}; deeper blocks are never reached more often."
    if not math.isfinite(scenario.loss):
        yield f"{where} has loss {scenario.loss}; give a number."
    for group, rate in scenario.miss_rate.items():
        if not 0.0 <= rate <= 1.0:
            yield f"{where} has miss rate {rate} for group {group!r}; give a share from 0 to 1."
    for group in paying:
        if group not in scenario.miss_rate:
            yield f"{where} has no miss rate for group {group!r}, whose options pay for misses; add it."


def _decision_faults(decision: Decision, blocks: int, scenarios: int) -> Iterator[str]:
    where = f"decision {decision.subject!r}"
    names = [option.name for option in decision.options]
    if not names:
        yield f"{where} has no options; give at least one."
    if _repeats(names):
        yield f"{where} has two options of one name among {names}; rename one."
    if not 0 <= decision.block < blocks:
        yield f"{where} lies in block {decision.block}; there are blocks 0 to {blocks - 1}."
    for option in decision.options:
        if len(option.loss) not in {1, scenarios}:
            lengths = "1" if scenarios == 1 else f"1 or {scenarios}"
            yield f"{where}, option {option.name!r} has {len(option.loss)} losses; give {lengths}."
        if not all(map(math.isfinite, (*option.loss, option.latency_s, option.miss_latency_s))):
            yield f"{where}, option {option.name!r} holds a value that is not a number; give figures."
        if option.disk_bytes < 0 or any(size < 0 for size in option.memory_bytes.values()):
            yield f"{where}, option {option.name!r} has a size below zero; give bytes of at least 0."
        if option.miss_latency_s and decision.group is None:
            yield f"{where}, option {option.name!r} pays for misses but has no group; name its group."


def _tie_faults(table: CostTable) -> Iterator[str]:
    ties: dict[str, list[Decision]] = {}
    for decision in table.decisions:
        if decision.tie is not None:
            ties.setdefault(decision.tie, []).append(decision)
    for tie, decisions in ties.items():
        sets = {frozenset(option.name for option in decision.options) for decision in decisions}
        if len(sets) > 1:
            subjects = ", ".join(decision.subject for decision in decisions)
            yield f"tie {tie!r} joins {subjects}, whose options differ; tied decisions need the same names."


def _boundary_faults(table: CostTable, blocks: int) -> Iterator[str]:
    subjects = {decision.subject for decision in table.decisions}
    for edge in table.boundaries:
        where = f"boundary {edge.source!r} to {edge.target!r}"
        for end in (edge.source, edge.target):
            if end and end not in subjects:
                yield f"{where} names the unknown decision {end!r}; name one of the table."
        if not 0 <= edge.block < blocks:
            yield f"{where} lies in block {edge.block}; there are blocks 0 to {blocks - 1}."
        if not (math.isfinite(edge.latency_s) and edge.latency_s >= 0):
            yield f"{where} costs {edge.latency_s} s; give at least 0."


def _rule_faults(table: CostTable) -> Iterator[str]:
    options = {decision.subject: {option.name for option in decision.options} for decision in table.decisions}
    for rule in table.rules:
        where = f"rule on option {rule.option!r}"
        unknown = [subject for subject in rule.subjects if subject not in options]
        if unknown:
            yield f"{where} names unknown decisions {', '.join(unknown)}; name those of the table."
        elif not any(rule.option in options[subject] for subject in rule.subjects):
            yield f"{where} is about an option that none of its decisions has; check the name."
        if _repeats(rule.subjects):
            yield f"{where} names a decision twice; name each once."
        if rule.at_most is not None and not 0 <= rule.at_least <= rule.at_most:
            yield f"{where} asks for at least {rule.at_least} and at most {rule.at_most}; at least must not be more."
