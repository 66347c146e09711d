"""Prints the planner's figures: published selections, speed, and agreement with exhaustive search.

Run as ``python benchmarks/planner.py``; the published instances are read from the folder that EDGEFLEX_DATA
names (or ``../shared/data`` beside the repository) and left out where it is absent.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

# one thread, so that figures do not depend on the machine's cores; before numpy and HiGHS start
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgeflex.errors import InfeasibleError, InputError
from edgeflex.plans import check, footprint, shortfalls, solve
from edgeflex.schema import Budget, Choice, CostTable, LatencyLimit, Tier
from tests.builders import (
    HAWQ_PUBLISHED,
    data_folder,
    hawq_table,
    mixtral_table,
    random_budget,
    random_table,
    synthetic_table,
)


def print_table(title: str, header: list[str], rows: list[list[object]]) -> None:
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def published(name: str) -> dict | None:
    folder = data_folder()
    path = folder / "planning" / name if folder else None
    if path is None or not path.is_file():
        print(f"\n{name}: not in the data folder, left out")
        return None
    return json.loads(path.read_text())


def hawq() -> None:
    instance = published("hawq-v3-resnet18.json")
    if instance is None:
        return
    rows = []
    for (quantity, ratio), value in HAWQ_PUBLISHED.items():
        table, low, high = hawq_table(instance, quantity)
        budget = Budget(memory_bytes={Tier.HOST: int(low + ratio * (high - low))}, minimize="drop")
        solution = solve(table, budget, tolerance=0.0)
        counted = check(table, budget, solution)
        int8 = sum(choice.option == "int8" for choice in solution.choices)
        same = "yes" if round(counted.loss, 5) == value else "NO"
        rows.append([quantity, ratio, f"{value:.5f}", f"{counted.loss:.5f}", same, int8, solution.proof.status])
    header = ["budget", "ratio", "published", "ours", "equal", "int8 layers", "status"]
    print_table("HAWQ-v3 ResNet-18: perturbation within 4 bit + ratio x (8 bit - 4 bit)", header, rows)


def mixtral() -> None:
    instance = published("mc-moe-mixtral.json")
    if instance is None:
        return
    rows = []
    for bits, official in instance["official_selection_by_total_bits_times_8"].items():
        same, blockwise = 0, 0.0
        for block, selection in official.items():
            table = mixtral_table(instance, [block])
            solution = solve(table, Budget(memory_bytes={Tier.HOST: int(bits)}, minimize="drop"), tolerance=0.0)
            blockwise += solution.proof.objective
            same += sum(int(one.option) == selection[one.subject.split(".")[1]] for one in solution.choices)
        row: list[object] = [f"{int(bits) / 8:.1f}", f"{same}/256", f"{blockwise / 1e6:.2f}e6"]
        for side_rules in (True, False):
            table = mixtral_table(instance, list(official), side_rules=side_rules)
            budget = Budget(memory_bytes={Tier.HOST: int(bits) * len(official)}, minimize="drop")
            began = time.perf_counter()
            solution = solve(table, budget)
            seconds = time.perf_counter() - began
            loss = check(table, budget, solution).loss
            row += [f"{loss / 1e6:.2f}e6 ({(loss / blockwise - 1) * 100:+.0f} %)", f"{seconds:.2f} s"]
        rows.append(row)
    header = ["bits", "experts as official", "a block at a time", "one plan, same rules", "", "one plan, no rules", ""]
    print_table("MC-MoE Mixtral-8x7B: official objective, 32 blocks of 8 experts", header, rows)


def timed(name: str, table: CostTable, budget: Budget, bar_s: float) -> list[object]:
    solve(table, budget)
    seconds, cpu = [], []
    for _ in range(5):
        began, began_cpu = time.perf_counter(), time.process_time()
        solution = solve(table, budget)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    check(table, budget, solution)
    middle = statistics.median(seconds)
    proof = solution.proof
    times = [f"{middle:.2f} s", f"{max(seconds):.2f} s", f"{statistics.median(cpu):.2f} s", f"{bar_s} s"]
    return [name, proof.status, f"{proof.gap * 100:.4f} %", *times, "yes" if middle < bar_s else "NO"]


def speed() -> None:
    rows = []
    for seed in range(3):
        table = synthetic_table(224, seed, bits=(2, 3, 4, 6, 8))
        sizes = [[one.memory_bytes[Tier.HOST] for one in layer.options] for layer in table.decisions]
        size = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
        latency = (LatencyLimit(limit_s=size * 3e-10 * 0.97),)
        budget = Budget(memory_bytes={Tier.HOST: size}, latency=latency, minimize="drop")
        rows.append(timed(f"224 x 5, memory + latency, seed {seed}", table, budget, 0.3))
    table = synthetic_table(6144, 0, tiers=(Tier.DEVICE, Tier.HOST, Tier.FLASH), bits=(2, 4, 8))
    total = sum(max(max(one.memory_bytes.values()) for one in layer.options) for layer in table.decisions)
    for share, pace in ((0.2, 2e-10), (0.3, 3e-10)):
        size = int(total * share)
        latency = (LatencyLimit(limit_s=total * pace),)
        budget = Budget(memory_bytes={Tier.DEVICE: size, Tier.HOST: size}, latency=latency, minimize="drop")
        rows.append(timed(f"6144 x 9, device + host + latency, {share:.0%} each", table, budget, 5.0))
    header = ["instance", "status", "gap", "median", "worst", "CPU", "bar", "kept"]
    print_table("Time to solve, table in memory, 1 thread, median of 5", header, rows)


def least_of_all(table: CostTable, budget: Budget) -> float:
    best = math.inf
    for names in itertools.product(*([one.name for one in layer.options] for layer in table.decisions)):
        choices = tuple(
            Choice(subject=layer.subject, option=name) for layer, name in zip(table.decisions, names, strict=True)
        )
        taken = dict(zip((layer.subject for layer in table.decisions), names, strict=True))
        tied = {(layer.tie, taken[layer.subject]) for layer in table.decisions if layer.tie}
        counts = [(rule, sum(taken[one] == rule.option for one in rule.subjects)) for rule in table.rules]
        in_rules = all(
            rule.at_least <= count <= (math.inf if rule.at_most is None else rule.at_most) for rule, count in counts
        )
        if len(tied) > 1 or not in_rules:
            continue
        for index in range(len(table.scenarios)):
            counted = footprint(table, index, choices)
            if not shortfalls(counted, budget):
                least = {"drop": counted.loss, "latency": counted.latency_s[budget.statistic]}
                tiers = budget.memory_bytes or Tier
                least["memory"] = float(sum(counted.memory_bytes.get(tier, 0) for tier in tiers))
                best = min(best, least[budget.minimize])
    return best


def agreement(tables: int = 400) -> None:
    counts = {"plan": 0, "no plan": 0, "refused table": 0, "DIFFERENT": 0}
    for seed in range(tables):
        table, budget = random_table(seed), random_budget(seed)
        try:
            found = check(table, budget, solution := solve(table, budget, tolerance=0.0)) and solution.proof.objective
        except InfeasibleError:
            found = math.inf
        except InputError:
            counts["refused table"] += 1
            continue
        least = least_of_all(table, budget)
        same = found == least or math.isclose(found, least, rel_tol=1e-9, abs_tol=1e-12)
        counts["DIFFERENT" if not same else "no plan" if math.isinf(found) else "plan"] += 1
    title = "Agreement with exhaustive search: ties, boundaries, rules, misses, up to 3 scenarios and 5 budgets"
    print_table(title, ["both", "tables"], [[name, count] for name, count in counts.items()])


if __name__ == "__main__":
    hawq()
    mixtral()
    speed()
    agreement()
