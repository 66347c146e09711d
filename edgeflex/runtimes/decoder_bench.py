"""A decoder's promises against measurement: ``bench_decoder`` for figures, ``verify_decoder`` for content.

Everything is generated in fresh processes, one a repeat, so that the cache of experts starts empty and memory is
the runtime's and the bundle's alone.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.progress import Silent
from edgeflex.runtimes.cuda_driver import driver_problem
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_measure import Reply, Task, answer
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.device_record import merged
from edgeflex.schema import Check, Conditions
from edgeflex.schema_moe import DecoderBench
from edgeflex.units import format_bytes, format_count, format_share, format_time

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgeflex.bundle_moe import DecoderBundle
    from edgeflex.progress import Progress
    from edgeflex.schema_gpu import DeviceRecord
    from edgeflex.schema_moe import DecoderManifest, DecoderRunStats

    Unit = Literal["bytes", "s", "share", "count"]

TIME_TOLERANCE = 0.15
MEMORY_TOLERANCE = 0.05
HIT_TOLERANCE = 0.05  # in points: the trace's text and the prompts differ
AGREEMENT = 0.9  # kernels quantise activations, the reference does not
_PROMPT_TOLERANCE = 0.1  # a promise about the first token is for a prompt of one length


@dataclass(frozen=True)
class _Measured:
    """All repeats of a benchmark.

    ``elsewhere`` says where they ran if not where the plan is for, ``other`` with what if not with the plan's settings.
    """

    replies: tuple[Reply, ...]
    elsewhere: str = ""
    other: str = ""

    @property
    def unjudged(self) -> str:
        """Why the plan's promises about speed and hits are not held against this."""
        return self.elsewhere or self.other

    @property
    def device(self) -> DeviceRecord | None:
        records = [reply.device for reply in self.replies if reply.device is not None]
        return merged(records) if records else None

    @property
    def runs(self) -> tuple[DecoderRunStats, ...]:
        return tuple(run for reply in self.replies for run in reply.runs)


# --- bench -------------------------------------------------------------------------------------------


def bench_decoder(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    repeats: int,
    answers: Sequence[Sequence[int]] | None = None,
    settings: Settings | None = None,
    device: str = "this machine",
    conditions: Callable[[], Conditions] = Conditions,
    progress: Progress | None = None,
) -> DecoderBench:
    """Answer the prompts in order, ``repeats`` times, and hold the plan's promises against what was measured.

    Each repeat is a process of its own: its first prompt meets an empty cache of experts, later ones what the
    earlier left, as in the replay that the plan was made with. Packing, which happens once per processor, is
    done before and not timed. On a device, events are recorded and some of them watched closely.

    Args:
        folder: The bundle.
        prompts: Token numbers.
        max_tokens: At most so many answered per prompt.
        repeats: Processes.
        answers: Token numbers that are taken for each prompt's answer, instead of what the decoder would say.
        settings: What differs from the plan; then the plan's promises about speed and hits are not judged.
        device: What the machine is called in the record.
        conditions: Reads the machine's state, before and after each repeat.
        progress: Told about repeats.

    Returns:
        The raw runs, repeat by repeat, prompts in order, and the checks.

    Raises:
        InputError: Nothing is to be done, or a prompt is empty or too long.
        BundleError: The bundle is damaged.
        DeviceError: A process failed or did not end.
    """
    faults = [
        f"{count} {what}; at least {least} is needed"
        for count, what, least in (
            (len(prompts), "prompts", 1),
            (repeats, "repeats", 1),
            (max_tokens, "tokens per answer", 2),
        )
        if count < least
    ]
    if faults:
        raise InputError.collect("the benchmark", faults)
    chosen = _plain(settings)
    manifest = DecoderSession.from_bundle(folder, chosen).manifest
    tasks = [
        Task(prompt=tuple(prompt), max_tokens=max_tokens, forced=tuple(answer))
        for prompt, answer in zip(prompts, answers or [()] * len(prompts), strict=True)
    ]
    shown = progress or Silent()
    if chosen.device is None:
        answer(folder, chosen, (), device)  # packs, which a device needs not
    else:
        chosen = replace(chosen, record=True)
    replies = []
    with shown.task("bench", repeats) as advance:
        for _ in range(repeats):
            before = conditions()
            reply = answer(folder, chosen, tasks, device)
            replies.append(_at(reply, before, conditions()))
            advance(1)
    measured = _Measured(tuple(replies), _elsewhere(manifest, chosen), _other_settings(manifest, chosen))
    record = measured.device
    return DecoderBench(
        manifest_digest=manifest.digest(),
        runs=measured.runs,
        checks=(*_bench_checks(manifest, measured), *_device_checks(manifest, record), *_way_checks(folder, manifest)),
        device=record,
    )


