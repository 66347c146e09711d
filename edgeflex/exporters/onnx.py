"""Prepared segments become ONNX graphs: ``segment0.onnx`` with its weights in ``segment0.data``, and so on.

Precisions stand in the files as ONNX says them: int8, int4 and fp8 weights are stored as such and restored by
DequantizeLinear, activations pass QuantizeLinear and DequantizeLinear. Opset 20, 21 where int4 is stored; batch 1.
After writing, the files are read back, and the precision of every layer is compared with the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import onnx
from torch import fx

from edgeflex.bundle import PROGRAM_PART
from edgeflex.errors import UnsupportedError
from edgeflex.exporters import Written
from edgeflex.exporters.executorch import method_name, segment_programs
from edgeflex.exporters.onnx_graph import Skeletons, add_confidence, fill, serialise
from edgeflex.files import write_atomic
from edgeflex.schema import Layer, LayerKind, ModelGraph, Precision
from edgeflex.transforms import prepare_explicit, prepare_explicit_segment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import nn

    from edgeflex.models import DynamicModel
    from edgeflex.transforms import PreparedModel

_FLOAT, _HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
_INT8, _INT4, _FP8 = onnx.TensorProto.INT8, onnx.TensorProto.INT4, onnx.TensorProto.FLOAT8E4M3FN
_BITS = {_FLOAT: 32, _HALF: 16, _INT8: 8, _FP8: 8, _INT4: 4}
_KINDS = {"Conv": LayerKind.CONV2D, "MatMul": LayerKind.LINEAR, "Gemm": LayerKind.LINEAR}
_BLOCKS = {64: Precision.INT4_BLOCK64, 128: Precision.INT4_BLOCK128}
_WEIGHT = ".weight"
# Both exporters write the same skeletons, and a process writes many mixes of one model.
_SKELETONS = Skeletons()


# --- reading back ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredLayer:
    """A layer as a file holds it; ``precision`` is None where weight and activations make none of ours."""

    kind: LayerKind
    precision: Precision | None
    weight_count: int
    weight_bytes: int


class _Reader:
    """One graph, with what produces each value."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = graph.node
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output}

    def restored(self, name: str) -> tuple[onnx.NodeProto | None, str]:
        """Return the DequantizeLinear that gives a value, or None, and the name of what is behind it."""
        node = self.maker.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            return node, node.input[0]
        return None, name

    def type_of_steps(self, activation: str) -> int | None:
        """Return the type that an activation was quantised to, or None if it was not."""
        restore, steps = self.restored(activation)
        node = self.maker.get(steps)
        if restore is None or node is None or node.op_type != "QuantizeLinear":
            return None
        zero = self.stored.get(node.input[2]) if len(node.input) > 2 else None
        scales = {node.input[1], restore.input[1]}
        return None if zero is None or len(scales) > 1 else int(zero.data_type)

    def scale_count(self, restore: onnx.NodeProto) -> int:
        """Return how many scales a weight has."""
        scale = self.stored.get(restore.input[1])
        return 0 if scale is None else prod(scale.dims)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(one.i) for one in node.attribute if one.name == name), default)


def _precision(reader: _Reader, node: onnx.NodeProto, weight: onnx.TensorProto) -> Precision | None:
    """Return the precision that weight and activation of a node make together."""
    restore, _ = reader.restored(node.input[1])
    if restore is None:
        return {_FLOAT: Precision.FP32, _HALF: Precision.FP16}.get(weight.data_type)
    steps, scales = reader.type_of_steps(node.input[0]), reader.scale_count(restore)
    axis, block = _attribute(restore, "axis", 1), _attribute(restore, "block_size", 0)
    channels = 0 if node.op_type == "Conv" else 1
    by_channel = not block and scales == weight.dims[channels] and axis == channels
    if weight.data_type == _INT8 and steps == _INT8 and by_channel:
        return Precision.INT8_STATIC
    if weight.data_type == _FP8 and steps == _FP8 and not block and scales == 1:
        return Precision.FP8
    in_blocks = block > 0 and axis == 0 and node.op_type == "MatMul" and scales * block == prod(weight.dims)
    return _BLOCKS.get(block) if weight.data_type == _INT4 and in_blocks else None


def _stored_bytes(weight: onnx.TensorProto) -> int:
    fields = {entry.key: entry.value for entry in weight.external_data}
    return int(fields.get("length", len(weight.raw_data)))


def _layers(graph: onnx.GraphProto) -> Iterator[tuple[str, StoredLayer]]:
    reader = _Reader(graph)
    for node in reader.nodes:
        if node.op_type not in _KINDS:
            continue
        weight = reader.stored.get(reader.restored(node.input[1])[1])
        if weight is None:
            continue  # a product of two activations
        count, size = prod(weight.dims), _stored_bytes(weight)
        whole = size * 8 == count * _BITS.get(weight.data_type, 0)
        precision = _precision(reader, node, weight) if whole else None
        yield weight.name.removesuffix(_WEIGHT), StoredLayer(_KINDS[node.op_type], precision, count, size)


def stored_layers(folder: Path, segments: int) -> dict[str, StoredLayer]:
    """Return every convolution and linear layer of a written program, by the name of its weight.

    Args:
        folder: Where ``segment0.onnx`` and its like lie.
        segments: How many there are.
    """
    found: dict[str, StoredLayer] = {}
    for index in range(segments):
        model = onnx.load(folder / f"{method_name(index)}.onnx", load_external_data=False)
        found |= dict(_layers(model.graph))
    return found


