"""What each section of the page shows: rows of text and charts, made from a report's values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from edgeflex.errors import InputError
from edgeflex.registry import GPU_BACKENDS
from edgeflex.reports import charts, summary
from edgeflex.reports.build import DROP, latency_statistic, measured_latency_s
from edgeflex.reports.charts import Axis, Mark, Rule
from edgeflex.reports.summary import format_seconds, format_value
from edgeflex.schema import Precision, Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgeflex.reports.svg import Markup
    from edgeflex.schema import (
        BenchResult,
        Budget,
        BundleManifest,
        Check,
        CostTable,
        Curve,
        CurvePoint,
        Example,
        Layer,
        Plan,
        Report,
        Statistic,
    )

_STATISTICS: tuple[Statistic, ...] = ("mean", "p50", "p95", "p99", "worst")
_MANY_LAYERS = 20
_MAX_STRIP_LAYERS = 240
_Item = TypeVar("_Item")


# --- verdicts ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckRow:
    """A check as the page shows it."""

    name: str
    state: str
    word: str
    limit: str
    promised: str
    interval: str
    measured: str
    sampling: str
    error: str
    note: str
    gauge: Markup | None


def check_row(check: Check, *, budget: bool) -> CheckRow:
    """Return a check as the page shows it."""
    name, limit, promised, measured, word = summary.row(check, budget=budget)
    return CheckRow(
        name=name,
        state=summary.state_of(check),
        word=word,
        limit=limit,
        promised=promised,
        interval="" if check.name == DROP else _interval(check),
        sampling=_interval(check) if check.name == DROP else "",
        measured=measured,
        error=summary.format_error(check),
        note=check.note,
        gauge=_gauge(check),
    )


def _interval(check: Check) -> str:
    if check.low is not None and check.high is not None:
        return f"{format_value(check.low, check.unit)} to {format_value(check.high, check.unit)}".replace("-", "−")
    if check.high is not None:
        return f"at most {format_value(check.high, check.unit)}"
    return f"at least {format_value(check.low, check.unit)}" if check.low is not None else ""


def _gauge(check: Check) -> Markup | None:
    """Return the measurement as a share of the limit; the limit stands at four fifths of the width."""
    if not check.limit:
        return None
    share = check.measured / check.limit * 0.8 if check.was_measured else 0.0
    name = f"gauge-{summary.state_of(check)}"
    words = f"{check.name}: {share / 0.8 * 100:.0f} % of the limit" if check.was_measured else "not measured"
    return charts.share_bar(words, [(name, share)], mark=0.8)


# --- Pareto curve ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PointRow:
    """A point of the curve, of the baselines, or of the comparison with static models."""

    label: str
    kind: charts.Kind
    latency: str
    memory: str
    drop: str
    sign: Markup


@dataclass(frozen=True, slots=True)
class FigureSection:
    """A chart with the rows behind it and a sentence on it."""

    chart: Markup
    rows: tuple[PointRow, ...]
    sentence: str = ""


def pareto_section(report: Report) -> FigureSection | None:
    """Return the curve with its baselines and limits, or None where the bundle keeps none."""
    curve = report.manifest.curve
    if curve is None or not curve.points:
        return None
    axes = charts.curve_axes((*curve.points, *curve.baselines))
    marks = [_curve_mark(point, axes, "chosen" if point.chosen else "plan") for point in curve.points]
    marks += [_curve_mark(point, axes, "baseline") for point in curve.baselines]
    frontier = charts.front([(charts.coordinate(p, axes[0]), charts.coordinate(p, axes[1])) for p in curve.points])
    rules = list(_budget_rules(report.manifest.plan.budget, axes))
    title = f"Pareto curve: {axes[1].title} against {axes[0].title}, {len(curve.points)} plans"
    chart = charts.both_widths(lambda width: charts.scatter(title, marks, axes, width, frontier=frontier, rules=rules))
    return FigureSection(chart, tuple(_curve_rows(curve)))


def _curve_mark(point: CurvePoint, axes: tuple[Axis, Axis], kind: charts.Kind) -> Mark:
    label = f"chosen: {point.label}" if kind == "chosen" else point.label
    return Mark(label, charts.coordinate(point, axes[0]), charts.coordinate(point, axes[1]), kind, kind != "plan")


def _curve_rows(curve: Curve) -> Iterator[PointRow]:
    for point in sorted(curve.points, key=lambda point: point.latency_s):
        yield _point_row(point, "chosen" if point.chosen else "plan")
    for point in curve.baselines:
        yield _point_row(point, "baseline")


def _point_row(point: CurvePoint, kind: charts.Kind) -> PointRow:
    return PointRow(
        label=point.label,
        kind=kind,
        latency=format_seconds(point.latency_s),
        memory=format_value(point.memory_bytes, "bytes"),
        drop=format_value(point.drop, "share"),
        sign=charts.legend_sign(kind),
    )


def _budget_rules(budget: Budget, axes: tuple[Axis, Axis]) -> Iterator[Rule]:
    quantities = {axis.quantity: along for axis, along in zip(axes, ("x", "y"), strict=True)}
    for limit in budget.latency:
        # The curve's latencies are of the statistic that is minimised; another's limit has no place on it.
        if limit.statistic == budget.statistic and "s" in quantities:
            yield Rule("x", limit.limit_s, f"limit {format_seconds(limit.limit_s)}")
    if budget.max_drop is not None and "share" in quantities:
        yield Rule("y", budget.max_drop, f"limit {format_value(budget.max_drop, 'share')}")


# --- exits -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExitRow:
    """An exit, promised and measured."""

    name: str
    stage: str
    threshold: str
    promised: str
    measured: str
    bar: Markup
    accuracy: str
    accuracy_of_leavers: str
    ece: str
    auroc: str
    latency: str


def exit_rows(report: Report) -> tuple[ExitRow, ...]:
    """Return every exit, promised and measured."""
    return tuple(_exit_row(report, index) for index in range(len(report.manifest.graph.exits)))


def _exit_row(report: Report, index: int) -> ExitRow:
    plan, bench, verify = report.manifest.plan, report.bench, report.verify
    point = report.manifest.graph.exits[index]
    promised = _at(plan.exit_shares, index)
    measured = _at(bench.exit_shares, index) if bench is not None else None
    quality = _at(verify.exits, index) if verify is not None else None
    threshold = _at(plan.thresholds, index)
    last = index == len(report.manifest.graph.exits) - 1
    latency_s = _at(bench.exit_latency_s, index) if bench is not None else None
    shown = promised if measured is None else measured
    words = f"exit {point.name}: {_share(promised)} promised, {_share(measured)} measured"
    return ExitRow(
        name=point.name,
        stage=f"after {point.stage}" if point.stage else "at the end",
        threshold=_leaves_from(threshold, last=last),
        promised=_share(promised),
        measured=_share(measured),
        bar=charts.share_bar(words, [("fill" if measured is not None else "fill-soft", shown or 0.0)], mark=promised),
        accuracy=_share(quality.accuracy if quality else None),
        accuracy_of_leavers=_share(quality.accuracy_of_leavers if quality else None),
        ece=f"{quality.ece:.3f}" if quality else summary.ABSENT,
        auroc=f"{quality.auroc:.3f}" if quality and quality.auroc is not None else summary.ABSENT,
        latency=summary.ABSENT if latency_s is None else format_seconds(latency_s),
    )


def _leaves_from(threshold: float | None, *, last: bool) -> str:
    if last or (threshold is not None and threshold <= 0.0):
        return "always"
    return "never" if threshold is None else f"{threshold:.3f}"


def _at(values: Sequence[_Item], index: int) -> _Item | None:
    return values[index] if index < len(values) else None


def _share(share: float | None) -> str:
    return summary.ABSENT if share is None else f"{share * 100:.1f} %"


@dataclass(frozen=True, slots=True)
class Gallery:
    """Example images that left at one exit."""

    title: str
    examples: tuple[Example, ...]


def galleries(report: Report) -> tuple[Gallery, ...]:
    """Return the example images, grouped by the exit where they left."""
    if report.verify is None:
        return ()
    exits = report.manifest.graph.exits
    groups = []
    for index, point in enumerate(exits):
        examples = tuple(example for example in report.verify.examples if example.exit == index)
        place = "Left first" if index == 0 else "Went to the end" if index == len(exits) - 1 else "Left on the way"
        if examples:
            groups.append(Gallery(f"{place}: {point.name}", examples))
    return tuple(groups)


# --- oracle and static models ------------------------------------------------------------------------


def statics_section(report: Report) -> FigureSection | None:
    """Return the achieved point beside the oracle and the static models, or None without a verification."""
    verify = report.verify
    if verify is None:
        return None
    latency_s, origin = _achieved_latency(report)
    reference = verify.reference_accuracy
    marks = [
        Mark("this plan", latency_s, verify.accuracy, "chosen"),
        Mark("oracle", verify.oracle_latency_s, verify.oracle_accuracy, "oracle"),
        *(Mark(point.label, point.latency_s, reference - point.drop, "static") for point in verify.static_points),
    ]
    axes = (Axis("mean latency", "s"), Axis("accuracy", "share"))
    rules = [Rule("y", reference, f"full depth {_share(reference)}", "reference")]
    title = "Accuracy against mean latency: this plan, the oracle and static models"
    chart = charts.both_widths(lambda width: charts.scatter(title, marks, axes, width, rules=rules))
    sentence = f"This plan: {_share(verify.accuracy)} at {format_seconds(latency_s)} ({origin}). "
    sentence += _static_sentence(verify.static_points, reference, latency_s)
    return FigureSection(chart, (), sentence)


def _achieved_latency(report: Report) -> tuple[float, str]:
    measured_s = measured_latency_s(report.bench, "mean")
    if measured_s is not None:
        return measured_s, "measured"
    latencies = report.manifest.plan.predicted.latency_s
    return latencies.get("mean", sum(report.manifest.plan.predicted.block_latency_s)), "promised, not benchmarked"


def _static_sentence(points: Sequence[CurvePoint], reference: float, latency_s: float) -> str:
    if not points:
        return "No static model was measured beside it."
    affordable = [point for point in points if point.latency_s <= latency_s]
    if not affordable:
        fastest = min(points, key=lambda point: point.latency_s)
        return (
            f"No static model here is as fast; the fastest, {fastest.label}, takes "
            f"{format_seconds(fastest.latency_s)} for {_share(reference - fastest.drop)}."
        )
    best = min(affordable, key=lambda point: (point.drop, point.latency_s))
    return (
        f"Best static model of equal cost: {best.label}, {_share(reference - best.drop)} "
        f"at {format_seconds(best.latency_s)}."
    )


# --- layers ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer with the precision that the file holds."""

    name: str
    segment: int
    precision: str
    planned: str
    weights: str
    macs: str
    loss: str


