"""A decoder's report: promises joined with measurements, and drawn as one self-contained HTML page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from edgeflex.errors import InputError
from edgeflex.files import write_atomic
from edgeflex.pace import pace, pace_sentences
from edgeflex.reports import decoder_device, decoder_placement, decoder_sections, summary
from edgeflex.reports.html import render
from edgeflex.reports.sections import check_row
from edgeflex.reports.summary import format_seconds, state_of
from edgeflex.schema import Check, Document
from edgeflex.schema_moe import DecoderBench, DecoderManifest, DecoderRunStats, DecoderVerify, MissPoint  # noqa: TC001 - pydantic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from edgeflex.schema_gpu import DeviceRecord

_BUDGET = " budget"
_FINDINGS = {
    "fits": ("good", "fits", "Every expert stays in memory."),
    "offload": ("good", "offload", "Experts are read from storage when they are needed."),
    "decline": ("bad", "decline", "This decoder is not worth starting on this device within this budget."),
}
_ON_GPU = {
    "fits": "Every expert stays in the GPU's memory.",
    "offload": "The GPU's memory holds a part of the experts.",
    "decline": _FINDINGS["decline"][2],
}


class DecoderReportDocument(Document):
    """What a page about a decoder is drawn from; ``verdicts`` are of budgets, ``checks`` of all other promises."""

    kind: Literal["decoder"] = "decoder"
    title: str
    manifest: DecoderManifest
    bench: DecoderBench | None
    stats: DecoderRunStats | None
    points: tuple[MissPoint, ...]
    verdicts: tuple[Check, ...]
    checks: tuple[Check, ...]

    @property
    def runs(self) -> tuple[DecoderRunStats, ...]:
        """The measured generations: the benchmark's, else the one run, else none."""
        if self.bench is not None and self.bench.runs:
            return self.bench.runs
        return () if self.stats is None else (self.stats,)

    @property
    def device(self) -> DeviceRecord | None:
        """What the benchmark says of a device, where it ran on one."""
        return None if self.bench is None else self.bench.device


def build_decoder_report(
    manifest: DecoderManifest,
    bench: DecoderBench | None,
    stats: DecoderRunStats | None,
    points: Sequence[MissPoint] = (),
    verify: DecoderVerify | None = None,
) -> DecoderReportDocument:
    """Join a decoder's promises with the measurements that exist of it.

    Args:
        manifest: What was promised.
        bench: Repeated generations; None if it was not run.
        stats: One run; stands in for speed and memory where ``bench`` is missing.
        points: Replays of the routing trace at several cache sizes.
        verify: What ``edgeflex verify`` found; None if it was not run.

    Raises:
        InputError: A result was measured on another bundle.
    """
    _require_same_bundle(manifest, {"bench": bench, "verify": verify, "run": stats})
    verdicts = tuple(_verdicts(manifest, bench, stats))
    checks = [check for result in (bench, verify) if result is not None for check in result.checks]
    others = tuple(_other_checks(verdicts, checks))
    runs = bench.runs if bench is not None and bench.runs else (() if stats is None else (stats,))
    place = runs[0].device if runs else manifest.backend
    return DecoderReportDocument(
        title=f"{manifest.graph.name} on {place}",
        manifest=manifest,
        bench=bench,
        stats=stats,
        points=tuple(points),
        verdicts=verdicts,
        checks=others,
    )


def further(report: DecoderReportDocument) -> Iterator[Check]:
    """Give the promises beside the budgets; one that shares a budget's name says which of the two it is."""
    budgets = {one.name for one in report.verdicts}
    for check in report.checks:
        promise = f"{check.name} as promised"
        yield check.model_copy(update={"name": promise}) if check.name in budgets else check


