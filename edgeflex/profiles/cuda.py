"""What a CUDA device is, by its driver, and what it does, where PyTorch can reach it."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeflex.profiles.overlap import overlap_of
from edgeflex.profiles.samples import summarise
from edgeflex.schema import ComputeRate, Figure, Link, Overlap, Tier, TierSpec

if TYPE_CHECKING:
    from collections.abc import Callable

_COPY_BYTES = 256 << 20
_MATMUL_SIZE = 4096
_REPEATS = 10
_WARM_UP = 3
_PRODUCTS = 8  # in a row, so that the GPU hardly waits for the next turn to be asked for
_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
# CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR, INTEGRATED.
_ATTRIBUTES = (75, 76, 18)
# CUresult, as in cuda.h.
_CUDA_ERRORS = {
    34: "the library is a stub, not the driver",
    100: "no GPU that CUDA can use",
    101: "no such GPU",
    802: "the system is not ready yet",
    803: "the driver's library and its kernel module are of different versions",
    804: "this GPU does not take the compatibility library",
    999: "unknown; often the kernel module is not loaded",
}


@dataclass(frozen=True)
class CudaFacts:
    """A CUDA device as measured; ``isa`` is its compute capability as compilers write it, for instance ``sm_87``.

    ``overlap`` is None where CPU and GPU share one memory, so that nothing is copied beside computing.
    """

    name: str
    isa: str
    integrated: bool
    tier: TierSpec
    links: tuple[Link, ...]
    compute: tuple[ComputeRate, ...]
    overlap: Overlap | None = None


@dataclass(frozen=True)
class GpuFacts:
    """A GPU as its driver names it; ``capability`` is the compute capability, for instance ``8.7``."""

    name: str
    capability: str
    memory_bytes: int
    integrated: bool


@dataclass(frozen=True)
class DriverFacts:
    """The NVIDIA driver: why it cannot be used (None where it can), the CUDA version it goes up to, its GPUs."""

    problem: str | None
    cuda_version: str | None = None
    gpus: tuple[GpuFacts, ...] = ()


def driver(load: Callable[[str], Any] = ctypes.CDLL) -> DriverFacts:
    """Ask the NVIDIA driver itself what there is; neither CUDA nor PyTorch is needed.

    Args:
        load: Opens a shared library by name.
    """
    library = _opened(load)
    if library is None:
        return DriverFacts(f"no NVIDIA driver ({' and '.join(_DRIVERS)} are not found)")
    status = int(library.cuInit(0))
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda_version = f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else None
    if status:
        why = _CUDA_ERRORS.get(status, "see the CUDA driver API's CUresult")
        return DriverFacts(f"the NVIDIA driver does not start: cuInit gives {status} ({why})", cuda_version)
    library.cuDeviceGetCount(ctypes.byref(count))
    if not count.value:
        return DriverFacts("the NVIDIA driver sees no GPU", cuda_version)
    return DriverFacts(None, cuda_version, tuple(_gpu(library, index) for index in range(count.value)))


def _opened(load: Callable[[str], Any]) -> Any:
    """Return the driver's library, or None where there is none."""
    for name in _DRIVERS:
        with suppress(OSError):
            return load(name)
    return None


def _gpu(library: Any, index: int) -> GpuFacts:
    handle, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(handle), index)
    library.cuDeviceGetName(name, len(name), handle)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    major, minor, integrated = (_attribute(library, one, handle) for one in _ATTRIBUTES)
    return GpuFacts(name.value.decode(errors="replace"), f"{major}.{minor}", int(memory.value), bool(integrated))


def _attribute(library: Any, attribute: int, handle: ctypes.c_int) -> int:
    value = ctypes.c_int()
    library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
    return value.value


def cuda_problem(load: Callable[[str], Any] = ctypes.CDLL) -> str | None:
    """Return why no CUDA device can be measured here, or None where one can.

    Args:
        load: Opens a shared library by name; see ``driver``.
    """
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    problem = driver(load).problem
    if problem is not None:
        return problem
    torch: Any = importlib.import_module("torch")
    return None if torch.cuda.is_available() else "this PyTorch was built without CUDA, or reaches no device"


