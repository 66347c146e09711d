"""The deciding part of the corridor: from a calibration folder and a budget to a plan. Nothing is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from edgeflex.errors import InfeasibleError, InputError
from edgeflex.files import StrPath, path_of, read_bytes
from edgeflex.schema import (
    Budget,
    Candidates,
    CostTable,
    Curve,
    CurvePoint,
    DeviceProfile,
    MemoryBreakdown,
    ModelGraph,
    Plan,
    Scenario,
    Solution,
    Tier,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.costs.store import Calibration
    from edgeflex.plans.choose import Pick


def parse_calibrated(kind: Any, folder: Path, name: str) -> Any:
    """Return the document ``name`` of a calibration.

    Raises:
        InputError: It is missing or not of its kind; the message says how to get one that is.
    """
    try:
        return kind.parse(read_bytes(folder / name, "calibration file"), str(folder / name))
    except InputError as error:
        raise InputError(
            f"the calibration in {str(folder)!r} is damaged, or of another version of edgeflex. Run the same edgeflex "
            f"calibrate again, with --overwrite if that is refused. {error}"
        ) from None


def open_calibration(folder: StrPath) -> tuple[Calibration, ModelGraph, DeviceProfile, CostTable, Candidates]:
    """Return a finished calibration and its documents."""
    from edgeflex.costs.store import Calibration

    folder = path_of(folder)
    opened = Calibration.open(folder)
    if not opened.has("candidates.json"):
        raise InputError(f"the calibration in {str(folder)!r} is not finished. Run the same edgeflex calibrate again.")

    def document(kind: Any, name: str) -> Any:
        return parse_calibrated(kind, folder, name)

    graph, device = document(ModelGraph, "graph.json"), document(DeviceProfile, "device.json")
    table, candidates = document(CostTable, "table.json"), document(Candidates, "candidates.json")
    made_from = (table.graph_digest, table.device_digest, candidates.table_digest)
    if made_from != (graph.digest(), device.digest(), table.digest()):
        raise InputError(
            f"the calibration in {str(folder)!r} was begun again and is not finished. Run the same edgeflex "
            "calibrate again."
        )
    return opened, graph, device, table, candidates


def solve_table(table_file: StrPath, budget: Budget) -> Solution:
    """Solve a saved cost table by itself and recount the answer."""
    from edgeflex.plans import check, solve

    table = CostTable.parse(read_bytes(path_of(table_file), "cost table"), str(table_file))
    solution = solve(table, budget)
    check(table, budget, solution)
    return solution


def _bare(device: DeviceProfile) -> str:
    """Return a profile's identity without its kernels: calibration adds those of its model."""
    return device.model_copy(update={"kernels": ()}).digest()


def plan(calibration_folder: StrPath, budget: Budget, *, device: DeviceProfile | None = None) -> Plan:
    """Return the certified plan for a budget; nothing is measured."""
    from edgeflex.costs import assemble
    from edgeflex.costs.latency import plan_notes
    from edgeflex.plans import choose, solve
    from edgeflex.plans.audit import check, check_plan
    from edgeflex.registry import EXPORTERS, capabilities_for

    folder, graph, own, table, candidates = open_calibration(calibration_folder)
    threads, samples = folder.meta.threads, len(folder.part("choose"))
    if device is not None and _bare(device) != _bare(own):
        capabilities = capabilities_for(EXPORTERS, folder.meta.backend, own, device)
        table, candidates = assemble.assemble(folder, graph, device, capabilities, threads=threads, here=False)
    chosen = choose.pick(table, candidates.candidates, budget, samples=samples)
    notes: list[str] = []
    try:
        solution = solve(table, budget)
        check(table, budget, solution)
    except InfeasibleError:
        if chosen is None:
            # what ships was measured, so that what measured plans need is the answer, not what the table reckons
            raise choose.explain(table, candidates.candidates, budget, samples=samples) from None
        notes.append(
            "the table's own estimate finds no plan here; what ships was measured, and the bound leaves it out"
        )
        free: dict[str, Any] = {"memory_bytes": {}, "latency": (), "disk_bytes": None, "max_drop": None}
        solution = solve(table, budget.model_copy(update=free))
    if chosen is None:
        hint = "Or calibrate with more --mixes: by its estimate, the table knows a plan that fits."
        raise choose.explain(table, candidates.candidates, budget, samples=samples, hint=hint)
    used = assemble.mix_of(chosen.candidate.choices).values()
    notes += plan_notes(device or own, folder.meta.backend, used)
    chosen = _with_safety(chosen, folder, budget, candidates)
    scenario, certificate = choose.certified(chosen, budget, _paired_losses(folder, chosen.candidate.mix))
    made = _plan_document(chosen, scenario, budget, graph, solution, candidates, folder)
    made = made.model_copy(
        update={
            "certificate": certificate,
            "notes": (*made.notes, *notes),
            "threads": threads,
            "memory_of": memory_of(device or own, folder.meta.backend),
        }
    )
    check_plan(chosen.table, made)
    return made


