"""Template programs: one per shape and precision, without weights, for any stock ExecuTorch.

A template is lowered once, with made-up numbers that only it holds. XNNPACK names each constant by its content;
as the content is ours, each name leads back to the piece of data that it stands for, and any expert's or layer's
file that offers its own numbers under these names runs with the same program.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from edgeflex.errors import UnsupportedError
from edgeflex.exporters.decoder_files import (
    EMBEDDING_FILE,
    HEAD_FILE,
    dense_path,
    expert_kind,
    is_matrix,
    local_name,
    pieces_of,
)
from edgeflex.exporters.decoder_stages import (
    AttentionStage,
    EmbeddingStage,
    FeedForwardStage,
    HeadStage,
    kernel_linear,
)
from edgeflex.exporters.executorch import quiet_exporter, stored_layers
from edgeflex.exporters.flat_tensor import DataKey
from edgeflex.schema import Precision
from edgeflex.transforms.decoder_weights import GROUP, StoredMatrix, quantize_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.models.decoders import DecoderSource
    from edgeflex.schema_moe import DecoderGraph, DecoderLayer, DecoderPlan

    Shapes = Mapping[str, tuple[int, int]]
    Keys = Mapping[str, tuple[DataKey, ...]]

_TAG = "weights"
# What belongs to the program and not to a layer: the sequence, and what follows from the configuration.
_OWN = ("inverse_frequencies", "key_cache", "value_cache", "lifted_tensor")


@dataclass(frozen=True)
class Template:
    """A program without weights.

    Attributes:
        program: The ``.pte``.
        keys: For each piece of data, the names that the program asks for it under.
    """

    program: bytes
    keys: Keys


@dataclass(frozen=True)
class TemplateUse:
    """What a template is for; uses of one ``stem`` share one program.

    Attributes:
        role: Of the program.
        stem: Its file's name.
        layer: The layer, or None for experts and both ends.
        precision: Of its matrices.
        kind: Of the files that offer it data.
        data: The file that it runs with; none for experts, where it is any expert's.
        build: Lowers it, given a folder for the moment.
        renamed: Names of matrices that are others in the file.
    """

    role: Literal["embedding", "attention", "expert", "dense", "head"]
    stem: str
    layer: int | None
    precision: Precision
    kind: str
    data: tuple[str, ...]
    build: Callable[[Path], Template]
    renamed: Mapping[str, str] = field(default_factory=dict)


def lengths_of(plan: DecoderPlan) -> tuple[int, int]:
    """Return the tokens of a program's cache, and the most tokens a call."""
    return plan.context_tokens, min(plan.prefill_chunk_tokens, plan.context_tokens)


def template_uses(
    source: DecoderSource, plan: DecoderPlan, precisions: Mapping[str, Precision]
) -> Iterator[TemplateUse]:
    """Yield every use of a template in this decoder: both ends, each layer, each kind of expert."""
    graph = source.graph
    lengths = lengths_of(plan)
    chunk = lengths[1]
    one = precisions["embedding"]
    build: Callable[[Path], Template] = partial(embedding_template, graph, one, chunk)
    yield TemplateUse("embedding", f"embedding.{one.value}", None, one, EMBEDDING_FILE, (EMBEDDING_FILE,), build)
    seen: dict[str, str] = {}
    for layer in graph.layers:
        yield from _layer_uses(source, layer, precisions[f"layers.{layer.index}"], lengths, seen)
    yield from _expert_uses(source, precisions, chunk)
    one = precisions["head"]
    file = EMBEDDING_FILE if graph.tied_embedding else HEAD_FILE
    renamed = {"head": "embedding"} if graph.tied_embedding else {}
    build = partial(head_template, graph, one)
    yield TemplateUse("head", f"head.{one.value}", None, one, file, (file,), build, renamed)


def _layer_uses(
    source: DecoderSource, layer: DecoderLayer, precision: Precision, lengths: tuple[int, int], seen: dict[str, str]
) -> Iterator[TemplateUse]:
    shapes = {local_name(name): _matrix_shape(source, name) for name in source.layer_tensors(layer.index)}
    prefix = "mlp." if layer.routing is None else "shared."
    inner = {name: shape for name, shape in shapes.items() if name.startswith(prefix) or name == "shared_gate"}
    outer = {name: shape for name, shape in shapes.items() if name not in inner}
    path, graph = dense_path(layer.index), source.graph
    build: Callable[[Path], Template] = partial(attention_template, graph, layer, outer, precision, lengths)
    role = f"attention-{layer.routing.experts}-experts" if layer.routing else "attention"
    stem = _stem(role, precision, (outer, layer.routing), seen)
    yield TemplateUse("attention", stem, layer.index, precision, path, (path,), build)
    if inner:
        build = partial(feed_forward_template, graph, prefix, inner, precision, lengths[1])
        stem = _stem("dense" if layer.routing is None else "shared", precision, inner, seen)
        yield TemplateUse("dense", stem, layer.index, precision, path, (path,), build)


