"""What experts cost here: on the device, with the processor, and to copy; measured before the first event."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeflex.runtimes.cuda_streams import explained
from edgeflex.runtimes.cuda_weights import run_expert
from edgeflex.runtimes.curves import Curve, Curves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from edgeflex.progress import Progress
    from edgeflex.runtimes.cuda_host import HostExperts
    from edgeflex.runtimes.cuda_streams import HostMemory, Streams
    from edgeflex.runtimes.cuda_weights import Kind

    Key = tuple[int, int]

_ROWS = (1, 4, 16, 64)
_REPEATS = 5
_COPIES = 8  # in a row, so that the latency of the first hides


@explained("measuring what experts cost on the device failed")
@torch.inference_mode()
def measure_curves(
    streams: Streams,
    host: HostExperts,
    kinds: Mapping[Key, Kind],
    dtype: torch.dtype,
    *,
    progress: Progress,
    clock: Callable[[], float] = time.perf_counter,
) -> Curves:
    """Return the costs of a decoder's experts by precision, medians of a few repeats.

    Copies and the processor are also measured beside each other, since both read the same memory. The record is
    zeros: no kernel's time depends on the numbers.

    Args:
        streams: The device.
        host: Computes with the processor.
        kinds: Of all experts; one of each precision is measured.
        dtype: The device's products run in it.
        progress: Told about it.
        clock: Seconds, rising.

    Raises:
        DeviceError: The device failed.
    """
    examples = {kind.down.precision.value: kind for kind in kinds.values()}
    found: dict[str, tuple[Curve, Curve]] = {}
    largest = max(examples.values(), key=lambda kind: kind.size_bytes)
    memory = streams.host(largest.size_bytes)
    target = streams.empty((largest.size_bytes,), torch.uint8)
    target.zero_()
    with progress.task("measure experts on the device", 2 * len(examples) + 2) as advance:
        for name, kind in examples.items():
            gpu = Curve.fitted(_device_samples(streams, kind, target, dtype))
            advance(1)
            cpu = Curve.fitted(_host_samples(host, kind, memory, clock))
            advance(1)
            found[name] = (gpu, cpu)
        alone_s, latency_s = _copy_seconds(streams, target, memory)
        advance(1)
        beside = _beside(streams, host, largest, target, memory, clock)
        advance(1)
    gpu, cpu = found[largest.down.precision.value]
    compute_s = cpu(1)
    return Curves(
        gpu=gpu,
        cpu=cpu,
        link_bytes_per_s=largest.size_bytes / max(alone_s - latency_s, 1e-9),
        link_latency_s=latency_s,
        cpu_beside_link=max(1.0, beside[0] / compute_s),
        link_beside_cpu=max(1.0, beside[1] / alone_s),
        kinds=found,
    )


def _device_samples(streams: Streams, kind: Kind, data: Tensor, dtype: torch.dtype) -> list[tuple[float, float]]:
    samples = []
    for rows in _ROWS:
        given = torch.zeros((rows, kind.gate_up.columns), device=streams.device)
        for repeat in range(_REPEATS + 1):
            begin = streams.stamp()
            run_expert(data, kind, given, dtype)
            end = streams.stamp()
            streams.synchronize()
            if repeat:
                samples.append((float(rows), streams.between(begin, end)))
    return samples


def _host_samples(
    host: HostExperts, kind: Kind, memory: HostMemory, clock: Callable[[], float]
) -> list[tuple[float, float]]:
    samples = []
    record = memory.data[: kind.size_bytes]
    for rows in _ROWS:
        given = np.zeros((rows, kind.gate_up.columns), dtype=np.float32)
        for repeat in range(_REPEATS + 1):
            begin = clock()
            host(kind, record, given)
            if repeat:
                samples.append((float(rows), clock() - begin))
    return samples


def _copy_seconds(streams: Streams, target: Tensor, memory: HostMemory) -> tuple[float, float]:
    """Return the seconds of one whole copy, and of one of a single block."""
    source = torch.from_numpy(memory.data)
    return _copied(streams, target, source), _copied(streams, target[:4096], source[:4096])


def _copied(streams: Streams, target: Tensor, source: Tensor) -> float:
    marks = [streams.upload(target, source, streams.fence()) for _ in range(_REPEATS)]
    streams.synchronize()
    return statistics.median(streams.seconds(mark) for mark in marks)


def _beside(
    streams: Streams,
    host: HostExperts,
    kind: Kind,
    target: Tensor,
    memory: HostMemory,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Return the processor's seconds of one row while copies run, and a copy's seconds meanwhile."""
    given = np.zeros((1, kind.gate_up.columns), dtype=np.float32)
    source, fence = torch.from_numpy(memory.data), streams.fence()
    marks = [streams.upload(target, source, fence) for _ in range(_COPIES)]
    begin = clock()
    host(kind, memory.data[: kind.size_bytes], given)
    taken_s = clock() - begin
    streams.synchronize()
    return taken_s, statistics.median(streams.seconds(mark) for mark in marks)
