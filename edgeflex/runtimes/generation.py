"""One generation of a decoder while it happens: its tokens, their times, and what the cache counted meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.runtimes.stays import Occupancy
    from edgeflex.schema_moe import DecoderCacheStats, TokenTime

StoppedBy = Literal["end", "length", "stop", "context", "interrupt"]


@dataclass
class Run:
    """One generation.

    Attributes:
        number: Counted from 0 in its session.
        prompt_tokens: Of the prompt.
        before: The cache's counters when it began.
        uses: ``[layers, experts]`` when it began.
        stays: How long experts were resident when it began.
        tokens: So far.
        times: Of all tokens but the first.
        first_token_s: Of the first.
        stopped_by: Why it ended.
    """

    number: int
    prompt_tokens: int
    before: DecoderCacheStats
    uses: NDArray[np.int64]
    stays: Occupancy
    tokens: list[int] = field(default_factory=list)
    times: list[TokenTime] = field(default_factory=list)
    first_token_s: float = 0.0
    stopped_by: StoppedBy = "length"


def counted_since(before: DecoderCacheStats, after: DecoderCacheStats) -> DecoderCacheStats:
    """Return the counters that came after ``before``; limits and the peak as they are."""
    kept = {"capacity_bytes", "peak_bytes", "prefetch_stopped"}
    old, new = before.model_dump(), after.model_dump()
    changed = {
        name: tuple(a - b for a, b in zip(value, old[name], strict=True))
        if isinstance(value, tuple)
        else value - old[name]
        for name, value in new.items()
        if name not in kept and not isinstance(value, str)
    }
    return after.model_copy(update=changed)