def _at(reply: Reply, before: Conditions, after: Conditions) -> Reply:
    changes: dict[str, object] = {"before": before, "after": after}
    if reply.device is not None and reply.runs:
        changes["device"] = f"{reply.device.name}, with {reply.runs[0].device}"
    runs = tuple(run.model_copy(update=changes) for run in reply.runs)
    return reply.model_copy(update={"runs": runs})


def _plain(settings: Settings | None) -> Settings:
    """Return settings that can be written as JSON, more than once."""
    chosen = settings or Settings()
    if chosen.static is None:
        return chosen
    return replace(chosen, static=[(int(layer), int(expert)) for layer, expert in chosen.static])


def _elsewhere(manifest: DecoderManifest, chosen: Settings) -> str:
    """Return where a run is if not where the plan is for, so that its promises do not hold; empty if there."""
    planned = manifest.plan.gpu is not None
    if chosen.device is None:
        return "run on the processor, planned for a GPU" if planned else ""
    if chosen.device != "cuda":
        return "the processor stood in for a GPU"
    return "" if planned else "run on a GPU, planned for the processor"


def _other_settings(manifest: DecoderManifest, chosen: Settings) -> str:
    plan = manifest.plan
    pairs = {
        "cache": (chosen.cache_bytes, plan.cache_bytes),
        "policy": (chosen.policy, plan.policy),
        "threads": (chosen.threads, plan.threads),
        "prefetch": (chosen.prefetch_depth, plan.prefetch_depth),
        "context": (chosen.context_tokens, plan.context_tokens),
        "chunks of prompts": (chosen.chunk_tokens, plan.prefill_chunk_tokens),
        "vram": (chosen.vram_bytes, plan.budget.vram_bytes),
    }
    others = [name for name, (value, planned) in pairs.items() if value is not None and value != planned]
    return f"run with other settings than the plan's: {', '.join(others)}" if others else ""


def _bench_checks(manifest: DecoderManifest, measured: _Measured) -> list[Check]:
    return [
        *_token_checks(manifest, measured),
        *_first_token_checks(manifest, measured),
        *_memory_checks(manifest, measured.replies, measured.elsewhere),
        _cache_check(manifest, measured.runs),
        _hit_check(manifest, measured),
    ]


def _token_checks(manifest: DecoderManifest, measured: _Measured) -> list[Check]:
    """Return the checks of decoding: the median over repeats of each one's mean.

    A cache that is still empty, or experts that are still being read, are what the promise of the first token is about.
    Tokens count from the second prompt on where there is one, as they do in the long text that was replayed: a plan
    that misses one expert in a thousand would else be judged by experts that each come once.
    """
    plan = manifest.plan
    warmed = all(len(reply.runs) > 1 for reply in measured.replies)
    first = 1 if warmed else 0
    times = [[time.total_s for run in reply.runs[first:] for time in run.times] for reply in measured.replies]
    means = [math.fsum(one) / len(one) for one in times if one]
    measured_s = statistics.median(means) if means else None
    note = f"{sum(map(len, times)):,} tokens in {format_count(len(means), 'repeat')}"
    if len(means) > 1:
        note += f", means {format_time(min(means))} to {format_time(max(means))}"
    if warmed:
        note += ", from the second prompt on"
    return _time_checks(
        "time per token",
        (plan.predicted.token_s.value, plan.budget.token_s),
        measured_s,
        note if means else "not measured: no answer has a second token",
        measured=measured,
    )


