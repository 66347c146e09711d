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
import io
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import ValidationError

from edgeflex.errors import InputError
from edgeflex.files import read_bytes, write_atomic
from edgeflex.models.decoder_reference import Reference, divergence
from edgeflex.progress import Silent
from edgeflex.schema import Noun, Precision
from edgeflex.schema_moe import DecoderCalibration, UnitLoss
from edgeflex.transforms.decoder_weights import StoredMatrix, dequantize, quantize_matrix, require_runnable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from edgeflex.models.decoder_reference import Routed
    from edgeflex.models.decoders import DecoderSource
    from edgeflex.progress import Progress

PRECISIONS = (Precision.INT8_DYNAMIC, Precision.INT4_GROUP32)
_PER_PASS = 8  # variants that go through a layer together
_CAP = 256  # tokens of its own that an expert's error is measured on
_UNUSED = 0.5  # tokens that an expert never seen is counted with
_KEPT_BYTES = 1 << 29  # of the source's matrices, so that a small decoder is read once
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


@dataclass(frozen=True)
class Routing:
    """Columns of a routing trace, one row for each (token, layer, expert used), all equally long.

    ``phase`` is 0 in a prompt and 1 while decoding, ``step`` the token's position, ``iter`` the prompt's chunk.
    """

    turn: NDArray[np.int64]
    phase: NDArray[np.int64]
    step: NDArray[np.int64]
    layer: NDArray[np.int64]
    iter: NDArray[np.int64]
    slot: NDArray[np.int64]
    expert: NDArray[np.int64]
    weight: NDArray[np.float32]

    def uses(self, layers: int, experts: int) -> NDArray[np.float64]:
        """Return the share of decoded tokens that use each expert, [layers, experts]; of all if none is decoded."""
        rows = self.phase == 1 if (self.phase == 1).any() else np.ones(len(self.phase), dtype=bool)
        flat = np.bincount(self.layer[rows] * experts + self.expert[rows], minlength=layers * experts)
        tokens = len(np.unique(np.stack([self.turn[rows], self.step[rows]]), axis=1).T)
        return flat.reshape(layers, experts) / max(1, tokens)


_IDS = ("turn", "phase", "step", "layer", "iter", "slot", "expert")


# --- the state of the sweep --------------------------------------------------------------------------------


@dataclass
class _State:
    """What the sweep carries from layer to layer."""

    done: int  # layers passed
    clean: Tensor  # [sequences, tokens, hidden], all text
    variants: dict[str, Tensor] = field(default_factory=dict)  # [kl sequences, tokens, hidden]
    shares: dict[str, tuple[float, int]] = field(default_factory=dict)  # unit@precision: share of layer, tokens
    agreement: dict[str, list[float]] = field(default_factory=dict)  # precision: share of each layer
    experts: list[NDArray[np.int64]] = field(default_factory=list)  # of each layer [tokens, top_k] or empty
    weights: list[NDArray[np.float32]] = field(default_factory=list)


@dataclass(frozen=True)
class _Text:
    """Token ids padded behind, and which positions are real."""

    tokens: Tensor  # [sequences, longest]
    real: Tensor  # bool
    kl_sequences: int

    @property
    def kl_real(self) -> Tensor:
        """Real positions of the sequences that KL is measured on, flattened."""
        return self.real[: self.kl_sequences].flatten()


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
    """Return KL of every unit and precision, and leave the routing of the text in ``folder`` (``read_routing``).

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
    with torch.no_grad():
        sweep = _Sweep(source, text, key, folder, progress or Silent())
        found = sweep.run()
    write_atomic(result, found.canonical_json())
    return found


def read_routing(folder: Path) -> Routing:
    """Return the routing trace that calibration recorded.

    Raises:
        InputError: ``folder`` holds none, or a damaged one.
    """
    path = folder / "routing.npz"
    arrays = _load(path)
    if set(arrays) != {*_IDS, "weight"} or len({len(values) for values in arrays.values()}) != 1:
        raise _damaged(path, "columns are missing or of unequal length")
    return Routing(**{name: arrays[name].astype(np.int64) for name in _IDS}, weight=arrays["weight"].astype(np.float32))


def _text(source: DecoderSource, sequences: Sequence[Sequence[int]], kl_tokens: int) -> _Text:
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
    return _Text(tokens, real, kl_sequences)


def _digest(sequences: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(map(int, one)) for one in sequences]).encode()).hexdigest()


def _refuse_columns(source: DecoderSource, precisions: Sequence[Precision]) -> None:
    for name in source.names:
        if _is_matrix(source, name):
            for precision in precisions:
                require_runnable(precision, source.shape(name)[1], name)


def _is_matrix(source: DecoderSource, name: str) -> bool:
    return len(source.shape(name)) == 2 and not name.endswith((".router", ".shared_gate"))


def _claim(folder: Path, key: CalibrationKey) -> None:
    """Make ``folder`` this calibration's, or refuse it."""
    path = folder / "decoder-key.json"
    if path.exists():
        try:
            found = CalibrationKey.model_validate_json(read_bytes(path, "calibration key"))
        except ValidationError as error:
            raise _damaged(path, f"{error.error_count()} faults") from None
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


