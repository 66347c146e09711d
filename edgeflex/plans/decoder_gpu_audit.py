"""An independent recount of plans for a GPU: plain sums, matrix by matrix, sharing no code with their planner.

What is recounted: precisions and KL; every part of both memories from the graph; T and the disk; seconds, hits and
bytes by the trace in virtual time at the plan's own division, with sizes counted here; that the chosen serving is the
quickest of those listed; that every limit is kept; that origins, verdict, placement and proof agree with each other.
Bytes that a plan may round up (of rows, restored numbers, buffers) are checked to be no less than what is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import CheckFailedError
from edgeflex.plans.decoder_audit import (
    fp32_bytes,
    layer_matrices,
    misfits,
    raw_matrix_bytes,
    refuse_all,
    uses_of,
)
from edgeflex.plans.decoder_device import Division, Serving
from edgeflex.schema import Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from edgeflex.plans.decoder_device import DevicePoint, VirtualDevice
    from edgeflex.schema_gpu import GpuPlacement
    from edgeflex.schema_moe import DecoderCalibration, DecoderGraph, DecoderPlan, DecoderRates

_RELATIVE = 1e-6
_BFLOAT_BYTES, _SCALE_BYTES, _PAGE = 2, 4, 4096
_DRIVER_BYTES, _PYTORCH_BYTES = 576 << 20, 1 << 30


@dataclass(frozen=True)
class GpuGround:
    """What a plan is counted against; as given to the planner.

    Attributes:
        calibration: Of the plan's decoder.
        rates: Of the computer that calibrated.
        device: Runs the trace.
        packed_bytes: Precision, rows and columns to bytes of the packed form in the bundle's folder.
        uses: Share of decoded tokens that use each expert, [layers, experts].
        activations_bytes: Chunk to bytes of the processor's buffers.
    """

    calibration: DecoderCalibration
    rates: DecoderRates
    device: VirtualDevice
    packed_bytes: Callable[[Precision, int, int], int]
    uses: NDArray[np.float64] | None
    activations_bytes: Callable[[int], int]


@dataclass(frozen=True)
class GpuRecount:
    """What a plan costs by plain sums; dense and embedding bytes on the GPU and beside it."""

    kl: float
    dense_bytes: int
    embedding_bytes: int
    experts_bytes: int
    cycle_bytes: int
    disk_bytes: int
    sizes: NDArray[np.int64]
    point: DevicePoint


def check_gpu_plan(plan: DecoderPlan, ground: GpuGround) -> GpuRecount:
    """Return the recount of ``plan`` if everything that it says holds.

    Raises:
        CheckFailedError: A figure differs from the recount, a limit is broken, or parts contradict each other; all of
            it is listed.
    """
    where = f"plan of decoder {ground.calibration.graph.name!r} for a GPU"
    gpu = plan.gpu
    if gpu is None:
        raise CheckFailedError(f"{where} names no GPU; plan again.")
    refuse_all(where, list(misfits(plan, ground)))
    counted = _recount(plan, gpu, ground)
    faults = [
        *_differences(plan, gpu, ground, counted),
        *_placement_faults(plan, gpu, counted),
        *_broken(plan, gpu),
        *_contradictions(plan, gpu),
    ]
    refuse_all(where, faults)
    return counted


def _recount(plan: DecoderPlan, gpu: GpuPlacement, ground: GpuGround) -> GpuRecount:
    graph = ground.calibration.graph
    chosen = {choice.subject: Precision(choice.option) for choice in plan.choices}
    table = (graph.vocabulary, graph.hidden_dim)
    packed = ground.packed_bytes
    dense = disk = fp32_bytes(graph)
    dense += _on_gpu(table)
    disk += raw_matrix_bytes(chosen["embedding"], *table) + packed(chosen["head"], *table)
    disk += 0 if graph.tied_embedding else raw_matrix_bytes(chosen["head"], *table)
    for layer in graph.layers:
        precision = chosen[f"layers.{layer.index}"]
        for shape in layer_matrices(graph, layer):
            dense += _on_gpu(shape)
            disk += packed(precision, *shape) + raw_matrix_bytes(precision, *shape)
    most = max((layer.routing.experts for layer in graph.layers if layer.routing), default=0)
    sizes, cycle = np.zeros((len(graph.layers), most), dtype=np.int64), 0.0
    for place, layer in enumerate(graph.layers):
        shapes = [(2 * layer.expert_dim, graph.hidden_dim), (graph.hidden_dim, layer.expert_dim)]
        for expert, use in enumerate(uses_of(ground, place, layer)):
            precision = chosen[f"layers.{layer.index}.experts.{expert}"]
            sizes[place, expert] = _file_pages(precision, shapes)
            cycle += use * float(sizes[place, expert])
            gate_up, down = (packed(precision, *shape) for shape in shapes)
            disk += math.ceil((math.ceil(gate_up / 64) * 64 + down) / _PAGE) * _PAGE
            disk += sum(raw_matrix_bytes(precision, *shape) for shape in shapes)
    losses = {(one.unit, one.precision): max(0.0, one.kl) for one in ground.calibration.losses}
    division, serving = _asked(gpu)
    return GpuRecount(
        kl=sum(losses.get((unit, precision), 0.0) for unit, precision in chosen.items()),
        dense_bytes=dense,
        embedding_bytes=raw_matrix_bytes(chosen["embedding"], *table),
        experts_bytes=int(sizes.sum()),
        cycle_bytes=round(cycle),
        disk_bytes=disk,
        sizes=sizes,
        point=ground.device.point(sizes, division, serving),
    )


def _on_gpu(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1] * _BFLOAT_BYTES + shape[0] * _SCALE_BYTES


def _file_pages(precision: Precision, shapes: list[tuple[int, int]]) -> int:
    """Return the bytes of an expert's file in whole pages: a front, then pieces that start at multiples of 128."""
    size = 1024
    for rows, columns in shapes:
        codes = rows * columns * precision.bits // 8
        pieces = [codes, raw_matrix_bytes(precision, rows, columns) - codes]
        if precision is Precision.INT4_GROUP32 and columns == 32:
            pieces.append(4 * rows)
        size += sum(math.ceil(piece / 128) * 128 for piece in pieces)
    return math.ceil(size / _PAGE) * _PAGE


