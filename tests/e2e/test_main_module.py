"""``python -m edgeflex`` keeps its exit code also when Ctrl-C falls into code that was made from a text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

FACTORY = """
import os, signal

def Network():
    exec("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
"""


def _listen_to_interrupts() -> None:
    # a test run in the background of a shell ignores them, and children inherit that
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_inside_generated_code_still_ends_with_130(tmp_path: Path):
    (tmp_path / "interrupting.py").write_text(FACTORY)
    line = [sys.executable, "-m", "edgeflex", "inspect", "interrupting:Network", "--input-size", "16"]
    options: dict[str, Any] = {
        "cwd": tmp_path,
        "env": {**os.environ},
        "capture_output": True,
        "text": True,
        "timeout": 120,
    }
    done = subprocess.run(line, check=False, preexec_fn=_listen_to_interrupts, **options)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith("edgeflex: interrupted")
