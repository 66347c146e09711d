"""Exit policies against exhaustive enumeration, and the rule of the runtime."""

from __future__ import annotations

import itertools
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.costs import policies
from edgeflex.costs.policies import (
    ExitOutputs,
    Policy,
    anchored,
    exit_outputs,
    exits_taken,
    judge,
    paired_losses,
    policy_pool,
    reach_of,
    safety_path,
)
from edgeflex.runtimes.loop import exits_for
from tests.small_graphs import probabilities

COSTS = (1.0, 0.7, 1.3)


def outputs(seed: int, count: int, exits: int = 3, *, distinct: bool = True) -> ExitOutputs:
    """Return exits whose confidence means something and that get better with depth."""
    draw = np.random.default_rng(seed)
    if distinct:
        ranks = np.tile(np.arange(1, count + 1) / (count + 1), (exits, 1))
        confidence = draw.permuted(ranks, axis=1).T.copy()
    else:
        confidence = draw.integers(1, 6, size=(count, exits)) / 6
    chance = 0.35 + 0.5 * confidence + 0.12 * np.arange(exits) - 0.3 * draw.random((count, 1))
    return ExitOutputs(confidence, draw.random((count, exits)) < chance)


def every_policy(given_outputs: ExitOutputs) -> list[Policy]:
    """Return every policy of a three-exit model that does anything different on these outputs."""

    def cuts(column: int) -> list[float | None]:
        ranked = np.unique(given_outputs.confidence[:, column])
        return [None, *(float(value) for value in (ranked[1:] + ranked[:-1]) / 2), 0.0]

    return [judge(given_outputs, pair, COSTS) for pair in itertools.product(cuts(0), cuts(1))]


def worth(policy: Policy, price: float) -> float:
    return policy.error + price * policy.cost / sum(COSTS)


def test_a_policy_judged_by_hand():
    confidence = np.array([[0.9, 0.2], [0.5, 0.8], [0.4, 0.7], [0.95, 0.1]])
    correct = np.array([[True, False], [False, True], [True, False], [False, True]])
    policy = judge(ExitOutputs(confidence, correct), (0.6,), (2.0, 3.0))
    # images 0 and 3 leave at once: right, wrong; 1 and 2 go on: right, wrong
    assert policy.reach == (1.0, 0.5)
    assert policy.error == pytest.approx(0.5)
    assert policy.cost == pytest.approx(3.5)


def test_confidence_and_correctness_come_from_the_greatest_probability():
    given_probabilities = np.array([[[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]]], dtype=np.float32)
    found = exit_outputs(given_probabilities, np.array([1]))
    assert found.confidence.dtype == np.float64
    assert found.confidence.tolist() == [[0.5, float(np.float32(0.7))]]
    assert found.correct.tolist() == [[True, False]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    thresholds=st.tuples(*[st.one_of(st.none(), st.floats(0.0, 1.0), st.just(0.5)) for _ in range(2)]),
)
def test_images_leave_where_the_runtime_says(seed: int, thresholds: tuple[float | None, ...]):
    labels, given_probabilities = probabilities(30, seed)
    found = exits_taken(exit_outputs(given_probabilities, labels), thresholds)
    assert found.tolist() == exits_for(given_probabilities, (*thresholds, None)).tolist()


def test_a_confidence_that_equals_its_threshold_leaves():
    labels, given_probabilities = probabilities(20, 3)
    found = exit_outputs(given_probabilities, labels)
    for row in range(20):
        threshold = float(found.confidence[row, 0])
        assert exits_taken(found, (threshold, None))[row] == 0
        assert exits_for(given_probabilities, (threshold, None, None))[row] == 0


@pytest.mark.parametrize("seed", range(12))
def test_the_pool_holds_the_best_policy_of_all_at_nearly_every_price(seed: int):
    count = (10, 25, 40)[seed % 3]
    found = outputs(seed, count)
    pool, everything = policy_pool(found, COSTS), every_policy(found)
    prices = np.geomspace(0.005, 2.0, 28)
    gaps = np.array([min(worth(p, c) for p in pool) - min(worth(p, c) for p in everything) for c in prices])
    assert gaps.min() > -1e-9, "the pool beats every policy: a policy is judged wrongly"
    # descent moves one threshold at a time and may stop short, by a few images at a few prices
    assert np.mean(gaps < 1e-9) >= 0.75
    assert gaps.max() <= 2.5 / count


