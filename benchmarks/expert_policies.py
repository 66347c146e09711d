"""Prints what each replacement policy makes of the public routing traces, and what it costs to ask it.

Run as ``python benchmarks/expert_policies.py [trace.csv ...]``; without names, the two public traces are read from
the folder that EDGEFLEX_DATA names (or ``../shared/data`` beside the repository).

Semantics: an event is one layer of one forward pass, atomic; the prompt warms the cache; hit rates and bytes are of
decoding; ties go to the lowest (layer, expert). ``static*`` is ordered by the counts of the trace that it is then
replayed on, which no run can know. Microseconds are processor time of the whole cache per event, not of a device.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from edgeflex.runtimes.expert_cache import ExpertCache
from edgeflex.runtimes.policies import POLICIES, make_policy
from edgeflex.runtimes.replay import replay
from edgeflex.runtimes.trace import Trace, read_trace
from tests.builders import data_folder

MIB = 1 << 20
BUDGETS_MIB = (500, 1000, 2000, 3000)


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        cells = zip(row, widths, strict=True)
        print(
            "  "
            + "  ".join(cell.ljust(width) if not at else cell.rjust(width) for at, (cell, width) in enumerate(cells))
        )


def policies_of(name: str, trace: Trace) -> None:
    cycle = int((trace.sizes()[:, 0] * trace.top_k).sum())
    header = ["policy"]
    for mib in BUDGETS_MIB:
        header += [f"{mib} MiB %", "MiB/token", "gap %", "us/event"]
    best = {mib: replay(trace, mib * MIB, "belady") for mib in BUDGETS_MIB}
    rows = []
    for policy in (*POLICIES, "belady", "belady-bypass"):
        row = [f"{policy}*" if policy == "static" else policy]
        for mib in BUDGETS_MIB:
            started = time.process_time()
            result = replay(trace, mib * MIB, policy)
            spent = time.process_time() - started
            gap = (result.misses - best[mib].misses) / result.misses if result.misses else 0.0
            row += [
                f"{100 * result.hit_rate:.1f}",
                f"{result.bytes_per_token / MIB:.0f}",
                f"{100 * gap:.1f}",
                f"{1e6 * spent / len(trace.events):.0f}",
            ]
        rows.append(row)
    print_table(
        f"{name}: {trace.layers} layers x {trace.experts} experts, top-{trace.top_k}, {trace.decode_tokens} tokens "
        f"decoded, T = {cycle / MIB:.0f} MiB; gap = share of the policy's misses that Belady (forced) does not make",
        header,
        rows,
    )


def cost_of_asking(layers: int, experts: int, top_k: int) -> list[str]:
    """Return the processor time of an all-hit event and of one that must evict as many as it uses."""
    row = [f"{layers} x {experts} top-{top_k}"]
    sizes = np.ones((layers, experts), dtype=np.int64)
    draw = np.random.default_rng(0)
    used = [tuple(sorted(draw.choice(experts, top_k, replace=False).tolist())) for _ in range(2000)]
    weights = tuple([1.0 / top_k] * top_k)
    for policy in ("lru", "lfru", "enu"):
        cache = ExpertCache(sizes.size, sizes, make_policy(policy, layers=layers, experts=experts, top_k=top_k))
        for layer in range(layers):
            cache.event(0, layer, range(experts), decoding=True)
        started = time.process_time()
        for number, chosen in enumerate(used):
            cache.event(1 + number // layers, number % layers, chosen, weights, decoding=True)
        row.append(f"{1e6 * (time.process_time() - started) / len(used):.1f}")
        cache = ExpertCache(sizes.size // 4, sizes, make_policy(policy, layers=layers, experts=experts, top_k=top_k))
        for number, chosen in enumerate(used):
            cache.event(number // layers, number % layers, chosen, weights, decoding=True)
        before, started = cache.stats().misses, time.process_time()
        for number, chosen in enumerate(used):
            cache.event(2000 + number // layers, number % layers, chosen, weights, decoding=True)
        spent = time.process_time() - started
        row.append(f"{1e6 * spent / len(used):.1f} ({(cache.stats().misses - before) / len(used):.1f})")
    return row


def main() -> None:
    folder = data_folder()
    named = [Path(argument) for argument in sys.argv[1:]]
    paths = named or [folder / "moe-traces" / f"{name}.route.csv" for name in ("qwen", "gptoss") if folder]
    for path in paths:
        if path.is_file():
            policies_of(path.name, read_trace(path))
        else:
            print(f"\n{path}: not there, left out")
    header = ["microseconds per event"]
    header += [f"{policy} {kind}" for policy in ("lru", "lfru", "enu") for kind in ("all hit", "evicting (misses)")]
    shapes = [(8, 32, 4), (16, 64, 8), (48, 128, 8), (48, 512, 10)]
    print_table("cost of asking, processor time", header, [cost_of_asking(*shape) for shape in shapes])


if __name__ == "__main__":
    main()