def _first_token_checks(manifest: DecoderManifest, measured: _Measured) -> list[Check]:
    """Return the checks of reading the first prompt with an empty cache, where its length is the planned one."""
    plan = manifest.plan
    runs = [reply.runs[0] for reply in measured.replies]
    planned = plan.budget.prompt_tokens
    near = abs(runs[0].prompt_tokens - planned) <= _PROMPT_TOLERANCE * planned
    read = statistics.median([run.first_token_s for run in runs])
    note = f"{format_count(len(runs), 'cold start')}, {runs[0].prompt_tokens} prompt tokens"
    far = f"not measured: the promise is for {planned} prompt tokens, the first prompt has {runs[0].prompt_tokens}"
    return _time_checks(
        "time to first token",
        (plan.predicted.first_token_s.value, plan.budget.first_token_s),
        read if near else None,
        note if near else far,
        measured=measured,
    )


def _time_checks(
    name: str, promise: tuple[float, float | None], measured_s: float | None, note: str, *, measured: _Measured
) -> list[Check]:
    """Return the promise's check and, where there is one, the budget's.

    The promise holds for the plan's settings, the budget wherever the plan is for.
    """
    promised_s, limit_s = promise
    kept = measured_s is not None and measured_s <= promised_s * (1 + TIME_TOLERANCE)
    fast = measured_s is not None and measured_s < promised_s * (1 - TIME_TOLERANCE)
    judged = measured.unjudged
    checks = [
        _check(
            name,
            "s",
            promised_s,
            measured_s if not judged else None,
            ok=kept,
            low=promised_s * (1 - TIME_TOLERANCE),
            high=promised_s * (1 + TIME_TOLERANCE),
            note=f"not judged: {judged}" if judged else f"{note}; faster than promised" if fast else note,
        )
    ]
    if limit_s is not None:
        there = None if measured.elsewhere else measured_s
        ok = there is not None and there <= limit_s
        told = f"not judged: {measured.elsewhere}" if measured.elsewhere else note
        checks.append(_check(f"{name} budget", "s", promised_s, there, ok=ok, limit=limit_s, note=told))
    return checks


def _memory_checks(manifest: DecoderManifest, replies: Sequence[Reply], elsewhere: str = "") -> list[Check]:
    """Hold all that the process held, the runtime's own part included, against the plan and the budget."""
    plan = manifest.plan
    held = max((run.peak_memory_bytes + run.runtime_memory_bytes for one in replies for run in one.runs), default=None)
    promised = plan.predicted.memory.total_bytes
    rises = [reply.rise_bytes for reply in replies if reply.rise_bytes is not None]
    note = f"highest rise, mapped files included: {format_bytes(max(rises))}" if rises else ""
    if elsewhere:
        note = f"not judged: {elsewhere}; the process held {format_bytes(held or 0)}"
        held = None
    checks = [
        _check(
            "memory",
            "bytes",
            promised,
            held,
            ok=held is not None and held <= promised * (1 + MEMORY_TOLERANCE),
            low=promised * (1 - MEMORY_TOLERANCE),
            high=promised * (1 + MEMORY_TOLERANCE),
            note=note,
        )
    ]
    limit = plan.budget.memory_bytes
    if limit is not None:
        ok = held is not None and held <= limit
        checks.append(_check("memory budget", "bytes", promised, held, ok=ok, limit=limit, note=note))
    return checks


def _cache_check(manifest: DecoderManifest, runs: Sequence[DecoderRunStats]) -> Check:
    """Return whether experts ever took more than they may: the run's own limit, which is the plan's by default."""
    limit = max((run.cache.capacity_bytes for run in runs), default=manifest.plan.cache_bytes)
    peak = max((run.cache.peak_bytes for run in runs), default=None)
    return _check(
        "expert cache", "bytes", limit, peak, ok=peak is not None and peak <= limit, high=limit, note="never above"
    )