def test_over_many_models_the_pool_misses_the_best_policy_at_few_prices():
    gaps = []
    for seed in range(100, 120):
        found = outputs(seed, 24)
        pool, everything = policy_pool(found, COSTS), every_policy(found)
        for price in np.geomspace(0.005, 2.0, 12):
            gaps.append(min(worth(p, price) for p in pool) - min(worth(p, price) for p in everything))
    assert np.mean(np.array(gaps) < 1e-9) >= 0.95


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), exits=st.integers(1, 4), distinct=st.booleans())
def test_no_policy_of_the_pool_beats_another_at_its_depth(seed: int, exits: int, distinct: bool):
    found = outputs(seed, 60, exits, distinct=distinct)
    pool = policy_pool(found, (1.0,) * exits, prices=8)
    for one in pool:
        assert judge(found, one.thresholds, (1.0,) * exits) == one
        assert one.reach[0] == 1.0
        assert all(later <= earlier for earlier, later in pairwise(one.reach))
        depth = sum(share > 0 for share in one.reach)
        for other in pool:
            better = other.cost < one.cost and other.error < one.error
            assert not (better and sum(share > 0 for share in other.reach) <= depth)
    assert [one.cost for one in pool] == sorted(one.cost for one in pool)


def test_full_depth_stays_where_nothing_beats_it_and_goes_where_something_does():
    count = 30
    confidence = outputs(0, count).confidence
    late = ExitOutputs(confidence, np.tile([False, False, True], (count, 1)))
    early = ExitOutputs(confidence, np.tile([True, False, False], (count, 1)))
    assert policy_pool(late, COSTS)[-1].thresholds == (None, None)
    assert [(policy.reach, policy.error) for policy in policy_pool(early, COSTS)] == [((1.0, 0.0, 0.0), 0.0)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), first=st.integers(0, 40), second=st.integers(0, 40))
def test_anchoring_gives_exactly_the_reach_that_was_asked_for(seed: int, first: int, second: int):
    count = 40
    reach = (1.0, 1.0 - first / count, max(0.0, 1.0 - (first + second) / count))
    found = outputs(seed, count)
    taken = exits_taken(found, anchored(found, reach))
    assert reach_of(taken, 3) == pytest.approx(reach)


def test_anchoring_on_other_outputs_keeps_the_mean_cost_of_a_policy():
    policy = judge(outputs(1, 200), (0.8, 0.5), COSTS)
    other = outputs(2, 200)
    assert judge(other, anchored(other, policy.reach), COSTS).cost == pytest.approx(policy.cost)


def test_a_rank_cut_spreads_the_exits_by_the_ratio():
    found = outputs(5, 4000)
    for ratio in (0.5, 1.0, 2.0):
        taken = exits_taken(found, policies._rank_cut(found, ratio))
        shares = np.bincount(taken, minlength=3) / len(taken)
        wanted = ratio ** np.arange(3) / sum(ratio ** np.arange(3))
        assert shares == pytest.approx(wanted, abs=0.01)


def test_a_safety_path_leads_from_full_depth_and_never_turns_back():
    path = safety_path((0.6, None, 0.9))
    assert path[0] == (None, None, None)
    assert all(one[1] is None for one in path)
    found = outputs(4, 500, 4)
    depths = [sum(judge(found, one, (1.0,) * 4).reach) for one in (*path, (0.6, None, 0.9))]
    assert depths == sorted(depths, reverse=True)


def test_paired_losses_are_one_where_only_the_reference_is_right():
    confidence = np.array([[0.9, 0.5]] * 4)
    plan = ExitOutputs(confidence, np.array([[True, True], [False, True], [True, False], [False, False]]))
    reference = ExitOutputs(confidence, np.array([[True, True], [True, True], [True, False], [True, False]]))
    losses = paired_losses(plan, reference, [(0.8,), (None,)])
    # leaving early: right, wrong, right, wrong against the last exit's right, right, wrong, wrong
    assert losses.tolist() == [[0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    drop = judge(plan, (0.8,), (1.0, 1.0)).error - judge(reference, (None,), (1.0, 1.0)).error
    assert losses[0].mean() == pytest.approx(drop)
