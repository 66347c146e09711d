"""Bundles of decoders: export with what the exported numbers do to the decoder, bench, verify, report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeflex.errors import InfeasibleError, InputError, UnsupportedError
from edgeflex.files import StrPath, path_of, place_of, read_bytes, read_text
from edgeflex.flow.decoders import CHECK_TEXT, open_decoder_calibration, read_array
from edgeflex.flow.device_plans import plan_again
from edgeflex.flow.traces import Replays, packed_bytes
from edgeflex.schema import Precision
from edgeflex.schema_moe import DecoderBench, DecoderPlan, DecoderRunStats, DecoderVerify, Expected

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.models.decoder_reference import Reference
    from edgeflex.models.decoders import DecoderSource
    from edgeflex.plans.decoder_costs import PackedBytes
    from edgeflex.progress import Progress
    from edgeflex.reports.decoder import DecoderReportDocument
    from edgeflex.runtimes.decoder_settings import Settings
    from edgeflex.schema_moe import DecoderGraph, DecoderManifest, MissPoint

    Ints = NDArray[np.int64]

_KEPT_BYTES = 1 << 28  # of a source's tensors, so that a small decoder is read once
_CURVE_POINTS = 7
_EXPECTED_PROMPT, _EXPECTED_ANSWER = 16, 16


# --- export ----------------------------------------------------------------------------------------------


def export_decoder(
    planned: DecoderPlan,
    place: StrPath,
    folder: StrPath,
    out: StrPath,
    *,
    target: str = "executorch",
    stock: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DecoderManifest:
    """Write a decoder's bundle, read it back, and measure the exported numbers against fp32 on text kept for that.

    For ``onnx`` and ``tensorrt`` it holds the same numbers, with stages for ONNX Runtime or for engines; the plan's
    times are those of the native engine.

    Raises:
        InputError: The plan is another model's or calibration's, or was changed by hand.
        InfeasibleError: The exported numbers diverge more than the budget allows.
        UnsupportedError: The bundle does not hold the plan.
    """
    from edgeflex.models.decoders import open_decoder

    write_bundle = _writer(target, stock=stock)
    place, folder, out = place_of(place), path_of(folder), path_of(out)
    source = open_decoder(place)
    if source.graph.digest() != planned.graph_digest:
        raise InputError(
            f"the plan is for decoder {planned.graph_digest[:12]}, {place!r} is {source.graph.digest()[:12]}. "
            "Give the decoder that was calibrated."
        )
    again = plan_again(folder, planned)
    # the proof says how long the search took, which differs
    kept = [name for name in DecoderPlan.model_fields if name != "proof"]
    changed = [name for name in kept if getattr(again, name) != getattr(planned, name)]
    if changed:
        raise InputError(
            f"planning again gives another {', '.join(changed)} than the plan's. It was changed, or the calibration "
            "was; run edgeflex plan again."
        )
    quality = _Quality(source, planned, folder)
    return write_bundle(source, planned, out, progress=progress, overwrite=overwrite, measured=quality.measure)


def _writer(target: str, *, stock: bool) -> Callable[..., DecoderManifest]:
    """Return what writes bundles for a target."""
    from functools import partial

    if target == "executorch":
        from edgeflex.exporters.decoder import export_decoder

        return partial(export_decoder, stock=stock)
    if target == "onnx":
        from edgeflex.exporters.onnx_decoder import export_onnx_decoder

        return export_onnx_decoder
    if target == "tensorrt":
        from edgeflex.exporters.tensorrt_decoder import export_tensorrt_decoder

        return export_tensorrt_decoder
    from edgeflex.registry import EXPORTERS

    EXPORTERS.row(target)  # refuses a name that nobody knows
    raise UnsupportedError(
        f"decoders are not exported for {target!r}. Choose --target executorch (the native engine), onnx or tensorrt."
    )


class _Quality:
    """What the exported numbers do to the decoder, on text that chose nothing."""

    def __init__(self, source: DecoderSource, planned: DecoderPlan, folder: Path) -> None:
        self._source = source
        self._planned = planned
        self._check = folder / CHECK_TEXT

    def measure(self, weights: Callable[[str], Any]) -> dict[str, Any]:
        """Return the manifest's measured fields, given the exported numbers by name.

        Raises:
            InfeasibleError: The divergence is above the budget's.
        """
        import numpy as np
        import torch

        from edgeflex.models.decoder_reference import Reference, divergence

        tokens = torch.from_numpy(read_array(self._check))
        true = Reference(self._source, keep_bytes=_KEPT_BYTES)
        other = true.replaced(weights)
        with torch.no_grad():
            clean, changed = true.forward(tokens), other.forward(tokens)
            kl = float(divergence(true, clean.hidden, other, changed.hidden).mean())
            losses = [float(one.losses(tokens, two.hidden).mean()) for one, two in ((true, clean), (other, changed))]
            agreement = _agreement(clean.routed, changed.routed)
            expected = [self._answer(other, row) for row in tokens[:2].tolist()]
        self._refuse_rise(float(np.expm1(losses[1] - losses[0])))
        limit = self._planned.budget.max_kl
        if limit is not None and not kl <= limit:  # also true of NaN
            raise InfeasibleError(
                f"the exported numbers diverge by {kl:.4f} nats per token on text that chose nothing; the budget is "
                f"{limit:.4f} and the additive estimate said {self._planned.predicted.kl:.4f}. Plan with "
                f"--max-kl {limit * limit / kl:.4f}, or allow more.",
                binding=("max kl",),
                least={"max kl": kl},
                relaxation=f"--max-kl {kl:.4f}",
            )
        return {
            "points": _miss_curve(self._planned, self._source.graph, self._check.parent),
            "measured_kl": kl,
            "reference_perplexity": float(np.exp(losses[0])),
            "measured_perplexity": float(np.exp(losses[1])),
            "router_agreement": agreement,
            "expected": tuple(expected),
        }

    def _refuse_rise(self, rise: float) -> None:
        limit = self._planned.budget.max_perplexity_rise
        if limit is None or rise <= limit:
            return
        raise InfeasibleError(
            f"the exported numbers raise perplexity by {rise:.2%} on text that chose nothing; the budget is "
            f"{limit:.2%}. Plan with --max-perplexity {100 * limit * limit / rise:.3g}%, or allow more.",
            binding=("max perplexity",),
            least={"max perplexity": rise},
            relaxation=f"--max-perplexity {100 * rise:.3g}%",
        )

    @staticmethod
    def _answer(reference: Reference, row: Sequence[int]) -> Expected:
        prompt = tuple(row[:_EXPECTED_PROMPT])
        return Expected(prompt=prompt, tokens=tuple(reference.generate(prompt, _EXPECTED_ANSWER)))


def _miss_curve(planned: DecoderPlan, graph: DecoderGraph, folder: Path) -> tuple[MissPoint, ...]:
    """Return replays of the plan's policy and of LRU, from one token's experts to all of them."""
    import numpy as np

    from edgeflex.runtimes.replay import miss_point

    if planned.verdict != "offload" or planned.gpu is not None:  # a GPU's tiers are not the processor's cache
        return ()
    _, rates, routing = open_decoder_calibration(folder)
    replays = Replays(graph, routing, planned.budget.prompt_tokens)
    sizes = _planned_sizes(planned, graph, packed_bytes(rates))
    caches = np.geomspace(min(planned.cache_bytes, planned.cycle_bytes), int(sizes.sum()), _CURVE_POINTS).astype(int)
    trace = replays.trace(64)
    return tuple(
        miss_point(trace, int(cache), policy, sizes=sizes, with_belady=policy == planned.policy)
        for policy in dict.fromkeys((planned.policy, "lru"))
        for cache in sorted({*caches.tolist(), planned.cache_bytes})
        if cache >= sizes.max()
    )


def _planned_sizes(planned: DecoderPlan, graph: DecoderGraph, packed: PackedBytes) -> Ints:
    """Return [layers, experts] bytes of the packed experts."""
    import numpy as np

    from edgeflex.plans.decoder_costs import expert_bytes

    chosen = {one.subject: Precision(one.option) for one in planned.choices}
    shapes = graph.matrix_shapes()
    most = max((one.routing.experts for one in graph.layers if one.routing is not None), default=1)
    sizes = np.zeros((len(graph.layers), most), dtype=np.int64)
    for layer in graph.layers:
        for expert in range(layer.routing.experts if layer.routing is not None else 0):
            unit = f"layers.{layer.index}.experts.{expert}"
            pair = [shapes[f"{unit}.{name}"] for name in ("gate_up", "down")]
            sizes[layer.index, expert] = expert_bytes(chosen[unit], pair, packed)
    return sizes


def _agreement(true: Sequence[Any], other: Sequence[Any]) -> float:
    """Return the share of the routers' choices that stayed."""
    same = total = 0
    for one, two in zip(true, other, strict=True):
        if one is not None:
            same += int((one.experts[:, :, None] == two.experts[:, None, :]).sum())
            total += one.experts.numel()
    return same / max(1, total)


