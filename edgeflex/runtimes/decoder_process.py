"""What a process that runs decoders holds before any weight: interpreter, libraries, tokenizer, manifest, readers.

Run as ``python -m edgeflex.runtimes.decoder_process`` it reads a request as JSON from standard input and writes the
bytes. ``process_bytes`` starts that process.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import DeviceError
from edgeflex.runtimes import fresh
from edgeflex.runtimes.packed import unit_of
from edgeflex.runtimes.recorder import memory_now
from edgeflex.schema import FileEntry, Noun, Precision
from edgeflex.schema_moe import DecoderGraph, MatrixRecord

if TYPE_CHECKING:
    from typing import Any

    from edgeflex.runtimes.native import Engine

_TIMEOUT_S = 300.0
# Tokens, events, reads in flight and statistics while answering; 2 to 5.6 MiB were seen with prompts of 128 and 256
# tokens. A plan that fills its budget to the brim must not break it for less.
_ANSWERING_BYTES = 6 << 20


def process_bytes(graph: DecoderGraph, tokenizer: Path | None, *, backend: str = "executorch") -> int:
    """Return the anonymous bytes of a fresh process ready to load ``graph``'s weights, and room for answering.

    Args:
        graph: The decoder.
        tokenizer: Its tokenizer's file, where it has one.
        backend: Of the bundle to be: ``executorch``, ``onnx`` or ``tensorrt``.

    Raises:
        DeviceError: The process failed.
    """
    request = {
        "backend": backend,
        "graph": graph.model_dump(mode="json"),
        "tokenizer": None if tokenizer is None else str(tokenizer.resolve()),
    }
    try:
        done = fresh.ask("edgeflex.runtimes.decoder_process", request, timeout_s=_TIMEOUT_S)
        return int(done.stdout) + _ANSWERING_BYTES
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise DeviceError(f"the memory of an idle runtime could not be measured: {error}. Check free memory.") from None


class _Weights(Noun):
    """The part of a manifest that grows with the decoder."""

    matrices: tuple[MatrixRecord, ...]
    files: tuple[FileEntry, ...]


def _weights_text(graph: DecoderGraph) -> str:
    """Return the text of a manifest's weights: a file for every expert and for the dense part of every layer."""
    shapes = graph.matrix_shapes() | {name: (1, shape[-1]) for name, shape in graph.small_shapes().items()}
    paths = {name: f"weights/{unit_of(name)}.ptd" for name in shapes}
    matrices = [
        MatrixRecord(
            name=name, precision=Precision.INT8_DYNAMIC, rows=rows, columns=columns, file=paths[name], offset=0
        )
        for name, (rows, columns) in shapes.items()
    ]
    files = [FileEntry(path=path, role=path, size_bytes=0, sha256="0" * 64) for path in dict.fromkeys(paths.values())]
    return _Weights(matrices=tuple(matrices), files=tuple(files)).model_dump_json(indent=1)


def _ready(request: dict[str, Any]) -> int:
    """Hold what a session holds beside weights, cache and buffers, and return the bytes."""
    from edgeflex.runtimes.decoder import DecoderSession
    from edgeflex.runtimes.movers import Mover
    from edgeflex.runtimes.packed import index_of
    from edgeflex.runtimes.sampling import load_tokenizer

    graph = DecoderGraph.model_validate(request["graph"])
    held: list[object] = [DecoderSession, graph]
    text = _weights_text(graph)
    json.loads(text)  # as when a manifest is opened: what parsing leaves behind counts too
    weights = _Weights.model_validate_json(text)
    del text
    if request["tokenizer"] is not None:
        held.append(load_tokenizer(Path(request["tokenizer"])))
    with (
        _kernels(graph, request["backend"]) as engine,
        Mover(np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=np.uint8), direct=False),
    ):
        held.append(weights if engine is None else index_of(weights.matrices, engine))
        gc.collect()
        memory_now()  # its own first call allocates
        return memory_now().anonymous_bytes


def _kernels(graph: DecoderGraph, backend: str) -> AbstractContextManager[Engine | None]:
    """Return the native engine without weights, to be held open, or None with ONNX Runtime or TensorRT ready."""
    if backend == "tensorrt":
        from edgeflex.runtimes.tensorrt_build import created, open_machine

        created(open_machine().trt, "Runtime")  # loads the library, and the driver's part of this process
        return nullcontext()
    if backend == "onnx":
        from edgeflex.runtimes.onnx_stages import session_options

        session_options(1)  # loads the package
        return nullcontext()
    from edgeflex.runtimes.native import Engine

    return Engine(graph, context_tokens=2, chunk_tokens=1, threads=1)


def _main() -> int:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    result = _ready(json.load(sys.stdin))
    with answer:
        answer.write(str(result))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
