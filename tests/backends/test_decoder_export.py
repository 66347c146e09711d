"""A planned decoder becomes a bundle that holds exactly the plan and that stock ExecuTorch runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir._serialize._cord import Cord
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from executorch.extension.pybindings import portable_lib
from numpy.typing import NDArray

from edgeflex.bundle_moe import TOKENIZER, open_decoder_bundle
from edgeflex.errors import DeviceError, InputError, UnsupportedError
from edgeflex.exporters import decoder_files
from edgeflex.exporters.decoder import export_decoder
from edgeflex.exporters.decoder_check import check_programs
from edgeflex.exporters.decoder_files import BundleWeights, unit_of
from edgeflex.models.decoder_reference import Reference
from edgeflex.schema import Choice, Interval, Precision
from edgeflex.schema_moe import (
    Attention,
    DecoderBudget,
    DecoderGraph,
    DecoderLayer,
    DecoderMemory,
    DecoderPlan,
    DecoderPrediction,
    Expected,
    Routing,
)
from edgeflex.transforms.decoder_weights import dequantize, quantize_matrix

Float32 = NDArray[np.float32]
FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32
HIDDEN, VOCABULARY, CONTEXT, CHUNK = 64, 96, 24, 8


class MemorySource:
    """A decoder whose numbers are made up when asked for."""

    def __init__(self, graph: DecoderGraph, folder: Path) -> None:
        self.graph = graph
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = dict(_shapes(graph))
        self.names = tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def tensor(self, name: str) -> Float32:
        name = "embedding" if name == "head" and self.graph.tied_embedding else name
        draw = np.random.default_rng(list(name.encode()))
        shape = self.shapes[name]
        values = draw.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm"):
            return np.float32(1) + np.float32(0.1) * values
        return values * np.float32(1.5 / np.sqrt(shape[-1]))

    def gather(self, name: str, wanted: Any) -> Float32:
        found: Float32 = self.tensor(name)[np.asarray(wanted)]
        return found

    def layer_tensors(self, index: int) -> tuple[str, ...]:
        start = f"layers.{index}."
        return tuple(name for name in self.names if name.startswith(start) and ".experts." not in name)

    def expert_tensors(self, index: int, expert: int) -> tuple[str, str]:
        start = f"layers.{index}.experts.{expert}."
        return f"{start}gate_up", f"{start}down"

    @property
    def tokenizer_file(self) -> Path:
        if not (self.folder / "tokenizer.json").is_file():
            raise InputError("no tokenizer.")
        return self.folder / "tokenizer.json"


def _shapes(graph: DecoderGraph):
    hidden, a = graph.hidden_dim, graph.attention
    yield "embedding", (graph.vocabulary, hidden)
    for layer in graph.layers:
        start = f"layers.{layer.index}."
        yield from ((start + name, (hidden,)) for name in ("input_norm", "post_norm"))
        if a.kind == "latent":
            plain = a.head_dim - a.rotary_dim
            yield start + "q", (a.heads * a.head_dim, hidden)
            yield start + "kv_a", (a.latent_dim + a.rotary_dim, hidden)
            yield start + "kv_norm", (a.latent_dim,)
            yield start + "kv_b", (a.heads * (plain + a.value_dim), a.latent_dim)
        else:
            yield start + "qkv", ((a.heads + 2 * a.kv_heads) * a.head_dim, hidden)
        if a.bias:
            yield start + "qkv_bias", ((a.heads + 2 * a.kv_heads) * a.head_dim,)
        if a.query_key_norm != "none":
            whole = a.query_key_norm == "projection"
            yield start + "q_norm", (a.head_dim * (a.heads if whole else 1),)
            yield start + "k_norm", (a.head_dim * (a.kv_heads if whole else 1),)
        yield start + "o", (hidden, a.heads * a.value_dim)
        feeds = [("mlp.", layer.dense_dim)] if layer.routing is None else []
        feeds += [("shared.", layer.shared_dim)] if layer.shared_dim else []
        if layer.routing:
            yield start + "router", (layer.routing.experts, hidden)
            feeds += [(f"experts.{expert}.", layer.expert_dim) for expert in range(layer.routing.experts)]
        if layer.shared_gate:
            yield start + "shared_gate", (1, hidden)
        for name, width in feeds:
            yield f"{start}{name}gate_up", (2 * width, hidden)
            yield f"{start}{name}down", (hidden, width)
    yield "norm", (hidden,)
    yield "head", (graph.vocabulary, hidden)


def graph_of(attention: Attention, *layers: DecoderLayer, tied: bool = False) -> DecoderGraph:
    return DecoderGraph(
        name="tiny",
        family="qwen2_moe",
        weights_digest="0" * 64,
        hidden_dim=HIDDEN,
        vocabulary=VOCABULARY,
        layers=layers,
        attention=attention,
        norm_epsilon=1e-6,
        tied_embedding=tied,
        context_tokens=64,
    )


def frequencies(dim: int) -> tuple[float, ...]:
    return tuple(10000.0 ** (-2 * i / dim) for i in range(dim // 2))


def grouped_graph(**attention: Any) -> DecoderGraph:
    """A dense layer, two with experts, shared experts and their gate; grouped queries."""
    routing = Routing(experts=4, top_k=2, normalised=True)
    known: dict[str, Any] = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "value_dim": 16,
        "rotary_dim": 16,
        "softmax_scale": 0.25,
    }
    routed: dict[str, Any] = {"routing": routing, "expert_dim": 32, "shared_dim": 64, "shared_gate": True}
    return graph_of(
        Attention(**{**known, "inverse_frequencies": frequencies(16), **attention}),
        DecoderLayer(index=0, routing=None, dense_dim=96),
        *(DecoderLayer(index=index, **routed) for index in (1, 2)),
    )


def latent_graph() -> DecoderGraph:
    """DeepSeek-V2's attention, ungated shared experts, scaled routing, a tied head."""
    routing = Routing(experts=4, top_k=3, normalised=False, scale=1.5)
    return graph_of(
        Attention(
            kind="latent",
            heads=4,
            kv_heads=4,
            head_dim=24,
            value_dim=16,
            rotary_dim=8,
            latent_dim=32,
            inverse_frequencies=frequencies(8),
            rotary_scale=1.1,
            softmax_scale=0.2,
        ),
        DecoderLayer(index=0, routing=routing, expert_dim=64, shared_dim=32),
        tied=True,
    )


