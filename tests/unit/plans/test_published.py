"""Published selections, reproduced from their own objectives."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from edgeflex.plans import check, solve
from edgeflex.schema import Budget, Tier
from tests.builders import HAWQ_PUBLISHED, hawq_table, mixtral_table, needed_data

pytestmark = pytest.mark.needs_data


@cache
def instance(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(needed_data("planning", name).read_text())
    return loaded


@pytest.mark.parametrize(("quantity", "ratio"), HAWQ_PUBLISHED)
def test_hawq_resnet18_is_reproduced(quantity: str, ratio: float):
    table, low, high = hawq_table(instance("hawq-v3-resnet18.json"), quantity)
    budget = Budget(memory_bytes={Tier.HOST: int(low + ratio * (high - low))}, minimize="drop")
    solution = solve(table, budget, tolerance=0.0)
    counted = check(table, budget, solution)
    assert round(counted.loss, 5) == HAWQ_PUBLISHED[quantity, ratio]
    assert solution.proof.status == "optimal"


@pytest.mark.parametrize("bits", ["12", "16", "20"])
def test_mixtral_blocks_equal_the_official_selection(bits: str):
    loaded = instance("mc-moe-mixtral.json")
    official = loaded["official_selection_by_total_bits_times_8"][bits]
    budget = Budget(memory_bytes={Tier.HOST: int(bits)}, minimize="drop")
    for block in official:
        solution = solve(mixtral_table(loaded, [block]), budget, tolerance=0.0)
        taken = {choice.subject.split(".")[1]: int(choice.option) for choice in solution.choices}
        assert taken == official[block]


@pytest.mark.parametrize(
    ("bits", "blockwise", "better"), [(12, 29.70e6, 0.32), (16, 21.46e6, 0.35), (20, 15.41e6, 0.23)]
)
def test_one_plan_for_all_mixtral_blocks_beats_planning_each(bits: int, blockwise: float, better: float):
    loaded = instance("mc-moe-mixtral.json")
    table = mixtral_table(loaded, list(loaded["frequency"]))
    budget = Budget(memory_bytes={Tier.HOST: 32 * bits}, minimize="drop")
    counted = check(table, budget, solve(table, budget))
    assert counted.loss < blockwise * (1.005 - better)
