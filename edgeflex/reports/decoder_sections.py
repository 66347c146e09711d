"""What each section of a decoder's page shows: rows of text and charts, made from the document's values."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeflex.reports import charts, decoder_charts, summary
from edgeflex.reports.charts import Axis, Line, Mark, Rule, both_widths
from edgeflex.reports.decoder_charts import Level, MapRow, Series
from edgeflex.reports.summary import format_seconds, format_value
from edgeflex.schema import Precision
from edgeflex.units import format_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgeflex.reports.svg import Markup
    from edgeflex.schema_moe import (
        DecoderManifest,
        DecoderMemory,
        DecoderPlan,
        DecoderRunStats,
        MissPoint,
        TokenTime,
    )

_MOST_POLICIES = 4
_BITS_HEIGHT = {32: 1.0, 16: 0.9, 8: 0.78, 4: 0.45}  # of a cell: the taller, the more bits


# --- memory ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryBar:
    """One bar: whose it is, its parts as (class, name, bytes), and its picture."""

    name: str
    parts: tuple[tuple[str, str, str], ...]
    total: str
    picture: Markup


def memory_bars(plan: DecoderPlan, run: DecoderRunStats | None) -> tuple[MemoryBar, ...]:
    """Return the promised memory by part and what a run held at most, on one scale."""
    bars = [("promised", _promised_parts(plan.predicted.memory))]
    if run is not None:
        cache = min(run.cache.peak_bytes, run.peak_memory_bytes)
        held = (
            ("part-cache", "experts", cache),
            ("part-rest", "dense weights, keys and values, activations", run.peak_memory_bytes - cache),
            ("part-runtime", "runtime", run.runtime_memory_bytes),
        )
        bars.append(("measured", held))
    limit = plan.budget.memory_bytes
    scale = max([sum(size for _, _, size in parts) for _, parts in bars] + [(limit or 0) * 1.02, 1.0])
    return tuple(memory_bar(name, parts, scale, limit) for name, parts in bars)


def _promised_parts(memory: DecoderMemory) -> tuple[tuple[str, str, int], ...]:
    return (
        ("part-cache", "experts", memory.cache_bytes),
        ("part-dense", "dense weights", memory.dense_bytes),
        ("part-kv", "keys and values", memory.kv_bytes),
        ("part-activations", "activations", memory.activations_bytes),
        ("part-runtime", "runtime", memory.runtime_bytes),
    )


def memory_bar(name: str, parts: Sequence[tuple[str, str, int]], scale: float, limit: int | None) -> MemoryBar:
    """Return one bar of parts as (class, name, bytes), as wide as its share of ``scale``; ``limit`` is a tick on it."""
    words = f"Memory {name}: " + ", ".join(f"{part} {format_value(size, 'bytes')}" for _, part, size in parts)
    mark = limit / scale if limit is not None else None
    return MemoryBar(
        name=name,
        parts=tuple((css, part, format_value(size, "bytes")) for css, part, size in parts),
        total=format_value(sum(size for _, _, size in parts), "bytes"),
        picture=charts.share_bar(words, [(css, size / scale) for css, _, size in parts], mark),
    )


@dataclass(frozen=True, slots=True)
class MemorySection:
    """Memory after each token, and the lines across as (sign, name)."""

    chart: Markup
    key: tuple[tuple[Markup, str], ...]


def memory_section(plan: DecoderPlan, runs: Sequence[DecoderRunStats]) -> MemorySection | None:
    """Return what the process held after each token of all runs, experts at most their cache; None where unknown."""
    run = next((one for one in runs if one.held_bytes), None)
    if run is None:
        return None
    cache = [min(run.cache.peak_bytes, held) for held in run.held_bytes]
    rest = [held - part for held, part in zip(run.held_bytes, cache, strict=True)]
    promised = plan.predicted.memory.total_bytes
    levels = [Level("promise", f"promised {format_value(promised, 'bytes')}", promised)]
    limit = plan.budget.memory_bytes
    if limit is not None:
        levels.append(Level("limit", f"limit {format_value(limit, 'bytes')}", limit))
    series = [
        Series("part-rest", "everything else", tuple(map(float, rest))),
        Series("part-cache", "experts, at most", tuple(map(float, cache))),
    ]
    title = f"Memory after each of {len(run.held_bytes):,} tokens"
    axis = Axis("memory after each token", "bytes")
    chart = both_widths(lambda width: decoder_charts.stacked_columns(title, series, levels, width, axis))
    return MemorySection(chart, tuple((decoder_charts.level_sign(level), level.name) for level in levels))


# --- hit rate ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HitsSection:
    """The curve, its legend as (sign, words), and the replays as rows."""

    chart: Markup
    key: tuple[tuple[Markup, str], ...]
    rows: tuple[tuple[str, str, str, str, str], ...]


def hit_rate(point: MissPoint) -> float:
    """Return the share of decode lookups that hit; 0 when there was none."""
    return point.hits / max(1, point.hits + point.misses)


def hits_section(
    plan: DecoderPlan, points: Sequence[MissPoint], measured: tuple[int, float] | None
) -> HitsSection | None:
    """Return hit rates over cache sizes, or None without replays.

    Args:
        plan: The plan, whose cache is the chosen point.
        points: Replays of the trace.
        measured: Bytes of the cache and its hit rate in a run, where one decoded.
    """
    if not points:
        return None
    policies = sorted({point.policy for point in points}, key=lambda name: (name != plan.policy, name))
    shown = policies[:_MOST_POLICIES]
    marks: list[Mark] = []
    lines: list[Line] = []
    for policy in shown:
        kind: charts.Kind = "plan" if policy == plan.policy else "baseline"
        found = sorted((one.cache_bytes, hit_rate(one)) for one in points if one.policy == policy)
        marks += _marks(found, kind, policy)
        lines.append(Line(tuple(found), kind))
    best = sorted({(one.cache_bytes, rate) for one in points if (rate := belady_rate(one)) is not None})
    if best:
        marks += _marks(best, "oracle", "Belady")
        lines.append(Line(tuple(best), "oracle"))
    chosen = Mark("this plan", plan.cache_bytes, plan.predicted.hit_rate, "chosen")
    run = [Mark("measured", measured[0], measured[1], "static")] if measured is not None else []
    axes = (Axis("cache of experts", "bytes", linear=True), Axis("hit rate while decoding", "share", linear=True))
    rules = [Rule("x", plan.cycle_bytes, "T", "reference")] if plan.cycle_bytes else []
    title = f"Hit rate against cache size for {', '.join(shown)}"
    drawn = [*marks, chosen, *run]
    chart = both_widths(lambda width: charts.scatter(title, drawn, axes, width, rules=rules, lines=lines))
    return HitsSection(chart, tuple(_key(plan, shown, best=bool(best), run=bool(run))), tuple(_hit_rows(points)))


def _marks(found: Sequence[tuple[int, float]], kind: charts.Kind, name: str) -> list[Mark]:
    """Return marks of one policy, of which only the last is named."""
    return [Mark(name, size, rate, kind, place == len(found) - 1) for place, (size, rate) in enumerate(found)]


def belady_rate(point: MissPoint) -> float | None:
    """Return the hit rate of the best possible cache at this size, where it was replayed."""
    uses = point.hits + point.misses
    return None if point.belady_misses is None or not uses else 1.0 - point.belady_misses / uses


def _key(plan: DecoderPlan, shown: Sequence[str], *, best: bool, run: bool) -> Iterator[tuple[Markup, str]]:
    yield charts.legend_sign("chosen"), "this plan, promised"
    if run:
        yield charts.legend_sign("static"), "measured"
    if plan.policy in shown:
        yield charts.legend_sign("plan"), f"{plan.policy}, replayed"
    if len(shown) > (plan.policy in shown):
        yield charts.legend_sign("baseline"), "other policies, replayed"
    if best:
        yield charts.legend_sign("oracle"), "Belady, which knows the future"


def _hit_rows(points: Sequence[MissPoint]) -> Iterator[tuple[str, str, str, str, str]]:
    for point in sorted(points, key=lambda one: (one.cache_bytes, -hit_rate(one), one.policy)):
        best = belady_rate(point)
        yield (
            point.policy,
            format_value(point.cache_bytes, "bytes"),
            format_value(hit_rate(point), "share"),
            summary.ABSENT if best is None else format_value(best, "share"),
            format_value(point.decode_bytes / max(1, point.decode_tokens), "bytes"),
        )


# --- time --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TimeSection:
    """The chart, its lines as (sign, name), and each part as (class, name, mean, share).

    ``words`` says of which run the chart is.
    """

    chart: Markup
    key: tuple[tuple[Markup, str], ...]
    parts: tuple[tuple[str, str, str, str], ...]
    words: str


def time_section(plan: DecoderPlan, runs: Sequence[DecoderRunStats]) -> TimeSection | None:
    """Return a token's time by part, over the tokens of the first run and in the mean of all; None without."""
    timed = [run for run in runs if run.times]
    if not timed:
        return None
    levels = [
        Level("promise", f"promised {format_seconds(plan.predicted.token_s.value)}", plan.predicted.token_s.value)
    ]
    if plan.budget.token_s is not None:
        levels.append(Level("limit", f"limit {format_seconds(plan.budget.token_s)}", plan.budget.token_s))
    if plan.predicted.bound_token_s > 0:
        bound_s = plan.predicted.bound_token_s
        levels.append(Level("reference", f"bound {format_seconds(bound_s)}", bound_s))
    first = timed[0]
    series = [Series(css, name, tuple(values)) for css, name, values in _split(first.times)]
    title = f"Time of {len(first.times):,} tokens, split into dense parts, experts and waiting"
    every = [time for run in timed for time in run.times]
    total_s = math.fsum(time.total_s for time in every)
    parts = []
    for css, name, values in _split(every):
        part_s = math.fsum(values)
        parts.append((css, name, format_seconds(part_s / len(every)), f"{part_s / total_s * 100:.1f} %"))
    parts.append(("", "together", format_seconds(total_s / len(every)), f"{len(every) / total_s:.1f} tokens/s"))
    words = f"The chart is of the first of {len(timed)} runs, the table of all." if len(timed) > 1 else ""
    chart = both_widths(lambda width: decoder_charts.stacked_columns(title, series, levels, width))
    key = tuple((decoder_charts.level_sign(level), level.name) for level in levels)
    return TimeSection(chart, key, tuple(parts), words)


