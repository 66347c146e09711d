"""What a CUDA device does, where there is one and PyTorch can reach it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeflex.profiles.samples import summarise
from edgeflex.schema import ComputeRate, Figure, Link, Tier, TierSpec

if TYPE_CHECKING:
    from collections.abc import Callable

_COPY_BYTES = 256 << 20
_MATMUL_SIZE = 4096
_REPEATS = 10
_WARM_UP = 3


@dataclass(frozen=True)
class CudaFacts:
    """A CUDA device as measured."""

    name: str
    integrated: bool
    tier: TierSpec
    links: tuple[Link, ...]
    compute: tuple[ComputeRate, ...]


def cuda(clock: Callable[[], float] = time.perf_counter) -> CudaFacts | None:
    """Measure the first CUDA device, or return None where there is none or PyTorch is not installed."""
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
        integrated=bool(properties.is_integrated),
        tier=TierSpec(tier=Tier.DEVICE, capacity_bytes=capacity, read_bytes_per_s=_device_read(torch, clock)),
        links=_links(torch, clock),
        compute=_rates(torch, clock),
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
