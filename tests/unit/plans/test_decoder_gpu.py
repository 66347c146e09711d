"""The planner for machines with a GPU against full enumeration, hand sums, and what must hold whatever the numbers.

The device is a table of formulas with noise: what is tested is the search, the memories, the refusals and the recount.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import CheckFailedError, InfeasibleError, InputError
from edgeflex.plans import decoder_costs as costs
from edgeflex.plans.decoder_device import DeviceBound, DevicePoint, Division
from edgeflex.plans.decoder_gpu import Machine, plan_on_gpu
from edgeflex.plans.decoder_gpu_audit import GpuGround, check_gpu_plan
from edgeflex.plans.decoder_gpu_memory import (
    CONTEXT_BYTES,
    HOST_LIBRARY_BYTES,
    LIBRARY_BYTES,
    Holdings,
    device_space,
    slot_bytes,
)
from edgeflex.plans.decoder_gpu_search import RESIDENT, SERVINGS, GpuSearch, arenas, crossing
from edgeflex.plans.decoder_mixes import pool
from edgeflex.plans.decoder_verdict import DeclinedError
from edgeflex.schema import ComputeRate, DeviceProfile, Interval, Link, Tier, TierSpec
from edgeflex.schema_moe import DecoderBudget, DecoderPlan
from tests import plan_samples
from tests.plan_samples import INT4, INT8, figure, graph_of, packed_bytes

MIB = 1 << 20


def calibration_of(graph, seed=0):
    return plan_samples.calibration_of(graph, seed, least=1e-5)


def rates_of(graph):
    return plan_samples.rates_of(graph, lambda precision, rows, columns, rows_in, count: 1e-5 * rows_in)


def profile_of(origin="measured", *, unified=False):
    return DeviceProfile(
        name="box",
        title="A box",
        origin=origin,
        unified_memory=unified,
        tiers=(
            TierSpec(tier=Tier.DEVICE, read_bytes_per_s=figure(1e12, origin)),
            TierSpec(tier=Tier.HOST, read_bytes_per_s=figure(6e10)),
        ),
        links=(Link(source=Tier.HOST, target=Tier.DEVICE, bytes_per_s=figure(2e10)),),
        compute=(ComputeRate(engine="gpu", precision="fp16", ops_per_s=figure(1e14)),),
    )


@dataclass
class FormulaDevice:
    """Seconds from the share of bytes on the GPU and in RAM; every serving with a cost of its own, and noise.

    ``noise`` is a share drawn from a digest of the question, so that equal questions have equal answers.
    """

    most_runs: int = 100_000
    noise: float = 0.0
    asked: int = 0
    known: dict[object, DevicePoint] = field(default_factory=dict)

    def point(self, sizes, division, serving):
        key = (sizes.tobytes(), division, serving)
        if key not in self.known:
            self.asked += 1
            self.known[key] = self._point(sizes, division, serving)
        return self.known[key]

    def _point(self, sizes, division, serving):
        total = float(sizes.sum())
        share = min(1.0, division.vram_bytes / total)
        below = division.ram_bytes + (division.vram_bytes if division.exclusive else 0)
        lost = max(0.0, 1.0 - max(share, min(1.0, below / total)))
        hits = {"reuse": share**0.6, "static": share**0.8, "lru": share}[serving.policy]
        missed = {"auto": 3.0, "upload": 6.0, "static": 3.5}[serving.rule]
        moved = 0.4 if serving.policy == "reuse" and serving is not RESIDENT else 0.0  # what copying ahead disturbs
        mean = total / np.count_nonzero(sizes)
        seconds = 1e-4 + mean * 1e-9 * (1 + moved * share + missed * (1 - hits) + 40 * lost)
        digest = zlib.crc32(repr((sizes.tobytes(), division, serving)).encode()) / 2**32
        if serving is not RESIDENT:
            seconds *= 1.0 + self.noise * digest
        return DevicePoint(seconds, hits, mean * (1 - hits), 0.0, mean * lost, {"gpu": 0.5, "cpu": 0.5})

    def interval(self, sizes, division, serving):
        value = self.point(sizes, division, serving).token_s
        return Interval(value=value, low=0.7 * value, high=1.6 * value)

    def first_token(self, sizes, division, serving, chunk_tokens):
        value = self.point(sizes, division, serving).token_s * (2 + 16 / chunk_tokens)
        return Interval(value=value, low=0.7 * value, high=1.6 * value)

    def bound(self, sizes, division):
        return DeviceBound(5e-5, 0.9)

    def estimate_s(self, sizes, division):
        return min(self._point(sizes, division, one).token_s for one in SERVINGS)


def space_of(graph, seed=0):
    plain = costs.build_space(calibration_of(graph, seed), rates_of(graph), packed_bytes, precisions=(INT8, INT4))
    return device_space(plain, gpu_bytes_per_s=1e12, link_bytes_per_s=2e10)


def holdings_of(graph, budget, seed=0):
    return Holdings(space_of(graph, seed), budget.context_tokens, rates_of(graph).runtime_bytes)


def budget_of(**changes):
    return DecoderBudget(**{"prompt_tokens": 16, "context_tokens": 64, "vram_bytes": 700 * MIB, **changes})


def machine_of(device, *, unified=False, origin="measured", graph=None):
    known: Any = graph or graph_of()
    order = [(layer, expert) for expert in range(known.layers[0].routing.experts) for layer in range(len(known.layers))]
    return Machine(
        profile=profile_of(origin, unified=unified),
        device=device,
        gpu_bytes_per_s=1e12,
        link_bytes_per_s=2e10,
        one_memory=unified,
        threads=1,
        order=order,
        assumptions=("a test's",),
    )


def plan_of(graph, budget, device=None, *, seed=0, **machine):
    return plan_on_gpu(
        calibration_of(graph, seed),
        rates_of(graph),
        budget,
        machine_of(device or FormulaDevice(), graph=graph, **machine),
        packed_bytes=packed_bytes,
        precisions=(INT8, INT4),
        clock=lambda: 0.0,
    )


def ground_of(graph, device=None, seed=0):
    return GpuGround(
        calibration=calibration_of(graph, seed),
        rates=rates_of(graph),
        device=device or FormulaDevice(),
        packed_bytes=packed_bytes,
        uses=None,
        activations_bytes=lambda chunk: costs.activations_bytes(graph, chunk),
    )


def beside_bytes(graph, budget, chunk=16):
    """Return the GPU's bytes without experts, and the process's without a tier."""
    held = holdings_of(graph, budget)
    smallest = min(pool(held.space, None), key=lambda one: one.experts_bytes)
    return held.gpu(0, chunk).total_bytes, held.host(smallest, 0, chunk).total_bytes, smallest


# --- the search ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.15, 0.4, 0.75, 1.0])
def test_the_chosen_setting_is_the_quickest_of_the_whole_grid(seed, share):
    graph = graph_of(layers=2, experts=6)
    gpu, host, smallest = beside_bytes(graph, budget_of())
    vram = gpu + int(share * smallest.experts_bytes)
    for memory in (None, host + smallest.experts_bytes // 2, host + 40_000):
        budget, device = budget_of(vram_bytes=vram, memory_bytes=memory), FormulaDevice(noise=0.1)
        plan = plan_of(graph, budget, device, seed=seed)
        search = GpuSearch(holdings_of(graph, budget, seed), device, budget, (16,))
        least = min(
            device.point(mix.sizes, division, serving).token_s
            for mix, divisions in search.likely_mixes()
            for division in divisions
            for serving in ([RESIDENT] if division.vram_bytes >= mix.experts_bytes else SERVINGS)
        )
        assert plan.predicted.token_s.value == least


def test_every_division_that_fits_is_in_the_grid_and_none_that_does_not():
    graph = graph_of(layers=2, experts=6)
    gpu, host, smallest = beside_bytes(graph, budget_of())
    total, largest = smallest.experts_bytes, int(smallest.sizes.max())
    ram = total // 2 // 4096 * 4096
    budget = budget_of(vram_bytes=gpu + total // 3, memory_bytes=host - 4 * largest + ram)
    found = GpuSearch(holdings_of(graph, budget), FormulaDevice(), budget, (16,)).divisions(smallest)
    allowed = [one for one in arenas(smallest) if one <= total // 3]
    assert {one.vram_bytes for one in found} == set(allowed)
    for arena in allowed:
        kinds = {(one.ram_bytes, one.exclusive) for one in found if one.vram_bytes == arena}
        assert (ram, True) in kinds
        assert ((ram, False) in kinds) == (ram >= arena + largest)


def test_arenas_begin_with_all_experts_and_end_with_one():
    smallest = beside_bytes(graph_of(layers=2, experts=6), budget_of())[2]
    found = arenas(smallest)
    assert (found[0], found[-1]) == (smallest.experts_bytes, int(smallest.sizes.max()))
    assert all(small < large for large, small in itertools.pairwise(found))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.floats(0.05, 1.2), st.floats(0.0, 1.2), st.sampled_from(["latency", "kl", "memory"]))
def test_no_plan_exceeds_a_budget_and_every_plan_survives_the_recount(seed, share, below, minimize):
    graph = graph_of(layers=2, experts=6)
    gpu, host, smallest = beside_bytes(graph, budget_of())
    budget = budget_of(
        vram_bytes=gpu + int(share * smallest.experts_bytes),
        memory_bytes=host + int(below * smallest.experts_bytes),
        minimize=minimize,
        token_s=4e-4,
    )
    device = FormulaDevice(noise=0.05)
    try:
        plan = plan_of(graph, budget, device, seed=seed)
    except InfeasibleError:
        return
    assert plan.gpu.memory.total_bytes <= budget.vram_bytes
    assert plan.predicted.memory.total_bytes <= budget.memory_bytes
    assert plan.predicted.token_s.value <= budget.token_s
    check_gpu_plan(plan, ground_of(graph, device, seed))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.lists(st.floats(0.05, 1.3), min_size=2, max_size=5))
def test_more_memory_of_the_gpu_never_makes_the_chosen_prediction_slower(seed, shares):
    graph = graph_of(layers=2, experts=6)
    gpu, _, smallest = beside_bytes(graph, budget_of())
    device = FormulaDevice(noise=0.2)
    found = [
        plan_of(
            graph, budget_of(vram_bytes=gpu + int(share * smallest.experts_bytes)), device, seed=seed
        ).predicted.token_s.value
        for share in sorted({max(share, 0.2) for share in shares})
    ]
    assert found == sorted(found, reverse=True)


def test_a_large_grid_is_walked_from_the_likeliest_on_and_the_plan_says_how_much_was_tried():
    graph = graph_of(layers=2, experts=6)
    gpu, _, smallest = beside_bytes(graph, budget_of())
    budget = budget_of(vram_bytes=gpu + smallest.experts_bytes // 2)
    whole, part = FormulaDevice(), FormulaDevice(most_runs=12)
    best, walked = plan_of(graph, budget, whole), plan_of(graph, budget, part)
    assert walked.gpu.tried <= 16
    assert whole.asked > 100
    assert walked.predicted.token_s.value <= best.predicted.token_s.value * 1.001
    assert any(f"best of {walked.gpu.tried} settings" in reason for reason in walked.reasons)
    assert "optimal" not in walked.canonical_json()


def test_everything_that_fits_is_kept_on_the_gpu():
    graph = graph_of()
    plan = plan_of(graph, budget_of())
    assert (plan.verdict, plan.gpu.placement, plan.cache_bytes) == ("fits", "resident", 0)
    assert plan.gpu.vram_cache_bytes == sum(slot_bytes(INT4, ((128, 64), (64, 64))) for _ in range(2 * 4))
    assert plan.predicted.bytes_per_token == 0


def test_the_dense_part_is_as_precise_as_can_be_where_that_costs_nothing_on_a_gpu():
    plan = plan_of(graph_of(), budget_of())
    chosen = {one.subject: one.option for one in plan.choices}
    assert {option for unit, option in chosen.items() if ".experts." not in unit} == {"int8-dynamic"}
    assert {option for unit, option in chosen.items() if ".experts." in unit} == {"int4-group32"}


def test_a_limit_of_kl_and_the_least_kl_choose_other_bits():
    graph = graph_of(layers=2, experts=6)
    free = plan_of(graph, budget_of())
    tight = plan_of(graph, budget_of(max_kl=free.predicted.kl / 3))
    assert tight.predicted.kl <= free.predicted.kl / 3
    least = plan_of(graph, budget_of(minimize="kl"))
    assert {one.option for one in least.choices} == {"int8-dynamic"}
    limit = (free.predicted.token_s.value + least.predicted.token_s.value) / 2
    between = plan_of(graph, budget_of(minimize="kl", token_s=limit))
    assert least.predicted.kl < between.predicted.kl < free.predicted.kl
    assert between.predicted.token_s.value <= limit


def test_the_least_memory_is_the_least_that_keeps_the_time():
    graph = graph_of(layers=2, experts=6)
    plan = plan_of(graph, budget_of(minimize="memory"))
    gpu, host, smallest = beside_bytes(graph, budget_of())
    largest = int(smallest.sizes.max())
    # one expert in RAM takes less than the four places where reads land without a tier; four bits less than eight
    embedding = (256 * 64 + 4 * 256) - (256 * 64 // 2 + 2 * 256 * 2)
    held = plan.gpu.memory.total_bytes + plan.predicted.memory.total_bytes
    assert held == gpu + largest + host - 3 * largest - embedding
    assert plan.proof.bound == plan.proof.objective
    quick = plan_of(graph, budget_of(minimize="memory", token_s=plan.predicted.token_s.value / 2))
    assert quick.predicted.token_s.value <= plan.predicted.token_s.value / 2
    assert quick.proof.objective > plan.proof.objective


def test_a_limit_of_the_disk_gives_dense_parts_fewer_bits_and_names_the_least():
    graph = graph_of(layers=2, experts=6)
    free = plan_of(graph, budget_of())
    with pytest.raises(InfeasibleError, match="disk") as caught:
        plan_of(graph, budget_of(disk_bytes=1000))
    least = int(caught.value.least["disk"])
    assert least < free.predicted.disk_bytes
    tight = plan_of(graph, budget_of(disk_bytes=least))
    assert tight.predicted.disk_bytes == least
    assert {one.option for one in tight.choices} == {"int4-group32"}


def test_a_limit_on_the_first_token_chooses_the_chunk():
    graph = graph_of()
    late = plan_of(graph, budget_of(prompt_tokens=48, minimize="memory"))
    assert late.prefill_chunk_tokens == 16
    limit = late.predicted.token_s.value * 2.4
    soon = plan_of(graph, budget_of(prompt_tokens=48, first_token_s=limit))
    assert soon.predicted.first_token_s.value <= limit


def test_every_expert_stays_on_the_gpu_unless_another_placement_is_clearly_quicker():
    class Busy(FormulaDevice):
        slower = 1.0

        def _point(self, sizes, division, serving):
            found = super()._point(sizes, division, serving)
            if serving is not RESIDENT:
                return found
            return DevicePoint(self.slower * found.token_s, 1.0, 0.0, 0.0, 0.0, found.waited)

    graph = graph_of()
    near, far = Busy(), Busy()
    quickest = min(
        near.point(mix.sizes, one, serving).token_s
        for mix, divisions in GpuSearch(holdings_of(graph, budget_of()), near, budget_of(), (16,)).likely_mixes()
        for one in divisions
        for serving in SERVINGS
        if one.vram_bytes < mix.experts_bytes
    )
    everything = plan_of(graph, budget_of()).predicted.token_s.value
    near.known.clear()
    near.slower, far.slower = 1.1 * quickest / everything, 1.3 * quickest / everything
    kept = plan_of(graph, budget_of(), near)
    assert (kept.verdict, kept.gpu.placement) == ("fits", "resident")
    assert any("passed over" in reason for reason in kept.reasons)
    assert plan_of(graph, budget_of(), far).verdict == "offload"


# --- the crossing ------------------------------------------------------------------------------------------


def test_below_the_crossing_a_cache_is_planned_and_above_it_a_fixed_list():
    graph = graph_of(layers=2, experts=6)
    gpu, _, smallest = beside_bytes(graph, budget_of())
    total = smallest.experts_bytes
    crossed = crossing(FormulaDevice(), smallest.sizes, total)
    assert crossed is not None
    kinds = {}
    for share in (0.15, 0.3, 0.5, 0.7, 0.9):
        plan = plan_of(graph, budget_of(vram_bytes=gpu + int(share * total)))
        kinds[share] = plan.gpu.placement
        assert plan.gpu.crossing == crossed
    assert {kinds[share] for share in kinds if share < crossed} == {"cache"}
    assert {kinds[share] for share in kinds if share > crossed} == {"static"}


def test_a_fixed_list_comes_with_its_experts_and_a_cache_without():
    graph = graph_of(layers=2, experts=6)
    gpu, _, smallest = beside_bytes(graph, budget_of())
    listed = plan_of(graph, budget_of(vram_bytes=gpu + int(0.95 * smallest.experts_bytes)))
    assert (listed.gpu.policy, len(listed.gpu.order)) == ("static", 12)
    cached = plan_of(graph, budget_of(vram_bytes=gpu + int(0.2 * smallest.experts_bytes)))
    assert (cached.gpu.policy, cached.gpu.order) == ("reuse", ())


# --- memories ------------------------------------------------------------------------------------------------


def test_the_memory_of_the_gpu_is_the_sum_made_by_hand():
    graph = graph_of(layers=2, experts=4, hidden=64, inner=64)
    plan = plan_of(graph, budget_of())
    held, chunk = plan.gpu.memory, plan.prefill_chunk_tokens
    shapes = [(256, 64), *[(192, 64), (64, 64)] * 2]
    small = 4 * (64 + 2 * (2 * 64 + 4 * 64))
    assert held.dense_bytes == sum(2 * rows * columns + 4 * rows for rows, columns in shapes) + small
    assert held.kv_bytes == 2 * 64 * (2 * 64) * 2
    assert held.context_bytes == CONTEXT_BYTES + LIBRARY_BYTES
    row = (2 + 8) * 64 + 4 * (2 * 64 + 2 * 64) + 6 * 64 * 2 + 256 + 3 * 2 * 64
    slot = slot_bytes(INT8, ((128, 64), (64, 64)))
    restored = max(4 * 256 * 64 + 4 * 256, 2 * (slot + 3 * 3 * 64 * 64))
    assert held.activations_bytes == 4 * chunk * row + restored
    host = plan.predicted.memory
    assert host.dense_bytes == 256 * 64 + 4 * 256
    assert host.runtime_bytes == 10_000 + HOST_LIBRARY_BYTES
    assert host.activations_bytes == costs.activations_bytes(graph, chunk) + 4 * slot_bytes(INT4, ((128, 64), (64, 64)))


def test_one_memory_for_both_gets_one_tier_and_the_reason():
    graph = graph_of(layers=2, experts=6)
    gpu, host, smallest = beside_bytes(graph, budget_of())
    memory = gpu + host + smallest.experts_bytes // 2
    plan = plan_of(graph, budget_of(memory_bytes=memory, vram_bytes=memory), unified=True)
    assert plan.gpu.one_memory
    assert plan.gpu.ram_cache_bytes == plan.cache_bytes == 0
    assert plan.gpu.memory.total_bytes + plan.predicted.memory.total_bytes <= memory
    assert any("offloading to RAM gains nothing" in reason for reason in plan.reasons)
    check_gpu_plan(plan, ground_of(graph))


def test_a_data_sheets_figure_makes_the_whole_a_data_sheets():
    assert plan_of(graph_of(), budget_of(), origin="datasheet").gpu.origin == "datasheet"
    plan = plan_of(graph_of(), budget_of())
    assert plan.gpu.origin == "measured"
    assert "nothing was measured on it" in " ".join(plan_of(graph_of(), budget_of(), origin="datasheet").reasons)


# --- refusals --------------------------------------------------------------------------------------------------


def test_less_than_the_dense_part_is_refused_with_the_least_that_is_enough():
    graph = graph_of()
    with pytest.raises(InfeasibleError, match="vram") as caught:
        plan_of(graph, budget_of(vram_bytes=1 * MIB))
    least = int(caught.value.least["vram"])
    assert caught.value.binding == ("vram",)
    assert "dense part takes" in str(caught.value)
    assert plan_of(graph, budget_of(vram_bytes=least)).gpu.memory.total_bytes == least
    with pytest.raises(InfeasibleError):
        plan_of(graph, budget_of(vram_bytes=least - 1))


def test_too_little_ram_is_refused_with_the_least_that_is_enough():
    graph = graph_of()
    with pytest.raises(InfeasibleError) as caught:
        plan_of(graph, budget_of(memory_bytes=100 * MIB))
    least = int(caught.value.least["memory"])
    assert caught.value.binding == ("memory",)
    assert plan_of(graph, budget_of(memory_bytes=least)).predicted.memory.total_bytes == least
    with pytest.raises(InfeasibleError):
        plan_of(graph, budget_of(memory_bytes=least - 1))


def test_a_time_that_only_residence_would_keep_is_declined_with_its_interval():
    graph = graph_of(layers=2, experts=6)
    gpu, _, smallest = beside_bytes(graph, budget_of())
    everything = plan_of(graph, budget_of()).predicted.token_s.value
    budget = budget_of(vram_bytes=gpu + smallest.experts_bytes // 4, token_s=1.05 * everything)
    with pytest.raises(DeclinedError) as caught:
        plan_of(graph, budget)
    assert caught.value.reason == "link"
    assert caught.value.token_s is not None
    assert caught.value.token_s.low < caught.value.least["time per token"] < caught.value.token_s.high
    with pytest.raises(InfeasibleError) as slower:
        plan_of(graph, budget_of(token_s=1e-9))
    assert not isinstance(slower.value, DeclinedError)
    assert plan_of(graph, budget_of(token_s=slower.value.least["time per token"] * (1 + 1e-9)))


def test_a_plan_without_a_limit_of_the_gpus_memory_or_without_experts_is_refused():
    with pytest.raises(InputError, match="no limit on the GPU"):
        plan_of(graph_of(), budget_of(vram_bytes=None))
    with pytest.raises(InputError, match="no answer"):
        plan_of(graph_of(), budget_of(prompt_tokens=64))


# --- the recount -------------------------------------------------------------------------------------------------


def lies(plan):
    gpu, said = plan.gpu, plan.predicted
    for name in ("dense_bytes", "kv_bytes", "context_bytes", "arena_bytes"):
        memory = gpu.memory.model_copy(update={name: getattr(gpu.memory, name) - 4096})
        yield plan.model_copy(update={"gpu": gpu.model_copy(update={"memory": memory})})
    none = gpu.memory.model_copy(update={"activations_bytes": 4096})
    yield plan.model_copy(update={"gpu": gpu.model_copy(update={"memory": none})})
    for change in (
        {"placement": "resident"},
        {"exclusive": not gpu.exclusive},
        {"ram_cache_bytes": gpu.ram_cache_bytes - 4096},
        {"vram_cache_bytes": gpu.vram_cache_bytes // 2},
        {"one_memory": True},
        {"order": ((0, 0), (0, 0))},
        {"trials": (gpu.trials[0].model_copy(update={"token_s": said.token_s.value / 2}), *gpu.trials)},
        {"trials": ()},
        {"tried": 1},
        {"upload_bytes": gpu.upload_bytes + 1.0},
        {"flash_bytes": gpu.flash_bytes + 1.0},
    ):
        yield plan.model_copy(update={"gpu": gpu.model_copy(update=change)})
    for change in ({"kl": said.kl / 2}, {"disk_bytes": 1}, {"hit_rate": 0.999}, {"bound_token_s": 1.0}):
        yield plan.model_copy(update={"predicted": said.model_copy(update=change)})
    faster = said.token_s.model_copy(update={"value": said.token_s.value * 0.95})
    yield plan.model_copy(update={"predicted": said.model_copy(update={"token_s": faster})})
    for name in ("dense_bytes", "cache_bytes", "activations_bytes", "runtime_bytes"):
        memory = said.memory.model_copy(update={name: getattr(said.memory, name) - 1})
        yield plan.model_copy(update={"predicted": said.model_copy(update={"memory": memory})})
    yield plan.model_copy(update={"choices": plan.choices[1:]})
    yield plan.model_copy(update={"cache_bytes": plan.cache_bytes + 1})
    yield plan.model_copy(update={"cycle_bytes": plan.cycle_bytes + 4096})
    tight = plan.budget.model_copy(update={"vram_bytes": gpu.memory.total_bytes - 1})
    yield plan.model_copy(update={"budget": tight})
    for change in ({"status": "optimal"}, {"bound": plan.proof.objective * 1.1}, {"gap": 0.9}):
        yield plan.model_copy(update={"proof": plan.proof.model_copy(update=change)})
    datasheet = profile_of("datasheet")
    yield plan.model_copy(update={"gpu": gpu.model_copy(update={"profile": datasheet})})


def test_the_recount_catches_every_lie():
    graph = graph_of(layers=2, experts=6)
    gpu, host, smallest = beside_bytes(graph, budget_of())
    budget = budget_of(vram_bytes=gpu + smallest.experts_bytes // 4, memory_bytes=host + smallest.experts_bytes // 2)
    plan = plan_of(graph, budget)
    check_gpu_plan(plan, ground_of(graph))
    for number, lie in enumerate(lies(plan)):
        try:
            check_gpu_plan(lie, ground_of(graph))
        except CheckFailedError:
            continue
        pytest.fail(f"lie {number} passed")


def test_a_plan_is_the_same_after_writing_and_reading():
    plan = plan_of(graph_of(), budget_of())
    assert DecoderPlan.parse(plan.canonical_json(), "it") == plan


def test_a_budget_and_a_plan_without_a_gpu_are_written_as_they_were_before_there_were_any():
    assert "vram" not in DecoderBudget().canonical_json()
    assert DecoderBudget(vram_bytes=5).model_dump()["vram_bytes"] == 5
    plan = plan_of(graph_of(), budget_of()).model_copy(update={"gpu": None, "budget": DecoderBudget()})
    assert "gpu" not in plan.model_dump()
    assert "vram" not in plan.canonical_json()


def test_divisions_are_told_apart_by_what_ram_keeps():
    assert Division(1, 2) != Division(1, 2, exclusive=True)
