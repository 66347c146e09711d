"""How fast a machine is now against when it was calibrated, and how that is told beside promises about time.

Two fixed pieces of work are timed at both times: see ``profiles.yardsticks``. Nothing here changes a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeflex.schema import Conditions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgeflex.schema import Check

STEADY = (0.9, 1.1)  # within these, in times as long, the yardsticks vary by themselves
_REMEDY = (
    "The promised times hold at the speed of calibration. Stop other programs, fix the clock (on a Jetson with "
    "nvpmodel and jetson_clocks), or"
)
_AGAIN = "calibrate again at this speed, with --overwrite."
_DECODER_AGAIN = "measure it at this speed with `edgeflex profile --decoder CALIBRATION`, then plan and export again."


@dataclass(frozen=True)
class Pace:
    """How many times as long the same work takes now as when the machine was calibrated; None where nobody knows.

    Attributes:
        arithmetic: Of arithmetic in cache.
        memory: Of reading the same bytes from memory.
        decoder: Whether a decoder's times were measured then, which can be done again by itself.
    """

    arithmetic: float | None = None
    memory: float | None = None
    decoder: bool = False

    @property
    def known(self) -> tuple[float, ...]:
        """Those of the two that are known."""
        return tuple(one for one in (self.arithmetic, self.memory) if one is not None)

    @property
    def slower(self) -> bool:
        """Whether something takes clearly longer than it did."""
        return any(one > STEADY[1] for one in self.known)

    @property
    def quicker(self) -> bool:
        """Whether something takes clearly less time than it did."""
        return any(one < STEADY[0] for one in self.known)


def middle(states: Iterable[Conditions]) -> Conditions | None:
    """Return the speed in the middle of several samples, None where none of them tells one.

    Seconds are averaged, also those that a byte takes, so that the middle of equal work is the time of all of it.

    Args:
        states: Samples around one measurement; other conditions than speed are left out.
    """
    kept = tuple(states)
    arithmetic_s, byte_s = _mean(_arithmetic(kept)), _mean(_bytes(kept))
    if arithmetic_s is None and byte_s is None:
        return None
    machines = {one.machine for one in kept if one.arithmetic_s is not None or one.memory_bytes_per_s is not None}
    return Conditions(
        arithmetic_s=arithmetic_s,
        memory_bytes_per_s=None if byte_s is None else 1.0 / byte_s,
        machine=machines.pop() if len(machines) == 1 else None,
    )


def pace(then: Conditions | None, now: Iterable[Conditions], *, decoder: bool = False) -> Pace:
    """Return how many times as long the same work takes now; nothing is known of another computer's speed.

    Args:
        then: The machine's conditions when it was calibrated, None where a plan carries none.
        now: Those before and after a measurement.
        decoder: See ``Pace``.
    """
    here = middle(now)
    if then is None or here is None or then.machine != here.machine:
        return Pace(decoder=decoder)
    arithmetic = memory = None
    if then.arithmetic_s is not None and here.arithmetic_s is not None:
        arithmetic = here.arithmetic_s / then.arithmetic_s
    if then.memory_bytes_per_s is not None and here.memory_bytes_per_s is not None:
        memory = then.memory_bytes_per_s / here.memory_bytes_per_s
    return Pace(arithmetic, memory, decoder)


def pace_sentences(found: Pace, checks: Iterable[Check]) -> tuple[str, ...]:
    """Return what is to be said of the machine's speed beside promises; nothing where it explains nothing.

    Args:
        found: The speed now against that of calibration.
        checks: Promises and budgets with their verdicts; those about time matter.
    """
    late = any(check.unit == "s" and check.was_measured and not check.ok for check in checks)
    changed = found.slower or found.quicker
    if not found.known or not (changed or late):
        return ()
    if found.slower and found.quicker:
        speed = "has another speed now than at calibration"
    elif changed:
        speed = f"is {'slower' if found.slower else 'quicker'} now than at calibration"
    else:
        speed = "runs at the speed of calibration"
    told = f"This machine {speed}: {_times(found)}."
    remedy = f"{_REMEDY} {_DECODER_AGAIN if found.decoder else _AGAIN}"
    return (told, remedy) if late and found.slower else (told,)


def _times(found: Pace) -> str:
    if found.arithmetic is None:
        return f"reading memory takes {found.memory:.2f} times as long"
    first = f"arithmetic takes {found.arithmetic:.2f} times as long"
    return first if found.memory is None else f"{first}, reading memory {found.memory:.2f} times"


def _arithmetic(states: Sequence[Conditions]) -> list[float]:
    return [one.arithmetic_s for one in states if one.arithmetic_s is not None]


def _bytes(states: Sequence[Conditions]) -> list[float]:
    return [1.0 / one.memory_bytes_per_s for one in states if one.memory_bytes_per_s is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
