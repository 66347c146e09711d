"""What this machine does with a decoder's shapes: matrices from memory, everything beside them, and the disk.

Matrices are timed one shape and precision at a time over as many copies as the decoder has weights, since those of a
large one come from memory and part of a small one's stays in the processor's caches; each is timed in two passes, far
apart, and the quicker stands, so that another program's spell is not taken for the machine. Within a decoded token
they take longer (each meets other memory, activations lie between) or, where small, less (experts share a quantised
row): how much is measured on experts of a short decoder of the same shape, beside the same matrices by themselves, and
is in the seconds of one row. What is beside matrices
(attention, norms, routing, the loop) is timed on that short decoder too, whose own matrices are taken off.
Reads go through the runtime's own readers, in records as large as an expert, with a decoder's computing between, and
spread over the whole time of measuring matrices.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
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
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from edgeflex.progress import Progress
    from edgeflex.schema_moe import DecoderGraph

    Clock = Callable[[], float]

ROWS_IN = (1, 4, 16, 64, 256)
_READ_BYTES = 256 << 20  # larger than what a disk's own cache gives back at once
_MOST_WALKED_BYTES = 128 << 20  # more than the last cache of any supported board
_WEIGHT_BYTES = {Precision.FP32: 4.0, Precision.INT8_DYNAMIC: 1.0, Precision.INT4_GROUP32: 0.5}
_PASSES = 2
_BATCHES = (1, 2, 4)  # experts that one event of a layer misses
_LEAST_TURNS, _MOST_TURNS = 3, 240
_LEAST_SLOPE = 0.01  # of the mean time of a record in the largest batch; less is the rounding of sums
_PAUSE_S = 2e-4  # about what a layer computes between two reads
_LAYERS = 2
_DECODED = 24
_ROUNDS = 15


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
    with ReadTimes(folder, _expert_bytes(graph), clock) as reads:
        with heard.task("Measuring matrices and reads", _PASSES * len(jobs)) as advance:
            for number, job in enumerate(_PASSES * jobs):
                (rows, columns), precision, rows_in, count = job
                total_bytes = walked[precision]
                took_s = time_matrix(precision, rows, columns, rows_in=rows_in, threads=count, total_bytes=total_bytes)
                seconds[job] = min(seconds[job], took_s)
                for _ in range(_share(reads.turns, number, _PASSES * len(jobs))):
                    reads.turn()
                advance(1)
        latency_s, rate = reads.line()
        first_rate = reads.checked_rate()
    in_token = _in_a_token(graph, threads[0])
    matrices = [
        MatrixRate(
            rows=rows,
            columns=columns,
            precision=precision,
            rows_in=rows_in,
            threads=count,
            seconds=took_s * (in_token if rows_in == 1 else 1.0),
        )
        for ((rows, columns), precision, rows_in, count), took_s in seconds.items()
    ]
    other_s, other_prefill_s = _beside_matrices(graph, threads[0], clock)
    return DecoderRates(
        device=device,
        matrices=tuple(matrices),
        read_bytes_per_s=rate,
        first_read_bytes_per_s=min(rate, first_rate),
        read_latency_s=latency_s,
        memory_bytes_per_s=memory_bytes_per_s,
        other_token_s=other_s,
        other_prefill_token_s=other_prefill_s,
        in_token=in_token,
        runtime_bytes=process_bytes(graph, tokenizer),
    )


def _share(whole: int, number: int, parts: int) -> int:
    """Return how many of ``whole`` fall to part ``number``, spread evenly."""
    return whole * (number + 1) // parts - whole * number // parts


def walked_bytes(graph: DecoderGraph, precision: Precision) -> int:
    """Return the bytes of weights that a matrix is timed over: all of the decoder's, or what no cache holds."""
    whole = sum(rows * columns for rows, columns in graph.matrix_shapes().values())
    return min(_MOST_WALKED_BYTES, int(whole * _WEIGHT_BYTES[precision]))


def _expert_bytes(graph: DecoderGraph) -> int:
    """Return the bytes that one int4 (or else int8) expert is read in."""
    inner, hidden = max(layer.expert_dim for layer in graph.layers), graph.hidden_dim
    precision = _smallest(graph)
    size = packed_bytes(precision, 2 * inner, hidden) + packed_bytes(precision, hidden, inner)
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _smallest(graph: DecoderGraph) -> Precision:
    """Return int4 where the experts' shapes take it, or else int8."""
    dims = {graph.hidden_dim, *(layer.expert_dim for layer in graph.layers if layer.routing is not None)}
    return Precision.INT4_GROUP32 if all(one % 32 == 0 for one in dims) else Precision.INT8_DYNAMIC


# --- matrices within a token --------------------------------------------------------------------------------


def _in_a_token(graph: DecoderGraph, threads: int) -> float:
    """Return how many times longer an expert's matrices take within a decoded token than by themselves."""
    short, precision = _short(graph), _smallest(graph)
    if not short.layers:
        return 1.0
    used = [
        shape
        for layer in short.layers
        if layer.routing is not None
        for shape in ((2 * layer.expert_dim, graph.hidden_dim), (graph.hidden_dim, layer.expert_dim))
        for _ in range(layer.routing.top_k)
    ]
    walked = walked_bytes(graph, precision)
    ratios = []
    with Engine(short, context_tokens=8, chunk_tokens=1, threads=threads) as engine:
        held = _random_weights(engine, short)
        turn = _Rotation(engine, graph, short, precision)
        for _ in range(_ROUNDS):
            alone = {
                shape: time_matrix(precision, *shape, rows_in=1, threads=threads, total_bytes=walked)
                for shape in set(used)
            }
            within = [turn.expert_s() for _ in range(_DECODED)]
            ratios.append(float(np.median(within)) / sum(alone[shape] for shape in used))
    del held  # lived as long as the engine
    return float(np.median(ratios))


