"""Python's side of the native decoder: one forward pass that stops where an expert is missing.

Imports neither torch nor ExecuTorch: the kernels are found in the shared libraries of ExecuTorch's wheel. Every
call releases Python's lock, so that readers can fill the arena meanwhile.

Memory that is handed over (packed matrices, embeddings) is used where it lies; the engine keeps it alive.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from edgeflex import native
from edgeflex.errors import DeviceError, InputError, MissingDependencyError
from edgeflex.native.build import sources_digest
from edgeflex.runtimes.pages import private_pages
from edgeflex.schema import Precision

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Self

    from edgeflex.schema_moe import DecoderGraph, DecoderLayer

    Raw: TypeAlias = bytes | bytearray | memoryview | NDArray[Any]

ALIGNMENT_BYTES = 64
_ABI = 5
_MISSING = 1
_INPUT_FAULT = -1
_CODES = {Precision.FP32: 0, Precision.INT8_DYNAMIC: 1, Precision.INT4_GROUP32: 2}
# In the order of the enumerations Small and Big in native/decoder.h.
_SMALL = ("input_norm", "post_norm", "q_norm", "k_norm", "kv_norm", "qkv_bias", "router", "shared_gate", "norm")
_BIG = (
    *("qkv", "o", "q", "kv_a", "kv_b"),
    *("mlp.gate_up", "mlp.down", "shared.gate_up", "shared.down", "head"),
)
_NORMS = {"none": 0, "projection": 1, "head": 2}
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")
_BUILD_AGAIN = f"Build it again: {native.BUILD_COMMAND}"


class Missing(NamedTuple):
    """A forward pass waits for experts.

    Attributes:
        layer: Where it waits.
        experts: All experts of the event, ascending.
        missing: Those that are neither computed nor bound, ascending.
    """

    layer: int
    experts: tuple[int, ...]
    missing: tuple[int, ...]


class Chosen(NamedTuple):
    """What one layer's tokens chose in one forward pass.

    Attributes:
        layer: The layer.
        experts: ``[tokens, top_k]`` ids, in falling order of router weight, ties to the lower id.
        weights: ``[tokens, top_k]``, as they multiply the experts' outputs.
    """

    layer: int
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]


class Times(NamedTuple):
    """Seconds of computing: dense matrices, experts, and all else (norms, attention, routing, sums)."""

    dense_s: float
    expert_s: float
    other_s: float


class _LayerSpec(ctypes.Structure):
    _fields_ = (
        ("experts", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("normalised", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("expert_dim", ctypes.c_int32),
        ("dense_dim", ctypes.c_int32),
        ("shared_dim", ctypes.c_int32),
        ("shared_gate", ctypes.c_int32),
    )


class _DecoderSpec(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "hidden", "vocabulary", "latent", "heads", "kv_heads")),
        *((name, ctypes.c_int32) for name in ("head_dim", "value_dim", "rotary_dim", "latent_dim")),
        *((name, ctypes.c_int32) for name in ("query_key_norm", "bias")),
        *((name, ctypes.c_float) for name in ("rotary_scale", "softmax_scale", "norm_epsilon")),
        *((name, ctypes.c_int32) for name in ("context_tokens", "chunk_tokens", "threads", "half_cache")),
        ("inverse_frequencies", ctypes.POINTER(ctypes.c_float)),
        ("layer_specs", ctypes.POINTER(_LayerSpec)),
    )


_Spec = TypeVar("_Spec", _LayerSpec, _DecoderSpec)
_WIDE = 1 << 31
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIZE_OUT = ctypes.POINTER(_SIZE)
_PACKED_ALIGNMENT = 64
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "efx_open": (ctypes.c_char_p, ctypes.c_char_p),
    "efx_kernel_id": (ctypes.c_char_p, _SIZE),
    "efx_packed_bytes": (_INT, _SIZE, _SIZE, _SIZE_OUT),
    "efx_pack": (_INT, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER),
    "efx_time_matrix": (_INT, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, ctypes.POINTER(ctypes.c_double)),
    "efx_raw_create": (_SIZE, ctypes.POINTER(_POINTER)),
    "efx_raw_expert": (_POINTER, _INT, *[_SIZE] * 4, *[_POINTER] * 5, _SIZE, _POINTER),
    "efx_create": (ctypes.POINTER(_DecoderSpec), ctypes.POINTER(_POINTER)),
    "efx_set_small": (_POINTER, _INT, _INT, _POINTER, _SIZE),
    "efx_set_matrix": (_POINTER, _INT, _INT, _INT, _SIZE, _SIZE, _POINTER, _SIZE),
    "efx_set_embedding": (_POINTER, _INT, _POINTER, _POINTER),
    "efx_set_arena": (_POINTER, _POINTER, _SIZE),
    "efx_expert_bytes": (_POINTER, _INT, _INT, _SIZE_OUT, _SIZE_OUT),
    "efx_bind": (_POINTER, _INT, _INT, _INT, _SIZE),
    "efx_unbind": (_POINTER, _INT, _INT),
    "efx_forward": (_POINTER, _POINTER, _SIZE, _SIZE, _INT),
    "efx_compute": (_POINTER, _POINTER, _SIZE),
    "efx_resume": (_POINTER,),
    "efx_event": (_POINTER, ctypes.POINTER(ctypes.c_int32), _POINTER, _POINTER, _SIZE_OUT),
    "efx_log_size": (_POINTER, _SIZE_OUT),
    "efx_take_log": (_POINTER, _POINTER, _SIZE),
    "efx_logits": (_POINTER, ctypes.POINTER(_POINTER), _SIZE_OUT),
    "efx_guess": (_POINTER, _INT, _POINTER, _SIZE_OUT),
    "efx_take_times": (_POINTER, ctypes.POINTER(ctypes.c_double)),
    "efx_memory_bytes": (_POINTER, _SIZE_OUT),
    "efx_every_logit": (_POINTER,),
}


# --- opening -----------------------------------------------------------------------------------------


def executorch_libraries() -> tuple[Path, Path]:
    """Return ExecuTorch's shared libraries with kernels and with threads, found without importing it.

    Raises:
        MissingDependencyError: ExecuTorch is not installed, or has no such libraries.
    """
    spec = importlib.util.find_spec("executorch")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    suffix = "dylib" if sys.platform == "darwin" else "so"
    names = (f"libexecutorch_backend_xnnpack.{suffix}", f"libexecutorch_threadpool.{suffix}")
    for place in places:
        backend, threads = (Path(place) / "lib" / name for name in names)
        if backend.is_file() and threads.is_file():
            return backend, threads
    where = f"in {places[0]}/lib" if places else "since ExecuTorch is not installed"
    raise MissingDependencyError(
        f"{names[0]} and {names[1]} are not there ({where}). Their kernels run decoders. "
        "Install them: pip install 'executorch>=1.5.1,<1.6'"
    )


def open_native(library: Path, backend: Path, threads: Path) -> ctypes.CDLL:
    """Open the native decoder and ExecuTorch's libraries, and check that they fit each other.

    Opening ExecuTorch's libraries happens once per process; the first ones stay.

    Raises:
        MissingDependencyError: The native decoder was built for another processor, or from other sources.
        DeviceError: ExecuTorch's libraries do not open, lack a function, or compute wrong numbers.
    """
    try:
        opened = ctypes.CDLL(str(library))
        opened.efx_features.restype = opened.efx_error.restype = opened.efx_sources.restype = ctypes.c_char_p
        abi, sources = opened.efx_abi(), opened.efx_sources().decode()
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(
            f"the native library of decoders does not open: {error}. Decoders run only with it. {_BUILD_AGAIN}"
        ) from error
    if abi != _ABI or sources != sources_digest():
        raise MissingDependencyError(
            f"{library} was built from other sources (interface {abi}, sources {sources}) than this edgeflex has "
            f"(interface {_ABI}, sources {sources_digest()}). They must be the same. {_BUILD_AGAIN}"
        )
    absent = _absent_features(opened.efx_features().decode())
    if absent:
        raise MissingDependencyError(
            f"{library} was built for a processor with {', '.join(absent)}, which this one lacks. "
            f"It would crash here. {_BUILD_AGAIN}"
        )
    for name, arguments in _SIGNATURES.items():
        function = getattr(opened, name)
        function.argtypes = arguments
        function.restype = _INT
    for destroy in (opened.efx_destroy, opened.efx_raw_destroy):
        destroy.argtypes = (_POINTER,)
        destroy.restype = None
    _check(opened, opened.efx_open(str(backend).encode(), str(threads).encode()))
    return opened


def _absent_features(needed: str) -> list[str]:
    """Return what the library needs of the processor and Linux does not list."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []  # not Linux: nothing to compare with
    listed = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    return [flag for flag in needed.split() if flag not in listed] if listed else []


