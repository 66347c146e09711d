"""What people read in a terminal: results as text, progress as bars. Only ``cli`` prints the text.

Functions named ``…_text`` return text without a final line break. Tables fold their cells to the width of the
terminal (``COLUMNS``); nothing is ever cut.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import textwrap
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from edgeflex.units import format_bytes, format_count, format_fine_time, format_share, format_time

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from edgeflex.pace import Pace
    from edgeflex.profiles.doctor import Doctor
    from edgeflex.progress import Advance
    from edgeflex.schema import (
        BundleManifest,
        Candidates,
        Check,
        Choice,
        Curve,
        DeviceProfile,
        ModelGraph,
        Plan,
        Proof,
        Solution,
        VerifyResult,
    )
    from edgeflex.schema_trt import EngineIndex, ExpertWay

ABSENT = "–"
_MANY_LAYERS = 24  # more are counted, not listed
_SHORT_CELL = 14  # a number with its unit: never broken
_LONG_WORD = 22  # longer ones, as names of layers, may be broken
_PLAIN = str.maketrans({"µ": "u", "–": "-", "−": "-", "±": "+-", "×": "x", "…": "..."})
# The terminal's standard error while native libraries write to a log instead.
_people: ContextVar[TextIO | None] = ContextVar("_people", default=None)


class Bars:
    """Progress bars on standard error; plain lines when that is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(file=_people.get(), stderr=True)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        """Show one bar while the block runs."""
        from rich import progress

        title = title[:1].upper() + title[1:]
        if not self.console.is_terminal:
            self.note(f"{title} …")
            yield lambda _count: None
            return
        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
        )
        with progress.Progress(*columns, console=self.console, transient=True) as bars:
            bar = bars.add_task(title, total=total)
            yield lambda count: bars.advance(bar, count)

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(printable(text, self.console.file), highlight=False, markup=False)


