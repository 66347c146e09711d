"""Text to bytes and seconds, and back; the only place that knows 1024 and 1e-3.

Sizes are binary with an ``i`` (``6GiB``) and decimal without (``6GB``); a bare number is bytes.
Times carry their unit (``8ms``); a bare number is refused, since it could be either.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

from edgeflex.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

Parsed = TypeVar("Parsed")

_SIZE = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _SIZE[f"{_letter}b"] = 1000**_power
    _SIZE[f"{_letter}ib"] = 1024**_power
_TIME = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_NUMBER = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})\s*([a-zµμ%]*)\s*", re.IGNORECASE)
_MOST_BYTES = 2**63 - 1  # what a file or an address can hold
_MOST_S = 1e9


def _split(text: str, what: str, examples: str) -> tuple[Fraction, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        msg = f"{what} {text!r} is not a number with a unit. Write it as {examples}."
        raise InputError(msg)
    return Fraction(match.group(1).rstrip(".")), match.group(2).lower()


def parse_size_bytes(text: str) -> int:
    """Return the bytes that ``text`` means.

    >>> parse_size_bytes("6GiB"), parse_size_bytes("1.5MB"), parse_size_bytes("4096")
    (6442450944, 1500000, 4096)

    Raises:
        InputError: ``text`` is not a positive size with a known unit.
    """
    examples = "6GiB, 512MiB, 1.5MB or a plain number of bytes"
    number, unit = _split(text, "size", examples)
    if unit not in _SIZE:
        msg = f"size {text!r} has the unknown unit {unit!r}. Write it as {examples}."
        raise InputError(msg)
    size_bytes = round(number * _SIZE[unit])
    if size_bytes <= 0:
        msg = f"size {text!r} is {size_bytes} bytes; it must be at least 1. Write it as {examples}."
        raise InputError(msg)
    if size_bytes > _MOST_BYTES:
        msg = f"size {text!r} is more than {_MOST_BYTES} bytes, which nothing can hold. Write it as {examples}."
        raise InputError(msg)
    return size_bytes


def parse_rate_bytes_per_s(text: str) -> int:
    """Return the bytes per second that ``text`` means: ``25GB/s`` and ``25GB`` are the same.

    Raises:
        InputError: ``text`` is not a positive size with a known unit.
    """
    return parse_size_bytes(text.strip().removesuffix("/s"))


def option_value(option: str, text: str | None, parse: Callable[[str], Parsed]) -> Parsed | None:
    """Return what the text after an option of the command line means; None where it was not given.

    Raises:
        InputError: It means nothing; the message begins with the option.
    """
    try:
        return None if text is None else parse(text)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None


def parse_time_s(text: str) -> float:
    """Return the seconds that ``text`` means.

    >>> parse_time_s("25ms"), parse_time_s("0.5s")
    (0.025, 0.5)

    Raises:
        InputError: ``text`` is not a positive time with a known unit.
    """
    examples = "25ms, 800us or 0.5s"
    number, unit = _split(text, "time", examples)
    if unit not in _TIME:
        why = "has no unit" if not unit else f"has the unknown unit {unit!r}"
        msg = f"time {text!r} {why}. Write it as {examples}."
        raise InputError(msg)
    seconds = float(number) * _TIME[unit]
    if not 0.0 < seconds <= _MOST_S:
        msg = f"time {text!r} must be above zero and at most {_MOST_S:.0e} seconds. Write it as {examples}."
        raise InputError(msg)
    return seconds


def parse_share(text: str) -> float:
    """Return the fraction that ``text`` means: ``1%`` and ``0.01`` are the same.

    Raises:
        InputError: ``text`` is not between 0 and 100 %.
    """
    number, unit = _split(text, "share", "1% or 0.01")
    if unit not in {"", "%"}:
        msg = f"share {text!r} has the unknown unit {unit!r}. Write it as 1% or 0.01."
        raise InputError(msg)
    share = float(number / 100 if unit == "%" else number)
    if not 0.0 <= share <= 1.0:
        msg = f"share {text!r} lies outside 0 to 100 %. Write it as 1% or 0.01."
        raise InputError(msg)
    return share


def format_bytes(size_bytes: float) -> str:
    """Return a short binary size.

    >>> format_bytes(6442450944), format_bytes(900)
    ('6.00 GiB', '900 B')
    """
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def format_exact_bytes(size_bytes: float) -> str:
    """Return a binary size that loses nothing: short where that is exact, else with its bytes beside it.

    >>> format_exact_bytes(102400), format_exact_bytes(113616)
    ('100 KiB', '110.95 KiB (113616 bytes)')
    """
    shown = format_bytes(size_bytes)
    number, unit = shown.split()
    if unit == "B":
        return shown
    short = f"{number.rstrip('0').rstrip('.')} {unit}"
    exact = Fraction(number) * _SIZE[unit.lower()] == round(size_bytes)
    return short if exact else f"{shown} ({round(size_bytes)} bytes)"


def format_time(seconds: float, *, up: bool = False) -> str:
    """Return a short time; with ``up`` no less than ``seconds``, so that it can be given back as a limit.

    >>> format_time(0.0004), format_time(0.0125), format_time(2.0)
    ('400.0 µs', '12.50 ms', '2.00 s')
    >>> format_time(0.012541), format_time(0.012541, up=True)
    ('12.54 ms', '12.55 ms')
    """
    if abs(seconds) < 1e-3:
        return f"{_digits(seconds * 1e6, 1, up=up)} µs"
    if abs(seconds) < 1.0:
        return f"{_digits(seconds * 1e3, 2, up=up)} ms"
    return f"{_digits(seconds, 2, up=up)} s"


def format_fine_time(seconds: float) -> str:
    """Return a time with five significant digits, which tell a value from its bound, in the unit of ``format_time``.

    >>> format_fine_time(0.000012834), format_fine_time(0.00027785), format_fine_time(2.0)
    ('12.834 µs', '277.85 µs', '2 s')
    """
    for scale, unit in ((1e6, "µs"), (1e3, "ms")):
        if abs(seconds) * scale < 1e3:
            return f"{seconds * scale:.5g} {unit}"
    return f"{seconds:.5g} s"


def format_share(share: float, digits: int = 2, *, up: bool = False) -> str:
    """Return a share as per cent; with ``up`` no less than ``share``.

    >>> format_share(0.0125)
    '1.25 %'
    """
    return f"{_digits(share * 100, digits, up=up)} %"


def format_count(number: int, one: str) -> str:
    """Return a number with its noun, in the plural unless it is 1.

    >>> format_count(1, "thread"), format_count(1200, "token")
    ('1 thread', '1,200 tokens')
    """
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def format_growth(old: float, new: float) -> str:
    """Return how much more ``new`` is than ``old``, above zero.

    >>> format_growth(100, 110.4), format_growth(1, 441)
    ('+10.4 %', '441 times as much')
    """
    return f"+{(new / old - 1) * 100:.1f} %" if new < 10 * old else f"{new / old:,.0f} times as much"


def format_nats(nats: float, *, up: bool = False) -> str:
    """Return a divergence with four significant digits; with ``up`` no less than ``nats``.

    >>> format_nats(0.0123412), format_nats(0.0123412, up=True)
    ('0.01234', '0.01235')
    """
    if not up or not 0.0 < nats < math.inf:
        return f"{nats:.4g}"
    step = Fraction(10) ** (math.floor(math.log10(nats)) - 3)
    return f"{float(math.ceil(nats / float(step) - 1e-7) * step):.4g}"


def _digits(value: float, digits: int, *, up: bool) -> str:
    # A sum of floats a hair above 357 must not become 357.1; limits are kept with more slack than that.
    return f"{math.ceil(value * 10**digits - 1e-7) / 10**digits if up else value:.{digits}f}"
