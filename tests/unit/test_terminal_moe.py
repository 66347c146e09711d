"""What people read about decoders: no line too wide, nothing lost when narrow, nothing overstated."""

from __future__ import annotations

from collections import Counter

import pytest

from edgeflex import terminal_costs, terminal_moe
from edgeflex.reports.decoder import build_decoder_report
from edgeflex.schema import Precision
from edgeflex.schema_moe import DecoderBudget, SimulatedCache, Simulation
from tests.decoder_samples import (
    sample_bench,
    sample_calibration,
    sample_gpu_plan,
    sample_graph,
    sample_manifest,
    sample_plan,
    sample_points,
    sample_record,
    sample_sizes,
    sample_stats,
)
from tests.plan_samples import rates_of
from tests.tiny_decoder import tiny_graph

MANIFEST = sample_manifest()

TEXTS = {
    "graph": lambda: terminal_costs.decoder_graph_text(sample_graph()),
    "sizes": lambda: terminal_costs.decoder_sizes_text(sample_sizes()),
    "calibration": lambda: terminal_costs.decoder_calibration_text(sample_calibration()),
    "rates": lambda: terminal_costs.rates_text(rates_of(sample_graph(), lambda *_: 2e-6, first_read_bytes_per_s=6e8)),
    "plan": lambda: terminal_moe.decoder_plan_text(sample_plan()),
    "plan for a GPU": lambda: terminal_moe.decoder_plan_text(sample_gpu_plan()),
    "bundle": lambda: terminal_moe.decoder_bundle_text(MANIFEST),
    "bundle for TensorRT": lambda: terminal_moe.decoder_bundle_text(
        MANIFEST.model_copy(update={"backend": "tensorrt"})
    ),
    "run": lambda: terminal_moe.generation_text(sample_stats(MANIFEST)),
    "run with plan": lambda: terminal_moe.generation_text(sample_stats(MANIFEST), sample_plan()),
    "report": lambda: terminal_moe.decoder_report_text(
        build_decoder_report(MANIFEST, sample_bench(MANIFEST), sample_stats(MANIFEST))
    ),
    "simulation": lambda: terminal_moe.simulation_text(simulation()),
    "device": lambda: terminal_moe.device_record_text(sample_record()),
}


@pytest.fixture
def width(monkeypatch: pytest.MonkeyPatch):
    return lambda columns: monkeypatch.setenv("COLUMNS", str(columns))


def shown(text: str) -> Counter[str]:
    return Counter("".join(text.split()))


