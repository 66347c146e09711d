"""Routing traces: recorded ones through the runtime's own cache, for the planner and for whoever asks."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgeflex.errors import InputError
from edgeflex.files import StrPath, path_of
from edgeflex.schema import Precision
from edgeflex.schema_moe import MissPoint, SimulatedCache, Simulation

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.plans.decoder_costs import PackedBytes
    from edgeflex.runtimes.trace import Trace
    from edgeflex.schema import DeviceProfile
    from edgeflex.schema_moe import DecoderGraph, DecoderRates, DeviceSimulation

    Ints = NDArray[np.int64]

_REPLAYED_USES = 60_000  # of experts, prompts included


def packed_bytes(rates: DecoderRates | None = None) -> PackedBytes:
    """Return a function of precision, rows and columns: bytes of a matrix as a machine's kernels hold it.

    Args:
        rates: Of that machine; None is this one, which also stands in for what the rates do not tell.
    """
    from edgeflex.runtimes import native

    known = {(one.precision, one.rows, one.columns): one.packed_bytes for one in rates.matrices} if rates else {}

    def held_bytes(precision: Precision, rows: int, columns: int) -> int:
        measured = known.get((precision, rows, columns))
        return native.packed_bytes(precision, rows, columns) if measured is None else measured

    return lru_cache(maxsize=None)(held_bytes)


def trace_of(
    graph: DecoderGraph,
    routing: Any,
    *,
    prompt: int | None = None,
    chunk: int | None = None,
    rates: DecoderRates | None = None,
) -> Trace:
    """Return the recorded routing as a trace, optionally with other prompts and chunks, or a computer's bytes."""
    import numpy as np

    from edgeflex.runtimes.trace import Trace

    layers, packed = len(graph.layers), packed_bytes(rates)
    experts = max((one.routing.experts for one in graph.layers if one.routing is not None), default=1)
    top_k = max((one.routing.top_k for one in graph.layers if one.routing is not None), default=1)
    phase, iteration = routing.phase, routing.iter
    if prompt is not None and chunk is not None:
        phase = (routing.step >= prompt).astype(np.int64)
        iteration = np.where(phase == 0, routing.step // chunk, 0)
    return Trace(
        turn=routing.turn,
        phase=phase,
        step=routing.step,
        layer=routing.layer,
        iter=iteration,
        slot=routing.slot,
        expert=routing.expert,
        weight=routing.weight,
        layers=layers,
        experts=experts,
        top_k=top_k,
        expert_bytes=_expert_sizes(graph, Precision.INT4_GROUP32, packed),
        precision_bytes={"int8-dynamic": _expert_sizes(graph, Precision.INT8_DYNAMIC, packed)},
        name=graph.name,
    )


def _expert_sizes(graph: DecoderGraph, precision: Precision, packed: PackedBytes) -> Ints:
    import numpy as np

    from edgeflex.plans.decoder_costs import expert_bytes

    shapes = graph.matrix_shapes()
    sizes = np.zeros(len(graph.layers), dtype=np.int64)
    for layer in graph.layers:
        if layer.routing is not None:
            pair = [shapes[f"layers.{layer.index}.experts.0.{name}"] for name in ("gate_up", "down")]
            sizes[layer.index] = expert_bytes(precision, pair, packed)
    return sizes


class Replays:
    """Replays of one calibration's trace through the real cache, each made once."""

    def __init__(self, graph: DecoderGraph, routing: Any, prompt_tokens: int) -> None:
        self._graph = graph
        self._routing = _shortened(routing)
        self._length = int(routing.step.max()) + 1
        # half of a text at least is decoded, so that there are misses to count
        self._prompt = min(prompt_tokens, self._length // 2)
        self._scale = prompt_tokens / max(1, self._prompt)
        self.with_belady: tuple[int, str] | None = None
        self._traces: dict[int, Trace] = {}
        self._points: dict[tuple[bytes, int, str], MissPoint] = {}
        self._reads: dict[tuple[bytes, int, str, int], int] = {}
        self._used: NDArray[np.bool_] | None = None

    def trace(self, chunk: int) -> Trace:
        """Return the texts with prompts read in chunks of ``chunk`` tokens."""
        if chunk not in self._traces:
            self._traces[chunk] = trace_of(self._graph, self._routing, prompt=self._prompt, chunk=chunk)
        return self._traces[chunk]

    @property
    def scale(self) -> float:
        """How many times longer the budget's prompt is than the trace's."""
        return self._scale

    def first_prompt(self, chunk: int) -> Trace:
        """Return the first text's prompt alone."""
        return _first_prompt(self.trace(chunk))

    def misses(self, sizes: Ints, cache_bytes: int, policy: str) -> MissPoint:
        """Return one replay with chunks of 64 tokens; a longer prompt than the trace's reads in proportion."""
        from edgeflex.runtimes.replay import miss_point

        key = (sizes.tobytes(), cache_bytes, policy)
        best = self.with_belady == (cache_bytes, policy)
        if key not in self._points or (best and self._points[key].belady_misses is None):
            point = miss_point(self.trace(64), cache_bytes, policy, sizes=sizes, with_belady=best)
            self._points[key] = point.model_copy(update={"prefill_bytes": int(point.prefill_bytes * self._scale)})
        return self._points[key]

    def prefill_bytes(self, sizes: Ints, cache_bytes: int, policy: str, chunk: int) -> int:
        """Return the bytes that the prompt reads into an empty cache, in chunks of ``chunk`` tokens."""
        from edgeflex.runtimes.replay import replay

        if cache_bytes >= int(sizes.sum()):
            used = int(sizes[self._first_used(sizes.shape)].sum())
            return min(int(used * self._scale), int(sizes.sum()))
        key = (sizes.tobytes(), cache_bytes, policy, chunk)
        if key not in self._reads:
            first = self.first_prompt(chunk)
            read = replay(first, cache_bytes, policy, sizes=sizes).first_prefill_bytes
            self._reads[key] = int(read * self._scale)
        return self._reads[key]

    def _first_used(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Return ``[layers, experts]``: what the first text's prompt uses."""
        import numpy as np

        if self._used is None:
            first = self.first_prompt(64)
            self._used = np.zeros(shape, dtype=np.bool_)
            self._used[first.layer, first.expert] = True
        return self._used


def _shortened(routing: Any) -> Any:
    """Return the first texts of a long routing: enough lookups for a miss rate, few enough for a quick plan."""
    from dataclasses import replace

    import numpy as np

    reached = np.cumsum(np.bincount(routing.turn))
    last = int(np.searchsorted(reached, min(_REPLAYED_USES, reached[-1])))
    kept = routing.turn <= last
    columns = ("turn", "phase", "step", "layer", "iter", "slot", "expert", "weight")
    return replace(routing, **{name: getattr(routing, name)[kept] for name in columns})


def _first_prompt(trace: Trace) -> Trace:
    """Return only the first text's prompt."""
    from dataclasses import replace

    rows = (trace.turn == trace.turn.min()) & (trace.phase == 0)
    columns = ("turn", "phase", "step", "layer", "iter", "slot", "expert", "weight")
    return replace(trace, **{name: getattr(trace, name)[rows] for name in columns})


# --- for whoever asks ------------------------------------------------------------------------------------


def simulate_device(
    path: StrPath,
    device: DeviceProfile,
    *,
    vram_bytes: int,
    ram_bytes: int | None = None,
    precision: str | None = None,
    link_bytes_per_s: float | None = None,
    ram_bytes_per_s: float | None = None,
) -> DeviceSimulation:
    """Return what a recorded trace comes to on a machine with a GPU that is not at hand, in virtual time.

    Args:
        path: The trace.
        device: Whose rates to take.
        vram_bytes: Of experts on the GPU.
        ram_bytes: Of experts in the processor's memory; None: all of them.
        precision: Of the experts; int4 in groups of 32 by default.
        link_bytes_per_s: Rate of copies to the GPU, where the profile has none.
        ram_bytes_per_s: Rate of the processor's memory, where the profile has none.

    Raises:
        InputError: The trace is damaged, the precision is unknown, or the profile lacks a rate.
    """
    from edgeflex.runtimes.boards import simulate_device as simulate
    from edgeflex.runtimes.trace import read_trace

    trace = read_trace(path_of(path))
    known = {one.value: one for one in Precision}
    wanted = precision or Precision.INT4_GROUP32.value
    if wanted not in known:
        raise InputError(f"precision {wanted!r} is unknown. Known: {', '.join(known)}.")
    return simulate(
        trace,
        device,
        vram_bytes=vram_bytes,
        ram_bytes=ram_bytes,
        precision=known[wanted],
        sizes=trace.sizes(precision),
        link_bytes_per_s=link_bytes_per_s,
        ram_bytes_per_s=ram_bytes_per_s,
    )


def simulate_trace(
    path: StrPath,
    caches_bytes: Sequence[int],
    policies: Sequence[str],
    *,
    precision: str | None = None,
    link_bytes_per_s: float | None = None,
    compute_s: float | None = None,
) -> Simulation:
    """Return replays of a recorded trace through the runtime's own cache, for every policy and size.

    Args:
        path: The trace.
        caches_bytes: Sizes of the cache.
        policies: Names of policies, ``belady`` and ``belady-bypass`` among them.
        precision: Expert bytes of this precision, where the trace has them.
        link_bytes_per_s: Rate that misses are read at; predicts the time of a token.
        compute_s: Time of a token with every expert in memory; needs the rate.

    Raises:
        InputError: The trace is damaged or does not say the experts' bytes, or a policy is unknown.
    """
    from edgeflex.runtimes.policies import unknown_policies
    from edgeflex.runtimes.replay import REPLAYED, belady, replay
    from edgeflex.runtimes.trace import read_trace

    if compute_s is not None and link_bytes_per_s is None:
        raise InputError("the time of a token's computing was given without the rate of reads. Pass --link too.")
    place = path_of(path)
    if faults := unknown_policies(policies, REPLAYED):
        raise InputError.collect("--policy", faults)
    trace = read_trace(place)
    sizes = trace.sizes(precision)
    best = {cache: belady(trace, cache, sizes=sizes) for cache in caches_bytes}
    results = []
    for policy in policies:
        for cache in caches_bytes:
            found = replay(trace, cache, policy, sizes=sizes)
            token_s = bound = None
            if link_bytes_per_s is not None:
                token_s = (compute_s or 0.0) + found.bytes_per_token / link_bytes_per_s
                least_s = (compute_s or 0.0) + best[cache].bytes_per_token / link_bytes_per_s
                bound = least_s / token_s if token_s else 1.0
            layers = zip(found.layer_hits, found.layer_misses, strict=True)
            results.append(
                SimulatedCache(
                    policy=policy,
                    cache_bytes=cache,
                    hit_rate=found.hit_rate,
                    hits=found.hits,
                    misses=found.misses,
                    bytes_per_token=found.bytes_per_token,
                    belady_hit_rate=best[cache].hit_rate,
                    layer_hit_rates=tuple(hits / max(1, hits + misses) for hits, misses in layers),
                    token_s=token_s,
                    bound_share=bound,
                )
            )
    return Simulation(
        trace=place.name,
        decode_tokens=trace.decode_tokens,
        link_bytes_per_s=link_bytes_per_s,
        compute_s=compute_s,
        results=tuple(results),
    )
