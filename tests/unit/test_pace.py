"""How fast a machine is now against when it was calibrated: ratios by hand, what is unknown, and what is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeflex.pace import Pace, middle, pace, pace_sentences
from edgeflex.schema import Check, Conditions

THEN = Conditions(arithmetic_s=1e-3, memory_bytes_per_s=10e9)
seconds = st.floats(1e-6, 1e-1)
rates = st.floats(1e8, 1e12)
states = st.builds(Conditions, arithmetic_s=seconds, memory_bytes_per_s=rates)


def check(*, ok: bool = False, unit: str = "s", measured: bool = True) -> Check:
    return Check.model_validate(
        {"name": "x", "unit": unit, "limit": None, "promised": 1, "measured": 2, "ok": ok, "was_measured": measured}
    )


def test_ratios_are_of_mean_seconds_before_and_after():
    # a byte takes 0.1 ns then, 0.125 and 0.1 ns now; a mean of rates would say 9e9 bytes a second, 1.11 times
    now = (
        Conditions(arithmetic_s=1.2e-3, memory_bytes_per_s=8e9),
        Conditions(arithmetic_s=1.4e-3, memory_bytes_per_s=10e9),
    )
    found = pace(THEN, now)
    assert found.arithmetic == pytest.approx(1.3)
    assert found.memory == pytest.approx(1.125)


def test_the_middle_of_two_samples_is_that_of_their_seconds_and_holds_nothing_else():
    found = middle((Conditions(load_average=3.0, arithmetic_s=1e-3, memory_bytes_per_s=8e9), THEN))
    assert found is not None
    assert found.arithmetic_s == pytest.approx(1e-3)
    assert found.memory_bytes_per_s == pytest.approx(2 / (1 / 8e9 + 1 / 10e9))
    assert found.load_average is None


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        (None, [THEN, THEN], Pace()),
        (Conditions(load_average=1.0), [THEN], Pace()),
        (THEN, [], Pace()),
        (THEN, [Conditions(), Conditions(clock_hz=1e9)], Pace()),
        (THEN, [Conditions(arithmetic_s=2e-3)], Pace(arithmetic=2.0)),
        (Conditions(memory_bytes_per_s=10e9), [THEN], Pace(memory=1.0)),
        (THEN, [Conditions(), THEN], Pace(1.0, 1.0)),  # what one of two samples tells is used
    ],
)
def test_what_nobody_measured_is_unknown(then, now, expected):
    assert pace(then, now) == expected


def test_without_any_speed_there_is_no_middle():
    assert middle(()) is None
    assert middle((Conditions(load_average=1.0), Conditions())) is None


@given(st.lists(states, min_size=1, max_size=5))
def test_work_in_the_middle_of_samples_has_the_pace_of_these_samples(sampled):
    found = pace(middle(sampled), reversed(sampled))
    assert found.known == pytest.approx((1.0, 1.0))


@given(states, st.lists(states, min_size=1, max_size=4), st.floats(0.1, 10))
def test_work_that_takes_so_many_times_as_long_is_told_as_that(then, now, times):
    slowed = [
        Conditions(arithmetic_s=one.arithmetic_s * times, memory_bytes_per_s=one.memory_bytes_per_s / times)
        for one in now
    ]
    assert pace(then, slowed).known == pytest.approx([times * one for one in pace(then, now).known])


FIGURES = "arithmetic takes {} times as long, reading memory {} times."
SLOWER = f"This machine is slower now than at calibration: {FIGURES.format('1.31', '1.44')}"
REMEDY = (
    "The promised times hold at the speed of calibration. Stop other programs, fix the clock (on a Jetson with "
    "nvpmodel and jetson_clocks), or calibrate again at this speed, with --overwrite."
)


@pytest.mark.parametrize(
    ("found", "late", "said", "remedied"),
    [
        (Pace(1.31, 1.44), False, "is slower now than at calibration: " + FIGURES.format("1.31", "1.44"), False),
        (Pace(1.31, 1.44), True, "is slower now than at calibration: " + FIGURES.format("1.31", "1.44"), True),
        (Pace(1.31, 1.0), True, "is slower now than at calibration: " + FIGURES.format("1.31", "1.00"), True),
        (Pace(0.8, 1.0), True, "is quicker now than at calibration: " + FIGURES.format("0.80", "1.00"), False),
        (Pace(0.8, 1.5), True, "has another speed now than at calibration: " + FIGURES.format("0.80", "1.50"), True),
        (Pace(1.02, 0.95), True, "runs at the speed of calibration: " + FIGURES.format("1.02", "0.95"), False),
        (Pace(1.5), False, "is slower now than at calibration: arithmetic takes 1.50 times as long.", False),
        (Pace(memory=1.5), False, "is slower now than at calibration: reading memory takes 1.50 times as long.", False),
    ],
)
def test_what_is_said_fits_the_speed_and_whether_a_time_was_kept(found, late, said, remedied):
    told = pace_sentences(found, [check(ok=True), check(ok=not late)])
    assert told == (f"This machine {said}", *((REMEDY,) if remedied else ()))


@pytest.mark.parametrize(
    ("found", "late"), [(Pace(1.02, 0.95), False), (Pace(1.1, 0.9), False), (Pace(), True), (Pace(), False)]
)
def test_nothing_is_said_where_there_is_nothing_to_explain_or_nothing_is_known(found, late):
    assert pace_sentences(found, [check(ok=not late)]) == ()


def test_nothing_is_said_of_another_computers_speed():
    here, there = (THEN.model_copy(update={"machine": name}) for name in ("Cortex-A78", "Cortex-A76"))
    assert pace(here, [here]) == Pace(1.0, 1.0)
    assert pace(there, [here]) == Pace()
    assert pace(here, [Conditions(), here]) == Pace(1.0, 1.0), "a sample without a speed is of no computer"
    assert pace(here, [here, there]) == Pace()


def test_a_decoders_times_are_measured_again_by_themselves():
    found = pace(THEN, [Conditions(arithmetic_s=2e-3)], decoder=True)
    assert "`edgeflex profile --decoder CALIBRATION`" in pace_sentences(found, [check()])[1]


@pytest.mark.parametrize("one", [check(unit="bytes"), check(unit="share"), check(measured=False), check(ok=True)])
def test_only_a_measured_time_that_was_not_kept_asks_for_a_remedy(one):
    assert pace_sentences(Pace(1.31, 1.44), [one]) == (SLOWER,)
    assert pace_sentences(Pace(1.0, 1.0), [one]) == ()


@given(st.builds(Pace, st.none() | st.floats(0.01, 100), st.none() | st.floats(0.01, 100)), st.booleans())
def test_a_sentence_is_there_wherever_the_speed_is_another_or_a_known_speed_explains_nothing(found, late):
    said = pace_sentences(found, [check(ok=not late)])
    outside = any(not 0.9 <= one <= 1.1 for one in found.known)
    assert bool(said) is (outside or (late and bool(found.known)))
    assert (REMEDY in said) is (late and any(one > 1.1 for one in found.known))
