"""How long experts were resident: by hand, and as one who looks after every event would count."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.runtimes.expert_cache import ExpertCache
from edgeflex.runtimes.policies import POLICIES, make_policy
from edgeflex.runtimes.replay import BELADY, BELADY_BYPASS, replay
from edgeflex.runtimes.stays import Occupancy
from edgeflex.runtimes.tiers import TieredCache
from edgeflex.runtimes.trace import Trace

LAYERS, EXPERTS = 3, 6
ORDER = [(layer, expert) for expert in range(EXPERTS) for layer in range(LAYERS)]


def trace_of(used, *, prompts=1) -> Trace:
    """Return one layer's trace of one expert a step; the first ``prompts`` steps are one prompt."""
    count = np.arange(len(used), dtype=np.int64)
    zero = np.zeros(len(used), dtype=np.int64)
    return Trace(
        turn=zero, phase=(count >= prompts).astype(np.int64), step=count, layer=zero, iter=zero, slot=zero,
        expert=np.array(used, dtype=np.int64), weight=np.ones(len(used), np.float32), layers=1, experts=3, top_k=1,
        expert_bytes=np.ones(1, dtype=np.int64),
    )  # fmt: skip


# Each line: what is in a cache of two when the event is over. The prompt's expert is there, its event does not count.
#   prompt 0: {0}; 1: {0, 1}; 2: 0 leaves, {1, 2}; 1: {1, 2}; 0: 2 leaves, {0, 1}
USED = (0, 1, 2, 1, 0)


def test_a_trace_by_hand():
    assert replay(trace_of(USED), 2, "lru").occupancy == Occupancy(4, ((2, 4, 2),))
    # whoever knows the future lets go of 0 for 2 too, which is wanted after 1, and at the end of 1 or 2
    assert replay(trace_of(USED), 2, BELADY).occupancy in {Occupancy(4, ((2, 4, 2),)), Occupancy(4, ((2, 3, 3),))}
    # with bypass 2 is used and not kept: 0 stays throughout
    assert replay(trace_of(USED), 2, BELADY_BYPASS).occupancy == Occupancy(4, ((4, 4, 0),))


def test_prompts_warm_and_do_not_count():
    assert replay(trace_of((2, 1, 1), prompts=2), 2, "lru").occupancy == Occupancy(1, ((0, 1, 1),))
    assert replay(trace_of((2, 1, 1), prompts=3), 2, "lru").occupancy == Occupancy(0, ((0, 0, 0),))


def test_what_comes_and_goes_within_an_event_was_never_there():
    cache = ExpertCache(2, np.ones((1, 3), np.int64), make_policy("lru", layers=1, experts=3, top_k=1))
    cache.event(0, 0, (0, 1), decoding=True)
    for _ in range(2):  # the parts of one pass are events of their own
        cache.event(1, 0, (2,), decoding=True)
    assert cache.occupancy() == Occupancy(3, ((1, 3, 2),))


class Seen:
    """Counts by looking at everything after every event."""

    def __init__(self) -> None:
        self.events = 0
        self.held = np.zeros((LAYERS, EXPERTS), dtype=np.int64)

    def look(self, cache: ExpertCache, *, decoding: bool) -> None:
        if decoding:
            self.events += 1
            for pair in cache.resident():
                self.held[pair] += 1

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(self.events, tuple(map(tuple, self.held.tolist())))


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(16, 90))
def test_the_books_say_what_looking_after_every_event_says(name, seed, capacity):
    draw, seen = random.Random(seed), Seen()
    sizes = np.random.default_rng(seed).integers(1, 5, (LAYERS, EXPERTS)).astype(np.int64)
    policy = make_policy(name, layers=LAYERS, experts=EXPERTS, top_k=2, seed=seed, static=ORDER)
    cache = ExpertCache(capacity, sizes, policy, prefetch_worth=0.0)
    middle = cache.occupancy(), seen.occupancy
    for step, layer in itertools.product(range(14), range(LAYERS)):
        decoding = step not in {0, 1, 7}
        cache.event(step, layer, sorted(draw.sample(range(EXPERTS), draw.randint(1, 3))), decoding=decoding)
        if decoding and draw.random() < 0.3:
            cache.prefetch(step, (layer + 1) % LAYERS, draw.sample(range(EXPERTS), 2))
        seen.look(cache, decoding=decoding)
        assert cache.occupancy() == seen.occupancy
        if step == 6 and layer == LAYERS - 1:
            middle = cache.occupancy(), seen.occupancy
    later = cache.occupancy().since(middle[0])
    assert later.events == seen.events - middle[1].events == 6 * LAYERS
    assert (np.array(later.resident) == seen.held - np.array(middle[1].resident)).all()


@pytest.mark.parametrize("name", ["lru", "enu", "arc", "static"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), exclusive=st.booleans(), vram=st.integers(8, 30), more=st.integers(8, 30))
def test_both_tiers_of_a_device_keep_such_books(name, seed, exclusive, vram, more):
    draw = random.Random(seed)
    sizes = np.random.default_rng(seed).integers(1, 4, (LAYERS, EXPERTS)).astype(np.int64)
    ram_bytes = more + (0 if exclusive else vram)
    cache = TieredCache(vram, ram_bytes, sizes, name, exclusive=exclusive, top_k=2, static=ORDER)
    cache.warm(draw.sample(ORDER, 6))
    assert cache.ram is not None
    upper, lower = Seen(), Seen()
    for step, layer in itertools.product(range(10), range(LAYERS)):
        used = sorted(draw.sample(range(EXPERTS), 2))
        for part in cache.parts(layer, used):
            found = cache.event(step, layer, part, decoding=step > 0)
            cache.admit([expert for expert in found.to_vram if draw.random() < 0.6])
            upper.look(cache.vram, decoding=step > 0)
            lower.look(cache.ram, decoding=step > 0)
    assert cache.vram.occupancy() == upper.occupancy
    assert cache.ram.occupancy() == lower.occupancy
