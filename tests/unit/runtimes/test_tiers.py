"""Three tiers: hard limits, the two-tier cache as a special case, hand-checked moves, and bounds by exhaustion."""

from __future__ import annotations

import functools
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.policies import POLICIES, make_policy
from edgeflex.runtimes.replay import belady, replay
from edgeflex.runtimes.tier_bounds import multi_tier_belady, time_bound, time_bound_s
from edgeflex.runtimes.tiers import TierCounts, TieredCache, tier_replay
from edgeflex.runtimes.trace import Trace

LAYERS, EXPERTS = 3, 6


def trace_of(events, *, layers=LAYERS, experts=EXPERTS, prompts=0, expert_bytes=1, top_k=2) -> Trace:
    """Return a trace from (step, layer, experts); the first ``prompts`` steps are one prompt."""
    rows = [(step, layer, slot, expert) for step, layer, used in events for slot, expert in enumerate(used)]
    step, layer, slot, expert = np.array(rows, dtype=np.int64).T
    zero = np.zeros(len(rows), dtype=np.int64)
    draw = np.random.default_rng(len(rows))
    return Trace(
        turn=zero, phase=(step >= prompts).astype(np.int64), step=step, layer=layer, iter=zero, slot=slot,
        expert=expert, weight=draw.random(len(rows)).astype(np.float32), layers=layers, experts=experts, top_k=top_k,
        expert_bytes=np.full(layers, expert_bytes),
    )  # fmt: skip


def random_trace(seed, *, layers=LAYERS, experts=EXPERTS, steps=8, top_k=2, prompts=0) -> Trace:
    draw = random.Random(seed)
    favour = [draw.random() ** 2 + 0.05 for _ in range(experts)]
    events = []
    for step, layer in itertools.product(range(steps), range(layers)):
        used: set[int] = set()
        while len(used) < top_k:
            used.add(draw.choices(range(experts), favour)[0])
        events.append((step, layer, sorted(used)))
    return trace_of(events, layers=layers, experts=experts, prompts=prompts, top_k=top_k)


def ones(layers=LAYERS, experts=EXPERTS) -> np.ndarray:
    return np.ones((layers, experts), dtype=np.int64)


def mixed_sizes(seed, layers=LAYERS, experts=EXPERTS) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 9, (layers, experts)).astype(np.int64)


def some(draw: random.Random):
    """Upload a random part of what fits."""
    return lambda event, found: [expert for expert in found.to_vram if draw.random() < 0.6]


