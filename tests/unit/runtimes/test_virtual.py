"""Virtual time: hand sums, the timeline's own simulator as oracle, budgets, and that choices look at the past only."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.runtimes.ahead_time import event_time
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.reuse import ReuseForecast, ReusePolicy
from edgeflex.runtimes.schedule import all_upload, fiddler, schedule, simulate
from edgeflex.runtimes.schedule import static as static_rule
from edgeflex.runtimes.strategies import BASELINES, Machine, Strategy
from edgeflex.runtimes.synthetic import TRACE_KINDS, Routing, synthetic_trace
from edgeflex.runtimes.tier_bounds import time_bound_s
from edgeflex.runtimes.timeline import Active, cost_of
from edgeflex.runtimes.virtual import choose_strategy, event_rows, first_judged_step, popular, run_virtual

OURS = (Strategy("ours"), Strategy("ours", horizon=4.0), Strategy("ours", static=True))
ALL = (*OURS, *(Strategy(name) for name in BASELINES))
UNITS = Curves(gpu=Curve(((1, 1.0),)), cpu=Curve(((1, 4.0),)), link_bytes_per_s=1.0)


def machine(**changes) -> Machine:
    curves = Curves(
        gpu=Curve(((1, 1e-5), (64, 4e-5))),
        cpu=Curve(((1, 8e-5), (64, 2e-3))),
        link_bytes_per_s=25e9,
        link_latency_s=8e-6,
        cpu_beside_link=1.1,
        link_beside_cpu=1.05,
    )
    return Machine(dataclasses.replace(curves, **changes), Curve(((1, 5e-5), (64, 1e-4))))


def small(kind="zipf", seed=0, **changes):
    return synthetic_trace(kind, dataclasses.replace(Routing(4, 16, 4, 48), **changes), seed=seed)


def run(trace, strategy, *, share=0.3, on=None, **options):
    sizes = options.get("sizes", trace.sizes())
    options.setdefault("vram_bytes", int(share * sizes.sum()))
    return run_virtual(trace, on or machine(), strategy, **options)


def random_event(draw: random.Random) -> tuple[list[Active], Curves]:
    active = [
        Active((0, number), draw.randint(1, 8), draw.randint(1, 9), draw.choice(["gpu", "ram", "flash"]))
        for number in range(draw.randint(1, 6))
    ]
    curves = Curves(
        gpu=Curve(((1, draw.random()),)),
        cpu=Curve(((1, draw.random() * 3),)),
        link_bytes_per_s=draw.uniform(1, 9),
        link_latency_s=draw.random() / 9,
        disk_bytes_per_s=draw.uniform(1, 9),
        cpu_beside_link=draw.uniform(1, 1.5),
        link_beside_cpu=draw.uniform(1, 1.5),
        cpu_start_s=draw.choice([0.0, 0.1]),
    )
    return active, curves


@pytest.mark.parametrize("seed", range(60))
def test_without_copies_ahead_an_event_takes_what_the_timeline_says(seed):
    active, curves = random_event(random.Random(seed))
    costs = {one.key: cost_of(one, curves) for one in active}
    for plan in (schedule(active, curves), all_upload(active, curves), fiddler(active, curves)):
        ours, oracle = event_time(plan, costs, curves), simulate(plan, active, curves)
        assert ours.span_s == pytest.approx(oracle.span_s)
        assert ours.busy_s == pytest.approx(tuple(oracle.busy_s.values()))


def test_a_copy_ahead_uses_the_links_idle_time_and_slows_the_cpu_beside_it():
    active = [Active((0, 0), 1, 2, "ram"), Active((0, 1), 1, 2, "gpu")]
    curves = dataclasses.replace(UNITS, cpu_beside_link=1.5)
    plan, costs = static_rule(active, curves), {one.key: cost_of(one, curves) for one in active}
    assert event_time(plan, costs, curves).span_s == 4.0
    # 3 s of copying beside the CPU, which does 2 s of its 4 meanwhile and the rest alone
    short = event_time(plan, costs, curves, [3.0])
    assert short.span_s == pytest.approx(5.0)
    assert short.ahead_s == (3.0,)
    # a copy of 9 s is cut where the event ends
    long = event_time(plan, costs, curves, [9.0, 1.0])
    assert long.span_s == pytest.approx(6.0)
    assert long.ahead_s == pytest.approx((6.0, 0.0))


def test_a_chunk_under_way_holds_an_upload_back():
    active = [Active((0, 0), 1, 2, "ram")]
    plan, costs = all_upload(active, UNITS), {(0, 0): cost_of(active[0], UNITS)}
    assert event_time(plan, costs, UNITS).span_s == 3.0
    assert event_time(plan, costs, UNITS, held_s=0.5).span_s == 3.5


def test_rows_are_counted_for_each_expert():
    trace = small(tokens=3, prompt_tokens=10)
    for event, rows in zip(trace.events, event_rows(trace), strict=True):
        assert sum(rows) == event.tokens * trace.top_k
        here = (trace.layer == event.layer) & ((trace.phase == 1) == event.decoding)
        if event.decoding:
            here &= trace.step == event.step + 9  # the prompt's ten positions are one pass
        assert rows == tuple((trace.expert[here] == expert).sum() for expert in event.experts)


def test_a_token_takes_the_sum_worked_out_by_hand():
    trace = synthetic_trace("cyclic", Routing(1, 4, 2, 2, expert_bytes=1))
    on = Machine(UNITS, Curve(((1, 10.0),)), token_s=100.0)
    first, second = (set(event.experts) for event in trace.events)
    order = [(0, expert) for expert in sorted(first)]
    found = run_virtual(trace, on, Strategy("static"), vram_bytes=2, order=order)
    # both resident: 2 s on the GPU; none of the next two: 8 s on the CPU
    assert first.isdisjoint(second)
    assert found.token_s == (112.0, 118.0)
    assert (found.lookups, found.gpu_hits) == (4, 2)
    assert found.waited["cpu"] == pytest.approx(1 - 8 / 230)
    assert found.waited["gpu"] == pytest.approx(1 - 22 / 230)
    uploads = run_virtual(trace, on, Strategy("lru"), vram_bytes=2, order=order)
    assert uploads.token_s == (112.0, 113.0)  # copies end at 1 and 2, the GPU at 2 and 3
    assert uploads.upload_bytes == 1.0


@pytest.mark.parametrize("strategy", ALL, ids=str)
@pytest.mark.parametrize("kind", TRACE_KINDS)
def test_runs_are_deterministic_and_never_exceed_their_budget(strategy, kind):
    trace = small(kind, prompt_tokens=5)
    sizes = trace.sizes()
    found = run(trace, strategy)
    assert found == run(trace, strategy)
    assert found.peak_vram_bytes <= int(0.3 * sizes.sum())
    assert len(found.token_s) == 48
    assert min(found.token_s) > 0 < found.prompt_s
    assert all(0.0 <= share <= 1.0 for share in found.waited.values())


@pytest.mark.parametrize("kind", TRACE_KINDS)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_no_strategy_beats_the_time_bound(kind, share):
    trace = small(kind, prompt_tokens=2)
    on = machine()
    total = int(trace.sizes().sum())
    bound = time_bound_s(trace, on.curves, int(share * total), total, dense_s=4 * on.dense(1))
    for strategy in ALL:
        assert run(trace, strategy, share=share, on=on).mean_s >= bound * (1 - 1e-9)


@pytest.mark.parametrize("kind", TRACE_KINDS)
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_our_schedule_of_a_static_placement_is_never_slower_than_the_published_one(kind, share):
    trace = small(kind)
    ours = run(trace, Strategy("ours", static=True), share=share)
    # uploads that pass through VRAM cost it a slot or two
    assert ours.mean_s <= run(trace, Strategy("static"), share=share).mean_s * 1.03


def test_everything_resident_costs_the_same_whoever_decides():
    trace = small()
    total = int(trace.sizes().sum())
    seconds = {run(trace, strategy, vram_bytes=2 * total).mean_s for strategy in ALL[3:]}
    assert len(seconds) == 1
    assert run(trace, OURS[0], vram_bytes=2 * total).mean_s <= seconds.pop()


def test_a_machine_of_half_the_speed_takes_twice_as_long():
    trace = small("markov")
    for strategy in ALL:
        fast = run(trace, strategy, on=machine())
        slow = run(trace, strategy, on=machine().scaled(2.0))
        assert slow.mean_s == pytest.approx(2 * fast.mean_s, rel=1e-3)


def test_flash_is_read_when_ram_does_not_hold_everything():
    trace = small()
    total = int(trace.sizes().sum())
    on = machine(disk_bytes_per_s=3e9, disk_latency_s=1e-4)
    for strategy in (*OURS, Strategy("lru"), Strategy("static"), Strategy("fiddler")):
        short = run(trace, strategy, on=on, share=0.2, ram_bytes=int(0.5 * total))
        assert short.flash_bytes > 0
        assert short.mean_s > run(trace, strategy, on=on, share=0.2).mean_s
        assert run(trace, strategy, on=on, share=0.2, ram_bytes=int(0.5 * total), exclusive=True).mean_s > 0


def test_the_choice_does_not_see_what_judges():
    trace = small("zipf")
    first = first_judged_step(trace)
    assert first == 12
    other = small("uniform", seed=7)
    later = trace.step >= first
    mixed = dataclasses.replace(trace, expert=np.where(later, other.expert, trace.expert))
    for one, share in ((trace, 0.2), (trace, 0.5)):
        vram = int(share * one.sizes().sum())
        chosen = [choose_strategy(t, machine(), vram_bytes=vram, first_step=first) for t in (trace, mixed)]
        assert chosen[0] == chosen[1]
    assert popular(trace, first) == popular(mixed, first)


def test_popular_experts_come_first():
    trace = small("zipf", prompt_tokens=4)
    order = popular(trace, 10_000)
    uses = trace.uses()
    counts = [uses[key] for key in order]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == uses.sum()


@pytest.mark.parametrize("kind", ["markov", "phases"])
def test_where_use_is_local_ours_beats_every_published_rule(kind):
    trace = synthetic_trace(kind, Routing(8, 64, 6, 64))
    first = first_judged_step(trace)
    vram = int(0.3 * trace.sizes().sum())
    options = {"vram_bytes": vram, "order": popular(trace, first), "first_step": first}
    ours = run(trace, choose_strategy(trace, machine(), vram_bytes=vram, first_step=first), **options).mean_s
    assert min(run(trace, Strategy(name), **options).mean_s for name in BASELINES) > 1.15 * ours


def test_too_little_room_is_said():
    trace = small()
    with pytest.raises(InputError, match="at least 1"):
        run(trace, OURS[1], vram_bytes=0)
    assert run(trace, OURS[1], vram_bytes=4_500_000).hit_rate < 0.1  # one slot is a budget too
    with pytest.raises(InputError, match="no flash tier"):
        run(trace, Strategy("hybrimoe"), ram_bytes=int(0.5 * trace.sizes().sum()))
    with pytest.raises(InputError, match="fractal"):
        run(trace, Strategy("fractal"))  # type: ignore[arg-type]


# --- the forecast ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 8), st.sampled_from([1.0, 8.0, 50.0]))
def test_rates_are_rates_and_add_up_to_about_top_k(seed, top_k, horizon):
    draw = np.random.default_rng(seed)
    forecast = ReuseForecast(2, 32, top_k, horizon=horizon)
    for _ in range(60):
        for layer in range(2):
            forecast.note(layer, sorted(draw.choice(32, top_k, replace=False).tolist()), None)
    assert ((forecast.rates > 0) & (forecast.rates <= 1)).all()
    assert forecast.rates.sum(axis=1) == pytest.approx(top_k, rel=0.3, abs=0.7)


def error_of(trace, **options) -> float:
    """Return the mean square error of foretelling each next step of the second half of a trace."""
    forecast = ReuseForecast(trace.layers, trace.experts, trace.top_k, horizon=1.0, **options)
    total, count = 0.0, 0
    for number, event in enumerate(trace.events):
        if number >= len(trace.events) // 2:
            used = np.zeros(trace.experts)
            used[list(event.experts)] = 1.0
            total += float(((used - forecast.rates[event.layer]) ** 2).sum())
            count += 1
        forecast.note(event.layer, event.experts, event.weights)
    return total / count


@pytest.mark.parametrize("kind", ["uniform", "zipf", "markov", "phases"])
def test_the_mixture_is_about_as_good_as_the_best_single_half_life(kind):
    trace = synthetic_trace(kind, Routing(4, 32, 4, 200))
    alone = min(error_of(trace, half_lives=(half_life,)) for half_life in (0.5, 3.0, 16.0, math.inf))
    assert error_of(trace) < alone * 1.02


def test_a_walk_round_all_experts_is_foretold_from_its_period():
    trace = synthetic_trace("cyclic", Routing(2, 20, 4, 60))
    known = (1 - 4 / 20) * 4  # the error of foretelling the average
    assert error_of(trace) < 0.25 * known


def test_a_long_horizon_values_what_stays_popular_above_what_was_used_last():
    long, short = (ReuseForecast(1, 16, 1, horizon=horizon) for horizon in (20.0, 1.0))
    draw = np.random.default_rng(0)
    for forecast in (long, short):
        for step in range(400):
            # expert 0 every second step, the others once in a while, never twice running
            forecast.note(0, (0,) if step % 2 else (int(draw.integers(1, 16)),), None)
    last = 1 + int(np.argmax(long.rates[0, 1:]))
    assert long.rates[0, 0] > 5 * long.rates[0, last]
    assert short.rates[0, 0] < 0.5  # it was used in the last step
    assert long.rates[0, 0] == pytest.approx(0.5, abs=0.1)


def test_victims_are_the_unlikely_and_candidates_the_likely():
    policy = ReusePolicy(2, 4, top_k=1)
    policy.start(4, np.ones((2, 4), dtype=np.int64))
    for step in range(20):
        policy.use(step, 0, (1,), None, ())
        policy.use(step, 1, (2,), None, ())
    policy.insert(0, (0, 1))
    policy.insert(1, (2, 3))
    assert {key for key, _ in policy.next_victims(0, 2)} == {0, 7}
    assert policy.next_victims(0, 1, pinned=[0])[0][0] == 7
    assert {key for key, _ in policy.likeliest_absent(8)} == {2, 3, 4, 5}
    assert {key for key, _ in policy.likeliest_absent(8, barred=[2])} == {3, 4, 5}
    assert policy.evict(0, [], 1)[0] in {0, 7}
