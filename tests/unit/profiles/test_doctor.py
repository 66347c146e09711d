"""What the doctor says about machines that are laid out for it: their files, packages and answers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from edgeflex.native.build import sources_digest
from edgeflex.profiles.doctor import Doctor, Finding, examine, fits
from edgeflex.profiles.surroundings import Ran, Surroundings, main
from edgeflex.registry import EXPORTERS, RUNTIMES
from edgeflex.schema import Document

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

WANTED = {"torch": ">=2.13,<2.14", "onnx": ">=1.20,<2", "onnxruntime": ">=1.24,<2", "numpy": ">=1.26"}
VERSIONS = {
    **dict.fromkeys(("numpy", "pydantic", "typer", "rich", "platformdirs", "psutil", "pillow", "safetensors"), "2.0"),
    **dict.fromkeys(("jinja2", "matplotlib", "scipy", "scikit-learn", "torchao", "executorch", "onnxscript"), "1.0"),
    **dict.fromkeys(("tokenizers", "huggingface_hub"), "0.30"),
    "torch": "2.13.0+cpu",
    "onnx": "1.23.2",
    "onnxruntime": "1.31.1",
}
ORIN = {"name": "Orin", "capability": "8.7", "memory_bytes": 8 << 30, "integrated": True}
NO_DRIVER = "no NVIDIA driver (libcuda.so.1 and nvcuda.dll are not found)"
ANSWERS: dict[str, Any] = {
    "onnxruntime": {"providers": ["CPUExecutionProvider"]},
    "driver": {"problem": NO_DRIVER, "cuda_version": None, "gpus": []},
}


def runner(answers: dict[str, Any]) -> Callable[[Sequence[str], float], Ran]:
    """Answer looks with these values; a ``Ran`` stands for itself, and what is not there cannot be started."""

    def run(command: Sequence[str], timeout_s: float) -> Ran:
        assert timeout_s > 0
        answer = answers.get(command[-1] if "-m" in command else command[0])
        if answer is None:
            return Ran(None, "", "No such file or directory")
        return answer if isinstance(answer, Ran) else Ran(0, f"chatter of a library\n{json.dumps(answer)}", "")

    return run


def write(root: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def desk(root: Path, **changes: Any) -> Surroundings:
    """A computer with everything but an NVIDIA GPU."""
    write(root, proc__meminfo="MemTotal: 16265500 kB\nMemAvailable: 8000000 kB\n")
    library = root / "library.so"
    library.write_bytes(b"\x7fELF" + sources_digest().encode())
    here = Surroundings(
        root=root,
        folder=root,
        python=(3, 11, 7),
        in_environment=True,
        environment={"CXX": sys.executable},
        library=library,
        version_of=VERSIONS.get,
        importable=lambda module: module != "tensorrt",
        requirements=WANTED,
        which=lambda name: None,
        run=runner(ANSWERS),
        disk_free_bytes=lambda folder: 100 << 30,
        reads_direct=lambda folder: True,
    )
    return replace(here, **changes)


def jetson(root: Path, **changes: Any) -> Surroundings:
    """An Orin board with JetPack 6.2, TensorRT, and only what running needs."""
    small = {name: VERSIONS[name] for name in ("numpy", "pydantic", "typer", "rich", "platformdirs", "psutil")}
    small |= {"pillow": "11.0", "safetensors": "0.5"}
    write(
        root,
        etc__nv_tegra_release="# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
        usr__src__tensorrt__bin__trtexec="",
    )
    answers = {
        "driver": {"problem": None, "cuda_version": "12.6", "gpus": [ORIN]},
        "tensorrt": {"version": "10.3.0"},
        "nvpmodel": Ran(0, "NV Power Mode: MAXN_SUPER\n2\n", ""),
    }
    modules = {*small, "PIL", "tensorrt"}
    board = desk(
        root,
        python=(3, 10, 12),
        version_of=small.get,
        importable=lambda module: module in modules,
        run=runner(answers),
    )
    return replace(board, **changes)


def found(here: Surroundings) -> dict[str, Finding]:
    return {one.name: one for one in examine(here).findings}


# --- a computer without a GPU ----------------------------------------------------------------------------


def test_a_computer_without_a_gpu_lacks_only_what_needs_one(tmp_path: Path):
    seen = found(desk(tmp_path))
    states = {name: one.state for name, one in seen.items() if one.state != "ok"}
    assert states == {
        "jetpack": "unavailable",
        "nvidia driver": "unavailable",
        "tensorrt": "unavailable",
        "trtexec": "unavailable",
        "runtime tensorrt": "unavailable",
    }
    assert "no NVIDIA GPU is seen" in seen["nvidia driver"].detail
    for name in ("nvidia driver", "tensorrt", "trtexec", "runtime tensorrt"):
        assert seen[name].remedy == "", "nothing that is installed would mend it"
    assert seen["onnxruntime"].detail == "providers: CPUExecutionProvider"
    assert seen["target tensorrt"].state == "ok"  # graphs are written here, engines built on the device
    assert Doctor(findings=tuple(seen.values())).lacking == ()


def test_every_target_and_runtime_is_judged_with_a_reason_and_a_remedy(tmp_path: Path):
    bare = desk(tmp_path, version_of=lambda name: None, importable=lambda module: False)
    seen = found(bare)
    rows = [f"{table.kind} {name}" for table in (EXPORTERS, RUNTIMES) for name in table.names()]
    assert rows
    for name in rows:
        assert seen[name].state == "unavailable", name
        assert "not installed" in seen[name].detail
        assert name == "runtime tensorrt" or "pip install" in seen[name].remedy
    line = "pip install 'torch>=2.13,<2.14' 'torchao' 'executorch' 'scipy'"  # one line for all that is lacking
    assert seen["target executorch"].remedy == line
    lacking = {one.name for one in Doctor(findings=tuple(seen.values())).lacking}
    assert Doctor(findings=tuple(seen.values())).exit_code == 5
    assert lacking == {"numpy", "pydantic", "typer", "rich", "platformdirs", "psutil", "pillow", "safetensors"}


def test_a_card_without_a_driver_is_told_from_no_card(tmp_path: Path):
    write(tmp_path, **{"sys__bus__pci__devices__0000:01:00.0__vendor": "0x10de\n"})
    driver = found(desk(tmp_path))["nvidia driver"]
    assert (driver.state, driver.detail) == ("missing", NO_DRIVER)
    assert driver.remedy.startswith("sudo ubuntu-drivers install; in a container")
    tensorrt = found(desk(tmp_path))["tensorrt"]
    assert (tensorrt.state, "edgeflex[tensorrt]" in tensorrt.remedy) == ("missing", True)


def test_a_driver_that_does_not_start_is_broken_not_missing(tmp_path: Path):
    write(tmp_path, **{"sys__bus__pci__devices__0000:01:00.0__vendor": "0x10de\n"})
    problem = "the NVIDIA driver does not start: cuInit gives 999 (unknown)"
    answers = {**ANSWERS, "driver": {"problem": problem, "cuda_version": "13.0", "gpus": []}}
    driver = found(desk(tmp_path, run=runner(answers)))["nvidia driver"]
    assert (driver.state, driver.version, driver.detail) == ("broken", "CUDA 13.0", problem)


# --- packages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "wanted", "right"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("2.12.9", ">=2.13,<2.14", False),
        ("2.14", ">=2.13,<2.14", False),
        ("2.14.0a1", "<2.14,>=2.13", False),
        ("1.9", ">=1.20", False),
        ("10.3.0", "", True),
    ],
)
def test_versions_are_compared_by_number_not_by_letter(version: str, wanted: str, right: bool):
    assert fits(version, wanted) is right


def test_a_package_of_another_version_is_broken_and_the_line_names_the_right_ones(tmp_path: Path):
    seen = found(desk(tmp_path, version_of={**VERSIONS, "torch": "2.9.1"}.get))
    torch = seen["torch"]
    assert (torch.state, torch.version, torch.detail) == ("broken", "2.9.1", "edgeflex works with >=2.13,<2.14")
    assert torch.remedy == "pip install 'torch>=2.13,<2.14'"
    assert seen["runtime reference"].state == "unavailable"
    assert seen["runtime onnxruntime"].state == "ok"


def test_a_package_that_lost_its_module_is_missing(tmp_path: Path):
    pillow = found(desk(tmp_path, importable=lambda module: module not in {"PIL", "tensorrt"}))["pillow"]
    assert (pillow.state, pillow.detail) == ("missing", "listed as installed, but its module is not found")


def test_an_optional_package_is_installed_by_its_extra(tmp_path: Path):
    without = {name: version for name, version in VERSIONS.items() if name != "huggingface_hub"}
    assert found(desk(tmp_path, version_of=without.get))["huggingface_hub"].remedy == "pip install 'edgeflex[hub]'"


def test_an_onnxruntime_that_cannot_be_imported_is_broken_with_its_own_words(tmp_path: Path):
    answers = {**ANSWERS, "onnxruntime": Ran(1, "", "Traceback …\nImportError: libonnxruntime.so: no such file\n")}
    seen = found(desk(tmp_path, run=runner(answers)))
    assert seen["onnxruntime"].state == "broken"
    assert seen["onnxruntime"].detail == "not importable: ImportError: libonnxruntime.so: no such file"
    assert seen["onnxruntime"].remedy == "pip install --force-reinstall 'onnxruntime>=1.24,<2'"
    assert seen["target onnx"].state == "unavailable"


# --- system ----------------------------------------------------------------------------------------------


def test_an_old_python_is_broken_and_required(tmp_path: Path):
    seen = found(desk(tmp_path, python=(3, 9, 18)))
    assert (seen["python"].state, seen["python"].version) == ("broken", "3.9.18")
    assert "3.10" in seen["python"].remedy
    assert [one.name for one in Doctor(findings=tuple(seen.values())).lacking] == ["python"]


def test_a_library_of_other_sources_is_broken_and_an_absent_one_missing(tmp_path: Path):
    stale, absent = tmp_path / "stale.so", tmp_path / "absent.so"
    stale.write_bytes(b"0123456789abcdef")
    for library, state in ((stale, "broken"), (absent, "missing")):
        seen = found(desk(tmp_path, library=library))["native library"]
        assert (seen.state, seen.remedy) == (state, "python -m edgeflex.native.build")


def test_a_missing_compiler_is_said_with_its_package(tmp_path: Path):
    seen = found(desk(tmp_path, environment={"PATH": str(tmp_path)}))["compiler"]
    assert (seen.state, seen.remedy) == ("missing", "sudo apt install g++")
    assert "no C++ compiler" in seen.detail


@pytest.mark.parametrize(("free_bytes", "state"), [(1 << 30, "broken"), (3 << 30, "ok")])
def test_a_disk_that_is_nearly_full_is_said(tmp_path: Path, free_bytes: int, state: str):
    assert found(desk(tmp_path, disk_free_bytes=lambda folder: free_bytes))["disk"].state == state


def test_a_file_system_that_refuses_direct_reads_is_said_and_no_fault(tmp_path: Path):
    disk = found(desk(tmp_path, reads_direct=lambda folder: False))["disk"]
    assert disk.state == "ok"
    assert "refuses O_DIRECT" in disk.detail
    assert found(desk(tmp_path, reads_direct=lambda folder: None))["disk"].state == "broken"


def test_the_least_limit_of_all_control_groups_counts(tmp_path: Path):
    write(
        tmp_path,
        proc__self__cgroup="0::/outer/inner\n",
        sys__fs__cgroup__outer__inner__memory_max="max\n",
        sys__fs__cgroup__outer__memory_max=f"{4 << 30}\n",
    )
    for name in ("outer/inner", "outer"):
        (tmp_path / "sys/fs/cgroup" / name / "memory_max").rename(tmp_path / "sys/fs/cgroup" / name / "memory.max")
    assert found(desk(tmp_path))["memory limit"].detail == "this process and its group may use 4.00 GiB"


def test_a_limit_of_the_older_control_groups_counts_too(tmp_path: Path):
    write(tmp_path, proc__self__cgroup="5:cpu:/job\n4:memory:/job\n")
    limit = tmp_path / "sys/fs/cgroup/memory/job/memory.limit_in_bytes"
    limit.parent.mkdir(parents=True)
    limit.write_text(f"{2 << 30}\n")
    assert "2.00 GiB" in found(desk(tmp_path))["memory limit"].detail


# --- Jetson ----------------------------------------------------------------------------------------------


def test_a_jetson_board_runs_engines_without_torch(tmp_path: Path):
    seen = found(jetson(tmp_path))
    assert seen["jetpack"].version == "L4T R36.4.3"
    assert seen["jetpack"].detail == "JetPack 6.1 to 6.2.1, TensorRT 10.3"
    assert seen["nvidia driver"].detail == "Orin, compute capability 8.7, memory shared with the processor"
    assert (seen["tensorrt"].state, seen["tensorrt"].version) == ("ok", "10.3.0")
    assert seen["trtexec"].detail == str(tmp_path / "usr/src/tensorrt/bin/trtexec")
    assert seen["power mode"].version == "MAXN_SUPER"
    assert seen["runtime tensorrt"].state == "ok"
    assert seen["torch"].state == "missing"
    assert not seen["torch"].required
    assert Doctor(findings=tuple(seen.values())).lacking == ()


def test_jetpack_5_is_too_old(tmp_path: Path):
    board = jetson(tmp_path)
    write(tmp_path, etc__nv_tegra_release="# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref\n")
    seen = found(board)["jetpack"]
    assert seen.state == "broken"
    assert "JetPack 6.1" in seen.remedy


@pytest.mark.parametrize(
    ("release", "revision", "jetpack"), [("R36", "5", "6.2.2"), ("R38", "4.0", "7.1"), ("R39", "2.1", "7.2")]
)
def test_jetpack_is_known_by_its_linux_release(tmp_path: Path, release: str, revision: str, jetpack: str):
    board = jetson(tmp_path)
    write(tmp_path, etc__nv_tegra_release=f"# {release} (release), REVISION: {revision}, GCID: 1, BOARD: x\n")
    assert f"JetPack {jetpack}," in found(board)["jetpack"].detail


def test_a_system_package_that_an_environment_hides_is_made_visible(tmp_path: Path):
    board = jetson(tmp_path, importable=lambda module: module != "tensorrt")
    assert "python3 -m venv --system-site-packages" in found(board)["tensorrt"].remedy
    assert "venv" not in found(replace(board, in_environment=False))["tensorrt"].remedy


@pytest.mark.parametrize(
    ("answer", "state", "said"),
    [
        (Ran(1, "", "ImportError: libnvinfer.so.10: cannot open shared object file"), "broken", "libnvinfer.so.10"),
        (Ran(-11, "", ""), "broken", "killed by signal 11"),
        (Ran(None, "", "it did not end within 60 s"), "broken", "did not end within 60 s"),
        (Ran(0, "no json at all", ""), "broken", "cannot be read"),
        ({"version": "8.6.2"}, "broken", "from 10.3 to before 12.0"),
        ({"version": "12.0.1"}, "broken", "from 10.3 to before 12.0"),
        ({"version": "11.4.0.106"}, "ok", ""),
    ],
)
def test_every_way_that_tensorrt_fails_is_one_line(tmp_path: Path, answer: Any, state: str, said: str):
    board = jetson(tmp_path)
    driver = {"problem": None, "cuda_version": "12.6", "gpus": [ORIN]}
    seen = found(replace(board, run=runner({"driver": driver, "tensorrt": answer})))
    assert seen["tensorrt"].state == state
    assert said in seen["tensorrt"].detail
    assert "\n" not in seen["tensorrt"].detail
    assert bool(seen["tensorrt"].remedy) == (state != "ok")
    assert seen["runtime tensorrt"].state == ("ok" if state == "ok" else "unavailable")


# --- this machine, and what is written -------------------------------------------------------------------


def test_this_very_machine_is_examined_without_an_unknown_word():
    document = examine()
    seen = document.findings
    assert len({one.name for one in seen}) == len(seen)
    assert {one.state for one in seen} <= {"ok", "missing", "broken", "unavailable"}
    for one in seen:
        assert one.state in {"ok", "unavailable"} or one.remedy, one
        assert one.needed_by or not one.remedy, one
    assert document.exit_code == 0


def test_the_document_survives_its_own_json(tmp_path: Path):
    document = examine(desk(tmp_path))
    assert isinstance(document, Document)
    assert Doctor.parse(document.canonical_json(), "itself") == document


def test_examining_imports_nothing_heavy():
    code = (
        "import sys\nfrom edgeflex.profiles.doctor import examine\nexamine()\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'tensorrt', 'executorch', 'scipy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_look_writes_one_json_line_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["driver"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"problem", "cuda_version", "gpus"}
    assert main(["elsewhere"]) == 2
    assert "usage" in capsys.readouterr().err
