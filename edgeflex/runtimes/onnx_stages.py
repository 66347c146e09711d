"""A decoder's ONNX stages in ONNX Runtime, and the keys and values that its attention reads.

Stages take and give NumPy arrays; inputs are used where they lie, so that an expert's weights stay in the arena and
the cache of keys and values is never copied.
"""

from __future__ import annotations

import functools
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeflex.errors import BundleError, DeviceError, MissingDependencyError
from edgeflex.files import sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import ModuleType

    from numpy.typing import NDArray

    from edgeflex.runtimes.raw_store import Pair
    from edgeflex.schema_moe import DecoderManifest, MatrixRecord, StockProgram

    Array = NDArray[Any]
    Float32 = NDArray[np.float32]

_REMEDY = "Copy the bundle again, or export it again with `edgeflex export`."
_LEAST_PAST = 16  # rows of the past that attention is given at least
_ERRORS_ONLY = 3  # of ONNX Runtime's log
# How the elements of an expert's pieces lie in memory.
_ELEMENTS: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint16)": np.dtype(np.uint16),
    "tensor(bfloat16)": np.dtype(np.uint16),
}
_ONNX_BFLOAT16 = 16  # NumPy has no such type; its bits are handed over under ONNX's number for it


def onnxruntime() -> ModuleType:
    """Return the package ``onnxruntime``.

    Raises:
        MissingDependencyError: It is not installed, or does not load here.
    """
    try:
        import onnxruntime as package
    except ImportError as error:
        raise MissingDependencyError(
            f"bundles for ONNX need the package onnxruntime, which does not load here: {error}. "
            "Install it: pip install onnxruntime"
        ) from None
    return package


