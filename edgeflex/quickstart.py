"""The whole corridor on small real models, no network needed: scikit-learn's digits, and a tiny decoder.

The network of digits is trained on the spot. The mixture-of-experts decoder comes with the package; it learnt from the
texts that every Python carries, is calibrated on others of them, and runs under a memory budget that it does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeflex import flow
from edgeflex.files import StrPath, path_of, staged_folder, write_atomic
from edgeflex.progress import Progress, Silent
from edgeflex.schema import Budget, LatencyLimit, Tier
from edgeflex.schema_moe import DecoderBudget

if TYPE_CHECKING:
    from pathlib import Path

    from edgeflex.pace import Pace
    from edgeflex.schema import Check, Report
    from edgeflex.schema_moe import DecoderBench, DecoderPlan

_MODEL = "zoo:digits-cnn"
_STAGES = 3
_MIXES = 4
_LATENCY_SHARE = 0.6
_MAX_DROP = 0.05
_PROMPT = "Return the "
_DECODER_BUNDLE = "decoder-bundle"
_DECODER_TOKENS = 1024
_CACHED_SHARE = 0.4  # of the experts' bytes that the budget leaves room for


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


@dataclass(frozen=True)
class Walked:
    """What the quickstart made.

    Attributes:
        report: Of the network of digits.
        speed: This machine's around its benchmark, against when it was calibrated.
        page: Its page.
        plan: Of the decoder.
        checks: The decoder's promises, measured.
        decoder_speed: Likewise.
        text: What it answered.
        decoder_page: Its page.
    """

    report: Report
    speed: Pace
    page: Path
    plan: DecoderPlan
    checks: tuple[Check, ...]
    decoder_speed: Pace
    text: str
    decoder_page: Path


def walk(folder: StrPath, *, progress: Progress | None = None) -> Walked:
    """Walk the corridor into ``folder``, for both models; return what was made.

    Everything is made anew: an earlier quickstart in ``folder`` is replaced, other folders are refused.

    Raises:
        InputError: ``folder`` holds something that no quickstart wrote.
    """
    folder, heard = path_of(folder), progress or Silent()
    ours = (folder / "quickstart.txt").exists()
    with staged_folder(folder, overwrite=ours) as staging:
        write_atomic(staging / "quickstart.txt", "Written by `edgeflex quickstart`; replaced by the next.\n")
        built, speed = _walk_digits(staging, heard)
        plan, benched, text = _walk_decoder(staging, heard)
        decoder_speed = flow.pace(staging / _DECODER_BUNDLE, benched)
    page, decoder_page = folder / "report.html", folder / "decoder.html"
    return Walked(built, speed, page, plan, benched.checks, decoder_speed, text, decoder_page)


def _walk_digits(staging: Path, progress: Progress) -> tuple[Report, Pace]:
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
    built: Report = flow.report(bundle, staging / "report.html", bench_result=benched, verify_result=verified)
    return built, flow.pace(bundle, benched)


def _walk_decoder(staging: Path, progress: Progress) -> tuple[DecoderPlan, DecoderBench, str]:
    from edgeflex.flow.conversation import Asked, Talk
    from edgeflex.models.tiny_decoder import library_text, write_tiny_decoder

    source, calibration, bundle = (staging / name for name in ("decoder", "decoder-calibration", _DECODER_BUNDLE))
    write_tiny_decoder(source)
    texts = library_text("heldout")
    text, unseen = staging / "text.txt", staging / "unseen.txt"
    write_atomic(text, "\n\n".join(texts[: len(texts) // 2]))
    write_atomic(unseen, "\n\n".join(texts[len(texts) // 2 :]))
    flow.calibrate_decoder(str(source), text, calibration, tokens=_DECODER_TOKENS, progress=progress)
    planned = flow.plan_decoder(calibration, _decoder_budget(source, calibration))
    write_atomic(staging / "decoder-plan.json", planned.canonical_json())
    flow.export_decoder(planned, str(source), calibration, bundle, stock=False, progress=progress)
    with Talk(bundle, Asked(prompt=_PROMPT, max_tokens=48, temperature=0.7, top_k=40)) as talk:
        said = "".join(piece for pieces in talk.answers() for piece in pieces)
    benched = flow.bench_decoder(bundle, unseen, repeats=3, progress=progress)
    write_atomic(staging / "decoder-bench.json", benched.canonical_json())
    flow.report_decoder(bundle, staging / "decoder.html", bench_file=staging / "decoder-bench.json")
    return planned, benched, _PROMPT + said


def _decoder_budget(source: Path, calibration: Path) -> DecoderBudget:
    """Return a memory budget that leaves room for a part of the experts only, whatever their precision."""
    limits: dict[str, Any] = {"context_tokens": 512, "prompt_tokens": 128}
    held = flow.plan_decoder(calibration, DecoderBudget(minimize="kl", **limits)).predicted.memory
    smallest = min(one.experts_bytes for one in flow.decoder_sizes(str(source), DecoderBudget(**limits)).uniform)
    return DecoderBudget(
        memory_bytes=held.total_bytes - held.cache_bytes + int(_CACHED_SHARE * smallest),
        minimize="kl",
        **limits,
    )
