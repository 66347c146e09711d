"""Machines that are not at hand: rooflines by hand, what is missing is named, and the interval holds its middle."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeflex.errors import InputError
from edgeflex.runtimes.boards import ExpertShape, curves_of, simulate_device
from edgeflex.runtimes.synthetic import Routing, synthetic_trace
from edgeflex.schema import ComputeRate, DeviceProfile, Figure, Link, Overlap, Precision, StorageRead, Tier, TierSpec
from edgeflex.schema_moe import DeviceSimulation

SHAPE = ExpertShape(size_bytes=4_500_000, macs=8_000_000)


def figure(value: float, origin="measured", spread=None) -> Figure:
    return Figure(value=value, origin=origin, source="a test", spread=spread)


def device(**changes) -> DeviceProfile:
    parts = {
        "name": "box",
        "title": "A box",
        "origin": "measured",
        "tiers": (
            TierSpec(tier=Tier.DEVICE, read_bytes_per_s=figure(1e12)),
            TierSpec(tier=Tier.HOST, read_bytes_per_s=figure(6e10)),
        ),
        "links": (Link(source=Tier.HOST, target=Tier.DEVICE, pinned=True, bytes_per_s=figure(2.4e10)),),
        "compute": (ComputeRate(engine="gpu", precision="fp16", ops_per_s=figure(1e14)),),
    }
    return DeviceProfile(**(parts | changes))


def test_an_expert_takes_its_launch_and_the_longer_of_bytes_and_operations():
    curves = curves_of(device(), SHAPE).curves
    assert curves.gpu_s(1) == pytest.approx(6e-6 + 4.5e-6)
    assert curves.cpu_s(1) == pytest.approx(8e-6 + 75e-6)
    assert curves.gpu_s(256) == pytest.approx(6e-6 + 256 * 16e6 / 1e14)
    assert curves.link_s(4_500_000) == pytest.approx(8e-6 + 187.5e-6)
    # 84 GB/s are asked of 60
    assert curves.cpu_beside_link == pytest.approx(1.4)
    assert curves_of(device(), replace(SHAPE, cpu_in_slices=1.1)).curves.in_slices().cpu_s(1) == 1.1 * curves.cpu_s(1)


def test_a_data_sheets_rate_is_not_reached_and_a_measured_one_is_within_its_spread():
    printed = device(tiers=(
        TierSpec(tier=Tier.DEVICE, read_bytes_per_s=figure(1e12, "datasheet")),
        TierSpec(tier=Tier.HOST, read_bytes_per_s=figure(6e10, spread=0.25)),
    ))  # fmt: skip
    gpu = [curves_of(printed, SHAPE, end=end).curves.gpu_s(1) for end in ("slow", "likely", "fast")]
    assert gpu == pytest.approx([12e-6 + 4.5e-6 / 0.6, 6e-6 + 4.5e-6 / 0.8, 3e-6 + 4.5e-6 / 0.95])
    assert curves_of(printed, SHAPE, end="slow").curves.cpu_s(1) == pytest.approx(16e-6 + 75e-6 * 1.25)


def test_what_was_measured_side_by_side_goes_before_what_the_rates_let_expect():
    overlap = Overlap(link_beside_cpu=figure(1.3, spread=0.1), cpu_beside_link=figure(1.1))
    known = device(overlap=overlap)
    curves = {end: curves_of(known, SHAPE, end=end).curves for end in ("slow", "likely", "fast")}
    assert [one.link_beside_cpu for one in curves.values()] == pytest.approx([1.43, 1.3, 1.3 / 1.1])
    assert [one.cpu_beside_link for one in curves.values()] == pytest.approx([1.155, 1.1, 1.1 / 1.05])
    half = device(overlap=Overlap(link_beside_cpu=figure(1.01)))
    assert curves_of(half, SHAPE, end="fast").curves.link_beside_cpu == 1.0
    assert curves_of(half, SHAPE).curves.cpu_beside_link == pytest.approx(1.4), "by the rates, as before"
    assert "overlap" not in device().canonical_json(), "profiles without it keep their digests"
    assert DeviceProfile.parse(known.canonical_json(), "itself") == known


def test_every_rate_that_is_missing_is_named_and_may_be_given():
    card = device(tiers=device().tiers[:1], links=())
    with pytest.raises(InputError, match="2 faults") as caught:
        curves_of(card, SHAPE)
    assert "RAM" in str(caught.value)
    curves = curves_of(card, SHAPE, ram_bytes_per_s=5e10, link_bytes_per_s=1e10).curves
    assert curves.cpu_s(1) == pytest.approx(8e-6 + 90e-6)
    assert curves.link_bytes_per_s == 1e10


def test_one_memory_for_both_is_refused_with_the_reason():
    with pytest.raises(InputError, match="one memory"):
        curves_of(device(unified_memory=True), SHAPE)


def test_a_simulation_has_an_interval_a_bound_and_the_published_rules_beside_it():
    trace = synthetic_trace("zipf", Routing(4, 32, 4, 40, 3))
    found = simulate_device(trace, device(), vram_bytes=150_000_000, precision=Precision.INT4_GROUP32)
    assert found.decode_tokens == 30
    assert found.bound_token_s < found.token_s.low < found.token_s.value < found.token_s.high
    assert found.tokens_per_s.value == pytest.approx(1 / found.token_s.value)
    assert found.tokens_per_s.low < found.tokens_per_s.value < found.tokens_per_s.high
    assert set(found.rival_token_s) == {"hybrimoe", "fiddler", "lru", "static"}
    assert DeviceSimulation.parse(found.canonical_json(), "it") == found


def test_experts_in_flash_need_its_rate():
    trace = synthetic_trace("zipf", Routing(4, 16, 2, 24))

    def simulated(on):
        return simulate_device(
            trace, on, vram_bytes=60_000_000, ram_bytes=150_000_000, precision=Precision.INT4_GROUP32
        )

    with pytest.raises(InputError, match="flash"):
        simulated(device())
    disk = StorageRead(pattern="random", block_bytes=1 << 20, queue_depth=8, direct=True, bytes_per_s=figure(3e9))
    found = simulated(device(storage=(disk,)))
    assert found.flash_bytes > 0
    assert "hybrimoe" not in found.rival_token_s


def test_a_trace_without_decoding_is_refused():
    trace = synthetic_trace("zipf", Routing(2, 8, 2, 4))
    trace.phase[:] = 0
    with pytest.raises(InputError, match="no decoded token"):
        simulate_device(trace, device(), vram_bytes=60_000_000, precision=Precision.FP16)
