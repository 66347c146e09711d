"""The report's charts as inline SVG, and the Pareto curve as a file.

A chart takes the width it will be shown at, so that its letters keep their size on a phone. Shape says what
colour says.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgeflex.errors import InputError
from edgeflex.files import StrPath, path_of, write_atomic
from edgeflex.reports.svg import (
    LINE_PX,
    Box,
    Markup,
    Scale,
    cascade_rows,
    clean,
    fit_scale,
    linear_scale,
    number,
    picture,
    place_label,
    shorten,
    tag,
    text_width,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from io import BytesIO

    from edgeflex.schema import Curve, CurvePoint, Precision

Kind = Literal["plan", "chosen", "baseline", "static", "oracle"]
Quantity = Literal["s", "bytes", "share"]
_WIDE_PX, _NARROW_PX = 760.0, 340.0
_MAX_COLUMN_PX = 26.0
_PANEL_PX = {"bits": 92.0, "weights": 58.0, "sensitivity": 58.0}


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a scatter chart, in seconds, bytes or shares."""

    label: str
    x: float
    y: float
    kind: Kind
    named: bool = True


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows; ``linear`` keeps it from being logarithmic."""

    title: str
    quantity: Quantity
    linear: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit or a reference drawn across the chart; ``along`` is the axis that its value is on."""

    along: Literal["x", "y"]
    value: float
    label: str
    kind: Literal["limit", "reference"] = "limit"


@dataclass(frozen=True, slots=True)
class Line:
    """A line through points, of the colour of a kind of point."""

    points: tuple[tuple[float, float], ...]
    kind: Kind


@dataclass(frozen=True, slots=True)
class LayerBar:
    """A layer as the strip draws it. ``loss`` is the sensitivity, or None where it is not known."""

    name: str
    segment: int
    precision: Precision
    weight_bytes: float
    loss: float | None = None


def display_unit(quantity: Quantity, largest: float) -> tuple[float, str]:
    """Return the factor and the name of the unit that suits values up to ``largest``."""
    if quantity == "share":
        return 100.0, "%"
    if quantity == "s":
        return (1.0, "s") if largest >= 1 else (1e3, "ms") if largest >= 1e-3 else (1e6, "µs")
    power = min(int(math.log(max(largest, 1.0), 1024)), 4)
    return 1024.0**-power, ("B", "KiB", "MiB", "GiB", "TiB")[power]


def curve_axes(points: Sequence[CurvePoint]) -> tuple[Axis, Axis]:
    """Return the two quantities that the points trade: latency and drop, or memory for the one that stays.

    A sweep holds one budget still, so that one quantity may hardly vary over its points.
    """
    latencies, drops = {point.latency_s for point in points}, {point.drop for point in points}
    latency, memory, drop = Axis("latency", "s"), Axis("memory", "bytes"), Axis("accuracy drop", "share")
    if len(points) > 1 and len(latencies) == 1:
        return memory, drop
    return (latency, memory) if len(points) > 1 and len(drops) == 1 else (latency, drop)


