"""Ctrl-C in every slow stage: exit code 130, one line, nothing half-written, and the next run goes on."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from edgeflex.models import zoo
from edgeflex.profiles import machine
from edgeflex.schema import Candidates, DeviceProfile, Figure

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Start = Callable[..., subprocess.Popen[str]]
    Command = Callable[..., Any]

pytestmark = pytest.mark.timeout(600)  # whole commands, begun and killed

PATIENCE_S = 240
# Four layers with weights, so that calibrating it takes seconds.
NETWORK = """
from torch import nn

class Network(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 32, 3, stride=2, padding=1), nn.ReLU()),
        )
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        return self.head(self.trunk(x).mean((2, 3)))
"""
CALIBRATE = ("calibrate", "-m", "model", "--data", "digits/dev", "-d", "./device.json", "-o", "calibration", "-q")


@dataclass(frozen=True)
class Resumed:
    """A stage that was interrupted once and then run again to its end."""

    interrupted: tuple[int, str, str]
    kept: dict[str, int]
    finished: tuple[int, str, str]


def files(folder: Path) -> dict[str, int]:
    """Return every file below ``folder`` with the time of its last change."""
    found = {}
    for path in folder.rglob("*") if folder.exists() else ():
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.stat().st_mtime_ns
    return found


def interrupt(process: subprocess.Popen[str], begun: Callable[[], bool]) -> tuple[int, str, str]:
    """Press Ctrl-C once ``begun`` holds; return how the process ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not begun():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the stage ended before it could be interrupted: {process.communicate()}")
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=2 * PATIENCE_S)
    return process.returncode, out, err


def resume(start: Start, line: Sequence[object], work: Path, folder: Path, begun: Callable[[], bool]) -> Resumed:
    stopped = interrupt(start(line, cwd=work), begun)
    kept = files(folder)
    return Resumed(stopped, kept, finish(start(line, cwd=work)))


