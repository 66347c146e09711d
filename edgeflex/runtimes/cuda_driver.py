"""The CUDA driver by itself, through ctypes: is there one, what does it drive, and the few calls that a session needs.

Nothing here needs a toolkit, a compiler or a framework: ``libcuda`` comes with the driver. It is asked before TensorRT
is, because TensorRT ends the process with a segmentation fault where no driver answers, and never raises.

Names end in ``_v2`` where the driver has two: the plain ones are the 32-bit interface of 2007 and cut addresses short.
Every address and handle is handed over in a ctypes type of its width, since ctypes takes a bare Python integer for a
32-bit one.
"""

from __future__ import annotations

import ctypes
import logging
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeflex.errors import DeviceError
from edgeflex.runtimes.pages import private_pages
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import DTypeLike, NDArray

logger = logging.getLogger(__name__)

_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
# Of cuDeviceGetAttribute, from the driver's documentation; they never change.
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76
_NON_BLOCKING = 1  # a stream that does not wait for the default one
_CAPTURE_THREAD_LOCAL = 1  # other threads may allocate while this one captures
_NO_TIMING = 2
_MAPPED = 2  # of cuMemHostRegister and cuMemHostAlloc: the device finds the memory too
_DEVICE_MEMORY = 2  # of CUDA_MEMCPY2D
_PAGE_BYTES = 4096
_OUT_OF_MEMORY = 2
_NAME_BYTES = 256

_REMEDIES = {
    _OUT_OF_MEMORY: "Close other programs that use the device, or export for a smaller memory budget.",
    100: "Connect a device, or choose another runtime.",
    999: "Restart the machine; the driver has failed.",
}
_OTHER_REMEDY = "Look at the kernel log (`dmesg`) for messages of the NVIDIA driver, then try again."


