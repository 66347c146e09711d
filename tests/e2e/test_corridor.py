"""The whole corridor on a small real network, with ExecuTorch at the end of it: what is kept, resumed and refused."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeflex import flow, terminal
from edgeflex.bundle import open_bundle
from edgeflex.errors import BundleError, CheckFailedError, InfeasibleError, InputError
from edgeflex.flow.decide import _with_safety
from edgeflex.pace import pace
from edgeflex.plans import check_plan, choose
from edgeflex.schema import (
    BenchResult,
    Budget,
    LatencyLimit,
    Plan,
    Precision,
    Tier,
    VerifyResult,
)
from tests.toy_bundle import this_machine

if TYPE_CHECKING:
    from pathlib import Path

    from edgeflex.schema import CostTable

pytestmark = pytest.mark.timeout(600)

MIXES = 2
MAX_DROP = 0.08


@dataclass(frozen=True)
class Corridor:
    """Everything that one walk left behind."""

    folder: Path
    plan: Plan
    bench: BenchResult
    verify: VerifyResult

    @property
    def images(self) -> Path:
        return self.folder / "digits" / "dev"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"


def wish(calibration: Path, share: float = 0.8) -> Budget:
    """Return a budget of ``share`` of the time and memory of the slowest and largest measured mix."""
    _, _, _, table, candidates = flow.open_calibration(calibration)
    points = choose.static_points(table, candidates.candidates, candidates.reference_accuracy)
    return Budget(
        memory_bytes={Tier.HOST: round(share * max(point.memory_bytes for point in points))},
        latency=(LatencyLimit(limit_s=share * max(point.latency_s for point in points)),),
        max_drop=MAX_DROP,
    )


def prepare_inputs(folder: Path) -> None:
    """Write digits as images and the weights of a network trained on them for a few seconds."""
    from safetensors.torch import save

    from edgeflex.images import open_images
    from edgeflex.models import zoo

    zoo.write_digits(folder / "digits", dev_share=0.6)
    trained = zoo.train_digits(open_images(folder / "digits" / "train"), epochs=5)
    (folder / "weights.safetensors").write_bytes(save(trained.state_dict()))


def fit(folder: Path, out: Path, epochs: int) -> None:
    flow.fit_exits(
        "zoo:digits-cnn",
        folder / "digits" / "train",
        out,
        weights=folder / "weights.safetensors",
        exits=2,
        epochs=epochs,
    )


@pytest.fixture(scope="module")
def corridor(tmp_path_factory: pytest.TempPathFactory) -> Corridor:
    folder = tmp_path_factory.mktemp("corridor")
    prepare_inputs(folder)
    images, model, calibration, bundle = (
        folder / "digits/dev",
        folder / "model",
        folder / "calibration",
        folder / "bundle",
    )
    fit(folder, model, epochs=10)
    flow.calibrate(model, images, calibration, device=this_machine(), mixes=MIXES)
    plan = flow.plan(calibration, wish(calibration))
    (folder / "plan.json").write_text(plan.canonical_json())
    flow.export(plan, model, calibration, bundle)
    bench = flow.bench(bundle, images, images=60, repeats=3)
    verify = flow.verify(bundle, images, model_folder=model)
    flow.report(bundle, folder / "report.html", bench_result=bench, verify_result=verify)
    return Corridor(folder, plan, bench, verify)


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file's time of change and size."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


# --- what the walk made ----------------------------------------------------------------------------------


def test_the_plan_keeps_every_budget_and_carries_a_certificate(corridor: Corridor):
    plan, budget = corridor.plan, corridor.plan.budget
    assert plan.predicted.memory_bytes[Tier.HOST] <= budget.memory_bytes[Tier.HOST]
    assert plan.predicted.latency_s["mean"] <= budget.latency[0].limit_s
    assert plan.certificate is not None
    assert plan.certificate.drop_upper_bound <= MAX_DROP
    assert plan.certificate.drop <= plan.certificate.drop_upper_bound
    assert sum(plan.exit_shares) == pytest.approx(1.0)
    assert plan.reference_accuracy is not None
    assert plan.reference_accuracy > 0.8


def test_the_bundle_holds_the_plan_and_exactly_the_promised_bytes(corridor: Corridor):
    bundle = open_bundle(corridor.bundle)
    assert bundle.manifest.plan == corridor.plan
    assert {name: one.value for name, one in bundle.manifest.layer_precisions.items()} == {
        choice.subject: choice.option for choice in corridor.plan.choices
    }
    assert (corridor.bundle / "program.pte").stat().st_size == corridor.plan.predicted.disk_bytes


def test_accuracy_and_size_are_measured_as_promised(corridor: Corridor):
    checks = {check.name: check for check in corridor.verify.checks}
    assert checks
    assert [check.name for check in corridor.verify.checks if not check.ok] == []
    assert corridor.verify.drop <= MAX_DROP
    assert corridor.verify.oracle_accuracy >= corridor.verify.accuracy
    _, _, _, _, candidates = flow.open_calibration(corridor.calibration)
    assert corridor.verify.reference_accuracy == pytest.approx(candidates.reference_accuracy, abs=0.1)


def test_the_bench_measured_what_the_plan_foretold(corridor: Corridor):
    bench = corridor.bench
    assert len(bench.samples_s) >= 60
    assert min(bench.samples_s) > 0
    assert sum(bench.exit_shares) == pytest.approx(1.0)
    # other work on the machine may double a time; a promise in another unit is off by a thousand
    assert 0.2 < bench.latency_s["mean"] / corridor.plan.predicted.latency_s["mean"] < 10
    assert 0.5 < bench.peak_memory_bytes / corridor.plan.predicted.memory_bytes[Tier.HOST] < 2


def test_the_plan_knows_how_fast_the_machine_was_and_a_slower_one_is_told(corridor: Corridor, tmp_path: Path):
    then = corridor.plan.conditions
    assert then is not None
    assert then.arithmetic_s is not None
    assert then.memory_bytes_per_s is not None
    bundle = tmp_path / "bundle"
    shutil.copytree(corridor.bundle, bundle)
    path = bundle / "manifest.json"
    before, after = corridor.bench.before, corridor.bench.after
    assert before.arithmetic_s is not None
    for times in (2.0, 0.5):
        # as if the machine had been so many times as quick as around this benchmark
        quick = {"arithmetic_s": before.arithmetic_s / times, "machine": before.machine}
        document = json.loads(path.read_text())
        document["plan"]["conditions"] = quick
        path.write_text(json.dumps(document))
        found = flow.pace(bundle, corridor.bench.model_copy(update={"after": before}))
        assert found.known == pytest.approx((times,))
        word = "slower" if times > 1 else "quicker"
        assert f"This machine is {word} now than at calibration" in terminal.pace_text(found, corridor.bench.checks)
    known = flow.pace(corridor.bundle, corridor.bench)
    assert known == pace(then, (before, after))
    assert len(known.known) == 2


def test_a_plan_for_another_device_knows_nothing_of_this_machines_speed(corridor: Corridor):
    _, _, own, _, _ = flow.open_calibration(corridor.calibration)
    assert flow.plan(corridor.calibration, Budget(), device=own).conditions == corridor.plan.conditions
    other = own.model_copy(update={"name": "another-board"})
    planned = flow.plan(corridor.calibration, Budget(), device=other)
    assert planned.conditions is None
    assert "conditions" not in json.loads(planned.canonical_json())


def test_the_report_is_one_page_that_loads_nothing(corridor: Corridor):
    page = (corridor.folder / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "<script src" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "digits-cnn" in page


def test_a_run_answers_every_image_at_an_exit_of_the_model(corridor: Corridor):
    stats = flow.run(corridor.bundle, corridor.images, limit=40)
    assert len(stats.requests) == 40
    assert {request.exit for request in stats.requests} <= {0, 1, 2}
    right = np.mean([request.prediction == request.label for request in stats.requests])
    assert right > 0.7


# --- resuming --------------------------------------------------------------------------------------------


def test_a_second_calibration_measures_nothing(corridor: Corridor):
    measured = ("mixes/", "sensitivity/", "ranges.json", "kernels.partial", "choose.npy", "labels.npy")
    before = {name: at for name, at in files_of(corridor.calibration).items() if name.startswith(measured)}
    table = (corridor.calibration / "table.json").read_bytes()
    candidates = (corridor.calibration / "candidates.json").read_bytes()
    flow.calibrate(corridor.model, corridor.images, corridor.calibration, device=this_machine(), mixes=MIXES)
    after = {name: at for name, at in files_of(corridor.calibration).items() if name.startswith(measured)}
    assert after == before
    assert (corridor.calibration / "table.json").read_bytes() == table
    assert (corridor.calibration / "candidates.json").read_bytes() == candidates


def test_only_what_is_missing_is_measured_again(corridor: Corridor, tmp_path: Path):
    """A killed run leaves a mix without its record, and a layer that was not tried."""
    copy = tmp_path / "calibration"
    shutil.copytree(corridor.calibration, copy)
    folder, _, _, _, _ = flow.open_calibration(copy)
    lost = next(mix for mix, record in folder.records().items() if record.role == "random")
    (copy / "mixes" / f"{lost}.json").unlink()
    (copy / "sensitivity" / "head.int8-static.npy").unlink()
    before = files_of(copy)
    flow.calibrate(corridor.model, corridor.images, copy, device=this_machine(), mixes=MIXES)
    after = files_of(copy)
    assert after.keys() - before.keys() == {f"mixes/{lost}.json", "sensitivity/head.int8-static.npy"}
    made = {name for name in after if after[name] != before.get(name) and name.startswith(("mixes/", "sensitivity/"))}
    assert made == {
        *(f"mixes/{lost}.{part}" for part in ("json", "choose.npy", "certify.npy")),
        "sensitivity/head.int8-static.npy",
        "sensitivity/baseline.npy",
    }


# --- deciding again ----------------------------------------------------------------------------------------


def test_a_new_budget_is_solved_in_under_a_second_and_writes_nothing(corridor: Corridor):
    before = files_of(corridor.folder)
    budgets = [wish(corridor.calibration, share) for share in (0.9, 0.75, 0.7)]
    flow.plan(corridor.calibration, budgets[0])  # libraries are imported once a process
    for budget in budgets:
        start = time.perf_counter()
        found = flow.plan(corridor.calibration, budget)
        assert time.perf_counter() - start < 1.0
        assert found.predicted.latency_s["mean"] <= budget.latency[0].limit_s
    assert files_of(corridor.folder) == before


def test_an_impossible_budget_is_answered_with_the_least_that_works(corridor: Corridor):
    with pytest.raises(InfeasibleError) as raised:
        flow.plan(corridor.calibration, Budget(memory_bytes={Tier.HOST: 1000}))
    assert raised.value.binding == ("memory",)
    least = int(raised.value.least["memory"])
    assert least > 1000
    assert (
        flow.plan(corridor.calibration, Budget(memory_bytes={Tier.HOST: least})).predicted.memory_bytes[Tier.HOST]
        == least
    )
    with pytest.raises(InfeasibleError):
        flow.plan(corridor.calibration, Budget(memory_bytes={Tier.HOST: least - 1}))


# --- refusals ----------------------------------------------------------------------------------------------


def shipped_table(corridor: Corridor) -> CostTable:
    """Return the table that the plan is about: one mix, its scenarios and the careful ones before them."""
    folder, _, _, table, candidates = flow.open_calibration(corridor.calibration)
    samples = len(folder.part("choose"))
    chosen = choose.pick(table, candidates.candidates, corridor.plan.budget, samples=samples)
    assert chosen is not None
    longer: choose.Pick = _with_safety(chosen, folder, corridor.plan.budget, candidates)
    return longer.table


def tampered(plan: Plan, **changes: object) -> Plan:
    return Plan.parse(json.dumps({**json.loads(plan.canonical_json()), **changes}), "plan.json")


def test_a_tampered_plan_is_caught(corridor: Corridor):
    plan = Plan.parse((corridor.folder / "plan.json").read_bytes(), "plan.json")
    table = shipped_table(corridor)
    assert check_plan(table, plan) == plan.predicted
    first = plan.choices[0]
    other = Precision.FP32 if first.option != Precision.FP32.value else Precision.INT8_STATIC
    choices = [{"subject": first.subject, "option": other.value}, *(one.model_dump() for one in plan.choices[1:])]
    for changes in (
        {"thresholds": [0.0] * (len(plan.thresholds) - 1) + [None]},
        {"choices": choices},
        {"predicted": {**json.loads(plan.predicted.canonical_json()), "disk_bytes": 1}},
        {"budget": {**json.loads(plan.budget.canonical_json()), "memory_bytes": {"host": 10}}},
    ):
        with pytest.raises(CheckFailedError):
            check_plan(table, tampered(plan, **changes))


@pytest.mark.parametrize("field", ["latency_interval_s", "accuracy", "threads", "notes"])
def test_a_promise_that_was_widened_by_hand_is_not_exported(corridor: Corridor, field: str):
    plan = corridor.plan
    wide = {name: one.model_dump() | {"high": 1.0} for name, one in plan.latency_interval_s.items()}
    changed = {"latency_interval_s": wide, "accuracy": 0.999, "threads": plan.threads + 1, "notes": ["kept"]}
    out = corridor.folder / "widened"
    with pytest.raises(InputError, match=f"planning again gives another {field} than the plan's"):
        flow.export(tampered(plan, **{field: changed[field]}), corridor.model, corridor.calibration, out)
    assert not out.exists()


def test_one_bit_flipped_in_the_program_is_caught_before_it_runs(corridor: Corridor):
    path = corridor.bundle / "program.pte"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    try:
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"program\.pte"):
            flow.run(corridor.bundle, corridor.images, limit=1)
    finally:
        path.write_bytes(whole)
    assert flow.run(corridor.bundle, corridor.images, limit=1).requests


def test_the_plan_of_another_model_is_refused_and_leaves_nothing(corridor: Corridor):
    other = corridor.folder / "other"
    fit(corridor.folder, other, epochs=1)
    with pytest.raises(InputError, match="the plan is for model"):
        flow.export(corridor.plan, other, corridor.calibration, corridor.folder / "never")
    assert not (corridor.folder / "never").exists()
    assert not list(corridor.folder.glob(".never*"))


def test_the_calibration_of_another_model_is_refused(corridor: Corridor):
    with pytest.raises(InputError, match="another weights_digest"):
        flow.calibrate(
            corridor.folder / "other", corridor.images, corridor.calibration, device=this_machine(), mixes=MIXES
        )
