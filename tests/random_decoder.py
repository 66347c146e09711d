"""Decoders whose numbers are drawn when asked for, and plans for them: what exporters take, without a checkpoint."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflex.schema import Choice, Precision
from tests.tiny_decoder import expert_precision, tiny_plan

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.schema_moe import DecoderGraph, DecoderPlan

FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32


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