# --- promises ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), exclusive=st.booleans(), vram=st.integers(20, 60), more=st.integers(12, 60))
def test_budgets_hold_and_outcomes_say_where_everything_is(name, seed, exclusive, vram, more):
    draw = random.Random(seed)
    sizes = mixed_sizes(seed)
    ram = more + (0 if exclusive else vram)
    order = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    cache = TieredCache(vram, ram, sizes, name, exclusive=exclusive, top_k=2, seed=seed, static=order)
    assert cache.ram is not None
    upper: set[tuple[int, int]] = set()
    lower: set[tuple[int, int]] = set()
    read = uploaded_bytes = demoted_bytes = 0
    for step, layer in itertools.product(range(12), range(LAYERS)):
        used = sorted(draw.sample(range(EXPERTS), draw.randint(1, 5)))
        for part in cache.parts(layer, used):
            weights = [draw.random() for _ in part]
            found = cache.event(step, layer, part, weights, decoding=True)
            present = {(layer, expert) for expert in part}
            assert sorted([*found.gpu_hits, *found.misses]) == list(part)
            assert {(layer, expert) for expert in found.gpu_hits} == present & upper
            assert {(layer, expert) for expert in found.ram_hits} == (present & lower) - upper
            assert set(found.to_vram) <= set(found.misses)
            lower -= set(found.evicted_ram)
            lower |= {(layer, expert) for expert in found.flash_misses}
            read += sum(int(sizes[layer, expert]) for expert in found.flash_misses)
            assert present <= upper | lower
            assert set(cache.ram.resident()) == lower
            chosen = [expert for expert in found.to_vram if draw.random() < 0.6]
            if chosen or draw.random() < 0.5:  # an event that is not closed had nothing uploaded
                moved = cache.admit(chosen)
                uploads = {(layer, expert) for expert in chosen}
                assert not present & {*moved.evicted_vram, *moved.evicted_ram}
                assert set(moved.demoted) <= set(moved.evicted_vram)
                upper = (upper - set(moved.evicted_vram)) | uploads
                if exclusive:
                    lower -= uploads
                lower = (lower | set(moved.demoted)) - set(moved.evicted_ram)
                uploaded_bytes += sum(int(sizes[pair]) for pair in uploads)
                demoted_bytes += sum(int(sizes[pair]) for pair in moved.demoted)
            assert set(cache.vram.resident()) == upper
            assert set(cache.ram.resident()) == lower
            assert cache.vram.resident_bytes == sum(int(sizes[pair]) for pair in upper) <= vram
            assert cache.ram.resident_bytes == sum(int(sizes[pair]) for pair in lower) <= ram
            assert not upper & lower if exclusive else upper <= lower
            assert all(cache.place(*pair) == "gpu" for pair in upper)
    counts = cache.counts(decoding=True)
    assert (counts.flash_bytes, counts.upload_bytes, counts.demoted_bytes) == (read, uploaded_bytes, demoted_bytes)
    assert cache.vram.stats().peak_bytes <= vram
    assert cache.ram.stats().peak_bytes <= ram
    assert cache.counts(decoding=False) == TierCounts()


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), room=st.integers(9, 70))
def test_without_ram_it_is_the_two_tier_cache_to_the_last_counter(name, seed, room):
    trace = random_trace(seed, steps=10, prompts=3)
    sizes = mixed_sizes(seed)
    two = replay(trace, room, name, sizes=sizes, seed=seed)
    three = tier_replay(trace, room, 0, name, sizes=sizes, seed=seed)
    assert three.ram is None
    assert (three.vram.decode_hits, three.vram.decode_misses) == (two.hits, two.misses)
    assert (three.vram.hits, three.vram.misses) == (two.hits + two.prefill_hits, two.misses + two.prefill_misses)
    assert three.vram.decode_read_bytes == three.decoding.flash_bytes == three.decoding.upload_bytes == two.read_bytes
    assert three.prompts.flash_bytes == two.prefill_bytes
    assert (three.vram.evictions, three.vram.peak_bytes) == (two.evictions, two.peak_bytes)
    assert three.gpu_hit_rate == two.hit_rate
    assert three.flash_bytes_per_token == two.bytes_per_token


@pytest.mark.parametrize("name", sorted({*POLICIES} - {"random"}))  # draws come in another order
def test_inclusive_ram_reads_what_a_cache_of_its_size_reads_when_vram_is_tiny(name):
    # one layer, one expert at a time: VRAM holds the last one, so its copy is never RAM's victim anyway
    trace = trace_of([(step, 0, (step * step % 5,)) for step in range(40)], layers=1, top_k=1)
    result = tier_replay(trace, 1, 4, name)
    assert result.decoding.flash_bytes == replay(trace, 4, name).read_bytes


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), vram=st.integers(2, 9), more=st.integers(2, 9))
def test_exclusive_lru_never_reads_more_from_flash_than_inclusive(seed, vram, more):
    trace = random_trace(seed, steps=12)
    inclusive = tier_replay(trace, vram, vram + more, "lru")
    exclusive = tier_replay(trace, vram, vram + more, "lru", exclusive=True)
    assert exclusive.decoding.flash_bytes <= inclusive.decoding.flash_bytes
    assert inclusive.decoding.demotions == 0
    assert exclusive.decoding.gpu_hits == inclusive.decoding.gpu_hits


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"random"}))
def test_exclusive_tiers_read_less_from_flash_over_many_traces(name):
    total = {True: 0, False: 0}
    for seed, exclusive in itertools.product(range(12), total):
        trace = random_trace(seed, experts=10, steps=14)
        result = tier_replay(trace, 6, 10, name, exclusive=exclusive)
        total[exclusive] += result.decoding.flash_bytes
    assert total[True] < total[False]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), vram=st.integers(2, 8), ram=st.integers(4, 10))
