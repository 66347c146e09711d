"""The planner's door for machines with a GPU: bits, placement, policy, bytes of both memories and chunk, together.

Costs in bits are those of ``decoder_costs``, bytes those of ``decoder_gpu_memory``, the search is
``decoder_gpu_search``; time comes from runs of the recorded trace in virtual time, which the caller hands in.
``decoder_gpu_audit`` recounts what comes out of here and shares no code with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeflex.errors import InfeasibleError, InputError
from edgeflex.plans import decoder_costs as costs
from edgeflex.plans.decoder_device import Division
from edgeflex.plans.decoder_gpu_memory import Holdings, device_space
from edgeflex.plans.decoder_gpu_search import RESIDENT, GpuSearch, crossing, mixes_of
from edgeflex.plans.decoder_mixes import make_mix
from edgeflex.plans.decoder_verdict import DeclinedError
from edgeflex.schema import Choice, Proof
from edgeflex.schema_gpu import GpuPlacement, PlacementTrial
from edgeflex.schema_moe import DECODER_PRECISIONS, DecoderPlan, DecoderPrediction
from edgeflex.units import format_bytes, format_exact_bytes, format_nats, format_share, format_time

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgeflex.plans.decoder_costs import Floats, PackedBytes, Space
    from edgeflex.plans.decoder_device import DevicePoint, Serving, VirtualDevice
    from edgeflex.plans.decoder_gpu_search import Tried
    from edgeflex.plans.decoder_mixes import Mix
    from edgeflex.schema import DeviceProfile, Precision
    from edgeflex.schema_gpu import PlacementName
    from edgeflex.schema_moe import DecoderBudget, DecoderCalibration, DecoderGraph, DecoderRates

CHUNKS = (16, 32, 64, 128, 256)
_TOLERANCE = 1e-4
_TINY = 1e-12
_PLACES: dict[PlacementName, str] = {
    "resident": "every expert stays on the GPU",
    "static": "a fixed list of the most used experts on the GPU, others copied for an event or left to the processor",
    "cpu": "a fixed list of the most used experts on the GPU, the processor computes all others",
    "cache": "experts come to the GPU and go",
}


@dataclass(frozen=True)
class Machine:
    """The machine that is planned for.

    Attributes:
        profile: Its figures, each with its origin.
        device: Runs the trace on them.
        gpu_bytes_per_s: Rate of the GPU's memory, for pricing precisions.
        link_bytes_per_s: Rate at which misses are brought, likewise.
        one_memory: Whether CPU and GPU share one memory.
        threads: Of the processor.
        order: (layer, expert), the most used first.
        assumptions: What the figures rest on, as sentences.
        given_link_bytes_per_s: Rate that the user gave instead of the profile's.
        given_ram_bytes_per_s: Likewise.
    """

    profile: DeviceProfile
    device: VirtualDevice
    gpu_bytes_per_s: float
    link_bytes_per_s: float
    one_memory: bool
    threads: int
    order: Sequence[tuple[int, int]]
    assumptions: tuple[str, ...]
    given_link_bytes_per_s: float | None = None
    given_ram_bytes_per_s: float | None = None


def plan_on_gpu(
    calibration: DecoderCalibration,
    rates: DecoderRates,
    budget: DecoderBudget,
    machine: Machine,
    *,
    packed_bytes: PackedBytes,
    uses: Floats | None = None,
    chunks: Sequence[int] = CHUNKS,
    precisions: Sequence[Precision] = DECODER_PRECISIONS,
    clock: Callable[[], float] = time.perf_counter,
) -> DecoderPlan:
    """Return the best plan of those tried that keeps every limit of ``budget`` on a machine with a GPU.

    Args:
        calibration: KL of every unit and precision, and the graph.
        rates: Of the computer that calibrated.
        budget: Limits, ``vram_bytes`` among them, and what is to be least.
        machine: What it is planned for.
        packed_bytes: Bytes of one matrix as the processor's kernels want it; they lie in the bundle's folder.
        uses: Share of decoded tokens that use each expert, [layers, experts].
        chunks: Tokens per prefill step to choose among.
        precisions: Options to consider.
        clock: Gives seconds; only differences count.

    Raises:
        InputError: Settings contradict the graph.
        InfeasibleError: No plan keeps every limit; ``DeclinedError`` where bringing experts is what is too slow.
    """
    began = clock()
    graph = calibration.graph
    _refuse(graph, budget)
    plain = costs.build_space(calibration, rates, packed_bytes, uses=uses, precisions=precisions)
    space = device_space(plain, gpu_bytes_per_s=machine.gpu_bytes_per_s, link_bytes_per_s=machine.link_bytes_per_s)
    search = GpuSearch(
        Holdings(space, budget.context_tokens, rates.runtime_bytes),
        machine.device,
        budget,
        _useful(chunks, budget.prompt_tokens),
        one_memory=machine.one_memory,
    )
    found = search.best()
    if found is None:
        raise explain_gpu(search)
    made = _Made(machine, search, found)
    return made.plan(lambda: clock() - began)


def _useful(chunks: Sequence[int], prompt_tokens: int) -> tuple[int, ...]:
    """Return the chunks up to the first that holds the whole prompt, ascending."""
    ordered = sorted(set(chunks))
    whole = next((one for one in ordered if one >= prompt_tokens), ordered[-1])
    return tuple(one for one in ordered if one <= whole)


def _refuse(graph: DecoderGraph, budget: DecoderBudget) -> None:
    limits = (
        ("vram", budget.vram_bytes),
        ("memory", budget.memory_bytes),
        ("time per token", budget.token_s),
        ("time to first token", budget.first_token_s),
        ("disk", budget.disk_bytes),
    )
    faults = [f"{name} of {value:g} must be above zero" for name, value in limits if value is not None and value <= 0]
    if budget.vram_bytes is None:
        faults.append("no limit on the GPU's memory; give one")
    if not 0 < budget.prompt_tokens < budget.context_tokens:
        faults.append(f"a prompt of {budget.prompt_tokens} tokens leaves no answer in {budget.context_tokens}")
    if budget.context_tokens > graph.context_tokens:
        faults.append(f"a context of {budget.context_tokens} tokens; {graph.name!r} knows {graph.context_tokens}")
    if not any(layer.routing for layer in graph.layers):
        faults.append(f"{graph.name!r} has no experts to place")
    if faults:
        raise InputError.collect("decoder plan request", faults)


@dataclass(frozen=True)
class _Made:
    """The plan of what was found."""

    machine: Machine
    search: GpuSearch
    found: Tried

    def plan(self, wall_s: Callable[[], float]) -> DecoderPlan:
        search, found, budget = self.search, self.found, self.search.budget
        chunk = search.chunk_for(found) or found.chunk_tokens
        predicted = self._predicted(chunk)
        trials = search.trials(found)
        crossed = self._crossing()
        fits = found.serving is RESIDENT
        return DecoderPlan(
            graph_digest=search.holdings.graph.digest(),
            budget=budget,
            verdict="fits" if fits else "offload",
            reasons=tuple(self._reasons(predicted, trials, crossed)),
            choices=_choices(search.holdings.space, found.mix),
            cache_bytes=found.division.ram_bytes,
            cycle_bytes=found.mix.cycle_bytes,
            threads=self.machine.threads,
            context_tokens=budget.context_tokens,
            prefill_chunk_tokens=chunk,
            predicted=predicted,
            proof=self._proof(predicted, wall_s),
            gpu=self._placement(chunk, trials, crossed),
        )

    def _predicted(self, chunk: int) -> DecoderPrediction:
        found, device = self.found, self.machine.device
        sizes, division = found.mix.sizes, found.division
        bound = device.bound(sizes, division)
        return DecoderPrediction(
            token_s=device.interval(sizes, division, found.serving),
            first_token_s=self.search.first_token(found, chunk),
            memory=self.search.memories(found.mix, division, chunk)[1],
            disk_bytes=found.mix.disk_bytes,
            kl=found.mix.kl,
            hit_rate=found.point.hit_rate,
            bytes_per_token=found.point.flash_bytes,
            belady_hit_rate=bound.hit_rate,
            bound_token_s=min(bound.token_s, found.point.token_s),
        )

    def _crossing(self) -> float | None:
        """Return the crossing of the fixed list, where there is one to be found."""
        found = self.found
        if self.machine.one_memory or found.serving is RESIDENT:
            return None
        return crossing(self.machine.device, found.mix.sizes, found.mix.experts_bytes)

    def _placement(self, chunk: int, trials: Mapping[Serving, DevicePoint], crossed: float | None) -> GpuPlacement:
        machine, found = self.machine, self.found
        listed = found.serving.policy == "static"
        return GpuPlacement(
            device=machine.profile.name,
            origin=origin_of(machine.profile),
            profile=machine.profile,
            given_link_bytes_per_s=machine.given_link_bytes_per_s,
            given_ram_bytes_per_s=machine.given_ram_bytes_per_s,
            placement=found.serving.placement,
            policy=found.serving.policy,
            rule=found.serving.rule,
            vram_cache_bytes=found.division.vram_bytes,
            ram_cache_bytes=found.division.ram_bytes,
            exclusive=found.division.exclusive,
            one_memory=machine.one_memory,
            memory=self.search.memories(found.mix, found.division, chunk)[0],
            order=tuple(machine.order) if listed else (),
            upload_bytes=found.point.upload_bytes,
            ahead_bytes=found.point.ahead_bytes,
            flash_bytes=found.point.flash_bytes,
            waited=dict(found.point.waited),
            trials=tuple(
                PlacementTrial(
                    placement=one.placement,
                    policy=one.policy,
                    exclusive=found.division.exclusive,
                    token_s=point.token_s,
                )
                for one, point in trials.items()
            ),
            tried=len(self.search.runs),
            crossing=crossed,
            assumptions=machine.assumptions,
        )

    # --- why ---------------------------------------------------------------------------------------------

    def _reasons(
        self, predicted: DecoderPrediction, trials: Mapping[Serving, DevicePoint], crossed: float | None
    ) -> list[str]:
        mix, division, serving = self.found.mix, self.found.division, self.found.serving
        total = mix.experts_bytes
        held = f"experts take {format_bytes(total)}; the GPU holds {format_bytes(division.vram_bytes)}"
        reasons = [f"{held} of them ({format_share(division.vram_bytes / max(1, total), 0)}){self._below()}"]
        if self.machine.one_memory:
            reasons.append(
                f"{self.machine.profile.title} has one memory for CPU and GPU: a copy of an expert in RAM would take "
                "the same bytes twice, so offloading to RAM gains nothing and one tier is planned above the flash"
            )
        if serving is not RESIDENT:
            seconds = {f"{one.placement} ({one.policy})": point.token_s for one, point in trials.items()}
            rows = ", ".join(f"{name} {format_time(value)}" for name, value in sorted(seconds.items(), key=_second))
            reasons.append(
                f"{_PLACES[serving.placement]}: the quickest of those tried at this budget ({rows} per token)"
            )
            if crossed is not None:
                reasons.append(
                    f"on this trace a fixed list is as quick or quicker from {format_share(crossed, 0)} of the experts "
                    "on the GPU on, below that a cache"
                )
        else:
            reasons.append("every expert is read once; after that nothing is copied or read while decoding")
            other = self.search.passed_over
            if other is not None:
                policy = "" if other.serving.policy == other.serving.placement else f" with {other.serving.policy}"
                reasons.append(
                    f"the placement {other.serving.placement}{policy} would take "
                    f"{format_time(other.point.token_s)}, quicker by less than the figures can tell, and is passed over"
                )
        share = format_share(predicted.bound_token_s / max(predicted.token_s.value, _TINY), 0)
        reasons.append(
            f"no cache and no scheduler needs less than {format_time(predicted.bound_token_s)} a token with these "
            f"memories; the plan reaches {share} of that speed"
        )
        every = "all" if self.search.exhaustive and self.search.budget.minimize == "latency" else "the likeliest"
        reasons.append(f"best of {len(self.search.runs)} settings run in virtual time, {every} of the grid")
        return [*reasons, self._said_of_figures()]

    def _below(self) -> str:
        division, total = self.found.division, self.found.mix.experts_bytes
        if division.vram_bytes >= total:
            return ""
        if not division.ram_bytes:
            return ", the others are read from flash"
        kind = "none of those that the GPU has" if division.exclusive else "copies of those that the GPU has too"
        if division.ram_bytes >= total:
            return ", RAM holds all"
        return f", RAM {format_bytes(division.ram_bytes)} ({kind}), the others are read from flash"

    def _said_of_figures(self) -> str:
        profile = self.machine.profile
        if origin_of(profile) == "measured":
            return f"every rate of {profile.title} was measured; the run itself is virtual"
        return (
            f"rates of {profile.title} come from data sheets at least in part: nothing was measured on it, and the "
            "range is wide for that"
        )

    # --- proof -------------------------------------------------------------------------------------------

    def _proof(self, predicted: DecoderPrediction, wall_s: Callable[[], float]) -> Proof:
        goal = self.search.budget.minimize
        held = (
            predicted.memory.total_bytes
            + self.search.memories(self.found.mix, self.found.division, self.search.chunks[0])[0].total_bytes
        )
        value = {"latency": predicted.token_s.value, "kl": self.found.mix.kl, "memory": float(held)}[goal]
        bound = min(value, self._bound(predicted))
        minimize: Literal["latency", "memory", "drop"] = "latency"
        if goal != "latency":
            minimize = "memory" if goal == "memory" else "drop"
        return Proof(
            solver=f"mixes by prices, then {len(self.search.runs)} runs of the trace in virtual time",
            status="feasible",
            minimize=minimize,
            objective=value,
            bound=bound,
            gap=max(0.0, value - bound) / max(abs(value), _TINY),
            tolerance=_TOLERANCE,
            wall_s=wall_s(),
            scenarios=len(self.search.runs),
            scenarios_solved=len(self.search.runs),
        )

    def _bound(self, predicted: DecoderPrediction) -> float:
        """Return what no plan goes below: the smallest experts with the largest memories, or the least of each unit."""
        search = self.search
        space = search.holdings.space
        least = smallest_mix(space)
        if search.budget.minimize == "kl":
            return float(np.where(np.isfinite(space.kl), space.kl, np.inf).min(axis=1).sum())
        if search.budget.minimize == "memory":
            return float(min(sum(_least_memories(search, mix)) for mix in mixes_of(space, search.budget.kl_limit)))
        if (least.sizes == self.found.mix.sizes).all():
            roomiest = search.divisions(least)
            if roomiest and roomiest[0] == self.found.division:
                return predicted.bound_token_s
        best = max(search.divisions(least), key=lambda one: (one.vram_bytes, one.ram_bytes), default=None)
        return predicted.bound_token_s if best is None else self.machine.device.bound(least.sizes, best).token_s


def _second(row: tuple[str, float]) -> float:
    return row[1]


def origin_of(profile: DeviceProfile) -> Literal["measured", "datasheet"]:
    """Return ``measured`` where every rate of a profile that plans look at is."""
    figures = [spec.read_bytes_per_s for spec in profile.tiers if spec.read_bytes_per_s is not None]
    figures += [*(one.bytes_per_s for one in profile.links), *(one.bytes_per_s for one in profile.storage)]
    figures += [one.ops_per_s for one in profile.compute]
    return "measured" if figures and all(one.origin == "measured" for one in figures) else "datasheet"


def _choices(space: Space, mix: Mix) -> tuple[Choice, ...]:
    return tuple(
        Choice(subject=unit, option=space.options[column].value)
        for pick, column in zip(space.picks, mix.columns.tolist(), strict=True)
        for unit in pick.units
    )


def smallest_mix(space: Space) -> Mix:
    """Return the mix of the fewest bytes of experts, elsewhere of the least KL."""
    kl = np.where(np.isfinite(space.kl), space.kl, np.inf)
    sizes = np.where(np.isfinite(space.kl), space.expert_bytes.astype(np.float64), np.inf)
    columns = np.where(space.is_expert, sizes.argmin(axis=1), kl.argmin(axis=1))
    return make_mix(space, columns)


# --- why nothing fits --------------------------------------------------------------------------------------


def _least_memories(search: GpuSearch, mix: Mix) -> tuple[int, int]:
    """Return the least bytes of the GPU and of the process with this mix: room for one expert in each, at most."""
    largest = int(mix.sizes.max(initial=0))
    gpu = search.holdings.gpu(largest, search.chunks[0]).total_bytes
    # a RAM tier of one expert takes less than the places where reads land without any
    tiers = (0,) if search.one_memory else (0, largest)
    host = min(search.holdings.host(mix, ram, search.chunks[0]).total_bytes for ram in tiers)
    return gpu, host + (gpu if search.one_memory else 0)


def explain_gpu(search: GpuSearch) -> InfeasibleError:
    """Return the error that says which limit is in the way, with the least that can be reached."""
    budget, space = search.budget, search.holdings.space
    mixes = mixes_of(space, budget.kl_limit) or [smallest_mix(space)]
    gpu, host = (min(sizes) for sizes in zip(*(_least_memories(search, one) for one in mixes), strict=True))
    disk = min(one.disk_bytes for one in mixes)
    kl = float(np.where(np.isfinite(space.kl), space.kl, np.inf).min(axis=1).sum())
    rows: list[tuple[str, float | None, float]] = [
        ("vram", budget.vram_bytes, gpu),
        ("memory", budget.memory_bytes, host),
        ("disk", budget.disk_bytes, disk),
        ("max KL", budget.kl_limit, kl),
    ]
    short = [(name, limit, least) for name, limit, least in rows if limit is not None and least > limit]
    if short:
        return _short(search, short)
    return _late(search)


def _short(search: GpuSearch, short: Sequence[tuple[str, float, float]]) -> InfeasibleError:
    parts = search.holdings.gpu(0, search.chunks[0])
    said = "; ".join(
        f"{name} is limited to {_show(name, limit)}, least {_show(name, least, up=True)}"
        for name, limit, least in short
    )
    names = " and ".join(name for name, _, _ in short)
    relaxation = " and ".join(f"{name} to {_show(name, least, up=True)}" for name, _, least in short)
    return InfeasibleError(
        f"no plan meets {names}: {said}. On the GPU the dense part takes {format_bytes(parts.dense_bytes)}, keys and "
        f"values {format_bytes(parts.kv_bytes)}, activations {format_bytes(parts.activations_bytes)}, the driver's "
        f"context and libraries {format_bytes(parts.context_bytes)}, and one expert must fit beside. "
        f"Raise {relaxation}.",
        binding=[name for name, _, _ in short],
        least={name: least for name, _, least in short},
        relaxation=f"Raise {relaxation}.",
    )


def _late(search: GpuSearch) -> InfeasibleError:
    """Return the error of memories that suffice and times that do not."""
    quickest, budget = search.quickest, search.budget
    if quickest is None:
        return InfeasibleError(
            "no plan meets vram, memory, disk and max KL together. Raise one of them.",
            binding=["vram", "memory", "disk", "max KL"],
            relaxation="Raise one of them.",
        )
    limit = budget.token_s
    if limit is None or quickest.point.token_s <= limit:
        chunks = [one for one in search.chunks if search.fits(quickest.mix, quickest.division, one)]
        least = min(search.first_token(quickest, one).value for one in chunks)
        return _too_slow("time to first token", budget.first_token_s or 0.0, least, search, quickest)
    return _too_slow("time per token", limit, quickest.point.token_s, search, quickest)


def _too_slow(name: str, limit: float, least: float, search: GpuSearch, quickest: Tried) -> InfeasibleError:
    interval = search.device.interval(quickest.mix.sizes, quickest.division, quickest.serving)
    least_time = format_time(least, up=True)
    relaxation = f"Raise {name} from {format_time(limit)} to {least_time}, or give the GPU more memory (--vram)."
    message = (
        f"no plan meets {name}: it is limited to {format_time(limit)}, and the quickest of {len(search.runs)} settings "
        f"run in virtual time takes {least_time}. {relaxation}"
    )
    resident = search.device.estimate_s(quickest.mix.sizes, Division(quickest.mix.experts_bytes, 0))
    if name != "time per token" or quickest.serving is RESIDENT or resident > limit:
        return InfeasibleError(message, binding=[name], least={name: least}, relaxation=relaxation)
    return DeclinedError(
        f"declined: with every expert on the GPU a token would take about {format_time(resident)}, but bringing or "
        f"computing those that are not there is too slow: {format_time(interval.low)} to {format_time(interval.high)}. "
        f"{message[0].upper()}{message[1:]}",
        reason="link",
        cycle_bytes=quickest.mix.cycle_bytes,
        token_s=interval,
        binding=[name],
        least={name: least},
        relaxation=relaxation,
    )


def _show(name: str, value: float, *, up: bool = False) -> str:
    """Return a value with its unit; with ``up`` no less, so that it can be given as a limit."""
    if name == "max KL":
        return f"{format_nats(value, up=up)} nats per token"
    return format_exact_bytes(value)
