"""Every policy against a trace worked out by hand, and against a slow statement of its own rule.

The tiny trace has 3 layers of 4 experts, two used per layer and step, 5 steps, and room for 8 experts of 1 byte;
one token cycle is 6. Keys are layer * 4 + expert.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.runtimes.expert_cache import ExpertCache
from edgeflex.runtimes.policies import POLICIES, make_policy
from edgeflex.runtimes.ranked_policies import DecayedLfuPolicy, EnuPolicy

LAYERS, EXPERTS, ROOM = 3, 4, 8
ORDER = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
# step by step, layer by layer
TINY = [
    [(0, 1), (0, 1), (0, 1)],
    [(0, 2), (0, 1), (0, 2)],
    [(0, 1), (2, 3), (0, 3)],
    [(0, 3), (0, 2), (0, 1)],
    [(0, 1), (0, 1), (2, 3)],
]


class Use(NamedTuple):
    """One event as the naive rules see it."""

    step: int
    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...] | None


def tiny_events() -> list[Use]:
    return [
        Use(step, layer, experts, (0.75, 0.25))
        for step, layers in enumerate(TINY)
        for layer, experts in enumerate(layers)
    ]


def random_events(seed: int, *, layers=LAYERS, experts=EXPERTS, steps=8, top_k=2) -> list[Use]:
    draw = random.Random(seed)
    events = []
    for step, layer in itertools.product(range(steps), range(layers)):
        used = tuple(sorted(draw.sample(range(experts), top_k)))
        first = draw.random()
        events.append(
            Use(step, layer, used, (first, *[(1 - first) / (top_k - 1)] * (top_k - 1)) if top_k > 1 else (1.0,))
        )
    return events


def run(name: str, events: list[Use], room: int, *, layers=LAYERS, experts=EXPERTS, top_k=2) -> tuple[int, list[int]]:
    """Return hits and the keys evicted, in order."""
    policy = make_policy(name, layers=layers, experts=experts, top_k=top_k, static=ORDER)
    cache = ExpertCache(room, np.ones((layers, experts), dtype=np.int64), policy)
    hits, evicted = 0, []
    for use in events:
        outcome = cache.event(use.step, use.layer, use.experts, use.weights, decoding=True)
        hits += len(outcome.hits)
        evicted += [layer * experts + expert for layer, expert in outcome.evicted]
    return hits, evicted


# --- slow rules: everything is worked out anew from the whole history ---------------------------------


def naive_ranked(rank, events, room, experts=EXPERTS):
    """Evict by ``rank(history, key)``; history ends with the present event; ties go to the lowest key."""
    resident: list[int] = []
    history: list[Use] = []
    hits, evicted = 0, []
    for use in events:
        history.append(use)
        keys = [use.layer * experts + expert for expert in use.experts]
        misses = [key for key in keys if key not in resident]
        hits += len(keys) - len(misses)
        while len(resident) + len(misses) > room:
            victim = max((key for key in resident if key not in keys), key=lambda key: (rank(history, key), -key))
            resident.remove(victim)
            evicted.append(victim)
        resident += misses
    return hits, evicted


def uses_of(history, key, experts=EXPERTS):
    layer, expert = divmod(key, experts)
    return [(index, use) for index, use in enumerate(history) if use.layer == layer and expert in use.experts]


def lru(history, key):
    return -uses_of(history, key)[-1][0]


def lfu(history, key):
    return -len(uses_of(history, key))


def decayed_lfu(history, key):
    return -sum(2.0 ** (use.step / 32) for _, use in uses_of(history, key))


def lfru(history, key):
    uses = uses_of(history, key)
    return -len(uses) / (history[-1].step - uses[-1][1].step + 1)


def lru_2(history, key):
    times = [index for index, _ in uses_of(history, key)]
    return (0, -times[-2]) if len(times) > 1 else (1, -times[-1])


def mrs(history, key):
    layer, expert = divmod(key, EXPERTS)
    score = 0.0
    for use in history:
        if use.layer == layer:
            score *= 0.5
            if expert in use.experts:
                score += 0.5 * use.weights[use.experts.index(expert)]
    return -score


def enu(history, key):
    layer, expert = divmod(key, EXPERTS)
    fast = slow = 0.03
    for use in history:
        if use.layer == layer:
            amount = 0.6 + 0.8 * use.weights[use.experts.index(expert)] if expert in use.experts else 0.0
            fast = fast * 2 ** (-1 / 4) + (1 - 2 ** (-1 / 4)) * amount
            slow = slow * 2 ** (-1 / 64) + (1 - 2 ** (-1 / 64)) * amount
    chance = 0.3 * fast + 0.7 * slow
    away = (layer - history[-1].layer - 1) % LAYERS + 1
    return round(away + LAYERS * (1 - chance) / chance, 9)


def static(history, key):
    pair = divmod(key, EXPERTS)
    return ORDER.index(pair) if pair in ORDER else len(ORDER)


RULES = {
    "lru": lru,
    "lfu": lfu,
    "decayed-lfu": decayed_lfu,
    "lfru": lfru,
    "lru-2": lru_2,
    "mrs": mrs,
    "enu": enu,
    "static": static,
}


def naive_lru_layer(events, room):
    queues: list[list[int]] = [[] for _ in range(LAYERS)]
    hits, evicted = 0, []
    for use in events:
        keys = [use.layer * EXPERTS + expert for expert in use.experts]
        own = queues[use.layer]
        found = [key for key in keys if key in own]
        hits += len(found)
        for key in found:
            own.remove(key)
            own.append(key)
        need = len(keys) - len(found)
        while sum(map(len, queues)) + need > room:
            free = [[key for key in queue if key not in keys] for queue in queues]
            victim = max(free, key=len)[0]
            queues[victim // EXPERTS].remove(victim)
            evicted.append(victim)
        queues[use.layer] = [key for key in own if key not in keys] + keys
    return hits, evicted


def naive_sieve(events, room):
    queue: list[int] = []  # old to young
    marked: dict[int, bool] = {}
    hand: int | None = None
    hits, evicted = 0, []
    for use in events:
        keys = [use.layer * EXPERTS + expert for expert in use.experts]
        for key in keys:
            hits += key in queue
            marked[key] = key in queue
        misses = [key for key in keys if key not in queue]
        while len(queue) + len(misses) > room:
            place = queue.index(hand) if hand is not None else 0
            while queue[place] in keys or marked[queue[place]]:
                if queue[place] not in keys:
                    marked[queue[place]] = False
                place = (place + 1) % len(queue)
            victim = queue[place]
            hand = queue[place + 1] if place + 1 < len(queue) else None
            queue.remove(victim)
            evicted.append(victim)
        queue += misses
    return hits, evicted


def naive_s3_fifo(events, room):
    small: list[int] = []
    main: list[int] = []
    ghosts: list[int] = []
    count: dict[int, int] = {}
    hits = 0
    evicted: list[int] = []
    for use in events:
        keys = [use.layer * EXPERTS + expert for expert in use.experts]
        misses = [key for key in keys if key not in small + main]
        for key in set(keys) - set(misses):
            count[key] = min(3, count[key] + 1)
            hits += 1
        before = len(evicted)
        while len(small) + len(main) + len(misses) > room:
            can_small = [key for key in small if key not in keys]
            can_main = [key for key in main if key not in keys]
            if can_small and (len(small) >= 0.1 * room or not can_main):
                key = can_small[0]
                small.remove(key)
                if count[key] > 1:
                    count[key] = 0
                    main.append(key)
                    continue
                ghosts.append(key)
                ghosts = ghosts[-int(0.9 * room) :]
            else:
                key = can_main[0]
                main.remove(key)
                if count[key]:
                    count[key] -= 1
                    main.append(key)
                    continue
            evicted.append(key)
        assert len(evicted) - before <= len(misses)
        for key in misses:
            count[key] = 0
            if key in ghosts:
                ghosts.remove(key)
                main.append(key)
            else:
                small.append(key)
    return hits, evicted


def naive_arc(events, room):
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    target = 0.0
    hits, evicted = 0, []
    for use in events:
        keys = [use.layer * EXPERTS + expert for expert in use.experts]
        often = []
        misses = []
        for key in keys:
            if key in t1 + t2:
                hits += 1
                (t1 if key in t1 else t2).remove(key)
                t2.append(key)
                continue
            misses.append(key)
            if key in b1:
                target = min(room, target + max(1, len(b2) / len(b1)))
                b1.remove(key)
                often.append(key)
            elif key in b2:
                target = max(0, target - max(1, len(b1) / len(b2)))
                b2.remove(key)
                often.append(key)
        while len(t1) + len(t2) + len(misses) > room:
            from_1 = [key for key in t1 if key not in keys]
            from_2 = [key for key in t2 if key not in keys]
            if from_1 and (len(t1) > target or not from_2):
                t1.remove(from_1[0])
                b1.append(from_1[0])
                evicted.append(from_1[0])
            else:
                t2.remove(from_2[0])
                b2.append(from_2[0])
                evicted.append(from_2[0])
        for key in misses:
            (t2 if key in often else t1).append(key)
        while b1 and len(t1) + len(b1) > room:
            b1.pop(0)
        while b2 and len(t1) + len(t2) + len(b1) + len(b2) > 2 * room:
            b2.pop(0)
    return hits, evicted


QUEUES = {"lru-layer": naive_lru_layer, "sieve": naive_sieve, "s3-fifo": naive_s3_fifo, "arc": naive_arc}


def naive(name, events, room):
    return naive_ranked(RULES[name], events, room) if name in RULES else QUEUES[name](events, room)


# --- claims ------------------------------------------------------------------------------------------

# Hits of 30 lookups, and what leaves in order. LRU, by hand: steps 0 and 1 fill the cache with 4 hits and leave,
# old to young, 1 9 | 0 2 | 4 5 | 8 10. Step 2: 0 1 hit; 6 7 push out 9 2; 8 hits and 11 pushes out 4 (7 hits).
# Step 3: 0 hits, 3 pushes out 5; 6 hits, 4 pushes out 10; 8 hits, 9 pushes out 1 (10 hits). Step 4: 0 hits, 1 pushes
# out 7; 4 hits, 5 pushes out 11; 10 11 push out 3 6: 12 hits.
TABLE: dict[str, tuple[int, list[int]]] = {
    "arc": (13, [9, 2, 10, 6, 7, 5, 11, 6, 8]),
    "decayed-lfu": (14, [9, 2, 10, 6, 7, 11, 3, 9]),
    "enu": (15, [2, 9, 10, 11, 7, 3, 9]),
    "lfru": (14, [9, 2, 10, 6, 7, 11, 3, 6]),
    "lfu": (15, [2, 9, 6, 7, 3, 10, 6]),
    "lru": (12, [9, 2, 4, 5, 10, 1, 7, 11, 3, 6]),
    "lru-2": (14, [9, 2, 10, 6, 7, 11, 3, 9]),
    "lru-layer": (13, [2, 9, 4, 5, 1, 7, 10, 3, 6]),
    "mrs": (14, [2, 9, 10, 1, 5, 3, 7, 9]),
    "s3-fifo": (13, [1, 4, 5, 9, 2, 10, 6, 7, 3]),
    "sieve": (14, [9, 2, 10, 6, 7, 11, 3, 6]),
    "static": (16, [2, 10, 6, 7, 3, 6]),
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_tiny_trace_goes_as_worked_out_by_hand(name):
    assert run(name, tiny_events(), ROOM) == TABLE[name]


def test_every_policy_but_the_random_one_is_in_the_table():
    assert {*TABLE, "random"} == set(POLICIES)


@pytest.mark.parametrize("name", sorted([*RULES, *QUEUES]))
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), room=st.integers(2, 11))
def test_each_policy_is_its_own_rule_stated_slowly(name, seed, room):
    events = random_events(seed)
    assert run(name, events, room) == naive(name, events, room)


def test_random_is_the_same_for_the_same_seed_and_another_for_another():
    def evicted(seed):
        policy = make_policy("random", layers=1, experts=64, seed=seed)
        cache = ExpertCache(8, np.ones((1, 64), dtype=np.int64), policy)
        return [cache.event(step, 0, (step % 64,), decoding=True).evicted for step in range(100)]

    assert evicted(1) == evicted(1)
    assert evicted(1) != evicted(2)


def test_decayed_counts_survive_very_long_runs():
    policy = DecayedLfuPolicy(1, 4)
    cache = ExpertCache(2, np.ones((1, 4), dtype=np.int64), policy)
    for step in range(0, 200_000, 8):
        cache.event(step, 0, (0,), decoding=True)
    assert cache.event(200_000, 0, (1,), decoding=True).evicted == ()
    assert cache.event(200_001, 0, (2,), decoding=True).evicted == ((0, 1),)
    assert all(math.isfinite(value) for value in policy._rank.ravel())


def test_enu_fades_a_split_event_once():
    whole, parts = EnuPolicy(1, 4, top_k=4), EnuPolicy(1, 4, top_k=4)
    for policy in (whole, parts):
        policy.start(4, np.ones((1, 4), dtype=np.int64))
    whole.use(0, 0, (0, 1, 2), (0.5, 0.3, 0.2), ())
    parts.use(0, 0, (0, 1), (0.5, 0.3), ())
    parts.use(0, 0, (2,), (0.2,), ())
    whole._catch_up()
    parts._catch_up()
    np.testing.assert_array_equal(whole._rank, parts._rank)


def test_enu_ranks_alike_however_long_it_puts_off_its_sums(monkeypatch):
    def evicted():
        return [run("enu", random_events(seed, steps=30), 9) for seed in range(5)]

    late = evicted()
    monkeypatch.setattr("edgeflex.runtimes.ranked_policies._MOST_NOTED", 1)
    assert evicted() == late


def test_enu_counts_only_layers_with_experts():
    sizes = np.ones((4, 2), dtype=np.int64)
    sizes[1] = 0
    policy = EnuPolicy(4, 2, top_k=1)
    policy.start(4, sizes)
    # from layer 2: layer 3 comes next, then layer 0, then layer 2 itself
    assert policy._ahead[2, [3, 0, 2], 0].tolist() == [1.0, 2.0, 3.0]


def test_unknown_names_and_a_static_policy_without_an_order_are_refused():
    with pytest.raises(InputError, match=r"policy 'mru' is unknown\. Name one of: enu, lru, lru-layer"):
        make_policy("mru", layers=1, experts=1)
    with pytest.raises(InputError, match="no order of worth"):
        make_policy("static", layers=1, experts=1)
    with pytest.raises(InputError, match=r"expert \(0, 9\) at place 1"):
        make_policy("static", layers=2, experts=4, static=[(0, 0), (0, 9)])
