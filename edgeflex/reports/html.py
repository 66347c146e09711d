"""The report as one self-contained HTML page: no script, nothing fetched, equal bytes for equal values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgeflex.errors import InputError
from edgeflex.pace import pace, pace_sentences
from edgeflex.reports import sections, summary
from edgeflex.reports.summary import format_seconds, format_value
from edgeflex.reports.svg import clean
from edgeflex.units import format_fine_time

if TYPE_CHECKING:
    from edgeflex.schema import CostTable, Report

_PNG_URI = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")
_TEMPLATES = Path(__file__).parent / "templates"


def to_html(report: Report, *, table: CostTable | None = None) -> str:
    """Return the page.

    Args:
        report: Promise and measurement, joined.
        table: The cost table that the plan was solved on; adds each layer's sensitivity.

    Raises:
        InputError: An example image is no PNG data URI, or ``table`` is not the plan's.
    """
    _require_sound(report, table)
    return render(
        "report.html.j2",
        title=report.title,
        report=report,
        manifest=report.manifest,
        plan=report.manifest.plan,
        bench=report.bench,
        verify=report.verify,
        sentence=summary.outcome(report)[1],
        verdicts=[sections.check_row(check, budget=True) for check in report.verdicts],
        others=[sections.check_row(check, budget=False) for check in summary.other_checks(report)],
        speed=_speed(report),
        pareto=sections.pareto_section(report),
        exits=sections.exit_rows(report),
        galleries=sections.galleries(report),
        statics=sections.statics_section(report),
        layers=sections.layers_section(report.manifest, table),
        memory=sections.memory_bars(report),
        latency=sections.latency_section(report),
        commands=sections.commands(report.manifest),
    )


def _speed(report: Report) -> tuple[str, ...]:
    """Return what the machine's speed explains of the benchmark's promises about time."""
    bench = report.bench
    if bench is None:
        return ()
    found = pace(report.manifest.plan.conditions, (bench.before, bench.after))
    return pace_sentences(found, (*report.verdicts, *bench.checks))


def render(template: str, **values: object) -> str:
    """Return a page from one of this room's templates; all text is escaped, what a template lacks is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    environment.filters |= {
        "value": format_value,
        "seconds": format_seconds,
        "fine": _fine,
        "count": lambda n: f"{n:,}",
    }
    return environment.get_template(template).render(absent=summary.ABSENT, **values) + "\n"


def _fine(value: float, unit: str) -> str:
    """Return a value with the digits that tell an objective from its bound."""
    if unit == "bytes":
        return f"{value:,.0f} bytes"
    return format_fine_time(value) if unit == "s" else f"{value:.5g}"


def _require_sound(report: Report, table: CostTable | None) -> None:
    examples = report.verify.examples if report.verify is not None else ()
    faults = [
        f"example image {example.input!r} is not a PNG data URI; run `edgeflex verify` again"
        for example in examples
        if _PNG_URI.fullmatch(example.image) is None
    ]
    exits = len(report.manifest.graph.exits)
    faults += [
        f"example image {example.input!r} left at exit {example.exit}, the model has {exits}; verify again"
        for example in examples
        if not 0 <= example.exit < exits
    ]
    digest = report.manifest.plan.table_digest
    if table is not None and table.digest() != digest:
        faults.append(f"the cost table is {table.digest()[:12]}, the plan was solved on {digest[:12]}; give that one")
    if faults:
        raise InputError.collect("the report cannot be drawn", faults)
