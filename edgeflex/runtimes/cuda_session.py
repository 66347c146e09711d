"""Opens a decoder's bundle on a device: its memory divided, its curves measured, its experts in tiers.

Loaded by name from ``runtimes.engines``, so that nothing which runs decoders on a processor needs PyTorch.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from edgeflex.errors import DeviceError, InputError
from edgeflex.runtimes.cuda_ahead import Ahead
from edgeflex.runtimes.cuda_curves import disk_rate, measure_curves, measure_part_s
from edgeflex.runtimes.cuda_decoder import DeviceEngine
from edgeflex.runtimes.cuda_experts import RULES, DeviceExperts
from edgeflex.runtimes.cuda_host import open_host
from edgeflex.runtimes.cuda_memory import device_bytes
from edgeflex.runtimes.cuda_slices import Dividing, sliced
from edgeflex.runtimes.cuda_streams import open_streams
from edgeflex.runtimes.cuda_weights import open_experts
from edgeflex.runtimes.division import pays, staged_bytes
from edgeflex.runtimes.engines import OpenedDevice
from edgeflex.runtimes.movers import Mover
from edgeflex.runtimes.policies import DEFAULT_POLICY
from edgeflex.runtimes.reuse import ReusePolicy
from edgeflex.runtimes.strategies import AheadCache
from edgeflex.runtimes.tiers import TieredCache
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.progress import Progress
    from edgeflex.runtimes.cuda_host import HostExperts
    from edgeflex.runtimes.cuda_memory import DeviceBytes
    from edgeflex.runtimes.cuda_streams import Streams
    from edgeflex.runtimes.cuda_weights import Kind
    from edgeflex.runtimes.curves import Curves
    from edgeflex.runtimes.engines import DeviceRequest, DeviceStats
    from edgeflex.runtimes.packed import PackedStore
    from edgeflex.schema_moe import DecoderManifest

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SHARE = 0.9  # of the device's free memory, where nobody says how much


def open_device(
    folder: Path,
    manifest: DecoderManifest,
    request: DeviceRequest,
    progress: Progress,
    *,
    streams: Streams | None = None,
    host: HostExperts | None = None,
    curves: Curves | None = None,
    part_s: float | None = None,
    mover: Callable[..., Mover] = Mover,
    clock: Callable[[], float] = time.perf_counter,
) -> OpenedDevice:
    """Return engine, store and experts of a bundle on a device; nothing of it is kept after a fault.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        request: What is asked for.
        progress: Told what is not as it should be, and about measuring.
        streams: The device; None opens the one that ``request`` names.
        host: Computes experts with the processor; None opens what this machine has.
        curves: What experts cost; None measures it now.
        part_s: What each part of a divided expert costs beside its share; None measures it with the curves, and where
            those are given divides nothing.
        mover: Makes the readers.
        clock: Seconds, rising.

    Raises:
        InputError: The device, the rule or the precision is unknown.
        BundleError: A file is missing or damaged.
        DeviceError: There is no such device, it refused, or its memory does not hold one expert.
    """
    _refuse_unknown(request)
    device = streams or open_streams(request.device)
    dtype = _DTYPES[request.precision or ("fp32" if device.device.type == "cpu" else "bf16")]
    store, stored = open_experts(folder, manifest)
    sizes = {"context_tokens": request.context_tokens, "chunk_tokens": request.chunk_tokens}
    fixed = device_bytes(manifest, stored, dtype, library_bytes=device.library_bytes, **sizes)
    divides = request.rule == "auto" and (curves is None or part_s is not None)
    kinds = {key: sliced(kind) for key, kind in stored.items()} if divides else stored
    divides = any(kind.down.slices > 1 for kind in kinds.values())
    tiers, staged = _tiers(store, fixed, manifest, request, device, divides=divides)
    kinds = kinds if staged else stored
    processor = host or open_host(request.threads, progress)
    engine = DeviceEngine(folder, manifest, stored, device, processor, dtype=dtype, clock=clock, **sizes)
    try:
        engine.load()
        known = curves or measure_curves(device, processor, stored, kinds, dtype, progress=progress, clock=clock)
        if curves is None:
            known = replace(known, disk_bytes_per_s=disk_rate(store, mover, clock=clock))
        dividing = None
        if staged:
            launch_s = measure_part_s(device, processor, kinds, dtype, known, clock=clock) if part_s is None else part_s
            if _pays(known, launch_s, kinds):
                known, dividing = known.in_slices(), Dividing(launch_s, staged, stored)
                engine.lay(kinds)
            else:
                tiers, staged = _tiers(store, fixed, manifest, request, device, divides=False)
        layers = [layer.index for layer in manifest.graph.layers if layer.routing is not None]
        experts = DeviceExperts(
            engine,
            store,
            tiers,
            layers,
            known,
            rule=request.rule,
            dividing=dividing,
            record=request.record,
            mover=mover,
            clock=clock,
        )
        if "static" in {request.rule, request.policy} and request.static is not None:
            experts.warm(request.static)
    except BaseException:
        engine.close()
        raise
    if engine.memory.host_problem:
        progress.note(
            f"memory of the RAM tier is not pinned ({engine.memory.host_problem}): copies to the device are slower and "
            "overlap with less. Raise the limit on locked memory (`ulimit -l`), or give a smaller RAM tier."
        )

    def stats() -> DeviceStats:
        return replace(
            experts.stats(),
            rule=request.rule,
            fixed_bytes=fixed.total + staged,
            requested_bytes=request.vram_bytes,
            peak_bytes=device.peak_bytes(),
        )

    return OpenedDevice(engine, store, experts, stats)


def _pays(curves: Curves, part_s: float, kinds: Mapping[tuple[int, int], Kind]) -> bool:
    """Return whether it is worth it to lay experts out in slices."""
    largest = max(kinds.values(), key=lambda one: one.size_bytes)
    return pays(curves, part_s, size_bytes=largest.size_bytes, slices=largest.down.slices)


def _refuse_unknown(request: DeviceRequest) -> None:
    faults = []
    if request.rule not in RULES:
        faults.append(f"rule {request.rule!r} is unknown; name one of {', '.join(RULES)}")
    if request.precision is not None and request.precision not in _DTYPES:
        faults.append(f"products in {request.precision!r} are unknown; name one of {', '.join(_DTYPES)}")
    if request.vram_bytes is not None and request.vram_bytes < 1:
        faults.append(f"{request.vram_bytes} bytes of the device; at least 1 is needed")
    if faults:
        raise InputError.collect("the run's device", faults)


def _tiers(
    store: PackedStore,
    fixed: DeviceBytes,
    manifest: DecoderManifest,
    request: DeviceRequest,
    device: Streams,
    *,
    divides: bool,
) -> tuple[Callable[[], tuple[TieredCache, Ahead | None]], int]:
    """Divide the memories, and return what makes the tiers' books, and the bytes where shares of experts arrive."""
    total = int(store.sizes.sum())
    given = request.vram_bytes
    if given is None:
        planned = request.arena_bytes
        given = _all_of(device, fixed.total + total) if planned is None else fixed.total + planned
    try:
        vram, ram, exclusive = tier_sizes(store.sizes, given - fixed.total, request.ram_bytes)
    except DeviceError as error:
        raise DeviceError(
            f"{format_bytes(given)} of the device are not enough beside {format_bytes(fixed.dense)} of dense weights, "
            f"{format_bytes(fixed.key_values)} of keys and values and {format_bytes(fixed.work)} to work in: {error}"
        ) from None
    exclusive = exclusive or (request.exclusive and ram > 0)
    largest = int(store.sizes.max(initial=0))
    staged = staged_bytes(vram, ram, total_bytes=total, largest_bytes=largest, exclusive=exclusive) if divides else 0
    vram -= staged
    logger.debug("tiers: %d bytes on the device, %d in RAM, exclusive %s", vram, ram, exclusive)
    top_k = max((layer.routing.top_k for layer in manifest.graph.layers if layer.routing), default=0)
    if request.policy == ReusePolicy.name:
        return functools.partial(_foretelling, store.sizes, vram, ram, exclusive=exclusive, top_k=top_k), staged
    order = None if request.static is None else tuple(request.static)

    def plain() -> tuple[TieredCache, None]:
        made = TieredCache(
            vram,
            ram,
            store.sizes,
            request.policy,
            # a fixed list says what the device keeps; below it what was used counts, as the planner has it
            DEFAULT_POLICY if request.policy == "static" else None,
            exclusive=exclusive,
            top_k=top_k,
            seed=request.seed,
            static=order,
        )
        return made, None

    plain()  # refuses what is impossible before anything is loaded
    return plain, staged