def coordinate(point: CurvePoint, axis: Axis) -> float:
    """Return the value of ``point`` on ``axis``."""
    return {"s": point.latency_s, "bytes": float(point.memory_bytes), "share": point.drop}[axis.quantity]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats on both coordinates, by rising first coordinate.

    A sweep over memory has plans that stand behind others once only latency and drop are drawn.
    """
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def both_widths(draw: Callable[[float], Markup]) -> Markup:
    """Return a chart at desk and at phone width; the style sheet shows one."""
    return Markup(f'<div class="wide">{draw(_WIDE_PX)}</div><div class="narrow">{draw(_NARROW_PX)}</div>')


# --- scatter -----------------------------------------------------------------------------------------


def scatter(
    title: str,
    marks: Sequence[Mark],
    axes: tuple[Axis, Axis],
    width: float,
    *,
    frontier: Sequence[tuple[float, float]] = (),
    rules: Sequence[Rule] = (),
    lines: Sequence[Line] = (),
) -> Markup:
    """Return points with names, a step line through ``frontier``, ``lines``, and limits, as one picture.

    The line steps because nothing between two plans can be had: up to the next plan the last one is best.
    """
    (x_axis, x_factor, x_unit), (y_axis, y_factor, y_unit) = (
        (axis, *display_unit(axis.quantity, max(abs(getattr(mark, name)) for mark in marks)))
        for axis, name in zip(axes, ("x", "y"), strict=True)
    )
    height = 360.0 if width > 500 else 320.0
    frame = Box(50, 30, width - 14, height - 46)
    shown = [rule for rule in rules if _rule_fits(rule, marks)]
    x_ticks = 5 if width > 500 else 3
    x_values, y_values = _values(marks, shown, "x", x_factor), _values(marks, shown, "y", y_factor)
    x = fit_scale(x_values, frame.left, frame.right, ticks=x_ticks, linear=x_axis.linear)
    y = fit_scale(y_values, frame.bottom, frame.top, linear=y_axis.linear)
    at = {id(mark): (x(mark.x * x_factor), y(mark.y * y_factor)) for mark in marks}
    drawn = [(rule, x(rule.value * x_factor) if rule.along == "x" else y(rule.value * y_factor)) for rule in shown]
    taken = [Box(px - 8, py - 8, px + 8, py + 8) for px, py in at.values()]
    return picture(
        title,
        width,
        height,
        [
            *_grid(x, y, frame),
            *_axis_titles(_axis_title(x_axis, x_unit, x), _axis_title(y_axis, y_unit, y), frame, height),
            *_rules(drawn, frame, taken),
            *_steps([(x(a * x_factor), y(b * y_factor)) for a, b in frontier]),
            *(_line(line.kind, [(x(a * x_factor), y(b * y_factor)) for a, b in line.points]) for line in lines),
            *(
                _dot(mark, at[id(mark)], f"{mark.x * x_factor:.4g} {x_unit}, {mark.y * y_factor:.4g} {y_unit}")
                for mark in marks
            ),
            *_names(marks, at, taken, Box(4, 18, width - 4, frame.bottom)),
        ],
    )


def _rule_fits(rule: Rule, marks: Sequence[Mark]) -> bool:
    values = [mark.x if rule.along == "x" else mark.y for mark in marks]
    low, high = min(values), max(values)
    room = (high - low) * 0.5
    return low - room <= rule.value <= high + room


def _values(marks: Sequence[Mark], rules: Sequence[Rule], along: Literal["x", "y"], factor: float) -> list[float]:
    values = [mark.x if along == "x" else mark.y for mark in marks]
    return [value * factor for value in (*values, *(rule.value for rule in rules if rule.along == along))]


def _grid(x: Scale, y: Scale, frame: Box) -> Iterator[Markup]:
    for value in y.ticks:
        yield tag("line", x1=frame.left, x2=frame.right, y1=y(value), y2=y(value), class_="grid")
        yield tag("text", f"{value:g}", x=frame.left - 8, y=y(value) + 4, text_anchor="end", class_="tick")
    yield from _x_ticks(x, frame)


def _x_ticks(x: Scale, frame: Box) -> Iterator[Markup]:
    yield tag("line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="axis")
    for value in x.ticks:
        yield tag("line", x1=x(value), x2=x(value), y1=frame.bottom, y2=frame.bottom + 4, class_="axis")
        yield tag("text", f"{value:g}", x=x(value), y=frame.bottom + 18, text_anchor="middle", class_="tick")


def _axis_title(axis: Axis, unit: str, scale: Scale) -> str:
    return f"{axis.title} ({unit}, logarithmic)" if scale.logarithmic else f"{axis.title} ({unit})"


def _axis_titles(x_title: str, y_title: str, frame: Box, height: float) -> Iterator[Markup]:
    yield tag("text", y_title, x=4, y=14, class_="axis-title")
    yield tag("text", x_title, x=frame.right, y=height - 8, text_anchor="end", class_="axis-title")


def _rules(drawn: Sequence[tuple[Rule, float]], frame: Box, taken: list[Box]) -> Iterator[Markup]:
    """Draw each rule at its pixel with its name, and keep both from being written over."""
    for rule, at in drawn:
        if rule.along == "x":
            line = Box(at, frame.top, at, frame.bottom)
            sides = ((at + 6, "start"), (at - 6, "end"))
            spots = [(x, y, anchor) for y in (frame.top + 12, frame.bottom - 8) for x, anchor in sides]
        else:
            line = Box(frame.left, at, frame.right, at)
            middle = (frame.left + frame.right) / 2
            ends = ((frame.right - 2, "end"), (frame.left + 6, "start"), (middle, "middle"))
            spots = [(x, y, anchor) for x, anchor in ends for y in (at - 6, at + 15)]
        yield tag("line", x1=line.left, x2=line.right, y1=line.top, y2=line.bottom, class_=rule.kind)
        yield _rule_name(rule, spots, taken, frame)
        taken.append(Box(line.left - 1, line.top - 1, line.right + 1, line.bottom + 1))


def _rule_name(rule: Rule, spots: Sequence[tuple[float, float, str]], taken: list[Box], frame: Box) -> Markup:
    """Return the rule's name at the first of ``spots``, each (x, y, anchor), that is free."""
    room = text_width(rule.label)
    boxes = []
    for x, y, anchor in spots:
        left = x - {"start": 0.0, "middle": room / 2, "end": room}[anchor]
        boxes.append(Box(left, y - 11, left + room, y + 4))
    free = [box for box in boxes if box.inside(frame) and not any(box.overlaps(other) for other in taken)]
    box = (free or boxes)[0]
    taken.append(box)
    return tag("text", rule.label, x=box.left, y=box.bottom - 4, class_=f"label {rule.kind}-label")