def test_exclusive_lru_on_single_lookups_is_one_lru_of_both(seed, vram, ram):
    trace = random_trace(seed, experts=8, steps=12, top_k=1)
    tiers = tier_replay(trace, vram, ram, "lru", exclusive=True)
    whole = replay(trace, vram + ram, "lru")
    # RAM makes room for a missing expert before VRAM's victim comes down, so one place may be used twice
    less = replay(trace, vram + ram - 1, "lru")
    assert whole.misses <= tiers.decoding.flash_misses <= less.misses


# --- by hand -------------------------------------------------------------------------------------------


def test_an_inclusive_run_by_hand():
    cache = TieredCache(2, 3, ones(1, 5), "lru")
    assert cache.event(0, 0, (0, 1), decoding=True) == ((), (), (0, 1), (0, 1), ())
    assert cache.admit((0, 1)) == ((), (), ())
    assert cache.event(1, 0, (2,), decoding=True) == ((), (), (2,), (2,), ())
    cache.admit(())  # computed by the CPU
    # RAM is full and 0 and 1 must stay, being in VRAM: 2 goes, though used last
    assert cache.event(2, 0, (3,), decoding=True) == ((), (), (3,), (3,), ((0, 2),))
    assert cache.admit((3,)) == (((0, 0),), (), ())
    assert (cache.place(0, 0), cache.place(0, 1), cache.place(0, 2), cache.place(0, 3)) == (
        "ram",
        "gpu",
        "flash",
        "gpu",
    )
    assert cache.event(3, 0, (0, 3), decoding=True)[:3] == ((3,), (0,), ())
    assert cache.counts(decoding=True) == TierCounts(1, 1, 4, 4, 3, 3, 0, 0)


def test_an_exclusive_run_by_hand():
    cache = TieredCache(2, 2, ones(1, 6), "lru", exclusive=True)
    cache.event(0, 0, (0, 1), decoding=True)
    cache.admit((0, 1))
    assert cache.ram is not None
    assert list(cache.ram.resident()) == []
    cache.event(1, 0, (2, 3), decoding=True)
    assert cache.admit((2,)) == (((0, 0),), ((0, 0),), ())  # 3 stays in RAM, 0 comes down
    assert [cache.place(0, expert) for expert in range(5)] == ["ram", "gpu", "gpu", "ram", "flash"]
    # 4 makes RAM's oldest go; its upload then frees the room for 1, which comes down
    assert cache.event(2, 0, (4,), decoding=True).evicted_ram == ((0, 3),)
    assert cache.admit((4,)) == (((0, 1),), ((0, 1),), ())
    assert [cache.place(0, expert) for expert in range(5)] == ["ram", "ram", "gpu", "flash", "gpu"]
    assert cache.counts(decoding=True).demotions == 2


def test_what_comes_down_counts_in_the_peak():
    cache = TieredCache(4, 4, np.array([[4, 1]], dtype=np.int64), "lru", exclusive=True)
    cache.warm([(0, 0)])
    cache.event(0, 0, (1,), decoding=True)
    assert cache.admit((1,)).demoted == ((0, 0),)
    assert cache.ram is not None
    assert cache.ram.stats().peak_bytes == cache.ram.resident_bytes == 4


def test_hits_of_an_event_that_nobody_closed_are_hits_all_the_same():
    cache = TieredCache(2, 0, ones(1, 3), "lru")
    cache.event(0, 0, (0, 1), decoding=True)
    cache.admit((0, 1))
    cache.event(1, 0, (0,), decoding=True)  # no admit: nothing missed
    cache.event(2, 0, (2,), decoding=True)
    assert cache.admit((2,)).evicted_vram == ((0, 1),)


