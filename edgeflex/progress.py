"""How long-running rooms tell where they are, without knowing who listens.

``cli`` shows bars; library callers get silence by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Opens tasks; each gives a function that is called with the number of units just done."""

    def task(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Return a context whose value advances the task."""

    def note(self, text: str) -> None:
        """Say something once, for people."""


class Silent:
    """Progress that nobody hears."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:  # noqa: ARG002 - the protocol's names
        """Return a function that does nothing."""
        yield lambda _count: None

    def note(self, text: str) -> None:
        """Say nothing."""
