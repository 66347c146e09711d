"""Programs through ExecuTorch's own Python binding, in this process.

Every segment is loaded from a program of its own: methods of one program share their activation arenas in the
binding, so that an output that was not copied could be overwritten by the next method. With one program each,
outputs are handed on without a copy.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from executorch.extension.pybindings import portable_lib

from edgeflex.bundle import PROGRAM
from edgeflex.errors import BundleError, DeviceError, InputError, UnsupportedError
from edgeflex.files import read_bytes
from edgeflex.runtimes.loop import Outcome, check_input, check_thresholds, walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from typing_extensions import Self

    from edgeflex.bundle import Bundle
    from edgeflex.schema import SegmentProgram

    Float32 = NDArray[np.float32]

logger = logging.getLogger(__name__)

# A .pte starts with a FlatBuffer root offset and its file identifier. Without this look the binding ends the
# process on a foreign file: it puts the identifier that it found into an error text that must be UTF-8.
_IDENTIFIER = slice(4, 6)
_EXPECTED_IDENTIFIER = b"ET"
_VERIFICATION = portable_lib.Verification.InternalConsistency
_LEAST_SAMPLE_S = 100e-6  # a thousand times the clock's resolution and call cost

_FEW_CLASSES = 64  # up to here a Python list is quicker than a call into torch

# The thread pool belongs to the process and its address is kept in every loaded method.
_open_sessions: set[int] = set()


class ExecutorchSession:
    """All segments of a bundle, loaded when entered. One thread of control at a time."""

    def __init__(
        self,
        program: Path,
        segments: Sequence[SegmentProgram],
        *,
        threads: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if threads < 1:
            raise InputError(f"{threads} threads: at least 1 is needed. Pass --threads 1 or more.")
        self._program = program
        self._segments = tuple(segments)
        self._threads = threads
        self._clock = clock
        self._methods: list[Any] = []
        self._input_shape = tuple(segments[0].input_shape) if segments else ()
        self._load_s = 0.0

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, threads: int = 1) -> ExecutorchSession:
        """Return a session over a checked bundle.

        Raises:
            UnsupportedError: The bundle was exported for another backend.
            InputError: ``threads`` is below 1.
        """
        manifest = bundle.manifest
        if manifest.backend != "executorch":
            raise UnsupportedError(
                f"{bundle.path}: exported for {manifest.backend!r}, which runtime 'executorch' cannot run. "
                "Choose its own runtime, or export again for executorch."
            )
        return cls(bundle.file(PROGRAM), manifest.segments, threads=threads)

    @classmethod
    def from_folder(
        cls, folder: Path, segments: Sequence[SegmentProgram], *, threads: int = 1, settings: str = ""
    ) -> ExecutorchSession:
        """Return a session over a program that its exporter wrote into ``folder``; see ``Session``."""
        if settings:
            raise InputError(f"ExecuTorch has no settings, {settings!r} were given. Leave them out.")
        return cls(folder / "program.pte", segments, threads=threads)

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
            BundleError: The file is no program, or not the one that its manifest describes.
            DeviceError: A method cannot be loaded, or another session runs with other threads.
        """
        set_threads(self._threads)
        start = self._clock()
        self._methods = [_load(self._program, segment) for segment in self._segments]
        self._load_s = self._clock() - start
        _open_sessions.add(id(self))
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Drop every method and its memory; a second call does nothing."""
        self._methods = []
        _open_sessions.discard(id(self))

    def segment(self, index: int, x: Float32) -> tuple[Float32 | None, Float32]:
        """Run one segment by itself; see ``Session.segment``."""
        if not 0 <= index < len(self._segments):
            raise InputError(f"segment {index}: there are segments 0 to {len(self._segments) - 1}. Name one.")
        segment = self._segments[index]
        check_input(x, segment.input_shape, f"segment {index}", segment.input_dtype)
        activations, probabilities, _ = self._step(index, _tensor(x))
        last = index == len(self._segments) - 1
        return None if last else activations.numpy().copy(), probabilities.numpy()[0].copy()

    def infer(self, x: Float32, thresholds: Sequence[float | None]) -> Outcome:
        """Run segments until one may be left; see ``Session.infer``."""
        check_thresholds(thresholds, len(self._segments))
        if x.shape != self._input_shape or x.dtype != np.float32:
            check_input(x, self._input_shape, "the input")
        index, probabilities, confidence = walk(self._step, _tensor(x), thresholds)
        return Outcome(index, probabilities.numpy()[0].copy(), confidence)

    def _step(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Run one method; what it returns lives until the same method runs again."""
        try:
            outputs = self._methods[index].call((x,), False)
        except RuntimeError as error:
            raise _device_error(self._segments[index].method, error) from None
        except IndexError:
            raise DeviceError("the session is closed. Run inside `with open_session(...)`.") from None
        probabilities = outputs[-1]
        return outputs[0], probabilities, _largest(probabilities)


def set_threads(threads: int) -> None:
    """Give the process's thread pool ``threads`` threads, before methods are loaded.

    Torch itself gets one, since its waiting workers would take the cores that the pool needs.

    Raises:
        InputError: ``threads`` is below 1.
        DeviceError: Another session is open with another number; its methods hold the pool.
    """
    if threads < 1:
        raise InputError(f"{threads} threads: at least 1 is needed. Pass --threads 1 or more.")
    torch.set_num_threads(1)
    present = portable_lib._threadpool_get_thread_count()  # noqa: SLF001 - the binding offers no other name
    if present == threads:
        return
    if _open_sessions:
        raise DeviceError(
            f"{threads} threads were asked for while {len(_open_sessions)} session(s) run with {present}. "
            "Close them first: they share one pool."
        )
    portable_lib._unsafe_reset_threadpool(threads)  # noqa: SLF001
    logger.debug("thread pool: %d -> %d threads", present, threads)


