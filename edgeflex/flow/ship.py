"""The shipping half of the corridor: export, run, bench, verify, report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeflex.errors import InputError
from edgeflex.files import StrPath, path_of, read_bytes, staged_folder, write_atomic
from edgeflex.flow.decide import open_calibration, require_own, sweep
from edgeflex.flow.measure import host_runtime, versions
from edgeflex.progress import Progress, Silent
from edgeflex.schema import (
    BenchResult,
    BundleManifest,
    DeviceProfile,
    ModelGraph,
    Plan,
    Precision,
    RunStats,
    VerifyResult,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.bundle import Bundle
    from edgeflex.costs.store import MixRecord
    from edgeflex.exporters import Exporter, Written
    from edgeflex.pace import Pace
    from edgeflex.schema import SegmentProgram
    from edgeflex.schema_moe import DecoderBench
    from edgeflex.schema_trt import EngineIndex
    from edgeflex.transforms import PreparedModel

# How far ExecuTorch may differ from the reference, in probability. Float differs by summation order; int8
# rounds after every operation, and one step in an early layer can move a later one.
_TOLERANCE = {8: 0.15, 4: 0.15, 32: 1e-3, 16: 1e-2}


def export(
    planned: Plan,
    model_folder: StrPath,
    calibration_folder: StrPath,
    out: StrPath,
    *,
    device: DeviceProfile | None = None,
    target: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write the bundle of a plan, read it back and hold it against plan and reference.

    Args:
        planned: The plan.
        model_folder: The model that was calibrated.
        calibration_folder: Its calibration.
        out: The bundle's folder.
        device: What was planned for, if not the calibration's own device.
        target: What to export for; must be the plan's, whose numbers were certified.
        overwrite: Replace what ``out`` holds.
        progress: Told about the steps.

    Raises:
        InputError: The plan is of another model, calibration, device or target, or was changed by hand.
        UnsupportedError: The target cannot express the plan, or computes something else than the reference.
    """
    from safetensors.numpy import save

    from edgeflex.bundle import EXPECTED, SEEN, seal, write_manifest
    from edgeflex.costs.assemble import mix_of
    from edgeflex.costs.store import mix_digest
    from edgeflex.models import open_model
    from edgeflex.plans import choose
    from edgeflex.registry import EXPORTERS, get

    heard = progress or Silent()
    model_folder, calibration_folder, out = path_of(model_folder), path_of(calibration_folder), path_of(out)
    model = open_model(model_folder)
    _refuse_other(planned, model.graph, str(model_folder), target)
    exporter: Exporter = get(EXPORTERS, planned.backend)
    folder, _, _, table, _ = open_calibration(calibration_folder)
    precisions = mix_of(planned.choices)
    require_own(planned, calibration_folder, device=device)
    with heard.task("Exporting", 4) as advance, staged_folder(out, overwrite=overwrite) as staging:
        prepared = exporter.prepare(model, precisions, folder.ranges())
        advance(1)
        record = folder.mix(mix_digest(precisions)).record
        written = exporter.write(prepared, model.graph, staging)
        _refuse_other_program(written.size_bytes, record)
        advance(1)
        exporter.pad(written, staging, planned.predicted.disk_bytes)
        samples = folder.samples()
        reference, tolerance = _held_against_reference(
            prepared, planned.backend, staging, written, samples, record.settings
        )
        trial = folder.trial_images() if record.settings else samples
        moved = moved_by_settings(planned.backend, staging, written.segments, trial, record.settings)
        advance(1)
        write_atomic(staging / "expected.safetensors", save({"inputs": samples, "probabilities": reference}))
        write_atomic(staging / "seen.txt", _seen(model_folder, calibration_folder))
        files = seal(staging, {**written.files, EXPECTED: "expected.safetensors", SEEN: "seen.txt"})
        write_manifest(
            staging,
            BundleManifest(
                backend=planned.backend,
                versions=versions(planned.backend),
                graph=model.graph,
                plan=planned,
                segments=written.segments,
                files=files,
                tolerance=tolerance,
                layer_precisions=written.precisions,
                settings=record.settings,
                settings_difference=moved,
                settings_images=None if moved is None else len(trial),
                layer_losses=choose.layer_losses(table, planned.choices, planned.scenario.reach),
                curve=sweep(calibration_folder, planned.budget, chosen=planned),
            ),
        )
        advance(1)
    from edgeflex.bundle import open_bundle

    return open_bundle(out)