def to_decoder_html(report: DecoderReportDocument) -> str:
    """Return the page: no script, nothing fetched, equal bytes for equal values."""
    manifest, runs = report.manifest, report.runs
    plan = manifest.plan
    state, word, finding = _FINDINGS[plan.verdict]
    if plan.gpu is not None:
        finding = _ON_GPU[plan.verdict]
    return render(
        "decoder.html.j2",
        title=report.title,
        manifest=manifest,
        plan=plan,
        runs=runs,
        bench=report.bench,
        sentence=outcome(report)[1],
        finding={"state": state, "word": word, "sentence": finding},
        verdicts=[check_row(check, budget=True) for check in report.verdicts],
        others=[check_row(check, budget=False) for check in further(report)],
        speed=_speed(report),
        memory=decoder_sections.memory_bars(plan, max(runs, key=held_bytes, default=None)),
        held=decoder_sections.memory_section(plan, runs),
        placement=decoder_placement.placement_section(plan),
        device=decoder_device.device_section(report.device),
        gpu_memory=decoder_device.gpu_memory_bars(plan, report.device),
        hits=decoder_sections.hits_section(plan, report.points, None if report.device else _measured_hits(runs)),
        time=decoder_sections.time_section(plan, runs),
        uses=decoder_sections.use_section(manifest, runs, on_device=report.device is not None),
        precisions=decoder_sections.precision_section(manifest),
        quality=decoder_sections.quality_rows(manifest),
        commands=decoder_sections.commands(manifest),
    )


def _speed(report: DecoderReportDocument) -> tuple[str, ...]:
    """Return what the machine's speed explains of the measured promises about time."""
    states = [state for run in report.runs for state in (run.before, run.after)]
    found = pace(report.manifest.plan.conditions, states, decoder=True)
    return pace_sentences(found, (*report.verdicts, *report.checks))


def save_decoder_report(report: DecoderReportDocument, path: Path) -> None:
    """Write the page whole or not at all.

    Raises:
        DeviceError: The disk is full.
        InputError: The path cannot be written.
    """
    write_atomic(path, to_decoder_html(report))


def outcome(report: DecoderReportDocument) -> tuple[summary.State, str]:
    """Return the report in a few plain sentences, and its state."""
    states = [state_of(check) for check in report.verdicts]
    broken = [check.name for check in report.checks if state_of(check) == "bad"]
    sentences = [summary.budget_sentence(report.verdicts)]
    if broken:
        many = "promise is" if len(broken) == 1 else "promises are"
        sentences.append(f"{len(broken)} further {many} not kept: {', '.join(broken)}.")
    sentences.append(_speed_sentence(report))
    if "bad" in states or broken:
        return "bad", " ".join(sentences)
    return ("good" if states and "unknown" not in states else "unknown"), " ".join(sentences)


def held_bytes(run: DecoderRunStats) -> int:
    """Return all that a run held: what the bundle added to the process, and the runtime's own."""
    return run.peak_memory_bytes + run.runtime_memory_bytes


def _speed_sentence(report: DecoderReportDocument) -> str:
    promised = f"{format_seconds(report.manifest.plan.predicted.token_s.value)} per token promised"
    checked = (one.measured for one in report.checks if one.name == "time per token" and one.was_measured)
    mean_s = next(checked, None) or _mean_token_s(report.runs)  # the same figure as in the table below
    if mean_s is None:
        return f"{promised}, not measured."
    if report.device is not None and report.manifest.plan.gpu is None:
        rate = f"{1 / mean_s:.1f} tokens/s"
        return f"{promised} on the processor; {format_seconds(mean_s)} measured on {report.device.name} ({rate})."
    return f"{promised}, {format_seconds(mean_s)} measured ({1 / mean_s:.1f} tokens/s)."


def _mean_token_s(runs: Sequence[DecoderRunStats]) -> float | None:
    times = [time.total_s for run in runs for time in run.times]
    total_s = math.fsum(times)
    return total_s / len(times) if total_s > 0 else None


def _measured_hits(runs: Sequence[DecoderRunStats]) -> tuple[int, float] | None:
    hits = sum(run.cache.decode_hits for run in runs)
    uses = hits + sum(run.cache.decode_misses for run in runs)
    return (runs[0].cache.capacity_bytes, hits / uses) if uses else None


