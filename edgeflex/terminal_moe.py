"""What people read in a terminal about mixture-of-experts decoders. Only ``cli`` prints the text.

Functions named ``…_text`` return text without a final line break, no line wider than the terminal (``COLUMNS``).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from edgeflex.schema_moe import DECODER_PRECISIONS
from edgeflex.terminal import ABSENT, prose, table_text
from edgeflex.terminal_costs import blocks, is_expert
from edgeflex.units import format_bytes, format_count, format_fine_time, format_share, format_time

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgeflex.reports.decoder import DecoderReportDocument
    from edgeflex.schema import Proof
    from edgeflex.schema_gpu import DeviceRecord, GpuPlacement
    from edgeflex.schema_moe import (
        DecoderCacheStats,
        DecoderManifest,
        DecoderPlan,
        DecoderRunStats,
        DeviceSimulation,
        Simulation,
    )

_PARTS = ("dense weights", "expert cache", "keys and values", "activations", "runtime")
_FINDINGS = {
    "fits": "FITS: every expert stays in memory",
    "offload": "OFFLOAD: experts are read from storage when they are needed",
    "decline": "DECLINE",
    "gpu fits": "FITS: every expert stays in the GPU's memory",
    "gpu": "OFFLOAD: the GPU's memory holds a part of the experts",
}

_PROGRAMS = {
    "executorch": "programs for a stock ExecuTorch",
    "onnx": "stages for ONNX Runtime",
    "tensorrt": "stages for TensorRT",
}


def _rate(token_s: float) -> str:
    return f"{1 / token_s:.1f} tokens/s" if token_s > 0 else ABSENT


# --- plan --------------------------------------------------------------------------------------------


def decoder_plan_text(plan: DecoderPlan) -> str:
    """Return a plan: verdict and reasons, budgets, memory, experts, time, precisions and proof."""
    if plan.gpu is not None:
        return _gpu_plan_text(plan, plan.gpu)
    return blocks(
        prose(_FINDINGS[plan.verdict], *(f"- {reason}" for reason in plan.reasons)),
        table_text("Budgets", ("budget", "limit", "promised", "margin"), list(_budget_rows(plan))),
        table_text("Memory", ("part", "bytes", "share"), _memory_rows(plan)),
        table_text("Experts and time", ("figure", "value"), list(_expert_rows(plan))),
        _precision_table(plan),
        prose(_proof_text(plan.proof)),
    )


def _budget_rows(plan: DecoderPlan) -> Iterator[tuple[str, str, str, str]]:
    budget, said = plan.budget, plan.predicted
    kl = "KL, nats per token"
    gpu = plan.gpu
    held = said.memory.total_bytes + (gpu.memory.total_bytes if gpu is not None and gpu.one_memory else 0)
    if gpu is not None and budget.vram_bytes:
        left = (budget.vram_bytes - gpu.memory.total_bytes) / budget.vram_bytes
        promised = format_bytes(gpu.memory.total_bytes)
        yield "vram", format_bytes(budget.vram_bytes), promised, f"{format_share(left, 1)} left"
    for name, limit, value, show in (
        ("memory", budget.memory_bytes, held, format_bytes),
        ("time per token", budget.token_s, said.token_s.value, format_time),
        ("time to first token", budget.first_token_s, said.first_token_s.value, format_time),
        ("disk", budget.disk_bytes, said.disk_bytes, format_bytes),
        (kl, budget.kl_limit, said.kl, lambda nats: f"{nats:.4f}"),
    ):
        margin = ABSENT
        if limit:
            left = (limit - value) / limit
            margin = f"{format_share(abs(left), 1)} {'left' if left >= 0 else 'over'}"
        yield name, ABSENT if limit is None else show(limit), show(value), margin


def _memory_rows(plan: DecoderPlan) -> list[tuple[str, str, str]]:
    memory = plan.predicted.memory
    sizes = (
        memory.dense_bytes,
        memory.cache_bytes,
        memory.kv_bytes,
        memory.activations_bytes,
        memory.runtime_bytes,
    )
    total = max(memory.total_bytes, 1)
    rows = [(name, format_bytes(size), format_share(size / total, 1)) for name, size in zip(_PARTS, sizes, strict=True)]
    return [*rows, ("together", format_bytes(memory.total_bytes), "")]


def _expert_rows(plan: DecoderPlan) -> Iterator[tuple[str, str]]:
    said = plan.predicted
    cycles = f", {plan.cache_bytes / plan.cycle_bytes:.2f} T" if plan.cycle_bytes else ""
    yield "cache", f"{format_bytes(plan.cache_bytes)}{cycles}"
    yield "T, the experts of one token", format_bytes(plan.cycle_bytes)
    yield "policy", plan.policy
    yield "prefetch", format_count(plan.prefetch_depth, "layer") + " ahead" if plan.prefetch_depth else "off"
    yield "hit rate", format_share(said.hit_rate, 1)
    yield "best possible (Belady)", ABSENT if said.belady_hit_rate is None else format_share(said.belady_hit_rate, 1)
    yield "read per token", format_bytes(said.bytes_per_token)
    for name, span in (("time per token", said.token_s), ("time to first token", said.first_token_s)):
        yield name, f"{format_time(span.value)} ({format_time(span.low)} to {format_time(span.high)})"
    yield "decoding", _rate(said.token_s.value)
    if said.bound_token_s > 0:
        reached = f" ({format_share(said.bound_token_s / said.token_s.value, 0)} reached)" if said.token_s.value else ""
        yield "bound without prefetch", f"{format_time(said.bound_token_s)}{reached}"
    yield "threads", str(plan.threads)
    yield "context", format_count(plan.context_tokens, "token")
    yield "prompt read in chunks of", format_count(plan.prefill_chunk_tokens, "token")


def _gpu_plan_text(plan: DecoderPlan, gpu: GpuPlacement) -> str:
    """Return a plan for a GPU: as any, with both memories, the placement with what else was tried, and assumptions."""
    finding = {"fits": _FINDINGS["gpu fits"], "offload": _FINDINGS["gpu"]}.get(plan.verdict, _FINDINGS["decline"])
    where = "in virtual time" if gpu.origin == "measured" else "in virtual time, from data sheets at least in part"
    parts = gpu.memory
    sizes = (
        ("dense weights", parts.dense_bytes),
        ("experts", parts.arena_bytes),
        ("keys and values", parts.kv_bytes),
        ("activations", parts.activations_bytes),
        ("driver and libraries", parts.context_bytes),
        ("together", parts.total_bytes),
    )
    rows = [(name, format_bytes(size), format_share(size / parts.total_bytes, 1)) for name, size in sizes]
    first, *others = _memory_rows(plan)
    process = [("embedding", *first[1:]), *others]
    host = "The process, in the same memory" if gpu.one_memory else "Memory of the process"
    tried = [(_placed(one.placement, one.policy), format_time(one.token_s), _rate(one.token_s)) for one in gpu.trials]
    return blocks(
        prose(finding, *(f"- {reason}" for reason in plan.reasons)),
        table_text("Budgets", ("budget", "limit", "promised", "margin"), list(_budget_rows(plan))),
        table_text(f"Memory of the GPU ({gpu.device})", ("part", "bytes", "share"), rows),
        table_text(host, ("part", "bytes", "share"), process),
        table_text(f"Experts and time, {where}", ("figure", "value"), list(_placement_rows(plan, gpu))),
        table_text("Placements tried with these memories", ("placement", "time per token", "decoding"), tried),
        _precision_table(plan),
        prose(_proof_text(plan.proof), *(f"assumed: {one}" for one in gpu.assumptions)),
    )


def _placed(placement: str, policy: str) -> str:
    return placement if placement == policy else f"{placement} ({policy})"


def _placement_rows(plan: DecoderPlan, gpu: GpuPlacement) -> Iterator[tuple[str, str]]:
    said = plan.predicted
    yield "placement", gpu.placement
    yield "policy on the GPU", gpu.policy
    yield (
        "misses",
        {"auto": "copied or computed by the processor", "upload": "copied", "static": "to the processor"}[gpu.rule],
    )
    yield "experts on the GPU", format_bytes(gpu.vram_cache_bytes)
    below = "no tier" if not gpu.ram_cache_bytes else f"{format_bytes(gpu.ram_cache_bytes)}, "
    kept = "" if not gpu.ram_cache_bytes else "not those on the GPU" if gpu.exclusive else "copies of the GPU's too"
    yield "experts in RAM", below + kept
    yield "T, the experts of one token", format_bytes(plan.cycle_bytes)
    yield "found on the GPU", format_share(said.hit_rate, 1)
    yield "best possible (Belady)", ABSENT if said.belady_hit_rate is None else format_share(said.belady_hit_rate, 1)
    yield "copied per token", f"{format_bytes(gpu.upload_bytes)}, and {format_bytes(gpu.ahead_bytes)} ahead"
    yield "read from flash per token", format_bytes(gpu.flash_bytes)
    for name, span in (("time per token", said.token_s), ("time to first token", said.first_token_s)):
        yield name, f"{format_time(span.value)} ({format_time(span.low)} to {format_time(span.high)})"
    yield "decoding", _rate(said.token_s.value)
    reached = f" ({format_share(said.bound_token_s / said.token_s.value, 0)} reached)" if said.token_s.value else ""
    yield "no cache or scheduler can beat", f"{format_time(said.bound_token_s)}{reached}"
    for name, share in gpu.waited.items():
        yield f"{name} had nothing to do", format_share(share, 1)
    if gpu.crossing is not None:
        yield "a fixed list is as quick from", f"{format_share(gpu.crossing, 0)} of the experts on the GPU"
    yield "threads", str(plan.threads)
    yield "context", format_count(plan.context_tokens, "token")
    yield "prompt read in chunks of", format_count(plan.prefill_chunk_tokens, "token")


def _precision_table(plan: DecoderPlan) -> str:
    counts: dict[str, Counter[str]] = {}
    for choice in plan.choices:
        counts.setdefault(_kind(choice.subject), Counter())[choice.option] += 1
    if not counts:
        return ""
    order = [one.value for one in DECODER_PRECISIONS if any(one.value in found for found in counts.values())]
    order += sorted({name for found in counts.values() for name in found} - set(order))
    rows = [(kind, *(f"{found[name]:,}" if found[name] else "" for name in order)) for kind, found in counts.items()]
    return table_text("Precisions", ("units", *order), rows)


def _kind(unit: str) -> str:
    if is_expert(unit):
        return "experts"
    return "dense parts of layers" if unit.startswith("layers.") else unit


def _proof_text(proof: Proof | None) -> str:
    if proof is None:
        return "Proof: none. A better plan may exist."
    what = "KL" if proof.minimize == "drop" else proof.minimize
    tried = f"{proof.solver}, {proof.scenarios_solved:,} of {proof.scenarios:,} solved, {proof.wall_s:.2f} s"
    if proof.status == "optimal":
        return (
            f"Proof: optimal for the measured costs, {what} {_fine(proof, proof.objective)}, bound "
            f"{_fine(proof, proof.bound)} ({tried})"
        )
    if proof.gap <= proof.tolerance:
        same = "no plan goes below that, by the recorded trace"
        return f"Proof: best found, {what} {_fine(proof, proof.objective)}; {same} ({tried})"
    return (
        f"Proof: best found, {what} {_fine(proof, proof.objective)}; no plan goes below {_fine(proof, proof.bound)}, "
        f"so a better one may exist within {format_share(proof.gap, 1)} ({tried})"
    )


def _fine(proof: Proof, value: float) -> str:
    """Return a value with the digits that tell an objective from its bound."""
    if proof.minimize == "memory":
        return f"{value:,.0f} bytes"
    return format_fine_time(value) if proof.minimize == "latency" else f"{value:.5g} nats"


# --- bundle ------------------------------------------------------------------------------------------


_ELSEWHERE = (
    "The plan's times and memory are those of edgeflex's own engine on the machine that calibrated; measure with "
    "`edgeflex bench` where this bundle runs."
)


def decoder_bundle_text(manifest: DecoderManifest) -> str:
    """Return what an exported bundle holds and how far it is from the fp32 decoder."""
    size = sum(file.size_bytes for file in manifest.files)
    rows = [
        ("files", f"{len(manifest.files):,}, {format_bytes(size)}"),
        ("matrices", f"{len(manifest.matrices):,}"),
        (_PROGRAMS[manifest.backend], f"{len(manifest.programs):,}"),
        ("KL predicted", f"{manifest.plan.predicted.kl:.4f} nats per token"),
    ]
    for name, value, show in (
        ("KL measured", manifest.measured_kl, "{:.4f} nats per token"),
        ("perplexity", manifest.measured_perplexity, "{:.3f}"),
        ("perplexity in fp32", manifest.reference_perplexity, "{:.3f}"),
    ):
        rows.append((name, ABSENT if value is None else show.format(value)))
    same = manifest.router_agreement
    rows.append(("same choices of experts", ABSENT if same is None else format_share(same, 1)))
    rows.append(("reference answers", f"{len(manifest.expected):,}"))
    table = table_text(manifest.graph.name, ("figure", "value"), rows)
    if manifest.backend == "executorch":
        return table
    return f"{table}\n{prose(_ELSEWHERE)}"


# --- run and simulation ------------------------------------------------------------------------------


def generation_text(stats: DecoderRunStats, plan: DecoderPlan | None = None) -> str:
    """Return how one generation went; with ``plan`` its promises stand beside."""
    said = None if plan is None else plan.predicted
    total_s = math.fsum(time.total_s for time in stats.times)
    mean_s = total_s / len(stats.times) if stats.times else 0.0
    held = stats.peak_memory_bytes + stats.runtime_memory_bytes
    rows = [
        ("answer", format_count(len(stats.tokens), "token"), ""),
        ("ended by", stats.stopped_by, ""),
        ("decoding", _rate(mean_s), "" if said is None else _rate(said.token_s.value)),
        (
            "time per token",
            format_time(mean_s) if mean_s else ABSENT,
            "" if said is None else format_time(said.token_s.value),
        ),
        *_split_rows(stats, total_s),
        (
            "prompt",
            format_count(stats.prompt_tokens, "token"),
            "" if plan is None else format_count(plan.budget.prompt_tokens, "token"),
        ),
        (
            "first token",
            format_time(stats.first_token_s),
            "" if said is None else format_time(said.first_token_s.value),
        ),
        ("loading", format_time(stats.load_s), ""),
        *_cache_rows(stats, plan),
        ("memory", format_bytes(held), "" if said is None else format_bytes(said.memory.total_bytes)),
    ]
    if plan is None:
        return table_text("", ("figure", "value"), [row[:2] for row in rows])
    return table_text("", ("figure", "measured", "planned"), rows)


def _split_rows(stats: DecoderRunStats, total_s: float) -> Iterator[tuple[str, str, str]]:
    if total_s <= 0:
        return
    parts = {
        "in dense parts": math.fsum(time.dense_s for time in stats.times),
        "in experts": math.fsum(time.expert_s for time in stats.times),
        "waiting for reads": math.fsum(time.wait_s for time in stats.times),
    }
    # clocks of several threads overlap, so that parts can come to a little more than the whole
    parts["beside these"] = max(total_s - math.fsum(parts.values()), 0.0)
    for name, part_s in parts.items():
        yield f"- {name}", format_share(part_s / total_s, 1), ""


def _cache_rows(stats: DecoderRunStats, plan: DecoderPlan | None) -> Iterator[tuple[str, str, str]]:
    cache = stats.cache
    uses = cache.decode_hits + cache.decode_misses
    said = None if plan is None else plan.predicted
    found = f"{format_share(cache.decode_hits / uses, 1)} of {uses:,} uses" if uses else ABSENT
    yield "expert hits", found, "" if said is None else format_share(said.hit_rate, 1)
    if stats.times:
        per_token = format_bytes(cache.decode_read_bytes / len(stats.times))
        yield "read per token", per_token, "" if said is None else format_bytes(said.bytes_per_token)
    yield (
        "expert cache",
        f"{format_bytes(cache.peak_bytes)} of {format_bytes(cache.capacity_bytes)}",
        "" if plan is None else format_bytes(plan.cache_bytes),
    )
    yield "policy", cache.policy, "" if plan is None else plan.policy
    if cache.prefetch_fetched_bytes:
        yield "read early and used", _prefetch(cache), ""


def _prefetch(cache: DecoderCacheStats) -> str:
    used = format_share(cache.prefetch_useful_bytes / cache.prefetch_fetched_bytes, 0)
    return (
        f"{used} of {format_bytes(cache.prefetch_fetched_bytes)}{', so it stopped' if cache.prefetch_stopped else ''}"
    )


def decoder_report_text(report: DecoderReportDocument) -> str:
    """Return a decoder's report: its sentence, every budget, and every further promise."""
    from edgeflex.reports.decoder import further, outcome
    from edgeflex.reports.summary import row

    rows = [row(check, budget=True) for check in report.verdicts]
    rows += [row(check, budget=False) for check in further(report)]
    columns = ("promise", "limit", "promised", "measured", "verdict")
    return blocks(prose(outcome(report)[1]), table_text("", columns, rows, words=("verdict",)))


