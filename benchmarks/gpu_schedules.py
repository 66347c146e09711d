"""Prints what our CPU-GPU schedules and caches make of routing traces, beside the rules of published systems.

Run as ``python benchmarks/gpu_schedules.py [--quick] [--each] [--seed N] [--in-slices X]``. Everything is simulated:
the machines below are sets of curves, not measurements, and every strategy is timed on the same curves and the same
trace (``virtual``).

Protocol: the first quarter of the decoded tokens (and the prompt) is the calibration. It gives every strategy the
order in which VRAM is filled, warms every cache, and lets ours choose its variant; the other three quarters judge.
Seconds are of whole decoded tokens: experts and the dense part of every layer.

    hybrimoe  its published rule and constants, MRS, even slots by layer; no prefetch, as its code is run
    fiddler   the most popular experts in VRAM, 7 n against 70: while decoding n is 1, so that it decides as static does
              and is not run again
    lru       every miss uploaded, global LRU (llama.cpp's expert cache)
    static    the most popular experts in VRAM, the rest on the CPU (KTransformers)

``x best`` is the time of the best of these four over ours, cell by cell, so that ours must beat a rival that knows
which rule suits the cell. Ours divides one missing expert of an event between CPU and GPU, as ``cuda_experts`` does
(see ``division``), on curves that carry what slices cost the CPU as ``sliced_experts.py`` measured it (bf16 experts,
for which the runtime has no kernel, take the figure of fp32; ``--in-slices`` takes another); ``whole`` is the same of
ours where none is. ``bound`` is the time that no cache and no scheduler can beat on these curves (Belady's bytes, all
resources always busy); its share of ours is 100 % where nothing is left to gain, and ``most possible x`` is the best
rival over it.

Without ``--seed`` the synthetic traces are those that our rules were written beside, and the recorded ones were looked
at too; ``--seed`` draws other synthetic ones, and leaves the recorded out. Those are read from the folder that
EDGEFLEX_DATA names (or ``../shared/data`` beside the repository).
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser
from dataclasses import replace
from math import exp, fsum, inf, log
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.division import cpu_in_slices, slices_of
from edgeflex.runtimes.strategies import BASELINES, Machine, Strategy
from edgeflex.runtimes.synthetic import TRACE_KINDS, Routing, synthetic_trace
from edgeflex.runtimes.tier_bounds import time_bound_s
from edgeflex.runtimes.trace import Trace, read_trace
from edgeflex.runtimes.virtual import choose_strategy, first_judged_step, judged_part, popular, run_virtual
from edgeflex.schema import Precision
from tests.builders import data_folder

BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
INT4_BYTES = 4_500_000
BITS_INT4 = 4.5
PART_S = 8e-6  # what a second launch costs where an expert is divided
# inner columns of the experts of Mixtral-8x7B, DeepSeek-V2-Lite, Qwen3-30B-A3B and Qwen3-Next-80B, which have as many
# experts as the synthetic traces; they say in how many slices one lies
INNER = {8: 14336, 64: 1408, 128: 768, 512: 512}


class Board(NamedTuple):
    """A machine by its rates: bytes per second of VRAM, CPU and link, operations per second, seconds."""

    gpu: float
    cpu: float
    link: float
    gpu_ops: float
    cpu_ops: float
    dense_s: float
    cpu_beside_link: float
    link_beside_cpu: float


# Rates reached, not printed on the box: PCIe 4.0 x16 brings 25 GB/s, 5.0 x16 50 GB/s, a laptop's x8 10 GB/s. The
# last two factors say how CPU and link share the RAM: together they get 70, 45 and 85 GB/s or so.
BOARDS = {
    "desktop, PCIe 4.0": Board(0.85e12, 60e9, 25e9, 40e12, 1.0e12, 50e-6, 1.10, 1.05),
    "desktop, PCIe 5.0": Board(1.40e12, 65e9, 50e9, 60e12, 1.2e12, 45e-6, 1.35, 1.25),
    "laptop, PCIe x8": Board(0.25e12, 40e9, 10e9, 15e12, 0.6e12, 90e-6, 1.10, 1.05),
}


def machine_of(board: Board, expert_bytes: int, bits: float, inner: int, in_slices: float | None) -> Machine:
    """Return curves by roofline: a launch, then the slower of reading the weights and computing the rows."""
    measured = cpu_in_slices(Precision.INT4_GROUP32 if bits == BITS_INT4 else Precision.FP32)
    ops = 2 * expert_bytes * 8 / bits

    def curve(launch_s: float, bytes_per_s: float, ops_per_s: float) -> Curve:
        return Curve(
            tuple(
                (rows, launch_s + max(expert_bytes / bytes_per_s, rows * ops / ops_per_s))
                for rows in (1, 4, 16, 64, 256)
            )
        )

    curves = Curves(
        gpu=curve(6e-6, board.gpu, board.gpu_ops),
        cpu=curve(8e-6, board.cpu, board.cpu_ops),
        link_bytes_per_s=board.link,
        link_latency_s=8e-6,
        cpu_beside_link=board.cpu_beside_link,
        link_beside_cpu=board.link_beside_cpu,
        cpu_in_slices=measured if in_slices is None else in_slices,
    )
    return Machine(curves, Curve(((1, board.dense_s), (64, 2 * board.dense_s))), part_s=PART_S, slices=slices_of(inner))


class Case(NamedTuple):
    """A trace with its name, and bits and inner columns of its experts."""

    name: str
    trace: Trace
    bits: float
    inner: int


def cases(*, quick: bool, seed: int) -> list[Case]:
    """Return every trace; layers are fewer than those of the real decoders, since they only repeat."""
    tokens = 64 if quick else 96
    shapes = [(24, 8, 2), (12, 64, 6), (12, 128, 8), (8, 512, 10)]
    found = []
    for layers, experts, top_k in shapes:
        for number, kind in enumerate(TRACE_KINDS):
            # every third in bf16
            bits = 16.0 if (number + experts) % 3 == 2 else BITS_INT4
            size = int(INT4_BYTES * bits / BITS_INT4)
            trace = synthetic_trace(kind, Routing(layers, experts, top_k, tokens, 0, size), seed=10 * seed + number)
            found.append(
                Case(f"{kind} {experts}/{top_k} {'bf16' if bits == 16.0 else 'int4'}", trace, bits, INNER[experts])
            )
    folder = None if seed else data_folder()
    recorded = (("qwen", "Qwen3-30B-A3B 128/6", 768), ("gptoss", "gpt-oss-120b 128/2", 2880))
    for name, model, inner in () if seed else recorded:
        path = folder / "moe-traces" / f"{name}.route.csv" if folder else None
        if path and path.is_file():
            found.append(Case(f"recorded {model}", read_trace(path), BITS_INT4, inner))
        else:
            print(f"recorded trace {name}: not there, left out")
    return found


class Cell(NamedTuple):
    """One trace, board and budget: seconds per token of each strategy, of ours, of ours undivided, and of the bound."""

    board: str
    case: str
    budget: float
    rivals: dict[str, float]
    ours: float
    whole: float
    static_of_ours: bool
    bound: float
    hit_rate: float
    event_s: float

    @property
    def ratio(self) -> float:
        return min(self.rivals.values()) / self.ours


def cell_of(board: str, case: Case, budget: float, in_slices: float | None) -> Cell:
    trace = case.trace
    sizes = trace.sizes()
    machine = machine_of(BOARDS[board], int(sizes.max()), case.bits, case.inner, in_slices)
    vram_bytes = int(budget * sizes.sum())
    first = first_judged_step(trace)
    order = popular(trace, first)

    def run(strategy: Strategy, on: Machine = machine):
        return run_virtual(trace, on, strategy, vram_bytes=vram_bytes, order=order, first_step=first)

    def chosen(on: Machine) -> Strategy:
        return choose_strategy(trace, on, vram_bytes=vram_bytes, first_step=first)

    rivals = {name: run(Strategy(name)).mean_s for name in BASELINES if name != "fiddler"}
    rivals["fiddler"] = rivals["static"]
    undivided = replace(machine, part_s=inf)
    whole = run(chosen(undivided), undivided)
    strategy = chosen(machine)
    started = time.process_time()
    ours = run(strategy)
    event_s = (time.process_time() - started) / len(trace.events)
    layers = int(sizes.any(axis=1).sum())
    bound = time_bound_s(
        judged_part(trace, first), machine.curves, vram_bytes, int(sizes.sum()), dense_s=layers * machine.dense(1)
    )
    return Cell(
        board, case.name, budget, rivals, ours.mean_s, whole.mean_s, strategy.static, bound, ours.hit_rate, event_s
    )


def least(cell: Cell) -> float:
    """Return how many times the best rival takes the time that nothing can beat."""
    return min(cell.rivals.values()) / cell.bound


def mean(values) -> float:
    values = list(values)
    return exp(fsum(log(value) for value in values) / len(values))


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        cells = zip(row, widths, strict=True)
        print(
            "  " + "  ".join(cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(cells))
        )


def summary(name: str, cells: list[Cell]) -> list[str]:
    row = [name]
    row += [f"{mean(cell.rivals[rival] / cell.ours for cell in cells):.2f}" for rival in BASELINES]
    row += [f"{mean(cell.ratio for cell in cells):.2f}", f"{min(cell.ratio for cell in cells):.2f}"]
    row += [f"{100 * mean(cell.bound / cell.ours for cell in cells):.0f} %"]
    best = mean(map(least, cells))
    whole = [min(cell.rivals.values()) / cell.whole for cell in cells]
    return [*row, f"{best:.2f}", f"{mean(whole):.2f}", f"{min(whole):.2f}"]


def main() -> None:
    started = time.process_time()
    parser = ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer tokens and budgets")
    parser.add_argument("--each", action="store_true", help="print every cell")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic traces; above 0 leaves the recorded out")
    parser.add_argument("--in-slices", type=float, help="how much longer the CPU takes over slices; default: measured")
    asked = parser.parse_args()
    budgets = (0.1, 0.3, 0.6) if asked.quick else BUDGETS
    traces = cases(quick=asked.quick, seed=asked.seed)
    print(f"seed {asked.seed}: " + ("traces that no rule was written beside" if asked.seed else "traces known before"))
    taken = {bits: machine_of(BOARDS["laptop, PCIe x8"], 1, bits, 768, asked.in_slices) for bits in (BITS_INT4, 16.0)}
    factors = ", ".join(f"{machine.curves.cpu_in_slices:.3f} in {bits:g} bits" for bits, machine in taken.items())
    print(f"the CPU's seconds over experts in slices, over those of whole ones: {factors}")
    cells = []
    for board in BOARDS:
        cells += [cell_of(board, case, budget, asked.in_slices) for case in traces for budget in budgets]
    header = ["", *(f"x {name}" for name in BASELINES), "x best", "worst cell", "bound / ours", "most possible x"]
    header += ["whole", "worst"]
    if asked.each:
        each = [
            [
                f"{cell.board}, {cell.case}, {100 * cell.budget:.0f} %",
                *(f"{1e3 * cell.rivals[rival]:.2f}" for rival in BASELINES),
                f"{1e3 * cell.ours:.2f}",
                f"{cell.ratio:.2f}",
                "static" if cell.static_of_ours else "cache",
                f"{100 * cell.hit_rate:.0f} %",
                f"{1e3 * cell.bound:.2f}",
                f"{100 * cell.bound / cell.ours:.0f} %",
                f"{least(cell):.2f}",
                f"{min(cell.rivals.values()) / cell.whole:.2f}",
            ]
            for cell in cells
        ]
        columns = ["ours", "x best", "variant", "hits", "bound", "share", "most", "whole"]
        print_table("ms per token", ["", *BASELINES, *columns], each)
    for title, key in (
        ("board", lambda cell: cell.board),
        ("trace", lambda cell: cell.case),
        ("VRAM", lambda cell: f"{100 * cell.budget:.0f} % of experts"),
    ):
        names = list(dict.fromkeys(key(cell) for cell in cells))
        rows = [summary(name, [cell for cell in cells if key(cell) == name]) for name in names]
        print_table(f"by {title} (geometric means of others' seconds over ours)", header, rows)
    print_table(f"all {len(cells)} cells", header, [summary("all", cells)])
    worst = min(cells, key=lambda cell: cell.ratio)
    print(f"\nworst cell: {worst.board}, {worst.case}, {100 * worst.budget:.0f} %: {worst.ratio:.3f}")
    print(f"cells below 0.97: {sum(cell.ratio < 0.97 for cell in cells)}; numpy {np.__version__}, one thread")
    print(f"cells where even the bound is below 1.2 of the best rival: {sum(least(cell) < 1.2 for cell in cells)}")
    print(
        "deciding about an event, its simulation included: "
        f"{1e6 * mean(cell.event_s for cell in cells):.0f} us in the mean, at most "
        f"{1e6 * max(cell.event_s for cell in cells):.0f} us (Python)"
    )
    print(f"processor time {time.process_time() - started:.0f} s")


if __name__ == "__main__":
    main()