def _steps(points: Sequence[tuple[float, float]]) -> Iterator[Markup]:
    if len(points) < 2:
        return
    path = f"M{number(points[0][0])} {number(points[0][1])}"
    path += "".join(f"H{number(x)}V{number(y)}" for x, y in points[1:])
    yield tag("path", d=path, class_="frontier")


def _line(kind: Kind, points: Sequence[tuple[float, float]]) -> Markup:
    path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return tag("path", d=path, class_=f"curve {kind}")


def _dot(mark: Mark, at: tuple[float, float], words: str) -> Markup:
    return tag("g", tag("title", f"{mark.label}: {words}"), *shape(mark.kind, *at), class_=f"mark {mark.kind}")


def shape(kind: Kind, x: float, y: float) -> tuple[Markup, ...]:
    """Return the sign of a kind of point, so that colour is not the only one."""
    if kind == "chosen":
        return tag("circle", cx=x, cy=y, r=10, class_="halo"), tag("circle", cx=x, cy=y, r=6)
    if kind == "plan":
        return (tag("circle", cx=x, cy=y, r=4),)
    if kind == "static":
        return (tag("rect", x=x - 4.5, y=y - 4.5, width=9, height=9),)
    corners = {"oracle": ((0, -7), (6.5, 5), (-6.5, 5)), "baseline": ((0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0))}
    points = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in corners[kind])
    return (tag("polygon", points=points),)


def _names(marks: Sequence[Mark], at: dict[int, tuple[float, float]], taken: list[Box], frame: Box) -> Iterator[Markup]:
    # The chosen point speaks first, so that crowding never costs its name.
    for mark in sorted((mark for mark in marks if mark.named), key=lambda mark: mark.kind != "chosen"):
        text = place_label(shorten(clean(mark.label), 30), *at[id(mark)], taken, frame)
        if text is not None:
            yield tag("g", text, class_=f"name {mark.kind}")


# --- histogram ---------------------------------------------------------------------------------------


def histogram(
    title: str, samples_s: Sequence[float], lines: Sequence[tuple[str, float]], limits: Sequence[Rule], width: float
) -> Markup:
    """Return how often each latency occurred, with named lines for statistics and limits.

    The axis ends a little after the 99.5th percentile, or the last line; what lies beyond is counted in words.
    """
    ordered = sorted(samples_s)
    factor, unit = display_unit("s", ordered[-1])
    far = ordered[math.ceil(0.995 * len(ordered)) - 1]
    near = [rule for rule in limits if rule.value <= 1.6 * far]
    signs = sorted(
        [(value, name, "stat") for name, value in lines] + [(rule.value, rule.label, "limit") for rule in near]
    )
    high = max([far, *(value for value, _, _ in signs)]) * 1.04
    low = 0.0 if ordered[0] < 0.35 * high else ordered[0] - (high - ordered[0]) * 0.04
    count = 64 if width > 500 else 32
    bins = _count_bins(ordered, low, high, count)
    rows = _line_rows(signs, linear_scale(low * factor, high * factor, 44, width - 14), factor, width)
    top = 14 + LINE_PX * (max(row for *_, row in rows) + 1) if rows else 20.0
    frame = Box(44, top, width - 14, top + 190)
    x = linear_scale(low * factor, high * factor, frame.left, frame.right, ticks=6 if width > 500 else 3)
    y = linear_scale(0, max(bins), frame.bottom, frame.top + 6, ticks=3)
    beyond = sum(1 for sample in ordered if sample > high)
    height = frame.bottom + 46
    parts = [*_grid(x, y, frame), *_columns(bins, frame, y), *_line_signs(rows, frame)]
    parts.append(tag("text", "samples", x=4, y=12, class_="axis-title"))
    words = f"latency ({unit})" + (f"; {beyond:,} beyond, largest {ordered[-1] * factor:.3g}" if beyond else "")
    parts.append(tag("text", words, x=frame.right, y=height - 8, text_anchor="end", class_="axis-title"))
    return picture(title, width, height, parts)


