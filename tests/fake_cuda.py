"""A stand-in for the CUDA driver's library: same functions, same ctypes arguments, device memory as NumPy arrays.

Work is queued and done at ``cuStreamSynchronize``, as on a device, so that reading before waiting gives rubbish. Fresh
memory is rubbish. Every access is checked against what is allocated; ``alive`` says what was not given back.
"""

# ruff: noqa: N802 - the names are the driver's

from __future__ import annotations

import ctypes
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
    700: b"CUDA_ERROR_ILLEGAL_ADDRESS",
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
        self.host_memory: dict[int, Any] = {}
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
            return code if which == self.calls.count(name) else int(found(*arguments))

        return counted

    @property
    def alive(self) -> list[str]:
        """What was not given back."""
        left = [f"device memory {address:#x}" for address in self.device_memory]
        left += [f"pinned memory {address:#x}" for address in self.host_memory]
        left += [f"{kind} {handle:#x}" for handle, kind in self.handles.items()]
        return left + ["context"] * self.retained

    # --- for the fake of TensorRT --------------------------------------------------------------------

    def array(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return float32 device memory as an array over it."""
        size = int(np.prod(shape)) * 4
        return self._device_bytes(address, size).view(np.float32).reshape(shape)

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Queue work, or record it where the stream is captured."""
        assert stream in self.queues, "no such stream"
        self.captures.get(stream, self.queues[stream]).append(work)

    def _device_bytes(self, address: int, size: int) -> np.ndarray:
        for start, memory in self.device_memory.items():
            if start <= address and address + size <= start + memory.nbytes:
                return memory[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated on the device")

    def _host_check(self, address: int, size: int) -> None:
        for start, memory in self.host_memory.items():
            if start <= address and address + size <= start + ctypes.sizeof(memory):
                return
        raise AssertionError(f"{size} bytes at {address:#x} are not pinned")

    def _handle(self, kind: str) -> int:
        self._next += 0x1000
        self.handles[self._next] = kind
        return self._next

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
        self._next += (_number(size) + 0xFFF) // 0x1000 * 0x1000 + 0x1000
        self.device_memory[self._next] = np.full(_number(size), RUBBISH, dtype=np.uint8)
        _set(address, self._next)
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        if code := self._lost():
            return code
        del self.device_memory[_number(address)]
        return 0

    def cuMemHostAlloc(self, address: Any, size: Any, flags: Any) -> int:
        if code := self._lost():
            return code
        memory = (ctypes.c_char * _number(size))()
        place = ctypes.addressof(memory)
        ctypes.memset(place, RUBBISH, _number(size))
        self.host_memory[place] = memory
        _set(address, place)
        return 0

    def cuMemFreeHost(self, address: Any) -> int:
        del self.host_memory[_number(address)]
        return 0

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
        self.submit(_number(stream), lambda: None)
        return 0

    def cuEventSynchronize(self, event: Any) -> int:
        return 0

    def cuEventElapsedTime(self, milliseconds: Any, start: Any, end: Any) -> int:
        milliseconds._obj.value = 2.5
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
