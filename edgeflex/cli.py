"""The commands: parse, call the corridor, print. The only place that prints, and the only exit codes.

Results go to standard output, progress and errors to standard error. ``--json`` prints one JSON document.
"""

from __future__ import annotations

import errno
import io
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

# No figures: what suits one model is impossible for the next.
_BUDGETS = (
    "That shows what is possible; then plan with --memory SIZE, --latency TIME, --max-drop SHARE, or some of them."
)
_DECODER_BUDGETS = (
    "Without budgets that is the quickest plan, whatever memory it takes; --memory SIZE, --latency TIME, --first-token "
    "TIME and --max-kl NATS limit it."
)
_ABOUT = (
    "Fit a trained network to a device: within a budget of memory, time and accuracy, with the promises checked.\n\n"
    "First: edgeflex quickstart walks the whole way on two small models. Your own image classifier: profile, "
    "fit-exits, calibrate, plan, export, then run, bench, verify and report. Your own mixture-of-experts decoder: the "
    "same without profile and fit-exits."
)
_EXIT_CODES = (
    "Exit codes: 0 done, 1 unexpected, 2 bad input, 3 budget cannot be met or check failed, "
    "4 backend cannot express it, 5 missing dependency, 6 bundle damaged, 7 device failed, 130 interrupted."
)
app = typer.Typer(
    name="edgeflex",
    help=f"{_ABOUT}\n\n{_EXIT_CODES}",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
devices_app = typer.Typer(
    help="Profiles of devices that come with edgeflex.",
    short_help="Show shipped device profiles",
    invoke_without_command=True,
    rich_markup_mode=None,
)
app.add_typer(devices_app, name="devices")
trace_app = typer.Typer(
    help="Routing traces of mixture-of-experts decoders.",
    short_help="Record and replay experts' routing",
    rich_markup_mode=None,
)
app.add_typer(trace_app, name="trace")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]
BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that export wrote.")]
Threads = Annotated[int, typer.Option("--threads", metavar="N", min=1, help="Threads of the runtime.")]
PlanThreads = Annotated[
    int | None, typer.Option("--threads", metavar="N", min=1, help="Threads; those of the plan if absent.")
]
Data = Annotated[
    Path, typer.Option("--data", metavar="IMAGES", help="Images: a folder or zip of class/NAME.(jpg|png).")
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Weights: .safetensors, .pt or .th (no code is run from it)."),
]
ModelName = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="zoo:NAME or package.module:factory.")]
InputSize = Annotated[
    int | None, typer.Option("--input-size", metavar="PIXELS", help="Pixels a side, for models not from the zoo.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything random.")]
OnDevice = Annotated[
    str | None,
    typer.Option("--device", "-d", metavar="DEVICE", help="Decoder: cuda computes on a GPU, through PyTorch."),
]
OnVram = Annotated[str | None, typer.Option("--vram", metavar="SIZE", help="Decoder: most bytes of the GPU's memory.")]
OnCache = Annotated[
    str | None, typer.Option("--cache", metavar="SIZE", help="Decoder: bytes of experts, if not the plan's.")
]
Runtime = Annotated[
    str | None,
    typer.Option("--runtime", metavar="RUNTIME", help="What runs it, if not its target's own, e.g. onnxruntime."),
]


def _progress(*, quiet: bool) -> Progress:
    from edgeflex.progress import Silent

    return Silent() if quiet else terminal.Bars()


def _print_json(document: Any) -> None:
    value = document.model_dump(mode="json") if hasattr(document, "model_dump") else document
    print(json.dumps({"schema_version": 1, **value}, sort_keys=True))


def _say(text: str = "") -> None:
    print(terminal.printable(text, sys.stdout))


def _result(value: Any, text: Callable[[Any], str], *, as_json: bool) -> None:
    """Print a value as one JSON document, or as the text that people read."""
    if as_json:
        _print_json(value)
        return
    _say(text(value))


def _say_speed(text: str) -> None:
    """Print what the machine's speed explains of the promises above, if anything."""
    if text:
        _say(f"\n{text}")


