from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.reports import build_report, latency_statistic
from edgeflex.reports.build import measured_latency_s, quantile
from edgeflex.schema import Budget, Certificate, Check, LatencyLimit, Report, Tier


def verdict(report: Report, name: str) -> Check:
    return next(check for check in report.verdicts if check.name == name)


def test_a_quantile_is_the_least_sample_that_the_share_does_not_exceed():
    samples = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    assert [quantile(samples, share) for share in (0.05, 0.1, 0.11, 0.5, 0.9, 0.95, 1.0)] == [1, 1, 2, 5, 9, 10, 10]


def test_a_rank_does_not_jump_by_rounding():
    # 0.07 * 100 is 7.000000000000001 in floats
    assert quantile([float(i) for i in range(1, 101)], 0.07) == 7


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40), st.integers(1, 100))
def test_a_quantile_agrees_with_its_definition_by_counting(samples, percent):
    found = quantile(samples, percent / 100)
    reached = [value for value in samples if 100 * sum(s <= value for s in samples) >= percent * len(samples)]
    assert found == min(reached)


def test_statistics_of_four_samples_are_the_sums_made_by_hand():
    samples_s = (0.001, 0.004, 0.002, 0.003)
    found = [latency_statistic(samples_s, name) for name in ("mean", "p50", "p95", "p99", "worst")]
    assert found == pytest.approx([0.0025, 0.002, 0.004, 0.004, 0.004])


@pytest.mark.parametrize("statistic", ["mean", "p95"])
def test_a_statistic_of_nothing_is_refused(statistic):
    with pytest.raises(InputError, match="0 samples"):
        latency_statistic((), statistic)


def test_every_budget_is_joined_with_its_measurement(make_small):
    manifest = make_small.manifest()
    report = build_report(manifest, make_small.bench(manifest), make_small.verify(manifest), None)
    assert [(v.name, v.limit, v.promised, v.ok) for v in report.verdicts] == [
        ("memory", 1000, 800, True),
        ("mean latency", 0.003, 0.002, True),
        ("accuracy drop", 0.02, 0.01, False),
        ("program size", 700, 600, True),
    ]
    assert [v.measured for v in report.verdicts] == pytest.approx([900, 0.0025, 0.03, 600])
    assert report.title == "digits on a machine"


def test_what_was_not_measured_is_neither_met_nor_silent(make_small):
    report = build_report(make_small.manifest(), None, None, None)
    unmeasured = [v for v in report.verdicts if not v.was_measured]
    assert [v.name for v in unmeasured] == ["memory", "mean latency", "accuracy drop"]
    assert not any(v.ok for v in unmeasured)
    assert all("not measured" in v.note for v in unmeasured)


def test_a_run_stands_in_for_a_missing_benchmark_and_says_so(make_small):
    manifest = make_small.manifest()
    found = verdict(build_report(manifest, None, None, make_small.stats(manifest)), "mean latency")
    assert found.measured == pytest.approx(0.0015)
    assert "not a benchmark" in found.note
    assert "threads: 2, planned for 1" in found.note


def test_a_verification_of_no_image_measures_no_drop(make_small):
    manifest = make_small.manifest()
    verify = make_small.verify(manifest).model_copy(update={"images": 0})
    assert not verdict(build_report(manifest, None, verify, None), "accuracy drop").was_measured


@pytest.mark.parametrize(("low", "ok"), [(0.019, True), (0.021, False)])
def test_a_drop_breaks_its_budget_only_beyond_what_the_sample_can_err(make_small, low, ok):
    manifest = make_small.manifest()
    check = Check(
        name="accuracy drop", unit="share", limit=0.02, promised=0.01, measured=0.03, low=low, high=0.05, ok=ok
    )
    verify = make_small.verify(manifest).model_copy(update={"checks": (check,)})
    assert verdict(build_report(manifest, None, verify, None), "accuracy drop").ok is ok


def test_a_percentile_of_few_samples_is_marked(make_small):
    budget = Budget(latency=(LatencyLimit(limit_s=0.005, statistic="p99"),))
    manifest = make_small.manifest(budget=budget)
    found = verdict(build_report(manifest, make_small.bench(manifest), None, None), "p99 latency")
    assert found.measured == 0.004
    assert found.promised == 0.005  # nothing was predicted, so the budget is the promise
    assert "too few to tell p99" in found.note


def test_the_benchmarks_own_statistic_goes_before_raw_samples(make_small):
    bench = make_small.bench(make_small.manifest()).model_copy(update={"latency_s": {"mean": 0.0021}})
    assert measured_latency_s(bench, "mean") == 0.0021
    assert measured_latency_s(bench, "worst") == 0.004


def test_an_accelerators_memory_is_not_read_from_the_process(make_small):
    manifest = make_small.manifest(budget=Budget(memory_bytes={Tier.DEVICE: 1000}))
    assert verdict(build_report(manifest, make_small.bench(manifest), None, None), "vram").measured == 900
    other = manifest.model_copy(update={"backend": "tensorrt"})
    assert not verdict(build_report(other, make_small.bench(other), None, None), "vram").was_measured


@pytest.mark.parametrize(
    ("memory_of", "name", "measured"), [("gpu", "GPU memory", 700), ("shared", "memory shared by CPU and GPU", 1600)]
)
def test_a_gpus_memory_is_the_drivers_and_one_memory_is_counted_whole(make_small, memory_of, name, measured):
    manifest = make_small.manifest(memory_of=memory_of).model_copy(update={"backend": "tensorrt"})
    changes = {"device_memory_bytes": 700, "unified_memory": memory_of == "shared"}
    bench = make_small.bench(manifest).model_copy(update=changes)
    found = verdict(build_report(manifest, bench, None, None), name)
    assert (found.measured, found.ok) == (measured, measured <= 1000)
    assert not verdict(build_report(manifest, None, None, None), name).was_measured


def test_flash_is_the_sum_of_all_files(make_small):
    manifest = make_small.manifest(budget=Budget(memory_bytes={Tier.FLASH: 649}))
    found = verdict(build_report(manifest, None, None, None), "flash")
    assert (found.measured, found.ok) == (650, False)


def test_without_a_prediction_the_certificates_drop_is_the_promise(make_small):
    certificate = Certificate(
        test="t",
        drop_limit=0.02,
        confidence=0.95,
        samples=9,
        candidates=1,
        certified_index=0,
        drop=0.004,
        drop_upper_bound=0.01,
    )
    manifest = make_small.manifest(predicted_drop=None, certificate=certificate)
    assert verdict(build_report(manifest, None, None, None), "accuracy drop").promised == 0.004


def test_results_of_another_bundle_are_refused_all_at_once(make_small):
    manifest, other = make_small.manifest(), make_small.manifest(name="other")
    with pytest.raises(InputError) as caught:
        build_report(manifest, make_small.bench(other), make_small.verify(manifest), make_small.stats(other))
    text = str(caught.value)
    assert "2 faults" in text
    assert "bench" in text
    assert other.digest()[:12] in text
    assert manifest.digest()[:12] in text


def test_a_report_survives_its_own_json(rich_report):
    assert Report.parse(rich_report.canonical_json(), "report.json") == rich_report