def test_a_ranked_ram_refuses_what_is_worth_less_than_its_own():
    # 0 is used rarely; 2 and 3 often: when 0 leaves VRAM, RAM would rather keep what it has
    order = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 0)]
    sizes = np.array([[2, 1, 1, 1, 1]], dtype=np.int64)
    cache = TieredCache(2, 2, sizes, "static", exclusive=True, static=order)
    cache.event(0, 0, (0,), decoding=True)
    cache.admit((0,))
    cache.event(1, 0, (2, 3), decoding=True)
    cache.admit(())
    cache.event(2, 0, (3,), decoding=True)
    moved = cache.admit((3,))
    assert moved.evicted_vram == ((0, 0),)
    assert moved.demoted == ()
    assert moved.evicted_ram == ()
    assert cache.place(0, 0) == "flash"
    assert cache.place(0, 2) == "ram"


def test_ranked_policies_learn_from_what_the_cpu_computes():
    cache = TieredCache(2, 0, ones(1, 4), "lfu")
    for step in range(3):
        cache.event(step, 0, (3,), decoding=True)  # never uploaded
    for step, expert in enumerate((0, 1), 3):
        cache.event(step, 0, (expert,), decoding=True)
        cache.admit((expert,))
    cache.event(5, 0, (3,), decoding=True)
    cache.admit((3,))
    cache.event(6, 0, (2,), decoding=True)
    assert cache.admit((2,)).evicted_vram == ((0, 1),)  # 3 was used four times, 1 once


def test_a_queue_does_not_remember_what_never_entered():
    for name in ("lru", "lru-layer", "arc", "s3-fifo", "sieve"):
        cache = TieredCache(2, 0, ones(1, 6), name)
        for step, expert in enumerate((0, 1, 2, 3, 4, 0, 5, 1, 2)):
            found = cache.event(step, 0, (expert,), decoding=True)
            cache.admit(found.misses if step % 2 else ())
            assert cache.vram.resident_bytes <= 2


def test_warming_fills_from_the_top_and_counts_nothing():
    order = [(0, 3), (0, 1), (0, 4), (0, 3), (0, 0), (0, 2)]
    exclusive = TieredCache(2, 2, ones(1, 6), "enu", exclusive=True)
    exclusive.warm(order)
    assert [exclusive.place(0, expert) for expert in range(6)] == ["ram", "gpu", "flash", "gpu", "ram", "flash"]
    inclusive = TieredCache(2, 3, ones(1, 6), "enu")
    inclusive.warm(order)
    assert [inclusive.place(0, expert) for expert in range(6)] == ["flash", "gpu", "flash", "gpu", "ram", "flash"]
    assert inclusive.ram is not None
    assert list(inclusive.ram.resident()) == [(0, 1), (0, 3), (0, 4)]
    assert inclusive.event(0, 0, (0, 1), decoding=True) == ((1,), (), (0,), (0,), ((0, 4),))
    assert inclusive.counts(decoding=True).lookups == 2
    two = TieredCache(2, 0, ones(1, 6), "enu")
    two.warm(order)
    assert list(two.vram.resident()) == [(0, 1), (0, 3)]


def test_a_warmed_queue_lets_go_of_the_least_valuable_first():
    cache = TieredCache(3, 0, ones(1, 6), "lru")
    cache.warm([(0, 5), (0, 1), (0, 3)])
    cache.event(0, 0, (0, 2), decoding=True)
    assert cache.admit((0, 2)).evicted_vram == ((0, 3), (0, 1))
    with pytest.raises(InputError, match="no expert 6 of layer 0"):
        cache.warm([(0, 6)])
    with pytest.raises(InputError, match="no expert 0 of layer 1"):
        cache.warm([(1, 0)])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), vram=st.integers(9, 30), more=st.integers(9, 40), exclusive=st.booleans())
