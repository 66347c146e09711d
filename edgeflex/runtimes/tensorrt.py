"""Engines that ``edgeflex build`` made on this device, run one segment at a time.

Everything is placed once: the image goes up from pinned memory, the activations of a segment are written where the next
one reads them, and after each segment only its confidence (or, where the graph gives none, its row of probabilities,
some kilobytes at most) comes back. After a warm-up a segment is one CUDA graph, so that a step costs one launch and
one wait.

Importing this loads neither TensorRT nor anything that needs a driver; ``with`` does, once the driver has answered.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeflex.errors import BundleError, DeviceError, InputError, UnsupportedError
from edgeflex.runtimes.cuda_driver import CudaContext, host_view
from edgeflex.runtimes.loop import Outcome, check_input, check_thresholds, walk
from edgeflex.runtimes.measure import DeviceMemory
from edgeflex.runtimes.tensorrt_build import created, engines_for, messages_of, open_machine, read_recipe, said
from edgeflex.runtimes.tensorrt_graphs import Watched, recorded
from edgeflex.runtimes.tensorrt_stages import load_engine
from edgeflex.schema import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from typing_extensions import Self

    from edgeflex.bundle import Bundle
    from edgeflex.schema import Plan, SegmentProgram

    Float32 = NDArray[np.float32]

logger = logging.getLogger(__name__)

# Names that the exporter gives. ``confidence``, the largest probability, is optional.
_INPUT, _ACTIVATIONS, _PROBABILITIES, _CONFIDENCE = "x", "activations", "probabilities", "confidence"
_FLOAT_BYTES = 4
_RESERVE = 0.1  # of the free memory, for what the driver itself takes later


@dataclass
class _Stage:
    """One segment in place: its context, where its tensors lie on the device, and where its answer comes back to.

    ``answer`` is pinned memory: the confidence where the engine gives one, else ``row`` itself.
    """

    name: str
    context: Any
    x: int
    activations: int
    probabilities: int
    confidence: int
    row: Float32
    answer: Float32
    graph: int = 0


class TensorrtSession:
    """All segments of a bundle, loaded when entered. One thread of control at a time."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 1,
        engines: Path | None = None,
        library: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Remember what to load.

        Args:
            bundle: A checked bundle, exported for tensorrt.
            threads: Threads of the processor; the device does the work whatever they are.
            engines: The folder that was built into; the bundle's own by default.
            library: What to ask instead of the driver's own library.
            clock: Seconds, rising.

        Raises:
            InputError: ``threads`` is below 1.
        """
        if threads < 1:
            raise InputError(f"{threads} threads: at least 1 is needed. Pass --threads 1 or more.")
        self._bundle = bundle
        self._folder = bundle.path if engines is None else engines
        self._segments = bundle.manifest.segments
        self._library = library
        self._clock = clock
        self._load_s = 0.0
        self._cuda: CudaContext | None = None
        self._runtime: Any = None
        self._messages: Any = None
        self._engines: list[Any] = []
        self._stages: list[_Stage] = []
        self._stream = 0
        self._staging = 0
        self._free_before = 0
        self._image: Float32 = np.zeros(0, dtype=np.float32)

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, threads: int = 1) -> TensorrtSession:
        """Return a session over a checked bundle.

        Raises:
            UnsupportedError: The bundle was exported for another backend.
            InputError: ``threads`` is below 1.
        """
        backend = bundle.manifest.backend
        if backend != "tensorrt":
            raise UnsupportedError(
                f"{bundle.path}: exported for {backend!r}, which runtime 'tensorrt' cannot run. "
                "Choose its own runtime, or export again for tensorrt."
            )
        return cls(bundle, threads=threads)

    @classmethod
    def from_folder(
        cls, folder: Path, segments: Sequence[SegmentProgram], *, threads: int = 1, settings: str = ""
    ) -> TensorrtSession:
        """Refuse: what an exporter writes are graphs, and engines are made of a bundle, on the device.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"{folder}: {len(segments)} ONNX graphs (settings {settings!r}, {threads} thread(s)) are no engines. "
            "Export a bundle and build it on the device, or run the graphs with --runtime onnxruntime."
        )

    @property
    def load_s(self) -> float:
        """Seconds that loading took, warm-up included; 0 before ``with``."""
        return self._load_s

    @property
    def segment_count(self) -> int:
        """Number of segments, and of exits."""
        return len(self._segments)

    def device_memory(self) -> DeviceMemory:
        """Return what loading took of the device's memory: what is less free now, by the driver.

        Other programs that take or free some meanwhile count too; never less is told than what the session allocated
        itself and the engines say they need to work in.

        Raises:
            DeviceError: The session is closed, or the driver failed.
        """
        cuda = self._ready()
        scratch = sum(int(engine.device_memory_size_v2) for engine in self._engines)
        taken = self._free_before - cuda.free_bytes()
        return DeviceMemory(max(taken, cuda.allocated_bytes + scratch), cuda.integrated)

    def __enter__(self) -> Self:
        """Load every engine, place its tensors, warm up and record its graph.

        Raises:
            MissingDependencyError: TensorRT is absent.
            DeviceError: There is no usable device, no engine for it, or too little memory.
            BundleError: An engine is damaged, or not of this bundle.
        """
        self.close()
        start = self._clock()
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        self._load_s = self._clock() - start
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        # contexts point into engines, engines into the runtime, and all of them into the device's context
        self._stages = []
        self._engines = []
        self._runtime = None
        self._image = np.zeros(0, dtype=np.float32)
        cuda, self._cuda = self._cuda, None
        if cuda is not None:
            cuda.close()

    # --- running -------------------------------------------------------------------------------------

    def segment(self, index: int, x: Float32) -> tuple[Float32 | None, Float32]:
        """Run one segment by itself; see ``Session.segment``."""
        if not 0 <= index < len(self._segments):
            raise InputError(f"segment {index}: there are segments 0 to {len(self._segments) - 1}. Name one.")
        cuda = self._ready()
        shape = self._segments[index].input_shape
        check_input(x, shape, f"segment {index}")
        np.copyto(host_view(self._staging, shape), x)
        if index:  # the first segment fetches its input itself
            cuda.upload(self._stages[index].x, self._staging, x.size * _FLOAT_BYTES, self._stream)
        self._run(index)
        return self._activations(index), self._row(index)

    def infer(self, x: Float32, thresholds: Sequence[float | None]) -> Outcome:
        """Run segments until one may be left; see ``Session.infer``."""
        check_thresholds(thresholds, len(self._segments))
        self._ready()
        shape = self._segments[0].input_shape
        check_input(x, shape, "the input")
        np.copyto(self._image, x)
        index, _, confidence = walk(self._step, None, thresholds)
        return Outcome(index, self._row(index), confidence)

    def _ready(self) -> CudaContext:
        if self._cuda is None or not self._stages:
            raise DeviceError("the session is closed. Run inside `with open_session(...)`.")
        self._cuda.make_current()
        return self._cuda

    def _step(self, index: int, _: object) -> tuple[None, None, float]:
        """Run a segment over what the one before left on the device."""
        self._run(index)
        return None, None, float(self._stages[index].answer.max())

    def _run(self, index: int) -> None:
        """Run a segment and wait for its answer."""
        cuda, stage = self._cuda, self._stages[index]
        if cuda is None:
            raise DeviceError("the session is closed. Run inside `with open_session(...)`.")
        if stage.graph:
            cuda.launch(stage.graph, self._stream)
        else:
            self._queue(cuda, index)
        cuda.synchronize(self._stream)

    def _queue(self, cuda: CudaContext, index: int) -> None:
        """Queue a segment's work: the image's way up (first segment), the engine, the answer's way back."""
        stage = self._stages[index]
        if index == 0:
            cuda.upload(stage.x, self._staging, self._image.nbytes, self._stream)
        if not stage.context.execute_async_v3(self._stream):
            raise DeviceError(
                f"TensorRT could not run {stage.name}: {said(self._messages)}. "
                "Check free memory on the device, then build again."
            )
        source = stage.confidence or stage.probabilities
        cuda.download(stage.answer.ctypes.data, source, stage.answer.nbytes, self._stream)

    def _row(self, index: int) -> Float32:
        """Return a copy of the probabilities of the segment that ran last."""
        cuda, stage = self._cuda, self._stages[index]
        if cuda is not None and stage.confidence:
            cuda.download(stage.row.ctypes.data, stage.probabilities, stage.row.nbytes, self._stream)
            cuda.synchronize(self._stream)
        return stage.row.copy()

    def _activations(self, index: int) -> Float32 | None:
        shape = self._segments[index].output_shape
        if shape is None or self._cuda is None:
            return None
        view = host_view(self._staging, shape)
        self._cuda.download(self._staging, self._stages[index].activations, view.nbytes, self._stream)
        self._cuda.synchronize(self._stream)
        return view.copy()

    # --- loading -------------------------------------------------------------------------------------

    def _open(self) -> None:
        recipe = read_recipe(self._bundle)
        machine = open_machine(self._library)
        index = engines_for(self._folder, recipe, machine)
        if len(recipe.segments) != len(self._segments):
            raise BundleError(
                f"{self._bundle.path}: the recipe has {len(recipe.segments)} segments, the manifest "
                f"{len(self._segments)}. Export the bundle again."
            )
        held = {one.segment: one for one in index.engines}
        cuda = self._cuda = CudaContext(self._library)
        self._stream = cuda.new_stream()
        self._messages = messages_of(machine.trt)
        self._runtime = created(machine.trt, "Runtime")
        free_bytes = self._free_before = cuda.free_bytes()
        self._engines = [load_engine(self._runtime, self._folder, held[one.name], machine) for one in recipe.segments]
        if recipe.options.weight_streaming:
            limit_bytes = device_limit(self._bundle.manifest.plan, free_bytes)
            _stream_weights(self._engines, min(limit_bytes, int(free_bytes * (1 - _RESERVE))))
        self._place(cuda, machine.trt)
        self._warm_up(cuda, record=recipe.cuda_graph)

    def _place(self, cuda: CudaContext, trt: Any) -> None:
        """Give every tensor its place for good; what one segment writes is where the next one reads."""
        shapes = [_shapes(engine, trt) for engine in self._engines]
        for held, segment in zip(shapes, self._segments, strict=True):
            _check_shapes(held, segment, self._bundle.path)
        sizes = [_bytes(held[name]) for held in shapes for name in (_INPUT, _ACTIVATIONS) if name in held]
        self._staging = cuda.allocate_pinned(max(sizes))
        self._image = host_view(self._staging, shapes[0][_INPUT])
        x = cuda.allocate(_bytes(shapes[0][_INPUT]))
        for engine, held, segment in zip(self._engines, shapes, self._segments, strict=True):
            stage = self._stage(cuda, engine, held, segment.method, x)
            self._stages.append(stage)
            x = stage.activations

    def _stage(self, cuda: CudaContext, engine: Any, held: dict[str, tuple[int, ...]], name: str, x: int) -> _Stage:
        places = {one: cuda.allocate(_bytes(shape)) for one, shape in held.items() if one != _INPUT}
        classes = held[_PROBABILITIES][1]
        row = host_view(cuda.allocate_pinned(classes * _FLOAT_BYTES), (classes,))
        answer = host_view(cuda.allocate_pinned(_FLOAT_BYTES), (1,)) if _CONFIDENCE in held else row
        context = engine.create_execution_context()
        if context is None:
            raise DeviceError(
                f"{name}: TensorRT could not make an execution context: {said(self._messages)}. "
                "Close other programs that use the device, or export for a smaller memory budget."
            )
        for one, address in {**places, _INPUT: x}.items():
            if not context.set_tensor_address(one, address):
                raise DeviceError(f"{name}: TensorRT refuses a place for {one!r}: {said(self._messages)}. Build again.")
        return _Stage(
            name=name,
            context=context,
            x=x,
            activations=places.get(_ACTIVATIONS, 0),
            probabilities=places[_PROBABILITIES],
            confidence=places.get(_CONFIDENCE, 0),
            row=row,
            answer=answer,
        )

    # --- graphs --------------------------------------------------------------------------------------

    def _warm_up(self, cuda: CudaContext, *, record: bool) -> None:
        """Run every segment once on zeros, which pays what a first run pays, and record it."""
        self._image.fill(0.0)
        for index, stage in enumerate(self._stages):
            self._run(index)
            if record:
                watched = Watched(stage.confidence or stage.probabilities, stage.answer, fetched=True)
                queue_work = partial(self._queue, cuda, index)
                stage.graph = recorded(cuda, self._stream, stage.name, queue_work, (watched,), self._messages)


