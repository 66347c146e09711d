"""What people read of a decoder before it is planned: what it is made of, what precisions cost, what a machine does."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import TYPE_CHECKING

from edgeflex.schema import Precision
from edgeflex.schema_moe import DECODER_PRECISIONS
from edgeflex.terminal import ABSENT, prose, table_text
from edgeflex.units import format_bytes, format_count, format_fine_time, format_share

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from edgeflex.schema_moe import (
        DecoderCalibration,
        DecoderGraph,
        DecoderRates,
        DecoderSizes,
        UnitLoss,
    )

_T = "T: bytes of the experts that one token uses. A cache smaller than T reads every expert anew."
_MOST_LOSSES = 8


def blocks(*texts: str) -> str:
    """Return those that are not empty, an empty line between."""
    return "\n\n".join(text for text in texts if text)


def _millions(count: float) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


# --- graph and sizes ---------------------------------------------------------------------------------


def decoder_graph_text(graph: DecoderGraph) -> str:
    """Return what a decoder is made of, and the bytes that it and one token's experts take in each precision."""
    expert_layers = [layer for layer in graph.layers if layer.routing is not None]
    counts = sorted({(one.routing.experts, one.routing.top_k) for one in expert_layers if one.routing is not None})
    routing = " or ".join(f"{experts} experts, {top_k} a token" for experts, top_k in counts) or "no experts"
    total, active = _parameters(graph)
    one = graph.attention
    kind = "latent" if one.kind == "latent" else f"{one.heads} heads over {one.kv_heads} of keys and values"
    rows = [
        ("family", graph.family),
        ("layers", f"{len(graph.layers)}, {len(expert_layers)} of them with experts"),
        ("routing", routing),
        ("attention", kind),
        ("hidden", f"{graph.hidden_dim:,}"),
        ("vocabulary", f"{graph.vocabulary:,}"),
        ("parameters", f"{_millions(total)}, {_millions(active)} of them active for a token"),
        ("context", f"{graph.context_tokens:,} tokens"),
    ]
    bytes_rows = [(one.value, *_sizes_of(graph, one)) for one in DECODER_PRECISIONS]
    return blocks(
        table_text(graph.name, ("figure", "value"), rows),
        table_text("Bytes with everything in one precision", ("precision", "dense part", "experts", "T"), bytes_rows),
        prose(_T),
    )


def _weights(graph: DecoderGraph) -> Iterator[tuple[int, int, bool, float]]:
    """Yield (rows, columns, whether an expert's, uses a token) of every stored matrix."""
    share = {one.index: one.routing.top_k / one.routing.experts for one in graph.layers if one.routing is not None}
    for name, (rows, columns) in graph.matrix_shapes().items():
        if name == "head" and graph.tied_embedding:
            continue
        parts = name.split(".")
        expert = len(parts) > 2 and parts[2] == "experts"
        yield rows, columns, expert, share[int(parts[1])] if expert else 1.0


def _parameters(graph: DecoderGraph) -> tuple[int, float]:
    small = sum(math.prod(shape) for shape in graph.small_shapes().values())
    weights = list(_weights(graph))
    total = small + sum(rows * columns for rows, columns, _, _ in weights)
    return total, small + sum(rows * columns * uses for rows, columns, _, uses in weights)


def _sizes_of(graph: DecoderGraph, precision: Precision) -> tuple[str, str, str]:
    """Return dense bytes, experts' bytes and T in one precision, as text."""
    weights = list(_weights(graph))
    if precision is Precision.INT4_GROUP32 and any(columns % 32 for _, columns, _, _ in weights):
        return ABSENT, ABSENT, "no: columns"
    small = 4 * sum(math.prod(shape) for shape in graph.small_shapes().values())
    sizes = [(_stored_bytes(precision, rows, columns), expert, uses) for rows, columns, expert, uses in weights]
    dense = small + sum(size for size, expert, _ in sizes if not expert)
    experts = sum(size for size, expert, _ in sizes if expert)
    cycle = sum(size * uses for size, expert, uses in sizes if expert)
    return format_bytes(dense), format_bytes(experts), format_bytes(cycle)


def _stored_bytes(precision: Precision, rows: int, columns: int) -> int:
    from edgeflex.plans.decoder_costs import raw_bytes

    return raw_bytes(precision, rows, columns)


