"""What every unit of a decoder costs in every precision: the arrays that the decoder planner walks.

A *pick* is a unit, or the embedding together with a tied head. All costs add over picks:

* bytes of dense picks lie in memory for good; those of experts lie in the store, and in the cache while used;
* seconds of a decoded token are the measured ones of one input row, an expert's times the share of tokens that
  use it;
* seconds of the first token are those of the prompt in chunks: a chunk of ``c`` tokens uses expert ``e`` with
  probability ``1 - (1 - u)^c``, and then with ``c u / (1 - (1 - u)^c)`` rows, ``u`` its share of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import InputError
from edgeflex.schema import Precision
from edgeflex.schema_moe import DECODER_PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from edgeflex.schema_moe import DecoderCalibration, DecoderGraph, DecoderLayer, DecoderRates

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

PackedBytes = Callable[[Precision, int, int], int]

PAGE_BYTES = 4096
_LINE_BYTES = 64
_LEAST_USE = 0.1
Shape = tuple[int, int]


# --- shapes ------------------------------------------------------------------------------------------


def _attention_shapes(graph: DecoderGraph) -> tuple[Shape, ...]:
    return tuple(graph.attention.matrix_shapes(graph.hidden_dim).values())


def _feed_forward(hidden: int, inner: int) -> tuple[Shape, ...]:
    return ((2 * inner, hidden), (hidden, inner)) if inner else ()


def _dense_shapes(graph: DecoderGraph, layer: DecoderLayer) -> tuple[Shape, ...]:
    hidden = graph.hidden_dim
    dense = _feed_forward(hidden, layer.dense_dim) if layer.routing is None else ()
    return (*_attention_shapes(graph), *dense, *_feed_forward(hidden, layer.shared_dim))


def small_bytes(graph: DecoderGraph) -> int:
    """Return the bytes of everything that stays in fp32: norms, biases, routers and gates."""
    return 4 * sum(math.prod(shape) for shape in graph.small_shapes().values())


def kv_bytes(graph: DecoderGraph, tokens: int) -> int:
    """Return the bytes of ``tokens`` keys and values of all layers in fp32, heads expanded."""
    one = graph.attention
    return 4 * tokens * len(graph.layers) * one.kv_heads * (one.head_dim + one.value_dim)


def activations_bytes(graph: DecoderGraph, chunk_tokens: int) -> int:
    """Return the bytes of the buffers for ``chunk_tokens`` rows and the logits of one, all in fp32.

    A row holds the residual, its normalised copy and the sum of outputs, the attention's projections, the
    widest feed-forward and one output for each chosen expert.
    """
    widest = max((max(x.dense_dim, x.shared_dim, x.expert_dim) for x in graph.layers), default=0)
    top_k = max((x.routing.top_k for x in graph.layers if x.routing), default=0)
    projections = sum(rows for rows, _ in _attention_shapes(graph))
    row = (3 + top_k) * graph.hidden_dim + projections + 3 * widest
    return 4 * (chunk_tokens * row + graph.vocabulary)


def raw_bytes(precision: Precision, rows: int, columns: int) -> int:
    """Return the bytes of a matrix as stored in the bundle, scales included."""
    weights = rows * columns * precision.bits // 8
    if precision is Precision.INT4_GROUP32:
        return weights + rows * (columns // 32) * 2
    return weights + (rows * 4 if precision is Precision.INT8_DYNAMIC else 0)


def expert_bytes(precision: Precision, shapes: Sequence[Shape], packed_bytes: PackedBytes) -> int:
    """Return the bytes of an expert in a cache slot: matrices at multiples of 64, the whole of 4096."""
    size = 0
    for rows, columns in shapes:
        size = _up(size, _LINE_BYTES) + packed_bytes(precision, rows, columns)
    return _up(size, PAGE_BYTES)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


# --- measured seconds ------------------------------------------------------------------------------------


class Times:
    """Measured seconds of matrices by shape, precision, threads and input rows, linear in between.

    Those of one row are as long as within a decoded token: so many times longer, for dense matrices and for experts,
    as the rates say.
    """

    def __init__(self, rates: DecoderRates) -> None:
        grouped: dict[tuple[int, int, Precision, int], dict[int, float]] = {}
        for one in rates.matrices:
            grouped.setdefault((one.rows, one.columns, one.precision, one.threads), {})[one.rows_in] = one.seconds
        self._curves = {key: tuple(zip(*sorted(curve.items()), strict=True)) for key, curve in grouped.items()}
        self._ratios = {(one.precision, one.threads): (one.dense, one.experts) for one in rates.token_ratios}
        self.threads = tuple(sorted({one.threads for one in rates.matrices}))

    def has(self, shape: Shape, precision: Precision) -> bool:
        """Say whether this shape was measured for one input row at every number of threads."""
        curves = [self._curves.get((*shape, precision, threads)) for threads in self.threads]
        return bool(curves) and all(curve is not None and curve[0][0] == 1 for curve in curves)

    def seconds(self, shape: Shape, precision: Precision, threads: int, rows_in: Floats, *, expert: bool) -> Floats:
        """Return the seconds for each of ``rows_in``; beyond the most rows measured, in proportion to them.

        Args:
            shape: Of the matrix, [outputs, inputs].
            precision: Of its weights.
            threads: That compute.
            rows_in: Numbers of input rows.
            expert: Whether it belongs to an expert, and not to the dense part.
        """
        rows, alone = self._curves[(*shape, precision, threads)]
        seconds = np.array(alone, dtype=np.float64)
        seconds[0] *= self._ratios.get((precision, threads), (1.0, 1.0))[expert]
        inside = np.interp(rows_in, rows, seconds)
        beyond: Floats = np.where(rows_in > rows[-1], rows_in * (seconds[-1] / rows[-1]), inside)
        return beyond


# --- picks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pick:
    """One decision: the units that share a precision, their shapes, and where an expert lies.

    Attributes:
        units: Names; two for an embedding with a tied head.
        shapes: Of the matrices that are multiplied, [outputs, inputs].
        looked_up: The embedding's shape, whose rows are looked up in its raw form, or None.
        layer: Index of the layer of an expert, or -1.
        expert: Index of the expert, or -1.
    """

    units: tuple[str, ...]
    shapes: tuple[Shape, ...]
    looked_up: Shape | None = None
    layer: int = -1
    expert: int = -1
    last_row_only: bool = False


def picks_of(graph: DecoderGraph) -> tuple[Pick, ...]:
    """Return every decision of a decoder, dense ones first."""
    table = (graph.vocabulary, graph.hidden_dim)
    if graph.tied_embedding:
        ends = [Pick(("embedding", "head"), (table,), looked_up=table, last_row_only=True)]
    else:
        ends = [Pick(("embedding",), (), looked_up=table), Pick(("head",), (table,), last_row_only=True)]
    layers = [Pick((f"layers.{one.index}",), _dense_shapes(graph, one)) for one in graph.layers]
    return (*ends, *layers, *_experts(graph))


def _experts(graph: DecoderGraph) -> Iterator[Pick]:
    for place, layer in enumerate(graph.layers):
        shapes = _feed_forward(graph.hidden_dim, layer.expert_dim)
        for expert in range(layer.routing.experts if layer.routing else 0):
            yield Pick((f"layers.{layer.index}.experts.{expert}",), shapes, layer=place, expert=expert)


@dataclass(frozen=True)
class Space:
    """All decisions as arrays [picks, options]; options that a pick does not have hold infinity in ``kl``.

    Attributes:
        picks: The decisions.
        options: Precisions, by column.
        kl: Nats per token.
        memory_bytes: Of dense picks; experts 0.
        expert_bytes: Of experts in a slot; dense picks 0.
        disk_bytes: Raw and packed, as both lie in the bundle's folder.
        use: Share of decoded tokens that use an expert, [picks]; dense picks 0.
        token_s: Seconds of one decoded token by number of threads, experts weighted by use.
        threads: Numbers of threads with measured rates.
    """

    graph: DecoderGraph
    rates: DecoderRates
    times: Times
    picks: tuple[Pick, ...]
    options: tuple[Precision, ...]
    kl: Floats
    memory_bytes: Ints
    expert_bytes: Ints
    disk_bytes: Ints
    is_expert: NDArray[np.bool_]
    use: Floats
    token_s: dict[int, Floats]
    threads: tuple[int, ...]
    small_bytes: int
    _first: dict[tuple[int, int, int], Floats] = field(default_factory=dict)

    @property
    def moe_layers(self) -> int:
        """Layers that have experts."""
        return sum(layer.routing is not None for layer in self.graph.layers)

    @property
    def uses_per_token(self) -> float:
        """Experts that one token uses, all layers together."""
        return float(sum(layer.routing.top_k for layer in self.graph.layers if layer.routing))

    def sizes(self, mix: Ints) -> Ints:
        """Return the bytes of every expert, [layers, experts]; layers without experts hold zeros."""
        most = max((layer.routing.experts for layer in self.graph.layers if layer.routing), default=0)
        sizes = np.zeros((len(self.graph.layers), most), dtype=np.int64)
        rows = np.flatnonzero(self.is_expert)
        places = [(self.picks[row].layer, self.picks[row].expert) for row in rows]
        if places:
            sizes[tuple(np.array(places).T)] = self.expert_bytes[rows, mix[rows]]
        return sizes

    def first_token_s(self, threads: int, chunk_tokens: int, prompt_tokens: int) -> Floats:
        """Return the seconds that the matrices of each pick take of a whole prompt, [picks, options]."""
        key = (threads, chunk_tokens, prompt_tokens)
        if key not in self._first:
            whole, rest = divmod(prompt_tokens, chunk_tokens)
            found = np.zeros(self.kl.shape)
            for count, tokens in ((whole, chunk_tokens), (1, rest)):
                if count and tokens:
                    found += count * self._chunk_s(threads, tokens)
            self._first[key] = found
        return self._first[key]

    def _chunk_s(self, threads: int, tokens: int) -> Floats:
        experts = self.is_expert
        chance = np.where(experts, 1.0 - (1.0 - np.minimum(self.use, 1.0)) ** tokens, 1.0)
        rows = np.where(experts, tokens * self.use / np.maximum(chance, 1e-12), float(tokens))
        rows = np.where([pick.last_row_only for pick in self.picks], 1.0, np.maximum(rows, 1.0))
        return chance[:, None] * _matrix_s(self.times, self.picks, self.options, np.isfinite(self.kl), threads, rows)


def build_space(
    calibration: DecoderCalibration,
    rates: DecoderRates,
    packed_bytes: PackedBytes,
    *,
    uses: Floats | None = None,
    precisions: Sequence[Precision] = DECODER_PRECISIONS,
) -> Space:
    """Return the arrays of a calibrated decoder on a measured machine.

    fp32 costs no KL; other precisions are options of a unit only where calibration measured their KL and the
    rates hold their shapes.

    Args:
        calibration: KL of units, and the graph.
        rates: Measured seconds of the graph's shapes.
        packed_bytes: Bytes of one matrix as the kernels want it.
        uses: Share of decoded tokens that use each expert, [layers, experts]; even use by default.
        precisions: Options to consider.

    Raises:
        InputError: A unit has no option, or ``uses`` has another shape.
    """
    graph, times = calibration.graph, Times(rates)
    picks, options = picks_of(graph), tuple(precisions)
    loss = {(one.unit, one.precision): max(one.kl, 0.0) for one in calibration.losses}
    kl = np.full((len(picks), len(options)), np.inf)
    for row, pick in enumerate(picks):
        for column, precision in enumerate(options):
            if all(times.has(shape, precision) and _fits(shape, precision) for shape in pick.shapes):
                kl[row, column] = _kl(pick, precision, loss)
    _refuse_empty(picks, kl, rates)
    have = np.isfinite(kl)
    use = _use_of(graph, picks, uses)
    ones = np.ones(len(picks))
    weight = np.where([pick.layer >= 0 for pick in picks], use, 1.0)[:, None]
    bytes_of = [_bytes_of(picks, options, have, packed_bytes, part) for part in ("memory", "expert", "disk")]
    return Space(
        graph=graph,
        rates=rates,
        times=times,
        picks=picks,
        options=options,
        kl=kl,
        memory_bytes=bytes_of[0],
        expert_bytes=bytes_of[1],
        disk_bytes=bytes_of[2],
        is_expert=np.array([pick.layer >= 0 for pick in picks]),
        use=use,
        token_s={n: weight * _matrix_s(times, picks, options, have, n, ones) for n in times.threads},
        threads=times.threads,
        small_bytes=small_bytes(graph),
    )


def _fits(shape: Shape, precision: Precision) -> bool:
    return precision.group_size is None or shape[1] % precision.group_size == 0


def _kl(pick: Pick, precision: Precision, loss: dict[tuple[str, Precision], float]) -> float:
    if precision is Precision.FP32:
        return 0.0
    known = [loss[unit, precision] for unit in pick.units if (unit, precision) in loss]
    # a tied head may be measured with its embedding, as one unit
    return sum(known) if known else float("inf")


def _refuse_empty(picks: Sequence[Pick], kl: Floats, rates: DecoderRates) -> None:
    lost = [pick for pick, row in zip(picks, kl, strict=True) if not np.isfinite(row).any()]
    if not lost:
        return
    shapes = sorted({shape for pick in lost for shape in pick.shapes})
    named = ", ".join(f"[{rows}, {columns}]" for rows, columns in shapes[:4])
    raise InputError(
        f"{len(lost)} units such as {lost[0].units[0]!r} have no precision that is both calibrated and measured on "
        f"{rates.device!r} (shapes {named} for one input row). Calibrate and measure the same precisions."
    )


def _use_of(graph: DecoderGraph, picks: Sequence[Pick], uses: Floats | None) -> Floats:
    """Return each expert's share of tokens, scaled so that every layer's sum is its top_k.

    No expert counts for less than a tenth of even use: other text than the trace's will use it.
    """
    most = max((one.routing.experts for one in graph.layers if one.routing), default=0)
    given = np.ones((len(graph.layers), most)) if uses is None else np.array(uses, dtype=np.float64)
    if given.shape != (len(graph.layers), most) or not np.isfinite(given).all() or (given < 0).any():
        raise InputError(
            f"uses of experts have shape {given.shape}; give finite shares of at least 0 as "
            f"[{len(graph.layers)}, {most}], layers by experts."
        )
    for place, layer in enumerate(graph.layers):
        if layer.routing is None:
            continue
        row = given[place, : layer.routing.experts]
        row[:] = row if row.sum() > 0 else 1.0
        np.maximum(row, _LEAST_USE * row.sum() / len(row), out=row)
        row *= layer.routing.top_k / row.sum()
    return np.array([given[pick.layer, pick.expert] if pick.layer >= 0 else 0.0 for pick in picks])


def _bytes_of(
    picks: Sequence[Pick], options: Sequence[Precision], have: NDArray[np.bool_], packed: PackedBytes, part: str
) -> Ints:
    known: dict[tuple[object, ...], int] = {}
    found = np.zeros((len(picks), len(options)), dtype=np.int64)
    for row, pick in enumerate(picks):
        for column in np.flatnonzero(have[row]).tolist():
            key = (pick.shapes, pick.looked_up, pick.layer >= 0, len(pick.units), column)
            if key not in known:
                known[key] = _pick_bytes(pick, options[column], packed, part)
            found[row, column] = known[key]
    return found


def _pick_bytes(pick: Pick, precision: Precision, packed: PackedBytes, part: str) -> int:
    slot = expert_bytes(precision, pick.shapes, packed) if pick.layer >= 0 else 0
    dense = 0 if pick.layer >= 0 else sum(packed(precision, *shape) for shape in pick.shapes)
    looked_up = raw_bytes(precision, *pick.looked_up) if pick.looked_up else 0
    if part == "expert":
        return slot
    if part == "memory":
        return dense + looked_up
    # a tied head has no raw copy of its own
    raw = 0 if len(pick.units) > 1 else sum(raw_bytes(precision, *shape) for shape in pick.shapes)
    return raw + looked_up + dense + slot


def _matrix_s(
    times: Times,
    picks: Sequence[Pick],
    options: Sequence[Precision],
    have: NDArray[np.bool_],
    threads: int,
    rows_in: Floats,
) -> Floats:
    """Return the seconds of each pick's matrices with ``rows_in`` [picks] input rows, [picks, options]."""
    groups: dict[tuple[tuple[Shape, ...], bool], list[int]] = {}
    for row, pick in enumerate(picks):
        groups.setdefault((pick.shapes, pick.layer >= 0), []).append(row)
    found = np.zeros((len(picks), len(options)))
    for (shapes, expert), members in groups.items():
        rows = np.array(members)
        for column in np.flatnonzero(have[rows].any(axis=0)).tolist():
            for shape in shapes:
                found[rows, column] += times.seconds(shape, options[column], threads, rows_in[rows], expert=expert)
    return found
