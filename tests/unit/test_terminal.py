"""What people read: whatever the width of the terminal, every character is shown and no text is an instruction."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeflex import terminal
from edgeflex.pace import Pace
from edgeflex.plans import solve
from edgeflex.profiles import load, names
from edgeflex.schema import Budget, Check, Curve, CurvePoint, Figure, Interval, LatencyLimit, Overlap, Tier
from tests.builders import decision, option, random_budget, table
from tests.toy_bundle import toy_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDE, NARROW = 400, 40
cells = st.text("abc xyz0189.,%[]/[bold][/]µ±", max_size=30)


def shown(text: str) -> Counter[str]:
    """Return how often every visible character stands in ``text``."""
    return Counter("".join(text.split()))


@pytest.fixture
def width(monkeypatch: pytest.MonkeyPatch):
    return lambda columns: monkeypatch.setenv("COLUMNS", str(columns))


def at(columns: int, title: str, heads: list[str], rows: list[list[str]]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        return terminal.table_text(title, heads, rows)


@given(cells, st.lists(st.lists(cells, min_size=4, max_size=4), max_size=4))
def test_a_narrow_table_shows_every_character(title: str, rows: list[list[str]]):
    heads = ["layer", "precision", "[share]", "time"]
    expected = shown(title + "".join(heads) + "".join("".join(row) for row in rows))
    narrow = at(NARROW, title, heads, rows)
    assert shown(narrow) >= expected, "heads stand at every row where rows are listed"
    assert max(map(len, narrow.splitlines())) <= NARROW
    assert shown(at(WIDE, title, heads, rows)) == expected


def test_no_number_is_broken_where_a_table_is_too_wide():
    heads = ["policy", "cache", "hit rate", "read per token", "behind Belady", "worst layer", "speed", "of bound"]
    row = ["enu", "1000.00 MiB", "43.4 %", "447.45 MiB", "19.3 pt", "5.9 %", "2.1 tokens/s", "66 %"]
    for columns in (40, 60):
        text = at(columns, "a.csv, 128 decoded tokens", heads, [row, row])
        assert max(map(len, text.splitlines())) <= columns
        assert all(text.count(cell) == 2 for cell in row)
    assert len(at(WIDE, "", heads, [row, row]).splitlines()) == 3
    middle = at(80, "", heads, [row, row]).splitlines()
    assert len(middle) < 7, "a table whose heads go over several lines"
    assert [" ".join(line.split()) for line in middle[-2:]] == [" ".join(row)] * 2


def test_a_wide_table_keeps_a_row_on_a_line():
    text = at(WIDE, "Title", ["layer", "bits"], [["stem", "8"], ["head", "4"]])
    assert [line.split() for line in text.splitlines()] == [["Title"], ["layer", "bits"], ["stem", "8"], ["head", "4"]]


@pytest.mark.parametrize("name", names())
def test_a_narrow_profile_shows_every_figure_with_its_source(name: str, width):
    device = load(name)
    width(WIDE)
    wide = terminal.device_text(device)
    width(NARROW)
    assert shown(terminal.device_text(device)) == shown(wide)
    for figure in (one.ops_per_s for one in device.compute):
        assert shown(figure.source) <= shown(wide)


def test_what_work_loses_beside_other_work_stands_among_the_figures():
    factor = Figure(value=1.234, origin="measured", source="copies beside reads", spread=0.1)
    device = load(names()[0]).model_copy(update={"overlap": Overlap(link_beside_cpu=factor)})
    (row,) = [line for line in terminal.device_text(device).splitlines() if line.startswith("link beside CPU")]
    assert "1.23 times" in row
    assert "±5 %" in row


def test_a_narrow_solution_shows_every_choice(width):
    layers = [decision(f"trunk.{index}.convolution", option("int8-static")) for index in range(20)]
    solution = solve(table(*layers), random_budget(1).model_validate({}))
    width(NARROW)
    text = terminal.solution_text(solution)
    assert shown("".join(f"{one.subject}{one.option}" for one in solution.choices)) <= shown(text)
    assert "Proof: optimal" in text


def test_a_narrow_curve_shows_every_point(width):
    points = tuple(
        CurvePoint(label=f"mix {index}", latency_s=index * 1e-3, memory_bytes=index * 1024, drop=index / 100)
        for index in range(1, 6)
    )
    width(NARROW)
    text = terminal.curve_text(Curve(points=points[:3], baselines=points[3:]))
    assert shown("".join(point.label for point in points)) <= shown(text)


def test_running_text_keeps_its_words_whole_and_indents_what_goes_on(width):
    width(NARROW)
    line = "note: the least that can be reached is told in /a/folder/with-a-rather-long-name/device.json, as ever"
    folded = terminal.prose(line, "", "  - one fault of several, which needs more than a line").splitlines()
    assert " ".join(part.strip() for part in folded if part).startswith(line)
    assert all(len(part) <= NARROW for part in folded if "/" not in part)
    assert folded[1].startswith("  ")
    assert [part[:4] for part in folded[-2:]] == ["  - ", "    "]


def test_a_narrow_plan_proof_is_folded_between_words(width):
    layers = [decision(f"trunk.{index}.convolution", option("int8-static")) for index in range(3)]
    solution = solve(table(*layers), random_budget(1).model_validate({}))
    width(NARROW)
    lines = terminal.solution_text(solution).splitlines()
    assert max(map(len, lines)) <= NARROW


def test_no_result_holds_colours_where_no_terminal_reads_it():
    assert "\x1b" not in at(WIDE, "Title", ["layer"], [["stem"]])


def test_a_plan_shows_each_limit_beside_what_it_promises(width):
    width(WIDE)
    limits = Budget(
        memory_bytes={Tier.HOST: 2 << 20}, latency=(LatencyLimit(limit_s=9e-4, statistic="p95"),), max_drop=0.02
    )
    spans = {"mean": Interval(value=1e-3, low=0.0, high=1.0), "p95": Interval(value=8e-4, low=0.0, high=1.0)}
    text = terminal.plan_text(toy_plan(budget=limits, latency_interval_s=spans))
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "2.00 MiB" in rows["memory"]
    assert "900.0 µs" in rows["latency p95"]
    assert "2.00 %" in rows["drop"]
    for name in ("latency mean", "file"):
        assert "–" in rows[name], "no limit was set"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "1 µs – 2 …"), ("ascii", "1 us - 2 ..."), ("no-such", "1 µs – 2 …")]
)
def test_signs_stay_only_where_the_encoding_has_them(encoding: str, shown: str):
    stream = SimpleNamespace(encoding=encoding)
    assert terminal.printable("1 µs – 2 …", stream) == shown
    assert terminal.printable("plain", stream) == "plain"


# --- standard error ---------------------------------------------------------------------------------------


@contextmanager
def error_stream() -> Iterator[int]:
    """Let standard error lead into a pipe; give its reading end."""
    reader, writer = os.pipe()
    kept = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    try:
        yield reader
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(reader)


def test_native_notes_go_aside_while_progress_and_warnings_reach_people():
    with error_stream() as heard, terminal.native_chatter_aside():
        bars = terminal.Bars()
        os.write(2, b"[cpuinfo_utils.cpp:71] Reading file\n")
        print("[threadpool.cpp:66] Resetting", file=sys.__stderr__, flush=True)
        with bars.task("Measuring [x]", 3) as advance:
            advance(1)
        logging.getLogger("edgeflex.profiles").warning("2 of 5 lines not used")
        text = os.read(heard, 10_000).decode()
    assert text == "Measuring [x] …\nedgeflex: 2 of 5 lines not used\n"


def test_standard_error_is_given_back_after_a_failure():
    with error_stream() as heard:
        with pytest.raises(ValueError, match="a bug"), terminal.native_chatter_aside():
            raise ValueError("a bug")
        os.write(2, b"after\n")
        assert os.read(heard, 100) == b"after\n"
    assert logging.getLogger("edgeflex").handlers == []


def test_a_slower_machine_is_told_in_whole_words_at_any_width(width):
    late = Check(name="mean latency", unit="s", limit=None, promised=1.0, measured=2.0, ok=False)
    said = []
    for columns in (WIDE, NARROW):
        width(columns)
        text = terminal.pace_text(Pace(1.31, 1.44), [late])
        assert max(map(len, text.splitlines())) <= columns
        said.append(" ".join(text.split()))
    assert said[0] == said[1]
    assert said[0].startswith("This machine is slower now than at calibration: arithmetic takes 1.31 times as long,")
    assert said[0].endswith("or calibrate again at this speed, with --overwrite.")
    assert terminal.pace_text(Pace(1.0, 1.0), []) == ""
