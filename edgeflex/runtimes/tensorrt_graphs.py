"""Queued work as CUDA graphs: recorded once, held against plain work, and left out, with a word, where that fails.

A graph costs the processor one launch where plain work costs one for every kernel. It holds addresses and shapes, so
that only work whose shapes and places stay is recorded. TensorRT asks for more ("CUDA Graphs" in its guide): a run with
the same shapes before, since what a first run does cannot be recorded, and a context that nobody changes while its
graph lives. What a decoder records therefore has contexts of its own.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeflex.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.cuda_driver import CudaContext
    from edgeflex.runtimes.tensorrt_stages import EngineStage, Shape
    from edgeflex.runtimes.tensorrt_wiring import BoundStage

logger = logging.getLogger(__name__)

# Replayed and plain work must agree this well, of the largest number; they run the same kernels.
_TOLERANCE = 1e-3
_NO_NUMBER = 0xFF  # each byte of a NaN, and of -1


class Watched(NamedTuple):
    """Numbers that work makes, by which its replay is held against it.

    Attributes:
        address: Where the work writes them on the device.
        array: Pinned memory where they are read, contiguous.
        fetched: The work itself brings them there; else they are fetched for the comparison.
    """

    address: int
    array: NDArray[Any]
    fetched: bool


def recorded(
    cuda: CudaContext,
    stream: int,
    name: str,
    queue_work: Callable[[], None],
    watched: Sequence[Watched],
    messages: Any,
) -> int:
    """Return a graph of work that was seen to do what the work does plainly, or 0, which is logged as a warning.

    After 0 what the work writes may be spoilt: do it again.

    Args:
        cuda: The device's context.
        stream: Where the work is queued.
        name: What it is called in the log.
        queue_work: Queues the work; it was done last in ``stream``, all of it, and gives the same numbers each time.
        watched: What it makes.
        messages: TensorRT's logger.

    Raises:
        DeviceError: Even what plain work made cannot be fetched.
    """
    _fetch(cuda, stream, watched)
    plain = [one.array.copy() for one in watched]
    if not all(np.isfinite(one).all() for one in plain):
        logger.warning("%s runs without a CUDA graph: what it makes is no number to compare a replay with", name)
        return 0
    graph = 0
    try:
        graph = cuda.capture(stream, queue_work)
        # whatever the graph leaves out shows: in place of the numbers stands what is none
        for one in watched:
            cuda.fill_zeros(one.address, one.array.nbytes, stream)
        cuda.synchronize(stream)
        for one in watched:
            one.array.view(np.uint8).fill(_NO_NUMBER)
        cuda.launch(graph, stream)
        _fetch(cuda, stream, watched)
    except DeviceError as error:
        because = str(error)
        messages.errors.clear()
    else:
        if all(_alike(one.array, before) for one, before in zip(watched, plain, strict=True)):
            return graph
        because = "its replay gave another answer"
    cuda.drop(graph)
    logger.warning("%s runs without a CUDA graph: %s", name, because)
    return 0


def _fetch(cuda: CudaContext, stream: int, watched: Sequence[Watched]) -> None:
    for one in watched:
        if not one.fetched:
            cuda.download(one.array.ctypes.data, one.address, one.array.nbytes, stream)
    cuda.synchronize(stream)


def _alike(found: NDArray[Any], plain: NDArray[Any]) -> bool:
    if np.issubdtype(plain.dtype, np.integer):
        return bool(np.array_equal(found, plain))
    return bool(np.allclose(found, plain, rtol=0.0, atol=_TOLERANCE * float(np.abs(plain).max()), equal_nan=False))


class Span:
    """Stages that run in a row for one token, always in the same places; only shapes change, and seldom.

    Args:
        calls: The stages with the places of everything.
        watched: What they make.
        fetch: Queues the way back of what they make; nothing by default.
    """

    def __init__(
        self, calls: Sequence[BoundStage], watched: Sequence[Watched], fetch: Callable[[], None] | None = None
    ) -> None:
        self.name = " and ".join(call.stage.name for call in calls)
        self.watched = tuple(watched)
        self.graph = 0
        self.shapes: Mapping[str, Shape] = {}  # of the last run
        self._calls = tuple(calls)
        self._fetch = fetch
        self._own: tuple[EngineStage, ...] = ()

    def queue(self) -> None:
        """Queue the work in contexts that others use too."""
        self._queue([call.stage for call in self._calls])

    def queue_own(self) -> None:
        """Queue the work in contexts that nothing else uses, which are made at the first call.

        Raises:
            DeviceError: A context cannot be made, or TensorRT failed.
        """
        if not self._own:
            self._own = tuple(call.stage.own(self.shapes) for call in self._calls)
        self._queue(self._own)

    def _queue(self, stages: Sequence[EngineStage]) -> None:
        for stage, call in zip(stages, self._calls, strict=True):
            stage(call.places, self.shapes)
        if self._fetch is not None:
            self._fetch()

    def give_up(self) -> None:
        """Let go of the contexts; there must be no graph of them any more."""
        self._own = ()


class DecodeGraphs:
    """Runs spans: plainly once, since many shapes come once only, then recorded, then replayed until shapes change.

    A span has one graph at a time; graphs and contexts are therefore at most as many as there are spans. Where a stage
    cannot be recorded, that is logged once, and it runs plainly from then on.

    Args:
        cuda: The device's context.
        stream: Where everything is queued.
        messages: TensorRT's logger.
    """

    def __init__(self, cuda: CudaContext, stream: int, messages: Any) -> None:
        self._cuda = cuda
        self._stream = stream
        self._messages = messages
        self._plain: set[str] = set()  # names of what could not be recorded

    def run(self, span: Span, shapes: Mapping[str, Shape]) -> None:
        """Queue a span's work.

        Args:
            span: What to run.
            shapes: Of the inputs that have an open axis.

        Raises:
            DeviceError: TensorRT or the driver failed.
        """
        if span.shapes != shapes:
            # the graph goes before its contexts are changed
            graph, span.graph, span.shapes = span.graph, 0, dict(shapes)
            self._cuda.drop(graph)
            span.queue()
        elif span.graph:
            self._cuda.launch(span.graph, self._stream)
        elif span.name in self._plain or not self._record(span):
            span.queue()

    def _record(self, span: Span) -> bool:
        """Do a span's work, and record it; False where it has to be done, plainly."""
        try:
            span.queue_own()
            self._cuda.synchronize(self._stream)
        except DeviceError as error:
            logger.warning("%s runs without a CUDA graph: %s", span.name, error)
        else:
            span.graph = recorded(self._cuda, self._stream, span.name, span.queue_own, span.watched, self._messages)
        if not span.graph:
            span.give_up()
            self._messages.errors.clear()
            self._plain.add(span.name)
        return bool(span.graph)