def _split(times: Sequence[TokenTime]) -> list[tuple[str, str, list[float]]]:
    """Return (class, name, seconds per token) of the parts; the rest is attention, norms, routing and the loop."""
    rest = [max(0.0, time.total_s - time.dense_s - time.expert_s - time.wait_s) for time in times]
    return [
        ("time-dense", "dense parts", [time.dense_s for time in times]),
        ("time-expert", "experts", [time.expert_s for time in times]),
        ("time-wait", "waiting for reads", [time.wait_s for time in times]),
        ("time-rest", "everything else", rest),
    ]


# --- experts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UseSection:
    """The map, its legend as (class, words), and per layer (name, uses, never used, busiest, its share, hits).

    ``stays`` tells how long experts were resident, where runs counted that.
    """

    chart: Markup
    key: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, str, str, str, str, str], ...]
    stays: StaySection | None


@dataclass(frozen=True, slots=True)
class StaySection:
    """The map, its legend as (class, words), and per layer (name, experts at a time, always, never, busiest's share).

    ``words`` say what was counted.
    """

    chart: Markup
    key: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, str, str, str, str], ...]
    words: str


def use_section(
    manifest: DecoderManifest, runs: Sequence[DecoderRunStats], *, on_device: bool = False
) -> UseSection | None:
    """Return how often each expert was used, how many uses were hits per layer, and how long experts were resident.

    Args:
        manifest: What ran.
        runs: Generations, summed.
        on_device: Whether they ran on a device with a memory of its own.

    Returns:
        None where no run counted.
    """
    uses = _summed([run.expert_uses for run in runs])
    hits, misses = (_summed([(counts,) for counts in found]) for found in _layer_counts(runs))
    layers = [layer for layer in manifest.graph.layers if layer.index < len(uses)]
    if not any(sum(row) for row in uses):
        return None
    drawn, rows = [], []
    for layer in layers:
        if layer.routing is None:
            drawn.append(MapRow(str(layer.index), (), note="dense, no experts"))
            continue
        counts = uses[layer.index][: layer.routing.experts]
        share = _share_of_hits(hits, misses, layer.index)
        total = sum(counts)
        even = total / len(counts) or 1.0
        cells = tuple(decoder_charts.use_cell(count / even) for count in counts)
        drawn.append(MapRow(str(layer.index), cells, share=share))
        busiest = max(range(len(counts)), key=lambda expert: counts[expert])
        rows.append(
            (
                str(layer.index),
                f"{total:,}",
                f"{sum(1 for count in counts if not count)} of {len(counts)}",
                str(busiest) if total else summary.ABSENT,
                f"{counts[busiest] / total * 100:.1f} %" if total else summary.ABSENT,
                summary.ABSENT if share is None else f"{share * 100:.1f} %",
            )
        )
    title = f"Use of experts in {len(rows)} layers, and the share of look-ups that found them in memory"
    side = "hits" if any(row.share is not None for row in drawn) else ""
    chart = both_widths(lambda width: decoder_charts.expert_map(title, drawn, width, side=side))
    stays = _stay_section(manifest, runs, uses, on_device=on_device)
    return UseSection(chart, tuple(_use_key()), tuple(rows), stays)


