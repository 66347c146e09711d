"""Decoders whose numbers are drawn when asked for, and plans for them: what exporters take, without a checkpoint."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflex.schema import Choice, Precision
from edgeflex.schema_moe import Attention, DecoderGraph, DecoderLayer, Routing
from tests.tiny_decoder import expert_precision, tiny_plan

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.schema_moe import DecoderPlan

FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32
FAMILIES = ("olmoe", "qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v2")
FAMILY_HIDDEN, FAMILY_VOCABULARY, FAMILY_EXPERTS = 64, 96, 4


class RandomSource:
    """A decoder as ``models.decoders.DecoderSource`` gives it; norms near one, routers wide."""

    def __init__(self, graph: DecoderGraph, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text("{}")
        self.graph = graph
        self.folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {**graph.matrix_shapes(), **graph.small_shapes()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> NDArray[np.float32]:
        name = "embedding" if name == "head" and self.graph.tied_embedding else name
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        values = np.random.default_rng(seed).standard_normal(self._shapes[name], dtype=np.float32)
        if name.endswith("norm"):
            return np.float32(1) + np.float32(0.1) * values
        scale = 3.0 if name.endswith("router") else 1.5
        return values * np.float32(scale / np.sqrt(values.shape[-1]))

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self.tensor(name)[start:stop]

    def gather(self, name: str, wanted: Any) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.tensor(name)[np.asarray(wanted)]
        return found

    def layer_tensors(self, index: int) -> tuple[str, ...]:
        start = f"layers.{index}."
        return tuple(name for name in self._shapes if name.startswith(start) and ".experts." not in name)

    def expert_tensors(self, index: int, expert: int) -> tuple[str, str]:
        start = f"layers.{index}.experts.{expert}."
        return f"{start}gate_up", f"{start}down"


def units_of(graph: DecoderGraph) -> list[str]:
    """Return every unit that has a precision."""
    found = ["embedding", "head", *(f"layers.{layer.index}" for layer in graph.layers)]
    for layer in graph.layers:
        experts = layer.routing.experts if layer.routing else 0
        found += [f"layers.{layer.index}.experts.{expert}" for expert in range(experts)]
    return found


def exact_plan(graph: DecoderGraph, **changes: Any) -> DecoderPlan:
    """Return a plan with everything in fp32."""
    return _plan(graph, dict.fromkeys(units_of(graph), FP32), changes)


def mixed_plan(graph: DecoderGraph, **changes: Any) -> DecoderPlan:
    """Return a plan with experts in two precisions, mixed within every layer, and a dense layer in a third."""
    chosen = dict.fromkeys(units_of(graph), INT8)
    for unit in chosen:
        if ".experts." in unit:
            _, layer, _, expert = unit.split(".")
            chosen[unit] = expert_precision(int(layer), int(expert))
    return _plan(graph, chosen | {"layers.0": INT4}, changes)


def _plan(graph: DecoderGraph, chosen: dict[str, Precision], changes: dict[str, Any]) -> DecoderPlan:
    choices = tuple(Choice(subject=unit, option=one.value) for unit, one in chosen.items())
    return tiny_plan(graph, **{"choices": choices, **changes})


def family_graph(family: str) -> DecoderGraph:
    """Return a small decoder with what is peculiar to a family."""
    latent = family == "deepseek_v2"
    norms: dict[str, Any] = {"olmoe": "projection", "qwen3_moe": "head"}
    grouped: dict[str, Any] = {
        "heads": 4,
        "kv_heads": 4 if family == "olmoe" else 2,
        "head_dim": 16,
        "value_dim": 16,
        "rotary_dim": 16,
        "bias": family == "qwen2_moe",
        "query_key_norm": norms.get(family, "none"),
        "softmax_scale": 0.25,
    }
    latents = {"heads": 4, "kv_heads": 4, "head_dim": 24, "value_dim": 16, "rotary_dim": 8, "latent_dim": 32}
    shape: dict[str, Any] = (
        {"kind": "latent", **latents, "rotary_scale": 1.1, "softmax_scale": 0.2} if latent else grouped
    )
    rotary = shape["rotary_dim"]
    shared = {"qwen2_moe": 32, "deepseek_v2": 96}.get(family, 0)
    routing = Routing(experts=FAMILY_EXPERTS, top_k=3, normalised=not latent, scale=1.5 if latent else 1.0)
    routed: dict[str, Any] = {"routing": routing, "expert_dim": 32, "shared_dim": shared}
    routed["shared_gate"] = family == "qwen2_moe"
    dense = [DecoderLayer(index=0, routing=None, dense_dim=96)] if latent else []
    start = len(dense)
    return DecoderGraph(
        name="tiny",
        family=family,  # type: ignore[arg-type]
        weights_digest="0" * 64,
        hidden_dim=FAMILY_HIDDEN,
        vocabulary=FAMILY_VOCABULARY,
        layers=(*dense, *(DecoderLayer(index=index, **routed) for index in range(start, start + 2))),
        attention=Attention(
            **shape, inverse_frequencies=tuple(10000.0 ** (-2 * one / rotary) for one in range(rotary // 2))
        ),
        norm_epsilon=1e-6,
        tied_embedding=family == "mixtral",
        context_tokens=64,
    )


def kind_precisions(graph: DecoderGraph, kind: str) -> dict[str, Precision]:
    """Return one precision for all units, or, mixed, every one among experts and among dense parts."""
    units = sorted(units_of(graph))
    if kind != "mixed":
        return dict.fromkeys(units, Precision(kind))
    turns = (INT4, INT8, FP32)
    chosen = {unit: turns[place % 3] for place, unit in enumerate(units)}
    return chosen | {"embedding": INT8, "head": INT8 if graph.tied_embedding else INT4}


def kind_plan(graph: DecoderGraph, kind: str = "mixed", **changes: Any) -> DecoderPlan:
    """Return a plan with ``kind_precisions``."""
    return _plan(graph, kind_precisions(graph, kind), changes)