def method_names(program: Path) -> tuple[str, ...]:
    """Return the names of the methods that a ``.pte`` holds, in its order.

    Raises:
        InputError: The file is absent.
        BundleError: It is no ExecuTorch program.
    """
    loaded = _open_program(program)
    return tuple(loaded.get_method_name(index) for index in range(loaded.num_methods()))


def time_program(
    pte: bytes,
    example_inputs: Sequence[torch.Tensor],
    *,
    threads: int,
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, ...]:
    """Return the seconds of one call of a program with a single method, ``repeats`` samples.

    A sample is the mean over as many calls as fill 100 us, so that short kernels are not lost in the clock.

    Args:
        pte: The program.
        example_inputs: What to call it with.
        threads: Threads of the pool.
        repeats: Samples to take.
        warmup: Calls before them.
        clock: Seconds, rising.

    Raises:
        InputError: The program has more than one method, or ``repeats`` is below 1.
        BundleError: ``pte`` is no ExecuTorch program.
        DeviceError: It cannot be loaded or run.
    """
    if repeats < 1:
        raise InputError(f"{repeats} repeats: at least 1 is needed to time a program.")
    set_threads(threads)
    program = _open_buffer(pte)  # keeps no reference to ``pte``, which outlives it here
    if program.num_methods() != 1:
        raise InputError(f"the program to time has {program.num_methods()} methods; exactly 1 is needed.")
    name = program.get_method_name(0)
    inputs = tuple(example_inputs)
    try:
        call = program.load_method(name).call
        for _ in range(max(warmup, 1)):
            call(inputs, False)
        calls = _calls_per_sample(call, inputs, clock)
        return tuple(_time_calls(call, inputs, calls, clock) / calls for _ in range(repeats))
    except RuntimeError as error:
        raise _device_error(name, error) from None


def _time_calls(call: Any, inputs: tuple[torch.Tensor, ...], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        call(inputs, False)
    return clock() - start


def _calls_per_sample(call: Any, inputs: tuple[torch.Tensor, ...], clock: Callable[[], float]) -> int:
    once_s = min(_time_calls(call, inputs, 1, clock) for _ in range(3))
    return max(1, min(10_000, int(np.ceil(_LEAST_SAMPLE_S / max(once_s, 1e-9)))))


def _load(path: Path, segment: SegmentProgram) -> Any:
    program = _open_program(path)
    names = [program.get_method_name(index) for index in range(program.num_methods())]
    if segment.method not in names:
        raise BundleError(f"{path}: no method {segment.method!r} (it has {', '.join(names)}). Export the bundle again.")
    meta = program.method_meta(segment.method)
    held = (tuple(meta.input_tensor_meta(0).sizes()), meta.num_outputs())
    promised = (tuple(segment.input_shape), 1 if segment.output_shape is None else 2)
    if held != promised:
        raise BundleError(
            f"{path}: method {segment.method!r} takes {list(held[0])} and returns {held[1]} tensors, the "
            f"manifest says {list(promised[0])} and {promised[1]}. Export the bundle again."
        )
    try:
        return program.load_method(segment.method)
    except RuntimeError as error:
        raise _device_error(segment.method, error) from None


def _open_program(path: Path) -> Any:
    with _as_bundle_error(str(path)):
        _check_identifier(str(path), _head(path))
        return portable_lib._load_program(str(path), program_verification=_VERIFICATION)  # noqa: SLF001


def _open_buffer(pte: bytes) -> Any:
    with _as_bundle_error("the program"):
        _check_identifier("the program", pte)
        return portable_lib._load_program_from_buffer(pte, program_verification=_VERIFICATION)  # noqa: SLF001


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_IDENTIFIER.stop)
    except OSError:
        return read_bytes(path, "the program")  # says what is wrong with the path


def _check_identifier(name: str, data: bytes) -> None:
    if data[_IDENTIFIER] != _EXPECTED_IDENTIFIER:
        raise BundleError(f"{name}: not an ExecuTorch program. Export the bundle again.")


@contextmanager
def _as_bundle_error(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise BundleError(f"{name}: ExecuTorch refuses the program: {error}. Export the bundle again.") from None


def _device_error(method: str, error: RuntimeError) -> DeviceError:
    return DeviceError(
        f"method {method!r} failed in ExecuTorch: {error}. Check free memory; if there is enough, export again."
    )


def _tensor(x: Float32) -> torch.Tensor:
    """Return ``x`` as a tensor over the same memory; a copy only where ``x`` is strided or read-only."""
    if not (x.flags.c_contiguous and x.flags.writeable):
        x = np.array(x, order="C")
    return torch.from_numpy(x)


def _largest(probabilities: torch.Tensor) -> float:
    """Return the largest of ``[1, classes]``, NaN if they are: softmax leaves either no NaN or nothing else."""
    if probabilities.numel() <= _FEW_CLASSES:
        return max(probabilities.tolist()[0])
    return probabilities.max().item()