class Stage:
    """One ONNX program, loaded.

    Args:
        path: The ``.onnx`` file; its data lie beside it.
        threads: That compute one call.

    Raises:
        BundleError: ONNX Runtime does not load it.
        MissingDependencyError: ONNX Runtime is absent.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        try:
            self._session: Any = onnxruntime().InferenceSession(
                str(path), sess_options=session_options(threads), providers=["CPUExecutionProvider"]
            )
        except MissingDependencyError:
            raise
        except Exception as error:  # noqa: BLE001 - its exceptions share no base of their own
            raise BundleError(
                f"{path}: ONNX Runtime does not load this stage: {_first_line(error)}. {_REMEDY}"
            ) from None
        self.inputs: dict[str, tuple[str, tuple[int | str, ...]]] = {
            one.name: (one.type, tuple(one.shape)) for one in self._session.get_inputs()
        }
        self.outputs: tuple[str, ...] = tuple(one.name for one in self._session.get_outputs())

    def __call__(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Array]:
        """Return these outputs for ``feeds``, which are not copied where they are contiguous.

        Raises:
            DeviceError: ONNX Runtime failed.
        """
        try:
            found: list[Array] = self._session.run(outputs, feeds)
        except Exception as error:  # noqa: BLE001 - its exceptions share no base of their own
            raise DeviceError(
                f"{self.path.name}: ONNX Runtime failed: {_first_line(error)}. Check free memory, then the bundle with "
                "`edgeflex verify`."
            ) from None
        return found

    def static(self, name: str, axis: int) -> int:
        """Return the size of an input's axis.

        Raises:
            BundleError: There is no such input, or the size is not fixed.
        """
        _, shape = self.inputs.get(name, ("", ()))
        size = shape[axis] if axis < len(shape) else None
        if not isinstance(size, int) or size < 1:
            raise BundleError(f"{self.path}: input {name!r} has the shape {list(shape)}. {_REMEDY}")
        return size


def session_options(threads: int) -> Any:
    """Return options for stages that share a process: nothing rewritten, no waiting in loops, one arena for all."""
    package = onnxruntime()
    _share_arena()
    options = package.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = package.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = package.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = False  # shapes change with every token
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@functools.cache
def _share_arena() -> None:
    """Give all stages of this process one arena for what lives within a call.

    An arena of each session's own would keep the largest call's memory in every one of them; without any, weights
    that are dequantised on the way would go to new pages at each call, at up to seven times the time.
    """
    package = onnxruntime()
    place = package.OrtMemoryInfo("Cpu", package.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, package.OrtMemType.DEFAULT)
    as_asked = package.OrtArenaCfg({"max_mem": 0, "arena_extend_strategy": 1})
    with suppress(RuntimeError):  # another part of this process has registered one
        package.create_and_register_allocator(place, as_asked)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- finding and checking ------------------------------------------------------------------------------


class Programs(NamedTuple):
    """The stages of a bundle by what they do.

    Attributes:
        attention: By layer.
        dense: By layer: dense layers and shared experts.
        experts: By the name of the template's file.
        head: The last one.
        sums: By layer, what adds its parts; engines without a host's sums have them.
        gather: What groups rows by expert; likewise.
    """

    attention: Mapping[int, StockProgram]
    dense: Mapping[int, StockProgram]
    experts: Mapping[str, StockProgram]
    head: StockProgram
    sums: Mapping[int, StockProgram]
    gather: StockProgram | None


def programs_of(folder: Path, manifest: DecoderManifest) -> Programs:
    """Return the stages that ``manifest`` names.

    Raises:
        BundleError: One is absent; all that are stand in one error.
    """
    by_role: dict[str, dict[int | None, StockProgram]] = {}
    experts: dict[str, StockProgram] = {}
    for one in manifest.programs:
        by_role.setdefault(one.role, {})[one.layer] = one
        if one.role == "expert":
            experts[one.path.rpartition("/")[2]] = one
    attention, dense, sums = (_by_layer(by_role.get(role, {})) for role in ("attention", "dense", "sum"))
    head, gather = (tuple(by_role.get(role, {}).values()) for role in ("head", "gather"))
    layers = manifest.graph.layers
    faults = [f"attention of layer {one.index}" for one in layers if one.index not in attention]
    faults += [
        f"dense part of layer {one.index}"
        for one in layers
        if (one.routing is None or one.shared_dim) and one.index not in dense
    ]
    faults += ["head"] if len(head) != 1 else []
    if faults:
        raise BundleError(f"{folder}: the manifest names no stage for {', '.join(faults)}. {_REMEDY}")
    return Programs(attention, dense, experts, head[0], sums, gather[0] if gather else None)


def _by_layer(found: Mapping[int | None, StockProgram]) -> dict[int, StockProgram]:
    return {layer: one for layer, one in found.items() if layer is not None}


def check_files(folder: Path, manifest: DecoderManifest, programs: Iterable[StockProgram]) -> frozenset[str]:
    """Hash every file of these stages, and return their paths.

    Raises:
        BundleError: Files are damaged or missing, or the manifest does not list them; all stand in one error.
        DeviceError: The disk failed.
    """
    entries = {entry.path: entry for entry in manifest.files}
    wanted = dict.fromkeys(path for one in programs for path in (one.path, *one.data))
    faults = []
    for path in wanted:
        entry = entries.get(path)
        try:
            if entry is None or sha256_file(folder / path) != entry.sha256:
                faults.append(f"{path} is not listed" if entry is None else f"{path} differs from its SHA-256")
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
    if faults:
        raise BundleError(f"bundle {str(folder)!r} is damaged: {'; '.join(faults[:5])}. {_REMEDY}")
    return frozenset(wanted)


# --- experts -------------------------------------------------------------------------------------------


class ExpertTemplate:
    """The program of all experts of one width and precision; their weights are its inputs.

    Args:
        stage: Inputs ``y`` ``[tokens, hidden]`` and the pieces of ``gate_up`` and ``down``; output ``out``.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def bound(self, data: NDArray[np.uint8], pair: Pair) -> dict[str, Any]:
        """Return an expert's pieces as inputs: views of its file's bytes ``data``, nothing is copied.

        Raises:
            BundleError: The program wants other shapes than the manifest names.
        """
        feeds: dict[str, Any] = {}
        for name, matrix in zip(("gate_up", "down"), pair, strict=True):
            feeds[name] = self._view(name, data, matrix, matrix.offset, matrix.weights_bytes)
            if matrix.scales_offset is not None:
                feeds[f"{name}_scales"] = self._view(
                    f"{name}_scales", data, matrix, matrix.scales_offset, matrix.scales_bytes
                )
        return feeds

    def _view(self, name: str, data: NDArray[np.uint8], matrix: MatrixRecord, offset: int, size_bytes: int) -> Any:
        kind, shape = self._stage.inputs.get(name, ("no input", ()))
        element = _ELEMENTS.get(kind)
        sizes = [size for size in shape if isinstance(size, int)]
        if element is None or len(sizes) != len(shape) or math.prod(sizes) * element.itemsize != size_bytes:
            raise BundleError(
                f"{self._stage.path}: input {name!r} is {kind} {list(shape)}, and {matrix.name} has {size_bytes} bytes "
                f"of it. {_REMEDY}"
            )
        found = data[offset : offset + size_bytes].view(element).reshape(sizes)
        if kind != "tensor(bfloat16)":
            return found
        return onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type(found, _ONNX_BFLOAT16)

    def __call__(self, rows: Float32, pieces: Mapping[str, Any]) -> Float32:
        """Return what an expert makes of ``rows`` ``[tokens, hidden]``."""
        return self._stage({"y": rows, **pieces}, ("out",))[0]


