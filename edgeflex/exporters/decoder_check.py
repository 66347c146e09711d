"""The written programs, run by stock ExecuTorch, against the fp32 reference with the bundle's own numbers.

Two short prompts walk through the bundle as a host would run it: embedding, attention with its cache (a chunk,
then single tokens), the chosen experts, head. Each program's answer is compared with the reference's answer to the
very same input, so that an error cannot hide behind an earlier one, and a choice of experts that rounding turned
over is no error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from executorch.extension.pybindings import portable_lib
from torch.nn.functional import linear, rms_norm

from edgeflex.errors import UnsupportedError
from edgeflex.exporters.executorch import quiet_exporter
from edgeflex.models.decoder_reference import KeyValues, Reference, Routed
from edgeflex.schema import Precision

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from edgeflex.exporters.decoder_files import BundleWeights
    from edgeflex.models.decoders import DecoderSource
    from edgeflex.schema_moe import DecoderLayer, StockProgram

# Relative error |a - b| / |b| of one program. Quantised ones round activations to 8 bits, row by row: each product
# adds about a hundredth. Swapped nibbles, scales or files give one or more.
_MOST_ERROR = {Precision.FP32: 1e-4, Precision.INT8_DYNAMIC: 0.05, Precision.INT4_GROUP32: 0.05}
_FLOAT_ERROR = 1e-4
_FEW_LAYERS = 2
_SMALL_BYTES = 64 << 20  # of all experts: then every layer is walked through
_HEAD_ROWS = 8192
_PROMPTS = ((5, 1, 1), (3, 1))  # tokens of each call


def check_programs(
    source: DecoderSource, weights: BundleWeights, programs: Sequence[StockProgram], lengths: tuple[int, int]
) -> None:
    """Run the stock programs and compare each with the reference.

    All layers are walked where the experts are small, else the first two and the first layer of each program.

    Args:
        source: The decoder.
        weights: The numbers of the written bundle.
        programs: What to run.
        lengths: Tokens of the cache, and most tokens a call.

    Raises:
        UnsupportedError: A program cannot be loaded or run, or answers otherwise than the reference.
    """
    with quiet_exporter(), torch.no_grad():
        walk = _Walk(source, weights, programs)
        draw = np.random.default_rng(len(programs))
        context, chunk = lengths
        for calls in _PROMPTS:
            tokens = draw.integers(0, source.graph.vocabulary, size=min(context, sum(calls)))
            walk.run(torch.from_numpy(tokens), [min(chunk, call) for call in calls])
        walk.run_unseen()


class _Walk:
    """The bundle run program by program, each checked."""

    def __init__(self, source: DecoderSource, weights: BundleWeights, programs: Sequence[StockProgram]) -> None:
        self._source = source
        self._folder = weights.folder
        self._weights = weights
        self._reference = Reference(source, weights)
        self._ends = {one.role: one for one in programs if one.role in {"embedding", "head"}}
        self._layers = {(one.role, one.layer): one for one in programs if one.layer is not None}
        self._experts = [one for one in programs if one.role == "expert"]
        self._methods: dict[tuple[str, str], Any] = {}
        self._seen: set[str] = set()
        self._walked = tuple(self._chosen_layers())
        self._rows: Tensor | None = None

    def run(self, tokens: Tensor, calls: Iterable[int]) -> None:
        """Walk through ``tokens`` in calls of so many, from an empty cache on."""
        past, start = KeyValues(), 0
        for call in calls:
            chunk = tokens[start : start + call]
            if len(chunk):
                self._step(chunk, torch.arange(start, start + len(chunk)), past)
            start += call

    def run_unseen(self) -> None:
        """Run the experts' programs that no token has chosen yet."""
        for layer in self._source.graph.layers:
            for expert in range(layer.routing.experts if layer.routing else 0):
                if self._expert_program(layer, expert).path not in self._seen and self._rows is not None:
                    self._expert(layer, expert, self._rows)

    def _step(self, tokens: Tensor, positions: Tensor, past: KeyValues) -> None:
        program = self._ends["embedding"]
        x = self._call(program, program.data[0], tokens)[0]
        rows = [self._weights.rows("embedding", token, token + 1) for token in tokens.tolist()]
        self._compare(program, "", x, torch.from_numpy(np.concatenate(rows)), _FLOAT_ERROR)
        for layer in self._walked:
            x = self._layer(layer, x, positions, past)
        program, last = self._ends["head"], x[-1:]
        found = self._call(program, program.data[0], last)[0]
        self._compare(program, "", found, self._logits(last))

    def _logits(self, last: Tensor) -> Tensor:
        """Return the logits of one row, by blocks: a whole head in float32 is large."""
        graph = self._source.graph
        normed = rms_norm(last, last.shape[-1:], self._reference.weight("norm"), graph.norm_epsilon)
        starts = range(0, graph.vocabulary, _HEAD_ROWS)
        blocks = (self._weights.rows("head", start, min(start + _HEAD_ROWS, graph.vocabulary)) for start in starts)
        return torch.cat([linear(normed, torch.from_numpy(block)) for block in blocks], dim=-1)

    def _layer(self, layer: DecoderLayer, x: Tensor, positions: Tensor, past: KeyValues) -> Tensor:
        index, program = layer.index, self._layers["attention", layer.index]
        after, y, *chosen = self._call(program, program.data[0], x, positions)
        self._rows = y
        wanted = self._reference.attention(index, x[None], past)[0]
        self._compare(program, f"layer {index}", after - x, wanted - x)
        self._compare(program, f"layer {index}, norm", y, self._reference.normed(index, after), _FLOAT_ERROR)
        if not chosen:
            return after + self._dense(layer, y)
        weights, experts = chosen
        self._compare_choice(program, layer, y, Routed(experts, weights))
        mixed = torch.zeros_like(y)
        for expert in sorted(set(experts.flatten().tolist())):
            rows, places = (experts == expert).nonzero(as_tuple=True)
            mixed[rows] += weights[rows, places, None] * self._expert(layer, expert, y[rows])
        return after + mixed + (self._dense(layer, y) if layer.shared_dim else 0)

    def _dense(self, layer: DecoderLayer, y: Tensor) -> Tensor:
        program = self._layers["dense", layer.index]
        start = f"layers.{layer.index}."
        wanted = self._reference.swiglu(start + ("mlp" if layer.routing is None else "shared"), y)
        if layer.shared_gate:
            wanted = wanted * torch.sigmoid(linear(y, self._reference.weight(f"{start}shared_gate")))
        found = self._call(program, program.data[0], y)[0]
        self._compare(program, f"layer {layer.index}", found, wanted)
        return found

    def _expert(self, layer: DecoderLayer, expert: int, rows: Tensor) -> Tensor:
        program = self._expert_program(layer, expert)
        file = f"weights/layers.{layer.index}/expert.{expert}.ptd"
        found = self._call(program, file, rows, keep=False)[0]
        wanted = self._reference.swiglu(f"layers.{layer.index}.experts.{expert}", rows)
        self._compare(program, f"layer {layer.index}, expert {expert}", found, wanted)
        return found

    def _expert_program(self, layer: DecoderLayer, expert: int) -> StockProgram:
        stored = self._weights.record(f"layers.{layer.index}.experts.{expert}.down")
        stem = f"programs/expert-{layer.expert_dim}.{stored.precision.value}.pte"
        return next(one for one in self._experts if one.path == stem)

    def _call(self, program: StockProgram, data: str, *inputs: Tensor, keep: bool = True) -> list[Tensor]:
        """Run a program over a data file; kept ones keep their cache."""
        key = (program.path, data)
        self._seen.add(program.path)
        try:
            method = self._methods.get(key)
            if method is None:
                loaded = portable_lib._load_program(  # noqa: SLF001 - the public loader takes no data file by path
                    str(self._folder / program.path), data_path=str(self._folder / data)
                )
                method = loaded.load_method("forward")
            if keep:
                self._methods[key] = method
            return list(method.call([one.contiguous() for one in inputs]))
        except RuntimeError as error:
            raise UnsupportedError(
                f"stock ExecuTorch cannot run {program.path} with {data}: {error}. Export without stock programs."
            ) from error

    def _compare(
        self, program: StockProgram, what: str, found: Tensor, wanted: Tensor, limit: float | None = None
    ) -> None:
        most = limit or _MOST_ERROR[program.precision or Precision.FP32]
        error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-20))
        if not error <= most:  # also when it is no number
            place = f" ({what})" if what else ""
            raise UnsupportedError(
                f"{program.path}{place}: the program differs from the reference by {error:.3g} of its size, "
                f"the limit is {most:.3g}. Export without stock programs, or plan with other precisions."
            )

    def _compare_choice(self, program: StockProgram, layer: DecoderLayer, y: Tensor, chosen: Routed) -> None:
        """Compare the chosen experts by their probabilities: of equals either may be chosen."""
        wanted = self._reference.route(layer.index, y)
        what = f"layer {layer.index}, router"
        self._compare(program, what, chosen.weights, wanted.weights, _FLOAT_ERROR)
        shares = torch.softmax(linear(y, self._reference.weight(f"layers.{layer.index}.router")), dim=-1)
        found, best = (torch.gather(shares, 1, one.experts) for one in (chosen, wanted))
        self._compare(program, what, found, best, _FLOAT_ERROR)

    def _chosen_layers(self) -> Iterator[DecoderLayer]:
        """Yield the layers to walk through: every one, or enough to run every layer's program."""
        layers = self._source.graph.layers
        small = sum(self._weights.expert_bytes(layer.index) for layer in layers) <= _SMALL_BYTES
        known: set[str] = set()
        for layer in layers:
            paths = {one.path for (_, index), one in self._layers.items() if index == layer.index}
            if small or layer.index < _FEW_LAYERS or not paths <= known:
                yield layer
            known |= paths
