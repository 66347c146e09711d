"""Watches a device's events: how long each took beside what was predicted of it, and who worked meanwhile.

Every few passes, each event that lacked experts is stamped on the clock of the device: when it began, when experts were
computed, when copies ran, when it was over. What the processor and the disk did is taken by the clock here,
which agrees with the device's at the beginning of an event, since the router's choice has just been waited for. A few
passes are enough, so that watching takes next to nothing of what it measures.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from edgeflex.runtimes.ahead_time import event_time
from edgeflex.runtimes.curves import RESOURCES
from edgeflex.runtimes.timeline import cost_of
from edgeflex.schema_gpu import EventTime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgeflex.runtimes.curves import Curves
    from edgeflex.runtimes.division import Division
    from edgeflex.runtimes.timeline import Active, Schedule

    Span = tuple[float, float]

T = TypeVar("T")

EVERY = 4  # passes of which one is watched
KEPT_EVENTS = 2000


class Reservoir(Generic[T]):
    """A fair sample of all that came, however much it was (Vitter, ACM TOMS 11, 1985, algorithm R).

    Args:
        limit: Most that is kept, at least 1.
        seed: Of the draws.

    Attributes:
        seen: How many came.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.seen = 0
        self._limit = limit
        self._draw = random.Random(seed)  # noqa: S311 - a sample, no secret
        self._kept: list[tuple[int, T]] = []

    def add(self, item: T) -> None:
        """Take an item; it stays with the probability of every other so far."""
        self.seen += 1
        if len(self._kept) < self._limit:
            self._kept.append((self.seen, item))
            return
        place = self._draw.randrange(self.seen)
        if place < self._limit:
            self._kept[place] = (self.seen, item)

    @property
    def items(self) -> tuple[T, ...]:
        """What is kept, in the order in which it came."""
        return tuple(item for _, item in sorted(self._kept, key=lambda pair: pair[0]))


@dataclass(frozen=True)
class Watched:
    """What was seen in the watched passes.

    Attributes:
        passes: That decoded.
        pass_s: Their seconds, from their first layer to their logits.
        events: Of them that lacked experts.
        event_s: Seconds of those.
        busy_s: Seconds that each resource worked in those, and the link also between them, by ``RESOURCES``.
        waited_s: Seconds of those in which each had nothing to do.
        exposed_s: Seconds of the link's work during which neither device nor processor computed.
        sample: Events of decoding and of prompts.
        seen: How many the sample was drawn from.
    """

    passes: int = 0
    pass_s: float = 0.0
    events: int = 0
    event_s: float = 0.0
    busy_s: tuple[float, ...] = (0.0,) * len(RESOURCES)
    waited_s: tuple[float, ...] = (0.0,) * len(RESOURCES)
    exposed_s: float = 0.0
    sample: tuple[EventTime, ...] = ()
    seen: int = 0


@dataclass
class WatchedEvent:
    """One event while it happens; every method notes something that has begun or ended just now."""

    layer: int
    decoding: bool
    origin: Any
    start_s: float
    ahead: list[Any]
    planned: tuple[Schedule, Sequence[Active], Curves] | None = None
    division: Division | None = None
    end: Any = None
    uploads: list[Any] = field(default_factory=list)
    gpu: list[tuple[Any, Any, Any]] = field(default_factory=list)  # stamp, mark that it waited for, stamp
    cpu: list[Span] = field(default_factory=list)
    reads: list[Span] = field(default_factory=list)


class Clocks(Protocol):
    """What of a device's ``Streams`` tells times."""

    def stamp(self) -> Any:
        """Return a time behind all computing that was asked for so far."""

    def between(self, first: Any, last: Any) -> float:
        """Return the seconds from one stamp to a later one."""

    def span(self, mark: Any, origin: Any) -> tuple[float, float]:
        """Return when an ended upload began and ended, in seconds from a stamp."""

    def seconds(self, mark: Any) -> float:
        """Return how long an ended upload took."""


