from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.reports.charts import (
    Axis,
    LayerBar,
    Mark,
    Rule,
    curve_axes,
    display_unit,
    front,
    histogram,
    layer_strip,
    save_curve,
    scatter,
    share_bar,
)
from edgeflex.reports.svg import Box, cascade_rows, fit_scale, place_label, shorten, tag
from edgeflex.schema import Curve, CurvePoint, Precision

HOSTILE = "<script>alert(1)</script>\"'&\x00\ud800\u202e"


def parse(svg):
    return ET.fromstring(str(svg))


def point(index):
    return CurvePoint(label=f"p{index}", latency_s=1e-3 * (1 + index), memory_bytes=100 + index, drop=-0.01 * index)


def points(count=3, **fixed):
    return tuple(point(index).model_copy(update=fixed) for index in range(count))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=1, max_size=12))
def test_a_scale_holds_every_value_and_rises(values):
    scale = fit_scale(values, 10, 200)
    pixels = [scale(value) for value in sorted(values)]
    assert all(10 - 1e-6 <= pixel <= 200 + 1e-6 for pixel in pixels)
    assert pixels == sorted(pixels)
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks[1:-1])


def test_wide_ranges_are_logarithmic_and_small_ones_start_at_zero():
    assert fit_scale([1, 9], 0, 1).logarithmic
    assert not fit_scale([0, 9], 0, 1).logarithmic
    assert fit_scale([1, 5], 0, 1).low == 0
    assert fit_scale([90, 95], 0, 1).low > 80


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 500), st.floats(1, 90)), max_size=12))
def test_names_in_a_row_never_overlap_and_no_line_crosses_a_lower_name(sizes):
    spans = sorted((left, left + width) for left, width in sizes)
    rows = cascade_rows(spans)
    for i, (_, right) in enumerate(spans):
        for j in range(i + 1, len(spans)):
            if spans[j][0] < right:
                assert rows[j] > rows[i]


def test_labels_take_their_room_and_give_up_when_there_is_none():
    taken: list[Box] = []
    frame = Box(0, 0, 200, 60)
    placed = [place_label("a long enough name", 100, 30, taken, frame) for _ in range(20)]
    assert placed[0] is not None
    assert placed[-1] is None
    assert not any(a.overlaps(b) for i, a in enumerate(taken) for b in taken[i + 1 :])


def test_an_element_escapes_text_and_attributes_but_not_markup():
    made = tag("text", HOSTILE, tag("b"), title=HOSTILE)
    assert "<script>" not in made
    assert parse(made).attrib["title"].startswith("<script>")
    assert made.endswith("<b/></text>")


def test_long_names_lose_their_middle():
    assert shorten("a" * 20 + "b" * 20, 11) == "aaaaa…bbbbb"
    assert shorten("short", 11) == "short"


@pytest.mark.parametrize("width", [340, 760])
def test_every_chart_is_xml_with_a_title_and_stays_inside_for_hostile_names(width):
    marks = [Mark(HOSTILE, 0.001, 0.01, "chosen"), Mark(HOSTILE, 0.2, -0.01, "oracle"), Mark("x", 0.1, 0, "static")]
    rules = [Rule("x", 0.1, HOSTILE), Rule("y", 0.0, "limit")]
    bars = [LayerBar(HOSTILE, i // 3, Precision.INT8_STATIC, 100.0 * i, loss=0.1 * i) for i in range(7)]
    charts = [
        scatter(
            HOSTILE,
            marks,
            (Axis("latency", "s"), Axis("drop", "share")),
            width,
            frontier=[(0.001, 0.01), (0.1, 0)],
            rules=rules,
        ),
        histogram("h", [0.001] * 5 + [0.9], [("mean", 0.1)], rules[:1], width),
        layer_strip("l", bars, width),
        share_bar(HOSTILE, [("fill", 0.4), ("rest", 0.9)], mark=2.0),
    ]
    for chart in charts:
        root = parse(chart)
        assert root.find("title") is not None
        assert "<script" not in chart
        if "viewBox" in root.attrib:
            assert all(-1 <= float(e.attrib["x"]) <= width for e in root.iter("text"))


def test_histogram_columns_count_every_sample():
    samples = [0.001 * (1 + i % 7) for i in range(700)]
    root = parse(histogram("h", samples, [], [], 760))
    columns = [e for e in root.iter("rect") if e.attrib["class"] == "column"]
    assert len(columns) == 7
    heights = {e.attrib["height"] for e in columns}
    assert len(heights) == 1


def test_samples_beyond_the_axis_are_said_in_words():
    made = histogram("h", [0.001 + i * 1e-6 for i in range(999)] + [0.5], [("mean", 0.0015)], [], 760)
    assert "1 beyond, largest 500" in made


@pytest.mark.parametrize("samples", [[0.001], [0.001, 0.001], [1e-9, 2.0]])
def test_few_or_equal_samples_are_drawn(samples):
    assert parse(histogram("h", samples, [("mean", samples[0])], [], 340)) is not None


def test_a_stacked_bar_never_leaves_its_box():
    root = parse(share_bar("b", [("a", 0.7), ("b", 0.7), ("c", -1.0)]))
    widths = [float(e.attrib["width"].rstrip("%")) for e in list(root.iter("rect"))[1:]]
    assert widths == pytest.approx([70, 30, 0])


def test_axes_follow_what_the_sweep_varies():
    names = [
        [axis.title for axis in curve_axes(found)] for found in (points(), points(latency_s=1.0), points(drop=0.0))
    ]
    assert names == [["latency", "accuracy drop"], ["memory", "accuracy drop"], ["latency", "memory"]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=15))
def test_the_front_is_what_no_other_point_beats(places):
    beaten = {(x, y) for x, y in places for a, b in places if (a, b) != (x, y) and a <= x and b <= y}
    assert front(places) == sorted(set(places) - beaten)


def test_units_suit_the_largest_value():
    assert [display_unit("s", s)[1] for s in (2.0, 0.002, 2e-6)] == ["s", "ms", "µs"]
    assert [display_unit("bytes", s) for s in (10, 2048, 3 * 2**20)] == [
        (1.0, "B"),
        (2.0**-10, "KiB"),
        (2.0**-20, "MiB"),
    ]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_saved_curve_has_equal_bytes_each_time(tmp_path, suffix):
    curve = Curve(
        points=(*points(), *points(1, chosen=True, label="$\\frac{1}{$ <b>")), baselines=points(1, label="fp32")
    )
    for name in ("a", "b"):
        save_curve(curve, tmp_path / f"{name}{suffix}")
    first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("a", "b"))
    assert first == second
    if suffix == ".svg":
        ET.fromstring(first)
        assert b"<dc:date>" not in first


def test_a_curve_is_refused_without_points_or_as_another_file(tmp_path):
    with pytest.raises(InputError, match=r"\.svg or \.png"):
        save_curve(Curve(points=points()), tmp_path / "curve.pdf")
    with pytest.raises(InputError, match="0 points"):
        save_curve(Curve(points=()), tmp_path / "curve.svg")
    assert not list(tmp_path.iterdir())
