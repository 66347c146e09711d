"""A stand-in for the CUDA driver's library: same functions, same ctypes arguments, device memory as NumPy arrays.

Work is queued and done at ``cuStreamSynchronize``, as on a device, so that reading before waiting gives rubbish. Fresh
memory is rubbish. Every access is checked against what is allocated; ``alive`` says what was not given back. Pages of
the host that the device shares have another address there.
"""

# ruff: noqa: N802 - the names are the driver's

from __future__ import annotations

import ctypes
import time
from threading import get_ident
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NAMES = {
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    3: b"CUDA_ERROR_NOT_INITIALIZED",
    100: b"CUDA_ERROR_NO_DEVICE",
    201: b"CUDA_ERROR_INVALID_CONTEXT",
    600: b"CUDA_ERROR_NOT_READY",
    700: b"CUDA_ERROR_ILLEGAL_ADDRESS",
    801: b"CUDA_ERROR_NOT_SUPPORTED",
    900: b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
    901: b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
    999: b"CUDA_ERROR_UNKNOWN",
}
RUBBISH = 0xCD
CONTEXT = 0x77
_ATTRIBUTES = {18: "integrated", 75: "major", 76: "minor"}


def _number(value: Any) -> int:
    return value.value or 0


def _set(reference: Any, value: int) -> None:
    reference._obj.value = value


def _move(target: int, source: int, size: int) -> None:
    ctypes.memmove(target, source, size)


class Device:
    """What one pretended device says of itself."""

    def __init__(
        self, name: str = "Orin", capability: tuple[int, int] = (8, 7), memory: int = 8 << 30, integrated: bool = True
    ) -> None:
        self.name, self.memory = name, memory
        self.attributes = {"major": capability[0], "minor": capability[1], "integrated": int(integrated)}


