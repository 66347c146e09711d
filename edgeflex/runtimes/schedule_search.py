"""Search for the schedule of one event, over indices and seconds only; ``schedule`` is its door.

Without flash an event is a choice between two sides: the CPU, or link then GPU. On the second side Johnson's order
(Naval Research Logistics Quarterly 1954) is best for every set of uploads, residents first, so that only the choice
is searched. With flash, every expert that is read shares the disk, and the order of reading is searched too; it may
be taken to agree with the order of upload and of the CPU (an exchange argument: reading a later one later hurts
nobody). Branch and bound with linear-programming duals as bounds; for large events a split by worth and local search.
"""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeflex.runtimes.schedule_bounds import Bounds
from edgeflex.runtimes.schedule_choices import ChoiceSearch
from edgeflex.runtimes.timeline import Cost, Work, contend

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from edgeflex.runtimes.timeline import Place

__all__ = ["Best", "Ends", "Event", "Found", "Job", "Order", "arrange", "ends_of", "search"]

_NEAR = 1e-3  # a large event within this share of its bound is searched no further
_SAME = 1e-9  # spans nearer than this share are equal
_SMALL = 16  # an event of more jobs is also searched locally
_QUICK = 8  # so many with flash are soon searched in full
_EXACT_JOBS, _EXACT_READS = 40, 16  # more, without and with flash, are not searched exactly
_REACH = 8  # jobs on each side of a split that the local search exchanges
_TRIES, _STEPS = 320, 10_000  # evaluations of the local search at most, and jobs in them


class Job(NamedTuple):
    """One expert: its seconds on each resource, where it lies, and what its upload is worth later."""

    cost: Cost
    place: Place
    worth_s: float = 0.0


class Order(NamedTuple):
    """Jobs by index: who computes what, in order. ``uploaded`` may name residents (those with a copy in RAM)."""

    uploaded: tuple[int, ...]
    on_cpu: tuple[int, ...]
    read: tuple[int, ...]


class Ends(NamedTuple):
    """When each resource ends, in seconds."""

    gpu: float
    cpu: float
    link: float
    disk: float


class Found(NamedTuple):
    """An order, its objective (span less worth), a bound below which no order comes, and whether it is the best."""

    order: Order
    objective_s: float
    bound_s: float
    proven: bool


class Event:
    """One event's jobs as the search needs them.

    Attributes:
        jobs: All, by index.
        costs: Of each job.
        pinned: Those that only the GPU can compute now.
        free: The others, in Johnson's order of link and GPU; equal jobs side by side.
        group: Of each job; equal jobs share one.
        gpu_s: Seconds of the pinned ones.
        flash: Those of ``free`` that are to be read.
        contended: Whether CPU and link slow each other.
        doubtful: Whether they do, and that may change Johnson's order.
    """

    def __init__(
        self, jobs: Sequence[Job], *, cpu_factor: float = 1.0, link_factor: float = 1.0, cpu_start_s: float = 0.0
    ) -> None:
        """Sort the jobs of one event; the factors are those of ``Curves``."""
        self.jobs, self.cpu_factor, self.link_factor, self.cpu_start_s = jobs, cpu_factor, link_factor, cpu_start_s
        self.costs = [job.cost for job in jobs]
        known: dict[Job, int] = {}
        self.group = [known.setdefault(job, len(known)) for job in jobs]
        self.pinned = [i for i, job in enumerate(jobs) if job.cost.cpu == math.inf]
        self.free = sorted(
            (i for i, job in enumerate(jobs) if job.cost.cpu < math.inf),
            key=lambda i: (_johnson(jobs[i].cost.link, jobs[i].cost.gpu), self.group[i], i),
        )
        self.gpu_s = sum(jobs[i].cost.gpu for i in self.pinned)
        self.flash = [i for i in self.free if jobs[i].place == "flash"]
        self.contended = cpu_factor > 1.0 or link_factor > 1.0
        # contention makes Johnson's order doubtful for jobs that its two speeds would place differently
        free = [jobs[i].cost for i in self.free]
        self.doubtful = self.contended and any(cost.link < cost.gpu < link_factor * cost.link for cost in free)

    def objective(self, order: Order) -> float:
        """Return the order's span less the worth of its uploads, in seconds."""
        return max(ends_of(self, order)) - sum([self.jobs[i].worth_s for i in order.uploaded])


