"""Plausible values of a decoder of OLMoE's shape: graph, plan, manifest, statistics, replays. Nothing is run."""

from __future__ import annotations

import math
import random
from typing import Any

from edgeflex.runtimes.device_record import errors_of
from edgeflex.schema import Check, Choice, Conditions, DeviceProfile, FileEntry, Interval, Precision, Proof
from edgeflex.schema_gpu import DeviceRecord, EventTime, GpuMemory, GpuPlacement, PlacementTrial
from edgeflex.schema_moe import (
    Attention,
    DecoderBench,
    DecoderBudget,
    DecoderCacheStats,
    DecoderCalibration,
    DecoderGraph,
    DecoderLayer,
    DecoderManifest,
    DecoderMemory,
    DecoderPlan,
    DecoderPrediction,
    DecoderRunStats,
    DecoderSizes,
    MatrixRecord,
    MissPoint,
    Routing,
    TokenTime,
    UniformSize,
    UnitLoss,
)

INT4, INT8 = Precision.INT4_GROUP32, Precision.INT8_DYNAMIC
MIB = 1 << 20
EXPERT_BYTES = {INT4: 3_538_944, INT8: 6_299_648}


def sample_graph(*, name: str = "OLMoE-1B-7B", layers: int = 16, experts: int = 64, top_k: int = 8) -> DecoderGraph:
    """Return a decoder whose first layer is dense where ``layers`` is odd."""
    return DecoderGraph(
        name=name,
        family="olmoe",
        weights_digest="5" * 64,
        hidden_dim=2048,
        vocabulary=50304,
        layers=tuple(
            DecoderLayer(index=index, routing=None, dense_dim=4096)
            if layers % 2 and index == 0
            else DecoderLayer(
                index=index, routing=Routing(experts=experts, top_k=top_k, normalised=False), expert_dim=1024
            )
            for index in range(layers)
        ),
        attention=Attention(
            heads=16,
            kv_heads=16,
            head_dim=128,
            value_dim=128,
            rotary_dim=128,
            query_key_norm="projection",
            inverse_frequencies=tuple(10000.0 ** (-2 * i / 128) for i in range(64)),
            softmax_scale=128**-0.5,
        ),
        norm_epsilon=1e-5,
        tied_embedding=False,
        context_tokens=4096,
        end_tokens=(50279,),
    )


def precision_of(unit: str) -> Precision:
    """Return the precision of a unit: a few experts and all dense parts in int8."""
    if ".experts." not in unit:
        return INT8
    _, layer, _, expert = unit.split(".")
    return INT8 if (int(layer) * 7 + int(expert) * 5) % 11 == 0 or int(layer) == 3 else INT4


def sample_units(graph: DecoderGraph) -> list[str]:
    """Return every unit of ``graph``."""
    units = ["embedding", "head", *(f"layers.{layer.index}" for layer in graph.layers)]
    for layer in graph.layers:
        experts = layer.routing.experts if layer.routing else 0
        units += [f"layers.{layer.index}.experts.{expert}" for expert in range(experts)]
    return units


def sample_plan(graph: DecoderGraph | None = None, **changes: Any) -> DecoderPlan:
    """Return a plan that streams experts within 2 GiB."""
    known = graph or sample_graph()
    memory = DecoderMemory(
        dense_bytes=531 * MIB,
        cache_bytes=1200 * MIB,
        kv_bytes=128 * MIB,
        activations_bytes=9 * MIB,
        runtime_bytes=58 * MIB,
    )
    predicted = DecoderPrediction(
        token_s=Interval(value=0.0512, low=0.0447, high=0.0598),
        first_token_s=Interval(value=3.91, low=3.4, high=4.4),
        memory=memory,
        disk_bytes=4_301_000_000,
        kl=0.0213,
        hit_rate=0.792,
        bytes_per_token=94_300_000.0,
        belady_hit_rate=0.861,
        bound_token_s=0.0331,
    )
    values: dict[str, Any] = {
        "graph_digest": known.digest(),
        "budget": DecoderBudget(memory_bytes=2048 * MIB, token_s=0.06, first_token_s=4.0, max_kl=0.03),
        "verdict": "offload",
        "reasons": (
            "all experts take 3.85 GiB; 1.17 GiB of the 2.00 GiB are left for them",
            "20.8 % of expert uses are read, 89.9 MiB per token at 2.47 GB/s",
        ),
        "choices": tuple(Choice(subject=unit, option=precision_of(unit).value) for unit in sample_units(known)),
        "cache_bytes": 1200 * MIB,
        "cycle_bytes": 452_984_832,
        "context_tokens": 1024,
        "prefill_chunk_tokens": 64,
        "predicted": predicted,
        "proof": Proof(
            solver="enumeration",
            status="feasible",
            minimize="latency",
            objective=0.0512,
            bound=0.0487,
            gap=0.0488,
            tolerance=1e-4,
            wall_s=12.3,
            scenarios=14,
            scenarios_solved=14,
        ),
    }
    return DecoderPlan(**{**values, **changes})