def _summed(found: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Return the sum of arrays of one shape; those without rows count nothing."""
    whole = [rows for rows in found if rows]
    return [[sum(column) for column in zip(*rows, strict=True)] for rows in zip(*whole, strict=True)] if whole else []


def _layer_counts(runs: Sequence[DecoderRunStats]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    return [run.cache.layer_hits for run in runs], [run.cache.layer_misses for run in runs]


def _share_of_hits(hits: Sequence[Sequence[int]], misses: Sequence[Sequence[int]], layer: int) -> float | None:
    if not hits or not misses or layer >= min(len(hits[0]), len(misses[0])):
        return None
    total = hits[0][layer] + misses[0][layer]
    return hits[0][layer] / total if total else None


def _use_key() -> Iterator[tuple[str, str]]:
    yield "use never", "never"
    yield "use u0", "rarer"
    for index, level in enumerate(decoder_charts.LEVELS):
        yield f"use u{index + 1}", f"{level:g}×"


def _stay_section(
    manifest: DecoderManifest, runs: Sequence[DecoderRunStats], uses: Sequence[Sequence[int]], *, on_device: bool
) -> StaySection | None:
    counted = [run for run in runs if run.decode_events and run.expert_residency]
    if not counted:
        return None
    held = _summed([run.expert_residency for run in counted])
    events = sum(run.decode_events for run in counted)
    drawn, rows = [], []
    for layer in manifest.graph.layers[: len(held)]:
        if layer.routing is None:
            drawn.append(MapRow(str(layer.index), (), note="dense, no experts"))
            continue
        counts = held[layer.index][: layer.routing.experts]
        cells = tuple(decoder_charts.stay_cell(count / events) for count in counts)
        drawn.append(MapRow(str(layer.index), cells, share=sum(counts) / events / len(counts)))
        rows.append(_stay_row(str(layer.index), counts, uses[layer.index], events))
    title = f"Residency of experts in {len(rows)} layers: the share of {events:,} events while decoding at whose end "
    title += "each was in the cache, and the share of each layer's experts that were there on average"
    chart = both_widths(lambda width: decoder_charts.expert_map(title, drawn, width, side="in cache", bar="stay"))
    words = _stay_words(manifest.plan, counted, events, on_device=on_device)
    return StaySection(chart, tuple(_stay_key()), tuple(rows), words)


def _stay_row(name: str, counts: Sequence[int], uses: Sequence[int], events: int) -> tuple[str, str, str, str, str]:
    busiest = max(range(len(counts)), key=lambda expert: uses[expert])
    return (
        name,
        f"{sum(counts) / events:.1f} of {len(counts)}",
        str(sum(1 for count in counts if count == events)),
        str(sum(1 for count in counts if not count)),
        f"{counts[busiest] / events * 100:.1f} %" if uses[busiest] else summary.ABSENT,
    )


def _stay_words(plan: DecoderPlan, runs: Sequence[DecoderRunStats], events: int, *, on_device: bool) -> str:
    """Say what an event is, and what the map does not show."""
    words = (
        f"An event is one layer of one decoded token, or a part of it that the cache holds at once: {events:,} in "
        f"{format_count(len(runs), 'run')}, prompts not counted. An expert counts where it was in the "
        "cache when the event was over."
    )
    if on_device:
        return f"{words} The cache is the device's memory; copies in the processor's memory are not shown."
    if plan.verdict == "fits" and not any(run.cache.evictions for run in runs):
        return f"{words} All experts are read from the first pass on, used or not; here each counts from its first use."
    return words


def _stay_key() -> Iterator[tuple[str, str]]:
    yield "stay never", "never"
    yield "stay s0", f"less than {decoder_charts.STAYS[0] * 100:.0f} % of events"
    for index, level in enumerate(decoder_charts.STAYS):
        yield f"stay s{index + 1}", f"from {level * 100:.0f} %"


# --- precision ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrecisionSection:
    """The map and totals (precision, units of experts, other units, bytes); ``mismatches`` against the plan."""

    chart: Markup | None
    totals: tuple[tuple[str, int, int, str], ...]
    mismatches: int


def precision_section(manifest: DecoderManifest) -> PrecisionSection:
    """Return the precision of every layer's dense part and of every expert, as the bundle holds them."""
    held = _held_precisions(manifest)
    planned = {choice.subject: choice.option for choice in manifest.plan.choices}
    mismatches = sum(1 for unit, one in held.items() if planned.get(unit, one.value) != one.value)
    rows = []
    for layer in manifest.graph.layers:
        unit = f"layers.{layer.index}"
        experts = range(layer.routing.experts if layer.routing else 0)
        cells = tuple(_cell(held.get(f"{unit}.experts.{expert}")) for expert in experts)
        rows.append(MapRow(str(layer.index), cells, dense=_cell(held.get(unit))))
    title = f"Precision of the dense part and of every expert in {len(rows)} layers"
    drawn = any(row.cells for row in rows)
    chart = both_widths(lambda width: decoder_charts.expert_map(title, rows, width)) if drawn else None
    return PrecisionSection(chart, tuple(_totals(manifest, held)), mismatches)


def _cell(precision: Precision | None) -> tuple[str, float]:
    if precision is None:
        return "use never", 1.0
    return f"precision {precision.value}", _BITS_HEIGHT[precision.bits]


def unit_of(matrix: str) -> str:
    """Return the unit whose precision a matrix has.

    >>> unit_of("layers.3.experts.17.down"), unit_of("layers.3.qkv"), unit_of("head")
    ('layers.3.experts.17', 'layers.3', 'head')
    """
    parts = matrix.split(".")
    if parts[0] != "layers":
        return matrix
    return ".".join(parts[: 4 if parts[2] == "experts" else 2])


def _held_precisions(manifest: DecoderManifest) -> Mapping[str, Precision]:
    """Return the precision of every unit; the fp32 tensors beside matrices (norms, routers) do not count."""
    known = manifest.graph.matrix_shapes()
    return {unit_of(one.name): one.precision for one in manifest.matrices if one.name in known}


def _totals(manifest: DecoderManifest, held: Mapping[str, Precision]) -> Iterator[tuple[str, int, int, str]]:
    sizes: Counter[Precision] = Counter()
    places = set()
    for one in manifest.matrices:
        if (one.file, one.offset) not in places:  # a tied head names the embedding's bytes
            places.add((one.file, one.offset))
            sizes[one.precision] += one.weights_bytes + one.scales_bytes
    for precision in Precision:
        units = [unit for unit, one in held.items() if one is precision]
        if units or sizes[precision]:
            experts = sum(1 for unit in units if ".experts." in unit)
            size = format_value(sizes[precision], "bytes")
            yield precision.value, experts, len(units) - experts, size


# --- facts and commands ------------------------------------------------------------------------------


def quality_rows(manifest: DecoderManifest) -> tuple[tuple[str, str], ...]:
    """Return what was found about the distance from the fp32 decoder."""
    found = (
        ("KL predicted", manifest.plan.predicted.kl, "{:.4f} nats per token"),
        ("KL measured", manifest.measured_kl, "{:.4f} nats per token"),
        ("Perplexity", manifest.measured_perplexity, "{:.3f}"),
        ("Perplexity in fp32", manifest.reference_perplexity, "{:.3f}"),
    )
    rows = [(name, summary.ABSENT if value is None else show.format(value)) for name, value, show in found]
    same = manifest.router_agreement
    return (*rows, ("Same choices of experts", summary.ABSENT if same is None else f"{same * 100:.1f} %"))


def commands(manifest: DecoderManifest) -> tuple[str, ...]:
    """Return the command lines that repeat the plan, from calibration to report."""
    plan = manifest.plan
    threads = f"--threads {plan.threads}"
    return (
        f"edgeflex calibrate --model MODEL --text TEXT {threads} -o CALIBRATION",
        f"edgeflex plan CALIBRATION {' '.join(_budget_options(plan))} -o plan.json",
        "edgeflex export plan.json --model MODEL --calibration CALIBRATION -o bundle",
        f"edgeflex bench bundle --text TEXT {threads} -o bench.json",
        "edgeflex verify bundle -o verify.json",
        "edgeflex report bundle --bench bench.json -o report.html",
    )


def _budget_options(plan: DecoderPlan) -> Iterator[str]:
    budget = plan.budget
    if budget.memory_bytes is not None:
        yield f"--memory {budget.memory_bytes}"
    if budget.vram_bytes is not None and plan.gpu is not None:
        measured = "" if plan.gpu.device == "this-machine" else " --device device.json"
        yield f"--vram {budget.vram_bytes}" + (
            f" --device {plan.gpu.device}" if plan.gpu.profile.origin == "datasheet" else measured
        )
        for option, rate in (("link", plan.gpu.given_link_bytes_per_s), ("ram-rate", plan.gpu.given_ram_bytes_per_s)):
            if rate is not None:
                yield f"--{option} {rate:.0f}"
    if budget.token_s is not None:
        yield f"--latency {_exact_ms(budget.token_s)}/token"
    if budget.first_token_s is not None:
        yield f"--first-token {_exact_ms(budget.first_token_s)}"
    if budget.disk_bytes is not None:
        yield f"--disk {budget.disk_bytes}"
    if budget.max_kl is not None:
        yield f"--max-kl {budget.max_kl:.9g}"
    if budget.max_perplexity_rise is not None:
        yield f"--max-perplexity {budget.max_perplexity_rise:.9g}"
    yield f"--minimize {budget.minimize}"
    yield f"--prompt-tokens {budget.prompt_tokens}"
    yield f"--context {budget.context_tokens}"


def _exact_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.9f}".rstrip("0").rstrip(".") + "ms"
