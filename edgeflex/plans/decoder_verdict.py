"""Why no plan of a decoder fits, and when streaming experts is declined.

Every figure comes from the same search as the plans, asked about one limit at a time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeflex.errors import InfeasibleError
from edgeflex.plans.decoder_search import LIMIT_GOALS, Found, Limits, Search
from edgeflex.units import format_bytes, format_exact_bytes, format_growth, format_nats, format_time

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeflex.schema import Interval

_NAMES = {
    "memory_bytes": "memory",
    "token_s": "time per token",
    "first_token_s": "time to first token",
    "disk_bytes": "disk",
    "kl": "max KL",
}
_HALVINGS = 12


class DeclinedError(InfeasibleError):
    """Streaming experts is not worth starting on this device within this budget.

    Attributes:
        reason: ``cycle`` (the budget holds less than one token's experts) or ``link`` (the store is too slow).
        cycle_bytes: T, the bytes of the experts that one token uses.
        token_s: The predicted interval nearest to the budget, or None where nothing can be predicted.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        cycle_bytes: int,
        token_s: Interval | None,
        binding: Sequence[str],
        least: Mapping[str, float],
        relaxation: str,
    ) -> None:
        """Keep the answer's fields beside its text."""
        super().__init__(message, binding=binding, least=least, relaxation=relaxation)
        self.reason = reason
        self.cycle_bytes = cycle_bytes
        self.token_s = token_s

    def details(self) -> dict[str, object]:
        """Return what ``InfeasibleError`` does, and the verdict with T and the predicted interval."""
        token_s = None if self.token_s is None else self.token_s.model_dump()
        extra = {"verdict": "decline", "reason": self.reason, "cycle_bytes": self.cycle_bytes, "token_s": token_s}
        return {**super().details(), **extra}


def explain(search: Search, limits: Limits) -> InfeasibleError:
    """Return the error that says why no combination keeps ``limits``: declined, or infeasible.

    Args:
        search: The search that found nothing.
        limits: What was asked.

    Raises:
        EdgeflexError: The replays that were allowed are used up before the reason was found.
    """
    binding = list(limits.set_names)
    for name in limits.set_names:
        rest = [one for one in binding if one != name]
        if search.best(_only(limits, rest), "latency") is None:
            binding = rest
    if not binding:
        return _nothing(search)
    leasts = {name: _least(search, limits, name) for name in limits.set_names}
    relaxation = _relaxation(search, limits, leasts)
    least = {_NAMES[name]: value for name, (value, _) in leasts.items()}
    named = [_NAMES[name] for name in binding]
    said = "; ".join(_say(limits, name, *leasts[name]) for name in limits.set_names)
    together = " together" if len(binding) > 1 else ""
    message = f"no plan meets {_join(named)}{together}: {said}. {relaxation}"
    declined = _declined(search, limits, binding)
    if declined is None:
        return InfeasibleError(message, binding=named, least=least, relaxation=relaxation)
    reason, why, cycle, interval = declined
    return DeclinedError(
        f"declined: {why} {message[0].upper()}{message[1:]}",
        reason=reason,
        cycle_bytes=cycle,
        token_s=interval,
        binding=named,
        least=least,
        relaxation=relaxation,
    )


def _only(limits: Limits, names: Sequence[str]) -> Limits:
    return Limits(**{name: getattr(limits, name) for name in names})


def _nothing(search: Search) -> InfeasibleError:
    relaxation = "Calibrate and measure more precisions."
    return InfeasibleError(
        f"no plan exists for {search.space.graph.name!r} whatever the budget. {relaxation}", relaxation=relaxation
    )


# --- the least that can be reached ---------------------------------------------------------------------


def _least(search: Search, limits: Limits, name: str) -> tuple[float, bool]:
    """Return the least of one limited quantity, and whether all other limits hold with it."""
    found = search.best(limits.without(name), LIMIT_GOALS[name])
    if found is not None:
        return found.value, True
    alone = search.best(Limits(), LIMIT_GOALS[name])
    return (math.inf if alone is None else alone.value), False


def _show(name: str, value: float, *, up: bool = False) -> str:
    """Return a value with its unit; with ``up`` no less, so that it can be given as a limit."""
    if name.endswith("_bytes"):
        return format_exact_bytes(value)
    return format_time(value, up=up) if name.endswith("_s") else f"{format_nats(value, up=up)} nats per token"


