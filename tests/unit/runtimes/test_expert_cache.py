"""The cache's promises: never above its bytes, nothing of the present event leaves, honest counters."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.runtimes.expert_cache import ExpertCache, split_event, union_of
from edgeflex.runtimes.policies import POLICIES, make_policy
from edgeflex.runtimes.ranked_policies import EnuPolicy

LAYERS, EXPERTS = 4, 6


def cache_of(name="enu", capacity=10, sizes=None, **options) -> ExpertCache:
    if sizes is None:
        sizes = np.ones((LAYERS, EXPERTS), dtype=np.int64)
    layers, experts = sizes.shape
    static = [(layer, expert) for layer in range(layers) for expert in range(2)]
    policy = make_policy(name, layers=layers, experts=experts, top_k=2, static=static)
    return ExpertCache(capacity, sizes, policy, **options)


def mixed_sizes(seed: int) -> np.ndarray:
    sizes = np.random.default_rng(seed).integers(1, 9, (LAYERS, EXPERTS))
    sizes[1] = 0  # a dense layer
    return sizes.astype(np.int64)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(16, 90))
def test_bytes_stay_within_the_limit_and_the_present_event_stays_whole(name, seed, capacity):
    draw = random.Random(seed)
    sizes = mixed_sizes(seed)
    cache = cache_of(name, capacity, sizes)
    mirror: set[tuple[int, int]] = set()  # what the outcomes say is resident
    most = hits = misses = read = 0
    for step in range(12):
        for layer in (0, 2, 3):
            used = sorted(draw.sample(range(EXPERTS), draw.randint(1, 4)))
            present: set[tuple[int, int]] = set()
            for part in split_event(used, sizes[layer], capacity):
                outcome = cache.event(step, layer, part, None, decoding=True)
                present = {(layer, expert) for expert in part}
                assert not present & set(outcome.evicted)
                assert sorted([*outcome.hits, *outcome.misses]) == list(part)
                assert {(layer, expert) for expert in outcome.hits} <= mirror
                mirror -= set(outcome.evicted)
                assert not {(layer, expert) for expert in outcome.misses} & mirror
                mirror |= present
                hits += len(outcome.hits)
                misses += len(outcome.misses)
                read += sum(int(sizes[layer, expert]) for expert in outcome.misses)
            if draw.random() < 0.3:
                guess = draw.sample(range(EXPERTS), 3)
                ahead = cache.prefetch(step, 3, guess)
                assert not present & set(ahead.evicted)
                mirror -= set(ahead.evicted)
                mirror |= {(3, expert) for expert in ahead.misses}
                assert present <= mirror
            assert list(cache.resident()) == sorted(mirror)
            assert cache.resident_bytes == sum(int(sizes[pair]) for pair in mirror) <= capacity
            most = max(most, cache.resident_bytes)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.decode_read_bytes) == (hits, misses, read)
    assert most <= stats.peak_bytes <= capacity
    assert sum(stats.layer_hits) == hits
    assert sum(stats.layer_misses) == misses
    assert stats.read_bytes == read + stats.prefetch_fetched_bytes


def test_prompts_and_decoding_are_counted_apart():
    cache = cache_of("lru", 4)
    cache.event(0, 0, (0, 1), decoding=False)
    cache.event(1, 0, (1, 2), decoding=True)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.decode_hits, stats.decode_misses) == (1, 3, 1, 1)
    assert (stats.read_bytes, stats.decode_read_bytes) == (3, 1)
    assert cache.layer_counts(decoding=False).misses == (2, 0, 0, 0)
    assert cache.layer_counts(decoding=True).hits == (1, 0, 0, 0)


def test_only_as_much_leaves_as_must():
    sizes = np.array([[5, 1, 1, 4]], dtype=np.int64)
    cache = cache_of("lru", 7, sizes)
    cache.event(0, 0, (0,), decoding=True)
    cache.event(1, 0, (1,), decoding=True)
    cache.event(2, 0, (2,), decoding=True)
    outcome = cache.event(3, 0, (3,), decoding=True)
    assert outcome.evicted == ((0, 0),)
    assert cache.resident_bytes == 6
    assert (0, 1) in cache
    assert (0, 0) not in cache


def test_a_full_cache_never_evicts_when_everything_fits():
    cache = cache_of("enu", LAYERS * EXPERTS)
    for step in range(5):
        for layer in range(LAYERS):
            assert cache.event(step, layer, tuple(range(EXPERTS)), decoding=True).evicted == ()
    assert cache.stats().misses == LAYERS * EXPERTS
    assert cache.stats().peak_bytes == LAYERS * EXPERTS


# --- refusals ------------------------------------------------------------------------------------------


def test_an_event_larger_than_the_cache_is_refused_and_changes_nothing():
    cache = cache_of("lru", 3)
    cache.event(0, 0, (0, 1), decoding=True)
    with pytest.raises(InputError, match=r"needs 4 experts, 4 B, at once and the cache holds 3 B\. Split it"):
        cache.event(0, 1, (0, 1, 2, 3), decoding=True)
    assert list(cache.resident()) == [(0, 0), (0, 1)]
    assert cache.event(0, 0, (0, 1), decoding=True).hits == (0, 1)


def test_experts_that_do_not_exist_are_refused():
    cache = cache_of(sizes=mixed_sizes(0), capacity=50)
    for layer, expert in ((0, EXPERTS), (0, -1), (1, 0)):
        with pytest.raises(InputError, match=rf"layer {layer} has no experts \[{expert}\]"):
            cache.event(0, layer, (expert,), decoding=True)
        with pytest.raises(InputError, match="has no experts"):
            cache.prefetch(0, layer, (expert,))


@pytest.mark.parametrize(
    ("sizes", "capacity", "said"),
    [
        (np.ones(4, dtype=np.int64), 9, "shape"),
        (np.ones((2, 2)), 9, "float64"),
        (np.full((2, 2), -1), 9, "-1 bytes"),
        (np.ones((2, 2), dtype=np.int64), 0, "cache of 0 bytes"),
    ],
)
def test_impossible_sizes_are_refused(sizes, capacity, said):
    policy = make_policy("lru", layers=2, experts=2)
    with pytest.raises(InputError, match=said):
        ExpertCache(capacity, sizes, policy)


# --- prefetch ------------------------------------------------------------------------------------------


def test_a_used_prefetch_is_a_hit_and_counts_as_useful_once():
    cache = cache_of("lru", 6)
    cache.event(0, 0, (0, 1), decoding=True)
    assert cache.prefetch(0, 1, (3, 2)) == ((), (2, 3), ())
    cache.event(0, 1, (2, 4), decoding=True)
    cache.event(1, 1, (2, 4), decoding=True)
    stats = cache.stats()
    assert (stats.prefetch_fetched_bytes, stats.prefetch_useful_bytes) == (2, 1)
    assert (stats.read_bytes, stats.decode_read_bytes, stats.misses) == (5, 3, 3)


def test_a_prefetch_takes_only_what_room_can_be_made_for():
    cache = cache_of("lru", 4)
    cache.event(0, 0, (4, 5), decoding=True)
    cache.event(0, 1, (0, 1, 2), decoding=True)
    outcome = cache.prefetch(0, 2, (5, 0, 3))
    # the present event keeps three of four places; the likeliest guess takes the last one
    assert outcome == ((), (5,), ((0, 5),))
    assert cache.prefetch(0, 2, (0, 3)) == ((), (), ())


@pytest.mark.parametrize("used", [False, True])
def test_prefetching_stops_itself_only_when_little_of_it_is_used(used):
    sizes = np.ones((2, 512), dtype=np.int64)
    cache = cache_of("lru", 4, sizes)
    for step in range(100):
        cache.event(step, 0, (step,), decoding=True)
        cache.prefetch(step, 1, (step,))
        cache.event(step, 1, (step if used else 511 - step,), decoding=True)
    assert cache.prefetch_stopped is cache.stats().prefetch_stopped is not used
    if not used:
        assert cache.stats().prefetch_fetched_bytes < 100
        assert cache.prefetch(100, 1, (200,)).misses == ()


# --- splitting, unions ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(8, 40))
def test_splitting_keeps_order_fits_and_is_greedy(seed, capacity):
    draw = random.Random(seed)
    sizes = [draw.randint(1, 8) for _ in range(20)]
    used = sorted(draw.sample(range(20), draw.randint(1, 20)))
    parts = split_event(used, sizes, capacity)
    assert [expert for part in parts for expert in part] == used
    loads = [sum(sizes[expert] for expert in part) for part in parts]
    assert max(loads) <= capacity
    for load, following in zip(loads, parts[1:], strict=False):
        assert load + sizes[following[0]] > capacity


def test_an_expert_larger_than_the_cache_cannot_be_split():
    with pytest.raises(InputError, match=r"expert 1 has 9 B and the cache 8 B: not even one fits"):
        split_event((0, 1), np.array([3, 9]), 8)


def test_the_union_of_tokens_has_parts_of_the_routers_weight():
    experts = np.array([[3, 1], [1, 0]])
    weights = np.array([[0.75, 0.25], [0.5, 0.5]], dtype=np.float32)
    assert union_of(experts, weights) == ((0, 1, 3), (0.25, 0.375, 0.375))
    assert union_of(experts, None) == ((0, 1, 3), None)
    assert union_of(experts, np.full((2, 2), np.nan)) == ((0, 1, 3), None)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 10))
def test_the_union_of_one_token_is_that_of_any_number_of_tokens(seed, top_k):
    draw = np.random.default_rng(seed)
    experts = draw.choice(40, (1, top_k), replace=False).astype(np.int32)
    weights = draw.random((1, top_k), dtype=np.float32) * draw.choice([1.0, 0.0]).astype(np.float32)
    # a second token that uses the same experts and weighs nothing makes it go the way of many
    both = np.concatenate([experts, experts]), np.concatenate([weights, 0 * weights])
    assert union_of(experts, weights) == union_of(*both)


class Told(EnuPolicy):
    """Remembers of how many events it was told."""

    events = 0

    def use(self, step, layer, experts, weights, misses):
        self.events += 1
        super().use(step, layer, experts, weights, misses)


class Asked(Told):
    """The same, asked by others too."""

    foretells = True


@pytest.mark.parametrize(("kind", "room", "told"), [(Told, 4, 0), (Told, 3, 6), (Asked, 4, 2), (Asked, 3, 6)])
def test_a_policy_learns_only_while_something_may_leave_or_is_foretold(kind, room, told):
    policy = kind(1, 4, top_k=2)
    cache = ExpertCache(room, np.ones((1, 4), dtype=np.int64), policy)
    for step, used in enumerate([(0, 1), (2, 3), (0, 1), (1, 2), (0, 3), (0, 1)]):
        cache.event(step, 0, used, decoding=True)
    assert policy.events == told
