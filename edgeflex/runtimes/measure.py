"""The bytes that a bundle adds to a process, measured in a fresh one.

Run as ``python -m edgeflex.runtimes.measure`` it reads ``{"bundle": ..., "threads": ..., "inferences": ...}``
from standard input and writes a ``ModelMemory`` as JSON. ``measure_memory`` starts that process.

The process loads the bundle twice. The first time pays what a runtime pays once (thread pool, kernel tables)
and is dropped; what is held then is the runtime's own. The second time is the model.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeflex.errors import (
    BundleError,
    DeviceError,
    EdgeflexError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
)
from edgeflex.runtimes import fresh
from edgeflex.runtimes.recorder import memory_now, reset_peak
from edgeflex.schema import Noun

if TYPE_CHECKING:
    from edgeflex.bundle import Bundle

_TIMEOUT_S = 600.0
# What the other process says as it is; anything else is a failure of the measurement.
_SAID: dict[int, type[EdgeflexError]] = {
    kind.exit_code: kind for kind in (BundleError, InputError, MissingDependencyError, UnsupportedError)
}


class ModelMemory(Noun):
    """Bytes of one bundle in a process of its own.

    ``model_bytes`` are held with every segment loaded and run; ``load_peak_bytes`` is the highest resident rise
    on the way there, pages of the program file included, None where the system does not tell.
    """

    runtime_bytes: int
    model_bytes: int
    load_peak_bytes: int | None


def measure_memory(bundle: Bundle, threads: int = 1, *, inferences: int = 5) -> ModelMemory:
    """Return what ``bundle`` adds to a fresh process.

    Args:
        bundle: A checked bundle.
        threads: Threads of the pool.
        inferences: Passes through all segments before memory is read.

    Raises:
        DeviceError: The process failed or did not end.
    """
    request = {"bundle": str(bundle.path.resolve()), "threads": threads, "inferences": inferences}
    try:
        done = fresh.ask("edgeflex.runtimes.measure", request, timeout_s=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"the memory measurement did not end: {error}. Try it on an idle machine.") from None
    if done.returncode in _SAID:
        raise _SAID[done.returncode](fresh.last_words(done))
    if done.returncode != 0:
        raise DeviceError(
            f"the memory measurement ended with code {done.returncode}: {fresh.last_words(done)}. "
            "Check free memory and the bundle."
        )
    return ModelMemory.model_validate_json(done.stdout)


def _held(path: Path, threads: int, inferences: int) -> ModelMemory:
    """Load and run the bundle once, and return what it held."""
    import numpy as np

    from edgeflex.bundle import open_bundle
    from edgeflex.runtimes import open_session

    bundle = open_bundle(path)
    shape = bundle.manifest.segments[0].input_shape
    x = np.zeros(shape, dtype=np.float32)
    never = (None,) * len(bundle.manifest.segments)
    session = open_session(bundle, threads=threads)
    start = memory_now()
    told = reset_peak()
    with session:
        for _ in range(inferences):
            session.infer(x, never)
        now = memory_now()
    peak = now.peak_resident_bytes
    return ModelMemory(
        runtime_bytes=start.anonymous_bytes,
        model_bytes=now.above(start),
        load_peak_bytes=None if peak is None or not told else max(0, peak - start.resident_bytes),
    )


def _main() -> int:
    # The runtime's C++ side may write to standard output; only the answer belongs there.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    path, threads, inferences = Path(request["bundle"]), request["threads"], request["inferences"]
    try:
        _held(path, threads, inferences)
        gc.collect()
        memory_now()  # its own first call allocates
        result = _held(path, threads, inferences)
    except EdgeflexError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    with answer:
        answer.write(result.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