class EventWatch:
    """Notes events of some passes, and sums them when nothing is under way.

    Args:
        streams: The device.
        every: Passes of which one is watched.
        limit: Events that are kept.
        seed: Of their draw.
        clock: Seconds, rising.
    """

    def __init__(
        self,
        streams: Clocks,
        *,
        every: int = EVERY,
        limit: int = KEPT_EVENTS,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._streams = streams
        self._every = every
        self._clock = clock
        self._sample: Reservoir[EventTime] = Reservoir(limit, seed)
        self._sums = Watched()
        self._number = -1
        self._decoding = False
        self._on = False
        self._start_s = 0.0
        self._events: list[WatchedEvent] = []
        self._ahead: list[Any] = []  # copies since the last event that no event asked for
        self._all_ahead: list[Any] = []

    def begin_pass(self, *, decoding: bool) -> None:
        """Say that a pass begins; passes of prompts and of decoding are counted together."""
        self._number += 1
        self._decoding = decoding
        self._on = self._number % self._every == 0
        self._start_s = self._clock()

    def begin_event(self, layer: int) -> WatchedEvent | None:
        """Return what an event is noted in, or None where this pass is not watched."""
        if not self._on:
            return None
        made = WatchedEvent(layer, self._decoding, self._streams.stamp(), self._clock(), self._ahead)
        self._ahead = []
        self._events.append(made)
        return made

    def end_event(self, event: WatchedEvent | None) -> None:
        """Say that all of an event's work was given to the device."""
        if event is not None:
            event.end = self._streams.stamp()

    def copied_ahead(self, mark: Any) -> None:
        """Note a copy that no event asked for."""
        if self._on:
            self._ahead.append(mark)
            self._all_ahead.append(mark)

    def collect(self, ended_s: float) -> None:
        """Sum what was noted; nothing is under way on the device.

        Args:
            ended_s: When the pass's logits were there, by the clock.
        """
        if not self._on:
            return
        self._on = False
        for event in self._events:
            if event.end is not None:
                self._fold(event)
        if self._decoding:
            copied = sum(self._streams.seconds(mark) for mark in self._all_ahead)
            sums = self._sums
            busy = tuple(
                one + (copied if resource == "link" else 0.0)
                for one, resource in zip(sums.busy_s, RESOURCES, strict=True)
            )
            pass_s = sums.pass_s + max(0.0, ended_s - self._start_s)
            self._sums = replace(sums, passes=sums.passes + 1, pass_s=pass_s, busy_s=busy)
        self.forget()

    def forget(self) -> None:
        """Forget what is not summed yet, after a pass that did not end."""
        self._on = False
        self._events, self._ahead, self._all_ahead = [], [], []

    def watched(self) -> Watched:
        """Return the sums so far."""
        return replace(self._sums, sample=self._sample.items, seen=self._sample.seen)

    # --- one event ------------------------------------------------------------------------------------

    def _fold(self, event: WatchedEvent) -> None:
        span_s = self._streams.between(event.origin, event.end)
        found = measured(
            span_s,
            gpu=list(self._gpu_spans(event)),
            cpu=[_since(one, event.start_s) for one in event.cpu],
            link=[self._streams.span(mark, event.origin) for mark in event.uploads],
            disk=[_since(one, event.start_s) for one in event.reads],
            ahead=[self._streams.span(mark, event.origin) for mark in event.ahead],
        )
        if event.planned is not None:
            planned, active, curves = event.planned
            costs = {one.key: cost_of(one, curves) for one in active}
            if event.division is not None:
                costs[event.division.key] = event.division.cost
            busy_s = event_time(planned, costs, curves).busy_s
            self._sample.add(
                EventTime(
                    layer=event.layer,
                    decoding=event.decoding,
                    predicted_s=planned.span_s,
                    actual_s=max(0.0, span_s),
                    predicted_busy_s=_rounded(busy_s),
                    actual_busy_s=_rounded(found.busy_s),
                )
            )
        if event.decoding:
            sums = self._sums
            self._sums = replace(
                sums,
                events=sums.events + 1,
                event_s=sums.event_s + span_s,
                busy_s=_added(sums.busy_s, found.busy_s),
                waited_s=_added(sums.waited_s, found.waited_s),
                exposed_s=sums.exposed_s + found.exposed_s,
            )

    def _gpu_spans(self, event: WatchedEvent) -> list[Span]:
        """Return when the device computed; what waited for a copy began no earlier than that had ended."""
        spans: list[Span] = []
        for begin, mark, end in event.gpu:
            start = self._streams.between(event.origin, begin)
            if mark is not None:
                start = max(start, self._streams.span(mark, event.origin)[1])
            spans.append((start, self._streams.between(event.origin, end)))
        return spans


@dataclass(frozen=True)
class Measured:
    """One event's seconds by resource, in the order of ``RESOURCES``; see ``Watched``."""

    busy_s: tuple[float, ...]
    waited_s: tuple[float, ...]
    exposed_s: float


def measured(
    span_s: float,
    *,
    gpu: Sequence[Span] = (),
    cpu: Sequence[Span] = (),
    link: Sequence[Span] = (),
    disk: Sequence[Span] = (),
    ahead: Sequence[Span] = (),
) -> Measured:
    """Return who worked how long in an event that took ``span_s``.

    Args:
        span_s: Seconds of the event.
        gpu: When the device computed, (start, end) in seconds from its beginning; spans may overlap or stick out.
        cpu: When the processor computed.
        link: When copies ran that the event asked for.
        disk: When reads were under way.
        ahead: When copies ran that it did not ask for. They fill the link's waiting and are not counted as its work.
    """
    lanes = [_union(spans, span_s) for spans in (gpu, cpu, link, disk)]
    busy = tuple(map(_length, lanes))
    present = [*busy]
    copying = _union([*link, *ahead], span_s)
    present[RESOURCES.index("link")] = _length(copying)
    computing = _union([*lanes[0], *lanes[1]], span_s)
    return Measured(
        busy_s=busy,
        waited_s=tuple(max(0.0, span_s - one) for one in present),
        exposed_s=max(0.0, _length(copying) - _common(copying, computing)),
    )


def _union(spans: Sequence[Span], span_s: float) -> list[Span]:
    """Return the spans' times within the event as disjoint ones, in order."""
    found: list[Span] = []
    for start, end in sorted((max(0.0, one), min(two, span_s)) for one, two in spans):
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _length(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)


def _common(ones: Sequence[Span], others: Sequence[Span]) -> float:
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in ones for b in others)


def _since(span: Span, start_s: float) -> Span:
    return span[0] - start_s, span[1] - start_s


def _rounded(found: Sequence[float]) -> tuple[float, float, float, float]:
    """Return seconds of the four resources to the nanosecond."""
    gpu, cpu, link, disk = (round(one, 9) for one in found)
    return gpu, cpu, link, disk


def _added(ones: Sequence[float], others: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(ones, others, strict=True))