def _note_threads(threads: int | None) -> None:
    """Say that more threads than processors take turns."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads is not None and threads > cores:
        from edgeflex.units import format_count

        told = format_count(cores, "processor core")
        terminal.tell(f"edgeflex: note: {threads} threads on {told} take turns, and are slower than {cores}")


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


@app.command(short_help="Measure this machine")
def profile(
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where the profile goes; device.json if absent."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A covering few kernels; about half a minute.")] = False,
    threads: Annotated[
        str | None,
        typer.Option("--threads", metavar="COUNTS", help="Thread counts, for instance 1,4; 1, or a calibration's own."),
    ] = None,
    storage: Annotated[
        Path | None, typer.Option("--storage", metavar="FOLDER", help="Folder whose disk is measured.")
    ] = None,
    decoder: Annotated[
        Path | None,
        typer.Option("--decoder", metavar="CALIBRATION", help="What this machine does with a calibrated decoder."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine: memory, storage, and kernels through ExecuTorch itself; or its rates for a decoder."""
    from edgeflex import flow

    counts = (1,) if threads is None else _thread_counts(threads)
    _note_threads(max(counts))
    if decoder is not None:
        given = {"--output": output, "--quick": quick or None, "--storage": storage}
        unfit = [name for name, value in given.items() if value is not None]
        if unfit:
            raise InputError(
                f"{' and '.join(unfit)} beside --decoder: rates go into the calibration, and its disk is measured. "
                f"Leave {'it' if len(unfit) == 1 else 'them'} out."
            )
        rates = flow.profile_decoder(
            decoder, threads=None if threads is None else counts, progress=_progress(quiet=quiet)
        )
        _result(rates, _decoder_text("rates_text"), as_json=as_json)
        if not as_json:
            _say(f"\nWrote {decoder / 'rates.json'}. Next: edgeflex plan {decoder}\n{terminal.prose(_DECODER_BUDGETS)}")
        return
    out = output or Path("device.json")
    measured = flow.profile(out, quick=quick, threads=counts, storage_folder=storage, progress=_progress(quiet=quiet))
    if as_json:
        _print_json(measured)
        return
    _say(terminal.device_text(measured))
    _say(f"\nWrote {out}")


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
    _say(terminal.table_text("", ("name", "device"), [(name, load(name).title) for name in names()], words=("device",)))
    _say("\nEvery figure with its source: edgeflex devices show NAME")


@devices_app.command("show", short_help="Show one profile with its sources")
def devices_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of a shipped profile, or a device.json.")],
    *,
    as_json: Json = False,
) -> None:
    """Show one profile, a shipped NAME or a device.json, with the source of every figure."""
    from edgeflex.profiles import load

    device = load(name)
    if as_json:
        _print_json(device)
        return
    _say(terminal.device_text(device))


@app.command(short_help="Show a model's layers and stages")
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="zoo:NAME, package.module:factory, a fitted model, or a Hugging Face folder."
        ),
    ],
    *,
    weights: Weights = None,
    input_size: InputSize = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write graph.json here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model's layers and the stages after which it can exit."""
    from edgeflex import flow
    from edgeflex.files import write_atomic

    if flow.is_decoder(model):
        if weights is not None or input_size is not None:
            raise InputError(f"{model!r} is a decoder: leave --weights and --input-size out.")
        decoder = flow.inspect_decoder(model)
        if output is not None:
            write_atomic(output, decoder.canonical_json())
        _result(decoder, _decoder_text("decoder_graph_text"), as_json=as_json)
        return
    graph, found = flow.inspect(model, weights, input_size=input_size)
    if output is not None:
        write_atomic(output, graph.canonical_json())
    if as_json:
        _print_json(graph)
        return
    _say(terminal.graph_text(graph, found))


