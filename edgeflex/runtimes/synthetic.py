"""Makes routing traces of known nature, to see what a cache and a scheduler do where the answer is understood.

    uniform   every expert alike: no cache can help beyond its share of the experts
    zipf      popularity falls as 1 / rank; each layer has its own order of experts
    markov    an expert of the token before stays, or follows from one of the layer above, else Zipf's law
    cyclic    every layer walks through its experts in turn: the worst case of LRU
    phases    Zipf's law whose order of experts is drawn anew several times: the text changes its subject

The same arguments give the same trace on every machine; the seed is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from edgeflex.errors import InputError
from edgeflex.runtimes.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    Draw = np.random.Generator

TraceKind = Literal["uniform", "zipf", "markov", "cyclic", "phases"]
TRACE_KINDS: tuple[TraceKind, ...] = get_args(TraceKind)

# Far above every logarithm of a weight plus Gumbel noise: what is kept, or follows, comes before what is drawn.
_KEPT = 2e6
_FOLLOWS = 1e6


@dataclass(frozen=True)
class Routing:
    """What a synthetic trace is made of.

    Args:
        layers: With experts.
        experts: Of each layer.
        top_k: Experts that a token uses in a layer.
        tokens: Tokens decoded.
        prompt_tokens: Tokens of the one prompt before them; 0 for none.
        expert_bytes: Of every expert.
        exponent: Of Zipf's law; 0 is uniform.
        stay: ``markov``: chance that an expert of the token before is used again.
        follow: ``markov``: chance that an expert of the layer above brings its successor with it.
        phases: ``phases``: how many orders of experts there are, each for as many tokens.

    Raises:
        InputError: A number is impossible; every one of them is named.
    """

    layers: int = 16
    experts: int = 64
    top_k: int = 8
    tokens: int = 128
    prompt_tokens: int = 0
    expert_bytes: int = 4_500_000
    exponent: float = 1.0
    stay: float = 0.5
    follow: float = 0.25
    phases: int = 4

    def __post_init__(self) -> None:
        """Check every number."""
        least = {"layers": 1, "experts": 1, "top_k": 1, "tokens": 1, "prompt_tokens": 0, "expert_bytes": 1, "phases": 1}
        faults = [
            f"{name} is {getattr(self, name)}; at least {limit} is needed"
            for name, limit in least.items()
            if getattr(self, name) < limit
        ]
        if self.top_k > self.experts:
            faults.append(f"top_k is {self.top_k} of {self.experts} experts; a token uses an expert once at most")
        if not 0.0 <= self.exponent < 100.0:
            faults.append(f"exponent is {self.exponent}; at least 0 and below 100 is needed")
        faults += [
            f"{name} is {getattr(self, name)}; a chance from 0 to 1 is needed"
            for name in ("stay", "follow")
            if not 0.0 <= getattr(self, name) <= 1.0
        ]
        if faults:
            raise InputError.collect("synthetic trace", faults)


def synthetic_trace(kind: TraceKind, routing: Routing, *, seed: int = 0) -> Trace:
    """Return a trace of the given nature.

    Args:
        kind: One of ``TRACE_KINDS``.
        routing: Its sizes.
        seed: Of everything that is drawn.

    Raises:
        InputError: The kind is unknown.
    """
    makers: dict[str, Callable[[Routing, Draw], Ids]] = {
        "uniform": _uniform,
        "zipf": _zipf,
        "markov": _markov,
        "cyclic": _cyclic,
        "phases": _phases,
    }
    if kind not in makers:
        raise InputError(f"synthetic trace {kind!r} is unknown. Name one of: {', '.join(TRACE_KINDS)}.")
    draw = np.random.default_rng(seed)
    chosen = makers[kind](routing, draw)
    return _trace(kind, routing, chosen, _weights(chosen.shape, draw))


# --- what is chosen: [tokens, layers, top_k] ids, the prompt's tokens first ----------------------------


def _uniform(routing: Routing, draw: Draw) -> Ids:
    return _drawn(routing, np.zeros((routing.layers, routing.experts)), _token_count(routing), draw)


def _zipf(routing: Routing, draw: Draw) -> Ids:
    return _drawn(routing, _log_popularity(routing, draw), _token_count(routing), draw)


def _phases(routing: Routing, draw: Draw) -> Ids:
    """Draw by Zipf's law; the prompt belongs to the first phase."""
    ends = np.linspace(0, routing.tokens, routing.phases + 1).round().astype(int)
    lengths = np.diff(ends)
    lengths[0] += routing.prompt_tokens
    parts = [_drawn(routing, _log_popularity(routing, draw), int(length), draw) for length in lengths]
    return np.concatenate(parts)


