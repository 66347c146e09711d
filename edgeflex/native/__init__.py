"""The native decoder: C++ that drives ExecuTorch's kernels, compiled where it is installed.

Sources lie in this folder, the compiled library beside them. ``edgeflex.runtimes.native`` calls it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgeflex.errors import MissingDependencyError

_FOLDER = Path(__file__).parent
BUILD_COMMAND = "python -m edgeflex.native.build"


def library_path() -> Path:
    """Return where the compiled library lies.

    Raises:
        MissingDependencyError: It is not there.
    """
    # Imported here so that `python -m edgeflex.native.build` does not find itself imported already.
    from edgeflex.native.build import library_name

    path = _FOLDER / library_name(sys.platform)
    if not path.is_file():
        raise MissingDependencyError(
            f"the native library of decoders is not built: {path} is absent. Decoders run only with it. "
            f"Install a C++17 compiler (g++ or clang++), then build it: {BUILD_COMMAND}"
        )
    return path
