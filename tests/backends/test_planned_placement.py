"""A run on a device takes the placement that was planned, as far as it names nothing of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.exporters.onnx_decoder import export_onnx_decoder
from edgeflex.plans.decoder_costs import build_space, raw_bytes
from edgeflex.plans.decoder_gpu_memory import Holdings, device_space, slot_bytes
from edgeflex.runtimes.cuda_memory import device_bytes
from edgeflex.runtimes.cuda_weights import open_experts
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.schema import DeviceProfile
from edgeflex.schema_gpu import GpuMemory, GpuPlacement
from edgeflex.schema_moe import DecoderCalibration, DecoderRates, MatrixRate, UnitLoss
from tests.random_decoder import FAMILIES, INT4, INT8, RandomSource, family_graph, mixed_plan, units_of
from tests.tiny_decoder import EXPERTS, LAYERS, tiny_graph

if TYPE_CHECKING:
    from pathlib import Path

PROMPT, NEW = [7, 3, 90, 3, 3, 15, 42, 61, 8, 8, 30], 12
EVEN = Curves(gpu=Curve(((1, 1e-6),)), cpu=Curve(((1, 1e-3),)), link_bytes_per_s=12e6, link_latency_s=1e-4)
ORDER = tuple((layer, expert) for expert in reversed(range(EXPERTS)) for layer in range(1, LAYERS))


def placement(vram: int, ram: int, **changes: Any) -> GpuPlacement:
    memory = GpuMemory(dense_bytes=1, arena_bytes=vram, kv_bytes=1, activations_bytes=1, context_bytes=1)
    known: dict[str, Any] = {
        "device": "box",
        "origin": "datasheet",
        "profile": DeviceProfile(name="box", title="A box", origin="datasheet"),
        "placement": "cache",
        "policy": "reuse",
        "rule": "auto",
        "vram_cache_bytes": vram,
        "ram_cache_bytes": ram,
        "exclusive": False,
        "one_memory": False,
        "memory": memory,
        "upload_bytes": 0.0,
        "ahead_bytes": 0.0,
        "flash_bytes": 0.0,
        "waited": {},
        "trials": (),
        "tried": 1,
        "assumptions": (),
    }
    return GpuPlacement(**{**known, **changes})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return RandomSource(tiny_graph(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sizes(source: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int]:
    """Return the bytes of the largest expert, and of all."""
    folder = bundle_of(source, tmp_path_factory.mktemp("sizes") / "bundle", None)
    store, _ = open_experts(folder, open_decoder_bundle(folder).manifest)
    return int(store.sizes.max()), int(store.sizes.sum())


def bundle_of(source: Any, folder: Path, gpu: GpuPlacement | None) -> Path:
    plan = mixed_plan(source.graph)
    ram = plan.cache_bytes if gpu is None else gpu.ram_cache_bytes
    export_onnx_decoder(source, plan.model_copy(update={"gpu": gpu, "cache_bytes": ram}), folder)
    return folder


def run(folder: Path, **settings: Any) -> tuple[list[int], Any]:
    with DecoderSession.from_bundle(
        folder, Settings(device="cpu-torch", device_parts={"curves": EVEN}, **settings)
    ) as session:
        said = list(session.generate(PROMPT, NEW))
        return said, session.device_stats()


def test_bytes_of_both_memories_and_what_ram_keeps_are_the_plans(source, sizes, tmp_path):
    one, total = sizes
    said = []
    for number, (ram, exclusive) in enumerate(((total, False), (6 * one, False), (6 * one, True), (0, False))):
        folder = bundle_of(source, tmp_path / str(number), placement(3 * one, ram, exclusive=exclusive))
        answer, done = run(folder)
        said.append(answer)
        assert (done.vram_bytes, done.ram_bytes, done.exclusive) == (3 * one, ram, exclusive)
    assert all(answer == said[0] for answer in said)


def test_a_fixed_list_is_there_before_the_first_event_and_misses_are_served_by_the_planned_rule(
    source, sizes, tmp_path
):
    one, total = sizes
    listed = placement(4 * one, total, placement="cpu", policy="static", rule="static", order=ORDER)
    answer, done = run(bundle_of(source, tmp_path / "cpu", listed))
    assert done.rule == "static"
    assert done.host_experts > 0
    assert done.decoding.uploads == 0
    assert done.decoding.gpu_hits > 0
    assert done.decoding.flash_misses == 0
    mixed = listed.model_copy(update={"placement": "static", "rule": "auto"})
    other, found = run(bundle_of(source, tmp_path / "static", mixed))
    assert found.rule == "auto"
    assert found.decoding.flash_misses == 0
    assert other == answer


def test_what_the_run_names_itself_comes_before_the_plan(source, sizes, tmp_path):
    one, total = sizes
    listed = placement(4 * one, total, placement="cpu", policy="static", rule="static", order=ORDER)
    folder = bundle_of(source, tmp_path / "bundle", listed)
    _, done = run(folder, cache_bytes=6 * one)
    assert (done.vram_bytes, done.ram_bytes) == (4 * one, 6 * one)
    _, done = run(folder, policy="lru", device_rule="upload")
    assert (done.rule, done.host_experts) == ("upload", 0)
    assert done.vram_bytes == 4 * one
    _, done = run(folder, vram_bytes=1 << 30)
    assert done.vram_bytes == total


def test_a_bundle_planned_for_a_gpu_also_runs_on_the_processor_alone(source, sizes, tmp_path):
    total = sizes[1]
    folder = bundle_of(source, tmp_path / "bundle", placement(total, 0, placement="resident"))
    with DecoderSession.from_bundle(folder) as session:
        assert session.cache_bytes == total
        assert len(list(session.generate(PROMPT, NEW))) == NEW


def test_a_bundle_whose_plan_knows_no_gpu_runs_as_before(source, sizes, tmp_path):
    folder = bundle_of(source, tmp_path / "bundle", None)
    _, done = run(folder)
    assert (done.vram_bytes, done.rule) == (sizes[1], "auto")


# --- bytes -------------------------------------------------------------------------------------------------


def planned_holdings(graph: Any, context_tokens: int) -> Holdings:
    """Return what a plan counts beside experts, for a decoder whose every unit is known in the two precisions."""
    shapes = {shape for name, shape in graph.matrix_shapes().items()}
    matrices = tuple(
        MatrixRate(rows=rows, columns=columns, precision=one, rows_in=1, threads=1, seconds=1e-5)
        for rows, columns in shapes
        for one in (INT8, INT4)
    )
    rates = DecoderRates(
        device="test",
        matrices=matrices,
        read_bytes_per_s=1e9,
        read_latency_s=0.0,
        memory_bytes_per_s=1e10,
        other_token_s=0.0,
        other_prefill_token_s=0.0,
        runtime_bytes=0,
    )
    losses = tuple(
        UnitLoss(unit=unit, precision=one, kl=0.001, tokens=1) for unit in units_of(graph) for one in (INT8, INT4)
    )
    known = DecoderCalibration(graph=graph, text_digest="t", tokens=1, reference_loss=1.0, losses=losses)
    space = build_space(known, rates, raw_bytes, precisions=(INT8, INT4))
    return Holdings(device_space(space, gpu_bytes_per_s=1e12, link_bytes_per_s=1e10), context_tokens, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_no_less_than_the_device_takes_and_hardly_more(family, tmp_path):
    graph = family_graph(family)
    plan = mixed_plan(graph)
    source: Any = RandomSource(graph, tmp_path / "model")
    export_onnx_decoder(source, plan, tmp_path / "bundle")
    manifest = open_decoder_bundle(tmp_path / "bundle").manifest
    store, kinds = open_experts(tmp_path / "bundle", manifest)
    for chunk in (1, 8, 64):
        taken = device_bytes(
            manifest, kinds, torch.bfloat16, context_tokens=plan.context_tokens, chunk_tokens=chunk, library_bytes=0
        )
        counted = planned_holdings(graph, plan.context_tokens).gpu(0, chunk)
        assert taken.dense <= counted.dense_bytes <= 1.1 * taken.dense
        assert taken.key_values == counted.kv_bytes
        assert taken.work <= counted.activations_bytes <= 1.5 * taken.work
    for (layer, expert), kind in kinds.items():
        shapes = [(one.rows, one.columns) for one in (kind.gate_up, kind.down)]
        slot = slot_bytes(kind.down.precision, shapes)
        assert store.sizes[layer, expert] <= slot <= store.sizes[layer, expert] + 4096