def _require_same_bundle(
    manifest: DecoderManifest, results: Mapping[str, DecoderBench | DecoderVerify | DecoderRunStats | None]
) -> None:
    digest = manifest.digest()
    faults = [
        f"the {command} result was measured on bundle {result.manifest_digest[:12] or 'unknown'}, "
        f"this bundle is {digest[:12]}; run `edgeflex {command}` on this bundle"
        for command, result in results.items()
        if result is not None and result.manifest_digest != digest
    ]
    if faults:
        raise InputError.collect("results of another bundle cannot be reported", faults)


def _other_checks(verdicts: Sequence[Check], checks: Sequence[Check]) -> Iterator[Check]:
    """Give what was checked beyond the budgets, each name once; what only repeats a budget's verdict is left out."""
    told = {(one.name, one.measured, one.ok) for one in verdicts if one.was_measured}
    names: set[str] = set()
    for check in checks:
        if check.name.endswith(_BUDGET) or check.name in names:
            continue
        if (check.name, check.measured, check.ok) not in told:
            names.add(check.name)
            yield check


# --- verdicts ----------------------------------------------------------------------------------------


def _verdicts(manifest: DecoderManifest, bench: DecoderBench | None, stats: DecoderRunStats | None) -> Iterator[Check]:
    """Give a verdict on every budget: the benchmark's own where it has one, else from the run or the manifest."""
    budget, said = manifest.plan.budget, manifest.plan.predicted
    benched = {check.name.removesuffix(_BUDGET): check for check in (bench.checks if bench is not None else ())
               if check.name.endswith(_BUDGET)}  # fmt: skip
    one = None if stats is None else _mean_token_s((stats,))
    near = stats is not None and abs(stats.prompt_tokens - budget.prompt_tokens) <= 0.1 * budget.prompt_tokens
    files = sum(file.size_bytes for file in manifest.files)
    rows: tuple[tuple[str, Literal["bytes", "s", "count", "share"], float | None, float, float | None, str], ...] = (
        (
            "memory",
            "bytes",
            budget.memory_bytes,
            said.memory.total_bytes,
            None if stats is None else held_bytes(stats),
            "from one run, not a benchmark",
        ),
        ("time per token", "s", budget.token_s, said.token_s.value, one, "from one run, not a benchmark"),
        (
            "time to first token",
            "s",
            budget.first_token_s,
            said.first_token_s.value,
            stats.first_token_s if stats is not None and near else None,
            f"for {budget.prompt_tokens} prompt tokens",
        ),
        ("disk", "bytes", budget.disk_bytes, said.disk_bytes, files, "sum of the bundle's files"),
        ("KL divergence", "count", budget.kl_limit, said.kl, manifest.measured_kl, "nats per token from fp32"),
        ("perplexity rise", "share", budget.max_perplexity_rise, math.expm1(said.kl), _rise(manifest), "over fp32's"),
    )
    for name, unit, limit, promised, measured, note in rows:
        if limit is None:
            continue
        found = benched.pop(name, None)
        if found is not None:
            yield found.model_copy(update={"name": name})
            continue
        yield Check(
            name=name,
            unit=unit,
            limit=limit,
            promised=promised,
            measured=0.0 if measured is None else measured,
            ok=measured is not None and measured <= limit,
            note=note if measured is not None else f"not measured: run edgeflex bench; {note}",
            was_measured=measured is not None,
        )
    if "vram" in benched:
        yield benched["vram"].model_copy(update={"name": "vram"})
    elif budget.vram_bytes is not None:
        told = "not measured: run edgeflex bench --device cuda"
        yield Check(
            name="vram",
            unit="bytes",
            limit=budget.vram_bytes,
            promised=budget.vram_bytes if manifest.plan.gpu is None else manifest.plan.gpu.memory.total_bytes,
            measured=0.0,
            ok=False,
            note=told,
            was_measured=False,
        )


def _rise(manifest: DecoderManifest) -> float | None:
    """Return how much higher the measured perplexity is than fp32's, as a fraction."""
    if manifest.measured_perplexity is None or not manifest.reference_perplexity:
        return None
    return manifest.measured_perplexity / manifest.reference_perplexity - 1.0