def _johnson(first_s: float, second_s: float) -> tuple[int, float]:
    """Return the sort key of Johnson's order on two machines in line."""
    return (0, first_s) if first_s <= second_s else (1, -second_s)


def ends_of(event: Event, order: Order) -> Ends:
    """Return when each resource ends under an order, by the rules of ``timeline``."""
    costs = event.costs
    if order.read:
        return _ends_with_flash(event, order)
    cpu_s = sum([costs[i].cpu for i in order.on_cpu]) + (event.cpu_start_s if order.on_cpu else 0.0)
    total_s = sum([costs[i].link for i in order.uploaded])
    slow, slope, switch_s, switch_at_s = 1.0, 1.0, math.inf, math.inf
    cpu_end_s = cpu_s
    if event.contended and cpu_s > 0 and total_s > 0:
        slow, slope = event.cpu_factor, event.link_factor
        switch_s, switch_at_s = cpu_s * slow / slope, cpu_s * slow
        cpu_end_s = switch_at_s if total_s >= switch_s else cpu_s + total_s * slope * (1.0 - 1.0 / slow)
    copied_s, at_s, gpu_s = 0.0, 0.0, event.gpu_s
    for i in order.uploaded:
        compute_s, _, copy_s, _ = costs[i]
        copied_s += copy_s
        at_s = copied_s * slope if copied_s <= switch_s else switch_at_s + copied_s - switch_s
        gpu_s = max(gpu_s, at_s) + compute_s
    return Ends(gpu_s, cpu_end_s, at_s, 0.0)


def _ends_with_flash(event: Event, order: Order) -> Ends:
    jobs, disk_s, ready = event.jobs, 0.0, dict[int, float]()
    for i in order.read:
        disk_s += jobs[i].cost.disk
        ready[i] = disk_s
    cpu = [Work(ready.get(i, 0.0), jobs[i].cost.cpu) for i in order.on_cpu]
    if cpu and event.cpu_start_s > 0:
        cpu.insert(0, Work(0.0, event.cpu_start_s))
    link = [Work(ready.get(i, 0.0), jobs[i].cost.link) for i in order.uploaded]
    cpu_spans, link_spans = contend(cpu, link, event.cpu_factor, event.link_factor)
    gpu_s = event.gpu_s
    for i, (_, end_s) in zip(order.uploaded, link_spans, strict=True):
        gpu_s = max(gpu_s, end_s) + jobs[i].cost.gpu
    return Ends(gpu_s, cpu_spans[-1][1] if cpu_spans else 0.0, link_spans[-1][1] if link_spans else 0.0, disk_s)


def arrange(event: Event, uploads: Iterable[int]) -> Order:
    """Return a good order for a given choice: exact without flash and contention, a rule of thumb with it.

    RAM first on link and CPU; of the two queues for the disk, the one whose reader waits is served, else the one
    with more work to come (Jackson's rule).
    """
    chosen, jobs = set(uploads), event.jobs
    up = [i for i in event.free if i in chosen]
    cpu = sorted(i for i in event.free if i not in chosen)
    if not event.flash:
        return Order(tuple(up), tuple(cpu), ())
    flash_up = [i for i in up if jobs[i].place == "flash"]
    flash_cpu = [i for i in cpu if jobs[i].place == "flash"]
    flash_up.sort(key=lambda i: _johnson(jobs[i].cost.disk + jobs[i].cost.link, jobs[i].cost.link + jobs[i].cost.gpu))
    flash_cpu.sort(key=lambda i: _johnson(jobs[i].cost.disk, jobs[i].cost.cpu))
    ram_up = [i for i in up if jobs[i].place != "flash"]
    ram_cpu = [i for i in cpu if jobs[i].place != "flash"]
    read = _merged(
        event, flash_up, flash_cpu, sum(jobs[i].cost.link for i in ram_up), sum(jobs[i].cost.cpu for i in ram_cpu)
    )
    return Order((*ram_up, *flash_up), (*ram_cpu, *flash_cpu), tuple(read))


