"""How long each expert was resident, in events of decoding.

An expert counts for an event if it is resident at the event's end: what the event brought counts, what left for it
does not. This is booked where experts come and go, never by looking at all of them: an event that found all it needed
costs an addition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Occupancy(NamedTuple):
    """Which experts were resident, and how long.

    Attributes:
        events: Events of decoding; prompts are not counted.
        resident: ``[layers][experts]``: at the end of how many of these events each expert was resident.
    """

    events: int
    resident: tuple[tuple[int, ...], ...]

    def since(self, before: Occupancy) -> Occupancy:
        """Return what came after ``before``, which was read from the same books."""
        pairs = zip(self.resident, before.resident, strict=True)
        resident = tuple(tuple(new - old for new, old in zip(*rows, strict=True)) for rows in pairs)
        return Occupancy(self.events - before.events, resident)


class Stays:
    """The books of who is resident since when. Keys are ``layer * experts + expert``.

    Args:
        layers: Of the decoder.
        experts: Of a layer, at most.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._layers, self._experts = layers, experts
        self._over = 0  # events of decoding before the present one
        self._present = 0  # 1 where the present event is one of decoding
        self._since: dict[int, int] = {}
        self._held = [0] * (layers * experts)

    def event(self, *, decoding: bool) -> None:
        """Begin an event; whoever comes or goes from now on does so in it."""
        self._over += self._present
        self._present = int(decoding)

    def entered(self, keys: Iterable[int]) -> None:
        """Book experts as resident from the present event on."""
        for key in keys:
            self._since[key] = self._over

    def left(self, keys: Iterable[int]) -> None:
        """Book residents as gone from the present event on."""
        for key in keys:
            self._held[key] += self._over - self._since.pop(key)

    def read(self) -> Occupancy:
        """Return what was booked up to the end of the present event."""
        held, now = list(self._held), self._over + self._present
        for key, since in self._since.items():
            held[key] += now - since
        rows = range(0, len(held), self._experts)
        return Occupancy(now, tuple(tuple(held[start : start + self._experts]) for start in rows))