def memory_of(device: DeviceProfile, backend: str) -> Literal["gpu", "shared"] | None:
    """Return which memory a plan's bytes are of; see ``Plan.memory_of``.

    Args:
        device: What is planned for.
        backend: What runs the plan.
    """
    from edgeflex.registry import GPU_BACKENDS

    if backend not in GPU_BACKENDS or device.unified_memory is None:
        return None
    return "shared" if device.unified_memory else "gpu"


def require_own(planned: Plan, calibration_folder: Path, *, device: DeviceProfile | None = None) -> None:
    """Refuse a plan that planning again from the same calibration and budget does not give.

    Raises:
        InputError: The file was changed by hand, or belongs to another calibration or device.
    """
    again = plan(calibration_folder, planned.budget, device=device)
    if planned.device_digest != again.device_digest:
        raise InputError(
            f"the plan is for device {planned.device_digest[:12]}, this is {again.device_digest[:12]}. "
            "Pass the --device it was planned with, or plan again."
        )
    # all but the proof, which tells how long the search took and may have ended by the clock
    kept = [name for name in Plan.model_fields if name != "proof"]
    changed = [name for name in kept if getattr(again, name) != getattr(planned, name)]
    if changed:
        raise InputError(
            f"planning again gives another {', '.join(changed)} than the plan's. It was changed, or the calibration "
            "was; run edgeflex plan again."
        )


def _with_safety(chosen: Pick, folder: Calibration, budget: Budget, candidates: Candidates) -> Pick:
    """Return the pick with a path of ever more careful thresholds before it, judged on the choosing images."""
    from edgeflex.costs.policies import exit_outputs, judge, safety_path
    from edgeflex.costs.table import scenario_of
    from edgeflex.plans import choose

    outputs = exit_outputs(folder.mix(chosen.candidate.mix).choose, folder.labels("choose"))
    block_s = chosen.costs.block_latency_s
    path = [
        scenario_of(judge(outputs, thresholds, block_s), 1.0 - candidates.reference_accuracy, f"careful {index}")
        for index, thresholds in enumerate(safety_path(chosen.chain[0].thresholds[:-1]))
    ]
    return choose.lengthened(chosen, path, budget, samples=len(folder.part("choose")))


def _paired_losses(folder: Calibration, mix: str) -> Callable[[Sequence[Scenario]], NDArray[np.float64]]:
    """Return the losses [scenarios, samples] of a mix against full-depth fp32, on the certify images."""
    from edgeflex.costs.policies import exit_outputs, paired_losses
    from edgeflex.costs.store import mix_digest

    labels = folder.labels("certify")
    outputs = exit_outputs(folder.mix(mix).certify, labels)
    reference = exit_outputs(folder.mix(mix_digest({})).certify, labels)
    return lambda scenarios: paired_losses(outputs, reference, [one.thresholds[:-1] for one in scenarios])


def _plan_document(
    chosen: Pick,
    scenario: Scenario,
    budget: Budget,
    graph: ModelGraph,
    solution: Solution,
    candidates: Candidates,
    folder: Calibration,
) -> Plan:
    from edgeflex.plans import choose
    from edgeflex.plans.audit import footprint

    table = chosen.table
    predicted = footprint(table, table.scenarios.index(scenario), chosen.candidate.choices)
    fixed = table.fixed_memory_bytes.get(Tier.HOST, 0)
    activations = min(fixed, 8 * max((edge.elements for edge in graph.edges), default=0))
    return Plan(
        name=graph.name,
        backend=table.backend,
        budget=budget,
        scenario=scenario,
        thresholds=scenario.thresholds,
        choices=chosen.candidate.choices,
        exit_shares=choose.exit_shares(scenario.reach),
        predicted=predicted,
        latency_interval_s=choose.latency_intervals(
            predicted, scenario.reach, table.latency_relative_error, len(folder.part("choose"))
        ),
        memory=MemoryBreakdown(
            weights_bytes=predicted.memory_bytes.get(Tier.HOST, 0) - fixed,
            activation_bytes=activations,
            overhead_bytes=fixed - activations,
        ),
        accuracy=candidates.reference_accuracy - scenario.loss,
        reference_accuracy=candidates.reference_accuracy,
        predicted_drop=scenario.loss,
        proof=choose.restated(solution, choose.objective_of(predicted, budget)),
        graph_digest=table.graph_digest,
        table_digest=table.digest(),
        device_digest=table.device_digest,
        calibration_digest=table.calibration_digest,
        conditions=table.conditions,
    )


def sweep(calibration_folder: StrPath, budget: Budget, *, chosen: Plan | None = None) -> Curve:
    """Return the non-dominated measured plans under the other budgets, with baselines beside them."""
    from edgeflex.plans import choose

    _, _, _, table, candidates = open_calibration(calibration_folder)
    points = choose.curve_points(table, candidates.candidates, budget)
    if chosen is not None:
        points = (
            *points,
            CurvePoint(
                label="this plan",
                latency_s=chosen.predicted.latency_s[budget.statistic],
                memory_bytes=sum(chosen.predicted.memory_bytes.values()),
                drop=chosen.predicted.loss,
                chosen=True,
            ),
        )
    return Curve(
        points=points, baselines=choose.static_points(table, candidates.candidates, candidates.reference_accuracy)
    )