def _merged(event: Event, up: list[int], cpu: list[int], link_s: float, cpu_s: float) -> list[int]:
    """Return one order of reading from two queues whose readers are busy until ``link_s`` and ``cpu_s``."""
    jobs, read, disk_s, ups, cpus = event.jobs, list[int](), 0.0, list(up), list(cpu)
    up_rest_s = sum(jobs[i].cost.link for i in ups) + (jobs[ups[-1]].cost.gpu if ups else 0.0)
    cpu_rest_s = sum(jobs[i].cost.cpu for i in cpus)
    while ups and cpus:
        up_waits, cpu_waits = link_s <= disk_s, cpu_s <= disk_s
        take_up = up_waits if up_waits != cpu_waits else up_rest_s >= cpu_rest_s
        i = (ups if take_up else cpus).pop(0)
        cost = jobs[i].cost
        disk_s += cost.disk
        read.append(i)
        if take_up:
            link_s, up_rest_s = max(link_s, disk_s) + cost.link, up_rest_s - cost.link
        else:
            cpu_s, cpu_rest_s = max(cpu_s, disk_s) + cost.cpu, cpu_rest_s - cost.cpu
    return [*read, *ups, *cpus]


def search(event: Event, *, effort: int, starts: Iterable[Iterable[int]] = ()) -> Found:
    """Return the best order found.

    Args:
        event: To schedule.
        effort: Nodes of the exact search; where they do not suffice the answer is not proven.
        starts: Choices of uploads to begin with, beside nothing, everything and splits by worth.
    """
    bounds = Bounds(event)
    best = Best(event, bounds.event_s)
    for choice in ([], event.free, *starts):
        best.offer(arrange(event, choice))
    large = len(event.free) > _SMALL
    rankings = _rankings(event) if large else [_ranked(event, 1.0, 0.0)]
    for ranking in rankings:
        _split(best, ranking)
    if event.flash and len(event.free) > _QUICK and not best.within(_NEAR):
        best.offer(arrange(event, search(_without_reads(event), effort=effort).order.uploaded))
    best.budget = best.tries + min(_TRIES, _STEPS // max(1, len(event.free)))
    for ranking in rankings if large else []:
        _improve(best, ranking)
    proven = best.within(_SAME)
    if not proven and not best.near(large=large) and len(event.free) <= (_EXACT_READS if event.flash else _EXACT_JOBS):
        proven = _deep(best, bounds, effort)
        if not proven and not large:  # the effort was spent: what is near the best may still be better
            best.budget = best.tries + _TRIES
            for ranking in _rankings(event):
                _improve(best, ranking)
    if not proven and (event.flash or event.contended):
        _polish(best)
    return best.found(proven=proven)


def _deep(best: Best, bounds: Bounds, effort: int) -> bool:
    """Search exactly as far as the effort goes; return whether what stands as best then is proven."""
    event = best.event
    searched = _DeepSearch(best, bounds, effort).run() if event.flash else ChoiceSearch(best, bounds, effort).run()
    sure = not (event.doubtful or (event.contended and event.flash))
    return best.within(_SAME) or (searched and sure)


def _without_reads(event: Event) -> Event:
    """Return the event as if nothing had to be read: where the disk is quick, the best choice is nearly the same."""
    jobs = [
        job._replace(cost=job.cost._replace(disk=0.0), place="gpu" if job.place == "gpu" else "ram")
        for job in event.jobs
    ]
    return Event(jobs, cpu_factor=event.cpu_factor, link_factor=event.link_factor, cpu_start_s=event.cpu_start_s)


class Best:
    """The best order so far."""

    def __init__(self, event: Event, bound_s: float) -> None:
        self.event, self.bound_s = event, bound_s
        self.order, self.objective_s, self.tries, self.budget = Order((), (), ()), math.inf, 0, 0

    @property
    def slack_s(self) -> float:
        """By how much an order must be better to be looked for."""
        return _SAME * max(abs(self.objective_s), abs(self.bound_s))

    def offer(self, order: Order) -> float:
        """Take an order if it is better, and return its objective."""
        objective_s = self.event.objective(order)
        self.tries += 1
        if objective_s < self.objective_s:
            self.order, self.objective_s = order, objective_s
        return objective_s

    def offer_path(self, path: Sequence[tuple[int, bool]]) -> None:
        """Offer an order by its jobs, each with whether it is uploaded."""
        event, flash = self.event, self.event.flash
        order = Order(
            tuple([i for i, up in path if up]),
            tuple([i for i, up in path if not up]),
            tuple([i for i, _ in path if i in flash]) if flash else (),
        )
        self.offer(order)
        if event.doubtful and not flash:
            jobs, factor = event.jobs, event.link_factor
            slow = sorted(order.uploaded, key=lambda i: _johnson(jobs[i].cost.link * factor, jobs[i].cost.gpu))
            self.offer(order._replace(uploaded=tuple(slow)))

    def within(self, share: float) -> bool:
        """Return whether what was found is so near the bound."""
        return self.objective_s - self.bound_s <= share * abs(self.bound_s)

    def near(self, *, large: bool) -> bool:
        """Return whether more search is not worth its time: a large event may end within ``_NEAR`` of its bound."""
        return self.within(_NEAR if large else _SAME)

    def found(self, *, proven: bool) -> Found:
        """Return what was found, equal jobs in the caller's order."""
        order = _canonical(self.event, self.order)
        bound_s = self.objective_s if proven else min(self.bound_s, self.objective_s)
        return Found(order, self.objective_s, bound_s, proven)


def _canonical(event: Event, order: Order) -> Order:
    """Return the order with equal jobs exchanged so that the earlier are uploaded, and first."""
    members: dict[int, list[int]] = {}
    for i in (*order.uploaded, *order.on_cpu):
        members.setdefault(event.group[i], []).append(i)
    stands_for = {old: new for group in members.values() for old, new in zip(group, sorted(group), strict=True)}
    return Order(*(tuple(stands_for[i] for i in indices) for indices in order))


def _rankings(event: Event) -> list[list[int]]:
    """Return the free jobs by how much CPU time one second of the other side saves, the most first.

    By link, by GPU and by both: which of them is scarce shows only when tried.
    """
    orders: list[list[int]] = []
    for link, gpu in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        order = _ranked(event, link, gpu)
        if order not in orders:
            orders.append(order)
    return orders


def _ranked(event: Event, link: float, gpu: float) -> list[int]:
    """Return the free jobs by the CPU's seconds over the weighed ones of link and GPU, the most first."""

    def gain(i: int) -> float:
        cost, _, worth_s = event.jobs[i]
        spent_s = link * cost.link + gpu * cost.gpu
        return -(cost.cpu + worth_s) / spent_s if spent_s > 0 else -math.inf

    return sorted(event.free, key=gain)


def _split(best: Best, ranking: list[int]) -> None:
    """Offer splits of a ranking: coarse first, then finer around the best."""
    tried: dict[int, float] = {}

    def value(cut: int) -> float:
        if cut not in tried:
            tried[cut] = best.offer(arrange(best.event, ranking[:cut]))
        return tried[cut]

    step = max(1, len(ranking) // 8)
    centre = min(range(0, len(ranking) + 1, step), key=value)
    while step > 1 and not best.within(_SAME):
        step = (step + 1) // 2
        near = (max(0, centre - step), centre, min(len(ranking), centre + step))
        centre = min(near, key=value)


def _improve(best: Best, ranking: list[int]) -> None:
    """Flip and swap jobs near the split of a ranking while that helps."""
    improved = True
    while improved and best.tries < best.budget and not best.within(_NEAR):
        improved = False
        up = set(best.order.uploaded)
        cut = len(up)
        window = ranking[max(0, cut - _REACH) : cut + _REACH]
        ins, outs = [i for i in window if i in up], [i for i in window if i not in up]
        changes = [{i} for i in window] + [{i, j} for i in reversed(ins) for j in outs]
        for change in changes:
            before = best.objective_s
            if best.tries >= best.budget:
                return
            if best.offer(arrange(best.event, up ^ change)) < before:
                improved = True
                break


def _polish(best: Best) -> None:
    """Exchange pairs within each list of the order while that helps.

    Where CPU and link slow each other, an order that keeps them apart may win against the arguments of the search.
    """
    event, before = best.event, math.inf
    small = len(event.free) <= _SMALL
    while best.objective_s < before and best.tries < best.budget and not best.near(large=not small):
        before = best.objective_s
        for field, indices in zip(Order._fields, best.order, strict=True):
            places = [p for p, i in enumerate(indices) if event.jobs[i].place != "gpu"]
            for left, right in combinations(places, 2) if small else pairwise(places):
                if best.tries >= best.budget:
                    return
                swapped = list(indices)
                swapped[left], swapped[right] = swapped[right], swapped[left]
                best.offer(best.order._replace(**{field: tuple(swapped)}))


class _Clocks(NamedTuple):
    """How far each resource is, the worth of what was uploaded, and what the undecided add to each dual bound."""

    disk: float
    cpu: float
    link: float
    gpu: float
    worth: float
    link_rest: float
    gpu_rest: float
    worth_rest: float


class _DeepSearch:
    """Depth-first branch and bound over choices, and over orders where there is flash."""

    def __init__(self, best: Best, bounds: Bounds, effort: int) -> None:
        self._best, self._bounds, self._event, self._left = best, bounds, best.event, effort
        self._jobs, self._group = best.event.jobs, best.event.group
        self._flash = frozenset(best.event.flash)
        self._ram = [i for i in best.event.free if i not in self._flash]
        self._rank = {i: position for position, i in enumerate(best.event.free)}
        self._path: list[tuple[int, bool]] = []  # (job, whether uploaded)
        self._slack_s = best.slack_s

    def run(self) -> bool:
        """Search; return whether the effort sufficed."""
        bounds, worths = self._bounds, (self._jobs[i].worth_s for i in self._event.free)
        rest = (sum(bounds.link_adds.values()), sum(bounds.gpu_adds.values()), sum(worths))
        self._choose(0, _Clocks(0.0, 0.0, 0.0, self._event.gpu_s, 0.0, *rest), -1)
        return self._left > 0

    def _choose(self, position: int, at: _Clocks, barred: int) -> None:
        """Decide what lies in RAM in Johnson's order; of equal jobs, those uploaded come first."""
        if self._hopeless(at):
            return
        if position == len(self._ram):
            self._finish_choice(at)
            return
        i = self._ram[position]
        undecided = self._decided(at, i)
        sides = [(self._to_cpu(undecided, i), False)]
        if self._group[i] != barred:
            sides.append((self._pledged(at, i) if self._waits(i) else self._to_gpu(undecided, i), True))
        for after, up in sorted(sides, key=_lateness):
            self._path.append((i, up))
            self._choose(position + 1, after, barred if up else self._group[i])
            self._path.pop()

    def _finish_choice(self, at: _Clocks) -> None:
        """Go on to the order of reading, or offer the choice."""
        if self._flash:
            waiting = tuple(i for i, up in self._path if up and self._waits(i))
            chosen = self._path
            self._path = [(i, up) for i, up in chosen if not (up and self._waits(i))]
            self._sequence(at, waiting, tuple(self._event.flash), (-1, False))
            self._path = chosen
            return
        self._best.offer_path(self._path)

    def _sequence(self, at: _Clocks, ram: tuple[int, ...], flash: tuple[int, ...], last: tuple[int, bool]) -> None:
        """Append uploads from RAM and reads from flash, each to either side, in every order that may matter."""
        if self._hopeless(at):
            return
        if not ram and not flash:
            self._best.offer_path(self._path)
            return
        moves = []
        for i, up in self._moves(ram, flash, last):
            before = self._decided(at, i) if i in self._flash else self._redeemed(at, i)
            moves.append((self._to_gpu(before, i) if up else self._to_cpu(before, i), up, i))
        for after, up, i in sorted(moves, key=_lateness):
            self._path.append((i, up))
            self._sequence(after, _without(ram, i), _without(flash, i), (i, up))
            self._path.pop()

    def _moves(
        self, ram: tuple[int, ...], flash: tuple[int, ...], last: tuple[int, bool]
    ) -> Iterator[tuple[int, bool]]:
        """Yield what may come next, one of each group; neighbours that do not touch, or obey Johnson, come once."""
        previous, was_up = last
        after_ram = was_up and previous not in self._flash
        after_cpu = previous >= 0 and not was_up
        for i in self._one_of_each(flash):
            yield i, True
            if not after_ram and not (after_cpu and self._cpu_rank(i) < self._cpu_rank(previous)):
                yield i, False
        for i in self._one_of_each(ram):
            if not (after_ram and self._rank[i] < self._rank[previous]):
                yield i, True

    def _one_of_each(self, indices: tuple[int, ...]) -> Iterable[int]:
        return {self._group[i]: i for i in reversed(indices)}.values()

    def _cpu_rank(self, i: int) -> tuple[int, float]:
        return _johnson(self._jobs[i].cost.disk, self._jobs[i].cost.cpu)

    def _waits(self, i: int) -> bool:
        """Return whether the job, if uploaded, finds its place among the uploads only with the reads."""
        return bool(self._flash) and self._jobs[i].place == "ram"

    def _hopeless(self, at: _Clocks) -> bool:
        """Return whether nothing below these clocks can beat the best, or the effort is spent."""
        self._left -= 1
        link, gpu = self._bounds.link, self._bounds.gpu
        bound_s = max(
            max(at.cpu, at.gpu) - at.worth_rest,
            link.cpu * at.cpu + link.other * at.link + at.link_rest,
            gpu.cpu * at.cpu + gpu.other * at.gpu + at.gpu_rest,
        )
        return self._left <= 0 or bound_s - at.worth >= self._best.objective_s - self._slack_s

    def _decided(self, at: _Clocks, i: int) -> _Clocks:
        """Return the clocks with one job no longer undecided."""
        return at._replace(
            link_rest=at.link_rest - self._bounds.link_adds[i],
            gpu_rest=at.gpu_rest - self._bounds.gpu_adds[i],
            worth_rest=at.worth_rest - self._jobs[i].worth_s,
        )

    def _pledged(self, at: _Clocks, i: int) -> _Clocks:
        """Return the clocks with one job known to be uploaded, but not yet when."""
        link_s, gpu_s = self._pledge(i)
        return at._replace(link_rest=at.link_rest + link_s, gpu_rest=at.gpu_rest + gpu_s)

    def _redeemed(self, at: _Clocks, i: int) -> _Clocks:
        """Return the clocks as before the pledge, and the job decided."""
        link_s, gpu_s = self._pledge(i)
        return self._decided(at._replace(link_rest=at.link_rest - link_s, gpu_rest=at.gpu_rest - gpu_s), i)

    def _pledge(self, i: int) -> tuple[float, float]:
        bounds, cost, worth_s = self._bounds, self._jobs[i].cost, self._jobs[i].worth_s
        return (
            bounds.link.other * cost.link - worth_s - bounds.link_adds[i],
            bounds.gpu.other * cost.gpu - worth_s - bounds.gpu_adds[i],
        )

    def _to_cpu(self, at: _Clocks, i: int) -> _Clocks:
        cost = self._jobs[i].cost
        disk_s = at.disk + cost.disk
        cpu_s = max(at.cpu if at.cpu > 0 else self._event.cpu_start_s, disk_s if i in self._flash else 0.0)
        return at._replace(disk=disk_s, cpu=cpu_s + cost.cpu)

    def _to_gpu(self, at: _Clocks, i: int) -> _Clocks:
        cost, place, worth_s = self._jobs[i]
        disk_s = at.disk + cost.disk
        link_s = max(at.link, disk_s if place == "flash" else 0.0) + cost.link
        gpu_s = max(at.gpu, 0.0 if place == "gpu" else link_s) + cost.gpu
        return at._replace(disk=disk_s, link=link_s, gpu=gpu_s, worth=at.worth + worth_s)


def _lateness(side: Sequence[Any]) -> float:
    """Return when the later side is free: the branch that leaves it earlier goes first."""
    return max(side[0].cpu, side[0].gpu)


def _without(indices: tuple[int, ...], gone: int) -> tuple[int, ...]:
    return tuple(i for i in indices if i != gone)
