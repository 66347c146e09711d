"""The corridor of mixture-of-experts decoders: the same stages, from a Hugging Face folder to text."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from edgeflex.errors import InputError
from edgeflex.files import StrPath, path_of, place_of, read_bytes, read_text, refuse_output, write_atomic
from edgeflex.flow.decide import parse_calibrated
from edgeflex.progress import Progress, Silent
from edgeflex.schema import Precision
from edgeflex.schema_moe import (
    DECODER_PRECISIONS,
    DecoderBudget,
    DecoderCalibration,
    DecoderGraph,
    DecoderPlan,
    DecoderRates,
    DecoderSizes,
    MissPoint,
    SimulatedCache,
    Simulation,
    UniformSize,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.models.decoders import DecoderSource
    from edgeflex.runtimes.trace import Trace
    from edgeflex.schema import DeviceProfile
    from edgeflex.schema_moe import DeviceSimulation

    Ints = NDArray[np.int64]

_KEY = "decoder-key.json"
_CALIBRATION = "decoder-calibration.json"
_RATES = "rates.json"
CHECK_TEXT = "check.npy"
_TRACE = "trace.csv"
PLANNED = (Precision.INT8_DYNAMIC, Precision.INT4_GROUP32)
_POLICIES = ("enu", "lru")
_REPLAYED_USES = 60_000  # of experts, prompts included


# --- what is meant ---------------------------------------------------------------------------------------


def is_decoder(place: StrPath) -> bool:
    """Return whether ``place`` is a Hugging Face folder, rather than a model of images."""
    return (path_of(place) / "config.json").is_file()


def is_decoder_calibration(folder: StrPath) -> bool:
    """Return whether ``folder`` holds the calibration of a decoder, finished or not."""
    return (path_of(folder) / _KEY).is_file()


def is_decoder_document(path: StrPath) -> bool:
    """Return whether a plan, statistics or measured figures are those of a decoder."""
    try:
        document = json.loads(read_bytes(path_of(path), "document"))
    except ValueError:
        return False
    return isinstance(document, dict) and document.get("kind") == "decoder"


def is_decoder_bundle(folder: StrPath) -> bool:
    """Return whether ``folder`` holds a decoder's bundle."""
    manifest = path_of(folder) / "manifest.json"
    return manifest.is_file() and is_decoder_document(manifest)


# --- inspect ---------------------------------------------------------------------------------------------


def inspect_decoder(place: StrPath, *, allow_download: bool = False) -> DecoderGraph:
    """Return the graph of a decoder; only headers are read."""
    from edgeflex.models.decoders import open_decoder

    return open_decoder(place_of(place), allow_download=allow_download, headers_only=True).graph


def context_of(place: StrPath) -> int:
    """Return the most tokens of context that the decoder of a calibration, or of a Hugging Face folder, knows."""
    if is_decoder_calibration(place):
        return open_decoder_calibration(path_of(place))[0].graph.context_tokens
    return inspect_decoder(place).context_tokens


def decoder_sizes(place: StrPath, budget: DecoderBudget) -> DecoderSizes:
    """Return what a decoder needs in each precision and whether the memory budget holds it; only headers are read."""
    from edgeflex.plans.decoder_costs import activations_bytes, kv_bytes, small_bytes

    graph = inspect_decoder(place)
    fixed = kv_bytes(graph, budget.context_tokens) + activations_bytes(graph, 64) + small_bytes(graph)
    packed = packed_bytes()
    return DecoderSizes(
        graph=graph,
        budget=budget,
        fixed_bytes=fixed,
        uniform=tuple(_uniform(graph, one, fixed, budget.memory_bytes, packed) for one in DECODER_PRECISIONS),
    )


def packed_bytes() -> Callable[[Precision, int, int], int]:
    """Return a function of precision, rows and columns: bytes of a matrix as this machine's kernels hold it."""
    from edgeflex.runtimes import native

    return lru_cache(maxsize=None)(native.packed_bytes)


def _uniform(
    graph: DecoderGraph,
    precision: Precision,
    fixed: int,
    limit: int | None,
    matrix_bytes: Callable[[Precision, int, int], int],
) -> UniformSize:
    from edgeflex.plans.decoder_costs import expert_bytes

    shapes = graph.matrix_shapes()
    dense = sum(matrix_bytes(precision, *shape) for name, shape in shapes.items() if ".experts." not in name)
    cycle = experts = 0
    for layer in graph.layers:
        if layer.routing is None:
            continue
        pair = [shapes[f"layers.{layer.index}.experts.0.{name}"] for name in ("gate_up", "down")]
        one = expert_bytes(precision, pair, matrix_bytes)
        experts += one * layer.routing.experts
        cycle += one * layer.routing.top_k
    verdict: Literal["fits", "offload", "decline"] = "fits"
    if limit is not None and fixed + dense + experts > limit:
        verdict = "offload" if fixed + dense + cycle <= limit else "decline"
    return UniformSize(
        precision=precision,
        dense_bytes=dense,
        experts_bytes=experts,
        cycle_bytes=cycle,
        verdict=verdict,
    )