@app.command("fit-exits", short_help="Attach and train early exits")
def fit_exits(
    *,
    model: ModelName,
    data: Data,
    weights: Weights = None,
    stages: Annotated[
        str, typer.Option("--stages", metavar="NAMES", help="Stages, comma-separated; found when absent.")
    ] = "",
    exits: Annotated[int, typer.Option("--exits", metavar="N", min=1, help="Early exits when --stages is absent.")] = 3,
    head: Annotated[
        str, typer.Option("--head", metavar="HEAD", help="linear (pool, norm, linear), grid (2x2 pool) or conv.")
    ] = "linear",
    input_size: InputSize = None,
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", min=1, help="Most passes over the features.")] = 60,
    flip: Annotated[bool, typer.Option("--flip", help="Also train on mirrored images; wrong for digits.")] = False,
    tune_trunk: Annotated[
        int, typer.Option("--tune-trunk", metavar="N", min=0, help="Epochs that also train the trunk.")
    ] = 0,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The model folder.")] = Path("model"),
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


@app.command(short_help="Measure what each precision costs")
def calibrate(
    *,
    model: Annotated[
        Path, typer.Option("--model", "-m", metavar="FOLDER", help="What fit-exits wrote, or a Hugging Face folder.")
    ],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="IMAGES", help="Images, for a model of images.")
    ] = None,
    text: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text, for a decoder.")] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=64, help="Decoder: tokens of the text to use.")
    ] = 4096,
    device: Annotated[
        str | None,
        typer.Option("--device", "-d", metavar="DEVICE", help="Profile: name or device.json; else a quick look here."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="TARGET", help="What images' models are exported for: executorch, onnx or tensorrt."
        ),
    ] = "executorch",
    threads: Threads = 1,
    mixes: Annotated[int, typer.Option("--mixes", metavar="N", min=0, help="Mixes of precisions to run for real.")] = 8,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The calibration folder.")] = Path(
        "calibration"
    ),
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure losses, confidences and whole mixes on real images or text; the only slow stage, resumable."""
    from edgeflex import flow

    _note_threads(threads)
    if flow.is_decoder(model):
        if text is None or data is not None or device is not None or target != "executorch":
            raise InputError(f"{str(model)!r} is a decoder: give --text FILE, and no --data, --device or --target.")
        measured = flow.calibrate_decoder(
            str(model), text, output, tokens=tokens, threads=_up_to(threads), seed=seed, overwrite=overwrite,
            progress=_progress(quiet=quiet),
        )  # fmt: skip
        _result(measured, _decoder_text("decoder_calibration_text"), as_json=as_json)
        if not as_json:
            _say(f"\nWrote {output}. Next: edgeflex plan {output}\n{terminal.prose(_DECODER_BUDGETS)}")
        return
    if not model.is_dir():
        raise InputError(f"--model {str(model)!r} is no folder. Give what fit-exits wrote, or a Hugging Face folder.")
    if data is None or text is not None:
        raise InputError(
            f"{str(model)!r} holds no config.json, so it is no decoder but a model of images: give --data IMAGES, and "
            "no --text."
        )
    found = flow.calibrate(
        model,
        data,
        output,
        device=_device(device),
        threads=threads,
        seed=seed,
        mixes=mixes,
        target=target,
        overwrite=overwrite,
        progress=_progress(quiet=quiet),
    )
    if as_json:
        _print_json(found)
        return
    _say(terminal.mixes_text(found))
    _say(f"\nWrote {output}. Next: edgeflex plan {output} --sweep\n{terminal.prose(_BUDGETS)}")


def _decoder_text(name: str) -> Callable[[Any], str]:
    """Return a function of ``terminal_moe`` or ``terminal_costs``, which are only read where a decoder is."""
    from edgeflex import terminal_costs, terminal_moe

    shown: Callable[[Any], str] = getattr(terminal_costs, name, None) or getattr(terminal_moe, name)
    return shown


def _up_to(threads: int) -> tuple[int, ...]:
    """Return the numbers of threads that a plan may choose among: 1, and the most that were allowed."""
    return (1,) if threads == 1 else (1, threads)


@app.command(short_help="Decide under budgets, with proof")
def plan(
    calibration: Annotated[
        Path | None, typer.Argument(metavar="CALIBRATION", help="The folder that calibrate wrote.")
    ] = None,
    *,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", help="Most bytes that the model adds, e.g. 2MiB; decoder: whole process."
        ),
    ] = None,
    latency: Annotated[
        list[str] | None,
        typer.Option(
            "--latency",
            metavar="TIME",
            help="Most time: 8ms or 8ms:p95 (mean, p50, p95, p99, worst); decoder: 60ms/token.",
        ),
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option(
            "--vram", metavar="SIZE", help="Decoder: most bytes of a GPU's memory, e.g. 6GiB; plans for --device."
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option("--link", metavar="RATE", help="With --vram: bytes per second to the GPU, if not the profile's."),
    ] = None,
    ram_rate: Annotated[
        str | None,
        typer.Option("--ram-rate", metavar="RATE", help="With --vram: bytes of RAM per second, if not the profile's."),
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option("--max-drop", metavar="SHARE", help="Most accuracy to lose, e.g. 1%.")
    ] = None,
    confidence: Annotated[
        str | None,
        typer.Option("--confidence", metavar="SHARE", help="How sure the accuracy promise must be; 95% if absent."),
    ] = None,
    disk: Annotated[str | None, typer.Option("--disk", metavar="SIZE", help="Most bytes of the program file.")] = None,
    minimize: Annotated[
        str | None,
        typer.Option(
            "--minimize",
            metavar="WHAT",
            help="What to make least: latency[:STATISTIC], memory or drop (decoder: kl).",
        ),
    ] = None,
    first_token: Annotated[
        str | None,
        typer.Option("--first-token", metavar="TIME", help="Decoder: most time to the first token, e.g. 2s."),
    ] = None,
    max_kl: Annotated[
        str | None,
        typer.Option("--max-kl", metavar="NATS", help="Decoder: most divergence from fp32, nats per token, e.g. 0.05."),
    ] = None,
    max_perplexity: Annotated[
        str | None,
        typer.Option("--max-perplexity", metavar="SHARE", help="Decoder: most rise of perplexity over fp32, e.g. 2%."),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens", metavar="N", min=1, help="Decoder: prompt of --first-token; 256, or what fits."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", metavar="N", min=2, help="Decoder: tokens of prompt and answer; 1024, or what it knows."
        ),
    ] = None,
    dry_run: Annotated[
        str | None, typer.Option("--dry-run", metavar="MODEL", help="Decoder: what fits, from its headers alone.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", "-d", metavar="DEVICE", help="Plan for another profile.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="Solve a saved cost table instead.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Print the Pareto curve.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curve to a .svg or .png.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the plan goes.")] = Path(
        "plan.json"
    ),
    as_json: Json = False,
) -> None:
    """Choose thresholds and precisions together under the budgets; nothing is measured here."""
    from edgeflex import flow
    from edgeflex.budget import parse_budget
    from edgeflex.files import write_atomic

    if dry_run is not None or (calibration is not None and flow.is_decoder_calibration(calibration)):
        idle = {
            "--max-drop": max_drop, "--confidence": confidence, "--table": table, "--plot": plot,
            "--sweep": sweep or None,
        }  # fmt: skip
        _plan_decoder(
            calibration,
            {
                "memory": memory, "vram": vram, "latency": latency or (), "first_token": first_token, "max_kl": max_kl,
                "max_perplexity": max_perplexity, "disk": disk, "minimize": minimize,
                "prompt_tokens": prompt_tokens, "context_tokens": context,
            },
            dry_run, [name for name, value in idle.items() if value is not None], output,
            gpu={"--device": device, "--link": link, "--ram-rate": ram_rate}, as_json=as_json,
        )  # fmt: skip
        return
    alien = (first_token, max_kl, max_perplexity, vram, link, ram_rate)
    if any(one is not None for one in alien):
        raise InputError(
            "--first-token, --max-kl, --max-perplexity, --vram, --link and --ram-rate are for decoders; give the "
            "calibration of one, or leave out."
        )
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
    if flow.is_decoder(calibration):
        raise InputError(
            f"{str(calibration)!r} is a decoder, not its calibration. Run edgeflex calibrate --model {calibration} "
            f"--text FILE first, or see what would fit: edgeflex plan --dry-run {calibration}"
        )
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


def _plan_decoder(
    calibration: Path | None,
    limits: dict[str, Any],
    dry_run: str | None,
    idle: list[str],
    output: Path,
    *,
    gpu: dict[str, str | None],
    as_json: bool,
) -> None:
    from edgeflex import flow
    from edgeflex.budget import parse_decoder_budget
    from edgeflex.files import write_atomic

    named = [name for name, value in gpu.items() if value is not None]
    if dry_run is not None and limits["vram"] is not None:
        named.insert(0, "--vram")
    if named and (dry_run is not None or limits["vram"] is None):
        why = "a dry run looks at headers alone" if dry_run is not None else "they need --vram, the GPU's memory"
        hint = "Leave out, or give what is missing."
        if gpu["--device"]:
            hint += " A processor is measured where it is: edgeflex profile --decoder CALIBRATION."
        raise InputError(f"{', '.join(named)}: for plans on a GPU, and {why}. {hint}")
    if idle:
        raise InputError(f"{', '.join(idle)}: not for decoders. Leave out, and see --max-kl and --first-token.")
    if dry_run is not None:
        if calibration is not None:
            raise InputError(f"--dry-run {dry_run} and the calibration {calibration} are two sources; give one.")
        budget = parse_decoder_budget(**limits, most_tokens=flow.context_of(dry_run))
        sizes = flow.decoder_sizes(dry_run, budget)
        _result(sizes, _decoder_text("decoder_sizes_text"), as_json=as_json)
        _end_with(kept=any(one.verdict != "decline" for one in sizes.uniform))
        return
    if calibration is None:
        raise InputError("plan needs the folder that edgeflex calibrate wrote, or --dry-run MODEL. Name one.")
    budget = parse_decoder_budget(**limits, most_tokens=flow.context_of(calibration))
    made = flow.plan_decoder(calibration, budget) if budget.vram_bytes is None else _on_gpu(calibration, budget, gpu)
    write_atomic(output, made.canonical_json())
    _result(made, _decoder_text("decoder_plan_text"), as_json=as_json)
    if not as_json:
        _say(f"\nWrote {output}. Next: edgeflex export {output} --model MODEL --calibration {calibration}")


def _on_gpu(calibration: Path, budget: Any, gpu: dict[str, str | None]) -> Any:
    """Plan for the named machine with a GPU, or for this one's GPU, which is then measured."""
    from edgeflex import flow
    from edgeflex.profiles import load
    from edgeflex.units import option_value, parse_rate_bytes_per_s

    device, link, ram_rate = gpu["--device"], gpu["--link"], gpu["--ram-rate"]
    return flow.plan_decoder_on_gpu(
        calibration,
        budget,
        None if device is None else load(device),
        link_bytes_per_s=option_value("--link", link, parse_rate_bytes_per_s),
        ram_bytes_per_s=option_value("--ram-rate", ram_rate, parse_rate_bytes_per_s),
    )


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


