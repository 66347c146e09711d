"""The two fixed pieces of work that tell how fast a machine is: what of them counts, and what they leave behind."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from edgeflex.profiles import conditions
from edgeflex.profiles.yardsticks import arithmetic_seconds, memory_rate


def clock_of(*samples: float):
    """Return a clock by which timed pieces of work take these seconds, one after the other."""
    times = itertools.accumulate(part for sample in samples for part in (1.0, sample))
    return lambda: next(times)


def test_arithmetic_is_the_median_of_fifteen_samples_after_one_that_does_not_count():
    assert arithmetic_seconds(clock_of(99.0, *(float(n) for n in range(15, 0, -1)))) == pytest.approx(8.0)


def test_arithmetic_beside_a_neighbour_that_takes_most_of_the_samples_is_slower():
    assert arithmetic_seconds(clock_of(1.0, *([1.0] * 7 + [2.0] * 8))) == pytest.approx(2.0)


def test_memory_is_64_mib_over_the_median_of_three_passes_after_one_that_does_not_count():
    assert memory_rate(clock_of(99.0, 0.5, 8.0, 0.25)) == pytest.approx((64 << 20) / 0.5)


def test_a_clock_that_stands_still_tells_nothing():
    assert arithmetic_seconds(lambda: 1.0) is None
    assert memory_rate(lambda: 1.0) is None


def test_without_room_for_the_buffer_the_rate_is_unknown(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "arange", full)
    assert memory_rate() is None


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