def test_warm_tiers_hold_what_their_limits_allow(seed, vram, more, exclusive):
    sizes = mixed_sizes(seed)
    order = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    random.Random(seed).shuffle(order)
    cache = TieredCache(vram, more if exclusive else vram + more, sizes, "lru", exclusive=exclusive)
    cache.warm(order)
    cache.warm(order)
    assert cache.ram is not None
    upper, lower = set(cache.vram.resident()), set(cache.ram.resident())
    assert not upper & lower if exclusive else upper <= lower
    assert cache.vram.resident_bytes <= vram < cache.vram.resident_bytes + 9 or not set(order) - upper
    assert order[0] in upper
    assert cache.counts(decoding=True) == cache.counts(decoding=False) == TierCounts()
    warmed = tier_replay(random_trace(seed), vram, 200, sizes=sizes, warm=order)
    assert warmed.decoding.flash_misses == 0


def test_where_not_all_misses_fit_the_heaviest_are_proposed():
    cache = TieredCache(3, 6, ones(1, 6), "enu")
    cache.warm([(0, 0)])
    found = cache.event(0, 0, (0, 1, 2, 3), (0.1, 0.2, 0.3, 0.4), decoding=True)
    assert found.to_vram == (3, 2)
    assert cache.event(1, 0, (1, 2), decoding=True).to_vram == (1, 2)


def test_prompts_are_counted_apart_and_split_to_fit():
    trace = trace_of([(0, 0, (0, 1)), (1, 0, (2, 3)), (2, 0, (0, 3))], layers=1, prompts=2)
    result = tier_replay(trace, 2, 6)
    assert (result.prompts.lookups, result.decoding.lookups) == (4, 2)
    assert result.prompts.flash_misses == 4
    assert result.decoding.flash_misses == 0
    assert result.upload_bytes_per_token == 1


# --- refusals ------------------------------------------------------------------------------------------


def test_refusals_say_what_and_why():
    with pytest.raises(InputError, match=r"inclusive RAM tier of 4 B cannot hold copies of a VRAM tier of 4 B"):
        TieredCache(4, 4, ones())
    with pytest.raises(InputError, match="RAM tier of -1 bytes"):
        TieredCache(4, -1, ones())
    with pytest.raises(InputError, match="needed"):
        TieredCache(4, 0, np.ones(3, dtype=np.int64))
    with pytest.raises(InputError, match="at least 1"):
        TieredCache(0, 9, ones())
    with pytest.raises(InputError, match="sizes are"):
        tier_replay(random_trace(0), 4, 0, sizes=ones(1, 1))
    cache = TieredCache(2, 8, ones())
    with pytest.raises(InputError, match="no event is open"):
        cache.admit(())
    with pytest.raises(InputError, match=r"no experts \[9\]"):
        cache.event(0, 0, (9,), decoding=True)
    cache.event(0, 0, (0, 1, 2), decoding=True)
    with pytest.raises(InputError, match=r"experts \[4\] of layer 0 are no misses"):
        cache.admit((4,))
    with pytest.raises(InputError, match=r"with 3 experts needs 3 B in one tier at once and that holds 2 B"):
        cache.admit((0, 1, 2))
    assert cache.admit((0, 2)) == ((), (), ())  # a refused choice changes nothing
    with pytest.raises(InputError, match="no event is open"):
        cache.admit(())


def test_an_event_that_ram_cannot_hold_is_refused_and_changes_nothing():
    cache = TieredCache(4, 2, ones(), exclusive=True)
    cache.event(0, 0, (0, 1), decoding=True)
    with pytest.raises(InputError, match=r"needs 3 B in one tier at once and that holds 2 B"):
        cache.event(0, 1, (0, 1, 2), decoding=True)
    assert cache.parts(1, (0, 1, 2)) == [(0, 1), (2,)]
    assert cache.event(0, 1, (0, 1), decoding=True).evicted_ram == ((0, 0), (0, 1))


# --- bounds --------------------------------------------------------------------------------------------