def _refuse_other(planned: Plan, graph: ModelGraph, place: str, target: str | None) -> None:
    """Refuse a plan of another model, or of another target's numbers."""
    if graph.digest() != planned.graph_digest:
        raise InputError(
            f"the plan is for model {planned.graph_digest[:12]}, {place!r} is {graph.digest()[:12]}. "
            "Give the model that was calibrated."
        )
    if target is not None and target != planned.backend:
        from edgeflex.registry import EXPORTERS

        EXPORTERS.row(target)  # refuses a name that nobody knows
        raise InputError(
            f"the plan's numbers are those of {planned.backend!r}, certified as it computes them; {target!r} computes "
            f"others. Calibrate with --target {target} and plan again."
        )


def _refuse_other_program(size_bytes: int, record: MixRecord) -> None:
    """Refuse a program of another size than the one that was calibrated: its network's code has changed."""
    if size_bytes != record.program_bytes:
        raise InputError(
            f"the program is {size_bytes} bytes, the one that was calibrated {record.program_bytes}: the network or "
            "the exporter has changed since. Calibrate and plan again."
        )


def _seen(model_folder: Path, calibration_folder: Path) -> str:
    """Return the digests of every image that fitted, chose or certified anything."""
    from edgeflex.bundle import seen_text

    lists = [calibration_folder / "seen.txt", model_folder / "seen.txt"]
    texts = [read_bytes(path, "list of used images").decode("ascii") for path in lists]
    return seen_text(digest for text in texts for digest in text.split())


def _held_against_reference(
    prepared: PreparedModel,
    target: str,
    folder: Path,
    written: Written,
    samples: NDArray[np.float32],
    settings: str,
) -> tuple[NDArray[np.float32], float]:
    """Return the reference's outputs for the samples and the tolerance, once the program was seen to agree with them.

    It is run plainly and, where there is a choice, in the chosen settings.
    """
    import numpy as np
    import torch

    from edgeflex.errors import UnsupportedError
    from edgeflex.runtimes.segments import all_exits
    from edgeflex.transforms import outputs

    reference = outputs(prepared, torch.from_numpy(samples), batch=1).numpy()
    kind = host_runtime(target)

    def found(name: str) -> NDArray[np.float32]:
        with kind.from_folder(folder, written.segments, settings=name) as session:
            return all_exits(session, [samples])

    plain = found("")
    tolerance = max(_TOLERANCE[one.bits] for one in {*written.precisions.values(), Precision.FP32})
    chosen = found(settings) if settings else plain
    for answers in (plain, chosen):
        difference = float(np.abs(answers - reference).max())
        if not difference <= tolerance:
            raise UnsupportedError(
                f"the program's probabilities differ from the reference by {difference:.3g}, the limit is {tolerance}. "
                "Plan again with other precisions and report the layer."
            )
    return reference, tolerance


def moved_by_settings(
    target: str, folder: Path, segments: Sequence[SegmentProgram], images: NDArray[np.float32], settings: str
) -> float | None:
    """Return how far settings of a runtime move any probability of any image from plain execution; None without any.

    Args:
        target: What the program was written for.
        folder: Where.
        segments: Its segments.
        images: ``[n, C, H, W]``, as the program takes them.
        settings: Of the runtime; empty where it has no choice.
    """
    import numpy as np

    from edgeflex.runtimes.segments import all_exits

    if not settings:
        return None
    kind = host_runtime(target)

    def found(name: str) -> NDArray[np.float32]:
        with kind.from_folder(folder, segments, settings=name) as session:
            return all_exits(session, [images])

    return float(np.abs(found(settings) - found("")).max())


