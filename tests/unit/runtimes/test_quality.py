from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from edgeflex.runtimes.quality import (
    auroc,
    exit_qualities,
    expected_calibration_error,
    oracle_exits,
    paired_drop_bounds,
    proportion_bounds,
)


def test_calibration_error_of_a_sum_done_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, False, True, True])
    # one bin: accuracy 0.5 against 0.95, the other: 1.0 against 0.55; each half of the samples
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.45)


def test_calibration_error_counts_the_ends_of_the_scale() -> None:
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_that_of_scikit_learn_with_ties(rows: list[tuple[int, bool]]) -> None:
    score = np.array([row[0] / 5 for row in rows])
    positive = np.array([row[1] for row in rows])
    if positive.all() or not positive.any():
        assert auroc(score, positive) is None
    else:
        assert auroc(score, positive) == pytest.approx(roc_auc_score(positive, score))


def test_the_oracle_leaves_at_the_first_right_exit_else_at_the_last() -> None:
    correct = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1]], dtype=bool)
    assert oracle_exits(correct).tolist() == [1, 0, 2, 2]


def test_exit_quality_counts_leavers_apart() -> None:
    correct = np.array([[1, 1], [0, 1], [0, 0]], dtype=bool)
    confidence = np.array([[0.9, 0.9], [0.8, 0.9], [0.2, 0.9]])
    first, last = exit_qualities(("a", "b"), confidence, correct, np.array([0, 0, 1]))
    assert first.accuracy == pytest.approx(1 / 3)
    assert first.share == pytest.approx(2 / 3)
    assert first.accuracy_of_leavers == 0.5
    assert last.accuracy == pytest.approx(2 / 3)
    assert last.accuracy_of_leavers == 0.0
    nobody = exit_qualities(("a", "b"), confidence, correct, np.array([1, 1, 1]))[0]
    assert nobody.share == 0.0
    assert nobody.accuracy_of_leavers is None


def test_clopper_pearson_gives_the_published_interval() -> None:
    # 10 of 100 at 95 %: 0.0490 to 0.1762 (Brown, Cai and DasGupta 2001 and every table since)
    assert proportion_bounds(10, 100, 0.95) == pytest.approx((0.0490, 0.1762), abs=5e-5)
    assert proportion_bounds(0, 20, 0.95)[0] == 0.0
    assert proportion_bounds(20, 20, 0.95)[1] == 1.0


def test_the_interval_of_a_paired_drop_holds_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(5)
    lost, won, n, inside = 0.04, 0.02, 300, 0
    for _ in range(200):
        u = draw.random(n)
        reference, answer = (u < lost) | (u > 0.3), (u >= lost) & (u < lost + won) | (u > 0.3)
        low, high = paired_drop_bounds(reference, answer, 0.95)
        inside += low <= lost - won <= high
    assert inside >= 190


def test_equal_answers_leave_only_the_sample_error() -> None:
    right = np.ones(1000, dtype=bool)
    low, high = paired_drop_bounds(right, right, 0.95)
    assert low == pytest.approx(-high)
    assert 0.0 < high < 0.005
