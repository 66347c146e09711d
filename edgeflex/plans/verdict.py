"""Why no plan fits: which budgets, the least that can be reached, and the cheapest way out.

Every figure comes from the same exact search as the plans, asked about one budget at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeflex.errors import EdgeflexError, InfeasibleError
from edgeflex.plans.search import Question, search
from edgeflex.units import format_growth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from edgeflex.plans.program import Limit

_TOLERANCE = 1e-6
_HALVINGS = 20
_LEAST_LIMIT = 1e-9  # a limit of zero can be divided by too


@dataclass(frozen=True)
class _Least:
    """The least value of one limited quantity; ``kept`` if all other limits hold with it."""

    limit: Limit
    value: float
    kept: bool

    @property
    def increase(self) -> float:
        """By how much of itself the limit must grow; infinite from zero."""
        if self.value <= self.limit.most:
            return 0.0
        return (self.value - self.limit.most) / self.limit.most if self.limit.most > 0 else math.inf


class _Asker:
    """Asks variants of one question within one time limit."""

    def __init__(self, question: Question, time_limit_s: float, now: Callable[[], float]) -> None:
        self._question = question
        self._now = now
        self._deadline = now() + time_limit_s

    def least(self, limit: Limit, others: Sequence[Limit]) -> float | None:
        """Return the least of ``limit``'s quantity within ``others``, or None if nothing fits them."""
        return self._search(replace(self._question, objective=limit.quantity, limits=tuple(others)))

    def fits(self, limits: Sequence[Limit]) -> bool:
        """Say whether a plan keeps ``limits``."""
        return self._search(replace(self._question, limits=tuple(limits)), tolerance=0.5) is not None

    def _search(self, question: Question, tolerance: float = _TOLERANCE) -> float | None:
        left_s = max(self._deadline - self._now(), 0.05)
        answer = search(question, tolerance=tolerance, time_limit_s=left_s, now=self._now)
        if answer.chosen is None and not answer.complete:
            raise EdgeflexError(
                "no plan fits the budgets, and the time limit struck before the reason was found. "
                "Allow more time to see which budget is in the way."
            )
        return None if answer.chosen is None else answer.objective


def explain(question: Question, *, time_limit_s: float, now: Callable[[], float]) -> InfeasibleError:
    """Return the error that says why ``question``, known to have no plan, has none.

    Args:
        question: What was asked.
        time_limit_s: Seconds for the whole explanation.
        now: Gives seconds.

    Raises:
        EdgeflexError: Time ran out before the explanation was complete.
    """
    asker = _Asker(question, time_limit_s, now)
    limits = question.limits
    binding = list(limits)
    for limit in limits:
        rest = [one for one in binding if one is not limit]
        if not asker.fits(rest):
            binding = rest
    if not binding:
        return _ruled_out()
    leasts = [_least(asker, limit, limits) for limit in limits]
    binding = _hopeless(leasts) or binding
    return _answer(leasts, binding, _relaxation(asker, leasts, binding))


def explain_points(limits: Sequence[Limit], points: Sequence[Sequence[float]], hint: str = "") -> InfeasibleError:
    """Return the error that says why none of some plans, all of them known, keeps ``limits``.

    Args:
        limits: At least one.
        points: At least one; what each plan takes of each limited quantity.
        hint: What else may help, as a sentence.
    """
    every = range(len(limits))

    def keeping(chosen: Iterable[int]) -> list[Sequence[float]]:
        kept = list(chosen)
        return [point for point in points if all(point[index] <= limits[index].most for index in kept)]

    binding = list(every)
    leasts = []
    for index in every:
        if not keeping(one for one in binding if one != index):
            binding.remove(index)
        rest = keeping(one for one in every if one != index)
        leasts.append(_Least(limits[index], min(point[index] for point in rest or points), kept=bool(rest)))
    named = _hopeless(leasts) or [limits[index] for index in binding]
    single = _single(leasts)
    if single is None:
        ratios = [
            [value / max(limit.most, _LEAST_LIMIT) for value, limit in zip(one, limits, strict=True)] for one in points
        ]
        nearest = points[min(range(len(points)), key=lambda one: max(ratios[one]))]
        single = _together([(limit, value) for limit, value in zip(limits, nearest, strict=True) if value > limit.most])
    return _answer(leasts, named, f"{single} {hint}".rstrip())


