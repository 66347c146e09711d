"""What work loses beside other work: quotients by hand, and the processor in a GPU's place."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from edgeflex.errors import DeviceError
from edgeflex.profiles import overlap
from edgeflex.profiles.overlap import overlap_of, side_by_side, slowdown, timed, timed_beside


def ticking(step: float = 0.5):
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += step
        return now

    return clock


def test_a_slowdown_is_the_quotient_of_the_medians_with_both_spreads():
    # medians 2 and 3; the middle half of 1, 2, 2, 2, 3 spreads over 0, that of 2, 2.4, 3, 3.6, 4 over 1.2
    found = slowdown([1.0, 2.0, 2.0, 2.0, 3.0], [2.0, 2.4, 3.0, 3.6, 4.0], "a copy")
    assert found.value == pytest.approx(1.5)
    assert found.spread == pytest.approx(1.2 / 3.0)
    both = slowdown([1.5, 1.7, 2.0, 2.3, 2.5], [2.0, 2.4, 3.0, 3.6, 4.0], "a copy")
    assert both.spread == pytest.approx((0.3**2 + 0.4**2) ** 0.5)
    assert (found.origin, found.source) == ("measured", "a copy")


def test_nothing_is_quicker_beside_other_work():
    assert slowdown([2.0], [1.0], "noise").value == 1.0
    assert slowdown([2.0], [1.0], "noise").spread is None


@pytest.mark.parametrize(("alone", "beside"), [([], [1.0]), ([1.0], []), ([1.0], [0.0]), ([float("nan")], [1.0])])
def test_samples_that_say_nothing_are_refused(alone, beside):
    with pytest.raises(DeviceError, match="samples"):
        slowdown(alone, beside, "a copy")


def test_turns_are_timed_by_the_clock_that_is_given_and_the_first_do_not_count():
    turns = []
    assert timed(lambda: turns.append(1), 3, clock=ticking()) == [0.5] * 3
    assert len(turns) == 5


def test_the_other_work_runs_before_during_and_not_after():
    done = threading.Event()
    others, seen = [], []

    def other() -> None:
        assert not done.is_set()
        others.append(1)

    def work() -> None:
        before = len(others)
        while len(others) == before:  # ends only if the other goes on
            pass
        seen.append(before)

    assert len(timed_beside(work, other, 4)) == 4
    done.set()
    assert min(seen) >= 1, "the other had been done once before the first turn"
    assert not [thread for thread in threading.enumerate() if thread.name == "beside"]


def test_a_failure_of_the_other_work_is_told_and_its_thread_ends():
    def fails() -> None:
        raise RuntimeError("no kernel image")

    with pytest.raises(DeviceError, match="no kernel image"):
        timed_beside(lambda: None, fails, 2)
    assert not [thread for thread in threading.enumerate() if thread.name == "beside"]


def test_other_work_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(overlap, "_LONGEST_S", 0.05)
    end = threading.Event()
    with pytest.raises(DeviceError, match="longer than"):
        timed_beside(lambda: None, lambda: end.wait(5), 1)
    end.set()


def test_the_processor_in_a_gpus_place_gives_all_four_factors():
    source, target = np.arange(1 << 18, dtype=np.int32), np.empty(1 << 18, dtype=np.int32)
    matrix = np.ones((96, 96), dtype=np.float32)
    out = np.empty_like(matrix)
    numbers = np.arange(1 << 18, dtype=np.int32)
    found = overlap_of(
        lambda: np.copyto(target, source), lambda: np.matmul(matrix, matrix, out=out), numbers.max, repeats=3
    )
    for name, figure in found:
        assert figure is not None, name
        assert figure.value >= 1.0
        assert figure.origin == "measured"
    assert found.link_beside_gpu is not None
    assert found.link_beside_cpu is not None
    assert "beside" in found.link_beside_gpu.source
    assert found.link_beside_cpu.source.startswith("copies to the GPU beside reads")


def test_each_of_two_is_timed_alone_and_beside_the_other():
    found = side_by_side(lambda: None, lambda: None, ("a", "b"), repeats=2, clock=ticking())
    # one clock for both threads' turns; every turn takes one step whatever else happens
    assert found.one.value == found.other.value == 1.0
    assert (found.one.source, found.other.source) == (
        "a beside b, median of 2 turns over that alone",
        "b beside a, median of 2 turns over that alone",
    )
