"""Room of what runs a bundle. Its door: ``open_session`` and the ``Session`` that every backend gives.

A backend that passes ``tests/contracts/test_sessions.py`` is a backend. Importing this door loads no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from edgeflex.registry import RUNTIMES, get, runtime_of
from edgeflex.runtimes.loop import Outcome, exits_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from edgeflex.bundle import Bundle
    from edgeflex.schema import SegmentProgram

    Float32 = NDArray[np.float32]

__all__ = ["Outcome", "Session", "SessionKind", "exits_for", "open_session"]


class Session(Protocol):
    """Segments ready to run; a context manager that touches hardware only inside ``with``."""

    @property
    def load_s(self) -> float:
        """Seconds that loading took; 0 before ``with``."""

    @property
    def segment_count(self) -> int:
        """Number of segments, and of exits."""

    def __enter__(self) -> Self:
        """Load every segment."""

    def __exit__(self, *exc: object) -> None:
        """Close."""

    def segment(self, index: int, x: Float32) -> tuple[Float32 | None, Float32]:
        """Run one segment by itself.

        Args:
            index: Which, counted from 0.
            x: The image ``[1, C, H, W]`` for segment 0, else the activations of the segment before.

        Returns:
            The activations (None after the last segment) and the probabilities ``[classes]``; both are copies.

        Raises:
            InputError: The index or the shape is wrong.
            DeviceError: The backend failed, or the session is closed.
        """

    def infer(self, x: Float32, thresholds: Sequence[float | None]) -> Outcome:
        """Run segments until one may be left, activations staying with the backend.

        Args:
            x: One image ``[1, C, H, W]``, float32.
            thresholds: One per segment; None never leaves there, the last always ends.

        Raises:
            InputError: The shape or the number of thresholds is wrong.
            DeviceError: The backend failed, or the session is closed.
        """

    def close(self) -> None:
        """Give everything back; a second call does nothing."""


class SessionKind(Protocol):
    """What a row of the registry's runtimes names."""

    def from_bundle(self, bundle: Bundle, *, threads: int = 1) -> Session:
        """Return a session over a checked bundle, executed as its manifest's ``settings`` say.

        Raises:
            UnsupportedError: The bundle was exported for another backend.
            InputError: ``threads`` is below 1.
        """

    def from_folder(
        self, folder: Path, segments: Sequence[SegmentProgram], *, threads: int = 1, settings: str = ""
    ) -> Session:
        """Return a session over a program that its exporter wrote into ``folder``.

        Raises:
            InputError: ``threads`` is below 1, or ``settings`` are none of this runtime's.
        """


def open_session(bundle: Bundle, runtime: str | None = None, threads: int = 1) -> Session:
    """Return a session over ``bundle``, to be entered with ``with``.

    Args:
        bundle: A checked bundle.
        runtime: What runs it; that of its backend by default.
        threads: Threads that compute.

    Raises:
        InputError: The runtime is unknown or ``threads`` is below 1.
        UnsupportedError: The runtime cannot run this bundle's backend.
        MissingDependencyError: The runtime's package is absent.
    """
    kind: SessionKind = get(RUNTIMES, runtime or runtime_of(bundle.manifest.backend))
    return kind.from_bundle(bundle, threads=threads)