def _expert_uses(source: DecoderSource, precisions: Mapping[str, Precision], chunk: int) -> Iterator[TemplateUse]:
    kinds: set[str] = set()
    for layer in source.graph.layers:
        for expert in range(layer.routing.experts if layer.routing else 0):
            precision = precisions[f"layers.{layer.index}.experts.{expert}"]
            kind = expert_kind(layer.expert_dim, precision)
            if kind in kinds:
                continue
            kinds.add(kind)
            names = source.expert_tensors(layer.index, expert)
            shapes = {local_name(name): _matrix_shape(source, name) for name in names}
            stem = f"expert-{layer.expert_dim}.{precision.value}"
            build = partial(feed_forward_template, source.graph, "", shapes, precision, chunk)
            yield TemplateUse("expert", stem, None, precision, kind, (), build)


def _matrix_shape(source: DecoderSource, name: str) -> tuple[int, int]:
    """Return a tensor's shape as a matrix; a norm or bias is one row."""
    shape = source.shape(name)
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _stem(role: str, precision: Precision, what: object, seen: dict[str, str]) -> str:
    """Name a layer's template: the same for layers of one shape, numbered where shapes differ."""
    same = f"{role}.{precision.value} {what!r}"
    if same not in seen:
        alike = sum(1 for other in seen if other.startswith(f"{role}.{precision.value} "))
        seen[same] = f"{role}.{precision.value}" + (f".{alike + 1}" if alike else "")
    return seen[same]


def embedding_template(graph: DecoderGraph, precision: Precision, chunk: int, folder: Path) -> Template:
    """Return the program that looks up rows of tokens."""
    content = _Content({"embedding": (graph.vocabulary, graph.hidden_dim)}, precision, {})
    stage = EmbeddingStage(content.matrices["embedding"])
    return _lowered(stage, (torch.arange(_rows(chunk)) % graph.vocabulary,), chunk, content, folder, linears=False)


def attention_template(
    graph: DecoderGraph,
    layer: DecoderLayer,
    shapes: Shapes,
    precision: Precision,
    lengths: tuple[int, int],
    folder: Path,
) -> Template:
    """Return the program of a layer's attention and router.

    Args:
        graph: The decoder.
        layer: One of the layers that the program is for.
        shapes: Rows and columns of the attention's matrices and small tensors, by name without the layer.
        precision: Of the matrices.
        lengths: Tokens of the cache, and most tokens a call.
        folder: Where to write for a moment.
    """
    content = _Content.split(shapes, precision)
    context, chunk = lengths
    stage = AttentionStage(graph, layer, content.linears(), content.smalls, context)
    rows = _rows(chunk)
    return _lowered(stage, (torch.zeros(rows, graph.hidden_dim), torch.arange(rows)), chunk, content, folder)


def feed_forward_template(
    graph: DecoderGraph, prefix: str, shapes: Shapes, precision: Precision, chunk: int, folder: Path
) -> Template:
    """Return the program of a feed-forward whose matrices are ``prefix`` + ``gate_up`` and ``down``."""
    content = _Content.split(shapes, precision)
    linears = {name.removeprefix(prefix): linear for name, linear in content.linears().items()}
    stage = FeedForwardStage(linears, content.smalls)
    return _lowered(stage, (torch.zeros(_rows(chunk), graph.hidden_dim),), chunk, content, folder)


def head_template(graph: DecoderGraph, precision: Precision, folder: Path) -> Template:
    """Return the program of final norm and head, for one row."""
    shapes = {"head": (graph.vocabulary, graph.hidden_dim), "norm": (1, graph.hidden_dim)}
    content = _Content.split(shapes, precision)
    return _lowered(
        HeadStage(graph, content.linears(), content.smalls), (torch.zeros(1, graph.hidden_dim),), 1, content, folder
    )


class _Content:
    """Made-up numbers that tell every piece of data from every other by its bytes."""

    def __init__(self, matrices: Shapes, precision: Precision, smalls: Shapes) -> None:
        self.precision = precision
        self.matrices = {name: _made_up(name, shape, precision) for name, shape in matrices.items()}
        self.small_shapes = dict(smalls)
        stored = {name: _made_up(name, shape, Precision.FP32) for name, shape in smalls.items()}
        self.smalls = {name: one.codes if _is_rows(name) else one.codes.reshape(-1) for name, one in stored.items()}
        self.pieces: dict[str, str] = {}
        for name, one in {**self.matrices, **stored}.items():
            for piece, values in pieces_of(name, one).items():
                self.pieces[hashlib.sha256(values.data.cast("B")).hexdigest()] = piece

    @classmethod
    def split(cls, shapes: Shapes, precision: Precision) -> _Content:
        matrices = {name: shape for name, shape in shapes.items() if is_matrix(name)}
        return cls(matrices, precision, {name: shape for name, shape in shapes.items() if name not in matrices})

    def linears(self) -> dict[str, nn.Module]:
        return {name: kernel_linear(stored) for name, stored in self.matrices.items()}

    def expected(self) -> list[tuple[tuple[int, ...], str]]:
        """Return shape and precision of every product that XNNPACK should hold."""
        quantised = [((one.rows, one.columns), self.precision.value) for one in self.matrices.values()]
        rows = [(shape, Precision.FP32.value) for name, shape in self.small_shapes.items() if _is_rows(name)]
        return sorted([*quantised, *rows])


