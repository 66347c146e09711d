"""The curves of a machine that is not at hand, from its profile, and a trace simulated on it with an interval.

A profile's rates become an expert's seconds by the roofline model (Williams, Waterman and Patterson, CACM 2009): a
launch, then the longer of reading the weights and computing the rows. Each rate is taken three times: what is likely
reached of it, and a lower and an upper end. A measured rate is taken for what it is, give or take its spread; of a
data sheet's, which nothing reaches, a share.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal, NamedTuple

from edgeflex.errors import InputError
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.division import cpu_in_slices
from edgeflex.runtimes.strategies import BASELINES, Machine, Strategy
from edgeflex.runtimes.tier_bounds import time_bound_s
from edgeflex.runtimes.virtual import choose_strategy, first_judged_step, judged_part, popular, run_virtual
from edgeflex.schema import Interval, Precision, Tier
from edgeflex.schema_moe import DeviceSimulation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.runtimes.trace import Trace
    from edgeflex.runtimes.virtual import VirtualRun
    from edgeflex.schema import DeviceProfile, Figure

    Int64 = NDArray[np.int64]
    End = Literal["slow", "likely", "fast"]

_ROWS = (1, 4, 16, 64, 256)
_REACHED = {"slow": 0.6, "likely": 0.8, "fast": 0.95}  # of a data sheet's rate
_LEAST_SPREAD = 0.05
_LAUNCH = {"slow": 2.0, "likely": 1.0, "fast": 0.5}
_GPU_LAUNCH_S, _CPU_LAUNCH_S, _COPY_LATENCY_S, _DENSE_LAUNCH_S = 6e-6, 8e-6, 8e-6, 30e-6
_SLICES = 6  # a trace does not say the experts' inner dimension; most have 768 columns or more
_CPU_OPS_PER_BYTE = 16.0  # about 1e12 operations where RAM gives 60 GB/s


@dataclass(frozen=True)
class ExpertShape:
    """What decides an expert's seconds.

    Args:
        size_bytes: Of its weights, as stored and copied.
        macs: Multiply-accumulates of one row: its number of weights.
        dense_bytes: Weights of a layer's other part, which lie on the GPU.
        slices: In which it lies in RAM (see ``division``); 1: it is never divided.
        cpu_in_slices: See ``Curves``.
    """

    size_bytes: int
    macs: int
    dense_bytes: int = 0
    slices: int = 1
    cpu_in_slices: float = 1.0


class _Rates(NamedTuple):
    """Bytes and operations per second; ``ram`` is what CPU and link share."""

    gpu: float
    cpu: float
    ram: float
    link: float
    disk: float
    gpu_ops: float
    cpu_ops: float


def curves_of(
    device: DeviceProfile,
    shape: ExpertShape,
    *,
    end: End = "likely",
    ram_bytes_per_s: float | None = None,
    link_bytes_per_s: float | None = None,
    disk_bytes_per_s: float | None = None,
) -> Machine:
    """Return a machine made of a profile's figures.

    Args:
        device: With a GPU that has memory of its own.
        shape: Of the experts.
        end: Which end of every figure's range.
        ram_bytes_per_s: Instead of the profile's, as reached: profiles of a card alone say nothing of the computer.
        link_bytes_per_s: Likewise, from RAM to VRAM.
        disk_bytes_per_s: Likewise, from flash; without it and in no profile there is no flash tier.

    Raises:
        InputError: The device has no VRAM, or rates are missing; all that are missing are named.
    """
    rates = _rates(device, end, ram_bytes_per_s, link_bytes_per_s, disk_bytes_per_s)
    launch = _LAUNCH[end]
    cpu_factor, link_factor = _crowded(device, rates, end)
    curves = Curves(
        gpu=_roofline(_GPU_LAUNCH_S * launch, shape, rates.gpu, rates.gpu_ops),
        cpu=_roofline(_CPU_LAUNCH_S * launch, shape, rates.cpu, rates.cpu_ops),
        link_bytes_per_s=rates.link,
        link_latency_s=_COPY_LATENCY_S * launch,
        disk_bytes_per_s=rates.disk,
        cpu_beside_link=cpu_factor,
        link_beside_cpu=link_factor,
        cpu_in_slices=shape.cpu_in_slices,
    )
    dense_s = _DENSE_LAUNCH_S * launch + shape.dense_bytes / rates.gpu
    # weights of a few bits, two operations a multiply-accumulate, 16 operations a byte at the least
    more_s = 4.0 * shape.dense_bytes / rates.gpu_ops
    dense = Curve(((1, dense_s), (256, max(dense_s, _DENSE_LAUNCH_S * launch + 256 * more_s))))
    part_s = max(_GPU_LAUNCH_S, _CPU_LAUNCH_S) * launch
    return Machine(curves, dense, part_s=part_s, slices=shape.slices)


def simulate_device(
    trace: Trace,
    device: DeviceProfile,
    *,
    vram_bytes: int,
    precision: Precision,
    ram_bytes: int | None = None,
    sizes: Int64 | None = None,
    dense_bytes: int = 0,
    ram_bytes_per_s: float | None = None,
    link_bytes_per_s: float | None = None,
    disk_bytes_per_s: float | None = None,
) -> DeviceSimulation:
    """Return what a trace comes to on a machine that is not at hand.

    The first quarter of the decoded tokens calibrates, the rest is judged; so are published rules.

    Args:
        trace: Recorded on any machine.
        device: See ``curves_of``, as the rates.
        vram_bytes: For experts.
        precision: Of the experts, which have ``sizes``.
        ram_bytes: For experts; None: all of them.
        sizes: ``[layers, experts]`` bytes; None takes the trace's own.
        dense_bytes: Weights of a layer's other part.
        ram_bytes_per_s: See ``curves_of``.
        link_bytes_per_s: See ``curves_of``.
        disk_bytes_per_s: See ``curves_of``.

    Raises:
        InputError: As ``curves_of`` and ``run_virtual``, or nothing was decoded in the trace, or there is no rate of
            flash and RAM does not hold every expert.
    """
    if not trace.decode_tokens:
        raise InputError("the trace has no decoded token, so it says nothing about tokens per second. Record some.")
    known = trace.sizes() if sizes is None else sizes
    ram = int(known.sum()) if ram_bytes is None else ram_bytes
    largest = int(known.max())
    slower = cpu_in_slices(precision)
    shape = ExpertShape(largest, round(largest * 8 / _stored_bits(precision)), dense_bytes, _SLICES, slower)

    def machine(end: End) -> Machine:
        return curves_of(
            device,
            shape,
            end=end,
            ram_bytes_per_s=ram_bytes_per_s,
            link_bytes_per_s=link_bytes_per_s,
            disk_bytes_per_s=disk_bytes_per_s,
        )

    likely = machine("likely")
    if ram < int(known.sum()) and likely.curves.disk_bytes_per_s == inf:
        raise InputError(f"device {device.name!r} has no rate of reads from flash, and RAM does not hold every expert.")
    first = first_judged_step(trace)
    order = popular(trace, first)
    chosen = choose_strategy(trace, likely, vram_bytes=vram_bytes, ram_bytes=ram, sizes=known, first_step=first)

    def run(strategy: Strategy, on: Machine) -> VirtualRun:
        return run_virtual(
            trace, on, strategy, vram_bytes=vram_bytes, ram_bytes=ram, sizes=known, order=order, first_step=first
        )

    found = run(chosen, likely)
    ends = sorted(run(chosen, machine(end)).mean_s for end in ("fast", "slow"))
    rivals = [name for name in BASELINES if name != "hybrimoe" or ram >= int(known.sum())]
    layers = int(known.any(axis=1).sum())
    bound_s = time_bound_s(
        judged_part(trace, first), likely.curves, vram_bytes, ram, sizes=known, dense_s=layers * likely.dense(1)
    )
    return DeviceSimulation(
        device=device.name,
        trace=trace.name,
        decode_tokens=len(found.token_s),
        precision=precision,
        vram_bytes=vram_bytes,
        ram_bytes=ram,
        placement="static" if chosen.static else "cache",
        token_s=Interval(value=found.mean_s, low=ends[0], high=ends[1]),
        tokens_per_s=Interval(value=1 / found.mean_s, low=1 / ends[1], high=1 / ends[0]),
        bound_token_s=bound_s,
        hit_rate=found.hit_rate,
        upload_bytes=found.upload_bytes,
        ahead_bytes=found.ahead_bytes,
        flash_bytes=found.flash_bytes,
        waited={str(resource): share for resource, share in found.waited.items()},
        rival_token_s={name: run(Strategy(name), likely).mean_s for name in rivals},
        assumptions=_assumptions(),
    )


# --- inside --------------------------------------------------------------------------------------------


def _stored_bits(precision: Precision) -> float:
    """Return bits of a weight with its share of a 16-bit scale."""
    return precision.bits + (16 / precision.group_size if precision.group_size else 0)


def _roofline(launch_s: float, shape: ExpertShape, bytes_per_s: float, ops_per_s: float) -> Curve:
    read_s, row_s = shape.size_bytes / bytes_per_s, 2 * shape.macs / ops_per_s
    return Curve(tuple((rows, launch_s + max(read_s, rows * row_s)) for rows in _ROWS))


def _reached(figure: Figure, end: End) -> float:
    if figure.origin == "datasheet":
        return figure.value * _REACHED[end]
    spread = max(_LEAST_SPREAD, figure.spread or 0.0)
    return figure.value * {"slow": 1.0 / (1.0 + spread), "likely": 1.0, "fast": 1.0 + spread}[end]


def _crowded(device: DeviceProfile, rates: _Rates, end: End) -> tuple[float, float]:
    """Return how much longer CPU and link take beside each other: as measured, else by the rate of RAM they share."""
    shared = max(1.0, (rates.cpu + rates.link) / rates.ram)
    known = device.overlap
    found = (None, None) if known is None else (known.cpu_beside_link, known.link_beside_cpu)
    cpu, link = (shared if one is None else _factor(one, end) for one in found)
    return cpu, link


def _factor(figure: Figure, end: End) -> float:
    """Return a measured factor, give or take its spread; more is slower."""
    spread = max(_LEAST_SPREAD, figure.spread or 0.0)
    return max(1.0, figure.value * {"slow": 1.0 + spread, "likely": 1.0, "fast": 1.0 / (1.0 + spread)}[end])


def _rates(device: DeviceProfile, end: End, ram: float | None, link: float | None, disk: float | None) -> _Rates:
    if device.unified_memory:
        raise InputError(
            f"device {device.name!r} has one memory for CPU and GPU, so that VRAM is no tier of its own and uploads "
            "gain nothing. Simulate the cache of its RAM with --cache instead."
        )
    reads = {spec.tier: _reached(spec.read_bytes_per_s, end) for spec in device.tiers if spec.read_bytes_per_s}
    links = [one for one in device.links if (one.source, one.target) == (Tier.HOST, Tier.DEVICE)]
    linked = max((_reached(one.bytes_per_s, end) for one in links), default=None)
    stored = max((_reached(one.bytes_per_s, end) for one in device.storage), default=reads.get(Tier.FLASH, inf))
    gpu_ops = [
        _reached(one.ops_per_s, end) for one in device.compute if one.engine == "gpu" and one.precision == "fp16"
    ]
    found = {
        "the rate of the GPU's memory": reads.get(Tier.DEVICE),
        "the rate of RAM": ram or reads.get(Tier.HOST),
        "the rate from RAM to the GPU": link or linked,
        "the GPU's operations per second in fp16": max(gpu_ops, default=None),
    }
    options = {"the rate of RAM": "--ram-rate", "the rate from RAM to the GPU": "--link"}
    missing = [
        f"{name} is not in the profile; {f'pass {options[name]}, or ' if name in options else ''}profile the computer"
        for name, value in found.items()
        if value is None
    ]
    if missing:
        raise InputError.collect(f"device {device.name!r}", missing)
    gpu, host, across, ops = (float(value) for value in found.values() if value is not None)
    cpu_ops = [_reached(one.ops_per_s, end) for one in device.compute if one.engine == "cpu"]
    return _Rates(gpu, host, host, across, disk or stored, ops, max(cpu_ops, default=_CPU_OPS_PER_BYTE * host))


def _assumptions() -> tuple[str, ...]:
    low, likely, high = (f"{_REACHED[end]:.0%}" for end in ("slow", "likely", "fast"))
    gpu, cpu, layer = (f"{1e6 * each:.0f} µs" for each in (_GPU_LAUNCH_S, _CPU_LAUNCH_S, _DENSE_LAUNCH_S))
    return (
        f"Of a data sheet's rate {likely} is reached, {low} to {high}.",
        "CPU and copies share the rate of RAM, where no profile says what they lose beside each other.",
        f"Beside its bytes an expert costs {gpu} on the GPU, {cpu} on the CPU, a layer {layer}; half to twice that.",
        f"One missing expert of an event may be divided between CPU and GPU, in {_SLICES} slices, if RAM holds all.",
        f"Where no profile says it, the CPU computes {_CPU_OPS_PER_BYTE:.0f} operations per byte of RAM's rate.",
    )
