"""Which precisions to consider together: a pool of mixes by prices, one exact knapsack, and proven bounds.

Inside a scenario (cache bytes, policy, threads) costs only add, so a mix is a multiple-choice knapsack. Every
mix that some prices of KL, of missed bytes and of memory make best is in the pool (its upper hull: 1,042 units
take milliseconds); the best of them is then improved by the exact search of ``solver``, and the bound is the
exact search's own on the relaxed scenario.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeflex.plans import program as programs
from edgeflex.plans.program import Limit, Quantity
from edgeflex.plans.search import Question, search
from edgeflex.schema import CostTable, Decision, Option, Scenario, Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from edgeflex.plans.decoder_costs import Space

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

Goal = Literal["latency", "kl", "memory", "first", "disk"]

_MISS_LEVELS = (0.0, 0.05, 0.15, 0.35, 0.7, 1.0)
_MEMORY_LEVELS = (0.0, 1.0, 10.0)
_PRICES = 33
_HALVINGS = 40
_TOLERANCE = 1e-4
# Picks above which the exact search would take longer than its gain over the hull is worth: with thousands of
# picks one fractional pick is less than a thousandth of the sum.
EXACT_PICKS = 2000


@dataclass(frozen=True)
class Mix:
    """One precision a pick, as columns of the space, with what adds up over picks."""

    columns: Ints  # [picks]
    kl: float
    memory_bytes: int
    experts_bytes: int
    disk_bytes: int
    cycle_bytes: int
    token_s: dict[int, float]
    sizes: Ints  # [layers, experts]


def make_mix(space: Space, columns: Ints) -> Mix:
    """Return the sums of a mix. ``cycle_bytes`` is T, the bytes of the experts that one token uses."""
    rows = np.arange(len(columns))
    expert_bytes = space.expert_bytes[rows, columns]
    return Mix(
        columns=columns,
        kl=float(space.kl[rows, columns].sum()),
        memory_bytes=int(space.memory_bytes[rows, columns].sum()) + space.small_bytes,
        experts_bytes=int(expert_bytes.sum()),
        disk_bytes=int(space.disk_bytes[rows, columns].sum()) + space.small_bytes,
        cycle_bytes=round(float(space.use @ expert_bytes)),
        token_s={n: float(cost[rows, columns].sum()) for n, cost in space.token_s.items()},
        sizes=space.sizes(columns),
    )


def smallest(space: Space) -> Mix:
    """Return the mix of least bytes, of least time where bytes are equal."""
    cost = (space.memory_bytes + space.expert_bytes).astype(np.float64)
    tie = space.token_s[space.threads[0]] / (1.0 + space.token_s[space.threads[0]].max())
    return make_mix(space, _least(space, cost + tie))


def _least(space: Space, cost: Floats) -> Ints:
    columns: Ints = np.where(np.isfinite(space.kl), cost, np.inf).argmin(axis=1)
    return columns


def pool(space: Space, most_kl: float | None, *, enumerate_up_to: int = 0) -> list[Mix]:
    """Return the distinct mixes that some prices make best, those above ``most_kl`` left out.

    Where there are at most ``enumerate_up_to`` mixes at all, all of them are returned.
    """
    seen: dict[bytes, Ints] = {}
    few = mixes_at_all(space) <= enumerate_up_to
    for columns in _all(space) if few else _priced(space, most_kl):
        seen.setdefault(columns.tobytes(), columns)
    found = [make_mix(space, columns) for columns in seen.values()]
    return [one for one in found if most_kl is None or one.kl <= most_kl + _slack(most_kl)]


def mixes_at_all(space: Space) -> int:
    """Return how many mixes there are."""
    counts: list[int] = np.isfinite(space.kl).sum(axis=1).tolist()
    return math.prod(counts)


def _all(space: Space) -> Iterator[Ints]:
    options = [np.flatnonzero(row).tolist() for row in np.isfinite(space.kl)]
    for columns in itertools.product(*options):
        yield np.array(columns, dtype=np.int64)


def _slack(limit: float) -> float:
    """Return what rounding of a sum may add, as ``program.Limit`` has it."""
    return 5e-10 * abs(limit) + 5e-13


def _priced(space: Space, most_kl: float | None) -> Iterator[Ints]:
    kl = np.where(np.isfinite(space.kl), space.kl, 0.0)
    for cost in _costs(space):
        prices = _ratios(space, cost, kl)
        for price in prices:
            yield _least(space, cost + price * kl)
        if most_kl is not None:
            columns = _at_limit(space, cost, kl, most_kl)
            if columns is not None:
                yield columns
    yield _least(space, kl + 1e-12 * _scaled(space.token_s[space.threads[0]]))


def _scaled(cost: Floats) -> Floats:
    return cost / (cost.max() or 1.0)


def _costs(space: Space) -> Iterator[Floats]:
    """Give what a precision costs beside KL, in seconds, for some miss rates and prices of memory."""
    read_s = space.use[:, None] * space.expert_bytes / space.rates.read_bytes_per_s
    byte_s = space.memory_bytes / space.rates.read_bytes_per_s
    store_s = space.expert_bytes / space.rates.read_bytes_per_s
    share = space.uses_per_token / max(1, int(space.is_expert.sum()))
    for threads in space.threads:
        for miss in _MISS_LEVELS:
            for memory in _MEMORY_LEVELS:
                # a byte of memory is worth what one more cached byte saves of reading, roughly its share of use
                yield space.token_s[threads] + miss * read_s + memory * share * byte_s
        for memory in _MEMORY_LEVELS[1:]:
            yield space.token_s[threads] + memory * share * (byte_s + store_s)


def _ratios(space: Space, cost: Floats, kl: Floats) -> Floats:
    """Return prices of KL at which some pick changes its option: quantiles of cost saved per KL added."""
    cells = []
    for one in range(len(space.options)):
        for other in range(one):
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = -(cost[:, one] - cost[:, other]) / (kl[:, one] - kl[:, other])
            cells.append(ratio[np.isfinite(ratio) & (ratio > 0)])
    found = np.concatenate([np.zeros(0), *cells])
    if len(found) == 0:
        return np.zeros(1)
    levels = np.quantile(found, np.linspace(0.0, 1.0, _PRICES)) if len(found) > _PRICES else np.sort(found)
    return np.concatenate([[0.0], levels * (1 - 1e-9), [levels[-1] * (1 + 1e-9)]])


def _at_limit(space: Space, cost: Floats, kl: Floats, most_kl: float) -> Ints | None:
    """Return the mix of the least price of KL that keeps ``most_kl``, the room left then spent greedily."""
    rows = np.arange(len(kl))
    low, high = 0.0, 1.0

    def at(price: float) -> tuple[Ints, float]:
        columns = _least(space, cost + price * kl)
        return columns, float(kl[rows, columns].sum())

    while at(high)[1] > most_kl and high < 1e30:
        low, high = high, high * 16.0
    columns, value = at(high)
    if value > most_kl + _slack(most_kl):
        return None
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        tried, value = at(middle)
        if value > most_kl:
            low = middle
        else:
            high, columns = middle, tried
    return _spend(space, cost, kl, columns, most_kl)


def _spend(space: Space, cost: Floats, kl: Floats, columns: Ints, most_kl: float) -> Ints:
    """Lower the cost of picks one by one while KL allows, largest saving per KL first."""
    rows = np.arange(len(kl))
    room = most_kl - float(kl[rows, columns].sum())
    saved = cost[rows, columns][:, None] - np.where(np.isfinite(space.kl), cost, np.inf)
    added = kl - kl[rows, columns][:, None]
    ratio = np.where(saved > 0, saved / np.maximum(added, 1e-18), -np.inf)
    spent = columns.copy()
    for flat in np.argsort(-ratio, axis=None)[: 4 * len(kl)]:
        row, column = divmod(int(flat), kl.shape[1])
        if ratio[row, column] <= 0:
            break
        if spent[row] == columns[row] and added[row, column] <= room:
            spent[row] = column
            room -= float(added[row, column])
    return spent


# --- the exact knapsack ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A scenario of the knapsack, in which costs only add.

    Attributes:
        threads: Whose seconds count.
        miss_rate: Share of expert uses that read the expert from the store.
        resident: Whether all experts lie in memory.
        other_s: Seconds of a token beside matrices and reads that scale with size.
    """

    threads: int
    miss_rate: float
    resident: bool
    other_s: float


