"""Text to bytes and seconds, and back; the only place that knows 1024 and 1e-3.

Sizes are binary with an ``i`` (``6GiB``) and decimal without (``6GB``); a bare number is bytes.
Times carry their unit (``8ms``); a bare number is refused, since it could be either.
"""

from __future__ import annotations

import re
from fractions import Fraction

from edgeflex.errors import InputError

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


def format_time(seconds: float) -> str:
    """Return a short time.

    >>> format_time(0.0004), format_time(0.0125), format_time(2.0)
    ('400.0 us', '12.50 ms', '2.00 s')
    """
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    if abs(seconds) < 1.0:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds:.2f} s"


def format_share(share: float, digits: int = 2) -> str:
    """Return a share as per cent.

    >>> format_share(0.0125)
    '1.25 %'
    """
    return f"{share * 100:.{digits}f} %"
