"""Units: text to bytes and seconds exactly, and back near enough; everything else refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.units import (
    format_bytes,
    format_exact_bytes,
    format_nats,
    format_share,
    format_time,
    option_value,
    parse_rate_bytes_per_s,
    parse_share,
    parse_size_bytes,
    parse_time_s,
)

SIZES = {
    "4096": 4096,
    "1B": 1,
    "6GiB": 6 * 1024**3,
    "512MiB": 512 * 1024**2,
    "1.5MB": 1_500_000,
    " 2 kb ": 2000,
    ".5KiB": 512,
    "3.KiB": 3072,
    "9007199254740993": 2**53 + 1,
    "1TiB": 1024**4,
}
BAD_SIZES = ("", "6 gigs", "-1MiB", "1e3", "GiB", "1,5MB", "0", "0.1B", "nan", "inf", "9" * 25, "9" * 400, "6GiB:p95")
TIMES = {"25ms": 0.025, "800us": 8e-4, "800µs": 8e-4, "800μs": 8e-4, "0.5s": 0.5, "2 min": 120.0, "7NS": 7e-9}
BAD_TIMES = ("", "8", "8 parsecs", "-3ms", "0ms", "1e-3s", "ms", "8ms:p95", "9" * 400 + "s", "0." + "0" * 29 + "0ns")
SHARES = {"1%": 0.01, "0.01": 0.01, "100 %": 1.0, "0": 0.0, "1": 1.0, "2.5%": 0.025}
BAD_SHARES = ("300%", "1.01", "-1%", "one", "5ms", "")


@pytest.mark.parametrize("text", SIZES)
def test_a_size_is_exactly_what_was_written(text: str):
    assert parse_size_bytes(text) == SIZES[text]


@pytest.mark.parametrize("text", TIMES)
def test_a_time_carries_its_unit(text: str):
    assert parse_time_s(text) == pytest.approx(TIMES[text], rel=1e-12)


@pytest.mark.parametrize("text", SHARES)
def test_a_share_is_per_cent_or_a_fraction(text: str):
    assert parse_share(text) == SHARES[text]


@pytest.mark.parametrize(
    ("parse", "text", "example"),
    [
        *((parse_size_bytes, text, "6GiB") for text in BAD_SIZES),
        *((parse_time_s, text, "25ms") for text in BAD_TIMES),
        *((parse_share, text, "1%") for text in BAD_SHARES),
    ],
)
def test_what_is_no_quantity_is_refused_in_one_line_with_an_example(parse, text: str, example: str):
    with pytest.raises(InputError) as refused:
        parse(text)
    message = str(refused.value)
    assert repr(text) in message
    assert example in message
    assert "\n" not in message


def test_a_rate_may_say_that_it_is_per_second():
    assert parse_rate_bytes_per_s("25GB/s") == parse_rate_bytes_per_s(" 25GB ") == 25_000_000_000
    with pytest.raises(InputError, match="25GB/min"):
        parse_rate_bytes_per_s("25GB/min")


def test_a_fault_names_the_option_that_it_follows():
    assert option_value("--cache", None, parse_size_bytes) is None
    assert option_value("--cache", "1KiB", parse_size_bytes) == 1024
    with pytest.raises(InputError, match=r"^--cache: size 'much'"):
        option_value("--cache", "much", parse_size_bytes)


@given(st.integers(1, 2**63 - 1))
def test_whole_bytes_survive_parsing(size_bytes: int):
    assert parse_size_bytes(str(size_bytes)) == size_bytes


@given(st.integers(1, 2**50))
def test_a_shown_size_reads_back_as_nearly_the_same(size_bytes: int):
    assert parse_size_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.006)


@given(st.floats(1e-6, 1e6))
def test_a_shown_time_reads_back_as_nearly_the_same(seconds: float):
    assert parse_time_s(format_time(seconds)) == pytest.approx(seconds, rel=0.06 if seconds < 1e-5 else 0.006)


@given(st.integers(1, 9999), st.sampled_from(["KiB", "MiB", "GiB"]))
def test_binary_units_are_1024_of_the_one_below(number: int, unit: str):
    below = {"KiB": "B", "MiB": "KiB", "GiB": "MiB"}[unit]
    assert parse_size_bytes(f"{number}{unit}") == 1024 * parse_size_bytes(f"{number}{below}")


@given(st.text(max_size=12))
def test_any_text_is_a_quantity_or_an_input_error(text: str):
    for parse in (parse_size_bytes, parse_time_s, parse_share):
        try:
            value = parse(text)
        except InputError:
            continue
        assert 0 <= value < 2**63


@given(st.integers(0, 2**62) | st.integers(0, 2**32).map(lambda count: count * 1024))
def test_an_exact_size_loses_no_byte(size_bytes: int):
    short, _, rest = format_exact_bytes(size_bytes).partition(" (")
    if rest:
        assert int(rest.removesuffix(" bytes)")) == size_bytes
        assert short == format_bytes(size_bytes)
    elif size_bytes:
        assert parse_size_bytes(short) == size_bytes


def test_an_exact_size_is_short_where_it_can_be():
    assert format_exact_bytes(2 * 1024**3) == "2 GiB"
    assert format_exact_bytes(1536) == "1.5 KiB"
    assert format_exact_bytes(113616) == "110.95 KiB (113616 bytes)"


@given(st.floats(1e-7, 1e6))
def test_a_time_that_is_shown_upwards_can_be_given_as_a_limit(seconds: float):
    shown = parse_time_s(format_time(seconds, up=True))
    assert seconds * (1 - 1e-6) <= shown <= seconds * 1.01 + 1e-7
    assert shown >= seconds or format_time(seconds, up=True) == format_time(seconds)


@given(st.floats(0.0, 1.0))
def test_a_share_that_is_shown_upwards_can_be_given_as_a_limit(share: float):
    assert share - 1e-9 <= parse_share(format_share(share, 4, up=True)) <= share + 1.1e-6


@given(st.floats(1e-6, 50.0))
def test_a_divergence_that_is_shown_upwards_can_be_given_as_a_limit(nats: float):
    assert nats * (1 - 1e-9) <= float(format_nats(nats, up=True)) <= nats * 1.0011


def test_shares_are_shown_as_per_cent():
    assert format_share(0.0125) == "1.25 %"
    assert format_share(0.5, 0) == "50 %"
