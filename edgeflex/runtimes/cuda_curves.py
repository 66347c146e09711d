"""What experts cost here: on the device, with the processor, to copy and to read; measured before the first event."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeflex.profiles.overlap import slowdown
from edgeflex.runtimes.cuda_slices import first_slices, rest_of, sliced
from edgeflex.runtimes.cuda_streams import explained
from edgeflex.runtimes.cuda_weights import run_expert
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.movers import takes_direct
from edgeflex.runtimes.pages import private_pages
from edgeflex.runtimes.sliced_rates import WALKED_BYTES, time_slices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from edgeflex.progress import Progress
    from edgeflex.runtimes.cuda_host import HostExperts
    from edgeflex.runtimes.cuda_streams import HostMemory, Streams
    from edgeflex.runtimes.cuda_weights import Kind
    from edgeflex.runtimes.movers import Mover
    from edgeflex.runtimes.packed import PackedStore

    Key = tuple[int, int]

_ROWS = (1, 4, 16, 64)
_REPEATS = 5
_MOST_COPIES = 64  # in a row, beside one expert of the processor
_READS = 5
_ROUNDS = 5  # of whole experts beside the same in slices


@explained("measuring what experts cost on the device failed")
@torch.inference_mode()
def measure_curves(
    streams: Streams,
    host: HostExperts,
    stored: Mapping[Key, Kind],
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
        stored: Kinds of all experts as their files are.
        kinds: As they may lie, which is what is measured, one of each precision; where that is in slices, the
            processor's are those of whole ones by ``cpu_in_slices``.
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
        copies_s = _copied(streams, target, torch.from_numpy(memory.data))
        latency_s = statistics.median(_copied(streams, target[:4096], torch.from_numpy(memory.data)[:4096]))
        advance(1)
        alone_s = _computed(host, largest, memory, clock)
        pace = statistics.median(alone_s) / statistics.median(copies_s)
        computed_s, beside_s = _beside(streams, host, largest, target, memory, clock, pace)
        advance(1)
    gpu, cpu = found[largest.down.precision.value]
    whole_s = statistics.median(copies_s)
    curves = Curves(
        gpu=gpu,
        cpu=cpu,
        link_bytes_per_s=largest.size_bytes / max(whole_s - latency_s, 1e-9),
        link_latency_s=latency_s,
        cpu_beside_link=slowdown(alone_s, computed_s, "an expert of the processor beside copies").value,
        link_beside_cpu=slowdown(copies_s, beside_s, "a copy beside an expert of the processor").value,
        kinds=found,
    )
    if kinds == stored:
        return curves
    factor = measure_in_slices(host, stored, clock=clock)
    return replace(curves.scaled(cpu=1.0 / factor), cpu_in_slices=factor)


@explained("measuring what parts of experts cost on the device failed")
@torch.inference_mode()
def measure_part_s(
    streams: Streams,
    host: HostExperts,
    kinds: Mapping[Key, Kind],
    dtype: torch.dtype,
    curves: Curves,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return what either part of a divided expert costs beside its share of the whole, the dearer of both.

    Of one row, in halves or nearly. The processor's part bears what it takes to hand the device its own.

    Args:
        streams: The device.
        host: Computes with the processor.
        kinds: Of all experts, in slices; the largest that is sliced is measured.
        dtype: The device's products run in it.
        curves: Of whole experts, and what slices cost the processor.
        clock: Seconds, rising.

    Raises:
        DeviceError: The device failed.
    """
    laid = curves.in_slices()
    kind = max((one for one in kinds.values() if one.down.slices > 1), key=lambda one: one.size_bytes)
    count, name = kind.down.slices // 2, kind.down.precision.value
    share = count / kind.down.slices
    memory = streams.host(kind.size_bytes)
    part, rest = first_slices(kind, count), rest_of(kind, count)
    data = streams.empty((part.size_bytes,), torch.uint8).zero_()
    given = torch.zeros((1, kind.gate_up.columns), device=streams.device)
    device_s, asked_s = [], []
    for _ in range(_REPEATS + 1):
        start, begin = clock(), streams.stamp()
        run_expert(data, part, given, dtype)
        end = streams.stamp()
        asked_s.append(clock() - start)
        streams.synchronize()
        device_s.append(streams.between(begin, end))
    taken_s = _computed(host, rest, memory, clock, _REPEATS + 1)
    on_device = statistics.median(device_s[1:]) - share * laid.gpu_s(1, name)
    on_host = statistics.median(taken_s[1:]) - (1.0 - share) * laid.cpu_s(1, name) + statistics.median(asked_s[1:])
    return max(0.0, on_device, on_host)