def sample_manifest(graph: DecoderGraph | None = None, **changes: Any) -> DecoderManifest:
    """Return a bundle's manifest; keywords change the plan, ``extra`` the manifest."""
    known = graph or sample_graph()
    extra = changes.pop("extra", {})
    files = [FileEntry(path=f"weights/{unit}.ptd", role="weights", size_bytes=3_538_944, sha256="a" * 64)
             for unit in sample_units(known)]  # fmt: skip
    values: dict[str, Any] = {
        "versions": {"edgeflex": "0.1.0", "executorch": "1.5.1", "python": "3.12.3"},
        "graph": known,
        "plan": sample_plan(known, **changes),
        "matrices": tuple(_records(known)),
        "files": tuple(files),
        "measured_kl": 0.0241,
        "measured_perplexity": 7.51,
        "reference_perplexity": 7.33,
        "router_agreement": 0.968,
    }
    return DecoderManifest(**{**values, **extra})


def _records(graph: DecoderGraph) -> list[MatrixRecord]:
    records = []
    for name, (rows, columns) in graph.matrix_shapes().items():
        unit = name if name in {"embedding", "head"} else _unit(name)
        precision = precision_of(unit)
        records.append(
            MatrixRecord(
                name=name,
                precision=precision,
                rows=rows,
                columns=columns,
                file=f"weights/{unit}.ptd",
                offset=64,
                scales_offset=64 + rows * columns,
            )
        )
    return records


def _unit(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:4] if parts[2] == "experts" else parts[:2])