def cells(text: str, start: str) -> list[str]:
    """Return the row that begins with ``start``, words apart by two spaces or more."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("columns", [40, 60, 100])
def test_no_line_is_wider_than_the_terminal(name: str, columns: int, width):
    width(columns)
    lines = TEXTS[name]().splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("name", TEXTS)
def test_a_narrow_terminal_loses_nothing(name: str, width):
    width(400)
    wide = TEXTS[name]()
    width(40)
    assert shown(TEXTS[name]()) >= shown(wide)


@pytest.mark.parametrize(("backend", "said"), [("executorch", False), ("onnx", True), ("tensorrt", True)])
def test_a_bundle_for_another_engine_says_whose_times_the_plan_has(backend: str, said: bool):
    text = terminal_moe.decoder_bundle_text(MANIFEST.model_copy(update={"backend": backend}))
    assert ("own engine" in " ".join(text.split())) is said


# --- graph --------------------------------------------------------------------------------------------------


def test_a_graphs_parameters_are_the_sums_made_by_hand(width):
    width(100)
    text = terminal_costs.decoder_graph_text(sample_graph())
    hidden, inner, vocabulary = 2048, 1024, 50304
    expert = 3 * hidden * inner
    attention = 4 * hidden * hidden
    small = hidden + 16 * (4 * hidden + 64 * hidden)
    total = 2 * vocabulary * hidden + 16 * (attention + 64 * expert) + small
    active = 2 * vocabulary * hidden + 16 * (attention + 8 * expert) + small
    assert cells(text, "parameters")[-1] == f"{total / 1e9:.2f} B, {active / 1e9:.2f} B of them active for a token"
    # one int4 expert: half a byte a weight, and a bfloat16 scale per 32 of them
    cycle = 16 * 8 * (expert // 2 + expert // 32 * 2)
    assert cells(text, "int4-group32")[-1] == f"{cycle / 2**20:.2f} MiB"


def test_a_dense_first_layer_is_counted_as_one(width):
    width(100)
    text = terminal_costs.decoder_graph_text(tiny_graph())
    assert cells(text, "layers")[-1] == "4, 3 of them with experts"
    assert cells(text, "routing")[-1] == "8 experts, 2 a token"


def test_a_shape_that_int4_cannot_take_has_no_bytes(width):
    width(100)
    graph = tiny_graph().model_copy(update={"hidden_dim": 40})
    assert cells(terminal_costs.decoder_graph_text(graph), "int4-group32")[1] == "–"


def test_sizes_name_the_verdict_of_each_precision(width):
    width(100)
    text = terminal_costs.decoder_sizes_text(sample_sizes())
    assert cells(text, "int4-group32")[-1] == "OFFLOAD"
    assert "Memory budget: 2.00 GiB" in text
    unlimited = sample_sizes().model_copy(update={"budget": DecoderBudget()})
    assert "No memory budget was given" in terminal_costs.decoder_sizes_text(unlimited)


# --- calibration --------------------------------------------------------------------------------------------


def test_a_calibration_shows_what_each_precision_costs(width):
    width(100)
    calibration = sample_calibration()
    text = terminal_costs.decoder_calibration_text(calibration)
    row = cells(text, "int4-group32")
    experts = sum(
        one.kl for one in calibration.losses if one.precision is Precision.INT4_GROUP32 and ".experts." in one.unit
    )
    assert row[1] == "0.0310"
    assert row[3] == f"{experts:.4f}"
    assert row[4] == "94.2 %"
    least = min(one.tokens for one in calibration.losses if ".experts." in one.unit)
    assert f"at least {least} tokens" in text


# --- plan ---------------------------------------------------------------------------------------------------


def test_a_plan_for_a_gpu_shows_both_memories_what_was_tried_and_what_is_assumed(width):
    width(120)
    text = terminal_moe.decoder_plan_text(sample_gpu_plan())
    assert text.startswith("OFFLOAD: the GPU's memory holds a part of the experts")
    assert cells(text, "vram") == ["vram", "4.00 GiB", "3.45 GiB", "13.9 % left"]
    assert cells(text, "driver and libraries")[1] == "576.00 MiB"
    assert cells(text, "time per token ")[-1] == "–"
    assert "4.20 ms (3.10 ms to 6.80 ms)" in text
    assert cells(text, "no cache or scheduler can beat")[-1] == "3.10 ms (74 % reached)"
    assert cells(text, "cpu (static)") == ["cpu (static)", "5.10 ms", "196.1 tokens/s"]
    assert "from data sheets at least in part" in " ".join(text.split())
    assert "assumed: copies to the GPU" in text
    measured = terminal_moe.decoder_plan_text(sample_gpu_plan(origin="measured"))
    assert "data sheets" not in measured


def test_one_memory_is_counted_once_against_its_budget(width):
    width(120)
    plan = sample_gpu_plan(one_memory=True, ram_cache_bytes=0)
    assert plan.gpu is not None
    total = plan.gpu.memory.total_bytes + plan.predicted.memory.total_bytes
    assert cells(terminal_moe.decoder_plan_text(plan), "memory ")[2] == f"{total / 2**30:.2f} GiB"
    assert "The process, in the same memory" in terminal_moe.decoder_plan_text(plan)


def test_a_plan_begins_with_its_verdict_and_reasons(width):
    width(400)
    first, second, third, *_ = terminal_moe.decoder_plan_text(sample_plan()).splitlines()
    assert first.startswith("OFFLOAD")
    assert (second[2:], third[2:]) == sample_plan().reasons


def test_margins_are_what_the_promise_leaves_of_the_limit(width):
    width(100)
    text = terminal_moe.decoder_plan_text(sample_plan())
    assert cells(text, "time per token") == ["time per token", "60.00 ms", "51.20 ms", "14.7 % left"]
    assert cells(text, "disk") == ["disk", "–", "4.01 GiB", "–"]
    tight = sample_plan(budget=DecoderBudget(token_s=0.04))
    assert cells(terminal_moe.decoder_plan_text(tight), "time per token")[-1] == "28.0 % over"


def test_precisions_are_counted_by_kind_of_unit(width):
    width(100)
    text = terminal_moe.decoder_plan_text(sample_plan())
    plan = sample_plan()
    experts = [one.option for one in plan.choices if ".experts." in one.subject]
    assert cells(text, "experts") == ["experts", f"{experts.count('int8-dynamic')}", f"{experts.count('int4-group32')}"]
    assert cells(text, "dense parts") == ["dense parts of layers", "16"]


def test_a_plan_is_never_called_optimal_without_a_proof(width):
    width(100)
    assert "optimal" not in terminal_moe.decoder_plan_text(sample_plan())
    assert "optimal" not in terminal_moe.decoder_plan_text(sample_plan(proof=None))
    proof = sample_plan().proof
    assert proof is not None
    proven = sample_plan(proof=proof.model_copy(update={"status": "optimal", "gap": 0.0}))
    assert "Proof: optimal" in terminal_moe.decoder_plan_text(proven)


def test_a_plan_as_good_as_its_bound_is_not_said_to_leave_room(width):
    width(400)
    proof = sample_plan().proof
    assert proof is not None
    met = sample_plan(proof=proof.model_copy(update={"bound": proof.objective, "gap": 0.0}))
    assert "no plan goes below that, by the recorded trace" in terminal_moe.decoder_plan_text(met)
    assert "better one may exist" not in terminal_moe.decoder_plan_text(met)


# --- run ----------------------------------------------------------------------------------------------------


def test_a_run_tells_speed_hits_and_memory_beside_the_plan(width):
    width(100)
    stats = sample_stats(MANIFEST)
    text = terminal_moe.generation_text(stats, sample_plan())
    mean_s = sum(time.total_s for time in stats.times) / len(stats.times)
    assert cells(text, "decoding") == ["decoding", f"{1 / mean_s:.1f} tokens/s", "19.5 tokens/s"]
    assert cells(text, "memory") == ["memory", "1.88 GiB", "1.88 GiB"]
    assert cells(text, "expert hits")[-1] == "79.2 %"
    waited_s = sum(time.wait_s for time in stats.times)
    assert cells(text, "- waiting") == ["- waiting for reads", f"{waited_s / (mean_s * len(stats.times)) * 100:.1f} %"]
    parts = [float(line.split()[-2]) for line in text.splitlines() if line.startswith("- ")]
    assert sum(parts) == pytest.approx(100, abs=0.3), "what a token's time went to is all of it"


def test_a_run_of_one_token_has_no_rate_and_no_split(width):
    width(100)
    stats = sample_stats(MANIFEST, tokens=1)
    text = terminal_moe.generation_text(stats)
    assert cells(text, "decoding")[-1] == "–"
    assert cells(text, "answer")[-1] == "1 token"
    assert "waiting" not in text


def test_prefetch_that_did_not_pay_is_said(width):
    width(100)
    stats = sample_stats(MANIFEST)
    early = {"prefetch_fetched_bytes": 100 << 20, "prefetch_useful_bytes": 31 << 20, "prefetch_stopped": True}
    text = terminal_moe.generation_text(stats.model_copy(update={"cache": stats.cache.model_copy(update=early)}))
    assert cells(text, "read early")[-1] == "31 % of 100.00 MiB, so it stopped"


def simulation(link_bytes_per_s: float | None = None) -> Simulation:
    """The replays of the sample points, as `trace simulate` gives them."""
    results = []
    for one in sample_points():
        uses = one.hits + one.misses
        read = one.decode_bytes / one.decode_tokens
        results.append(
            SimulatedCache(
                policy=one.policy,
                cache_bytes=one.cache_bytes,
                hit_rate=one.hits / uses,
                hits=one.hits,
                misses=one.misses,
                bytes_per_token=read,
                belady_hit_rate=1 - (one.belady_misses or 0) / uses,
                layer_hit_rates=(one.hits / uses, 0.125),
                token_s=None if link_bytes_per_s is None else read / link_bytes_per_s,
                bound_share=None if link_bytes_per_s is None else 0.5,
            )
        )
    return Simulation(
        trace="deepseek-v2-lite.csv", decode_tokens=100, results=tuple(results), link_bytes_per_s=link_bytes_per_s
    )


def test_a_simulation_is_ordered_by_cache_and_names_the_gap_to_belady(width):
    width(120)
    lines = terminal_moe.simulation_text(simulation()).splitlines()[2:]
    assert [line.split()[0] for line in lines[:2]] == ["enu", "lru"]
    assert [line.split()[1] for line in lines] == [f"{size}.00" if size < 1024 else f"{size / 1024:.2f}" for size in
        (300, 300, 600, 600, 900, 900, 1200, 1200, 1800, 1800, 2400, 2400, 3000, 3000)]  # fmt: skip
    first = sample_points()[0]
    gap = (first.misses - (first.belady_misses or 0)) / (first.hits + first.misses) * 100
    assert f"{gap:.1f} pt" in lines[0]
    assert lines[0].split()[-2:] == ["12.5", "%"]


def test_a_simulation_with_a_link_says_how_fast_and_how_near_the_bound(width):
    width(140)
    first = simulation(1e9).results[0]
    line = terminal_moe.simulation_text(simulation(1e9)).splitlines()[2]
    assert f"{1e9 / first.bytes_per_token:.1f} tokens/s" in line
    assert line.endswith("50 %")


def test_a_device_is_shown_with_its_errors_and_its_waiting():
    record = sample_record()
    text = terminal_moe.device_record_text(record)
    assert cells(text, "copying hidden") == ["copying hidden behind computing", "83.3 %"]
    assert cells(text, "copies to the GPU")[1] == f"{record.errors['link'].samples}"
    waits = text[text.index("Share of the watched time") :]
    assert cells(waits, "GPU") == ["GPU", "18.1 %", "41.5 %", "40.4 %"]
    assert terminal_moe.device_record_text(sample_record(errors={}, pass_s=0.0)).count("\n\n") == 0
