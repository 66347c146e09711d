from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import DeviceError, InputError
from edgeflex.runtimes.loop import exits_for, walk


def softmax_rows(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=2.0, size=shape)
    exp = np.exp(logits)
    return np.asarray(exp / exp.sum(-1, keepdims=True), dtype=np.float32)


def walk_over(probabilities: np.ndarray, thresholds) -> tuple[int, np.ndarray, float]:
    """Walk over probabilities [exits, classes] that are known already."""
    return walk(lambda k, x: (x, probabilities[k], float(probabilities[k].max())), None, thresholds)


def test_it_leaves_at_the_first_exit_that_is_sure_enough() -> None:
    p = np.array([[0.5, 0.5], [0.8, 0.2], [0.9, 0.1]], dtype=np.float32)
    assert walk_over(p, (0.6, 0.7, None))[0] == 1
    assert walk_over(p, (0.5, 0.7, None))[0] == 0
    assert walk_over(p, (None, None, None))[0] == 2
    assert walk_over(p, (0.99, 0.99, 0.99))[0] == 2


def test_later_segments_are_not_run() -> None:
    ran: list[int] = []

    def step(k, x):
        ran.append(k)
        return x + 1, "p", 0.7

    assert walk(step, 0, (0.8, 0.7, 0.6)) == (1, "p", 0.7)
    assert ran == [0, 1]


def test_each_segment_gets_the_activations_of_the_one_before() -> None:
    seen: list[int] = []

    def step(k, x):
        seen.append(x)
        return x * 10 + k, None, 0.0

    walk(step, 1, (None, None, None))
    assert seen == [1, 10, 101]


def test_equality_leaves_and_is_decided_in_double_precision() -> None:
    # 0.9 as float32 is 0.89999998: below the threshold 0.9 in float64, equal to it where NumPy rounds the threshold.
    p = np.array([[0.9, 0.1], [0.9, 0.1]], dtype=np.float32)
    assert float(p[0, 0]) < 0.9
    assert walk_over(p, (0.9, None))[0] == 1
    assert exits_for(p[None], (0.9, None)).tolist() == [1]
    exact = float(p[0, 0])
    assert walk_over(p, (exact, None))[0] == 0
    assert exits_for(p[None], (exact, None)).tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exits=st.integers(1, 5),
    classes=st.integers(2, 6),
    data=st.data(),
)
def test_the_vectorised_rule_and_the_walk_agree(seed: int, exits: int, classes: int, data: st.DataObject) -> None:
    probabilities = softmax_rows(seed, (17, exits, classes))
    held = [float(v) for v in probabilities[:3].max(-1).ravel()]  # thresholds that are met exactly, too
    threshold = st.one_of(st.none(), st.floats(0.0, 1.1), st.sampled_from(held))
    thresholds = data.draw(st.tuples(*[threshold] * exits))
    assert exits_for(probabilities, thresholds).tolist() == [walk_over(p, thresholds)[0] for p in probabilities]


def test_probabilities_that_are_no_numbers_are_a_failure() -> None:
    p = np.full((2, 3), np.nan, dtype=np.float32)
    with pytest.raises(DeviceError, match="segment 1 gave the confidence nan"):
        walk_over(p, (0.5, None))


def test_the_number_of_thresholds_must_be_that_of_exits() -> None:
    with pytest.raises(InputError, match="2 thresholds for 3 segments"):
        exits_for(np.ones((1, 3, 2)), (0.5, None))
    with pytest.raises(InputError, match="no segment"):
        walk(lambda k, x: (x, x, 1.0), 0, ())
