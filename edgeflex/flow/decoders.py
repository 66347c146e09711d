"""The corridor of mixture-of-experts decoders: the same stages, from a Hugging Face folder to text."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, Literal

from edgeflex.errors import BundleError, InputError
from edgeflex.files import StrPath, path_of, place_of, read_bytes, read_text, refuse_output, write_atomic
from edgeflex.flow.decide import parse_calibrated
from edgeflex.flow.traces import Replays, packed_bytes, trace_of
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
    UniformSize,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgeflex.models.decoders import DecoderSource

_KEY = "decoder-key.json"
_CALIBRATION = "decoder-calibration.json"
_RATES = "rates.json"
CHECK_TEXT = "check.npy"
_TRACE = "trace.csv"
_TOKENIZER = "tokenizer.json"
PLANNED = (Precision.INT8_DYNAMIC, Precision.INT4_GROUP32)
_POLICIES = ("enu", "lru")


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
    from edgeflex.costs.decoder_files import read_routing
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
    write_atomic(out / _TOKENIZER, read_bytes(source.tokenizer_file, "tokenizer"))
    if not _knows(out, threads):
        profile_decoder(out, threads=threads, progress=heard)
    elif not (out / _TRACE).exists():
        write_trace(out / _TRACE, trace_of(found.graph, read_routing(out), rates=_known_rates(out)))
    return found


def profile_decoder(
    folder: StrPath, *, threads: Sequence[int] | None = None, progress: Progress | None = None
) -> DecoderRates:
    """Measure what this machine does with a calibrated decoder's shapes, and keep that in the calibration.

    It needs the calibration's folder alone, a few MiB: no weights, no text and no torch. So a decoder that was
    calibrated on a large computer is measured on the small one that it is for; and a machine whose speed has changed is
    measured again.

    Args:
        folder: Of the calibration; its disk should be the one that experts will be read from. Rates that it holds are
            replaced, and the bytes of experts in its trace.
        threads: Numbers of threads to measure kernels with; None takes those of the rates that are there, or 1.
        progress: Told of every measurement.

    Raises:
        InputError: The calibration is not finished or damaged.
        DeviceError: The disk is full or fails, or a kernel does.
    """
    from edgeflex.costs.decoder_files import read_routing
    from edgeflex.pace import middle
    from edgeflex.profiles import conditions
    from edgeflex.profiles.probe import memory_read
    from edgeflex.runtimes.decoder_rates import measure_rates
    from edgeflex.runtimes.sampling import load_tokenizer
    from edgeflex.runtimes.trace import write_trace

    folder = path_of(folder)
    if not is_decoder_calibration(folder):
        raise InputError(
            f"{str(folder)!r} is no calibration of a decoder. Give the folder that edgeflex calibrate wrote."
        )
    _refuse_unfinished(folder, (_CALIBRATION, CHECK_TEXT, _TOKENIZER))
    graph = parse_calibrated(DecoderCalibration, folder, _CALIBRATION).graph
    routing, tokenizer = read_routing(folder), folder / _TOKENIZER
    try:
        load_tokenizer(tokenizer)  # a damaged one is known now, not after a minute
    except BundleError:
        raise InputError(f"{tokenizer}: no tokenizer. Copy the calibration again, or calibrate again.") from None
    known = _known_rates(folder)
    counts = tuple(threads or ({one.threads for one in known.matrices} if known else (1,)))
    before = conditions()
    rates = measure_rates(
        graph,
        folder,
        trace_of(graph, routing),
        tokenizer=tokenizer,
        device=_this_machine(),
        precisions=PLANNED,
        threads=sorted(counts),
        memory_bytes_per_s=memory_read(threads=max(counts)).value,
        progress=progress,
    )
    rates = rates.model_copy(update={"conditions": middle((before, conditions()))})
    write_trace(folder / _TRACE, trace_of(graph, routing, rates=rates))
    write_atomic(folder / _RATES, rates.canonical_json())
    return rates


def _this_machine() -> str:
    from edgeflex.profiles import machine

    return machine().cpu_model or "this machine"


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


def _known_rates(folder: Path) -> DecoderRates | None:
    """Return the rates of a calibration; None where there are none, or of a release that wrote them otherwise."""
    place = folder / _RATES
    if not place.exists():
        return None
    try:
        return DecoderRates.parse(read_bytes(place, "rates"), str(place))
    except InputError:
        return None


def _knows(folder: Path, threads: Sequence[int]) -> bool:
    """Return whether kernels were measured with so many threads; a calibration may be resumed with more of them.

    Rates of a release that wrote less are measured anew.

    Raises:
        InputError: Other threads are asked for, and the rates are of another computer.
    """
    known = _known_rates(folder)
    if known is None:
        return False
    counts = {one.threads for one in known.matrices}
    if set(threads) <= counts and all(one.packed_bytes is not None for one in known.matrices):
        return True
    if known.device != _this_machine():
        raise InputError(
            f"the rates in {str(folder)!r} are of {known.device}, with {sorted(counts)} threads, and this is "
            f"{_this_machine()}. Measure there: edgeflex profile --decoder {folder} --threads "
            f"{','.join(map(str, threads))}; or delete rates.json to measure here."
        )
    return False


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


# --- plan ------------------------------------------------------------------------------------------------


def open_decoder_calibration(folder: Path) -> tuple[DecoderCalibration, DecoderRates, Any]:
    """Return a finished calibration: losses, this machine's rates, and the routing.

    Raises:
        InputError: It is not finished, or damaged.
    """
    from edgeflex.costs.decoder_files import read_routing

    _refuse_unfinished(folder, (_CALIBRATION, CHECK_TEXT))
    if not (folder / _RATES).is_file():
        raise InputError(
            f"the calibration in {str(folder)!r} holds no rates of a machine. Run edgeflex profile --decoder {folder}, "
            "or the same edgeflex calibrate again."
        )

    def document(kind: Any, name: str) -> Any:
        return parse_calibrated(kind, folder, name)

    return document(DecoderCalibration, _CALIBRATION), document(DecoderRates, _RATES), read_routing(folder)


def _refuse_unfinished(folder: Path, names: Sequence[str]) -> None:
    if not all((folder / name).is_file() for name in names):
        raise InputError(f"the calibration in {str(folder)!r} is not finished. Run the same edgeflex calibrate again.")


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
        "packed_bytes": packed_bytes(rates),
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