def stored_precisions(folder: Path, graph: ModelGraph) -> dict[str, Precision | None]:
    """Return the precision that the files hold for each layer; None where it is none of ours, or there is no layer."""
    found = stored_layers(folder, graph.segment_count)
    return {layer.name: found[layer.name].precision if layer.name in found else None for layer in graph.layers}


def _difference(layer: Layer, there: StoredLayer | None, plan: Precision) -> str | None:
    """Return how a layer in the file differs from the plan, or None."""
    if there is None:
        return f"{layer.name} is not there"
    if there.kind is not layer.shape.kind or there.weight_count != layer.shape.weight_count:
        return f"{layer.name} stands as a {there.kind.value} of {there.weight_count} weights"
    if there.precision is plan:
        return None
    name = there.precision.value if there.precision else "an unknown format"
    return f"{layer.name} is stored as {name} ({there.weight_bytes} bytes), the plan says {plan.value}"


def compare_precisions(folder: Path, graph: ModelGraph, wanted: Mapping[str, Precision]) -> dict[str, Precision]:
    """Return the precision that the files hold for each layer, if it is the one that was planned.

    Raises:
        UnsupportedError: A layer is missing or is stored in another precision; all differences are listed.
    """
    found = stored_layers(folder, graph.segment_count)
    held = {layer.name: wanted.get(layer.name, Precision.FP32) for layer in graph.layers}
    differences = [_difference(layer, found.get(layer.name), held[layer.name]) for layer in graph.layers]
    if faults := [one for one in differences if one is not None]:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise UnsupportedError(
            f"the written program does not hold the plan:{listed}\nPlan again without these precisions."
        )
    return held


# --- writing -----------------------------------------------------------------------------------------------------


def _body(segment: nn.Module, name: str) -> fx.GraphModule:
    body = segment.get_submodule("body")
    if not isinstance(body, fx.GraphModule):
        raise UnsupportedError(
            f"{name} is a {type(body).__name__}, not a traced segment. Prepare it with this exporter."
        )
    return body


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise UnsupportedError(
            f"{path.name} is not valid ONNX: {str(error).strip().splitlines()[0]} Report the model; choose another "
            "target for now."
        ) from error


class OnnxExporter:
    """See ``edgeflex.exporters.Exporter``.

    Attributes:
        half: Whether int4 blocks and fp8 compute in half precision, which TensorRT's kernels want; in fp32 they
            run in ONNX Runtime on a processor.
        skeletons: Where exported skeletons are kept.
    """

    def __init__(self, *, half: bool, skeletons: Skeletons = _SKELETONS) -> None:
        self.half = half
        self._skeletons = skeletons

    def prepare(
        self, model: DynamicModel, precisions: Mapping[str, Precision], ranges: Mapping[str, tuple[float, float]]
    ) -> PreparedModel:
        """Return the segments with ONNX's numbers."""
        return prepare_explicit(model, precisions, ranges, half=self.half)

    def prepare_segment(
        self,
        segment: fx.GraphModule,
        index: int,
        precisions: Mapping[str, Precision],
        ranges: Mapping[str, tuple[float, float]],
    ) -> nn.Module:
        """Return one segment with ONNX's numbers."""
        return prepare_explicit_segment(segment, index, precisions, ranges, half=self.half)

    def write(self, prepared: PreparedModel, graph: ModelGraph, folder: Path) -> Written:
        """Write a graph and a file of weights for each segment, check them, and read them back."""
        files: dict[str, str] = {}
        size_bytes = 0
        for index, (segment, example) in enumerate(zip(prepared.segments, prepared.examples, strict=True)):
            name = method_name(index)
            body = _body(segment, name)
            model = fill(self._skeletons.get(body, example, segment=name), body, name)
            if self.half:
                add_confidence(model)  # decided on the device, where reading more back costs time
            program, data = serialise(model, f"{name}.data")
            write_atomic(folder / f"{name}.data", data)
            write_atomic(folder / f"{name}.onnx", program)
            _check(folder / f"{name}.onnx")
            files |= {f"{PROGRAM_PART}{name}": f"{name}.onnx", f"{PROGRAM_PART}{name}.data": f"{name}.data"}
            size_bytes += len(program) + len(data)
        held = compare_precisions(folder, graph, prepared.precisions)
        return Written(files, segment_programs(prepared, graph), held, size_bytes)

    def pad(self, written: Written, folder: Path, size_bytes: int) -> None:
        """Write zeros behind the last segment's weights, where no tensor lies.

        The planner reserves room by an upper bound of the format's overhead; filling it makes the promise about
        bytes on disk exact.
        """
        parts = [folder / path for role, path in written.files.items() if role.startswith(PROGRAM_PART)]
        missing = size_bytes - sum(path.stat().st_size for path in parts)
        if missing < 0:
            raise UnsupportedError(
                f"the program needs {size_bytes - missing} bytes, the plan promised {size_bytes}. "
                "Calibrate and plan again."
            )
        last = folder / f"{method_name(len(written.segments) - 1)}.data"
        write_atomic(last, last.read_bytes() + bytes(missing))


ONNX = OnnxExporter(half=False)
HALF = OnnxExporter(half=True)
