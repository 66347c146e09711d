"""What is seen of a device's events: seconds by hand, fair samples, and errors as they are defined."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.runtimes.cuda_watch import EventWatch, Reservoir, measured
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.device_record import errors_of, merged, prediction_error
from edgeflex.runtimes.schedule import Active, schedule
from edgeflex.schema_gpu import DeviceRecord, EventTime
from tests.decoder_samples import sample_record

SPANS = st.lists(st.tuples(st.floats(-1, 3), st.floats(0, 2)).map(lambda one: (one[0], one[0] + one[1])), max_size=6)


# --- one event -----------------------------------------------------------------------------------------


def test_an_events_seconds_by_hand():
    found = measured(
        10.0,
        gpu=[(0, 2), (6, 9)],
        cpu=[(1, 4)],
        link=[(0, 3), (3, 6)],
        disk=[(-1, 1), (0.5, 2)],  # reads overlap, and one began before the event
        ahead=[(9, 12)],  # ends after it
    )
    assert found.busy_s == pytest.approx((5, 3, 6, 2))
    assert found.waited_s == pytest.approx((5, 7, 10 - 6 - 1, 8))
    # copying 0 to 6 and 9 to 10; computing 0 to 4 and 6 to 9
    assert found.exposed_s == pytest.approx(2 + 1)


def test_nothing_done_is_all_waiting():
    found = measured(3.0)
    assert (found.busy_s, found.waited_s, found.exposed_s) == ((0, 0, 0, 0), (3, 3, 3, 3), 0)


@settings(max_examples=60, deadline=None)
@given(SPANS, SPANS, SPANS, SPANS)
def test_work_and_waiting_fill_the_event_and_exposed_copying_is_part_of_it(gpu, cpu, link, ahead):
    span_s = 2.0
    found = measured(span_s, gpu=gpu, cpu=cpu, link=link, ahead=ahead)
    for busy, waited in list(zip(found.busy_s, found.waited_s, strict=True))[:2]:
        assert busy + waited == pytest.approx(span_s)
    assert 0 <= found.exposed_s <= span_s - found.waited_s[2] + 1e-9
    assert found.exposed_s <= span_s - max(found.busy_s[:2]) + 1e-9


# --- passes ---------------------------------------------------------------------------------------------


class Stamps:
    """A device whose stamps are what a test says next; marks are (start, end)."""

    def __init__(self) -> None:
        self.now = 0.0

    def stamp(self) -> float:
        return self.now

    def between(self, first: float, last: float) -> float:
        return last - first

    def span(self, mark: tuple[float, float], origin: float) -> tuple[float, float]:
        return mark[0] - origin, mark[1] - origin

    def seconds(self, mark: tuple[float, float]) -> float:
        return mark[1] - mark[0]


CURVES = Curves(gpu=Curve(((1, 2.0),)), cpu=Curve(((1, 3.0),)), link_bytes_per_s=1.0)
ACTIVE = [Active((0, 1), 1, 4, "gpu"), Active((0, 2), 1, 4, "ram")]


def watch(every: int = 1) -> tuple[EventWatch, Stamps]:
    streams: Any = Stamps()
    return EventWatch(streams, every=every, clock=lambda: streams.now), streams


def serve(found: EventWatch, streams: Stamps, start: float) -> None:
    """One event of 8 s: the device computes 0 to 1, the processor 0 to 5, a copy lands at 4 and is computed to 7."""
    streams.now = start
    event = found.begin_event(3)
    assert event is not None
    event.planned = schedule(ACTIVE, CURVES), ACTIVE, CURVES
    mark = (start + 1, start + 4)
    event.uploads.append(mark)
    event.gpu += [(start, None, start + 1), (start + 1, mark, start + 7)]
    event.cpu.append((start, start + 5))
    streams.now = start + 8
    found.end_event(event)


def test_a_watched_pass_is_summed_with_its_prediction():
    found, streams = watch()
    streams.now = 9.0
    found.begin_pass(decoding=True)
    serve(found, streams, 10.0)
    found.copied_ahead((18.0, 19.5))
    found.collect(ended_s=22.0)
    seen = found.watched()
    assert (seen.passes, seen.pass_s, seen.events, seen.event_s) == (1, 13.0, 1, 8.0)
    assert seen.busy_s == pytest.approx((1 + 3, 5, 3 + 1.5, 0))
    assert seen.waited_s == pytest.approx((4, 3, 5, 8))
    assert seen.exposed_s == 0  # somebody computed during all of 1 to 4
    (one,) = seen.sample
    # the device has one expert (2 s) and the processor the other (3 s), quicker than a copy of 4 s and 2 s
    assert (one.layer, one.decoding, one.predicted_s, one.actual_s) == (3, True, 3.0, 8.0)
    assert one.predicted_busy_s == (2.0, 3.0, 0.0, 0.0)
    assert one.actual_busy_s == pytest.approx((4, 5, 3, 0))


def test_events_of_prompts_are_sampled_and_not_summed():
    found, streams = watch()
    found.begin_pass(decoding=False)
    serve(found, streams, 1.0)
    found.collect(ended_s=12.0)
    seen = found.watched()
    assert (seen.passes, seen.events, seen.busy_s) == (0, 0, (0, 0, 0, 0))
    assert [one.decoding for one in seen.sample] == [False]


def test_one_pass_in_so_many_is_watched_and_a_broken_one_leaves_nothing():
    found, streams = watch(every=3)
    for number in range(7):
        found.begin_pass(decoding=True)
        assert (found.begin_event(0) is not None) is (number % 3 == 0)
        found.collect(ended_s=streams.now)
    assert found.watched().passes == 3
    found, streams = watch()
    found.begin_pass(decoding=True)
    found.begin_event(0)
    found.forget()
    found.collect(ended_s=5.0)
    assert found.watched() == EventWatch(streams).watched()


# --- samples --------------------------------------------------------------------------------------------


def test_a_small_stream_is_kept_whole_and_a_long_one_fairly():
    few: Reservoir[int] = Reservoir(10)
    for number in range(7):
        few.add(number)
    assert few.items == tuple(range(7))
    counts: Counter[int] = Counter()
    for seed in range(400):
        many: Reservoir[int] = Reservoir(5, seed)
        for number in range(50):
            many.add(number)
        assert len(many.items) == 5
        assert list(many.items) == sorted(many.items)
        assert many.seen == 50
        counts.update(many.items)
    # 40 expected of each, a deviation of 6
    assert len(counts) == 50
    assert all(15 < count < 70 for count in counts.values())


def event(predicted_s: float, actual_s: float, *, decoding: bool = True, busy=(0, 0, 0, 0)) -> EventTime:
    return EventTime(
        layer=0,
        decoding=decoding,
        predicted_s=predicted_s,
        actual_s=actual_s,
        predicted_busy_s=busy,
        actual_busy_s=tuple(2 * one for one in busy),
    )


def test_errors_by_hand():
    found = prediction_error([(1.0, 2.0), (3.0, 2.0), (2.0, 2.0), (0.0, 5.0), (5.0, 0.0)])
    assert found is not None
    assert (found.samples, found.bias) == (3, 0.0)
    assert found.mean_error == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found.p90_error == 0.5
    assert prediction_error([(0.0, 1.0)]) is None


def test_errors_stand_by_resource_and_prompts_apart():
    sample = [event(1, 2, busy=(1, 0, 3, 0)), event(2, 2), event(4, 1, decoding=False)]
    found = errors_of(sample)
    assert list(found) == ["event", "gpu", "link", "prompt"]
    assert found["event"].bias == pytest.approx(-0.25)
    assert found["gpu"].bias == -0.5
    assert found["prompt"].bias == 3.0


def test_repeats_are_joined_into_sums_the_highest_peak_and_a_sample_of_both():
    one = sample_record(tokens=10, token_s=0.02, peak_bytes=5, bound_token_s=0.01)
    two = sample_record(tokens=30, token_s=0.04, peak_bytes=9, bound_token_s=0.02)
    joined = merged([one, two])
    assert (joined.tokens, joined.peak_bytes) == (40, 9)
    assert joined.token_s == pytest.approx(0.035)
    assert joined.bound_token_s == pytest.approx(0.0175)
    assert joined.busy_s["gpu"] == pytest.approx(one.busy_s["gpu"] + two.busy_s["gpu"])
    assert joined.hidden_share == pytest.approx(one.hidden_share)
    assert joined.sampled == one.sampled + two.sampled
    assert joined.sample == (*one.sample, *two.sample)
    assert joined.errors == errors_of(joined.sample)
    few = merged([one, two], limit=50)
    assert 48 <= len(few.sample) <= 52
    assert few == merged([one, two], limit=50), "the draw has a seed"
    assert DeviceRecord.model_validate_json(joined.canonical_json()) == joined
    with pytest.raises(InputError, match="no record"):
        merged([])


def test_a_peak_that_nobody_counted_stays_unknown():
    assert merged([sample_record(peak_bytes=None)] * 2).peak_bytes is None
