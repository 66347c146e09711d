"""What users write about their budgets (``--memory 2MiB --latency 8ms:p95``) to a ``Budget``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeflex.errors import InputError
from edgeflex.schema import Budget, LatencyLimit, Tier
from edgeflex.units import parse_share, parse_size_bytes, parse_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_STATISTICS = ("mean", "p50", "p95", "p99", "worst")


def _known_statistic(statistic: str) -> str:
    if statistic and statistic not in _STATISTICS:
        raise InputError(f"statistic {statistic!r} is unknown. Choose one of {', '.join(_STATISTICS)}.")
    return statistic


def _latency_limit(text: str) -> LatencyLimit:
    seconds, _, statistic = text.partition(":")
    limit = {"limit_s": parse_time_s(seconds), "statistic": _known_statistic(statistic) or "mean"}
    return LatencyLimit.model_validate(limit)


def _confidence(text: str) -> float:
    level = parse_share(text)
    if not 0 < level < 1:
        raise InputError(f"{text!r} must lie between 0 and 100 %, both excluded. Write it as 95%.")
    return level


def _objective(text: str) -> tuple[str, str]:
    what, _, statistic = text.partition(":")
    if what not in {"latency", "memory", "drop"}:
        raise InputError(f"{text!r} is unknown. Choose latency, memory or drop.")
    if statistic and what != "latency":
        raise InputError(f"{text!r}: only latency has a statistic. Write it as {what}.")
    return what, _known_statistic(statistic)


def parse_budget(
    *,
    memory: str | None = None,
    latency: Sequence[str] = (),
    max_drop: str | None = None,
    confidence: str = "95%",
    minimize: str | None = None,
    disk: str | None = None,
) -> Budget:
    """Return the budget that the texts mean.

    Args:
        memory: Most bytes in host memory, for instance ``2MiB``.
        latency: Limits such as ``8ms`` (of the mean) or ``8ms:p95``.
        max_drop: Most accuracy to lose, for instance ``1%``.
        confidence: Of the accuracy promise.
        minimize: ``latency``, ``latency:STATISTIC``, ``memory`` or ``drop``; when absent, the first of latency,
            drop and memory that has no budget.
        disk: Most bytes of the program file.

    Raises:
        InputError: Texts that mean nothing; all of them stand in one error.
    """
    faults: list[str] = []

    def read(option: str, text: str | None, parse: Callable[[str], Any]) -> Any:
        if text is None:
            return None
        try:
            return parse(text)
        except InputError as error:
            faults.append(f"{option}: {error}")
            return None

    memory_bytes = read("--memory", memory, parse_size_bytes)
    disk_bytes = read("--disk", disk, parse_size_bytes)
    limits = [read("--latency", text, _latency_limit) for text in latency]
    drop = read("--max-drop", max_drop, parse_share)
    level = read("--confidence", confidence, _confidence)
    what, statistic = read("--minimize", minimize, _objective) or ("", "")
    if faults:
        raise InputError.collect("the budget", faults)
    if not what:
        free = [("latency", not limits), ("drop", drop is None), ("memory", memory_bytes is None)]
        what = next((name for name, missing in free if missing), "drop")
    return Budget.model_validate(
        {
            "memory_bytes": {} if memory_bytes is None else {Tier.HOST: memory_bytes},
            "latency": limits,
            "disk_bytes": disk_bytes,
            "max_drop": drop,
            "confidence": level,
            "minimize": what,
            "statistic": statistic or (limits[0].statistic if limits else "mean"),
        }
    )