@dataclass(frozen=True, slots=True)
class PrecisionRow:
    """All layers of one precision."""

    precision: str
    layers: int
    weights: str
    mac_share: str


@dataclass(frozen=True, slots=True)
class LayersSection:
    """What the layers' section shows."""

    chart: Markup | None
    totals: tuple[PrecisionRow, ...]
    rows: tuple[LayerRow, ...]
    collapsed: bool
    mismatches: int
    sensitivity: bool


def layers_section(manifest: BundleManifest, table: CostTable | None) -> LayersSection:
    """Return the layers with the precision that the file holds, and their sensitivity if ``table`` is given.

    Raises:
        InputError: The table lacks the scenario of the plan.
    """
    planned = {choice.subject: choice.option for choice in manifest.plan.choices}
    losses = _losses(manifest, table)
    layers = [layer for layer in manifest.graph.layers if layer.name in manifest.layer_precisions]
    bars = [
        charts.LayerBar(layer.name, layer.segment, held, _weight_bytes(layer, held), losses.get(layer.name))
        for layer, held in ((layer, manifest.layer_precisions[layer.name]) for layer in layers)
    ]
    rows = tuple(_layer_row(layer, bar, planned) for layer, bar in zip(layers, bars, strict=True))
    title = f"Precision and weight bytes of {len(bars)} layers in execution order"
    drawn = 0 < len(bars) <= _MAX_STRIP_LAYERS
    return LayersSection(
        chart=charts.both_widths(lambda width: charts.layer_strip(title, bars, width)) if drawn else None,
        totals=tuple(_precision_rows(layers, bars)),
        rows=rows,
        collapsed=len(rows) > _MANY_LAYERS,
        mismatches=sum(1 for row in rows if row.planned),
        sensitivity=bool(losses),
    )


