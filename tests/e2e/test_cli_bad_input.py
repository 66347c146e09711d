"""Whatever is wrong with what a user gives: one clear line, the right exit code, the same for machines."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from edgeflex.models import zoo
from tests.toy_bundle import write_images, write_toy_bundle

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., Any]

TABLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "table.json"
FIT = ("fit-exits", "--model", "zoo:digits-cnn", "-o", "out")


class Hostile:
    """An object whose unpickling would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of good and bad inputs."""
    folder = tmp_path_factory.mktemp("inputs")
    write_images(folder / "images", per_class=130)
    (folder / "empty").mkdir()
    shutil.copytree(folder / "images", folder / "corrupt")
    whole = (folder / "images" / "red" / "3.png").read_bytes()
    (folder / "corrupt" / "red" / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt" / "blue" / "1.png").write_bytes(b"")
    (folder / "notes.zip").write_text("no archive")
    state = zoo.build("digits-cnn", classes=3).state_dict()
    save_file(state, folder / "good.safetensors")
    raw = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(raw[: len(raw) // 2])
    torch.save(state, folder / "good.pt")
    raw = (folder / "good.pt").read_bytes()
    (folder / "cut.pt").write_bytes(raw[: len(raw) // 2])
    (folder / "evil.pt").write_bytes(pickle.dumps(Hostile(folder / "ran")))
    torch.save({"state_dict": {"a": Hostile(folder / "ran")}}, folder / "evil.th")
    (folder / "garbage.json").write_bytes(b"\x00\xffgarbage{")
    (folder / "other.json").write_text('{"schema_version": 1, "name": "x"}')
    (folder / "filled").mkdir()
    (folder / "filled" / "thesis.tex").write_text("years of work")
    write_toy_bundle(folder / "bundle")
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder from which ``in/`` leads to the inputs."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "in").symlink_to(inputs)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def visible() -> list[str]:
    """Return what lies here, but for the journal in which fit-exits keeps finished work for a later run."""
    return sorted(path.name for path in Path().iterdir() if not path.name.endswith(".fitting"))


def refused(edgeflex: Command, line: tuple[str, ...], code: int, *parts: str) -> dict[str, Any]:
    """Run a command that must fail; return the document that machines get."""
    before = visible()
    done = edgeflex(*line, "--json")
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    first, *listed = done.err.rstrip("\n").split("\n")
    assert first.startswith("edgeflex: ")
    assert all(one.startswith("  - ") for one in listed), "one line, or one line per fault below it"
    for part in parts:
        assert part in done.err
    document: dict[str, Any] = done.document
    assert document["message"] == done.err.removeprefix("edgeflex: ").rstrip("\n")
    assert visible() == before, "a refused command left something behind"
    return document


BAD_LINES: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("no such command", ("plam",), ("No such command 'plam'. Did you mean 'plan'? See `edgeflex --help`.",)),
    ("no such option", ("plan", "--memori", "1MiB"), ("No such option", "--memori", "edgeflex plan --help")),
    ("missing argument", ("run", "--data", "in/images"), ("Missing argument", "edgeflex run --help")),
    ("missing option", ("fit-exits", "--model", "zoo:resnet20"), ("Missing option", "--data")),
    (
        "option out of range",
        ("bench", "in/bundle", "--data", "in/images", "--images", "0"),
        ("--images", "1", "edgeflex bench --help"),
    ),
    (
        "a decoder's options for a bundle of exits",
        ("run", "in/bundle", "--data", "in/images", "--temperature", "0.5", "--vram", "1GiB"),
        ("bundle of exits", "leave out --temperature, --vram"),
    ),
    ("unknown network", ("inspect", "zoo:resnet21"), ("'resnet21'", "resnet20")),
    ("unknown module", ("inspect", "no_such_module:f", "--input-size", "32"), ("no_such_module",)),
    ("no model at all", ("inspect", "resnet20"), ("'resnet20'", "zoo:NAME")),
    (
        "unknown stage",
        (*FIT, "--data", "in/images", "--stages", "trunk.1,trunk.x"),
        ("trunk.x", "near or possible: trunk."),
    ),
    ("unknown head", (*FIT, "--data", "in/images", "--head", "big"), ("'big'", "linear", "conv")),
    ("unknown device", ("devices", "show", "raspbery-pi-5"), ("'raspbery-pi-5'", "'raspberry-pi-5'")),
    ("device to plan for", ("plan", "in/empty", "--device", "raspbery-pi-5"), ("Did you mean 'raspberry-pi-5'",)),
    ("garbage as a device", ("devices", "show", "in/garbage.json"), ("in/garbage.json is not a valid DeviceProfile",)),
    ("unknown statistic", ("plan", "--latency", "8ms:p42"), ("'p42'", "mean, p50, p95, p99, worst")),
    ("objective's statistic", ("plan", "--minimize", "latency:p42"), ("'p42'", "mean, p50, p95, p99, worst")),
    ("unknown objective", ("plan", "--minimize", "speed"), ("'speed'", "latency, memory or drop")),
    ("size in words", ("plan", "--memory", "6 gigs"), ("'6 gigs'", "6GiB")),
    ("time without unit", ("plan", "--latency", "8"), ("'8'", "no unit", "25ms")),
    ("more than all", ("plan", "--max-drop", "300%"), ("'300%'", "0 to 100 %")),
    ("budget of zero", ("plan", "--memory", "0"), ("'0'", "at least 1")),
    ("certainty", ("plan", "--confidence", "100%"), ("'100%'", "excluded")),
    ("nothing to plan from", ("plan",), ("--table",)),
    ("no calibration", ("plan", "in/empty"), ("calibration.json", "does not exist")),
    ("missing calibration", ("plan", "nowhere"), ("nowhere", "does not exist")),
    ("missing table", ("plan", "--table", "none.json"), ("none.json", "does not exist")),
    ("garbage as a table", ("plan", "--table", "in/garbage.json"), ("in/garbage.json is not a valid CostTable",)),
    ("another document", ("plan", "--table", "in/other.json"), ("scenarios: is missing", "decisions")),
    ("threads in words", ("profile", "--threads", "all"), ("'all'", "1,4")),
    ("empty image folder", (*FIT, "--data", "in/empty"), ("in/empty", "no image found")),
    ("corrupt images", (*FIT, "--data", "in/corrupt"), ("blue/1.png", "empty")),
    ("missing images", (*FIT, "--data", "in/none"), ("in/none", "do not exist")),
    ("zip that is none", (*FIT, "--data", "in/notes.zip"), ("in/notes.zip", "zip")),
    (
        "cut safetensors",
        (*FIT, "--data", "in/images", "--weights", "in/cut.safetensors"),
        ("cut.safetensors", "damaged"),
    ),
    ("cut torch file", (*FIT, "--data", "in/images", "--weights", "in/cut.pt"), ("cut.pt", "damaged")),
    ("missing weights", (*FIT, "--data", "in/images", "--weights", "in/none.pt"), ("none.pt", "do not exist")),
    (
        "filled output",
        ("fit-exits", "--model", "zoo:digits-cnn", "--data", "in/images", "-o", "in/filled"),
        ("in/filled", "not empty", "--overwrite"),
    ),
    ("foreign output", ("quickstart", "-o", "in/filled"), ("in/filled", "not empty")),
    ("file as output", (*FIT[:-1], "in/other.json", "--data", "in/images"), ("in/other.json", "is a file")),
    ("folder as a file", ("inspect", "zoo:digits-cnn", "-o", "in/empty"), ("in/empty", "folder")),
    (
        "garbage as a plan",
        ("export", "in/garbage.json", "--model", "in/empty", "--calibration", "in/empty", "-o", "out"),
        ("in/garbage.json is not a valid Plan",),
    ),
    (
        "missing plan",
        ("export", "plan.json", "--model", "in/empty", "--calibration", "in/empty", "-o", "out"),
        ("plan.json", "does not exist"),
    ),
    ("no bundle", ("run", "in/none", "--data", "in/images"), ("in/none", "not a folder")),
    ("no bundle and no images", ("run", "in/none"), ("in/none", "not a folder")),
    ("prompt for images", ("run", "in/bundle", "--prompt", "a"), ("in/bundle", "bundle of exits", "--data")),
    ("text for images", ("calibrate", "--model", "in/empty", "--text", "in/other.json"), ("config.json", "no --text")),
    ("model that is not there", ("calibrate", "--model", "modle", "--data", "in/images"), ("'modle'", "no folder")),
    (
        "rate in words",
        ("trace", "simulate", "in/other.json", "--cache", "1GiB", "--link", "fast"),
        ("--link: size 'fast'", "6GiB"),
    ),
    (
        "cache in words",
        ("trace", "simulate", "in/other.json", "--cache", "1GiB,2 gigs"),
        ("--cache: size '2 gigs'", "6GiB"),
    ),
    (
        "a rate that only a GPU has",
        ("trace", "simulate", "in/other.json", "--cache", "1GiB", "--ram-rate", "60GB/s"),
        ("--device", "--ram-rate"),
    ),
    ("unknown runtime", ("run", "in/bundle", "--data", "in/images", "--runtime", "executorh"), ("'executorch'",)),
    ("garbage as figures", ("report", "in/bundle", "--bench", "in/garbage.json"), ("not a valid BenchResult",)),
]


@pytest.mark.parametrize(("line", "parts"), [row[1:] for row in BAD_LINES], ids=[row[0] for row in BAD_LINES])
def test_bad_input_is_one_clear_line_and_exit_code_2(
    edgeflex: Command, here: Path, line: tuple[str, ...], parts: tuple[str, ...]
):
    assert refused(edgeflex, line, 2, *parts)["error"] == "InputError"


def test_all_faults_of_a_budget_are_told_at_once(edgeflex: Command, here: Path):
    line = ("plan", "--memory", "6 gigs", "--latency", "8", "--latency", "8ms:p42", "--max-drop", "300%")
    document = refused(edgeflex, line, 2, "6 gigs", "'8'", "p42", "300%")
    assert document["message"].startswith("the budget: 4 faults")


@pytest.mark.parametrize("weights", ["evil.pt", "evil.th"])
def test_code_in_weights_is_refused_and_never_runs(edgeflex: Command, here: Path, weights: str):
    line = (*FIT, "--data", "in/images", "--weights", f"in/{weights}")
    refused(edgeflex, line, 2, "refused", "run code", "system")
    assert not Path("in/ran").exists()


def test_a_half_image_is_named(edgeflex: Command, here: Path):
    # its header is whole, so that only decoding finds it
    shutil.copytree("in/images", "images")
    shutil.copy("in/corrupt/red/3.png", "images/red/3.png")
    done = edgeflex(*FIT, "--data", "images")
    assert done.code == 2
    assert "red/3.png" in done.err
    assert "cannot be decoded" in done.err
    assert not Path("out").exists()


def test_nothing_of_a_filled_output_is_lost(edgeflex: Command, here: Path):
    refused(edgeflex, ("quickstart", "-o", "in/filled"), 2)
    assert Path("in/filled/thesis.tex").read_text() == "years of work"


# --- a budget that nothing meets ------------------------------------------------------------------------


def test_an_infeasible_budget_says_what_binds_what_is_least_and_what_would_do(edgeflex: Command, here: Path):
    document = refused(edgeflex, ("plan", "--table", str(TABLE), "--memory", "80KiB"), 3, "memory")
    assert document["error"] == "InfeasibleError"
    assert document["binding"] == ["memory"]
    assert "memory is limited to 80 KiB, least " in document["message"]
    least = int(document["least"]["memory"])
    assert least > 80 * 1024
    assert document["relaxation"]
    assert edgeflex("plan", "--table", TABLE, "--memory", least).code == 0
    assert edgeflex("plan", "--table", TABLE, "--memory", least - 1).code == 3


def test_budgets_that_only_together_cannot_be_met_are_all_named(edgeflex: Command, here: Path):
    assert edgeflex("plan", "--table", TABLE, "--latency", "214us").code == 0
    assert edgeflex("plan", "--table", TABLE, "--max-drop", "0.1%").code == 0
    line = ("plan", "--table", str(TABLE), "--latency", "214us", "--max-drop", "0.1%")
    document = refused(edgeflex, line, 3)
    assert len(document["binding"]) == 2
    assert set(document["binding"]) == set(document["least"])


# --- damaged bundles ------------------------------------------------------------------------------------


def flip_a_bit(bundle: Path) -> None:
    raw = bytearray((bundle / "program.pte").read_bytes())
    raw[len(raw) // 2] ^= 1
    (bundle / "program.pte").write_bytes(raw)


def lose_a_file(bundle: Path) -> None:
    (bundle / "expected.safetensors").unlink()


def lose_the_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def cut_the_manifest(bundle: Path) -> None:
    raw = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.json").write_bytes(raw[: len(raw) // 2])


def escape_by_name(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][0]["path"] = "../outside.bin"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle.parent / "outside.bin").write_bytes(b"secret")


def escape_by_link(bundle: Path) -> None:
    (bundle / "program.pte").replace(bundle.parent / "program.pte")
    (bundle / "program.pte").symlink_to((bundle.parent / "program.pte").absolute())


def come_from_the_future(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))


DAMAGES: dict[Callable[[Path], None], str] = {
    flip_a_bit: "SHA-256",
    lose_a_file: "missing",
    lose_the_manifest: "manifest.json",
    cut_the_manifest: "not JSON",
    escape_by_name: "inside the folder",
    escape_by_link: "outside the folder",
    come_from_the_future: "version 99",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("command", ["run", "bench", "verify", "report"])
def test_a_damaged_bundle_is_never_used(edgeflex: Command, here: Path, command: str, damage: Callable[[Path], None]):
    shutil.copytree("in/bundle", "bundle")
    damage(Path("bundle"))
    data = () if command == "report" else ("--data", "in/images")
    document = refused(edgeflex, (command, "bundle", *data), 6, "bundle", DAMAGES[damage])
    assert document["error"] == "BundleError"


# --- the system says no -----------------------------------------------------------------------------------


def test_a_full_disk_is_exit_code_7_and_leaves_the_old_file(
    edgeflex: Command, here: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("graph.json").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    document = refused(edgeflex, ("inspect", "zoo:digits-cnn", "-o", "graph.json"), 7, "the disk is full", "graph.json")
    assert document["error"] == "DeviceError"
    assert Path("graph.json").read_text() == "old"


def test_ctrl_c_while_writing_is_exit_code_130_and_leaves_the_old_file(
    edgeflex: Command, here: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    Path("graph.json").write_text("old")
    monkeypatch.setattr(os, "fsync", interrupt)
    done = edgeflex("inspect", "zoo:digits-cnn", "-o", "graph.json")
    assert (done.code, done.out) == (130, "")
    assert done.err.startswith("edgeflex: interrupted")
    assert sorted(path.name for path in here.iterdir()) == ["graph.json", "in"]
    assert Path("graph.json").read_text() == "old"


def test_results_that_cannot_be_printed_are_an_error(start: Command):
    with Path("/dev/full").open("w") as full:
        process = start(["devices"], stdout=full)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 7
    assert err.count("\n") == 1
    assert "the disk is full" in err


def test_a_reader_that_goes_away_ends_the_command_quietly(start: Command):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(["devices", "show", "jetson-orin-nano-8gb"], stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141