def _say(limits: Limits, name: str, value: float, kept: bool) -> str:
    others = f" with all other budgets {'kept' if kept else 'left aside'}" if len(limits.set_names) > 1 else ""
    least = _show(name, value, up=True)
    return f"{_NAMES[name]} is limited to {_show(name, getattr(limits, name))}, least {least}{others}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _relaxation(search: Search, limits: Limits, leasts: Mapping[str, tuple[float, bool]]) -> str:
    """Return the cheapest change: one limit to its least, or all short ones by one common factor."""
    single = {name: value for name, (value, kept) in leasts.items() if kept}
    if single:
        name = min(single, key=lambda one: single[one] / max(getattr(limits, one), 1e-30))
        return f"Raise {_raise(limits, name, single[name])}."
    raised = _common(search, limits)
    if raised is None:
        return f"No single budget helps; raise {_join([_NAMES[name] for name in leasts])} together."
    changed = [name for name in limits.set_names if getattr(raised, name) > getattr(limits, name)]
    return f"No single budget helps; raise {_join([_raise(limits, one, getattr(raised, one)) for one in changed])}."


def _raise(limits: Limits, name: str, value: float) -> str:
    most = getattr(limits, name)
    share = f", {format_growth(most, value)}" if most > 0 else ""
    return f"{_NAMES[name]} from {_show(name, most)} to {_show(name, value, up=True)}{share}"


def _common(search: Search, limits: Limits) -> Limits | None:
    """Return limits grown by the least common factor at which a plan fits, needless ones put back."""
    low, high = 1.0, 2.0
    while search.best(_grown(limits, high), "latency") is None:
        low, high = high, 2.0 * high
        if high > 1e6:
            return None
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if search.best(_grown(limits, middle), "latency") is None else (low, middle)
    raised = _grown(limits, high)
    for name in limits.set_names:
        back = replace(raised, **{name: getattr(limits, name)})
        if search.best(back, "latency") is not None:
            raised = back
    return raised


def _grown(limits: Limits, factor: float) -> Limits:
    grown = {name: getattr(limits, name) * factor for name in limits.set_names}
    whole = {name: math.ceil(value) if name.endswith("_bytes") else value for name, value in grown.items()}
    return replace(limits, **whole)


# --- declining -------------------------------------------------------------------------------------------


def _declined(search: Search, limits: Limits, binding: Sequence[str]) -> tuple[str, str, int, Interval | None] | None:
    """Return reason, text, T and interval if streaming experts is what fails, or None."""
    if "memory_bytes" in binding and "token_s" not in binding and "first_token_s" not in binding:
        found = search.best(limits.without("memory_bytes"), "memory")
        return None if found is None else _below_cycle(search, limits, found)
    if not {"token_s", "first_token_s"} & set(binding):
        return None
    eased = limits.without("token_s").without("first_token_s")
    found = search.best(eased, "latency")
    return None if found is None or found.setting.resident else _slow_link(search, limits, found)


def _below_cycle(search: Search, limits: Limits, found: Found) -> tuple[str, str, int, Interval | None]:
    mix, chunk = found.mix, found.setting.chunk_tokens
    left = max(0, int(search.room_bytes(mix, chunk, limits.memory_bytes)))
    beside = mix.memory_bytes + search.predictor.fixed_bytes(chunk)
    interval = search.predictor.predict(mix, found.setting).token_s
    why = (
        f"one token uses {format_bytes(mix.cycle_bytes)} of experts (T), and the budget of "
        f"{format_bytes(limits.memory_bytes or 0)} leaves {format_bytes(left)} beside {format_bytes(beside)} for the "
        f"dense part, keys and values, activations and the runtime; with the least memory a token would take "
        f"{format_time(interval.low)} to {format_time(interval.high)}."
    )
    return "cycle", why, mix.cycle_bytes, interval


def _slow_link(search: Search, limits: Limits, found: Found) -> tuple[str, str, int, Interval | None] | None:
    """Say that the store is too slow, if work alone would have kept the limits."""
    mix, setting, predictor = found.mix, found.setting, search.predictor
    compute = predictor.compute_s(mix, setting.threads)
    first = predictor.first_compute_s(mix, setting.threads, setting.chunk_tokens)
    if compute > (limits.token_s or math.inf) or first > (limits.first_token_s or math.inf):
        return None
    predicted = predictor.predict(mix, setting)
    token = predicted.token_s
    slow = limits.token_s is not None and token.value > limits.token_s
    what = "a token" if slow else "the first token"
    limit = (limits.token_s if slow else limits.first_token_s) or 0.0
    value = token if slow else predicted.first_token_s
    why = (
        f"the store is too slow for {format_time(limit)} to {what}: its work takes "
        f"{format_time(compute if slow else first)}, but with {format_bytes(predicted.bytes_per_token)} read per token "
        f"(T is {format_bytes(mix.cycle_bytes)}) at "
        f"{format_bytes(search.space.rates.read_bytes_per_s)} per second it would take "
        f"{format_time(value.low)} to {format_time(value.high)}."
    )
    return "link", why, mix.cycle_bytes, token
