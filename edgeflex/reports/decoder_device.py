"""What a page shows of a run on a device: events as predicted and as measured, and how long each resource waited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeflex.reports import charts, decoder_charts
from edgeflex.reports.charts import both_widths
from edgeflex.reports.decoder_charts import Cloud
from edgeflex.reports.decoder_sections import memory_bar
from edgeflex.reports.summary import ABSENT, format_seconds, format_value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgeflex.reports.decoder_sections import MemoryBar
    from edgeflex.reports.svg import Markup
    from edgeflex.schema_gpu import DeviceRecord
    from edgeflex.schema_moe import DecoderPlan

RESOURCES = {
    "gpu": "GPU",
    "cpu": "processor",
    "link": "copies to the GPU",
    "disk": "reads from the disk",
}
_ERRORS = {"event": "events while decoding", **RESOURCES, "prompt": "events of prompts"}


@dataclass(frozen=True, slots=True)
class WaitRow:
    """One resource's share of the watched time: at work, waiting while an event was served, and between events."""

    name: str
    picture: Markup
    work: str
    waited: str
    between: str


@dataclass(frozen=True, slots=True)
class DeviceSection:
    """Facts as (name, value); the chart with its key as (sign, words); errors and waiting as rows of tables."""

    name: str
    facts: tuple[tuple[str, str], ...]
    chart: Markup | None
    key: tuple[tuple[Markup, str], ...]
    words: str
    errors: tuple[tuple[str, str, str, str, str], ...]
    waits: tuple[WaitRow, ...]
    watched: str


def device_section(record: DeviceRecord | None) -> DeviceSection | None:
    """Return what the page shows of a device, or None where nothing ran on one."""
    if record is None:
        return None
    clouds = _clouds(record)
    count = sum(len(cloud.points) for cloud in clouds)
    drawn = sum(len(decoder_charts.drawn_points(cloud)) for cloud in clouds)
    title = f"Predicted against measured seconds of {count:,} events"
    chart = both_widths(lambda width: decoder_charts.clouds(title, clouds, width)) if clouds else None
    words = f"{count:,} of {record.sampled:,} watched events, drawn by lot" if record.sampled > count else ""
    if drawn < count:
        words += f"{'; ' if words else ''}{drawn:,} of the {count:,} are shown"
    return DeviceSection(
        name=record.name,
        facts=tuple(facts(record)),
        chart=chart,
        key=tuple((decoder_charts.cloud_sign(cloud), cloud.name) for cloud in clouds),
        words=f"{words}." if words else "",
        errors=tuple(_error_rows(record)),
        waits=tuple(_wait_rows(record)),
        watched=f"{format_seconds(record.pass_s)} of {record.passes:,} passes were watched, "
        f"{format_seconds(record.event_s)} of them in {record.events:,} events that lacked experts.",
    )


def gpu_memory_bars(plan: DecoderPlan, record: DeviceRecord | None) -> tuple[MemoryBar, ...]:
    """Return the promised memory of a GPU by part, and the most that was held; nothing where none was benchmarked."""
    if plan.gpu is None or record is None:
        return ()
    memory, limit = plan.gpu.memory, plan.budget.vram_bytes
    bars: list[tuple[str, tuple[tuple[str, str, int], ...]]] = [
        (
            "GPU, promised",
            (
                ("part-cache", "experts", memory.arena_bytes),
                ("part-dense", "dense weights", memory.dense_bytes),
                ("part-kv", "keys and values", memory.kv_bytes),
                ("part-activations", "activations", memory.activations_bytes),
                ("part-runtime", "driver and libraries", memory.context_bytes),
            ),
        )
    ]
    if record.peak_bytes is not None:
        experts = min(record.vram_bytes, record.peak_bytes)
        rest = ("part-rest", "everything else but driver and libraries", record.peak_bytes - experts)
        bars.append(("GPU, measured", (("part-cache", "room for experts", experts), rest)))
    scale = max([sum(size for _, _, size in parts) for _, parts in bars] + [(limit or 0) * 1.02, 1.0])
    return tuple(memory_bar(name, parts, scale, limit) for name, parts in bars)