@functools.cache
def _opened() -> ctypes.CDLL:
    return open_native(native.library_path(), *executorch_libraries())


def _check(library: ctypes.CDLL, status: int) -> int:
    if status >= 0:
        return status
    text = library.efx_error().decode(errors="replace")
    raise (InputError if status == _INPUT_FAULT else DeviceError)(text)


def _call(name: str, *arguments: object) -> int:
    library = _opened()
    return _check(library, getattr(library, name)(*arguments))


def kernel_id() -> str:
    """Return the name of the kernels chosen here; weights packed under another name are of no use.

    It names the processor's family, the activation formats of int8 and int4, and a digest of how each precision
    packs a probe.
    """
    text = ctypes.create_string_buffer(128)
    _call("efx_kernel_id", text, len(text))
    return text.value.decode()


# --- packing -----------------------------------------------------------------------------------------


def packed_bytes(precision: Precision, rows: int, columns: int) -> int:
    """Return the bytes of a packed matrix, a multiple of 64.

    Raises:
        InputError: The precision or the shape has no kernel.
    """
    size = _SIZE()
    _call("efx_packed_bytes", _code(precision), _natural(rows), _natural(columns), ctypes.byref(size))
    return int(size.value)


def pack(precision: Precision, rows: int, columns: int, codes: Raw, scales: Raw | None, out: Raw) -> None:
    """Pack a raw matrix (forms as in ``MatrixRecord``) for the kernels chosen here; equal input gives equal bytes.

    May be called from several threads.

    Args:
        precision: Of the codes.
        rows: Outputs.
        columns: Inputs.
        codes: The raw weights.
        scales: The raw scales; None for fp32.
        out: Writable, at least ``packed_bytes``.

    Raises:
        InputError: A buffer is too small, or a scale is negative or not finite.
    """
    code = _code(precision)
    needed = _raw_bytes(precision, rows, columns)
    given = _aligned(_bytes_of(codes), 4)
    factors = _aligned(_bytes_of(scales if scales is not None else b""), 4)
    target = np.frombuffer(out, dtype=np.uint8)
    wanted = packed_bytes(precision, rows, columns)
    sizes = zip(("codes", "scales", "the output"), (given, factors, target), (*needed, wanted), strict=True)
    faults = [
        f"{name} have {buffer.size} bytes, {size} are needed" for name, buffer, size in sizes if buffer.size < size
    ]
    if not target.flags.writeable:
        faults.append("the output is read-only")
    if faults:
        raise InputError.collect(f"packing a {precision.value} matrix of {rows} x {columns}", faults)
    # XNNPACK packs with stores that need aligned addresses
    aligned = target.ctypes.data % _PACKED_ALIGNMENT == 0
    place = target if aligned else _aligned_zeros(wanted)
    _call("efx_pack", code, rows, columns, given.ctypes.data, factors.ctypes.data, place.ctypes.data)
    if not aligned:
        target[:wanted] = place


