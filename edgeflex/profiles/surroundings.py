"""What the doctor looks at: files, installed packages, programs, and answers of what may be slow or may crash.

ONNX Runtime, TensorRT and the NVIDIA driver are asked in processes of their own, which is what
``python -m edgeflex.profiles.surroundings NAME`` is for. A test hands in another machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeflex import native
from edgeflex.native.build import library_name
from edgeflex.profiles.cuda import driver

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LOOK_TIMEOUT_S = 60.0
_BLOCK_BYTES = 4096


class Ran(NamedTuple):
    """How a command ended: ``code`` is None where it could not be started or did not end in time."""

    code: int | None
    stdout: str
    stderr: str


def _run(command: Sequence[str], timeout_s: float) -> Ran:
    path = os.pathsep.join(part for part in (str(package_root()), os.environ.get("PYTHONPATH", "")) if part)
    try:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return Ran(None, "", f"it did not end within {timeout_s:.0f} s")
    except OSError as error:
        return Ran(None, "", error.strerror or str(error))
    return Ran(done.returncode, done.stdout, done.stderr)


def package_root() -> Path:
    """Return the folder that holds the package."""
    return Path(__file__).resolve().parents[2]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _requirements() -> dict[str, str]:
    """Return what the installed edgeflex asks of each package, extras included, as ``>=1,<2``."""
    try:
        lines = metadata.requires("edgeflex") or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)\s*([^;\[]*)", line)
        if match is not None:
            found[match.group(1).lower().replace("_", "-")] = match.group(2).replace(" ", "")
    return found


def _reads_direct(folder: Path) -> bool | None:
    """Say whether the file system of ``folder`` takes ``O_DIRECT``; None where no file can be written there."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return False
    try:
        with tempfile.NamedTemporaryFile(prefix=".edgeflex-doctor-", dir=folder) as file:
            file.write(bytes(_BLOCK_BYTES))
            file.flush()
            return _opens(file.name, flag)
    except OSError:
        return None


def _opens(name: str, flag: int) -> bool:
    try:
        os.close(os.open(name, os.O_RDONLY | flag))
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Surroundings:
    """One machine, as the doctor sees it.

    Attributes:
        root: Start of the file tree that tells about the machine.
        folder: Where work is done: its disk is looked at.
        python: Version of the interpreter.
        in_environment: Whether the interpreter runs in a virtual environment.
        environment: Environment variables.
        library: The compiled native library.
        version_of: Version of an installed distribution, or None.
        importable: Whether a module is found, without importing it.
        requirements: What edgeflex asks of each distribution.
        which: Finds a program on the path.
        run: Runs a command within a time.
        disk_free_bytes: Free bytes of a folder's file system.
        reads_direct: Whether a folder's file system takes ``O_DIRECT``.
    """

    root: Path = Path("/")
    folder: Path = field(default_factory=Path.cwd)
    python: tuple[int, int, int] = sys.version_info[:3]
    in_environment: bool = sys.prefix != sys.base_prefix
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    library: Path = Path(native.__file__).parent / library_name(sys.platform)
    version_of: Callable[[str], str | None] = _version
    importable: Callable[[str], bool] = _importable
    requirements: Mapping[str, str] = field(default_factory=_requirements)
    which: Callable[[str], str | None] = shutil.which
    run: Callable[[Sequence[str], float], Ran] = _run
    disk_free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free
    reads_direct: Callable[[Path], bool | None] = _reads_direct

    def look(self, name: str) -> tuple[dict[str, Any] | None, str]:
        """Ask one of this module's own looks in a process; return its answer, or why there is none."""
        done = self.run([sys.executable, "-m", "edgeflex.profiles.surroundings", name], LOOK_TIMEOUT_S)
        if done.code == 0:
            try:
                return dict(json.loads(done.stdout.strip().splitlines()[-1])), ""
            except (ValueError, IndexError):
                return None, "its answer cannot be read"
        if done.code is not None and done.code < 0:
            return None, f"the process that asked was killed by signal {-done.code}"
        return None, (done.stderr.strip().splitlines() or [f"exit status {done.code}"])[-1]


# --- looks, each in a process of its own ---------------------------------------------------------------


def _look_onnxruntime() -> dict[str, Any]:
    runtime: Any = importlib.import_module("onnxruntime")
    return {"providers": list(runtime.get_available_providers())}


def _look_tensorrt() -> dict[str, Any]:
    # The version alone: an object of TensorRT without a driver can bring the process down.
    tensorrt: Any = importlib.import_module("tensorrt")
    return {"version": str(tensorrt.__version__)}


def _look_driver() -> dict[str, Any]:
    return asdict(driver())


_LOOKS: dict[str, Callable[[], dict[str, Any]]] = {
    "driver": _look_driver,
    "onnxruntime": _look_onnxruntime,
    "tensorrt": _look_tensorrt,
}


def main(arguments: Sequence[str]) -> int:
    """Write what one look finds as JSON; return the exit code."""
    if len(arguments) != 1 or arguments[0] not in _LOOKS:
        sys.stderr.write(f"usage: python -m edgeflex.profiles.surroundings ({' | '.join(_LOOKS)})\n")
        return 2
    try:
        answer = _LOOKS[arguments[0]]()
    except Exception as error:  # noqa: BLE001 - whatever a package does when it is imported is its answer
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