def device_limit(plan: Plan, free_bytes: int) -> int:
    """Return the budget of the device's memory, which users call the memory where a GPU has its own."""
    limits = plan.budget.memory_bytes
    called = limits.get(Tier.HOST, free_bytes) if plan.memory_of == "gpu" else free_bytes
    return limits.get(Tier.DEVICE, called)


def _stream_weights(engines: Sequence[Any], limit_bytes: int) -> None:
    """Let engines stream from the host what of their weights does not fit into ``limit_bytes`` with their scratch.

    The budget is reckoned here: the binding's own ``get_weight_streaming_automatic_budget`` returns 32 bits.

    Raises:
        DeviceError: TensorRT does not take the budget.
    """
    sizes = [int(engine.streamable_weights_size) for engine in engines]
    allowed = max(0, limit_bytes - sum(int(engine.device_memory_size_v2) for engine in engines))
    total = sum(sizes)
    if total <= allowed:
        return
    for engine, size in zip(engines, sizes, strict=True):
        budget = size * allowed // total
        engine.weight_streaming_budget_v2 = budget  # before any context exists
        if engine.weight_streaming_budget_v2 > budget:
            raise DeviceError(
                f"TensorRT keeps {engine.weight_streaming_budget_v2} bytes of weights on the device, {budget} were "
                "allowed. Free device memory, or export for a smaller memory budget."
            )
    logger.info("%d of %d bytes of weights stay on the device, the rest is streamed", allowed, total)


