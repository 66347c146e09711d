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
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from edgeflex.errors import (
    BundleError,
    DeviceError,
    EdgeflexError,
    InputError,
    MissingDependencyError,
    UnsupportedError,
)
from edgeflex.registry import GPU_BACKENDS
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


class DeviceMemory(NamedTuple):
    """What a session took of a GPU's memory.

    Attributes:
        model_bytes: Less free than before it was loaded, and no less than is known to be taken.
        unified: The GPU's memory is the processor's.
    """

    model_bytes: int
    unified: bool


@runtime_checkable
class OnDevice(Protocol):
    """A session that knows what it took of a GPU."""

    def device_memory(self) -> DeviceMemory:
        """Return what it took; it is open."""


class ModelMemory(Noun):
    """Bytes of one bundle in a process of its own.

    ``model_bytes`` are held with every segment loaded and run; ``load_peak_bytes`` is the highest resident rise
    on the way there, pages of the program file included, None where the system does not tell. ``device_bytes`` is what
    it took of a GPU's memory, None where it runs on none; with ``unified`` that is the process's memory too.
    """

    runtime_bytes: int
    model_bytes: int
    load_peak_bytes: int | None
    device_bytes: int | None = None
    unified: bool | None = None


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
        held = session.device_memory() if isinstance(session, OnDevice) else None
    peak = now.peak_resident_bytes
    return ModelMemory(
        runtime_bytes=start.anonymous_bytes,
        model_bytes=now.above(start),
        load_peak_bytes=None if peak is None or not told else max(0, peak - start.resident_bytes),
        device_bytes=None if held is None else held.model_bytes,
        unified=None if held is None else held.unified,
    )


def measured_here(path: Path, threads: int, inferences: int) -> ModelMemory:
    """Load and run a bundle twice in this process, and return what it held the second time.

    Args:
        path: The bundle.
        threads: Threads of the pool.
        inferences: Passes through all segments.

    Raises:
        EdgeflexError: The bundle cannot be opened or run here.
    """
    with _kept_device(path):
        _held(path, threads, inferences)
        gc.collect()
        memory_now()  # its own first call allocates
        return _held(path, threads, inferences)


def _kept_device(path: Path) -> AbstractContextManager[object]:
    """Return what keeps a GPU's libraries loaded from the first time to the second, for bundles that run on one.

    Where there is no GPU, loading says so, with what to do.
    """
    from edgeflex.bundle import open_bundle

    if open_bundle(path).manifest.backend not in GPU_BACKENDS:
        return nullcontext()
    from edgeflex.runtimes.cuda_driver import CudaContext

    try:
        return closing(CudaContext())
    except DeviceError:
        return nullcontext()


def _main() -> int:
    # The runtime's C++ side may write to standard output; only the answer belongs there.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    path, threads, inferences = Path(request["bundle"]), request["threads"], request["inferences"]
    try:
        result = measured_here(path, threads, inferences)
    except EdgeflexError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    with answer:
        answer.write(result.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
