"""Prepared segments become one ``.pte``: a method a segment, weights stored once.

After writing, the file is read back: XNNPACK's own graphs are decoded and the precision of every layer is
compared with the plan, so that a silent fallback to another format is an error and not a surprise.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgeflex.bundle import PROGRAM
from edgeflex.errors import UnsupportedError
from edgeflex.exporters import Written
from edgeflex.files import write_atomic
from edgeflex.schema import LayerKind, LayerShape, ModelGraph, Precision, SegmentProgram
from edgeflex.transforms import PreparedModel, prepare, prepare_segment, quantized_layer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.fx import GraphModule

    from edgeflex.models import DynamicModel

BACKEND = "executorch"
PROGRAM_FILE = "program.pte"
_KINDS = {
    "XNNConv2d": LayerKind.CONV2D,
    "XNNDepthwiseConv2d": LayerKind.CONV2D,
    "XNNFullyConnected": LayerKind.LINEAR,
}
_NOT_FINITE = re.compile(r"(?<![\w\"])(?:inf|nan)(?![\w\"])")
_JSON_NAMES = {"inf": "Infinity", "nan": "NaN"}


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's own notices from the user; its errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch", "torchao", "executorch", "root", "")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def method_name(segment: int) -> str:
    """Return the name of a segment's method in the program."""
    return f"segment{segment}"


def lower(modules: Mapping[str, tuple[nn.Module, torch.Tensor]]) -> bytes:
    """Return the program with one method per module, given an example input of each.

    Raises:
        UnsupportedError: ExecuTorch cannot export or lower a module.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with quiet_exporter():
        try:
            exported = {
                name: torch.export.export(module, (example,), strict=False)
                for name, (module, example) in modules.items()
            }
            partitioners = {name: [XnnpackPartitioner()] for name in exported}
            edge = to_edge_transform_and_lower(exported, partitioner=partitioners)
            return bytes(edge.to_executorch().buffer)
        except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
            names = ", ".join(modules)
            raise UnsupportedError(
                f"ExecuTorch cannot lower {names}: {type(error).__name__}: {error}. "
                "Leave the operation out of the model, or choose another backend."
            ) from error


def program_from_prepared(prepared: PreparedModel) -> bytes:
    """Return the ``.pte`` bytes of all segments."""
    pairs = zip(prepared.segments, prepared.examples, strict=True)
    return lower({method_name(index): pair for index, pair in enumerate(pairs)})


def segment_programs(prepared: PreparedModel, graph: ModelGraph) -> tuple[SegmentProgram, ...]:
    """Return what each method takes and returns."""
    shapes = [tuple(example.shape) for example in prepared.examples]
    return tuple(
        SegmentProgram(
            method=method_name(index),
            input_shape=shape,
            input_dtype="int8" if prepared.examples[index].dtype == torch.int8 else "float32",
            output_shape=shapes[index + 1] if index + 1 < len(shapes) else None,
            exit=graph.exits[index].name,
        )
        for index, shape in enumerate(shapes)
    )


def kernel_program(shape: LayerShape, precision: Precision, seed: int = 0) -> tuple[bytes, torch.Tensor]:
    """Return a program of one layer, and an example input, for measuring kernel times."""
    torch.manual_seed(seed)
    if shape.kind is LayerKind.LINEAR:
        layer: nn.Module = nn.Linear(shape.in_channels, shape.out_channels)
        input_shape: tuple[int, ...] = (shape.rows, shape.in_channels)
    else:
        layer = nn.Conv2d(
            shape.in_channels,
            shape.out_channels,
            shape.kernel,
            shape.stride,
            shape.padding,
            groups=shape.groups,
        )
        input_shape = (shape.rows, shape.in_channels, shape.height, shape.width)
    module = quantized_layer(layer.requires_grad_(requires_grad=False), precision)
    example = torch.zeros(input_shape, dtype=torch.float16 if precision is Precision.FP16 else torch.float32)
    return lower({"forward": (module, example)}), example


class _Calls(nn.Module):
    """``delegates`` tiny XNNPACK graphs with a portable operation between them."""

    def __init__(self, delegates: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(delegates))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Alternate a delegated layer with an operation that XNNPACK does not take."""
        for layer in self.layers:
            x = torch.cumsum(layer(x), dim=-1)
        return torch.cumsum(x, dim=-1)


