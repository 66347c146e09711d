"""The small ViT: planned mixes of precisions against every uniform one, and what exits add.

    python benchmarks/vit_train.py --out vit-small.safetensors                  (once)
    python benchmarks/vit_mix.py --weights vit-small.safetensors --work /tmp/vit

Precisions are chosen on 30 % of the 5,000 dev images; accuracy is told on the 30 % kept for certificates, which
choose nothing here. Latency is the full-depth sum of segments as measured when the mix ran, one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.resnet56_exits import SHARES, Bars
from edgeflex import flow
from edgeflex.costs.policies import exit_outputs, judge
from edgeflex.profiles import load
from edgeflex.schema import Budget
from tests.builders import needed_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mixes", type=int, default=8)
    parser.add_argument("--max-drop", type=float, default=0.03)
    parser.add_argument("--only-table", action="store_true", help="of the calibration that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, progress = arguments.work, Bars()
    work.mkdir(parents=True, exist_ok=True)
    train, dev = needed_data("cifar10-jpeg", "train.zip"), needed_data("cifar10-jpeg", "dev.zip")
    if not (work / "device.json").exists():
        flow.profile(work / "device.json", quick=True, progress=progress)
    if not (work / "model").exists():
        flow.fit_exits(
            "zoo:vit-small", train, work / "model", weights=arguments.weights, exits=3, epochs=30, flip=True,
            progress=progress,
        )  # fmt: skip
    if arguments.only_table:
        table_of_mixes(work / "calibration")
        return
    flow.calibrate(
        work / "model", dev, work / "calibration", device=load(str(work / "device.json")), shares=SHARES,
        mixes=arguments.mixes, progress=progress,
    )  # fmt: skip
    table_of_mixes(work / "calibration")
    plan = flow.plan(work / "calibration", Budget(max_drop=arguments.max_drop, minimize="latency"))
    mean_s, full_s = plan.predicted.latency_s["mean"], sum(plan.predicted.block_latency_s)
    print(
        f"with exits, certified drop <= {arguments.max_drop:.1%}: mean {mean_s * 1e6:.0f} us of {full_s * 1e6:.0f} us "
        f"at full depth in the same mix, {plan.predicted.disk_bytes} B, seen drop {plan.certificate.drop:+.2%}"
    )


def table_of_mixes(calibration: Path) -> None:
    folder = flow.open_calibration(calibration)[0]
    labels, choosing = folder.labels("certify"), folder.labels("choose")
    rows = []
    for mix in folder.mixes():
        outputs, chooser = exit_outputs(mix.certify, labels), exit_outputs(mix.choose, choosing)
        never = (None,) * (outputs.exits - 1)
        unit = (1.0,) * outputs.exits
        accuracy, chosen = (1.0 - judge(one, never, unit).error for one in (outputs, chooser))
        kind = "planned" if mix.record.role == "candidate" else mix.record.role
        right = outputs.correct[:, -1].astype(float)
        rows.append((kind, sum(mix.record.segment_s), mix.record.program_bytes, accuracy, chosen, right))
    print(f"{'mix':<14} {'latency':>9} {'file':>10} {'accuracy':>9} {'on choosing':>12}")
    for kind, seconds, size, accuracy, chosen, _ in sorted(rows, key=lambda row: (row[0] == "planned", row[1])):
        print(f"{kind:<14} {seconds * 1e6:>6.0f} us {size:>8} B {accuracy:>9.4f} {chosen:>12.4f}")
    uniform = [row for row in rows if row[0] not in {"planned", "random"}]
    planned = [row for row in rows if row[0] == "planned"]
    best = max(uniform[1:] or uniform, key=lambda row: row[4] - 1e3 * row[1])
    better = [row for row in planned if row[4] >= best[4] - 0.002 and row[1] <= best[1] and row[2] <= best[2]]
    print(f"uniform with the best trade of accuracy and time: {best[0]}, {best[1] * 1e6:.0f} us, {best[2]} B")
    for row in better:
        print(
            f"planned, no worse on choosing: {row[1] / best[1]:.3f} of its time, {row[2] / best[2]:.3f} of its bytes, "
            f"accuracy {row[3] - best[3]:+.4f} ± {paired_error(row[5], best[5]):.4f}"
        )
    if not better:
        print("no planned mix is at once smaller, faster and as accurate")
    full, least = (min(rows, key=key) for key in (lambda row: row[0] != "fp32", lambda row: row[2]))
    print(
        f"the smallest format everywhere ({least[0]}, {least[2]} B) differs from fp32 by {least[3] - full[3]:+.4f} "
        f"± {paired_error(least[5], full[5]):.4f} on {len(labels)} images: no mix can be smaller than it, and where it "
        "costs no accuracy that shows, a mix can only be faster"
    )
    fastest = min(planned, key=lambda row: row[1])
    print(f"fastest planned mix: {fastest[1] / least[1]:.3f} of its time, {fastest[1] / best[1]:.3f} of {best[0]}'s")


def paired_error(one: np.ndarray, other: np.ndarray) -> float:
    """Return the standard error of the difference of two accuracies on the same images."""
    return float((one - other).std() / np.sqrt(len(one)))


if __name__ == "__main__":
    main()
