"""The forecast, its ranking and what is copied ahead, against slow statements of the same rules."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.runtimes.ahead_time import Worth
from edgeflex.runtimes.cuda_ahead import MOST_AHEAD, Ahead
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.replacement import ABSENT
from edgeflex.runtimes.reuse import HALF_LIVES, Peaks, ReuseForecast, ReusePolicy
from edgeflex.runtimes.tiers import AheadCache
from edgeflex.runtimes.timeline import Active, Place
from edgeflex.runtimes.virtual import HORIZON

MOST_AGE, LEAST, FADE, PRIOR = 512, 1e-3, 0.9995, 4.0


class SlowForecast:
    """The forecast as it is worked out without care for time: every matrix in full, every sum in one line."""

    def __init__(self, layers, experts, top_k, *, horizon=8.0, half_lives=HALF_LIVES):
        self.top_k = max(1, top_k)
        self.base = min(0.5, self.top_k / experts)
        self.later = 1.0 - 1.0 / max(1.0, horizon)
        self.keep = np.array([2.0 ** (-1.0 / half_life) for half_life in half_lives])[:, None]
        self.uses = np.zeros((layers, len(half_lives), experts))
        self.mass = np.zeros((layers, len(half_lives), 1))
        self.age = np.full((layers, experts), MOST_AGE)
        self.aged = np.zeros((2, MOST_AGE + 1))
        count = len(half_lives) + 2
        self.weights = np.append(np.full(count - 1, 1.0 / (count - 1)), 0.0)
        self.products = PRIOR * experts * np.eye(count)
        self.products[-1, -1] *= 1e-3
        self.targets = self.products @ self.weights
        self.inputs = np.ones((layers, count, experts))
        self.rates = np.full((layers, experts), self.base)
        for layer in range(layers):
            self.foretell(layer)

    def note(self, layer, experts, weights):
        used = np.zeros(self.rates.shape[1])
        if len(experts) <= self.top_k:
            used[list(experts)] = 1.0
        elif weights is None:
            used[list(experts)] = self.top_k / len(experts)
        else:
            used[list(experts)] = np.minimum(1.0, self.top_k * np.array(weights))
        self.uses[layer] = self.uses[layer] * self.keep + used
        self.mass[layer] = self.mass[layer] * self.keep + 1.0
        age = self.age[layer]
        self.aged[0] += np.bincount(age, minlength=MOST_AGE + 1)
        self.aged[1] += np.bincount(age, weights=used, minlength=MOST_AGE + 1)
        self.age[layer] = np.where(used > 0.0, 0, np.minimum(age + 1, MOST_AGE))
        before = self.inputs[layer].copy()
        age = self.age[layer]
        self.inputs[layer, :-2] = (self.uses[layer] / self.base + 1.0) / (self.mass[layer] + 1.0)
        self.inputs[layer, -2] = (self.aged[1, age] / self.base + 2.0) / (self.aged[0, age] + 2.0)
        self.products = self.products * FADE + before @ (before - self.later * self.inputs[layer]).T
        self.targets = self.targets * FADE + before @ used * ((1.0 - self.later) / self.base)
        if layer == 0:
            self.weights = np.linalg.solve(self.products, self.targets)
        self.foretell(layer)

    def foretell(self, layer):
        self.rates[layer] = np.clip(self.weights @ self.inputs[layer], LEAST, 1.0 / self.base) * self.base


def ranked(scores: dict[int, float], count: int, barred=()) -> list[int]:
    """The ``count`` largest that are there at all; of equal ones the lowest key first."""
    there = [key for key, score in scores.items() if score > ABSENT and key not in set(barred)]
    return sorted(there, key=lambda key: (-scores[key], key))[:count]


# --- the forecast ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1.0, 8.0, 50.0]), st.sampled_from([16, 37, 64]))
def test_rates_are_those_of_the_slow_forecast_to_rounding(seed, top_k, horizon, experts):
    draw = random.Random(seed)
    quick, slow = (make(3, experts, top_k, horizon=horizon) for make in (ReuseForecast, SlowForecast))
    for _ in range(60):
        layer = draw.randrange(3)
        many = draw.random() < 0.2
        count = draw.randint(1, 3 * top_k if many else top_k)
        used = tuple(sorted(draw.sample(range(experts), min(count, experts))))
        parts = [draw.choice([0.0, draw.random()]) for _ in used]
        weights = None if draw.random() < 0.3 else tuple(parts)
        for forecast in (quick, slow):
            forecast.note(layer, used, weights)
        # products of matrices are summed in an order that depends on where in memory they lie
        np.testing.assert_allclose(quick.rates, slow.rates, rtol=1e-12)


def test_events_of_many_steps_reach_the_greatest_age_alike():
    quick, slow = (make(1, 12, 2) for make in (ReuseForecast, SlowForecast))
    for step in range(700):
        used = (0, 1 + step % 5) if step < 60 or step > 640 else (0, 1)
        for forecast in (quick, slow):
            forecast.note(0, used, None)
    np.testing.assert_allclose(quick.rates, slow.rates, rtol=1e-12)


# --- the largest of a matrix -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=120)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 12), st.integers(1, 14))
def test_peaks_are_what_sorting_everything_gives(seed, rows, columns, count):
    draw = random.Random(seed)

    def number() -> float:
        return draw.choice([ABSENT, 1.0, 2.0, draw.random()])

    values = np.array([[number() for _ in range(columns)] for _ in range(rows)])
    peaks = Peaks(values)
    for _ in range(6):
        barred = draw.sample(range(values.size), draw.randint(0, min(4, values.size)))
        added = np.array([draw.choice([0.0, 1.0, draw.random()]) for _ in range(rows)]) if draw.random() < 0.5 else None
        seen = values if added is None else values + added[:, None]
        scores = dict(enumerate(seen.ravel().tolist()))
        places, numbers = peaks.largest(count, barred, added)
        assert places == ranked(scores, count, barred)
        assert numbers == [scores[place] for place in places]
        assert peaks.top() == values.max()
        row = draw.randrange(rows)
        values[row] = [number() for _ in range(columns)]
        peaks.change(row)


# --- the policy ------------------------------------------------------------------------------------------


def test_victims_and_candidates_are_those_of_the_whole_matrix_whatever_happened():
    draw, layers, experts = random.Random(7), 5, 24
    sizes = np.full((layers, experts), 3, dtype=np.int64)
    sizes[1] = 0  # a layer without experts
    sizes[2, ::5] = 2
    policy, slow = ReusePolicy(layers, experts, top_k=3), SlowForecast(layers, experts, 3)
    policy.start(100, sizes)
    with_experts = [0, 2, 3, 4]
    resident: set[int] = set()
    for step in range(120):
        for place, layer in enumerate(with_experts):
            used = tuple(sorted(draw.sample(range(experts), 3)))
            policy.use(step, layer, used, None, ())
            slow.note(layer, used, None)
            keys = [layer * experts + expert for expert in used]
            coming = [expert for expert, key in zip(used, keys, strict=True) if key not in resident]
            distance = [(with_experts.index(of) - place - 1) % 4 + 1 if of in with_experts else 0 for of in range(5)]
            rates = slow.rates.ravel().tolist()
            leaving = {key: 4 / rates[key] + distance[key // experts] for key in resident}
            absent = {key: rates[key] for key in range(layers * experts) if key not in resident and sizes.ravel()[key]}
            pinned, count = draw.choice([keys, []]), draw.randint(1, 8)
            victims = ranked(leaving, count, pinned)
            assert policy.next_victims(layer, count, pinned) == [(key, rates[key]) for key in victims]
            wanted = ranked(absent, count, keys)
            assert policy.likeliest_absent(count, keys) == [(key, rates[key]) for key in wanted]
            assert policy.likeliest_rate() == max(absent.values(), default=ABSENT)
            policy.insert(layer, coming)
            resident |= set(keys)
            leaving = {key: 4 / rates[key] + distance[key // experts] for key in resident}
            excess = int(sum(sizes.ravel()[key] for key in resident)) - 100
            expected = []
            for key in ranked(leaving, len(leaving), keys):
                if excess <= 0:
                    break
                expected.append(key)
                excess -= int(sizes.ravel()[key])
            over = int(sum(sizes.ravel()[key] for key in resident)) - 100
            assert (policy.evict(layer, keys, over) if over > 0 else []) == expected
            resident -= set(expected)
            if draw.random() < 0.1 and resident - set(keys):
                gone = draw.choice(sorted(resident - set(keys)))
                policy.release([gone])
                resident.discard(gone)
    assert len(resident) > 20


def test_what_may_not_leave_is_named_instead_of_looked_for_for_ever():
    policy = ReusePolicy(1, 4, top_k=1)
    policy.start(2, np.ones((1, 4), dtype=np.int64))
    policy.insert(0, (0, 1))
    with pytest.raises(InputError, match="2 bytes more must leave"):
        policy.evict(0, [0, 1], 2)


# --- worth and copies ahead ------------------------------------------------------------------------------


def slow_ranking(tiers, policy, layer, active, curves, largest):
    """Return (key, worth) in the order of worth, and the rates of who would leave."""
    rates, experts = policy.rates, policy.rates.shape[1]
    found = sorted(active, key=lambda one: (-rates[one.key], one.key))
    missing = [one for one in found if one.place != "gpu"]
    count = len(missing) + MOST_AHEAD
    victims = [0.0] * min(count, (tiers.vram.capacity_bytes - tiers.vram.resident_bytes) // largest)
    if len(victims) < count:
        pinned = [one.key[0] * experts + one.key[1] for one in found]
        victims += [rate for _, rate in policy.next_victims(layer, count, pinned)]
    worth_of = Worth.of(curves, largest, HORIZON)
    worth = {one.key: worth_of.seconds(float(rates[one.key]) - v) for one, v in zip(missing, victims, strict=False)}
    return [(one.key, worth.get(one.key, 0.0)) for one in found], victims


def slow_wanted(tiers, policy, victims, uploaded, seconds, curves, largest):
    copy_s, experts = curves.link_s(largest), policy.rates.shape[1]
    count = min(MOST_AHEAD, int(seconds / copy_s) + 1)
    beside_s = copy_s * (1.0 - 1.0 / curves.cpu_beside_link)
    least = beside_s / (HORIZON * max(curves.cpu_s(1), 1e-9))
    likely = policy.likeliest_absent(count, [layer * experts + expert for layer, expert in uploaded])
    pairs = zip(likely, victims[len(uploaded) :], strict=False)
    keys = [(divmod(key, experts), rate - victim) for (key, rate), victim in pairs]
    return [key for key, gain in keys if gain > least and tiers.place(*key) == "ram"]


@pytest.mark.parametrize(("ram", "exclusive"), [(1.0, False), (0.7, False), (0.5, True)])
def test_worth_and_copies_ahead_are_those_of_the_slow_rules(ram, exclusive):
    draw, layers, experts = random.Random(11), 4, 16
    sizes = np.full((layers, experts), 4, dtype=np.int64)
    total = int(sizes.sum())
    policy = ReusePolicy(layers, experts, top_k=4)
    tiers = AheadCache(int(0.4 * total), int(ram * total), sizes, policy, top_k=4, exclusive=exclusive)
    ahead = Ahead(tiers, policy, sizes)
    curves = Curves(Curve(((1, 1.0),)), Curve(((1, 5.0),)), 2.0, cpu_beside_link=1.2)
    favour = [[draw.random() ** 3 for _ in range(experts)] for _ in range(layers)]
    copied = valued = 0
    for step in range(150):
        for layer in range(layers):
            used = sorted(set(draw.choices(range(experts), favour[layer], k=4)))
            found = tiers.event(step, layer, used, None, decoding=True)
            places: dict[int, Place] = dict.fromkeys(found.gpu_hits, "gpu")
            places.update(dict.fromkeys(found.flash_misses, "flash"))
            active = [Active((layer, one), 1, 4, places.get(one, "ram"), "kind", ram_copy=True) for one in used]
            expected, victims = slow_ranking(tiers, policy, layer, active, curves, 4)
            got = ahead.ranked(layer, active, curves)
            assert [(one.key, one.worth_s) for one in got] == expected
            assert {one.key: (one.place, one.kind, one.ram_copy, one.rows) for one in got} == {
                one.key: (one.place, one.kind, one.ram_copy, one.rows) for one in active
            }
            valued += sum(one.worth_s > 0 for one in got)
            uploaded = [one.key for one in got if one.place != "gpu" and draw.random() < 0.5]
            tiers.admit(expert for _, expert in uploaded)
            seconds = draw.choice([0.5, 9.0])
            wanted = ahead.wanted(uploaded, seconds, curves)
            assert wanted == slow_wanted(tiers, policy, victims, uploaded, seconds, curves, 4)
            present = [(layer, expert) for expert in used]
            for key in wanted if not exclusive else ():
                if tiers.place(*key) == "ram" and ahead.fits(key, present):
                    gone = ahead.bring(layer, key, present)
                    assert tiers.place(*key) == "gpu"
                    assert all(tiers.place(*one) != "gpu" for one in gone)
                    copied += 1
            assert tiers.vram.resident_bytes == 4 * sum(1 for _ in tiers.vram.resident()) <= tiers.vram.capacity_bytes
    assert valued > 30
    assert copied > 10 or exclusive
