"""Choices grouped by expert: what every engine of stages computes with."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.runtimes.stage_engine import Waiting, grouped_choices


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 9), top_k=st.integers(1, 4), seed=st.integers(0, 1000))
def test_every_choice_stands_once_in_its_experts_stretch_by_token(tokens, top_k, seed):
    draw = np.random.default_rng(seed)
    experts = np.stack([draw.permutation(6)[:top_k] for _ in range(tokens)]).astype(np.int32)
    order, spans = grouped_choices(experts)
    weights = np.ones(experts.shape, np.float32)
    waiting = Waiting(0, None, None, weights, experts, order, spans, set(spans))
    assert sorted(order.tolist()) == list(range(tokens * top_k))
    assert waiting.union == tuple(np.unique(experts).tolist())
    assert [first for first, _ in spans.values()] == [0, *[last for _, last in spans.values()]][:-1]
    for expert in waiting.union:
        wanted = np.nonzero(experts == expert)
        found = waiting.chosen(expert)
        assert [one.tolist() for one in found] == [one.tolist() for one in wanted]