def cuda(*, threads: int = 1, clock: Callable[[], float] = time.perf_counter) -> CudaFacts | None:
    """Measure the first CUDA device, or return None where there is none or PyTorch is not installed.

    Args:
        threads: Of the processor that read memory beside copies.
        clock: Seconds, rising.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    name = str(properties.name)
    capacity = Figure(value=float(properties.total_memory), origin="measured", source=f"driver of {name}")
    return CudaFacts(
        name=name,
        isa=f"sm_{properties.major}{properties.minor}",
        integrated=bool(properties.is_integrated),
        tier=TierSpec(tier=Tier.DEVICE, capacity_bytes=capacity, read_bytes_per_s=_device_read(torch, clock)),
        links=_links(torch, clock),
        compute=_rates(torch, clock),
        overlap=None if properties.is_integrated else _overlap(torch, threads, clock),
    )


def _timed(torch: Any, call: Callable[[], object], clock: Callable[[], float]) -> list[float]:
    seconds = []
    for repeat in range(_WARM_UP + _REPEATS):
        torch.cuda.synchronize()
        start = clock()
        call()
        torch.cuda.synchronize()
        if repeat >= _WARM_UP:
            seconds.append(clock() - start)
    return seconds


def _device_read(torch: Any, clock: Callable[[], float]) -> Figure:
    values = torch.ones(_COPY_BYTES, dtype=torch.int32, device="cuda")
    seconds = _timed(torch, values.sum, clock)
    size_bytes = values.numel() * values.element_size()
    return summarise([size_bytes / each for each in seconds], "sum of 1 GiB of int32 on the device")


def _links(torch: Any, clock: Callable[[], float]) -> tuple[Link, ...]:
    host = torch.ones(_COPY_BYTES, dtype=torch.uint8).pin_memory()
    device = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    ways = ((Tier.HOST, Tier.DEVICE, device, host), (Tier.DEVICE, Tier.HOST, host, device))
    links = []
    for source, target, into, out_of in ways:
        seconds = _timed(torch, functools.partial(into.copy_, out_of, non_blocking=True), clock)
        rates = [_COPY_BYTES / each for each in seconds]
        figure = summarise(rates, "copy of 256 MiB of pinned memory")
        links.append(Link(source=source, target=target, pinned=True, bytes_per_s=figure))
    return tuple(links)


def _rates(torch: Any, clock: Callable[[], float]) -> tuple[ComputeRate, ...]:
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
    rates = []
    for precision, dtype in names.items():
        left = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, device="cuda", dtype=dtype)
        # The integer product takes its right operand by columns.
        right = left.t() if precision == "int8" else left
        multiply = torch._int_mm if precision == "int8" else torch.mm  # noqa: SLF001 - no public int8 product
        seconds = _timed(torch, functools.partial(multiply, left, right), clock)
        source = f"{_MATMUL_SIZE}-square matrix product, 2 operations per multiply-accumulate"
        figure = summarise([2.0 * _MATMUL_SIZE**3 / each for each in seconds], source)
        rates.append(ComputeRate(engine="gpu", precision=precision, ops_per_s=figure))
    return tuple(rates)


def _overlap(torch: Any, threads: int, clock: Callable[[], float]) -> Overlap:
    """Measure what copies, products and the processor's reads take beside each other, each on a queue of its own."""
    import numpy as np

    host = torch.ones(_COPY_BYTES, dtype=torch.uint8).pin_memory()
    device = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    factor = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, device="cuda", dtype=torch.float16)
    product = torch.empty_like(factor)
    copying, computing = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    parts = np.array_split(np.arange(_COPY_BYTES // 4, dtype=np.int32), threads)

    def copy() -> None:
        with torch.cuda.stream(copying):
            device.copy_(host, non_blocking=True)
        copying.synchronize()

    def multiply() -> None:
        with torch.cuda.stream(computing):
            for _ in range(_PRODUCTS):
                torch.mm(factor, factor, out=product)
        computing.synchronize()

    with ThreadPoolExecutor(threads) as pool:
        return overlap_of(copy, multiply, lambda: list(pool.map(np.max, parts)), clock=clock)
