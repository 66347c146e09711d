"""The command line as a user meets it: in this process for speed, in another where signals matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from edgeflex.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on standard output; nothing else may stand there."""
        document: dict[str, Any] = json.loads(self.out)
        return document


@pytest.fixture
def edgeflex(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run one command line in this process."""

    def call(*line: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["edgeflex", *map(str, line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main()
        shown = capsys.readouterr()
        return Done(int(leaving.value.code or 0), shown.out, shown.err)

    return call


def _listen_to_interrupts() -> None:
    # a test run in the background of a shell ignores them, and children inherit that
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def start() -> Callable[[Sequence[object]], subprocess.Popen[str]]:
    """Start one command line in a process of its own."""

    def begin(line: Sequence[object], **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        command = [sys.executable, "-m", "edgeflex", *map(str, line)]
        return subprocess.Popen(command, env={**os.environ}, preexec_fn=_listen_to_interrupts, **pipes)  # noqa: PLW1509

    return begin