@dataclass(frozen=True)
class Room:
    """What a mix may take; None is no limit."""

    token_s: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Exact:
    """The knapsack's answer: a mix, or None if none keeps the limits, and what no mix can beat."""

    mix: Mix | None
    bound: float
    complete: bool


class Knapsack:
    """The exact search over mixes, its tables built once."""

    def __init__(self, space: Space, *, time_limit_s: float, clock: Callable[[], float]) -> None:
        self._space = space
        self._time_limit_s = time_limit_s
        self._clock = clock
        self._programs: dict[Scene, programs.Program] = {}

    def solve(self, scene: Scene, goal: Goal, room: Room) -> Exact:
        """Return the mix of least ``goal`` within ``room``, and the proven bound."""
        if scene not in self._programs:
            self._programs[scene] = programs.build(_table(self._space, scene))
        memory = Quantity("memory", (Tier.HOST,))
        quantity = {"latency": Quantity("latency"), "kl": Quantity("drop"), "memory": memory, "disk": Quantity("disk")}
        limits = [
            Limit(one, float(most))
            for one, most in (
                (Quantity("latency"), room.token_s),
                (memory, room.memory_bytes),
                (Quantity("disk"), room.disk_bytes),
                (Quantity("drop"), room.kl),
            )
            if most is not None
        ]
        question = Question(self._programs[scene], quantity[goal], tuple(limits), (0,))
        answer = search(question, tolerance=_TOLERANCE, time_limit_s=self._time_limit_s, now=self._clock)
        if answer.chosen is None:
            return Exact(None, float("inf") if answer.complete else float("-inf"), answer.complete)
        columns = self._columns(self._programs[scene], answer.chosen)
        return Exact(make_mix(self._space, columns), answer.bound, answer.complete)

    def _columns(self, program: programs.Program, chosen: Ints) -> Ints:
        place = {one.value: column for column, one in enumerate(self._space.options)}
        columns = np.zeros(len(self._space.picks), dtype=np.int64)
        for variable in chosen:
            columns[program.pick[variable]] = place[program.names[variable]]
        return columns