def _losses(manifest: BundleManifest, table: CostTable | None) -> dict[str, float]:
    """Return the loss of each chosen option: the table's in the plan's scenario, else what the bundle carries."""
    if table is None:
        return dict(manifest.layer_losses)
    names = [scenario.name for scenario in table.scenarios]
    if manifest.plan.scenario.name not in names:
        msg = f"scenario {manifest.plan.scenario.name!r} is not in the cost table ({len(names)} scenarios). Plan again."
        raise InputError(msg)
    at = names.index(manifest.plan.scenario.name)
    chosen = {choice.subject: choice.option for choice in manifest.plan.choices}
    return {
        decision.subject: option.loss[at if len(option.loss) > 1 else 0]
        for decision in table.decisions
        for option in decision.options
        if chosen.get(decision.subject) == option.name
    }


def _weight_bytes(layer: Layer, precision: Precision) -> float:
    return layer.shape.weight_count * precision.bits / 8


def _layer_row(layer: Layer, bar: charts.LayerBar, planned: dict[str, str]) -> LayerRow:
    wanted = planned.get(layer.name, bar.precision.value)
    return LayerRow(
        name=layer.name,
        segment=layer.segment + 1,
        precision=bar.precision.value,
        planned="" if wanted == bar.precision.value else wanted,
        weights=format_value(bar.weight_bytes, "bytes"),
        macs=f"{layer.shape.macs:,}",
        loss=summary.ABSENT if bar.loss is None else f"{bar.loss:.2e}",
    )