def device_record_text(record: DeviceRecord) -> str:
    """Return what a device did in a benchmark, how far predictions were off, and who waited."""
    from edgeflex.reports.decoder_device import RESOURCES, facts, waits

    errors = [
        (
            {"event": "events", "prompt": "events of prompts"}.get(name, RESOURCES.get(name, name)),
            f"{one.samples:,}",
            f"{one.bias * 100:+,.1f} %",
            f"{one.mean_error * 100:,.1f} %",
            f"{one.p90_error * 100:,.1f} %",
        )
        for name, one in record.errors.items()
    ]
    shares = [(RESOURCES[name], *(format_share(share, 1) for share in parts)) for name, *parts in waits(record)]
    return blocks(
        table_text(record.name, ("figure", "value"), list(facts(record)), words=("value",)),
        table_text("Predicted against measured", ("seconds of", "samples", "error", "its size", "90 % within"), errors)
        if errors
        else "",
        table_text("Share of the watched time", ("resource", "at work", "waiting in events", "between"), shares)
        if shares
        else "",
    )


def device_simulation_text(found: DeviceSimulation) -> str:
    """Return what a machine that is not at hand would make of a trace, with what was assumed."""
    rate, token = found.tokens_per_s, found.token_s
    rows = [
        ("decoding", f"{rate.value:.1f} tokens/s ({rate.low:.1f} to {rate.high:.1f})"),
        ("time per token", f"{format_time(token.value)} ({format_time(token.low)} to {format_time(token.high)})"),
        ("no cache or scheduler can beat", format_time(found.bound_token_s)),
        ("experts found on the GPU", format_share(found.hit_rate, 1)),
        ("copied per token", format_bytes(round(found.upload_bytes + found.ahead_bytes))),
        ("read from flash per token", format_bytes(round(found.flash_bytes))),
        ("experts on the GPU", {"cache": "come and go", "static": "stay"}[found.placement]),
        *((f"{name} had nothing to do", format_share(share, 1)) for name, share in found.waited.items()),
        *((f"by the rule {name}", format_time(seconds)) for name, seconds in found.rival_token_s.items()),
    ]
    title = (
        f"{found.device}, {format_bytes(found.vram_bytes)} of VRAM for experts, in virtual time: nothing was measured"
    )
    table = table_text(title, ("figure", "value"), rows)
    return "\n".join([table, *(prose(f"note: {one}") for one in found.assumptions)])


def simulation_text(simulation: Simulation) -> str:
    """Return replays of a trace, decode lookups only: by cache size, the best hit rate first."""
    ordered = sorted(simulation.results, key=lambda one: (one.cache_bytes, -one.hit_rate, one.policy))
    timed = simulation.link_bytes_per_s is not None
    rows = [
        (
            one.policy,
            format_bytes(one.cache_bytes),
            format_share(one.hit_rate, 1),
            format_bytes(one.bytes_per_token),
            f"{(one.belady_hit_rate - one.hit_rate) * 100:.1f} pt",
            format_share(min(one.layer_hit_rates, default=0.0), 1),
            *((_rate(one.token_s), format_share(one.bound_share or 0.0, 0)) if timed and one.token_s else ()),
        )
        for one in ordered
    ]
    columns = ("policy", "cache", "hit rate", "read per token", "behind Belady", "worst layer")
    title = f"{simulation.trace}, {simulation.decode_tokens:,} decoded tokens"
    return table_text(title, (*columns, *(("speed", "of bound") if timed else ())), rows)