def _table(space: Space, scene: Scene) -> CostTable:
    read_s = space.use[:, None] * space.expert_bytes / space.rates.read_bytes_per_s
    memory = space.memory_bytes + (space.expert_bytes if scene.resident else 0)
    decisions = tuple(
        Decision(
            subject=pick.units[0],
            block=0,
            group="experts" if pick.layer >= 0 else None,
            options=tuple(
                Option(
                    name=space.options[column].value,
                    loss=(float(space.kl[row, column]),),
                    latency_s=float(space.token_s[scene.threads][row, column]),
                    miss_latency_s=float(read_s[row, column]),
                    memory_bytes={Tier.HOST: int(memory[row, column])},
                    disk_bytes=int(space.disk_bytes[row, column]),
                )
                for column in np.flatnonzero(np.isfinite(space.kl[row]))
            ),
        )
        for row, pick in enumerate(space.picks)
    )
    rate = min(max(scene.miss_rate, 0.0), 1.0)
    return CostTable(
        name=space.graph.name,
        scenarios=(Scenario(name="one", reach=(1.0,), loss=0.0, miss_rate={"experts": rate}),),
        decisions=decisions,
        fixed_latency_s=(scene.other_s,),
        fixed_memory_bytes={Tier.HOST: space.small_bytes},
        fixed_disk_bytes=space.small_bytes,
    )


def relaxed_bound(space: Space, threads: int, goal: Goal, room: Room, other_s: float) -> float:
    """Return a bound that any mix within ``room`` obeys, from Lagrange prices of one limit at a time.

    Used instead of the exact search where there are too many picks; experts' bytes do not count as memory.
    """
    kl = np.where(np.isfinite(space.kl), space.kl, 0.0)
    memory = space.memory_bytes.astype(np.float64)
    disk = space.disk_bytes.astype(np.float64)
    token_s = space.token_s[threads]
    cost, constant = {
        "latency": (token_s, other_s),
        "kl": (kl, 0.0),
        "memory": (memory, float(space.small_bytes)),
        "disk": (disk, float(space.small_bytes)),
    }[goal]
    rows: Sequence[tuple[Floats, float | None]] = (
        (kl, room.kl),
        (token_s, None if room.token_s is None else room.token_s - other_s),
        (memory, None if room.memory_bytes is None else room.memory_bytes - space.small_bytes),
        (disk, None if room.disk_bytes is None else room.disk_bytes - space.small_bytes),
    )
    have = np.isfinite(space.kl)
    bound = float(np.where(have, cost, np.inf).min(axis=1).sum())
    for values, most in rows:
        if most is not None:
            bound = max(bound, _dual(np.where(have, cost, np.inf), values, most))
    return constant + bound


def _dual(cost: Floats, values: Floats, most: float) -> float:
    """Return the largest Lagrangian value found by golden steps over the price; concave in the price."""
    scale = float(np.where(np.isfinite(cost), cost, 0.0).sum()) / max(float(values.sum()), 1e-30)
    prices = scale * np.geomspace(1e-6, 1e6, 97)

    def at(price: float) -> float:
        return float((cost + price * values).min(axis=1).sum()) - price * most

    found = [at(price) for price in prices]
    best = int(np.argmax(found))
    fine = np.linspace(prices[max(best - 1, 0)], prices[min(best + 1, len(prices) - 1)], 65)
    return max(found[best], *(at(price) for price in fine))