def fewest_bytes(trace: Trace, room: int, sizes) -> int:
    """Return the least missed bytes of decoding of any way to keep whole experts, by trying all."""
    everything = [(layer, expert) for layer in range(trace.layers) for expert in range(trace.experts)]

    def weight(keys) -> int:
        return sum(int(sizes[key]) for key in keys)

    def choices(keys):
        keys = sorted(keys)
        for count in range(len(keys) + 1):
            yield from (frozenset(kept) for kept in itertools.combinations(keys, count) if weight(kept) <= room)

    @functools.cache
    def least(index: int, resident: frozenset[tuple[int, int]]) -> int:
        if index == len(trace.events):
            return 0
        event = trace.events[index]
        used = frozenset((event.layer, expert) for expert in event.experts)
        if not event.decoding:
            return min(least(index + 1, kept) for kept in choices(everything))
        return weight(used - resident) + min(least(index + 1, kept) for kept in choices(resident | used))

    return least(0, frozenset())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), vram=st.integers(1, 3), ram=st.integers(0, 3), prompts=st.integers(0, 2))
def test_with_one_size_the_byte_bounds_are_the_least_of_all_ways(seed, vram, ram, prompts):
    trace = random_trace(seed, layers=2, experts=3, steps=5, prompts=prompts)
    for exclusive, both in ((True, vram + ram), (False, max(vram, ram))):
        bound = multi_tier_belady(trace, vram, ram, exclusive=exclusive)
        assert bound.gpu_missed_bytes == bound.gpu_misses == fewest_bytes(trace, vram, ones())
        assert bound.flash_bytes == bound.flash_misses == fewest_bytes(trace, both, ones())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), room=st.integers(1, 14))
def test_with_mixed_sizes_the_byte_bound_is_below_all_ways(seed, room):
    trace = random_trace(seed, layers=2, experts=3, steps=5)
    sizes = mixed_sizes(seed, 2, 3)
    bound = multi_tier_belady(trace, room, 0, sizes=sizes)
    assert bound.gpu_missed_bytes <= fewest_bytes(trace, room, sizes)
    assert bound.lookup_bytes >= bound.gpu_missed_bytes
    assert bound.gpu_misses is None or len(set(sizes.ravel().tolist())) < 6


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), room=st.integers(2, 17), size=st.integers(1, 3))
def test_on_a_trace_without_prompts_it_is_belady_with_bypass(seed, room, size):
    trace = random_trace(seed, steps=10)
    sizes = ones() * size
    bound = multi_tier_belady(trace, room * size + size - 1, 0, sizes=sizes)
    assert bound.gpu_misses == belady(trace, room * size, bypass=True, sizes=sizes).misses


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), exclusive=st.booleans(), vram=st.integers(16, 40), more=st.integers(16, 40))
def test_no_policy_and_no_choice_of_uploads_beats_the_byte_bounds(name, seed, exclusive, vram, more):
    trace = random_trace(seed, steps=10, prompts=3)
    sizes = mixed_sizes(seed)
    ram = more if exclusive else vram + more
    bound = multi_tier_belady(trace, vram, ram, exclusive=exclusive, sizes=sizes)
    for upload in (None, some(random.Random(seed))):
        result = tier_replay(trace, vram, ram, name, exclusive=exclusive, sizes=sizes, seed=seed, upload=upload)
        counts = result.decoding
        missed_bytes = bound.lookup_bytes - _gpu_hit_bytes(trace, vram, ram, name, exclusive, sizes, seed, upload)
        assert missed_bytes >= bound.gpu_missed_bytes
        assert counts.flash_bytes >= bound.flash_bytes
        assert counts.lookups == bound.lookups


def _gpu_hit_bytes(trace, vram, ram, name, exclusive, sizes, seed, upload) -> int:
    hit_bytes = []

    def watch(event, found):
        hit_bytes.append(sum(int(sizes[event.layer, expert]) for expert in found.gpu_hits) * event.decoding)
        return found.misses if upload is None else upload(event, found)

    tier_replay(trace, vram, ram, name, exclusive=exclusive, sizes=sizes, seed=seed, upload=watch)
    return sum(hit_bytes)


