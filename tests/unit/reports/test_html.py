from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgeflex.errors import InputError
from edgeflex.reports import build_report, to_html
from edgeflex.schema import Check, Conditions, Curve, CurvePoint, Precision, Report

GOLDEN = Path(__file__).parents[2] / "golden" / "report_small.html"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x00"
_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Balanced tags, the visible text, and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def small(make_small):
    manifest = make_small.manifest()
    return build_report(manifest, make_small.bench(manifest), make_small.verify(manifest), None)


def hostile(report: Report) -> Report:
    """Every free text of the report replaced by an attack."""
    manifest, verify, bench = report.manifest, report.verify, report.bench
    assert verify is not None
    assert bench is not None
    layer = manifest.graph.layers[0]
    graph = manifest.graph.model_copy(
        update={
            "name": HOSTILE,
            "layers": (layer.model_copy(update={"name": HOSTILE}), *manifest.graph.layers[1:]),
            "exits": tuple(e.model_copy(update={"name": HOSTILE, "stage": HOSTILE}) for e in manifest.graph.exits),
        }
    )
    point = CurvePoint(label=HOSTILE, latency_s=0.001, memory_bytes=1, drop=0.1, chosen=True)
    plan = manifest.plan
    changed = manifest.model_copy(
        update={
            "backend": HOSTILE,
            "graph": graph,
            "versions": {HOSTILE: HOSTILE},
            "layer_precisions": {**manifest.layer_precisions, HOSTILE: Precision.FP16},
            "plan": plan.model_copy(
                update={"notes": (HOSTILE,), "proof": plan.proof.model_copy(update={"solver": HOSTILE})}
            ),
            "curve": Curve(points=(point, point.model_copy(update={"latency_s": 0.1})), baselines=(point,)),
        }
    )
    examples = tuple(
        e.model_copy(update={"input": HOSTILE, "label": HOSTILE, "prediction": "cat"}) for e in verify.examples
    )
    statics = tuple(p.model_copy(update={"label": HOSTILE}) for p in verify.static_points)
    verdicts = tuple(v.model_copy(update={"name": HOSTILE, "note": HOSTILE}) for v in report.verdicts)
    return report.model_copy(
        update={
            "title": HOSTILE,
            "manifest": changed,
            "bench": bench.model_copy(update={"device": HOSTILE}),
            "verify": verify.model_copy(update={"examples": examples, "static_points": statics}),
            "verdicts": verdicts,
        }
    )


def test_hostile_names_stay_text(small):
    page = to_html(hostile(small))
    parsed = Page(page)
    assert "script" not in parsed.seen
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert [value[:22] for tag, name, value in parsed.attributes if (tag, name) == ("img", "src")] == [
        "data:image/png;base64,"
    ]
    assert "<script>alert(1)</script>" in parsed.text
    assert "\x00" not in page
    assert parsed.open == []


@pytest.mark.parametrize("which", ["small", "rich_report"])
def test_the_page_is_balanced_and_every_picture_is_xml(which, request):
    page = to_html(request.getfixturevalue(which))
    assert Page(page).open == []
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) > 5
    for picture in pictures:
        ET.fromstring(picture)


def test_nothing_is_fetched_and_no_script_runs(rich_report):
    page = to_html(rich_report)
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe|javascript:", page, re.IGNORECASE)
    sources = [value for _, name, value in Page(page).attributes if name in {"src", "href", "xlink:href", "action"}]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_equal_reports_give_equal_bytes(rich_report, rich_table_of_plan):
    twin = Report.parse(rich_report.canonical_json(), "report.json")
    assert to_html(rich_report, table=rich_table_of_plan) == to_html(twin, table=rich_table_of_plan)


def test_the_page_has_its_sections_in_order(rich_report):
    found = re.findall(r"<h2>(.*?)</h2>", to_html(rich_report))
    assert found == [
        "Verdict per budget",
        "Promise against measurement",
        "Pareto curve",
        "Exits",
        "Oracle and static models",
        "Bits per layer",
        "Memory",
        "Latency",
        "Proof",
        "Reproduce",
    ]


