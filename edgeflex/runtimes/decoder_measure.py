"""Generations in fresh processes: time, memory and cache as the bundle and the runtime alone make them.

Run as ``python -m edgeflex.runtimes.decoder_measure`` it reads a request as JSON from standard input and writes a
``Reply`` as JSON. ``answer`` starts that process.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeflex.errors import (
    BundleError,
    DeviceError,
    EdgeflexError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
)
from edgeflex.runtimes import fresh
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.device_record import record_of
from edgeflex.runtimes.recorder import memory_now, reset_peak
from edgeflex.schema import Noun
from edgeflex.schema_gpu import DeviceRecord  # noqa: TC001 - pydantic resolves them
from edgeflex.schema_moe import DecoderRunStats  # noqa: TC001 - pydantic resolves them

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

_TIMEOUT_S = 3600.0
_KINDS = (InputError, UnsupportedError, MissingDependencyError, BundleError, DeviceError)
_ERRORS: dict[int, type[EdgeflexError]] = {kind.exit_code: kind for kind in _KINDS}
_STATUS = Path("/proc/self/status")


class Task(Noun):
    """One generation. With ``forced``, these tokens are the answer and the greedy ones are only noted."""

    prompt: tuple[int, ...]
    max_tokens: int
    forced: tuple[int, ...] = ()


class Reply(Noun):
    """What a process measured: one run and one row of greedy tokens per task.

    ``rise_bytes``: the highest rise of resident bytes, mapped files included; None where the system does not tell.
    ``device``: of a session on a device that answered.
    """

    runs: tuple[DecoderRunStats, ...] = ()
    greedy: tuple[tuple[int, ...], ...] = ()
    rise_bytes: int | None = None
    device: DeviceRecord | None = None
    records: int = 0
    damaged: tuple[str, ...] = ()
    error: str = ""
    code: int = 0


def answer(folder: Path, settings: Settings, tasks: Iterable[Task], device: str, *, check_store: bool = False) -> Reply:
    """Do the tasks in a fresh process; none only opens the bundle, which packs it where that is needed."""
    request = {
        "folder": str(folder.resolve()),
        "settings": asdict(settings),
        "tasks": [task.model_dump() for task in tasks],
        "device": device,
        "check_store": check_store,
    }
    try:
        done = fresh.ask("edgeflex.runtimes.decoder_measure", request, timeout_s=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"the measuring process did not end: {error}. Try it on an idle machine.") from None
    if done.returncode != 0 or not done.stdout:
        raise DeviceError(
            f"the measuring process ended with code {done.returncode}: {fresh.last_words(done)}. "
            "Check free memory and the bundle."
        )
    reply = Reply.model_validate_json(done.stdout)
    if reply.error:
        raise _ERRORS.get(reply.code, DeviceError)(reply.error)
    return reply


def _do(request: dict[str, Any]) -> Reply:
    """Do a request in this process."""
    chosen = request["settings"]
    if chosen["static"] is not None:
        chosen["static"] = [tuple(pair) for pair in chosen["static"]]
    tasks = [Task.model_validate(task) for task in request["tasks"]]
    session = DecoderSession.from_bundle(request["folder"], Settings(**chosen))
    gc.collect()
    start = memory_now()
    told = reset_peak()
    with session:
        text = session.tokenizer() if any(one.role == "tokenizer" for one in session.manifest.files) else None
        gc.disable()  # this process ends before garbage can matter
        answered = [_generated(session, task, request["device"]) for task in tasks]
        peak = memory_now().peak_resident_bytes
        damaged = _damaged(session) if request["check_store"] else []
        runs = tuple(stats for stats, _ in answered)
        device = record_of(session, runs) if runs and chosen["device"] is not None else None
        records = len(session.store.experts) + len(session.store.dense)
        del text  # held while answering, as by whoever answers text
    return Reply(
        runs=runs,
        greedy=tuple(tokens for _, tokens in answered),
        rise_bytes=None if peak is None or not told else max(0, peak - start.resident_bytes),
        device=device,
        records=records,
        damaged=tuple(damaged),
    )


def _generated(session: DecoderSession, task: Task, device: str) -> tuple[DecoderRunStats, tuple[int, ...]]:
    """Return one generation's record, with the most memory that was seen after any of its tokens."""
    greedy: list[int] = []

    def choose(logits: NDArray[np.float32]) -> int:
        greedy.append(int(logits.argmax()))
        return task.forced[len(greedy) - 1] if task.forced else greedy[-1]

    held = [_anonymous_bytes() for _ in session.generate(task.prompt, task.max_tokens, choose)]
    held = [bytes_ + session.unseen_bytes for bytes_ in held if bytes_] if all(held) else []
    stats = session.stats(device=device)
    if stats.stopped_by == "interrupt":
        raise KeyboardInterrupt
    own_bytes = stats.runtime_memory_bytes
    peak_bytes = max([stats.peak_memory_bytes, *(bytes_ - own_bytes for bytes_ in held)])
    return stats.model_copy(update={"peak_memory_bytes": peak_bytes, "held_bytes": tuple(held)}), tuple(greedy)


def _anonymous_bytes() -> int:
    """Return resident bytes that no file backs, cheaply enough for every token; 0 where the system hides them."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def _damaged(session: DecoderSession) -> list[str]:
    """Return the names of packed records that are not what the index says."""
    store = session.store
    records = [*(expert.record for expert in store.experts.values()), *(record for record, _ in store.dense)]
    damaged = []
    for record in records:
        with record.file.open("rb") as file:
            file.seek(record.offset)
            found = hashlib.sha256(file.read(record.size_bytes)).hexdigest()
        if found != record.sha256:
            damaged.append(record.name)
    return damaged


def _main() -> int:
    # Native code may write to standard output; only the reply belongs there.
    reply_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        reply = _do(json.load(sys.stdin))
    except EdgeflexError as error:
        reply = Reply(error=str(error), code=error.exit_code)
    with reply_to:
        reply_to.write(reply.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
