"""Streams on the processor that keep books of what a device would hold, and fail where a test says so."""

from __future__ import annotations

import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from edgeflex.runtimes.cuda_streams import HostStreams

if TYPE_CHECKING:
    from collections.abc import Collection


class CountingStreams(HostStreams):
    """Counts the device's bytes that are held, and refuses or fails where a test says so.

    Attributes:
        taken: Gives the number of allocations so far.
        held_bytes: Allocated and not given back.
        most_bytes: The most that ever was.
        closed: Whether the streams were given back.
    """

    def __init__(
        self, refused: int = -1, *, failing: int = -1, lost: int = -1, uncounted: Collection[int] = ()
    ) -> None:
        """Say what goes wrong, counted from 0; nothing by default.

        Args:
            refused: The allocation that gets no memory.
            failing: The copy to the device that fails.
            lost: The first stamp or wait that finds the device gone, as all after it do.
            uncounted: Sizes of copies, in elements, that ``failing`` passes over.
        """
        super().__init__()
        self.taken = count()
        self.held_bytes = self.most_bytes = 0
        self.closed = False
        self._refused, self._failing, self._lost, self._uncounted = refused, failing, lost, frozenset(uncounted)
        self._copied, self._passed = count(), count()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory, and note when it is given back."""
        if next(self.taken) == self._refused:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        found = super().empty(shape, dtype)
        self.held_bytes += found.nbytes
        self.most_bytes = max(self.most_bytes, self.held_bytes)
        weakref.finalize(found, self._given_back, found.nbytes)
        return found

    def peak_bytes(self) -> int:  # type: ignore[override]
        """Return the most that was held."""
        return self.most_bytes

    def upload(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> tuple[float, float]:
        """Copy, or fail."""
        if target.numel() not in self._uncounted and next(self._copied) == self._failing:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")
        return super().upload(target, source, after)

    def stamp(self) -> float:
        """Return the time, unless the device is gone."""
        self._find()
        return super().stamp()

    def synchronize(self) -> None:
        """Wait, unless the device is gone."""
        self._find()

    def close(self) -> None:
        """Note it."""
        self.closed = True

    def _given_back(self, size_bytes: int) -> None:
        self.held_bytes -= size_bytes

    def _find(self) -> None:
        if self._lost >= 0 and next(self._passed) >= self._lost:
            raise RuntimeError("CUDA error: unspecified launch failure")
