"""What this machine does with a decoder's shapes: matrices from memory, everything beside them, and the disk.

Matrices are timed one shape and precision at a time over as many copies as the decoder has weights, since those of a
large one come from memory and part of a small one's stays in the processor's caches; each is timed in two passes, far
apart, and the quicker stands, so that another program's spell is not taken for the machine. Within a decoded token
they take longer (each meets other memory, activations lie between) or less: a small decoder's dense part is used by
every token and stays in the processor's caches, and so do experts that tokens choose again; and experts share a
quantised row. How much is measured, apart for the dense part and for experts, on a decoder of the same shapes whose
experts lie where those of the recorded tokens would, beside the same matrices by themselves. What is beside matrices
(attention, norms, routing, the loop) is timed on a shorter one, whose own matrices are taken off.
Reads (see ``read_times``) are spread over the whole time of measuring matrices; what the runtime does beside reading
when experts are missing is timed on a short decoder again, and is in the latency.
"""

from __future__ import annotations

import os
import time
from math import ceil, inf
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from edgeflex.progress import Silent
from edgeflex.runtimes.decoder_process import process_bytes
from edgeflex.runtimes.expert_cache import ExpertCache, union_of
from edgeflex.runtimes.movers import BLOCK_BYTES, Mover, Record
from edgeflex.runtimes.native import Engine, pack, packed_bytes, time_matrix
from edgeflex.runtimes.packed import Expert, PackedStore
from edgeflex.runtimes.pages import private_pages
from edgeflex.runtimes.policies import make_policy
from edgeflex.runtimes.read_times import ReadTimes
from edgeflex.runtimes.residency import Pass, Residency
from edgeflex.schema import Precision
from edgeflex.schema_moe import DECODER_PRECISIONS, DecoderRates, MatrixRate, TokenRatio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from edgeflex.progress import Progress
    from edgeflex.runtimes.trace import Trace
    from edgeflex.schema_moe import DecoderGraph

    Clock = Callable[[], float]

ROWS_IN = (1, 4, 16, 64, 256)
_MOST_WALKED_BYTES = 128 << 20  # more than the last cache of any supported board
_WEIGHT_BYTES = {Precision.FP32: 4.0, Precision.INT8_DYNAMIC: 1.0, Precision.INT4_GROUP32: 0.5}
_PASSES = 2
_LAYERS = 2
_PARTS = ("gate_up", "down")
_DECODED = 24
_ROUNDS = 15