def printable(text: str, stream: Any) -> str:
    """Return text whose signs the stream's encoding can print: where it lacks µ, – and their kin, in plain letters."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return text.translate(_PLAIN)
    except LookupError:  # an encoding that Python does not know
        pass
    return text


def tell(text: str) -> None:
    """Print a line beside the result, where people see it also while native libraries write elsewhere."""
    people = _people.get() or sys.stderr
    people.write(f"{printable(text, people)}\n")
    people.flush()


def ask() -> None:
    """Show that a line is waited for."""
    people = _people.get() or sys.stderr
    people.write("> ")
    people.flush()


def table_text(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: Container[str] = ()) -> str:
    """Return a table as wide as the terminal allows; cells fold between words rather than be cut.

    The first column and those named in ``words`` hold words and stand left, the others numbers. Where the terminal is
    too narrow for a row to stand on a line without breaking numbers, every row becomes a list of its figures.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    left = [index == 0 or column in words for index, column in enumerate(columns)]
    if rows and _least_width(columns, rows, left) > console.width:
        return _listed(title, columns, rows, console.width)
    natural = [max(map(len, (column, *(row[index] for row in rows)))) for index, column in enumerate(columns)]
    wide = sum(natural) + 2 * (len(columns) - 1) > console.width
    shown = Table(
        title=Text(title) if title else None,
        title_justify="left",
        header_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        whole = not left[index] and all(len(row[index]) <= _SHORT_CELL for row in rows)
        # what is never wrapped is as wide as its head, so that a head of several words goes over several lines
        room = max(len(text) for text in (*column.split(), *(row[index] for row in rows), "-"))
        head = textwrap.fill(column, room, break_on_hyphens=False) if whole and wide else column
        shown.add_column(Text(head), justify="left" if left[index] else "right", overflow="fold", no_wrap=whole)
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    with console.capture() as capture:
        console.print(shown)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _least_width(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[bool]) -> int:
    """Return how wide a table must be for no number and no usual word to be broken."""
    needs = []
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        numbers = [len(cell) for cell in cells if not left[index] and len(cell) <= _SHORT_CELL]
        parts = [len(part) for text in (column, *cells) for part in text.split()]
        needs.append(max([*numbers, *(min(part, _LONG_WORD) for part in parts)], default=0))
    return sum(needs) + 2 * (len(columns) - 1)


def _listed(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Return rows one below the other, each as its name and a line for every other figure."""
    room = min(max((len(column) for column in columns[1:]), default=0), width // 2)
    lines = [title] if title else []
    for row in rows:
        lines.append(f"{columns[0]} {row[0]}")
        lines += [f"  {column:<{room}}  {cell}" for column, cell in zip(columns[1:], row[1:], strict=True)]
    wrap = textwrap.TextWrapper(width, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(wrap.fill(line).rstrip() for line in lines)


def prose(*lines: str) -> str:
    """Return lines folded to the width of the terminal, whole words on each; a continued line is indented."""
    width = max(shutil.get_terminal_size().columns, 20)
    return "\n".join(_folded(line, width) for line in lines)


def _folded(line: str, width: int) -> str:
    if not line.strip():
        return ""
    inner = len(line) - len(line.lstrip()) + 2
    return textwrap.fill(line, width, subsequent_indent=" " * inner, break_on_hyphens=False, break_long_words=False)


def device_text(device: DeviceProfile) -> str:
    """Return every figure of a profile with the number of its source, and the sources."""
    head = prose(f"{device.title} ({device.name}, {device.origin})")
    figures = _figure_rows(device)
    numbers = {source: f"[{index}]" for index, source in enumerate(dict.fromkeys(row[-1] for row in figures), start=1)}
    rows = [(*row[:-1], numbers[row[-1]]) for row in figures]
    spread = any(row[2] for row in rows)
    columns = ("figure", "value", *(("spread",) if spread else ()), "source")
    table = table_text("", columns, rows if spread else [(one, value, source) for one, value, _, source in rows])
    sources = [prose(f"{number} {source}") for source, number in numbers.items()]
    kernels = [f"{len(device.kernels)} kernel times"] if device.kernels else []
    notes = [prose(f"note: {one}") for one in device.notes]
    return "\n".join([head, table, *kernels, "", *sources, *([""] if notes else []), *notes])


def _figure_rows(device: DeviceProfile) -> list[tuple[str, str, str, str]]:
    rows = []

    def add(what: str, figure: Any, shown: str) -> None:
        spread = f"±{figure.spread * 50:.0f} %" if figure.spread is not None else ""
        rows.append((what, shown, spread, figure.source))

    for tier in device.tiers:
        name = tier.tier.budget_name
        if tier.capacity_bytes:
            add(name, tier.capacity_bytes, format_bytes(tier.capacity_bytes.value))
        if tier.read_bytes_per_s:
            add(f"{name} read", tier.read_bytes_per_s, f"{tier.read_bytes_per_s.value / 1e9:.1f} GB/s")
        if tier.read_one_thread_bytes_per_s:
            one = tier.read_one_thread_bytes_per_s
            add(f"{name} read, 1 thread", one, f"{one.value / 1e9:.1f} GB/s")
    for rate in device.compute:
        sparse = ", sparse" if rate.sparse else ""
        add(f"{rate.engine} {rate.precision}{sparse}", rate.ops_per_s, f"{rate.ops_per_s.value / 1e12:.1f} Tops/s")
    for name, found in device.overlap or ():
        if found:
            add(name.replace("_", " ").replace("cpu", "CPU").replace("gpu", "GPU"), found, f"{found.value:.2f} times")
    for read in device.storage:
        name = f"storage {read.pattern} {format_bytes(read.block_bytes)}, depth {read.queue_depth}"
        add(name, read.bytes_per_s, f"{read.bytes_per_s.value / 1e6:.0f} MB/s")
    for name, figure in (("call", device.call_s), ("delegate", device.delegate_s)):
        if figure:
            add(name, figure, format_time(figure.value))
    return rows


def doctor_text(found: Doctor) -> str:
    """Return what is installed, what is missing and what mends it."""
    rows = [(one.name, one.state, one.version, one.detail) for one in found.findings]
    columns = ("what", "state", "version", "detail")
    lines = [table_text("", columns, rows, words=columns)]
    mends = [one for one in found.findings if one.remedy and one.state != "ok"]
    if mends:
        lines += ["", "To mend:", prose(*(f"  {one.name} (for {one.needed_by}): {one.remedy}" for one in mends))]
    return "\n".join(lines)


def graph_text(graph: ModelGraph, found: Sequence[Any]) -> str:
    """Return a model's size and its layers, or the stages where it can be cut if there are any."""
    weights_bytes = 4 * sum(layer.shape.weight_count for layer in graph.layers)
    macs = sum(layer.shape.macs for layer in graph.layers)
    head = (
        f"{graph.name}: {format_count(len(graph.layers), 'layer')}, {format_count(graph.segment_count, 'segment')}, "
        f"{format_count(len(graph.exits), 'exit')}, "
        f"{format_bytes(weights_bytes)} of fp32 weights, {macs / 1e6:.1f} M multiply-accumulates"
    )
    if found:
        rows = [(one.name, f"{one.mac_share * 100:.1f} %", "x".join(map(str, one.output_shape))) for one in found]
        table = table_text("Stages that an exit can follow", ("stage", "share of work", "output"), rows)
    else:
        layers = [
            (one.name, one.shape.kind.value, str(one.segment), f"{one.shape.macs / 1e6:.2f} M") for one in graph.layers
        ]
        table = table_text("Layers", ("layer", "kind", "segment", "MACs"), layers, words=("kind",))
    return f"{prose(head)}\n{table}"


def fit_text(report: Any) -> str:
    """Return how every fitted exit does on images that fitted nothing."""
    rows = [
        (
            one.name,
            one.stage or "end",
            f"{one.accuracy * 100:.2f} %",
            f"{one.ece * 100:.2f} %",
            f"{one.share * 100:.1f} %",
            ABSENT if one.accuracy_of_leavers is None else f"{one.accuracy_of_leavers * 100:.2f} %",
            f"{one.temperature:.2f}",
        )
        for one in report.exits
    ]
    columns = ("exit", "after", "accuracy", "ECE", "leave", "their accuracy", "temperature")
    return table_text(f"On {report.held_out_images} held-out images", columns, rows)


def mixes_text(found: Candidates) -> str:
    """Return the measured mixes of a calibration."""
    rows = [
        (_precision_counts(one.choices), f"{one.accuracy * 100:.2f} %", str(len(one.scenarios)))
        for one in found.candidates
    ]
    title = "Measured mixes of precisions, on the images kept for choosing"
    return table_text(title, ("layers", "accuracy at full depth", "exit policies"), rows)


def _precision_counts(choices: Sequence[Choice]) -> str:
    counts: dict[str, int] = {}
    for choice in choices:
        counts[choice.option] = counts.get(choice.option, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _proof_line(proof: Proof) -> str:
    objective, bound = (_fine(proof, value) for value in (proof.objective, proof.bound))
    return (
        f"Proof: {proof.status}, {proof.minimize} {objective}, bound {bound}, gap {proof.gap * 100:.3g} % "
        f"({proof.solver}, {proof.scenarios_solved} of {proof.scenarios} scenarios solved, {proof.wall_s:.2f} s)"
    )


def _fine(proof: Proof, value: float) -> str:
    """Return a value with the digits that tell an objective from its bound."""
    if proof.minimize == "memory":
        return f"{value:,.0f} bytes"
    return format_fine_time(value) if proof.minimize == "latency" else f"{value * 100:.4g} %"


def solution_text(solution: Solution) -> str:
    """Return a solved table's choices and proof."""
    rows = [(one.subject, one.option) for one in solution.choices]
    table = table_text("Choices", ("decision", "option"), rows, words=("option",))
    return f"{table}\n{prose(f'Scenario {solution.scenario}, counted from 0', _proof_line(solution.proof))}"


def curve_text(curve: Curve) -> str:
    """Return the Pareto curve with its baselines."""
    rows = [
        (one.label, format_time(one.latency_s), format_bytes(one.memory_bytes), f"{one.drop * 100:.2f} %")
        for one in (*curve.points, *curve.baselines)
    ]
    title = "Measured plans that no other beats, and full-depth baselines"
    return table_text(title, ("mix", "latency", "memory", "drop"), rows)


def plan_text(made: Plan) -> str:
    """Return what a plan promises, its exits and precisions, its proof and its accuracy promise."""
    head = f"{made.name} on {made.backend}"
    precisions = [(one.subject, one.option) for one in made.choices]
    if len(precisions) > _MANY_LAYERS:
        listed = prose(
            f"Precisions: {_precision_counts(made.choices)}; layer by layer with --json or in the plan's file."
        )
    else:
        listed = table_text("Precisions", ("layer", "precision"), precisions, words=("precision",))
    parts = [
        table_text(
            head, ("promise", "limit", "value", "range or parts"), _promise_rows(made), words=("range or parts",)
        ),
        table_text("Exits", ("exit", "threshold", "leave here"), _exit_rows(made)),
        listed,
    ]
    lines = [_proof_line(made.proof)]
    certificate = made.certificate
    if certificate is not None:
        lines.append(
            f"Accuracy promise: drop at most {format_share(certificate.drop_limit)} with "
            f"{format_share(certificate.confidence, 0)} confidence, by {certificate.test} on {certificate.samples} "
            f"images that chose nothing (seen there: {format_share(certificate.drop)})"
        )
    lines += [f"note: {note}" for note in made.notes]
    return "\n\n".join([*parts, prose(*lines)])


def _promise_rows(made: Plan) -> list[tuple[str, str, str, str]]:
    memory, budget = made.memory, made.budget
    times = {one.statistic: format_time(one.limit_s) for one in sorted(budget.latency, key=lambda one: -one.limit_s)}
    most_bytes = min(budget.memory_bytes.values(), default=None)
    parts = (
        f"weights {format_bytes(memory.weights_bytes)}, activations {format_bytes(memory.activation_bytes)}, "
        f"overhead {format_bytes(memory.overhead_bytes)}"
    )
    return [
        *(
            (
                f"latency {name}",
                times.get(name, ABSENT),
                format_time(span.value),
                f"{format_time(span.low)} to {format_time(span.high)}",
            )
            for name, span in made.latency_interval_s.items()
        ),
        (made.memory_name, _or_absent(most_bytes, format_bytes), format_bytes(memory.model_bytes), parts),
        ("file", _or_absent(budget.disk_bytes, format_bytes), f"{made.predicted.disk_bytes:,} B", "exact"),
        (
            "drop",
            _or_absent(budget.max_drop, format_share),
            format_share(made.predicted.loss),
            "on the images it was chosen on",
        ),
    ]


def _or_absent(value: Any, show: Callable[[Any], str]) -> str:
    return ABSENT if value is None else show(value)


def _exit_rows(made: Plan) -> list[tuple[str, str, str]]:
    last = len(made.thresholds) - 1
    return [
        (str(index), "end" if threshold is None and index == last else _threshold(threshold), format_share(share, 1))
        for index, (threshold, share) in enumerate(zip(made.thresholds, made.exit_shares, strict=True))
    ]


def settings_text(manifest: BundleManifest) -> str:
    """Return in what settings the runtime executes a program, and what they change in its answers."""
    moved, images = manifest.settings_difference, manifest.settings_images
    if moved is None:
        return prose(f"Settings of the runtime: {manifest.settings}.")
    count = "" if images is None else f" of {images} images"
    return prose(
        f"Settings of the runtime: {manifest.settings}, chosen by measurement; no probability{count} differs from "
        f"plain execution by more than {moved:.2g}."
    )


def _threshold(threshold: float | None) -> str:
    if threshold is None:
        return "never"
    return f"{threshold:.4f}" if threshold > 0.0 else "always"


def run_text(stats: Any) -> str:
    """Return mean latency, accuracy where labels are known, and where images left."""
    requests = stats.requests
    labelled = [one for one in requests if one.label is not None]
    mean_s = sum(one.latency_s for one in requests) / len(requests)
    exits: dict[int, int] = {}
    for one in requests:
        exits[one.exit] = exits.get(one.exit, 0) + 1
    rows = [("images", str(len(requests))), ("mean latency", format_time(mean_s))]
    if labelled:
        right = sum(one.prediction == one.label for one in labelled)
        rows.append(("accuracy", f"{right / len(labelled) * 100:.2f} %"))
    rows += [
        (f"left at exit {index}", f"{count / len(requests) * 100:.1f} %") for index, count in sorted(exits.items())
    ]
    return table_text("", ("figure", "value"), rows)


def engines_text(index: EngineIndex) -> str:
    """Return the engines that were built, and how experts get their weights where there was a choice."""
    rows = [(one.file, format_bytes(one.size_bytes), f"{one.build_s:.1f} s") for one in index.engines]
    title = f"TensorRT {index.key.tensorrt}, {index.key.gpu}"
    return "\n".join([table_text(title, ("engine", "size", "built in"), rows), *map(_way_line, index.experts)])


def _way_line(one: ExpertWay) -> str:
    chosen = {"inputs": "taken as inputs", "refit": "put into the engine before each run"}[one.way]
    figures = ""
    if one.inputs_s is not None and one.refit_s is not None:
        figures = f" ({format_time(one.inputs_s)} as inputs, {format_time(one.refit_s)} by refit)"
    return prose(f"{one.segment}: weights are {chosen}{figures}; {one.reason}")


_CHECK_COLUMNS = ("promise", "limit", "promised", "measured", "verdict")


def checks_text(checks: Sequence[Check]) -> str:
    """Return each promise beside its measurement."""
    from edgeflex.reports.summary import row

    return table_text(
        "", _CHECK_COLUMNS, [row(check, budget=check.limit is not None) for check in checks], words=("verdict",)
    )


def pace_text(found: Pace, checks: Sequence[Check]) -> str:
    """Return what the machine's speed explains of promises about time, or nothing."""
    from edgeflex.pace import pace_sentences

    return prose(*pace_sentences(found, checks))


def sample_text(result: VerifyResult) -> str:
    """Return how many images were judged, and how far their number leaves the drop open."""
    left_out = (
        f"{result.skipped_seen:,} left out because they chose something" if result.skipped_seen else "none left out"
    )
    lines = [f"{result.images:,} images, {left_out}."]
    for check in result.checks:
        if check.name == "accuracy drop" and check.low is not None and check.high is not None:
            span = f"{format_share(check.low)} to {format_share(check.high)}"
            lines.append(
                f"So many images place the drop within {span}; it is broken only if all of that is above the limit."
            )
    return prose(*lines)


def report_text(built: Any) -> str:
    """Return a report's table of promises."""
    from edgeflex.reports import summary_rows

    if not summary_rows(built):
        return "No budget was set, and nothing was measured: see edgeflex bench and edgeflex verify."
    return table_text("", _CHECK_COLUMNS, summary_rows(built), words=("verdict",))


@contextmanager
def native_chatter_aside() -> Iterator[None]:
    """Send what native libraries write to standard error to a log; our own lines still reach the terminal.

    ExecuTorch's C++ side prints processor notes at every start, below Python's reach.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    log = Path(tempfile.gettempdir()) / f"edgeflex-native-{user}.log"
    try:
        terminal = os.dup(2)
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError:  # no standard error, or nowhere to put the log: everything stays where it was
        yield
        return
    native = sys.stderr
    native.flush()
    os.dup2(sink, 2)
    os.close(sink)
    with os.fdopen(terminal, "w", buffering=1, errors="backslashreplace") as people:
        # Not by way of sys.stderr: ExecuTorch's bindings send their notes to that too.
        token = _people.set(people)
        handler = logging.StreamHandler(people)
        handler.setFormatter(logging.Formatter("edgeflex: %(message)s"))
        logging.getLogger("edgeflex").addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger("edgeflex").removeHandler(handler)
            _people.reset(token)
            native.flush()
            os.dup2(terminal, 2)


def quiet_libraries() -> None:
    """Keep the notices of torch and its kin to the log level that users asked for: errors."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in ("torch", "torch.utils._pytree", "torchao", "executorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