def _precision_rows(layers: Sequence[Layer], bars: Sequence[charts.LayerBar]) -> Iterator[PrecisionRow]:
    total_macs = sum(layer.shape.macs for layer in layers) or 1
    for precision in Precision:
        held = [(layer, bar) for layer, bar in zip(layers, bars, strict=True) if bar.precision is precision]
        if held:
            yield PrecisionRow(
                precision=precision.value,
                layers=len(held),
                weights=format_value(sum(bar.weight_bytes for _, bar in held), "bytes"),
                mac_share=_share(sum(layer.shape.macs for layer, _ in held) / total_macs),
            )


# --- memory and latency ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryBar:
    """One bar: whose it is, its parts as (class, name, bytes), and its picture; ``runtime`` is empty if unknown."""

    name: str
    parts: tuple[tuple[str, str, str], ...]
    total: str
    limit: str
    runtime: str
    picture: Markup


def memory_bars(report: Report) -> tuple[MemoryBar, ...]:
    """Return the promised memory by part and the measured peak, on one scale."""
    memory, bench = report.manifest.plan.memory, report.bench
    promised = (
        ("weights", "weights", memory.weights_bytes),
        ("activations", "activations", memory.activation_bytes),
        ("overhead", "overhead", memory.overhead_bytes),
    )
    bars: list[tuple[str, tuple[tuple[str, str, int], ...]]] = [("promised", promised)]
    if bench is not None and bench.device_memory_bytes is not None:
        device = ("peak", "on the GPU", bench.device_memory_bytes)
        process = ("overhead", "in the process", bench.peak_memory_bytes)
        bars.append(("measured", (device, process) if bench.unified_memory else (device,)))
    elif bench is not None and report.manifest.backend not in GPU_BACKENDS:
        bars.append(("measured", (("peak", "peak of the model", bench.peak_memory_bytes),)))
    budget = report.manifest.plan.budget.memory_bytes
    limit = budget.get(Tier.HOST, budget.get(Tier.DEVICE))
    scale = max([sum(size for _, _, size in parts) for _, parts in bars] + [(limit or 0) * 1.02, 1.0])
    beside = [memory.runtime_bytes, *([bench.runtime_memory_bytes] if bench is not None and len(bars) > 1 else [])]
    return tuple(
        _memory_bar(name, parts, (scale, limit), format_value(runtime_bytes, "bytes") if runtime_bytes else "")
        for (name, parts), runtime_bytes in zip(bars, beside, strict=True)
    )


