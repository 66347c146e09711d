from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeflex.bundle import PROGRAM
from edgeflex.errors import InputError
from edgeflex.runtimes import exits_for
from edgeflex.runtimes.bench import bench, latency_statistics
from edgeflex.runtimes.measure import ModelMemory
from edgeflex.schema import (
    BenchResult,
    Budget,
    Conditions,
    Interval,
    LatencyLimit,
    MemoryBreakdown,
    Tier,
)
from tests.toy_bundle import reference_probabilities, toy_inputs, toy_plan, toy_program, write_toy_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edgeflex.bundle import Bundle
    from edgeflex.schema import Check

IMAGES = 12
MEMORY = ModelMemory(runtime_bytes=10_000_000, model_bytes=100_000, load_peak_bytes=150_000)


def at_once(bundle: Bundle, threads: int) -> ModelMemory:
    return MEMORY


def checks_of(result: BenchResult) -> dict[str, Check]:
    return {check.name: check for check in result.checks}


def test_statistics_of_a_sum_done_by_hand() -> None:
    samples = np.arange(1.0, 101.0)
    assert latency_statistics(samples) == {
        "mean": 50.5,
        "p50": 50.0,
        "p90": 90.0,
        "p95": 95.0,
        "p99": 99.0,
        "worst": 100.0,
    }


def test_a_bench_holds_every_promise_against_its_measurement(tmp_path: Path) -> None:
    inputs = toy_inputs(IMAGES)
    budget = Budget(
        memory_bytes={Tier.HOST: 1, Tier.FLASH: 1},
        latency=(LatencyLimit(limit_s=10.0), LatencyLimit(limit_s=1e-9, statistic="p95")),
        disk_bytes=len(toy_program()),
    )
    plan = toy_plan(
        budget=budget,
        latency_interval_s={
            "mean": Interval(value=1e-3, low=0.0, high=1.0),
            "worst": Interval(value=1e-9, low=1e-9, high=2e-9),
        },
    )
    bundle = write_toy_bundle(tmp_path / "bundle", plan=plan)
    states = iter([Conditions(load_average=1.0), Conditions(load_average=2.0)])
    result = bench(bundle, inputs, repeats=3, warmup=2, device="toy", conditions=lambda: next(states))
    checks = checks_of(result)
    assert {name: check.ok for name, check in checks.items() if name != "memory"} == {
        "mean latency": True,
        "worst latency": False,
        "mean latency budget": True,
        "p95 latency budget": False,
        "memory budget": False,
        "program size": True,
        "program size budget": True,
    }
    assert checks["program size"].measured == len(toy_program())
    assert checks["p95 latency budget"].limit == 1e-9
    assert checks["memory budget"].measured == result.peak_memory_bytes
    assert (result.before.load_average, result.after.load_average) == (1.0, 2.0)
    exits = exits_for(reference_probabilities(inputs), plan.thresholds)
    assert result.exit_shares == tuple(np.bincount(exits, minlength=3) / IMAGES)
    assert len(result.samples_s) == 3 * IMAGES
    assert result.latency_s["p50"] <= result.latency_s["p99"] <= result.latency_s["worst"]
    assert BenchResult.parse(result.canonical_json(), "bench.json") == result


def test_an_exit_where_nobody_leaves_still_gets_its_latency(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", plan=toy_plan(thresholds=(None, None, None)))
    result = bench(bundle, toy_inputs(4), repeats=2, warmup=1, memory=at_once)
    assert result.exit_shares == (0.0, 0.0, 1.0)
    assert all(0.0 < latency_s < 0.1 for latency_s in result.exit_latency_s)


def test_memory_may_differ_from_its_promise_by_ten_per_cent_upwards(tmp_path: Path) -> None:
    for promised, ok in ((200_000, True), (91_000, True), (90_000, False)):
        promise = MemoryBreakdown(weights_bytes=promised, activation_bytes=0, overhead_bytes=0)
        bundle = write_toy_bundle(tmp_path / f"{promised}", plan=toy_plan(memory=promise))
        check = checks_of(bench(bundle, toy_inputs(1), repeats=1, memory=at_once))["memory"]
        assert check.ok is ok
        assert "times the promise" in check.note
        assert ("below the predicted range" in check.note) is (promised == 200_000)
        assert "highest rise while loading 146.48 KiB" in check.note


def test_one_byte_of_program_size_breaks_the_promise(tmp_path: Path) -> None:
    plan = toy_plan()
    predicted = plan.predicted.model_copy(update={"disk_bytes": plan.predicted.disk_bytes - 1})
    bundle = write_toy_bundle(tmp_path / "bundle", plan=plan.model_copy(update={"predicted": predicted}))
    check = checks_of(bench(bundle, toy_inputs(1), repeats=1, memory=at_once))["program size"]
    assert not check.ok
    assert check.note == "+1 bytes; the promise is exact"
    assert bundle.file(PROGRAM).stat().st_size == check.measured


def test_the_clock_that_is_handed_in_is_the_one_that_counts(tmp_path: Path) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.5
        return now

    result = bench(write_toy_bundle(tmp_path / "bundle"), toy_inputs(3), repeats=2, clock=clock, memory=at_once)
    assert set(result.samples_s) == {0.5}
    assert result.latency_s["mean"] == 0.5


def test_nothing_to_measure_is_bad_input(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match="0 images"):
        bench(bundle, toy_inputs(0))
    with pytest.raises(InputError, match="0 repeats"):
        bench(bundle, toy_inputs(1), repeats=0)
