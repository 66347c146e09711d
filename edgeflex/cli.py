"""The commands: parse, call the corridor, print. The only place that prints, and the only exit codes.

Results go to standard output, progress and errors to standard error. ``--json`` prints one JSON document.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeflex import __version__, terminal
from edgeflex.errors import EdgeflexError, InputError
from edgeflex.files import explain_os_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeflex.progress import Progress
    from edgeflex.schema import Curve

# As shells report them: 128 + SIGINT, 128 + SIGPIPE.
_INTERRUPTED = 130
_READER_GONE = 141
_INTERRUPTED_TEXT = (
    "edgeflex: interrupted, nothing is half-written. Run the same command again: profile, fit-exits and calibrate "
    "go on where they stopped.\n"
)
_REFUSED_BY_SYSTEM = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
# Some versions of typer carry click's classes under their own roof; this finds the one that they raise.
_ParserError: type[Exception] = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")

_EXIT_CODES = (
    "Exit codes: 0 done, 1 unexpected, 2 bad input, 3 budget cannot be met or check failed, "
    "4 backend cannot express it, 5 missing dependency, 6 bundle damaged, 7 device failed, 130 interrupted."
)
app = typer.Typer(
    name="edgeflex",
    help=f"Dynamic models under memory and latency budgets, with proof.\n\n{_EXIT_CODES}",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
devices_app = typer.Typer(help="Shipped device profiles.", invoke_without_command=True, rich_markup_mode=None)
app.add_typer(devices_app, name="devices")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime.")]
PlanThreads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; those of the plan if absent.")]
Data = Annotated[Path, typer.Option("--data", help="Images: a folder or zip of class/NAME.(jpg|png).")]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="Weights: .safetensors, .pt or .th (no code is run from it).")
]
ModelName = Annotated[str, typer.Option("--model", "-m", help="zoo:NAME or package.module:factory.")]
InputSize = Annotated[int | None, typer.Option("--input-size", help="Pixels a side, for models not from the zoo.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


def _progress(*, quiet: bool) -> Progress:
    from edgeflex.progress import Silent

    return Silent() if quiet else terminal.Bars()


def _print_json(document: Any) -> None:
    value = document.model_dump(mode="json") if hasattr(document, "model_dump") else document
    print(json.dumps({"schema_version": 1, **value}, sort_keys=True))


def _say(text: str = "") -> None:
    print(text)


def _result(value: Any, text: Callable[[Any], str], *, as_json: bool) -> None:
    """Print a value as one JSON document, or as the text that people read."""
    if as_json:
        _print_json(value)
        return
    _say(text(value))


def _device(name: str | None) -> Any:
    """Return the profile to plan for: a name, a file, or a quick look at this machine."""
    from edgeflex.profiles import load

    if name is not None:
        return load(name)
    from edgeflex.profiles.probe import measure

    return measure(quick=True)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        _say(f"edgeflex {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        _say(context.get_help())


@app.command()
def profile(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes.")] = Path("device.json"),
    quick: Annotated[bool, typer.Option("--quick", help="A covering few kernels; under 30 seconds.")] = False,
    threads: Annotated[str, typer.Option("--threads", help="Thread counts, for instance 1,4.")] = "1",
    storage: Annotated[Path | None, typer.Option("--storage", help="Folder whose disk is measured.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine: memory, storage, and kernels through ExecuTorch itself."""
    from edgeflex import flow

    counts = _thread_counts(threads)
    measured = flow.profile(
        output, quick=quick, threads=counts, storage_folder=storage, progress=_progress(quiet=quiet)
    )
    if as_json:
        _print_json(measured)
        return
    _say(terminal.device_text(measured))
    _say(f"\nWrote {output}")


def _thread_counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise InputError(f"--threads {text!r} is no list of thread counts. Write it as 1 or 1,4.")
    return counts


@devices_app.callback()
def devices(context: typer.Context, *, as_json: Json = False) -> None:
    """List the shipped device profiles."""
    if context.invoked_subcommand is not None:
        return
    from edgeflex.profiles import load, names

    if as_json:
        _print_json({"devices": [load(name).model_dump(mode="json") for name in names()]})
        return
    _say(terminal.table_text("", ("name", "device"), [(name, load(name).title) for name in names()]))
    _say("\nEvery figure with its source: edgeflex devices show NAME")