def call_programs() -> tuple[tuple[bytes, torch.Tensor], ...]:
    """Return programs of zero, one and two delegates, for measuring what a call and a delegate cost."""
    example = torch.zeros(1, 1)
    return tuple(
        (lower({"forward": (_Calls(count).requires_grad_(requires_grad=False), example)}), example)
        for count in range(3)
    )


@dataclass(frozen=True)
class StoredLayer:
    """A layer as the file holds it."""

    method: str
    kind: LayerKind
    precision: Precision | None
    weight_shape: tuple[int, ...]


def _decompile(payload: bytes, folder: Path) -> Any:
    """Return the JSON form of one XNNPACK graph, through the flatbuffer compiler that ExecuTorch ships."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    schema, binary = folder / "schema.fbs", folder / "graph.bin"
    schema.write_bytes(_get_schema_bytes())
    binary.write_bytes(payload[start : start + header.flatbuffer_size])
    _flatc_decompile(str(folder), str(schema), str(binary), ["--raw-binary"])
    # flatc writes C's inf and nan (the open end of a ReLU is inf); JSON readers know them by other names
    text = _NOT_FINITE.sub(lambda found: _JSON_NAMES[found.group()], (folder / "graph.json").read_text())
    return json.loads(text)


def _stored_precision(weight: Mapping[str, Any], source: Mapping[str, Any]) -> Precision | None:
    tensor = weight.get("tensor_value", weight)
    stored, given = tensor["datatype"], source.get("tensor_value", source)["datatype"]
    if stored == "xnn_datatype_fp32":
        return Precision.FP32
    if stored == "xnn_datatype_qcint8":
        return {
            "xnn_datatype_qdint8": Precision.INT8_DYNAMIC,
            "xnn_datatype_qint8": Precision.INT8_STATIC,
        }.get(given)
    if stored == "xnn_datatype_qcint4":
        return Precision.INT4_CHANNEL
    if stored == "xnn_datatype_qbint4":
        group = weight["quant_params"].get("group_size")
        # one group as wide as the layer is a scale per channel
        by_group = {tensor["dims"][-1]: Precision.INT4_CHANNEL, 32: Precision.INT4_GROUP32}
        return by_group.get(group)
    return Precision.FP16 if stored == "xnn_datatype_fp16" else None


def _layers_of_graph(graph: Mapping[str, Any], method: str) -> Iterator[StoredLayer]:
    values = {}
    for entry in graph["xvalues"]:
        value = entry["xvalue_union"]
        values[value.get("tensor_value", value)["id_out"]] = value
    for node in graph["xnodes"]:
        kind = _KINDS.get(node["xnode_union_type"])
        if kind is None:
            continue
        call = node["xnode_union"]
        weight, source = values[call["filter_id"]], values[call["input1_id"]]
        dims = tuple(weight.get("tensor_value", weight)["dims"])
        yield StoredLayer(method, kind, _stored_precision(weight, source), dims)


def stored_layers(program: bytes) -> tuple[StoredLayer, ...]:
    """Return every convolution and linear layer that the file's delegates hold, in execution order."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall

    parsed = deserialize_pte_binary(program).program
    found: list[StoredLayer] = []
    with tempfile.TemporaryDirectory(prefix="edgeflex-") as folder:
        for plan in parsed.execution_plan:
            calls = [
                instruction.instr_args.delegate_index
                for chain in plan.chains
                for instruction in chain.instructions
                if isinstance(instruction.instr_args, DelegateCall)
            ]
            for index in calls:
                payload = parsed.backend_delegate_data[plan.delegates[index].processed.index].data
                found.extend(_layers_of_graph(_decompile(bytes(payload), Path(folder)), plan.name))
    return tuple(found)


