"""Plans for a GPU by the real cache and scheduler in virtual time: what is chosen, assumed, and refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from edgeflex.errors import InputError
from edgeflex.flow.device_plans import completed, this_gpu
from edgeflex.flow.simulated_device import SimulatedDevice, of_calibrated_computer, trimmed
from edgeflex.flow.traces import Replays
from edgeflex.plans.decoder_device import Division, Serving
from edgeflex.plans.decoder_gpu import origin_of, plan_on_gpu
from edgeflex.plans.decoder_gpu_memory import slot_bytes
from edgeflex.plans.decoder_gpu_search import RESIDENT, SERVINGS, crossing
from edgeflex.profiles import load
from edgeflex.profiles.cuda import CudaFacts
from edgeflex.runtimes import synthetic
from edgeflex.runtimes.division import cpu_in_slices
from edgeflex.runtimes.strategies import Strategy
from edgeflex.runtimes.virtual import first_judged_step, popular, run_virtual
from edgeflex.schema import ComputeRate, Conditions, DeviceProfile, Link, StorageRead, Tier, TierSpec
from edgeflex.schema_moe import DecoderBudget
from tests import plan_samples
from tests.plan_samples import INT4, INT8, calibration_of, expert_shapes, figure, packed_bytes

CACHE, LISTED, CPU, LRU = SERVINGS


def graph_of(layers=3, experts=12, top_k=2):
    return plan_samples.graph_of(layers, experts, top_k, hidden=1024, inner=512, heads=8, vocabulary=512)


PAIR = expert_shapes(graph_of())


def rates_of(device="a processor", threads=(1, 4)):
    def seconds(precision, rows, columns, rows_in, count):
        return packed_bytes(precision, rows, columns) * (1 + rows_in / 16) / (2e10 * count**0.5)

    return plan_samples.rates_of(
        graph_of(),
        seconds,
        rows_in=(1, 16, 64),
        threads=threads,
        device=device,
        read_bytes_per_s=2e9,
        memory_bytes_per_s=6e10,
    )


@dataclass(frozen=True)
class Columns:
    """A recorded routing, as calibration keeps it."""

    turn: np.ndarray
    phase: np.ndarray
    step: np.ndarray
    layer: np.ndarray
    iter: np.ndarray
    slot: np.ndarray
    expert: np.ndarray
    weight: np.ndarray

    def uses(self, layers, experts):
        rows = self.phase == 1
        flat = np.bincount(self.layer[rows] * experts + self.expert[rows], minlength=layers * experts)
        return flat.reshape(layers, experts) / max(1, len(np.unique(self.step[rows])))


def routing_of(graph, kind="markov", tokens=96, prompt=16, seed=0, **more):
    one = graph.layers[0].routing
    asked = synthetic.Routing(len(graph.layers), one.experts, one.top_k, tokens, prompt, **more)
    trace = synthetic.synthetic_trace(kind, asked, seed=seed)
    names = ("turn", "phase", "step", "layer", "iter", "slot", "expert", "weight")
    return Columns(**{name: getattr(trace, name) for name in names})


def box(**changes):
    disk = StorageRead(pattern="random", block_bytes=1 << 20, queue_depth=8, direct=True, bytes_per_s=figure(3e9))
    parts = {
        "name": "box",
        "title": "A box",
        "origin": "measured",
        "tiers": (
            TierSpec(tier=Tier.DEVICE, read_bytes_per_s=figure(1e12)),
            TierSpec(tier=Tier.HOST, read_bytes_per_s=figure(6e10)),
        ),
        "links": (Link(source=Tier.HOST, target=Tier.DEVICE, pinned=True, bytes_per_s=figure(2.4e10)),),
        "storage": (disk,),
        "compute": (ComputeRate(engine="gpu", precision="fp16", ops_per_s=figure(1e14)),),
        "cpu_model": "a processor",
    }
    return DeviceProfile(**(parts | changes))


def device_of(graph=None, routing=None, profile=None, **changes):
    known = graph or graph_of()
    recorded = routing or routing_of(known)
    rates = rates_of()
    most = known.layers[0].routing.experts
    return SimulatedDevice(
        known,
        rates,
        completed(profile or box(), rates),
        Replays(known, recorded, 16),
        recorded.uses(len(known.layers), most),
        16,
        **changes,
    )


def sizes_of(graph, precision=INT4):
    return np.full((len(graph.layers), graph.layers[0].routing.experts), slot_bytes(precision, PAIR), dtype=np.int64)


def plan_of(device, **limits):
    return plan_on_gpu(
        calibration_of(device.graph, kl=0.01),
        device.rates,
        DecoderBudget(**{"prompt_tokens": 16, "context_tokens": 64, **limits}),
        device.described(),
        packed_bytes=packed_bytes,
        uses=device.uses,
        precisions=(INT8, INT4),
        clock=lambda: 0.0,
    )


def beside_bytes(device):
    """Return what the GPU holds without experts."""
    everything = plan_of(device, vram_bytes=1 << 33)
    return everything.gpu.memory.total_bytes - everything.gpu.vram_cache_bytes


# --- its curves --------------------------------------------------------------------------------------------


def test_what_slices_cost_the_processor_is_the_mean_over_the_experts_precisions_by_their_use():
    device = device_of()
    sizes = sizes_of(device.graph, INT4)
    assert device._machine(sizes, "likely").curves.cpu_in_slices == cpu_in_slices(INT4)
    sizes[0] = slot_bytes(INT8, PAIR)
    share = device.uses[0].sum() / device.uses.sum()
    expected = share * cpu_in_slices(INT8) + (1.0 - share) * cpu_in_slices(INT4)
    assert device._machine(sizes, "slow").curves.cpu_in_slices == pytest.approx(expected)
    assert 0.0 < share < 1.0


# --- what is chosen ----------------------------------------------------------------------------------------


def test_the_plan_is_the_quickest_of_its_grid_run_through_the_virtual_device_by_hand():
    device = device_of(most_uses=4000)
    sizes = sizes_of(device.graph)
    total = int(sizes.sum())
    plan = plan_of(device, vram_bytes=beside_bytes(device) + total // 2)
    trace = trimmed(device.replays.trace(64), 4000)
    first = first_judged_step(trace)
    strategies = {CACHE: Strategy("ours", horizon=8.0), LISTED: Strategy("ours", static=True), CPU: Strategy("static"),
                  LRU: Strategy("lru")}  # fmt: skip
    machine = device._machine(sizes, "likely")
    by_hand = {
        serving: run_virtual(
            trace, machine, strategy, vram_bytes=plan.gpu.vram_cache_bytes, ram_bytes=total, sizes=sizes,
            order=popular(trace, first), first_step=first,
        ).mean_s
        for serving, strategy in strategies.items()
    }  # fmt: skip
    chosen = Serving(plan.gpu.placement, plan.gpu.policy, plan.gpu.rule)
    assert plan.predicted.token_s.value == min(by_hand.values()) == by_hand[chosen]
    assert {(one.placement, one.policy): one.token_s for one in plan.gpu.trials} == {
        (serving.placement, serving.policy): seconds for serving, seconds in by_hand.items()
    }


@pytest.mark.slow
def test_the_crossing_is_found_from_the_trace_and_the_plan_follows_it():
    graph = graph_of(layers=4, experts=24, top_k=2)
    device = device_of(graph, routing_of(graph, "zipf", tokens=200, exponent=1.5), most_uses=4000)
    sizes = sizes_of(graph)
    total = int(sizes.sum())
    crossed = crossing(device, sizes, total)
    assert crossed is not None
    assert 0.2 < crossed < 0.95
    beside = beside_bytes(device)
    low = plan_of(device, vram_bytes=beside + int(0.2 * total))
    assert low.gpu.placement == "cache"
    assert any("a fixed list is as quick or quicker from" in reason for reason in low.reasons)
    high = [plan_of(device, vram_bytes=beside + int(share * total)) for share in (0.65, 0.8, 0.9) if share >= crossed]
    assert "static" in {plan.gpu.placement for plan in high}
    for plan in high:
        seconds = {one.placement: one.token_s for one in plan.gpu.trials if one.policy != "lru"}
        assert seconds["static"] <= 1.005 * seconds["cache"]


@pytest.mark.slow
def test_more_memory_of_the_gpu_never_makes_the_prediction_slower():
    device = device_of(most_uses=3000)
    beside, total = beside_bytes(device), int(sizes_of(device.graph).sum())
    found = [
        plan_of(device, vram_bytes=beside + int(share * total)).predicted.token_s.value
        for share in (0.15, 0.3, 0.5, 0.8, 1.0)
    ]
    assert found == sorted(found, reverse=True)


@pytest.mark.slow
def test_memories_that_hold_all_but_a_part_read_it_from_flash():
    device = device_of(most_uses=3000)
    beside, total = beside_bytes(device), int(sizes_of(device.graph).sum())
    rich = plan_of(device, vram_bytes=beside + total // 4)
    host = rich.predicted.memory.total_bytes - rich.predicted.memory.cache_bytes
    poor = plan_of(device, vram_bytes=beside + total // 4, memory_bytes=host + total // 2)
    assert rich.gpu.flash_bytes == 0
    assert poor.gpu.flash_bytes > 0
    assert poor.predicted.bytes_per_token == poor.gpu.flash_bytes
    assert poor.predicted.memory.total_bytes <= host + total // 2
    assert poor.predicted.token_s.value > rich.predicted.token_s.value


def test_an_interval_holds_its_value_and_the_bound_lies_below():
    device = device_of(most_uses=3000)
    plan = plan_of(device, vram_bytes=beside_bytes(device) + int(sizes_of(device.graph).sum()) // 3)
    said = plan.predicted
    for one in (said.token_s, said.first_token_s):
        assert one.low < one.value < one.high
    assert 0 < said.bound_token_s <= said.token_s.value
    assert set(plan.gpu.waited) == {"gpu", "cpu", "link", "disk"}


def test_a_data_sheets_card_has_a_wider_interval_than_a_measured_one():
    def width(origin):
        tiers = tuple(
            TierSpec(tier=tier, read_bytes_per_s=figure(rate, origin))
            for tier, rate in ((Tier.DEVICE, 1e12), (Tier.HOST, 6e10))
        )
        link = Link(source=Tier.HOST, target=Tier.DEVICE, bytes_per_s=figure(2.4e10, origin))
        device = device_of(profile=box(tiers=tiers, links=(link,)), most_uses=3000)
        sizes = sizes_of(device.graph)
        found = device.interval(sizes, Division(int(sizes.sum()) // 3, int(sizes.sum())), CACHE)
        return found.high / found.low

    assert width("datasheet") > width("measured")


def test_a_cache_reads_its_first_prompt_from_flash_and_a_fixed_list_was_read_before():
    device = device_of(most_uses=3000)
    sizes = sizes_of(device.graph)
    division = Division(int(sizes.sum()) // 2, int(sizes.sum()))
    read = device.first_token(sizes, division, CACHE, 16).value - device.first_token(sizes, division, LISTED, 16).value
    prompt = device.replays.first_prompt(16)
    used = {(int(layer), int(expert)) for layer, expert in zip(prompt.layer, prompt.expert, strict=True)}
    assert read == pytest.approx(len(used) * int(sizes[0, 0]) / 3e9, rel=0.3)


# --- what it rests on ----------------------------------------------------------------------------------------


def test_the_processors_experts_take_what_calibration_measured_with_its_quickest_threads():
    device = device_of()
    sizes = sizes_of(device.graph)
    machine = device._machine(sizes, "likely")
    seconds = sum(packed_bytes(INT4, *shape) for shape in PAIR) * (1 + 1 / 16) / (2e10 * 2)
    assert device.threads == 4
    assert machine.curves.cpu_s(1) == pytest.approx(seconds + 15e-6)
    slow, fast = (device._machine(sizes, end).curves.cpu_s(1) for end in ("slow", "fast"))
    assert (slow, fast) == pytest.approx((1.1 * seconds + 30e-6, 0.9 * seconds + 7.5e-6))
    elsewhere = device_of(profile=box(cpu_model="another", cores=6))
    assert elsewhere.threads == 6
    assert elsewhere._machine(sizes, "likely").curves.cpu_s(1) != pytest.approx(seconds)


def test_a_card_alone_stands_in_the_computer_that_calibrated_and_every_figure_says_where_it_is_from():
    card, rates = load("rtx-4090"), rates_of()
    assert of_calibrated_computer(card, rates)
    whole = completed(card, rates)
    host = next(one for one in whole.tiers if one.tier is Tier.HOST)
    assert host.read_bytes_per_s is not None
    assert (host.read_bytes_per_s.value, host.read_bytes_per_s.origin) == (6e10, "measured")
    assert whole.links[0].bytes_per_s.origin == "datasheet"
    assert "PCI Express" in whole.links[0].bytes_per_s.source
    assert whole.storage[0].bytes_per_s.value == 2e9
    assert origin_of(whole) == "datasheet"
    assert completed(whole, rates) == whole
    assert completed(card, rates, link_given=True).links == ()


def test_another_computers_disk_is_never_called_measured():
    whole = completed(box(cpu_model="another", storage=()), rates_of())
    assert whole.storage[0].bytes_per_s.origin == "datasheet"
    assert "stands in" in whole.storage[0].bytes_per_s.source


def test_a_machine_whose_rates_are_missing_is_refused_by_name():
    bare = box(cpu_model="another", tiers=box().tiers[:1])
    with pytest.raises(InputError, match="RAM"):
        device_of(profile=bare).described()
    assert device_of(profile=bare, ram_bytes_per_s=5e10).described().given_ram_bytes_per_s == 5e10


def test_a_board_with_one_memory_is_planned_with_one_tier():
    device = device_of(profile=load("jetson-agx-orin-64gb"), most_uses=3000)
    total = int(sizes_of(device.graph).sum())
    everything = plan_of(device, vram_bytes=1 << 34, memory_bytes=1 << 34)
    held = everything.gpu.memory.total_bytes - everything.gpu.vram_cache_bytes
    plan = plan_of(device, vram_bytes=held + total // 2, memory_bytes=1 << 34)
    assert plan.gpu.one_memory
    assert plan.gpu.ram_cache_bytes == 0
    assert plan.gpu.flash_bytes > 0
    assert any("gains nothing" in one for one in plan.reasons)
    assert plan.gpu.origin == "datasheet"


def test_without_a_gpu_and_without_a_name_the_refusal_says_what_to_name(monkeypatch):
    monkeypatch.setattr("edgeflex.profiles.cuda.cuda_problem", lambda: "no NVIDIA driver")
    with pytest.raises(InputError, match="--device rtx-4090"):
        this_gpu()


def test_the_gpu_of_this_machine_is_planned_for_as_measured(monkeypatch):
    tier, link = box().tiers[0], box().links[0]
    facts = CudaFacts(name="A card", isa="sm_90", integrated=False, tier=tier, links=(link,), compute=box().compute)
    monkeypatch.setattr("edgeflex.profiles.cuda.cuda_problem", lambda: None)
    monkeypatch.setattr("edgeflex.profiles.cuda.cuda", lambda: facts)
    here = this_gpu()
    assert (here.name, here.origin, here.unified_memory) == ("this-machine", "measured", False)
    whole = completed(here, rates_of(here.cpu_model or "a processor"))
    assert origin_of(whole) == "measured"
    assert whole.storage[0].bytes_per_s.origin == "measured"


# --- the part of the trace ---------------------------------------------------------------------------------


def test_a_long_trace_is_cut_between_tokens_and_keeps_its_prompt():
    graph = graph_of()
    trace = Replays(graph, routing_of(graph, tokens=200), 16).trace(64)
    short = trimmed(trace, 400)
    assert len(short.step) < len(trace.step) / 2
    assert (short.phase == 0).sum() == (trace.phase == 0).sum()
    assert short.decode_tokens > 10
    counts = {(event.step, event.layer): len(event.experts) for event in short.events if event.decoding}
    assert set(counts.values()) == {2}
    whole = trimmed(trace, 10**9)
    assert (whole.step == trace.step).all()


def test_texts_are_kept_whole_as_far_as_they_fit():
    graph = graph_of()
    trace = Replays(graph, routing_of(graph, tokens=48), 16).trace(64)
    again = {name: np.concatenate([getattr(trace, name)] * 2) for name in ("phase", "step", "layer", "iter", "slot",
                                                                          "expert", "weight")}  # fmt: skip
    turns = np.repeat([0, 1], len(trace.step))
    fields: dict[str, Any] = {"turn": turns, **again}
    two = replace(trace, **fields)
    kept = trimmed(two, len(trace.step))
    assert set(kept.turn.tolist()) == {0}
    assert len(kept.step) == len(trace.step)
    assert RESIDENT.placement == "resident"


def test_a_plan_for_a_gpu_carries_no_speed_of_the_computer_that_calibrated():
    device = device_of(most_uses=4000)
    device.rates = device.rates.model_copy(update={"conditions": Conditions(arithmetic_s=1e-3)})
    plan = plan_of(device, vram_bytes=1 << 33)
    assert plan.conditions is None
    assert plan.canonical_json().count("arithmetic_s") == 0