def _asked(gpu: GpuPlacement) -> tuple[Division, Serving]:
    """Return the plan's placement as the virtual device takes it."""
    division = Division(gpu.vram_cache_bytes, gpu.ram_cache_bytes, gpu.exclusive)
    return division, Serving(gpu.placement, gpu.policy, gpu.rule)


def _differences(plan: DecoderPlan, gpu: GpuPlacement, ground: GpuGround, counted: GpuRecount) -> Iterator[str]:
    said, held, host = plan.predicted, gpu.memory, plan.predicted.memory
    attention = ground.calibration.graph.attention
    width = attention.kv_heads * (attention.head_dim + attention.value_dim)
    landing = 0 if gpu.ram_cache_bytes else 4 * int(counted.sizes.max(initial=0))
    buffers = ground.activations_bytes(plan.prefill_chunk_tokens) + landing
    pairs: list[tuple[str, float, float]] = [
        ("KL", said.kl, counted.kl),
        ("dense bytes on the GPU", held.dense_bytes, counted.dense_bytes),
        ("bytes of experts on the GPU", held.arena_bytes, gpu.vram_cache_bytes),
        (
            "bytes of keys and values",
            held.kv_bytes,
            len(ground.calibration.graph.layers) * width * plan.context_tokens * _BFLOAT_BYTES,
        ),
        ("bytes of the driver", held.context_bytes, _DRIVER_BYTES),
        ("bytes of the embedding", host.dense_bytes, counted.embedding_bytes),
        ("bytes of experts in RAM", host.cache_bytes, gpu.ram_cache_bytes),
        ("cache bytes", plan.cache_bytes, gpu.ram_cache_bytes),
        ("bytes of the processor's buffers", host.activations_bytes, buffers),
        ("bytes of the process", host.runtime_bytes, ground.rates.runtime_bytes + _PYTORCH_BYTES),
        ("disk bytes", said.disk_bytes, counted.disk_bytes),
        ("cycle bytes", plan.cycle_bytes, counted.cycle_bytes),
        ("seconds per token", said.token_s.value, counted.point.token_s),
        ("hit rate", said.hit_rate, counted.point.hit_rate),
        ("bytes read from flash", gpu.flash_bytes, counted.point.flash_bytes),
        ("bytes per token", said.bytes_per_token, gpu.flash_bytes),
        ("bytes copied", gpu.upload_bytes, counted.point.upload_bytes),
        ("bytes copied ahead", gpu.ahead_bytes, counted.point.ahead_bytes),
    ]
    for name, claimed, found in pairs:
        whole = isinstance(claimed, int) and isinstance(found, int)
        allowed = (1 if name == "cycle bytes" else 0) if whole else _RELATIVE * abs(found) + 1e-12
        if abs(claimed - found) > allowed:
            yield f"{name}: {claimed:.9g} is claimed, {found:.9g} counted"
    needed = _working_bytes(ground.calibration.graph, plan, counted)
    if held.activations_bytes < needed:
        yield f"activations on the GPU: {held.activations_bytes} is claimed, at least {needed} needed"
    for name, interval in (("token", said.token_s), ("first token", said.first_token_s)):
        if not interval.low <= interval.value <= interval.high:
            yield f"interval of the {name}: {interval.value:.6g} lies outside {interval.low:.6g} to {interval.high:.6g}"
    if said.bound_token_s > said.token_s.value * (1 + _RELATIVE):
        yield f"bound of the token: {said.bound_token_s:.6g} s exceeds the prediction of {said.token_s.value:.6g} s"


