"""No TensorRT, half a TensorRT, or one without a driver: one clear line and an exit code, never a crash.

Each case is a process of its own, since what must not happen is that the process dies.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgeflex
from tests.toy_bundle import write_images
from tests.toy_engines import write_engine_bundle

HEAVY = ("torch", "executorch", "torchao", "scipy", "onnx", "onnxruntime", "matplotlib", "sklearn", "tensorrt")
# Whatever this machine has: the driver's library is not found in these processes.
NO_DRIVER = "import edgeflex.runtimes.cuda_driver as driver; driver._LIBRARIES = ('libno-such-library.so.1',)\n"
BUILD = "from edgeflex.runtimes.tensorrt_build import build; build(bundle)"
RUN = "from edgeflex.runtimes import open_session\nwith open_session(bundle) as session: pass"
STUBS = {
    "no libraries": "raise ImportError('libnvinfer.so.10: cannot open shared object file: No such file')",
    "a broken library": "raise OSError('libcudart.so.12: file too short')",
    "a crash": (
        "import os\n__version__ = '10.3.0'\n"
        "class ILogger:\n    def __init__(self): os.abort()\n"
        "def Runtime(logger): os.abort()\ndef Builder(logger): os.abort()\n"
    ),
}


def ran(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process that sees our package, and ``path`` before everything else."""
    places = [*map(str, path), str(Path(edgeflex.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def refused(folder: Path, work: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Do work on a bundle as the command line would: the error's one line, and its exit code."""
    lines = [
        "import sys",
        "from pathlib import Path",
        "from edgeflex.bundle import open_bundle",
        "from edgeflex.errors import EdgeflexError",
        f"bundle = open_bundle(Path({str(folder)!r}))",
        "try:",
        *(f"    {line}" for line in work.splitlines()),
        "except EdgeflexError as error:",
        "    print(error, file=sys.stderr)",
        "    sys.exit(error.exit_code)",
    ]
    return ran(NO_DRIVER + "\n".join(lines), *path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine_bundle(tmp_path_factory.mktemp("safety") / "bundle").path


@pytest.mark.parametrize("module", ["cuda_driver", "tensorrt_build", "tensorrt", "tensorrt_progress"])
def test_importing_loads_nothing_heavy(module: str):
    done = ran(f"import sys, edgeflex.runtimes.{module}\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("work", [BUILD, RUN], ids=["build", "run"])
def test_without_tensorrt_the_line_says_how_to_install_it(bundle: Path, work: str):
    hidden = (
        "import importlib.util as util; real = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'tensorrt' else real(name, *rest)\n"
    )
    done = refused(bundle, hidden + work)
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("\n") == 1
    assert "TensorRT is not installed" in done.stderr
    assert "pip install" in done.stderr


@pytest.mark.parametrize("work", [BUILD, RUN], ids=["build", "run"])
@pytest.mark.parametrize("stub", STUBS)
def test_without_a_driver_tensorrt_is_never_called(bundle: Path, work: str, stub: str, tmp_path: Path):
    (tmp_path / "tensorrt.py").write_text(STUBS[stub])
    done = refused(bundle, work, tmp_path)
    assert done.returncode == 7, done.stderr
    assert done.stderr.count("\n") == 1
    assert "no NVIDIA driver" in done.stderr


def test_the_crash_that_is_guarded_against_is_real(tmp_path: Path):
    (tmp_path / "tensorrt.py").write_text(STUBS["a crash"])
    done = ran("import tensorrt; tensorrt.Runtime(None)", tmp_path)
    assert done.returncode < 0


@pytest.mark.parametrize("stub", ["no libraries", "a broken library"])
def test_with_a_driver_and_no_libraries_the_line_names_the_library(bundle: Path, stub: str, tmp_path: Path):
    (tmp_path / "tensorrt.py").write_text(STUBS[stub])
    repository = Path(__file__).resolve().parents[3]
    work = "from tests.fake_cuda import FakeCuda\nfrom edgeflex.runtimes.tensorrt_build import build\n"
    done = refused(bundle, f"{work}build(bundle, library=FakeCuda())", tmp_path, repository)
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("\n") == 1
    assert "cannot be loaded: lib" in done.stderr


@pytest.mark.parametrize("command", ["build", "run"])
def test_the_command_line_says_it_in_one_line_too(bundle: Path, command: str, tmp_path: Path):
    (tmp_path / "tensorrt.py").write_text(STUBS["a crash"])
    write_images(tmp_path / "images", 1)
    data = ["--data", str(tmp_path / "images")] if command == "run" else []
    arguments = ["edgeflex", command, str(bundle), *data]
    done = ran(f"{NO_DRIVER}import sys\nsys.argv = {arguments!r}\nfrom edgeflex.cli import main\nmain()", tmp_path)
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
    assert "no NVIDIA driver" in done.stderr
