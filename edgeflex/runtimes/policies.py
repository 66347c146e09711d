"""Which expert leaves when room is needed: replacement policies over ids and sizes, free of any clock or device.

Every policy is told each event (the experts that one layer uses in one forward pass) before room is made for
it, sees what enters, and names what leaves. An expert's *key* is ``layer * experts + expert``. Equal scores are
broken by (layer, expert), so a run can be replayed exactly. Nothing here depends on when a read finishes.

    lru, lru-layer      least recently used; over all layers, or in the layer that holds the most bytes
    lfu, decayed-lfu    least used ever; with uses that fade, half-life 32 steps
    lfru                uses / (steps since the last one + 1)
    lru-2               oldest second-last use (O'Neil et al., SIGMOD 1993)
    arc                 adaptive replacement (Megiddo and Modha, FAST 2003), lists measured in bytes
    s3-fifo             small, main and ghost queue (Yang et al., SOSP 2023)
    sieve               one queue and a moving hand (Zhang et al., NSDI 2024)
    mrs                 minus recent score: faded router weights (HybriMoE, DAC 2025)
    enu                 estimated next use from the layer order and the recent rate of use; the default
    static              a fixed order of worth
    random              seeded, as a floor to compare with
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeflex.errors import InputError
from edgeflex.runtimes.queue_policies import ArcPolicy, LayerLruPolicy, LruPolicy, S3FifoPolicy, SievePolicy
from edgeflex.runtimes.ranked_policies import (
    DecayedLfuPolicy,
    EnuPolicy,
    LfruPolicy,
    LfuPolicy,
    Lru2Policy,
    MrsPolicy,
    NextUsePolicy,
    RandomPolicy,
    StaticPolicy,
)
from edgeflex.runtimes.replacement import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["DEFAULT_POLICY", "POLICIES", "NextUsePolicy", "Policy", "make_policy", "unknown_policies"]

_PLAIN: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        LruPolicy,
        LayerLruPolicy,
        LfuPolicy,
        DecayedLfuPolicy,
        LfruPolicy,
        Lru2Policy,
        ArcPolicy,
        S3FifoPolicy,
        SievePolicy,
        MrsPolicy,
    )
}
DEFAULT_POLICY = EnuPolicy.name
POLICIES: tuple[str, ...] = (DEFAULT_POLICY, *_PLAIN, StaticPolicy.name, RandomPolicy.name)


def unknown_policies(names: Iterable[str], known: Sequence[str] = POLICIES) -> list[str]:
    """Return a fault for every name that is not known."""
    return [f"policy {name!r} is unknown. Name one of: {', '.join(known)}." for name in names if name not in known]


def make_policy(
    name: str,
    *,
    layers: int,
    experts: int,
    top_k: int = 0,
    seed: int = 0,
    static: Iterable[tuple[int, int]] | None = None,
) -> Policy:
    """Return a new policy by name.

    Args:
        name: One of ``POLICIES``.
        layers: Of the decoder, with and without experts.
        experts: Of a layer, at most.
        top_k: Experts that a token uses in a layer; ``enu`` tells passes of many tokens by it. 0: unknown.
        seed: For ``random``.
        static: For ``static``: (layer, expert) pairs, the most valuable first.

    Raises:
        InputError: The name is unknown, or ``static`` has no order.
    """
    if name == EnuPolicy.name:
        return EnuPolicy(layers, experts, top_k=top_k)
    if name == RandomPolicy.name:
        return RandomPolicy(layers, experts, seed)
    if name == StaticPolicy.name:
        if static is None:
            raise InputError(
                "policy 'static' has no order of worth. Give one, from the counts of a calibration trace for instance."
            )
        return StaticPolicy(layers, experts, static)
    if name not in _PLAIN:
        raise InputError(unknown_policies([name])[0])
    return _PLAIN[name](layers, experts)
