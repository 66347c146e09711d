"""Promise against measurement for decoders: random budgets, each planned, exported and measured.

    python benchmarks/decoder_promise.py --model moe-lm --calibration calibration --text heldout.txt --budgets 10

Memory budgets lie at random between what the smallest cache needs and what everything needs, some with a limit on
divergence. Kept: mean seconds of a decoded token within 15 % and memory within 5 % of the plan, both ways. The text
must not be the calibration's. One thread. Plans with the same precisions share one export, which is the same but for
the plan in its manifest; a decoder of many gigabytes is then exported once (``--max-kl 100``, fewer tokens).

A shared machine's speed drifts by more than that within seconds, and a calibration's rates are those of its day. So the
rates are measured anew before and after each repeat, and the plan, which stays what it was, is priced with both: that
tells how well rates foretell a token, whatever the machine does today. Times are counted so, and against the promise in
the plan itself. ``--as-planned`` leaves the new rates out (a decoder of 7 billion parameters takes 40 s for them).
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
from edgeflex.flow.decoders import PLANNED, open_decoder_calibration
from edgeflex.flow.traces import Replays, packed_bytes
from edgeflex.models.decoders import open_decoder
from edgeflex.plans.decoder_audit import Ground, recount
from edgeflex.runtimes.decoder_rates import measure_rates
from edgeflex.runtimes.trace import read_trace
from edgeflex.schema_moe import DecoderBudget, DecoderManifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeflex.schema_moe import DecoderBench, DecoderPlan, DecoderRates


def with_plan(exported: Path, plan: DecoderPlan, bundle: Path) -> None:
    """Make ``bundle`` of another bundle's files, as links, and its manifest with ``plan`` in it."""
    shutil.copytree(exported, bundle, copy_function=os.link)
    path = bundle / "manifest.json"
    manifest = DecoderManifest.parse(path.read_bytes(), str(path))
    write_atomic(path, manifest.model_copy(update={"plan": plan}).canonical_json())  # a new file: links stay whole


class Prices:
    """Prices plans with rates of the moment.

    Args:
        model: The decoder.
        calibration: Its folder, on the disk that is read from.
        prompt_tokens: Of the plans.
    """

    def __init__(self, model: str, calibration: Path, prompt_tokens: int) -> None:
        self._folder, self._tokenizer = calibration, open_decoder(model).tokenizer_file
        self._losses, self._rates, routing = open_decoder_calibration(calibration)
        graph = self._losses.graph
        experts = max(layer.routing.experts for layer in graph.layers if layer.routing)
        replays = Replays(graph, routing, prompt_tokens)
        self._ground = {
            "misses": replays.misses,
            "packed_bytes": packed_bytes(self._rates),
            "uses": routing.uses(len(graph.layers), experts),
        }
        self._trace = read_trace(calibration / "trace.csv")

    def measure(self) -> DecoderRates:
        """Return the rates that this machine has now."""
        return measure_rates(
            self._losses.graph,
            self._folder,
            self._trace,
            tokenizer=self._tokenizer,
            device=self._rates.device,
            precisions=PLANNED,
            rows_in=(1,),
            memory_bytes_per_s=self._rates.memory_bytes_per_s,
        )

    def token_s(self, plan: DecoderPlan, rates: DecoderRates) -> float:
        """Return the seconds of a decoded token with these rates."""
        return recount(plan, Ground(self._losses, rates, **self._ground)).token_s


def benched(
    bundle: Path, plan: DecoderPlan, bench: Callable[[Path], DecoderBench], repeats: int, prices: Prices | None
) -> Measured:
    """Return medians over repeats, each between two measurements of rates."""
    rows = []
    before = prices.measure() if prices else None
    for _ in range(repeats):
        result = bench(bundle)
        token_s, now = measured(result, "time per token"), plan.predicted.token_s.value
        if prices and before:
            after = prices.measure()
            now = (prices.token_s(plan, before) + prices.token_s(plan, after)) / 2
            before = after
        rows.append((token_s, now, token_s / now, measured(result, "memory"), measured(result, "hit rate")))
    return Measured(*np.median(rows, axis=0).tolist())


class Measured(NamedTuple):
    """Medians: seconds per token, foretold by rates of the moment, their ratio, bytes, share of hits."""

    token_s: float
    now_s: float
    beside: float
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where bundles lie, on the disk that was calibrated")
    parser.add_argument("--exported", type=Path, help="a bundle of the decoder that need not be exported again")
    parser.add_argument("--follow-text", action="store_true", help="answers are the text's; for random weights")
    parser.add_argument("--as-planned", action="store_true", help="rates are not measured anew")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    sizes = {"context_tokens": arguments.context, "prompt_tokens": arguments.prompt}
    free = flow.plan_decoder(arguments.calibration, DecoderBudget(minimize="kl", **sizes)).predicted.memory
    least = free.total_bytes - free.cache_bytes
    kept = {"time per token, as planned": 0, "time per token, by rates of the moment": 0, "memory": 0}
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

    def bench(bundle: Path) -> DecoderBench:
        return flow.bench_decoder(
            bundle,
            arguments.text,
            prompts=3,
            max_tokens=arguments.max_tokens,
            repeats=1,
            follow_text=arguments.follow_text,
        )

    prices = None if arguments.as_planned else Prices(arguments.model, arguments.calibration, arguments.prompt)
    print("    budget  verdict    promised    foretold   measured  promise  beside  memory   hits   seen")
    while done < arguments.budgets:
        memory_bytes = int(least + rng.uniform(0.12, 1.05) * free.cache_bytes)
        budget = DecoderBudget(
            memory_bytes=memory_bytes,
            max_kl=float(rng.choice(arguments.max_kl)),
            minimize="latency",
            **sizes,
        )
        try:
            plan = flow.plan_decoder(arguments.calibration, budget)
        except InfeasibleError:
            continue
        found = benched(placed(plan), plan, bench, arguments.repeats, prices)
        said = plan.predicted
        ratio, share = found.token_s / said.token_s.value, found.memory_bytes / said.memory.total_bytes
        kept["time per token, as planned"] += abs(ratio - 1) <= 0.15
        kept["time per token, by rates of the moment"] += abs(found.beside - 1) <= 0.15
        kept["memory"] += abs(share - 1) <= 0.05
        done += 1
        print(
            f"{memory_bytes / 2**20:>6.1f} MiB {plan.verdict:>8} {said.token_s.value * 1e3:>8.3f} ms "
            f"{found.now_s * 1e3:>8.3f} ms {found.token_s * 1e3:>7.3f} ms {ratio:>8.3f} {found.beside:>7.3f} "
            f"{share:>7.3f} {said.hit_rate:>6.1%} {found.hits:>6.1%}",
            flush=True,
        )
    scratch.cleanup()
    if prices is None:
        del kept["time per token, by rates of the moment"]
    for name, count in kept.items():
        print(f"{name}: {count} of {done}")


if __name__ == "__main__":
    main()
