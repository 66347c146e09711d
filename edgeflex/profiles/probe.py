"""Measures this machine into a profile: memory, storage, kernels, and CUDA where present.

Every measurement notes load, clock, temperature and speed before and after, since a figure from a busy or
throttled machine is a figure about that state.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from edgeflex.profiles.cuda import cuda, cuda_problem
from edgeflex.profiles.kernels import KernelJob, kernel_grid, measure_kernels
from edgeflex.profiles.machine import MachineFacts, conditions, machine
from edgeflex.profiles.samples import summarise
from edgeflex.profiles.storage import storage
from edgeflex.progress import Progress, Silent
from edgeflex.schema import Conditions, DeviceProfile, Figure, Tier, TierSpec
from edgeflex.units import format_count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgeflex.profiles.cuda import CudaFacts
    from edgeflex.schema import Kernel, LayerKind, Precision

__all__ = ["measure", "memory_read", "slug", "summarise"]

_BUFFER_BYTES = 256 << 20
_PASSES = 9
# More waiting processes per core than this before we start, and the figures are about a crowd.
_CROWDED = 0.5


def memory_read(
    threads: int,
    *,
    buffer_bytes: int = _BUFFER_BYTES,
    passes: int = _PASSES,
    clock: Callable[[], float] = time.perf_counter,
) -> Figure:
    """Measure how fast ``threads`` threads together read memory, in bytes per second.

    Each thread takes the maximum of its own slice of a buffer of 32-bit integers: one vector instruction per
    load, so that the loads are the limit, with the interpreter lock released. The buffer holds distinct
    numbers, since pages of zeros share one page and would be read from cache.
    """
    import numpy as np

    buffer = np.arange(buffer_bytes // 4, dtype=np.int32)
    slices = np.array_split(buffer, threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for repeat in range(passes + 1):
            start = clock()
            list(pool.map(np.max, slices))
            elapsed = clock() - start
            if repeat > 0:  # the first pass starts the threads
                rates.append(buffer.nbytes / elapsed)
    by = format_count(threads, "thread")
    source = f"maximum over {buffer.nbytes >> 20} MiB of int32, {by}, median of {passes} passes"
    return summarise(rates, source)


def measure(
    name: str | None = None,
    *,
    quick: bool = False,
    threads: Sequence[int] = (1,),
    precisions: Mapping[LayerKind, Sequence[Precision]] | None = None,
    run_kernel: Callable[[KernelJob], Sequence[float]] | None = None,
    call_cost: Callable[[], tuple[Figure, Figure]] | None = None,
    backend: str | None = None,
    versions: Mapping[str, str] | None = None,
    storage_folder: Path | None = None,
    journal: Path | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
    root: Path = Path("/"),
) -> DeviceProfile:
    """Measure this machine.

    Args:
        name: The profile's name; by default made from the processor's, never from the host's.
        quick: Fewer patterns and kernels, well under half a minute.
        threads: Thread counts for kernels.
        precisions: What the backend runs per layer kind; which kernels are timed follows from it.
        run_kernel: Times one kernel and returns raw seconds; without it no kernel is timed.
        call_cost: Returns the fixed seconds per call and per delegate.
        backend: What the kernels run through.
        versions: Versions of what was measured, kept in the conditions.
        storage_folder: Where the storage probe writes; by default the user's cache.
        journal: Keeps finished kernels, so that a killed profile goes on; not removed here.
        progress: Who hears of progress.
        clock: Seconds, never backwards.
        root: Start of the file tree that tells about the machine.

    Raises:
        DeviceError: The disk is full, or a measurement gave nothing usable.
        InputError: A folder or the journal cannot be used.
    """
    heard = progress or Silent()
    facts = machine(root)
    states = {"before": conditions(root)}
    host = _host_tier(facts, heard, clock)
    states["after_memory"] = conditions(root)
    reads = storage(storage_folder, quick=quick, progress=heard, clock=clock)
    states["after_storage"] = conditions(root)
    gpu = cuda(threads=facts.logical_cores or 1, clock=clock)
    jobs = kernel_grid(precisions or {}, quick=quick, threads=threads) if run_kernel else ()
    kernels: tuple[Kernel, ...] = ()
    if run_kernel is not None:
        context = _context(facts, backend, versions or {})
        kernels = measure_kernels(jobs, run=run_kernel, journal=journal, context=context, progress=heard)
    call_s, delegate_s = call_cost() if call_cost is not None else (None, None)
    states["after"] = conditions(root)
    return DeviceProfile(
        name=name or slug(facts.cpu_model or "unknown-machine"),
        title=_title(facts),
        origin="measured",
        backend=backend,
        cpu_model=facts.cpu_model,
        cores=facts.physical_cores or facts.logical_cores,
        isa=facts.isa if gpu is None else (*facts.isa, gpu.isa),
        unified_memory=_unified(facts, gpu),
        tiers=(host, gpu.tier) if gpu is not None and not gpu.integrated else (host,),
        links=gpu.links if gpu is not None else (),
        storage=reads,
        compute=gpu.compute if gpu is not None else (),
        kernels=kernels,
        call_s=call_s,
        delegate_s=delegate_s,
        overlap=gpu.overlap if gpu is not None else None,
        conditions=_recorded(states, facts, gpu, versions or {}),
        notes=_notes(states["before"], facts, gpu, reads_direct=all(read.direct for read in reads)),
    )


def slug(text: str) -> str:
    """Return ``text`` as a name: lower case, digits and single hyphens.

    >>> slug("Intel(R) Core(TM) i7-1185G7 @ 3.00GHz")
    'intel-core-i7-1185g7-3-00ghz'
    """
    plain = re.sub(r"\((r|tm|c)\)", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _title(facts: MachineFacts) -> str:
    parts = [part for part in (facts.board, facts.cpu_model) if part]
    cores = f", {facts.physical_cores} cores" if facts.physical_cores else ""
    return (", ".join(parts) or "this machine") + cores


def _context(facts: MachineFacts, backend: str | None, versions: Mapping[str, str]) -> str:
    """Return a short digest of what kernel times depend on besides the job."""
    known = {"cpu": facts.cpu_model, "isa": facts.isa, "backend": backend, "versions": dict(versions)}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _host_tier(facts: MachineFacts, progress: Progress, clock: Callable[[], float]) -> TierSpec:
    buffer_bytes = _buffer_bytes(facts)
    with progress.task("memory", 2) as advance:
        one = memory_read(1, buffer_bytes=buffer_bytes, clock=clock)
        advance(1)
        every = memory_read(facts.logical_cores or 1, buffer_bytes=buffer_bytes, clock=clock)
        advance(1)
    capacity = None
    if facts.ram_bytes is not None:
        capacity = Figure(value=float(facts.ram_bytes), origin="measured", source="memory that the kernel manages")
    return TierSpec(
        tier=Tier.HOST,
        capacity_bytes=capacity,
        read_bytes_per_s=every,
        read_one_thread_bytes_per_s=one,
    )


def _buffer_bytes(facts: MachineFacts) -> int:
    """Return 256 MiB or four times the last-level cache, but at most an eighth of memory."""
    wanted = max(_BUFFER_BYTES, 4 * (facts.l3_bytes or 0))
    return min(wanted, facts.ram_bytes // 8) if facts.ram_bytes else wanted


def _unified(facts: MachineFacts, gpu: CudaFacts | None) -> bool | None:
    if facts.is_jetson:
        return True
    return gpu.integrated if gpu is not None else None


def _recorded(
    states: Mapping[str, Conditions], facts: MachineFacts, gpu: CudaFacts | None, versions: Mapping[str, str]
) -> dict[str, str | float]:
    recorded: dict[str, str | float] = {}
    for when, state in states.items():
        recorded.update({f"{field}_{when}": value for field, value in state if value is not None})
    named = {
        "board": facts.board,
        "jetson_release": facts.jetson_release,
        "gpu": gpu.name if gpu is not None else None,
        "logical_cores": facts.logical_cores,
    }
    recorded.update({key: value for key, value in named.items() if value is not None})
    recorded.update({f"version_{key}": value for key, value in versions.items()})
    return recorded


def _notes(before: Conditions, facts: MachineFacts, gpu: CudaFacts | None, *, reads_direct: bool) -> tuple[str, ...]:
    notes = []
    cores = facts.logical_cores or 1
    if before.load_average is not None and before.load_average > _CROWDED * cores:
        notes.append(
            f"The machine was busy before the measurement: load average {before.load_average:.2f} on {cores} cores."
        )
    if not reads_direct:
        notes.append("The file system refuses O_DIRECT: storage was read through the page cache, dropped before.")
    if gpu is None or gpu.overlap is None:
        why = cuda_problem() if gpu is None else "CPU and GPU share one memory"
        notes.append(f"What copies to a GPU and computing lose beside each other was not measured: {why}.")
    return tuple(notes)
