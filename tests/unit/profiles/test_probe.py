from __future__ import annotations

import itertools
import statistics
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeflex.errors import DeviceError
from edgeflex.profiles import load, measure, memory_read, summarise
from edgeflex.profiles.probe import slug
from edgeflex.schema import DeviceProfile, Figure, LayerKind, Precision, Tier

PRECISIONS = {LayerKind.LINEAR: (Precision.FP32, Precision.INT8_DYNAMIC), LayerKind.CONV2D: (Precision.FP32,)}


def figure(value: float) -> Figure:
    return Figure(value=value, origin="measured", source="by hand")


def test_the_summary_is_median_and_interquartile_range_over_median():
    found = summarise([5.0, 1.0, 4.0, 2.0, 3.0], "by hand")
    assert found.value == 3.0
    assert found.spread == pytest.approx((4.0 - 2.0) / 3.0)


def test_one_sample_has_no_spread_and_none_is_refused():
    assert summarise([2.0], "by hand").spread is None
    with pytest.raises(DeviceError, match="0 samples"):
        summarise([], "by hand")


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30))
def test_the_summary_does_not_depend_on_order_and_has_no_negative_spread(samples):
    found = summarise(samples, "any")
    assert found == summarise(sorted(samples), "any")
    assert found.value == statistics.median(samples)
    assert (found.spread or 0.0) >= 0.0


def test_memory_rates_are_bytes_over_seconds_without_the_first_pass():
    # Passes of 1, 1/2, 1/4 and 1/2 s over 4096 bytes; the first is warm-up.
    times = iter(itertools.accumulate([0.0, 1.0, 0.0, 0.5, 0.0, 0.25, 0.0, 0.5]))
    found = memory_read(1, buffer_bytes=4096, passes=3, clock=lambda: next(times))
    assert found.value == 8192.0
    assert found.spread == pytest.approx(((8192.0 + 16384.0) / 2 - 8192.0) / 8192.0)


def test_memory_is_read_at_a_rate_that_no_cache_and_no_disk_has():
    found = memory_read(1, buffer_bytes=64 << 20, passes=3)
    assert 1e8 < found.value < 1e12


@pytest.mark.parametrize(
    ("text", "name"),
    [("AMD EPYC", "amd-epyc"), ("Cortex-X4 + Cortex-A720", "cortex-x4-cortex-a720"), ("Intel(R) N100", "intel-n100")],
)
def test_a_profile_is_named_after_the_processor(text, name):
    assert slug(text) == name


def test_a_quick_profile_is_whole_and_quick(tmp_path):
    start = time.monotonic()
    profile = measure(
        quick=True,
        threads=(1,),
        precisions=PRECISIONS,
        run_kernel=lambda job: [1e-9 * job.shape.macs] * 3,
        call_cost=lambda: (figure(2e-6), figure(3e-6)),
        backend="executorch-xnnpack",
        versions={"executorch": "1.5.1"},
        storage_folder=tmp_path / "probe",
        journal=tmp_path / "journal.jsonl",
    )
    assert time.monotonic() - start < 30
    assert profile.origin == "measured"
    assert profile.name == slug(profile.cpu_model or "unknown-machine")
    (host,) = [tier for tier in profile.tiers if tier.tier is Tier.HOST]
    assert host.read_bytes_per_s is not None
    assert host.read_one_thread_bytes_per_s is not None
    assert len(profile.storage) == 8
    assert len(profile.kernels) == 3
    assert profile.call_s == figure(2e-6)
    assert profile.delegate_s == figure(3e-6)
    assert profile.conditions["version_executorch"] == "1.5.1"
    assert "load_average_before" in profile.conditions
    assert "load_average_after" in profile.conditions
    if profile.overlap is None:
        assert any("beside each other was not measured: " in note for note in profile.notes)
    path = tmp_path / "device.json"
    path.write_text(profile.model_dump_json())
    assert load(str(path)) == profile
    assert DeviceProfile.parse(profile.canonical_json(), "itself").digest() == profile.digest()