def _foretelling(
    sizes: NDArray[np.int64], vram: int, ram: int, *, exclusive: bool, top_k: int
) -> tuple[TieredCache, Ahead]:
    policy = ReusePolicy(*sizes.shape, top_k=top_k)
    cache = AheadCache(vram, ram, sizes, policy, exclusive=exclusive, top_k=top_k)
    return cache, Ahead(cache, policy, sizes)


def _all_of(device: Streams, needed: int) -> int:
    free = device.free_bytes()
    return needed if free is None else min(needed, int(free * _SHARE))


def tier_sizes(sizes: NDArray[np.int64], device_bytes: int, host_bytes: int) -> tuple[int, int, bool]:
    """Return the bytes of both tiers, and whether they must hold different experts.

    RAM keeps copies of what the device has where it is large enough for that and one expert more; then nothing is ever
    copied back. It is left out where it holds no expert.

    Args:
        sizes: ``[layers, experts]`` bytes, whole blocks.
        device_bytes: What the device has for experts.
        host_bytes: What the host has for experts.

    Raises:
        DeviceError: The device does not hold the largest expert.
    """
    total, largest = int(sizes.sum()), int(sizes.max(initial=0))
    vram = min(device_bytes // 4096 * 4096, total)
    if vram < largest:
        raise DeviceError(
            f"{format_bytes(max(0, device_bytes))} of the device are left for experts, and the largest takes "
            f"{format_bytes(largest)}. Give more of the device's memory, or fewer tokens of context."
        )
    ram = min(host_bytes // 4096 * 4096, total)
    if ram < largest:
        return vram, 0, False
    return vram, ram, ram < min(total, vram + largest)
