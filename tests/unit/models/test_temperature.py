"""Temperatures and thresholds: known answers, and the searches against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.models import temperature


def drawn(seed: int, samples: int, true_temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Return logits whose labels follow softmax(logits / true_temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(samples, 5)) * 3.0
    p = np.exp(temperature.log_softmax(logits / true_temperature))
    return logits, np.array([rng.choice(5, p=row) for row in p])


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(true_temperature: float) -> None:
    logits, labels = drawn(0, 4000, true_temperature)
    assert temperature.fit_temperature(logits, labels) == pytest.approx(true_temperature, rel=0.1)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), samples=st.integers(1, 60))
def test_golden_section_finds_what_a_grid_finds(seed: int, samples: int) -> None:
    logits, labels = drawn(seed, samples, 1.5)
    grid = np.linspace(-math.log(20), math.log(20), 3001)
    losses = [
        -temperature.log_softmax(logits / math.exp(g))[np.arange(samples), labels].sum() + 0.5 * g**2 for g in grid
    ]
    assert math.log(temperature.fit_temperature(logits, labels)) == pytest.approx(grid[np.argmin(losses)], abs=5e-3)


def test_leavers_that_are_all_right_do_not_send_the_temperature_to_zero() -> None:
    logits = np.eye(4) * 5.0
    assert 0.1 < temperature.fit_temperature(logits, np.arange(4)) < 1.0


def test_no_leavers_give_temperature_one() -> None:
    assert temperature.fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=np.int64)) == pytest.approx(1.0, abs=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), exits=st.integers(2, 5))
def test_default_thresholds_share_samples_equally(seed: int, exits: int) -> None:
    confidence = np.random.default_rng(seed).uniform(size=(500, exits))
    taken = temperature.exits_taken(confidence, temperature.equal_share_thresholds(confidence))
    assert np.abs(np.bincount(taken, minlength=exits) - 500 / exits).max() <= exits + 1


def test_a_sample_leaves_at_the_first_exit_it_satisfies() -> None:
    confidence = np.array([[0.9, 0.9, 0.9], [0.5, 0.9, 0.1], [0.5, 0.5, 0.1], [0.7, 0.1, 0.1]])
    assert temperature.exits_taken(confidence, (0.7, 0.8, None)).tolist() == [0, 1, 2, 0]
    assert temperature.exits_taken(confidence, (None, None, None)).tolist() == [2, 2, 2, 2]


def test_calibration_error_is_the_sum_done_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, False, True, True])
    # bin of 0.95: |0.95 - 0.5| · 2/4; bin of 0.55: |0.55 - 1| · 2/4
    assert temperature.calibration_error(confidence, correct) == pytest.approx(0.45)
    assert temperature.calibration_error(np.ones(3), np.ones(3, dtype=bool)) == 0.0


def test_leavers_become_calibrated() -> None:
    logits, labels = drawn(1, 3000, 2.0)
    found, thresholds = temperature.fit_temperatures([logits, logits * 2.0], labels)
    assert len(found) == len(thresholds) == 2
    confidence = temperature.confidences([logits, logits * 2.0], found)
    taken = temperature.exits_taken(confidence, thresholds)
    for number, part in enumerate((logits, logits * 2.0)):
        mine = taken == number
        assert temperature.calibration_error(confidence[mine, number], (part.argmax(1) == labels)[mine]) < 0.06