def _cyclic(routing: Routing, draw: Draw) -> Ids:
    """Walk through the experts, ``top_k`` further with each token; each layer starts somewhere else."""
    starts = draw.integers(routing.experts, size=(1, routing.layers, 1))
    steps = np.arange(_token_count(routing))[:, None, None] * routing.top_k + np.arange(routing.top_k)
    return (starts + steps) % routing.experts


def _markov(routing: Routing, draw: Draw) -> Ids:
    logs = _log_popularity(routing, draw)
    successor = np.stack([draw.permutation(routing.experts) for _ in range(routing.layers)])
    chosen = np.empty((_token_count(routing), routing.layers, routing.top_k), dtype=np.int64)
    for token in range(len(chosen)):
        for layer in range(routing.layers):
            scores = logs[layer] + draw.gumbel(size=routing.experts)
            if layer:
                above = successor[layer][chosen[token, layer - 1]]
                scores[above[draw.random(routing.top_k) < routing.follow]] += _FOLLOWS
            if token:
                before = chosen[token - 1, layer]
                scores[before[draw.random(routing.top_k) < routing.stay]] += _KEPT
            chosen[token, layer] = _largest(scores, routing.top_k)
    return chosen


def _token_count(routing: Routing) -> int:
    return routing.prompt_tokens + routing.tokens


def _log_popularity(routing: Routing, draw: Draw) -> NDArray[np.float64]:
    """Return ``[layers, experts]`` logarithms of Zipf's weights, in an order of its own for each layer."""
    falling = -routing.exponent * np.log(np.arange(1, routing.experts + 1))
    return np.stack([draw.permutation(falling) for _ in range(routing.layers)])


def _drawn(routing: Routing, logs: NDArray[np.float64], tokens: int, draw: Draw) -> Ids:
    """Draw ``top_k`` different experts for every token and layer.

    The largest of logarithm plus Gumbel noise are a draw without replacement (Yellott 1977; Kool et al., ICML 2019).
    """
    noise = draw.gumbel(size=(tokens, routing.layers, routing.experts))
    return _largest(logs + noise, routing.top_k)


def _largest(scores: NDArray[np.float64], count: int) -> Ids:
    return np.argsort(-scores, axis=-1, kind="stable")[..., :count]


# --- the trace -----------------------------------------------------------------------------------------


def _weights(shape: tuple[int, ...], draw: Draw) -> NDArray[np.float32]:
    """Return router weights that fall with the slot and add up to one for each token and layer."""
    logits = np.sort(draw.normal(size=shape), axis=-1)[..., ::-1]
    odds = np.exp(logits)
    shares: NDArray[np.float32] = (odds / odds.sum(axis=-1, keepdims=True)).astype(np.float32)
    return shares


def _trace(kind: str, routing: Routing, chosen: Ids, weights: NDArray[np.float32]) -> Trace:
    token, layer, slot = (axis.ravel() for axis in np.indices(chosen.shape))
    nothing = np.zeros(chosen.size, dtype=np.int64)
    return Trace(
        turn=nothing,
        phase=(token >= routing.prompt_tokens).astype(np.int64),
        step=token.astype(np.int64),
        layer=layer.astype(np.int64),
        iter=nothing,
        slot=slot.astype(np.int64),
        expert=chosen.ravel(),
        weight=weights.ravel(),
        layers=routing.layers,
        experts=routing.experts,
        top_k=routing.top_k,
        expert_bytes=np.full(routing.layers, routing.expert_bytes, dtype=np.int64),
        name=f"{kind}-{routing.experts}-{routing.top_k}",
    )
