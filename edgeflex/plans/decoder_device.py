"""What a planner asks a device in virtual time, and what it answers; who runs it is not known here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.schema import Interval
    from edgeflex.schema_gpu import PlacementName

    Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Serving:
    """What becomes of misses, and what stays on the GPU; names as a run takes them."""

    placement: PlacementName
    policy: str
    rule: Literal["auto", "upload", "static"]


@dataclass(frozen=True)
class Division:
    """Bytes of experts in both memories. ``exclusive``: RAM keeps no copy of what the GPU has."""

    vram_bytes: int
    ram_bytes: int
    exclusive: bool = False


@dataclass(frozen=True)
class DevicePoint:
    """One run of the trace in virtual time, per decoded token."""

    token_s: float
    hit_rate: float
    upload_bytes: float
    ahead_bytes: float
    flash_bytes: float
    waited: Mapping[str, float]


@dataclass(frozen=True)
class DeviceBound:
    """What no cache and no scheduler can beat."""

    token_s: float
    hit_rate: float | None


class VirtualDevice(Protocol):
    """Runs the calibration's trace in virtual time; sizes are ``[layers, experts]`` bytes."""

    @property
    def most_runs(self) -> int:
        """Runs that a plan may take."""

    def point(self, sizes: Ints, division: Division, serving: Serving) -> DevicePoint:
        """Return what the trace comes to; the same question is run once."""

    def interval(self, sizes: Ints, division: Division, serving: Serving) -> Interval:
        """Return the seconds of a token, with every rate at its lower and its upper end."""

    def first_token(self, sizes: Ints, division: Division, serving: Serving, chunk_tokens: int) -> Interval:
        """Return the seconds to the first token of the budget's prompt."""

    def bound(self, sizes: Ints, division: Division) -> DeviceBound:
        """Return what nothing beats."""

    def estimate_s(self, sizes: Ints, division: Division) -> float:
        """Return a guess of the seconds of a token, which only orders what is run."""
