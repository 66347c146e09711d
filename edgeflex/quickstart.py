"""The whole corridor on a small real model: scikit-learn's digits, trained on the spot, no network needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeflex import flow
from edgeflex.files import staged_folder, write_atomic
from edgeflex.schema import Budget, LatencyLimit, Tier

if TYPE_CHECKING:
    from pathlib import Path

    from edgeflex.progress import Progress

_MODEL = "zoo:digits-cnn"
_STAGES = 3
_MIXES = 4
_LATENCY_SHARE = 0.6
_MAX_DROP = 0.05


def _train(folder: Path, progress: Progress) -> None:
    """Write the digits as images and the weights of a network trained on them."""
    from safetensors.torch import save

    from edgeflex.images import open_images
    from edgeflex.models import zoo

    zoo.write_digits(folder / "digits")
    trained = zoo.train_digits(open_images(folder / "digits" / "train"), progress=progress)
    write_atomic(folder / "weights.safetensors", save(trained.state_dict()))


def _budget(calibration: Path) -> Budget:
    """Return budgets that full depth in fp32 breaks: 0.6 of its time, and memory halfway to the least."""
    from edgeflex.costs.store import mix_digest
    from edgeflex.plans import choose

    _, _, _, table, candidates = flow.open_calibration(calibration)
    points = choose.static_points(table, candidates.candidates, candidates.reference_accuracy)
    by_mix = dict(zip((one.mix for one in candidates.candidates), points, strict=True))
    baseline = by_mix[mix_digest({})]
    least_bytes = min(point.memory_bytes for point in points)
    return Budget(
        memory_bytes={Tier.HOST: (baseline.memory_bytes + least_bytes) // 2},
        latency=(LatencyLimit(limit_s=_LATENCY_SHARE * baseline.latency_s, statistic="mean"),),
        max_drop=_MAX_DROP,
        minimize="latency",
    )


def walk(folder: Path, *, progress: Progress) -> tuple[Any, Path]:
    """Walk the corridor into ``folder``; return the report and the path of its page.

    Everything is made anew: an earlier quickstart in ``folder`` is replaced, other folders are refused.

    Raises:
        InputError: ``folder`` holds something that no quickstart wrote.
    """
    ours = (folder / "quickstart.txt").exists()
    with staged_folder(folder, overwrite=ours) as staging:
        write_atomic(staging / "quickstart.txt", "Written by `edgeflex quickstart`; replaced by the next.\n")
        _train(staging, progress)
        digits, model, calibration, bundle = (staging / name for name in ("digits", "model", "calibration", "bundle"))
        device = flow.profile(staging / "device.json", quick=True, progress=progress)
        flow.fit_exits(
            _MODEL,
            digits / "train",
            model,
            weights=staging / "weights.safetensors",
            exits=_STAGES,
            progress=progress,
        )
        flow.calibrate(model, digits / "dev", calibration, device=device, mixes=_MIXES, progress=progress)
        planned = flow.plan(calibration, _budget(calibration))
        write_atomic(staging / "plan.json", planned.canonical_json())
        flow.export(planned, model, calibration, bundle, progress=progress)
        benched = flow.bench(bundle, digits / "dev", progress=progress)
        write_atomic(staging / "bench.json", benched.canonical_json())
        verified = flow.verify(bundle, digits / "dev", model_folder=model, progress=progress)
        write_atomic(staging / "verify.json", verified.canonical_json())
        built = flow.report(bundle, staging / "report.html", bench_result=benched, verify_result=verified)
    return built, folder / "report.html"
