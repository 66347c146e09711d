"""The sweep of decoder calibration: every variant of a decoder through its layers, all through a layer together.

Together go the unchanged decoder, the variants that began in earlier layers and those that begin here. The layer's
dense part is held while it does, and experts are visited one after the other: an expert is read, rounded to each
precision, computes for all rows that chose it, and is forgotten. Rows are held until the last expert was visited, so
their bytes are limited; what is beyond the limit goes in further visits, which read the experts again but round
nothing.

Memory: the rows of a visit (``VISIT_BYTES``), the text's hidden states a few times, the dense part of one layer and one
expert with their changed numbers, and at both ends the embedding or the head twice. Neither the number of layers nor
that of variants is among them: hidden states wait on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeflex.costs import decoder_states
from edgeflex.costs.decoder_states import ShelfWriter, State
from edgeflex.models.decoder_reference import Mixing, Reference, Routed, divergences
from edgeflex.transforms.decoder_weights import StoredMatrix, dequantize, quantize_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from edgeflex.costs.decoder_states import ShelfFile
    from edgeflex.models.decoders import DecoderSource
    from edgeflex.progress import Progress
    from edgeflex.schema import Precision

VISIT_BYTES = 3 << 29  # of rows on their way through a layer's experts
_ATTENDED_ROWS = 4096  # that go through attention together
_OTHER_COPIES = 6  # of a row beside its experts' outputs: before, attended, normed twice, summed, after
_CAP = 256  # tokens of its own that an expert's error is measured on
_UNUSED = 0.5  # tokens that an expert never seen is counted with


@dataclass(frozen=True)
class Text:
    """Token ids padded behind, and which positions are real."""

    tokens: Tensor  # [sequences, longest]
    real: Tensor  # bool
    kl_sequences: int

    @property
    def kl_real(self) -> Tensor:
        """Real positions of the sequences that KL is measured on, flattened."""
        return self.real[: self.kl_sequences].flatten()

    @property
    def kl_tokens(self) -> Tensor:
        """Tokens of the sequences that KL is measured on."""
        return self.tokens[: self.kl_sequences]


@dataclass(frozen=True)
class Measured:
    """What a sweep found.

    Attributes:
        groups: KL by group and precision, ``layers.3.experts@int8-dynamic``.
        uniform: KL of everything in one precision, by its name.
        reference_loss: Mean cross entropy of the unchanged decoder over all text, nats.
        state: After the last layer.
    """

    groups: Mapping[str, float]
    uniform: Mapping[str, float]
    reference_loss: float
    state: State


def is_matrix(source: DecoderSource, name: str) -> bool:
    """Whether a precision is chosen for this tensor."""
    return len(source.shape(name)) == 2 and not name.endswith((".router", ".shared_gate"))


class _Stored:
    """Quantised matrices of the present layer, kept as codes so that each is quantised once."""

    def __init__(self, plain: Reference) -> None:
        self._plain = plain
        self._held: dict[tuple[str, Precision], StoredMatrix] = {}

    def weight(self, name: str, precision: Precision) -> NDArray[np.float32] | None:
        """Return a matrix as ``precision`` has it, or None for what stays in fp32."""
        if not is_matrix(self._plain.source, name):
            return None
        if (name, precision) not in self._held:
            self._held[name, precision] = quantize_matrix(self._plain.weight(name).numpy(), precision)
        return dequantize(self._held[name, precision])

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()


@dataclass(frozen=True)
class _Strand:
    """Rows on their way through a layer, before its feed-forward. ``reference`` is whose they are.

    ``attended`` is ``[sequences, tokens, hidden]``, ``normed`` ``[sequences * tokens, hidden]``; ``routed`` is None in
    a dense layer.
    """

    reference: Reference
    attended: Tensor
    normed: Tensor
    routed: Routed | None

    def part(self, first: int, count: int) -> _Strand:
        """Return ``count`` sequences from ``first`` on."""
        attended = self.attended[first : first + count]
        rows = slice(first * attended.shape[1], first * attended.shape[1] + attended.shape[0] * attended.shape[1])
        routed = None if self.routed is None else Routed(self.routed.experts[rows], self.routed.weights[rows])
        return _Strand(self.reference, attended, self.normed[rows], routed)


@dataclass(frozen=True)
class _Own:
    """What goes through a layer beside the unchanged decoder and earlier variants, by precision."""

    dense: Mapping[Precision, _Strand]  # the dense part changed here, experts unchanged
    uniform: Mapping[Precision, _Strand]  # everything changed everywhere
    experts: Mapping[Precision, _Strand]  # experts changed here; none in a dense layer


class Sweep:
    """Measures a decoder; ``run`` once.

    Args:
        source: The decoder.
        text: What it reads.
        precisions: To measure.
        expert_tokens: Least tokens that an expert is judged by.
        folder: Where the state lies.
        progress: Told of every layer.
    """

    def __init__(
        self,
        source: DecoderSource,
        text: Text,
        precisions: Sequence[Precision],
        *,
        expert_tokens: int,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._source = source
        self._text = text
        self._precisions = tuple(precisions)
        self._expert_tokens = expert_tokens
        self._folder = folder
        self._progress = progress
        self._plain = Reference(source)
        self._stored = _Stored(self._plain)
        graph = source.graph
        most = max((layer.routing.top_k for layer in graph.layers if layer.routing is not None), default=0)
        self._visit_rows = VISIT_BYTES // (4 * graph.hidden_dim * (most + _OTHER_COPIES))
        self._length = text.tokens.shape[1]
        self._variant_rows = text.kl_sequences * self._length
        self._per_file = max(1, self._visit_rows // self._variant_rows)

    # --- from start to end ---

    def run(self) -> Measured:
        """Go on from the last whole layer, or start, and return what was found.

        Raises:
            InputError: The folder's state is damaged, or the source cannot be read.
        """
        state = decoder_states.resumed(self._folder, self._per_file) or self._started()
        layers = len(self._source.graph.layers)
        with self._progress.task("Measuring precisions layer by layer", layers) as advance:
            advance(state.done)
            while state.done < layers:
                with self._plain.holding(self._source.layer_tensors(state.done)):
                    self._pass(state)
                self._stored.clear()
                decoder_states.keep(state, self._folder)
                advance(1)
        with self._plain.holding(("head", "norm")):
            return self._measured(state)

    def forget(self) -> None:
        """Remove the state; its results are kept elsewhere."""
        for path in self._folder.glob("state*"):
            path.unlink(missing_ok=True)

    def _started(self) -> State:
        shelf, uniform = ShelfWriter(self._folder, 0, self._per_file), {}
        with self._plain.holding(("embedding",)):
            clean = self._plain.embed(self._text.tokens)
            for precision in self._precisions:
                table = self._changed(precision, lambda name: name == "embedding").embed(self._text.kl_tokens)
                shelf.put(f"embedding@{precision.value}", table)
                uniform[precision.value] = table
                self._stored.clear()
        return State(0, clean, uniform, shelf.shelf())

    def _changed(self, precision: Precision, applies: Callable[[str], bool]) -> Reference:
        return self._plain.replaced(lambda name: self._stored.weight(name, precision) if applies(name) else None)

    # --- one layer ---

    def _pass(self, state: State) -> None:
        """Take the state through one layer, adding the variants that begin there."""
        index = state.done
        clean = self._entered(self._plain, index, state.clean)
        own = self._own(index, state, clean)
        self._note(state, clean, own)
        judging = None if clean.routed is None else self._judging(index, clean.normed, clean.routed)
        shelf = ShelfWriter(self._folder, index + 1, self._per_file)
        passed: list[Tensor] = []
        begun: list[tuple[str, Tensor]] = []
        for number, (pieces, files) in enumerate(self._visits(clean, own, state.shelf.files)):
            names, strands = self._together(state, clean, pieces, files)
            if number:
                after = self._left(index, strands, self._visited(index, strands, {}, None)[0])
            else:
                after, begun = self._first_visit(state, strands, own, judging)
            passed += after[: len(pieces)]
            for name, hidden in zip(names, after[len(pieces) :], strict=True):
                shelf.put(name, hidden)
            del strands, after  # before the next ones are made
        for name, hidden in begun:
            shelf.put(name, hidden)
        state.clean = torch.cat(passed)
        state.shelf = shelf.shelf()
        state.done += 1

    def _entered(self, reference: Reference, index: int, hidden: Tensor) -> _Strand:
        together = max(1, _ATTENDED_ROWS // self._length)
        attended = torch.cat([reference.attention(index, part) for part in hidden.split(together)])
        normed = reference.normed(index, attended).flatten(0, 1)
        dense = self._source.graph.layers[index].routing is None
        return _Strand(reference, attended, normed, None if dense else reference.route(index, normed))

    def _own(self, index: int, state: State, clean: _Strand) -> _Own:
        """Return what is changed in this layer, as its feed-forward sees it."""
        start, before = f"layers.{index}.experts.", state.clean[: self._text.kl_sequences]
        dense, uniform, experts = {}, {}, {}
        for precision in self._precisions:
            changed = self._changed(precision, lambda name: not name.startswith(start))
            dense[precision] = self._entered(changed, index, before)
            uniform[precision] = self._entered(changed, index, state.uniform[precision.value])
            if clean.routed is not None:
                experts[precision] = clean.part(0, self._text.kl_sequences)
        return _Own(dense, uniform, experts)

    def _note(self, state: State, clean: _Strand, own: _Own) -> None:
        """Keep what the routers chose, and how often changed ones chose the same."""
        if clean.routed is None:
            state.experts.append(np.zeros((0, 0), np.int64))
            state.weights.append(np.zeros((0, 0), np.float32))
            return
        real = self._text.real.flatten()
        state.experts.append(clean.routed.experts[real].numpy())
        state.weights.append(clean.routed.weights[real].numpy())
        for precision, strand in own.uniform.items():
            if strand.routed is not None:
                share = _overlap(clean.routed, strand.routed, self._text.kl_real)
                state.agreement.setdefault(precision.value, []).append(share)

    def _judging(self, index: int, normed: Tensor, routed: Routed) -> _Judging:
        real = self._text.real.flatten()
        chosen = Routed(routed.experts[real], routed.weights[real])
        router = self._plain.weight(f"layers.{index}.router")
        return _Judging(f"layers.{index}.experts", normed[real], chosen, router, self._expert_tokens)

    def _visits(
        self, clean: _Strand, own: _Own, files: Sequence[ShelfFile]
    ) -> Iterator[tuple[list[tuple[int, int]], list[ShelfFile]]]:
        """Give, for each visit to the experts, pieces of the text as (first sequence, count), and files of variants.

        The first visit has the changed experts too.
        """
        together = max(1, self._visit_rows // (4 * self._length))  # a quarter, so that most visits are nearly full
        total = clean.attended.shape[0]
        rows = self._variant_rows * sum(len(one) for one in (own.dense, own.uniform, own.experts))
        pieces: list[tuple[int, int]] = []
        held: list[ShelfFile] = []
        for first in range(0, total, together):
            count = min(together, total - first)
            if rows and rows + count * self._length > self._visit_rows:
                yield pieces, held
                pieces, held, rows = [], [], 0
            pieces.append((first, count))
            rows += count * self._length
        for file in files:
            if rows + file.variants * self._variant_rows > self._visit_rows:
                yield pieces, held
                pieces, held, rows = [], [], 0
            held.append(file)
            rows += file.variants * self._variant_rows
        yield pieces, held

    def _together(
        self, state: State, clean: _Strand, pieces: Sequence[tuple[int, int]], files: Sequence[ShelfFile]
    ) -> tuple[list[str], list[_Strand]]:
        """Return the names of the variants in ``files``, and the pieces of the text and them, before the experts."""
        names, strands = list[str](), [clean.part(*piece) for piece in pieces]
        for file in files:
            for name, hidden in state.shelf.read(file).items():
                names.append(name)
                strands.append(self._entered(self._plain, state.done, hidden))
        return names, strands

    def _first_visit(
        self, state: State, strands: list[_Strand], own: _Own, judging: _Judging | None
    ) -> tuple[list[Tensor], list[tuple[str, Tensor]]]:
        """Take ``strands`` and all that is changed in this layer through it; return them and the variants begun."""
        index = state.done
        all_plain = [*strands, *own.dense.values()]
        changed = {one: [own.uniform[one], *([own.experts[one]] if own.experts else [])] for one in self._precisions}
        summed, others = self._visited(index, all_plain, changed, judging)
        after = self._left(index, all_plain, summed)
        unit, dense = f"layers.{index}", zip(own.dense, after[len(strands) :], strict=True)
        begun = [(f"{unit}@{precision.value}", hidden) for precision, hidden in dense]
        for precision in self._precisions:
            found = self._left(index, changed[precision], others[precision])
            state.uniform[precision.value] = found[0]
            begun += [(f"{unit}.experts@{precision.value}", hidden) for hidden in found[1:]]
        if judging is not None:
            state.shares.update(judging.shares())
        return after[: len(strands)], begun

    def _left(self, index: int, strands: Sequence[_Strand], summed: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the hidden states after the layer, given what its experts gave; None in a dense layer."""
        after = []
        for strand, given in zip(strands, summed, strict=True):
            if given is None:
                added = strand.reference.swiglu(f"layers.{index}.mlp", strand.normed)
            else:
                added = strand.reference.with_shared(index, strand.normed, given)
            after.append(strand.attended + added.reshape(strand.attended.shape))
        return after

    # --- experts ---

    def _visited(
        self,
        index: int,
        plain: Sequence[_Strand],
        changed: Mapping[Precision, Sequence[_Strand]],
        judging: _Judging | None,
    ) -> tuple[Sequence[Tensor | None], Mapping[Precision, Sequence[Tensor | None]]]:
        """Visit every expert once, unchanged for ``plain`` and as each precision has it for ``changed``."""
        routing = self._source.graph.layers[index].routing
        if routing is None:
            return [None] * len(plain), {one: [None] * len(strands) for one, strands in changed.items()}
        mixing = _mixing(plain)
        others = {precision: _mixing(strands) for precision, strands in changed.items()}
        for expert in range(routing.experts):
            prefix, names = f"layers.{index}.experts.{expert}", self._source.expert_tensors(index, expert)
            with self._plain.holding(names):
                feeds = {}
                for precision, other in others.items():
                    numbers = {name: self._rounded(name, precision) for name in names}
                    feeds[precision] = partial(self._plain.replaced(numbers.get).swiglu, prefix)
                    other.take(expert, feeds[precision])
                mixing.take(expert, partial(self._plain.swiglu, prefix))
                if judging is not None:
                    judging.judge(expert, partial(self._plain.swiglu, prefix), feeds)
        return _shared_out(mixing, plain), {one: _shared_out(other, changed[one]) for one, other in others.items()}

    def _rounded(self, name: str, precision: Precision) -> NDArray[np.float32]:
        return dequantize(quantize_matrix(self._plain.weight(name).numpy(), precision))

    # --- results ---

    def _measured(self, state: State) -> Measured:
        clean = state.clean[: self._text.kl_sequences]
        groups: dict[str, float] = {}
        for file in state.shelf.files:
            held = state.shelf.read(file)
            groups.update(zip(held, self._kl(clean, held.values(), self._plain), strict=True))
        uniform = {}
        for precision in self._precisions:
            head = {"head": self._stored.weight("head", precision)}
            self._stored.clear()
            together = (clean, state.uniform[precision.value])
            groups[f"head@{precision.value}"], uniform[precision.value] = self._kl(
                clean, together, self._plain.replaced(head.get)
            )
        real = self._text.real[:, 1:] & self._text.real[:, :-1]
        losses = self._plain.losses(self._text.tokens, state.clean)
        return Measured(groups, uniform, float(losses[real].double().mean()), state)

    def _kl(self, true: Tensor, others: Iterable[Tensor], reference: Reference) -> list[float]:
        found = divergences(self._plain, true, reference, list(others))
        return [max(0.0, float(one[self._text.kl_real].double().mean())) for one in found]