def _shapes(engine: Any, trt: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every input and output; (0,) stands for one of another type or direction than is meant."""
    shapes = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_float = engine.get_tensor_dtype(name) == trt.DataType.FLOAT
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        fits = is_float and is_input == (name == _INPUT)
        shapes[name] = tuple(int(size) for size in engine.get_tensor_shape(name)) if fits else (0,)
    return shapes


def _check_shapes(held: dict[str, tuple[int, ...]], segment: SegmentProgram, folder: Path) -> None:
    """Refuse an engine that takes or gives something else than the manifest says."""
    wanted = {_INPUT: tuple(segment.input_shape)}
    if segment.output_shape is not None:
        wanted[_ACTIVATIONS] = tuple(segment.output_shape)
    row = held.get(_PROBABILITIES, ())
    fixed = {name: shape for name, shape in held.items() if name not in {_PROBABILITIES, _CONFIDENCE}}
    fits = fixed == wanted and len(row) == 2 and row[0] == 1 and row[1] > 0
    if not fits or int(np.prod(held.get(_CONFIDENCE, (1,)))) != 1:
        raise BundleError(
            f"{folder}: the engine of {segment.method!r} has the tensors {held}, the manifest says {wanted} and "
            "probabilities [1, classes], all float32. Export the bundle again."
        )


def _bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * _FLOAT_BYTES
