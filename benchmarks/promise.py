"""Promise against measurement over random feasible plans of one calibration.

    python benchmarks/promise.py --model WORK/model --calibration WORK/calibration --data IMAGES --plans 20

Budgets are drawn at random between what the calibration's table can least do and what full depth in fp32
needs; each feasible one is planned, exported and measured, one thread. A plan counts as kept within 10 % on both
sides. Bytes are measured as `edgeflex bench` does, in a process of their own. A shared machine's speed drifts by more
than that within minutes, so times are taken beside one program that stays the same (the first plan's at full depth), in
turns, and held against the promises for both: (measured / yardstick) against (promised / yardstick's promise).
Raw ratios stand beside. While the yardstick is slower than 1.15 times its promise, another program shares the core, and
the pair is timed again, at most twelve times; nothing about the plan decides that.
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
from edgeflex.images import open_images
from edgeflex.plans import choose
from edgeflex.runtimes.executorch import ExecutorchSession
from edgeflex.runtimes.verify import unseen_indices
from edgeflex.schema import Budget, LatencyLimit, Tier

_BLOCK = 40
# Where another program shares the core, not all slows alike: wait until the yardstick is near its promise.
_CALM, _ATTEMPTS = 1.15, 12


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


class Alternation:
    """Times plans beside one program that stays the same, so that a machine whose speed drifts slows both.

    Blocks of images go through the plan's program and through the yardstick (the first plan's, at full depth) in
    turn, A B B A; what counts is the quotient of their means.
    """

    def __init__(self, program: bytes, segments, images: np.ndarray) -> None:
        self.file = tempfile.NamedTemporaryFile(suffix=".pte")  # noqa: SIM115 - lives as long as the run
        self.file.write(program)
        self.file.flush()
        self.segments = segments
        self.images = images
        self.never = (None,) * len(segments)

    def block_s(self, session: ExecutorchSession, thresholds, start: int) -> list[float]:
        samples = []
        for index in range(start, start + _BLOCK):
            x = self.images[index % len(self.images)][None]
            begun = time.perf_counter()
            session.infer(x, thresholds)
            samples.append(time.perf_counter() - begun)
        return samples

    def times_s(self, bundle: Path, rounds: int) -> tuple[float, float]:
        """Return the mean seconds of the plan's images and of the yardstick, both the median over rounds."""
        manifest = open_bundle(bundle).manifest
        ours = ExecutorchSession(bundle / "program.pte", manifest.segments)
        quotients, theirs_s = [], []
        with ours, ExecutorchSession(Path(self.file.name), self.segments) as theirs:
            for number in range(-2, rounds):
                start = 2 * _BLOCK * max(number, 0)
                a = self.block_s(ours, manifest.plan.thresholds, start)
                b = self.block_s(theirs, self.never, start)
                b += self.block_s(theirs, self.never, start + _BLOCK)
                a += self.block_s(ours, manifest.plan.thresholds, start + _BLOCK)
                if number >= 0:
                    quotients.append((np.mean(a), np.mean(b)))
                    theirs_s.append(np.median(b))
        # rounds run different images, whose depths differ: sums of rounds are compared, rounds in a burst left out
        calm = np.array(theirs_s) <= 1.25 * np.median(theirs_s)
        ours_s, yard_s = (np.array(quotients)[calm].mean(axis=0)).tolist()
        return ours_s, yard_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=15, help="turns of two blocks of images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _, _, _, table, candidates = flow.open_calibration(arguments.calibration)
    points = choose.static_points(table, candidates.candidates, candidates.reference_accuracy)
    low = {"memory": min(p.memory_bytes for p in points), "latency": 0.3 * min(p.latency_s for p in points)}
    high = {"memory": max(p.memory_bytes for p in points), "latency": max(p.latency_s for p in points)}
    rng = np.random.default_rng(arguments.seed)
    kept = {"memory": 0, "disk": 0}
    done, tried = [], set()
    alternation, yard_promised = None, 0.0
    heads = ("plan", "mean promised", "measured", "yardstick", "ratio", "memory", "disk")
    print("{:>4} {:>14} {:>11} {:>11} {:>6} {:>7} {:>6}  exits".format(*heads))
    while len(done) < arguments.plans:
        try:
            plan = flow.plan(arguments.calibration, random_budget(rng, low, high))
        except InfeasibleError:
            continue
        if plan.scenario.canonical_json() in tried:
            continue
        tried.add(plan.scenario.canonical_json())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bundle"
            flow.export(plan, arguments.model, arguments.calibration, path)
            bundle = open_bundle(path)
            if alternation is None:
                images = open_images(arguments.data)
                indices = unseen_indices(bundle, images, arguments.images)
                loaded = np.ascontiguousarray(images.load(indices, bundle.manifest.graph.preprocessing))
                program = (path / "program.pte").read_bytes()
                alternation = Alternation(program, bundle.manifest.segments, loaded)
                yard_promised = sum(plan.predicted.block_latency_s)
            result = flow.bench(path, arguments.data, images=20, repeats=1)
            for attempt in range(_ATTEMPTS):
                ours_s, yard_s = alternation.times_s(path, arguments.rounds)
                if yard_s <= _CALM * yard_promised:
                    break
                time.sleep(2 + attempt)
            size = (path / "program.pte").stat().st_size
        promised = plan.predicted.latency_s["mean"]
        memory = result.peak_memory_bytes / sum(plan.predicted.memory_bytes.values())
        disk = size == plan.predicted.disk_bytes
        kept["memory"] += abs(memory - 1) <= 0.10
        kept["disk"] += disk
        done.append((promised, ours_s, yard_s))
        shares = " ".join(f"{one:.2f}" for one in plan.exit_shares)
        print(
            f"{len(done):>4} {promised * 1e6:>11.1f} us {ours_s * 1e6:>8.1f} us {yard_s * 1e6:>8.1f} us "
            f"{ours_s / yard_s * yard_promised / promised:>6.3f} "
            f"{memory:>7.3f} {'exact' if disk else 'OFF':>6}  {shares}",
            flush=True,
        )
    promised, ours, yard = np.array(done).T
    for name, ratios in (("raw", ours / promised), ("beside the yardstick", ours / yard * yard_promised / promised)):
        within = int((np.abs(ratios - 1) <= 0.10).sum())
        low_ratio, high_ratio = ratios.min(), ratios.max()
        print(f"mean latency, {name}: {within} of {len(done)} within 10 %; ", end="")
        print(f"measured / promised median {np.median(ratios):.3f}, from {low_ratio:.3f} to {high_ratio:.3f}")
        print("   " + " ".join(f"{one:.2f}" for one in ratios))
    print(f"yardstick: promised {yard_promised * 1e6:.0f} us, {yard.min() * 1e6:.0f} to {yard.max() * 1e6:.0f} us")
    for name, count in kept.items():
        print(f"{name}: {count} of {len(done)}")


if __name__ == "__main__":
    main()
