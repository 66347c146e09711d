"""Hatchling's hook: compile the native decoder into wheels and editable installs.

In ``pyproject.toml``::

    [tool.hatch.build.hooks.custom]
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# EDGEFLEX_NATIVE=0 leaves the native decoder out, for boards without a compiler that run no decoders with it.
SKIPPED = "EDGEFLEX_NATIVE"


class NativeBuildHook(BuildHookInterface):
    """Compiles before the files of a wheel are collected; sdists carry sources only."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Compile, and mark the wheel as made for this platform.

        Raises:
            SystemExit: No compiler, or it failed; with a text that says what to do.
        """
        if self.target_name != "wheel" or os.environ.get(SKIPPED) == "0":
            return
        sys.path.insert(0, self.root)
        try:
            from edgeflex.errors import EdgeflexError  # on the path only now
            from edgeflex.native.build import build, library_name
        finally:
            sys.path.remove(self.root)
        inside = f"edgeflex/native/{library_name(sys.platform)}"
        try:
            build(Path(self.root) / inside)
        except EdgeflexError as error:
            raise SystemExit(f"edgeflex cannot be installed: {error}") from error
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
        build_data["artifacts"].append(inside)