def measure_rates(
    graph: DecoderGraph,
    folder: Path,
    trace: Trace,
    *,
    device: str,
    tokenizer: Path | None = None,
    precisions: Sequence[Precision] = DECODER_PRECISIONS,
    threads: Sequence[int] = (1,),
    rows_in: Sequence[int] = ROWS_IN,
    memory_bytes_per_s: float,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> DecoderRates:
    """Return the measured rates of a decoder on this machine.

    Args:
        graph: The decoder.
        folder: On the disk that experts will be read from; a file is written there and removed.
        trace: Of the decoder on text; its decoded tokens say which experts follow each other.
        device: Its name.
        tokenizer: Whose memory counts as the runtime's.
        precisions: To measure; one that does not fit a shape is left out for it.
        threads: Numbers of threads to measure with.
        rows_in: Numbers of input rows to measure with; a decoded token needs 1.
        memory_bytes_per_s: Measured rate of reading memory.
        progress: Told of every measurement.
        clock: Gives seconds.

    Raises:
        DeviceError: The disk is full or fails, or a kernel does.
    """
    heard = progress or Silent()
    jobs = [
        (shape, precision, rows, count)
        for shape in sorted(set(graph.matrix_shapes().values()))
        for precision in precisions
        if _taken(precision, shape[1]) is precision
        for rows in rows_in
        for count in threads
    ]
    walked = {precision: walked_bytes(graph, precision) for precision in precisions}
    seconds = dict.fromkeys(jobs, inf)
    with ReadTimes(folder, _expert_bytes(graph), clock) as reads:
        with heard.task("Measuring matrices and reads", _PASSES * len(jobs)) as advance:
            for number, job in enumerate(_PASSES * jobs):
                shape, precision, rows, count = job
                total_bytes = walked[precision]
                took_s = time_matrix(precision, *shape, rows_in=rows, threads=count, total_bytes=total_bytes)
                seconds[job] = min(seconds[job], took_s)
                for _ in range(_share(reads.turns, number, _PASSES * len(jobs))):
                    reads.turn()
                advance(1)
        latency_s, rate = reads.line()
        first_rate = reads.checked_rate()
    pairs = [(precision, count) for precision in precisions for count in threads if _experts_take(graph, precision)]
    with heard.task("Measuring matrices within a token", len(pairs)) as advance:
        ratios = []
        for precision, count in pairs:
            ratios.append(_ratio(graph, trace, precision, count, walked[precision]))
            advance(1)
    matrices = [
        MatrixRate(
            rows=shape[0],
            columns=shape[1],
            precision=precision,
            rows_in=rows,
            threads=count,
            seconds=took_s,
            packed_bytes=packed_bytes(precision, *shape),
        )
        for (shape, precision, rows, count), took_s in seconds.items()
    ]
    other_s, other_prefill_s = _beside_matrices(graph, threads[0], clock)
    # what an event costs because something is missing, whether or not the disk is quick
    latency_s += _missing_s(graph, threads[0], clock)
    return DecoderRates(
        device=device,
        matrices=tuple(matrices),
        read_bytes_per_s=rate,
        first_read_bytes_per_s=min(rate, first_rate),
        read_latency_s=latency_s,
        memory_bytes_per_s=memory_bytes_per_s,
        other_token_s=other_s,
        other_prefill_token_s=other_prefill_s,
        token_ratios=tuple(ratios),
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
    return Precision.INT4_GROUP32 if _experts_take(graph, Precision.INT4_GROUP32) else Precision.INT8_DYNAMIC


def _experts_take(graph: DecoderGraph, precision: Precision) -> bool:
    widths = {graph.hidden_dim, *(layer.expert_dim for layer in graph.layers if layer.routing is not None)}
    return all(_taken(precision, columns) is precision for columns in widths)


def _taken(precision: Precision, columns: int) -> Precision:
    """Return the precision, or int8 where rows of so many columns do not come out even in its groups."""
    return Precision.INT8_DYNAMIC if columns % (precision.group_size or 1) else precision


# --- matrices within a token --------------------------------------------------------------------------------


def _ratio(graph: DecoderGraph, trace: Trace, precision: Precision, threads: int, total_bytes: int) -> TokenRatio:
    """Return how many times longer matrices take within a decoded token than by themselves, over ``total_bytes``."""
    short = _walking(graph, precision)
    if not short.layers:
        return TokenRatio(precision=precision, threads=threads, dense=1.0, experts=1.0)
    shapes = short.matrix_shapes()
    dense = [shape for name, shape in shapes.items() if ".experts." not in name and name != "embedding"]
    chosen = {layer.index: layer.routing.top_k for layer in short.layers if layer.routing is not None}
    experts = [shapes[f"layers.{layer}.experts.0.{part}"] for layer, count in chosen.items() for part in _PARTS * count]
    found = []
    with Engine(short, context_tokens=8, chunk_tokens=1, threads=threads) as engine:
        held = _random_weights(engine, short, precision)
        retold = _Retold(engine, short, trace, precision)
        for _ in range(_ROUNDS):
            alone_s = {
                shape: time_matrix(
                    _taken(precision, shape[1]), *shape, rows_in=1, threads=threads, total_bytes=total_bytes
                )
                for shape in {*dense, *experts}
            }
            within_s = np.median([retold.pass_s() for _ in range(_DECODED)], axis=0)
            found.append(within_s / [sum(alone_s[shape] for shape in used) for used in (dense, experts)])
    del held  # lived as long as the engine
    in_dense, in_experts = np.median(found, axis=0).tolist()
    return TokenRatio(precision=precision, threads=threads, dense=in_dense, experts=in_experts)


def _walking(graph: DecoderGraph, precision: Precision) -> DecoderGraph:
    """Return a decoder of as many layers, and tokens to choose from, as no cache holds the dense part of."""
    table = graph.vocabulary * graph.hidden_dim * _WEIGHT_BYTES[precision]
    short = _short(graph, 1, round(graph.vocabulary * min(1.0, _MOST_WALKED_BYTES / 4 / table)))
    dense = [shape for name, shape in short.matrix_shapes().items() if name[0] == "l" and ".experts." not in name]
    layer_bytes = _WEIGHT_BYTES[precision] * sum(rows * columns for rows, columns in dense)
    return _short(graph, max(_LAYERS, ceil(_MOST_WALKED_BYTES / max(1.0, layer_bytes))), short.vocabulary)


class _Retold:
    """Decodes one token again and again, its experts lying where those of a trace's tokens would.

    The layers of a decoder that is shorter than the whole stand for the next ones of the trace in each pass.
    """

    def __init__(self, engine: Engine, short: DecoderGraph, trace: Trace, precision: Precision) -> None:
        self._engine, self._precision, self._next = engine, precision, 0
        decoded = [event for event in trace.events if event.decoding] or trace.events
        self._told = [
            [event.layer * trace.experts + expert for expert in event.experts]
            for event in sorted(decoded, key=attrgetter("step", "layer"))
        ]
        self._stride = max(engine.expert_bytes(layer, precision)[0] for layer in range(len(short.layers)))
        self._slots = max(1, min(trace.layers * trace.experts, _MOST_WALKED_BYTES // self._stride))
        engine.arena(self._slots * self._stride)[:] = 0
        _bind_all(engine, short, precision)
        engine.forward(np.zeros(1, np.int32), 0)
        self._chosen = [(event.layer, event.experts[0].tolist()) for event in engine.take_events()]

    def pass_s(self) -> tuple[float, float]:
        """Return the seconds in dense matrices and in experts of one pass."""
        for layer, chosen in self._chosen:
            told = self._told[self._next % len(self._told)]
            for mine, theirs in zip(chosen, told, strict=False):
                self._engine.bind(layer, mine, self._precision, theirs % self._slots * self._stride)
            self._next += 1
        self._engine.times()
        self._engine.forward(np.zeros(1, np.int32), 0)
        self._engine.logits()
        self._engine.take_events()
        took = self._engine.times()
        return took.dense_s, took.expert_s


# --- everything beside matrices ------------------------------------------------------------------------


def _beside_matrices(graph: DecoderGraph, threads: int, clock: Clock) -> tuple[float, float]:
    """Return seconds beside matrices of one decoded and one prompt token."""
    short = _short(graph, _LAYERS, 512)
    context = min(graph.context_tokens, 512)
    chunk = min(128, context // 2)
    with Engine(short, context_tokens=context, chunk_tokens=chunk, threads=threads) as engine:
        held = _random_weights(engine, short, Precision.INT8_DYNAMIC)
        tokens = np.arange(context, dtype=np.int32) % short.vocabulary
        engine.forward(tokens[:chunk], 0)
        engine.times()
        start = clock()
        engine.forward(tokens[chunk : 2 * chunk], chunk)
        prefill_s = clock() - start - _in_matrices(engine)
        position, decoded = 2 * chunk - 1, []
        engine.take_events()
        for _ in range(_DECODED):
            start = clock()
            engine.forward(tokens[:1], position)
            decoded.append(clock() - start - _in_matrices(engine))
        told_s = _telling_s(engine, short, clock) / _DECODED
        answered_s = _answering_s(engine, graph, clock)
    del held  # lived as long as the engine
    scale = len(graph.layers) / len(short.layers)
    return (float(np.median(decoded)) + told_s) * scale + answered_s, max(prefill_s, 0.0) / chunk * scale


def _short(graph: DecoderGraph, layers: int, vocabulary: int) -> DecoderGraph:
    """Return a decoder of so many of the first layers with experts, and tokens to choose from, at most."""
    sparse = [layer for layer in graph.layers if layer.routing is not None][:layers]
    return graph.model_copy(
        update={
            "layers": tuple(layer.model_copy(update={"index": index}) for index, layer in enumerate(sparse)),
            "vocabulary": min(graph.vocabulary, vocabulary),
            "tied_embedding": False,
        }
    )


def _telling_s(engine: Engine, short: DecoderGraph, clock: Clock) -> float:
    """Return the seconds of telling a cache in which everything is resident what was chosen since the last call."""
    most = max(one.routing.experts for one in short.layers if one.routing is not None)
    sizes = np.ones((len(short.layers), most), np.int64)
    cache = ExpertCache(sizes.size, sizes, make_policy("enu", layers=len(sizes), experts=most))
    for layer in range(len(short.layers)):
        cache.event(0, layer, range(most), decoding=True)
    start = clock()
    for step, (layer, experts, _) in enumerate(engine.take_events(), 1):
        cache.event(step, layer, union_of(experts, None)[0], decoding=True)
    return clock() - start


class _AtOnce:
    """Stands where readers do, for the time of all that is done about a missing expert but to read it."""

    mode = "direct"
    done = True

    def __init__(self, arena: NDArray[np.uint8], *, direct: bool) -> None:
        del arena, direct

    def submit(self, record: Record, offset: int, *, check: bool) -> Self:
        del record, offset, check
        return self

    def wait(self) -> None:
        """Do nothing: it is there."""

    def close(self) -> None:
        """Do nothing: no thread was begun."""


def _missing_s(graph: DecoderGraph, threads: int, clock: Clock) -> float:
    """Return the seconds that an event costs because experts are missing, beside reading and computing them."""
    short, precision = _short(graph, _LAYERS, 512), _smallest(graph)
    if not short.layers:
        return 0.0
    layers = [one.index for one in short.layers]
    seconds: dict[int, list[float]] = {}
    with Engine(short, context_tokens=8, chunk_tokens=1, threads=threads) as engine:
        held = _random_weights(engine, short, Precision.INT8_DYNAMIC)
        store = _store(short, engine, precision)
        of_a_token = sum(one.routing.top_k for one in short.layers if one.routing) * int(store.sizes.max())
        half = min(int(store.sizes.sum()) // 2, _MOST_WALKED_BYTES) // BLOCK_BYTES * BLOCK_BYTES
        policy = make_policy("enu", layers=len(layers), experts=store.sizes.shape[1])
        cache = ExpertCache(max(half, of_a_token), store.sizes, policy)
        residency = Residency(engine, store, cache, layers, mover=cast("Callable[..., Mover]", _AtOnce))
        for number in range(8 * _DECODED):
            # each token twice, so that some lack nothing however small the cache
            missed, took_s = _served(engine, residency, number // 2 % short.vocabulary, number, clock)
            seconds.setdefault(missed, []).append(took_s)
        residency.close()
    del held  # lived as long as the engine
    if len(seconds) == 1:
        return 0.0
    medians = {missed: float(np.median(took)) for missed, took in seconds.items()}
    slope, _ = np.polyfit(list(medians), list(medians.values()), 1, w=[len(took) ** 0.5 for took in seconds.values()])
    return max(0.0, float(slope))


def _store(short: DecoderGraph, engine: Engine, precision: Precision) -> PackedStore:
    """Return the books of a store with all experts in one precision, and no file."""
    experts, most = {}, max(one.routing.experts for one in short.layers if one.routing is not None)
    sizes = np.zeros((len(short.layers), most), np.int64)
    for one in short.layers:
        for number in range(one.routing.experts if one.routing else 0):
            sizes[one.index, number] = engine.expert_bytes(one.index, precision)[0]
            record = Record("expert", Path(os.devnull), 0, int(sizes[one.index, number]), "")
            experts[one.index, number] = Expert(record, precision)
    return PackedStore(Path(), sizes, experts, ())


def _served(engine: Engine, residency: Residency, token: int, number: int, clock: Clock) -> tuple[int, float]:
    """Decode a token; return how many events lacked experts, and the seconds beside matrices."""
    missed = 0
    engine.times()
    start = clock()
    residency.begin(Pass(0, number, 0, decoding=True))
    missing = engine.forward(np.full(1, token, np.int32), 0)
    while missing is not None:
        missed += 1
        residency.serve(missing)
        missing = engine.resume()
    residency.settle()
    return missed, clock() - start - _in_matrices(engine)


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


def _random_weights(engine: Engine, graph: DecoderGraph, precision: Precision) -> list[NDArray[np.uint8]]:
    """Give the engine numbers of the right shapes; return what must outlive it."""
    rng = np.random.default_rng(0)
    held: list[NDArray[np.uint8]] = []
    for name, shape in graph.small_shapes().items():
        engine.set_small(name, rng.normal(scale=0.1, size=shape).astype(np.float32))
    for name, (rows, columns) in graph.matrix_shapes().items():
        if ".experts." in name:
            continue
        if name == "embedding":
            codes = rng.integers(1, 255, size=rows * columns, dtype=np.uint8)
            scales = np.full(rows, 1e-3, np.float32).view(np.uint8)
            engine.set_embedding(Precision.INT8_DYNAMIC, codes.data, scales.data)
            held += [codes, scales]
            continue
        kind = _taken(precision, columns)
        held.append(private_pages(packed_bytes(kind, rows, columns)))
        _pack_random(rng, kind, rows, columns, held[-1])
        engine.set_matrix(name, kind, rows, columns, held[-1])
    engine.arena(engine.expert_bytes(0, precision)[0])[:] = 0
    _bind_all(engine, graph, precision)
    return held


def _bind_all(engine: Engine, graph: DecoderGraph, precision: Precision) -> None:
    """Let all experts lie at the start of the arena."""
    for one in graph.layers:
        for expert in range(0 if one.routing is None else one.routing.experts):
            engine.bind(one.index, expert, precision, 0)


def _pack_random(
    rng: np.random.Generator, precision: Precision, rows: int, columns: int, out: NDArray[np.uint8]
) -> None:
    """Write a packed matrix of small random numbers."""
    if precision is Precision.FP32:
        weights = rng.random(rows * columns, dtype=np.float32) * np.float32(1e-3)
        pack(precision, rows, columns, weights.view(np.uint8).data, None, out.data)
        return
    codes = rng.integers(1, 255, size=int(rows * columns * _WEIGHT_BYTES[precision]), dtype=np.uint8)
    groups = columns // 32 if precision is Precision.INT4_GROUP32 else 1
    scales = np.full(rows * groups, 1e-3, np.float32)
    # bfloat16 is the upper half of a float
    stored = (scales.view(np.uint32) >> 16).astype(np.uint16) if precision is Precision.INT4_GROUP32 else scales
    pack(precision, rows, columns, codes.data, stored.view(np.uint8).data, out.data)