class _Mark:
    """One recording of an event: done when its stream has come there."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.done_s: float | None = None


class FakeCuda:
    """``fail`` maps a function to (which call of it, counted from 1; the error code that it returns)."""

    def __init__(
        self,
        *,
        version: int = 12060,
        devices: tuple[Device, ...] = (Device(),),
        free: int = 6 << 30,
        fail: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.version, self.devices, self.free = version, devices, free
        self.fail = dict(fail or {})
        self.calls: list[str] = []
        self.device_memory: dict[int, np.ndarray] = {}
        self.host_memory: dict[int, tuple[Any, int]] = {}  # what keeps it, and its size
        self.registered: dict[int, int] = {}
        self.shared: dict[int, tuple[int, int]] = {}  # the device's address: the host's, and the size
        self.marks: dict[int, _Mark] = {}
        self.handles: dict[int, str] = {}
        self.queues: dict[int, list[Callable[[], None]]] = {}
        self.captures: dict[int, list[Callable[[], None]]] = {}
        self.invalid: set[int] = set()
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.current: dict[int, int] = {}
        self.retained = 0
        self._next = 0x10_0000_0000  # beyond 32 bits: a cut address is found out

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu") or not callable(found):
            return found

        def counted(*arguments: Any) -> int:
            self.calls.append(name)
            which, code = self.fail.get(name, (0, 0))
            if which != self.calls.count(name):
                return int(found(*arguments))
            if name == "cuStreamEndCapture":  # which ends it also where it fails
                self.captures.pop(_number(arguments[0]), None)
            return code

        return counted

    @property
    def alive(self) -> list[str]:
        """What was not given back."""
        left = [f"device memory {address:#x}" for address in self.device_memory]
        left += [f"pinned memory {address:#x}" for address in self.host_memory]
        left += [f"registered memory {address:#x}" for address in self.registered]
        left += [f"{kind} {handle:#x}" for handle, kind in self.handles.items()]
        return left + ["context"] * self.retained

    # --- for the fake of TensorRT --------------------------------------------------------------------

    def array(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return float32 device memory as an array over it."""
        size = int(np.prod(shape)) * 4
        return self._device_bytes(address, size).view(np.float32).reshape(shape)

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        """Return device memory, or pages of the host that the device shares, as bytes over it."""
        return self._device_bytes(address, size)

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Queue work, or record it where the stream is captured."""
        assert stream in self.queues, "no such stream"
        self.captures.get(stream, self.queues[stream]).append(work)

    def _device_bytes(self, address: int, size: int) -> np.ndarray:
        for start, memory in self.device_memory.items():
            if start <= address and address + size <= start + memory.nbytes:
                return memory[address - start : address - start + size]
        for start, (host, held) in self.shared.items():
            if start <= address and address + size <= start + held:
                raw = memoryview((ctypes.c_char * size).from_address(host + address - start))
                return np.frombuffer(raw, dtype=np.uint8, count=size)
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated on the device")

    def _host_check(self, address: int, size: int) -> None:
        held = {**{start: size for start, (_, size) in self.host_memory.items()}, **self.registered}
        if any(start <= address and address + size <= start + length for start, length in held.items()):
            return
        raise AssertionError(f"{size} bytes at {address:#x} are not pinned")

    def _handle(self, kind: str) -> int:
        handle = self._room(1)
        self.handles[handle] = kind
        return handle

    def _room(self, size: int) -> int:
        """Return an address with ``size`` bytes behind it that nothing else has, and a gap after them."""
        place = self._next
        self._next += (size + 0xFFF) // 0x1000 * 0x1000 + 0x1000
        return place

    def _lost(self) -> int:
        return 0 if self.current.get(get_ident()) == CONTEXT and self.retained else 201

    # --- driver and devices --------------------------------------------------------------------------

    def cuInit(self, flags: Any) -> int:
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        _set(version, self.version)
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        _set(count, len(self.devices))
        return 0

    def cuDeviceGet(self, device: Any, index: Any) -> int:
        _set(device, _number(index))
        return 0 if _number(index) < len(self.devices) else 100

    def cuDeviceGetName(self, text: Any, size: Any, device: Any) -> int:
        text.value = self.devices[_number(device)].name.encode()
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:
        _set(size, self.devices[_number(device)].memory)
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:
        _set(value, self.devices[_number(device)].attributes[_ATTRIBUTES[_number(attribute)]])
        return 0

    def cuGetErrorName(self, code: Any, text: Any) -> int:
        text._obj.value = NAMES.get(_number(code))
        return 0

    # --- contexts ------------------------------------------------------------------------------------

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self.retained += 1
        _set(context, CONTEXT)
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:
        self.retained -= 1
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:
        _set(context, self.current.get(get_ident(), 0))
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.current[get_ident()] = _number(context)
        return 0

    # --- memory --------------------------------------------------------------------------------------

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        _set(free, self.free)
        _set(total, self.devices[0].memory)
        return self._lost()

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        if code := self._lost():
            return code
        place = self._room(_number(size))
        self.device_memory[place] = np.full(_number(size), RUBBISH, dtype=np.uint8)
        _set(address, place)
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        if code := self._lost():
            return code
        del self.device_memory[_number(address)]
        return 0

    def cuMemHostAlloc(self, address: Any, size: Any, flags: Any) -> int:
        if code := self._lost():
            return code
        memory = (ctypes.c_char * (_number(size) + 0x1000))()
        place = -(-ctypes.addressof(memory) // 0x1000) * 0x1000  # pages, as the driver's are
        ctypes.memset(place, RUBBISH, _number(size))
        self.host_memory[place] = (memory, _number(size))
        _set(address, place)
        return 0

    def cuMemFreeHost(self, address: Any) -> int:
        del self.host_memory[_number(address)]
        self._unshare(_number(address))
        return 0

    def cuMemHostRegister_v2(self, address: Any, size: Any, flags: Any) -> int:
        if code := self._lost():
            return code
        assert _number(address) % 0x1000 == _number(size) % 0x1000 == 0, "no whole pages"
        self.registered[_number(address)] = _number(size)
        return 0

    def cuMemHostUnregister(self, address: Any) -> int:
        del self.registered[_number(address)]
        self._unshare(_number(address))
        return 0

    def cuMemHostGetDevicePointer_v2(self, device: Any, host: Any, flags: Any) -> int:
        place = _number(host)
        size = self.registered[place] if place in self.registered else self.host_memory[place][1]
        seen = self._room(size)
        self.shared[seen] = (place, size)
        _set(device, seen)
        return 0

    def _unshare(self, place: int) -> None:
        self.shared = {start: held for start, held in self.shared.items() if held[0] != place}

    def cuMemsetD8Async(self, address: Any, value: Any, size: Any, stream: Any) -> int:
        memory = self._device_bytes(_number(address), _number(size))
        self.submit(_number(stream), lambda: memory.fill(_number(value)))
        return 0

    def cuMemcpyHtoDAsync_v2(self, device: Any, host: Any, size: Any, stream: Any) -> int:
        if code := self._lost():
            return code
        memory, source, count = self._device_bytes(_number(device), _number(size)), _number(host), _number(size)
        self._host_check(source, count)
        self.submit(_number(stream), lambda: _move(memory.ctypes.data, source, count))
        return 0

    def cuMemcpyDtoHAsync_v2(self, host: Any, device: Any, size: Any, stream: Any) -> int:
        if code := self._lost():
            return code
        memory, target, count = self._device_bytes(_number(device), _number(size)), _number(host), _number(size)
        self._host_check(target, count)
        self.submit(_number(stream), lambda: _move(target, memory.ctypes.data, count))
        return 0

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:
        if code := self._lost():
            return code
        memory, count = self._device_bytes(_number(target), _number(size)), _number(size)
        given = self._device_bytes(_number(source), count)
        self.submit(_number(stream), lambda: _move(memory.ctypes.data, given.ctypes.data, count))
        return 0

    def cuMemcpy2DAsync_v2(self, reference: Any, stream: Any) -> int:
        if code := self._lost():
            return code
        spec = reference._obj
        assert spec.src_type == spec.dst_type == 2, "only within the device"
        assert spec.width_bytes <= min(spec.src_pitch, spec.dst_pitch), "rows overlap"
        sides = []
        for start, pitch in ((spec.dst_device, spec.dst_pitch), (spec.src_device, spec.src_pitch)):
            extent = (spec.height - 1) * pitch + spec.width_bytes
            sides.append((self._device_bytes(start, extent).ctypes.data, pitch, extent))
        (target, over, size), (source, down, other) = sides
        assert target + size <= source or source + other <= target, "source and target overlap"
        width, height = spec.width_bytes, spec.height

        def work() -> None:
            for row in range(height):
                _move(target + row * over, source + row * down, width)

        self.submit(_number(stream), work)
        return 0

    # --- streams and events --------------------------------------------------------------------------

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:
        _set(stream, self._handle("stream"))
        self.queues[stream._obj.value] = []
        return self._lost()

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        del self.handles[_number(stream)], self.queues[_number(stream)]
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        queue = self.queues[_number(stream)]
        if _number(stream) in self.captures:
            self.invalid.add(_number(stream))
            return 900
        while queue:
            queue.pop(0)()
        return self._lost()

    def cuEventCreate(self, event: Any, flags: Any) -> int:
        _set(event, self._handle("event"))
        return 0

    def cuEventDestroy_v2(self, event: Any) -> int:
        del self.handles[_number(event)]
        return 0

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        assert self.handles[_number(event)] == "event"
        mark = self.marks[_number(event)] = _Mark(_number(stream))

        def happen() -> None:
            mark.done_s = time.perf_counter()

        self.submit(_number(stream), happen)
        return self._lost()

    def cuStreamWaitEvent(self, stream: Any, event: Any, flags: Any) -> int:
        mark = self.marks[_number(event)]
        self.submit(_number(stream), lambda: self._reach(mark))
        return self._lost()

    def cuEventSynchronize(self, event: Any) -> int:
        if _number(event) in self.marks:
            self._reach(self.marks[_number(event)])
        return self._lost()

    def _reach(self, mark: _Mark) -> None:
        while mark.done_s is None:
            self.queues[mark.stream].pop(0)()

    def cuEventElapsedTime(self, milliseconds: Any, start: Any, end: Any) -> int:
        first, last = (self.marks[_number(one)].done_s for one in (start, end))
        if first is None or last is None:
            return 600
        milliseconds._obj.value = (last - first) * 1e3
        return 0

    # --- graphs --------------------------------------------------------------------------------------

    def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:
        assert not self.queues[_number(stream)], "captured with work before it"
        self.captures[_number(stream)] = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        work = self.captures.pop(_number(stream))
        if _number(stream) in self.invalid:
            self.invalid.discard(_number(stream))
            _set(graph, 0)
            return 901
        handle = self._handle("graph")
        self.graphs[handle] = work
        _set(graph, handle)
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        handle = self._handle("executable graph")
        self.graphs[handle] = self.graphs[_number(graph)]
        _set(executable, handle)
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        del self.handles[_number(graph)], self.graphs[_number(graph)]
        return 0

    def cuGraphExecDestroy(self, graph: Any) -> int:
        del self.handles[_number(graph)], self.graphs[_number(graph)]
        return 0

    def cuGraphLaunch(self, graph: Any, stream: Any) -> int:
        assert self.handles[_number(graph)] == "executable graph"
        for work in self.graphs[_number(graph)]:
            self.submit(_number(stream), work)
        return self._lost()