def _device_checks(manifest: DecoderManifest, record: DeviceRecord | None) -> list[Check]:
    """Return what was planned of the device's memory against the most that was held, and the budget's check.

    The promise is the plan's where it is for a GPU, else what this run reckoned before it took anything.
    """
    if record is None:
        return []
    gpu, peak = manifest.plan.gpu, record.peak_bytes
    promised = record.planned_bytes if gpu is None else gpu.memory.total_bytes
    note = "by PyTorch's allocator" if peak is not None else "not measured: nobody counts this device's memory"
    ok = peak is not None and peak <= promised
    checks = [_check("vram", "bytes", promised, peak, ok=ok, high=promised, note=note)]
    limit = record.requested_bytes if manifest.plan.budget.vram_bytes is None else manifest.plan.budget.vram_bytes
    if limit is not None:
        ok = peak is not None and peak <= limit
        checks.append(_check("vram budget", "bytes", promised, peak, ok=ok, limit=limit, note=note))
    return checks


def _way_checks(folder: Path, manifest: DecoderManifest) -> list[Check]:
    """Return how experts get their weights in TensorRT, against the other way, as ``build`` measured both here."""
    if manifest.backend != "tensorrt":
        return []
    from edgeflex.runtimes.tensorrt_ways import kept_ways

    checks = []
    for one in kept_ways(folder):
        if one.inputs_s is None or one.refit_s is None:
            continue
        taken, other = (one.inputs_s, one.refit_s) if one.way == "inputs" else (one.refit_s, one.inputs_s)
        if taken > other:  # the other way was refused, for what it computes
            continue
        rival = "refit" if one.way == "inputs" else "inputs"
        note = f"an expert that is not on the device, as measured when it was built; promised is what {rival} takes"
        checks.append(_check(f"{one.segment} by {one.way}", "s", other, taken, ok=True, note=note))
    return checks


def _hit_check(manifest: DecoderManifest, measured: _Measured) -> Check:
    hits = sum(run.cache.decode_hits for run in measured.runs)
    uses = hits + sum(run.cache.decode_misses for run in measured.runs)
    promised = manifest.plan.predicted.hit_rate
    least = max(0.0, promised - HIT_TOLERANCE)
    judged = measured.unjudged
    note = f"not judged: {judged}" if judged else f"{uses:,} uses while decoding"
    if not uses:
        note = "not measured: no expert was used while decoding"
    share = hits / uses if uses and not judged else None
    return _check("hit rate", "share", promised, share, ok=share is not None and share >= least, low=least, note=note)


def _check(
    name: str,
    unit: Unit,
    promised: float,
    measured: float | None,
    *,
    ok: bool,
    limit: float | None = None,
    low: float | None = None,
    high: float | None = None,
    note: str = "",
) -> Check:
    return Check(
        name=name,
        unit=unit,
        limit=limit,
        promised=promised,
        measured=0.0 if measured is None else measured,
        low=low,
        high=high,
        ok=ok and measured is not None,
        note=note,
        was_measured=measured is not None,
    )


# --- verify ------------------------------------------------------------------------------------------