def build(
    bundle_folder: StrPath,
    *,
    workspace_bytes: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> EngineIndex:
    """Build the TensorRT engines of a bundle, a network's or a decoder's, on this device; return what was built.

    For a decoder it is measured too how its experts best get their weights.

    Raises:
        UnsupportedError: The bundle is not for TensorRT, or this device or version cannot build it.
        MissingDependencyError: TensorRT is not installed.
        DeviceError: There is no usable GPU, or the builder failed.
    """
    from edgeflex.bundle import open_bundle
    from edgeflex.bundle_moe import bundle_kind, open_decoder_bundle
    from edgeflex.runtimes.tensorrt_build import build as build_engines
    from edgeflex.runtimes.tensorrt_ways import measuring

    told, bundle_folder = progress or Silent(), path_of(bundle_folder)
    if bundle_kind(bundle_folder) == "decoder":
        decoder = open_decoder_bundle(bundle_folder)
        way = measuring(decoder)
        return build_engines(decoder, workspace_bytes=workspace_bytes, force=force, progress=told, measure=way)
    return build_engines(open_bundle(bundle_folder), workspace_bytes=workspace_bytes, force=force, progress=told)


# --- run, bench, verify, report ----------------------------------------------------------------------


def run(
    bundle_folder: StrPath,
    data: StrPath,
    *,
    runtime: str | None = None,
    threads: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> RunStats:
    """Run a bundle on a folder of images and return the raw samples; threads are the plan's unless given."""
    from edgeflex.bundle import open_bundle
    from edgeflex.images import open_images
    from edgeflex.profiles.machine import conditions, machine
    from edgeflex.runtimes.recorder import run_images

    bundle = open_bundle(path_of(bundle_folder))
    return run_images(
        bundle,
        open_images(path_of(data)),
        runtime=runtime,
        threads=threads or bundle.manifest.plan.threads,
        limit=limit,
        device=machine().cpu_model or "unknown processor",
        conditions=conditions,
        progress=progress or Silent(),
    )


def bench(
    bundle_folder: StrPath,
    data: StrPath,
    *,
    images: int = 200,
    repeats: int = 5,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure a bundle's latency and memory against what its plan promised, on images that it has not seen."""
    from edgeflex.bundle import open_bundle
    from edgeflex.images import open_images
    from edgeflex.profiles.machine import conditions, machine
    from edgeflex.runtimes.bench import bench as measure
    from edgeflex.runtimes.verify import unseen_indices

    bundle, folder = open_bundle(path_of(bundle_folder)), open_images(path_of(data))
    preprocessing = bundle.manifest.graph.preprocessing
    if preprocessing is None:
        raise InputError("the bundle does not say how images are prepared. Export it again.")
    indices = unseen_indices(bundle, folder, images)
    return measure(
        bundle,
        folder.load(indices, preprocessing),
        repeats=repeats,
        threads=threads or bundle.manifest.plan.threads,
        device=machine().cpu_model or "unknown processor",
        conditions=conditions,
        progress=progress,
    )


def pace(bundle_folder: StrPath, result: BenchResult | DecoderBench) -> Pace:
    """Return how fast this machine was around a benchmark of a bundle, against when the bundle was calibrated."""
    from edgeflex.bundle import open_bundle
    from edgeflex.bundle_moe import open_decoder_bundle
    from edgeflex.pace import pace as against

    if isinstance(result, BenchResult):
        return against(open_bundle(path_of(bundle_folder)).manifest.plan.conditions, (result.before, result.after))
    then = open_decoder_bundle(path_of(bundle_folder)).manifest.plan.conditions
    return against(then, [state for run in result.runs for state in (run.before, run.after)], decoder=True)


def verify(
    bundle_folder: StrPath,
    data: StrPath,
    *,
    model_folder: StrPath | None = None,
    limit: int | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Hold a bundle's accuracy, parity and size against its manifest; the runtime is its target's own unless named."""
    from edgeflex.bundle import open_bundle
    from edgeflex.images import open_images
    from edgeflex.runtimes.verify import verify as check

    bundle = open_bundle(path_of(bundle_folder))
    reference = _full_depth(path_of(model_folder), bundle) if model_folder is not None else None
    return check(
        bundle,
        open_images(path_of(data)),
        max_images=limit,
        runtime=runtime,
        threads=threads or bundle.manifest.plan.threads,
        reference=reference,
        progress=progress,
    )


def _full_depth(model_folder: Path, bundle: Bundle) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    import torch

    from edgeflex.models import open_model

    model = open_model(model_folder)
    if model.graph.weights_digest != bundle.manifest.graph.weights_digest:
        raise InputError(f"{str(model_folder)!r} is not the model of this bundle. Give the one that was exported.")
    return lambda images: torch.softmax(model.exit_logits(torch.from_numpy(images))[-1], dim=-1).numpy()


def report(
    bundle_folder: StrPath,
    out: StrPath,
    *,
    bench_result: BenchResult | None = None,
    verify_result: VerifyResult | None = None,
    stats: RunStats | None = None,
) -> Any:
    """Write the page that joins promise and measurement; return the report behind it."""
    from edgeflex.bundle import open_bundle
    from edgeflex.reports import build_report, to_html

    built = build_report(open_bundle(path_of(bundle_folder)).manifest, bench_result, verify_result, stats)
    write_atomic(path_of(out), to_html(built))
    return built
