"""Which exporters and runtimes exist, as rows of data that can be read without importing any of them.

Third parties add rows through the entry-point groups ``edgeflex.exporters`` and ``edgeflex.runtimes``; such an
entry point names a ``Row``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from edgeflex.errors import InputError, MissingDependencyError, UnsupportedError
from edgeflex.schema import Capabilities, DeviceProfile, LayerKind, Precision


@dataclass(frozen=True)
class Row:
    """One backend.

    Attributes:
        name: What users write.
        target: ``module:attribute`` of what ``get`` returns.
        extra: The extra of edgeflex that installs its packages; empty where a plain install has them.
        description: One line for people.
        capabilities: What it really runs.
    """

    name: str
    target: str
    extra: str
    description: str
    capabilities: Capabilities


@dataclass(frozen=True)
class Table:
    """Rows of one kind, with the entry-point group that adds to them."""

    kind: str
    group: str
    rows: tuple[Row, ...]

    def _plugins(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        taken = {row.name: "edgeflex itself" for row in self.rows}
        for point in entry_points(group=self.group):
            if point.name in taken:
                raise InputError(
                    f"{self.kind} {point.name!r} is offered by {point.value!r} and by {taken[point.name]}; "
                    "a name belongs to one. Uninstall one of the two packages."
                )
            taken[point.name] = repr(point.value)
            found[point.name] = point
        return found

    def names(self) -> tuple[str, ...]:
        """Return every name, our own first.

        Raises:
            InputError: Two packages offer the same name.
        """
        return (*(row.name for row in self.rows), *sorted(self._plugins()))

    def row(self, name: str) -> Row:
        """Return the row of ``name``.

        Raises:
            InputError: No row has this name, or two packages offer it.
            MissingDependencyError: The plug-in needs a package that is absent.
        """
        plugins = self._plugins()
        for row in self.rows:
            if row.name == name:
                return row
        if name in plugins:
            return _plugin_row(plugins[name])
        known = self.names()
        close = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(known)}.")


def names(table: Table) -> tuple[str, ...]:
    """Return the names of ``table``."""
    return table.names()


def capabilities(table: Table, name: str) -> Capabilities:
    """Return what the backend ``name`` runs, without importing it."""
    return table.row(name).capabilities


# Shipped profiles that name the compute capability of their GPU.
NVIDIA_DEVICES = (
    "jetson-agx-orin-64gb",
    "jetson-orin-nano-8gb",
    "jetson-orin-nano-8gb-super",
    "jetson-orin-nx-16gb",
    "jetson-thor",
    "rtx-4090",
)
# From which compute capability TensorRT 10 and later run at all (Turing), and what needs a newer one: 4-bit weights
# from Ampere, E4M3 from Ada (TensorRT support matrix, "Hardware and Precision").
_LEAST_CAPABILITY = (7, 5)
_NEEDED_CAPABILITY = {Precision.INT4_BLOCK64: (8, 0), Precision.INT4_BLOCK128: (8, 0), Precision.FP8: (8, 9)}


def compute_capability(device: DeviceProfile) -> tuple[int, int] | None:
    """Return the compute capability of a device's NVIDIA GPU, which stands in its ``isa`` as ``sm_87``, or None."""
    found = [match for name in device.isa if (match := re.fullmatch(r"sm_(\d+)(\d)[af]?", name))]
    return (int(found[0].group(1)), int(found[0].group(2))) if found else None


def capabilities_for(table: Table, name: str, *devices: DeviceProfile) -> Capabilities:
    """Return what the backend ``name`` runs on all of ``devices``: for TensorRT, what their GPUs have kernels for.

    Raises:
        InputError: The name is unknown, or a profile does not say which NVIDIA GPU its device has.
        UnsupportedError: A GPU is older than any that TensorRT 10 runs on.
    """
    found = table.row(name).capabilities
    if found.backend != "tensorrt":
        return found
    least = min(_gpu_capability(device) for device in devices)
    held = {
        kind: tuple(one for one in precisions if least >= _NEEDED_CAPABILITY.get(one, _LEAST_CAPABILITY))
        for kind, precisions in found.precisions.items()
    }
    return found.model_copy(update={"precisions": held})


