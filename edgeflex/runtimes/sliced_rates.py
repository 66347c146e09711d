"""How much longer the processor takes over an expert that lies in slices than over a whole one, measured.

The kernel of a run (``cuda_host.NativeExperts``) reads the same memory in both orders, in turns, so that the figure is
a ratio within one run. Many experts are walked through, more than the last cache holds, as decoding does; the memory
holds one byte over and over, which is a harmless number in every form, since no kernel's time depends on numbers.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex.errors import InputError
from edgeflex.runtimes.cuda_slices import rest_of, sliced
from edgeflex.runtimes.pages import private_pages
from edgeflex.schema import Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgeflex.runtimes.cuda_host import HostExperts
    from edgeflex.runtimes.cuda_weights import Kind
    from edgeflex.schema_moe import DecoderGraph

    Bytes = NDArray[np.uint8]

WALKED_BYTES = 256 << 20  # more than the last cache of most processors
ROUNDS = 9
_BYTE = 0x3C  # 0.01 as float and as bfloat16, 60 as int8, 4 and -5 as int4
_ALIGNMENT = 128  # of the pieces of a bundle's records


@dataclass(frozen=True)
class SlicedTimes:
    """Seconds of one expert for one token, a value a round.

    Attributes:
        whole_s: As its file is.
        sliced_s: In slices, all computed.
        rest_s: In slices, all but the first half computed (or nearly), as where that was copied.
        rest_share: What the rest is of the whole.
        slices: In which it lies.
        expert_bytes: Of its weights.
        walked_bytes: Of all experts that were read in turn.
    """

    whole_s: tuple[float, ...]
    sliced_s: tuple[float, ...]
    rest_s: tuple[float, ...]
    rest_share: float
    slices: int
    expert_bytes: int
    walked_bytes: int

    @property
    def in_slices(self) -> Ratio:
        """Seconds in slices over seconds of the whole."""
        return _ratio(self.sliced_s, self.whole_s)

    @property
    def rest(self) -> Ratio:
        """Seconds of the rest over its share of the seconds of the whole."""
        return _ratio(self.rest_s, [self.rest_share * one for one in self.whole_s])


class Ratio(NamedTuple):
    """Median of the rounds' ratios, and their quartiles."""

    value: float
    low: float
    high: float


def _ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    ratios = [one / max(other, 1e-12) for one, other in zip(over, under, strict=True)]
    low, value, high = np.percentile(ratios, [25, 50, 75])
    return Ratio(float(value), float(low), float(high))


def stored_kind(precision: Precision, hidden: int, inner: int) -> Kind:
    """Return the kind of an expert as a bundle's files have it."""
    from edgeflex.runtimes.cuda_weights import Kind, Shape

    places, end = [], 0
    for rows, columns in ((2 * inner, hidden), (hidden, inner)):
        for size in _bytes(precision, rows, columns):
            places.append(end if size else 0)
            end += size + -size % _ALIGNMENT
    gate_up = Shape(precision, 2 * inner, hidden, places[0], places[1])
    return Kind(gate_up, Shape(precision, hidden, inner, places[2], places[3]), end)


def time_slices(
    host: HostExperts,
    stored: Kind,
    *,
    walked_bytes: int = WALKED_BYTES,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> SlicedTimes:
    """Time one token through experts whole, in slices, and through the rest of a divided one, in turns A B C C B A.

    Args:
        host: What computes them.
        stored: The experts' kind as their files are.
        walked_bytes: Of experts that are read one after the other; it should exceed the last cache.
        rounds: Each of two passes per form, after one that does not count.
        clock: Seconds, rising.

    Raises:
        InputError: Experts of this kind do not lie in slices.
    """
    laid = sliced(stored)
    count = laid.down.slices
    if count == 1:
        raise InputError(
            f"experts of {stored.gate_up.columns} x {stored.down.columns} in {stored.down.precision.value} do not lie "
            "in slices. Time others."
        )
    rest = rest_of(laid, count // 2)
    pitch = stored.size_bytes + -stored.size_bytes % 4096
    records = private_pages(max(1, -(-walked_bytes // pitch)) * pitch).reshape(-1, pitch)
    records[...] = _BYTE
    order = np.random.default_rng(0).permutation(len(records))
    row = np.random.default_rng(1).normal(size=(1, stored.gate_up.columns)).astype(np.float32)

    def passed(kind: Kind) -> float:
        begin = clock()
        for place in order:
            host(kind, records[place, : kind.size_bytes], row)
        return (clock() - begin) / len(order)

    taken: list[list[float]] = []
    for _ in range(rounds + 1):
        there = [passed(kind) for kind in (stored, laid, rest)]
        back = [passed(kind) for kind in (rest, laid, stored)][::-1]
        taken.append([(one + other) / 2 for one, other in zip(there, back, strict=True)])
    whole_s, sliced_s, rest_s = zip(*taken[1:], strict=True)
    return SlicedTimes(whole_s, sliced_s, rest_s, 1.0 - (count // 2) / count, count, stored.size_bytes, records.size)


def sliced_ratio(
    graph: DecoderGraph,
    precision: Precision,
    threads: int,
    walked_bytes: int = WALKED_BYTES,
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return how much longer this processor takes over a decoder's experts in slices; 1 where they stay whole.

    Of the inner dimension that most of its layers have.

    Args:
        graph: Of the decoder.
        precision: Of the experts.
        threads: That compute.
        walked_bytes: See ``time_slices``.
        rounds: Likewise.
        clock: Likewise.

    Raises:
        MissingDependencyError: The native library or ExecuTorch is absent.
        DeviceError: No threads.
    """
    from edgeflex.runtimes.cuda_host import NativeExperts

    inner = [layer.expert_dim for layer in graph.layers if layer.routing is not None]
    if not inner:
        return 1.0
    kind = stored_kind(precision, graph.hidden_dim, statistics.mode(inner))
    if sliced(kind).down.slices == 1:
        return 1.0
    host = NativeExperts(threads)
    try:
        return time_slices(host, kind, walked_bytes=walked_bytes, rounds=rounds, clock=clock).in_slices.value
    finally:
        host.close()


def _bytes(precision: Precision, rows: int, columns: int) -> tuple[int, int]:
    """Return the bytes of a matrix's codes and of its scales."""
    scales = {
        Precision.FP32: 0,
        Precision.INT8_DYNAMIC: 4 * rows,
        Precision.INT4_GROUP32: 2 * rows * (columns // 32),
    }[precision]
    return rows * columns * precision.bits // 8, scales
