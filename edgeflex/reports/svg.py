"""SVG by hand: escaped elements, axes with round ticks, and labels that do not sit on each other.

Colours come from the page's style sheet through classes, so that a chart follows light and dark. Sizes are
CSS pixels, drawn one to one.
"""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Not allowed in XML, or able to reorder the text around them (bidirectional overrides).
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_CHARACTER_PX = 6.7
LINE_PX = 15.0


class Markup(str):
    """Text that is already markup; a template prints it as it is."""

    __slots__ = ()

    def __html__(self) -> str:
        """Return itself: the sign by which templates know markup."""
        return self


def clean(text: str) -> str:
    """Return ``text`` with characters replaced that XML forbids or that reorder their neighbours."""
    return _UNSAFE.sub("\ufffd", text)


def shorten(text: str, limit: int) -> str:
    """Return at most ``limit`` characters, the middle left out."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def tag(name: str, *children: str, **attributes: str | float) -> Markup:
    """Return one element; attributes and children that are not markup are escaped.

    ``class_`` becomes ``class`` and other underscores hyphens; numbers keep two decimals.
    """
    written = "".join(f' {_attribute_name(key)}="{_attribute(value)}"' for key, value in attributes.items())
    inner = "".join(
        child if isinstance(child, Markup) else html.escape(clean(child), quote=False) for child in children
    )
    return Markup(f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>")


def _attribute_name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _attribute(value: str | float) -> str:
    return html.escape(clean(value)) if isinstance(value, str) else number(value)


def number(value: float) -> str:
    """Return a coordinate with at most two decimals."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def picture(title: str, width: float, height: float, children: Iterable[str]) -> Markup:
    """Return an ``<svg>`` with a title for those who cannot see it."""
    return tag(
        "svg",
        tag("title", title),
        *children,
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=title,
    )


def text_width(text: str) -> float:
    """Return about how wide ``text`` is at the charts' 12 px."""
    return len(text) * _CHARACTER_PX


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to pixels, linearly or by logarithm."""

    low: float
    high: float
    start_px: float
    end_px: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.start_px + (at - low) / (high - low) * (self.end_px - self.start_px)


def fit_scale(
    values: Sequence[float], start_px: float, end_px: float, *, ticks: int = 5, linear: bool = False
) -> Scale:
    """Return a scale that holds all ``values`` with room around them.

    Logarithmic when all are above zero and the largest is over eight times the least, unless ``linear``; from
    zero when the least is small beside the largest.
    """
    low, high = min(values), max(values)
    if low > 0 and high / low > 8 and not linear:
        return _log_scale(low / 1.15, high * 1.15, start_px, end_px)
    if low == high:
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    pad = (high - low) * 0.08
    padded_low = 0.0 if 0 <= low < 0.35 * high else low - pad
    return linear_scale(padded_low, high + pad, start_px, end_px, ticks=ticks)


def linear_scale(low: float, high: float, start_px: float, end_px: float, *, ticks: int = 5) -> Scale:
    """Return a linear scale from ``low`` to ``high`` with about ``ticks`` round ticks."""
    rough = (high - low) / max(ticks, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.8)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    marks = tuple(round(index * step, 12) for index in range(first, last + 1))
    return Scale(low, high, start_px, end_px, marks)


def _log_scale(low: float, high: float, start_px: float, end_px: float) -> Scale:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = tuple(float(f"{mark:.3g}") for mark in marks if low <= mark <= high)
    if len(inside) > 8:
        inside = tuple(mark for mark in inside if f"{mark:e}".startswith("1"))
    return Scale(low, high, start_px, end_px, inside, logarithmic=True)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle that labels keep clear of."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Return whether the two share an area."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)

    def inside(self, other: Box) -> bool:
        """Return whether this box lies wholly in ``other``."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


def place_label(text: str, x: float, y: float, taken: list[Box], frame: Box) -> Markup | None:
    """Return a text near (x, y) that covers nothing in ``taken``, and take its room; None if there is none."""
    width = text_width(text)
    for dx, dy, anchor in _spots():
        left = x + dx - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
        box = Box(left, y + dy - 10, left + width, y + dy + 4)
        needed = [box]
        leader: list[Markup] = []
        if abs(dy - 4) > 16:
            # A name that had to move away is tied to its point, by a line that crosses nothing either.
            foot_x, foot_y = min(max(x, left), left + width), y + dy + (4 if dy < 0 else -10)
            near = y + math.copysign(9.0, dy)
            needed.append(Box(min(x, foot_x) - 1, min(near, foot_y), max(x, foot_x) + 1, max(near, foot_y)))
            leader.append(tag("line", x1=x, y1=y, x2=foot_x, y2=foot_y, class_="leader"))
        if box.inside(frame) and not any(need.overlaps(other) for need in needed for other in taken):
            taken.extend(needed)
            return tag("g", *leader, tag("text", text, x=x + dx, y=y + dy, text_anchor=anchor, class_="label"))
    return None


def _spots() -> Iterable[tuple[float, float, str]]:
    for reach in (0.0, 9.0, 20.0, 34.0):
        yield 12 + reach / 3, 4 - reach, "start"
        yield 12 + reach / 3, 4 + reach, "start"
        yield -12 - reach / 3, 4 - reach, "end"
        yield -12 - reach / 3, 4 + reach, "end"
        yield 0, -12 - reach, "middle"
        yield 0, 20 + reach, "middle"
        yield 8, 20 + reach, "end"
        yield -8, 20 + reach, "start"
        yield 8, -12 - reach, "end"
        yield -8, -12 - reach, "start"


def cascade_rows(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Return a row for each (left, right) span, sorted by left, so that none overlap in a row.

    A span goes below every earlier one that reaches over it: a line dropped from its left end then
    crosses no other span.
    """
    rows: list[int] = []
    for index, (left, _) in enumerate(spans):
        over = [row for row, (_, right) in zip(rows, spans[:index], strict=True) if right > left]
        rows.append(max(over, default=-1) + 1)
    return rows