# --- keys and values -----------------------------------------------------------------------------------


def past_rows(filled: int, context_tokens: int) -> int:
    """Return how many rows of keys attention is handed when ``filled`` of them are the past: a power of two."""
    return min(context_tokens, max(_LEAST_PAST, 1 << max(filled - 1, 0).bit_length()))


class KeyValues:
    """Keys and values of one layer, in memory that grows with what was read.

    Attention takes a contiguous ``[heads, rows, dim]`` whose rows from the present position on it masks out. To hand
    over neither a copy nor the whole context, rows are a power of two that depends on the position alone: what is
    computed does then not depend on what was there before. All numbers are finite always, also masked ones.

    Args:
        heads: Of keys and values.
        key_dim: Of keys.
        value_dim: Of values.
        context_tokens: Most rows.
    """

    def __init__(self, heads: int, key_dim: int, value_dim: int, context_tokens: int) -> None:
        self._context_tokens = context_tokens
        self._keys = _Rows(heads, context_tokens, key_dim)
        self._values = _Rows(heads, context_tokens, value_dim)

    @property
    def size_bytes(self) -> int:
        """Bytes at most, which a full context takes."""
        return self._keys.flat.nbytes + self._values.flat.nbytes

    def past(self, position: int) -> tuple[Float32, Float32]:
        """Return views of keys and values of which the first ``position`` rows are the past."""
        rows = self._rows(position)
        return self._keys.shaped(rows), self._values.shaped(rows)

    def write(self, position: int, keys: Float32, values: Float32) -> None:
        """Put keys and values ``[heads, tokens, dim]`` at ``position``."""
        end = position + keys.shape[1]
        rows = self._rows(end)
        self._keys.shaped(rows)[:, position:end] = keys
        self._values.shaped(rows)[:, position:end] = values

    def mend(self) -> None:
        """Put zeros for what is no finite number."""
        for flat in (self._keys.flat, self._values.flat):
            flat[~np.isfinite(flat)] = 0.0

    def _rows(self, filled: int) -> int:
        return past_rows(filled, self._context_tokens)


class _Rows:
    """``[heads, rows, dim]`` with room for more rows, in one stretch of memory from its start on."""

    def __init__(self, heads: int, most: int, dim: int) -> None:
        try:
            self.flat: Float32 = np.zeros(heads * most * dim, dtype=np.float32)  # pages come when touched
        except MemoryError as error:
            raise DeviceError(
                f"no memory for keys and values of {most} tokens: {error}. Give fewer tokens of context."
            ) from None
        self._heads = heads
        self._dim = dim
        self._count = 0

    def shaped(self, rows: int) -> Float32:
        """Return the view with so many rows, moving each head's rows to where they then lie."""
        before, self._count = self._count, rows
        old, new = self._view(before), self._view(rows)
        if rows > before:
            for head in range(self._heads - 1, 0, -1):
                new[head, :before] = old[head]
        elif rows < before:
            for head in range(1, self._heads):
                new[head] = old[head, :rows]
        return new

    def _view(self, rows: int) -> Float32:
        return self.flat[: self._heads * rows * self._dim].reshape(self._heads, rows, self._dim)
