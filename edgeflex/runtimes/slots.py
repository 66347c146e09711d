"""Where experts lie in the arena: first come, and slid together when the free bytes lie apart.

The cache decides by bytes alone what is resident; this module finds the place. Whatever fits by bytes gets a
place, so that placement never changes a decision. With one size of expert nothing is ever moved; with two, the
larger ones are laid from the front and the smaller ones from the back, and what must move is the cheapest run
of experts between two holes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, NamedTuple

from edgeflex.errors import DeviceError

if TYPE_CHECKING:
    Key = tuple[int, int]


class Move(NamedTuple):
    """An expert (layer, number) whose bytes must be copied in the arena before anything else is written there."""

    key: Key
    source: int
    target: int
    size_bytes: int


class Slots:
    """Offsets of what lies in ``capacity_bytes``; sizes and capacity are multiples of one alignment.

    Args:
        capacity_bytes: The arena.
        small_bytes: Sizes up to this are laid from the back; 0 lays all from the front.
    """

    def __init__(self, capacity_bytes: int, small_bytes: int = 0) -> None:
        self.capacity_bytes = capacity_bytes
        self.free_bytes = capacity_bytes
        self.small_bytes = small_bytes
        self._holes: list[tuple[int, int]] = [(0, capacity_bytes)] if capacity_bytes else []  # (offset, size)
        self._places: dict[Key, tuple[int, int]] = {}

    def __contains__(self, key: Key) -> bool:
        """Return whether ``key`` has a place."""
        return key in self._places

    def offset(self, key: Key) -> int:
        """Return where ``key`` lies."""
        return self._places[key][0]

    def place(self, key: Key, size_bytes: int) -> tuple[int, tuple[Move, ...]]:
        """Find a place and return its offset and what must be moved first, in this order.

        Raises:
            DeviceError: There are not so many free bytes; a bug of the caller.
        """
        if size_bytes > self.free_bytes:
            raise DeviceError(
                f"{size_bytes} bytes do not fit into {self.free_bytes} free ones of {self.capacity_bytes}: "
                "the cache and the arena disagree. Please report this."
            )
        index = self._hole_for(size_bytes)
        moves: tuple[Move, ...] = ()
        if index is None:
            moves = self._slide(size_bytes)
            index = self._hole_for(size_bytes)
        if index is None:  # _slide has just made one
            raise DeviceError(f"no hole of {size_bytes} bytes after moving {len(moves)} experts. Please report this.")
        offset = self._cut(index, size_bytes)
        self._places[key] = (offset, size_bytes)
        self.free_bytes -= size_bytes
        return offset, moves

    def remove(self, key: Key) -> None:
        """Free the place of ``key``."""
        offset, size_bytes = self._places.pop(key)
        self.free_bytes += size_bytes
        self._add_hole(offset, size_bytes)

    def _hole_for(self, size_bytes: int) -> int | None:
        """Return the hole to use: the tightest, then the one nearest to this size's end of the arena."""
        sign = -1 if size_bytes <= self.small_bytes else 1
        fitting = (
            (size, sign * offset, index) for index, (offset, size) in enumerate(self._holes) if size >= size_bytes
        )
        best = min(fitting, default=None)
        return None if best is None else best[2]

    def _cut(self, index: int, size_bytes: int) -> int:
        offset, size = self._holes[index]
        at_back = size_bytes <= self.small_bytes
        rest = (offset, size - size_bytes) if at_back else (offset + size_bytes, size - size_bytes)
        self._holes[index : index + 1] = [rest] if rest[1] else []
        return offset + size - size_bytes if at_back else offset

    def _add_hole(self, offset: int, size_bytes: int) -> None:
        """Add a hole and join it with its neighbours."""
        index = bisect_left(self._holes, (offset, 0))
        if index < len(self._holes) and self._holes[index][0] == offset + size_bytes:
            size_bytes += self._holes.pop(index)[1]
        if index and sum(self._holes[index - 1]) == offset:
            offset, before = self._holes.pop(index - 1)
            size_bytes += before
        insort(self._holes, (offset, size_bytes))

    def _slide(self, size_bytes: int) -> tuple[Move, ...]:
        """Slide the cheapest run of experts to its front, so that a hole of ``size_bytes`` opens behind it."""
        first, last = self._cheapest_run(size_bytes)
        start = self._holes[first][0]
        end = sum(self._holes[last])
        inside = sorted((offset, size, key) for key, (offset, size) in self._places.items() if start <= offset < end)
        moves = []
        target = start
        for offset, size, key in inside:
            moves.append(Move(key, offset, target, size))
            self._places[key] = (target, size)
            target += size
        self._holes[first : last + 1] = [(target, end - target)]
        return tuple(moves)

    def _cheapest_run(self, size_bytes: int) -> tuple[int, int]:
        """Return the first and last hole of the run with enough free bytes and the fewest bytes between."""
        best: tuple[int, int, int] | None = None
        first, free = 0, 0
        for last, (offset, size) in enumerate(self._holes):
            free += size
            while free - self._holes[first][1] >= size_bytes:
                free -= self._holes[first][1]
                first += 1
            if free >= size_bytes:
                between = offset + size - self._holes[first][0] - free
                if best is None or between < best[0]:
                    best = (between, first, last)
        if best is None:  # the caller has counted the free bytes
            raise DeviceError(f"{size_bytes} bytes are not free. Please report this.")
        return best[1], best[2]