def _count_bins(samples: Sequence[float], low: float, high: float, count: int) -> list[int]:
    bins = [0] * count
    for sample in samples:
        if sample <= high:
            bins[min(int((sample - low) / (high - low) * count), count - 1)] += 1
    return bins


def _columns(bins: Sequence[int], frame: Box, y: Scale) -> Iterator[Markup]:
    step = (frame.right - frame.left) / len(bins)
    for index, count in enumerate(bins):
        if count:
            left, top = frame.left + index * step, y(count)
            yield tag("rect", x=left + 0.5, y=top, width=step - 1, height=frame.bottom - top, class_="column")


def _line_rows(
    signs: Sequence[tuple[float, str, str]], x: Scale, factor: float, width: float
) -> list[tuple[float, float, str, str, int]]:
    """Return (line x, text x, words, kind, row) for each named line; names that would collide take rows."""
    placed = []
    for value, name, kind in signs:
        at, room = x(value * factor), text_width(name) + 8
        left = at + 5 if at + 5 + room <= width else at - 5 - text_width(name)
        placed.append((at, left, name, kind))
    placed.sort(key=lambda sign: sign[1])
    rows = cascade_rows([(left - 8, left + text_width(name) + 4) for _, left, name, _ in placed])
    return [(*sign, row) for sign, row in zip(placed, rows, strict=True)]


def _line_signs(rows: Sequence[tuple[float, float, str, str, int]], frame: Box) -> Iterator[Markup]:
    for at, _, _, kind, row in rows:
        yield tag("line", x1=at, x2=at, y1=14 + LINE_PX * row, y2=frame.bottom, class_=f"line {kind}")
    for _, left, name, kind, row in rows:
        yield tag("text", name, x=left, y=24 + LINE_PX * row, class_=f"label {kind}-label")


# --- layers ------------------------------------------------------------------------------------------


def layer_strip(title: str, layers: Sequence[LayerBar], width: float) -> Markup:
    """Return one column a layer, in execution order: its bits, its weight bytes, and its sensitivity if known."""
    left, right = 50.0, width - 8
    step = min((right - left) / len(layers), _MAX_COLUMN_PX)
    panels = ["bits", "weights", *(["sensitivity"] if any(layer.loss is not None for layer in layers) else [])]
    parts: list[Markup] = []
    top = 34.0
    for panel in panels:
        bottom = top + _PANEL_PX[panel]
        parts += _panel(panel, layers, left, step, (top, bottom))
        parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        top = bottom + 36
    parts += _segment_signs(layers, left, step, top - 36)
    return picture(title, width, top - 8, parts)


def _panel(
    panel: str, layers: Sequence[LayerBar], left: float, step: float, span: tuple[float, float]
) -> Iterator[Markup]:
    top, bottom = span
    factor, unit = display_unit("bytes", max(layer.weight_bytes for layer in layers))
    words = {
        "bits": "bits a weight (doubling steps)",
        "weights": f"weights ({unit})",
        "sensitivity": "sensitivity (added loss)",
    }[panel]
    yield tag("text", words, x=4, y=top - 14, class_="axis-title")
    values = [_panel_value(panel, layer, factor) for layer in layers]
    scale = linear_scale(0, 4 if panel == "bits" else max([*values, 1e-12]), bottom, top, ticks=2)
    for tick in (1, 2, 3, 4) if panel == "bits" else scale.ticks[1:]:
        name = str(2 ** (int(tick) + 1)) if panel == "bits" else f"{tick:g}"
        yield tag("line", x1=left, x2=left + step * len(layers), y1=scale(tick), y2=scale(tick), class_="grid")
        yield tag("text", name, x=left - 8, y=scale(tick) + 4, text_anchor="end", class_="tick")
    gap = min(1.0, step * 0.15)
    for index, (layer, value) in enumerate(zip(layers, values, strict=True)):
        if value > 0:
            box = {"x": left + index * step + gap, "width": step - 2 * gap}
            label = tag("title", f"{layer.name}: {layer.precision.value}, {layer.weight_bytes:,.0f} bytes")
            yield tag("rect", label, y=scale(value), height=bottom - scale(value), class_=_css(layer.precision), **box)


def _css(precision: Precision) -> str:
    return f"precision {precision.value}"


def _panel_value(panel: str, layer: LayerBar, factor: float) -> float:
    if panel == "bits":
        return math.log2(layer.precision.bits) - 1
    return layer.weight_bytes * factor if panel == "weights" else max(layer.loss or 0.0, 0.0)


