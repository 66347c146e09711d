"""Promise against measurement: latency, memory and size of a bundle on this machine."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.bundle import program_bytes
from edgeflex.errors import InputError
from edgeflex.progress import Silent
from edgeflex.registry import GPU_BACKENDS
from edgeflex.runtimes import open_session
from edgeflex.runtimes.measure import measure_memory
from edgeflex.schema import BenchResult, Check, Conditions, Interval, Tier
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeflex.bundle import Bundle
    from edgeflex.progress import Progress
    from edgeflex.runtimes import Session
    from edgeflex.runtimes.measure import ModelMemory
    from edgeflex.schema import Plan

    Float32 = NDArray[np.float32]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "worst": 1.0}
# A prediction of memory holds within this share of itself.
MEMORY_TOLERANCE = 0.10
_FORCED_CALLS = 32


def bench(
    bundle: Bundle,
    images: Float32,
    *,
    repeats: int = 5,
    threads: int = 1,
    warmup: int = 20,
    seed: int = 0,
    device: str = "this machine",
    conditions: Callable[[], Conditions] = Conditions,
    memory: Callable[[Bundle, int], ModelMemory] = measure_memory,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure ``bundle`` and hold its promises against the result.

    Every image is answered once per pass, in an order that ``seed`` shuffles anew for each, so that a slow
    minute of the machine falls on all images alike. An image's latency is its median over the passes; mean and
    quantiles are over images. Memory is measured in a process of its own before.

    Args:
        bundle: A checked bundle.
        images: ``[n, C, H, W]``, prepared.
        repeats: Passes.
        threads: Threads of the pool.
        warmup: Inferences through all segments before the first pass.
        seed: Seed of the orders.
        device: What the machine is called in the result.
        conditions: Reads the machine's state, before and after.
        memory: Measures what the bundle adds, given it and the threads.
        clock: Seconds, rising.
        progress: Told about passes.

    Returns:
        The result; ``samples_s`` holds all raw samples, pass by pass, images in their order.

    Raises:
        InputError: There are no images, or no repeats, or the images have the wrong shape.
        DeviceError: The backend failed.
    """
    if len(images) == 0 or repeats < 1:
        raise InputError(f"{len(images)} images and {repeats} repeats: at least 1 of each is needed.")
    plan = bundle.manifest.plan
    held = memory(bundle, threads)
    before = conditions()
    singles = [np.ascontiguousarray(images[i : i + 1], dtype=np.float32) for i in range(len(images))]
    with open_session(bundle, threads=threads) as session, _without_collector():
        _warm(session, singles[0], warmup)
        samples, exits = _passes(
            session,
            singles,
            plan.thresholds,
            repeats=repeats,
            order=np.random.default_rng(seed),
            clock=clock,
            progress=progress or Silent(),
        )
        per_image = np.median(samples, axis=0)
        exit_latency_s = _exit_latencies(session, singles, per_image, exits, clock)
    latency_s = latency_statistics(per_image)
    shares = np.bincount(exits, minlength=session.segment_count) / len(singles)
    return BenchResult(
        manifest_digest=bundle.manifest.digest(),
        device=device,
        threads=threads,
        images=len(singles),
        repeats=repeats,
        checks=(*_latency_checks(plan, latency_s), *_memory_checks(plan, held), *disk_checks(bundle)),
        latency_s=latency_s,
        exit_latency_s=exit_latency_s,
        exit_shares=tuple(shares.tolist()),
        samples_s=tuple(samples.ravel().tolist()),
        peak_memory_bytes=held.model_bytes,
        runtime_memory_bytes=held.runtime_bytes,
        before=before,
        after=conditions(),
        device_memory_bytes=held.device_bytes,
        unified_memory=held.unified,
    )


def latency_statistics(per_image_s: NDArray[np.float64]) -> dict[str, float]:
    """Return mean and quantiles; a quantile is the least sample that enough samples do not exceed."""
    statistics = {"mean": float(per_image_s.mean())}
    for name, share in QUANTILES.items():
        statistics[name] = float(np.quantile(per_image_s, share, method="inverted_cdf"))
    return statistics


def disk_checks(bundle: Bundle) -> list[Check]:
    """Return the promised size of the program against the file, and against the budget if there is one."""
    plan = bundle.manifest.plan
    measured = program_bytes(bundle.manifest)
    promised = plan.predicted.disk_bytes
    checks = [
        Check(
            name="program size",
            unit="bytes",
            limit=None,
            promised=promised,
            measured=measured,
            low=promised,
            high=promised,
            ok=measured == promised,
            note="" if measured == promised else f"{measured - promised:+d} bytes; the promise is exact",
        )
    ]
    if plan.budget.disk_bytes is not None:
        checks.append(_budget("program size", "bytes", plan.budget.disk_bytes, promised, measured))
    return checks


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python's garbage collector out of the samples."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _warm(session: Session, x: Float32, count: int) -> None:
    never = (None,) * session.segment_count
    for _ in range(max(count, 1)):
        session.infer(x, never)