def sample_stats(manifest: DecoderManifest, *, tokens: int = 128, seed: int = 0, **changes: Any) -> DecoderRunStats:
    """Return one generation of ``tokens`` tokens."""
    draw = random.Random(seed)
    layers = manifest.graph.layers
    uses = [[_uses(draw) for _ in range(layer.routing.experts)] if layer.routing else [0] * 64 for layer in layers]
    misses = [round(0.2 * sum(row) * draw.uniform(0.6, 1.5)) for row in uses]
    hits = [sum(row) - missed for row, missed in zip(uses, misses, strict=True)]
    events = max(0, tokens - 1) * sum(1 for layer in layers if layer.routing)
    cache = DecoderCacheStats(
        policy="enu",
        capacity_bytes=manifest.plan.cache_bytes,
        peak_bytes=round(manifest.plan.cache_bytes * 0.997),
        hits=sum(hits),
        misses=sum(misses),
        evictions=max(0, sum(misses) - 300),
        read_bytes=sum(misses) * EXPERT_BYTES[INT4],
        decode_hits=round(sum(hits) * 0.6),
        decode_misses=round(sum(misses) * 0.6),
        decode_read_bytes=(tokens - 1) * 97_000_000,
        layer_hits=tuple(hits),
        layer_misses=tuple(misses),
    )
    values: dict[str, Any] = {
        "manifest_digest": manifest.digest(),
        "device": "laptop, 2 cores",
        "threads": 1,
        "prompt_tokens": 256,
        "tokens": tuple(draw.randrange(50000) for _ in range(tokens)),
        "times": tuple(_time(draw, index) for index in range(tokens - 1)),
        "first_token_s": 3.72,
        "load_s": 0.41,
        "peak_memory_bytes": 1871 * MIB,
        "runtime_memory_bytes": 52 * MIB,
        "cache": cache,
        "held_bytes": tuple(1905 * MIB + index * MIB // 8 for index in range(tokens)),
        "before": Conditions(load_average=0.3, clock_hz=2.9e9),
        "after": Conditions(load_average=1.1, clock_hz=2.9e9),
        "expert_uses": tuple(map(tuple, uses)),
        "decode_events": events,
        "expert_residency": tuple(tuple(_resident(draw, count, events) for count in row) for row in uses),
    }
    return DecoderRunStats(**{**values, **changes})


def _uses(draw: random.Random) -> int:
    return int(140 * draw.random() ** 5)


def _resident(draw: random.Random, uses: int, events: int) -> int:
    """Return the events that an expert was resident for; the busier, the more."""
    return round(events * min(1.0, uses / 60 * draw.uniform(0.7, 1.3)))


def _time(draw: random.Random, index: int) -> TokenTime:
    wait_s = 0.018 * draw.random() ** 2 * (2.2 if index < 12 else 1.0) + 0.004
    dense_s, expert_s = 0.0132 + 0.001 * draw.random(), 0.0201 + 0.002 * draw.random()
    return TokenTime(total_s=dense_s + expert_s + wait_s + 0.0019, dense_s=dense_s, expert_s=expert_s, wait_s=wait_s)


def sample_bench(manifest: DecoderManifest, *, repeats: int = 3) -> DecoderBench:
    """Return repeats of one prompt, with checks as the benchmark makes them."""
    runs = tuple(sample_stats(manifest, seed=index) for index in range(repeats))
    times = [time.total_s for run in runs for time in run.times]
    mean_s = math.fsum(times) / len(times)
    said, budget = manifest.plan.predicted, manifest.plan.budget
    held = max(run.peak_memory_bytes + run.runtime_memory_bytes for run in runs)
    rows: list[tuple[str, Any, float, float, float | None]] = [
        ("time per token", "s", said.token_s.value, mean_s, None),
        ("time per token budget", "s", said.token_s.value, mean_s, budget.token_s),
        ("time to first token", "s", said.first_token_s.value, 3.72, None),
        ("time to first token budget", "s", said.first_token_s.value, 3.72, budget.first_token_s),
        ("memory", "bytes", said.memory.total_bytes, held, None),
        ("memory budget", "bytes", said.memory.total_bytes, held, budget.memory_bytes),
        ("expert cache", "bytes", manifest.plan.cache_bytes, runs[0].cache.peak_bytes, None),
        ("hit rate", "share", said.hit_rate, 0.781, None),
    ]
    checks = tuple(
        Check(name=name, unit=unit, limit=limit, promised=promised, measured=measured, ok=True, note="381 tokens")
        for name, unit, promised, measured, limit in rows
        if not name.endswith("budget") or limit is not None
    )
    return DecoderBench(manifest_digest=manifest.digest(), runs=runs, checks=checks)


def sample_points() -> tuple[MissPoint, ...]:
    """Return replays of ENU and LRU at seven sizes, with Belady's misses."""
    points = []
    for policy, power in (("enu", 0.2), ("lru", 0.5)):
        for size in (300, 600, 900, 1200, 1800, 2400, 3000):
            rate = min(1.0, (size / 3700) ** power) if not (policy == "lru" and size < 500) else 0.0
            best = min(1.0, (size / 3700) ** 0.13)
            misses = round(65536 * (1 - rate))
            points.append(
                MissPoint(
                    policy=policy,
                    cache_bytes=size * MIB,
                    hits=65536 - misses,
                    misses=misses,
                    decode_tokens=512,
                    decode_bytes=misses * EXPERT_BYTES[INT4],
                    prefill_bytes=900 * MIB,
                    belady_misses=round(65536 * (1 - best)),
                )
            )
    return tuple(points)


def sample_calibration(graph: DecoderGraph | None = None) -> DecoderCalibration:
    """Return a calibration in which every unit was judged in both precisions."""
    known = graph or sample_graph()
    draw = random.Random(3)
    losses = tuple(
        UnitLoss(unit=unit, precision=precision, kl=scale * draw.random(), tokens=draw.randrange(40, 4096))
        for unit in sample_units(known)
        for precision, scale in ((INT8, 1e-6), (INT4, 3e-5))
    )
    return DecoderCalibration(
        graph=known,
        text_digest="7" * 64,
        tokens=8192,
        reference_loss=1.992,
        losses=losses,
        router_agreement={INT8: 0.991, INT4: 0.942},
        uniform_kl={INT8: 0.0007, INT4: 0.031},
    )


def sample_sizes(graph: DecoderGraph | None = None) -> DecoderSizes:
    """Return what headers alone tell."""
    known = graph or sample_graph()
    return DecoderSizes(
        graph=known,
        budget=DecoderBudget(memory_bytes=2048 * MIB),
        fixed_bytes=141 * MIB,
        uniform=(
            UniformSize(
                precision=INT8,
                dense_bytes=475 * MIB,
                experts_bytes=6152 * MIB,
                cycle_bytes=769 * MIB,
                verdict="offload",
            ),
            UniformSize(
                precision=INT4,
                dense_bytes=268 * MIB,
                experts_bytes=3456 * MIB,
                cycle_bytes=432 * MIB,
                verdict="offload",
            ),
        ),
    )


def sample_gpu_plan(**changes: Any) -> DecoderPlan:
    """Return a plan for a card alone, with a changing cache for half of the experts."""
    memory = GpuMemory(
        dense_bytes=718 * MIB,
        arena_bytes=1700 * MIB,
        kv_bytes=128 * MIB,
        activations_bytes=406 * MIB,
        context_bytes=576 * MIB,
    )
    values: dict[str, Any] = {
        "device": "rtx-4090",
        "origin": "datasheet",
        "profile": DeviceProfile(name="rtx-4090", title="NVIDIA GeForce RTX 4090", origin="datasheet"),
        "placement": "cache",
        "policy": "reuse",
        "rule": "auto",
        "vram_cache_bytes": memory.arena_bytes,
        "ram_cache_bytes": 3460 * MIB,
        "exclusive": False,
        "one_memory": False,
        "memory": memory,
        "upload_bytes": 31.0 * MIB,
        "ahead_bytes": 4.0 * MIB,
        "flash_bytes": 0.0,
        "waited": {"gpu": 0.85, "cpu": 0.12, "link": 0.29, "disk": 1.0},
        "trials": (
            PlacementTrial(placement="cache", policy="reuse", exclusive=False, token_s=0.0042),
            PlacementTrial(placement="static", policy="static", exclusive=False, token_s=0.0046),
            PlacementTrial(placement="cpu", policy="static", exclusive=False, token_s=0.0051),
            PlacementTrial(placement="cache", policy="lru", exclusive=False, token_s=0.0069),
        ),
        "tried": 13,
        "crossing": 0.65,
        "assumptions": ("copies to the GPU: 29.34 GiB per second, datasheet, PCI Express 4.0 x16",),
    }
    plain = sample_plan()
    predicted = plain.predicted.model_copy(
        update={
            "token_s": Interval(value=0.0042, low=0.0031, high=0.0068),
            "first_token_s": Interval(value=0.7, low=0.6, high=0.9),
            "bound_token_s": 0.0031,
            "bytes_per_token": 0.0,
        }
    )
    budget = plain.budget.model_copy(update={"vram_bytes": 4096 * MIB, "memory_bytes": 16384 * MIB, "token_s": None})
    kept = {"budget": budget, "predicted": predicted, "cache_bytes": 3460 * MIB, "reasons": ("a sample",)}
    return plain.model_copy(update={**kept, "gpu": GpuPlacement(**{**values, **changes})})


def sample_record(*, events: int = 300, seed: int = 0, **changes: Any) -> DeviceRecord:
    """Return what a GPU did in a benchmark: a few experts uploaded, some computed by the processor."""
    draw = random.Random(seed)
    sample = tuple(_event(draw, index) for index in range(events))
    values: dict[str, Any] = {
        "name": "NVIDIA GeForce RTX 4090",
        "rule": "auto",
        "policy": "reuse",
        "exclusive": False,
        "pinned": True,
        "requested_bytes": 4096 * MIB,
        "planned_bytes": 4060 * MIB,
        "peak_bytes": 3981 * MIB,
        "vram_bytes": 1800 * MIB,
        "ram_bytes": 3700 * MIB,
        "tokens": 576,
        "token_s": 0.0121,
        "lookups": 576 * 128,
        "gpu_hits": 60211,
        "host_experts": 6004,
        "upload_bytes": 576 * 21 * MIB,
        "ahead_bytes": 576 * 9 * MIB,
        "flash_bytes": 576 * 130_000,
        "passes": 144,
        "pass_s": 1.71,
        "events": 1804,
        "event_s": 1.02,
        "busy_s": {"gpu": 0.31, "cpu": 0.55, "link": 0.42, "disk": 0.01},
        "waited_s": {"gpu": 0.71, "cpu": 0.47, "link": 0.70, "disk": 1.01},
        "exposed_s": 0.07,
        "bound_token_s": 0.0079,
        "sample": sample,
        "sampled": 2104,
        "errors": errors_of(sample),
    }
    return DeviceRecord(**{**values, **changes})


def _event(draw: random.Random, index: int) -> EventTime:
    decoding = index % 12 != 0
    predicted_s = (3e-4 if decoding else 4e-3) * math.exp(draw.gauss(0, 0.5))
    actual_s = predicted_s * math.exp(draw.gauss(0.05, 0.18))
    gpu_s, cpu_s, link_s = (predicted_s * draw.uniform(0.1, 0.9) for _ in range(3))
    drift = [math.exp(draw.gauss(0, 0.1)) for _ in range(3)]
    return EventTime(
        layer=index % 16,
        decoding=decoding,
        predicted_s=predicted_s,
        actual_s=actual_s,
        predicted_busy_s=(gpu_s, cpu_s, link_s, 0.0),
        actual_busy_s=(gpu_s * drift[0], cpu_s * drift[1], link_s * drift[2], 0.0),
    )
