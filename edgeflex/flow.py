"""The corridor: every stage in order, each a function from files to a file. No arithmetic lives here."""

from __future__ import annotations

import gc
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflex.errors import DeviceError, InfeasibleError, InputError
from edgeflex.files import read_bytes, staged_folder, write_atomic
from edgeflex.progress import Progress, Silent
from edgeflex.schema import (
    BenchResult,
    Budget,
    BundleManifest,
    Candidates,
    CostTable,
    Curve,
    CurvePoint,
    DeviceProfile,
    Figure,
    MemoryBreakdown,
    ModelGraph,
    Plan,
    Precision,
    Preprocessing,
    RunStats,
    Scenario,
    Solution,
    Tier,
    VerifyResult,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.bundle import Bundle
    from edgeflex.costs.calibration import Evaluate
    from edgeflex.costs.store import Calibration
    from edgeflex.images import ImageFolder
    from edgeflex.models import DynamicModel
    from edgeflex.profiles.kernels import KernelJob
    from edgeflex.transforms import PreparedModel

BACKEND = "executorch"
_KERNEL_SAMPLES = 15
_TIMING_IMAGES = 32
_SAMPLES = 2
# How far ExecuTorch may differ from the reference, in probability. Float differs by summation order; int8
# rounds after every operation, and one step in an early layer can move a later one.
_TOLERANCE = {8: 0.15, 4: 0.15, 32: 1e-3, 16: 1e-2}


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    return {name: version(name) for name in ("edgeflex", "torch", "executorch", "torchao", "numpy", "scipy")}


# --- profile -----------------------------------------------------------------------------------------


def _kernel_runner() -> Callable[[KernelJob], Sequence[float]]:
    """Return a function that times one layer through the exporter and the runtime themselves."""
    from edgeflex.exporters.executorch import kernel_program
    from edgeflex.runtimes.executorch import time_program

    programs: dict[tuple[str, Precision], tuple[bytes, Any]] = {}

    def run(job: KernelJob) -> Sequence[float]:
        key = (job.shape.digest(), job.precision)
        if key not in programs:
            programs.clear()  # jobs of one kernel follow each other; keep only that one
            programs[key] = kernel_program(job.shape, job.precision)
        program, example = programs[key]
        return time_program(program, [example], threads=job.threads, repeats=_KERNEL_SAMPLES)

    return run


def _call_cost() -> tuple[Figure, Figure]:
    """Return the fixed seconds of a call, and of a delegate within it."""
    from edgeflex.exporters.executorch import call_programs
    from edgeflex.profiles.samples import summarise
    from edgeflex.runtimes.executorch import time_program

    empty, one, two = call_programs()
    samples = [
        time_program(program, [example], threads=1, repeats=_KERNEL_SAMPLES) for program, example in (empty, one, two)
    ]
    call = summarise(samples[0], "a program of one portable operation on one number")
    delegate = summarise(
        [max(1e-9, later - earlier) for earlier, later in zip(samples[1], samples[2], strict=True)],
        "a program of two delegates less one of one",
    )
    return call, delegate


def profile(
    out: Path,
    *,
    quick: bool = False,
    threads: Sequence[int] = (1,),
    storage_folder: Path | None = None,
    progress: Progress | None = None,
) -> DeviceProfile:
    """Measure this machine into ``out``; a killed run goes on where it stopped."""
    from edgeflex.profiles import probe
    from edgeflex.registry import EXPORTERS

    journal = out.with_name(f"{out.name}.partial")
    measured = probe.measure(
        quick=quick,
        threads=threads,
        precisions=_profiled_precisions(EXPORTERS.row(BACKEND).capabilities.precisions),
        run_kernel=_kernel_runner(),
        call_cost=_call_cost,
        backend=BACKEND,
        versions=versions(),
        storage_folder=storage_folder,
        journal=journal,
        progress=progress,
    )
    write_atomic(out, _pretty(measured))
    journal.unlink(missing_ok=True)
    return measured


def _profiled_precisions(planned: Any) -> dict[Any, tuple[Precision, ...]]:
    """Return what to time: what plans may use, and fp16 of linear layers for comparison."""
    return {
        kind: (*precisions, Precision.FP16) if kind.value == "linear" else tuple(precisions)
        for kind, precisions in planned.items()
    }


def _pretty(document: Any) -> str:
    return json.dumps(document.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def _same_machine(device: DeviceProfile) -> bool:
    """Say whether a profile was measured on a machine like this one."""
    from edgeflex.profiles.machine import machine

    facts = machine()
    return device.origin == "measured" and device.cpu_model == facts.cpu_model and device.isa == facts.isa


# --- inspect, fit-exits --------------------------------------------------------------------------------


def _preprocessing_for(model: str, input_size: int | None) -> Preprocessing:
    """Return how images become inputs: the zoo's own way, or ImageNet's constants at ``input_size``."""
    if model.startswith("zoo:"):
        from edgeflex.models import zoo

        return zoo.preprocessing(model.removeprefix("zoo:"))
    if input_size is None:
        raise InputError(f"the input size of {model!r} is not known. Pass --input-size, for instance 224.")
    # the constants of torchvision's ImageNet models, which most image backbones were trained with
    return Preprocessing(height=input_size, width=input_size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def inspect(
    model: str, weights: Path | None = None, *, classes: int | None = None, input_size: int | None = None
) -> tuple[ModelGraph, Any]:
    """Return the graph of a model, or of a folder that fit-exits wrote, and the stages where it can be cut."""
    from edgeflex.models import graph_from_module, load_module, open_model, stages, trace

    if ":" not in model and Path(model).is_dir():
        return open_model(Path(model)).graph, ()
    module = load_module(model, weights, classes=classes)
    preprocessing = _preprocessing_for(model, input_size)
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    graph = graph_from_module(module, source=model, input_shape=shape, preprocessing=preprocessing)
    return graph, stages(trace(module, shape))


def fit_exits(
    model: str,
    data: Path,
    out: Path,
    *,
    weights: Path | None = None,
    stage_names: Sequence[str] = (),
    exits: int = 3,
    head: str = "linear",
    input_size: int | None = None,
    seed: int = 0,
    epochs: int = 60,
    flip: bool = False,
    tune_trunk_epochs: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DynamicModel:
    """Train an exit after each stage and write the model folder; a killed run goes on where it stopped."""
    import shutil

    from edgeflex.files import refuse_output
    from edgeflex.images import open_images
    from edgeflex.models import HeadSpec, default_stages, load_module, save_model, stages, trace
    from edgeflex.models.exits import fit_exits as fit

    refuse_output(out, overwrite=overwrite)
    images = open_images(data)
    module = load_module(model, weights, classes=len(images.classes))
    preprocessing = _preprocessing_for(model, input_size)
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    names = tuple(stage_names) or default_stages(stages(trace(module, shape)), exits)
    journal = out.with_name(f".{out.name}.fitting")
    fitted = fit(
        module,
        names,
        HeadSpec.model_validate({"kind": head}),
        images,
        preprocessing,
        source=model,
        seed=seed,
        epochs=epochs,
        flip=flip,
        tune_trunk_epochs=tune_trunk_epochs,
        progress=progress,
        journal=journal,
    )
    save_model(fitted, out, overwrite=overwrite)
    shutil.rmtree(journal, ignore_errors=True)
    return fitted


# --- calibrate ---------------------------------------------------------------------------------------


def _evaluator(model: DynamicModel, images: ImageFolder, threads: int) -> Evaluate:
    """Return a function that exports a prepared model and runs it for real on images of the folder."""
    from edgeflex.exporters.executorch import program_from_prepared, segment_programs
    from edgeflex.runtimes.executorch import ExecutorchSession
    from edgeflex.runtimes.recorder import memory_now
    from edgeflex.runtimes.segments import all_exits, segment_seconds

    def batches(indices: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(indices), 64):
            yield images.load(indices[start : start + 64], _preprocessing(model))

    def evaluate(
        prepared: PreparedModel, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], tuple[float, ...], int, int | None]:
        program = program_from_prepared(prepared)
        with tempfile.TemporaryDirectory(prefix="edgeflex-") as folder:
            path = Path(folder) / "program.pte"
            path.write_bytes(program)
            session = ExecutorchSession(path, segment_programs(prepared, model.graph), threads=threads)
            sample = images.load(indices[:_TIMING_IMAGES], _preprocessing(model))
            never = (None,) * session.segment_count
            with session:  # a rehearsal pays what a process pays once
                session.infer(sample[:1], never)
            gc.collect()
            before = memory_now()
            with session:
                session.infer(sample[:1], never)
                memory_bytes = memory_now().above(before)
                outputs = all_exits(session, batches(indices))
                seconds = segment_seconds(session, sample)
        return outputs, seconds, len(program), memory_bytes

    return evaluate


def _preprocessing(model: DynamicModel) -> Any:
    if model.graph.preprocessing is None:
        raise InputError("the model has no preprocessing, so images cannot be loaded. Fit its exits again.")
    return model.graph.preprocessing


def _with_kernels(
    device: DeviceProfile, graph: ModelGraph, options: Any, threads: int, journal: Path, progress: Progress
) -> DeviceProfile:
    """Return the profile with the kernels of this very model measured, where this is the machine."""
    from edgeflex.profiles.kernels import KernelJob, measure_kernels

    jobs = dict.fromkeys(
        KernelJob(layer.shape, precision, threads) for layer in graph.layers for precision in options[layer.name]
    )
    kernels = measure_kernels(
        tuple(jobs), run=_kernel_runner(), journal=journal, context=device.name, progress=progress
    )
    known = {(one.shape, one.precision, one.threads) for one in kernels}
    kept = tuple(one for one in device.kernels if (one.shape, one.precision, one.threads) not in known)
    return device.model_copy(update={"kernels": (*kernels, *kept)})


def calibrate(
    model_folder: Path,
    data: Path,
    out: Path,
    *,
    device: DeviceProfile,
    threads: int = 1,
    seed: int = 0,
    mixes: int = 8,
    shares: dict[str, float] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Candidates:
    """Measure what the model does in every precision and exit; resumable, cached by content.

    Writes the calibration folder with ``graph.json``, ``device.json``, ``table.json`` and
    ``candidates.json``, which are all that planning needs.
    """
    import shutil

    from edgeflex.costs import assemble, calibration, store
    from edgeflex.costs.table import layer_options
    from edgeflex.images import open_images, split
    from edgeflex.models import open_model
    from edgeflex.registry import EXPORTERS

    heard = progress or Silent()
    model, images = open_model(model_folder), open_images(data)
    _check_classes(model, images)
    meta = store.CalibrationMeta(
        weights_digest=model.graph.weights_digest,
        images_digest=images.digest(),
        seed=seed,
        shares=shares or store.SHARES,
        backend=BACKEND,
    )
    if overwrite and out.is_dir():
        shutil.rmtree(out)
    folder = store.Calibration.create(out, meta)
    if not folder.has("labels.npy"):
        folder.write_split(split(images, meta.shares, seed), images.labels, seed)
    write_atomic(out / "graph.json", _pretty(model.graph))
    _keep_samples(folder, images, model)
    capabilities = EXPORTERS.row(BACKEND).capabilities
    options = layer_options(model.graph, capabilities)
    calibration.measure_ranges(folder, model, images)
    here = _same_machine(device)
    if here:
        device = _with_kernels(device, model.graph, options, threads, out / "kernels.partial", heard)
    write_atomic(out / "device.json", _pretty(device))
    calibration.measure_sensitivity(folder, model, images, options, heard)
    evaluate = _evaluator(model, images, threads)
    uniform = assemble.uniform_mixes(model.graph, options)
    mixed = [("random", assemble.random_mix(model.graph, options, seed + step)) for step in range(2)]
    with heard.task("Running whole mixes", len(uniform) + len(mixed) + mixes) as advance:
        for role, precisions in (*uniform, *mixed):
            calibration.measure_mix(folder, model, precisions, evaluate, role)
            advance(1)
        table, _ = assemble.assemble(folder, model.graph, device, capabilities, threads=threads, here=here)
        for solution in _frontier(table, mixes):
            calibration.measure_mix(folder, model, assemble.mix_of(solution.choices), evaluate)
            advance(1)
    table, candidates = assemble.assemble(folder, model.graph, device, capabilities, threads=threads, here=here)
    write_atomic(out / "table.json", table.canonical_json())
    write_atomic(out / "candidates.json", candidates.canonical_json())
    return candidates


def _check_classes(model: DynamicModel, images: ImageFolder) -> None:
    if model.graph.classes and tuple(model.graph.classes) != tuple(images.classes):
        raise InputError(
            f"the images have {len(images.classes)} classes ({', '.join(images.classes[:4])}, …), the model has "
            f"{len(model.graph.classes)} ({', '.join(model.graph.classes[:4])}, …). Give images of the same classes."
        )


def _keep_samples(folder: Calibration, images: ImageFolder, model: DynamicModel) -> None:
    """Keep two inputs whose outputs the bundle will carry, and the digests of every image that is used."""
    import numpy as np

    from edgeflex.costs.store import save_array

    if folder.has("samples.npy") and folder.has("seen.txt"):
        return
    save_array(folder.folder / "samples.npy", images.load(folder.part("choose")[:_SAMPLES], _preprocessing(model)))
    used = np.concatenate([folder.part("choose"), folder.part("certify")])
    digests = sorted({images.items[int(index)].digest for index in used})
    write_atomic(folder.folder / "seen.txt", "".join(f"{one}\n" for one in digests))


def _frontier(table: CostTable, points: int) -> tuple[Solution, ...]:
    """Return the table's best plans over a sweep of memory, and over a sweep of drop."""
    from edgeflex.plans import frontier

    half = max(1, points // 2)
    by_memory = frontier(table, Budget(minimize="drop"), over="memory", points=half)
    by_latency = frontier(table, Budget(minimize="drop"), over="latency", points=points - half)
    return (*by_memory, *by_latency)


# --- plan --------------------------------------------------------------------------------------------


def open_calibration(folder: Path) -> tuple[Calibration, ModelGraph, DeviceProfile, CostTable, Candidates]:
    """Return a finished calibration and its documents."""
    from edgeflex.costs.store import Calibration

    opened = Calibration.open(folder)
    if not opened.has("candidates.json"):
        raise InputError(f"the calibration in {str(folder)!r} is not finished. Run the same edgeflex calibrate again.")

    def document(kind: Any, name: str) -> Any:
        return kind.parse(read_bytes(folder / name, "calibration file"), str(folder / name))

    return (
        opened,
        document(ModelGraph, "graph.json"),
        document(DeviceProfile, "device.json"),
        document(CostTable, "table.json"),
        document(Candidates, "candidates.json"),
    )


def solve_table(table_file: Path, budget: Budget) -> Solution:
    """Solve a saved cost table by itself and recount the answer."""
    from edgeflex.plans import check, solve

    table = CostTable.parse(read_bytes(table_file, "cost table"), str(table_file))
    solution = solve(table, budget)
    check(table, budget, solution)
    return solution


def plan(calibration_folder: Path, budget: Budget, *, device: DeviceProfile | None = None, threads: int = 1) -> Plan:
    """Return the certified plan for a budget; nothing is measured."""
    from edgeflex.costs import assemble
    from edgeflex.plans import choose, solve
    from edgeflex.plans.audit import check, check_plan
    from edgeflex.registry import EXPORTERS

    folder, graph, own, table, candidates = open_calibration(calibration_folder)
    if device is not None and device.digest() != own.digest():
        capabilities = EXPORTERS.row(BACKEND).capabilities
        table, candidates = assemble.assemble(folder, graph, device, capabilities, threads=threads, here=False)
    chosen = choose.pick(table, candidates.candidates, budget)
    notes: list[str] = []
    try:
        solution = solve(table, budget)
        check(table, budget, solution)
    except InfeasibleError:
        if chosen is None:
            raise
        notes.append("the additive loss model of the table is too pessimistic here; the drop was measured instead")
        solution = solve(table, budget.model_copy(update={"max_drop": None}))
    if chosen is None:
        raise _unmeasured(table, candidates, budget)
    chosen = _with_safety(chosen, folder, budget, candidates)
    scenario, certificate = choose.certified(chosen, budget, _paired_losses(folder, chosen.candidate.mix))
    made = _plan_document(chosen, scenario, budget, graph, solution, candidates, folder)
    made = made.model_copy(update={"certificate": certificate, "notes": (*made.notes, *notes), "threads": threads})
    check_plan(chosen.table, made)
    return made


def _with_safety(chosen: Any, folder: Calibration, budget: Budget, candidates: Candidates) -> Any:
    """Return the pick with a path of ever more careful thresholds before it, judged on the choosing images."""
    from edgeflex.costs.policies import exit_outputs, judge, safety_path
    from edgeflex.costs.table import scenario_of
    from edgeflex.plans import choose

    outputs = exit_outputs(folder.mix(chosen.candidate.mix).choose, folder.labels("choose"))
    block_s = chosen.costs.block_latency_s
    path = [
        scenario_of(judge(outputs, thresholds, block_s), 1.0 - candidates.reference_accuracy, f"careful {index}")
        for index, thresholds in enumerate(safety_path(chosen.chain[0].thresholds[:-1]))
    ]
    return choose.lengthened(chosen, path, budget)


def _unmeasured(table: CostTable, candidates: Candidates, budget: Budget) -> InfeasibleError:
    from edgeflex.plans import choose

    free = budget.model_copy(update={"max_drop": None})
    nearest = choose.pick(table, candidates.candidates, free.model_copy(update={"minimize": "drop"}))
    if nearest is None:
        advice = "Calibrate with more --mixes, or loosen the budget"
        return InfeasibleError(
            f"no mix that was measured fits the budget, though the table knows one. {advice}.", relaxation=advice
        )
    least = nearest.chain[-1].loss
    return InfeasibleError(
        f"no measured mix fits: within the other budgets the least drop is {least * 100:.2f} %, the budget is "
        f"{(budget.max_drop or 0) * 100:.2f} %. Pass --max-drop {least * 100 + 0.01:.2f}% or allow more latency.",
        binding=("max drop",),
        least={"max drop": least},
        relaxation=f"--max-drop {least * 100 + 0.01:.2f}%",
    )


def _paired_losses(folder: Calibration, mix: str) -> Callable[[Sequence[Scenario]], NDArray[np.float64]]:
    """Return the losses [scenarios, samples] of a mix against full-depth fp32, on the certify images."""
    from edgeflex.costs.policies import exit_outputs, paired_losses
    from edgeflex.costs.store import mix_digest

    labels = folder.labels("certify")
    outputs = exit_outputs(folder.mix(mix).certify, labels)
    reference = exit_outputs(folder.mix(mix_digest({})).certify, labels)
    return lambda scenarios: paired_losses(outputs, reference, [one.thresholds[:-1] for one in scenarios])


def _plan_document(
    chosen: Any,
    scenario: Scenario,
    budget: Budget,
    graph: ModelGraph,
    solution: Solution,
    candidates: Candidates,
    folder: Calibration,
) -> Plan:
    from edgeflex.plans import choose
    from edgeflex.plans.audit import footprint

    table = chosen.table
    predicted = footprint(table, table.scenarios.index(scenario), chosen.candidate.choices)
    fixed = table.fixed_memory_bytes.get(Tier.HOST, 0)
    activations = min(fixed, 8 * max((edge.elements for edge in graph.edges), default=0))
    return Plan(
        name=graph.name,
        backend=table.backend,
        budget=budget,
        scenario=scenario,
        thresholds=scenario.thresholds,
        choices=chosen.candidate.choices,
        exit_shares=choose.exit_shares(scenario.reach),
        predicted=predicted,
        latency_interval_s=choose.latency_intervals(
            predicted, scenario.reach, table.latency_relative_error, len(folder.part("choose"))
        ),
        memory=MemoryBreakdown(
            weights_bytes=predicted.memory_bytes.get(Tier.HOST, 0) - fixed,
            activation_bytes=activations,
            overhead_bytes=fixed - activations,
        ),
        accuracy=candidates.reference_accuracy - scenario.loss,
        reference_accuracy=candidates.reference_accuracy,
        predicted_drop=scenario.loss,
        proof=choose.restated(solution, choose.objective_of(predicted, budget)),
        graph_digest=table.graph_digest,
        table_digest=table.digest(),
        device_digest=table.device_digest,
        calibration_digest=table.calibration_digest,
    )


def sweep(calibration_folder: Path, budget: Budget, *, chosen: Plan | None = None) -> Curve:
    """Return the non-dominated measured plans under the other budgets, with baselines beside them."""
    from edgeflex.plans import choose

    _, _, _, table, candidates = open_calibration(calibration_folder)
    points = choose.curve_points(table, candidates.candidates, budget)
    if chosen is not None:
        points = (
            *points,
            CurvePoint(
                label="this plan",
                latency_s=chosen.predicted.latency_s[budget.statistic],
                memory_bytes=sum(chosen.predicted.memory_bytes.values()),
                drop=chosen.predicted.loss,
                chosen=True,
            ),
        )
    return Curve(
        points=points, baselines=choose.static_points(table, candidates.candidates, candidates.reference_accuracy)
    )


# --- export ------------------------------------------------------------------------------------------


def export(
    planned: Plan,
    model_folder: Path,
    calibration_folder: Path,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write the bundle of a plan, read it back and hold it against plan and reference."""
    import numpy as np
    from safetensors.numpy import save

    from edgeflex.bundle import EXPECTED, PROGRAM, SEEN, seal, write_manifest
    from edgeflex.costs.assemble import mix_of
    from edgeflex.costs.store import Calibration
    from edgeflex.exporters import executorch as exporter
    from edgeflex.models import open_model
    from edgeflex.transforms import prepare

    heard = progress or Silent()
    model = open_model(model_folder)
    if model.graph.digest() != planned.graph_digest:
        raise InputError(
            f"the plan is for model {planned.graph_digest[:12]}, {str(model_folder)!r} is "
            f"{model.graph.digest()[:12]}. Give the model that was calibrated."
        )
    folder = Calibration.open(calibration_folder)
    precisions = mix_of(planned.choices)
    with heard.task("Exporting", 4) as advance, staged_folder(out, overwrite=overwrite) as staging:
        prepared = prepare(model, precisions, folder.ranges())
        advance(1)
        program = exporter.program_from_prepared(prepared)
        held = exporter.compare_precisions(program, model.graph, precisions)
        advance(1)
        write_atomic(staging / "program.pte", exporter.padded(program, planned.predicted.disk_bytes))
        segments = exporter.segment_programs(prepared, model.graph)
        samples = np.load(folder.folder / "samples.npy", allow_pickle=False)
        reference, tolerance = _held_against_reference(prepared, staging / "program.pte", segments, samples, held)
        advance(1)
        write_atomic(staging / "expected.safetensors", save({"inputs": samples, "probabilities": reference}))
        write_atomic(staging / "seen.txt", read_bytes(folder.folder / "seen.txt", "list of used images"))
        files = seal(staging, {PROGRAM: "program.pte", EXPECTED: "expected.safetensors", SEEN: "seen.txt"})
        write_manifest(
            staging,
            BundleManifest(
                backend=BACKEND,
                versions=versions(),
                graph=model.graph,
                plan=planned,
                segments=segments,
                files=files,
                tolerance=tolerance,
                layer_precisions=held,
                curve=sweep(calibration_folder, planned.budget, chosen=planned),
            ),
        )
        advance(1)
    from edgeflex.bundle import open_bundle

    return open_bundle(out)


def _held_against_reference(
    prepared: PreparedModel, program: Path, segments: Any, samples: NDArray[np.float32], held: Any
) -> tuple[NDArray[np.float32], float]:
    """Return the reference's outputs for the samples, once the program was seen to agree with them."""
    import numpy as np
    import torch

    from edgeflex.errors import UnsupportedError
    from edgeflex.runtimes.executorch import ExecutorchSession
    from edgeflex.runtimes.segments import all_exits
    from edgeflex.transforms import outputs

    reference = outputs(prepared, torch.from_numpy(samples)).numpy()
    with ExecutorchSession(program, segments) as session:
        found = all_exits(session, [samples])
    tolerance = max(_TOLERANCE[one.bits] for one in {*held.values(), Precision.FP32})
    difference = float(np.abs(found - reference).max())
    if not difference <= tolerance:
        raise UnsupportedError(
            f"the program's probabilities differ from the reference by {difference:.3g}, the limit is {tolerance}. "
            "Plan again with other precisions and report the layer."
        )
    return reference, tolerance


# --- run, bench, verify, report ----------------------------------------------------------------------


def run(
    bundle_folder: Path,
    data: Path,
    *,
    runtime: str = BACKEND,
    threads: int = 1,
    limit: int | None = None,
    progress: Progress | None = None,
) -> RunStats:
    """Run a bundle on a folder of images and return the raw samples."""
    from edgeflex.bundle import open_bundle
    from edgeflex.images import open_images
    from edgeflex.profiles.machine import conditions, machine
    from edgeflex.runtimes.recorder import run_images

    return run_images(
        open_bundle(bundle_folder),
        open_images(data),
        runtime=runtime,
        threads=threads,
        limit=limit,
        device=machine().cpu_model or "unknown processor",
        conditions=conditions,
        progress=progress or Silent(),
    )


def bench(
    bundle_folder: Path,
    data: Path,
    *,
    images: int = 200,
    repeats: int = 5,
    threads: int = 1,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure a bundle's latency and memory against what its plan promised, on images that it has not seen."""
    from edgeflex.bundle import open_bundle
    from edgeflex.images import open_images
    from edgeflex.profiles.machine import conditions, machine
    from edgeflex.runtimes.bench import bench as measure
    from edgeflex.runtimes.verify import unseen_indices

    bundle, folder = open_bundle(bundle_folder), open_images(data)
    preprocessing = bundle.manifest.graph.preprocessing
    if preprocessing is None:
        raise InputError("the bundle does not say how images are prepared. Export it again.")
    indices = unseen_indices(bundle, folder, images)
    return measure(
        bundle,
        folder.load(indices, preprocessing),
        repeats=repeats,
        threads=threads,
        device=machine().cpu_model or "unknown processor",
        conditions=conditions,
        progress=progress,
    )


def verify(
    bundle_folder: Path,
    data: Path,
    *,
    model_folder: Path | None = None,
    limit: int | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> VerifyResult:
    """Hold a bundle's accuracy, parity and size against its manifest."""
    from edgeflex.bundle import open_bundle
    from edgeflex.images import open_images
    from edgeflex.runtimes.verify import verify as check

    bundle = open_bundle(bundle_folder)
    reference = _full_depth(model_folder, bundle) if model_folder is not None else None
    return check(bundle, open_images(data), max_images=limit, threads=threads, reference=reference, progress=progress)


def _full_depth(model_folder: Path, bundle: Bundle) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    import torch

    from edgeflex.models import open_model

    model = open_model(model_folder)
    if model.graph.weights_digest != bundle.manifest.graph.weights_digest:
        raise InputError(f"{str(model_folder)!r} is not the model of this bundle. Give the one that was exported.")
    return lambda images: torch.softmax(model.exit_logits(torch.from_numpy(images))[-1], dim=-1).numpy()


def report(
    bundle_folder: Path,
    out: Path,
    *,
    bench_result: BenchResult | None = None,
    verify_result: VerifyResult | None = None,
    stats: RunStats | None = None,
) -> Any:
    """Write the page that joins promise and measurement; return the report behind it."""
    from edgeflex.bundle import open_bundle
    from edgeflex.reports import build_report, to_html

    built = build_report(open_bundle(bundle_folder).manifest, bench_result, verify_result, stats)
    write_atomic(out, to_html(built))
    return built


__all__ = [
    "DeviceError",
    "bench",
    "calibrate",
    "export",
    "open_calibration",
    "plan",
    "profile",
    "report",
    "run",
    "solve_table",
    "sweep",
    "verify",
    "versions",
]
