"""What this machine does with a decoder's shapes: matrices from memory, everything beside them, and the disk.

Matrices are timed one shape and precision at a time over as many copies as the decoder has weights, since those of a
large one come from memory and part of a small one's stays in the processor's caches; each is timed in two passes, far
apart, and the quicker stands, so that another program's spell is not taken for the machine. What is beside them
(attention, norms, routing, the loop) is timed on a short decoder of the same shape, whose own matrices are taken off.
Reads go through the runtime's own readers, in records as large as an expert, with the pauses of a decoder between.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.progress import Silent
from edgeflex.runtimes.decoder_process import process_bytes
from edgeflex.runtimes.movers import BLOCK_BYTES, Mover, Record, takes_direct
from edgeflex.runtimes.native import Engine, pack, packed_bytes, time_matrix
from edgeflex.runtimes.pages import private_pages
from edgeflex.schema import Precision
from edgeflex.schema_moe import DECODER_PRECISIONS, DecoderRates, MatrixRate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeflex.progress import Progress
    from edgeflex.schema_moe import DecoderGraph

    Clock = Callable[[], float]

ROWS_IN = (1, 4, 16, 64, 256)
_READ_BYTES = 256 << 20  # larger than what a disk's own cache gives back at once
_MOST_WALKED_BYTES = 128 << 20  # more than the last cache of any supported board
_WEIGHT_BYTES = {Precision.FP32: 4.0, Precision.INT8_DYNAMIC: 1.0, Precision.INT4_GROUP32: 0.5}
_PASSES = 2
_BATCHES = (1, 2, 4)  # experts that one event of a layer misses
_BATCH_REPEATS = 24
_LEAST_SLOPE = 0.01  # of the mean time of a record in the largest batch; less is the rounding of sums
_PAUSE_S = 2e-4  # about what a layer computes between two reads
_LAYERS = 2
_DECODED = 24


def measure_rates(
    graph: DecoderGraph,
    folder: Path,
    *,
    device: str,
    tokenizer: Path | None = None,
    precisions: Sequence[Precision] = DECODER_PRECISIONS,
    threads: Sequence[int] = (1,),
    memory_bytes_per_s: float,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> DecoderRates:
    """Return the measured rates of a decoder on this machine.

    Args:
        graph: The decoder.
        folder: On the disk that experts will be read from; a file is written there and removed.
        device: Its name.
        tokenizer: Whose memory counts as the runtime's.
        precisions: To measure; one that does not fit a shape is left out for it.
        threads: Numbers of threads to measure with.
        memory_bytes_per_s: Measured rate of reading memory.
        progress: Told of every measurement.
        clock: Gives seconds.

    Raises:
        DeviceError: The disk is full or fails, or a kernel does.
    """
    heard = progress or Silent()
    jobs = [
        (shape, precision, rows_in, count)
        for shape in sorted(set(graph.matrix_shapes().values()))
        for precision in precisions
        if precision is not Precision.INT4_GROUP32 or shape[1] % 32 == 0
        for rows_in in ROWS_IN
        for count in threads
    ]
    walked = {precision: walked_bytes(graph, precision) for precision in precisions}
    seconds = dict.fromkeys(jobs, inf)
    with heard.task("Measuring matrices", _PASSES * len(jobs)) as advance:
        for job in _PASSES * jobs:
            (rows, columns), precision, rows_in, count = job
            total_bytes = walked[precision]
            took_s = time_matrix(precision, rows, columns, rows_in=rows_in, threads=count, total_bytes=total_bytes)
            seconds[job] = min(seconds[job], took_s)
            advance(1)
    matrices = [
        MatrixRate(rows=rows, columns=columns, precision=precision, rows_in=rows_in, threads=count, seconds=took_s)
        for ((rows, columns), precision, rows_in, count), took_s in seconds.items()
    ]
    other_s, other_prefill_s = _beside_matrices(graph, threads[0], clock)
    record_bytes = _expert_bytes(graph)
    rate, first_rate, latency_s = measure_reads(folder, record_bytes, clock)
    return DecoderRates(
        device=device,
        matrices=tuple(matrices),
        read_bytes_per_s=rate,
        first_read_bytes_per_s=min(rate, first_rate),
        read_latency_s=latency_s,
        memory_bytes_per_s=memory_bytes_per_s,
        other_token_s=other_s,
        other_prefill_token_s=other_prefill_s,
        runtime_bytes=process_bytes(graph, tokenizer),
    )


def walked_bytes(graph: DecoderGraph, precision: Precision) -> int:
    """Return the bytes of weights that a matrix is timed over: all of the decoder's, or what no cache holds."""
    whole = sum(rows * columns for rows, columns in graph.matrix_shapes().values())
    return min(_MOST_WALKED_BYTES, int(whole * _WEIGHT_BYTES[precision]))


