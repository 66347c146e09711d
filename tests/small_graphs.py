"""A small two-exit network as plain values, with a device that has measured every kernel of it. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflex.schema import (
    Capabilities,
    ComputeRate,
    DeviceProfile,
    ExitPoint,
    Figure,
    FormatEdge,
    Kernel,
    Layer,
    LayerKind,
    LayerShape,
    ModelGraph,
    Precision,
    Tier,
    TierSpec,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

FP32, STATIC, DYNAMIC = Precision.FP32, Precision.INT8_STATIC, Precision.INT8_DYNAMIC
CHANNEL, GROUP = Precision.INT4_CHANNEL, Precision.INT4_GROUP32

CAPABILITIES = Capabilities(
    backend="executorch",
    precisions={
        LayerKind.CONV2D: (FP32, STATIC),
        LayerKind.LINEAR: (FP32, STATIC, DYNAMIC, CHANNEL, GROUP),
    },
)


def conv(channels: int, out: int, size: int, *, stride: int = 1, groups: int = 1) -> LayerShape:
    return LayerShape(
        kind=LayerKind.CONV2D,
        in_channels=channels,
        out_channels=out,
        kernel=3,
        stride=stride,
        padding=1,
        groups=groups,
        height=size,
        width=size,
    )


def linear(inputs: int, outputs: int, rows: int = 1) -> LayerShape:
    return LayerShape(kind=LayerKind.LINEAR, in_channels=inputs, out_channels=outputs, rows=rows)


def graph() -> ModelGraph:
    """Return three segments: convolutions, a head after the first, linear layers in the last."""
    return ModelGraph(
        name="small",
        weights_digest="1" * 64,
        input_shape=(3, 16, 16),
        classes=("a", "b", "c"),
        segment_count=3,
        layers=(
            Layer(name="stem", shape=conv(3, 16, 16), segment=0, bias=True),
            Layer(name="exit0.linear", shape=linear(16, 3), segment=0, bias=True, head=True),
            Layer(name="body", shape=conv(16, 32, 16, stride=2), segment=1, bias=False),
            Layer(name="exit1.linear", shape=linear(32, 3), segment=1, bias=True, head=True),
            Layer(name="wide", shape=linear(32, 64), segment=2, bias=True),
            Layer(name="last", shape=linear(64, 3), segment=2, bias=True),
        ),
        edges=(
            FormatEdge(source="", target="stem", segment=0, elements=768),
            FormatEdge(source="stem", target="", segment=0, elements=4096),
            FormatEdge(source="stem", target="exit0.linear", segment=0, elements=16),
            FormatEdge(source="exit0.linear", target="", segment=0, elements=3),
            FormatEdge(source="", target="body", segment=1, elements=4096),
            FormatEdge(source="body", target="", segment=1, elements=2048),
            FormatEdge(source="body", target="exit1.linear", segment=1, elements=32),
            FormatEdge(source="", target="wide", segment=2, elements=2048),
            FormatEdge(source="wide", target="last", segment=2, elements=64),
            FormatEdge(source="last", target="", segment=2, elements=3),
        ),
        exits=tuple(ExitPoint(name=name, segment=k, stage="") for k, name in enumerate(("exit0", "exit1", "final"))),
    )


def figure(value: float) -> Figure:
    return Figure(value=value, origin="measured", source="a test")


def kernel(shape: LayerShape, precision: Precision, seconds: float, threads: int = 1) -> Kernel:
    return Kernel(shape=shape, precision=precision, threads=threads, seconds=figure(seconds))


# seconds a multiply-accumulate
RATES = {FP32: 1e-9, STATIC: 3e-10, DYNAMIC: 4e-10, CHANNEL: 5e-10, GROUP: 5e-10, Precision.FP16: 8e-10}


def kernels(known: ModelGraph) -> tuple[Kernel, ...]:
    """Return a kernel for every layer in every precision of its kind: 2 us and the time of its operations."""
    return tuple(
        kernel(layer.shape, precision, 2e-6 + layer.shape.macs * RATES[precision])
        for layer in known.layers
        for precision in CAPABILITIES.precisions[layer.shape.kind]
    )


def device(
    *measured: Kernel,
    cpu: Iterable[tuple[str, float, bool]] = (),
    read: Sequence[tuple[Tier, float]] = (),
) -> DeviceProfile:
    """Return a device with these kernels, CPU rates (precision, operations a second, sparse) and read speeds."""
    return DeviceProfile(
        name="bench-board",
        title="A board on a bench",
        origin="measured",
        kernels=measured,
        call_s=figure(5e-6),
        compute=tuple(
            ComputeRate(engine="cpu", precision=name, ops_per_s=figure(rate), sparse=sparse)
            for name, rate, sparse in cpu
        ),
        tiers=tuple(TierSpec(tier=tier, read_bytes_per_s=figure(speed)) for tier, speed in read),
    )


def probabilities(
    count: int, seed: int, *, exits: int = 3, classes: int = 3
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return labels [n] and probabilities [n, exits, classes] of exits that get better with depth."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, size=count)
    hardness = draw.exponential(1.0, size=(count, 1, 1))
    right = np.eye(classes)[labels][:, None, :] * np.linspace(1.5, 4.0, exits)[None, :, None]
    return labels, _softmax(right + hardness * draw.normal(size=(count, exits, classes)))


def changed(base: NDArray[np.float32], seed: int, amount: float) -> NDArray[np.float32]:
    """Return probabilities [n, exits, classes] disturbed by ``amount`` in their logarithms."""
    draw = np.random.default_rng(seed)
    return _softmax(np.log(base) + amount * draw.normal(size=base.shape))


def _softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    strength = np.exp(logits - logits.max(axis=2, keepdims=True))
    shares: NDArray[np.float32] = (strength / strength.sum(axis=2, keepdims=True)).astype(np.float32)
    return shares
