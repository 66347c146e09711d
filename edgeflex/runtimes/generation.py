"""One generation of a decoder while it happens: its tokens, their times, and what the cache counted meanwhile."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from edgeflex.schema_moe import TokenTime

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.runtimes.native import Times
    from edgeflex.runtimes.stays import Occupancy
    from edgeflex.schema_moe import DecoderCacheStats

Method = TypeVar("Method", bound="Callable[..., Any]")

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

    def note(self, token: int, total_s: float, times: Times, wait_s: float) -> None:
        """Add a token and the seconds that it took, of which ``wait_s`` for experts."""
        if self.tokens:
            part = TokenTime(total_s=total_s, dense_s=times.dense_s, expert_s=times.expert_s, wait_s=wait_s)
            self.times.append(part)
        else:
            self.first_token_s = total_s
        self.tokens.append(token)


def alone(method: Method) -> Method:
    """Return a method of a session that waits while another thread is in such a method: it holds ``control``."""

    @functools.wraps(method)
    def guarded(session: Any, *given: Any, **named: Any) -> Any:
        with session.control:
            return method(session, *given, **named)

    return cast("Method", guarded)


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
