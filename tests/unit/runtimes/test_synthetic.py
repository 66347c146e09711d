"""Synthetic traces: each is of the nature that its name claims, and the same again for the same seed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.runtimes.replay import replay
from edgeflex.runtimes.synthetic import TRACE_KINDS, Routing, synthetic_trace
from edgeflex.runtimes.trace import read_trace, write_trace


@pytest.mark.parametrize("kind", TRACE_KINDS)
def test_the_same_seed_gives_the_same_trace_and_another_seed_another(kind):
    routing = Routing(layers=3, experts=16, top_k=4, tokens=20)
    first, again, other = (synthetic_trace(kind, routing, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.expert, again.expert)
    assert np.array_equal(first.weight, again.weight)
    assert not np.array_equal(first.expert, other.expert)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(TRACE_KINDS),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_every_token_uses_top_k_different_experts_in_every_layer(kind, layers, experts, top_k, tokens, prompt):
    routing = Routing(layers, experts, min(top_k, experts), tokens, prompt)
    trace = synthetic_trace(kind, routing)
    assert trace.decode_tokens == tokens
    assert len(trace.events) == layers * (tokens + (prompt > 0))
    for event in trace.events:
        assert event.tokens == (1 if event.decoding else prompt)
        if event.decoding:
            assert len(event.experts) == routing.top_k
    assert 0 <= trace.expert.min() <= trace.expert.max() < experts


@pytest.mark.parametrize("kind", TRACE_KINDS)
def test_a_written_trace_reads_back(tmp_path, kind):
    trace = synthetic_trace(kind, Routing(layers=2, experts=6, top_k=2, tokens=5, prompt_tokens=3))
    write_trace(tmp_path / "trace.csv", trace)
    assert read_trace(tmp_path / "trace.csv").events == trace.events


def test_zipf_uses_the_most_popular_expert_as_often_as_its_law_says():
    trace = synthetic_trace("zipf", Routing(layers=2, experts=16, top_k=1, tokens=8000))
    shares = np.sort(trace.uses(), axis=1)[:, ::-1] / 8000
    law = 1 / np.arange(1, 17)
    assert np.allclose(shares, law / law.sum(), atol=0.02)


def test_uniform_uses_every_expert_alike():
    trace = synthetic_trace("uniform", Routing(layers=2, experts=16, top_k=4, tokens=4000))
    assert np.allclose(trace.uses() / 4000, 4 / 16, atol=0.03)


def test_markov_keeps_experts_as_often_as_asked_and_brings_successors():
    kept = synthetic_trace("markov", Routing(2, 64, 4, 2000, exponent=0.0, stay=0.6, follow=0.0))
    sets = [set(event.experts) for event in kept.events if event.layer == 1]
    overlap = np.mean([len(now & before) / 4 for before, now in itertools.pairwise(sets)])
    # what is not kept may be drawn again by chance
    assert 0.6 - 0.03 < overlap < 0.6 + 0.4 * 4 / 60 + 0.03
    tied = synthetic_trace("markov", Routing(2, 64, 1, 2000, exponent=0.0, stay=0.0, follow=1.0))
    above, below = (tied.expert[tied.layer == layer] for layer in (0, 1))
    assert len(set(zip(above.tolist(), below.tolist(), strict=True))) == len(set(above.tolist()))


def test_cyclic_is_never_hit_by_an_lru_that_holds_less_than_all():
    trace = synthetic_trace("cyclic", Routing(layers=2, experts=12, top_k=3, tokens=40, expert_bytes=1))
    # an event's experts are kept together, so that one event less than all is what LRU always drops too early
    assert replay(trace, 24 - 3, "lru").hits == 0
    assert replay(trace, 24, "lru").misses == 24


def test_a_phase_changes_which_experts_are_popular():
    trace = synthetic_trace("phases", Routing(1, 64, 4, 400, phases=2, exponent=1.5))
    halves = [np.bincount(trace.expert[rows], minlength=64) for rows in (trace.step < 200, trace.step >= 200)]
    top = [set(np.argsort(-half)[:4].tolist()) for half in halves]
    assert len(top[0] & top[1]) < 4


def test_every_impossible_number_is_named_at_once():
    with pytest.raises(InputError, match="4 faults") as caught:
        Routing(layers=0, experts=4, top_k=5, stay=1.5, exponent=-1.0)
    for name in ("layers", "top_k", "stay", "exponent"):
        assert name in str(caught.value)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(InputError, match="uniform, zipf, markov, cyclic, phases"):
        synthetic_trace("fractal", Routing())  # type: ignore[arg-type]
