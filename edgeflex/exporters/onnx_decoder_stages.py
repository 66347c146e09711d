"""A decoder's stages as ONNX templates: graphs whose weights are inputs, exported once per structure.

Weights never pass through the exporter: every matrix ``[rows, columns]`` and small tensor is an input of the template
under its own name (``qkv``, ``input_norm``), so that no optimiser can fold, merge or copy it, and a decoder of
many equal layers is exported once. ``onnx_decoder_graphs`` then puts a precision's operators where the weights
enter.

The host owns the cache of keys and values: an attention stage takes it and returns the rows to be written, so a
step's softmax runs over two score blocks, the cache's and the new rows', and the cache is never copied.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import rms_norm

from edgeflex.errors import UnsupportedError
from edgeflex.exporters.decoder_stages import AttentionStage, FeedForwardStage, HeadStage
from edgeflex.exporters.executorch import quiet_exporter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx

    from edgeflex.schema_moe import DecoderGraph, DecoderLayer

    Shapes = Mapping[str, tuple[int, ...]]

OPSET = 20
# Finite, so that a row without any allowed key stays a number, and far below every score of a trained decoder.
_NEVER = -1e30
_ATTENTION = frozenset({"qkv", "o", "q", "kv_a", "kv_b"})
_EXAMPLE_TOKENS, _EXAMPLE_ROWS = 3, 5  # other than 1, which the exporter would take for a constant


class CachedAttention(AttentionStage):
    """The attention stage with the cache outside: rows before ``positions[0]`` are read, new ones returned."""

    def __init__(self, graph: DecoderGraph, layer: DecoderLayer, shapes: Shapes) -> None:
        linears = {name: _bare(shape) for name, shape in shapes.items() if name in _ATTENTION}
        smalls = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name not in _ATTENTION}
        super().__init__(graph, layer, linears, smalls, context=1)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, positions: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Attend to the cache and to the rows themselves.

        Args:
            x: ``[T, hidden]``.
            positions: ``[T]`` int64, consecutive.
            key_cache: ``[kv_heads, P, head_dim]``; rows from ``positions[0]`` on are not attended to.
            value_cache: ``[kv_heads, P, value_dim]``.

        Returns:
            Sum with the residual and its normalised form ``[T, hidden]``, keys ``[kv_heads, T, head_dim]`` and
            values ``[kv_heads, T, value_dim]`` of the rows, then weights and experts ``[T, top_k]`` of a router.
        """
        y = self._norm(x, "input_norm")
        latent = self.attention.kind == "latent"
        query, key, value = self._latent(y, positions) if latent else self._grouped(y, positions)
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        x = x + self.o(self._mixed(query, positions, (key_cache, keys), (value_cache, values)))
        y = self._norm(x, "post_norm")
        return (x, y, keys, values) if self.routing is None else (x, y, keys, values, *self.route(y))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], self.get_buffer(name), self.epsilon)

    def _mixed(
        self,
        query: torch.Tensor,
        positions: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor],
        values: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Return ``[T, heads * value_dim]``; ``keys`` and ``values`` are the cache's and the rows' own."""
        a, rows = self.attention, query.shape[0]
        # heads that share keys are stacked below each row, so that the cache is not repeated for them
        shared = a.heads // a.kv_heads
        stacked = query.reshape(rows, a.kv_heads, shared * a.head_dim).transpose(0, 1)
        stacked = stacked.reshape(a.kv_heads, rows * shared, a.head_dim) * a.softmax_scale
        before, own = (torch.bmm(stacked, one.transpose(1, 2)) for one in keys)
        unwritten = torch.arange(before.shape[-1]) >= positions[:1]
        before = torch.where(unwritten, _NEVER, before)
        later = positions.unsqueeze(0) > positions.unsqueeze(-1)
        own = own.reshape(a.kv_heads, rows, shared, rows)
        own = torch.where(later.unsqueeze(1), _NEVER, own).reshape(a.kv_heads, rows * shared, rows)
        shares = torch.softmax(torch.cat((before, own), -1), -1)
        first, second = shares.split((before.shape[-1], rows), -1)
        mixed = torch.bmm(first, values[0]) + torch.bmm(second, values[1])
        mixed = mixed.reshape(a.kv_heads, rows, shared * a.value_dim)
        return mixed.transpose(0, 1).reshape(rows, a.heads * a.value_dim)


@lru_cache(maxsize=64)
def attention_template(graph: DecoderGraph) -> onnx.ModelProto:
    """Return the attention stage of the only layer of ``graph`` (see ``only``)."""
    layer, a = graph.layers[0], graph.attention
    shapes = attention_shapes(graph)
    tokens, cached = _dim("tokens"), _dim("cached")
    inputs = {
        "x": torch.zeros(_EXAMPLE_TOKENS, graph.hidden_dim),
        "positions": torch.arange(_EXAMPLE_ROWS, _EXAMPLE_ROWS + _EXAMPLE_TOKENS),
        "key_cache": torch.zeros(a.kv_heads, _EXAMPLE_ROWS, a.head_dim),
        "value_cache": torch.zeros(a.kv_heads, _EXAMPLE_ROWS, a.value_dim),
    }
    sizes = ({0: tokens}, {0: tokens}, {1: cached}, {1: cached})
    outputs = ["residual", "normed", "keys", "values"] + (["weights", "experts"] if layer.routing else [])
    return _exported(CachedAttention(graph, layer, shapes), inputs, sizes, outputs, shapes)


@lru_cache(maxsize=64)
def feed_forward_template(hidden_dim: int, width: int, *, gated: bool) -> onnx.ModelProto:
    """Return SwiGLU with ``width`` inner columns; ``gated``: times the sigmoid of a learned product."""
    shapes: dict[str, tuple[int, ...]] = {"gate_up": (2 * width, hidden_dim), "down": (hidden_dim, width)}
    linears = {name: _bare(shape) for name, shape in shapes.items()}
    smalls = {"shared_gate": np.zeros((1, hidden_dim), np.float32)} if gated else {}
    shapes |= {name: one.shape for name, one in smalls.items()}
    inputs = {"y": torch.zeros(_EXAMPLE_TOKENS, hidden_dim)}
    return _exported(FeedForwardStage(linears, smalls), inputs, ({0: _dim("tokens")},), ["out"], shapes)


@lru_cache(maxsize=8)
def head_template(graph: DecoderGraph) -> onnx.ModelProto:
    """Return final norm and head for one row."""
    shapes = {"head": (graph.vocabulary, graph.hidden_dim), "norm": (graph.hidden_dim,)}
    stage = HeadStage(graph, {"head": _bare(shapes["head"])}, {"norm": np.zeros(graph.hidden_dim, np.float32)})
    return _exported(stage, {"x": torch.zeros(1, graph.hidden_dim)}, ({},), ["logits"], shapes)


def only(graph: DecoderGraph, layer: DecoderLayer) -> DecoderGraph:
    """Return what a layer's attention and router depend on: equal layers of any decoder give equal graphs."""
    others = {"dense_dim": 0, "expert_dim": 0, "shared_dim": 0, "shared_gate": False}
    kept = layer.model_copy(update={"index": 0, **others})
    return graph.model_copy(update={"name": "", "weights_digest": "", "layers": (kept,)})


