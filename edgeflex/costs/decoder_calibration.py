"""What a decoder loses in each precision, unit by unit, and which experts its routers choose on real text.

One sweep goes through the layers once, whatever the number of units: beside the unchanged decoder it carries one
*variant* of the hidden states for every unit group x precision that was changed in a layer already passed, and
all of them go through the next layers unchanged. At the end each variant's next-token distribution is compared
with the unchanged one: KL(p||q) in nats per token, really measured. Groups are the dense part of a layer, all
experts of a layer at once, the embedding, the head; and everything at once (uniform), for which the share of
unchanged router choices is measured too.

A layer's expert KL is split over its experts by how much of the error each makes:

    KL[l,e,p] = KL[l,p] S[e] / sum S,     S[e] = n[e] E[w^2 | e] E||y_p(x) - y(x)||^2

``n[e]`` counts the tokens that really use expert e in the whole text (half a token where none does) and ``w`` is the
weight that they give it. The mean error is *expert-balanced*: an expert that fewer than ``expert_tokens`` tokens use
is also fed the tokens nearest to choosing it (largest router probability), so that no expert is judged by three
tokens; their outputs enter the mean error only, never ``n`` and ``w``. Independent errors add in the residual
stream, and KL is quadratic in a small error, hence the squares.

Weights only: activations stay fp32 here, while kernels round them to 8 bits in every precision but fp32.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import ValidationError

from edgeflex.costs.decoder_files import ROUTING, damaged, save
from edgeflex.costs.decoder_sweep import Sweep, Text, is_matrix
from edgeflex.errors import InputError
from edgeflex.files import read_bytes, write_atomic
from edgeflex.progress import Silent
from edgeflex.schema import Noun, Precision
from edgeflex.schema_moe import DecoderCalibration, UnitLoss
from edgeflex.transforms.decoder_weights import require_runnable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.costs.decoder_states import State
    from edgeflex.costs.decoder_sweep import Measured
    from edgeflex.models.decoders import DecoderSource
    from edgeflex.progress import Progress
    from edgeflex.schema_moe import DecoderGraph

PRECISIONS = (Precision.INT8_DYNAMIC, Precision.INT4_GROUP32)
_VERSION = 1


class CalibrationKey(Noun):
    """What a folder's calibration belongs to; anything else is another folder."""

    version: int = _VERSION
    weights_digest: str
    text_digest: str
    precisions: tuple[Precision, ...]
    kl_tokens: int
    expert_tokens: int
    prompt_tokens: int
    chunk_tokens: int


def calibrate_decoder(
    source: DecoderSource,
    token_sequences: Sequence[Sequence[int]],
    *,
    folder: Path,
    precisions: Sequence[Precision] = PRECISIONS,
    kl_tokens: int = 1024,
    expert_tokens: int = 64,
    prompt_tokens: int = 64,
    chunk_tokens: int = 64,
    progress: Progress | None = None,
) -> DecoderCalibration:
    """Return KL of every unit and precision, and leave the routing of the text in ``folder``.

    Killed at any point, it goes on after the last whole layer; a folder that is finished is only read.

    Args:
        source: The decoder.
        token_sequences: Texts as token ids, each at least 2 and at most the context's tokens.
        folder: Where state and result lie.
        precisions: To measure; fp32 needs none.
        kl_tokens: Tokens that KL is measured on: the first whole sequences that reach this number.
        expert_tokens: Least tokens that an expert is judged by.
        prompt_tokens: First tokens of each sequence that the trace calls a prompt.
        chunk_tokens: Tokens of a prompt that go through together in the trace.
        progress: Told of every layer.

    Raises:
        InputError: The text is empty or too long, or the folder holds another calibration or a damaged one.
        UnsupportedError: A precision does not fit a matrix.
    """
    text = _text(source, token_sequences, kl_tokens)
    key = CalibrationKey(
        weights_digest=source.graph.weights_digest,
        text_digest=_digest(token_sequences),
        precisions=tuple(precisions),
        kl_tokens=kl_tokens,
        expert_tokens=expert_tokens,
        prompt_tokens=prompt_tokens,
        chunk_tokens=chunk_tokens,
    )
    _refuse_columns(source, key.precisions)
    _claim(folder, key)
    result = folder / "decoder-calibration.json"
    if result.exists():
        return DecoderCalibration.parse(read_bytes(result, "calibration"), str(result))
    heard = progress or Silent()
    sweep = Sweep(source, text, key.precisions, expert_tokens=expert_tokens, folder=folder, progress=heard)
    with torch.no_grad():
        measured = sweep.run()
    save(folder / ROUTING, dict(_rows(measured.state, text, key)), packed=True)
    found = _calibration(source.graph, text, key, measured)
    write_atomic(result, found.canonical_json())
    sweep.forget()
    return found