class _Rotation:
    """Decodes with a short decoder whose experts lie elsewhere in each pass, as those of further layers do."""

    def __init__(self, engine: Engine, graph: DecoderGraph, short: DecoderGraph, precision: Precision) -> None:
        self._engine, self._precision, self._next = engine, precision, 0
        self._experts = [
            (one.index, expert) for one in short.layers for expert in range(one.routing.experts if one.routing else 0)
        ]
        self._stride = max(engine.expert_bytes(one.index, precision)[0] for one in short.layers)
        experts = sum(one.routing.experts for one in graph.layers if one.routing is not None)
        self._slots = max(1, min(experts, _MOST_WALKED_BYTES // self._stride))
        engine.arena(self._slots * self._stride)[:] = 0

    def expert_s(self) -> float:
        """Return the seconds in experts of one pass."""
        for number, (layer, expert) in enumerate(self._experts):
            slot = (self._next + number) % self._slots
            self._engine.bind(layer, expert, self._precision, slot * self._stride)
        self._next += len(self._experts)
        self._engine.times()
        self._engine.forward(np.zeros(1, np.int32), 0)
        self._engine.take_events()
        return self._engine.times().expert_s


# --- everything beside matrices ------------------------------------------------------------------------


def _beside_matrices(graph: DecoderGraph, threads: int, clock: Clock) -> tuple[float, float]:
    """Return seconds beside matrices of one decoded and one prompt token."""
    short = _short(graph)
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
    scale = len(graph.layers) / len(short.layers)
    return float(np.median(decoded)) * scale + answered_s, max(prefill_s, 0.0) / chunk * scale


def _short(graph: DecoderGraph) -> DecoderGraph:
    """Return a decoder of the first layers with experts, and few tokens to choose from."""
    sparse = [layer for layer in graph.layers if layer.routing is not None][:_LAYERS]
    return graph.model_copy(
        update={
            "layers": tuple(layer.model_copy(update={"index": index}) for index, layer in enumerate(sparse)),
            "vocabulary": min(graph.vocabulary, 512),
            "tied_embedding": False,
        }
    )


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


class ReadTimes:
    """Times records read from a file on the disk, in batches such as events miss them; a context.

    A disk's speed, and how soon an idle thread awakes, change within seconds. So turns are taken one by one,
    wherever the caller has time between other work, and the medians of all stand.

    Args:
        folder: On the disk; a file is written there and removed.
        record_bytes: Of one read.
        clock: Gives seconds.

    Raises:
        DeviceError: The disk is full or fails.
    """

    def __init__(self, folder: Path, record_bytes: int, clock: Clock = time.perf_counter) -> None:
        self._record_bytes, self._clock = record_bytes, clock
        turn_bytes = sum(_BATCHES) * record_bytes
        self.turns = int(np.clip(2 * _READ_BYTES // turn_bytes, _LEAST_TURNS, _MOST_TURNS))
        self._seconds: dict[int, list[float]] = {count: [] for count in _BATCHES}
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as kept:
            count = max(4, _READ_BYTES // record_bytes)
            self._path = kept.enter_context(_written(folder, count, record_bytes))
            order = np.random.default_rng(1).permutation(count)
            self._places, self._checked = cycle(order[: count // 2].tolist()), order[count // 2 :]
            memory = private_pages(4 * record_bytes)
            self._mover = kept.enter_context(Mover(memory, direct=takes_direct(self._path)))
            self._kept = kept.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    def turn(self) -> None:
        """Read one batch of each size, with a decoder's computing before each."""
        for count in _BATCHES:
            places = islice(self._places, count)
            records = [_record(self._path, place, self._record_bytes) for place in places]
            _compute(_PAUSE_S)
            self._seconds[count].append(_read_s(self._mover, records, self._clock))

    def line(self) -> tuple[float, float]:
        """Return latency in seconds and bytes per second, as all turns so far have it."""
        medians = {count: float(np.median(took)) for count, took in self._seconds.items()}
        return read_line(medians, self._record_bytes)

    def checked_rate(self) -> float:
        """Return bytes per second of records that were not read before and are checked as they come."""
        digests = _digests(self._path, self._checked, self._record_bytes)
        with self._path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        records = [_record(self._path, place, self._record_bytes, digest) for place, digest in digests.items()]
        return _rate(self._mover, records, self._clock)


@contextmanager
def _written(folder: Path, count: int, record_bytes: int) -> Iterator[Path]:
    """Write records of random bytes, which no disk can fold, and keep them out of the page cache."""
    block = np.random.default_rng(0).bytes(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".edgeflex-", suffix=".reads") as file:
        left = count * record_bytes
        while left > 0:
            left -= file.write(block[: min(left, len(block))])
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(file.name)


def _compute(seconds: float) -> None:
    """Keep this core busy: one that sleeps falls idle, and then its first read costs what awaking does."""
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass


def _digests(path: Path, places: NDArray[np.intp], record_bytes: int) -> dict[int, str]:
    found = {}
    with path.open("rb") as file:
        for place in places.tolist():
            file.seek(place * record_bytes)
            found[place] = hashlib.sha256(file.read(record_bytes)).hexdigest()
    return found


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
