"""The page about Python: its blocks, run as they stand, walk both corridors; its table names what there is."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

from edgeflex import flow, profiles, quickstart, reports
from edgeflex.cli import app
from edgeflex.errors import InputError
from edgeflex.flow import conversation
from edgeflex.models.tiny_decoder import library_text, write_tiny_decoder
from edgeflex.reports import decoder_charts
from tests.toy_bundle import CLASSES, this_machine, write_images

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
TABLE = TEXT.partition("## Which function a command is")[2]
CLI: Any = typer.main.get_command(app)
# `Path` where no word or dot touches it: not StrPath, not a path's own module
PATH_ALONE = re.compile(r"(?<!\w)Path(?!\w)")
NETWORK = f"""
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU())
        self.last = nn.Linear(16, {len(CLASSES)})

    def forward(self, x):
        return self.last(self.second(self.first(x)).mean((2, 3)))


def build():
    return Net()
"""


def write_inputs(folder: Path) -> None:
    """Write all that the page's blocks name and do not make: a small network, the shipped decoder, images, texts."""
    import torch
    from safetensors.torch import save

    write_images(folder / "images" / "train", per_class=100)
    write_images(folder / "images" / "dev", per_class=60, seed=1)
    (folder / "mynet").mkdir()
    (folder / "mynet" / "model.py").write_text(NETWORK)
    names: dict[str, Any] = {}
    exec(NETWORK, names)
    torch.manual_seed(0)
    (folder / "weights.safetensors").write_bytes(save(names["build"]().state_dict()))
    (folder / "device.json").write_text(this_machine().canonical_json())
    write_tiny_decoder(folder / "olmoe")
    texts = library_text("heldout")
    (folder / "text.txt").write_text("\n\n".join(texts[: len(texts) // 2]))
    (folder / "other.txt").write_text("\n\n".join(texts[len(texts) // 2 :]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_blocks_of_the_page_walk_both_corridors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["plan"].certificate.drop_upper_bound <= 0.1
    assert len(names["stats"].requests) == 20
    assert {one.prediction for one in names["stats"].requests} <= {0, 1, 2}
    assert {one.name for one in names["budgets"]} == {"p95 latency budget", "memory budget"}
    assert names["broken"] == []
    assert names["smallest"].predicted.memory_bytes["host"] == int(names["least"])
    assert names["in_the_way"] == ("memory",)
    assert "no-such-folder" in names["wrong"]
    assert names["progress"].heard
    assert names["decoder_plan"].verdict == "offload"
    assert names["manifest"].plan == names["decoder_plan"]
    assert len(names["said"]) > 10
    assert names["decoder_stats"].stopped_by in {"length", "end"}
    assert all(one.ok for one in names["decoder_verified"].checks)
    for made in ("report.html", "decoder.html"):
        assert Path(made).read_text().lower().startswith("<!doctype html>")


# --- the doors -------------------------------------------------------------------------------------------


def functions() -> dict[str, Callable[..., Any]]:
    """Every function that the page's table may name, and the doors beside them."""
    found = {f"flow.{name}": getattr(flow, name) for name in flow.__all__ if inspect.isfunction(getattr(flow, name))}
    others: dict[str, Callable[..., Any]] = {
        "Talk": conversation.Talk.__init__,
        "Asked": conversation.Asked,
        "profiles.load": profiles.load,
        "quickstart.walk": quickstart.walk,
        "save_curve": reports.save_curve,
        "save_hit_rates": decoder_charts.save_hit_rates,
    }
    return found | others


def annotations_of(function: Callable[..., Any]) -> dict[str, str]:
    return {name: str(one.annotation) for name, one in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", functions())
def test_no_parameter_takes_a_path_and_not_text(name: str):
    told = annotations_of(functions()[name])
    assert [one for one, kind in told.items() if PATH_ALONE.search(kind)] == []


def takes_a_place(name: str) -> bool:
    first = next(iter(annotations_of(functions()[name]).values()), "")
    return "StrPath" in first


@pytest.mark.parametrize("name", [name for name in functions() if name.startswith("flow.") and takes_a_place(name)])
def test_what_is_neither_text_nor_a_path_is_told_so(name: str, tmp_path: Path):
    """All other arguments are text that leads nowhere, or nothing: the first is looked at before them."""
    function = functions()[name]
    needed = [
        one
        for one in list(inspect.signature(function).parameters.values())[1:]
        if one.default is inspect.Parameter.empty
    ]
    rest = {one.name: str(tmp_path / "none") if "StrPath" in str(one.annotation) else None for one in needed}
    with pytest.raises(InputError, match=r"7 is of type int, which names no file or folder\. Give text or a pathlib"):
        function(7, **rest)


@pytest.mark.parametrize("kind", [str, Path])
def test_text_and_paths_are_answered_alike(kind: Callable[[str], Any], tmp_path: Path):
    nothing = kind(str(tmp_path / "none"))
    assert not flow.is_decoder(nothing)
    assert not flow.is_decoder_bundle(nothing)
    assert not flow.is_decoder_calibration(nothing)
    for refused in (flow.open_calibration, flow.is_decoder_document, profiles.load):
        with pytest.raises(InputError, match="none"):
            refused(kind(f"{nothing}/none.json"))


# --- the table -------------------------------------------------------------------------------------------


def commands() -> set[str]:
    """Every command as it is typed; a group that answers by itself too."""
    found = set()
    for name, command in CLI.commands.items():
        below = getattr(command, "commands", {})
        found |= {f"{name} {one}" for one in below}
        if not below or command.invoke_without_command:
            found.add(name)
    return found


def rows() -> list[list[str]]:
    return [row.strip("| ").split(" | ") for row in TABLE.splitlines() if row.startswith("| `")]


def test_the_table_names_every_command():
    told = {re.findall(r"`([^`]+)`", row[0])[0] for row in rows()}
    assert {name for name in told if "--" not in name} == commands()


def test_everything_that_the_table_names_exists():
    named = {one for row in rows() for cell in row[1:] for one in re.findall(r"`([\w.]+)`", cell)}
    assert len(named) > 25
    for name in named:
        module, _, attribute = f"edgeflex.{name}".rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute, None)), name


def test_every_stage_of_the_corridor_stands_in_the_table():
    stages = {name for name in flow.__all__ if inspect.isfunction(getattr(flow, name)) and not name.startswith("is_")}
    beside = {"context_of", "open_calibration", "versions"}  # no command of their own
    named = set(re.findall(r"`flow\.(\w+)`", TABLE))
    assert stages - beside == named