def _mixing(strands: Sequence[_Strand]) -> Mixing:
    routed = [strand.routed for strand in strands if strand.routed is not None]
    together = Routed(torch.cat([one.experts for one in routed]), torch.cat([one.weights for one in routed]))
    return Mixing(torch.cat([strand.normed for strand in strands]), together)


def _shared_out(mixing: Mixing, strands: Sequence[_Strand]) -> Sequence[Tensor]:
    """Return the sum of each strand's own rows."""
    return mixing.summed().split([len(strand.normed) for strand in strands])


# --- experts judged one by one -----------------------------------------------------------------------------


class _Judging:
    """Finds each expert's share of its layer's error, on as many tokens as balance needs.

    Args:
        unit: ``layers.3.experts``.
        normed: ``[tokens, hidden]`` of the unchanged decoder, real tokens only.
        routed: What the router chose for them.
        router: Its matrix.
        least: Tokens that an expert is judged by, at least.
    """

    def __init__(self, unit: str, normed: Tensor, routed: Routed, router: Tensor, least: int) -> None:
        self._unit = unit
        self._normed = normed
        self._chosen, self._weights = routed.experts, routed.weights
        self._scores = torch.softmax(normed @ router.T, dim=-1)
        self._least = least
        self._errors: dict[Precision, list[float]] = {}
        self._judged: list[int] = []

    def judge(
        self,
        expert: int,
        true: Callable[[Tensor], Tensor],
        feeds: Mapping[Precision, Callable[[Tensor], Tensor]],
    ) -> None:
        """Hold an expert in each precision against itself; experts come in ascending order."""
        rows = _judges(self._chosen, self._scores, expert, self._least)
        weight = _weight_of(self._chosen, self._weights, self._scores, expert, rows)
        self._judged.append(len(rows))
        wanted = true(self._normed[rows])
        for precision, feed in feeds.items():
            error = (feed(self._normed[rows]) - wanted).square().sum(dim=1).double().mean()
            self._errors.setdefault(precision, []).append(weight * float(error))

    def shares(self) -> Iterator[tuple[str, tuple[float, int]]]:
        """Give each expert's share of the layer's error, and the tokens it was judged by."""
        for precision, values in self._errors.items():
            total = sum(values)
            for expert, (value, tokens) in enumerate(zip(values, self._judged, strict=True)):
                share = value / total if total > 0 else 1.0 / len(values)
                yield f"{self._unit}.{expert}@{precision.value}", (share, tokens)


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