def _hopeless(leasts: Sequence[_Least]) -> list[Limit]:
    """Return the limits that nothing keeps, whatever the others are."""
    return [one.limit for one in leasts if not one.kept and one.value > one.limit.most + one.limit.slack]


def _answer(leasts: Sequence[_Least], binding: Sequence[Limit], relaxation: str) -> InfeasibleError:
    named = _join(limit.quantity.name for limit in binding)
    together = " together" if len(binding) > 1 and not _hopeless(leasts) else ""
    said = "; ".join(_say(one, alone=len(leasts) == 1) for one in leasts)
    return InfeasibleError(
        f"no plan meets {named}{together}: {said}. {relaxation}",
        binding=[limit.quantity.name for limit in binding],
        least={one.limit.quantity.name: one.value for one in leasts},
        relaxation=relaxation,
    )


def _least(asker: _Asker, limit: Limit, limits: Sequence[Limit]) -> _Least:
    value = asker.least(limit, [one for one in limits if one is not limit])
    if value is not None:
        return _Least(limit, value, kept=True)
    alone = asker.least(limit, [])
    return _Least(limit, math.inf if alone is None else alone, kept=False)


def _ruled_out() -> InfeasibleError:
    relaxation = "Loosen a rule or a tie of the table."
    return InfeasibleError(
        f"no plan keeps the rules of the cost table, whatever the budgets: no budget would help. {relaxation}",
        binding=["rules"],
        relaxation=relaxation,
    )


def _say(one: _Least, *, alone: bool) -> str:
    show = one.limit.quantity.show
    others = "" if alone else f" with all other budgets {'kept' if one.kept else 'left aside'}"
    return f"{one.limit.quantity.name} is limited to {show(one.limit.most)}, least {show(one.value, up=True)}{others}"


def _join(names: Iterable[str]) -> str:
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"


def _relaxation(asker: _Asker, leasts: Sequence[_Least], binding: Sequence[Limit]) -> str:
    """Return the cheapest change: one budget to its least, or several by one common factor."""
    single = _single(leasts)
    if single is not None:
        return single
    lone = [(one.limit, one.value) for one in leasts if one.increase > 0]
    if asker.fits([replace(one.limit, most=max(one.limit.most, one.value)) for one in leasts]):
        return _together(lone)
    raised = _common(asker, leasts)
    if raised is None:
        names = _join([limit.quantity.name for limit in binding])
        return f"No single budget helps; raise {names} together."
    return _together(raised)


def _single(leasts: Sequence[_Least]) -> str | None:
    """Return the cheapest change of one budget, or None where none helps."""
    single = [one for one in leasts if one.kept]
    if not single:
        return None
    cheapest = min(single, key=lambda one: one.increase)
    return f"Raise {_raise(cheapest.limit, cheapest.value)}."


def _together(raised: Sequence[tuple[Limit, float]]) -> str:
    return f"No single budget helps; raise {_join([_raise(*pair) for pair in raised])}."


def _raise(limit: Limit, value: float) -> str:
    show = limit.quantity.show
    share = f", {format_growth(limit.most, value)}" if limit.most > 0 else ""
    return f"{limit.quantity.name} from {show(limit.most)} to {show(value, up=True)}{share}"


def _common(asker: _Asker, leasts: Sequence[_Least]) -> list[tuple[Limit, float]] | None:
    """Return limits grown by the least common factor at which a plan fits, the needless ones left out."""
    if any(one.limit.most <= 0 for one in leasts):
        return None

    def grown(factor: float) -> list[Limit]:
        return [replace(one.limit, most=_whole(one.limit, factor)) for one in leasts]

    low, high = 1.0, 1.0 + max(one.increase for one in leasts)
    while not asker.fits(grown(high)):
        low, high = high, 2.0 * high
        if high > 1e9:
            return None
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if asker.fits(grown(middle)) else (middle, high)
    limits = grown(high)
    for place, one in enumerate(leasts):
        back = [*limits[:place], one.limit, *limits[place + 1 :]]
        if asker.fits(back):
            limits = back
    return [(one.limit, new.most) for one, new in zip(leasts, limits, strict=True) if new.most > one.limit.most]


def _whole(limit: Limit, factor: float) -> float:
    grown = limit.most * factor
    return float(math.ceil(grown)) if limit.quantity.kind in {"memory", "disk"} else grown