@app.command(short_help="Write the program of a plan, and check it")
def export(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan.json.")],
    *,
    model: Annotated[Path, typer.Option("--model", "-m", metavar="FOLDER", help="What was calibrated: a folder.")],
    calibration: Annotated[
        Path, typer.Option("--calibration", metavar="FOLDER", help="The folder that calibrate wrote.")
    ],
    device: Annotated[
        str | None, typer.Option("--device", "-d", metavar="DEVICE", help="The profile planned for, if another.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", metavar="TARGET", help="executorch, onnx or tensorrt; the plan's own if absent."
        ),
    ] = None,
    stock: Annotated[
        bool, typer.Option("--stock/--no-stock", help="Decoder: also write what a stock ExecuTorch loads.")
    ] = True,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The bundle folder.")] = Path(
        "bundle"
    ),
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the bundle of a plan, read it back and hold it against the plan."""
    from edgeflex import flow
    from edgeflex.files import read_bytes
    from edgeflex.schema import Plan
    from edgeflex.units import format_bytes

    if flow.is_decoder_document(plan_file):
        from edgeflex.schema_moe import DecoderPlan

        if device is not None:
            raise InputError(
                "--device is not for decoders: their plans are for the machine that calibrated. Leave out."
            )
        decided = DecoderPlan.parse(read_bytes(plan_file, "plan"), str(plan_file))
        _refuse_other_kind(plan_file, model, calibration, decoder=True)
        manifest = flow.export_decoder(
            decided, str(model), calibration, output, target=target or "executorch", stock=stock, overwrite=overwrite,
            progress=_progress(quiet=quiet),
        )  # fmt: skip
        _result(manifest, _decoder_text("decoder_bundle_text"), as_json=as_json)
        if not as_json:
            following = f"on the device: edgeflex build {output}" if manifest.backend == "tensorrt" else ""
            _say(f"\nWrote {output}. Next: {following or _first_prompt(output)}")
        return

    made = Plan.parse(read_bytes(plan_file, "plan"), str(plan_file))
    _refuse_other_kind(plan_file, model, calibration, decoder=False)
    bundle = flow.export(
        made,
        model,
        calibration,
        output,
        device=None if device is None else _device(device),
        target=target,
        overwrite=overwrite,
        progress=_progress(quiet=quiet),
    )
    if as_json:
        _print_json(bundle.manifest)
        return
    rows = [(one.path, one.role, format_bytes(one.size_bytes), one.sha256[:16]) for one in bundle.manifest.files]
    title = f"{len(bundle.manifest.layer_precisions)} layers held as planned"
    _say(terminal.table_text(title, ("file", "role", "size", "sha256"), rows, words=("role", "sha256")))
    if bundle.manifest.settings:
        _say(f"\n{terminal.settings_text(bundle.manifest)}")
    following = f"on the device: edgeflex build {output}" if bundle.manifest.backend == "tensorrt" else ""
    _say(f"\nWrote {output}. Next: {following or f'edgeflex bench {output} --data IMAGES'}")


def _refuse_other_kind(plan_file: Path, model: Path, calibration: Path, *, decoder: bool) -> None:
    """Refuse a model or a calibration of the other kind than the plan is."""
    from edgeflex import flow

    faults = []
    if flow.is_decoder(model) is not decoder:
        why = (
            "holds no config.json: give the Hugging Face folder"
            if decoder
            else "is a decoder: give what fit-exits wrote"
        )
        faults.append(f"--model {str(model)!r} {why}")
    if flow.is_decoder_calibration(calibration) is not decoder:
        why = "is no calibration of a decoder" if decoder else "is the calibration of a decoder"
        faults.append(f"--calibration {str(calibration)!r} {why}: give the one that was planned")
    if faults:
        kind = "a decoder" if decoder else "a model of images"
        raise InputError.collect(f"{str(plan_file)!r} is the plan of {kind}", faults)


def _first_prompt(bundle: Path) -> str:
    return f'edgeflex run {bundle} --prompt "Once upon a time"'


@app.command(short_help="Build TensorRT engines on the device")
def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle that was exported for tensorrt.")],
    *,
    workspace: Annotated[
        str | None, typer.Option("--workspace", metavar="SIZE", help="Most scratch memory while building, e.g. 1GiB.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what is there already.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build TensorRT engines on this device; what was built stays, so a killed run goes on where it stopped."""
    from edgeflex import flow
    from edgeflex.units import option_value, parse_size_bytes

    index = flow.build(
        bundle,
        workspace_bytes=option_value("--workspace", workspace, parse_size_bytes),
        force=force,
        progress=_progress(quiet=quiet),
    )
    if as_json:
        _print_json(index)
        return
    _say(terminal.engines_text(index))
    following = _first_prompt(bundle) if flow.is_decoder_bundle(bundle) else f"edgeflex bench {bundle} --data IMAGES"
    _say(f"\nNext: {following}")