def plan_of(graph: DecoderGraph, precisions: dict[str, Precision], **changes: Any) -> DecoderPlan:
    zero = Interval(value=0.5, low=0.0, high=1.0)
    memory = DecoderMemory(dense_bytes=1, cache_bytes=1, kv_bytes=1, activations_bytes=1, runtime_bytes=1)
    known: dict[str, Any] = {
        "graph_digest": graph.digest(),
        "budget": DecoderBudget(),
        "verdict": "offload",
        "reasons": ("a test",),
        "choices": tuple(Choice(subject=unit, option=one.value) for unit, one in precisions.items()),
        "cache_bytes": 1 << 16,
        "cycle_bytes": 1 << 14,
        "context_tokens": CONTEXT,
        "prefill_chunk_tokens": CHUNK,
        "predicted": DecoderPrediction(
            token_s=zero,
            first_token_s=zero,
            memory=memory,
            disk_bytes=0,
            kl=0.0,
            hit_rate=0.0,
            bytes_per_token=0.0,
            bound_token_s=0.0,
        ),
    }
    return DecoderPlan(**{**known, **changes})


def source_of(graph: DecoderGraph, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    return MemorySource(graph, folder)


def units(graph: DecoderGraph) -> list[str]:
    return sorted({unit for name, _ in _shapes(graph) if (unit := unit_of(name))})


def mixed(graph: DecoderGraph) -> dict[str, Precision]:
    """Every precision somewhere: by turns over experts, 8 bits for the dense part."""
    chosen = dict.fromkeys(units(graph), INT8)
    experts = [unit for unit in chosen if ".experts." in unit]
    chosen.update({unit: (INT4, INT8, FP32)[place % 3] for place, unit in enumerate(experts)})
    return chosen | {"embedding": INT4, "head": INT4, "layers.0": INT4}


def exact(graph: DecoderGraph) -> dict[str, Precision]:
    return dict.fromkeys(units(graph), FP32)


pytestmark = pytest.mark.usefixtures("one_thread")  # of tests/conftest.py


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The mixed bundle with its programs: source, plan, folder, manifest."""
    folder = tmp_path_factory.mktemp("mixed")
    graph = grouped_graph(bias=True, query_key_norm="head")
    source = source_of(graph, folder / "model")
    plan = plan_of(graph, mixed(graph))
    return source, plan, folder / "bundle", export_decoder(source, plan, folder / "bundle")


def hidden_leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def stock_logits(folder: Path, manifest, graph: DecoderGraph, tokens: torch.Tensor, calls) -> torch.Tensor:
    """Run the bundle as a plain ExecuTorch host would: its own routing, its own errors carried on."""
    ends = {one.role: one for one in manifest.programs if one.role in {"embedding", "head"}}
    layers = {(one.role, one.layer): one for one in manifest.programs}
    experts = {one.precision: one for one in manifest.programs if one.role == "expert"}
    held = {record.name: record.precision for record in manifest.matrices}

    def method(program, data):
        loaded = portable_lib._load_program(str(folder / program.path), data_path=str(folder / data))
        return loaded.load_method("forward")

    methods = {key: method(one, one.data[0]) for key, one in layers.items() if one.layer is not None}
    embed, head = (method(ends[role], ends[role].data[0]) for role in ("embedding", "head"))
    logits, start = [], 0
    for count in calls:
        positions = torch.arange(start, start + count)
        (x,) = embed.call([tokens[start : start + count]])
        for layer in graph.layers:
            x, y, *chosen = methods["attention", layer.index].call([x, positions])
            out = torch.zeros_like(x)
            if chosen:
                weights, indices = chosen
                for row in range(count):
                    for weight, expert in zip(weights[row], indices[row].tolist(), strict=True):
                        unit = f"layers.{layer.index}.experts.{expert}"
                        file = f"weights/layers.{layer.index}/expert.{expert}.ptd"
                        one = method(experts[held[f"{unit}.down"]], file)
                        out[row] += weight * one.call([y[row : row + 1]])[0][0]
            if ("dense", layer.index) in methods:
                out = out + methods["dense", layer.index].call([y])[0]
            x = x + out
        logits += [head.call([row[None]])[0] for row in x]
        start += count
    return torch.cat(logits)


def test_every_matrix_lies_at_its_offset_in_the_precision_of_the_plan(made):
    source, plan, folder, manifest = made
    precisions = {choice.subject: Precision(choice.option) for choice in plan.choices}
    weights = BundleWeights(folder, manifest.matrices, source)
    assert {record.name for record in manifest.matrices} == set(source.names)
    for record in manifest.matrices:
        unit = unit_of(record.name)
        precision = precisions[unit] if unit else FP32
        assert record.precision is precision
        assert record.offset % 64 == 0
        tensor = source.tensor(record.name)
        wanted = quantize_matrix(tensor.reshape(-1, tensor.shape[-1]), precision)
        stored = weights.stored(record.name)
        np.testing.assert_array_equal(stored.codes, wanted.codes)
        np.testing.assert_array_equal(weights(record.name), dequantize(wanted).reshape(tensor.shape))
        np.testing.assert_array_equal(weights.rows(record.name, 0, 1), dequantize(wanted)[:1])
        if wanted.rows > 5:
            np.testing.assert_array_equal(weights.rows(record.name, 3, 5), dequantize(wanted)[3:5])


def test_the_bundle_opens_with_every_hash_right_and_nothing_left_beside_it(made):
    _, _, folder, manifest = made
    bundle = open_decoder_bundle(folder)
    assert bundle.manifest == manifest
    bundle.check_all()
    assert bundle.role(TOKENIZER).read_text() == "{}"
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert on_disk == {entry.path for entry in manifest.files} | {"manifest.json"}
    assert hidden_leftovers(folder.parent) == []


def test_executorchs_own_reader_reads_the_files(made):
    _, _, folder, manifest = made
    record = next(one for one in manifest.matrices if one.name == "layers.1.experts.0.gate_up")
    raw = (folder / record.file).read_bytes()
    payload = FlatTensorSerializer().deserialize(Cord(raw))
    found = payload.buffers[payload.named_data["gate_up"].buffer_index]
    assert found == raw[record.offset : record.offset + record.weights_bytes]


def test_weights_are_on_disk_once(made):
    _, _, folder, manifest = made
    needed = sum(one.weights_bytes + one.scales_bytes for one in manifest.matrices)
    held = sum(entry.size_bytes for entry in manifest.files if entry.path.endswith((".ptd", ".pte")))
    # what is beside: fronts and paddings of files, and programs, whose sizes do not grow with the weights
    assert held < needed + 4096 * sum(entry.path.endswith(".ptd") for entry in manifest.files) + 200_000
    assert all((folder / one.path).stat().st_size < 64_000 for one in manifest.programs)


def test_one_program_serves_all_experts_and_layers_of_a_kind(made):
    _, _, _, manifest = made
    experts = [one for one in manifest.programs if one.role == "expert"]
    assert sorted(one.precision.value for one in experts if one.precision) == sorted(
        p.value for p in (FP32, INT8, INT4)
    )
    attention = [one for one in manifest.programs if one.role == "attention"]
    assert [one.layer for one in attention] == [0, 1, 2]
    assert [one.path == attention[1].path for one in attention] == [False, True, True]


def test_quantised_programs_chained_by_stock_executorch_stay_near_the_reference(made):
    source, _, folder, manifest = made
    tokens = torch.from_numpy(np.random.default_rng(5).integers(0, VOCABULARY, size=9))
    found = stock_logits(folder, manifest, source.graph, tokens, (6, 1, 1, 1))
    wanted = Reference(source, BundleWeights(folder, manifest.matrices, source)).logits(tokens[None])[0]
    # activations in 8 bits through three layers, with routing free to turn over
    assert float((found - wanted).norm() / wanted.norm()) < 0.15


@pytest.mark.parametrize("graph", [grouped_graph(query_key_norm="projection", kv_heads=4), latent_graph()])
def test_fp32_programs_chained_by_stock_executorch_give_the_reference_logits(graph, tmp_path):
    source = source_of(graph, tmp_path / "model")
    manifest = export_decoder(source, plan_of(graph, exact(graph)), tmp_path / "bundle")
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, VOCABULARY, size=10))
    found = stock_logits(tmp_path / "bundle", manifest, graph, tokens, (7, 1, 2))
    wanted = Reference(source).logits(tokens[None])[0]
    assert float((found - wanted).abs().max()) < 1e-4
    if graph.tied_embedding:
        records = {one.name: one for one in manifest.matrices}
        assert records["head"].model_copy(update={"name": "embedding"}) == records["embedding"]
        assert not (tmp_path / "bundle" / "weights" / "head.ptd").exists()


def test_a_program_over_another_experts_numbers_is_noticed(made, tmp_path):
    source, _, folder, manifest = made
    swapped = tmp_path / "swapped"
    subprocess.run(["cp", "-r", str(folder), str(swapped)], check=True)
    experts = sorted(swapped.glob("weights/layers.1/expert.*.ptd"), key=lambda path: path.stat().st_size)
    alike = {path.stat().st_size: path for path in experts}
    first = next(path for path in experts if alike[path.stat().st_size] != path)
    second = alike[first.stat().st_size]
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    weights = BundleWeights(folder, manifest.matrices, source)
    weights_swapped = BundleWeights(swapped, manifest.matrices, source)
    weights_swapped.__class__ = type("Right", (BundleWeights,), {"__call__": lambda _self, name: weights(name)})
    with pytest.raises(UnsupportedError, match="differs from the reference"):
        check_programs(source, weights_swapped, manifest.programs, (CONTEXT, CHUNK))
    first.write_bytes(raw)
    check_programs(source, weights_swapped, manifest.programs, (CONTEXT, CHUNK))


def test_without_programs_only_weights_are_written(tmp_path):
    graph = grouped_graph()
    source = source_of(graph, tmp_path / "model")
    manifest = export_decoder(source, plan_of(graph, mixed(graph)), tmp_path / "bundle", stock=False)
    assert manifest.programs == ()
    assert not (tmp_path / "bundle" / "programs").exists()
    open_decoder_bundle(tmp_path / "bundle").check_all()


def test_the_callers_answers_of_the_written_numbers_go_into_the_manifest(tmp_path):
    graph = latent_graph()
    source = source_of(graph, tmp_path / "model")

    def answers(weights):
        reference = Reference(source, weights)
        return tuple(Expected(prompt=prompt, tokens=reference.generate(prompt, 4)) for prompt in ((1, 2, 3), (7,)))

    plan = plan_of(graph, mixed(graph) | {"layers.0": INT8})
    manifest = export_decoder(source, plan, tmp_path / "bundle", stock=False, expected=answers)
    assert [one.prompt for one in manifest.expected] == [(1, 2, 3), (7,)]
    assert manifest.expected == answers(BundleWeights(tmp_path / "bundle", manifest.matrices, source))


def test_a_decoder_without_a_tokenizer_is_exported_for_token_numbers(tmp_path):
    graph = latent_graph()
    source = source_of(graph, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    manifest = export_decoder(source, plan_of(graph, exact(graph)), tmp_path / "bundle", stock=False)
    assert TOKENIZER not in {entry.role for entry in manifest.files}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"graph_digest": "1" * 64}, "another decoder"),
        ({"verdict": "decline", "reasons": ("too slow",)}, "too slow"),
        ({"choices": (Choice(subject="layers.9", option="fp32"),)}, "layers.9 is no unit"),
        ({"choices": (Choice(subject="layers.0", option="int3"),)}, "unknown precision 'int3'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, change, said):
    graph = latent_graph()
    source = source_of(graph, tmp_path / "model")
    with pytest.raises(InputError, match=said):
        export_decoder(source, plan_of(graph, exact(graph), **change), tmp_path / "bundle", stock=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_tied_head_may_not_have_a_precision_of_its_own(tmp_path):
    graph = latent_graph()
    source = source_of(graph, tmp_path / "model")
    with pytest.raises(InputError, match="tied"):
        export_decoder(source, plan_of(graph, exact(graph) | {"head": INT8}), tmp_path / "bundle", stock=False)


def test_four_bits_over_columns_that_do_not_divide_are_refused(tmp_path):
    graph = grouped_graph(heads=3, kv_heads=3)
    source = source_of(graph, tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"layers\.0\.o: int4-group32 needs columns in multiples of 32"):
        export_decoder(source, plan_of(graph, dict.fromkeys(units(graph), INT4)), tmp_path / "bundle", stock=False)


@pytest.mark.parametrize("failing", [0, 3, 9])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, failing):
    graph = grouped_graph()
    source = source_of(graph, tmp_path / "model")
    write, count = decoder_files._write_pieces, iter(range(10_000))

    def full(path, front, pieces):
        if next(count) == failing:
            raise OSError(28, "No space left on device", str(path))
        write(path, front, pieces)

    monkeypatch.setattr(decoder_files, "_write_pieces", full)
    with pytest.raises(DeviceError, match="disk is full"):
        export_decoder(source, plan_of(graph, mixed(graph)), tmp_path / "bundle", stock=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, monkeypatch):
    graph = latent_graph()
    source = source_of(graph, tmp_path / "model")
    write = decoder_files._write_pieces

    def flipped(path, front, pieces):
        write(path, front, pieces)
        if path.name == "expert.2.ptd":
            with path.open("r+b") as file:
                file.seek(front.offsets[-1])
                byte = file.read(1)
                file.seek(front.offsets[-1])
                file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(decoder_files, "_write_pieces", flipped)
    with pytest.raises(DeviceError, match="other bytes than were written"):
        export_decoder(source, plan_of(graph, exact(graph)), tmp_path / "bundle", stock=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("written", [1, 8])
def test_a_killed_export_leaves_no_bundle(tmp_path, written):
    script = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from edgeflex.exporters import decoder_files
        from edgeflex.exporters.decoder import export_decoder
        from tests.backends.test_decoder_export import grouped_graph, mixed, plan_of, source_of
        write, count = decoder_files._write_pieces, iter(range(10000))
        def killed(path, front, pieces):
            write(path, front, pieces)
            if next(count) == {written}:
                os.kill(os.getpid(), signal.SIGKILL)
        decoder_files._write_pieces = killed
        folder = Path({str(tmp_path)!r})
        graph = grouped_graph()
        export_decoder(source_of(graph, folder / "model"), plan_of(graph, mixed(graph)), folder / "bundle", stock=False)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()
    graph = grouped_graph()
    source = source_of(graph, tmp_path / "model")
    export_decoder(source, plan_of(graph, mixed(graph)), tmp_path / "bundle", stock=False)
    open_decoder_bundle(tmp_path / "bundle").check_all()
