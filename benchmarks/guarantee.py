"""How often the accuracy promise is broken, over random splits of one calibration's measured outputs.

    python benchmarks/guarantee.py --calibration WORK/calibration --splits 200

Every split draws a third of the images to choose policies and the rest as a population. Certification images
are drawn from that population with replacement, so that the true drop of what is certified is known exactly.
The naive rule ships what looked best on the choosing images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from edgeflex import flow
from edgeflex.costs.policies import ExitOutputs, exit_outputs, judge, paired_losses, policy_pool, safety_path
from edgeflex.costs.store import Calibration, mix_digest
from edgeflex.costs.table import scenario_of
from edgeflex.errors import InfeasibleError
from edgeflex.plans import choose, footprint
from edgeflex.schema import Budget


def part(outputs: ExitOutputs, rows: np.ndarray) -> ExitOutputs:
    return ExitOutputs(outputs.confidence[rows], outputs.correct[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--splits", type=int, default=200)
    arguments = parser.parse_args()
    folder, _, _, table, candidates = flow.open_calibration(arguments.calibration)
    labels = np.concatenate([folder.labels("choose"), folder.labels("certify")])
    reference = _outputs(folder, mix_digest({}), labels)
    candidate = max((one for one in candidates.candidates if one.mix != mix_digest({})), key=lambda one: one.accuracy)
    outputs = _outputs(folder, candidate.mix, labels)
    block_s = footprint(choose.shipping_table(table, candidate), 0, candidate.choices).block_latency_s
    print(f"{len(labels)} images, mix {candidate.mix}, {arguments.splits} splits")
    columns = ("promise", "broken", "allowed", "naive broken", "not promised", "mean cost / full")
    print(" ".join(f"{name:>{width}}" for name, width in zip(columns, (16, 7, 8, 13, 13, 17), strict=True)))
    for limit, confidence in ((0.01, 0.9), (0.02, 0.9), (0.02, 0.95), (0.03, 0.95)):
        broken = naive = refused = 0
        costs = []
        for seed in range(arguments.splits):
            rng = np.random.default_rng(seed)
            order = rng.permutation(len(labels))
            chooser, population = order[: len(order) // 3], order[len(order) // 3 :]
            base = 1.0 - float(reference.correct[chooser, -1].mean())
            pool = policy_pool(part(outputs, chooser), block_s, prices=10)
            own = candidate.model_copy(
                update={"scenarios": tuple(scenario_of(one, base, str(i)) for i, one in enumerate(pool))}
            )
            budget = Budget(max_drop=limit, confidence=confidence, minimize="latency")
            chosen = choose.pick(table, [own], budget)
            if chosen is None:
                refused += 1
                continue
            naive += _drop(outputs, reference, chosen.chain[-1].thresholds, population) > limit
            path = [
                scenario_of(judge(part(outputs, chooser), one, block_s), base, f"careful {i}")
                for i, one in enumerate(safety_path(chosen.chain[0].thresholds[:-1]))
            ]
            drawn = rng.choice(population, size=len(population) // 2)
            chosen = choose.lengthened(chosen, path, budget)
            try:
                scenario, _ = choose.certified(
                    chosen,
                    budget,
                    lambda ones, rows=drawn: paired_losses(
                        part(outputs, rows), part(reference, rows), [one.thresholds[:-1] for one in ones]
                    ),
                )
            except InfeasibleError:
                refused += 1
                continue
            broken += _drop(outputs, reference, scenario.thresholds, population) > limit
            costs.append(float(np.dot(scenario.reach, block_s)) / sum(block_s))
        cost = f"{np.mean(costs):.3f}" if costs else "-"
        print(
            f"{limit:>7.1%} at {confidence:.0%} {broken / arguments.splits:>8.1%} {1 - confidence:>8.1%} "
            f"{naive / arguments.splits:>13.1%} {refused / arguments.splits:>13.1%} {cost:>17}",
            flush=True,
        )


def _outputs(folder: Calibration, mix: str, labels: np.ndarray) -> ExitOutputs:
    found = folder.mix(mix)
    return exit_outputs(np.concatenate([found.choose, found.certify]), labels)


def _drop(outputs: ExitOutputs, reference: ExitOutputs, thresholds, rows: np.ndarray) -> float:
    return float(paired_losses(part(outputs, rows), part(reference, rows), [thresholds[:-1]]).mean())


if __name__ == "__main__":
    main()