def _same_weight(shape: LayerShape, stored: StoredLayer) -> bool:
    count = 1
    for dim in stored.weight_shape:
        count *= dim
    return shape.kind is stored.kind and shape.weight_count == count


def _one_group(shape: LayerShape, plan: Precision, stored: Precision | None) -> bool:
    """Say whether both 4-bit formats are the same, a layer of 32 inputs having one group either way."""
    both = {Precision.INT4_CHANNEL, Precision.INT4_GROUP32}
    return shape.in_channels == 32 and plan in both and stored in both


def compare_precisions(program: bytes, graph: ModelGraph, wanted: Mapping[str, Precision]) -> dict[str, Precision]:
    """Return the precision that the file holds for each layer, if it is the one that was planned.

    Raises:
        UnsupportedError: A layer is missing from the delegates or is stored in another precision; all
            differences are listed.
    """
    stored = stored_layers(program)
    faults: list[str] = []
    held: dict[str, Precision] = {}
    for segment in range(graph.segment_count):
        layers = [layer for layer in graph.layers if layer.segment == segment]
        found = [layer for layer in stored if layer.method == method_name(segment)]
        if len(found) != len(layers):
            faults.append(f"{method_name(segment)} holds {len(found)} layers in XNNPACK, the model has {len(layers)}")
            continue
        for layer, there in zip(layers, found, strict=True):
            plan = wanted.get(layer.name, Precision.FP32)
            if not _same_weight(layer.shape, there):
                faults.append(f"{layer.name} stands as a {there.kind.value} of {there.weight_shape}")
            elif there.precision is not plan and not _one_group(layer.shape, plan, there.precision):
                name = there.precision.value if there.precision else "an unknown format"
                faults.append(f"{layer.name} is stored as {name}, the plan says {plan.value}")
            else:
                held[layer.name] = plan
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise UnsupportedError(
            f"the written program does not hold the plan:{listed}\nPlan again without these precisions."
        )
    return held


class ExecutorchExporter:
    """See ``edgeflex.exporters.Exporter``."""

    def prepare(
        self, model: DynamicModel, precisions: Mapping[str, Precision], ranges: Mapping[str, tuple[float, float]]
    ) -> PreparedModel:
        """Return the segments with XNNPACK's numbers."""
        return prepare(model, precisions, ranges)

    def prepare_segment(
        self,
        segment: GraphModule,
        index: int,
        precisions: Mapping[str, Precision],
        ranges: Mapping[str, tuple[float, float]],
    ) -> nn.Module:
        """Return one segment with XNNPACK's numbers."""
        return prepare_segment(segment, index, precisions, ranges)

    def write(self, prepared: PreparedModel, graph: ModelGraph, folder: Path) -> Written:
        """Lower all segments to one ``.pte``, and read its delegates back."""
        program = program_from_prepared(prepared)
        held = compare_precisions(program, graph, prepared.precisions)
        write_atomic(folder / PROGRAM_FILE, program)
        return Written({PROGRAM: PROGRAM_FILE}, segment_programs(prepared, graph), held, len(program))

    def pad(self, written: Written, folder: Path, size_bytes: int) -> None:
        """Write zeros behind the program, which ExecuTorch ignores.

        The planner reserves room by an upper bound of the file format's overhead; filling it makes the promise
        about bytes on disk exact, at the price of a few pages.
        """
        path = folder / PROGRAM_FILE
        if written.size_bytes > size_bytes:
            raise UnsupportedError(
                f"the program needs {written.size_bytes} bytes, the plan promised {size_bytes}. "
                "Calibrate and plan again."
            )
        write_atomic(path, path.read_bytes() + bytes(size_bytes - written.size_bytes))


EXECUTORCH = ExecutorchExporter()
