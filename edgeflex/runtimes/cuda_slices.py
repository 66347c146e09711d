"""Experts as they lie in RAM where one of an event may be divided: in slices of their inner dimension.

A slice holds the rows of gate and of up that make some inner columns, then the columns of down that take them: codes
and scales, each a matrix of its own in the bundle's form. The first slices of a record are so one copy, and the rest
is computed where it lies. Nothing is rounded again, and a record takes no more bytes than its file. Scales of down in
int8 belong to rows, and so to every slice: they stand at the record's head.

Records are put into this order in place, when they have come from the disk (and their hash was found right).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.runtimes.division import HEAD_SHARE, slices_of
from edgeflex.schema import Precision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgeflex.runtimes.cuda_weights import Kind, Shape

    Bytes = NDArray[np.uint8]
    Key = tuple[int, int]


@dataclass(frozen=True)
class Dividing:
    """What a run needs that divides experts.

    Attributes:
        part_s: What the second launch costs on either side.
        staged_bytes: Of the device, where a share arrives.
        stored: Kinds of all experts as their files are.
    """

    part_s: float
    staged_bytes: int
    stored: Mapping[Key, Kind]


def sliced(kind: Kind) -> Kind:
    """Return where an expert's pieces lie once its record is ``arranged``; the kind itself where it stays whole."""
    count = slices_of(kind.down.columns)
    head = 4 * kind.down.rows if kind.down.precision is Precision.INT8_DYNAMIC else 0
    if count == 1 or kind.gate_up.slices > 1 or head > HEAD_SHARE * kind.size_bytes:
        return kind
    pieces = [one // count for one in (*_bytes(kind.gate_up), *_bytes(kind.down))]
    if head:
        pieces[3] = 0
    ends = [head + sum(pieces[:place]) for place in range(len(pieces) + 1)]
    pitch = ends[-1] - head
    gate_up = kind.gate_up._replace(offset=ends[0], scales_offset=ends[1], slices=count, pitch=pitch)
    down = kind.down._replace(
        offset=ends[2], scales_offset=0 if head else ends[3], slices=count, pitch=pitch, across=True
    )
    return kind._replace(gate_up=gate_up, down=down)


def first_slices(kind: Kind, count: int) -> Kind:
    """Return the kind of the first ``count`` slices; its ``size_bytes`` are those of a record that are copied."""
    made = _part(kind, 0, count)
    last = kind.gate_up.pitch * count
    return made._replace(size_bytes=kind.gate_up.offset + last)


def rest_of(kind: Kind, count: int) -> Kind:
    """Return the kind of all but the first ``count`` slices, in the same record."""
    return _part(kind, count, kind.down.slices)


def _part(kind: Kind, first: int, last: int) -> Kind:
    gate_up, down = kind.gate_up, kind.down
    width, skipped, count = down.columns // down.slices, first * down.pitch, last - first
    moved = 0 if down.precision is Precision.INT8_DYNAMIC else skipped
    return kind._replace(
        gate_up=gate_up._replace(
            rows=2 * width * count,
            offset=gate_up.offset + skipped,
            scales_offset=gate_up.scales_offset + skipped,
            slices=count,
        ),
        down=down._replace(
            columns=width * count,
            offset=down.offset + skipped,
            scales_offset=down.scales_offset + moved,
            slices=count,
        ),
    )


def arrange(record: Bytes, stored: Kind, wanted: Kind) -> None:
    """Put a record into slices, in place.

    Args:
        record: The bytes of the expert's file.
        stored: Its kind as the file is.
        wanted: ``sliced(stored)``.
    """
    if stored == wanted:
        return
    data = record.copy()
    for one, other in ((stored.gate_up, wanted.gate_up), (stored.down, wanted.down)):
        codes, scales = _bytes(one)
        _move(data[one.offset : one.offset + codes], other, record, other.offset)
        source = data[one.scales_offset : one.scales_offset + scales]
        if other.across and one.precision is Precision.INT8_DYNAMIC:
            record[other.scales_offset : other.scales_offset + scales] = source
        elif scales:
            _move(source, other, record, other.scales_offset)


def _move(source: Bytes, shape: Shape, record: Bytes, offset: int) -> None:
    """Write what lies row by row to where each slice has it."""
    lines = shape.rows if shape.across else 2  # gate's rows, then up's, are cut into as many pieces as there are slices
    piece = np.dtype((np.void, source.size // (lines * shape.slices)))
    given = source.view(piece).reshape(lines, shape.slices).T
    target: NDArray[np.void] = np.ndarray(given.shape, piece, record, offset, (shape.pitch, piece.itemsize))
    target[...] = given


def _bytes(shape: Shape) -> tuple[int, int]:
    """Return the bytes of a matrix's codes and of its scales."""
    scales = {
        Precision.FP32: 0,
        Precision.INT8_DYNAMIC: 4 * shape.rows,
        Precision.INT4_GROUP32: 2 * (shape.numbers // 32),
    }[shape.precision]
    return shape.weights_bytes, scales