def _working_bytes(graph: DecoderGraph, plan: DecoderPlan, counted: GpuRecount) -> int:
    """Return bytes that a prompt's pass cannot do without: rows, scores, logits, and restored experts."""
    attention, chunk = graph.attention, plan.prefill_chunk_tokens
    rows = chunk * (graph.hidden_dim + graph.vocabulary + attention.heads * plan.context_tokens)
    routed = [layer for layer in graph.layers if layer.routing]
    numbers = max((3 * graph.hidden_dim * layer.expert_dim for layer in routed), default=0)
    top_k = max((layer.routing.top_k for layer in routed if layer.routing), default=0)
    return 4 * rows + min(8, top_k) * (_BFLOAT_BYTES * numbers + int(counted.sizes.max(initial=0)))


def _placement_faults(plan: DecoderPlan, gpu: GpuPlacement, counted: GpuRecount) -> Iterator[str]:
    total, largest = counted.experts_bytes, int(counted.sizes.max(initial=0))
    vram, ram = gpu.vram_cache_bytes, gpu.ram_cache_bytes
    if (plan.verdict == "fits") != (gpu.placement == "resident") or (plan.verdict == "fits") != (vram >= total):
        yield f"verdict {plan.verdict}, placement {gpu.placement} and {vram} of {total} bytes on the GPU contradict"
    if vram < largest:
        yield f"{vram} bytes on the GPU do not hold the largest expert of {largest}"
    if ram and not gpu.exclusive and ram < min(total, vram + largest):
        yield f"{ram} bytes of RAM hold no copies of the GPU's {vram} and one expert more"
    if ram and ram < largest:
        yield f"{ram} bytes of RAM do not hold the largest expert of {largest}"
    if gpu.one_memory and ram:
        yield f"one memory for CPU and GPU, and yet {ram} bytes of it are a tier of their own"
    if gpu.one_memory != bool(gpu.profile.unified_memory):
        yield "whether there is one memory for CPU and GPU contradicts the machine's profile"
    if (gpu.policy == "static") != bool(gpu.order):
        yield f"policy {gpu.policy} and a list of {len(gpu.order)} experts contradict"
    strange = [key for key in gpu.order if not _exists(key, counted)]
    if strange or len(set(gpu.order)) < len(gpu.order):
        yield f"the list of experts names {strange[:3] or 'one twice'}"
    slower = [one for one in gpu.trials if one.token_s < plan.predicted.token_s.value * (1 - _RELATIVE)]
    if slower and plan.budget.minimize == "latency" and plan.budget.first_token_s is None:
        yield f"{slower[0].placement} ({slower[0].policy}) was quicker, {slower[0].token_s:.6g} s, and is not planned"
    if gpu.placement not in {one.placement for one in gpu.trials}:
        yield f"placement {gpu.placement} is none of those tried"
    if gpu.tried < len(gpu.trials):
        yield f"{len(gpu.trials)} ways were tried, but only {gpu.tried} runs made"


