"""Prints what deciding about an event costs: where its experts are, which are copied, what is copied ahead.

    python benchmarks/decide.py [--against FOLDER] [--rounds 3] [--tokens 160] [--profile]

The very books, policy and scheduler of the runtime are asked about synthetic routing, event by event, as
``cuda_experts`` asks them; nothing is computed or copied. One thread. Each line is a decoder's shape and a share of
its experts in VRAM; columns are microseconds of one event, medians over the events that missed one to four experts:

    union     the event's experts and their weights, from the router's arrays
    lookup    tiers and their policies: where each expert is, and learning from the event
    rank      the event's experts in the order of worth
    schedule  which of the missing are copied and which the processor computes
    divide    which of them both compute a part of
    admit     what leaves VRAM for them
    ahead     what the link copies next
    all       of one event, all parts; with the mean and the 90th percentile of the same events
    hits      all parts of an event that missed nothing: union and lookup only
    each      the mean over every event, whatever it missed

Every 16 tokens the curves are fitted anew and the scheduler forgets, as in a run; ``shapes`` is the share of the events
whose shape it had not met since. ``processor`` is the other path, without a GPU: one cache in RAM, decided by ``enu``.

``--against`` names another checkout of this repository: both are run in processes of their own, in turns (A B B A), and
their medians stand side by side. Each process decides the same events several times and takes the least seconds of
each part of each event, which other programs on the machine disturb little. ``--profile`` prints instead where the
time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parents[1]
PARTS = ("union", "lookup", "rank", "schedule", "divide", "admit", "ahead")
REFIT_TOKENS = 16
REPEATS = 5
PART_S = 8e-6  # what a second launch costs where an expert is divided
SIZE = 4_500_000


class Shape(NamedTuple):
    """Layers, experts and those that a token uses; the share of experts in VRAM; the share in RAM."""

    layers: int
    experts: int
    top_k: int
    vram: float
    ram: float = 1.0

    def __str__(self) -> str:
        where = f"{self.vram:.0%} in VRAM" + ("" if self.ram == 1.0 else f", {self.ram:.0%} in RAM")
        return f"{self.layers} x {self.experts}, top {self.top_k}, {where}"


SHAPES = (
    Shape(16, 64, 8, 0.5),
    Shape(24, 32, 4, 0.5),
    Shape(48, 128, 8, 0.6),
    Shape(48, 128, 8, 0.4),
    Shape(48, 128, 8, 0.3, 0.8),
)


# --- one process ---------------------------------------------------------------------------------------


def trace_of(shape: Shape, tokens: int):
    from edgeflex.runtimes.synthetic import Routing, synthetic_trace

    routing = Routing(shape.layers, shape.experts, shape.top_k, tokens, 0, SIZE, stay=0.7)
    return synthetic_trace("markov", routing, seed=1)


def arrays_of(trace) -> list:
    """Return each event as the engine logs it: layer, ``[1, top_k]`` ids and weights."""
    import numpy as np

    weights = np.asarray(trace.weight, dtype=np.float32).reshape(-1, trace.top_k)
    ids = np.asarray(trace.expert, dtype=np.int32).reshape(-1, trace.top_k)
    layers = np.asarray(trace.layer).reshape(-1, trace.top_k)[:, 0].tolist()
    return [(layer, ids[i : i + 1], weights[i : i + 1]) for i, layer in enumerate(layers)]


def device_times(shape: Shape, tokens: int) -> dict[str, object]:
    """Return seconds of each event by part, how many experts it missed, and the share of shapes met first."""
    import numpy as np

    from edgeflex.runtimes.cuda_ahead import Ahead
    from edgeflex.runtimes.curves import Curve, Curves
    from edgeflex.runtimes.division import Divider
    from edgeflex.runtimes.expert_cache import union_of
    from edgeflex.runtimes.reuse import ReusePolicy
    from edgeflex.runtimes.schedule import Active, Scheduler
    from edgeflex.runtimes.strategies import AheadCache
    from edgeflex.runtimes.timeline import cost_of

    curves = Curves(
        gpu=Curve(((1, 1.15e-5), (64, 3e-5))),
        cpu=Curve(((1, 8.3e-5), (64, 1e-3))),
        link_bytes_per_s=25e9,
        link_latency_s=8e-6,
        disk_bytes_per_s=6e9,
        cpu_beside_link=1.1,
        link_beside_cpu=1.05,
    )
    sizes = np.full((shape.layers, shape.experts), SIZE, dtype=np.int64)
    total = int(sizes.sum())
    policy = ReusePolicy(*sizes.shape, top_k=shape.top_k)
    tiers = AheadCache(int(shape.vram * total), int(shape.ram * total), sizes, policy, top_k=shape.top_k)
    tiers.warm([(layer, expert) for expert in range(shape.experts) for layer in range(shape.layers)])
    ahead = Ahead(tiers, policy, sizes)
    scheduler, divider, shapes, first, passes = Scheduler(curves), Divider(curves, PART_S), 0, 0, -1
    rows, clock = [], time.perf_counter
    for number, (layer, ids, weight) in enumerate(arrays_of(trace_of(shape, tokens))):
        if number % shape.layers == 0:
            passes += 1
            if passes % REFIT_TOKENS == 0:
                curves = curves.scaled(cpu=1.0 + 0.001 * (passes % 3))
                scheduler, divider = Scheduler(curves), Divider(curves, PART_S)
        known = len(scheduler._known)
        t0 = clock()
        union, weights = union_of(ids, weight)
        t1 = clock()
        found = tiers.event(passes, layer, union, weights, decoding=True)
        t2 = t3 = t4 = t5 = t6 = t7 = clock()
        missed = len(found.ram_hits) + len(found.flash_misses)
        if missed:
            flash, hits = frozenset(found.flash_misses), frozenset(found.gpu_hits)
            active = [
                Active(
                    (layer, one),
                    1,
                    SIZE,
                    "gpu" if one in hits else "flash" if one in flash else "ram",
                    "int4",
                    True,
                )
                for one in union
            ]
            active = ahead.ranked(layer, active, curves)
            t3 = clock()
            plan = scheduler.schedule(active)
            t4 = clock()
            if hasattr(scheduler, "costs"):
                costs = scheduler.costs(active)
            else:  # as it was
                costs = {one.key: cost_of(one, curves) for one in active}
            plan, division = divider.divide(plan, active, costs, link_price=getattr(ahead, "link_price", 0.0))
            uploaded = [key for key in plan.uploaded if division is None or key != division.key]
            t5 = clock()
            tiers.admit(expert for _, expert in uploaded)
            t6 = clock()
            present = [(layer, expert) for expert in union]
            for key in ahead.wanted(uploaded, 3e-4, curves):
                if ahead.fits(key, present):
                    ahead.bring(layer, key, present)
            t7 = clock()
            shapes += 1
            first += len(scheduler._known) != known
        if passes >= tokens // 4:
            rows.append((missed, t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4, t6 - t5, t7 - t6))
    return {"rows": rows, "shapes": first / max(1, shapes)}


def processor_times(shape: Shape, tokens: int) -> list[tuple[int, float]]:
    """Return misses and seconds of each event of the cache in RAM; a hit's learning is paid with a later miss."""
    import numpy as np

    from edgeflex.runtimes.expert_cache import ExpertCache, union_of
    from edgeflex.runtimes.policies import make_policy
    from edgeflex.runtimes.residency import Event, Pass

    sizes = np.full((shape.layers, shape.experts), SIZE, dtype=np.int64)
    policy = make_policy("enu", layers=shape.layers, experts=shape.experts, top_k=shape.top_k)
    cache = ExpertCache(int(shape.vram * sizes.sum()), sizes, policy)
    rows, clock, of = [], time.perf_counter, Pass(0, 0, 0, decoding=True)
    for number, (layer, ids, weight) in enumerate(arrays_of(trace_of(shape, tokens))):
        event = Event(number // shape.layers, of, layer, ids, weight)
        start = clock()
        union, weights = union_of(event.experts, event.weights)
        outcome = cache.event(event.step, layer, union, weights, decoding=True)
        seconds = clock() - start
        if event.step >= tokens // 4:
            rows.append((len(outcome.misses), seconds))
    return rows


def least(events: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    """Return one event's misses and its least seconds by part, of several runs that decided alike."""
    return tuple(map(min, zip(*events, strict=True)))


def one_process(tokens: int) -> None:
    found = {}
    for shape in SHAPES:
        times = [device_times(shape, tokens) for _ in range(REPEATS)]
        rows = [least(events) for events in zip(*(one["rows"] for one in times), strict=True)]
        cpu = [least(events) for events in zip(*(processor_times(shape, tokens) for _ in range(REPEATS)), strict=True)]
        some = [row[1:] for row in rows if 1 <= row[0] <= 4]
        line = {name: statistics.median(column) for name, column in zip(PARTS, zip(*some, strict=True), strict=True)}
        totals = sorted(map(sum, some))
        hits = [sum(row[1:]) for row in rows if not row[0]]
        line |= {
            "all": statistics.median(totals),
            "mean": statistics.fmean(totals),
            "p90": totals[int(0.9 * len(totals))],
            "hits": statistics.median(hits) if hits else 0.0,
            "each": statistics.fmean(sum(row[1:]) for row in rows),
            "shapes": times[0]["shapes"],
            "processor hit": statistics.median(seconds for missed, seconds in cpu if not missed),
            "processor each": statistics.fmean(seconds for _, seconds in cpu),
        }
        found[str(shape)] = line
    print(json.dumps(found))


def profile(tokens: int) -> None:
    import cProfile
    import pstats

    for shape in SHAPES[:1] + SHAPES[2:3]:
        watch = cProfile.Profile()
        watch.runcall(device_times, shape, tokens)
        print(shape)
        pstats.Stats(watch).sort_stats("tottime").print_stats(28)


# --- the table -----------------------------------------------------------------------------------------


def run(tree: Path, tokens: int) -> dict[str, dict[str, float]]:
    line = [sys.executable, str(Path(__file__).resolve()), "--tree", str(tree), "--tokens", str(tokens)]
    done = subprocess.run(line, check=True, capture_output=True, text=True, cwd=tree)
    return json.loads(done.stdout)


def medians(found: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        shape: {name: statistics.median(one[shape][name] for one in found) for name in found[0][shape]}
        for shape in found[0]
    }


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    columns = [*PARTS, "all", "mean", "p90", "hits", "each", "shapes", "processor hit", "processor each"]
    print(f"\n{title}; microseconds")
    print(" " * 40 + "".join(f"{name:>10}" if " " not in name else f"{name:>16}" for name in columns))
    for shape, line in found.items():
        cells = [f"{line[name]:.0%}" if name == "shapes" else f"{1e6 * line[name]:.1f}" for name in columns]
        print(
            f"{shape:40}"
            + "".join(f"{cell:>{16 if ' ' in name else 10}}" for name, cell in zip(columns, cells, strict=True))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, to be run in turns with this one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--profile", action="store_true", help="where the time goes, with the profiler's own share")
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(options.tree or HERE))
    if options.profile:
        profile(options.tokens)
    elif options.tree:
        one_process(options.tokens)
    else:
        trees = [HERE] if options.against is None else [HERE, options.against.resolve()]
        found: dict[Path, list[dict[str, dict[str, float]]]] = {tree: [] for tree in trees}
        for number in range(options.rounds):
            for tree in trees if number % 2 == 0 else trees[::-1]:
                found[tree].append(run(tree, options.tokens))
        for tree in trees:
            show("this checkout" if tree is HERE else str(tree), medians(found[tree]))


if __name__ == "__main__":
    main()
