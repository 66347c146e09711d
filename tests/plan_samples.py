"""Small decoders as planners see them: graph, calibration and rates. Nothing is run."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeflex.schema import Figure, Precision
from edgeflex.schema_moe import (
    Attention,
    DecoderCalibration,
    DecoderGraph,
    DecoderLayer,
    DecoderRates,
    MatrixRate,
    Routing,
    UnitLoss,
)
from tests.random_decoder import units_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32


def packed_bytes(precision: Precision, rows: int, columns: int) -> int:
    """Stand in for the kernels' packing: codes, and a scale a row."""
    return rows * columns * precision.bits // 8 + 4 * rows


def graph_of(
    layers: int = 2,
    experts: int = 4,
    top_k: int = 2,
    hidden: int = 64,
    inner: int = 64,
    *,
    heads: int = 2,
    tied: bool = True,
    vocabulary: int = 256,
) -> DecoderGraph:
    """Return a decoder with experts in every layer."""
    routing = Routing(experts=experts, top_k=top_k, normalised=True)
    head_dim = hidden // heads
    return DecoderGraph(
        name="tiny",
        family="olmoe",
        weights_digest="0" * 64,
        hidden_dim=hidden,
        vocabulary=vocabulary,
        layers=tuple(DecoderLayer(index=one, routing=routing, expert_dim=inner) for one in range(layers)),
        attention=Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            value_dim=head_dim,
            rotary_dim=head_dim,
            inverse_frequencies=(1.0,) * (head_dim // 2),
            softmax_scale=1.0,
        ),
        norm_epsilon=1e-5,
        tied_embedding=tied,
        context_tokens=2048,
    )


def expert_shapes(graph: DecoderGraph) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of an expert's two matrices."""
    hidden, inner = graph.hidden_dim, graph.layers[0].expert_dim
    return (2 * inner, hidden), (hidden, inner)


def calibration_of(
    graph: DecoderGraph, seed: int = 0, *, int8: float = 0.02, least: float = 0.0, kl: float | None = None
) -> DecoderCalibration:
    """Return a calibration whose KL in four bits is drawn for each unit, or ``kl`` for all; int8 has a share of it."""
    draw = np.random.default_rng(seed)
    losses = []
    for unit in units_of(graph):
        worst = float(draw.gamma(0.5, 0.01)) + least if kl is None else kl
        losses.append(UnitLoss(unit=unit, precision=INT4, kl=worst, tokens=100))
        losses.append(UnitLoss(unit=unit, precision=INT8, kl=worst * int8, tokens=100))
    return DecoderCalibration(graph=graph, text_digest="t", tokens=100, reference_loss=3.0, losses=tuple(losses))


def rates_of(
    graph: DecoderGraph,
    seconds: Callable[[Precision, int, int, int, int], float],
    *,
    precisions: Sequence[Precision] = (INT8, INT4),
    rows_in: Sequence[int] = (1, 16),
    threads: Sequence[int] = (1,),
    **figures: Any,
) -> DecoderRates:
    """Return the rates of a processor on which a matrix takes ``seconds(precision, rows, columns, rows_in, threads)``.

    Args:
        graph: Whose matrices they are.
        seconds: The formula.
        precisions: That were timed.
        rows_in: Likewise.
        threads: Likewise.
        figures: Other fields.
    """
    hidden = graph.hidden_dim
    shapes = {(3 * hidden, hidden), (hidden, hidden), (graph.vocabulary, hidden), *expert_shapes(graph)}
    matrices = tuple(
        MatrixRate(
            rows=rows, columns=columns, precision=one, rows_in=n, threads=count,
            seconds=seconds(one, rows, columns, n, count),
        )
        for (rows, columns), one, n, count in itertools.product(sorted(shapes), precisions, rows_in, threads)
    )  # fmt: skip
    known: dict[str, Any] = {
        "device": "test",
        "matrices": matrices,
        "read_bytes_per_s": 1e9,
        "read_latency_s": 1e-4,
        "memory_bytes_per_s": 1e10,
        "other_token_s": 1e-5,
        "other_prefill_token_s": 1e-6,
        "runtime_bytes": 10_000,
    }
    return DecoderRates(**{**known, **figures})


def figure(value: float, origin: Literal["measured", "datasheet"] = "measured") -> Figure:
    """Return a figure of a profile."""
    return Figure(value=value, origin=origin, source="a test")
