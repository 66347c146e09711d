"""Loads what stays in memory: one stretch of pages that the engine uses where it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import DeviceError
from edgeflex.runtimes.movers import Mover, takes_direct
from edgeflex.runtimes.packed import is_small, raw_parts
from edgeflex.runtimes.pages import private_pages
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from edgeflex.runtimes.native import Engine
    from edgeflex.runtimes.packed import PackedStore, Piece


def load_dense(engine: Engine, store: PackedStore) -> NDArray[np.uint8]:
    """Read all dense records, check them, hand their parts to the engine, and return the memory that holds them.

    Raises:
        BundleError: A record is not what was packed.
        DeviceError: The disk failed, or memory is short.
        InputError: The engine's decoder has other matrices.
    """
    return read_dense(store, lambda piece, data: _hand_over(engine, piece, data))


def read_dense(store: PackedStore, take: Callable[[Piece, NDArray[np.uint8]], None]) -> NDArray[np.uint8]:
    """Read all dense records, check them, give each part to ``take``, and return the memory that holds them.

    Raises:
        BundleError: A record is not what was packed.
        DeviceError: The disk failed, or memory is short.
    """
    memory = _pages(store.dense_bytes)
    direct = all(takes_direct(record.file) for record, _ in store.dense[:1])
    with Mover(memory, direct=direct) as mover:
        offset = 0
        started = []
        for record, unit in store.dense:
            started.append((mover.submit(record, offset, check=True), unit, offset))
            offset += record.size_bytes
        for read, unit, first in started:
            read.wait()
            for piece in unit.pieces:
                start = first + piece.offset
                take(piece, memory[start : start + piece.size_bytes])
    return memory


def _hand_over(engine: Engine, piece: Piece, data: NDArray[np.uint8]) -> None:
    """Give the engine one matrix or small tensor; of matrices it keeps views, not copies."""
    matrix = piece.matrix
    if is_small(matrix.name):
        values = data[: matrix.weights_bytes].view(np.float32).reshape(matrix.rows, matrix.columns)
        engine.set_small(matrix.name, values)
    elif piece.packed:
        engine.set_matrix(matrix.name, matrix.precision, matrix.rows, matrix.columns, data)
    else:
        codes, scales = raw_parts(piece, data)
        engine.set_embedding(matrix.precision, codes.data, None if scales is None else scales.data)


def _pages(size_bytes: int) -> NDArray[np.uint8]:
    """Return page-aligned zeros, in huge pages where the system gives them: fewer address look-ups a token."""
    try:
        return private_pages(size_bytes)
    except (OSError, ValueError) as error:
        raise DeviceError(
            f"no memory for {format_bytes(size_bytes)} of dense weights: {error}. Plan with fewer bits or a smaller "
            "expert cache."
        ) from None
