"""A tiny random mixture-of-experts decoder as a bundle, written by hand: no torch, no exporter.

Two kinds of layers (a dense one first), shared experts, experts of two precisions and so of two packed sizes.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflex.schema import Choice, FileEntry, Interval, Precision
from edgeflex.schema_moe import (
    Attention,
    DecoderBudget,
    DecoderGraph,
    DecoderLayer,
    DecoderManifest,
    DecoderMemory,
    DecoderPlan,
    DecoderPrediction,
    MatrixRecord,
    Routing,
)
from edgeflex.transforms.decoder_weights import quantize_matrix

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

VOCABULARY = 96
HIDDEN = 64
EXPERTS = 8
TOP_K = 2
EXPERT_DIM = 64
LAYERS = 4
CONTEXT = 64
INT4, INT8, FP32 = Precision.INT4_GROUP32, Precision.INT8_DYNAMIC, Precision.FP32


def tiny_graph(*, layers: int = LAYERS, experts: int = EXPERTS, dense_first: bool = True) -> DecoderGraph:
    """Return the decoder's graph; with ``dense_first`` layer 0 has no experts."""
    heads, head_dim = 4, 16
    return DecoderGraph(
        name="tiny",
        family="qwen2_moe",
        weights_digest="0" * 64,
        hidden_dim=HIDDEN,
        vocabulary=VOCABULARY,
        layers=tuple(
            DecoderLayer(index=index, routing=None, dense_dim=96)
            if dense_first and index == 0
            else DecoderLayer(
                index=index,
                routing=Routing(experts=experts, top_k=TOP_K, normalised=True),
                expert_dim=EXPERT_DIM,
                shared_dim=32,
                shared_gate=True,
            )
            for index in range(layers)
        ),
        attention=Attention(
            heads=heads,
            kv_heads=2,
            head_dim=head_dim,
            value_dim=head_dim,
            rotary_dim=head_dim,
            bias=True,
            inverse_frequencies=tuple(10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)),
            softmax_scale=head_dim**-0.5,
        ),
        norm_epsilon=1e-6,
        tied_embedding=False,
        context_tokens=CONTEXT,
        end_tokens=(),
    )


def tiny_plan(graph: DecoderGraph, **changes: Any) -> DecoderPlan:
    """Return a plan with a cache for about a third of the experts."""
    memory = DecoderMemory(dense_bytes=1, cache_bytes=1, kv_bytes=1, activations_bytes=1, runtime_bytes=1)
    zero = Interval(value=0.5, low=0.0, high=1.0)
    known: dict[str, Any] = {
        "graph_digest": graph.digest(),
        "budget": DecoderBudget(),
        "verdict": "offload",
        "reasons": ("a test",),
        "choices": (Choice(subject="layers.1", option=INT8.value),),
        "cache_bytes": 96 << 10,
        "cycle_bytes": 48 << 10,
        "context_tokens": graph.context_tokens,
        "prefill_chunk_tokens": 8,
        "predicted": DecoderPrediction(
            token_s=zero,
            first_token_s=zero,
            memory=memory,
            disk_bytes=0,
            kl=0.0,
            hit_rate=0.0,
            bytes_per_token=0.0,
            bound_token_s=0.0,
        ),
    }
    return DecoderPlan(**{**known, **changes})


def expert_precision(layer: int, expert: int) -> Precision:
    """Return the precision of an expert: two sizes, mixed within every layer."""
    return INT8 if (layer + expert) % 3 == 0 else INT4