@devices_app.command("show")
def devices_show(name: str, *, as_json: Json = False) -> None:
    """Show one profile, a shipped NAME or a device.json, with the source of every figure."""
    from edgeflex.profiles import load

    device = load(name)
    if as_json:
        _print_json(device)
        return
    _say(terminal.device_text(device))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="zoo:NAME, package.module:factory, or a fitted model folder.")],
    *,
    weights: Weights = None,
    input_size: InputSize = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write graph.json here.")] = None,
    as_json: Json = False,
) -> None:
    """Show a model's layers and the stages after which it can exit."""
    from edgeflex import flow
    from edgeflex.files import write_atomic

    graph, found = flow.inspect(model, weights, input_size=input_size)
    if output is not None:
        write_atomic(output, graph.canonical_json())
    if as_json:
        _print_json(graph)
        return
    _say(terminal.graph_text(graph, found))


@app.command("fit-exits")
def fit_exits(
    *,
    model: ModelName,
    data: Data,
    weights: Weights = None,
    stages: Annotated[str, typer.Option("--stages", help="Stages, comma-separated; found when absent.")] = "",
    exits: Annotated[int, typer.Option("--exits", min=1, help="Early exits when --stages is absent.")] = 3,
    head: Annotated[
        str, typer.Option("--head", help="linear (pool, norm, linear), grid (2x2 pool) or conv.")
    ] = "linear",
    input_size: InputSize = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Most passes over the features.")] = 60,
    flip: Annotated[bool, typer.Option("--flip", help="Also train on mirrored images; wrong for digits.")] = False,
    tune_trunk: Annotated[int, typer.Option("--tune-trunk", min=0, help="Epochs that also train the trunk.")] = 0,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="The model folder.")] = Path("model"),
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attach and train early exits, the trunk frozen unless told otherwise."""
    from edgeflex import flow

    if head not in {"linear", "grid", "conv"}:
        raise InputError(f"--head {head!r} is unknown. Choose linear, grid or conv.")
    fitted = flow.fit_exits(
        model,
        data,
        output,
        weights=weights,
        stage_names=tuple(part.strip() for part in stages.split(",") if part.strip()),
        exits=exits,
        head=head,
        input_size=input_size,
        seed=seed,
        epochs=epochs,
        flip=flip,
        tune_trunk_epochs=tune_trunk,
        overwrite=overwrite,
        progress=_progress(quiet=quiet),
    )
    if as_json:
        _print_json(fitted.recipe)
        return
    if fitted.recipe.report is not None:
        _say(terminal.fit_text(fitted.recipe.report))
    _say(f"\nWrote {output}. Next: edgeflex calibrate --model {output} --data IMAGES")


@app.command()
def calibrate(
    *,
    model: Annotated[Path, typer.Option("--model", "-m", help="The folder that fit-exits wrote.")],
    data: Data,
    device: Annotated[str | None, typer.Option("--device", "-d", help="Profile: name or device.json.")] = None,
    threads: Threads = 1,
    mixes: Annotated[int, typer.Option("--mixes", min=0, help="Mixes of precisions to run for real.")] = 8,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="The calibration folder.")] = Path("calibration"),
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure losses, confidences and whole mixes on real images; the only slow stage, resumable."""
    from edgeflex import flow

    found = flow.calibrate(
        model,
        data,
        output,
        device=_device(device),
        threads=threads,
        seed=seed,
        mixes=mixes,
        overwrite=overwrite,
        progress=_progress(quiet=quiet),
    )
    if as_json:
        _print_json(found)
        return
    _say(terminal.mixes_text(found))
    _say(f"\nWrote {output}. Next: edgeflex plan {output} --memory 2MiB --max-drop 2%")


