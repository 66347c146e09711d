"""Charts of decoders as inline SVG: time split over tokens, maps of layers by experts, predictions as clouds.

Cells of one colour are one path, so that a page with thousands of them stays small.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeflex.errors import InputError
from edgeflex.files import StrPath, path_of, write_atomic
from edgeflex.reports.charts import Axis, display_unit
from edgeflex.reports.summary import format_value
from edgeflex.reports.svg import Box, Markup, fit_scale, linear_scale, number, picture, tag, text_width

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgeflex.reports.svg import Scale
    from edgeflex.schema_moe import SimulatedCache

_LEFT_PX, _RIGHT_PX = 44.0, 14.0
_PLOT_PX = 220.0
_TIME = Axis("time per token", "s")
_MAP_TOP_PX, _SIDE_PX = 34.0, 96.0
_ROWS_PX = (6.0, 16.0)
_MOST_POINTS = 800  # of one cloud
# A cell's colour tells its share of its layer's uses, in multiples of an even share.
LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# And its share of the time that it was resident.
STAYS = (0.1, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True)
class Series:
    """One part of every column: its class in the style sheet, its name, its value per token, seconds or bytes."""

    css: str
    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Level:
    """A line across the chart: class ``limit``, ``reference`` or ``promise``, its name and its value."""

    css: str
    name: str
    value: float


@dataclass(frozen=True, slots=True)
class MapRow:
    """One layer of a map.

    ``cells`` holds a class per expert, and the height of the cell between 0 and 1; ``dense`` one cell before
    them. ``share`` is drawn as a bar beside the row; ``note`` stands in a row without cells.
    """

    name: str
    cells: tuple[tuple[str, float], ...]
    dense: tuple[str, float] | None = None
    share: float | None = None
    note: str = ""


# --- time --------------------------------------------------------------------------------------------


def stacked_columns(
    title: str, series: Sequence[Series], levels: Sequence[Level], width: float, axis: Axis = _TIME
) -> Markup:
    """Return one column a token, its parts on each other, with lines across, whose names a legend tells.

    Where there are more tokens than room, a column is the mean of neighbours. The axis ends a little above the
    98th percentile or the highest line; columns beyond are cut and counted in words.
    """
    count = len(series[0].values)
    group = math.ceil(count / (150 if width > 500 else 60))
    grouped = [_grouped(one.values, group) for one in series]
    sums = [math.fsum(column) for column in zip(*grouped, strict=True)]
    ordered = sorted(sums)
    far = ordered[math.ceil(0.98 * len(ordered)) - 1]
    high = max([far * 1.1, *(level.value * 1.08 for level in levels if level.value < 2.5 * far)])
    factor, unit = display_unit(axis.quantity, high)
    bottom = 26.0 + _PLOT_PX
    y = linear_scale(0.0, high * factor, bottom, 26.0, ticks=4)
    step = (width - _LEFT_PX - _RIGHT_PX) / len(sums)
    beyond = sum(1 for one in sums if one > high)
    words = "token" if group == 1 else f"token, {group} to a column"
    words += f"; {beyond:,} beyond, largest {format_value(ordered[-1], axis.quantity)}" if beyond else ""
    return picture(
        title,
        width,
        bottom + 46.0,
        [
            *_time_grid(y, bottom, width),
            *_stacks(series, grouped, [min(one, high) for one in sums], (y, factor, step)),
            *_token_ticks(count, group, step, bottom),
            *(_level(level, y(level.value * factor), width) for level in levels if level.value <= high),
            tag("text", f"{axis.title} ({unit})", x=4, y=14, class_="axis-title"),
            tag("text", words, x=width - _RIGHT_PX, y=bottom + 38, text_anchor="end", class_="axis-title"),
        ],
    )


def _grouped(values: Sequence[float], group: int) -> list[float]:
    """Return the mean of every ``group`` neighbours."""
    parts = [values[start : start + group] for start in range(0, len(values), group)]
    return [math.fsum(part) / len(part) for part in parts]


def _time_grid(y: Scale, bottom: float, width: float) -> Iterator[Markup]:
    right = width - _RIGHT_PX
    for value in y.ticks:
        yield tag("line", x1=_LEFT_PX, x2=right, y1=y(value), y2=y(value), class_="grid")
        yield tag("text", f"{value:g}", x=_LEFT_PX - 8, y=y(value) + 4, text_anchor="end", class_="tick")
    yield tag("line", x1=_LEFT_PX, x2=right, y1=bottom, y2=bottom, class_="axis")


def _stacks(
    series: Sequence[Series],
    grouped: Sequence[Sequence[float]],
    tops: Sequence[float],
    frame: tuple[Scale, float, float],
) -> Iterator[Markup]:
    y, factor, step = frame
    gap = min(1.0, step * 0.15)
    floors = [0.0] * len(tops)
    for one, values in zip(series, grouped, strict=True):
        path = ""
        for index, value in enumerate(values):
            low, high = floors[index], min(floors[index] + value, tops[index])
            floors[index] = high
            if high > low:
                left, right = _LEFT_PX + index * step + gap / 2, _LEFT_PX + (index + 1) * step - gap / 2
                path += f"M{number(left)} {number(y(low * factor))}V{number(y(high * factor))}"
                path += f"H{number(right)}V{number(y(low * factor))}Z"
        if path:
            yield tag("path", tag("title", one.name), d=path, class_=one.css)


def _token_ticks(count: int, group: int, step: float, bottom: float) -> Iterator[Markup]:
    scale = linear_scale(0.0, float(count), _LEFT_PX, _LEFT_PX + step * count / group, ticks=5)
    for value in scale.ticks:
        if value >= 1 and value == round(value):
            at = scale(value - 0.5)
            yield tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis")
            yield tag("text", f"{value:g}", x=at, y=bottom + 18, text_anchor="middle", class_="tick")


def _level(level: Level, at: float, width: float) -> Markup:
    """Return one line with a halo, so that it shows on columns too."""
    ends = {"x1": _LEFT_PX, "x2": width - _RIGHT_PX, "y1": at, "y2": at}
    halo, line = tag("line", class_="level-halo", **ends), tag("line", class_=f"level {level.css}", **ends)
    return tag("g", tag("title", level.name), halo, line)


def level_sign(level: Level) -> Markup:
    """Return the small sign of a line for a legend; the words stand beside it."""
    line = tag("line", x1=0, x2=22, y1=6, y2=6, class_=f"level {level.css}")
    return tag("svg", line, viewBox="0 0 22 12", width=22, height=12, aria_hidden="true", class_="sign")


# --- maps --------------------------------------------------------------------------------------------


def expert_map(title: str, rows: Sequence[MapRow], width: float, *, side: str = "", bar: str = "") -> Markup:
    """Return a map of layers (downwards) by experts (rightwards).

    Args:
        title: For those who cannot see it.
        rows: One per layer.
        width: In CSS pixels.
        side: What the bars beside the rows show; empty draws none.
        bar: A class of theirs.
    """
    lead = 30.0 if any(row.dense for row in rows) else 0.0
    left, right = _LEFT_PX + lead, width - (_SIDE_PX if side else _RIGHT_PX)
    experts = max(len(row.cells) for row in rows)
    height = min(max(_PLOT_PX / len(rows), _ROWS_PX[0]), _ROWS_PX[1])
    step = (right - left) / max(experts, 1)
    bottom = _MAP_TOP_PX + height * len(rows)
    parts: list[Markup] = [
        tag("text", "layer", x=4, y=22, class_="axis-title"),
        tag("text", f"expert, 0 to {experts - 1}", x=right, y=bottom + 34, text_anchor="end", class_="axis-title"),
        *_cells(rows, (left, _MAP_TOP_PX), (step, height)),
        *_row_names(rows, height),
        *_expert_ticks(experts, left, step, bottom),
    ]
    if lead:
        parts.append(tag("text", "dense", x=_LEFT_PX, y=22, class_="axis-title"))
    if side:
        parts += _side((side, bar), rows, (right + 12, width - 4), height)
    return picture(title, width, bottom + 42, parts)


def _cells(rows: Sequence[MapRow], origin: tuple[float, float], size: tuple[float, float]) -> Iterator[Markup]:
    (left, top), (step, height) = origin, size
    gap = min(1.0, 0.12 * step)
    paths: dict[str, list[str]] = {}
    for place, row in enumerate(rows):
        floor = top + (place + 1) * height - 0.5
        if row.dense is not None:
            css, share = row.dense
            paths.setdefault(css, []).append(_cell(_LEFT_PX, floor, 22.0, share * (height - 1)))
        for index, (css, share) in enumerate(row.cells):
            path = _cell(left + index * step + gap / 2, floor, step - gap, share * (height - 1))
            paths.setdefault(css, []).append(path)
        if row.note:
            yield tag("text", row.note, x=left + 4, y=floor - height / 2 + 5, class_="tick")
    for css, found in sorted(paths.items()):
        yield tag("path", d="".join(found), class_=css)


def _cell(left: float, floor: float, width: float, height: float) -> str:
    return f"M{number(left)} {number(floor)}v{number(-height)}h{number(width)}v{number(height)}z"


def _row_names(rows: Sequence[MapRow], height: float) -> Iterator[Markup]:
    every = math.ceil(13.0 / height)
    for place, row in enumerate(rows):
        if place % every == 0:
            y = _MAP_TOP_PX + (place + 0.5) * height + 4
            yield tag("text", row.name, x=_LEFT_PX - 8, y=y, text_anchor="end", class_="tick")


def _expert_ticks(experts: int, left: float, step: float, bottom: float) -> Iterator[Markup]:
    if experts < 2:
        return
    for value in linear_scale(0.0, experts - 1.0, 0.0, 1.0, ticks=4).ticks:
        if value == round(value):
            at = left + (value + 0.5) * step
            yield tag("text", f"{value:g}", x=at, y=bottom + 15, text_anchor="middle", class_="tick")


def _side(names: tuple[str, str], rows: Sequence[MapRow], span: tuple[float, float], height: float) -> Iterator[Markup]:
    """Draw a bar beside each row, and its per cent where letters fit; ``names`` are its title and a class."""
    (name, css), (left, right) = names, span
    room = text_width("100 %") if height >= 12 else 0.0
    wide = right - left - room - (4 if room else 0)
    yield tag("text", name, x=right, y=22, text_anchor="end", class_="axis-title")
    for place, row in enumerate(rows):
        top = _MAP_TOP_PX + place * height + 0.5
        if row.share is None:
            continue
        box = {"y": top + height * 0.2, "height": height * 0.6}
        yield tag("rect", x=left, width=wide, class_="side-track", **box)
        words = tag("title", f"layer {row.name}: {row.share * 100:.1f} %")
        share = min(max(row.share, 0.0), 1.0)
        yield tag("rect", words, x=left, width=wide * share, class_=f"side-bar {css}".strip(), **box)
        if room:
            yield tag(
                "text", f"{row.share * 100:.0f} %", x=right, y=top + height / 2 + 4, text_anchor="end", class_="tick"
            )


def use_cell(times_even: float) -> tuple[str, float]:
    """Return the cell of an expert used ``times_even`` times as often as an even share; never used ones are low."""
    if times_even <= 0:
        return "use never", 0.25
    return f"use u{sum(1 for level in LEVELS if times_even >= level)}", 1.0


def stay_cell(share: float) -> tuple[str, float]:
    """Return the cell of an expert that was resident for ``share`` of the time; those that never were are low."""
    if share <= 0:
        return "stay never", 0.25
    return f"stay s{sum(1 for level in STAYS if share >= level)}", 1.0


# --- clouds ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cloud:
    """Many points of one kind: class in the style sheet, name, (predicted, measured) seconds, all above 0."""

    css: str
    name: str
    points: tuple[tuple[float, float], ...]


def drawn_points(cloud: Cloud) -> tuple[tuple[float, float], ...]:
    """Return the points that are drawn: all, or every so many of them."""
    return cloud.points[:: math.ceil(len(cloud.points) / _MOST_POINTS)]


def clouds(title: str, found: Sequence[Cloud], width: float) -> Markup:
    """Return measured over predicted seconds, on one scale for both, with the line on which they are equal.

    Points of one cloud are one path, so that thousands of them stay small.
    """
    values = [value for cloud in found for point in cloud.points for value in point]
    factor, unit = display_unit("s", max(values))
    height = 380.0 if width > 500 else 330.0
    frame = Box(52, 30, width - 14, height - 46)
    seconds = [value * factor for value in values]
    x = fit_scale(seconds, frame.left, frame.right, ticks=6 if width > 500 else 3)
    y = fit_scale(seconds, frame.bottom, frame.top)
    words = f"{unit}, logarithmic" if x.logarithmic else unit
    every = 1 if width > 500 or len(x.ticks) < 6 else 2
    return picture(
        title,
        width,
        height,
        [
            *_cloud_grid(x, y, frame, every),
            *(_dots(cloud, factor, x, y) for cloud in found),
            tag("line", x1=x(x.low), y1=y(x.low), x2=x(x.high), y2=y(x.high), class_="reference"),
            tag("text", "as predicted", x=frame.right - 4, y=frame.top - 4, text_anchor="end", class_="tick"),
            tag("text", f"measured ({words})", x=4, y=14, class_="axis-title"),
            tag("text", f"predicted ({words})", x=frame.right, y=height - 8, text_anchor="end", class_="axis-title"),
        ],
    )


def _cloud_grid(x: Scale, y: Scale, frame: Box, every: int) -> Iterator[Markup]:
    for value in y.ticks:
        yield tag("line", x1=frame.left, x2=frame.right, y1=y(value), y2=y(value), class_="grid")
        yield tag("text", f"{value:g}", x=frame.left - 8, y=y(value) + 4, text_anchor="end", class_="tick")
    yield tag("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="axis")
    for place, value in enumerate(x.ticks):
        yield tag("line", x1=x(value), x2=x(value), y1=frame.top, y2=frame.bottom, class_="grid")
        if place % every == 0:
            yield tag("text", f"{value:g}", x=x(value), y=frame.bottom + 18, text_anchor="middle", class_="tick")


def _dots(cloud: Cloud, factor: float, x: Scale, y: Scale) -> Markup:
    places = sorted((x(a * factor), y(b * factor)) for a, b in drawn_points(cloud))
    path = "".join(f"M{across:.1f} {down:.1f}h0" for across, down in places)
    return tag("path", tag("title", f"{len(cloud.points):,} events {cloud.name}"), d=path, class_=f"dots {cloud.css}")


def cloud_sign(cloud: Cloud) -> Markup:
    """Return the small sign of a cloud for a legend."""
    dot = tag("path", d="M11 6h0", class_=f"dots {cloud.css}")
    return tag("svg", dot, viewBox="0 0 22 12", width=22, height=12, aria_hidden="true", class_="sign")


# --- a picture of its own ------------------------------------------------------------------------------------


def save_hit_rates(results: Sequence[SimulatedCache], path: StrPath) -> None:
    """Draw hit rates over cache sizes, a line per policy, into an ``.svg`` or ``.png`` file.

    Raises:
        InputError: There is nothing to draw, or the suffix is another.
        DeviceError: The disk is full.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = path_of(path)
    suffix = path.suffix.lower()
    if suffix not in {".svg", ".png"} or not results:
        raise InputError(f"{str(path)!r}: {len(results)} replays are drawn as .svg or .png. Name such a file.")
    style = {"svg.hashsalt": "edgeflex", "svg.fonttype": "none", "text.parse_math": False, "font.size": 10}
    buffer = io.BytesIO()
    with rc_context(style):
        figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
        plot = figure.add_subplot()
        for policy in dict.fromkeys(one.policy for one in results):
            points = sorted((one.cache_bytes / 2**20, one.hit_rate * 100) for one in results if one.policy == policy)
            plot.plot(*zip(*points, strict=True), "o-", label=policy)
        plot.set(xlabel="cache of experts (MiB)", ylabel="hit rate while decoding (%)", ylim=(-2, 102))
        plot.grid(alpha=0.3)
        plot.legend()
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(buffer, format=suffix[1:], metadata=metadata)
    write_atomic(path, buffer.getvalue())