def write_tiny_bundle(folder: Path, *, seed: int = 0, graph: DecoderGraph | None = None, **plan: Any) -> Path:
    """Write the bundle into ``folder`` and return it; keywords change the plan."""
    known = graph or tiny_graph()
    draw = np.random.default_rng(seed)
    matrices: list[MatrixRecord] = []
    files: list[FileEntry] = []
    for name, members in _files(known):
        raw = bytearray(b"FlatTensor stands here".ljust(64, b"\0"))
        for member, precision, shape in members:
            matrices.append(_append(raw, name, member, precision, _values(draw, member, shape)))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        digest = hashlib.sha256(raw).hexdigest()
        files.append(FileEntry(path=name, role=name, size_bytes=len(raw), sha256=digest))
    manifest = DecoderManifest(
        versions={}, graph=known, plan=tiny_plan(known, **plan), matrices=tuple(matrices), files=tuple(files)
    )
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1)
    (folder / "manifest.json").write_text(text + "\n")
    return folder


def _files(graph: DecoderGraph) -> Iterator[tuple[str, list[tuple[str, Precision, tuple[int, int]]]]]:
    yield "weights/embedding.ptd", [("embedding", INT8, (VOCABULARY, HIDDEN))]
    yield "weights/head.ptd", [("head", INT8, (VOCABULARY, HIDDEN)), ("norm", FP32, (1, HIDDEN))]
    for layer in graph.layers:
        unit = f"layers.{layer.index}"
        yield f"weights/{unit}/dense.ptd", _dense(unit, layer, graph.attention)
        for expert in range(layer.routing.experts if layer.routing else 0):
            precision = expert_precision(layer.index, expert)
            name = f"{unit}.experts.{expert}"
            yield (
                f"weights/{unit}/expert.{expert}.ptd",
                [
                    (f"{name}.gate_up", precision, (2 * layer.expert_dim, HIDDEN)),
                    (f"{name}.down", precision, (HIDDEN, layer.expert_dim)),
                ],
            )


def _dense(unit: str, layer: DecoderLayer, attention: Attention) -> list[tuple[str, Precision, tuple[int, int]]]:
    query, key = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    members = [
        (f"{unit}.input_norm", FP32, (1, HIDDEN)),
        (f"{unit}.post_norm", FP32, (1, HIDDEN)),
        (f"{unit}.qkv_bias", FP32, (1, query + 2 * key)),
        (f"{unit}.qkv", INT8, (query + 2 * key, HIDDEN)),
        (f"{unit}.o", INT8, (HIDDEN, query)),
    ]
    if layer.routing is None:
        return [
            *members,
            (f"{unit}.mlp.gate_up", INT8, (2 * layer.dense_dim, HIDDEN)),
            (f"{unit}.mlp.down", INT8, (HIDDEN, layer.dense_dim)),
        ]
    return [
        *members,
        (f"{unit}.router", FP32, (layer.routing.experts, HIDDEN)),
        (f"{unit}.shared_gate", FP32, (1, HIDDEN)),
        (f"{unit}.shared.gate_up", INT4, (2 * layer.shared_dim, HIDDEN)),
        (f"{unit}.shared.down", INT4, (HIDDEN, layer.shared_dim)),
    ]


def _values(draw: np.random.Generator, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return weights that make texts varied: norms near one, everything else wide."""
    if name.endswith("norm"):
        return (1.0 + 0.1 * draw.normal(size=shape)).astype(np.float32)
    scale = 3.0 if name.endswith("router") else 1.5
    values: NDArray[np.float32] = (scale * draw.normal(size=shape) / np.sqrt(shape[1])).astype(np.float32)
    return values


def _append(raw: bytearray, file: str, name: str, precision: Precision, values: NDArray[np.float32]) -> MatrixRecord:
    stored = quantize_matrix(values, precision)
    offset = _aligned(raw)
    raw += stored.codes.tobytes()
    scales_offset = None
    if stored.scales is not None:
        scales_offset = _aligned(raw)
        raw += stored.scales.tobytes()
    return MatrixRecord(
        name=name,
        precision=precision,
        rows=stored.rows,
        columns=stored.columns,
        file=file,
        offset=offset,
        scales_offset=scales_offset,
    )


def _aligned(raw: bytearray) -> int:
    raw += bytes(-len(raw) % 16)
    return len(raw)
