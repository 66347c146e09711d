"""Prints how many certification images a promise about accuracy takes, and whether the promise keeps its level.

Run as ``python benchmarks/guarantee_samples.py``. Images are drawn from a made-up population in which the plan
and the full-depth network disagree on a given share, so that the true drop is known; nothing is measured on a
device. It takes a few minutes on one core.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

# one thread, so that it disturbs nothing else; before numpy starts
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from edgeflex.costs.store import SHARES
from edgeflex.plans import certify, samples_needed

CONFIDENCE = 0.95
POPULATION = 1_000_000
POWER = 0.8
POWER_DRAWS = 100
LEVEL_DRAWS = 400
GROWTH = 1.15
MOST_SIMULATED = 8_000  # images of a draw; for more the estimate stands, since it errs less the more there are


@dataclass(frozen=True)
class World:
    """A plan against its full-depth network: on ``churn`` of the images exactly one of them is right."""

    drop: float
    churn: float

    @property
    def lost(self) -> float:
        """Share of images that only the full-depth network gets right."""
        return (self.churn + self.drop) / 2

    @property
    def won(self) -> float:
        """Share of images that only the plan gets right."""
        return (self.churn - self.drop) / 2

    def population(self) -> np.ndarray:
        """Return losses 1, -1 and 0 in the world's exact shares."""
        lost, won = round(self.lost * POPULATION), round(self.won * POPULATION)
        return np.repeat([1.0, -1.0, 0.0], [lost, won, POPULATION - lost - won])

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return the losses of ``count`` images drawn at random."""
        return rng.choice([1.0, -1.0, 0.0], size=count, p=[self.lost, self.won, 1.0 - self.lost - self.won])


def certified_share(world: World, limit: float, count: int, draws: int, seed: int) -> float:
    rng = np.random.default_rng(seed)
    passed = [certify(world.draw(count, rng)[None], limit, CONFIDENCE) is not None for _ in range(draws)]
    return float(np.mean(passed))


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    for cells in (header, ["---:"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")


def needed(world: World, limit: float, seed: int) -> tuple[int, str]:
    """Return the images that certify in four draws of five, and the share of draws that were."""
    count = samples_needed(world.population(), limit, CONFIDENCE)
    if count is None:
        raise SystemExit(f"a drop of {world.drop} is not below {limit}")
    while count <= MOST_SIMULATED:
        share = certified_share(world, limit, count, POWER_DRAWS, seed)
        if share >= POWER:
            return count, f"{share * 100:.0f} %"
        count = int(count * GROWTH) + 1
    return count, "estimated"


def power_rows() -> list[list[str]]:
    rows = []
    for limit in (0.005, 0.01, 0.02, 0.05):
        for share, churn in ((0.0, 0.02), (0.0, 0.06), (0.5, 0.06)):
            world = World(drop=share * limit, churn=churn)
            count, seen = needed(world, limit, seed=len(rows))
            folder = -(-count / SHARES["certify"] // 100) * 100
            rows.append(
                [
                    f"{limit * 100:g} %",
                    f"{world.drop * 100:g} %",
                    f"{churn * 100:g} %",
                    f"{count:,}",
                    f"{folder:,.0f}",
                    seen,
                ]
            )
    return rows


def level_rows() -> list[list[str]]:
    rows = []
    for limit, churn, count in ((0.01, 0.06, 500), (0.01, 0.06, 2000), (0.02, 0.06, 1000), (0.05, 0.10, 500)):
        broken = certified_share(World(drop=limit, churn=churn), limit, count, LEVEL_DRAWS, seed=100 + len(rows))
        rows.append([f"{limit * 100:g} %", f"{churn * 100:g} %", f"{count:,}", f"{broken * 100:.1f} %"])
    return rows


def main() -> None:
    print_table(
        f"Certification images for a promise with {CONFIDENCE:.0%} confidence, and how often the promise could be made"
        f" with that many ({POWER_DRAWS} draws)",
        ["promised drop", "true drop", "disagreement", "certification images", "images for calibrate", "promise made"],
        power_rows(),
    )
    print_table(
        f"Plans whose true drop is exactly the limit: how often they are promised, wrongly ({LEVEL_DRAWS} draws; at "
        f"most {1 - CONFIDENCE:.0%} is allowed)",
        ["promised drop", "disagreement", "certification images", "promise made"],
        level_rows(),
    )


if __name__ == "__main__":
    main()
