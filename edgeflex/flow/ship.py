"""The shipping half of the corridor: export, run, bench, verify, report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeflex.errors import InputError
from edgeflex.files import read_bytes, staged_folder, write_atomic
from edgeflex.flow.decide import open_calibration, require_own, sweep
from edgeflex.flow.measure import BACKEND, versions
from edgeflex.progress import Progress, Silent
from edgeflex.schema import (
    BenchResult,
    BundleManifest,
    DeviceProfile,
    Plan,
    Precision,
    RunStats,
    VerifyResult,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.bundle import Bundle
    from edgeflex.costs.store import MixRecord
    from edgeflex.transforms import PreparedModel

# How far ExecuTorch may differ from the reference, in probability. Float differs by summation order; int8
# rounds after every operation, and one step in an early layer can move a later one.
_TOLERANCE = {8: 0.15, 4: 0.15, 32: 1e-3, 16: 1e-2}


def export(
    planned: Plan,
    model_folder: Path,
    calibration_folder: Path,
    out: Path,
    *,
    device: DeviceProfile | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write the bundle of a plan, read it back and hold it against plan and reference."""
    from safetensors.numpy import save

    from edgeflex.bundle import EXPECTED, PROGRAM, SEEN, seal, write_manifest
    from edgeflex.costs.assemble import mix_of
    from edgeflex.costs.store import mix_digest
    from edgeflex.exporters import executorch as exporter
    from edgeflex.models import open_model
    from edgeflex.plans import choose
    from edgeflex.transforms import prepare

    heard = progress or Silent()
    model = open_model(model_folder)
    if model.graph.digest() != planned.graph_digest:
        raise InputError(
            f"the plan is for model {planned.graph_digest[:12]}, {str(model_folder)!r} is "
            f"{model.graph.digest()[:12]}. Give the model that was calibrated."
        )
    folder, _, _, table, _ = open_calibration(calibration_folder)
    precisions = mix_of(planned.choices)
    require_own(planned, calibration_folder, device=device)
    with heard.task("Exporting", 4) as advance, staged_folder(out, overwrite=overwrite) as staging:
        prepared = prepare(model, precisions, folder.ranges())
        advance(1)
        program = exporter.program_from_prepared(prepared)
        _refuse_other_program(program, folder.mix(mix_digest(precisions)).record)
        held = exporter.compare_precisions(program, model.graph, precisions)
        advance(1)
        write_atomic(staging / "program.pte", exporter.padded(program, planned.predicted.disk_bytes))
        segments = exporter.segment_programs(prepared, model.graph)
        samples = folder.samples()
        reference, tolerance = _held_against_reference(prepared, staging / "program.pte", segments, samples, held)
        advance(1)
        write_atomic(staging / "expected.safetensors", save({"inputs": samples, "probabilities": reference}))
        write_atomic(staging / "seen.txt", _seen(model_folder, calibration_folder))
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
                layer_losses=choose.layer_losses(table, planned.choices, planned.scenario.reach),
                curve=sweep(calibration_folder, planned.budget, chosen=planned),
            ),
        )
        advance(1)
    from edgeflex.bundle import open_bundle

    return open_bundle(out)


def _refuse_other_program(program: bytes, record: MixRecord) -> None:
    """Refuse a program of another size than the one that was calibrated: its network's code has changed."""
    if len(program) != record.program_bytes:
        raise InputError(
            f"the program is {len(program)} bytes, the one that was calibrated {record.program_bytes}: the network or "
            "the exporter has changed since. Calibrate and plan again."
        )


def _seen(model_folder: Path, calibration_folder: Path) -> str:
    """Return the digests of every image that fitted, chose or certified anything."""
    from edgeflex.bundle import seen_text

    lists = [calibration_folder / "seen.txt", model_folder / "seen.txt"]
    texts = [read_bytes(path, "list of used images").decode("ascii") for path in lists]
    return seen_text(digest for text in texts for digest in text.split())


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
    threads: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> RunStats:
    """Run a bundle on a folder of images and return the raw samples; threads are the plan's unless given."""
    from edgeflex.bundle import open_bundle
    from edgeflex.images import open_images
    from edgeflex.profiles.machine import conditions, machine
    from edgeflex.runtimes.recorder import run_images

    bundle = open_bundle(bundle_folder)
    return run_images(
        bundle,
        open_images(data),
        runtime=runtime,
        threads=threads or bundle.manifest.plan.threads,
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
    threads: int | None = None,
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
        threads=threads or bundle.manifest.plan.threads,
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
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Hold a bundle's accuracy, parity and size against its manifest."""
    from edgeflex.bundle import open_bundle
    from edgeflex.images import open_images
    from edgeflex.runtimes.verify import verify as check

    bundle = open_bundle(bundle_folder)
    reference = _full_depth(model_folder, bundle) if model_folder is not None else None
    return check(
        bundle,
        open_images(data),
        max_images=limit,
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
