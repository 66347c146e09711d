"""Asks a module of this room in a process of its own, where memory is the runtime's and the model's alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Blocks from 128 KiB up come from the system one by one and return to it when freed. glibc would otherwise
# raise the limit after the first large free, and keep the pages.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}


def ask(module: str, request: Mapping[str, Any], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` with ``request`` as JSON on its standard input, and return how it ended.

    Raises:
        OSError: The process could not be started.
        subprocess.TimeoutExpired: It did not end in time.
    """
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH", "")) if part)
    return subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
        timeout=timeout_s,
        check=False,
    )


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a process wrote to standard error."""
    return (done.stderr.strip().splitlines() or ["no message"])[-1]