def time_matrix(
    precision: Precision, rows: int, columns: int, *, rows_in: int, threads: int, total_bytes: int = 128 << 20
) -> float:
    """Return the median seconds of ``rows_in`` rows times one matrix ``[rows, columns]`` whose weights lie in memory.

    Args:
        precision: Of the matrix.
        rows: Outputs.
        columns: Inputs.
        rows_in: Input rows.
        threads: That compute.
        total_bytes: Of the copies that are walked through, more than any cache holds.

    Raises:
        InputError: The precision does not fit the shape.
        DeviceError: No memory, or no threads.
    """
    seconds = ctypes.c_double()
    shape = (_natural(rows), _natural(columns), _natural(rows_in), _natural(threads), _natural(total_bytes))
    _call("efx_time_matrix", _code(precision), *shape, ctypes.byref(seconds))
    return float(seconds.value)


def _code(precision: Precision) -> int:
    code = _CODES.get(precision)
    if code is None:
        known = ", ".join(known.value for known in _CODES)
        raise InputError(
            f"decoder kernels have no precision {precision.value}. They have {known}. Choose one of these."
        )
    return code


def _natural(value: int) -> int:
    if value < 0:
        raise InputError(f"a matrix has {value} rows or columns. They are at least 1. Mend the caller.")
    return value


