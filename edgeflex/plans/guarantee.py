"""Finite-sample promises about a mean loss, by betting, over plans tested in a fixed order.

Each plan's claim "its mean loss is below the limit" is tested by a gambler who starts with 1 and bets
against "the mean is at least the limit". Under that hypothesis no strategy makes the wealth grow on average,
so it ever reaches ``1 / (1 - confidence)`` with probability at most ``1 - confidence`` (Ville), at any sample
size and for any distribution of losses of at most 1 (Waudby-Smith and Ramdas 2024, "Estimating means of
bounded random variables by betting", section 4). Plans are tested safest first and testing stops at the
first that fails; then the whole sequence needs no correction (fixed-sequence testing, as in Angelopoulos
et al. 2021, "Learn then test").

How much to bet only changes the power. Their plug-in bet grows wealth at the best rate; here the bet is
instead the one that most probably reaches the goal by the last sample (Browne 1999, "Reaching goals by a
deadline", for Brownian wealth): with wealth w, goal g, m samples left and spread s, the share bet is
``phi(z) / (Phi(z) s sqrt(m))`` with ``Phi(z) = w / g``. On paired 0/1 differences it certifies where the plug-in
bet does and in about a quarter more of the borderline cases, close to the normal bound, which promises nothing.

The order of the samples is used as given. Shuffle them beforehand with a seed that does not depend on the
losses, and let no sample that chose a plan take part.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


_NORMAL = NormalDist()
_CAP = 0.99  # of the largest bet that can never lose everything
_PRIOR_VARIANCE = 0.25  # as in Waudby-Smith and Ramdas; counts as one sample
_GRID = 64
_ROUNDS = 4
_POWER = 0.8
_OVERHEAD = 1.1  # of bets over the normal approximation, measured

_SHARES = np.concatenate([np.geomspace(1e-8, 0.5, 1000), 1.0 - np.geomspace(0.5, 1e-6, 400)[1:]])
_HAZARD = np.array([_NORMAL.pdf(_NORMAL.inv_cdf(share)) / share for share in _SHARES.tolist()])


def certify(losses: npt.ArrayLike, limit: float, confidence: float) -> int | None:
    """Return the index of the last plan certified before the first failure, or None if the first fails.

    With probability at least ``confidence`` over the samples, every plan up to the returned index has a
    mean loss below ``limit``. Plans behind the first failure are never certified, even if they would pass.

    Args:
        losses: [plans, samples], safest plan first; losses in [0, 1] or paired differences in [-1, 1].
        limit: What the mean loss must stay below, between 0 and 1.
        confidence: Between 0 and 1.

    Raises:
        InputError: The losses are not such a table, or limit or confidence is out of range.
    """
    table = _checked(losses, 2, limit, confidence)
    wealth = _wealth(table, np.full(len(table), limit), confidence)
    failed = np.flatnonzero(wealth * (1.0 - confidence) < 1.0)
    last = (int(failed[0]) if len(failed) else len(table)) - 1
    return last if last >= 0 else None


def betting_p_value(sample: npt.ArrayLike, limit: float, confidence: float = 0.95) -> float:
    """Return a p-value of "the mean is at least ``limit``", aimed at ``confidence``.

    It is one over the greatest wealth, valid at every level. The bets stop at the goal, so it hardly falls
    below ``1 - confidence``.

    Args:
        sample: [samples], values of at most 1 in the order in which to bet.
        limit: Between 0 and 1.
        confidence: Level that the bets aim at.

    Raises:
        InputError: The sample, limit or confidence is out of range.
    """
    row = _checked(sample, 1, limit, confidence)
    return min(1.0, 1.0 / float(_wealth(row[None, :], np.array([limit]), confidence)[0]))


def upper_bound(losses: npt.ArrayLike, confidence: float) -> float:
    """Return an upper bound of the mean loss: the least limit that the betting test certifies.

    The answer lies between -1 and 1 and is 1 when no limit below it can be certified.

    Args:
        losses: [samples], values of at most 1 in the order in which to bet.
        confidence: Between 0 and 1.

    Raises:
        InputError: The sample or the confidence is out of range.
    """
    row = _checked(losses, 1, 0.5, confidence)
    low, high = -1.0, 1.0
    for _ in range(_ROUNDS):
        limits = np.linspace(low, high, _GRID + 1)[1:-1]
        passed = _wealth(row[None, :], limits, confidence) * (1.0 - confidence) >= 1.0
        refused = np.flatnonzero(~passed)
        if len(refused) and refused[-1] == len(limits) - 1:
            low = float(limits[-1])
            continue
        first = int(refused[-1]) + 1 if len(refused) else 0
        low, high = (float(limits[first - 1]) if first else low), float(limits[first])
    return high


def samples_needed(losses: npt.ArrayLike, limit: float, confidence: float) -> int | None:
    """Return roughly how many samples certify ``limit`` in four cases of five, for messages.

    Mean and spread are taken from ``losses``, so this is an estimate and no promise; None if the mean is
    not below the limit, when more samples would not help.

    Args:
        losses: [samples], values of at most 1.
        limit: Between 0 and 1.
        confidence: Between 0 and 1.

    Raises:
        InputError: The sample, limit or confidence is out of range.
    """
    row = _checked(losses, 1, limit, confidence)
    room = limit - float(row.mean())
    if room <= 0.0:
        return None
    quantiles = _NORMAL.inv_cdf(confidence) + _NORMAL.inv_cdf(_POWER)
    normal = (_OVERHEAD * quantiles * float(row.std()) / room) ** 2
    least = math.log(1.0 - confidence) / math.log1p(-limit * _CAP)
    return math.ceil(max(normal, least))


def _wealth(samples: Floats, limits: Floats, confidence: float) -> Floats:
    """Return the greatest wealth of one gambler per row, betting towards ``1 / (1 - confidence)``.

    ``samples`` is [rows or 1, samples], ``limits`` [rows]. The bet before sample t uses samples 1 to t - 1 only,
    and ``bet < 1 / (1 - limit)`` keeps the wealth above zero for every loss of at most 1.
    """
    goal = 1.0 / (1.0 - confidence)
    count = samples.shape[1]
    spread = _spreads(samples) * np.sqrt(np.arange(count, 0, -1))
    most = _CAP / (1.0 - limits)
    wealth = np.ones(len(limits))
    greatest = wealth.copy()
    for step in range(count):
        bet = np.minimum(np.interp(wealth / goal, _SHARES, _HAZARD) / spread[:, step], most)
        bet = np.where(greatest >= goal, 0.0, bet)
        wealth = wealth * (1.0 + bet * (limits - samples[:, step]))
        greatest = np.maximum(greatest, wealth)
    return greatest


def _spreads(samples: Floats) -> Floats:
    """Return the standard deviation of the samples before each one, [rows, samples], with a prior."""
    before = np.arange(samples.shape[1], dtype=np.float64)
    total = np.cumsum(samples, axis=1) - samples
    squares = np.cumsum(samples**2, axis=1) - samples**2
    around = np.maximum(squares - total**2 / np.maximum(before, 1.0), 0.0)
    spread: Floats = np.sqrt((_PRIOR_VARIANCE + around) / (before + 1.0))
    return spread


def _checked(losses: npt.ArrayLike, dimensions: int, limit: float, confidence: float) -> Floats:
    try:
        values = np.asarray(losses, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError("losses are not a table of numbers. Give one row a plan, all of one length.") from None
    axes = "[plans, samples]" if dimensions == 2 else "[samples]"
    faults = []
    if values.ndim != dimensions:
        faults.append(f"losses have {values.ndim} dimensions; give {axes}.")
    elif values.size == 0:
        faults.append(f"losses are empty, of shape {values.shape}; give at least one plan and sample.")
    elif not np.all(np.isfinite(values)):
        faults.append(f"{int((~np.isfinite(values)).sum())} losses are not numbers; leave those samples out.")
    elif values.max() > 1.0:
        faults.append(f"the greatest loss is {values.max():g}; scale losses to at most 1.")
    if not 0.0 < limit < 1.0:
        faults.append(f"limit {limit} must lie between 0 and 1; give a share such as 0.01.")
    if not 0.0 < confidence < 1.0:
        faults.append(f"confidence {confidence} must lie between 0 and 1; give a share such as 0.95.")
    if faults:
        raise InputError.collect("certification", faults)
    return values