def _segment_signs(layers: Sequence[LayerBar], left: float, step: float, bottom: float) -> Iterator[Markup]:
    start = 0
    for index in range(1, len(layers) + 1):
        if index < len(layers) and layers[index].segment == layers[start].segment:
            continue
        first, last = left + start * step, left + index * step
        if start:
            yield tag("line", x1=first, x2=first, y1=34, y2=bottom + 6, class_="divider")
        wide = f"segment {layers[start].segment + 1}"
        name = wide if text_width(wide) < last - first else str(layers[start].segment + 1)
        if text_width(name) < last - first:
            yield tag("text", name, x=(first + last) / 2, y=bottom + 18, text_anchor="middle", class_="tick")
        start = index


# --- bars that stretch -------------------------------------------------------------------------------


def share_bar(title: str, shares: Sequence[tuple[str, float]], mark: float | None = None) -> Markup:
    """Return one stacked bar as wide as its cell; ``shares`` are (class, fraction), ``mark`` a tick across it."""
    parts = [tag("title", title), tag("rect", width="100%", height="100%", rx=3, class_="track")]
    start = 0.0
    for name, share in shares:
        held = min(max(share, 0.0), 1.0 - start)
        parts.append(tag("rect", x=_percent(start), width=_percent(held), height="100%", class_=name))
        start += held
    if mark is not None:
        at = _percent(min(max(mark, 0.0), 1.0))
        parts.append(tag("line", x1=at, x2=at, y1="0", y2="100%", class_="tick-mark"))
    return tag("svg", *parts, role="img", aria_label=title, class_="bar")


def _percent(share: float) -> str:
    return f"{number(share * 100)}%"


def legend_sign(kind: Kind) -> Markup:
    """Return the small sign of a kind for a legend; the words stand beside it."""
    sign = tag("g", *shape(kind, 11, 11), class_=f"mark {kind}")
    return tag("svg", sign, viewBox="0 0 22 22", width=18, height=18, aria_hidden="true", class_="sign")


# --- file --------------------------------------------------------------------------------------------


def save_curve(curve: Curve, path: StrPath) -> None:
    """Draw the Pareto curve into an ``.svg`` or ``.png`` file; equal curves give equal bytes.

    Raises:
        InputError: The curve is empty, or the suffix is another.
        DeviceError: The disk is full.
    """
    path = path_of(path)
    suffix = path.suffix.lower()
    if suffix not in {".svg", ".png"}:
        msg = f"plot file {str(path)!r} ends in {suffix!r}; a curve is drawn as .svg or .png. Rename it."
        raise InputError(msg)
    if not curve.points:
        raise InputError("the curve has 0 points; at least 1 is needed to draw it. Widen the sweep or the budget.")
    buffer = io.BytesIO()
    _draw_curve(curve, buffer, suffix[1:])
    write_atomic(path, buffer.getvalue())


def _draw_curve(curve: Curve, target: BytesIO, file_format: str) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    axes = curve_axes((*curve.points, *curve.baselines))
    spans = [max(abs(coordinate(point, axis)) for point in (*curve.points, *curve.baselines)) for axis in axes]
    units = [display_unit(axis.quantity, span) for axis, span in zip(axes, spans, strict=True)]
    style = {"svg.hashsalt": "edgeflex", "svg.fonttype": "none", "text.parse_math": False, "font.size": 10}
    with rc_context(style):
        figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
        plot = figure.add_subplot()

        def places(points: Sequence[CurvePoint]) -> list[tuple[float, float]]:
            return [(coordinate(p, axes[0]) * units[0][0], coordinate(p, axes[1]) * units[1][0]) for p in points]

        chosen = [point for point in curve.points if point.chosen]
        plot.step(*zip(*front(places(curve.points)), strict=True), where="post", color="#1f5fa8", alpha=0.6)
        plot.plot(*zip(*places(curve.points), strict=True), "o", color="#1f5fa8", label="plans")
        if curve.baselines:
            plot.plot(*zip(*places(curve.baselines), strict=True), "D", mfc="none", color="#7a7f87", label="baselines")
        if chosen:
            plot.plot(*zip(*places(chosen), strict=True), "o", ms=11, color="#c4570b", label="chosen")
        named = (*curve.baselines, *chosen)
        for point, place in zip(named, places(named), strict=True):
            plot.annotate(shorten(clean(point.label), 30), place, xytext=(8, 6), textcoords="offset points")
        plot.set_xlabel(f"{axes[0].title} ({units[0][1]})")
        plot.set_ylabel(f"{axes[1].title} ({units[1][1]})")
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
        plot.legend(frameon=False)
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(target, format=file_format, metadata=metadata)