@app.command()
def plan(
    calibration: Annotated[Path | None, typer.Argument(help="The folder that calibrate wrote.")] = None,
    *,
    memory: Annotated[str | None, typer.Option("--memory", help="Most bytes the model may add, e.g. 2MiB.")] = None,
    latency: Annotated[
        list[str] | None, typer.Option("--latency", help="For instance 8ms:p95 (mean, p50, p95, p99, worst).")
    ] = None,
    max_drop: Annotated[str | None, typer.Option("--max-drop", help="Most accuracy to lose, e.g. 1%.")] = None,
    confidence: Annotated[str, typer.Option("--confidence", help="Of the accuracy promise.")] = "95%",
    disk: Annotated[str | None, typer.Option("--disk", help="Most bytes of the program file.")] = None,
    minimize: Annotated[
        str | None, typer.Option("--minimize", help="latency[:statistic], memory or drop; else what has no budget.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", "-d", help="Plan for another profile.")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="Solve a saved cost table instead.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Print the Pareto curve.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the curve to a .svg or .png.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Choose thresholds and precisions together under the budgets; nothing is measured here."""
    from edgeflex import flow
    from edgeflex.budget import parse_budget
    from edgeflex.files import write_atomic

    budget = parse_budget(
        memory=memory, latency=latency or (), max_drop=max_drop, confidence=confidence, minimize=minimize, disk=disk
    )
    _refuse_idle(table=table, sweep=sweep or plot is not None, device=device, calibration=calibration)
    if table is not None:
        solution = flow.solve_table(table, budget)
        _result(solution, terminal.solution_text, as_json=as_json)
        return
    if calibration is None:
        raise InputError("plan needs the folder that edgeflex calibrate wrote, or --table FILE. Name one.")
    target = None if device is None else _device(device)
    if sweep or plot is not None:
        _curve(flow.sweep(calibration, budget), plot, as_json=as_json)
        return
    made = flow.plan(calibration, budget, device=target)
    write_atomic(output, made.canonical_json())
    if as_json:
        _print_json(made)
        return
    _say(terminal.plan_text(made))
    _say(f"\nWrote {output}. Next: edgeflex export {output} --model MODEL --calibration {calibration}")


def _refuse_idle(*, table: Path | None, sweep: bool, device: str | None, calibration: Path | None) -> None:
    """Refuse options that the others would silence."""
    faults = []
    if table is not None and calibration is not None:
        faults.append(f"--table {table} and the calibration {calibration} are two sources; give one")
    if table is not None and sweep:
        faults.append("--table has no measured mixes to sweep; leave --sweep and --plot out")
    if table is not None and device is not None:
        faults.append("--table holds its own times; leave --device out")
    if sweep and device is not None:
        faults.append("--sweep shows what was measured here; leave --device out")
    if faults:
        raise InputError.collect("the options of plan", faults)


def _curve(curve: Curve, plot: Path | None, *, as_json: bool) -> None:
    if plot is not None:
        from edgeflex.reports import save_curve

        save_curve(curve, plot)
    _result(curve, terminal.curve_text, as_json=as_json)
    if plot is not None and not as_json:
        _say(f"\nWrote {plot}")


@app.command()
def export(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan.json.")],
    *,
    model: Annotated[Path, typer.Option("--model", "-m", help="The folder that fit-exits wrote.")],
    calibration: Annotated[Path, typer.Option("--calibration", help="The folder that calibrate wrote.")],
    device: Annotated[str | None, typer.Option("--device", "-d", help="The profile planned for, if another.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle folder.")] = Path("bundle"),
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one ExecuTorch program, read it back and hold it against the plan."""
    from edgeflex import flow
    from edgeflex.files import read_bytes
    from edgeflex.schema import Plan
    from edgeflex.units import format_bytes

    made = Plan.parse(read_bytes(plan_file, "plan"), str(plan_file))
    bundle = flow.export(
        made,
        model,
        calibration,
        output,
        device=None if device is None else _device(device),
        overwrite=overwrite,
        progress=_progress(quiet=quiet),
    )
    if as_json:
        _print_json(bundle.manifest)
        return
    rows = [(one.path, one.role, format_bytes(one.size_bytes), one.sha256[:16]) for one in bundle.manifest.files]
    title = f"{len(bundle.manifest.layer_precisions)} layers held as planned"
    _say(terminal.table_text(title, ("file", "role", "size", "sha256"), rows))
    _say(f"\nWrote {output}. Next: edgeflex bench {output} --data IMAGES")


@app.command()
def run(
    bundle: Path,
    *,
    data: Data,
    runtime: Annotated[str, typer.Option("--runtime", help="What runs it.")] = "executorch",
    threads: PlanThreads = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many images.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Raw samples.")] = Path("stats.json"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a bundle on images: answers, exits taken, raw latencies."""
    from edgeflex import flow
    from edgeflex.files import write_atomic

    stats = flow.run(bundle, data, runtime=runtime, threads=threads, limit=limit, progress=_progress(quiet=quiet))
    write_atomic(output, stats.canonical_json())
    if as_json:
        _print_json(stats)
        return
    _say(terminal.run_text(stats))
    _say(f"\nWrote {output}")


def _end_with(*, kept: bool) -> None:
    if not kept:
        raise typer.Exit(3)


@app.command()
def bench(
    bundle: Path,
    *,
    data: Data,
    images: Annotated[int, typer.Option("--images", min=1, help="At most so many images.")] = 200,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Passes over the images.")] = 5,
    threads: PlanThreads = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Measured figures.")] = Path("bench.json"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency and memory against the plan; exit code 3 when a budget is broken."""
    from edgeflex import flow
    from edgeflex.files import write_atomic

    result = flow.bench(bundle, data, images=images, repeats=repeats, threads=threads, progress=_progress(quiet=quiet))
    write_atomic(output, result.canonical_json())
    if as_json:
        _print_json(result)
    else:
        _say(terminal.checks_text(result.checks))
        _say(f"\nWrote {output}")
    _end_with(kept=all(check.ok for check in result.checks if check.limit is not None))


@app.command()
def verify(
    bundle: Path,
    *,
    data: Data,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Full-depth reference: the model folder.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many images.")] = None,
    threads: PlanThreads = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Measured figures.")] = Path("verify.json"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hold accuracy, parity and size against the manifest; exit code 3 when a promise is broken."""
    from edgeflex import flow
    from edgeflex.files import write_atomic

    result = flow.verify(
        bundle, data, model_folder=model, limit=limit, threads=threads, progress=_progress(quiet=quiet)
    )
    write_atomic(output, result.canonical_json())
    if as_json:
        _print_json(result)
    else:
        _say(terminal.checks_text(result.checks))
        _say(f"\n{result.images} images, {result.skipped_seen} left out because they chose something\nWrote {output}")
    _end_with(kept=all(check.ok for check in result.checks))


@app.command()
def report(
    bundle: Path,
    *,
    bench_file: Annotated[Path | None, typer.Option("--bench", help="bench.json of this bundle.")] = None,
    verify_file: Annotated[Path | None, typer.Option("--verify", help="verify.json of this bundle.")] = None,
    stats_file: Annotated[Path | None, typer.Option("--stats", help="stats.json of this bundle.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one self-contained page: promise against measurement."""
    from edgeflex import flow
    from edgeflex.files import read_bytes
    from edgeflex.schema import BenchResult, RunStats, VerifyResult

    def read(kind: Any, path: Path | None) -> Any:
        return None if path is None else kind.parse(read_bytes(path, "measured figures"), str(path))

    built = flow.report(
        bundle,
        output,
        bench_result=read(BenchResult, bench_file),
        verify_result=read(VerifyResult, verify_file),
        stats=read(RunStats, stats_file),
    )
    if as_json:
        _print_json(built)
        return
    _say(terminal.report_text(built))
    _say(f"\nWrote {output}")


@app.command()
def quickstart(
    *,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Where everything goes.")] = Path(
        "edgeflex-quickstart"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Walk the whole corridor on a small real model that needs no network."""
    from edgeflex.quickstart import walk

    built, page = walk(folder, progress=_progress(quiet=quiet))
    if as_json:
        _print_json(built)
        return
    _say(terminal.report_text(built))
    _say(f"\nThe report: {page}")


def _fail(error: EdgeflexError) -> int:
    """Say what went wrong, for machines too if they asked; return the exit code."""
    if "--json" in sys.argv:
        document = {"error": type(error).__name__, "message": str(error), **error.details()}
        _print_json(document)
    sys.stderr.write(f"edgeflex: {error}\n")
    return error.exit_code


def _misuse(error: Exception) -> InputError:
    """Return what the parser of the command line has to say as one of our errors, in one line."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    where = "edgeflex" if context is None else context.command_path
    return InputError(f"{text.rstrip('.')}. See `{where} --help`.")


def _run() -> int:
    """Run the app and return its exit code, once every failure was said."""
    try:
        with terminal.native_chatter_aside():
            # Not standalone, so that a misused command line fails like everything else, also in JSON.
            code = app(standalone_mode=False, prog_name="edgeflex")
            sys.stdout.flush()
    except EdgeflexError as error:
        return _fail(error)
    except _ParserError as error:
        return _fail(_misuse(error))
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except SystemExit as leaving:  # what typer makes of a reader that went away
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        return _READER_GONE
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _READER_GONE
        if error.errno not in _REFUSED_BY_SYSTEM:
            raise
        return _fail(explain_os_error(error, Path(error.filename or "standard output")))
    if code == _INTERRUPTED:
        sys.stderr.write(_INTERRUPTED_TEXT)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command line; the console script's entry."""
    terminal.quiet_libraries()
    code = _run()
    try:
        sys.stdout.flush()
    except OSError:
        # Nobody can read the rest; the interpreter must not try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(code)