def measure_in_slices(
    host: HostExperts, stored: Mapping[Key, Kind], *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return how much longer the processor takes over experts in slices than over whole ones.

    Args:
        host: Computes with the processor.
        stored: Kinds of all experts as their files are; the largest that can be sliced is measured.
        clock: Seconds, rising.
    """
    kind = max((one for one in stored.values() if sliced(one) != one), key=lambda one: one.size_bytes)
    walked_bytes = min(WALKED_BYTES, sum(one.size_bytes for one in stored.values()))
    return time_slices(host, kind, walked_bytes=walked_bytes, rounds=_ROUNDS, clock=clock).in_slices.value


def disk_rate(
    store: PackedStore, mover: Callable[..., Mover], *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the bytes per second at which one expert after another comes from the disk; infinite without experts.

    Each is read as a run reads it: past the page cache where the file system allows it, in parts by several threads.

    Args:
        store: Where experts lie.
        mover: Makes the readers.
        clock: Seconds, rising.

    Raises:
        DeviceError: The disk failed.
        BundleError: A file is missing or too short.
    """
    known = [expert.record for expert in store.experts.values()]
    if not known:
        return math.inf
    records = [known[place * (len(known) - 1) // (_READS - 1)] for place in range(_READS)]
    direct = all(one.size_bytes % 4096 == 0 and takes_direct(one.file) for one in records)
    rates, size = [], max(one.size_bytes for one in records)
    with mover(private_pages(size)[:size], direct=direct) as reading:
        for one in records:
            start = clock()
            reading.submit(one, 0, check=False).wait()
            rates.append(one.size_bytes / max(clock() - start, 1e-9))
    return statistics.median(rates)


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


def _copied(streams: Streams, target: Tensor, source: Tensor) -> list[float]:
    """Return the seconds of copies of ``source``, by the device's own clock."""
    marks = [streams.upload(target, source, streams.fence()) for _ in range(_REPEATS)]
    streams.synchronize()
    return [streams.seconds(mark) for mark in marks]


def _computed(
    host: HostExperts, kind: Kind, memory: HostMemory, clock: Callable[[], float], repeats: int = _REPEATS
) -> list[float]:
    """Return the seconds of one row with the processor."""
    given, taken = np.zeros((1, kind.gate_up.columns), dtype=np.float32), []
    for _ in range(repeats):
        begin = clock()
        host(kind, memory.data[: kind.size_bytes], given)
        taken.append(clock() - begin)
    return taken


def _beside(
    streams: Streams,
    host: HostExperts,
    kind: Kind,
    target: Tensor,
    memory: HostMemory,
    clock: Callable[[], float],
    pace: float,
) -> tuple[list[float], list[float]]:
    """Return the processor's seconds of one row while copies run, and the copies' seconds meanwhile.

    ``pace`` is how many copies the processor's work takes. There are twice as many, so that they outlast it, and only
    those count that ended before it did.
    """
    source, fence = torch.from_numpy(memory.data), streams.fence()
    count = min(_MOST_COPIES, 2 + math.ceil(2 * pace))
    computed, copied = [], []
    for _ in range(_REPEATS):
        origin = streams.stamp()
        marks = [streams.upload(target, source, fence) for _ in range(count)]
        computed += _computed(host, kind, memory, clock, 1)
        streams.synchronize()
        spans = [streams.span(mark, origin) for mark in marks]
        inside = [end - start for start, end in spans if end <= computed[-1]]
        copied += inside or [spans[0][1] - spans[0][0]]
    return computed, copied
