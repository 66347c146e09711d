"""ONNX programs through ONNX Runtime, in this process.

Every segment is a graph of its own in a session of its own. What it reads and writes is bound once, when it is
loaded, to buffers that stay where they are, and the buffer of one segment's activations is the next one's input:
a step is one call that converts nothing, and between segments nothing is copied.

Settings name how a program is executed. The plain way, ``exact``, runs every node as it was written, so that
quantised programs give the numbers of their reference. The quick ways rewrite the graph; ``choose_settings`` tells
by running them which of them still give the same answers, and which is quickest.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as binding_errors

from edgeflex.bundle import PROGRAM_PART
from edgeflex.errors import BundleError, DeviceError, EdgeflexError, InputError, UnsupportedError
from edgeflex.runtimes.cuda_driver import driver_problem
from edgeflex.runtimes.loop import Outcome, check_input, check_thresholds, walk
from edgeflex.runtimes.onnx_types import FP8_TYPES, INT4_TYPES, INT8_TYPES, element_types
from edgeflex.runtimes.segments import all_exits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from typing_extensions import Self

    from edgeflex.bundle import Bundle
    from edgeflex.schema import SegmentProgram

    Float32 = NDArray[np.float32]

Provider = Literal["auto", "cpu", "cuda"]

logger = logging.getLogger(__name__)

_FATAL_ONLY = 4  # errors come as exceptions, which say what to do
ort.set_default_logger_severity(_FATAL_ONLY)
ort.disable_telemetry_events()  # Linux builds hold none; where one does, it stays silent

_REFUSALS = (
    RuntimeError,
    ValueError,
    *(
        getattr(binding_errors, name)
        for name in ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile")
    ),
    binding_errors.NotImplemented,
    binding_errors.RuntimeException,
)
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
# Without these CUDA rounds float32 to TF32 and picks convolutions anew in every process.
_CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
_FEW_CLASSES = 64  # up to here a Python list is quicker than a call into NumPy
_TIE = 1.05


@dataclass(frozen=True)
class Setting:
    """One way to execute a program.

    Attributes:
        level: How far ONNX Runtime rewrites the graph.
        accuracy: In what a product with 4-bit weights computes: 1 in float32, 4 with activations rounded to int8.
        tolerance: The most that a probability may differ from plain execution.
        rounded_tolerance: The same where the program rounds activations to int8 between layers. Float sums in
            another order then tip single values to the next step, and a deep network carries that on.
        rounded_mean: The most that it may differ there on the mean over images and exits.
    """

    level: Any
    accuracy: int = 0
    tolerance: float = 0.0
    rounded_tolerance: float = 0.0
    rounded_mean: float = 0.0


# From plain to bold; of ways that are equally quick the first is chosen. What plain execution of a 56-layer network in
# int8 differs from its reference by, for the order of sums alone, is 0.07; an exporter refuses 0.15.
SETTINGS: Mapping[str, Setting] = {
    "exact": Setting(ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
    "fast": Setting(
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL, 1, tolerance=1e-3, rounded_tolerance=0.15, rounded_mean=0.01
    ),
    "fast-int8": Setting(
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL, 4, tolerance=0.02, rounded_tolerance=0.02, rounded_mean=0.01
    ),
}
PLAIN = "exact"


class _Buffer:
    """Activations in a place that does not move: in memory, or on the device."""

    def __init__(self, shape: Sequence[int], device: str) -> None:
        array = np.zeros(shape, dtype=np.float32)
        self.shape = tuple(shape)
        self.value: Any = ort.OrtValue.ortvalue_from_numpy(array, device, 0)
        self._array = array if device == "cpu" else None  # on the processor the value is this array

    def write(self, x: Float32) -> None:
        if self._array is not None:
            np.copyto(self._array, x)
        else:
            self.value.update_inplace(np.ascontiguousarray(x))

    def read(self) -> Float32:
        """Return a copy."""
        return self.value.numpy() if self._array is None else self._array.copy()


class _Segment(NamedTuple):
    """A loaded segment: ``run(binding)`` turns ``input`` into ``activations`` and ``probabilities`` [1, classes]."""

    run: Callable[[Any], None]
    binding: Any
    input: _Buffer
    activations: _Buffer | None
    probabilities: Float32


class OnnxruntimeSession:
    """All segments of a bundle, loaded when entered. One thread of control at a time."""

    def __init__(
        self,
        programs: Sequence[Path],
        segments: Sequence[SegmentProgram],
        *,
        threads: int = 1,
        settings: str = "",
        provider: Provider = "auto",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if threads < 1:
            raise InputError(f"{threads} threads: at least 1 is needed. Pass --threads 1 or more.")
        if not segments or len(programs) != len(segments):
            raise InputError(f"{len(programs)} programs for {len(segments)} segments. Give one per segment.")
        self._settings = settings or PLAIN
        if self._settings not in SETTINGS:
            raise InputError(f"ONNX Runtime has no settings {settings!r}; it has {', '.join(SETTINGS)}. Name one.")
        self._programs = tuple(programs)
        self._segments = tuple(segments)
        self._threads = threads
        self._provider = provider
        self._clock = clock
        self._loaded: list[_Segment] = []
        self._input_shape = tuple(segments[0].input_shape)
        self._load_s = 0.0

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, threads: int = 1, provider: Provider = "auto") -> OnnxruntimeSession:
        """Return a session over a checked bundle; one for TensorRT holds the same graphs and runs plainly here.

        Raises:
            UnsupportedError: The bundle was exported for another backend.
            BundleError: The manifest's settings are none of this runtime's.
            InputError: ``threads`` is below 1.
        """
        manifest = bundle.manifest
        if manifest.backend not in {"onnx", "tensorrt"}:
            raise UnsupportedError(
                f"{bundle.path}: exported for {manifest.backend!r}, which runtime 'onnxruntime' cannot run. "
                "Choose its own runtime, or export again for onnx."
            )
        settings = manifest.settings if manifest.backend == "onnx" else ""
        if settings and settings not in SETTINGS:
            raise BundleError(
                f"{bundle.path}: the manifest's settings {settings!r} are none of ONNX Runtime's "
                f"({', '.join(SETTINGS)}). Export the bundle again."
            )
        programs = [bundle.file(f"{PROGRAM_PART}segment{index}") for index in range(len(manifest.segments))]
        return cls(programs, manifest.segments, threads=threads, settings=settings, provider=provider)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        segments: Sequence[SegmentProgram],
        *,
        threads: int = 1,
        settings: str = "",
        provider: Provider = "auto",
    ) -> OnnxruntimeSession:
        """Return a session over a program that its exporter wrote into ``folder``; see ``SessionKind``."""
        programs = _programs(folder, len(segments))
        return cls(programs, segments, threads=threads, settings=settings, provider=provider)

    @property
    def load_s(self) -> float:
        """Seconds that loading took; 0 before ``with``."""
        return self._load_s

    @property
    def segment_count(self) -> int:
        """Number of segments, and of exits."""
        return len(self._segments)

    def __enter__(self) -> Self:
        """Load every segment.

        Raises:
            BundleError: A file is no ONNX graph, or not the one that its manifest describes.
            UnsupportedError: The graph holds numbers that ONNX Runtime computes rightly in plain execution only.
            DeviceError: There is no memory, or the asked device is absent.
        """
        start = self._clock()
        self._loaded = self._load()
        self._load_s = self._clock() - start
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Drop every session and its memory; a second call does nothing."""
        self._loaded = []

    def segment(self, index: int, x: Float32) -> tuple[Float32 | None, Float32]:
        """Run one segment by itself; see ``Session.segment``."""
        if not 0 <= index < len(self._segments):
            raise InputError(f"segment {index}: there are segments 0 to {len(self._segments) - 1}. Name one.")
        check_input(x, self._segments[index].input_shape, f"segment {index}")
        self._write(index, x)
        _, probabilities, _ = self._step(index, None)
        activations = self._loaded[index].activations
        return None if activations is None else activations.read(), probabilities[0].copy()

    def infer(self, x: Float32, thresholds: Sequence[float | None]) -> Outcome:
        """Run segments until one may be left; see ``Session.infer``."""
        check_thresholds(thresholds, len(self._segments))
        if x.shape != self._input_shape or x.dtype != np.float32:
            check_input(x, self._input_shape, "the input")
        self._write(0, x)
        index, probabilities, confidence = walk(self._step, None, thresholds)
        return Outcome(index, probabilities[0].copy(), confidence)

    def _write(self, index: int, x: Float32) -> None:
        if not self._loaded:
            raise DeviceError("the session is closed. Run inside `with open_session(...)`.")
        self._loaded[index].input.write(x)

    def _step(self, index: int, _: None) -> tuple[None, Float32, float]:
        """Run one segment on what its input buffer holds; its probabilities live until it runs again."""
        segment = self._loaded[index]
        try:
            segment.run(segment.binding)
        except _REFUSALS as error:
            raise _device_error(f"segment {index}", error) from None
        return None, segment.probabilities, _largest(segment.probabilities)

    def _load(self) -> list[_Segment]:
        providers, device = _providers(self._provider)
        loaded: list[_Segment] = []
        for index, (path, segment) in enumerate(zip(self._programs, self._segments, strict=True)):
            session = _open(path, _options(path, self._settings, self._threads), providers)
            _check_signature(path, session, segment, last=index == len(self._segments) - 1)
            before = loaded[-1].activations if loaded else _Buffer(segment.input_shape, device)
            loaded.append(_bound(path, session, segment, before, device))
        return loaded