def _is_rows(name: str) -> bool:
    """Say whether a small tensor is multiplied with, and not a norm or bias."""
    return name in {"router", "shared_gate"}


def _made_up(name: str, shape: tuple[int, int], precision: Precision) -> StoredMatrix:
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    if precision is Precision.FP32:
        return quantize_matrix(draw.standard_normal(shape, dtype=np.float32), precision)
    rows, columns = shape
    if precision is Precision.INT8_DYNAMIC:
        codes: NDArray[Any] = draw.integers(-127, 128, size=shape, dtype=np.int8)
        scales: NDArray[Any] = draw.uniform(0.5, 1.0, size=rows).astype(np.float32)
        return StoredMatrix(precision, rows, columns, codes, scales)
    codes = draw.integers(0, 256, size=(rows, columns // 2), dtype=np.uint8)
    scales = draw.integers(0x3F00, 0x3F80, size=(rows, columns // GROUP), dtype=np.uint16)  # 0.5 to 1
    return StoredMatrix(precision, rows, columns, codes, scales)


def _rows(chunk: int) -> int:
    """Rows of the example: more than one, so that one is not taken for a constant."""
    return min(chunk, 3)


def _tag(node: Any) -> str | None:
    text = f"{node.name} {node.target}"
    return None if any(own in text for own in _OWN) else _TAG


def _lowered(
    stage: nn.Module,
    examples: tuple[torch.Tensor, ...],
    chunk: int,
    content: _Content,
    folder: Path,
    *,
    linears: bool = True,
) -> Template:
    """Lower ``stage``, its rows variable up to ``chunk``, its constants named and left outside."""
    rows = torch.export.Dim("rows", min=1, max=chunk) if chunk > 1 else None
    shapes = tuple({0: rows} for _ in examples) if rows is not None else None
    kind = type(stage).__name__
    with quiet_exporter(), torch.no_grad():
        try:
            manager = _executorch_program(stage.requires_grad_(requires_grad=False), examples, shapes)
            manager.write_tensor_data_to_file(str(folder))
        except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
            raise UnsupportedError(
                f"ExecuTorch cannot lower {kind} in {content.precision.value}: {type(error).__name__}: {error}. "
                "Export without stock programs, or plan with other precisions."
            ) from error
    program = bytes(manager.buffer)
    if linears:
        _compare_products(kind, program, content)
    return Template(program, _keys(folder / f"{_TAG}.ptd", kind, content))


def _executorch_program(stage: nn.Module, examples: tuple[torch.Tensor, ...], shapes: Any) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes.external_constants_pass import delegate_external_constants_pass_unlifted
    from torchao.utils import unwrap_tensor_subclass

    unwrap_tensor_subclass(stage)  # else quantised weights stay in the program
    flat = torch.export.export(stage, examples, dynamic_shapes=shapes, strict=False).module()
    delegate_external_constants_pass_unlifted(module=flat, gen_tag_fn=_tag)
    exported = torch.export.export(flat, examples, dynamic_shapes=shapes, strict=False)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner()],
        # the validity check runs operators on symbolic sizes and so pins the rows to those of the example
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    return edge.to_executorch(ExecutorchBackendConfig(external_constants=_tag))


def _compare_products(kind: str, program: bytes, content: _Content) -> None:
    """Refuse a program whose delegates do not hold every matrix in its precision."""
    held = sorted((one.weight_shape, _held_name(one.precision, one.weight_shape)) for one in stored_layers(program))
    wanted = sorted((shape, _held_name(Precision(value), shape)) for shape, value in content.expected())
    if held != wanted:
        raise UnsupportedError(f"the lowered {kind} holds {held}, the plan needs {wanted}. Plan with other precisions.")


def _held_name(precision: Precision | None, shape: Sequence[int]) -> str:
    """Name a precision; of 32 columns, one group and one channel are the same."""
    if precision is Precision.INT4_CHANNEL and shape[-1] == GROUP:
        return Precision.INT4_GROUP32.value
    return precision.value if precision else "an unknown format"


def _keys(path: Path, kind: str, content: _Content) -> Keys:
    """Return under which names the program asks for each piece, by the bytes that it was lowered with."""
    from executorch.exir._serialize._cord import Cord
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    payload = FlatTensorSerializer().deserialize(Cord(path.read_bytes()))
    path.unlink()
    found: dict[str, tuple[DataKey, ...]] = {}
    for key, entry in payload.named_data.items():
        piece = content.pieces.get(hashlib.sha256(payload.buffers[entry.buffer_index]).hexdigest())
        if piece is None:
            raise UnsupportedError(
                f"the lowered {kind} asks for {key!r}, which is no piece of its weights. "
                "Export without stock programs, and report this."
            )
        found[piece] = (*found.get(piece, ()), DataKey(key, entry.tensor_layout))
    return found
