"""What a mix of precisions with a cache is predicted to cost: the time and memory model of decoders.

    token_s       = matrices + other + wait
    matrices      = sum over dense matrices + sum over experts of share of use x seconds, one input row, from memory
    wait          = missed bytes per token / read rate + read latency x layers that miss
    layers        = L (1 - (1 - q)^k), q the miss rate and k experts a token of each of the L layers
    first_token_s = matrices of the prompt in chunks + other + bytes missed by the prompt / read rate + latency
    memory        = dense matrices as packed + cache + keys and values + activations + runtime

Misses come only from replays of the trace through the real cache at the mix's own expert sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import InputError
from edgeflex.schema import Interval
from edgeflex.schema_moe import DecoderMemory, DecoderPrediction, MissPoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeflex.plans.decoder_costs import Space
    from edgeflex.plans.decoder_mixes import Mix

Misses = Callable[["NDArray[np.int64]", int, str], MissPoint]
PrefillBytes = Callable[["NDArray[np.int64]", int, str, int], int]


@dataclass(frozen=True)
class Doubts:
    """How far a prediction may be off, as fractions, and what waiting hides.

    Attributes:
        rates: Of measured seconds of matrices, on another day of the same machine.
        reads: Of the measured read rate.
        traffic: Of misses, on other text than the trace's; 2 / sqrt(misses replayed) is added in squares.
        overlap: Share of the present experts' work that is done while others are read (0: none).
    """

    rates: float = 0.10
    reads: float = 0.10
    traffic: float = 0.10
    overlap: float = 0.0


@dataclass(frozen=True)
class Setting:
    """Everything that a plan decides beside precisions. ``resident``: all experts are loaded at the start."""

    threads: int
    cache_bytes: int
    policy: str
    chunk_tokens: int
    resident: bool


@dataclass(frozen=True)
class Traffic:
    """What decoding misses per token, and the first prompt in all."""

    miss_rate: float
    misses: float
    bytes: float
    prefill_bytes: int
    replayed: int
    best_misses: float | None

    @property
    def best_rate(self) -> float | None:
        """The miss rate of the best possible cache, where known."""
        if self.best_misses is None:
            return None
        return 0.0 if self.misses == 0 else self.miss_rate * self.best_misses / self.misses


_NONE = Traffic(0.0, 0.0, 0.0, 0, 0, 0.0)


class TooManyReplaysError(Exception):
    """The search has used up the replays that it was allowed."""


class Predictor:
    """Predicts mixes in settings; keeps every replay that it asked for."""

    def __init__(
        self,
        space: Space,
        misses: Misses,
        *,
        prompt_tokens: int,
        kv_bytes: int,
        activations_bytes: Callable[[int], int],
        prefill_bytes: PrefillBytes | None,
        doubts: Doubts,
        most_replays: int,
    ) -> None:
        self.space = space
        self.prompt_tokens = prompt_tokens
        self.replays = 0
        self.most_replays = most_replays
        self._doubts = doubts
        self._misses = misses
        self._prefill = prefill_bytes
        self._kv_bytes = kv_bytes
        self._activations_bytes = activations_bytes
        self._points: dict[tuple[bytes, int, str], MissPoint] = {}

    # --- traffic -----------------------------------------------------------------------------------------

    def point(self, mix: Mix, cache_bytes: int, policy: str) -> MissPoint:
        """Return the replay of the trace with this mix's expert sizes.

        Raises:
            TooManyReplaysError: The allowance is used up and this point is not known yet.
            InputError: The replay answered nonsense.
        """
        key = (mix.sizes.tobytes(), cache_bytes, policy)
        if key not in self._points:
            if self.replays >= self.most_replays:
                raise TooManyReplaysError
            self.replays += 1
            found = self._misses(mix.sizes, cache_bytes, policy)
            if found.decode_tokens < 1 or min(found.hits, found.misses, found.decode_bytes) < 0:
                raise InputError(
                    f"the routing trace decodes {found.decode_tokens} tokens with {found.misses} misses; a plan needs "
                    "a trace with decoded tokens. Record a longer one."
                )
            self._points[key] = found
        return self._points[key]

    def traffic(self, mix: Mix, setting: Setting) -> Traffic:
        """Return what is missed; nothing where all experts are resident."""
        if setting.resident:
            return replace(_NONE, prefill_bytes=self._first_reads(mix, setting))
        point = self.point(mix, setting.cache_bytes, setting.policy)
        tokens = point.decode_tokens
        prefill = point.prefill_bytes
        if self._prefill is not None:
            prefill = self._prefill(mix.sizes, setting.cache_bytes, setting.policy, setting.chunk_tokens)
        return Traffic(
            miss_rate=point.misses / max(1, point.hits + point.misses),
            misses=point.misses / tokens,
            bytes=point.decode_bytes / tokens,
            prefill_bytes=prefill,
            replayed=point.misses,
            best_misses=None if point.belady_misses is None else point.belady_misses / tokens,
        )

    def _first_reads(self, mix: Mix, setting: Setting) -> int:
        """Return the bytes that the first prompt reads though nothing is ever read twice."""
        if self._prefill is None:
            return 0
        return self._prefill(mix.sizes, setting.cache_bytes, setting.policy, setting.chunk_tokens)

    # --- figures -----------------------------------------------------------------------------------------

    def fixed_bytes(self, chunk_tokens: int) -> int:
        """Return what no precision changes: keys and values, activations, the runtime."""
        return self._kv_bytes + self._activations_bytes(chunk_tokens) + self.space.rates.runtime_bytes

    def compute_s(self, mix: Mix, threads: int) -> float:
        """Return the seconds of a token without any wait."""
        return mix.token_s[threads] + self.space.rates.other_token_s

    def latency_s(self, miss_rate: float) -> float:
        """Return the read latencies of a token: one for each layer that misses, misses independent."""
        layers, uses = self.space.moe_layers, self.space.uses_per_token
        if layers == 0:
            return 0.0
        return self.space.rates.read_latency_s * layers * (1.0 - math.pow(1.0 - miss_rate, uses / layers))

    def wait_s(self, mix: Mix, setting: Setting, traffic: Traffic) -> float:
        """Return the seconds of a token in which nothing is computed."""
        if traffic.bytes <= 0:
            return 0.0
        latency = self.latency_s(traffic.miss_rate)
        read = traffic.bytes / self.space.rates.read_bytes_per_s
        hidden = self._doubts.overlap * (1.0 - traffic.miss_rate) * self.expert_s(mix, setting.threads)
        return latency + max(0.0, read - hidden)

    def expert_s(self, mix: Mix, threads: int) -> float:
        """Return the seconds of a token's experts."""
        rows = np.flatnonzero(self.space.is_expert)
        return float(self.space.token_s[threads][rows, mix.columns[rows]].sum())

    @property
    def most_hidden_s(self) -> float:
        """The most of a token's reading that its own work can hide, whatever the mix."""
        rows = self.space.is_expert
        work = max((float(cost[rows].max(axis=1).sum()) for cost in self.space.token_s.values()), default=0.0)
        return float(self._doubts.overlap * work)

    def token_s(self, mix: Mix, setting: Setting) -> float:
        """Return the predicted seconds of a decoded token."""
        return self.compute_s(mix, setting.threads) + self.wait_s(mix, setting, self.traffic(mix, setting))

    def first_compute_s(self, mix: Mix, threads: int, chunk_tokens: int) -> float:
        """Return the seconds of the prompt without any wait."""
        matrices = self.space.first_token_s(threads, chunk_tokens, self.prompt_tokens)
        rows = np.arange(len(mix.columns))
        other = self.space.rates.other_prefill_token_s * self.prompt_tokens
        return float(matrices[rows, mix.columns].sum()) + other

    def first_token_s(self, mix: Mix, setting: Setting) -> float:
        """Return the predicted seconds until the first token, the bundle being open."""
        compute = self.first_compute_s(mix, setting.threads, setting.chunk_tokens)
        return compute + self._first_wait_s(setting, self.traffic(mix, setting))

    def _first_wait_s(self, setting: Setting, traffic: Traffic) -> float:
        if traffic.prefill_bytes == 0:
            return 0.0
        events = math.ceil(self.prompt_tokens / setting.chunk_tokens) * self.space.moe_layers
        rates = self.space.rates
        rate = rates.first_read_bytes_per_s or rates.read_bytes_per_s  # experts are checked at their first use
        return traffic.prefill_bytes / rate + events * rates.read_latency_s

    def memory(self, mix: Mix, setting: Setting) -> DecoderMemory:
        """Return what the run holds."""
        return DecoderMemory(
            dense_bytes=mix.memory_bytes,
            cache_bytes=setting.cache_bytes,
            kv_bytes=self._kv_bytes,
            activations_bytes=self._activations_bytes(setting.chunk_tokens),
            runtime_bytes=self.space.rates.runtime_bytes,
        )

    def bound_token_s(self, mix: Mix, setting: Setting, traffic: Traffic) -> float:
        """Return what no policy without prefetch can beat on the trace.

        Belady's misses, each of the smallest expert's bytes, with reads and experts' work fully overlapped. Where
        sizes differ, Belady's misses are those of a cache in which every expert has the smallest size.
        """
        compute, expert = self.compute_s(mix, setting.threads), self.expert_s(mix, setting.threads)
        present = mix.sizes[mix.sizes > 0]
        least = float(present.min()) if present.size else 0.0
        best = traffic.best_misses
        if best is not None and least and not setting.resident and (present != least).any():
            even = replace(mix, sizes=np.where(mix.sizes > 0, int(least), 0).astype(np.int64))
            with suppress(TooManyReplaysError):
                best = self.traffic(even, setting).best_misses
        read = (best or 0.0) * least / self.space.rates.read_bytes_per_s
        return compute - expert + max(expert, read)

    def predict(self, mix: Mix, setting: Setting) -> DecoderPrediction:
        """Return everything that a plan promises."""
        traffic = self.traffic(mix, setting)
        best = traffic.best_rate
        first = self.first_compute_s(mix, setting.threads, setting.chunk_tokens)
        return DecoderPrediction(
            token_s=self._token_interval(mix, setting, traffic),
            first_token_s=self._interval(first, self._first_wait_s(setting, traffic), 0.0, traffic),
            memory=self.memory(mix, setting),
            disk_bytes=mix.disk_bytes,
            kl=mix.kl,
            hit_rate=1.0 - traffic.miss_rate,
            bytes_per_token=traffic.bytes,
            belady_hit_rate=None if best is None else 1.0 - best,
            bound_token_s=self.bound_token_s(mix, setting, traffic),
        )

    def _token_interval(self, mix: Mix, setting: Setting, traffic: Traffic) -> Interval:
        wait = self.wait_s(mix, setting, traffic)
        hits = (1.0 - traffic.miss_rate) * self.expert_s(mix, setting.threads)
        return self._interval(self.compute_s(mix, setting.threads), wait, (1.0 - self._doubts.overlap) * hits, traffic)

    def _interval(self, compute_s: float, wait_s: float, hideable_s: float, traffic: Traffic) -> Interval:
        """Return value and range; the low end lets reads run beside all work that could hide them."""
        sampling = 2.0 / math.sqrt(traffic.replayed) if traffic.replayed else 0.0
        moved = math.hypot(self._doubts.traffic, sampling)
        low_wait = max(0.0, wait_s * max(0.0, 1.0 - moved) / (1.0 + self._doubts.reads) - hideable_s)
        high_wait = wait_s * (1.0 + moved) / (1.0 - self._doubts.reads)
        return Interval(
            value=compute_s + wait_s,
            low=compute_s * (1.0 - self._doubts.rates) + low_wait,
            high=compute_s * (1.0 + self._doubts.rates) + high_wait,
        )