def _exists(key: tuple[int, int], counted: GpuRecount) -> bool:
    layers, experts = counted.sizes.shape
    return 0 <= key[0] < layers and 0 <= key[1] < experts and int(counted.sizes[key]) > 0


def _broken(plan: DecoderPlan, gpu: GpuPlacement) -> Iterator[str]:
    said, budget = plan.predicted, plan.budget
    held = said.memory.total_bytes + (gpu.memory.total_bytes if gpu.one_memory else 0)
    rows = (
        ("vram", budget.vram_bytes, gpu.memory.total_bytes),
        ("memory", budget.memory_bytes, held),
        ("time per token", budget.token_s, said.token_s.value),
        ("time to first token", budget.first_token_s, said.first_token_s.value),
        ("disk", budget.disk_bytes, said.disk_bytes),
        ("max KL", budget.kl_limit, said.kl),
    )
    for name, most, value in rows:
        rounding = 0.0 if isinstance(value, int) or most is None else 1e-9 * abs(most) + 1e-12
        if most is not None and value > most + rounding:
            yield f"{name} is limited to {most:.9g}, and the plan takes {value:.9g}"
    if budget.vram_bytes is None:
        yield "there is no limit on the GPU's memory"


def _contradictions(plan: DecoderPlan, gpu: GpuPlacement) -> Iterator[str]:
    figures = [one.read_bytes_per_s for one in gpu.profile.tiers]
    figures += [one.bytes_per_s for one in gpu.profile.links]
    figures += [one.bytes_per_s for one in gpu.profile.storage]
    figures += [one.ops_per_s for one in gpu.profile.compute]
    known = {one.origin for one in figures if one is not None}
    if gpu.origin == "measured" and known != {"measured"}:
        yield "its figures are said to be measured, and some are of a data sheet"
    proof = plan.proof
    if proof is None:
        return
    said = plan.predicted
    if proof.status != "feasible":
        yield f"the proof says {proof.status}; a plan by virtual time is the best of those tried and no more"
    if plan.budget.minimize != "memory":
        value = {"latency": said.token_s.value, "kl": said.kl}[plan.budget.minimize]
        if abs(proof.objective - value) > _RELATIVE * abs(value) + 1e-12:
            yield f"the proof's objective {proof.objective:.9g} is not the plan's {value:.9g}"
    if proof.bound > proof.objective * (1 + _RELATIVE) + 1e-12:
        yield f"the proof's bound {proof.bound:.9g} exceeds its objective {proof.objective:.9g}"
    gap = max(0.0, proof.objective - proof.bound) / max(abs(proof.objective), 1e-12)
    if abs(gap - proof.gap) > _RELATIVE:
        yield f"the proof's gap {proof.gap:.6g} is not {gap:.6g}"