def test_a_larger_tier_never_raises_a_bound():
    trace = random_trace(3, steps=20, prompts=2)
    for exclusive in (True, False):
        bounds = [multi_tier_belady(trace, room, 2 * room, exclusive=exclusive) for room in range(12)]
        gpu, flash = ([getattr(one, name) for one in bounds] for name in ("gpu_missed_bytes", "flash_bytes"))
        assert gpu == sorted(gpu, reverse=True)
        assert flash == sorted(flash, reverse=True)
        assert gpu[0] == bounds[0].lookup_bytes
    assert multi_tier_belady(trace, 18, 0).flash_bytes == 0  # prompts may leave everything there


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), room=st.integers(1, 3), first=st.integers(1, 4))
def test_what_comes_before_the_first_counted_pass_counts_as_a_prompt(seed, room, first):
    trace = random_trace(seed, layers=2, experts=3, steps=5)
    as_prompt = random_trace(seed, layers=2, experts=3, steps=5, prompts=first)
    bound = multi_tier_belady(trace, room, 0, first_step=first)
    assert bound == multi_tier_belady(as_prompt, room, 0)
    assert bound.decode_tokens == 5 - first
    assert time_bound_s(trace, machine(), room, 9, first_step=first) == time_bound_s(as_prompt, machine(), room, 9)


def test_bounds_refuse_what_they_cannot_bound():
    trace = random_trace(1, steps=4)
    prompt = Trace(**{**vars(trace), "phase": np.zeros_like(trace.phase)})
    with pytest.raises(InputError, match="none may be below 0"):
        multi_tier_belady(trace, 4, -1)
    with pytest.raises(InputError, match="sizes are"):
        multi_tier_belady(trace, 4, 1, sizes=ones(1, 1))
    with pytest.raises(InputError, match="no size"):
        multi_tier_belady(trace, 4, 1, sizes=0 * ones())
    with pytest.raises(InputError, match="no decoded token"):
        time_bound(prompt, machine(), 4, 4)


# --- seconds -------------------------------------------------------------------------------------------


def machine(gpu=1.0, cpu=3.0, link=1.0, disk=0.5, **more) -> Curves:
    return Curves(Curve(((1, gpu),)), Curve(((1, cpu),)), link_bytes_per_s=link, disk_bytes_per_s=disk, **more)


def shortest(trace: Trace, curves: Curves, vram: int) -> float:
    """Return the least seconds of all clairvoyant runs in which nothing waits and nothing slows another, by trying.

    Everything is in RAM. A lookup is a hit, an upload or the CPU's; what was in VRAM during an event may stay. Only
    sums of work that no other undercuts everywhere are carried on.
    """
    states: dict[frozenset[tuple[int, int]], set[tuple[float, ...]]] = {frozenset(): {(0.0, 0.0, 0.0)}}
    sizes = trace.sizes()
    for event in trace.events:
        after: dict[frozenset[tuple[int, int]], set[tuple[float, ...]]] = {}
        for (held, works), on_cpu in itertools.product(
            states.items(), itertools.product((False, True), repeat=len(event.experts))
        ):
            keys = [(event.layer, expert) for expert in event.experts]
            there = [key for key, away in zip(keys, on_cpu, strict=True) if not away]
            loads = [key for key in there if key not in held]
            more = (
                sum(curves.gpu_s(1) for _ in there),
                sum(curves.cpu_s(1) for away in on_cpu if away),
                sum(curves.link_s(int(sizes[key])) for key in loads),
            )
            sums = {tuple(a + b for a, b in zip(work, more, strict=True)) for work in works}
            together = sorted(held | set(there))
            for count in range(min(vram, len(together)) + 1):
                for kept in itertools.combinations(together, count):
                    after.setdefault(frozenset(kept), set()).update(sums)
        states = {held: undominated(works) for held, works in after.items()}
    return min(max(work) for works in states.values() for work in works) / trace.decode_tokens