def _expert_bytes(graph: DecoderGraph) -> int:
    """Return the bytes that one int4 (or else int8) expert is read in."""
    inner = max(layer.expert_dim for layer in graph.layers)
    hidden = graph.hidden_dim
    four = inner % 32 == 0 and hidden % 32 == 0
    precision = Precision.INT4_GROUP32 if four else Precision.INT8_DYNAMIC
    size = packed_bytes(precision, 2 * inner, hidden) + packed_bytes(precision, hidden, inner)
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


# --- everything beside matrices ------------------------------------------------------------------------


def _beside_matrices(graph: DecoderGraph, threads: int, clock: Clock) -> tuple[float, float]:
    """Return seconds beside matrices of one decoded and one prompt token."""
    sparse = [layer for layer in graph.layers if layer.routing is not None][:_LAYERS]
    short = graph.model_copy(
        update={
            "layers": tuple(layer.model_copy(update={"index": index}) for index, layer in enumerate(sparse)),
            "vocabulary": min(graph.vocabulary, 512),
            "tied_embedding": False,
        }
    )
    context = min(graph.context_tokens, 512)
    chunk = min(128, context // 2)
    with Engine(short, context_tokens=context, chunk_tokens=chunk, threads=threads) as engine:
        held = _random_weights(engine, short)
        tokens = np.arange(context, dtype=np.int32) % short.vocabulary
        engine.forward(tokens[:chunk], 0)
        engine.times()
        start = clock()
        engine.forward(tokens[chunk : 2 * chunk], chunk)
        prefill_s = clock() - start - _in_matrices(engine)
        position, decoded = 2 * chunk - 1, []
        for _ in range(_DECODED):
            start = clock()
            engine.forward(tokens[:1], position)
            decoded.append(clock() - start - _in_matrices(engine))
            engine.take_events()
        answered_s = _answering_s(engine, graph, clock)
    del held  # lived as long as the engine
    scale = len(graph.layers) / len(sparse)
    return float(np.median(decoded)) * scale + answered_s, max(prefill_s, 0.0) / chunk * scale


def _answering_s(engine: Engine, graph: DecoderGraph, clock: Clock) -> float:
    """Return the seconds of taking a token from the logits: the loop around the engine, whatever the layers."""
    logits = np.zeros(graph.vocabulary, np.float32)
    seconds = []
    for _ in range(_DECODED):
        start = clock()
        engine.logits()
        engine.times()
        int(logits.copy().argmax())
        seconds.append(clock() - start)
    return float(np.median(seconds))


def _in_matrices(engine: Engine) -> float:
    times = engine.times()
    return times.dense_s + times.expert_s


def _random_weights(engine: Engine, graph: DecoderGraph) -> list[NDArray[np.uint8]]:
    """Give the engine numbers of the right shapes; return what must outlive it."""
    rng = np.random.default_rng(0)
    held: list[NDArray[np.uint8]] = []
    for name, shape in graph.small_shapes().items():
        engine.set_small(name, rng.normal(scale=0.1, size=shape).astype(np.float32))
    for name, (rows, columns) in graph.matrix_shapes().items():
        if ".experts." in name:
            continue
        codes = rng.integers(1, 255, size=rows * columns).astype(np.uint8)
        scales = np.full(rows, 1e-3, np.float32).view(np.uint8)
        if name == "embedding":
            engine.set_embedding(Precision.INT8_DYNAMIC, codes.data, scales.data)
            held += [codes, scales]
            continue
        held.append(private_pages(packed_bytes(Precision.INT8_DYNAMIC, rows, columns)))
        pack(Precision.INT8_DYNAMIC, rows, columns, codes.data, scales.data, held[-1].data)
        engine.set_matrix(name, Precision.INT8_DYNAMIC, rows, columns, held[-1])
    arena = engine.arena(engine.expert_bytes(0, Precision.INT8_DYNAMIC)[0])
    arena[:] = 0
    for one in graph.layers:
        for expert in range(0 if one.routing is None else one.routing.experts):
            engine.bind(one.index, expert, Precision.INT8_DYNAMIC, 0)
    return held


# --- reads ------------------------------------------------------------------------------------------------


def measure_reads(folder: Path, record_bytes: int, clock: Clock = time.perf_counter) -> tuple[float, float, float]:
    """Return bytes per second of records in flight, plain and checked, and the seconds that any read begins with.

    Args:
        folder: On the disk; a file is written there and removed.
        record_bytes: Of one read.
        clock: Gives seconds.

    Raises:
        DeviceError: The disk is full or fails.
    """
    count = max(4, _READ_BYTES // record_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    block = np.random.default_rng(0).bytes(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".edgeflex-", suffix=".reads") as file:
        left = count * record_bytes
        while left > 0:
            left -= file.write(block[: min(left, len(block))])
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        path = Path(file.name)
        order = np.random.default_rng(1).permutation(count)
        half = max(2, count // 2)
        digests = _digests(path, order[half:], record_bytes)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        memory = private_pages(4 * record_bytes)
        with Mover(memory, direct=takes_direct(path)) as mover:
            places = _batches(order[:half], record_bytes)
            seconds: dict[int, list[float]] = {count: [] for count in _BATCHES}
            for batch in places:
                time.sleep(_PAUSE_S)
                records = [_record(path, int(place), record_bytes) for place in batch]
                seconds[len(batch)].append(_read_s(mover, records, clock))
            latency_s, rate = read_line(
                {count: float(np.median(took)) for count, took in seconds.items()}, record_bytes
            )
            checked = [_record(path, place, record_bytes, digest) for place, digest in digests.items()]
            first_rate = _rate(mover, checked, clock)
    return rate, first_rate, latency_s


def _digests(path: Path, places: NDArray[np.intp], record_bytes: int) -> dict[int, str]:
    found = {}
    with path.open("rb") as file:
        for place in places.tolist():
            file.seek(place * record_bytes)
            found[place] = hashlib.sha256(file.read(record_bytes)).hexdigest()
    return found


def _batches(order: NDArray[np.intp], record_bytes: int) -> list[NDArray[np.intp]]:
    """Return which records are read together: batches of each size in turn, about ``_READ_BYTES`` in all."""
    turn_bytes = sum(_BATCHES) * record_bytes
    turns = int(np.clip(2 * _READ_BYTES // turn_bytes, 3, _BATCH_REPEATS))
    ends = np.cumsum(np.tile(_BATCHES, turns))
    return [
        np.take(order, np.arange(end - count, end), mode="wrap")
        for end, count in zip(ends, _BATCHES * turns, strict=True)
    ]


def read_line(seconds: Mapping[int, float], record_bytes: int) -> tuple[float, float]:
    """Return latency in seconds and bytes per second of the line through what batches of records took.

    Args:
        seconds: By number of records read at once, at least two numbers.
        record_bytes: Of one record.
    """
    counts, took = np.array(list(seconds), float), np.array(list(seconds.values()))
    slope, latency_s = np.polyfit(counts, took, 1)
    # noise, or reads that wait for each other no more: the line through no latency at all
    if latency_s < 0.0 or slope < _LEAST_SLOPE * took.max() / counts.max():
        return 0.0, record_bytes * float(counts @ counts) / float(counts @ took)
    return float(latency_s), record_bytes / float(slope)


def _rate(mover: Mover, records: Sequence[Record], clock: Clock) -> float:
    """Read records in batches of up to four, one behind the other as a prompt's are, and return the median rate."""
    batches = [records[first : first + 4] for first in range(0, len(records), 4)]
    return float(np.median([sum(one.size_bytes for one in batch) / _read_s(mover, batch, clock) for batch in batches]))


def _read_s(mover: Mover, batch: Sequence[Record], clock: Clock) -> float:
    """Return the seconds of reading records at once."""
    start = clock()
    reads = [
        mover.submit(record, slot * record.size_bytes, check=bool(record.sha256)) for slot, record in enumerate(batch)
    ]
    for read in reads:
        read.wait()
    return clock() - start


def _record(path: Path, place: int, record_bytes: int, sha256: str = "") -> Record:
    return Record("record", path, place * record_bytes, record_bytes, sha256)
