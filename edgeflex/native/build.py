"""Compile the native decoder: ``python -m edgeflex.native.build [OUTPUT]``.

For another machine, name its compiler and its flags::

    CXX=aarch64-linux-gnu-g++ CXXFLAGS="-march=armv8.2-a+dotprod" python -m edgeflex.native.build libedgeflex_decoder.so

Only the standard library is used, since installers run this before anything else is installed.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgeflex.errors import DeviceError, EdgeflexError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FOLDER = Path(__file__).parent
_SOURCES = (
    "api.cpp",
    "decoder.cpp",
    "attention.cpp",
    "weights.cpp",
    "xnnpack.cpp",
    "choice.cpp",
    "gemv.cpp",
    "raw.cpp",
    "timing.cpp",
)
_COMPILERS = ("g++", "clang++", "c++")
# One multiply-add is one rounding, on every compiler; sums are never reordered.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-Wfatal-errors",
)
_LIMIT_S = 600


def library_name(platform: str) -> str:
    """Return the file name of the compiled library on ``sys.platform``."""
    return "libedgeflex_decoder.dylib" if platform == "darwin" else "libedgeflex_decoder.so"


def sources_digest() -> str:
    """Return a digest of the sources; the library carries it, so that a stale one is found when it is opened."""
    digest = hashlib.sha256()
    for path in sorted((*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h"))):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler(environment: Mapping[str, str]) -> list[str]:
    """Return the compiler's command: ``CXX``, else the first of g++, clang++ and c++ on the path.

    Raises:
        MissingDependencyError: There is none.
    """
    named = shlex.split(environment.get("CXX", ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        if shutil.which(command[0], path=environment.get("PATH")):
            return command
    tried = named[0] if named else ", ".join(_COMPILERS)
    raise MissingDependencyError(
        f"no C++ compiler was found (tried {tried}). The native decoder is C++17 and is compiled where it is "
        "installed. Install one, for example with: apt-get install g++; or name it in CXX."
    )


def compile_command(compiler: Sequence[str], output: Path, environment: Mapping[str, str]) -> list[str]:
    """Return the command that compiles all sources into ``output``.

    Without ``CXXFLAGS`` the code is made for this processor; with it, for what it says.
    """
    given = shlex.split(environment.get("CXXFLAGS", ""))
    machine = given or ["-march=native"]
    sources = [str(_FOLDER / name) for name in _SOURCES]
    return [*compiler, *_FLAGS, *machine, f"-DEFX_SOURCES={sources_digest()}", "-o", str(output), *sources, "-ldl"]


def build(output: Path) -> None:
    """Compile the native decoder into ``output``, which is replaced only when it worked.

    Raises:
        MissingDependencyError: No compiler was found.
        InputError: The folder of ``output`` cannot be written.
        DeviceError: The compiler failed.
    """
    command_head = find_compiler(os.environ)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".native-") as folder:
            made = Path(folder) / output.name
            _compile(compile_command(command_head, made, os.environ))
            made.replace(output)
    except OSError as error:
        raise InputError(
            f"{output} cannot be written: {error.strerror or error}. The native decoder is compiled there. "
            "Free space or give a folder that you may write to."
        ) from error


def _compile(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"the compiler did not end within {_LIMIT_S} s: {shlex.join(command)}. It usually takes some 20 s. "
            "Run this command by hand to see where it stays."
        ) from None
    if done.returncode:
        said = done.stderr.strip()[-2000:]
        raise DeviceError(
            f"the compiler failed with status {done.returncode}: {shlex.join(command)}\n{said}\n"
            "The native decoder needs C++17 (g++ 9 or clang++ 10 and later). Mend CXX and CXXFLAGS, then build again."
        )


def main(arguments: Sequence[str]) -> int:
    """Build into the given path, or beside the sources; return the exit code."""
    output = Path(arguments[0]) if arguments else _FOLDER / library_name(sys.platform)
    try:
        build(output)
    except EdgeflexError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{output}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