def _text(source: DecoderSource, sequences: Sequence[Sequence[int]], kl_tokens: int) -> Text:
    most = source.graph.context_tokens
    faults = [
        f"text {number} has {len(one)} tokens; give 2 to {most}."
        for number, one in enumerate(sequences)
        if not 2 <= len(one) <= most
    ]
    if not sequences:
        faults.append("there is no text; give at least one.")
    if faults:
        raise InputError.collect("calibration text", faults[:5])
    longest = max(len(one) for one in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    real = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, one in enumerate(sequences):
        tokens[row, : len(one)] = torch.tensor(list(one))
        real[row, : len(one)] = True
    reached = np.cumsum([len(one) for one in sequences])
    kl_sequences = min(len(sequences), int(np.searchsorted(reached, kl_tokens)) + 1)
    return Text(tokens, real, kl_sequences)


def _digest(sequences: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(map(int, one)) for one in sequences]).encode()).hexdigest()


def _refuse_columns(source: DecoderSource, precisions: Sequence[Precision]) -> None:
    for name in source.names:
        if is_matrix(source, name):
            for precision in precisions:
                require_runnable(precision, source.shape(name)[1], name)


def _claim(folder: Path, key: CalibrationKey) -> None:
    """Make ``folder`` this calibration's, or refuse it."""
    path = folder / "decoder-key.json"
    if path.exists():
        try:
            found = CalibrationKey.model_validate_json(read_bytes(path, "calibration key"))
        except ValidationError as error:
            raise damaged(path, f"{error.error_count()} faults") from None
        different = [name for name in CalibrationKey.model_fields if getattr(found, name) != getattr(key, name)]
        if different:
            raise InputError(
                f"{str(folder)!r} holds a calibration with another {', '.join(different)}. "
                "Name another folder with -o or pass --overwrite."
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"output folder {str(folder)!r} is not empty and no calibration. Name another with -o.")
    write_atomic(path, key.canonical_json())


# --- results -----------------------------------------------------------------------------------------


def _calibration(graph: DecoderGraph, text: Text, key: CalibrationKey, found: Measured) -> DecoderCalibration:
    agreement = found.state.agreement
    return DecoderCalibration(
        graph=graph,
        text_digest=key.text_digest,
        tokens=int(text.real.sum()),
        reference_loss=found.reference_loss,
        losses=tuple(_losses(graph, found, key, int(text.kl_real.sum()))),
        router_agreement={Precision(name): float(np.mean(shares)) for name, shares in agreement.items()},
        uniform_kl={Precision(name): kl for name, kl in found.uniform.items()},
    )


def _losses(graph: DecoderGraph, found: Measured, key: CalibrationKey, tokens: int) -> Iterator[UnitLoss]:
    """Give every unit's KL in the order of the graph, whatever order the sweep took."""
    for precision in key.precisions:
        for unit in ("embedding", "head", *(f"layers.{layer.index}" for layer in graph.layers)):
            kl = found.groups[f"{unit}@{precision.value}"]
            yield UnitLoss(unit=unit, precision=precision, kl=kl, tokens=tokens)
        for layer in graph.layers:
            experts = f"layers.{layer.index}.experts"
            for expert in range(layer.routing.experts if layer.routing else 0):
                share, judged = found.state.shares[f"{experts}.{expert}@{precision.value}"]
                kl = share * found.groups[f"{experts}@{precision.value}"]
                yield UnitLoss(unit=f"{experts}.{expert}", precision=precision, kl=kl, tokens=judged)


def _rows(state: State, text: Text, key: CalibrationKey) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Give the columns of the trace."""
    turn, step = (one.numpy() for one in text.real.nonzero(as_tuple=True))
    phase = (step >= key.prompt_tokens).astype(np.int64)
    chunk = np.where(phase == 0, step // key.chunk_tokens, 0)
    layers = [place for place, experts in enumerate(state.experts) if experts.size]
    widths = {place: state.experts[place].shape[1] for place in layers}

    def column(of: Callable[[int], NDArray[np.generic]]) -> NDArray[np.generic]:
        return np.concatenate([of(place).reshape(-1) for place in layers]) if layers else np.zeros(0, np.int64)

    for name, values in (("turn", turn), ("phase", phase), ("step", step), ("iter", chunk)):
        yield name, column(lambda place, values=values: np.repeat(values, widths[place]))  # type: ignore[misc]
    yield "layer", column(lambda place: np.full(state.experts[place].shape, place, np.int64))
    yield "slot", column(lambda place: np.tile(np.arange(widths[place]), len(turn)))
    yield "expert", column(lambda place: state.experts[place])
    yield "weight", column(lambda place: state.weights[place])