def check_interrupted(ended: tuple[int, str, str]) -> None:
    code, out, err = ended
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("edgeflex: interrupted, nothing is half-written.")
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with digits and a profile of this machine without any kernel."""
    folder = tmp_path_factory.mktemp("work")
    zoo.write_digits(folder / "digits")
    (folder / "network_of_interrupted.py").write_text(NETWORK)
    facts = machine()
    figure = Figure(value=1e-5, origin="measured", source="a round number for this test")
    device = DeviceProfile(
        name="here",
        title="this machine",
        origin="measured",
        backend="executorch",
        cpu_model=facts.cpu_model,
        isa=facts.isa,
        call_s=figure,
        delegate_s=figure,
    )
    (folder / "device.json").write_text(device.canonical_json())
    return folder


@pytest.fixture(scope="module")
def fitted(work: Path, start: Start) -> Resumed:
    journal = work / ".model.fitting"
    line = ("fit-exits", "--model", "network_of_interrupted:Network", "--input-size", 16, "--stages", "trunk.0")
    more = ("--data", "digits/train", "-o", "model", "--epochs", 4)
    return resume(start, (*line, *more), work, journal, lambda: any(journal.rglob("*.safetensors")))


@pytest.fixture(scope="module")
def calibrated(work: Path, fitted: Resumed, start: Start) -> Resumed:
    folder = work / "calibration"
    return resume(start, (*CALIBRATE, "--mixes", 2), work, folder, lambda: any(folder.glob("mixes/*.json")))


def test_fit_exits_goes_on_where_it_stopped(work: Path, fitted: Resumed):
    check_interrupted(fitted.interrupted)
    assert fitted.kept
    assert not any(name.endswith(".tmp") for name in fitted.kept)
    assert fitted.finished[0] == 0, fitted.finished[2]
    assert {path.name for path in (work / "model").iterdir()} >= {"model.json", "weights.safetensors"}
    assert not (work / ".model.fitting").exists()


def test_calibrate_goes_on_where_it_stopped(work: Path, calibrated: Resumed):
    check_interrupted(calibrated.interrupted)
    assert "candidates.json" not in calibrated.kept
    assert not any(name.endswith((".tmp", ".partial.tmp")) for name in calibrated.kept)
    assert calibrated.finished[0] == 0, calibrated.finished[2]
    now = files(work / "calibration")
    measured = [name for name in calibrated.kept if name.startswith(("sensitivity/", "mixes/"))]
    assert len(measured) > 3
    assert {name: now[name] for name in measured} == {name: calibrated.kept[name] for name in measured}
    found = Candidates.parse((work / "calibration" / "candidates.json").read_bytes(), "candidates")
    assert len(found.candidates) >= 2


def test_profile_goes_on_where_it_stopped(tmp_path: Path, start: Start):
    out, journal = tmp_path / "device.json", tmp_path / "device.json.partial"
    line = ("profile", "--quick", "-o", out, "--storage", tmp_path)
    stopped = interrupt(start(line), lambda: journal.exists() and journal.read_text().count("\n") > 1)
    check_interrupted(stopped)
    assert {path.name for path in tmp_path.iterdir()} == {"device.json.partial"}
    lines = journal.read_text().splitlines()
    measured = {json.loads(line)["kernel"]["seconds"]["value"] for line in lines if "kernel" in json.loads(line)}
    code, _, err = finish(start(line))
    assert code == 0, err
    profile = DeviceProfile.parse(out.read_bytes(), "profile")
    assert measured <= {one.seconds.value for one in profile.kernels}
    assert len(profile.kernels) > len(measured)
    assert {path.name for path in tmp_path.iterdir()} == {"device.json"}


# --- what follows from a calibration -------------------------------------------------------------------


@pytest.fixture
def here(work: Path, calibrated: Resumed, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert calibrated.finished[0] == 0, calibrated.finished[2]
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def planned(here: Path, edgeflex: Command) -> Path:
    path = here / "plan.json"
    if not path.exists():
        done = edgeflex("plan", "calibration", "--memory", "4MiB", "--max-drop", "90%", "-o", path)
        assert done.code == 0, done.err
    return path


def export_line(plan: Path, out: Path) -> tuple[object, ...]:
    return ("export", plan, "--model", "model", "--calibration", "calibration", "-o", out)


def test_an_interrupted_export_leaves_nothing_and_can_be_repeated(
    here: Path, planned: Path, tmp_path: Path, start: Start, edgeflex: Command
):
    line = export_line(planned, tmp_path / "bundle")
    check_interrupted(interrupt(start(line), lambda: any(tmp_path.glob(".bundle.*.partial"))))
    assert list(tmp_path.iterdir()) == []
    assert edgeflex(*line).code == 0
    assert edgeflex("report", tmp_path / "bundle", "-o", tmp_path / "report.html").code == 0


def test_a_plan_with_an_unknown_precision_is_refused(planned: Path, tmp_path: Path, edgeflex: Command):
    document = json.loads(planned.read_text())
    document["choices"][0]["option"] = "int3"
    (tmp_path / "plan.json").write_text(json.dumps(document))
    done = edgeflex(*export_line(tmp_path / "plan.json", tmp_path / "bundle"), "--json")
    assert done.code == 2, done.err
    assert "int3" in done.err
    assert done.document["error"] == "InputError"
    assert not (tmp_path / "bundle").exists()


def test_a_budget_that_this_model_cannot_meet_is_exit_code_3(here: Path, edgeflex: Command):
    done = edgeflex("plan", "calibration", "--memory", "1KiB", "-o", "no.json", "--json")
    assert done.code == 3
    assert done.document["binding"] == ["memory"]
    assert done.document["least"]["memory"] > 1024
    assert done.document["relaxation"]
    assert not (here / "no.json").exists()


def test_a_plan_for_a_device_without_kernel_times_says_so(here: Path, edgeflex: Command):
    done = edgeflex("plan", "calibration", "--memory", "4MiB", "-d", "raspberry-pi-5", "-o", "no.json")
    assert done.code == 2
    assert "raspberry-pi-5" in done.err
    assert "edgeflex profile" in done.err
    assert not (here / "no.json").exists()


def test_a_calibration_is_not_mixed_with_another(here: Path, edgeflex: Command):
    done = edgeflex(*CALIBRATE, "--seed", 1)
    assert done.code == 2
    assert "another seed" in done.err
    assert "--overwrite" in done.err