def _bytes_of(data: Raw) -> NDArray[np.uint8]:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(data, dtype=np.uint8)


def _aligned_zeros(count: int) -> NDArray[np.uint8]:
    whole = np.zeros(count + _PACKED_ALIGNMENT, dtype=np.uint8)
    skip = -whole.ctypes.data % _PACKED_ALIGNMENT
    return whole[skip : skip + count]


def _aligned(data: NDArray[np.uint8], alignment: int) -> NDArray[np.uint8]:
    """Return the same bytes at an address that is a multiple of ``alignment``; copied only where needed."""
    return data if data.ctypes.data % alignment == 0 else data.copy()


# --- experts from raw numbers --------------------------------------------------------------------------


class RawMatrix(NamedTuple):
    """A matrix as a bundle stores it, at addresses that are multiples of 4.

    Attributes:
        precision: Of the codes.
        rows: Outputs.
        columns: Inputs.
        codes: Its bytes; there may be more.
        scales: Its scales' bytes; empty for fp32.
        slices: In which both lie, each a matrix of its own: rows of gate and the same of up, or columns of down.
        pitch: Bytes from one slice to the next.
    """

    precision: Precision
    rows: int
    columns: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    slices: int = 1
    pitch: int = 0


class RawExperts:
    """Computes experts from their raw numbers, with fp32 inputs; not for several threads at once.

    What a device computes is computed here from the same bytes, and XNNPACK's packed form is needed by neither.

    Args:
        threads: That compute; results do not depend on them.

    Raises:
        DeviceError: No threads.
        MissingDependencyError: The native library or ExecuTorch is absent.
    """

    def __init__(self, threads: int) -> None:
        self._library = _opened()
        self._handle = _POINTER()
        _check(self._library, self._library.efx_raw_create(_natural(threads), ctypes.byref(self._handle)))

    def __call__(self, gate_up: RawMatrix, down: RawMatrix, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return ``[n, hidden]`` of ``rows`` ``[n, hidden]`` through one expert.

        Raises:
            InputError: The shapes do not fit each other, or bytes are missing.
        """
        given = np.ascontiguousarray(rows, dtype=np.float32)
        self._refuse(gate_up, down, given)
        out = np.empty((len(given), gate_up.columns), dtype=np.float32)
        places = [one.ctypes.data for one in (gate_up.codes, gate_up.scales, down.codes, down.scales, given)]
        shape = (gate_up.columns, down.columns // down.slices, down.slices, down.pitch)
        arguments = (self._handle, _code(gate_up.precision), *shape, *places, len(given), out.ctypes.data)
        _check(self._library, self._library.efx_raw_expert(*arguments))
        return out

    def close(self) -> None:
        """End the threads; a second call does nothing."""
        if self._handle.value is not None:
            self._library.efx_raw_destroy(self._handle)
            self._handle = _POINTER()

    @staticmethod
    def _refuse(gate_up: RawMatrix, down: RawMatrix, rows: NDArray[np.float32]) -> None:
        shapes = (gate_up.rows, gate_up.columns, gate_up.precision, gate_up.slices, gate_up.pitch) == (
            2 * down.columns,
            down.rows,
            down.precision,
            down.slices,
            down.pitch,
        )
        fits = shapes and down.slices > 0 and down.columns % down.slices == 0 and down.pitch >= 0
        faults = [] if fits and rows.ndim == 2 and rows.shape[1] == gate_up.columns else ["shapes do not fit"]
        for one in () if faults else (gate_up, down):
            codes, scales = _slice_bytes(one, across=one is down)
            if one.codes.size < codes or one.scales.size < scales:
                faults.append(f"{one.codes.size} and {one.scales.size} bytes of {codes} and {scales}")
            if one.codes.ctypes.data % 4 or (scales and one.scales.ctypes.data % 4) or one.pitch % 4:
                faults.append("bytes do not start at a multiple of 4")
        if faults:
            raise InputError.collect(f"an expert of {gate_up.rows} x {gate_up.columns} in {rows.shape} rows", faults)


def _slice_bytes(one: RawMatrix, *, across: bool) -> tuple[int, int]:
    """Return the bytes from the first code to the last, and from the first scale to the last."""
    skipped = (one.slices - 1) * one.pitch
    if across:
        codes, scales = _raw_bytes(one.precision, one.rows, one.columns // one.slices)
    else:
        codes, scales = _raw_bytes(one.precision, one.rows // one.slices, one.columns)
    if across and one.precision is Precision.INT8_DYNAMIC:  # a row's scale is that of all slices
        return codes + skipped, scales
    return codes + skipped, scales + (skipped if scales else 0)


def _raw_bytes(precision: Precision, rows: int, columns: int) -> tuple[int, int]:
    """Return the bytes of a raw matrix's codes and of its scales."""
    return {
        Precision.FP32: (4 * rows * columns, 0),
        Precision.INT8_DYNAMIC: (rows * columns, 4 * rows),
        Precision.INT4_GROUP32: (rows * columns // 2, 2 * rows * (columns // 32)),
    }[precision]


# --- the engine --------------------------------------------------------------------------------------


class Engine:
    """A decoder in native code. Not for several threads at once, except that ``arena`` may be written meanwhile.

    Args:
        graph: What to compute.
        context_tokens: Positions that the key/value cache holds.
        chunk_tokens: Most tokens of one forward pass.
        threads: Threads that compute; results do not depend on them.
        half_cache: Keep keys and values in fp16: half the memory and reading, and numbers that differ by some 5e-4.

    Raises:
        InputError: A number of the graph makes no sense.
        DeviceError: No memory, or no threads.
        MissingDependencyError: The native library or ExecuTorch is absent.
    """

    def __init__(
        self, graph: DecoderGraph, *, context_tokens: int, chunk_tokens: int, threads: int, half_cache: bool = False
    ) -> None:
        self._library = _opened()
        self._graph = graph
        self._handle = _POINTER()
        self._kept: dict[str, object] = {}
        self._arena: NDArray[np.uint8] | None = None
        self._most = max((layer.routing.experts for layer in graph.layers if layer.routing is not None), default=1)
        spec = _spec_of(graph, (context_tokens, chunk_tokens, threads), half_cache=half_cache)
        _check(self._library, self._library.efx_create(ctypes.byref(spec), ctypes.byref(self._handle)))

    def _call(self, name: str, *arguments: object) -> int:
        return _check(self._library, getattr(self._library, name)(self._handle, *arguments))

    def packed_bytes(self, precision: Precision, rows: int, columns: int) -> int:
        """Return the bytes of a packed matrix; see the function of this name."""
        return packed_bytes(precision, rows, columns)

    def pack(self, precision: Precision, rows: int, columns: int, codes: Raw, scales: Raw | None, out: Raw) -> None:
        """Pack a raw matrix; see the function of this name."""
        pack(precision, rows, columns, codes, scales, out)

    def expert_bytes(self, layer: int, precision: Precision) -> tuple[int, int]:
        """Return the bytes of a layer's packed expert, and where in them ``down`` begins.

        Raises:
            InputError: The layer has no experts.
        """
        size, offset = _SIZE(), _SIZE()
        self._call("efx_expert_bytes", layer, _code(precision), ctypes.byref(size), ctypes.byref(offset))
        return int(size.value), int(offset.value)

    # --- weights --------------------------------------------------------------------------------------

    def set_small(self, name: str, values: NDArray[np.float32]) -> None:
        """Copy a norm, a bias, a router or a shared gate; names as in ``schema_moe``.

        Raises:
            InputError: This decoder has no such tensor, or it has another size.
        """
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        layer, which = _place(name, _SMALL)
        self._naming(name, "efx_set_small", layer, which, flat.ctypes.data, flat.size)

    def set_matrix(self, name: str, precision: Precision, rows: int, columns: int, packed: NDArray[np.uint8]) -> None:
        """Use a packed dense matrix or the head where it lies; names as in ``schema_moe``.

        Raises:
            InputError: This decoder has no such matrix, it has another shape, or ``packed`` is too small or not
                aligned to 64 bytes.
        """
        flat = packed.reshape(-1).view(np.uint8)
        layer, which = _place(name, _BIG)
        place = (layer, which, _code(precision), _natural(rows), _natural(columns))
        self._naming(name, "efx_set_matrix", *place, flat.ctypes.data, flat.size)
        self._kept[name] = flat

    def set_embedding(self, precision: Precision, codes: Raw, scales: Raw | None) -> None:
        """Look embeddings up in a raw matrix where it lies, ``[vocabulary, hidden_dim]``.

        Raises:
            InputError: A buffer is too small, or not aligned to its numbers.
        """
        count = self._graph.vocabulary * self._graph.hidden_dim
        sizes = {
            Precision.FP32: (4 * count, 0),
            Precision.INT8_DYNAMIC: (count, 4 * self._graph.vocabulary),
            Precision.INT4_GROUP32: (count // 2, count // 32 * 2),
        }
        code = _code(precision)
        given, factors = _bytes_of(codes), _bytes_of(scales if scales is not None else b"")
        needed = sizes[precision]
        if given.size < needed[0] or factors.size < needed[1]:
            raise InputError(
                f"the embedding has {given.size} bytes of codes and {factors.size} of scales; {needed[0]} and "
                f"{needed[1]} are needed for {precision.value}. Export the decoder again."
            )
        given, factors = _aligned(given, 4), _aligned(factors, 4)
        self._call("efx_set_embedding", code, given.ctypes.data, factors.ctypes.data if factors.size else None)
        self._kept["embedding"] = (given, factors)

    def _naming(self, name: str, function: str, *arguments: object) -> None:
        try:
            self._call(function, *arguments)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    # --- experts --------------------------------------------------------------------------------------

    def arena(self, capacity_bytes: int) -> NDArray[np.uint8]:
        """Return zeroed memory for experts' packed bytes; an earlier arena is given up, its experts unbound.

        Raises:
            DeviceError: No memory.
        """
        try:
            arena = private_pages(capacity_bytes)[:capacity_bytes]
        except (OSError, ValueError, OverflowError) as error:
            raise DeviceError(
                f"no memory for an expert cache of {capacity_bytes} bytes: {error}. All of it is taken at once. "
                "Give a smaller cache."
            ) from error
        self._call("efx_set_arena", arena.ctypes.data, capacity_bytes)
        self._arena = arena
        return arena

    def bind(self, layer: int, expert: int, precision: Precision, offset: int) -> None:
        """Say that an expert's packed bytes (``gate_up``, then ``down`` at the next multiple of 64) lie at ``offset``.

        Nothing is read: the bytes may still change until the expert is computed.

        Raises:
            InputError: No such expert, or it does not lie in the arena at a multiple of 64.
        """
        if offset < 0:
            raise InputError(
                f"expert {expert} of layer {layer}: offset {offset} is outside the arena. Mend the caller."
            )
        self._call("efx_bind", layer, expert, _code(precision), offset)

    def unbind(self, layer: int, expert: int) -> None:
        """Forget where an expert lies.

        Raises:
            InputError: No such expert.
        """
        self._call("efx_unbind", layer, expert)

    # --- running --------------------------------------------------------------------------------------

    def forward(self, tokens: NDArray[np.int32], position: int, *, every_logit: bool = False) -> Missing | None:
        """Run tokens at ``position``, until done (None) or an expert is missing. A waiting pass is given up.

        Args:
            tokens: ``[count]`` ids, at most ``chunk_tokens``.
            position: Of the first; at most the number of tokens run so far. A smaller one goes back there.
            every_logit: ``logits`` gives all tokens' rows, not only the last one's.

        Raises:
            InputError: Weights are not set, the tokens do not fit the context or the vocabulary, or leave a gap.
            DeviceError: A kernel failed, or the weights give numbers that are not finite.
        """
        flat = np.ascontiguousarray(tokens, dtype=np.int32).reshape(-1)
        if position < 0:
            raise InputError(f"position {position} is negative. The first token's is 0. Mend the caller.")
        return self._outcome(self._call("efx_forward", flat.ctypes.data, flat.size, position, int(every_logit)))

    def compute(self, experts: Sequence[int]) -> None:
        """Compute these experts of the waiting event now; they may be unbound afterwards.

        Raises:
            InputError: Nothing waits, or one is not in the event or not bound.
        """
        ids = np.asarray(experts, dtype=np.int32)
        self._call("efx_compute", ids.ctypes.data, ids.size)

    def resume(self) -> Missing | None:
        """Compute the waiting event's bound experts and go on; the same event again if some are still missing.

        Raises:
            InputError: Nothing waits.
        """
        return self._outcome(self._call("efx_resume"))

    def _outcome(self, status: int) -> Missing | None:
        if status != _MISSING:
            return None
        layer, count = ctypes.c_int32(), _SIZE()
        experts = np.empty(self._most, dtype=np.int32)
        missing = np.empty(self._most, dtype=np.uint8)
        self._call("efx_event", ctypes.byref(layer), experts.ctypes.data, missing.ctypes.data, ctypes.byref(count))
        union = experts[: count.value]
        return Missing(
            int(layer.value), tuple(union.tolist()), tuple(union[missing[: count.value].astype(bool)].tolist())
        )

    def take_events(self) -> list[Chosen]:
        """Return what was routed since the last call, in order; a waiting event stands last, once."""
        count = _SIZE()
        self._call("efx_log_size", ctypes.byref(count))
        log = np.empty(count.value, dtype=np.int32)
        self._call("efx_take_log", log.ctypes.data, log.size)
        return _parse_log(log)

    def guess(self, layer: int) -> tuple[int, ...]:
        """Return the experts that ``layer`` would choose for the tokens as they are now, ascending.

        While an event waits, its experts are not yet added: a guess worth prefetching on (Eliseev and Mazur 2023).

        Raises:
            InputError: The layer has no experts, or no pass is under way.
        """
        count = _SIZE()
        experts = np.empty(self._most, dtype=np.int32)
        self._call("efx_guess", layer, experts.ctypes.data, ctypes.byref(count))
        return tuple(experts[: count.value].tolist())

    def logits(self) -> NDArray[np.float32]:
        """Return a copy of the logits: ``[vocabulary]`` of the last token, ``[tokens, vocabulary]`` if all were asked.

        They are computed when first asked for, so that chunks that nobody samples from cost no head.

        Raises:
            InputError: No pass has ended.
        """
        values, rows = _POINTER(), _SIZE()
        self._call("efx_logits", ctypes.byref(values), ctypes.byref(rows))
        address = values.value or 0
        shape = (int(rows.value), self._graph.vocabulary)
        found = np.ctypeslib.as_array((ctypes.c_float * (shape[0] * shape[1])).from_address(address)).reshape(shape)
        return found.copy() if self._every() else found[0].copy()

    def _every(self) -> bool:
        return bool(self._library.efx_every_logit(self._handle))

    def times(self) -> Times:
        """Return the seconds of computing since the last call."""
        seconds = (ctypes.c_double * 3)()
        self._call("efx_take_times", seconds)
        return Times(*seconds)

    @property
    def memory_bytes(self) -> int:
        """Bytes allocated here: key/value cache, activations and small tensors; neither arena nor packed weights."""
        size = _SIZE()
        self._call("efx_memory_bytes", ctypes.byref(size))
        return int(size.value)

    def close(self) -> None:
        """Give the memory back; every later call but this one raises InputError."""
        if self._handle.value is not None:
            self._library.efx_destroy(self._handle)
            self._handle = _POINTER()
        self._kept.clear()
        self._arena = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_kept"):
            self.close()


def _place(name: str, known: Sequence[str]) -> tuple[int, int]:
    """Return the layer (-1: none) and the kind that a name means."""
    found = _LAYER_NAME.fullmatch(name)
    layer, kind = (int(found.group(1)), found.group(2)) if found else (-1, name)
    if kind not in known:
        raise InputError(f"{name}: no such tensor in a decoder. Known are {', '.join(known)}. Mend the bundle.")
    return min(layer, 2**31 - 1), known.index(kind)


_MANY = 8  # events from which on looking for those that are alike pays


def _parse_log(log: NDArray[np.int32]) -> list[Chosen]:
    """Split the native log: layer, tokens, top_k, size of the union, the union, ids, weights' bits."""
    events: list[Chosen] = []
    at = 0
    while at < log.size:
        _, tokens, top_k, union = log[at : at + 4].tolist()
        ids, count = 4 + union, tokens * top_k
        width = ids + 2 * count
        rest = log[at:]
        # events of single tokens are alike and many: split all of them at once
        rows = _alike(rest, width) if rest.size >= _MANY * width else rest[:width].reshape(1, width)
        at += rows.size
        experts = rows[:, ids : ids + count].reshape(len(rows), tokens, top_k)
        weights = rows[:, ids + count :].view(np.float32).reshape(len(rows), tokens, top_k)
        events += map(Chosen, rows[:, 0].tolist(), experts, weights)
    return events


def _alike(log: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    """Return ``[events, width]``: the events from the first on that have as many tokens, ids and experts as it."""
    rows = log[: log.size // width * width].reshape(-1, width)
    other = (rows[:, 1:4] != rows[0, 1:4]).any(axis=1)
    return rows[: int(other.argmax()) if other.any() else len(rows)]


def _exact(kind: type[_Spec], /, **fields: Any) -> _Spec:
    """Return a structure with these fields; ctypes would cut off the upper bits of a large number."""
    wide = [f"{name} is {one}" for name, one in fields.items() if isinstance(one, int) and not -_WIDE <= one < _WIDE]
    if wide:
        raise InputError(f"{', '.join(wide)}: the engine takes whole numbers of 32 bits. Check the bundle's manifest.")
    return kind(**fields)


def _layer_spec(layer: DecoderLayer) -> _LayerSpec:
    routing = layer.routing
    return _exact(
        _LayerSpec,
        experts=routing.experts if routing else 0,
        top_k=routing.top_k if routing else 0,
        normalised=int(routing.normalised) if routing else 0,
        scale=routing.scale if routing else 1.0,
        expert_dim=layer.expert_dim,
        dense_dim=layer.dense_dim,
        shared_dim=layer.shared_dim,
        shared_gate=int(layer.shared_gate),
    )


def _spec_of(graph: DecoderGraph, sizes: tuple[int, int, int], *, half_cache: bool) -> _DecoderSpec:
    attention = graph.attention
    if len(attention.inverse_frequencies) * 2 != attention.rotary_dim:
        raise InputError(
            f"the graph has {len(attention.inverse_frequencies)} rotary frequencies for {attention.rotary_dim} "
            "dimensions. There is one for each two. Read the checkpoint again."
        )
    layers = (_LayerSpec * len(graph.layers))(*(_layer_spec(layer) for layer in graph.layers))
    frequencies = (ctypes.c_float * max(1, len(attention.inverse_frequencies)))(*attention.inverse_frequencies)
    return _exact(
        _DecoderSpec,
        layers=len(graph.layers),
        hidden=graph.hidden_dim,
        vocabulary=graph.vocabulary,
        latent=int(attention.kind == "latent"),
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        value_dim=attention.value_dim,
        rotary_dim=attention.rotary_dim,
        latent_dim=attention.latent_dim,
        query_key_norm=_NORMS[attention.query_key_norm],
        bias=int(attention.bias),
        rotary_scale=attention.rotary_scale,
        softmax_scale=attention.softmax_scale,
        norm_epsilon=graph.norm_epsilon,
        context_tokens=sizes[0],
        chunk_tokens=sizes[1],
        threads=sizes[2],
        half_cache=int(half_cache),
        inverse_frequencies=ctypes.cast(frequencies, ctypes.POINTER(ctypes.c_float)),
        layer_specs=ctypes.cast(layers, ctypes.POINTER(_LayerSpec)),
    )