def decoder_sizes_text(sizes: DecoderSizes) -> str:
    """Return what fits, told by a checkpoint's headers alone."""
    limit = sizes.budget.memory_bytes
    rows = [
        (
            one.precision.value,
            format_bytes(one.experts_bytes),
            format_bytes(one.dense_bytes + one.experts_bytes + sizes.fixed_bytes),
            format_bytes(one.cycle_bytes),
            one.verdict.upper(),
        )
        for one in sizes.uniform
    ]
    asked = "No memory budget was given." if limit is None else f"Memory budget: {format_bytes(limit)}."
    return blocks(
        prose(
            f"{sizes.graph.name} ({sizes.graph.family}), from its headers; nothing was measured.",
            f"{asked} Whatever the precision, keys and values, buffers, norms and routers take "
            f"{format_bytes(sizes.fixed_bytes)}. What the process itself holds comes on top; calibrate measures it.",
        ),
        table_text("Everything in one precision", ("precision", "experts", "together", "T", "verdict"), rows),
        prose(_T),
    )


# --- calibration -------------------------------------------------------------------------------------


def decoder_calibration_text(calibration: DecoderCalibration) -> str:
    """Return what calibration found: loss, what each precision costs, and the units that cost most."""
    head = prose(
        f"{calibration.graph.name} on {calibration.tokens:,} tokens: fp32 loss {calibration.reference_loss:.3f} nats "
        f"per token (perplexity {math.exp(calibration.reference_loss):.2f})."
    )
    rows = [_precision_row(calibration, precision) for precision in DECODER_PRECISIONS[1:]]
    worst = sorted(calibration.losses, key=lambda one: -one.kl)[:_MOST_LOSSES]
    return blocks(
        head,
        table_text(
            "Cost of each precision: KL from fp32, nats per token",
            ("precision", "everything", "dense parts", "experts", "same choices"),
            rows,
        ),
        table_text(
            "Units that lose most",
            ("unit", "precision", "KL", "tokens"),
            [(one.unit, one.precision.value, f"{one.kl:.2e}", f"{one.tokens:,}") for one in worst],
        )
        if worst
        else "",
        _least_seen(calibration.losses),
    )


def rates_text(rates: DecoderRates) -> str:
    """Return what a machine does with a decoder's shapes: reads, what is beside matrices, and matrices of one row."""
    figures = [
        ("experts read", f"{rates.read_bytes_per_s / 1e6:,.0f} MB/s"),
        ("an event that reads, beside that", format_fine_time(rates.read_latency_s)),
        ("memory read", f"{rates.memory_bytes_per_s / 1e9:.1f} GB/s"),
        ("a decoded token, beside matrices", format_fine_time(rates.other_token_s)),
        ("a prompt's token, beside matrices", format_fine_time(rates.other_prefill_token_s)),
        ("the process without weights", format_bytes(rates.runtime_bytes)),
    ]
    if rates.first_read_bytes_per_s is not None:
        figures.insert(1, ("for the first time, and checked", f"{rates.first_read_bytes_per_s / 1e6:,.0f} MB/s"))
    matrices = [
        (one.precision.value, f"{one.rows:,} x {one.columns:,}", str(one.threads), format_fine_time(one.seconds))
        for one in rates.matrices
        if one.rows_in == 1
    ]
    return blocks(
        table_text(f"A decoder on {rates.device}", ("figure", "value"), figures),
        table_text(
            "Matrices with weights from memory",
            ("precision", "matrix", "threads", "one row"),
            sorted(matrices, key=itemgetter(0)),
        ),
    )


def _precision_row(calibration: DecoderCalibration, precision: Precision) -> tuple[str, ...]:
    whole = calibration.uniform_kl.get(precision)
    same = calibration.router_agreement.get(precision)
    sums = [
        math.fsum(one.kl for one in calibration.losses if one.precision is precision and is_expert(one.unit) is expert)
        for expert in (False, True)
    ]
    return (
        precision.value,
        ABSENT if whole is None else f"{whole:.4f}",
        *(f"{value:.4f}" for value in sums),
        ABSENT if same is None else format_share(same, 1),
    )


def is_expert(unit: str) -> bool:
    """Return whether a unit's name is an expert's."""
    return ".experts." in unit


def _least_seen(losses: Iterable[UnitLoss]) -> str:
    seen = [one.tokens for one in losses if is_expert(one.unit)]
    return prose(f"Every expert was judged by at least {format_count(min(seen), 'token')}.") if seen else ""
