"""The sweep says what one pass per variant says, reads every weight once, and holds no more rows than it may."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch

from edgeflex.costs import decoder_sweep
from edgeflex.costs.decoder_calibration import calibrate_decoder
from edgeflex.costs.decoder_files import load, save
from edgeflex.errors import InputError
from edgeflex.models.decoder_reference import Mixing, Reference, divergence
from edgeflex.progress import Silent
from edgeflex.schema import Precision
from edgeflex.transforms.decoder_weights import dequantize, quantize_matrix
from tests.random_decoder import FAMILY_VOCABULARY, RandomSource, family_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from edgeflex.schema_moe import DecoderCalibration, DecoderGraph

INT8, INT4 = Precision.INT8_DYNAMIC, Precision.INT4_GROUP32
PRECISIONS = (INT8, INT4)
LENGTH, TEXTS, KL_TEXTS, LEAST = 14, 5, 2, 6
# Products of few rows round differently with their number; of a KL near 1e-5, made from logits in fp32, that shows.
SAME: dict[str, Any] = {"rel": 1e-6, "abs": 2e-7}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counted(RandomSource):
    """Counts whole tensors that are read."""

    reads: Counter[str]

    def __init__(self, graph: DecoderGraph, folder: Path) -> None:
        super().__init__(graph, folder)
        self.reads = Counter()

    def tensor(self, name: str) -> Any:
        self.reads[name] += 1
        return super().tensor(name)


def deep(family: str, layers: int = 4) -> DecoderGraph:
    """Return a family's small decoder with more layers."""
    graph = family_graph(family)
    last = graph.layers[-1]
    more = [last.model_copy(update={"index": index}) for index in range(len(graph.layers), layers)]
    return graph.model_copy(update={"layers": (*graph.layers, *more)})


def texts() -> list[list[int]]:
    draw = np.random.default_rng(5)
    return [draw.integers(0, FAMILY_VOCABULARY, LENGTH - row % 3).tolist() for row in range(TEXTS)]


def calibrated(source: Any, folder: Path, **more: Any) -> DecoderCalibration:
    kl_tokens = sum(len(one) for one in texts()[:KL_TEXTS])
    options = {"kl_tokens": kl_tokens, "expert_tokens": LEAST, "prompt_tokens": 4, **more}
    return calibrate_decoder(source, texts(), folder=folder, precisions=PRECISIONS, **options)


# --- the same by one pass per variant ------------------------------------------------------------------------


def belongs(start: str, *, inside: bool) -> Callable[[str], bool]:
    """Return what says whether a name begins with ``start``, or does not."""
    return lambda name: name.startswith(start) is inside