# --- bench and verify --------------------------------------------------------------------------------------


def bench_decoder(
    bundle: StrPath,
    text: StrPath,
    *,
    prompts: int = 3,
    max_tokens: int = 64,
    repeats: int = 3,
    follow_text: bool = False,
    threads: int | None = None,
    on: Place | None = None,
    progress: Progress | None = None,
) -> DecoderBench:
    """Answer prompts from a text, each repeat in a fresh process, and hold the plan's promises against it.

    With ``follow_text`` an answer is how the text goes on, not what the decoder would say: the plan's hits were
    replayed on text, and a decoder that repeats itself, or has random weights, uses other experts.

    Raises:
        InputError: The text is too short for the planned prompt, or the place is impossible.
        BundleError: The bundle is damaged.
        DeviceError: There is no such device, or it failed.
    """
    from edgeflex.profiles import conditions, machine
    from edgeflex.runtimes.decoder import DecoderSession
    from edgeflex.runtimes.decoder_bench import bench_decoder as measure

    bundle, text = path_of(bundle), path_of(text)
    settings = settings_at(on or Place(), threads=threads)
    session = DecoderSession.from_bundle(bundle, settings)
    plan = session.manifest.plan
    most = plan.context_tokens - max_tokens
    length = min(plan.budget.prompt_tokens, most)
    if length < 1:
        raise InputError(
            f"{max_tokens} tokens of an answer leave no room for a prompt in a context of {plan.context_tokens}. "
            "Ask for fewer."
        )
    ids = session.tokenizer().encode(read_text(text, "text")).ids
    needed, what = (length + max_tokens, "prompt and answer") if follow_text else (length, "prompt")
    if len(ids) < needed:
        raise InputError(f"{text}: {len(ids)} tokens are fewer than the planned {what}'s {needed}. Give more text.")
    starts = [index * (len(ids) - needed) // max(1, prompts - 1) for index in range(prompts)]
    return measure(
        bundle,
        [ids[start : start + length] for start in starts],
        max_tokens=max_tokens,
        repeats=repeats,
        answers=[ids[start + length : start + needed] for start in starts] if follow_text else None,
        settings=settings,
        device=machine().cpu_model or "this machine",
        conditions=conditions,
        progress=progress,
    )


def verify_decoder(
    bundle: StrPath, *, threads: int | None = None, on: Place | None = None, progress: Progress | None = None
) -> DecoderVerify:
    """Check a bundle's files, packed weights, answers and limits.

    Raises:
        InputError: The place is impossible.
        BundleError: The manifest is damaged.
        DeviceError: There is no such device, or it failed.
    """
    from edgeflex.bundle_moe import open_decoder_bundle
    from edgeflex.profiles import machine
    from edgeflex.runtimes.decoder_bench import verify_decoder as check

    bundle, device = path_of(bundle), machine().cpu_model or "this machine"
    found = check(bundle, settings=settings_at(on or Place(), threads=threads), device=device, progress=progress)
    return DecoderVerify(manifest_digest=open_decoder_bundle(bundle).manifest.digest(), checks=found)


@dataclass(frozen=True)
class Place:
    """Where a decoder is to run, and in how much memory, as users write it; None takes the plan's.

    Args:
        device: ``cuda`` for a GPU, None for the processor.
        vram: Most bytes of the GPU's memory.
        cache: Bytes of experts in the processor's memory.
    """

    device: str | None = None
    vram: str | None = None
    cache: str | None = None


def settings_at(place: Place, **more: Any) -> Settings:
    """Return the settings of a run at ``place``; keywords are other fields.

    Raises:
        InputError: A number of bytes is none.
    """
    from edgeflex.runtimes.decoder_settings import Settings
    from edgeflex.units import option_value, parse_size_bytes

    return Settings(
        device=place.device,
        vram_bytes=option_value("--vram", place.vram, parse_size_bytes),
        cache_bytes=option_value("--cache", place.cache, parse_size_bytes),
        **more,
    )


def report_decoder(
    bundle: StrPath,
    out: StrPath,
    *,
    bench_file: StrPath | None = None,
    stats_file: StrPath | None = None,
    verify_file: StrPath | None = None,
) -> DecoderReportDocument:
    """Write the page of a decoder's bundle; return what it shows.

    Raises:
        InputError: A result was measured on another bundle.
    """
    from edgeflex.bundle_moe import open_decoder_bundle
    from edgeflex.reports.decoder import build_decoder_report, save_decoder_report

    manifest = open_decoder_bundle(path_of(bundle)).manifest

    def read(kind: Any, path: StrPath | None) -> Any:
        return None if path is None else kind.parse(read_bytes(path_of(path), "measured figures"), str(path))

    built = build_decoder_report(
        manifest,
        read(DecoderBench, bench_file),
        read(DecoderRunStats, stats_file),
        manifest.points,
        read(DecoderVerify, verify_file),
    )
    save_decoder_report(built, path_of(out))
    return built


def record_trace(
    bundle: StrPath,
    prompt_file: StrPath,
    out: StrPath,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> int:
    """Answer a prompt, write the routing of prompt and answer to ``out``, and return the answered tokens.

    Raises:
        InputError: The prompt is empty, too long or no text.
        BundleError: The bundle is damaged.
    """
    from edgeflex.runtimes.decoder import DecoderSession
    from edgeflex.runtimes.decoder_settings import Settings
    from edgeflex.runtimes.sampling import Sampler
    from edgeflex.runtimes.trace import write_trace

    bundle, prompt_file, out = path_of(bundle), path_of(prompt_file), path_of(out)
    with DecoderSession.from_bundle(bundle, Settings(record=True), progress=progress) as session:
        prompt = session.tokenizer().encode(read_text(prompt_file, "prompt")).ids
        answered = sum(1 for _ in session.generate(prompt, max_tokens, Sampler(temperature=temperature, seed=seed)))
        if session.stats().stopped_by == "interrupt":
            raise KeyboardInterrupt  # a trace that breaks off within a pass would be simulated as if it were whole
        write_trace(out, session.trace())
    return answered