# --- calibrate -------------------------------------------------------------------------------------------


def calibrate_decoder(
    place: StrPath,
    text: StrPath,
    out: StrPath,
    *,
    tokens: int = 4096,
    sequence_tokens: int = 512,
    kl_tokens: int = 1024,
    prompt_tokens: int = 256,
    threads: Sequence[int] = (1,),
    seed: int = 0,
    overwrite: bool = False,
    allow_download: bool = False,
    progress: Progress | None = None,
) -> DecoderCalibration:
    """Measure losses and routing of a decoder on real text, and this machine's rates for its shapes; resumable.

    Args:
        place: A Hugging Face folder, or an id where ``allow_download``.
        text: UTF-8 text.
        out: The calibration folder.
        tokens: Of the text to use; a fifth as many more are set aside for checking what was exported.
        sequence_tokens: Tokens of one text.
        kl_tokens: Tokens that divergences are measured on.
        prompt_tokens: First tokens of each text that count as its prompt in the trace.
        threads: Numbers of threads to measure kernels with.
        seed: Of the places in the text.
        overwrite: Begin anew where another calibration lies.
        allow_download: Fetch an id.
        progress: Told of every step.

    Raises:
        InputError: The decoder or the text cannot be used, or the folder holds another calibration.
    """
    from edgeflex.costs.decoder_calibration import calibrate_decoder as calibrate_losses
    from edgeflex.costs.decoder_calibration import read_routing
    from edgeflex.models.decoders import open_decoder
    from edgeflex.runtimes.trace import write_trace

    heard, out = progress or Silent(), path_of(out)
    source = open_decoder(place_of(place), allow_download=allow_download)
    length = min(sequence_tokens, source.graph.context_tokens)
    chosen, check = _texts(source, path_of(text), tokens, length, seed)
    if overwrite and is_decoder_calibration(out):
        # only now, so that a mistyped name costs nobody hours of measuring
        refuse_output(out, overwrite=True)
        shutil.rmtree(out)
    found = calibrate_losses(
        source,
        chosen,
        folder=out,
        precisions=PLANNED,
        kl_tokens=kl_tokens,
        prompt_tokens=min(prompt_tokens, length // 2),
        progress=heard,
    )
    write_atomic(out / CHECK_TEXT, _npy(check))
    if not (out / _TRACE).exists():
        write_trace(out / _TRACE, _trace_of(found.graph, read_routing(out)))
    if not _knows(out / _RATES, threads):
        rates = _rates(source, out, _trace_of(found.graph, read_routing(out)), threads, heard)
        write_atomic(out / _RATES, rates.canonical_json())
    return found


def read_array(path: Path) -> Any:
    """Return what `_npy` wrote.

    Raises:
        InputError: It is absent or damaged.
    """
    import io

    import numpy as np

    try:
        return np.load(io.BytesIO(read_bytes(path, "calibration file")), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{str(path)!r} is damaged: {error}. Run the same edgeflex calibrate again.") from None


def _knows(rates: Path, threads: Sequence[int]) -> bool:
    """Return whether kernels were measured with so many threads; a calibration may be resumed with more of them.

    Rates of a release that wrote them otherwise are measured anew.
    """
    if not rates.exists():
        return False
    try:
        known = DecoderRates.parse(read_bytes(rates, "rates"), str(rates))
    except InputError:
        return False
    return set(threads) <= {one.threads for one in known.matrices}


def _npy(array: Any) -> bytes:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array, dtype=np.int64), allow_pickle=False)
    return buffer.getvalue()


