"""What TensorRT would refuse in an ONNX graph, found before a board is at hand, by node and with the remedy.

The rules are those of TensorRT's ONNX importer (onnx-tensorrt: ``QuantDequantLinearHelper``, ``docs/operators.md`` and
``docs/Changelog.md`` of 10.1 to 10.15), of ``NvInfer.h`` of 10.3 and 11.1 (``IQuantizeLayer``, ``IDequantizeLayer``)
and of the chapter "Working with quantized types" of its documentation. Which rule holds for which version is data
here. Scales and zero points are read, weights never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx import TensorProto, external_data_helper

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.exporters.onnx_lint_scales import SCALE_RULES, scale_findings
from edgeflex.exporters.onnx_view import (
    FLOATS,
    QUANTIZED,
    View,
    attribute,
    dequantizes,
    in_default_domain,
    input_name,
    integer,
    label,
    open_view,
    place_of,
    quantizes,
    stored_bytes,
    type_name,
    view_of,
)
from edgeflex.schema_trt import SUPPORTED_VERSIONS, Version, version_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import onnx

# Least and most opset by the first version that has it. 10.1's guide names 20; its importer reads the INT4 and the
# block_size of opset 21, which INT4 needs. Attention (10.14) came with opset 23; 10.15 names 24, the guide of 11.x 25.
_OPSETS: Mapping[Version, tuple[int, int]] = {
    (10, 3): (9, 21),
    (10, 14): (9, 23),
    (10, 15): (9, 24),
    (11, 4): (9, 25),
}
# Operators that came after 10.3, by the version that brought them.
_SINCE: Mapping[str, Version] = {
    "BlackmanWindow": (10, 4),
    "HammingWindow": (10, 4),
    "HannWindow": (10, 4),
    "STFT": (10, 5),
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
    "Swish": (11, 0),
    "TRT_MoE": (11, 0),
}
_INSTEAD: Mapping[str, str] = {
    "Attention": "Write attention as MatMul, Softmax and MatMul (export at opset 20)",
    "RMSNormalization": "Write it as Mul, ReduceMean, Sqrt and Div (export at opset 20)",
    "RotaryEmbedding": "Write it as Mul, Add and Concat (export at opset 20)",
    "Swish": "Write it as Sigmoid and Mul (export at opset 20)",
}
_QUANTIZE_ALONE = "Write the layer with QuantizeLinear and DequantizeLinear around the float operator"
_UNSUPPORTED: Mapping[str, str] = {
    "DynamicQuantizeLinear": "Calibrate the activation and write QuantizeLinear with a constant scale",
    "MatMulInteger": _QUANTIZE_ALONE,
    "ConvInteger": _QUANTIZE_ALONE,
    "QLinearMatMul": _QUANTIZE_ALONE,
    "QLinearConv": _QUANTIZE_ALONE,
    "QLinearAdd": _QUANTIZE_ALONE,
    "QGemm": _QUANTIZE_ALONE,
    "MatMulIntegerToFloat": _QUANTIZE_ALONE,
    "DynamicQuantizeMatMul": _QUANTIZE_ALONE,
    "MatMulNBits": "Store the weight as INT4 with scales by blocks and put a DequantizeLinear before the MatMul",
    "GatherBlockQuantized": "Store the table in float16",
    **dict.fromkeys(
        (
            *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Col2Im"),
            *("CenterCropPad", "Compress", "ConcatFromSequence", "DFT", "Det", "ImageDecoder", "MaxRoiPool"),
            *("MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional"),
            *("OptionalGetElement", "OptionalHasElement", "RegexFullMatch", "SequenceAt", "SequenceConstruct"),
            *("SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap"),
            *("SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit"),
            *("TfIdfVectorizer", "Unique"),
        ),
        "Write it with other operators, or compute it on the host",
    ),
}
_DOMAINS = frozenset({"", "ai.onnx", "trt"})
_FLOAT4_SINCE: Version = (10, 8)
_PLAIN_TYPES = FLOATS | {TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
_BORDER_TYPES = _PLAIN_TYPES | {TensorProto.UINT8, TensorProto.INT8, TensorProto.FLOAT8E4M3FN}
_UINT8_CASTS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})
_TYPED_ALIKE = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Add", "Sub", "Mul", "Div", "Concat"})
_MOST_TOP_K = 3840
_MOST_FLOAT8_KERNEL = 32

# What a rule found: node, rule, what with its values and limit, remedy.
Finding = tuple[str, str, str, str]

RULES: Mapping[str, str] = {
    "opset": "the opset lies in the range that the importer documents",
    "operator-unsupported": "no operator that the importer never takes",
    "operator-domain": "operators are ONNX's own, TensorRT's or local functions",
    "operator-too-new": "no operator that a later version brought",
    "operator-form": "operators are used in a form that the importer takes",
    "tensor-type": "constants have a type that TensorRT has",
    "border-type": "inputs and outputs have a type that an engine can exchange",
    "uint8-cast": "only inputs and outputs are UINT8, cast at once to or from float32 or float16",
    "axis-named": "every axis of an input has a size, or a name that a profile can bound",
    "operand-types": "operands of one operator have one type, since networks are strongly typed",
    "quantized-consumer": "quantised values are read by QuantizeLinear and DequantizeLinear alone",
    "fp8-convolution": "FP8 convolutions have kernels: no groups, at most 32 positions",
    "external-data": "external data is there, beside or below the graph, and whole",
    **SCALE_RULES,
}


@dataclass(frozen=True)
class Violation:
    """A rule that a node breaks.

    Attributes:
        node: Name of the node, else what it makes; of the tensor where no node is at fault.
        rule: A name of ``RULES``.
        message: What, with its values and the limit.
        remedy: What to do.
    """

    node: str
    rule: str
    message: str
    remedy: str

    def __str__(self) -> str:
        """Return all of it in one line."""
        return f"{self.node} [{self.rule}]: {self.message}. {self.remedy}."


def lint(path: Path, version: Version) -> tuple[Violation, ...]:
    """Return what the given TensorRT would refuse in the graph at ``path``.

    Raises:
        InputError: ``path`` is no ONNX model, or ``version`` is older than all that are supported.
    """
    return _violations(open_view(path), version)


def lint_model(model: onnx.ModelProto, version: Version, folder: Path | None = None) -> tuple[Violation, ...]:
    """Return what the given TensorRT would refuse in a model in memory; ``folder`` holds its external data.

    Raises:
        InputError: ``version`` is older than all that are supported.
    """
    return _violations(view_of(model, folder), version)


def lint_versions(path: Path, versions: Sequence[Version]) -> dict[Version, tuple[Violation, ...]]:
    """Return the same for several versions; the graph is opened once.

    Raises:
        InputError: As ``lint``.
    """
    view = open_view(path)
    return {version: _violations(view, version) for version in versions}


def require_clean(paths: Iterable[Path], versions: Sequence[Version] = SUPPORTED_VERSIONS) -> None:
    """Refuse graphs that one of the versions refuses.

    Raises:
        UnsupportedError: Some violation was found; all of them are listed, with the versions concerned.
        InputError: As ``lint``.
    """
    found = {path.name: lint_versions(path, versions) for path in paths}
    if any(violations for by_version in found.values() for violations in by_version.values()):
        raise UnsupportedError(f"TensorRT would refuse what was written:{listed(found)}")


def listed(found: Mapping[str, Mapping[Version, Sequence[Violation]]]) -> str:
    """Return the violations of each file as lines, each with the versions that it concerns."""
    lines: list[str] = []
    for name, by_version in found.items():
        concerned: dict[Violation, list[Version]] = {}
        for version, violations in by_version.items():
            for violation in violations:
                concerned.setdefault(violation, []).append(version)
        for violation, versions in concerned.items():
            whom = "all versions" if len(versions) == len(by_version) > 1 else ", ".join(map(version_text, versions))
            lines.append(f"\n  - {name}: {violation} (TensorRT: {whom})")
    return "".join(lines)


def _violations(view: View, version: Version) -> tuple[Violation, ...]:
    if version < SUPPORTED_VERSIONS[0]:
        raise InputError(
            f"TensorRT {version_text(version)} is older than {version_text(SUPPORTED_VERSIONS[0])}, the oldest that is "
            "supported. Install a newer one (JetPack 6 has 10.3)."
        )
    found = (Violation(*finding) for check in _CHECKS for finding in check(view, version))
    return tuple(dict.fromkeys(found))


# --- operators ---------------------------------------------------------------------------------------


def _opset(view: View, version: Version) -> Iterator[Finding]:
    least, most = _OPSETS[max(known for known in _OPSETS if known <= version)]
    where = view.model.graph.name or "graph"
    if view.opset is None:
        yield where, "opset", "the model names no opset of ONNX's own operators", "Export it at opset 20"
    elif not least <= view.opset <= most:
        message = f"opset {view.opset} lies outside {least} to {most}"
        yield where, "opset", message, "Export at opset 20, or 21 where a weight is INT4"


def _operators(view: View, version: Version) -> Iterator[Finding]:
    for node in (*view.nodes, *view.function_nodes):
        kind = node.op_type
        if (node.domain, kind) in view.functions:
            continue
        if kind in _UNSUPPORTED and (node.domain != "trt"):
            yield label(node), "operator-unsupported", f"the importer has no {kind}", _UNSUPPORTED[kind]
        elif node.domain not in _DOMAINS:
            message = f"{kind} is of domain {node.domain!r}; known are ONNX's own operators and 'trt'"
            yield label(node), "operator-domain", message, "Export with ONNX's own operators"
        elif version < _SINCE.get(kind, version):
            message = f"{kind} came with TensorRT {version_text(_SINCE[kind])}"
            yield label(node), "operator-too-new", message, _INSTEAD.get(kind, "Write it with older operators")


def _forms(view: View, version: Version) -> Iterator[Finding]:
    for node in view.nodes:
        if not in_default_domain(node):
            continue
        for fault, remedy in _form_faults(node, view, version):
            yield label(node), "operator-form", f"{node.op_type} {fault}", remedy


def _form_faults(node: onnx.NodeProto, view: View, version: Version) -> Iterator[tuple[str, str]]:
    kind, extra = node.op_type, sum(bool(name) for name in node.output[1:])
    if kind in {"MaxPool", "AveragePool", "LpPool"} and set(attribute(node, "dilations", [1])) != {1}:
        yield "has dilations other than 1", "Pool without dilation"
    if kind in {"MaxPool", "LayerNormalization"} and extra:
        yield f"gives {extra} outputs beside the first, which are not supported", "Use the first output alone"
    if kind == "Attention":
        yield from _attention_faults(node, extra)
    if kind == "ScatterND" and attribute(node, "reduction", b"none") != b"none":
        yield "reduces, which is not supported", "Scatter without reduction"
    if kind == "GroupNormalization" and (view.opset or 0) >= 21 and version < (10, 9):
        yield "is that of opset 21, which came with TensorRT 10.9", "Export at opset 20"
    if kind == "Pad" and input_name(node, 3) and version < (10, 4):
        yield "takes axes as an input, which came with TensorRT 10.4", "Give pads for every axis"
    if kind.startswith("Reduce") and input_name(node, 1) and input_name(node, 1) not in view.constants:
        yield "takes axes that are computed, and they must be constant", "Make the axes an initialiser"
    if kind == "TopK":
        yield from _top_k_faults(node, view)


def _attention_faults(node: onnx.NodeProto, extra: int) -> Iterator[tuple[str, str]]:
    if any(input_name(node, index) for index in (4, 5, 6)):
        yield "takes past keys and values, which are not supported", "Concatenate the cache before it"
    if extra:
        yield f"gives {extra} outputs beside the first, which are not supported", "Return the cache by itself"
    if attribute(node, "softcap", 0.0):
        yield "has a softcap, which is not supported", "Write attention as MatMul, Softmax and MatMul"


def _top_k_faults(node: onnx.NodeProto, view: View) -> Iterator[tuple[str, str]]:
    if integer(node, "sorted", 1) != 1:
        yield "is not sorted", "Ask for sorted results"
    count = view.array(input_name(node, 1))
    if count is not None and int(count.max()) >= _MOST_TOP_K:
        yield f"asks for {int(count.max())} values, the limit is {_MOST_TOP_K - 1}", "Take fewer"


# --- types and shapes --------------------------------------------------------------------------------


def _constants(view: View, version: Version) -> Iterator[Finding]:
    allowed = _PLAIN_TYPES | QUANTIZED | {TensorProto.DOUBLE}
    zero_points = {input_name(node, 2) for node in view.nodes if quantizes(node) or dequantizes(node)}
    for name, tensor in view.constants.items():
        too_new = tensor.data_type == TensorProto.FLOAT4E2M1 and version < _FLOAT4_SINCE
        if name in zero_points or (tensor.data_type in allowed and not too_new):
            continue  # zero points have rules of their own
        readers = view.consumers.get(name, ())
        where = label(readers[0]) if readers else name
        limit = f"FP4 came with TensorRT {version_text(_FLOAT4_SINCE)}" if too_new else "TensorRT has no such weights"
        message = f"constant {name} is {type_name(tensor.data_type)}; {limit}"
        yield where, "tensor-type", message, "Store it as a float, int32, int64, bool, int8, int4 or float8e4m3fn"


def _borders(view: View, _version: Version) -> Iterator[Finding]:
    graph = view.model.graph
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type.elem_type
        if value.name not in view.constants and kind not in _BORDER_TYPES:
            known = ", ".join(sorted(type_name(one) for one in _BORDER_TYPES))
            message = f"{value.name} is {type_name(kind)}; an engine exchanges {known}"
            yield value.name, "border-type", message, "Cast it inside the graph"


def _unsigned_bytes(view: View, _version: Version) -> Iterator[Finding]:
    """UINT8 is no type of arithmetic (``NvInfer.h``, ``DataType::kUINT8``; ``ModelImporter.cpp`` of onnx-tensorrt)."""
    kinds = {one.name: one.type.tensor_type.elem_type for one in view.model.graph.input}
    for name in (name for name, kind in kinds.items() if kind == TensorProto.UINT8 and name not in view.constants):
        for node in view.consumers.get(name, ()):
            if not (_casts(node) and integer(node, "to", 0) in _UINT8_CASTS):
                message = f"{node.op_type} reads {name}, which is uint8; only a Cast to float32 or float16 may"
                yield label(node), "uint8-cast", message, "Cast it to float32 or float16 first"
    outputs = {one.name for one in view.model.graph.output}
    for node in view.nodes:
        # constants, and what QuantizeLinear makes, have rules of their own
        made = [name for name in node.output if name not in view.constants and not quantizes(node)]
        if all(view.types.get(name) != TensorProto.UINT8 for name in made):
            continue
        given = view.types.get(input_name(node, 0))
        if not outputs.issuperset(made):
            message = f"{node.op_type} makes uint8 inside the graph, where only inputs and outputs may be uint8"
            yield label(node), "uint8-cast", message, "Compute in float32, float16 or int32"
        elif not (_casts(node) and given in {*_UINT8_CASTS, None}):
            message = f"{node.op_type} of {type_name(given)} makes an output that is uint8; only a Cast of floats may"
            yield label(node), "uint8-cast", message, "Cast to uint8 from float32 or float16 last"


def _casts(node: onnx.NodeProto) -> bool:
    return in_default_domain(node) and node.op_type == "Cast"


def _axes(view: View, _version: Version) -> Iterator[Finding]:
    for value in view.model.graph.input:
        tensor = value.type.tensor_type
        if value.name in view.constants:
            continue
        if not tensor.HasField("shape"):
            yield value.name, "axis-named", f"input {value.name} has no shape", "Export it with a shape"
            continue
        bare = [i for i, dim in enumerate(tensor.shape.dim) if not dim.dim_param and not dim.HasField("dim_value")]
        if bare:
            message = f"input {value.name} has axes {bare} with neither size nor name"
            yield value.name, "axis-named", message, "Name dynamic axes, so that a profile can bound them"
        none = [i for i, dim in enumerate(tensor.shape.dim) if dim.HasField("dim_value") and dim.dim_value < 1]
        if none:
            message = f"input {value.name} has axes {none} of size below 1"
            yield value.name, "axis-named", message, "Give the size, or name the axis"


def _operands(view: View, _version: Version) -> Iterator[Finding]:
    for node in view.nodes:
        if node.op_type not in _TYPED_ALIKE or not in_default_domain(node):
            continue
        kinds = {view.types[name] for name in node.input if name in view.types}
        if len(kinds) > 1:
            found = " and ".join(sorted(type_name(kind) for kind in kinds))
            message = f"{node.op_type} takes {found} together, and types must be equal"
            yield label(node), "operand-types", message, "Cast one side, or give the scales the other side's type"


def _quantized_consumers(view: View, _version: Version) -> Iterator[Finding]:
    for name, kind in _quantized_names(view):
        for node in view.consumers.get(name, ()):
            if not quantizes(node) and not dequantizes(node):
                message = f"{node.op_type} reads {name}, which is {type_name(kind)}; only Q/DQ may"
                yield label(node), "quantized-consumer", message, "Dequantise it first, or store it as floats"


def _quantized_names(view: View) -> Iterator[tuple[str, int]]:
    for name, tensor in view.constants.items():
        if tensor.data_type in QUANTIZED:
            yield name, tensor.data_type
    for value in view.model.graph.input:
        kind = value.type.tensor_type.elem_type
        if value.name not in view.constants and kind in QUANTIZED:
            yield value.name, kind
    for node in view.nodes:
        if quantizes(node):
            for name in node.output:
                yield name, view.types.get(name, TensorProto.INT8)


def _float8_convolutions(view: View, _version: Version) -> Iterator[Finding]:
    for node in view.nodes:
        if node.op_type != "Conv" or not any(_dequantized_type(view, name) for name in node.input[:2]):
            continue
        weight = view.producers.get(input_name(node, 1))
        source = view.source(input_name(weight, 0)) if weight is not None else view.constants.get(input_name(node, 1))
        positions = 1
        for size in source.dims[2:] if source is not None else attribute(node, "kernel_shape", []):
            positions *= size
        groups = integer(node, "group", 1)
        if groups != 1 or positions > _MOST_FLOAT8_KERNEL:
            message = (
                f"a convolution of {groups} groups and {positions} kernel positions has no FP8 kernel "
                f"(those have 1 group and at most {_MOST_FLOAT8_KERNEL} positions)"
            )
            yield label(node), "fp8-convolution", message, "Plan this layer in int8-static or fp16"


def _dequantized_type(view: View, name: str) -> bool:
    producer = view.producers.get(name)
    if producer is None or not dequantizes(producer):
        return False
    return view.types.get(input_name(producer, 0)) == TensorProto.FLOAT8E4M3FN


def _external_data(view: View, _version: Version) -> Iterator[Finding]:
    if view.folder is None:
        return
    for name, tensor in view.constants.items():
        if external_data_helper.uses_external_data(tensor):
            fault = _place_fault(name, tensor, view.folder)
            if fault:
                yield name, "external-data", fault, "Keep the .data file beside the graph, or export again"


def _place_fault(name: str, tensor: TensorProto, folder: Path) -> str:
    """Return why external data cannot be read, or nothing."""
    place, wanted = place_of(tensor), stored_bytes(tensor)
    if place is None:
        said = ", ".join(f"{entry.key} {entry.value!r}" for entry in tensor.external_data)
        return f"{name} lies in no file beside or below the graph ({said})"
    file = folder / place.location
    if not file.is_file():
        return f"{name} lies in {place.location!r}, which is missing"
    size_bytes = file.stat().st_size
    length = wanted if place.length is None else place.length
    if wanted is not None and (length != wanted or place.offset + wanted > size_bytes):
        return (
            f"{name} takes {wanted} bytes; {length} are given at {place.offset} of {place.location!r}, which has "
            f"{size_bytes}"
        )
    return ""


_CHECKS: tuple[Callable[[View, Version], Iterator[Finding]], ...] = (
    _opset,
    _operators,
    _forms,
    _constants,
    _borders,
    _unsigned_bytes,
    _axes,
    _operands,
    _quantized_consumers,
    _float8_convolutions,
    _external_data,
    scale_findings,
)
