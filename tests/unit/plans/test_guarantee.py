"""The promise: how often it may break, what it needs to be given, and what it refuses."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeflex.errors import InputError
from edgeflex.plans import betting_p_value, certify, samples_needed, upper_bound
from edgeflex.plans.guarantee import _wealth

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

DRAWS = 2000


def differences(
    rng: np.random.Generator, shape: tuple[int, int], mean: float, discordant: float
) -> NDArray[np.float64]:
    """Paired differences of 0/1 losses: 1, -1, and mostly 0."""
    draw = rng.random(shape)
    return (draw < (discordant + mean) / 2) * 1.0 - (draw > 1 - (discordant - mean) / 2) * 1.0


def rare_gain(rng: np.random.Generator, shape: tuple[int, int], mean: float) -> NDArray[np.float64]:
    """Slightly above the mean nearly always, rarely far below it: a normal bound breaks here."""
    return np.where(rng.random(shape) < 0.01, -0.5, mean + 0.01 * (0.5 + mean) / 0.99)


@pytest.mark.parametrize(
    ("name", "limit", "samples", "draw"),
    [
        ("differences", 0.01, 500, lambda r, s, m: differences(r, s, m, 0.06)),
        ("differences, many", 0.02, 300, lambda r, s, m: differences(r, s, m, 0.5)),
        ("hardly any differences", 0.01, 400, lambda r, s, m: differences(r, s, m, 0.0101)),
        ("bernoulli", 0.1, 300, lambda r, s, m: (r.random(s) < m) * 1.0),
        ("beta", 0.1, 200, lambda r, s, m: r.beta(4 * m, 4 * (1 - m), s)),
        ("two points", 0.3, 200, lambda r, s, m: np.where(r.random(s) < 0.5, m - 0.2, m + 0.2)),
        ("rare gain", 0.05, 200, rare_gain),
    ],
)
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_at_the_limit_the_promise_is_given_at_most_as_often_as_it_may_break(
    name: str,
    limit: float,
    samples: int,
    draw: Callable[[np.random.Generator, tuple[int, int], float], NDArray[np.float64]],
    confidence: float,
):
    rows = draw(np.random.default_rng(7), (DRAWS, samples), limit)
    passed = _wealth(rows, np.full(DRAWS, limit), confidence) * (1 - confidence) >= 1
    allowed = 1 - confidence
    assert passed.mean() <= allowed + 3 * np.sqrt(allowed * confidence / DRAWS)


def test_the_returned_plan_is_itself_certified_and_the_next_is_not():
    rng = np.random.default_rng(3)
    losses = np.stack([differences(rng, (1, 2000), mean, 0.06)[0] for mean in (-0.02, -0.01, -0.005, 0.02, 0.04)])
    last = certify(losses, 0.01, 0.95)
    assert last is not None
    assert betting_p_value(losses[last], 0.01) <= 0.05
    assert betting_p_value(losses[last + 1], 0.01) > 0.05


def test_a_risk_that_falls_again_stops_at_the_first_gap():
    good, bad = np.zeros(1000), np.full(1000, 0.5)
    assert certify([good, good, bad, good], 0.1, 0.95) == 1
    assert certify([bad, good], 0.1, 0.95) is None
    assert certify([good], 0.1, 0.95) == 0


@pytest.mark.slow
def test_random_splits_break_the_promise_in_at_most_the_promised_share():
    rng = np.random.default_rng(11)
    means = np.array([-0.01, 0.0, 0.005, 0.009, 0.011, 0.014, 0.02, 0.03])
    population = np.stack([differences(rng, (1, 50_000), mean, 0.06)[0] for mean in means])
    truth = population.mean(axis=1)
    broken = shipped = 0
    for _ in range(200):
        split = rng.permutation(50_000)[:2000]
        last = certify(population[:, split], 0.01, 0.9)
        shipped += last is not None
        broken += last is not None and truth[: last + 1].max() > 0.01
    assert broken <= 200 * 0.1
    assert shipped >= 150


@pytest.mark.parametrize(
    ("discordant", "samples", "limit", "mean"),
    [(0.06, 2500, 0.01, -0.002), (0.06, 500, 0.02, -0.01), (0.15, 1000, 0.02, -0.01)],
)
def test_the_power_is_close_to_the_normal_bound(discordant: float, samples: int, limit: float, mean: float):
    rows = differences(np.random.default_rng(5), (DRAWS, samples), mean, discordant)
    passed = _wealth(rows, np.full(DRAWS, limit), 0.95) >= 20
    normal = rows.mean(1) + NormalDist().inv_cdf(0.95) * rows.std(1) / np.sqrt(samples) < limit
    assert passed.mean() >= 0.78 * normal.mean()
    assert passed.mean() >= 0.65


def test_the_bets_beat_the_plug_in_of_the_paper():
    rows = differences(np.random.default_rng(5), (DRAWS, 2500), -0.002, 0.06)
    mean = np.cumsum(rows, 1) / np.arange(2, 2502)
    spread = (0.25 + np.cumsum((rows - mean) ** 2, 1)) / np.arange(2, 2502)
    before = np.concatenate([np.full((DRAWS, 1), 0.25), spread[:, :-1]], 1)
    bets = np.minimum(np.sqrt(2 * np.log(20) / (2500 * before)), 0.99)
    plug_in = np.cumsum(np.log1p(bets * (0.01 - rows)), 1).max(1) >= np.log(20)
    ours = _wealth(rows, np.full(DRAWS, 0.01), 0.95) >= 20
    assert ours.mean() > plug_in.mean() + 0.08


def test_the_upper_bound_is_where_certification_begins():
    row = differences(np.random.default_rng(2), (1, 1500), 0.01, 0.08)[0]
    bound = upper_bound(row, 0.95)
    assert row.mean() < bound < row.mean() + 0.03
    assert certify(row[None, :], bound + 1e-6, 0.95) == 0
    assert certify(row[None, :], bound - 1e-4, 0.95) is None


@pytest.mark.slow
def test_the_upper_bound_covers_the_mean_as_often_as_promised_and_shrinks_with_samples():
    rng = np.random.default_rng(9)
    rows = differences(rng, (150, 400), 0.01, 0.1)
    assert np.mean([upper_bound(row, 0.9) < 0.01 for row in rows]) <= 0.1 + 3 * np.sqrt(0.09 / 150)
    assert upper_bound(np.zeros(4000), 0.95) < upper_bound(np.zeros(400), 0.95) < upper_bound(np.zeros(40), 0.95)
    assert upper_bound(np.ones(50), 0.95) == 1.0


def test_a_bound_of_a_mix_that_is_better_than_its_reference_may_be_negative():
    assert upper_bound(differences(np.random.default_rng(1), (1, 4000), -0.05, 0.1)[0], 0.95) < 0.0


def test_samples_needed_are_about_enough():
    rng = np.random.default_rng(4)
    pilot = differences(rng, (1, 20_000), 0.0, 0.08)[0]
    needed = samples_needed(pilot, 0.01, 0.95)
    assert needed is not None
    rows = differences(rng, (500, needed), 0.0, 0.08)
    assert 0.6 < (_wealth(rows, np.full(500, 0.01), 0.95) >= 20).mean() < 0.95
    assert samples_needed(differences(rng, (1, 900), 0.05, 0.08)[0], 0.01, 0.95) is None


def test_the_order_is_used_as_given():
    row = np.concatenate([np.zeros(300), np.ones(30)])
    assert betting_p_value(row, 0.02) != betting_p_value(row[::-1], 0.02)


@pytest.mark.parametrize(
    "losses",
    [[], [[]], np.zeros((0, 5)), np.zeros((3, 0)), np.zeros(5), np.zeros((2, 2, 2)), [[0.0, float("nan")]],
     [[0.0, 1.5]], [[0.0, float("-inf")]], [["a"]], [[0.0], [0.0, 1.0]]],
)  # fmt: skip
def test_losses_that_are_no_table_are_refused(losses: object):
    with pytest.raises(InputError):
        certify(losses, 0.1, 0.9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "confidence"), [(0.0, 0.9), (1.0, 0.9), (-0.1, 0.9), (0.1, 0.0), (0.1, 1.0), (float("nan"), 0.9)]
)
def test_levels_out_of_range_are_refused(limit: float, confidence: float):
    with pytest.raises(InputError):
        certify([[0.0, 0.1]], limit, confidence)
