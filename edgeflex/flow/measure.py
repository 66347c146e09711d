"""The measuring half of the corridor: profile, inspect, fit-exits, calibrate."""

from __future__ import annotations

import gc
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeflex.errors import InfeasibleError, InputError
from edgeflex.files import StrPath, path_of, path_or_none, place_of, read_bytes, write_atomic
from edgeflex.progress import Progress, Silent
from edgeflex.schema import (
    Budget,
    Candidates,
    CostTable,
    DeviceProfile,
    Figure,
    ModelGraph,
    Precision,
    Preprocessing,
    Solution,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.costs.calibration import Evaluate, Evaluation
    from edgeflex.costs.store import Calibration
    from edgeflex.exporters import Exporter
    from edgeflex.images import ImageFolder
    from edgeflex.models import DynamicModel
    from edgeflex.profiles.doctor import Doctor
    from edgeflex.profiles.kernels import KernelJob
    from edgeflex.runtimes import SessionKind
    from edgeflex.schema import SegmentProgram
    from edgeflex.transforms import PreparedModel

# What is exported for unless another target is named.
BACKEND = "executorch"
_KERNEL_SAMPLES = 15
_TIMING_IMAGES = 32
_SAMPLES = 2
_TRIAL_IMAGES = 64  # that settings of a runtime are tried on when exporting
_FEWEST_IMAGES = 20
# A drop that users would still call small: the fast mixes worth measuring are those within it.
_FAST_DROP = 0.03


def versions(target: str = BACKEND) -> dict[str, str]:
    """Return the versions of what decides the numbers of a target's programs."""
    own = ("executorch", "torchao") if target == BACKEND else ("onnx", "onnxscript", "onnxruntime")
    return {name: version(name) for name in ("edgeflex", "torch", *own, "numpy", "scipy")}


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
    out: StrPath,
    *,
    quick: bool = False,
    threads: Sequence[int] = (1,),
    storage_folder: StrPath | None = None,
    progress: Progress | None = None,
) -> DeviceProfile:
    """Measure this machine into ``out``; a killed run goes on where it stopped."""
    from edgeflex.profiles import probe
    from edgeflex.registry import EXPORTERS

    out = path_of(out)
    journal = out.with_name(f"{out.name}.partial")
    measured = probe.measure(
        quick=quick,
        threads=threads,
        precisions=_profiled_precisions(EXPORTERS.row(BACKEND).capabilities.precisions),
        run_kernel=_kernel_runner(),
        call_cost=_call_cost,
        backend=BACKEND,
        versions=versions(),
        storage_folder=path_or_none(storage_folder),
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


def doctor() -> Doctor:
    """Return what is installed here, what is missing with its remedy, and which targets run."""
    from edgeflex.profiles.doctor import examine

    return examine()


def _pretty(document: Any) -> str:
    return json.dumps(document.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


def _same_machine(device: DeviceProfile) -> bool:
    """Say whether a profile was measured on a machine like this one."""
    from edgeflex.profiles.machine import machine, processor_isa

    facts = machine()
    here = device.cpu_model == facts.cpu_model and processor_isa(device.isa) == facts.isa
    return device.origin == "measured" and here


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
    model: StrPath, weights: StrPath | None = None, *, classes: int | None = None, input_size: int | None = None
) -> tuple[ModelGraph, Any]:
    """Return the graph of a model, or of a folder that fit-exits wrote, and the stages where it can be cut."""
    from edgeflex.models import graph_from_module, load_module, open_model, stages, trace

    model = place_of(model)
    if ":" not in model and Path(model).is_dir():
        return open_model(Path(model)).graph, ()
    module = load_module(model, path_or_none(weights), classes=classes)
    preprocessing = _preprocessing_for(model, input_size)
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    graph = graph_from_module(module, source=model, input_shape=shape, preprocessing=preprocessing)
    return graph, stages(trace(module, shape))


def fit_exits(
    model: str,
    data: StrPath,
    out: StrPath,
    *,
    weights: StrPath | None = None,
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

    out = path_of(out)
    refuse_output(out, overwrite=overwrite)
    images = open_images(path_of(data))
    module = load_module(model, path_or_none(weights), classes=len(images.classes))
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
    save_model(fitted, out, overwrite=overwrite, seen=[item.digest for item in images.items])
    shutil.rmtree(journal, ignore_errors=True)
    return fitted


# --- calibrate ---------------------------------------------------------------------------------------


def _yardstick() -> Callable[[], object]:
    """Return a fixed piece of work, some tens of microseconds, that tells how fast the machine is just now."""
    import numpy as np

    # vector arithmetic in one thread, on so little memory that what ran before cannot push it out of the cache
    values = np.random.default_rng(0).standard_normal(1 << 12).astype(np.float32)
    result = np.empty_like(values)

    def work() -> None:
        for _ in range(12):
            np.exp(values, out=result)

    return work


def _evaluator(model: DynamicModel, images: ImageFolder, threads: int, target: str) -> Evaluate:
    """Return a function that exports a prepared model and runs it for real on images of the folder."""
    from edgeflex.costs.calibration import Evaluation
    from edgeflex.pace import middle
    from edgeflex.profiles.machine import conditions
    from edgeflex.registry import EXPORTERS, get
    from edgeflex.runtimes.recorder import memory_now
    from edgeflex.runtimes.segments import all_exits, segment_seconds

    def batches(indices: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(indices), 64):
            yield images.load(indices[start : start + 64], _preprocessing(model))

    yardstick = _yardstick()
    exporter: Exporter = get(EXPORTERS, target)

    def evaluate(prepared: PreparedModel, indices: NDArray[np.int64]) -> Evaluation:
        sample = images.load(indices[:_TIMING_IMAGES], _preprocessing(model))
        with tempfile.TemporaryDirectory(prefix="edgeflex-") as place:
            folder = Path(place)
            written = exporter.write(prepared, model.graph, folder)
            settings = _quickest(target, folder, written.segments, sample, threads)
            session = host_runtime(target).from_folder(folder, written.segments, threads=threads, settings=settings)
            never = (None,) * session.segment_count
            with session:  # a rehearsal pays what a process pays once
                session.infer(sample[:1], never)
            gc.collect()
            before = memory_now()
            with session:
                session.infer(sample[:1], never)
                memory_bytes = memory_now().above(before)
                outputs = all_exits(session, batches(indices))
                state = conditions()
                seconds, steady_s = segment_seconds(session, sample, yardstick=yardstick)
                speed = middle((state, conditions()))
        return Evaluation(outputs, seconds, steady_s, written.size_bytes, memory_bytes, settings, speed)

    return evaluate


def host_runtime(target: str) -> SessionKind:
    """Return what runs a target's programs on this machine.

    Engines of TensorRT exist only on their device; here the same ONNX graphs run plainly in ONNX Runtime.
    """
    from edgeflex.registry import RUNTIMES, get, runtime_of

    kind: SessionKind = get(RUNTIMES, "onnxruntime" if target == "tensorrt" else runtime_of(target))
    return kind


def _quickest(
    target: str, folder: Path, segments: Sequence[SegmentProgram], sample: NDArray[np.float32], threads: int
) -> str:
    """Return the settings in which a program runs quickest without other numbers, where its runtime has a choice."""
    if target != "onnx":
        return ""
    from edgeflex.runtimes.onnxruntime import choose_settings

    return choose_settings(folder, segments, sample, threads=threads)


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
    context = f"{_machine_name()} {sorted(versions().items())}"
    kernels = measure_kernels(tuple(jobs), run=_kernel_runner(), journal=journal, context=context, progress=progress)
    known = {(one.shape, one.precision, one.threads) for one in kernels}
    kept = tuple(one for one in device.kernels if (one.shape, one.precision, one.threads) not in known)
    return device.model_copy(update={"kernels": (*kernels, *kept)})


def calibrate(
    model_folder: StrPath,
    data: StrPath,
    out: StrPath,
    *,
    device: DeviceProfile,
    threads: int = 1,
    seed: int = 0,
    mixes: int = 8,
    target: str = BACKEND,
    shares: dict[str, float] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Candidates:
    """Measure what the model does in every precision of ``target`` and at every exit; resumable, cached by content.

    Writes the calibration folder with ``graph.json``, ``device.json``, ``table.json`` and
    ``candidates.json``, which are all that planning needs.
    """
    from edgeflex.costs import assemble, calibration, store
    from edgeflex.costs.table import layer_options
    from edgeflex.images import open_images, split
    from edgeflex.models import open_model
    from edgeflex.registry import EXPORTERS, capabilities_for, get

    heard = progress or Silent()
    capabilities = capabilities_for(EXPORTERS, target, device)
    model_folder, out = path_of(model_folder), path_of(out)
    model, images = open_model(model_folder), open_images(path_of(data))
    _check_classes(model, images)
    _refuse_fitted(model_folder, images)
    meta = store.CalibrationMeta(
        weights_digest=model.graph.weights_digest,
        images_digest=images.digest(),
        seed=seed,
        shares=shares or store.SHARES,
        backend=target,
        threads=threads,
        machine=_machine_name(),
        versions=versions(target),
    )
    if overwrite and (out / "calibration.json").exists():
        store.Calibration(out, meta).clear()
    folder = store.Calibration.create(out, meta)
    if not folder.has("labels.npy"):
        parts = split(images, meta.shares, seed)
        _refuse_few(parts, images)
        folder.write_split(parts, images.labels, seed)
    write_atomic(out / "graph.json", _pretty(model.graph))
    _keep_samples(folder, images, model)
    _keep_trial(folder, images, model, target)
    options = layer_options(model.graph, capabilities)
    calibration.measure_ranges(folder, model, images)
    here = target != "tensorrt" and _same_machine(device)
    if here and target == BACKEND:
        device = _with_kernels(device, model.graph, options, threads, out / "kernels.partial", heard)
    write_atomic(out / "device.json", _pretty(device))
    exporter: Exporter = get(EXPORTERS, target)
    calibration.measure_sensitivity(folder, model, images, options, exporter.prepare_segment, heard)
    evaluate = _evaluator(model, images, threads, target)
    uniform = assemble.uniform_mixes(model.graph, options)
    mixed = [("random", assemble.random_mix(model.graph, options, seed + step)) for step in range(2)]
    with heard.task("Running whole mixes", len(uniform) + len(mixed) + mixes) as advance:
        for role, precisions in (*uniform, *mixed):
            calibration.measure_mix(folder, model, precisions, exporter.prepare, evaluate, role)
            advance(1)
        if folder.asked(mixes) is None:
            # from the seeds alone, so that what is asked for does not depend on how often this was resumed
            table, _ = assemble.assemble(
                folder, model.graph, device, capabilities, threads=threads, here=here, seeds_only=True
            )
            folder.write_asked(mixes, [assemble.mix_of(one.choices) for one in _frontier(table, mixes)])
        for wanted in folder.asked(mixes) or ():
            calibration.measure_mix(folder, model, wanted, exporter.prepare, evaluate)
            advance(1)
    table, candidates = assemble.assemble(folder, model.graph, device, capabilities, threads=threads, here=here)
    write_atomic(out / "table.json", table.canonical_json())
    write_atomic(out / "candidates.json", candidates.canonical_json())
    return candidates


def _machine_name() -> str:
    """Return what times depend on beside versions: the processor and what it can do."""
    from edgeflex.profiles.machine import machine

    facts = machine()
    return f"{facts.cpu_model} {' '.join(facts.isa)}"


def _refuse_few(parts: Mapping[str, NDArray[np.int64]], images: ImageFolder) -> None:
    """Refuse a folder too small to choose or to certify anything, before hours are spent on it."""
    counts = {name: len(parts[name]) for name in ("choose", "certify")}
    if min(counts.values()) < _FEWEST_IMAGES:
        raise InputError(
            f"{len(images)} images in {str(images.source)!r} leave {counts['choose']} to choose and "
            f"{counts['certify']} to certify; at least {_FEWEST_IMAGES} each are needed. Give more images."
        )


def _check_classes(model: DynamicModel, images: ImageFolder) -> None:
    if model.graph.classes and tuple(model.graph.classes) != tuple(images.classes):
        raise InputError(
            f"the images have {len(images.classes)} classes ({', '.join(images.classes[:4])}, …), the model has "
            f"{len(model.graph.classes)} ({', '.join(model.graph.classes[:4])}, …). Give images of the same classes."
        )


def _refuse_fitted(model_folder: Path, images: ImageFolder) -> None:
    """Refuse images that the heads were fitted on: confidence on them is not what new images get."""
    fitted = set(read_bytes(model_folder / "seen.txt", "list of fitted images").decode("ascii").split())
    common = sum(item.digest in fitted for item in images.items)
    if common:
        raise InputError(
            f"{common} of {len(images)} images in {str(images.source)!r} were used to fit the exits; a promise from "
            "them would be false. Give images that fit-exits has not seen."
        )


def _keep_samples(folder: Calibration, images: ImageFolder, model: DynamicModel) -> None:
    """Keep two inputs whose outputs the bundle will carry, and the digests of every image that is used."""
    import numpy as np

    from edgeflex.bundle import seen_text
    from edgeflex.costs.store import save_array

    if folder.has("samples.npy") and folder.has("seen.txt"):
        return
    save_array(folder.folder / "samples.npy", images.load(folder.part("choose")[:_SAMPLES], _preprocessing(model)))
    used = np.concatenate([folder.part("choose"), folder.part("certify")])
    write_atomic(folder.folder / "seen.txt", seen_text(images.items[int(index)].digest for index in used))


def _keep_trial(folder: Calibration, images: ImageFolder, model: DynamicModel, target: str) -> None:
    """Keep inputs that tell what settings of the runtime change, where it has a choice."""
    from edgeflex.costs.store import TRIAL, save_array

    if target == "onnx" and not folder.has(TRIAL):
        chosen = folder.part("choose")[:_TRIAL_IMAGES]
        save_array(folder.folder / TRIAL, images.load(chosen, _preprocessing(model)))


def _frontier(table: CostTable, points: int) -> tuple[Solution, ...]:
    """Return the table's best plans over sweeps: least drop by memory and by latency, least latency by memory."""
    from edgeflex.plans import frontier

    # without a limit on the drop, the least latency is to leave at once, whatever the deeper layers are
    fast = Budget(minimize="latency", max_drop=max(_FAST_DROP, min(one.loss for one in table.scenarios)))
    accurate = Budget(minimize="drop")
    sweeps: tuple[tuple[Budget, Literal["memory", "latency"]], ...] = (
        (accurate, "memory"),
        (fast, "memory"),
        (accurate, "latency"),
    )
    found: list[Solution] = []
    for index, (budget, over) in enumerate(sweeps):
        count = (points + len(sweeps) - 1 - index) // len(sweeps)
        if count:
            try:
                found.extend(frontier(table, budget, over=over, points=count))
            except InfeasibleError:
                continue  # no mix is that accurate by the table's estimate; the other sweeps stand
    return tuple(found)