def test_a_broken_budget_shows_as_broken(small):
    page = to_html(small)
    assert "1 broken (accuracy drop)" in page
    assert re.search(r'<h3>accuracy drop</h3><span class="chip bad">✕ broken</span>', page)
    assert re.search(r'<h3>mean latency</h3><span class="chip good">✓ met</span>', page)


def test_promise_and_measurement_stand_side_by_side(small):
    text = Page(to_html(small)).text
    assert "Mean 2.00 ms promised, 2.50 ms measured." in text
    # mean 2.5 ms against 2 ms; 900 B against 800 B; drop 3 % against 1 %
    for figure in ("+25.0 %", "+12.5 %", "+2.00 points", "1.80 ms to 2.20 ms", "600 B", "900 B"):
        assert figure in text


def test_missing_results_are_named_and_nothing_is_made_up(make_small):
    page = to_html(build_report(make_small.manifest(), None, None, None))
    text = Page(page).text
    assert "Latency and memory were not benchmarked" in text
    assert "Accuracy was not verified" in text
    assert text.count("? not measured") == 6  # three budgets, on a card and in the table
    assert "oracle" not in text.lower().replace("oracle and static models", "")
    assert 'class="column"' not in page


def test_bench_alone_and_verify_alone_both_give_a_page(make_small):
    manifest = make_small.manifest()
    bench_only = to_html(build_report(manifest, make_small.bench(manifest), None, None))
    verify_only = to_html(build_report(manifest, None, make_small.verify(manifest), None))
    assert "Accuracy was not verified" in bench_only
    assert "promised, not benchmarked" in verify_only


def test_a_plan_that_is_not_proven_is_never_called_optimal(rich_report, small):
    assert "optimal" not in Page(to_html(rich_report)).text
    assert "gap of 0.25 %" in Page(to_html(rich_report)).text
    assert "This plan is proven optimal for its cost table" in Page(to_html(small)).text


def test_sensitivity_appears_with_the_table_of_the_plan_only(rich_report, rich_table_of_plan):
    assert "sensitivity (added loss)" not in to_html(rich_report)
    assert "sensitivity (added loss)" in to_html(rich_report, table=rich_table_of_plan)
    other = rich_table_of_plan.model_copy(update={"name": "another"})
    with pytest.raises(InputError, match="the plan was solved on"):
        to_html(rich_report, table=other)


def test_a_layer_held_in_another_precision_than_planned_is_shown(small):
    held = {**small.manifest.layer_precisions, "body": Precision.FP32}
    manifest = small.manifest.model_copy(update={"layer_precisions": held})
    text = Page(to_html(small.model_copy(update={"manifest": manifest}))).text
    assert "1 of 3 layers are held in another precision" in text
    assert "planned int8-static" in text


def test_weights_per_precision_are_the_sums_made_by_hand(small):
    text = Page(to_html(small)).text
    # stem 4*1*9*4 B = 144 B and head 80*4 B = 320 B in fp32; body 8*4*9 B = 288 B in int8
    assert "fp32 2 464 B" in text
    assert "int8-static 1 288 B" in text
    # 64 pixels: stem 2,304 and body 18,432 multiply-accumulates, head 80
    assert "18,432" in text
    assert "88.5 %" in text