class Slow:
    """Every variant by a forward pass of its own, from the embeddings on; weights are read whenever they are used."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.plain = Reference(source)
        self.depth = len(source.graph.layers)
        self.hidden: dict[str, list[Tensor]] = {}  # after the last layer, by unit and sequence

    def changed(self, precision: Precision, applies: Callable[[str], bool]) -> Reference:
        def weight(name: str) -> Any:
            small = len(self.source.shape(name)) != 2 or name.endswith((".router", ".shared_gate"))
            if small or not applies(name):
                return None
            return dequantize(quantize_matrix(self.source.tensor(name), precision))

        return self.plain.replaced(weight)

    def kl(self, unit: str, run: Callable[[Tensor], Tensor], head: Reference) -> float:
        """Return the KL of what ``run`` makes of the tokens, and keep its hidden states under ``unit``."""
        found = []
        self.hidden[unit] = []
        for one in texts()[:KL_TEXTS]:
            tokens = torch.tensor([one])
            true, other = self.plain.forward(tokens).hidden, run(tokens)
            found.append(divergence(self.plain, true, head, other))
            self.hidden[unit].append(other[0])
        return max(0.0, float(torch.cat(found).double().mean()))

    def through(self, hidden: Tensor, first: int, last: int) -> Tensor:
        for index in range(first, last):
            hidden, _ = self.plain.run_layer(index, hidden)
        return hidden

    def groups(self, precision: Precision) -> dict[str, float]:
        """Return KL of every group."""
        everything, plain = self.changed(precision, lambda _: True), self.plain
        head = self.changed(precision, lambda name: name == "head")
        found = {
            "embedding": self.kl(
                "embedding", lambda tokens: self.through(everything.embed(tokens), 0, self.depth), plain
            ),
            "head": self.kl("head", lambda tokens: plain.forward(tokens).hidden, head),
            "uniform": self.kl("uniform", lambda tokens: everything.forward(tokens).hidden, everything),
        }
        for index, layer in enumerate(self.source.graph.layers):
            start = f"layers.{index}.experts."
            dense, experts = (self.changed(precision, belongs(start, inside=inside)) for inside in (False, True))

            def with_dense(tokens: Tensor, index: int = index, dense: Reference = dense) -> Tensor:
                hidden, _ = dense.run_layer(index, self.through(plain.embed(tokens), 0, index))
                return self.through(hidden, index + 1, self.depth)

            def with_experts(tokens: Tensor, index: int = index, experts: Reference = experts) -> Tensor:
                attended = plain.attention(index, self.through(plain.embed(tokens), 0, index))
                normed = plain.normed(index, attended).flatten(0, 1)
                mixed = experts.mixture(index, normed, plain.route(index, normed))
                return self.through(attended + mixed.reshape(attended.shape), index + 1, self.depth)

            found[f"layers.{index}"] = self.kl(f"layers.{index}", with_dense, plain)
            if layer.routing is not None:
                found[f"layers.{index}.experts"] = self.kl(f"layers.{index}.experts", with_experts, plain)
        return found

    def shares(self, index: int, precision: Precision) -> list[float]:
        """Return every expert's share of the layer's error."""
        rows = [self.plain.attention(index, self.through(self.plain.embed(torch.tensor([one])), 0, index))[0]
                for one in texts()]  # fmt: skip
        normed = self.plain.normed(index, torch.cat(rows))
        routed = self.plain.route(index, normed)
        scores = torch.softmax(normed @ self.plain.weight(f"layers.{index}.router").T, dim=-1)
        errors = []
        for expert in range(scores.shape[1]):
            used = (routed.experts == expert).any(dim=1)
            own = [int(row) for row in used.nonzero()[:, 0]]
            others = sorted((float(-scores[row, expert]), row) for row in range(len(normed)) if row not in own)
            judges = own + [row for _, row in others[: max(0, LEAST - len(own))]]
            weights = routed.weights[routed.experts == expert].double()
            likely = 0.5 * float(scores[judges, expert].double().square().mean())
            weight = float(weights.square().sum()) if len(weights) else likely
            prefix = f"layers.{index}.experts.{expert}"
            error = self.changed(precision, lambda _: True).swiglu(prefix, normed[judges])
            error = error - self.plain.swiglu(prefix, normed[judges])
            errors.append(weight * float(error.square().sum(dim=1).double().mean()))
        return [one / sum(errors) for one in errors]


def found_groups(calibration: DecoderCalibration, precision: Precision) -> dict[str, float]:
    """Return the groups' KL of a calibration; experts' parts added up."""
    sums: dict[str, float] = {}
    for one in calibration.losses:
        if one.precision is precision:
            unit = one.unit.rsplit(".", 1)[0] if ".experts." in one.unit else one.unit
            sums[unit] = sums.get(unit, 0.0) + one.kl
    return sums | {"uniform": calibration.uniform_kl[precision]}


def compare(kept: dict[str, Tensor], slow: dict[str, list[Tensor]], precision: Precision) -> None:
    """Hold the sweep's last hidden states against those of passes of their own."""
    assert {name for name in kept if name.endswith(precision.value)} == {
        f"{unit}@{precision.value}" for unit in slow if unit not in {"head", "uniform"}
    } | {f"u:{precision.value}"}
    for unit, rows in slow.items():
        name = (
            f"u:{precision.value}" if unit == "uniform" else "clean" if unit == "head" else f"{unit}@{precision.value}"
        )
        for number, want in enumerate(rows):
            assert (kept[name][number, : len(want)] - want).abs().max() < 3e-6 * want.abs().max(), name


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "mixtral", "deepseek_v2"])
def test_it_finds_what_one_pass_per_variant_finds(tmp_path, family, monkeypatch):
    source = Counted(deep(family), tmp_path / "model")
    kept: dict[str, Tensor] = {}
    monkeypatch.setattr(decoder_sweep.Sweep, "forget", lambda sweep: None)
    calibration, slow = calibrated(source, tmp_path / "out"), Slow(source)
    for path in (tmp_path / "out").glob("state-4*.npz"):
        kept |= {name: torch.from_numpy(value) for name, value in load(path).items()}
    with torch.no_grad():
        for precision in PRECISIONS:
            assert found_groups(calibration, precision) == pytest.approx(slow.groups(precision), **SAME)
            compare(kept, slow.hidden, precision)
        for index in (1, 3):
            kls = [one.kl for one in calibration.losses if one.unit.startswith(f"layers.{index}.experts.")]
            shares = np.array(kls[: len(kls) // 2]) / sum(kls[: len(kls) // 2])
            assert shares == pytest.approx(slow.shares(index, INT8), rel=1e-4)


# --- what it costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v2"])
def test_every_weight_is_read_once(tmp_path, family):
    graph = deep(family, 6)
    source = Counted(graph, tmp_path / "model")
    calibrated(source, tmp_path / "out")
    # a tied head is the embedding, wanted at the start and at the end
    twice = {"embedding"} if graph.tied_embedding else set()
    wanted = set(source.names) - ({"head"} if graph.tied_embedding else set())
    assert source.reads == {name: 2 if name in twice else 1 for name in wanted}


class Rows(Mixing):
    """Notes how many rows go through experts together."""

    seen: ClassVar[list[int]] = []

    def __init__(self, normed: Tensor, routed: Any) -> None:
        self.seen.append(len(normed))
        super().__init__(normed, routed)


@pytest.mark.parametrize("variants", [1, 5, 8, 12])
def test_rows_beyond_the_limit_go_in_further_visits_and_change_nothing(tmp_path, monkeypatch, variants):
    graph = deep("qwen2_moe", 5)
    source = Counted(graph, tmp_path / "model")
    whole = calibrated(source, tmp_path / "whole")
    row_bytes = 4 * graph.hidden_dim * (3 + 6)
    limit = variants * KL_TEXTS * LENGTH
    monkeypatch.setattr(decoder_sweep, "VISIT_BYTES", limit * row_bytes)
    monkeypatch.setattr(decoder_sweep, "Mixing", Rows)
    monkeypatch.setattr(Rows, "seen", [])
    source.reads.clear()
    cut = calibrated(source, tmp_path / "cut")
    for precision in PRECISIONS:
        assert found_groups(cut, precision) == pytest.approx(found_groups(whole, precision), **SAME)
    assert cut.router_agreement == whole.router_agreement
    dense = [count for name, count in source.reads.items() if ".experts." not in name]
    assert set(dense) == {1}
    # the first visit of a layer holds all that is changed there; the others what fits, at least one variant
    firsts = 6 * KL_TEXTS * LENGTH
    assert max(Rows.seen) <= max(limit, firsts)
    experts = [source.reads[f"layers.{index}.experts.0.down"] for index in range(5)]
    visits = [1 + -(-(TEXTS * LENGTH + (2 + 4 * index) * KL_TEXTS * LENGTH) // limit) for index in range(5)]
    assert all(1 <= read <= most + 2 for read, most in zip(experts, visits, strict=True))
    assert experts == sorted(experts)
    if variants == 1:
        assert experts[-1] > experts[0] + 10, "one visit for each of 4 x 4 variants more"


# --- going on ------------------------------------------------------------------------------------------------


class _Killed(Silent):
    def __init__(self, layers: int) -> None:
        self._left = layers

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Any]:
        yield self._advance

    def _advance(self, count: int) -> None:
        self._left -= count
        if self._left <= 0 and count:
            raise KeyboardInterrupt


@pytest.fixture
def half(tmp_path, monkeypatch) -> tuple[Counted, Path]:
    """Return a decoder and its calibration, killed after two of four layers, with its variants in several files."""
    monkeypatch.setattr(decoder_sweep, "VISIT_BYTES", 3 * KL_TEXTS * LENGTH * 4 * 64 * (3 + 6))
    source = Counted(deep("olmoe"), tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        calibrated(source, tmp_path / "half", progress=_Killed(2))
    assert len(list((tmp_path / "half").glob("state-2-*.npz"))) == 4
    return source, tmp_path / "half"


def test_a_killed_sweep_goes_on_to_the_same_result_which_is_then_only_read(half, tmp_path):
    source, folder = half
    found = calibrated(source, folder)
    assert found == calibrated(source, tmp_path / "whole")
    assert not list(folder.glob("state*"))
    again = Counted(source.graph, tmp_path / "model")
    assert calibrated(again, folder) == found
    assert not again.reads


def test_layers_that_were_passed_are_not_read_again(half):
    source, folder = half
    source.reads.clear()
    calibrated(source, folder)
    assert not [name for name in source.reads if name.startswith(("layers.0.", "layers.1.", "embedding"))]


def test_a_state_in_one_file_as_written_before_goes_on(half, tmp_path):
    source, folder = half
    pointer = json.loads((folder / "state.json").read_text())
    arrays = {name.replace("u:", "v:uniform@"): one for name, one in load(folder / "state-2.npz").items()}
    for path in sorted(folder.glob("state-2-*.npz")):
        arrays |= {f"v:{name}": one for name, one in load(path).items()}
        path.unlink()
    del pointer["files"]
    pointer["digest"] = save(folder / "state-2.npz", arrays)
    (folder / "state.json").write_text(json.dumps(pointer))
    assert calibrated(source, folder) == calibrated(source, tmp_path / "whole")


@pytest.mark.parametrize("file", ["state-2.npz", "state-2-0.npz", "state-2-3.npz"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_or_missing_file_of_the_state_is_told(half, file, damage):
    source, folder = half
    raw = bytearray((folder / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / file).unlink()
    if damage == "flipped":
        (folder / file).write_bytes(bytes(raw))
    with pytest.raises(InputError, match="damaged" if damage == "flipped" else "does not exist"):
        calibrated(source, folder)
