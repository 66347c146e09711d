"""A decoder's page: what was promised beside what was measured, nothing invented, nothing that runs or is fetched."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.reports import decoder_charts
from edgeflex.reports.decoder import (
    DecoderReportDocument,
    build_decoder_report,
    outcome,
    save_decoder_report,
    to_decoder_html,
)
from edgeflex.reports.decoder_charts import (
    Cloud,
    Level,
    MapRow,
    Series,
    clouds,
    expert_map,
    stacked_columns,
    use_cell,
)
from edgeflex.reports.decoder_device import device_section, gpu_memory_bars
from edgeflex.reports.decoder_sections import (
    commands,
    hits_section,
    memory_section,
    precision_section,
    time_section,
    use_section,
)
from edgeflex.schema import Check, Choice, Conditions, DeviceProfile
from edgeflex.schema_gpu import GpuMemory, GpuPlacement, PlacementTrial
from edgeflex.schema_moe import DecoderBudget, DecoderVerify
from tests.decoder_samples import (
    MIB,
    sample_bench,
    sample_graph,
    sample_manifest,
    sample_points,
    sample_record,
    sample_stats,
)

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x00"
_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Balanced tags, the visible text, and every tag and attribute that was seen."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def manifest():
    return sample_manifest(sample_graph(layers=5, experts=8, top_k=2))


@pytest.fixture(scope="module")
def full(manifest) -> DecoderReportDocument:
    return build_decoder_report(manifest, sample_bench(manifest), sample_stats(manifest), sample_points())


def verdict(report: DecoderReportDocument, name: str) -> Check:
    return next(check for check in report.verdicts if check.name == name)


# --- values -------------------------------------------------------------------------------------------------


def test_every_budget_has_a_verdict_and_the_benchmarks_own_goes_first(manifest, full):
    assert [(one.name, one.limit) for one in full.verdicts] == [
        ("memory", 2048 * MIB),
        ("time per token", 0.06),
        ("time to first token", 4.0),
        ("KL divergence", 0.03),
    ]
    benched = next(one for one in sample_bench(manifest).checks if one.name == "time per token budget")
    assert verdict(full, "time per token").measured == benched.measured
    assert verdict(full, "KL divergence").measured == manifest.measured_kl
    assert outcome(full)[0] == "good"


def test_a_run_stands_in_for_a_missing_benchmark_and_says_so(manifest):
    stats = sample_stats(manifest)
    report = build_decoder_report(manifest, None, stats)
    found = verdict(report, "time per token")
    assert found.measured == pytest.approx(sum(time.total_s for time in stats.times) / len(stats.times))
    assert "not a benchmark" in found.note
    assert verdict(report, "memory").measured == stats.peak_memory_bytes + stats.runtime_memory_bytes
    assert report.runs == (stats,)


def test_what_was_not_measured_is_neither_met_nor_silent(manifest):
    report = build_decoder_report(manifest, None, None)
    unmeasured = {one.name for one in report.verdicts if not one.was_measured}
    assert unmeasured == {"memory", "time per token", "time to first token"}
    assert not any(one.ok for one in report.verdicts if one.name in unmeasured)
    text = Page(to_decoder_html(report)).text
    assert "51.2 ms per token promised, not measured" in text
    assert "Run edgeflex bench" in text


def test_a_prompt_of_another_length_does_not_judge_the_first_token(manifest):
    report = build_decoder_report(manifest, None, sample_stats(manifest, prompt_tokens=20))
    assert not verdict(report, "time to first token").was_measured


def test_a_check_that_only_repeats_a_budgets_verdict_is_told_once(full):
    assert [check.name for check in full.checks] == ["expert cache", "hit rate"]


def test_a_broken_promise_beside_a_met_budget_stays(manifest):
    bench = sample_bench(manifest)
    checks = tuple(
        check.model_copy(update={"ok": False}) if check.name == "time per token" else check for check in bench.checks
    )
    report = build_decoder_report(manifest, bench.model_copy(update={"checks": checks}), None)
    assert verdict(report, "time per token").ok
    assert "time per token" in {check.name for check in report.checks}
    state, sentence = outcome(report)
    assert state == "bad"
    assert "1 further promise is not kept: time per token" in sentence


def test_what_verify_found_joins_the_further_promises(manifest):
    files = Check(name="sound files", unit="count", limit=None, promised=9, measured=8, ok=False)
    found = DecoderVerify(manifest_digest=manifest.digest(), checks=(files,))
    report = build_decoder_report(manifest, None, None, verify=found)
    assert report.checks == (files,)
    assert "sound files" in Page(to_decoder_html(report)).text


def test_results_of_another_bundle_are_refused_all_at_once(manifest):
    other = sample_manifest(sample_graph(name="other", layers=2, experts=4, top_k=2))
    verify = DecoderVerify(manifest_digest=other.digest(), checks=())
    with pytest.raises(InputError) as caught:
        build_decoder_report(manifest, sample_bench(other), sample_stats(other), verify=verify)
    assert "3 faults" in str(caught.value)


def test_a_document_survives_its_own_json(full):
    assert DecoderReportDocument.parse(full.canonical_json(), "report.json") == full


# --- page ---------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_carries_nothing_that_runs_or_is_fetched(full):
    html = to_decoder_html(full)
    page = Page(html)
    assert not page.seen & {"script", "link", "iframe", "object", "embed", "form"}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not any(name in {"src", "href", "xlink:href"} for name, _ in page.attributes)
    assert "url(" not in html
    assert html.count("<svg") == html.count("</svg>")
    for picture in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(picture)


@pytest.mark.parametrize(
    "words",
    [
        "Verdict",
        "Promise against measurement",
        "Memory",
        "Expert cache",
        "Time per token",
        "Use of experts",
        "Residency",
        "less than 10 % of events",
        "Precision",
        "Quality",
        "Proof",
        "Reproduce",
        "all experts take 3.85 GiB",
        "Met 4 of 4 budgets",
    ],
)
def test_the_page_shows(full, words):
    assert words in Page(to_decoder_html(full)).text


def test_the_speed_of_the_machine_stands_beside_the_promises(manifest):
    then = Conditions(arithmetic_s=1e-3, memory_bytes_per_s=9e9)
    slow = Conditions(arithmetic_s=2e-3, memory_bytes_per_s=6e9)
    known = manifest.model_copy(update={"plan": manifest.plan.model_copy(update={"conditions": then})})
    bench = sample_bench(known)
    runs = tuple(run.model_copy(update={"before": slow, "after": slow}) for run in bench.runs)
    bench = bench.model_copy(update={"runs": runs})
    figures = "arithmetic takes 2.00 times as long, reading memory 1.50 times."
    text = Page(to_decoder_html(build_decoder_report(known, bench, None))).text
    assert f"This machine is slower now than at calibration: {figures}" in text
    assert "profile --decoder CALIBRATION" not in text, "all times were kept"
    late = tuple(check.model_copy(update={"ok": check.unit != "s"}) for check in bench.checks)
    broken = build_decoder_report(known, bench.model_copy(update={"checks": late}), None)
    assert "profile --decoder CALIBRATION" in Page(to_decoder_html(broken)).text
    unknown = build_decoder_report(manifest, sample_bench(manifest), None)
    assert "at calibration" not in Page(to_decoder_html(unknown)).text


def test_equal_values_give_equal_bytes(full, tmp_path):
    save_decoder_report(full, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == to_decoder_html(full)


def test_hostile_names_stay_text():
    manifest = sample_manifest(
        sample_graph(name=HOSTILE, layers=2, experts=4, top_k=2), reasons=(HOSTILE,), policy=HOSTILE
    )
    manifest = manifest.model_copy(update={"versions": {HOSTILE: HOSTILE}})
    stats = sample_stats(manifest, device=HOSTILE)
    points = [point.model_copy(update={"policy": HOSTILE}) for point in sample_points()]
    page = Page(to_decoder_html(build_decoder_report(manifest, None, stats, points)))
    assert not page.seen & {"script", "img"}
    assert "\x00" not in page.text
    assert "alert(1)" in page.text


def test_the_page_of_a_large_decoder_stays_small():
    manifest = sample_manifest(sample_graph(layers=48, experts=128))
    stats = sample_stats(manifest, tokens=1000)
    uses = tuple(tuple(range(128)) for _ in range(48))
    stats = stats.model_copy(update={"expert_uses": uses})
    assert len(to_decoder_html(build_decoder_report(manifest, None, stats, sample_points()))) < 1_500_000


def test_a_page_without_any_budget_says_so(manifest):
    bare = manifest.model_copy(update={"plan": manifest.plan.model_copy(update={"budget": DecoderBudget()})})
    assert (
        "No budget was set, so there is nothing to meet"
        in Page(to_decoder_html(build_decoder_report(bare, None, None))).text
    )


def test_the_plan_is_not_called_optimal_without_a_proof(manifest):
    for proof in (None, manifest.plan.proof):
        one = manifest.model_copy(update={"plan": manifest.plan.model_copy(update={"proof": proof})})
        assert "optimal" not in Page(to_decoder_html(build_decoder_report(one, None, None))).text


def test_the_room_still_loads_neither_jinja_nor_torch():
    code = (
        "import sys, edgeflex.reports.decoder;"
        "print(sorted({'jinja2', 'matplotlib', 'torch', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


# --- sections -----------------------------------------------------------------------------------------------


def test_the_parts_of_a_tokens_time_make_up_all_of_it(manifest):
    section = time_section(manifest.plan, [sample_stats(manifest)])
    assert section is not None
    shares = [float(share.removesuffix(" %")) for css, _, _, share in section.parts if css]
    assert sum(shares) == pytest.approx(100.0, abs=0.3)
    assert [name for _, name in section.key] == ["promised 51.2 ms", "limit 60.0 ms", "bound 33.1 ms"]


def test_memory_after_each_token_stands_against_the_limit(manifest):
    section = memory_section(manifest.plan, [sample_stats(manifest, tokens=20)])
    assert section is not None
    assert [name for _, name in section.key] == ["promised 1.88 GiB", "limit 2.00 GiB"]
    assert memory_section(manifest.plan, [sample_stats(manifest, held_bytes=())]) is None


def test_a_run_of_one_token_has_no_split(manifest):
    assert time_section(manifest.plan, [sample_stats(manifest, tokens=1)]) is None


def test_use_is_summed_over_runs_and_dense_layers_have_none(manifest):
    runs = sample_bench(manifest, repeats=2).runs
    section = use_section(manifest, runs)
    assert section is not None
    assert [row[0] for row in section.rows] == ["1", "2", "3", "4"]
    assert section.rows[0][1] == f"{sum(sum(run.expert_uses[1][:8]) for run in runs):,}"
    hits = sum(run.cache.layer_hits[1] for run in runs)
    misses = sum(run.cache.layer_misses[1] for run in runs)
    assert section.rows[0][5] == f"{hits / (hits + misses) * 100:.1f} %"
    assert use_section(manifest, ()) is None


def test_residency_is_shown_as_a_share_of_the_events_of_all_runs(manifest):
    first, second = sample_bench(manifest, repeats=2).runs
    first, second = (
        run.model_copy(update={"decode_events": events, "expert_residency": ((0,) * 8, held, *[(0,) * 8] * 3)})
        for run, events, held in (
            (first, 100, (100, 0, 50, 5, 0, 100, 0, 0)),
            (second, 300, (300, 0, 50, 5, 0, 299, 0, 0)),
        )
    )
    uses = ((0,) * 8, (1, 2, 9, 0, 0, 0, 0, 0), *[(0,) * 8] * 3)
    section = use_section(manifest, [one.model_copy(update={"expert_uses": uses}) for one in (first, second)])
    assert section is not None
    assert section.stays is not None
    # the busiest expert, 2, was there in 100 of 400 events; expert 0 always, experts 1, 4, 6 and 7 never
    assert section.stays.rows[0] == ("1", "2.3 of 8", "1", "4", "25.0 %")
    assert section.stays.rows[1] == ("2", "0.0 of 8", "0", "8", "–")
    assert [words for _, words in section.stays.key] == [
        "never", "less than 10 % of events", "from 10 %", "from 25 %", "from 50 %", "from 75 %", "from 95 %",
    ]  # fmt: skip
    assert "400 in 2 runs, prompts not counted" in section.stays.words
    wide = ET.fromstring(_pictures(section.stays.chart)[0])
    assert "Residency of experts in 4 layers: the share of 400 events" in wide.attrib["aria-label"]
    paths = [one for one in wide.iter() if one.get("class", "").startswith("stay")]
    cells = {one.attrib["class"]: one.attrib["d"].count("M") for one in paths}
    assert cells == {"stay s5": 2, "stay s2": 1, "stay s0": 1, "stay never": 4 + 3 * 8}


def test_the_two_maps_of_experts_have_the_same_places(full):
    section = use_section(full.manifest, full.runs)
    assert section is not None
    assert section.stays is not None
    for use, stay in zip(*(_pictures(one.chart) for one in (section, section.stays)), strict=True):
        assert _places(use) == _places(stay)
        assert len(_places(use)) == 4 * 8


def _pictures(chart: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", chart, re.DOTALL)


def _places(picture: str) -> list[str]:
    """Return where the cells of a map stand, in order."""
    paths = [one.attrib["d"] for one in ET.fromstring(picture).iter() if "d" in one.attrib]
    return sorted(re.findall(r"M([\d.]+ [\d.]+)", "".join(paths)))


def test_a_record_without_residency_says_so(manifest):
    old = sample_stats(manifest, decode_events=0, expert_residency=())
    section = use_section(manifest, [old])
    assert section is not None
    assert section.stays is None
    assert "is not in this record" in Page(to_decoder_html(build_decoder_report(manifest, None, old))).text
    known = sample_stats(manifest).model_dump()
    for name in ("decode_events", "expert_residency"):
        del known[name]
    assert type(old).model_validate(known).expert_residency == ()


def test_what_the_map_of_residency_leaves_out_is_said(manifest, full, on_device):
    assert "copies in the processor's memory are not shown" in Page(to_decoder_html(on_device)).text
    assert "copies in the processor's memory" not in Page(to_decoder_html(full)).text
    plan = manifest.plan.model_copy(update={"verdict": "fits"})
    fits = manifest.model_copy(update={"plan": plan})
    run = sample_stats(fits)
    whole, crowded = (
        run.model_copy(update={"cache": run.cache.model_copy(update={"evictions": count})}) for count in (0, 5)
    )
    assert "counts from its first use" in Page(to_decoder_html(build_decoder_report(fits, None, whole))).text
    assert "counts from its first use" not in Page(to_decoder_html(build_decoder_report(fits, None, crowded))).text


def test_precisions_are_the_bundles_and_differences_from_the_plan_are_counted(manifest):
    assert precision_section(manifest).mismatches == 0
    totals = {name: (experts, units) for name, experts, units, _ in precision_section(manifest).totals}
    assert sum(experts for experts, _ in totals.values()) == 4 * 8
    assert sum(units for _, units in totals.values()) == 5 + 2
    changed = tuple(
        Choice(subject=one.subject, option="fp32") if one.subject == "layers.2.experts.3" else one
        for one in manifest.plan.choices
    )
    other = manifest.model_copy(update={"plan": manifest.plan.model_copy(update={"choices": changed})})
    assert precision_section(other).mismatches == 1
    assert "1 unit held in another precision" in Page(to_decoder_html(build_decoder_report(other, None, None))).text


def test_a_tied_heads_bytes_are_counted_once(manifest):
    embedding = next(one for one in manifest.matrices if one.name == "embedding")
    tied = tuple(
        embedding.model_copy(update={"name": "head"}) if one.name == "head" else one for one in manifest.matrices
    )
    whole = precision_section(manifest).totals[0][3]
    assert precision_section(manifest.model_copy(update={"matrices": tied})).totals[0][3] != whole


def test_the_curve_shows_the_plan_the_run_and_belady(manifest):
    section = hits_section(manifest.plan, sample_points(), (1200 * MIB, 0.77))
    assert section is not None
    assert section.chart.count("this plan") == 4  # the name and its tip, at both widths
    assert [words for _, words in section.key][-1].startswith("Belady")
    assert len(section.rows) == 14
    assert hits_section(manifest.plan, (), None) is None


def test_the_commands_repeat_the_budget_exactly(manifest):
    plan = next(line for line in commands(manifest) if line.startswith("edgeflex plan"))
    assert "--memory 2147483648 --latency 60ms/token --first-token 4000ms --max-kl 0.03" in plan


# --- device -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_device(manifest) -> DecoderReportDocument:
    record = sample_record()
    checks = [
        Check(name=name, unit="bytes", limit=limit, promised=4060 * MIB, measured=3981 * MIB, ok=True)
        for name, limit in (("vram", None), ("vram budget", 4096 * MIB))
    ]
    bench = sample_bench(manifest)
    bench = bench.model_copy(update={"device": record, "checks": (*bench.checks, *checks)})
    return build_decoder_report(manifest, bench, None, sample_points())


def test_a_device_has_a_section_of_its_own_and_its_budget_a_verdict(on_device, full):
    page = Page(to_decoder_html(on_device)).text
    for words in ("Predicted against measured", "Who waited", "NVIDIA GeForce RTX 4090", "copies to the GPU"):
        assert words in page
        assert words not in Page(to_decoder_html(full)).text
    assert verdict(on_device, "vram").limit == 4096 * MIB
    assert "vram" not in {check.name for check in on_device.checks}, "told once"
    assert "51.2 ms per token promised on the processor" in outcome(on_device)[1]


def test_a_gpus_budget_that_nobody_measured_is_not_met(manifest):
    budget = manifest.plan.budget.model_copy(update={"vram_bytes": 1 << 30})
    asked = manifest.model_copy(update={"plan": manifest.plan.model_copy(update={"budget": budget})})
    found = verdict(build_decoder_report(asked, None, None), "vram")
    assert not found.was_measured
    assert not found.ok
    assert "edgeflex bench --device cuda" in found.note


def test_the_section_counts_what_it_draws_and_errs_by_resource():
    record = sample_record(events=2000)
    section = device_section(record)
    assert section is not None
    assert section.chart is not None
    decoded = sum(one.decoding for one in record.sample)
    shown = -(-decoded // 3) + 2000 - decoded
    assert section.words == f"2,000 of 2,104 watched events, drawn by lot; {shown:,} of the 2,000 are shown."
    wide = section.chart.index('<div class="narrow">')
    assert section.chart[:wide].count("h0") == shown
    assert [row[0] for row in section.errors] == [
        "events while decoding", "GPU", "processor", "copies to the GPU", "events of prompts",
    ]  # fmt: skip
    assert section.errors[0][1] == f"{decoded:,}"
    for row in section.waits:
        shares = [float(text.removesuffix(" %")) for text in (row.work, row.waited, row.between)]
        assert sum(shares) == pytest.approx(100, abs=0.2)
    assert device_section(None) is None


def test_a_device_that_lacked_nothing_has_no_picture():
    section = device_section(sample_record(events=0, sampled=0, errors={}, passes=0, pass_s=0.0))
    assert section is not None
    assert (section.chart, section.errors, section.waits) == (None, (), ())


def on_gpu(manifest):
    """The same manifest, planned for a GPU."""
    sizes = {"dense_bytes": 500, "arena_bytes": 1800, "kv_bytes": 300, "activations_bytes": 100, "context_bytes": 400}
    placement = GpuPlacement(
        device="rtx-4090",
        origin="measured",
        profile=DeviceProfile(name="rtx-4090", title="A card", origin="measured"),
        placement="cache",
        policy="reuse",
        rule="auto",
        vram_cache_bytes=1800 * MIB,
        ram_cache_bytes=3700 * MIB,
        exclusive=False,
        one_memory=False,
        memory=GpuMemory(**{name: size * MIB for name, size in sizes.items()}),
        upload_bytes=1e6,
        ahead_bytes=0.0,
        flash_bytes=0.0,
        waited={"gpu": 0.2},
        trials=(PlacementTrial(placement="cache", policy="reuse", exclusive=False, token_s=0.01),),
        tried=12,
        assumptions=(),
    )
    budget = manifest.plan.budget.model_copy(update={"vram_bytes": 4096 * MIB})
    plan = manifest.plan.model_copy(update={"gpu": placement, "budget": budget})
    return manifest.model_copy(update={"plan": plan})


def test_a_gpus_memory_stands_beside_its_promise(manifest):
    planned = on_gpu(manifest)
    promised, measured = gpu_memory_bars(planned.plan, sample_record(peak_bytes=2900 * MIB))
    assert promised.total == "3.03 GiB"
    assert [size for _, _, size in measured.parts] == ["1.76 GiB", "1.07 GiB"]
    assert gpu_memory_bars(manifest.plan, sample_record()) == ()
    assert len(gpu_memory_bars(planned.plan, sample_record(peak_bytes=None))) == 1
    bench = sample_bench(planned).model_copy(update={"device": sample_record()})
    page = Page(to_decoder_html(build_decoder_report(planned, bench, None))).text
    assert "GPU, measured: 3.89 GiB" in page
    assert "51.2 ms per token promised, 47." in page, "the plan is for this GPU"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-7, 50.0), st.floats(1e-7, 50.0)), min_size=1, max_size=60),
    st.sampled_from([340.0, 760.0]),
)
def test_clouds_stay_inside_their_picture(points, width):
    drawn = clouds("t", [Cloud("event", "n", tuple(points))], width)
    picture = ET.fromstring(drawn)
    height = float(picture.attrib["height"])
    paths = [one.attrib["d"] for one in picture.iter() if one.tag.endswith("path")]
    places = [(float(x), float(y)) for path in paths for x, y in re.findall(r"M([\d.-]+) ([\d.-]+)h0", path)]
    assert len(places) == len(points)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)


def test_a_point_on_the_line_is_as_predicted():
    drawn = clouds("t", [Cloud("event", "n", ((1e-3, 1e-3), (1e-2, 1e-2), (1e-3, 1e-2)))], 760.0)
    line = re.search(r'<line x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)" class="reference"', drawn)
    assert line is not None
    x1, y1, x2, y2 = map(float, line.groups())
    places = [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", drawn)]
    off = [abs((x - x1) / (x2 - x1) - (y - y1) / (y2 - y1)) for x, y in places]
    assert sorted(value < 1e-3 for value in off) == [False, True, True]


# --- charts -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(0.0, 5.0)] * 3), min_size=1, max_size=400),
    st.lists(st.floats(1e-6, 10.0), max_size=3),
    st.sampled_from([340.0, 760.0]),
)
def test_columns_stay_inside_their_picture(times, levels, width):
    if not any(any(column) for column in times):
        times = [(0.1, 0.1, 0.1), *times]
    series = [Series(f"c{index}", "n", tuple(column[index] for column in times)) for index in range(3)]
    lines = [Level("limit", "limit", seconds) for seconds in levels]
    picture = ET.fromstring(stacked_columns("t", series, lines, width))
    height = float(picture.attrib["height"])
    for path in (one for one in picture.iter() if one.tag.endswith("path")):
        numbers = [float(number) for number in re.findall(r"V(-?[\d.]+)", path.attrib["d"])]
        assert all(0 <= number <= height for number in numbers)
        assert all(0 <= float(number) <= width for number in re.findall(r"[HM](-?[\d.]+)", path.attrib["d"]))


def test_more_tokens_than_room_share_columns():
    values = tuple(float(index % 2) for index in range(600))
    picture = stacked_columns("t", [Series("c", "n", values)], [], 760.0)
    assert "4 to a column" in picture
    assert picture.count("M", picture.index(" d=")) == 150  # each the mean of two zeros and two ones


def test_a_token_that_took_far_longer_is_cut_and_said():
    values = (0.05,) * 99 + (3.0,)
    assert "1 beyond, largest 3.00 s" in stacked_columns("t", [Series("c", "n", values)], [], 760.0)


@pytest.mark.parametrize(
    ("times", "css"), [(0.0, "use never"), (0.1, "use u0"), (0.25, "use u1"), (1.0, "use u3"), (99.0, "use u6")]
)
def test_cells_are_classed_by_multiples_of_an_even_share(times, css):
    assert use_cell(times)[0] == css
    assert len(decoder_charts.LEVELS) == 6


@pytest.mark.parametrize("layers", [1, 16, 48, 94])
def test_a_map_has_one_cell_per_expert(layers):
    rows = [MapRow(str(index), (("a", 1.0),) * 7 + (("b", 0.5),), share=0.5) for index in range(layers)]
    picture = ET.fromstring(expert_map("t", rows, 340.0, side="hits"))
    cells = {one.attrib["class"]: one.attrib["d"].count("M") for one in picture.iter() if "d" in one.attrib}
    assert cells == {"a": 7 * layers, "b": layers}
