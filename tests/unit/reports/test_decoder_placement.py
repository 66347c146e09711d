"""A plan for a GPU on the page: its placement and why, both memories, and where the figures are from."""

from __future__ import annotations

from edgeflex.reports.decoder import build_decoder_report, to_decoder_html
from edgeflex.reports.decoder_placement import placement_section
from edgeflex.reports.decoder_sections import commands
from tests.decoder_samples import sample_gpu_plan, sample_manifest, sample_plan


def manifest_of(plan):
    return sample_manifest().model_copy(update={"plan": plan})


def section_of(plan):
    section = placement_section(plan)
    assert section is not None
    return section


def page_of(plan):
    return to_decoder_html(build_decoder_report(manifest_of(plan), None, None))


def test_a_plan_without_a_gpu_has_no_placement():
    assert placement_section(sample_plan()) is None
    assert "<h2>Placement</h2>" not in page_of(sample_plan())


def test_the_placement_is_told_with_all_that_was_tried_the_quickest_first():
    section = section_of(sample_gpu_plan())
    assert [row[:2] for row in section.tried] == [
        ("cache", "reuse"),
        ("static", "static"),
        ("cpu", "static"),
        ("cache", "lru"),
    ]
    assert [row[4] for row in section.tried] == [True, False, False, False]
    rows = dict(section.rows)
    assert rows["A fixed list is as quick from"] == "65.00 % on the GPU"
    assert rows["Experts in RAM"].endswith("the GPU's too")
    assert dict(section.memory)["Together"] == "3.45 GiB"


def test_what_ram_holds_is_said_for_every_kind_of_tier():
    def told(**changes):
        return dict(section_of(sample_gpu_plan(**changes)).rows)["Experts in RAM"]

    assert told(exclusive=True).endswith("none of the GPU's")
    assert told(ram_cache_bytes=0) == "no tier"
    assert told(ram_cache_bytes=0, one_memory=True) == "no tier: CPU and GPU share one memory"


def test_a_data_sheets_figures_are_never_called_measured():
    assert "rates from data sheets at least in part" in page_of(sample_gpu_plan())
    assert "every rate measured" in page_of(sample_gpu_plan(origin="measured"))
    assert "PCI Express" in page_of(sample_gpu_plan())


def test_the_page_repeats_the_command_with_the_gpu():
    line = next(one for one in commands(manifest_of(sample_gpu_plan())) if one.startswith("edgeflex plan"))
    assert "--vram 4294967296 --device rtx-4090" in line
    given = sample_gpu_plan(given_link_bytes_per_s=25e9, given_ram_bytes_per_s=6e10)
    assert "--link 25000000000 --ram-rate 60000000000" in " ".join(commands(manifest_of(given)))
    assert "--vram" not in " ".join(commands(manifest_of(sample_plan())))