def choose_settings(
    folder: Path,
    segments: Sequence[SegmentProgram],
    sample: Float32,
    *,
    threads: int = 1,
    provider: Provider = "auto",
    rounds: int = 40,
    clock: Callable[[], float] = time.perf_counter,
) -> str:
    """Return the settings in which a program runs quickest while it gives the answers of plain execution.

    Settings that cannot load the program, that move the most probable class of any image at any exit, or whose
    probabilities differ by more than their tolerance, are dropped. The others are timed through all segments,
    forwards and backwards in every round (A B B A), so that a slow spell of the machine falls on all alike; their
    medians are compared. Within 5 % of the quickest, the plainest wins.

    The answers of the chosen settings may still differ from plain execution within that tolerance: what promises
    something about a program must be measured in the settings that were chosen.

    Args:
        folder: Where the exporter wrote the program.
        segments: What each segment takes and returns.
        sample: Images [n, C, H, W] as the program will see them.
        threads: Threads that compute.
        provider: Where they run.
        rounds: Rounds to time, after a quarter as many to warm up.
        clock: Seconds, rising.

    Raises:
        InputError: There is no image, or ``threads`` is below 1.
        BundleError: The program cannot be loaded plainly.
        DeviceError: Plain execution failed.
    """
    if len(sample) == 0 or rounds < 1:
        raise InputError(f"{len(sample)} images and {rounds} rounds: at least 1 of each is needed to choose settings.")
    with ExitStack() as stack:

        def opened(name: str) -> OnnxruntimeSession:
            session = OnnxruntimeSession.from_folder(
                folder, segments, threads=threads, settings=name, provider=provider
            )
            return stack.enter_context(session)

        sessions = {PLAIN: opened(PLAIN)}
        expected = all_exits(sessions[PLAIN], [sample])
        held = frozenset[int]().union(*(_types(path) for path in _programs(folder, len(segments))))
        for name in _candidates(held):
            try:
                session = opened(name)
                found = all_exits(session, [sample])
            except EdgeflexError as error:
                logger.info("settings %s: %s", name, error)
                continue
            if agrees(found, expected, SETTINGS[name], rounded=bool(held & INT8_TYPES)):
                sessions[name] = session
        seconds = _seconds(sessions, sample, rounds, clock)
    quickest = min(seconds.values())
    return next(name for name in sessions if seconds[name] <= _TIE * quickest)