def attention_shapes(graph: DecoderGraph) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of an attention stage by local name."""
    start = f"layers.{graph.layers[0].index}."
    matrices = {name[len(start) :]: shape for name, shape in graph.matrix_shapes().items() if name.startswith(start)}
    smalls = {name[len(start) :]: shape for name, shape in graph.small_shapes().items() if name.startswith(start)}
    kept = {name: shape for name, shape in matrices.items() if name in _ATTENTION}
    return {**kept, **{name: shape for name, shape in smalls.items() if name != "shared_gate"}}


def _bare(shape: Sequence[int]) -> nn.Linear:
    """Return a layer without numbers, as a place for given ones."""
    rows, columns = shape
    return nn.Linear(columns, rows, bias=False, device="meta")


def _dim(name: str) -> Any:
    return torch.export.Dim(name, min=1, max=1 << 20)


class _WithWeights(nn.Module):
    """A stage whose weights are arguments. The stage hides in a tuple, so that its own are not exported."""

    def __init__(self, stage: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._held = (stage.eval(),)
        self._names = tuple(names)

    def forward(self, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> Any:
        return functional_call(self._held[0], dict(zip(self._names, weights, strict=True)), tuple(inputs))


def _exported(
    stage: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    sizes: Sequence[Mapping[int, Any]],
    outputs: Sequence[str],
    shapes: Shapes,
) -> onnx.ModelProto:
    """Export a stage with inputs, then weights, by name.

    Raises:
        UnsupportedError: The exporter cannot express it.
    """
    linear = {name for name, _ in stage.named_parameters()}
    names = [f"{name}.weight" if f"{name}.weight" in linear else name for name in shapes]
    arguments = (tuple(inputs.values()), tuple(torch.zeros(shape) for shape in shapes.values()))
    dynamic: Any = (tuple(sizes), tuple({} for _ in shapes))
    try:
        with quiet_exporter(), torch.no_grad():
            program: Any = torch.onnx.export(
                _WithWeights(stage, names),
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=[*inputs, *shapes],
                output_names=list(outputs),
                dynamic_shapes=dynamic,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UnsupportedError(
            f"{type(stage).__name__} cannot be exported to ONNX: {str(error).strip().splitlines()[0]}. "
            "Export for executorch instead."
        ) from error
    return _plain(program.model_proto)


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Strip what depends on the machine: stack traces, module names, paths."""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string, model.doc_string = "stage", "", ""
    del graph.metadata_props[:]
    del graph.value_info[:]  # shapes are inferred from the inputs again
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    for node in graph.node:
        said = sorted(node.attribute, key=lambda one: one.name)
        del node.attribute[:]
        node.attribute.extend(said)
    return model
