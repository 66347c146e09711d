"""Promise against measurement for decoders: random budgets, each planned, exported and measured.

    python benchmarks/decoder_promise.py --model moe-lm --calibration calibration --text heldout.txt --budgets 10

Memory budgets lie at random between what the smallest cache needs and what everything needs, some with a limit on
divergence. Kept: mean seconds of a decoded token within 15 % and memory within 5 % of the plan, both ways. The text
must not be the calibration's. One thread. Plans with the same precisions share one export, which is the same but for
the plan in its manifest; a decoder of many gigabytes is then exported once (``--max-kl 100``, fewer tokens).

A shared machine's speed drifts by more than that within seconds. So each repeat of a plan is measured between two of
one program that stays the same (everything in memory), and what was computed is divided by how much slower that program
was then than when the run began; waits for the disk stay as they were. For a plan that is this program, that tells only
what it took when the run began. Measure the rates just before (remove rates.json from the calibration, and run the same
``edgeflex calibrate`` again). Times are counted so, and raw.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex import flow
from edgeflex.errors import InfeasibleError
from edgeflex.files import write_atomic
from edgeflex.schema_moe import DecoderBudget, DecoderManifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeflex.schema_moe import DecoderBench, DecoderPlan

_FIRST = 5  # benches of the program that stays the same, when the run begins


def with_plan(exported: Path, plan: DecoderPlan, bundle: Path) -> None:
    """Make ``bundle`` of another bundle's files, as links, and its manifest with ``plan`` in it."""
    shutil.copytree(exported, bundle, copy_function=os.link)
    path = bundle / "manifest.json"
    manifest = DecoderManifest.parse(path.read_bytes(), str(path))
    write_atomic(path, manifest.model_copy(update={"plan": plan}).canonical_json())  # a new file: links stay whole


def waiting_share(result: DecoderBench) -> float:
    """Return the share of the decoded tokens' time in which nothing could be computed."""
    times = [one for run in result.runs for one in run.times[1:]]
    return sum(one.wait_s for one in times) / sum(one.total_s for one in times)


class Turns:
    """Benches one bundle between two benches of another that stays the same.

    Args:
        same: The bundle that stays.
        bench: Benches a bundle once.

    Attributes:
        first_s: Seconds per token of the bundle that stays, at the beginning.
    """

    def __init__(self, same: Path, bench: Callable[[Path], DecoderBench]) -> None:
        self._same, self._bench = same, bench
        self.first_s = float(np.median([self._same_s() for _ in range(_FIRST)]))

    def _same_s(self) -> float:
        return measured(self._bench(self._same), "time per token")

    def measure(self, bundle: Path, repeats: int) -> Measured:
        """Return medians over repeats."""
        rows = []
        before = self._same_s()
        for _ in range(repeats):
            result = self._bench(bundle)
            after = self._same_s()
            slower = (before + after) / 2 / self.first_s
            waited, token_s = waiting_share(result), measured(result, "time per token")
            rows.append((
                token_s, token_s * ((1 - waited) / slower + waited), slower,
                measured(result, "memory"), measured(result, "hit rate"),
            ))  # fmt: skip
            before = after
        return Measured(*np.median(rows, axis=0).tolist())


class Measured(NamedTuple):
    """Medians: seconds per token, the same at the first speed, slowness, bytes, share of hits."""

    token_s: float
    calm_s: float
    slower: float
    memory_bytes: float
    hits: float


def measured(result: DecoderBench, name: str) -> float:
    """Return what a check measured."""
    return next(one.measured for one in result.checks if one.name == name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--max-kl", type=float, nargs="+", default=[0.005, 0.02, 1.0], help="drawn from")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--work", type=Path, help="where bundles lie, on the disk that was calibrated")
    parser.add_argument("--exported", type=Path, help="a bundle of the decoder that need not be exported again")
    parser.add_argument("--follow-text", action="store_true", help="answers are the text's; for random weights")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    sizes = {"context_tokens": arguments.context, "prompt_tokens": arguments.prompt}
    free = flow.plan_decoder(arguments.calibration, DecoderBudget(minimize="kl", **sizes)).predicted.memory
    least = free.total_bytes - free.cache_bytes
    kept = {"time per token, raw": 0, "time per token, at the first speed": 0, "memory": 0}
    done, exports = 0, {}
    if arguments.exported:
        raw = (arguments.exported / "manifest.json").read_bytes()
        exports[arguments.exported] = DecoderManifest.parse(raw, "manifest").plan.choices
    scratch = tempfile.TemporaryDirectory(dir=arguments.work)

    def placed(plan: DecoderPlan) -> Path:
        bundle = Path(scratch.name) / f"bundle-{len(list(Path(scratch.name).iterdir()))}"
        exported = next((one for one, choices in exports.items() if choices == plan.choices), None)
        if exported is None:
            flow.export_decoder(plan, arguments.model, arguments.calibration, bundle, stock=False)
            exports[bundle] = plan.choices
        else:
            with_plan(exported, plan, bundle)
        return bundle

    every = flow.plan_decoder(
        arguments.calibration, DecoderBudget(max_kl=max(arguments.max_kl), minimize="latency", **sizes)
    )
    turns = Turns(
        placed(every),
        lambda bundle: flow.bench_decoder(
            bundle,
            arguments.text,
            prompts=3,
            max_tokens=arguments.max_tokens,
            repeats=1,
            follow_text=arguments.follow_text,
        ),
    )
    said_s = every.predicted.token_s.value
    print(f"the program that stays: promised {said_s * 1e3:.3f} ms, took {turns.first_s * 1e3:.3f} ms at first")
    print("    budget  verdict   promised   measured  ratio  memory   hits   seen  slower   calm")
    while done < arguments.budgets:
        budget = DecoderBudget(
            memory_bytes=int(least + rng.uniform(0.12, 1.05) * free.cache_bytes),
            max_kl=float(rng.choice(arguments.max_kl)),
            minimize="latency",
            **sizes,
        )
        try:
            plan = flow.plan_decoder(arguments.calibration, budget)
        except InfeasibleError:
            continue
        found = turns.measure(placed(plan), arguments.repeats)
        said = plan.predicted
        ratio, share = found.token_s / said.token_s.value, found.memory_bytes / said.memory.total_bytes
        calm = found.calm_s / said.token_s.value
        kept["time per token, raw"] += abs(ratio - 1) <= 0.15
        kept["time per token, at the first speed"] += abs(calm - 1) <= 0.15
        kept["memory"] += abs(share - 1) <= 0.05
        done += 1
        print(
            f"{budget.memory_bytes / 2**20:>6.1f} MiB {plan.verdict:>8} {said.token_s.value * 1e3:>7.3f} ms "
            f"{found.token_s * 1e3:>7.3f} ms {ratio:>6.3f} {share:>7.3f} {said.hit_rate:>6.1%} {found.hits:>6.1%} "
            f"{found.slower:>7.2f} {calm:>6.3f}",
            flush=True,
        )
    scratch.cleanup()
    for name, count in kept.items():
        print(f"{name}: {count} of {done}")


if __name__ == "__main__":
    main()