def test_the_best_static_model_of_equal_cost_is_not_a_slower_one(small, rich_report):
    text = Page(to_html(small)).text
    assert "Best static model of equal cost: tiny, 93.0 % at 2.40 ms." in text
    slow = CurvePoint(label="slow", latency_s=0.1, memory_bytes=1, drop=0.0)
    verify = small.verify.model_copy(update={"static_points": (slow,)})
    text = Page(to_html(small.model_copy(update={"verify": verify}))).text
    assert "No static model here is as fast; the fastest, slow, takes 100 ms for 98.0 %." in text
    assert "resnet20 int8, 91.7 %" in Page(to_html(rich_report)).text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "https://example.org/x.png"}, "not a PNG data URI"),
        ({"image": "data:image/svg+xml;base64,AAAA"}, "not a PNG data URI"),
        ({"image": 'data:image/png;base64,AA"onload=x'}, "not a PNG data URI"),
        ({"exit": 2}, "the model has 2"),
        ({"exit": -1}, "the model has 2"),
    ],
)
def test_an_example_that_cannot_be_shown_safely_is_refused(small, change, message):
    examples = (small.verify.examples[0].model_copy(update=change),)
    verify = small.verify.model_copy(update={"examples": examples})
    with pytest.raises(InputError, match=message):
        to_html(small.model_copy(update={"verify": verify}))


def test_commands_repeat_the_budget_so_that_it_parses(rich_report):
    from edgeflex.units import parse_share, parse_size_bytes, parse_time_s

    text = Page(to_html(rich_report)).text
    budget = rich_report.manifest.plan.budget
    memory, drop = (re.findall(rf"--{option} (\S+)", text)[0] for option in ("memory", "max-drop"))
    latency, statistic = re.findall(r"--latency (\S+)", text)[1].split(":")
    assert parse_size_bytes(memory) == next(iter(budget.memory_bytes.values()))
    assert parse_share(drop) == budget.max_drop
    assert parse_time_s(latency) == pytest.approx(budget.latency[1].limit_s)
    assert statistic == "p95"
    assert f"--disk {budget.disk_bytes} --confidence 95% --minimize latency:mean" in text


def test_every_precision_has_a_colour_of_its_own_rule():
    css = (Path(to_html.__code__.co_filename).parent / "templates" / "report.css").read_text(encoding="utf-8")
    assert [one.value for one in Precision if f"\n.{one.value} {{ fill: " not in css] == []


def test_the_small_page_is_the_golden_page(small):
    page = to_html(small)
    if os.environ.get("EDGEFLEX_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(page, encoding="utf-8")
    assert page == GOLDEN.read_text(encoding="utf-8"), "set EDGEFLEX_UPDATE_GOLDEN=1 to accept the new page"


def test_the_room_loads_neither_jinja_nor_matplotlib_nor_torch():
    code = (
        "import sys, edgeflex.reports;"
        "print(sorted({'jinja2', 'matplotlib', 'torch', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("slower", "said"),
    [
        (2.0, "This machine is slower now than at calibration: arithmetic takes 2.00 times as long."),
        (0.5, "This machine is quicker now than at calibration: arithmetic takes 0.50 times as long."),
        (1.0, "This machine runs at the speed of calibration: arithmetic takes 1.00 times as long."),
    ],
)
def test_the_speed_of_the_machine_stands_beside_a_time_that_was_not_kept(make_small, slower, said):
    manifest = make_small.manifest(conditions=Conditions(arithmetic_s=1e-3))
    late = Check(name="p95 latency", unit="s", limit=None, promised=1e-3, measured=2e-3, ok=False)
    now = Conditions(arithmetic_s=slower * 1e-3)
    bench = make_small.bench(manifest).model_copy(update={"before": now, "after": now, "checks": (late,)})
    text = Page(to_html(build_report(manifest, bench, None, None))).text
    assert said in text
    assert text.index("Promise against measurement") < text.index(said) < text.index("Pareto curve")
    assert ("calibrate again at this speed" in text) is (slower > 1.1)
    kept = bench.model_copy(update={"checks": ()})
    shown = Page(to_html(build_report(manifest, kept, None, None))).text
    assert ("at calibration" in shown) is (slower != 1.0)


def test_without_a_known_speed_the_page_says_nothing_of_it(make_small):
    manifest = make_small.manifest()
    now = Conditions(arithmetic_s=1.0, memory_bytes_per_s=1.0)
    bench = make_small.bench(manifest).model_copy(update={"before": now, "after": now})
    assert "calibration:" not in to_html(build_report(manifest, bench, None, None))
