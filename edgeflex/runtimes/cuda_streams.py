"""Where a decoder's device memory comes from, and how bytes get there beside the computing.

``CudaStreams`` copies on a stream of its own, from memory that the driver has pinned. ``HostStreams`` stands in for a
device on machines without one: the same tensors in the processor's memory, every copy done when it is asked for.
Whatever PyTorch raises leaves here as a ``DeviceError``.
"""

from __future__ import annotations

import functools
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch

from edgeflex.errors import DeviceError, InputError
from edgeflex.runtimes.pages import private_pages
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

# What cuBLAS keeps for itself: 32 MiB on Hopper, 8 MiB elsewhere (cuBLAS documentation, cublasSetWorkspace), and the
# rounding of PyTorch's allocator.
CUDA_LIBRARY_BYTES = 64 << 20
_GROUPED_SINCE = (9, 0)  # compute capability from which torch._grouped_mm is one kernel


class HostMemory(NamedTuple):
    """Page-aligned memory of the processor.

    Attributes:
        data: The bytes.
        pinned: The device's copy engine reads them where they lie.
        problem: Why they are not pinned; empty where they are, or where nothing needs it.
    """

    data: NDArray[np.uint8]
    pinned: bool
    problem: str


class Streams(Protocol):
    """A device: its memory, its copies, and the order between copies and computing."""

    @property
    def device(self) -> torch.device:
        """Where tensors lie."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def grouped(self) -> bool:
        """Whether one kernel multiplies the rows of several experts."""

    @property
    def library_bytes(self) -> int:
        """Bytes that libraries take on the device for themselves."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return device memory."""

    def host(self, size_bytes: int) -> HostMemory:
        """Return memory of the processor, pinned if possible; it is given back by ``close``."""

    def fence(self) -> Any:
        """Return a mark behind all computing that was asked for so far."""

    def upload(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Start a copy to the device that begins after the mark ``after``, and return the mark of its end."""

    def wait(self, mark: Any) -> None:
        """Let computing that is asked for from now on begin after ``mark``."""

    def seconds(self, mark: Any) -> float:
        """Return how long an ended upload took."""

    def stamp(self) -> Any:
        """Return a time behind all computing that was asked for so far."""

    def between(self, first: Any, last: Any) -> float:
        """Return the seconds from one stamp to a later one; both have passed."""

    def span(self, mark: Any, origin: Any) -> tuple[float, float]:
        """Return when an ended upload began and ended, in seconds from a stamp."""

    def peak_bytes(self) -> int | None:
        """Return the most bytes of the device that were held at once since it was opened; None where nobody counts."""

    def free_bytes(self) -> int | None:
        """Return what the device has free; None where nobody says."""

    def synchronize(self) -> None:
        """Block until nothing is under way."""

    def close(self) -> None:
        """Give pinned memory back; a second call does nothing."""


class HostStreams:
    """The processor in a device's place: copies are made at once and marks mean nothing."""

    name = "the processor in a device's place"
    grouped = False
    library_bytes = 0

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device("cpu")
        self._clock = clock

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory; see ``Streams``."""
        return torch.empty(shape, dtype=dtype)

    def host(self, size_bytes: int) -> HostMemory:
        """Return plain pages, which no copy engine reads."""
        return HostMemory(private_pages(size_bytes)[:size_bytes], pinned=False, problem="")

    def fence(self) -> float:
        """Return a mark; all computing is done when its call returns."""
        return 0.0

    def upload(self, target: Tensor, source: Tensor, after: Any) -> tuple[float, float]:
        """Copy now, and return when that began and ended."""
        del after
        start = self._clock()
        target.copy_(source)
        return start, self._clock()

    def wait(self, mark: Any) -> None:
        """Do nothing."""

    def seconds(self, mark: tuple[float, float]) -> float:
        """Return what ``upload`` found."""
        return mark[1] - mark[0]

    def stamp(self) -> float:
        """Return the time."""
        return self._clock()

    def between(self, first: Any, last: Any) -> float:
        """Return the difference."""
        return float(last - first)

    def span(self, mark: tuple[float, float], origin: float) -> tuple[float, float]:
        """Return what ``upload`` found, from ``origin`` on."""
        return mark[0] - origin, mark[1] - origin

    def peak_bytes(self) -> None:
        """Return nothing: the processor's memory is not counted here."""

    def free_bytes(self) -> None:
        """Return nothing: the processor's memory is not the device's."""

    def synchronize(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class CudaStreams:
    """A CUDA device through PyTorch: copies on a side stream, ordered with the computing by events.

    Raises:
        DeviceError: PyTorch reaches no CUDA device, or it fails at its first use.
    """

    library_bytes = CUDA_LIBRARY_BYTES

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(
                "PyTorch reaches no CUDA device. Look at `edgeflex doctor`, install a CUDA build of torch, or name no "
                "device."
            )
        with explained("the CUDA device does not start"):
            self.device = torch.device("cuda", torch.cuda.current_device())
            self._side = torch.cuda.Stream(self.device)
            self.name = torch.cuda.get_device_name(self.device)
            self.grouped = torch.cuda.get_device_capability(self.device) >= _GROUPED_SINCE
            self._held_bytes = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._registered: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return device memory; see ``Streams``."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def host(self, size_bytes: int) -> HostMemory:
        """Return pages that the driver pinned, or plain ones with what it said.

        PyTorch's own pinned memory is rounded up to a power of two; registering pages keeps their number exact.
        """
        data = private_pages(size_bytes)[:size_bytes]
        problem = self._pin(data) if size_bytes else ""
        return HostMemory(data, pinned=not problem, problem=problem)

    def _pin(self, data: NDArray[np.uint8]) -> str:
        try:
            code = int(torch.cuda.cudart().cudaHostRegister(data.ctypes.data, data.nbytes, 0))
        except RuntimeError as error:
            return str(error).splitlines()[0]
        if code:
            self._forget_error()
            return f"cudaHostRegister of {format_bytes(data.nbytes)} gave error {code}"
        self._registered.append(data)
        return ""

    def _forget_error(self) -> None:
        """Let the next kernel have the refusal, which CUDA keeps until somebody asks for the last error."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device).add_(1)

    def fence(self) -> torch.cuda.Event:
        """Return an event behind what the computing stream was given."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def upload(
        self, target: Tensor, source: Tensor, after: torch.cuda.Event
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Start a copy on the side stream; see ``Streams``."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._side):
            self._side.wait_event(after)
            begin.record(self._side)
            target.copy_(source, non_blocking=True)
            end.record(self._side)
        return begin, end

    def wait(self, mark: tuple[torch.cuda.Event, torch.cuda.Event]) -> None:
        """Let the computing stream wait for an upload."""
        torch.cuda.current_stream(self.device).wait_event(mark[1])

    def seconds(self, mark: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        """Return the device's own time of an ended upload."""
        return mark[0].elapsed_time(mark[1]) / 1e3

    def stamp(self) -> torch.cuda.Event:
        """Return an event with a time on the computing stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Return the device's own seconds between two stamps."""
        return first.elapsed_time(last) / 1e3

    def span(self, mark: tuple[torch.cuda.Event, torch.cuda.Event], origin: torch.cuda.Event) -> tuple[float, float]:
        """Return the device's own times of an ended upload; one that began before ``origin`` has times below 0."""
        return origin.elapsed_time(mark[0]) / 1e3, origin.elapsed_time(mark[1]) / 1e3

    def peak_bytes(self) -> int:
        """Return what PyTorch's allocator says, less what others of this process held before."""
        return max(0, int(torch.cuda.max_memory_allocated(self.device)) - self._held_bytes)

    def free_bytes(self) -> int:
        """Return what the driver says is free."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def synchronize(self) -> None:
        """Wait for both streams."""
        torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Unpin, after all copies are over; what fails here is logged, as the first fault is the one to tell."""
        held, self._registered = self._registered, []
        try:
            torch.cuda.synchronize(self.device)
            for data in held:
                torch.cuda.cudart().cudaHostUnregister(data.ctypes.data)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            logger.warning("while closing the CUDA device: %s", error)


def open_streams(device: str) -> Streams:
    """Return the device that a setting names: ``cuda``, or ``cpu-torch`` for the processor in its place.

    Raises:
        InputError: Another name.
        DeviceError: There is no CUDA device.
    """
    if device == "cuda":
        return CudaStreams()
    if device == "cpu-torch":
        return HostStreams()
    raise InputError(f"device {device!r} is unknown. Name 'cuda', or 'cpu-torch' to try it without a GPU.")


class explained:  # noqa: N801 - used like a function
    """Turns what PyTorch raises into a ``DeviceError``; a context and a decorator of methods.

    Args:
        what: What was tried.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Translate.

        Raises:
            DeviceError: In place of PyTorch's.
        """
        if isinstance(error, (RuntimeError, MemoryError)):
            raise DeviceError(f"{self._what}: {_first_line(error)}. {_remedy(error)}") from error

    def __call__(self, method: Callable[P, R]) -> Callable[P, R]:
        """Return ``method`` inside this context."""

        @functools.wraps(method)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return method(*args, **kwargs)

        return wrapped


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _remedy(error: BaseException) -> str:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error).lower():
        return "Give the experts less of its memory, close other programs that use it, or give fewer tokens of context."
    return "Open the session again; if it fails again, look at the kernel log (`dmesg`) and restart the machine."