@dataclass(frozen=True)
class CudaDevice:
    """One device as its driver describes it.

    Attributes:
        index: Its number, counted from 0.
        name: What the vendor calls it.
        compute_capability: Major and minor, such as (8, 7).
        memory_bytes: All of its memory; on an integrated device, that of the machine.
        integrated: It shares the machine's memory, as on Jetson.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    integrated: bool


@dataclass(frozen=True)
class DriverFacts:
    """The driver and what it drives.

    Attributes:
        version: The newest CUDA that the driver serves, major and minor.
        devices: Every device that it shows to this process.
    """

    version: tuple[int, int]
    devices: tuple[CudaDevice, ...]


class HostPages(NamedTuple):
    """Page-aligned memory of the machine that the device reads and writes where it lies.

    Attributes:
        data: The bytes; they must not be used once the context is closed.
        address: Where the device finds them.
        counted: The system counts them as this process's own.
    """

    data: NDArray[np.uint8]
    address: int
    counted: bool


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D, as the driver's documentation gives it."""

    _fields_ = (
        ("src_x_bytes", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_type", ctypes.c_uint),
        ("src_host", ctypes.c_void_p),
        ("src_device", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x_bytes", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_type", ctypes.c_uint),
        ("dst_host", ctypes.c_void_p),
        ("dst_device", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width_bytes", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class Driver:
    """The driver's library with every return code checked. ``library`` is found unless given.

    Raises:
        DeviceError: There is no library.
    """

    def __init__(self, library: Any = None) -> None:
        found = _load() if library is None else library
        if found is None:
            raise DeviceError("no NVIDIA driver (libcuda.so.1 was not found). Install it, or choose another runtime.")
        self._library = found

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Args:
            name: The function.
            arguments: ctypes values, each of the width that the function takes.

        Raises:
            DeviceError: It returned an error, which is named, or the driver is too old to have it.
        """
        code = self._function(name)(*arguments)
        if code:
            remedy = _REMEDIES.get(code, _OTHER_REMEDY)
            raise DeviceError(f"the CUDA driver's {name} failed: {self.error_name(code)}. {remedy}")

    def release(self, name: str, *arguments: Any) -> None:
        """Call a function that gives something back; a failure is logged, as the first fault is the one to tell."""
        try:
            self.call(name, *arguments)
        except DeviceError as error:
            logger.warning("while closing: %s", error)

    def error_name(self, code: int) -> str:
        """Return what the driver calls an error, with its number."""
        text = ctypes.c_char_p()
        with suppress(AttributeError):
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
        return f"{(text.value or b'an unknown error').decode('ascii', 'replace')} ({code})"

    def _function(self, name: str) -> Callable[..., int]:
        try:
            function: Callable[..., int] = getattr(self._library, name)
        except AttributeError:
            raise DeviceError(f"the NVIDIA driver has no {name}: it is too old. Install a newer driver.") from None
        return function


def driver_problem(library: Any = None) -> str | None:
    """Return why CUDA cannot be used here, or None.

    Only the driver is asked, so that this is safe wherever Python runs.

    Args:
        library: What to ask instead of the driver's own library.
    """
    try:
        facts = driver_facts(library)
    except DeviceError as error:
        return str(error)
    if not facts.devices:
        return "the NVIDIA driver shows no device. Connect one, or unset CUDA_VISIBLE_DEVICES."
    return None


def driver_facts(library: Any = None) -> DriverFacts:
    """Return the driver's version and its devices.

    Args:
        library: What to ask instead of the driver's own library.

    Raises:
        DeviceError: There is no driver, or it does not start.
    """
    driver = Driver(library)
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.call("cuInit", ctypes.c_uint(0))
    driver.call("cuDriverGetVersion", ctypes.byref(version))
    driver.call("cuDeviceGetCount", ctypes.byref(count))
    return DriverFacts(
        version=(version.value // 1000, version.value % 1000 // 10),
        devices=tuple(_device(driver, index) for index in range(count.value)),
    )


def _load() -> Any:
    for name in _LIBRARIES:
        with suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _device(driver: Driver, index: int) -> CudaDevice:
    handle, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(index))
    driver.call("cuDeviceGetName", name, ctypes.c_int(_NAME_BYTES), handle)
    driver.call("cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
    return CudaDevice(
        index=index,
        name=name.value.decode("utf-8", "replace"),
        compute_capability=(_attribute(driver, _MAJOR, handle), _attribute(driver, _MINOR, handle)),
        memory_bytes=memory.value,
        integrated=bool(_attribute(driver, _INTEGRATED, handle)),
    )


def _attribute(driver: Driver, attribute: int, handle: ctypes.c_int) -> int:
    value = ctypes.c_int()
    driver.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), handle)
    return value.value


class CudaContext:
    """The primary context of a device, which TensorRT works in too, with all that was allocated in it.

    Everything that it handed out is given back by ``close``, graphs first, the rest last first. Addresses and handles
    are plain integers.
    """

    def __init__(self, library: Any = None, index: int = 0) -> None:
        """Retain the context of device ``index`` and make it current.

        Raises:
            DeviceError: There is no such device, or its context cannot be made.
        """
        self._driver = Driver(library)
        self._stack = ExitStack()
        self._held: dict[int, tuple[int, Callable[[], None]]] = {}  # bytes on the device, and what gives them back
        self._graphs: dict[int, ctypes.c_void_p] = {}
        device, context, previous = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        call = self._driver.call
        call("cuInit", ctypes.c_uint(0))
        call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        call("cuCtxGetCurrent", ctypes.byref(previous))
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._stack.callback(self._driver.release, "cuDevicePrimaryCtxRelease_v2", device)
        self._context = context
        self._thread = 0
        self._device = device
        try:
            self.make_current()
        except DeviceError:
            self.close()
            raise
        # what was current before, another framework's perhaps, is current again before ours is released
        self._stack.callback(self._driver.release, "cuCtxSetCurrent", previous)

    def close(self) -> None:
        """Give everything back, on whichever thread; a second call does nothing."""
        with suppress(DeviceError):
            if self._thread:
                self.make_current()
        self._thread = 0
        for graph in tuple(self._graphs):
            self.drop(graph)
        self._stack.close()

    def make_current(self) -> None:
        """Make the context that of this thread, where another thread used it last."""
        thread = get_ident()
        if thread != self._thread:
            self._driver.call("cuCtxSetCurrent", self._context)
            self._thread = thread

    # --- memory --------------------------------------------------------------------------------------

    def allocate(self, size_bytes: int) -> int:
        """Return the address of ``size_bytes`` of device memory."""
        address = ctypes.c_uint64()
        self._driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        self._hold(address.value, size_bytes, partial(self._driver.release, "cuMemFree_v2", address))
        return address.value

    @property
    def allocated_bytes(self) -> int:
        """Bytes of device memory that this context has now, pages of the host not counted."""
        return sum(size_bytes for size_bytes, _ in self._held.values())

    def free(self, address: int) -> None:
        """Give device memory, pinned memory or host pages back now; nothing that is queued may still use them.

        Args:
            address: What ``allocate`` or ``allocate_pinned`` returned, or the ``address`` of ``host_pages``; another
                does nothing.
        """
        _, release = self._held.pop(address, (0, None))
        if release is not None:
            release()

    def host_pages(self, size_bytes: int) -> HostPages:
        """Return zeroed pages of the machine that the device uses where they lie.

        They are pages of this process that the driver pins, so that files can be read into them past the page cache,
        and a device that shares the machine's memory keeps them in its cache where it can. Where the driver pins
        none of other making, it makes them.

        Raises:
            DeviceError: No memory, or the device does not find it.
        """
        whole = -(-max(size_bytes, 1) // _PAGE_BYTES) * _PAGE_BYTES
        try:
            data = private_pages(whole)
        except (OSError, ValueError, OverflowError) as error:
            raise DeviceError(
                f"no memory for {format_bytes(size_bytes)} that the device shares: {error}. All of it is taken at "
                "once. Give a smaller cache."
            ) from error
        place = ctypes.c_void_p(data.ctypes.data)
        try:
            self._driver.call("cuMemHostRegister_v2", place, ctypes.c_size_t(whole), ctypes.c_uint(_MAPPED))
        except DeviceError as error:
            logger.info("the driver's own pages are used instead: %s", error)
            return self._driver_pages(size_bytes, whole)
        return self._shared(data[:size_bytes], place, partial(self._unpin, place, data))

    def _unpin(self, place: ctypes.c_void_p, data: NDArray[np.uint8]) -> None:
        """Let the driver forget pages, which live until then because they are named here."""
        self._driver.release("cuMemHostUnregister", place)
        del data

    def _driver_pages(self, size_bytes: int, whole: int) -> HostPages:
        place = ctypes.c_void_p()
        self._driver.call("cuMemHostAlloc", ctypes.byref(place), ctypes.c_size_t(whole), ctypes.c_uint(_MAPPED))
        data = host_view(place.value or 0, (whole,), np.uint8)
        data.fill(0)
        found = self._shared(data[:size_bytes], place, partial(self._driver.release, "cuMemFreeHost", place))
        return found._replace(counted=False)

    def _shared(self, data: NDArray[np.uint8], place: ctypes.c_void_p, release: Callable[[], None]) -> HostPages:
        """Return pages with the device's address of them; they are given back if it has none."""
        address = ctypes.c_uint64()
        try:
            self._driver.call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), place, ctypes.c_uint(0))
        except DeviceError:
            release()
            raise
        self._hold(address.value, 0, release)
        return HostPages(data, address.value, counted=True)

    def _hold(self, address: int, size_bytes: int, release: Callable[[], None]) -> None:
        self._held[address] = (size_bytes, release)
        self._stack.callback(self.free, address)

    @property
    def integrated(self) -> bool:
        """Whether the device shares the machine's memory."""
        return bool(_attribute(self._driver, _INTEGRATED, self._device))

    def free_bytes(self) -> int:
        """Return the device memory that is free now."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate_pinned(self, size_bytes: int) -> int:
        """Return the address of ``size_bytes`` of host memory that copies reach without a detour."""
        address = ctypes.c_void_p()
        self._driver.call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size_bytes), ctypes.c_uint(0))
        self._hold(address.value or 0, 0, partial(self._driver.release, "cuMemFreeHost", address))
        return address.value or 0

    def fill_zeros(self, address: int, size_bytes: int, stream: int) -> None:
        """Queue the zeroing of device memory."""
        self._driver.call(
            "cuMemsetD8Async",
            ctypes.c_uint64(address),
            ctypes.c_ubyte(0),
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
        )

    def upload(self, device_address: int, host_address: int, size_bytes: int, stream: int) -> None:
        """Queue a copy from pinned host memory to the device."""
        self._driver.call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(device_address),
            ctypes.c_void_p(host_address),
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
        )

    def download(self, host_address: int, device_address: int, size_bytes: int, stream: int) -> None:
        """Queue a copy from the device to pinned host memory."""
        self._driver.call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(host_address),
            ctypes.c_uint64(device_address),
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
        )

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Queue a copy within the device."""
        self._driver.call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
        )

    def copy_rows(
        self, target: tuple[int, int], source: tuple[int, int], row_bytes: int, rows: int, stream: int
    ) -> None:
        """Queue a copy of equal rows within the device.

        Args:
            target: Address of the first row, and bytes from one row's start to the next one's.
            source: Likewise; the two may not overlap.
            row_bytes: Of each row.
            rows: How many.
            stream: Where it is queued.
        """
        spec = _Copy2D(
            src_type=_DEVICE_MEMORY,
            src_device=source[0],
            src_pitch=source[1],
            dst_type=_DEVICE_MEMORY,
            dst_device=target[0],
            dst_pitch=target[1],
            width_bytes=row_bytes,
            height=rows,
        )
        self._driver.call("cuMemcpy2DAsync_v2", ctypes.byref(spec), ctypes.c_void_p(stream))

    # --- streams and events --------------------------------------------------------------------------

    def new_stream(self) -> int:
        """Return a stream that does not wait for the default one."""
        stream = ctypes.c_void_p()
        self._driver.call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self._stack.callback(self._driver.release, "cuStreamDestroy_v2", stream)
        return stream.value or 0

    def synchronize(self, stream: int) -> None:
        """Wait until all that was queued is done; a failure of queued work is raised here."""
        self._driver.call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def new_event(self, *, timing: bool = False) -> int:
        """Return an event; only one with ``timing`` can be measured."""
        event = ctypes.c_void_p()
        self._driver.call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0 if timing else _NO_TIMING))
        self._stack.callback(self._driver.release, "cuEventDestroy_v2", event)
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        """Queue the event: it happens when all that was queued before is done."""
        self._driver.call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def order_after(self, event: int, stream: int) -> None:
        """Let what is queued into ``stream`` from now on begin when an event has happened."""
        self._driver.call("cuStreamWaitEvent", ctypes.c_void_p(stream), ctypes.c_void_p(event), ctypes.c_uint(0))

    def wait_for(self, event: int) -> None:
        """Wait until an event has happened."""
        self._driver.call("cuEventSynchronize", ctypes.c_void_p(event))

    def elapsed_s(self, start: int, end: int) -> float:
        """Return the seconds between two events that have happened."""
        milliseconds = ctypes.c_float()
        self._driver.call(
            "cuEventElapsedTime", ctypes.byref(milliseconds), ctypes.c_void_p(start), ctypes.c_void_p(end)
        )
        return milliseconds.value / 1e3

    # --- graphs --------------------------------------------------------------------------------------

    def capture(self, stream: int, queue_work: Callable[[], None]) -> int:
        """Record what ``queue_work`` puts into ``stream``, without doing it, and return it as one graph to launch.

        The stream can be used again whatever happens. The graph is there until it is dropped.

        Raises:
            DeviceError: Something in it cannot be recorded, or nothing was.
        """
        handle = ctypes.c_void_p(stream)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._driver.call("cuStreamBeginCapture_v2", handle, ctypes.c_int(_CAPTURE_THREAD_LOCAL))
        try:
            queue_work()
        except BaseException:
            # leaves the recording state; the first error is the one to tell
            with suppress(DeviceError):
                self._driver.call("cuStreamEndCapture", handle, ctypes.byref(graph))
            self._drop_graph(graph)
            raise
        self._driver.call("cuStreamEndCapture", handle, ctypes.byref(graph))
        try:
            self._driver.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        finally:
            self._drop_graph(graph)
        self._graphs[executable.value or 0] = executable
        return executable.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Queue a captured graph."""
        self._driver.call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def drop(self, graph: int) -> None:
        """Give a captured graph back now, which must not be launched any more; another number does nothing."""
        executable = self._graphs.pop(graph, None)
        if executable is not None:
            self._driver.release("cuGraphExecDestroy", executable)

    def _drop_graph(self, graph: ctypes.c_void_p) -> None:
        if graph.value:
            self._driver.release("cuGraphDestroy", graph)


def host_view(address: int, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Return an array over host memory that is not its own; it must not outlive what it looks at.

    Args:
        address: Where the memory starts.
        shape: Of the array.
        dtype: Of its elements.
    """
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    raw = memoryview((ctypes.c_char * (count * kind.itemsize)).from_address(address))
    return np.frombuffer(raw, dtype=kind, count=count).reshape(shape)