def undominated(works) -> set[tuple[float, ...]]:
    """Return those that no other is below in every part."""
    kept: list[tuple[float, ...]] = []
    for work in sorted(works):
        if not any(all(a <= b for a, b in zip(one, work, strict=True)) for one in kept):
            kept.append(work)
    return set(kept)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), vram=st.integers(1, 3), gpu=st.floats(0.1, 2), cpu=st.floats(0.5, 6),
    link=st.floats(0.2, 3), latency=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_the_time_bound_is_below_every_run(seed, vram, gpu, cpu, link, latency):
    trace = random_trace(seed, layers=1, experts=4, steps=4)
    curves = machine(gpu, cpu, link, link_latency_s=latency)
    best = shortest(trace, curves, vram)
    bound = time_bound(trace, curves, vram, 4)
    assert bound.compute_s <= best * (1 + 1e-9)
    # whole experts cannot be divided: what rounding costs is at most one lookup more on each resource
    one_more = max(gpu, cpu, latency + 1 / link) / trace.decode_tokens
    assert bound.compute_s >= best - one_more - 1e-6
    assert bound.token_s == max(bound.compute_s, bound.disk_s)


def test_the_time_bound_by_hand():
    # ten tokens use experts 0 and 1 in turn, one place in VRAM: every second use hits if 0 stays
    trace = trace_of([(step, 0, (step % 2,)) for step in range(10)], layers=1, experts=2, top_k=1)
    assert multi_tier_belady(trace, 1, 2).gpu_misses == 6
    assert multi_tier_belady(trace, 1, 2).flash_misses == 2
    # a slow CPU: six uploads of 1 s, or one of them on the CPU beside five uploads
    assert time_bound(trace, machine(gpu=0.1, cpu=5.0), 1, 2).compute_s == pytest.approx(0.5, rel=1e-6)
    assert time_bound(trace, machine(gpu=0.1, cpu=1e9), 1, 2).compute_s == pytest.approx(0.6, rel=1e-6)
    # a slow GPU shares with the CPU: 10 lookups at 1 s and 3 s in parallel
    assert time_bound(trace, machine(gpu=1.0, cpu=3.0, link=1e9), 1, 2).compute_s == pytest.approx(0.75, rel=1e-6)
    # dense parts come on top of both, but not of the link
    dense = time_bound(trace, machine(gpu=1.0, cpu=3.0, link=1e9), 1, 2, dense_s=2.0)
    assert dense.compute_s == pytest.approx(2.75, rel=1e-6)
    assert time_bound(trace, machine(gpu=0.1, cpu=1e9), 1, 2, dense_s=0.3).compute_s == pytest.approx(0.6, rel=1e-6)
    # two reads of 2 s from flash
    assert time_bound(trace, machine(disk=0.5), 1, 2).disk_s == pytest.approx(0.4)
    assert time_bound_s(trace, machine(disk=0.01), 1, 2) == pytest.approx(20.0)
    assert time_bound_s(trace, machine(disk=0.5, disk_latency_s=8.0), 1, 2) == pytest.approx(2.0)


def test_kinds_choose_the_curves():
    trace = trace_of([(step, 0, (0,)) for step in range(4)], layers=1, experts=2, top_k=1)
    slow = (Curve(((1, 7.0),)), Curve(((1, 1e9),)))
    curves = machine(gpu=1.0, cpu=1e9, kinds={"slow": slow})
    assert time_bound_s(trace, curves, 2, 2) == pytest.approx(1.0)
    assert time_bound_s(trace, curves, 2, 2, kind_of=lambda layer, expert: "slow") == pytest.approx(7.0)


def test_a_faster_machine_never_raises_the_time_bound():
    trace = random_trace(5, steps=12)
    base = time_bound_s(trace, machine(), 4, 9)
    for faster in (machine(gpu=0.5), machine(cpu=1.0), machine(link=4.0), machine(disk=5.0)):
        assert time_bound_s(trace, faster, 4, 9) <= base * (1 + 1e-9)
    assert time_bound_s(trace, machine(), 6, 12) <= base * (1 + 1e-9)


def test_a_policy_object_serves_vram_and_ram_takes_the_default():
    policy = make_policy("lfru", layers=LAYERS, experts=EXPERTS)
    result = tier_replay(random_trace(2), 4, 10, policy)
    assert (result.policy, result.ram_policy) == ("lfru", "enu")
    assert tier_replay(random_trace(2), 4, 10, "lru").ram_policy == "lru"
    assert tier_replay(random_trace(2), 4, 10, "lru", "static").ram_policy == "static"
