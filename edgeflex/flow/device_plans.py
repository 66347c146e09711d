"""Plans of decoders for machines with a GPU, and the figures that they rest on.

A profile says what a machine does; what it does not say is taken from the computer that calibrated, or from a data
sheet, and is then called so. Nothing is measured here, but for the GPU of this machine where none is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeflex.errors import InputError
from edgeflex.files import StrPath, path_of
from edgeflex.flow.decoders import PLANNED, open_decoder_calibration, plan_decoder
from edgeflex.flow.simulated_device import SimulatedDevice, is_upward, of_calibrated_computer
from edgeflex.flow.traces import Replays, packed_bytes
from edgeflex.schema import DeviceProfile, Figure, Link, StorageRead, Tier, TierSpec

if TYPE_CHECKING:
    from pathlib import Path

    from edgeflex.schema_moe import DecoderBudget, DecoderPlan, DecoderRates

_PCIE_BYTES_PER_S = 31.5e9
_PCIE = "PCI Express 4.0 x16: 16 lanes of 16 GT/s at 128b/130b; the profile names no link"


def plan_decoder_on_gpu(
    folder: StrPath,
    budget: DecoderBudget,
    device: DeviceProfile | None = None,
    *,
    link_bytes_per_s: float | None = None,
    ram_bytes_per_s: float | None = None,
) -> DecoderPlan:
    """Return the plan of a decoder for a machine with a GPU, recounted.

    Args:
        folder: The calibration.
        budget: With a limit on the GPU's memory.
        device: The machine, or a card alone, which then stands in the computer that calibrated; None measures this
            machine's GPU.
        link_bytes_per_s: Rate of copies to the GPU as reached, instead of the profile's.
        ram_bytes_per_s: Rate of the processor's memory as reached, instead of the profile's.

    Raises:
        InputError: The calibration is not finished, there is no GPU, or a rate is missing.
        InfeasibleError: No plan keeps the budget.
    """
    from edgeflex.plans import decoder_costs as costs
    from edgeflex.plans.decoder_gpu import plan_on_gpu
    from edgeflex.plans.decoder_gpu_audit import GpuGround, check_gpu_plan

    calibration, rates, routing = open_decoder_calibration(path_of(folder))
    graph = calibration.graph
    profile = completed(device or this_gpu(), rates, link_given=link_bytes_per_s is not None)
    experts = max((one.routing.experts for one in graph.layers if one.routing is not None), default=1)
    uses = routing.uses(len(graph.layers), experts)
    replays = Replays(graph, routing, budget.prompt_tokens)
    simulated = SimulatedDevice(
        graph, rates, profile, replays, uses, budget.prompt_tokens, link_bytes_per_s, ram_bytes_per_s
    )
    machine, packed = simulated.described(), packed_bytes(rates)
    made = plan_on_gpu(calibration, rates, budget, machine, packed_bytes=packed, uses=uses, precisions=PLANNED)
    check_gpu_plan(
        made,
        GpuGround(
            calibration=calibration,
            rates=rates,
            device=simulated,
            packed_bytes=packed,
            uses=uses,
            activations_bytes=lambda chunk: costs.activations_bytes(graph, chunk),
        ),
    )
    return made


def plan_again(folder: Path, planned: DecoderPlan) -> DecoderPlan:
    """Return what planning gives again for a plan's own budget and machine.

    Raises:
        InputError: The calibration is not finished.
        InfeasibleError: No plan keeps the budget any more.
    """
    gpu = planned.gpu
    if gpu is None:
        return plan_decoder(folder, planned.budget)
    return plan_decoder_on_gpu(
        folder,
        planned.budget,
        gpu.profile,
        link_bytes_per_s=gpu.given_link_bytes_per_s,
        ram_bytes_per_s=gpu.given_ram_bytes_per_s,
    )


# --- the machine -------------------------------------------------------------------------------------------


def this_gpu() -> DeviceProfile:
    """Return the GPU of this machine as measured now.

    Raises:
        InputError: There is none that can be measured.
    """
    from edgeflex.profiles import cuda as probe
    from edgeflex.profiles import machine

    problem = probe.cuda_problem()
    facts = None if problem is not None else probe.cuda()
    if facts is None:
        raise InputError(
            f"--vram plans for a GPU, and none can be measured here: {problem or 'PyTorch reaches none'}. Name the "
            "machine to plan for: --device rtx-4090, or --device device.json of `edgeflex profile` there."
        )
    here = machine()
    return DeviceProfile(
        name="this-machine",
        title=f"{facts.name} in this machine",
        origin="measured",
        cpu_model=here.cpu_model,
        cores=here.physical_cores,
        isa=(facts.isa,),
        unified_memory=facts.integrated,
        tiers=(facts.tier,),
        links=facts.links,
        compute=facts.compute,
        overlap=facts.overlap,
    )


def completed(profile: DeviceProfile, rates: DecoderRates, *, link_given: bool = False) -> DeviceProfile:
    """Return a profile with the rates that it lacks and that something else tells, each with its source.

    Args:
        profile: Of a machine, or of a card alone.
        rates: Of the computer that calibrated.
        link_given: Whether the user says how fast copies to the GPU are.
    """
    same = of_calibrated_computer(profile, rates)
    changes: dict[str, Any] = {"kernels": (), "conditions": {}}
    tiers = {spec.tier: spec for spec in profile.tiers}
    host = tiers.get(Tier.HOST)
    if same and (host is None or host.read_bytes_per_s is None):
        read = Figure(
            value=rates.memory_bytes_per_s, origin="measured", source=f"memory of {rates.device}, when it was measured"
        )
        spec = TierSpec(tier=Tier.HOST) if host is None else host
        tiers[Tier.HOST] = spec.model_copy(update={"read_bytes_per_s": read})
        changes["tiers"] = tuple(tiers.values())
    if not (profile.unified_memory or link_given or any(is_upward(one) for one in profile.links)):
        figure = Figure(value=_PCIE_BYTES_PER_S, origin="datasheet", source=_PCIE)
        link = Link(source=Tier.HOST, target=Tier.DEVICE, pinned=True, bytes_per_s=figure)
        changes["links"] = (*profile.links, link)
    flash = tiers.get(Tier.FLASH)
    if not profile.storage and (flash is None or flash.read_bytes_per_s is None):
        # another computer's disk is not this one's: its rate is taken as a data sheet's, with as wide a range
        source = f"disk of {rates.device}, when it was measured" + ("" if same else "; it stands in for this machine's")
        figure = Figure(value=rates.read_bytes_per_s, origin="measured" if same else "datasheet", source=source)
        changes["storage"] = (
            StorageRead(pattern="random", block_bytes=1 << 20, queue_depth=8, direct=True, bytes_per_s=figure),
        )
    return profile.model_copy(update=changes)
