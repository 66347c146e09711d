"""What a decoder's page says about a plan for a GPU: where experts live, what else was tried, and what is assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeflex.reports.summary import format_seconds, format_value

if TYPE_CHECKING:
    from edgeflex.schema_gpu import GpuPlacement
    from edgeflex.schema_moe import DecoderPlan


@dataclass(frozen=True, slots=True)
class PlacementSection:
    """Rows of (name, value) of the placement and of the GPU's memory, what was tried, and what is assumed.

    ``tried`` holds (placement, policy, seconds, tokens per second, whether it is planned).
    """

    title: str
    rows: tuple[tuple[str, str], ...]
    memory: tuple[tuple[str, str], ...]
    tried: tuple[tuple[str, str, str, str, bool], ...]
    assumptions: tuple[str, ...]


def placement_section(plan: DecoderPlan) -> PlacementSection | None:
    """Return what a plan for a GPU says of its placement; None for plans without one."""
    gpu = plan.gpu
    if gpu is None:
        return None
    origin = "every rate measured" if gpu.origin == "measured" else "rates from data sheets at least in part"
    return PlacementSection(
        title=f"{gpu.profile.title}, in virtual time, {origin}",
        rows=tuple(_rows(plan, gpu)),
        memory=tuple(_memory(gpu)),
        tried=tuple(
            (
                one.placement,
                one.policy,
                format_seconds(one.token_s),
                f"{1 / one.token_s:.1f}",
                (one.placement, one.policy) == (gpu.placement, gpu.policy),
            )
            for one in sorted(gpu.trials, key=lambda one: one.token_s)
        ),
        assumptions=gpu.assumptions,
    )


def _rows(plan: DecoderPlan, gpu: GpuPlacement) -> list[tuple[str, str]]:
    said = plan.predicted.token_s
    rows = [
        ("Placement", gpu.placement),
        ("Experts on the GPU", format_value(gpu.vram_cache_bytes, "bytes")),
        ("Experts in RAM", _in_ram(gpu)),
        ("Found on the GPU", format_value(plan.predicted.hit_rate, "share")),
        ("Copied per token", format_value(gpu.upload_bytes + gpu.ahead_bytes, "bytes")),
        ("Read from flash per token", format_value(gpu.flash_bytes, "bytes")),
        (
            "Time per token",
            f"{format_seconds(said.value)} ({format_seconds(said.low)} to {format_seconds(said.high)})",
        ),
        ("No cache or scheduler can beat", format_seconds(plan.predicted.bound_token_s)),
    ]
    rows += [(f"The {name} had nothing to do", format_value(share, "share")) for name, share in gpu.waited.items()]
    if gpu.crossing is not None:
        rows.append(("A fixed list is as quick from", f"{format_value(gpu.crossing, 'share')} on the GPU"))
    return rows


def _in_ram(gpu: GpuPlacement) -> str:
    if not gpu.ram_cache_bytes:
        return "no tier: CPU and GPU share one memory" if gpu.one_memory else "no tier"
    kept = "none of the GPU's" if gpu.exclusive else "the GPU's too"
    return f"{format_value(gpu.ram_cache_bytes, 'bytes')}, {kept}"


def _memory(gpu: GpuPlacement) -> list[tuple[str, str]]:
    held = gpu.memory
    sizes = (
        ("Dense weights", held.dense_bytes),
        ("Experts", held.arena_bytes),
        ("Keys and values", held.kv_bytes),
        ("Activations", held.activations_bytes),
        ("Driver and libraries", held.context_bytes),
        ("Together", held.total_bytes),
    )
    return [(name, format_value(size, "bytes")) for name, size in sizes]