def _passes(
    session: Session,
    singles: Sequence[Float32],
    thresholds: Sequence[float | None],
    *,
    repeats: int,
    order: np.random.Generator,
    clock: Callable[[], float],
    progress: Progress,
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return seconds ``[repeats, n]`` and exits ``[n]``."""
    samples = np.zeros((repeats, len(singles)))
    exits = np.zeros(len(singles), dtype=np.intp)
    with progress.task("bench", repeats) as advance:
        for number in range(repeats):
            for index in order.permutation(len(singles)).tolist():
                x = singles[index]
                start = clock()
                outcome = session.infer(x, thresholds)
                samples[number, index] = clock() - start
                exits[index] = outcome.exit
            advance(1)
    return samples, exits


def _exit_latencies(
    session: Session,
    singles: Sequence[Float32],
    per_image_s: NDArray[np.float64],
    exits: NDArray[np.intp],
    clock: Callable[[], float],
) -> tuple[float, ...]:
    """Return the median seconds of those that leave at each exit; where none does, they are made to."""
    return tuple(
        float(np.median(per_image_s[exits == k])) if (exits == k).any() else _forced_s(session, singles, k, clock)
        for k in range(session.segment_count)
    )


def _forced_s(session: Session, singles: Sequence[Float32], exit_: int, clock: Callable[[], float]) -> float:
    thresholds = [None if k != exit_ else 0.0 for k in range(session.segment_count)]
    taken: list[float] = []
    for number in range(_FORCED_CALLS):
        x = singles[number % len(singles)]
        start = clock()
        session.infer(x, thresholds)
        taken.append(clock() - start)
    return float(np.median(taken))


def _latency_checks(plan: Plan, latency_s: Mapping[str, float]) -> list[Check]:
    checks = [
        _promise(f"{statistic} latency", "s", span, latency_s[statistic])
        for statistic, span in sorted(plan.latency_interval_s.items())
    ]
    for limit in plan.budget.latency:
        promised = plan.predicted.latency_s.get(limit.statistic, limit.limit_s)
        measured = latency_s[limit.statistic]
        checks.append(_budget(f"{limit.statistic} latency", "s", limit.limit_s, promised, measured))
    return checks


def _memory_checks(plan: Plan, memory: ModelMemory) -> list[Check]:
    """A processor's device and host tiers are one memory, so each limit is held against the same bytes.

    So are those of a plan for a GPU, whose memory it is about; see ``Plan.memory_of``.
    """
    promised = plan.memory.model_bytes
    span = Interval(value=promised, low=(1 - MEMORY_TOLERANCE) * promised, high=(1 + MEMORY_TOLERANCE) * promised)
    held, told = counted_memory(plan, memory)
    check = _promise(plan.memory_name, "bytes", span, held or 0)
    check = check.model_copy(update={"note": "; ".join(part for part in (check.note, told) if part)})
    checks = [check]
    for tier, limit in sorted(plan.budget.memory_bytes.items()):
        if tier is not Tier.FLASH:
            name = plan.memory_name if plan.memory_of else tier.budget_name
            expected = plan.predicted.memory_bytes.get(tier, promised)
            checks.append(_budget(name, "bytes", limit, expected, held or 0))
    if held is not None:
        return checks
    unseen = {"measured": 0.0, "ok": False, "was_measured": False, "note": told}
    return [check.model_copy(update=unseen) for check in checks]


def counted_memory(plan: Plan, memory: ModelMemory) -> tuple[int | None, str]:
    """Return the bytes that a plan's memory is about, None where nobody saw them, and what is to be said of them."""
    if plan.backend not in GPU_BACKENDS:
        peak = memory.load_peak_bytes
        rise = f"highest rise while loading {format_bytes(peak or 0)}, pages of the program file included"
        return memory.model_bytes, "" if peak is None else rise
    if memory.device_bytes is None:
        return None, "the process does not see what the GPU holds"
    process, device = format_bytes(memory.model_bytes), format_bytes(memory.device_bytes)
    if memory.unified:
        return memory.model_bytes + memory.device_bytes, f"{process} of the process and {device} of the GPU, one memory"
    return memory.device_bytes, f"what the GPU had less free; the process took {process} beside"


def _promise(name: str, unit: str, span: Interval, measured: float) -> Check:
    """A promise is kept from above: to be faster or smaller than predicted breaks nothing, but is said."""
    note = f"{measured / span.value:.2f} times the promise" if span.value > 0 else ""
    if measured < span.low:
        note += ", below the predicted range"
    return Check.model_validate(
        {
            "name": name,
            "unit": unit,
            "limit": None,
            "promised": span.value,
            "measured": measured,
            "low": span.low,
            "high": span.high,
            "ok": measured <= span.high,
            "note": note,
        }
    )


def _budget(name: str, unit: str, limit: float, promised: float, measured: float) -> Check:
    return Check.model_validate(
        {
            "name": f"{name} budget",
            "unit": unit,
            "limit": limit,
            "promised": promised,
            "measured": measured,
            "ok": measured <= limit,
        }
    )
