"""What the disk gives a decoder: the line through reads, and how much is walked to time a matrix."""

import errno
import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest

from edgeflex.errors import DeviceError, InputError
from edgeflex.runtimes.decoder_rates import measure_rates, walked_bytes
from edgeflex.runtimes.read_times import ReadTimes, read_line
from edgeflex.runtimes.synthetic import Routing, synthetic_trace
from edgeflex.schema import Precision
from edgeflex.schema_moe import DECODER_PRECISIONS
from tests.tiny_decoder import EXPERTS, LAYERS, TOP_K, tiny_graph

TRACE = synthetic_trace("zipf", Routing(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, tokens=20, expert_bytes=4096))


def timed(spells: Iterator[float]) -> Callable[[], float]:
    """Return a clock on which each measurement, from one reading to the next, takes the next of ``spells``."""
    now, begun = 0.0, False

    def clock() -> float:
        nonlocal now, begun
        now += next(spells) if begun else 0.0
        begun = not begun
        return now

    return clock


def test_a_line_gives_back_the_latency_and_the_rate_that_made_it() -> None:
    latency_s, rate = read_line({count: 150e-6 + count * 1e6 / 8e8 for count in (1, 2, 4)}, 1_000_000)
    assert latency_s == pytest.approx(150e-6)
    assert rate == pytest.approx(8e8)


def test_times_that_fall_below_the_origin_give_no_latency_below_zero() -> None:
    # least squares through the origin: (1 * 1 + 2 * 3) / (1 * 1 + 2 * 2) seconds a record
    latency_s, rate = read_line({1: 1.0, 2: 3.0}, 7)
    assert latency_s == 0.0
    assert rate == pytest.approx(7 / (7 / 5))


def test_times_that_do_not_grow_still_give_a_finite_rate() -> None:
    latency_s, rate = read_line({1: 2.0, 2: 2.0, 4: 2.0}, 14)
    assert latency_s == 0.0
    assert rate == pytest.approx(14 / (2.0 * 7 / 21))


def test_a_matrix_is_timed_over_the_decoders_own_bytes_and_no_more_than_no_cache_holds() -> None:
    graph = tiny_graph()
    weights = sum(rows * columns for rows, columns in graph.matrix_shapes().values())
    assert walked_bytes(graph, Precision.INT4_GROUP32) == weights // 2
    assert walked_bytes(graph, Precision.FP32) == 4 * weights
    large = graph.model_copy(update={"vocabulary": 1 << 22})
    assert walked_bytes(large, Precision.INT8_DYNAMIC) == 128 << 20


def test_matrices_are_measured_within_a_token_for_each_precision_and_number_of_threads(tmp_path: Path) -> None:
    rates = measure_rates(tiny_graph(), tmp_path, TRACE, device="this one", threads=(1, 2), memory_bytes_per_s=1e10)
    measured = {(one.precision, one.threads) for one in rates.token_ratios}
    assert measured == {(precision, count) for precision in DECODER_PRECISIONS for count in (1, 2)}
    assert all(one.dense > 0 and one.experts > 0 for one in rates.token_ratios)


def test_what_a_precision_does_not_fit_is_int8_within_a_token(tmp_path: Path) -> None:
    graph = tiny_graph()
    uneven = tuple(layer.model_copy(update={"expert_dim": 24}) for layer in graph.layers)
    rates = measure_rates(
        graph.model_copy(update={"layers": uneven}), tmp_path, TRACE, device="this one", memory_bytes_per_s=1e10
    )
    assert {one.precision for one in rates.token_ratios} == {Precision.FP32, Precision.INT8_DYNAMIC}


def test_reads_are_measured_with_what_the_clock_says_and_leave_no_file(tmp_path: Path) -> None:
    ticks = iter(range(10**6))
    with ReadTimes(tmp_path, 1 << 20, lambda: float(next(ticks))) as reads:
        for _ in range(3):
            reads.turn()
        # every batch takes one tick, whatever its records: no slope, so the rate is that of a line through the origin
        latency_s, rate = reads.line()
        assert latency_s == 0.0
        assert rate == pytest.approx((1 << 20) * 21 / 7)
        # so of checked ones, which come two and eight at once
        assert reads.checked_rate() == pytest.approx((1 << 20) * (2 * 2 + 8 * 8) / (2 + 8))
    assert not list(tmp_path.iterdir())


def test_the_rate_of_checked_records_is_without_their_latency(tmp_path: Path) -> None:
    spells = cycle([5e-3 + 2e-3, 5e-3 + 8e-3])  # batches of two and of eight: 5 ms, and 1 ms a record
    with ReadTimes(tmp_path, 1 << 20, timed(spells)) as reads:
        assert reads.checked_rate() == pytest.approx((1 << 20) / 1e-3)


def test_few_large_records_have_the_rate_of_them_all(tmp_path: Path) -> None:
    ticks = iter(range(10**6))
    with ReadTimes(tmp_path, 100 << 20, lambda: float(next(ticks))) as reads:  # two to be checked: one batch
        assert reads.checked_rate() == pytest.approx(200 << 20)


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [(errno.ENOSPC, DeviceError, "256.00 MiB there"), (errno.EROFS, InputError, "Read-only")],
)
def test_a_disk_that_takes_no_file_is_named_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], said: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(kind, match=said) as error:
        ReadTimes(tmp_path / "calibration", 1 << 20)
    assert str(tmp_path / "calibration") in str(error.value)
    assert not list((tmp_path / "calibration").iterdir())


def test_one_slow_spell_among_many_turns_does_not_move_the_line(tmp_path: Path) -> None:
    spells = iter([1e-3] * 24 + [1e-4] * 2 * 24)  # seconds of each batch; the first eight turns are slow
    with ReadTimes(tmp_path, 1 << 16, timed(spells)) as reads:
        for _ in range(24):
            reads.turn()
        _, rate = reads.line()
    assert rate == pytest.approx((1 << 16) * 21 / 7 / 1e-4)


def test_small_records_get_many_turns_and_large_ones_few(tmp_path: Path) -> None:
    with ReadTimes(tmp_path, 4096) as small, ReadTimes(tmp_path, 64 << 20) as large:
        assert (small.turns, large.turns) == (240, 3)
