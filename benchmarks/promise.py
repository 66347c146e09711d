"""Promise against measurement over random feasible plans of one calibration.

    python benchmarks/promise.py --model WORK/model --calibration WORK/calibration --data IMAGES --plans 20

Budgets are drawn at random between what the calibration's table can least do and what full depth in fp32
needs; each feasible one is planned, exported and measured as `edgeflex bench` does, one thread. A plan counts
as kept within 10 % on both sides. A shared machine slows down for seconds at a time: the same program, the
first plan's, is timed before and after each measurement, and the measurement is taken again when either differs by more
than 5 % from that program's usual time (its median so far). Nothing about the plan itself decides that.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from edgeflex import flow
from edgeflex.bundle import open_bundle
from edgeflex.errors import InfeasibleError
from edgeflex.plans import choose
from edgeflex.runtimes.executorch import ExecutorchSession
from edgeflex.schema import Budget, LatencyLimit, Tier


def random_budget(rng: np.random.Generator, low: dict[str, float], high: dict[str, float]) -> Budget:
    """Return a budget with each limit drawn between its least and its most."""
    memory, latency = (low[name] + rng.uniform() * (high[name] - low[name]) for name in ("memory", "latency"))
    minimize = rng.choice(["latency", "drop", "memory"])
    return Budget(
        memory_bytes={Tier.HOST: int(memory)},
        latency=(LatencyLimit(limit_s=float(latency), statistic=str(rng.choice(["mean", "p95"]))),),
        max_drop=float(rng.uniform(0.03, 0.15)),
        minimize=str(minimize),
    )


class Yardstick:
    """One program, timed again and again: tells whether the machine is as fast as usual."""

    def __init__(self, program: bytes, segments) -> None:
        self.file = tempfile.NamedTemporaryFile(suffix=".pte")  # noqa: SIM115 - lives as long as the run
        self.file.write(program)
        self.file.flush()
        self.segments = segments
        self.seen: list[float] = []

    def time_s(self) -> float:
        x = np.zeros(self.segments[0].input_shape, np.float32)
        with ExecutorchSession(Path(self.file.name), self.segments) as session:
            samples = []
            for _ in range(300):
                start = time.perf_counter()
                session.infer(x, (None,) * len(self.segments))
                samples.append(time.perf_counter() - start)
        self.seen.append(float(np.mean(samples[20:])))
        return self.seen[-1]

    def usual(self, value: float) -> bool:
        return abs(value / float(np.median(self.seen)) - 1) <= 0.05


def measured(bundle: Path, arguments: argparse.Namespace, yardstick: Yardstick):
    """Return the measurement and how often it was taken."""
    for attempts in range(1, 5):  # noqa: B007 - the count is returned
        before = yardstick.time_s()
        result = flow.bench(bundle, arguments.data, images=arguments.images, repeats=3)
        after = yardstick.time_s()
        if yardstick.usual(before) and yardstick.usual(after):
            break
        time.sleep(2)
    return result, attempts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _, _, _, table, candidates = flow.open_calibration(arguments.calibration)
    points = choose.static_points(table, candidates.candidates, candidates.reference_accuracy)
    low = {"memory": min(p.memory_bytes for p in points), "latency": 0.3 * min(p.latency_s for p in points)}
    high = {"memory": max(p.memory_bytes for p in points), "latency": max(p.latency_s for p in points)}
    rng = np.random.default_rng(arguments.seed)
    kept = {"mean latency": 0, "memory": 0, "disk": 0}
    done, tried = [], set()
    yardstick = None
    print(
        f"{'plan':>4} {'mean promised':>14} {'measured':>10} {'ratio':>6} {'memory':>7} {'disk':>6} {'taken':>5}  exits"
    )
    while len(done) < arguments.plans:
        try:
            plan = flow.plan(arguments.calibration, random_budget(rng, low, high))
        except InfeasibleError:
            continue
        if plan.scenario.canonical_json() in tried:
            continue
        tried.add(plan.scenario.canonical_json())
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            flow.export(plan, arguments.model, arguments.calibration, bundle)
            if yardstick is None:
                yardstick = Yardstick((bundle / "program.pte").read_bytes(), open_bundle(bundle).manifest.segments)
                for _ in range(5):
                    yardstick.time_s()
            result, attempts = measured(bundle, arguments, yardstick)
            size = (bundle / "program.pte").stat().st_size
        promised = plan.predicted.latency_s["mean"]
        ratio = result.latency_s["mean"] / promised
        memory = result.peak_memory_bytes / sum(plan.predicted.memory_bytes.values())
        disk = size == plan.predicted.disk_bytes
        kept["mean latency"] += abs(ratio - 1) <= 0.10
        kept["memory"] += abs(memory - 1) <= 0.10
        kept["disk"] += disk
        done.append(ratio)
        shares = " ".join(f"{one:.2f}" for one in plan.exit_shares)
        print(
            f"{len(done):>4} {promised * 1e6:>11.1f} us {promised * ratio * 1e6:>7.1f} us "
            f"{ratio:>6.3f} {memory:>7.3f} {'exact' if disk else 'OFF':>6} {attempts:>5}  {shares}",
            flush=True,
        )
    for name, count in kept.items():
        print(f"{name}: {count} of {len(done)}")
    print(f"latency ratio: median {np.median(done):.3f}, from {min(done):.3f} to {max(done):.3f}")


if __name__ == "__main__":
    main()
