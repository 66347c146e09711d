"""The two fixed pieces of work that tell how fast a machine is: what of them counts, and what they leave behind."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from edgeflex.profiles import conditions
from edgeflex.profiles.yardsticks import speed

WARM_UP = (99.0, 99.0)


def clock_of(*samples: float):
    """Return a clock by which timed pieces of work take these seconds, one after the other."""
    times = itertools.accumulate(part for sample in samples for part in (1.0, sample))
    return lambda: next(times)


def test_reading_and_arithmetic_take_turns_and_the_means_of_all_but_the_first_stand():
    turns = ((0.5, 1.0), (0.25, 2.0), (0.25, 3.0), (1.0, 6.0))
    arithmetic_s, rate = speed(clock_of(*WARM_UP, *itertools.chain(*turns)))
    assert arithmetic_s == pytest.approx(3.0)
    assert rate == pytest.approx((64 << 20) / 0.5)


def test_a_neighbour_that_takes_the_core_in_one_turn_of_four_shows():
    arithmetic_s, _ = speed(clock_of(*WARM_UP, *(1.0, 1.0) * 3, 1.0, 5.0))
    assert arithmetic_s == pytest.approx(2.0), "a median would be 1, as without him"


def test_a_clock_that_stands_still_tells_nothing():
    assert speed(lambda: 1.0) == (None, None)


def test_without_room_for_the_buffer_only_the_rate_is_unknown(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "arange", full)
    ticks = itertools.count()
    assert speed(lambda: float(next(ticks))) == (1.0, None)


def test_conditions_hold_both_by_the_clock_that_is_handed_in():
    ticks = itertools.count()
    found = conditions(clock=lambda: float(next(ticks)))
    assert (found.memory_bytes_per_s, found.arithmetic_s) == (float(64 << 20), 1.0)


def test_this_machine_has_a_speed_and_nothing_stays_allocated():
    conditions()  # imports NumPy
    tracemalloc.start()
    try:
        found = conditions()
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.arithmetic_s is not None
    assert 1e-6 < found.arithmetic_s < 1.0
    assert found.memory_bytes_per_s is not None
    assert 1e7 < found.memory_bytes_per_s < 1e13
    assert left < 1 << 20
    assert 64 << 20 <= peak < 70 << 20


def test_a_recorded_machine_has_no_speed_of_this_one(tmp_path):
    found = conditions(tmp_path)
    assert (found.arithmetic_s, found.memory_bytes_per_s) == (None, None)