def _gpu_capability(device: DeviceProfile) -> tuple[int, int]:
    capability = compute_capability(device)
    if capability is None:
        raise InputError(
            f"device {device.name!r} names no compute capability of an NVIDIA GPU (sm_87, say, in its isa), and what "
            f"TensorRT runs depends on it. Plan for one of {', '.join(NVIDIA_DEVICES)}, or for a device.json that "
            "edgeflex profile wrote where PyTorch reaches the GPU."
        )
    if capability < _LEAST_CAPABILITY:
        raise UnsupportedError(
            f"the GPU of {device.name!r} has compute capability {_dotted(capability)}; TensorRT 10 and later run from "
            f"{_dotted(_LEAST_CAPABILITY)}. Choose another --target or --device."
        )
    return capability


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def get(table: Table, name: str) -> Any:
    """Return what the row's target names, imported now.

    Raises:
        InputError: The name is unknown; the nearest one is offered.
        MissingDependencyError: A package is absent; the message ends with the pip line.
    """
    row = table.row(name)
    module_name, _, attribute = row.target.partition(":")
    try:
        return getattr(import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise _missing(f"{table.kind} {row.name!r}", error, row.extra) from error


def _plugin_row(point: EntryPoint) -> Row:
    try:
        row = point.load()
    except ModuleNotFoundError as error:
        raise _missing(f"plug-in {point.name!r}", error, "") from error
    if not isinstance(row, Row) or row.name != point.name:
        raise InputError(
            f"plug-in {point.name!r}: {point.value!r} is not an edgeflex.registry.Row of that name. "
            "Ask its author to mend the entry point."
        )
    return row


def _missing(what: str, error: ModuleNotFoundError, extra: str) -> Exception:
    package = (error.name or "").partition(".")[0]
    if package in {"", "edgeflex"}:
        return error  # a fault of ours keeps its traceback
    line = f"pip install 'edgeflex[{extra}]'" if extra else f"pip install {package}"
    return MissingDependencyError(f"{what} needs the package {package!r}, which is not installed. Run: {line}")


# What ExecuTorch 1.5 lowers to XNNPACK with right results: a convolution has static 8-bit kernels only, a
# linear layer also dynamic 8-bit and 4-bit ones (per channel, or groups that are a multiple of 32 weights).
_XNNPACK = {
    LayerKind.CONV2D: (Precision.FP32, Precision.INT8_STATIC),
    LayerKind.LINEAR: (
        Precision.FP32,
        Precision.INT8_STATIC,
        Precision.INT8_DYNAMIC,
        Precision.INT4_CHANNEL,
        Precision.INT4_GROUP32,
    ),
}
# What ONNX says in standard operators and ONNX Runtime's processor kernels take; fp16 and fp8 would only be slower.
_ONNX = {
    LayerKind.CONV2D: (Precision.FP32, Precision.INT8_STATIC),
    LayerKind.LINEAR: (Precision.FP32, Precision.INT8_STATIC, Precision.INT4_BLOCK64, Precision.INT4_BLOCK128),
}
# What TensorRT's importer takes; which of it a GPU has is a matter of its compute capability.
_TENSORRT = {
    LayerKind.CONV2D: (Precision.FP32, Precision.FP16, Precision.INT8_STATIC),
    LayerKind.LINEAR: (
        Precision.FP32,
        Precision.FP16,
        Precision.INT8_STATIC,
        Precision.INT4_BLOCK64,
        Precision.INT4_BLOCK128,
        Precision.FP8,
    ),
}
_EXECUTORCH = Capabilities(backend="executorch", precisions=_XNNPACK, group_multiple=32)
_REFERENCE = Capabilities(backend="reference", precisions=_XNNPACK, group_multiple=32)
_ONNXRUNTIME = Capabilities(backend="onnx", precisions=_ONNX, group_multiple=64)
_NVIDIA = Capabilities(backend="tensorrt", precisions=_TENSORRT, group_multiple=64)

EXPORTERS = Table(
    kind="target",
    group="edgeflex.exporters",
    rows=(
        Row(
            name="executorch",
            target="edgeflex.exporters.executorch:EXECUTORCH",
            extra="",
            description="One .pte with a method per segment, lowered to XNNPACK",
            capabilities=_EXECUTORCH,
        ),
        Row(
            name="onnx",
            target="edgeflex.exporters.onnx:ONNX",
            extra="",
            description="An ONNX graph per segment, precisions as Q/DQ, for ONNX Runtime",
            capabilities=_ONNXRUNTIME,
        ),
        Row(
            name="tensorrt",
            target="edgeflex.exporters.tensorrt:TENSORRT",
            extra="",
            description="ONNX graphs that TensorRT 10.3 to 11 accepts, with a recipe to build engines on the device",
            capabilities=_NVIDIA,
        ),
    ),
)
RUNTIMES = Table(
    kind="runtime",
    group="edgeflex.runtimes",
    rows=(
        Row(
            name="executorch",
            target="edgeflex.runtimes.executorch:ExecutorchSession",
            extra="",
            description="ExecuTorch with XNNPACK in this process",
            capabilities=_EXECUTORCH,
        ),
        Row(
            name="onnxruntime",
            target="edgeflex.runtimes.onnxruntime:OnnxruntimeSession",
            extra="",
            description="ONNX Runtime in this process",
            capabilities=_ONNXRUNTIME,
        ),
        Row(
            name="tensorrt",
            target="edgeflex.runtimes.tensorrt:TensorrtSession",
            extra="",
            description="TensorRT engines that `edgeflex build` made on this device",
            capabilities=_NVIDIA,
        ),
        Row(
            name="reference",
            target="edgeflex.runtimes.reference:ReferenceSession",
            extra="",
            description="Plain PyTorch over the quantised reference modules; the oracle of the contract tests",
            capabilities=_REFERENCE,
        ),
    ),
)
# What runs a backend's programs unless another is named.
RUNTIME_OF = {"executorch": "executorch", "onnx": "onnxruntime", "tensorrt": "tensorrt"}
# Those that compute on a GPU: what it holds is not the process's memory, and its rates decide the time.
GPU_BACKENDS = frozenset({"tensorrt"})


def runtime_of(backend: str) -> str:
    """Return the runtime of a backend's programs; a plug-in's has the backend's own name."""
    return RUNTIME_OF.get(backend, backend)