def _texts(source: DecoderSource, text: Path, tokens: int, length: int, seed: int) -> tuple[list[list[int]], Any]:
    """Return sequences for calibration, and others ``[sequences, length]`` for checking, from places all over."""
    import numpy as np

    from edgeflex.runtimes.sampling import load_tokenizer

    ids = load_tokenizer(source.tokenizer_file).encode(read_text(text, "text")).ids
    if len(ids) < 2 * min(length, 64):
        raise InputError(
            f"{text}: {len(ids)} tokens are too few to calibrate on; at least {2 * min(length, 64)} are needed. "
            "Give more text."
        )
    length = min(length, len(ids) // 2)
    pieces = np.array(ids[: len(ids) // length * length], dtype=np.int64).reshape(-1, length)
    order = np.random.default_rng(seed).permutation(len(pieces))
    wanted = max(1, tokens // length)
    spare = max(1, wanted // 5)
    used = min(wanted, len(pieces) - 1)
    return pieces[np.sort(order[:used])].tolist(), pieces[np.sort(order[used : used + spare])]


def _trace_of(graph: DecoderGraph, routing: Any, *, prompt: int | None = None, chunk: int | None = None) -> Trace:
    """Return the recorded routing as a trace, optionally with other prompts and chunks."""
    import numpy as np

    from edgeflex.runtimes.trace import Trace

    layers = len(graph.layers)
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
        expert_bytes=_expert_sizes(graph, Precision.INT4_GROUP32, layers),
        precision_bytes={"int8-dynamic": _expert_sizes(graph, Precision.INT8_DYNAMIC, layers)},
        name=graph.name,
    )


def _expert_sizes(graph: DecoderGraph, precision: Precision, layers: int) -> Ints:
    import numpy as np

    from edgeflex.plans.decoder_costs import expert_bytes

    shapes, packed = graph.matrix_shapes(), packed_bytes()
    sizes = np.zeros(layers, dtype=np.int64)
    for layer in graph.layers:
        if layer.routing is not None:
            pair = [shapes[f"layers.{layer.index}.experts.0.{name}"] for name in ("gate_up", "down")]
            sizes[layer.index] = expert_bytes(precision, pair, packed)
    return sizes


def _rates(
    source: DecoderSource, folder: Path, trace: Trace, threads: Sequence[int], progress: Progress
) -> DecoderRates:
    from edgeflex.profiles import machine
    from edgeflex.profiles.probe import memory_read
    from edgeflex.runtimes.decoder_rates import measure_rates

    return measure_rates(
        source.graph,
        folder,
        trace,
        tokenizer=source.tokenizer_file,
        device=machine().cpu_model or "this machine",
        precisions=PLANNED,
        threads=threads,
        memory_bytes_per_s=memory_read(threads=max(threads)).value,
        progress=progress,
    )


# --- plan ------------------------------------------------------------------------------------------------


def open_decoder_calibration(folder: Path) -> tuple[DecoderCalibration, DecoderRates, Any]:
    """Return a finished calibration: losses, this machine's rates, and the routing.

    Raises:
        InputError: It is not finished, or damaged.
    """
    from edgeflex.costs.decoder_calibration import read_routing

    missing = [name for name in (_CALIBRATION, CHECK_TEXT, _RATES) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"the calibration in {str(folder)!r} is not finished. Run the same edgeflex calibrate again.")

    def document(kind: Any, name: str) -> Any:
        return parse_calibrated(kind, folder, name)

    return document(DecoderCalibration, _CALIBRATION), document(DecoderRates, _RATES), read_routing(folder)


def plan_decoder(folder: StrPath, budget: DecoderBudget) -> DecoderPlan:
    """Return the plan of a decoder for a budget, recounted; nothing is measured.

    Raises:
        InputError: The calibration is not finished.
        InfeasibleError: No plan keeps the budget.
    """
    from edgeflex.plans import decoder_costs as costs
    from edgeflex.plans.decoder import plan_decoder as decide
    from edgeflex.plans.decoder_audit import Ground, check_decoder_plan

    calibration, rates, routing = open_decoder_calibration(path_of(folder))
    graph = calibration.graph
    experts = max((one.routing.experts for one in graph.layers if one.routing is not None), default=1)
    replays = Replays(graph, routing, budget.prompt_tokens)
    ground: dict[str, Any] = {
        "packed_bytes": packed_bytes(),
        "prefill_bytes": replays.prefill_bytes,
        "uses": routing.uses(len(graph.layers), experts),
        "kv_bytes": lambda tokens: costs.kv_bytes(graph, tokens),
        "activations_bytes": lambda chunk: costs.activations_bytes(graph, chunk),
    }
    asked: dict[str, Any] = {"policies": _POLICIES, "precisions": PLANNED, **ground}
    made = decide(calibration, rates, budget, replays.misses, **asked)
    if made.verdict == "offload":
        # The best possible cache is only replayed where the plan stands; the search itself finds the same again.
        replays.with_belady = (made.cache_bytes, made.policy)
        made = decide(calibration, rates, budget, replays.misses, **asked)
    check_decoder_plan(made, Ground(calibration, rates, replays.misses, **ground))
    return made


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
            self._traces[chunk] = _trace_of(self._graph, self._routing, prompt=self._prompt, chunk=chunk)
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


# --- traces ----------------------------------------------------------------------------------------------


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
    from edgeflex.runtimes.replay import belady, replay
    from edgeflex.runtimes.trace import read_trace

    if compute_s is not None and link_bytes_per_s is None:
        raise InputError("the time of a token's computing was given without the rate of reads. Pass --link too.")
    trace = read_trace(path_of(path))
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
        trace=path_of(path).name,
        decode_tokens=trace.decode_tokens,
        link_bytes_per_s=link_bytes_per_s,
        compute_s=compute_s,
        results=tuple(results),
    )
