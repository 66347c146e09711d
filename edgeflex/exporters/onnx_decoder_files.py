"""The files of a decoder's bundle for ONNX: raw weights, and stages that name them as external data.

Every number lies on disk once, in the raw form of ``MatrixRecord``: an expert in a file of its own, which the host
reads and hands to its template; the embedding in one that the host looks rows up in; everything else in the data
file of the stage that multiplies with it. A tied head's data file is the embedding's too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx

from edgeflex.exporters.decoder_files import unit_of
from edgeflex.exporters.decoder_raw import EMBEDDING_FILE, RawFiles, WrittenFiles, template_path
from edgeflex.exporters.onnx_decoder_graphs import Place, enter_weight, seal_weights, weight_places
from edgeflex.exporters.onnx_decoder_stages import (
    attention_shapes,
    attention_template,
    feed_forward_template,
    head_template,
    only,
)
from edgeflex.schema_moe import StockProgram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from edgeflex.progress import Progress
    from edgeflex.schema import Precision
    from edgeflex.schema_moe import DecoderGraph, DecoderLayer

HEAD_STEM = "stages/head"


@dataclass(frozen=True)
class Stage:
    """One graph to be, and the weights in it.

    Attributes:
        role: As in ``StockProgram``.
        layer: None for the head.
        stem: Path without suffix.
        template: Gives its graph, with a weight's local name as its input.
        weights: Full names by local names, in the order in which they are stored.
    """

    role: Literal["attention", "dense", "head"]
    layer: int | None
    stem: str
    template: Callable[[], onnx.ModelProto]
    weights: Mapping[str, str]


def stages(graph: DecoderGraph) -> Iterator[Stage]:
    """Yield every stage with weights of its own: layer by layer, then the head."""
    for layer in graph.layers:
        yield from _layer_stages(graph, layer)
    shared = only(graph, graph.layers[0])
    yield Stage("head", None, HEAD_STEM, lambda: head_template(shared), {"head": "head", "norm": "norm"})


def _layer_stages(graph: DecoderGraph, layer: DecoderLayer) -> Iterator[Stage]:
    start, stem = f"layers.{layer.index}.", f"stages/layer-{layer.index}"
    one = only(graph, layer)
    names = {name: start + name for name in attention_shapes(one)}
    yield Stage("attention", layer.index, f"{stem}.attention", lambda: attention_template(one), names)
    width = layer.dense_dim if layer.routing is None else layer.shared_dim
    if not width:
        return
    inner = "mlp." if layer.routing is None else "shared."
    names = {name: start + inner + name for name in ("gate_up", "down")}
    if layer.shared_gate:
        names["shared_gate"] = f"{start}shared_gate"

    def template() -> onnx.ModelProto:
        return feed_forward_template(graph.hidden_dim, width, gated=layer.shared_gate)

    yield Stage("dense", layer.index, f"{stem}.dense", template, names)


class OnnxFiles(RawFiles):
    """Writes weights and stages into a folder; see ``RawFiles``."""

    def write(self, told: Progress) -> WrittenFiles:
        """Write everything; memory holds one matrix, or a few experts."""
        graph = self.source.graph
        ours = tuple(stages(graph))
        for place in ("stages", "weights"):
            (self.folder / place).mkdir()
        with told.task("stages", len(ours)) as advance:
            for stage in ours:
                self._write_stage(stage)
                advance(1)
        if graph.tied_embedding:
            (self.folder / "weights").rmdir()
            self.copy_record("head", to="embedding")
        else:
            self.write_weights(EMBEDDING_FILE, ("embedding",))
        self.write_experts(told)
        for width, precision in self.expert_kinds():
            path = template_path(width, precision)
            self.save(expert_model(graph.hidden_dim, width, precision), path)
            self.programs.append(StockProgram(role="expert", layer=None, precision=precision, path=path))
        return self.written()

    def _write_stage(self, stage: Stage) -> None:
        data = f"{stage.stem}.data"
        records = self.write_weights(data, stage.weights.values())
        model = onnx.ModelProto()
        model.CopyFrom(stage.template())
        places: dict[str, Place] = {}
        for local, full in stage.weights.items():
            record = records[full]
            places |= weight_places(local, record)
            if unit_of(full):
                enter_weight(model, local, record.precision, record.rows, record.columns, constant=True)
        seal_weights(model, places, data.rpartition("/")[2])
        path = f"{stage.stem}.onnx"
        self.save(model, path)
        unit = unit_of(next(name for name in stage.weights.values() if unit_of(name)))
        self.programs.append(
            StockProgram(
                role=stage.role, layer=stage.layer, precision=self.precisions[unit or ""], path=path, data=(data,)
            )
        )


def expert_model(hidden_dim: int, width: int, precision: Precision) -> onnx.ModelProto:
    """Return the graph of any expert of this width and precision; its weights are inputs in their raw form."""
    model = onnx.ModelProto()
    model.CopyFrom(feed_forward_template(hidden_dim, width, gated=False))
    enter_weight(model, "gate_up", precision, 2 * width, hidden_dim, constant=False)
    enter_weight(model, "down", precision, hidden_dim, width, constant=False)
    return model
