"""A report in words: numbers with units, verdicts, one sentence, and the rows of the terminal's table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edgeflex.reports.build import measured_latency_s
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeflex.schema import Check, Report

ABSENT = "–"
State = Literal["good", "bad", "unknown"]


def format_seconds(seconds: float) -> str:
    """Return three significant digits in microseconds, milliseconds or seconds, the unit nearest below.

    >>> format_seconds(0.000119), format_seconds(0.0125), format_seconds(2.5), format_seconds(4e-6)
    ('119 µs', '12.5 ms', '2.50 s', '4.00 µs')
    """
    size = abs(seconds)
    if size >= 1.0:
        return f"{_significant(seconds)} s"
    return f"{_significant(seconds * 1e3)} ms" if size >= 1e-3 or size == 0 else f"{_significant(seconds * 1e6)} µs"


def _significant(value: float) -> str:
    """Return three significant digits without an exponent."""
    size = abs(value)
    digits = 2 if size >= 1 or size == 0 else next(d for d in range(3, 12) if size >= 10.0 ** (2 - d) or d == 11)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else digits}f}"


def format_value(value: float, unit: str) -> str:
    """Return ``value`` as text in its unit: bytes, s, share or count.

    >>> format_value(0.0123, "share"), format_value(2048, "bytes"), format_value(1500, "count")
    ('1.23 %', '2.00 KiB', '1,500')
    """
    if unit == "bytes":
        return format_bytes(value)
    if unit == "s":
        return format_seconds(value)
    if unit == "share":
        return f"{value * 100:.2f} %" if abs(value) >= 1e-4 or value == 0 else f"{value * 100:.2g} %"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.4g}"


def format_error(check: Check) -> str:
    """Return how far the measurement lies from the promise.

    Relative, save for shares: these differ by points, since a relative error of a small drop says nothing.
    """
    if not check.was_measured:
        return ABSENT
    difference = check.measured - check.promised
    if difference == 0:
        return "exact"
    if check.unit == "share":
        return _signed(f"{difference * 100:+.2f} points")
    if check.promised == 0:
        return ABSENT
    return _signed(f"{difference / abs(check.promised) * 100:+.1f} %")


def _signed(text: str) -> str:
    return text.replace("-", "−")


def state_of(check: Check) -> State:
    """Return good, bad, or unknown: not measured, or beyond the limit by less than the sample can err."""
    if not check.was_measured:
        return "unknown"
    if not check.ok:
        return "bad"
    return "unknown" if check.limit is not None and check.measured > check.limit else "good"


def verdict_word(check: Check, *, budget: bool) -> str:
    """Return the verdict: a budget is met or broken, a promise is kept or not, another check holds or fails."""
    good, bad = ("met", "broken") if budget else ("kept", "not kept") if check.limit is None else ("holds", "fails")
    unsure = "within error" if check.was_measured else "not measured"
    return {"good": good, "bad": bad, "unknown": unsure}[state_of(check)]


def other_checks(report: Report) -> tuple[Check, ...]:
    """Return what bench and verify checked beyond the budgets, each once.

    A check that agrees with a budget's verdict on the same measurement is left out; one that contradicts
    it stays.
    """
    told = {(verdict.name, verdict.measured, verdict.ok) for verdict in report.verdicts if verdict.was_measured}
    kept: list[Check] = []
    for result in (report.bench, report.verify):
        for check in result.checks if result is not None else ():
            if (check.name.removesuffix(" budget"), check.measured, check.ok) not in told and check not in kept:
                kept.append(check)
    return tuple(kept)


def outcome(report: Report) -> tuple[State, str]:
    """Return the report in one or two plain sentences, and its state."""
    states = [state_of(verdict) for verdict in report.verdicts]
    failed = [check.name for check in other_checks(report) if state_of(check) == "bad"]
    sentences = [budget_sentence(report.verdicts)]
    if failed:
        fails = _count(len(failed), "further promise is not kept", "further promises are not kept")
        sentences.append(f"{fails}: {', '.join(failed)}.")
    sentences.append(_latency_sentence(report))
    if "bad" in states or failed:
        return "bad", " ".join(sentences)
    return ("good" if states and "unknown" not in states else "unknown"), " ".join(sentences)


def budget_sentence(verdicts: Sequence[Check]) -> str:
    """Return in one sentence how many budgets are met, and the names of the others."""
    total = len(verdicts)
    if total == 0:
        return "No budget was set."
    words = [(verdict_word(verdict, budget=True), verdict.name) for verdict in verdicts]
    met = sum(1 for word, _ in words if word == "met")
    parts = []
    for state in ("broken", "within error", "not measured"):
        names = [name for word, name in words if word == state]
        if names:
            parts.append(f"{len(names)} {state} ({', '.join(names)})")
    return f"Met {met} of {_count(total, 'budget', 'budgets')}{': ' if parts else ''}{', '.join(parts)}."


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _latency_sentence(report: Report) -> str:
    promised_s = report.manifest.plan.predicted.latency_s.get("mean")
    measured_s = measured_latency_s(report.bench, "mean")
    said = f"Mean {format_seconds(promised_s)} promised" if promised_s is not None else "No mean latency promised"
    return f"{said}, {'not benchmarked' if measured_s is None else f'{format_seconds(measured_s)} measured'}."


def summary_rows(report: Report) -> tuple[tuple[str, str, str, str, str], ...]:
    """Return (name, limit, promised, measured, verdict) as text: budgets first, then the other checks."""
    budgets = [row(check, budget=True) for check in report.verdicts]
    return (*budgets, *(row(check, budget=False) for check in other_checks(report)))


def row(check: Check, *, budget: bool) -> tuple[str, str, str, str, str]:
    """Return one check as (name, limit, promised, measured, verdict) text."""
    limit = ABSENT if check.limit is None else format_value(check.limit, check.unit)
    measured = format_value(check.measured, check.unit) if check.was_measured else ABSENT
    promised = format_value(check.promised, check.unit)
    return check.name, limit, promised, measured, verdict_word(check, budget=budget)
