"""Commands in a narrow terminal and in a pipe: nothing is cut, colours stay out, JSON is one document."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgeflex.profiles import names
from edgeflex.schema import CostTable, DeviceProfile, ModelGraph, Noun, Report, RunStats, Solution
from tests.toy_bundle import write_images, write_toy_bundle

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., Any]

TABLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "table.json"
SHOWING = [
    ("devices",),
    ("devices", "show", "jetson-orin-nano-8gb"),
    ("inspect", "zoo:digits-cnn"),
    ("plan", "--table", str(TABLE), "--memory", "96KiB"),
    ("report", "in/bundle"),
]
DOCUMENTS: list[tuple[tuple[str, ...], type[Noun]]] = [
    (("devices", "show", "jetson-orin-nano-8gb"), DeviceProfile),
    (("inspect", "zoo:digits-cnn"), ModelGraph),
    (("plan", "--table", str(TABLE), "--memory", "96KiB"), Solution),
    (("run", "in/bundle", "--data", "in/images", "--limit", "6"), RunStats),
    (("report", "in/bundle"), Report),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_images(folder / "images", per_class=4)
    write_toy_bundle(folder / "bundle")
    return folder


@pytest.fixture(autouse=True)
def _here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").symlink_to(inputs)
    monkeypatch.chdir(tmp_path)


def shown(text: str) -> Counter[str]:
    # the time that a solver took differs from call to call
    return Counter("".join(text.partition("Proof:")[0].split()))


@pytest.mark.parametrize("line", SHOWING, ids=lambda line: " ".join(line[:2]))
@pytest.mark.parametrize("columns", [40, 60])
def test_a_narrow_terminal_shows_all_that_a_wide_one_does(
    edgeflex: Command, monkeypatch: pytest.MonkeyPatch, line: tuple[str, ...], columns: int
):
    monkeypatch.setenv("COLUMNS", "400")
    wide = edgeflex(*line)
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = edgeflex(*line)
    assert wide.code == narrow.code == 0
    assert shown(narrow.out) >= shown(wide.out)
    assert "…" not in narrow.out
    assert "\x1b" not in narrow.out + wide.out


@pytest.mark.parametrize(("line", "kind"), DOCUMENTS, ids=[" ".join(row[0][:2]) for row in DOCUMENTS])
def test_piped_json_is_one_document_of_its_kind(edgeflex: Command, line: tuple[str, ...], kind: type[Noun]):
    done = edgeflex(*line, "--json")
    assert done.code == 0, done.err
    document = done.document
    assert document.pop("schema_version") == 1
    kind.model_validate(document)


def test_the_list_of_devices_is_one_document_too(edgeflex: Command):
    devices = edgeflex("devices", "--json").document["devices"]
    assert len(devices) == len(names())
    assert all(DeviceProfile.model_validate(one).origin == "datasheet" for one in devices)


def test_a_written_table_is_the_one_that_is_solved(edgeflex: Command):
    table = CostTable.parse(TABLE.read_bytes(), "the example")
    choices = edgeflex("plan", "--table", TABLE, "--memory", "96KiB", "--json").document["choices"]
    assert [one["subject"] for one in choices] == [one.subject for one in table.decisions]


def test_the_version_and_the_help_are_told(edgeflex: Command):
    assert edgeflex("--version").out.startswith("edgeflex ")
    assert "Exit codes: 0 done" in edgeflex().out
    assert edgeflex("plan", "-h").code == 0
