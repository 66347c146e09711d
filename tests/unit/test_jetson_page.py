"""The page about Jetson boards, tried as far as it can be without one: commands, files, devices, packages."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from edgeflex import profiles
from edgeflex.cli import app
from edgeflex.registry import EXPORTERS, NVIDIA_DEVICES, RUNTIMES, capabilities_for
from edgeflex.schema import LayerKind, Precision

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "jetson.md"
TEXT = PAGE.read_text(encoding="utf-8")
REQUIREMENTS = ROOT / "requirements-device.txt"
CLI: Any = typer.main.get_command(app)
# typer may carry click's classes under its own roof
PARSER_ERROR: type[Exception] = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")
# Programs of a PC or of JetPack that the page calls besides edgeflex.
OTHERS = {"scp", "sudo", "python3", ".", "pip", "cd", "sh"}
ON_BOARD = (
    *("edgeflex.cli", "edgeflex.flow", "edgeflex.profiles.doctor", "edgeflex.images", "edgeflex.bundle"),
    *("edgeflex.runtimes.tensorrt", "edgeflex.runtimes.tensorrt_build", "edgeflex.runtimes.cuda_driver"),
    "edgeflex.runtimes.tensorrt_ways",
    *("edgeflex.runtimes.tensorrt_decoder", "edgeflex.runtimes.decoder", "edgeflex.runtimes.decoder_bench"),
    *("edgeflex.runtimes.bench", "edgeflex.runtimes.verify", "edgeflex.runtimes.recorder", "edgeflex.reports.html"),
)


def lines(text: str = TEXT) -> list[str]:
    """Every line of a text's shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def parsed(line: str) -> dict[str, Any]:
    """What edgeflex's own parser reads from a line; it fails like the command would."""
    command, rest = CLI, shlex.split(line)[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    assert not hasattr(command, "commands") or not rest, line
    context = command.make_context(command.name, rest)
    return dict(context.params)


def requirements() -> dict[str, str]:
    stated = [line for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return {re.split(r"[<>=]", line)[0]: line for line in stated}


def declared() -> dict[str, str]:
    """What edgeflex itself asks for, without extras."""
    reader: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = reader.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {re.split(r"[<>=]", line)[0]: line for line in project["dependencies"]}


def limits(requirement: str) -> set[str]:
    return set(re.sub(r"^[\w.-]+", "", requirement).split(","))


DECODERS = re.findall(r"^## Decoders\n(.*?)^## ", TEXT, re.MULTILINE | re.DOTALL)[0]
OF_DECODERS = [line for line in lines(DECODERS) if line.startswith("edgeflex ")]
COMMANDS = [line for line in lines(TEXT.replace(DECODERS, "")) if line.startswith("edgeflex ")]


@pytest.mark.parametrize("line", [*COMMANDS, *OF_DECODERS])
def test_every_edgeflex_line_of_the_page_parses(line: str) -> None:
    parsed(line)


def test_a_line_that_does_not_parse_would_be_found() -> None:
    for wrong in ("edgeflex build", "edgeflex build bundle --worspace 1GiB", "edgeflex bench bundle --images many"):
        with pytest.raises(PARSER_ERROR):
            parsed(wrong)


def test_the_page_walks_the_whole_way_in_order() -> None:
    walked = list(dict.fromkeys(shlex.split(line)[1] for line in COMMANDS))
    assert walked == [
        *("devices", "fit-exits", "calibrate", "plan", "export"),
        *("doctor", "build", "run", "bench", "verify", "report"),
    ]


def test_every_other_line_calls_a_program_that_the_page_may_call() -> None:
    words = [shlex.split(line) for line in lines() if line not in {*COMMANDS, *OF_DECODERS}]
    programs = {next(word for word in line if "=" not in word) for line in words}
    assert programs <= OTHERS


def test_devices_targets_and_runtimes_of_the_commands_exist() -> None:
    given = [parsed(line) for line in COMMANDS]
    assert {one["device"] for one in given if one.get("device")} <= set(profiles.names())
    assert {one["target"] for one in given if one.get("target")} == {"tensorrt"}
    assert {one["runtime"] for one in given if one.get("runtime")} <= set(RUNTIMES.names())
    assert all(f"`{name}`" in TEXT for name in NVIDIA_DEVICES)


def test_what_one_command_writes_is_what_the_next_one_reads() -> None:
    given = {shlex.split(line)[1]: parsed(line) for line in COMMANDS if "onnxruntime" not in line}
    assert given["calibrate"]["model"] == given["export"]["model"] == given["fit-exits"]["output"]
    assert given["plan"]["calibration"] == given["export"]["calibration"] == given["calibrate"]["output"]
    assert given["export"]["plan_file"] == given["plan"]["output"]
    for reader in ("build", "run", "bench", "verify", "report"):
        assert given[reader]["bundle"] == given["export"]["output"]
    for writer, read in (("bench", "bench_file"), ("verify", "verify_file"), ("run", "stats_file")):
        assert given["report"][read] == given[writer]["output"]


def test_a_decoder_takes_the_same_way() -> None:
    given = {shlex.split(line)[1]: parsed(line) for line in OF_DECODERS}
    assert list(given) == ["calibrate", "plan", "export", "build", "run"]
    assert given["export"]["target"] == "tensorrt"
    assert given["calibrate"]["model"] == given["export"]["model"]
    assert given["plan"]["calibration"] == given["export"]["calibration"] == given["calibrate"]["output"]
    assert given["export"]["plan_file"] == given["plan"]["output"]
    assert given["build"]["bundle"] == given["run"]["bundle"] == given["export"]["output"]


def test_files_of_the_repository_that_the_page_names_exist() -> None:
    named = set(re.findall(r"requirements-[\w.]+", TEXT))
    assert named == {REQUIREMENTS.name}
    assert REQUIREMENTS.is_file()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", TEXT)]
    assert all((PAGE.parent / link).exists() for link in links if link)


def test_the_table_of_precisions_is_what_each_gpu_is_offered() -> None:
    rows = dict(re.findall(r"^\| (`fp.*?|`int.*?) \| (.*?) \|$", TEXT, re.MULTILINE))
    assert len(rows) == 4
    devices = [profiles.load(name) for name in ("jetson-orin-nano-8gb", "jetson-thor")]
    for named, answers in rows.items():
        for device, answer in zip(devices, answers.split(" | "), strict=True):
            held = capabilities_for(EXPORTERS, "tensorrt", device).precisions[LayerKind.LINEAR]
            for name in re.findall(r"`([\w-]+)`", named):
                assert (Precision(name) in held) is (answer == "yes"), (name, device.name)


def test_the_page_says_first_what_was_not_run_on_hardware() -> None:
    assert TEXT.splitlines()[2].startswith("**What of this was not run on hardware:** nothing")


# --- what a board installs -------------------------------------------------------------------------------


def test_a_board_installs_part_of_what_edgeflex_needs_in_the_same_versions() -> None:
    own = declared()
    assert set(requirements()) < set(own)
    for name, line in requirements().items():
        assert limits(line) == limits(own[name]), name


def test_everything_on_the_board_starts_without_what_a_board_does_not_install() -> None:
    left_out = {"sklearn" if name == "scikit-learn" else name for name in set(declared()) - set(requirements())}
    assert {"torch", "scipy", "onnx", "onnxruntime", "executorch"} <= left_out
    code = (
        f"import importlib, sys\nfor name in {sorted({*left_out, 'onnx_ir', 'tensorrt'})}: sys.modules[name] = None\n"
        f"for name in {ON_BOARD}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["build", "run", "bench", "verify", "report", "doctor"])
def test_the_help_of_every_command_on_the_board_needs_no_more(command: str) -> None:
    code = (
        "import sys\nfor name in ('torch', 'scipy', 'onnx', 'onnxruntime', 'executorch', 'matplotlib'): "
        "sys.modules[name] = None\n"
        f"sys.argv = ['edgeflex', {command!r}, '--help']\nfrom edgeflex.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: edgeflex")