@app.command(short_help="Say what is installed and what is missing")
def doctor(*, as_json: Json = False) -> None:
    """Say what is installed, what is missing with the command that mends it, and which targets run here."""
    from edgeflex import flow

    found = flow.doctor()
    _result(found, terminal.doctor_text, as_json=as_json)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


@app.command(short_help="Answer images, or a prompt")
def run(
    bundle: BundleFolder,
    *,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="IMAGES", help="Images, for a bundle of exits.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Decoder: text to go on from.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="Decoder: the same from a file.")
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Decoder: talk, line by line.")] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Decoder: most tokens of an answer.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0, help="Decoder: 0 is greedy.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="N", min=1, help="Decoder: draw among so many.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="SHARE", help="Decoder: draw among this share.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Decoder: end before this text.")
    ] = None,
    cache: OnCache = None,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="NAME", help="Decoder: of the cache, if not the plan's.")
    ] = None,
    prefetch: Annotated[
        int | None, typer.Option("--prefetch", metavar="N", min=0, help="Decoder: layers to read ahead.")
    ] = None,
    device: OnDevice = None,
    vram: OnVram = None,
    seed: Seed = 0,
    runtime: Runtime = None,
    threads: PlanThreads = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="At most so many images.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Raw samples.")] = Path("stats.json"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a bundle: on images (answers, exits taken, raw latencies), or a decoder on a prompt (text)."""
    from edgeflex import flow
    from edgeflex.files import write_atomic

    _note_threads(threads)
    if flow.is_decoder_bundle(bundle):
        if data is not None or limit is not None or runtime is not None:
            raise InputError(
                "--data, --limit and --runtime are for bundles of exits; a decoder takes --prompt, and runs where it "
                "was exported for, or with --device."
            )
        from edgeflex.flow import conversation

        asked = conversation.Asked(
            prompt=prompt, prompt_file=prompt_file, interactive=interactive, max_tokens=max_tokens,
            temperature=temperature, top_k=top_k, top_p=top_p, stops=tuple(stop or ()), seed=seed, cache=cache,
            policy=policy, prefetch=prefetch, threads=threads, device=device, vram=vram,
        )  # fmt: skip
        typed = sys.stdin.isatty() and not (quiet or as_json)
        ask = terminal.ask if typed else None
        talk = conversation.Talk(bundle, asked, ask=ask, progress=_progress(quiet=quiet))
        _converse(talk, output, quiet=quiet, as_json=as_json)
        return
    spoken = {
        "--prompt": prompt, "--prompt-file": prompt_file, "--interactive": interactive or None,
        "--temperature": temperature or None, "--top-k": top_k, "--top-p": top_p, "--stop": stop or None,
        "--cache": cache, "--policy": policy, "--prefetch": prefetch, "--device": device, "--vram": vram,
    }  # fmt: skip
    unfit = [name for name, value in spoken.items() if value is not None]
    if data is None or unfit:
        raise _for_exits(bundle, "give --data IMAGES" + (f", and leave out {', '.join(unfit)}" if unfit else ""))
    stats = flow.run(bundle, data, runtime=runtime, threads=threads, limit=limit, progress=_progress(quiet=quiet))
    write_atomic(output, stats.canonical_json())
    if as_json:
        _print_json(stats)
        return
    _say(terminal.run_text(stats))
    _say(f"\nWrote {output}")


def _for_exits(bundle: Path, needed: str) -> EdgeflexError:
    """Return what is wrong with a command for ``bundle``, which is no decoder's: it may be no whole bundle at all."""
    from edgeflex.bundle import open_bundle

    try:
        open_bundle(bundle)
    except EdgeflexError as error:
        return error
    return InputError(f"{str(bundle)!r} is a bundle of exits: {needed}.")


def _converse(talk: Any, output: Path, *, quiet: bool, as_json: bool) -> None:
    """Print answers as they are made; with ``--json`` the statistics alone."""
    from edgeflex.files import write_atomic

    interrupted = False
    with talk:
        try:
            for pieces in talk.answers():
                for piece in pieces:
                    if not as_json:
                        sys.stdout.write(piece)
                        sys.stdout.flush()
                if not as_json:
                    _say()
        except KeyboardInterrupt:  # between two answers; within one it only ends that one
            if not talk.said:
                raise
            interrupted = True
        stats = talk.stats()
    write_atomic(output, stats.canonical_json())
    if as_json:
        _print_json({**stats.model_dump(mode="json"), "text": talk.said})
    elif not quiet:
        terminal.tell(f"\n{_decoder_text('generation_text')(stats)}\n\nWrote {output}")
    if interrupted or stats.stopped_by == "interrupt":
        terminal.tell(f"edgeflex: interrupted; the figures of the last answer are in {output}")
        raise SystemExit(_INTERRUPTED)  # not typer's, after which nobody knows what is left to be said


def _refuse_place(bundle: Path, *given: str | None) -> None:
    """Refuse a place to run for a bundle that knows its own."""
    if any(one is not None for one in given):
        raise InputError(
            f"--device, --vram and --cache are for decoders; {str(bundle)!r} is a bundle of exits, whose target says "
            "where it runs. Leave them out."
        )


def _end_with(*, kept: bool) -> None:
    if not kept:
        raise typer.Exit(3)


@app.command(short_help="Measure latency and memory")
def bench(
    bundle: BundleFolder,
    *,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="IMAGES", help="Images, for a bundle of exits.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Decoder: UTF-8 text that prompts are taken from.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=2, help="Decoder: tokens of an answer.")
    ] = 64,
    follow_text: Annotated[
        bool, typer.Option("--follow-text", help="Decoder: answer as the text goes on, as the plan's replay does.")
    ] = False,
    images: Annotated[int, typer.Option("--images", metavar="N", min=1, help="At most so many images.")] = 200,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Passes over the images.")] = 5,
    device: OnDevice = None,
    vram: OnVram = None,
    cache: OnCache = None,
    threads: PlanThreads = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Measured figures.")] = Path(
        "bench.json"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency and memory against the plan; exit code 3 when a budget is broken."""
    from edgeflex import flow
    from edgeflex.files import write_atomic

    result: Any
    _note_threads(threads)
    decoder = flow.is_decoder_bundle(bundle)
    if decoder:
        if text is None or data is not None:
            raise InputError(f"{str(bundle)!r} is a decoder's bundle: give --text FILE, and no --data.")
        result = flow.bench_decoder(
            bundle, text, max_tokens=max_tokens, repeats=repeats, follow_text=follow_text, threads=threads,
            on=flow.Place(device, vram, cache), progress=_progress(quiet=quiet),
        )  # fmt: skip
    elif data is None or text is not None:
        raise _for_exits(bundle, "give --data IMAGES, and no --text")
    elif follow_text:
        raise _for_exits(bundle, "leave out --follow-text")
    else:
        _refuse_place(bundle, device, vram, cache)
        result = flow.bench(
            bundle, data, images=images, repeats=repeats, threads=threads, progress=_progress(quiet=quiet)
        )
    write_atomic(output, result.canonical_json())
    if as_json:
        _print_json(result)
    else:
        _say(terminal.checks_text(result.checks))
        _say_speed(terminal.pace_text(flow.pace(bundle, result), result.checks))
        if decoder and result.device is not None:
            _say(f"\n{_decoder_text('device_record_text')(result.device)}")
        _say(f"\nWrote {output}")
    budgets = [check for check in result.checks if check.limit is not None and check.was_measured]
    _end_with(kept=all(check.ok for check in budgets))


@app.command(short_help="Check accuracy, answers and files")
def verify(
    bundle: BundleFolder,
    *,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="IMAGES", help="Images, for a bundle of exits.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", metavar="FOLDER", help="Full-depth reference: the model folder.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="At most so many images.")] = None,
    runtime: Runtime = None,
    device: OnDevice = None,
    vram: OnVram = None,
    cache: OnCache = None,
    threads: PlanThreads = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Measured figures.")] = Path(
        "verify.json"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hold accuracy, parity and size against the manifest; exit code 3 when a promise is broken."""
    from edgeflex import flow
    from edgeflex.files import write_atomic

    _note_threads(threads)
    if flow.is_decoder_bundle(bundle):
        if data is not None or model is not None or limit is not None or runtime is not None:
            raise InputError(
                "--data, --model, --limit and --runtime are for bundles of exits; a decoder's carries its own answers."
            )
        found = flow.verify_decoder(
            bundle, threads=threads, on=flow.Place(device, vram, cache), progress=_progress(quiet=quiet)
        )
        write_atomic(output, found.canonical_json())
        _result(found, lambda one: terminal.checks_text(one.checks), as_json=as_json)
        if not as_json:
            _say(f"\nWrote {output}")
        _end_with(kept=all(one.ok for one in found.checks))
        return
    if data is None:
        raise _for_exits(bundle, "give --data IMAGES")
    _refuse_place(bundle, device, vram, cache)
    result = flow.verify(
        bundle, data, model_folder=model, limit=limit, runtime=runtime, threads=threads,
        progress=_progress(quiet=quiet),
    )  # fmt: skip
    write_atomic(output, result.canonical_json())
    if as_json:
        _print_json(result)
    else:
        _say(terminal.checks_text(result.checks))
        _say(f"\n{terminal.sample_text(result)}\n\nWrote {output}")
    _end_with(kept=all(check.ok for check in result.checks))


@app.command(short_help="Write promise against measurement")
def report(
    bundle: BundleFolder,
    *,
    bench_file: Annotated[
        Path | None, typer.Option("--bench", metavar="FILE", help="bench.json of this bundle.")
    ] = None,
    verify_file: Annotated[
        Path | None, typer.Option("--verify", metavar="FILE", help="verify.json of this bundle.")
    ] = None,
    stats_file: Annotated[
        Path | None, typer.Option("--stats", metavar="FILE", help="stats.json of this bundle.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one self-contained page: promise against measurement."""
    from edgeflex import flow
    from edgeflex.files import read_bytes
    from edgeflex.schema import BenchResult, RunStats, VerifyResult

    if flow.is_decoder_bundle(bundle):
        shown = flow.report_decoder(
            bundle, output, bench_file=bench_file, stats_file=stats_file, verify_file=verify_file
        )
        _result(shown, _decoder_text("decoder_report_text"), as_json=as_json)
        if not as_json:
            _say(f"\nWrote {output}")
        return

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


@trace_app.command("record", short_help="Write which experts an answer uses")
def trace_record(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A decoder's bundle.")],
    *,
    prompt_file: Annotated[Path, typer.Option("--prompt-file", metavar="FILE", help="UTF-8 text to go on from.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=2, help="Tokens to answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", min=0, help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the trace goes.")] = Path(
        "trace.csv"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer a prompt and write which experts every token used."""
    from edgeflex import flow
    from edgeflex.bundle_moe import open_decoder_bundle
    from edgeflex.units import format_count

    tokens = flow.record_trace(
        bundle, prompt_file, output, max_tokens=max_tokens, temperature=temperature, seed=seed,
        progress=_progress(quiet=quiet),
    )  # fmt: skip
    if as_json:
        _print_json({"tokens": tokens, "output": str(output)})
        return
    cache_bytes = open_decoder_bundle(bundle).manifest.plan.cache_bytes
    following = f"edgeflex trace simulate {output} --cache {max(cache_bytes // 1024, 1)}KiB"
    _say(f"{format_count(tokens, 'answered token')}\n\nWrote {output}. Next, with the plan's cache: {following}")


@trace_app.command("simulate", short_help="Replay a trace through the cache")
def trace_simulate(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A recorded trace: trace.csv of a calibration, or a public one.")
    ],
    *,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache", metavar="SIZE", help="Bytes of the cache, for instance 1000MiB,3000MiB; with --device of RAM."
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAME", help="Comma-separated, for instance lru,enu,belady.")
    ] = "enu,lru",
    device: Annotated[
        str | None,
        typer.Option(
            "--device", "-d", metavar="DEVICE", help="A machine with a GPU that is not at hand: in virtual time."
        ),
    ] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", metavar="SIZE", help="With --device: bytes of experts on the GPU.")
    ] = None,
    ram_rate: Annotated[
        str | None,
        typer.Option(
            "--ram-rate", metavar="RATE", help="With --device: bytes of RAM per second, if not in the profile."
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link", metavar="RATE", help="Bytes per second that misses are read at, e.g. 1GB: predicts time."
        ),
    ] = None,
    compute: Annotated[
        str | None,
        typer.Option("--compute", metavar="TIME", help="Time of a token with every expert in memory, e.g. 20ms."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", metavar="NAME", help="Expert bytes of this precision, where the trace has them."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw hit rates to a .svg or .png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay a routing trace through the runtime's own expert cache: hits and bytes for each size and policy."""
    from edgeflex import flow
    from edgeflex.units import option_value, parse_rate_bytes_per_s, parse_size_bytes, parse_time_s

    rate = option_value("--link", link, parse_rate_bytes_per_s)
    if device is not None:
        vram_bytes = option_value("--vram", vram, parse_size_bytes)
        if vram_bytes is None or compute is not None or plot is not None:
            raise InputError("--device needs --vram, for instance 8GiB, and takes neither --compute nor --plot.")
        simulated = flow.simulate_device(
            trace,
            _device(device),
            vram_bytes=vram_bytes,
            ram_bytes=option_value("--cache", cache, parse_size_bytes),
            precision=precision,
            link_bytes_per_s=rate,
            ram_bytes_per_s=option_value("--ram-rate", ram_rate, parse_rate_bytes_per_s),
        )
        _result(simulated, _decoder_text("device_simulation_text"), as_json=as_json)
        return
    caches = option_value("--cache", cache, lambda text: [parse_size_bytes(part) for part in text.split(",")])
    if caches is None or vram is not None or ram_rate is not None:
        raise InputError(
            "a replay needs --cache, for instance 1000MiB,3000MiB; --vram and --ram-rate are for --device NAME, a GPU."
        )
    replays = flow.simulate_trace(
        trace,
        caches,
        [part.strip() for part in policy.split(",")],
        precision=precision,
        link_bytes_per_s=rate,
        compute_s=option_value("--compute", compute, parse_time_s),
    )
    if plot is not None:
        from edgeflex.reports.decoder_charts import save_hit_rates

        save_hit_rates(replays.results, plot)
    _result(replays, _decoder_text("simulation_text"), as_json=as_json)
    if plot is not None and not as_json:
        _say(f"\nWrote {plot}")


@app.command(short_help="Walk the whole way on two small models")
def quickstart(
    *,
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where everything goes.")] = Path(
        "edgeflex-quickstart"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Walk the whole corridor on two small real models that need no network."""
    from edgeflex.quickstart import walk

    made = walk(folder, progress=_progress(quiet=quiet))
    if as_json:
        decoder = {
            "plan": made.plan.model_dump(mode="json"),
            "checks": [one.model_dump(mode="json") for one in made.checks],
            "text": made.text,
        }
        _print_json({**made.report.model_dump(mode="json"), "decoder": decoder})
        return
    _say("Digits, a network with early exits\n")
    _say(terminal.report_text(made.report))
    measured = () if made.report.bench is None else made.report.bench.checks
    _say_speed(terminal.pace_text(made.speed, (*made.report.verdicts, *measured)))
    _say(f"\nThe report: {made.page}\n\nA tiny mixture-of-experts decoder, its experts read from disk\n")
    _say(terminal.checks_text(made.checks))
    _say_speed(terminal.pace_text(made.decoder_speed, made.checks))
    _say(f"\nIt says: {made.text}\n\nThe report: {made.decoder_page}")


def _fail(error: EdgeflexError) -> int:
    """Say what went wrong, for machines too if they asked; return the exit code."""
    if "--json" in sys.argv:
        document = {"error": type(error).__name__, "message": str(error), **error.details()}
        _print_json(document)
    text = terminal.printable(f"edgeflex: {error}", sys.stderr)
    # a terminal would break lines inside words; whoever reads a pipe wants them whole
    sys.stderr.write(f"{terminal.prose(*text.splitlines()) if sys.stderr.isatty() else text}\n")
    return error.exit_code


def _misuse(error: Exception) -> InputError:
    """Return what the parser of the command line has to say as one of our errors, in one line."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    where = "edgeflex" if context is None else context.command_path
    said = text if text.endswith("?") else text.rstrip(".") + "."
    return InputError(f"{said} See `{where} --help`.")


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error does it: a terminal of another encoding shows what it can, and escapes the rest.
        sys.stdout.reconfigure(errors="backslashreplace")
    terminal.quiet_libraries()
    code = _run()
    try:
        sys.stdout.flush()
    except OSError:
        # Nobody can read the rest; the interpreter must not try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(code)