def _memory_bar(
    name: str, parts: Sequence[tuple[str, str, int]], frame: tuple[float, int | None], runtime: str
) -> MemoryBar:
    scale, limit = frame
    mark = limit / scale if limit is not None else None
    words = f"Memory {name}: " + ", ".join(f"{part} {format_value(size, 'bytes')}" for _, part, size in parts)
    return MemoryBar(
        name=name,
        parts=tuple((sign, part, format_value(size, "bytes")) for sign, part, size in parts),
        total=format_value(sum(size for _, _, size in parts), "bytes"),
        picture=charts.share_bar(words, [(sign, size / scale) for sign, _, size in parts], mark),
        runtime=runtime,
        limit="" if limit is None else format_value(limit, "bytes"),
    )


@dataclass(frozen=True, slots=True)
class LatencySection:
    """The histogram and the statistics: (name, promised, range, measured, over all samples)."""

    chart: Markup
    rows: tuple[tuple[str, str, str, str, str], ...]


def latency_section(report: Report) -> LatencySection | None:
    """Return the histogram with its statistics, or None without samples."""
    if report.bench is None or not report.bench.samples_s:
        return None
    bench, plan = report.bench, report.manifest.plan
    rows = tuple(_latency_row(plan, bench, statistic) for statistic in _STATISTICS)
    found = [(statistic, measured_latency_s(bench, statistic)) for statistic in _STATISTICS if statistic != "worst"]
    lines = [(name, value) for name, value in found if value is not None]
    limits = [
        Rule("x", limit.limit_s, f"limit of {limit.statistic} {format_seconds(limit.limit_s)}")
        for limit in plan.budget.latency
    ]
    title = f"Histogram of {len(bench.samples_s):,} latency samples"
    return LatencySection(
        charts.both_widths(lambda width: charts.histogram(title, bench.samples_s, lines, limits, width)), rows
    )


def _latency_row(plan: Plan, bench: BenchResult, statistic: Statistic) -> tuple[str, str, str, str, str]:
    promised_s = plan.predicted.latency_s.get(statistic)
    measured_s = measured_latency_s(bench, statistic)
    interval = plan.latency_interval_s.get(statistic)
    return (
        statistic,
        summary.ABSENT if promised_s is None else format_seconds(promised_s),
        f"{format_seconds(interval.low)} to {format_seconds(interval.high)}" if interval else summary.ABSENT,
        summary.ABSENT if measured_s is None else format_seconds(measured_s),
        format_seconds(latency_statistic(bench.samples_s, statistic)),
    )


# --- reproduce ---------------------------------------------------------------------------------------


def commands(manifest: BundleManifest) -> tuple[str, ...]:
    """Return the command lines that repeat the plan, from calibration to report."""
    plan = manifest.plan
    threads = f"--threads {plan.threads}"
    return (
        f"edgeflex plan CALIBRATION {' '.join(_budget_options(plan.budget))} -o plan.json",
        "edgeflex export plan.json --model MODEL --calibration CALIBRATION -o bundle",
        f"edgeflex bench bundle --data IMAGES {threads} -o bench.json",
        f"edgeflex verify bundle --data IMAGES --model MODEL {threads} -o verify.json",
        "edgeflex report bundle --bench bench.json --verify verify.json -o report.html",
    )


def _budget_options(budget: Budget) -> Iterator[str]:
    for _, size_bytes in sorted(budget.memory_bytes.items()):
        yield f"--memory {size_bytes}"
    for limit in budget.latency:
        yield f"--latency {_exact_ms(limit.limit_s)}:{limit.statistic}"
    if budget.max_drop is not None:
        yield f"--max-drop {budget.max_drop * 100:.6g}%"
    if budget.disk_bytes is not None:
        yield f"--disk {budget.disk_bytes}"
    yield f"--confidence {budget.confidence * 100:.6g}%"
    yield f"--minimize {budget.minimize}" + (f":{budget.statistic}" if budget.minimize == "latency" else "")


def _exact_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.9f}".rstrip("0").rstrip(".") + "ms"
