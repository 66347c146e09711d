"""Reports built by hand: a rich one like a real ResNet-56, and a small one whose sums fit on paper."""

from __future__ import annotations

import base64
import math
import random
import struct
import zlib
from typing import Any

import pytest

from edgeflex.reports import build_report
from edgeflex.schema import (
    BenchResult,
    Budget,
    BundleManifest,
    Certificate,
    Check,
    Choice,
    Conditions,
    CostTable,
    Curve,
    CurvePoint,
    Decision,
    Example,
    ExitPoint,
    ExitQuality,
    FileEntry,
    Footprint,
    Interval,
    LatencyLimit,
    Layer,
    LayerKind,
    LayerShape,
    MemoryBreakdown,
    ModelGraph,
    Option,
    Plan,
    Precision,
    Proof,
    Report,
    RequestStats,
    RunStats,
    Scenario,
    SegmentProgram,
    Tier,
    VerifyResult,
)

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_IDLE = Conditions(load_average=0.21, clock_hz=2.9e9, temperature_c=41.5)


def png_uri(seed: int, size: int = 32) -> str:
    """A small picture as a data URI; stored, not compressed, so that its bytes never depend on zlib."""
    rows = bytearray()
    for y in range(size):
        rows.append(0)
        for x in range(size):
            wave = math.sin((x * (seed % 3 + 1) + seed) / 6) + math.cos((y * (seed % 4 + 1)) / 7)
            rows += bytes((int(128 + 50 * wave), int(90 + 40 * wave + 2 * x), int(150 + 2 * y - 20 * wave)))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def _rich_layers() -> tuple[Layer, ...]:
    layers = [Layer(name="conv1", shape=_conv(3, 16, 32), segment=0, bias=False)]
    for stage, (channels, size) in enumerate(((16, 32), (32, 16), (64, 8)), start=1):
        for block in range(9):
            for conv in (1, 2):
                into = channels // 2 if stage > 1 and block == 0 and conv == 1 else channels
                segment = min(stage - 1 if stage < 3 else 2 + (block > 4), 3)
                name = f"layer{stage}.{block}.conv{conv}"
                layers.append(Layer(name=name, shape=_conv(into, channels, size), segment=segment, bias=False))
    layers += [
        Layer(name=f"exit{index + 1}.linear", shape=_linear(width), segment=index, bias=True, head=True)
        for index, width in enumerate((16, 32, 64, 64))
    ]
    layers += [
        Layer(name=f"layer{stage}.0.shortcut", shape=_conv(width // 2, width, 16), segment=stage - 1, bias=False)
        for stage, width in ((2, 32), (3, 64))
    ]
    return tuple(sorted(layers, key=lambda layer: layer.segment))


def _conv(into: int, out: int, size: int) -> LayerShape:
    return LayerShape(
        kind=LayerKind.CONV2D, in_channels=into, out_channels=out, kernel=3, padding=1, height=size, width=size
    )


def _linear(into: int) -> LayerShape:
    return LayerShape(kind=LayerKind.LINEAR, in_channels=into, out_channels=10)


def _rich_manifest() -> BundleManifest:
    layers = _rich_layers()
    rng = random.Random(3)
    kinds = {
        layer.name: rng.choice([Precision.INT4_GROUP32, Precision.INT4_CHANNEL, Precision.INT8_DYNAMIC])
        if layer.head
        else Precision.FP32
        if layer.name in {"conv1", "layer3.8.conv2"}
        else Precision.INT8_STATIC
        for layer in layers
    }
    graph = ModelGraph(
        name="resnet56-cifar10",
        weights_digest="ab" * 32,
        input_shape=(1, 3, 32, 32),
        classes=_CLASSES,
        segment_count=4,
        layers=layers,
        exits=tuple(
            ExitPoint(name=f"exit{index + 1}", segment=index, stage=stage)
            for index, stage in enumerate(("layer1", "layer2", "layer3.4", "layer3"))
        ),
    )
    table = rich_table(layers, kinds)
    plan = Plan(
        name="resnet56",
        backend="executorch",
        budget=Budget(
            memory_bytes={Tier.HOST: 4 * 2**20},
            latency=(LatencyLimit(limit_s=0.00025), LatencyLimit(limit_s=0.0006, statistic="p95")),
            max_drop=0.01,
            disk_bytes=2 * 2**20,
        ),
        scenario=table.scenarios[0],
        thresholds=(0.972, 0.914, None, None),
        choices=tuple(Choice(subject=name, option=precision.value) for name, precision in kinds.items()),
        exit_shares=(0.412, 0.377, 0.0, 0.211),
        predicted=Footprint(
            loss=0.31,
            latency_s={"mean": 0.000201, "p50": 0.000182, "p95": 0.000418, "p99": 0.000421, "worst": 0.000425},
            block_latency_s=(0.00011, 0.00008, 0.00007, 0.00016),
            memory_bytes={Tier.HOST: 2_310_144},
            disk_bytes=1_046_528,
        ),
        latency_interval_s={
            "mean": Interval(value=0.000201, low=0.000186, high=0.000217),
            "p95": Interval(value=0.000418, low=0.000389, high=0.000447),
        },
        memory=MemoryBreakdown(
            weights_bytes=890_112, activation_bytes=1_048_576, overhead_bytes=371_456, runtime_bytes=11_800_000
        ),
        accuracy=0.9312,
        reference_accuracy=0.9364,
        predicted_drop=0.0052,
        proof=Proof(
            solver="HiGHS 1.8 branch and cut",
            status="feasible",
            minimize="latency",
            objective=0.000201,
            bound=0.0002005,
            gap=0.0025,
            tolerance=1e-6,
            wall_s=0.41,
            scenarios=412,
            scenarios_solved=37,
        ),
        certificate=Certificate(
            test="fixed-sequence testing with betting p-values",
            drop_limit=0.01,
            confidence=0.95,
            samples=2500,
            candidates=24,
            certified_index=17,
            drop=0.0048,
            drop_upper_bound=0.0094,
        ),
        graph_digest=graph.digest(),
        table_digest=table.digest(),
        device_digest="cd" * 32,
        notes=("Exit 3 is never used: it costs more than it saves.",),
    )
    return BundleManifest(
        backend="executorch",
        versions={"edgeflex": "0.1.0", "executorch": "1.5.1", "torch": "2.13.0+cpu", "torchao": "0.18.0"},
        graph=graph,
        plan=plan,
        segments=tuple(
            SegmentProgram(method=f"segment{i}", input_shape=(1, 16, 32, 32), output_shape=None, exit=f"exit{i + 1}")
            for i in range(4)
        ),
        files=(FileEntry(path="model.pte", role="program", size_bytes=1_046_528, sha256="0" * 64),),
        tolerance=1e-3,
        layer_precisions=kinds,
        curve=_rich_curve(),
    )


def rich_table(layers: tuple[Layer, ...], kinds: dict[str, Precision]) -> CostTable:
    """A cost table in which early layers hurt most."""
    decisions = []
    for index, layer in enumerate(layers):
        harm = 0.02 * math.exp(-index / 14) * (1.3 + math.sin(index))
        options = tuple(
            Option(
                name=precision.value,
                loss=(0.0 if precision is Precision.FP32 else harm,),
                latency_s=1e-6,
                memory_bytes={Tier.HOST: 100},
            )
            for precision in {Precision.FP32, kinds[layer.name]}
        )
        ordered = tuple(sorted(options, key=lambda option: option.name))
        decisions.append(Decision(subject=layer.name, block=layer.segment, options=ordered))
    return CostTable(
        name="resnet56",
        scenarios=(Scenario(name="t17", reach=(1.0, 0.588, 0.211, 0.211), loss=0.3),),
        decisions=tuple(decisions),
        fixed_latency_s=(0.0,) * 4,
    )


def _rich_curve() -> Curve:
    points = []
    for index in range(12):
        latency_s = 0.000128 * 1.093**index
        drop = 0.031 * math.exp(-index / 3.0) - 0.0012
        points.append(
            CurvePoint(
                label=f"plan {index + 1}",
                latency_s=latency_s,
                memory_bytes=2_100_000 + 60_000 * index,
                drop=drop,
                chosen=index == 5,
            )
        )
    return Curve(
        points=tuple(points),
        baselines=(
            CurvePoint(label="fp32, full depth", latency_s=0.00127, memory_bytes=5_900_000, drop=0.0),
            CurvePoint(label="int8-static, full depth", latency_s=0.00040, memory_bytes=2_050_000, drop=0.0021),
            CurvePoint(label="fp32 with exits", latency_s=0.00061, memory_bytes=6_010_000, drop=0.0049),
        ),
    )


def _rich_samples() -> tuple[float, ...]:
    rng = random.Random(7)
    centres = (0.000112, 0.000203, 0.000405)
    chosen = [centres[0 if draw < 0.41 else 1 if draw < 0.79 else 2] for draw in (rng.random() for _ in range(300))]
    samples = []
    for centre in chosen * 5:
        jitter = sum(rng.random() for _ in range(6)) / 6 - 0.5
        samples.append(round(centre * (1 + 0.16 * jitter) + (0.0004 * rng.random() if rng.random() < 0.004 else 0), 9))
    return tuple(samples)


def _over_images(samples_s: tuple[float, ...]) -> dict[str, float]:
    images = sorted(sorted(samples_s[image::300])[2] for image in range(300))
    ranks = {"p50": 150, "p90": 270, "p95": 285, "p99": 297, "worst": 300}
    return {"mean": math.fsum(images) / 300} | {name: images[rank - 1] for name, rank in ranks.items()}


def rich_bench(manifest: BundleManifest) -> BenchResult:
    samples_s = _rich_samples()
    return BenchResult(
        manifest_digest=manifest.digest(),
        device="Intel Xeon 2.9 GHz",
        threads=1,
        images=300,
        repeats=5,
        checks=(
            Check(name="load time", unit="s", limit=None, promised=0.004, measured=0.0036, ok=True),
            Check(
                name="share leaving at exit1",
                unit="share",
                limit=None,
                promised=0.412,
                measured=0.409,
                low=0.371,
                high=0.453,
                ok=True,
            ),
        ),
        latency_s=_over_images(samples_s),
        exit_latency_s=(0.000112, 0.000203, 0.000262, 0.000405),
        exit_shares=(0.409, 0.383, 0.0, 0.208),
        samples_s=samples_s,
        peak_memory_bytes=2_402_304,
        runtime_memory_bytes=12_140_000,
        before=_IDLE,
        after=Conditions(load_average=0.98, clock_hz=3.1e9, temperature_c=55.0, energy_j=12.5),
    )


def rich_verify(manifest: BundleManifest) -> VerifyResult:
    names = [point.name for point in manifest.graph.exits]
    figures = ((0.782, 0.021, 0.881), (0.874, 0.017, 0.899), (0.919, 0.012, 0.921), (0.934, 0.009, 0.934))
    leavers = ((0.409, 0.981), (0.383, 0.964), (0.0, None), (0.208, 0.781))
    wrong = {5}
    return VerifyResult(
        manifest_digest=manifest.digest(),
        images=2500,
        skipped_seen=0,
        checks=(
            Check(name="largest difference of outputs", unit="count", limit=1e-3, promised=0, measured=2.4e-4, ok=True),
            Check(
                name="program size budget",
                unit="bytes",
                limit=2 * 2**20,
                promised=1_046_528,
                measured=1_046_528,
                ok=True,
            ),
            Check(
                name="accuracy drop",
                unit="share",
                limit=0.01,
                promised=0.0048,
                measured=0.0048,
                low=-0.0012,
                high=0.0109,
                ok=True,
                note="95% interval -0.0012 to 0.0109 (Clopper–Pearson, 2500 images)",
            ),
        ),
        accuracy=0.9316,
        reference_accuracy=0.9364,
        drop=0.0048,
        exits=tuple(
            ExitQuality(name=name, accuracy=a, ece=e, auroc=r, share=s, accuracy_of_leavers=left)
            for name, (a, e, r), (s, left) in zip(names, figures, leavers, strict=True)
        ),
        oracle_accuracy=0.9624,
        oracle_latency_s=0.000139,
        static_points=(
            CurvePoint(label="resnet20 int8", latency_s=0.000171, memory_bytes=900_000, drop=0.0193),
            CurvePoint(label="resnet32 int8", latency_s=0.000252, memory_bytes=1_300_000, drop=0.0098),
            CurvePoint(label="resnet56 int8", latency_s=0.00040, memory_bytes=2_050_000, drop=0.0021),
            CurvePoint(label="resnet20 fp32", latency_s=0.00046, memory_bytes=2_300_000, drop=0.0182),
        ),
        examples=tuple(
            Example(
                input=f"dev/{index:05d}.jpg",
                image=png_uri(index),
                label=_CLASSES[index],
                prediction=_CLASSES[(index + 2) % 10] if index in wrong else _CLASSES[index],
                exit=0 if index < 4 else 1 if index < 5 else 3,
                confidence=0.998 - 0.004 * index if index < 4 else 0.71 - 0.03 * index,
            )
            for index in range(8)
        ),
    )


def small_manifest(**changes: Any) -> BundleManifest:
    """Two exits, three layers; ``changes`` replace fields of the plan."""
    layers = (
        Layer(name="stem", shape=_conv(1, 4, 8), segment=0, bias=False),
        Layer(name="body", shape=_conv(4, 8, 8), segment=1, bias=False),
        Layer(name="head", shape=_linear(8), segment=1, bias=True, head=True),
    )
    graph = ModelGraph(
        name="digits",
        weights_digest="11" * 32,
        input_shape=(1, 1, 8, 8),
        segment_count=2,
        layers=layers,
        exits=(ExitPoint(name="early", segment=0, stage="stem"), ExitPoint(name="last", segment=1, stage="body")),
    )
    plan = Plan(
        name="digits",
        backend="executorch",
        budget=Budget(
            memory_bytes={Tier.HOST: 1000}, latency=(LatencyLimit(limit_s=0.003),), max_drop=0.02, disk_bytes=700
        ),
        scenario=Scenario(name="t", reach=(1.0, 0.25), loss=0.1),
        thresholds=(0.9, None),
        choices=(Choice(subject="stem", option="fp32"), Choice(subject="body", option="int8-static")),
        exit_shares=(0.75, 0.25),
        predicted=Footprint(
            loss=0.1,
            latency_s={"mean": 0.002, "worst": 0.004},
            block_latency_s=(0.001, 0.003),
            memory_bytes={Tier.HOST: 800},
            disk_bytes=600,
        ),
        latency_interval_s={"mean": Interval(value=0.002, low=0.0018, high=0.0022)},
        memory=MemoryBreakdown(weights_bytes=400, activation_bytes=300, overhead_bytes=100),
        predicted_drop=0.01,
        proof=Proof(
            solver="HiGHS",
            status="optimal",
            minimize="latency",
            objective=0.002,
            bound=0.002,
            gap=0.0,
            tolerance=1e-6,
            wall_s=0.01,
            scenarios=2,
            scenarios_solved=2,
        ),
    )
    return BundleManifest(
        backend="executorch",
        versions={"edgeflex": "0.1.0"},
        graph=graph,
        plan=plan.model_copy(update=changes),
        segments=(),
        files=(
            FileEntry(path="model.pte", role="program", size_bytes=600, sha256="0" * 64),
            FileEntry(path="expected.safetensors", role="expected", size_bytes=50, sha256="1" * 64),
        ),
        tolerance=1e-3,
        layer_precisions={"stem": Precision.FP32, "body": Precision.INT8_STATIC, "head": Precision.FP32},
    )


def small_bench(manifest: BundleManifest) -> BenchResult:
    """Four samples whose mean is 2.5 ms by hand."""
    return BenchResult(
        manifest_digest=manifest.digest(),
        device="a machine",
        threads=1,
        images=2,
        repeats=2,
        checks=(),
        latency_s={},
        exit_latency_s=(0.001, 0.004),
        exit_shares=(0.5, 0.5),
        samples_s=(0.001, 0.004, 0.002, 0.003),
        peak_memory_bytes=900,
        runtime_memory_bytes=5000,
        before=Conditions(),
        after=Conditions(),
    )


def small_verify(manifest: BundleManifest) -> VerifyResult:
    return VerifyResult(
        manifest_digest=manifest.digest(),
        images=100,
        skipped_seen=0,
        checks=(),
        accuracy=0.95,
        reference_accuracy=0.98,
        drop=0.03,
        exits=(),
        oracle_accuracy=0.99,
        oracle_latency_s=0.0015,
        static_points=(CurvePoint(label="tiny", latency_s=0.0024, memory_bytes=300, drop=0.05),),
        examples=(
            Example(input="3.png", image=png_uri(1, 8), label="three", prediction="three", exit=0, confidence=0.99),
        ),
    )


def small_stats(manifest: BundleManifest) -> RunStats:
    return RunStats(
        manifest_digest=manifest.digest(),
        runtime="executorch",
        device="a machine",
        threads=2,
        requests=tuple(
            RequestStats(input=f"{i}.png", exit=0, prediction=1, confidence=0.9, latency_s=s)
            for i, s in enumerate((0.001, 0.002))
        ),
        load_s=0.1,
        peak_memory_bytes=950,
        runtime_memory_bytes=1,
        before=Conditions(),
        after=Conditions(),
    )


@pytest.fixture
def rich_table_of_plan() -> CostTable:
    manifest = _rich_manifest()
    return rich_table(manifest.graph.layers, dict(manifest.layer_precisions))


@pytest.fixture
def rich_report() -> Report:
    manifest = _rich_manifest()
    return build_report(manifest, rich_bench(manifest), rich_verify(manifest), None)


@pytest.fixture
def make_small():
    """Return a builder of small reports; each part can be left out or replaced."""

    class Small:
        manifest = staticmethod(small_manifest)
        bench = staticmethod(small_bench)
        verify = staticmethod(small_verify)
        stats = staticmethod(small_stats)

    return Small