def agrees(found: Float32, expected: Float32, setting: Setting, *, rounded: bool) -> bool:
    """Say whether probabilities [n, exits, classes] are those of plain execution, as far as ``setting`` demands.

    The most probable class must be the same at every exit of every image in any case.

    Args:
        found: In ``setting``.
        expected: In plain execution.
        setting: What says how far they may differ.
        rounded: Whether the program rounds activations to int8.
    """
    differences = np.abs(found - expected).max(axis=2)  # [n, exits]
    most, mean = float(differences.max()), float(differences.mean())
    moved = int((found.argmax(axis=2) != expected.argmax(axis=2)).sum())
    logger.info("settings differ by %.3g from plain execution, %.3g on the mean; %d classes moved", most, mean, moved)
    if moved:
        return False
    if rounded:
        return most <= setting.rounded_tolerance and mean <= setting.rounded_mean
    return most <= setting.tolerance  # a NaN is no agreement


def _candidates(held: frozenset[int]) -> tuple[str, ...]:
    """Return the settings beside the plain one that can help a program with these formats without making it wrong."""
    if held & FP8_TYPES:
        return ()
    return ("fast", "fast-int8") if held & INT4_TYPES else ("fast",)


def _seconds(
    sessions: Mapping[str, OnnxruntimeSession], sample: Float32, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return the median seconds of an inference through all segments, by settings."""
    if len(sessions) == 1:
        return dict.fromkeys(sessions, 0.0)
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    warm_up = rounds // 4
    for number in range(warm_up + rounds):
        x = np.ascontiguousarray(sample[number % len(sample)][None])
        for name in (*sessions, *reversed(tuple(sessions))):
            session = sessions[name]
            never = (None,) * session.segment_count
            start = clock()
            session.infer(x, never)
            took_s = clock() - start
            if number >= warm_up:
                taken[name].append(took_s)
    return {name: float(np.median(one)) for name, one in taken.items()}


def _programs(folder: Path, count: int) -> list[Path]:
    return [folder / f"segment{index}.onnx" for index in range(count)]


def _options(path: Path, settings: str, threads: int) -> Any:
    """Return the session options of one graph.

    Raises:
        BundleError: The file is no ONNX graph.
        UnsupportedError: It holds 8-bit floats, and the settings are not the plain ones.
    """
    setting = SETTINGS[settings]
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.graph_optimization_level = setting.level
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Sleeping workers start too late for operators of some tens of microseconds. They spin while a segment runs and
    # no longer: the next one has workers of its own, which need the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if settings != PLAIN:
        held = _types(path)
        _refuse_fp8(path, held, settings)
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(setting.accuracy))
        # Integer kernels would round biases, which were not rounded in the reference, and move classes. Without
        # them 4-bit weights are unpacked once, so they stay allowed where nothing else is rounded.
        if held & INT8_TYPES:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _providers(asked: Provider) -> tuple[list[Any], str]:
    """Return the execution providers in order, and the device that activations live on.

    Raises:
        InputError: There is no such provider.
        DeviceError: CUDA was asked for and is absent.
    """
    if asked not in {"auto", "cpu", "cuda"}:
        raise InputError(f"provider {asked!r} is unknown. Name auto, cpu or cuda.")
    if asked == "cpu":
        return [_CPU], "cpu"
    problem: str | None = "this ONNX Runtime has no CUDA provider. Install onnxruntime-gpu instead."
    if _CUDA in ort.get_available_providers():
        problem = driver_problem()  # the driver first: without one ONNX Runtime would write errors of its own
    if problem is None:
        return [(_CUDA, _CUDA_OPTIONS), _CPU], "cuda"
    if asked == "cuda":
        raise DeviceError(f"provider 'cuda' was asked for: {problem}")
    return [_CPU], "cpu"


def _open(path: Path, options: Any, providers: list[Any]) -> Any:
    try:
        # the fallback of the binding would print, and run elsewhere than was asked
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except (MemoryError, *_REFUSALS) as error:
        if "alloc" in str(error):
            raise _device_error(str(path), error) from None
        raise BundleError(
            f"{path}: ONNX Runtime refuses the program: {_one_line(error)}. Export the bundle again."
        ) from None
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != first:
        raise DeviceError(f"ONNX Runtime could not start {first}. Check its CUDA and cuDNN versions, or ask for 'cpu'.")
    return session


def _bound(path: Path, session: Any, segment: SegmentProgram, before: _Buffer | None, device: str) -> _Segment:
    """Return a segment whose input and outputs lie in buffers that stay."""
    if before is None or before.shape != tuple(segment.input_shape):
        raise BundleError(f"{path}: the segment before hands over another shape. Export the bundle again.")
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", before.value)
    activations = None if segment.output_shape is None else _Buffer(segment.output_shape, device)
    if activations is not None:
        binding.bind_ortvalue_output("activations", activations.value)
    shape = next(one.shape for one in session.get_outputs() if one.name == "probabilities")
    probabilities = np.zeros(shape, dtype=np.float32)
    binding.bind_ortvalue_output("probabilities", ort.OrtValue.ortvalue_from_numpy(probabilities))
    return _Segment(session.run_with_iobinding, binding, before, activations, probabilities)


def _check_signature(path: Path, session: Any, segment: SegmentProgram, *, last: bool) -> None:
    """Refuse a graph that is not the one its manifest describes.

    Raises:
        BundleError: Names, types or shapes differ.
    """
    handed = [] if last else ["activations"]
    promised = [("x", "tensor(float)", tuple(segment.input_shape))]
    promised += [(name, "tensor(float)", tuple(segment.output_shape or ())) for name in handed]
    # graphs for TensorRT also give the largest probability, which costs nothing to find here
    inputs, outputs = session.get_inputs(), [one for one in session.get_outputs() if one.name != "confidence"]
    held = [(one.name, one.type, tuple(one.shape)) for one in (*inputs, *outputs)]
    classes = held.pop() if outputs else ("nothing", "", ())
    fixed = len(classes[2]) == 2 and classes[2][0] == 1 and isinstance(classes[2][1], int)
    if held == promised and classes[:2] == ("probabilities", "tensor(float)") and fixed:
        return
    raise BundleError(
        f"{path}: the graph has {_listed([*held, classes])}; the manifest says {_listed(promised)} and probabilities "
        "float [1, classes]. Export the bundle again."
    )


def _listed(tensors: Sequence[tuple[str, str, tuple[Any, ...]]]) -> str:
    return ", ".join(f"{name} {kind[7:-1]} {list(shape)}" for name, kind, shape in tensors)


def _refuse_fp8(path: Path, held: frozenset[int], settings: str) -> None:
    """Refuse 8-bit floats in other than plain execution: rewritten, such graphs fail or silently lose nodes."""
    if held & FP8_TYPES:
        raise UnsupportedError(
            f"{path}: holds 8-bit floats, which ONNX Runtime computes rightly in settings {PLAIN!r} only, "
            f"not in {settings!r}. Run it with {PLAIN!r}."
        )


def _types(path: Path) -> frozenset[int]:
    try:
        return element_types(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not an ONNX graph ({error}). Export the bundle again.") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _device_error(what: str, error: BaseException) -> DeviceError:
    return DeviceError(f"{what} failed in ONNX Runtime: {error}. Check free memory; if there is enough, export again.")


def _largest(probabilities: Float32) -> float:
    """Return the largest of ``[1, classes]``, NaN if they are: softmax leaves either no NaN or nothing else."""
    if probabilities.size <= _FEW_CLASSES:
        return max(probabilities.tolist()[0])
    return float(probabilities.max())
