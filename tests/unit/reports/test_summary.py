from __future__ import annotations

import pytest

from edgeflex.reports import build_report, outcome, summary_rows
from edgeflex.reports.summary import format_error, format_seconds, format_value, other_checks, state_of, verdict_word
from edgeflex.schema import Budget, Check


def check(**changes):
    fields = {"name": "x", "unit": "s", "limit": 0.002, "promised": 0.001, "measured": 0.0011, "ok": True}
    return Check.model_validate(fields | changes)


def test_times_keep_three_digits_in_the_unit_that_suits():
    assert [format_seconds(s) for s in (0.0, 4.2e-6, 0.00012, 0.0012345, 0.0999, 0.5, 12.0)] == [
        "0.00 ms",
        "4.20 µs",
        "120 µs",
        "1.23 ms",
        "99.9 ms",
        "500 ms",
        "12.0 s",
    ]


def test_small_shares_do_not_become_zero():
    assert [format_value(v, "share") for v in (0.0, 0.00002, -0.0123)] == ["0.00 %", "0.002 %", "-1.23 %"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "+10.0 %"),
        ({"measured": 0.0009}, "−10.0 %"),
        ({"measured": 0.001}, "exact"),
        ({"promised": 0.0}, "–"),
        ({"was_measured": False}, "–"),
        ({"unit": "share", "promised": 0.01, "measured": 0.0125}, "+0.25 points"),
    ],
)
def test_errors_are_relative_save_for_shares(changes, text):
    assert format_error(check(**changes)) == text


@pytest.mark.parametrize(
    ("changes", "budget", "word"),
    [
        ({}, True, "met"),
        ({"ok": False}, True, "broken"),
        ({"ok": False}, False, "fails"),
        ({"limit": None}, False, "kept"),
        ({"limit": None, "ok": False}, False, "not kept"),
        ({"was_measured": False, "ok": False}, True, "not measured"),
        ({"measured": 0.0021, "ok": True}, True, "within error"),
    ],
)
def test_verdicts_have_their_words(changes, budget, word):
    assert verdict_word(check(**changes), budget=budget) == word


def test_beyond_the_limit_within_the_error_is_not_called_good():
    assert state_of(check(measured=0.0021)) == "unknown"


def test_the_outcome_counts_what_is_met_broken_and_unmeasured(make_small):
    manifest = make_small.manifest()
    full = build_report(manifest, make_small.bench(manifest), make_small.verify(manifest), None)
    assert outcome(full) == (
        "bad",
        "Met 3 of 4 budgets: 1 broken (accuracy drop). Mean 2.00 ms promised, 2.50 ms measured.",
    )
    empty = build_report(manifest, None, None, None)
    assert outcome(empty) == (
        "unknown",
        (
            "Met 1 of 4 budgets: 3 not measured (memory, mean latency, accuracy drop). "
            "Mean 2.00 ms promised, not benchmarked."
        ),
    )
    free = make_small.manifest(budget=Budget())
    assert outcome(build_report(free, None, None, None))[1].startswith("No budget was set.")


def test_all_met_reads_as_good(rich_report):
    state, sentence = outcome(rich_report)
    assert state == "good"
    assert sentence.startswith("Met 5 of 5 budgets. Mean 201 µs promised")


def test_a_failed_promise_spoils_met_budgets(rich_report):
    broken = check(name="parity", measured=0.5, ok=False)
    bench = rich_report.bench.model_copy(update={"checks": (broken,)})
    state, sentence = outcome(rich_report.model_copy(update={"bench": bench}))
    assert state == "bad"
    assert "1 further promise is not kept: parity." in sentence


def test_repeated_checks_are_said_once_and_contradictions_stay(make_small):
    manifest = make_small.manifest()
    same = check(name="mean latency budget", limit=0.003, measured=0.0025)
    contrary = same.model_copy(update={"ok": False})
    extra = check(name="load time", limit=None)
    bench = make_small.bench(manifest).model_copy(update={"checks": (same, contrary, extra, extra)})
    assert other_checks(build_report(manifest, bench, None, None)) == (contrary, extra)


def test_rows_are_budgets_then_the_rest(make_small):
    manifest = make_small.manifest()
    bench = make_small.bench(manifest).model_copy(update={"checks": (check(name="load time", limit=None),)})
    assert summary_rows(build_report(manifest, bench, None, None)) == (
        ("memory", "1000 B", "800 B", "900 B", "met"),
        ("mean latency", "3.00 ms", "2.00 ms", "2.50 ms", "met"),
        ("accuracy drop", "2.00 %", "1.00 %", "–", "not measured"),
        ("program size", "700 B", "600 B", "600 B", "met"),
        ("load time", "–", "1.00 ms", "1.10 ms", "kept"),
    )