# --- files -----------------------------------------------------------------------------------------------


def _save(path: Path, arrays: dict[str, NDArray[np.generic]], *, packed: bool = False) -> str:
    """Write arrays whole or not at all, and return their digest."""
    buffer = io.BytesIO()
    # numbers only, so that nothing is ever pickled; not every numpy has savez refuse objects by itself
    (np.savez_compressed if packed else np.savez)(buffer, **arrays)  # type: ignore[arg-type]
    raw = buffer.getvalue()
    write_atomic(path, raw)
    return hashlib.sha256(raw).hexdigest()


def _load(path: Path, digest: str | None = None) -> dict[str, NDArray[np.generic]]:
    raw = read_bytes(path, "calibration file")
    if digest is not None and hashlib.sha256(raw).hexdigest() != digest:
        raise _damaged(path, "its content is not what was written")
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(f"calibration file {str(path)!r} is damaged: {reason}. Delete it and calibrate again.")


# --- the sweep -------------------------------------------------------------------------------------------


class _Stored:
    """Quantised matrices of the present layer, kept as codes so that each is quantised once."""

    def __init__(self, plain: Reference) -> None:
        self._plain = plain
        self._held: dict[tuple[str, Precision], StoredMatrix] = {}

    def weight(self, name: str, precision: Precision) -> NDArray[np.float32] | None:
        """Return a matrix as ``precision`` has it, or None for what stays in fp32."""
        if not _is_matrix(self._plain.source, name):
            return None
        if (name, precision) not in self._held:
            self._held[name, precision] = quantize_matrix(self._plain.weight(name).numpy(), precision)
        return dequantize(self._held[name, precision])

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()


