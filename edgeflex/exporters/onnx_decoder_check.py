"""The written stages, run by ONNX Runtime without its rewriting, against the fp32 reference with the bundle's numbers.

A few tokens walk through the layers in two calls, the second over a cache with rubbish behind its rows. Each stage
is compared with the reference's answer to the very same input, so that an error cannot hide behind an earlier one,
and every stage is run: each has numbers of its own. Of experts one of each precision a layer is. Graphs that take
their numbers as inputs are given them for each layer, and opened once.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import linear, rms_norm

from edgeflex.errors import MissingDependencyError, UnsupportedError
from edgeflex.exporters.decoder_raw import template_path
from edgeflex.models.decoder_reference import KeyValues, Reference, Routed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from edgeflex.exporters.decoder_files import BundleWeights
    from edgeflex.models.decoders import DecoderSource
    from edgeflex.progress import Progress
    from edgeflex.schema_moe import DecoderLayer, StockProgram

# Largest difference over the largest number of the answer. Products in float32 differ by their order of summation
# alone; a softmax multiplies that by its largest score.
_MOST_ERROR = 1e-5
_SOFTMAX_ERROR = 1e-4
_ROUNDING = 2.0**-22  # of the residual that an answer was added to
_CALLS = (3, 1)
_RUBBISH = 7.0
_CACHED_ROWS = 8
_HEAD_ROWS = 8192
_BFLOAT16 = 16  # in ONNX's TensorProto


def plain_session(path: Path, content: bytes | None = None) -> Any:
    """Return an ONNX Runtime session that runs the graph as it is written, in one thread.

    Args:
        path: The graph.
        content: What to run in its place.

    Raises:
        MissingDependencyError: ONNX Runtime is absent.
        UnsupportedError: It cannot load the graph.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError("checking ONNX stages needs onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no other base
        raise UnsupportedError(f"ONNX Runtime cannot load {path.name}: {error}. Export for executorch.") from error


def check_stages(
    source: DecoderSource,
    weights: BundleWeights,
    programs: Sequence[StockProgram],
    told: Progress,
    *,
    given: Callable[[StockProgram], Mapping[str, NDArray[Any]]] | None = None,
    opened: Callable[[Path], Any] = plain_session,
) -> None:
    """Run every stage and one expert of each kind a layer, and compare each with the reference.

    Args:
        source: The decoder.
        weights: The numbers of the written bundle.
        programs: Its stages.
        told: Told about layers.
        given: Returns the numbers that a stage takes as inputs; None where stages hold their own.
        opened: Returns the session of a graph.

    Raises:
        MissingDependencyError: ONNX Runtime is absent.
        UnsupportedError: A stage cannot be loaded or run, or answers otherwise than the reference.
    """
    with torch.no_grad():
        walk = _Walk(source, weights, programs, given, opened)
        with told.task("stages against the reference", len(source.graph.layers)) as advance:
            for layer in source.graph.layers:
                walk.layer(layer)
                advance(1)
        walk.head()


class _Walk:
    """The stages in their order, each checked; ``x`` holds the rows of all calls between layers."""

    def __init__(
        self,
        source: DecoderSource,
        weights: BundleWeights,
        programs: Sequence[StockProgram],
        given: Callable[[StockProgram], Mapping[str, NDArray[Any]]] | None,
        opened: Callable[[Path], Any],
    ) -> None:
        self._graph = source.graph
        self._weights = weights
        self._given = given
        self._session = opened
        self._kept: dict[str, Any] = {}
        self._reference = Reference(source, weights)
        self._programs = {(one.role, one.layer): one for one in programs}
        draw = np.random.default_rng(len(programs))
        tokens = draw.integers(0, source.graph.vocabulary, size=sum(_CALLS)).tolist()
        rows = [weights.rows("embedding", token, token + 1) for token in tokens]
        self._x = torch.from_numpy(np.concatenate(rows))

    def layer(self, layer: DecoderLayer) -> None:
        """Run a layer's stages on the rows."""
        self._x = torch.cat(list(self._attended(layer)))
        y = self._reference.normed(layer.index, self._x)
        if ("dense", layer.index) in self._programs:
            self._x = self._x + self._dense(layer, y)
        precisions = {
            self._weights.record(f"layers.{layer.index}.experts.{expert}.down").precision: expert
            for expert in range(layer.routing.experts if layer.routing else 0)
        }
        for precision, expert in precisions.items():
            self._expert(layer, expert, template_path(layer.expert_dim, precision), y)

    def head(self) -> None:
        """Run the head on the last row; the reference's logits are made by blocks, as a float32 head is large."""
        program, last = self._programs["head", None], self._x[-1:]
        found = self._logits(program, last)
        normed = rms_norm(last, last.shape[-1:], self._reference.weight("norm"), self._graph.norm_epsilon)
        starts = range(0, self._graph.vocabulary, _HEAD_ROWS)
        blocks = (self._weights.rows("head", one, min(one + _HEAD_ROWS, self._graph.vocabulary)) for one in starts)
        wanted = torch.cat([linear(normed, torch.from_numpy(block)) for block in blocks], dim=-1)
        _compare(program.path, found, wanted)

    def _logits(self, program: StockProgram, row: Tensor) -> Tensor:
        """Return the head's answer; one that is given its numbers takes them by blocks too, and unpacks no more."""
        feeds = {"x": row.numpy()}
        if self._given is None:
            return self._opened(program)(feeds)["logits"]
        session, numbers = self._shared(program.path), self._given(program)
        cut = {name: values for name, values in numbers.items() if len(values) == self._graph.vocabulary}
        starts = range(0, self._graph.vocabulary, _HEAD_ROWS)
        parts = ({name: values[one : one + _HEAD_ROWS] for name, values in cut.items()} for one in starts)
        return torch.cat([_run(session, {**numbers, **feeds, **part})["logits"] for part in parts], dim=-1)

    def _opened(self, program: StockProgram) -> Callable[[Mapping[str, NDArray[Any]]], dict[str, Tensor]]:
        """Return what runs a stage of a layer, with the layer's numbers where it takes them."""
        if self._given is None:
            return partial(_run, self._session(self._weights.folder / program.path))
        session, numbers = self._shared(program.path), self._given(program)
        return lambda feeds: _run(session, {**numbers, **feeds})

    def _shared(self, path: str) -> Any:
        """Return the session of a graph without numbers of its own, opened once."""
        if path not in self._kept:
            self._kept[path] = self._session(self._weights.folder / path)
        return self._kept[path]

    def _attended(self, layer: DecoderLayer) -> Iterator[Tensor]:
        """Yield the residual of each call."""
        program, index = self._programs["attention", layer.index], layer.index
        run, past, start = self._opened(program), KeyValues(), 0
        for count in _CALLS:
            x = self._x[start : start + count]
            cache = self._cache(past.layers.get(index), start)
            feeds = {"x": x.numpy(), "positions": np.arange(start, start + count), **cache}
            found = run(feeds)
            wanted = self._reference.attention(index, x[None], past)[0]
            residual = found["residual"]
            floor = _ROUNDING * float(wanted.abs().max())
            _compare(program.path, residual - x, wanted - x, _SOFTMAX_ERROR, floor)
            _compare(f"{program.path}: norm", found["normed"], self._reference.normed(index, residual))
            for name, both in zip(("keys", "values"), past.layers[index], strict=True):
                _compare(f"{program.path}: {name}", found[name], both[0, :, start:])
            if layer.routing is not None:
                self._compare_choice(program, index, found["normed"], Routed(found["experts"].long(), found["weights"]))
            yield wanted
            start += count

    def _cache(self, known: tuple[Tensor, Tensor] | None, start: int) -> dict[str, NDArray[np.float32]]:
        """Return both caches, rubbish where nothing was written; one row, the least there can be, at the start."""
        a, caches = self._graph.attention, {}
        for place, (name, dim) in enumerate((("key_cache", a.head_dim), ("value_cache", a.value_dim))):
            rows = np.full((a.kv_heads, _CACHED_ROWS if start else 1, dim), _RUBBISH, np.float32)
            if known is not None:
                rows[:, :start] = known[place][0].numpy()
            caches[name] = rows
        return caches

    def _dense(self, layer: DecoderLayer, y: Tensor) -> Tensor:
        program, start = self._programs["dense", layer.index], f"layers.{layer.index}."
        wanted = self._reference.swiglu(start + ("mlp" if layer.routing is None else "shared"), y)
        if layer.shared_gate:
            wanted = wanted * torch.sigmoid(linear(y, self._reference.weight(f"{start}shared_gate")))
        found = self._opened(program)({"y": y.numpy()})
        _compare(program.path, found["out"], wanted)
        return wanted

    def _expert(self, layer: DecoderLayer, expert: int, path: str, y: Tensor) -> None:
        name = f"layers.{layer.index}.experts.{expert}"
        feeds: dict[str, NDArray[Any]] = {"y": y.numpy()}
        for matrix in ("gate_up", "down"):
            stored = self._weights.stored(f"{name}.{matrix}")
            feeds[matrix] = stored.codes
            if stored.scales is not None:
                feeds[f"{matrix}_scales"] = stored.scales
        found = _run(self._shared(path), feeds)
        _compare(f"{path} with {name}", found["out"], self._reference.swiglu(name, y))

    def _compare_choice(self, program: StockProgram, index: int, y: Tensor, chosen: Routed) -> None:
        """Compare the chosen experts by their probabilities: of nearly equal ones rounding may choose either."""
        wanted = self._reference.route(index, y)
        _compare(f"{program.path}: weights", chosen.weights, wanted.weights, _SOFTMAX_ERROR)
        shares = torch.softmax(linear(y, self._reference.weight(f"layers.{index}.router")), dim=-1)
        found, best = (torch.gather(shares, 1, one.experts) for one in (chosen, wanted))
        _compare(f"{program.path}: experts", found, best, _SOFTMAX_ERROR)


def _run(session: Any, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Run a session on arrays, viewed as the shape and element type that each input has."""
    from onnxruntime import OrtValue

    given = {}
    for one in session.get_inputs():
        values = feeds[one.name]
        if len(one.shape) == 1 or all(isinstance(size, int) for size in one.shape):
            values = values.reshape([size if isinstance(size, int) else -1 for size in one.shape])
        if one.type == "tensor(bfloat16)":
            given[one.name] = OrtValue.ortvalue_from_numpy_with_onnx_type(values, _BFLOAT16)
        elif one.type == "tensor(uint8)":
            given[one.name] = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values).view(np.uint8))
        else:
            narrow = values.astype(np.int32) if one.type == "tensor(int32)" else values
            given[one.name] = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(narrow))
    names = [one.name for one in session.get_outputs()]
    answers = session.run_with_ort_values(names, given)
    return {name: torch.from_numpy(one.numpy()) for name, one in zip(names, answers, strict=True)}


def _compare(what: str, found: Tensor, wanted: Tensor, limit: float = _MOST_ERROR, floor: float = 0.0) -> None:
    error = (float((found - wanted).abs().max()) - floor) / max(float(wanted.abs().max()), 1e-20)
    if not error <= limit:  # also when it is no number
        raise UnsupportedError(
            f"{what}: the stage differs from the reference by {error:.3g} of its largest number, the limit is "
            f"{limit:.3g}. Export for executorch instead, or plan with other precisions."
        )