def facts(record: DeviceRecord) -> Iterator[tuple[str, str]]:
    """Give what a device did as (name, value) text, for a page or a terminal."""
    tokens = max(1, record.tokens)
    kept = "other experts than the device's" if record.exclusive else "with copies of the device's"
    peak = "not counted" if record.peak_bytes is None else format_value(record.peak_bytes, "bytes")
    limit = "" if record.requested_bytes is None else f", limit {format_value(record.requested_bytes, 'bytes')}"
    bound, share = record.bound_token_s, record.bound_share
    yield "vram, at most", f"{peak}; planned {format_value(record.planned_bytes, 'bytes')}{limit}"
    yield "room for experts there", format_value(record.vram_bytes, "bytes")
    yield (
        "room for experts in RAM",
        f"{format_value(record.ram_bytes, 'bytes')}, {kept}" if record.ram_bytes else "none",
    )
    yield "RAM that copies start from", "pinned" if record.pinned else "not pinned"
    yield "experts that the device lacks", f"by the rule {record.rule}, policy {record.policy}"
    yield "experts found on the device", _share(record.gpu_hits, record.lookups)
    yield "experts that the processor computed", f"{record.host_experts:,}"
    yield "copied per token", format_value(record.upload_bytes / tokens, "bytes")
    yield "copied ahead per token", format_value(record.ahead_bytes / tokens, "bytes")
    yield "read from the disk per token", format_value(record.flash_bytes / tokens, "bytes")
    hidden = record.hidden_share
    yield "copying hidden behind computing", ABSENT if hidden is None else f"{hidden * 100:.1f} %"
    yield "time per token", format_seconds(record.token_s) if record.token_s else ABSENT
    reached = "" if share is None else f", {share * 100:.1f} % of what was measured"
    yield "least time that anything could take", ABSENT if bound is None else f"{format_seconds(bound)}{reached}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole * 100:.1f} % of {whole:,}" if whole else ABSENT


def _clouds(record: DeviceRecord) -> list[Cloud]:
    found = []
    for css, name, decoding in (("event", "while decoding", True), ("prompt", "of prompts", False)):
        points = [(one.predicted_s, one.actual_s) for one in record.sample if one.decoding is decoding]
        points = [pair for pair in points if min(pair) > 0]
        if points:
            found.append(Cloud(css, name, tuple(points)))
    return found


def _error_rows(record: DeviceRecord) -> Iterator[tuple[str, str, str, str, str]]:
    for name, words in _ERRORS.items():
        error = record.errors.get(name)
        if error is not None:
            shares = (error.bias, error.mean_error, error.p90_error)
            bias, mean, p90 = (f"{share * 100:,.1f} %" for share in shares)
            yield words, f"{error.samples:,}", bias.replace("-", "−") if error.bias < 0 else f"+{bias}", mean, p90


def waits(record: DeviceRecord) -> Iterator[tuple[str, float, float, float]]:
    """Give (resource, share at work, share waiting in events, share between events) of the watched time."""
    if record.pass_s <= 0:
        return
    for resource in RESOURCES:
        work = record.busy_s.get(resource, 0.0) / record.pass_s
        waited = record.waited_s.get(resource, 0.0) / record.pass_s
        yield resource, work, waited, max(0.0, 1.0 - work - waited)


def _wait_rows(record: DeviceRecord) -> Iterator[WaitRow]:
    for resource, work, waited, between in waits(record):
        name = RESOURCES[resource]
        told = tuple(f"{share * 100:.1f} %" for share in (work, waited, between))
        words = f"{name}: {told[0]} at work, {told[1]} waiting in events, {told[2]} between them"
        picture = charts.share_bar(words, [("wait-work", work), ("wait-idle", waited)])
        yield WaitRow(name, picture, *told)