class _Sweep:
    def __init__(
        self, source: DecoderSource, text: _Text, key: CalibrationKey, folder: Path, progress: Progress
    ) -> None:
        self._source = source
        self._text = text
        self._key = key
        self._folder = folder
        self._progress = progress
        self._plain = Reference(source, keep_bytes=_KEPT_BYTES)
        self._stored = _Stored(self._plain)

    # --- from start to end ---

    def run(self) -> DecoderCalibration:
        state = self._resumed() or self._started()
        layers = len(self._source.graph.layers)
        with self._progress.task("Measuring precisions layer by layer", layers) as advance:
            advance(state.done)
            while state.done < layers:
                self._pass(state)
                self._stored.clear()
                self._keep(state)
                advance(1)
        found = self._finish(state)
        for path in self._folder.glob("state*"):
            path.unlink(missing_ok=True)
        return found

    def _started(self) -> _State:
        state = _State(0, self._plain.embed(self._text.tokens))
        for precision in self._key.precisions:
            table = self._changed(precision, lambda name: name == "embedding").embed(self._kl_tokens())
            state.variants[f"embedding@{precision.value}"] = table
            state.variants[f"uniform@{precision.value}"] = table.clone()
        self._stored.clear()
        return state

    def _kl_tokens(self) -> Tensor:
        return self._text.tokens[: self._text.kl_sequences]

    def _changed(self, precision: Precision, applies: Callable[[str], bool]) -> Reference:
        return self._plain.replaced(lambda name: self._stored.weight(name, precision) if applies(name) else None)

    def _pass(self, state: _State) -> None:
        """Take the state through one layer, adding the variants that begin there."""
        index, count = state.done, self._text.kl_sequences
        before = state.clean
        begun = self._dense_variants(index, before[:count])
        attended = self._plain.attention(index, before)
        normed = self._plain.normed(index, attended).flatten(0, 1)
        if self._source.graph.layers[index].routing is None:
            state.clean = attended + self._plain.swiglu(f"layers.{index}.mlp", normed).reshape(attended.shape)
            routed = None
            state.experts.append(np.zeros((0, 0), np.int64))
            state.weights.append(np.zeros((0, 0), np.float32))
        else:
            routed = self._plain.route(index, normed)
            state.clean = attended + self._plain.mixture(index, normed, routed).reshape(attended.shape)
            real = self._text.real.flatten()
            state.experts.append(routed.experts[real].numpy())
            state.weights.append(routed.weights[real].numpy())
            begun.update(self._expert_variants(index, attended[:count], normed, routed))
            self._split(state, index, normed, routed)
        self._advance(state, index, routed)
        state.variants.update(begun)
        state.done += 1

    def _advance(self, state: _State, index: int, routed: Routed | None) -> None:
        """Take every variant that began earlier through layer ``index``; uniform ones in their precision."""
        plain = [name for name in state.variants if not name.startswith("uniform@")]
        for start in range(0, len(plain), _PER_PASS):
            names = plain[start : start + _PER_PASS]
            after, _ = self._plain.run_layer(index, torch.cat([state.variants[name] for name in names]))
            state.variants.update(zip(names, after.split(self._text.kl_sequences), strict=True))
        for precision in self._key.precisions:
            name = f"uniform@{precision.value}"
            after, chosen = self._changed(precision, lambda _: True).run_layer(index, state.variants[name])
            state.variants[name] = after
            if routed is not None and chosen is not None:
                share = _overlap(routed, chosen, self._text.kl_real)
                state.agreement.setdefault(precision.value, []).append(share)

    def _dense_variants(self, index: int, before: Tensor) -> dict[str, Tensor]:
        experts = f"layers.{index}.experts."
        found = {}
        for precision in self._key.precisions:
            changed = self._changed(precision, lambda name: not name.startswith(experts))
            found[f"layers.{index}@{precision.value}"] = changed.run_layer(index, before)[0]
        return found

    def _expert_variants(self, index: int, attended: Tensor, normed: Tensor, routed: Routed) -> dict[str, Tensor]:
        """Return the hidden states after the layer with all its experts changed, routing as it was."""
        rows, experts = attended.shape[0] * attended.shape[1], f"layers.{index}.experts."
        part = type(routed)(routed.experts[:rows], routed.weights[:rows])
        found = {}
        for precision in self._key.precisions:
            changed = self._changed(precision, lambda name: name.startswith(experts))
            mixed = changed.mixture(index, normed[:rows], part).reshape(attended.shape)
            found[f"layers.{index}.experts@{precision.value}"] = attended + mixed
        return found

    # --- experts ---

    def _split(self, state: _State, index: int, normed: Tensor, routed: Routed) -> None:
        """Find each expert's share of its layer's error, on as many tokens as balance needs."""
        real = self._text.real.flatten()
        normed, chosen, weights = normed[real], routed.experts[real], routed.weights[real]
        scores = torch.softmax(normed @ self._plain.weight(f"layers.{index}.router").T, dim=-1)
        routing = self._source.graph.layers[index].routing
        errors: dict[Precision, list[float]] = {precision: [] for precision in self._key.precisions}
        judged = []
        for expert in range(routing.experts if routing else 0):
            rows = _judges(chosen, scores, expert, self._key.expert_tokens)
            weight = _weight_of(chosen, weights, scores, expert, rows)
            judged.append(len(rows))
            prefix = f"layers.{index}.experts.{expert}"
            true = self._plain.swiglu(prefix, normed[rows])
            for precision in self._key.precisions:
                other = self._changed(precision, lambda _: True).swiglu(prefix, normed[rows])
                errors[precision].append(weight * float((other - true).square().sum(dim=1).double().mean()))
        for precision, values in errors.items():
            total = sum(values)
            for expert, (value, tokens) in enumerate(zip(values, judged, strict=True)):
                share = value / total if total > 0 else 1.0 / len(values)
                state.shares[f"layers.{index}.experts.{expert}@{precision.value}"] = (share, tokens)

    # --- results ---

    def _finish(self, state: _State) -> DecoderCalibration:
        _save(self._folder / "routing.npz", dict(_rows(state, self._text, self._key)), packed=True)
        clean = state.clean[: self._text.kl_sequences]
        groups = {name: self._kl(clean, hidden, self._plain) for name, hidden in state.variants.items()}
        uniform = {}
        for precision in self._key.precisions:
            headed = self._changed(precision, lambda name: name == "head")
            groups[f"head@{precision.value}"] = self._kl(clean, clean, headed)
            uniform[precision] = self._kl(clean, state.variants[f"uniform@{precision.value}"], headed)
        real = self._text.real[:, 1:] & self._text.real[:, :-1]
        losses = self._plain.losses(self._text.tokens, state.clean)
        return DecoderCalibration(
            graph=self._source.graph,
            text_digest=self._key.text_digest,
            tokens=int(self._text.real.sum()),
            reference_loss=float(losses[real].double().mean()),
            losses=tuple(self._losses(state, groups)),
            router_agreement={Precision(name): float(np.mean(shares)) for name, shares in state.agreement.items()},
            uniform_kl=uniform,
        )

    def _kl(self, true: Tensor, other: Tensor, reference: Reference) -> float:
        found = divergence(self._plain, true, reference, other)[self._text.kl_real]
        return max(0.0, float(found.double().mean()))

    def _losses(self, state: _State, groups: dict[str, float]) -> Iterator[UnitLoss]:
        """Give every unit's KL in the order of the graph, whatever order the sweep took."""
        tokens = int(self._text.kl_real.sum())
        for precision in self._key.precisions:
            for unit in ("embedding", "head", *(f"layers.{layer.index}" for layer in self._source.graph.layers)):
                yield UnitLoss(unit=unit, precision=precision, kl=groups[f"{unit}@{precision.value}"], tokens=tokens)
            for layer in self._source.graph.layers:
                experts = f"layers.{layer.index}.experts"
                for expert in range(layer.routing.experts if layer.routing else 0):
                    share, judged = state.shares[f"{experts}.{expert}@{precision.value}"]
                    kl = share * groups[f"{experts}@{precision.value}"]
                    yield UnitLoss(unit=f"{experts}.{expert}", precision=precision, kl=kl, tokens=judged)

    # --- keeping and resuming ---

    def _keep(self, state: _State) -> None:
        """Write the state; the pointer last, so that a killed run finds the layer before."""
        arrays: dict[str, NDArray[np.generic]] = {"clean": state.clean.numpy()}
        arrays.update({f"v:{name}": value.numpy() for name, value in state.variants.items()})
        arrays.update({f"e:{place}": value for place, value in enumerate(state.experts)})
        arrays.update({f"w:{place}": value for place, value in enumerate(state.weights)})
        path = self._folder / f"state-{state.done}.npz"
        digest = _save(path, arrays)
        pointer = {"done": state.done, "digest": digest, "shares": state.shares, "agreement": state.agreement}
        write_atomic(self._folder / "state.json", json.dumps(pointer, sort_keys=True))
        (self._folder / f"state-{state.done - 1}.npz").unlink(missing_ok=True)

    def _resumed(self) -> _State | None:
        path = self._folder / "state.json"
        if not path.exists():
            return None
        try:
            pointer = json.loads(read_bytes(path, "calibration state"))
            done, digest = int(pointer["done"]), str(pointer["digest"])
            shares = {name: (float(share), int(tokens)) for name, (share, tokens) in pointer["shares"].items()}
            agreement = {name: [float(one) for one in values] for name, values in pointer["agreement"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from None
        arrays = _load(self._folder / f"state-{done}.npz", digest)
        return _State(
            done=done,
            clean=torch.from_numpy(arrays["clean"]),
            variants={name[2:]: torch.from_numpy(value) for name, value in arrays.items() if name.startswith("v:")},
            shares=shares,
            agreement=agreement,
            experts=[arrays[f"e:{place}"].astype(np.int64) for place in range(done)],
            weights=[arrays[f"w:{place}"].astype(np.float32) for place in range(done)],
        )


def _overlap(true: Routed, other: Routed, real: Tensor) -> float:
    """Return the share of the top-k choices of ``true`` that ``other`` makes too, over real tokens."""
    rows = real.nonzero()[:, 0]
    ours, theirs = true.experts[: len(real)][rows], other.experts[rows]
    return float((ours[:, :, None] == theirs[:, None, :]).any(dim=2).double().mean())


def _judges(chosen: Tensor, scores: Tensor, expert: int, least: int) -> Tensor:
    """Return the tokens that an expert is judged by: its own, then those nearest to choosing it."""
    own = (chosen == expert).any(dim=1)
    rows = own.nonzero()[:, 0]
    if len(rows) > _CAP:
        # evenly spaced, so that every part of the text speaks
        rows = rows[torch.linspace(0, len(rows) - 1, _CAP).long()]
    if len(rows) >= least:
        return rows
    near = torch.where(own, -1.0, scores[:, expert])
    more = near.argsort(descending=True, stable=True)[: min(least - len(rows), int((~own).sum()))]
    return torch.cat([rows, more])


def _weight_of(chosen: Tensor, weights: Tensor, scores: Tensor, expert: int, rows: Tensor) -> float:
    """Return n E[w^2]: the sum of squared weights of real uses; for an unused expert, of half a likely one."""
    real = weights[chosen == expert]
    if len(real):
        return float(real.double().square().sum())
    return _UNUSED * float(scores[rows, expert].double().square().mean())


def _rows(state: _State, text: _Text, key: CalibrationKey) -> Iterator[tuple[str, NDArray[np.generic]]]:
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
