"""The scheduler of one event against hand sums, exhaustive search, a linear-programming bound and published rules.

Small events are built from arbitrary seconds: every expert is a kind of its own with one-point curves, and its size
in bytes is its seconds on a link of 1000 bytes/s times 1000. Large ones take curves of a plausible machine.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.runtimes.schedule import (
    Active,
    Curve,
    Curves,
    Place,
    Refit,
    Schedule,
    Scheduler,
    all_cpu,
    all_upload,
    contend,
    fiddler,
    hybrimoe,
    schedule,
    simulate,
    static,
    two_pointer,
)
from edgeflex.runtimes.schedule_bounds import Bounds, _dual_of_few, _dual_of_many, _Sides
from edgeflex.runtimes.schedule_choices import ChoiceSearch
from edgeflex.runtimes.schedule_search import Best, Event, Job, Order, _DeepSearch
from edgeflex.runtimes.timeline import Work, cost_of

RULES = (all_cpu, all_upload, static, two_pointer, hybrimoe, fiddler)
ONE = Curve(((1, 1.0),))


def flat(seconds: float) -> Curve:
    return Curve(((1, seconds),))


def event_of(*experts: tuple[Any, float, float, float], **rates) -> tuple[list[Active], Curves]:
    """Experts as (place, gpu seconds, cpu seconds, link seconds); the disk reads at 500 bytes/s unless told."""
    kinds = {str(i): (flat(gpu), flat(cpu)) for i, (_, gpu, cpu, _) in enumerate(experts)}
    active = [
        Active((0, i), 1, round(1000 * link), place.removesuffix("+"), str(i), ram_copy=place.endswith("+"))
        for i, (place, _, _, link) in enumerate(experts)
    ]
    return active, Curves(ONE, ONE, 1000.0, **{"disk_bytes_per_s": 500.0, "kinds": kinds, **rates})


def random_event(draw: random.Random, count: int, places: tuple[str, ...], *, contended: bool):
    """Arbitrary costs; a fifth of the events are of few distinct costs, so that ties and equal experts occur."""
    few = draw.random() < 0.2

    def seconds(low, high):
        return float(draw.randint(1, 3)) if few else draw.uniform(low, high)

    scale = draw.choice([0.2, 1.0, 2.0])
    experts = [(draw.choice(places), scale * seconds(0.1, 3), seconds(0.5, 4), seconds(0.2, 4)) for _ in range(count)]
    return event_of(
        *experts,
        link_latency_s=draw.choice([0.0, 0.1]),
        disk_bytes_per_s=draw.choice([500.0, 1000.0, 3000.0]),
        cpu_start_s=draw.choice([0.0, 0.0, 0.3]),
        cpu_beside_link=draw.uniform(1, 1.8) if contended else 1.0,
        link_beside_cpu=draw.uniform(1, 1.8) if contended else 1.0,
    )


def exhaustive(active: list[Active], curves: Curves) -> float:
    """Least span less worth over every choice and every order of link, CPU and disk; all by ``simulate``."""
    resident = {one.key for one in active if one.place == "gpu"}
    flash = [one.key for one in active if one.place == "flash"]
    worth = {one.key: one.worth_s for one in active}
    sides = [("gpu",) if one.place == "gpu" and not one.ram_copy else ("gpu", "cpu") for one in active]
    best = math.inf
    for choice in itertools.product(*sides):
        gpu = [one.key for one, side in zip(active, choice, strict=True) if side == "gpu"]
        cpu = [one.key for one, side in zip(active, choice, strict=True) if side == "cpu"]
        kept, up = tuple(key for key in gpu if key in resident), [key for key in gpu if key not in resident]
        # the CPU's order matters only where some of it waits for a read
        for order in itertools.permutations(cpu) if set(cpu) & set(flash) else [tuple(cpu)]:
            for uploaded, read in itertools.product(itertools.permutations(up), itertools.permutations(flash)):
                span_s = simulate(told(kept, uploaded, order, read), active, curves).span_s
                best = min(best, span_s - sum(worth[key] for key in up))
    return best


def told(on_gpu, uploaded, on_cpu, read) -> Schedule:
    """A schedule that predicts nothing."""
    return Schedule(on_gpu, uploaded, on_cpu, read, gpu_s=0, cpu_s=0, link_s=0, disk_s=0, span_s=0)


def objective(found: Schedule, active: list[Active]) -> float:
    return found.span_s - sum(one.worth_s for one in active if one.key in found.uploaded)


def machine(draw: random.Random) -> Curves:
    """A GPU that is quick on many rows, a CPU that is not, a link and a disk, all within a factor of a few."""
    return Curves(
        gpu=Curve(
            ((1, 2e-5 * draw.uniform(0.3, 3)), (64, 6e-5 * draw.uniform(1, 5)), (256, 4e-4 * draw.uniform(1, 5)))
        ),
        cpu=Curve(((1, 1.2e-4 * draw.uniform(0.3, 1.5)), (8, 3e-4), (256, 6e-3))),
        link_bytes_per_s=12e9 * draw.uniform(0.5, 4),
        link_latency_s=1e-5,
        disk_bytes_per_s=1e9 * draw.uniform(1, 12),
        disk_latency_s=5e-5,
        cpu_beside_link=draw.choice([1.0, draw.uniform(1, 1.6)]),
        link_beside_cpu=draw.choice([1.0, draw.uniform(1, 1.6)]),
    )


def large_event(draw: random.Random, count: int) -> list[Active]:
    mixes: list[tuple[Place, ...]] = [("gpu", "ram"), ("ram",), ("gpu", "ram", "flash"), ("ram", "ram", "flash")]
    places = draw.choice(mixes)
    most = draw.choice([4, 30, 300])
    return [
        Active((0, i), draw.randint(1, most), draw.choice([3_000_000, 1_600_000]), draw.choice(places))
        for i in range(count)
    ]


def linear_bound(active: list[Active], curves: Curves) -> float:
    """The event relaxed: experts may be divided, no resource waits for another but for the last read's work.

    Unknown are the span T, the seconds o in which CPU and link both work, and the uploaded share x of each expert;
    C − o/a is then the CPU's time alone and L − o/b the link's, and both with o fit into T.
    """
    from scipy.optimize import linprog

    costs = [cost_of(one, curves) for one in active]
    cpu = [0.0 if one.cpu == math.inf else one.cpu for one in costs]
    link, gpu = [one.link for one in costs], [one.gpu for one in costs]
    a, b = 1 / curves.cpu_beside_link, 1 / curves.link_beside_cpu
    rows = [
        ([-1, 0, *(-one for one in cpu)], -sum(cpu)),
        ([-1, 0, *link], 0),
        ([-1, 0, *gpu], 0),
        ([-1, 1 - a - b, *(two - one for one, two in zip(cpu, link, strict=True))], -sum(cpu)),
        ([0, a, *cpu], sum(cpu)),
        ([0, b, *(-one for one in link)], 0),
    ]
    tails = [
        min(cost.cpu, cost.link + cost.gpu) for cost, one in zip(costs, active, strict=True) if one.place == "flash"
    ]
    reads_s = sum(cost.disk for cost in costs) + min(tails, default=0.0)
    shares = [(1, 1) if cost.cpu == math.inf else (0, 1) for cost in costs]
    found = linprog(
        [1, 0, *[0] * len(costs)],
        A_ub=[row for row, _ in rows],
        b_ub=[limit for _, limit in rows],
        bounds=[(reads_s, None), (0, None), *shares],
    )
    assert found.status == 0
    return float(found.fun or 0.0)


# curves


def test_a_curve_is_flat_below_linear_between_and_goes_on_beyond():
    curve = Curve(((2, 1.0), (4, 2.0), (8, 2.5)))
    assert [curve(rows) for rows in (1, 2, 3, 4, 6, 8, 16)] == [1.0, 1.0, 1.5, 2.0, 2.25, 2.5, 3.5]
    assert [Curve(((4, 2.0),))(rows) for rows in (1, 4, 6)] == [2.0, 2.0, 3.0]


def test_all_faults_of_a_curve_stand_in_one_error():
    with pytest.raises(InputError, match=r"2 faults"):
        Curve(((0, 1.0), (2, 3.0), (4, 2.0)))
    with pytest.raises(InputError, match="no point"):
        Curve(())
    with pytest.raises(InputError, match=r"3 faults"):
        Curves(ONE, ONE, 0.0, cpu_beside_link=0.5, disk_latency_s=math.nan)


def test_fitting_takes_medians_and_pools_what_falls():
    # medians 1, 4, 2 with 3, 1 and 2 samples: 4 and 2 are pooled to (4 + 2 * 2) / 3
    samples = [(1, 1.0), (1, 0.5), (1, 9.0), (2, 4.0), (3, 1.0), (3, 3.0)]
    assert Curve.fitted(samples).points == ((1, 1.0), (2, 8 / 3), (3, 8 / 3))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-6, 1.0)), min_size=1, max_size=30))
def test_a_fitted_curve_never_falls_and_stays_among_the_samples(samples):
    curve = Curve.fitted(samples)
    values = [curve(rows) for rows in range(1, 65)]
    assert values == sorted(values)
    seconds = [second for _, second in samples]
    assert min(seconds) * (1 - 1e-9) <= curve.points[0][1] <= curve.points[-1][1] <= max(seconds) * (1 + 1e-9)


# time


def test_cpu_and_link_slow_each_other_only_while_both_work():
    # the link needs 4 * 1.25 = 5 s; the CPU has done 2.5 of 10 by then and does the rest alone
    cpu, link = contend([Work(0, 10)], [Work(0, 4)], 2.0, 1.25)
    assert cpu == [(0, 12.5)]
    assert link == [(0, 5.0)]
    # alone until 3, together until the copy's 2 s are done at 6 (CPU: 3 + 3 / 2 of 6), then alone
    cpu, link = contend([Work(0, 6)], [Work(3, 2)], 2.0, 1.5)
    assert cpu == [(0, 7.5)]
    assert link == [(3, 6.0)]


def test_a_schedule_runs_as_worked_out_by_hand():
    active, curves = event_of(
        ("gpu", 1, 9, 9), ("ram", 1, 9, 2), ("ram", 3, 4, 9), ("flash", 2, 9, 1), disk_bytes_per_s=250
    )
    line = simulate(told(((0, 0),), ((0, 1), (0, 3)), ((0, 2),), ((0, 3),)), active, curves)
    # resident 0-1; first copy 0-2, its compute 2-3; the read ends at 4, its copy at 5, its compute at 7; CPU 0-4
    assert [tuple(use) for use in line.gpu.uses] == [((0, 0), 0, 1), ((0, 1), 2, 3), ((0, 3), 5, 7)]
    assert [(use.start_s, use.end_s) for use in line.link.uses] == [(0, 2), (4, 5)]
    assert line.span_s == 7
    assert line.busy_s == {"gpu": 4, "cpu": 4, "link": 3, "disk": 4}
    assert line.waited_s == {"gpu": 3, "cpu": 3, "link": 4, "disk": 3}
    assert line.hidden_upload_s == 2  # the second copy hides behind nothing


def test_the_start_of_the_cpu_is_paid_once():
    active, curves = event_of(("ram", 1, 2, 9), ("ram", 1, 3, 9), cpu_start_s=0.5)
    line = simulate(all_cpu(active, curves), active, curves)
    assert line.span_s == 5.5
    assert line.cpu.busy_s == 5.5
    assert simulate(all_upload(active, curves), active, curves).cpu.busy_s == 0


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((((0, 0),), (), (), ()), "name each once"),
        ((((0, 0), (0, 1)), (), (), ()), "not resident"),
        (((), ((0, 0),), ((0, 1),), ()), "do not upload"),
        (((), ((0, 1),), ((0, 0),), ()), "GPU's memory only"),
        ((((0, 0),), ((0, 1),), (), ((0, 1),)), "what lies in flash"),
    ],
)
def test_a_schedule_of_another_event_is_refused(parts, words):
    active, curves = event_of(("gpu", 1, 1, 1), ("ram", 1, 1, 1))
    with pytest.raises(InputError, match=words):
        simulate(told(*parts), active, curves)


@pytest.mark.parametrize("rule", [schedule, *RULES])
def test_predicted_ends_are_those_of_the_simulation(rule):
    draw = random.Random(5)
    for turn in range(40):
        active, curves = random_event(
            draw, draw.randint(0, 9), ("gpu", "gpu+", "ram", "flash"), contended=turn % 2 == 0
        )
        found = rule(active, curves)
        line = simulate(found, active, curves)
        assert line.span_s == pytest.approx(found.span_s, rel=1e-9)
        ends = [line.lane(name).end_s for name in ("gpu", "cpu", "link", "disk")]
        assert ends == pytest.approx([found.gpu_s, found.cpu_s, found.link_s, found.disk_s], rel=1e-9)
        for name, busy_s in line.busy_s.items():
            assert busy_s + line.waited_s[name] == pytest.approx(line.span_s)
        assert line.hidden_upload_s <= line.link.busy_s * (1 + 1e-9)


# the search


@pytest.mark.parametrize("contended", [False, True])
def test_without_flash_300_random_events_equal_exhaustive_search(contended):
    draw, proven = random.Random(11 + contended), 0
    for _ in range(300):
        active, curves = random_event(
            draw, draw.choice([1, 2, 3, 4, 4, 5, 5, 6]), ("gpu", "gpu+", "ram", "ram"), contended=contended
        )
        found = schedule(active, curves)
        assert found.span_s == pytest.approx(exhaustive(active, curves), rel=1e-8)
        proven += found.proven
    assert proven == 300 if not contended else proven >= 240


def test_with_flash_random_events_equal_exhaustive_search_over_all_orders():
    draw = random.Random(13)
    for _ in range(150):
        active, curves = random_event(draw, draw.randint(1, 4), ("gpu", "ram", "flash", "flash"), contended=False)
        found = schedule(active, curves)
        assert found.proven
        assert found.span_s == pytest.approx(exhaustive(active, curves), rel=1e-8)


def test_with_flash_and_contention_what_is_called_proven_is_and_the_rest_is_near():
    draw, equal = random.Random(17), 0
    for _ in range(100):
        active, curves = random_event(draw, draw.randint(2, 4), ("gpu", "ram", "flash", "flash"), contended=True)
        found, least_s = schedule(active, curves), exhaustive(active, curves)
        assert least_s * (1 - 1e-9) <= found.span_s <= least_s * (1 + 1e-8 if found.proven else 1.05)
        equal += found.span_s <= least_s * (1 + 1e-8)
    assert equal >= 95


def test_events_of_ten_experts_equal_all_1024_choices():
    # uploads in Johnson's order, written out here; 10 missing experts, no flash
    draw = random.Random(19)
    for _ in range(6):
        active, curves = random_event(draw, 10, ("ram",), contended=False)
        costs = [cost_of(one, curves) for one in active]
        johnson = sorted(costs, key=lambda cost: (0, cost.link) if cost.link <= cost.gpu else (1, -cost.gpu))
        least_s = math.inf
        for up in itertools.product([False, True], repeat=10):
            link_s = gpu_s = 0.0
            cpu_s = 0.0 if all(up) else curves.cpu_start_s
            for cost, uploaded in zip(johnson, up, strict=True):
                if uploaded:
                    link_s += cost.link
                    gpu_s = max(gpu_s, link_s) + cost.gpu
                else:
                    cpu_s += cost.cpu
            least_s = min(least_s, max(cpu_s, gpu_s))
        found = schedule(active, curves)
        assert found.proven
        assert found.span_s == pytest.approx(least_s, rel=1e-8)


def test_what_an_upload_is_worth_later_counts_as_if_exhaustively_searched():
    draw = random.Random(23)
    for turn in range(80):
        active, curves = random_event(draw, draw.randint(1, 4), ("gpu", "ram", "ram", "flash"), contended=turn % 2 == 0)
        active = [replace(one, worth_s=draw.choice([0.0, draw.uniform(0, 2)])) for one in active]
        found = schedule(active, curves)
        least_s = exhaustive(active, curves)
        assert objective(found, active) <= least_s + 0.05 * found.span_s * (not found.proven) + 1e-8


def test_larger_events_end_within_five_percent_of_the_linear_bound():
    draw = random.Random(29)
    for count in (32, 48, 64, 96, 128) * 8:
        curves, active = machine(draw), large_event(draw, count)
        found, bound_s = schedule(active, curves), linear_bound(active, curves)
        assert bound_s * (1 - 1e-9) <= found.span_s <= 1.05 * bound_s, (count, found.span_s / bound_s)
        assert found.bound_s <= found.span_s


@pytest.mark.parametrize("count", [8, 24, 64])
def test_no_rule_ends_earlier(count):
    draw = random.Random(31)
    for _ in range(25):
        curves, active = machine(draw), large_event(draw, count)
        span_s = schedule(active, curves).span_s
        for rule in RULES:
            assert span_s <= rule(active, curves).span_s * (1 + 1e-12), rule


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(1.01, 4.0))
@example(38992, 2.0)  # spends the effort of the exact search
def test_a_quicker_resource_never_ends_later(seed, factor):
    draw = random.Random(seed)
    active, curves = random_event(draw, draw.randint(1, 7), ("gpu", "ram", "ram", "flash"), contended=False)
    span_s = schedule(active, curves, effort=10**6).span_s
    for resource in ("gpu", "cpu", "link", "disk"):
        assert schedule(active, curves.scaled(**{resource: 1 / factor}), effort=10**6).span_s <= span_s * (1 + 1e-8)
    if "ram" in {one.place for one in active}:
        nearer = [replace(one, place="gpu", ram_copy=True) if one.place == "ram" else one for one in active]
        assert schedule(nearer, curves, effort=10**6).span_s <= span_s * (1 + 1e-8)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.01, 100.0))
def test_the_unit_of_time_and_the_order_of_the_experts_change_nothing(seed, factor):
    draw = random.Random(seed)
    active, curves = random_event(draw, draw.randint(1, 7), ("gpu", "gpu+", "ram", "flash"), contended=False)
    span_s = schedule(active, curves).span_s
    slower = curves.scaled(gpu=factor, cpu=factor, link=factor, disk=factor)
    assert schedule(active, slower).span_s == pytest.approx(span_s * factor, rel=1e-8)
    assert schedule(draw.sample(active, len(active)), curves).span_s == pytest.approx(span_s, rel=1e-8)


def test_of_equal_experts_the_first_named_are_uploaded():
    curves = Curves(flat(0.1), flat(1.0), 1000.0)
    active = [Active((0, i), 1, 1000, "ram") for i in (5, 3, 8, 1)]
    found = schedule(active, curves)
    assert found.uploaded == ((0, 5), (0, 3))[: len(found.uploaded)]
    assert found.on_cpu == tuple(one.key for one in active)[len(found.uploaded) :]
    assert found.uploaded
    assert Scheduler(curves).schedule(active) == found


def test_little_effort_gives_an_answer_that_claims_nothing():
    draw = random.Random(37)
    active, curves = random_event(draw, 10, ("ram",), contended=False)
    hasty, thorough = schedule(active, curves, effort=1), schedule(active, curves)
    assert not hasty.proven
    assert thorough.proven
    assert thorough.span_s <= hasty.span_s
    assert hasty.bound_s <= thorough.span_s == thorough.bound_s


def test_an_empty_event_takes_no_time():
    found = schedule([], Curves(ONE, ONE, 1.0))
    assert (found.span_s, found.uploaded, found.on_cpu, found.proven) == (0.0, (), (), True)


def test_a_malformed_event_is_refused_with_all_its_faults():
    curves = Curves(ONE, ONE, 1.0)
    with pytest.raises(InputError, match="2 faults"):
        schedule([Active((0, 1), 0, 1, "ram"), Active((0, 1), 1, 1, "ram")], curves)


def test_a_scheduler_remembers_shapes_and_gives_what_a_search_gives():
    draw = random.Random(41)
    curves = machine(draw)
    scheduler = Scheduler(curves, shapes=8)
    for _ in range(60):
        keys = draw.sample(range(128), 8)
        active = [Active((3, key), 1, 3_000_000, draw.choice(["gpu", "ram", "flash"])) for key in keys]
        found = scheduler.schedule(active)
        assert found.span_s == pytest.approx(schedule(active, curves).span_s, rel=1e-9)
        assert simulate(found, active, curves).span_s == pytest.approx(found.span_s, rel=1e-9)


def decode_events(seed: int, count: int) -> list[tuple[list[Active], Curves]]:
    """Events as decoding asks for them: few kinds of expert, worth in steps, some of them again on other curves."""
    draw, found = random.Random(seed), []
    curves = machine(draw)
    for number in range(count):
        if number % 20 == 0:
            curves = replace(machine(draw), cpu_start_s=draw.choice([0.0, 3e-5]))
        flash, copies, step_s = draw.random() < 0.2, draw.random() < 0.7, draw.choice([0.0, 2e-5, 4e-5])
        places: list[Place] = ["gpu", "gpu", "gpu", "ram", "ram"]
        places += ["flash"] if flash else []
        active = []
        for expert in sorted(draw.sample(range(64), draw.randint(1, 8))):
            size_bytes = draw.choice([4_500_000, 4_500_000, 9_000_000])
            one = Active((number, expert), draw.choice([1, 1, 1, 2]), size_bytes, draw.choice(places))
            worth_s = 0.0 if one.place == "gpu" else step_s * draw.randint(0, 6)
            active.append(replace(one, ram_copy=copies and one.place == "gpu", worth_s=worth_s))
        found.append((active, curves))
    return found


def decision(found: Schedule) -> list[Any]:
    """What is decided, by numbers of experts, and when it ends."""
    sides = [[expert for _, expert in keys] for keys in (found.on_gpu, found.uploaded, found.on_cpu, found.read)]
    return [*sides, found.proven, found.span_s]


def test_what_is_decided_is_what_was_decided_before_it_became_quick():
    # recorded from the scheduler that built every candidate as an object and weighed them with arrays
    path = Path(__file__).parents[2] / "data" / "decode_schedules.json"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    events = decode_events(recorded["seed"], len(recorded["decisions"]))
    assert len(events) >= 400
    schedulers: dict[int, Scheduler] = {}
    for (active, curves), expected in zip(events, recorded["decisions"], strict=True):
        scheduler = schedulers.setdefault(id(curves), Scheduler(curves))
        for _ in range(2):  # searched, and remembered
            found = decision(scheduler.schedule(active))
            assert found[:-1] == expected[:-1]
            assert found[-1] == pytest.approx(expected[-1], rel=1e-12)


def test_a_remembered_schedule_is_the_searched_one_to_the_last_field():
    for active, curves in decode_events(3, 120):
        order = sorted(
            active, key=lambda one: (one.place, one.size_bytes, one.rows, one.kind, one.ram_copy, one.worth_s)
        )
        scheduler = Scheduler(curves)
        assert scheduler.schedule(active) == scheduler.schedule(active) == schedule(order, curves)
        moved = [replace(one, key=(9, 63 - one.key[1])) for one in active]
        again = scheduler.schedule(moved)
        assert [(9, 63 - expert) for _, expert in schedule(order, curves).uploaded] == list(again.uploaded)
        assert scheduler.costs(active) == {one.key: cost_of(one, curves) for one in active}


def test_a_scheduler_of_other_curves_remembers_nothing_of_these():
    active = [Active((0, i), 1, 1000, "ram") for i in range(4)]
    quick, slow = Curves(flat(0.1), flat(1.0), 1e5), Curves(flat(0.1), flat(1.0), 1.0)
    assert Scheduler(quick).schedule(active).on_cpu == ()
    assert Scheduler(slow).schedule(active).uploaded == ()


def searched(active: list[Active], curves: Curves, search, effort: int) -> tuple[Order, float, bool]:
    """Search an event to the end from nothing but everything on the CPU."""
    jobs = [Job(cost_of(one, curves), one.place, 0.0 if one.place == "gpu" else one.worth_s) for one in active]
    factors = {"cpu_factor": curves.cpu_beside_link, "link_factor": curves.link_beside_cpu}
    event = Event(jobs, cpu_start_s=curves.cpu_start_s, **factors)
    bounds = Bounds(event)
    best = Best(event, bounds.event_s)
    best.offer(Order((), tuple(sorted(event.free)), ()))
    done = search(best, bounds, effort).run()
    return best.order, best.objective_s, done


@pytest.mark.parametrize("effort", [20, 1500])
def test_the_search_of_choices_finds_what_the_search_with_reads_finds_without_any(effort):
    draw = random.Random(43)
    events = [random_event(draw, draw.randint(1, 12), ("gpu", "gpu+", "ram"), contended=n % 2 == 0) for n in range(150)]
    events += [event for event in decode_events(5, 150) if "flash" not in {one.place for one in event[0]}]
    for event, curves in events:
        active = [replace(one, worth_s=draw.choice([0.0, draw.uniform(0, 2)])) for one in event]
        assert searched(active, curves, ChoiceSearch, effort) == searched(active, curves, _DeepSearch, effort)


def test_bounds_of_few_jobs_are_those_of_many_to_the_bit():
    draw = random.Random(47)
    for _ in range(400):
        count = draw.randint(0, 16)
        sides = _Sides(*([draw.choice([0.0, 1.0, draw.random()]) for _ in range(count)] for _ in range(3)))
        factors = None if draw.random() < 0.5 else (1 / draw.uniform(1, 2), 1 / draw.uniform(1, 2))
        shares = [0.0, 1.0] + ([] if factors is None else [draw.random(), draw.random()])
        given_s = draw.choice([0.0, draw.random()])
        assert _dual_of_few(sides, shares, given_s, factors) == _dual_of_many(sides, shares, given_s, factors)


def test_a_remembered_shape_still_names_an_expert_that_stands_twice():
    scheduler = Scheduler(Curves(ONE, ONE, 1.0))
    scheduler.schedule([Active((0, 0), 1, 1, "ram"), Active((0, 1), 1, 1, "ram")])
    with pytest.raises(InputError, match="stands twice"):
        scheduler.schedule([Active((0, 0), 1, 1, "ram")] * 2)


# rules of others


def test_hybrimoe_decides_by_its_published_constants():
    # rows 1: the CPU asks 1.79, the GPU 0.5 + wait for 0.418. Head by head: GPU 0.918 <= 1.79; copies end at 0.836,
    # 1.254, 1.672: GPU 1.418, then 1.918 > 1.79, so the CPU takes the tail (1.79); then 1.918 <= 3.58, and so on
    active, curves = event_of(*[("ram", 1, 1, 1)] * 5)
    found = hybrimoe(active, curves)
    assert found.on_cpu == ((0, 4),)
    assert len(found.uploaded) == 4
    assert hybrimoe(active, curves, decoding=False).on_cpu == ()


def test_a_resident_tail_goes_to_the_cpu_only_where_ram_holds_it_too():
    active, curves = event_of(*[("gpu+", 1, 1, 1)] * 5)
    assert len(hybrimoe(active, curves).on_cpu) == 1  # GPU 0.5, 1.0, 1.5; 2.0 > 1.79
    active, curves = event_of(*[("gpu", 1, 1, 1)] * 5)
    assert hybrimoe(active, curves).on_cpu == ()


def test_fiddler_uploads_from_eleven_rows_on():
    curves = Curves(ONE, ONE, 1000.0)
    found = fiddler([Active((0, rows), rows, 1000, "ram") for rows in (9, 10, 11)], curves)
    assert found.uploaded == ((0, 11),)


def test_static_never_uploads_and_all_upload_never_computes_on_the_cpu():
    active, curves = event_of(("gpu+", 1, 1, 1), ("ram", 1, 1, 1), ("flash", 1, 1, 1))
    assert (static(active, curves).on_gpu, static(active, curves).uploaded) == (((0, 0),), ())
    assert all_upload(active, curves).on_cpu == ()
    assert set(all_cpu(active, curves).on_cpu) == {(0, 0), (0, 1), (0, 2)}


# following a run


def test_refitting_finds_the_scale_and_keeps_the_errors_of_the_curves_then_in_force():
    curves = Curves(flat(1.0), flat(2.0), 1000.0)
    refit = Refit(curves, least_samples=4)
    for _ in range(10):
        refit.observe("cpu", 2.0, 3.0)
    assert refit.curves == curves
    assert refit.refit().cpu(1) == pytest.approx(3.0)
    assert refit.curves.gpu == curves.gpu
    errors = refit.statistics()["cpu"]
    assert errors.samples == 10
    assert [errors.mean_error, errors.bias] == pytest.approx([1 / 3, -1 / 3])
    # predicted by the new curves, and right: the scale stays
    for _ in range(50):
        refit.observe("cpu", 3.0, 3.0)
    assert refit.refit().cpu(1) == pytest.approx(3.0)
    assert refit.statistics()["cpu"].mean_error < 0.1


def test_refitting_follows_a_drift_and_shrugs_at_one_outlier():
    refit = Refit(Curves(ONE, ONE, 1000.0), half_life=8)
    for _ in range(100):
        refit.observe("link", 1.0, 1.0)
    refit.observe("link", 1.0, 1e6)
    assert refit.refit().link_s(1000) < 1.7
    for _ in range(200):
        predicted_s = refit.curves.link_s(1000)
        refit.observe("link", predicted_s, 2.0)
        refit.refit()
    assert refit.curves.link_s(1000) == pytest.approx(2.0, rel=1e-6)
    assert refit.statistics()["link"].scale == pytest.approx(2.0, rel=1e-6)


def test_refitting_keeps_its_curves_until_there_are_samples_and_refuses_nonsense():
    curves = Curves(ONE, ONE, 1000.0)
    refit = Refit(curves, least_samples=3)
    refit.observe("gpu", 1.0, 5.0)
    refit.observe("gpu", 0.0, 5.0)
    assert refit.refit() == curves
    with pytest.raises(InputError, match="clock"):
        refit.observe("gpu", 1.0, -1.0)
    with pytest.raises(InputError, match="half_life"):
        Refit(curves, half_life=0)