def verify_decoder(
    folder: Path,
    *,
    settings: Settings | None = None,
    device: str = "this machine",
    progress: Progress | None = None,
) -> tuple[Check, ...]:
    """Check a bundle's content: every file, the packed store, its answers, and the limits while answering.

    Answers are held against those that the exporter kept of its reference. The reference's tokens are fed, so
    that every one of them is judged by itself: a single other token would otherwise change all that follow.

    Args:
        folder: The bundle.
        settings: What differs from the plan; tokens do not depend on it, but for a device's rounding.
        device: What the machine is called in the record.
        progress: Told about steps.

    Returns:
        The checks: files, packed store, greedy agreement, memory, expert cache; on a device its memory, and the
        process's only where the plan is for one. Where files changed nothing is run, and the other checks say that
        they were not measured.

    Raises:
        InputError: ``folder`` is not a bundle's, or a setting is impossible.
        BundleError: The manifest is damaged, or a file is missing, of another size or outside the folder.
        DeviceError: There is no such device, or the process failed.
    """
    chosen = _plain(settings)
    if chosen.device is not None:
        chosen = replace(chosen, record=True)
    bundle = open_decoder_bundle(folder)
    manifest = bundle.manifest
    _refuse_place(folder, manifest, chosen)
    shown = progress or Silent()
    files = _files_check(bundle, shown)
    if not files.ok:
        return files, *_unmeasured(manifest)
    tasks = [
        Task(prompt=one.prompt, max_tokens=len(one.tokens), forced=one.tokens)
        for one in manifest.expected
        if one.tokens
    ]
    with shown.task("answers", 1) as advance:
        reply = answer(folder, chosen, tasks, device, check_store=True)
        advance(1)
    memory = () if _elsewhere(manifest, chosen) else _memory_checks(manifest, (reply,))
    counted = [one for one in _device_checks(manifest, reply.device) if one.was_measured]
    return (
        files,
        _store_check(reply),
        _agreement_check(manifest, reply),
        *memory,
        _cache_check(manifest, reply.runs),
        *counted,
    )


def _refuse_place(folder: Path, manifest: DecoderManifest, chosen: Settings) -> None:
    """Refuse what can be seen to be impossible before thousands of files are read."""
    DecoderSession(folder, manifest, chosen)
    problem = driver_problem() if chosen.device == "cuda" else None
    if problem is not None:
        raise DeviceError(f"there is no CUDA device to answer on: {problem}")


def _files_check(bundle: DecoderBundle, progress: Progress) -> Check:
    faults = []
    count = len(bundle.manifest.files)
    with progress.task("files", count) as advance:
        for entry in bundle.manifest.files:
            try:
                bundle.check(entry.path)
            except BundleError:
                faults.append(entry.path)
            advance(1)
    more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
    note = f"changed: {', '.join(faults[:5])}{more}" if faults else "every file has the manifest's SHA-256"
    return _check("sound files", "count", count, count - len(faults), ok=not faults, low=count, note=note)


def _unmeasured(manifest: DecoderManifest) -> tuple[Check, ...]:
    note = "not measured: files are damaged"
    promised = manifest.plan.predicted.memory.total_bytes
    return (
        _check("packed store", "count", 0, None, ok=False, note=note),
        _check("greedy agreement", "share", 1.0, None, ok=False, note=note),
        _check("memory", "bytes", promised, None, ok=False, note=note),
        _check("expert cache", "bytes", manifest.plan.cache_bytes, None, ok=False, note=note),
    )


def _store_check(reply: Reply) -> Check:
    sound = reply.records - len(reply.damaged)
    note = f"damaged: {', '.join(reply.damaged[:5])}" if reply.damaged else "every record has its index's SHA-256"
    return _check("packed store", "count", reply.records, sound, ok=not reply.damaged, low=reply.records, note=note)


def _agreement_check(manifest: DecoderManifest, reply: Reply) -> Check:
    answers = [one.tokens for one in manifest.expected if one.tokens]
    pairs = list(zip(answers, reply.greedy, strict=True)) if len(answers) == len(reply.greedy) else []
    total = sum(len(tokens) for tokens, _ in pairs)
    if not total:
        note = "not measured: the bundle keeps no reference answer"
        return _check("greedy agreement", "share", 1.0, None, ok=False, low=AGREEMENT, note=note)
    equal = sum(a == b for tokens, found in pairs for a, b in zip(tokens, found, strict=False))
    before = sum(_equal_before(tokens, found) for tokens, found in pairs)
    note = (
        f"{total:,} tokens of {format_count(len(pairs), 'answer')}; {format_share(before / total, 1)} of them stand "
        "before their answer's first difference"
    )
    share = equal / total
    return _check("greedy agreement", "share", 1.0, share, ok=share >= AGREEMENT, low=AGREEMENT, note=note)


def _equal_before(expected: Sequence[int], found: Sequence[int]) -> int:
    """Return how many tokens are equal before the first that is not."""
    pairs = zip(expected, found, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
