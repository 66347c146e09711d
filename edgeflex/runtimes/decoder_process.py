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
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import DeviceError
from edgeflex.runtimes import fresh
from edgeflex.runtimes.recorder import memory_now
from edgeflex.schema_moe import DecoderGraph

if TYPE_CHECKING:
    from typing import Any

_TIMEOUT_S = 300.0
# Tokens, events and statistics while answering; 1.5 to 2.4 MiB were seen with prompts of 256 tokens.
_ANSWERING_BYTES = 3 << 20


def process_bytes(graph: DecoderGraph, tokenizer: Path | None) -> int:
    """Return the anonymous bytes of a fresh process ready to load ``graph``'s weights, and room for answering.

    Raises:
        DeviceError: The process failed.
    """
    request = {
        "graph": graph.model_dump(mode="json"),
        "tokenizer": None if tokenizer is None else str(tokenizer.resolve()),
    }
    try:
        done = fresh.ask("edgeflex.runtimes.decoder_process", request, timeout_s=_TIMEOUT_S)
        return int(done.stdout) + _ANSWERING_BYTES
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise DeviceError(f"the memory of an idle runtime could not be measured: {error}. Check free memory.") from None


def _ready(request: dict[str, Any]) -> int:
    """Hold what a session holds beside weights, cache and buffers, and return the bytes."""
    from edgeflex.runtimes.decoder import DecoderSession
    from edgeflex.runtimes.movers import Mover
    from edgeflex.runtimes.native import Engine
    from edgeflex.runtimes.sampling import load_tokenizer
    from edgeflex.schema import FileEntry, Precision
    from edgeflex.schema_moe import MatrixRecord

    graph = DecoderGraph.model_validate(request["graph"])
    held: list[object] = [DecoderSession, graph]
    if request["tokenizer"] is not None:
        held.append(load_tokenizer(Path(request["tokenizer"])))
    shapes = graph.matrix_shapes() | {name: (1, shape[-1]) for name, shape in graph.small_shapes().items()}
    held.extend(
        MatrixRecord(name=name, precision=Precision.FP32, rows=rows, columns=columns, file=f"{name}.ptd", offset=0)
        for name, (rows, columns) in shapes.items()
    )
    held.extend(FileEntry(path=f"{name}.ptd", role="weights", size_bytes=0, sha256="0" * 64) for name in shapes)
    with (
        Engine(graph, context_tokens=2, chunk_tokens=1, threads=1),
        Mover(np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=np.uint8), direct=False),
    ):
        gc.collect()
        memory_now()  # its own first call allocates
        return memory_now().anonymous_bytes


def _main() -> int:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    result = _ready(json.load(sys.stdin))
    with answer:
        answer.write(str(result))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
