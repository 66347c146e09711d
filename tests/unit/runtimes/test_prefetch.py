"""Guesses of what the next layers use."""

from __future__ import annotations

import numpy as np

from edgeflex.runtimes.prefetch import EarlyRouter, Predictor


def ids(*rows):
    return np.array(rows, dtype=np.int32)


def test_what_was_used_together_is_expected_together():
    guess = Predictor(layers=(1, 2, 4), experts=5, top_k=2, depth=2)
    for _ in range(3):
        guess.learn(1, ids([0, 1]))
        guess.learn(2, ids([2, 3]))
        guess.learn(4, ids([4, 0]))
    guess.learn(1, ids([1, 2]))
    guess.learn(2, ids([3, 1]))
    assert guess.predict(1, [0]) == [(2, (2, 3)), (4, (0, 4))]
    assert guess.predict(1, [1, 2]) == [(2, (3, 2)), (4, (0, 4))]
    assert guess.predict(2, [2]) == [(4, (0, 4))]
    assert guess.predict(4, [4]) == []


def test_tokens_of_a_chunk_are_counted_each_for_itself():
    guess = Predictor(layers=(0, 1), experts=4, top_k=1, depth=1)
    guess.learn(0, ids([0], [1]))
    guess.learn(1, ids([2], [3]))
    assert guess.predict(0, [0]) == [(1, (2,))]
    assert guess.predict(0, [1]) == [(1, (3,))]


def test_nothing_is_learned_across_a_pass_that_did_not_end():
    guess = Predictor(layers=(0, 1, 2), experts=4, top_k=1, depth=1)
    guess.learn(0, ids([0]))
    guess.learn(0, ids([1]))
    guess.learn(1, ids([2]))
    assert guess.predict(0, [0]) == []
    assert guess.predict(0, [1]) == [(1, (2,))]


def test_the_routers_of_the_next_layers_are_asked():
    asked = []

    def router(layer: int) -> list[int]:
        asked.append(layer)
        return [layer + 10]

    guess = EarlyRouter((1, 2, 5), 2, router)
    assert guess.predict(1, [0]) == [(2, (12,)), (5, (15,))]
    assert guess.predict(2, [0]) == [(5, (15,))]
    assert guess.predict(5, [0]) == []
    assert asked == [2, 5, 5]
