"""A report's values: the promises of a plan joined with what was measured of its bundle.

Nothing is drawn here. A budget that nobody measured is said to be unmeasured; it is never called met.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeflex.bundle import program_bytes
from edgeflex.errors import InputError
from edgeflex.registry import GPU_BACKENDS, RUNTIME_OF, runtime_of
from edgeflex.schema import Check, Report, Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Literal

    from edgeflex.schema import BenchResult, BundleManifest, LatencyLimit, Plan, RunStats, Statistic, VerifyResult

DROP = "accuracy drop"
_QUANTILES: dict[Statistic, float] = {"p50": 0.50, "p95": 0.95, "p99": 0.99, "worst": 1.0}


def quantile(samples: Sequence[float], share: float) -> float:
    """Return the least sample that at least ``share`` of all samples do not exceed.

    This is the inverse of the empirical distribution (definition 1 of Hyndman and Fan, 1996): it is
    always a latency that happened, never one between two.

    Args:
        samples: At least one value, any order.
        share: In (0, 1]; 1 gives the largest sample.

    Raises:
        InputError: ``samples`` is empty or ``share`` is outside (0, 1].
    """
    if not samples or not 0.0 < share <= 1.0:
        msg = f"quantile {share:g} of {len(samples)} samples: it needs a sample and a share in (0, 1]. Measure first."
        raise InputError(msg)
    # 0.07 * 100 is 7.000000000000001 in floats; without the slack the rank would jump to 8.
    rank = math.ceil(share * len(samples) - 1e-9)
    return sorted(samples)[max(rank, 1) - 1]


def latency_statistic(samples_s: Sequence[float], statistic: Statistic) -> float:
    """Return one statistic of raw latency samples, in seconds.

    Raises:
        InputError: There is no sample.
    """
    if statistic == "mean" and samples_s:
        return math.fsum(samples_s) / len(samples_s)
    return quantile(samples_s, _QUANTILES.get(statistic, 1.0))


def build_report(
    manifest: BundleManifest,
    bench: BenchResult | None,
    verify: VerifyResult | None,
    stats: RunStats | None,
) -> Report:
    """Join a bundle's promises with the measurements that exist of it.

    Args:
        manifest: What was promised.
        bench: Latency and memory, repeated; None if it was not run.
        verify: Accuracy on images that chose nothing; None if it was not run.
        stats: One run; stands in for latency and memory where ``bench`` is missing.

    Raises:
        InputError: A result was measured on another bundle.
    """
    _require_same_bundle(manifest, bench, verify, stats)
    # another runtime's times and bytes say nothing about this plan's
    timed = stats if stats is not None and stats.runtime == runtime_of(manifest.backend) else None
    measured_on = bench or timed
    place = measured_on.device if measured_on is not None else manifest.backend
    verdicts = (
        *_memory_checks(manifest, bench or timed),
        *_latency_checks(manifest.plan, bench, timed),
        *_drop_checks(manifest.plan, verify),
        *_disk_checks(manifest),
    )
    return Report(
        title=f"{manifest.graph.name} on {place}", manifest=manifest, bench=bench, verify=verify, verdicts=verdicts
    )


def _require_same_bundle(
    manifest: BundleManifest, bench: BenchResult | None, verify: VerifyResult | None, stats: RunStats | None
) -> None:
    digest = manifest.digest()
    results = {"bench": bench, "verify": verify, "run": stats}
    faults = [
        f"the {command} result was measured on bundle {result.manifest_digest[:12] or 'unknown'}, "
        f"this bundle is {digest[:12]}; run `edgeflex {command}` on this bundle"
        for command, result in results.items()
        if result is not None and result.manifest_digest != digest
    ]
    if faults:
        raise InputError.collect("results of another bundle cannot be reported", faults)


def _check(
    name: str,
    unit: Literal["bytes", "s", "share"],
    limit: float,
    promised: float,
    measured: float | None,
    *,
    low: float | None = None,
    high: float | None = None,
    note: str = "",
) -> Check:
    """Return a verdict; a ``measured`` of None gives one that is neither met nor broken."""
    return Check(
        name=name,
        unit=unit,
        limit=limit,
        promised=promised,
        measured=0.0 if measured is None else measured,
        low=low,
        high=high,
        ok=measured is not None and measured <= limit,
        note=note,
        was_measured=measured is not None,
    )


def _memory_checks(manifest: BundleManifest, result: BenchResult | RunStats | None) -> Iterator[Check]:
    predicted = manifest.plan.predicted.memory_bytes
    for tier in Tier:
        limit = manifest.plan.budget.memory_bytes.get(tier)
        if limit is None:
            continue
        measured, note = _measured_memory(manifest, tier, result)
        named = manifest.plan.memory_of is not None and tier is not Tier.FLASH
        name = manifest.plan.memory_name if named else tier.budget_name
        yield _check(name, "bytes", limit, predicted.get(tier, limit), measured, note=note)


def _measured_memory(
    manifest: BundleManifest, tier: Tier, result: BenchResult | RunStats | None
) -> tuple[float | None, str]:
    if tier is Tier.FLASH:
        return sum(file.size_bytes for file in manifest.files), "sum of the bundle's files"
    if result is None:
        return None, "not measured: run edgeflex bench"
    on_gpu = getattr(result, "device_memory_bytes", None)
    if on_gpu is not None:
        unified = getattr(result, "unified_memory", None)
        held = result.peak_memory_bytes + on_gpu if unified else on_gpu
        return held, "of process and GPU, one memory" if unified else "what the GPU had less free once it was loaded"
    # A processor has one memory, whatever the tier is called; what a GPU allocates is not the process's.
    if manifest.backend in GPU_BACKENDS or (tier is Tier.DEVICE and manifest.backend not in RUNTIME_OF):
        return None, "not measured: the run saw only the process's own memory"
    return result.peak_memory_bytes, "peak that the model added to the process"


def measured_latency_s(bench: BenchResult | None, statistic: Statistic) -> float | None:
    """Return what the benchmark found for ``statistic``, or None where it found nothing.

    The benchmark's own figure is over images, each the median of its passes; where it gives none, the
    statistic is taken over all samples.
    """
    if bench is None:
        return None
    if statistic in bench.latency_s:
        return bench.latency_s[statistic]
    return latency_statistic(bench.samples_s, statistic) if bench.samples_s else None


def _latency_checks(plan: Plan, bench: BenchResult | None, stats: RunStats | None) -> Iterator[Check]:
    result = bench or stats
    threads = result.threads if result is not None else plan.threads
    for limit in plan.budget.latency:
        measured_s, notes = _latency_found(bench, stats, limit.statistic)
        if threads != plan.threads:
            notes.append(f"measured with threads: {threads}, planned for {plan.threads}")
        yield _latency_check(plan, limit, measured_s, "; ".join(notes))


def _latency_found(
    bench: BenchResult | None, stats: RunStats | None, statistic: Statistic
) -> tuple[float | None, list[str]]:
    measured_s = measured_latency_s(bench, statistic)
    if bench is not None and measured_s is not None:
        over_images = statistic in bench.latency_s
        count = bench.images if over_images else len(bench.samples_s)
        passes = f", median of {bench.repeats} each" if over_images else ""
        what = "images" if over_images else "samples"
        return measured_s, [f"{count:,} {what}{passes}", *_too_few(count, statistic)]
    if stats is not None and stats.requests:
        samples_s = [request.latency_s for request in stats.requests]
        found_s = latency_statistic(samples_s, statistic)
        notes = [f"{len(samples_s):,} samples from one run, not a benchmark"]
        return found_s, [*notes, *_too_few(len(samples_s), statistic)]
    return None, ["not measured: run edgeflex bench"]


def _too_few(count: int, statistic: Statistic) -> list[str]:
    beyond = count - math.ceil(_QUANTILES.get(statistic, 0.5) * count - 1e-9)
    return [f"too few to tell {statistic} from the largest"] if statistic != "worst" and beyond == 0 else []


def _latency_check(plan: Plan, limit: LatencyLimit, measured_s: float | None, note: str) -> Check:
    statistic = limit.statistic
    interval = plan.latency_interval_s.get(statistic)
    return _check(
        f"{statistic} latency",
        "s",
        limit.limit_s,
        plan.predicted.latency_s.get(statistic, limit.limit_s),
        measured_s,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        note=note,
    )


def _drop_checks(plan: Plan, verify: VerifyResult | None) -> Iterator[Check]:
    limit = plan.budget.max_drop
    if limit is None:
        return
    if verify is None or verify.images == 0:
        note = "not measured: run edgeflex verify"
        yield _check(DROP, "share", limit, _promised_drop(plan, limit), None, note=note)
        return
    found = next((check for check in verify.checks if check.name == DROP), None)
    note = found.note if found is not None and found.note else f"{verify.images:,} images"
    low, high = (found.low, found.high) if found is not None else (None, None)
    check = _check(DROP, "share", limit, _promised_drop(plan, limit), verify.drop, low=low, high=high, note=note)
    # A sample of images errs: the budget is broken only where the whole interval lies beyond it.
    yield check if low is None else check.model_copy(update={"ok": low <= limit})


def _promised_drop(plan: Plan, limit: float) -> float:
    if plan.predicted_drop is not None:
        return plan.predicted_drop
    return plan.certificate.drop if plan.certificate is not None else limit


def _disk_checks(manifest: BundleManifest) -> Iterator[Check]:
    limit = manifest.plan.budget.disk_bytes
    if limit is None:
        return
    measured = program_bytes(manifest) or None
    note = "" if measured else "not measured: the manifest names no program file"
    yield _check("program size", "bytes", limit, manifest.plan.predicted.disk_bytes, measured, note=note)
