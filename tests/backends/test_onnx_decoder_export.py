"""A planned decoder becomes ONNX stages and raw experts: exactly the plan, and what the reference computes."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from edgeflex.bundle_moe import TOKENIZER, open_decoder_bundle
from edgeflex.errors import InputError, UnsupportedError
from edgeflex.exporters import onnx_decoder_graphs, onnx_decoder_stages
from edgeflex.exporters.decoder_files import BundleWeights, unit_of
from edgeflex.exporters.onnx_decoder import compare_stages, export_onnx_decoder
from edgeflex.exporters.onnx_decoder_check import check_stages
from edgeflex.exporters.onnx_decoder_graphs import enter_weight
from edgeflex.models.decoder_reference import Reference
from edgeflex.progress import Silent
from edgeflex.schema import Choice, Precision
from edgeflex.schema_moe import Expected
from edgeflex.transforms.decoder_weights import quantize_matrix
from tests.random_decoder import FAMILIES, family_graph, kind_plan, units_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgeflex.schema_moe import DecoderGraph, DecoderManifest, MatrixRecord

Float32 = NDArray[np.float32]
FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32
HIDDEN, VOCABULARY, EXPERTS = 64, 96, 4
BFLOAT16 = 16
RUBBISH = 1e20  # in rows of the cache that nothing was written to


class MemorySource:
    """A decoder whose numbers are made up when asked for."""

    def __init__(self, graph: DecoderGraph, folder: Path) -> None:
        self.graph = graph
        self.folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {**graph.matrix_shapes(), **graph.small_shapes()}
        self.names = tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> Float32:
        name = "embedding" if name == "head" and self.graph.tied_embedding else name
        shape = self._shapes[name]
        values = np.random.default_rng(list(name.encode())).standard_normal(shape, dtype=np.float32)
        if name.endswith("norm"):
            return np.float32(1) + np.float32(0.1) * values
        return values * np.float32(1.5 / np.sqrt(shape[-1]))

    def gather(self, name: str, wanted: Any) -> Float32:
        found: Float32 = self.tensor(name)[np.asarray(wanted)]
        return found

    def expert_tensors(self, index: int, expert: int) -> tuple[str, str]:
        start = f"layers.{index}.experts.{expert}."
        return f"{start}gate_up", f"{start}down"

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"


def source_of(graph: DecoderGraph, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    return MemorySource(graph, folder)


pytestmark = pytest.mark.usefixtures("one_thread")  # of tests/conftest.py


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The mixed bundle of the decoder with most in it: source, plan, folder, manifest."""
    folder = tmp_path_factory.mktemp("mixed")
    graph = family_graph("qwen2_moe")
    source, plan = source_of(graph, folder / "model"), kind_plan(graph)
    return source, plan, folder / "bundle", export_onnx_decoder(source, plan, folder / "bundle")


@pytest.fixture
def copied(made, tmp_path):
    """The same bundle, to be damaged."""
    source, _, folder, manifest = made
    shutil.copytree(folder, tmp_path / "bundle")
    return source, tmp_path / "bundle", manifest


# --- a host that knows nothing but the manifest --------------------------------------------------------


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answer(held: Any, feeds: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Run a session; raw bytes are viewed as what each input is."""
    kinds = {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(bfloat16)": np.uint16}
    given = {}
    for one in held.get_inputs():
        value = feeds[one.name]
        if isinstance(value, bytes):
            value = np.frombuffer(value, kinds.get(one.type, np.float32)).reshape(one.shape)
        if one.type == "tensor(bfloat16)":
            given[one.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, BFLOAT16)
        else:
            given[one.name] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
    names = [one.name for one in held.get_outputs()]
    found = held.run_with_ort_values(names, given)
    return {name: one.numpy() for name, one in zip(names, found, strict=True)}


def raw_pieces(folder: Path, record: MatrixRecord) -> tuple[bytes, bytes]:
    raw = (folder / record.file).read_bytes()
    scales = record.scales_offset or 0
    return (
        raw[record.offset : record.offset + record.weights_bytes],
        raw[scales : scales + record.scales_bytes],
    )


def embedding_rows(folder: Path, record: MatrixRecord, tokens: Sequence[int]) -> Float32:
    """Look rows up as the layout's words say, without the package's own reading."""
    codes, scales = raw_pieces(folder, record)
    if record.precision is FP32:
        return np.frombuffer(codes, np.float32).reshape(record.rows, -1)[list(tokens)]
    if record.precision is INT8:
        rows = np.frombuffer(codes, np.int8).reshape(record.rows, -1)[list(tokens)]
        return rows * np.frombuffer(scales, np.float32)[list(tokens), None]
    packed = np.frombuffer(codes, np.uint8).reshape(record.rows, -1)[list(tokens)]
    whole = np.stack((packed & 15, packed >> 4), -1).reshape(len(tokens), -1, 32).astype(np.float32) - 8
    steps = (np.frombuffer(scales, np.uint16).astype(np.uint32) << 16).view(np.float32)
    found: Float32 = (whole * steps.reshape(record.rows, -1)[list(tokens), :, None]).reshape(len(tokens), -1)
    return found


def host_logits(folder: Path, manifest: DecoderManifest, tokens: Sequence[int], calls: Sequence[int]) -> Float32:
    """Run the bundle as a host would: its own cache, its own routing, its own errors carried on."""
    graph, a = manifest.graph, manifest.graph.attention
    records = {one.name: one for one in manifest.matrices}
    opened = {(one.role, one.layer, one.precision): session(folder / one.path) for one in manifest.programs}
    stages = {key[:2]: one for key, one in opened.items()}
    caches = [
        [np.full((a.kv_heads, rows, dim), RUBBISH, np.float32) for dim in (a.head_dim, a.value_dim)]
        for rows in range(len(tokens), len(tokens) + len(graph.layers))
    ]
    logits, start = [], 0
    for count in calls:
        positions = np.arange(start, start + count)
        x = embedding_rows(folder, records["embedding"], tokens[start : start + count])
        for layer, (keys, values) in zip(graph.layers, caches, strict=True):
            feeds = {"x": x, "positions": positions, "key_cache": keys, "value_cache": values}
            found = answer(stages["attention", layer.index], feeds)
            keys[:, start : start + count], values[:, start : start + count] = found["keys"], found["values"]
            x, y = found["residual"].copy(), found["normed"]
            if ("dense", layer.index) in stages:
                x += answer(stages["dense", layer.index], {"y": y})["out"]
            for row, places in enumerate(found["experts"] if layer.routing else ()):
                for place, expert in enumerate(places.tolist()):
                    name = f"layers.{layer.index}.experts.{expert}"
                    pieces: dict[str, Any] = {"y": y[row : row + 1]}
                    for one in ("gate_up", "down"):
                        pieces[one], pieces[f"{one}_scales"] = raw_pieces(folder, records[f"{name}.{one}"])
                    expert_stage = opened["expert", None, records[f"{name}.down"].precision]
                    x[row] += found["weights"][row, place] * answer(expert_stage, pieces)["out"][0]
        logits += [answer(stages["head", None], {"x": x[row : row + 1]})["logits"] for row in range(count)]
        start += count
    return np.concatenate(logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_chained_by_a_plain_host_give_the_reference_logits(family, tmp_path):
    graph = family_graph(family)
    source = source_of(graph, tmp_path / "model")
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, size=9).tolist()
    for kind in ("fp32", "int8-dynamic", "int4-group32", "mixed"):
        bundle = tmp_path / kind
        manifest = export_onnx_decoder(source, kind_plan(graph, kind), bundle)
        found = host_logits(bundle, manifest, tokens, (1, 5, 1, 2))
        # what is not rounded comes from the source itself, so that nothing read from the bundle vouches for itself
        wanted = Reference(source, None if kind == "fp32" else BundleWeights(bundle, manifest.matrices, source))
        logits = wanted.logits(torch.tensor([tokens]))[0].numpy()
        assert np.abs(found - logits).max() < 1e-5 * np.abs(logits).max(), (family, kind)


def test_every_number_lies_at_its_offset_in_the_precision_of_the_plan(made):
    source, plan, folder, manifest = made
    precisions = {choice.subject: Precision(choice.option) for choice in plan.choices}
    weights = BundleWeights(folder, manifest.matrices, source)
    assert {record.name for record in manifest.matrices} == set(source.names)
    for record in manifest.matrices:
        unit = unit_of(record.name)
        assert record.precision is (precisions[unit] if unit else FP32)
        tensor = source.tensor(record.name)
        wanted = quantize_matrix(tensor.reshape(-1, tensor.shape[-1]), record.precision)
        stored = weights.stored(record.name)
        np.testing.assert_array_equal(stored.codes, wanted.codes)
        np.testing.assert_array_equal(stored.scales, wanted.scales)


def test_the_bundle_opens_with_every_hash_right_and_nothing_left_beside_it(made):
    _, _, folder, manifest = made
    bundle = open_decoder_bundle(folder)
    assert bundle.manifest == manifest
    assert manifest.backend == "onnx"
    bundle.check_all()
    assert bundle.role(TOKENIZER).read_text() == "{}"
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert on_disk == {entry.path for entry in manifest.files} | {"manifest.json"}
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_weights_are_on_disk_once_in_files_that_can_be_read_past_the_page_cache(made):
    _, _, folder, manifest = made
    held = [entry for entry in manifest.files if entry.path.endswith((".bin", ".data"))]
    assert all(entry.size_bytes % 4096 == 0 for entry in held)
    pieces = []
    for one in manifest.matrices:
        pieces.append((one.file, one.offset, one.weights_bytes))
        if one.scales_offset is not None:
            pieces.append((one.file, one.scales_offset, one.scales_bytes))
    assert all(offset % 64 == 0 for _, offset, _ in pieces)
    needed = sum(size for _, _, size in pieces)
    gaps = 64 * len(pieces) + 4096 * len(held)
    assert sum(entry.size_bytes for entry in held) < needed + gaps
    assert all((folder / one.path).stat().st_size < 20_000 for one in manifest.programs)
    experts = {one.file for one in manifest.matrices if ".experts." in one.name}
    assert experts == {f"experts/layer-{layer}/expert-{one}.bin" for layer in (0, 1) for one in range(EXPERTS)}


def test_a_tied_head_and_the_embedding_are_the_same_bytes(tmp_path):
    graph = family_graph("mixtral")
    source = source_of(graph, tmp_path / "model")
    manifest = export_onnx_decoder(source, kind_plan(graph, "int4-group32"), tmp_path / "bundle")
    records = {one.name: one for one in manifest.matrices}
    assert records["head"].model_copy(update={"name": "embedding"}) == records["embedding"]
    assert not (tmp_path / "bundle" / "weights").exists()


def test_four_bit_constants_take_half_a_byte_a_weight(made):
    _, _, folder, manifest = made
    records = {one.name: one for one in manifest.matrices}
    model = onnx.load(str(folder / "stages/head.onnx"), load_external_data=False)
    held = {one.name: {two.key: two.value for two in one.external_data} for one in model.graph.initializer}
    assert records["head"].precision is INT4
    assert int(held["head"]["length"]) * 2 == VOCABULARY * HIDDEN
    assert held["head"] == {"location": "head.data", "offset": str(records["head"].offset), "length": "3072"}
    assert {one.domain: one.version for one in model.opset_import} == {"": 21, "com.microsoft": 1}


@pytest.mark.parametrize("kind", ["int8-dynamic", "int4-group32"])
def test_large_matrices_are_dequantised_in_blocks_of_rows(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_decoder_graphs, "_MOST_WEIGHTS", 2500)
    graph = family_graph("qwen2_moe")
    source = source_of(graph, tmp_path / "model")
    manifest = export_onnx_decoder(source, kind_plan(graph, kind), tmp_path / "bundle")
    model = onnx.load(str(tmp_path / "bundle/stages/head.onnx"), load_external_data=False)
    held = {one.name: list(one.dims) for one in model.graph.initializer if one.name.startswith("head")}
    if kind == "int8-dynamic":
        blocks = {f"head_{one}": [32, HIDDEN] for one in range(3)}
        assert held == blocks | {f"{name}_scales": [32] for name in blocks}
    else:
        assert held == {"head": [VOCABULARY, 2, 16], "head_scales": [VOCABULARY, 2]}
    template = onnx.load(str(tmp_path / f"bundle/stages/expert-32.{kind}.onnx"))
    assert [one.name for one in template.graph.input] == ["y", "gate_up", "gate_up_scales", "down", "down_scales"]
    assert [node.op_type for node in template.graph.node].count("Concat") == 1
    tokens = [3, 1, 4, 1, 5]
    found = host_logits(tmp_path / "bundle", manifest, tokens, (4, 1))
    weights = BundleWeights(tmp_path / "bundle", manifest.matrices, source)
    wanted = Reference(source, weights).logits(torch.tensor([tokens]))[0].numpy()
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_four_bit_stages_mean_the_same_in_plain_onnx(made):
    source, _, folder, manifest = made
    x = np.random.default_rng(1).standard_normal((1, HIDDEN), dtype=np.float32)
    plain = ReferenceEvaluator(onnx.load(str(folder / "stages/head.onnx"))).run(None, {"x": x})[0]
    weights = BundleWeights(folder, manifest.matrices, source)
    wanted = Reference(source, weights).head(torch.from_numpy(x)).numpy()
    assert np.abs(plain - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_activations_stay_float_in_every_setting_of_onnxruntime(made):
    source, _, folder, manifest = made
    x = np.random.default_rng(1).standard_normal((1, HIDDEN), dtype=np.float32)
    quick = onnxruntime.InferenceSession(str(folder / "stages/head.onnx"), providers=["CPUExecutionProvider"])
    wanted = Reference(source, BundleWeights(folder, manifest.matrices, source)).head(torch.from_numpy(x)).numpy()
    assert np.abs(quick.run(None, {"x": x})[0] - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_one_template_serves_all_experts_of_a_width_and_precision(made):
    _, _, _, manifest = made
    experts = [one for one in manifest.programs if one.role == "expert"]
    assert sorted(one.path for one in experts) == [
        f"stages/expert-32.{precision}.onnx" for precision in ("fp32", "int4-group32", "int8-dynamic")
    ]
    stages = {(one.role, one.layer, one.path, one.data) for one in manifest.programs if one.role != "expert"}
    assert ("attention", 1, "stages/layer-1.attention.onnx", ("stages/layer-1.attention.data",)) in stages
    assert ("dense", 0, "stages/layer-0.dense.onnx", ("stages/layer-0.dense.data",)) in stages
    assert ("head", None, "stages/head.onnx", ("stages/head.data",)) in stages


def test_equal_experts_are_chosen_from_the_lowest_number_on(tmp_path):
    graph = family_graph("qwen2_moe")
    source = source_of(graph, tmp_path / "model")
    given = source.tensor
    source.tensor = lambda name: given(name) * np.float32(not name.endswith("router"))
    manifest = export_onnx_decoder(source, kind_plan(graph), tmp_path / "bundle")
    a = graph.attention
    caches = {"key_cache": (a.kv_heads, 1, a.head_dim), "value_cache": (a.kv_heads, 1, a.value_dim)}
    feeds: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in caches.items()}
    path = next(one.path for one in manifest.programs if one.role == "attention")
    x = np.ones((2, HIDDEN), np.float32)
    found = answer(session(tmp_path / "bundle" / path), {"x": x, "positions": np.arange(2), **feeds})
    np.testing.assert_array_equal(found["experts"], [[0, 1, 2]] * 2)
    np.testing.assert_allclose(found["weights"], 1 / 3, rtol=1e-6)


def test_far_positions_turn_as_the_reference_module_turns_them(made):
    source, _, folder, manifest = made
    graph, a = source.graph, source.graph.attention
    draw = np.random.default_rng(5)
    stage = onnx_decoder_stages.CachedAttention(
        graph, graph.layers[0], onnx_decoder_stages.attention_shapes(onnx_decoder_stages.only(graph, graph.layers[0]))
    )
    weights = BundleWeights(folder, manifest.matrices, source)
    linear = {name.removesuffix(".weight") for name, _ in stage.named_parameters()}
    numbers = {
        f"{name}.weight" if name in linear else name: torch.from_numpy(weights(f"layers.0.{name}"))
        for name in onnx_decoder_stages.attention_shapes(onnx_decoder_stages.only(graph, graph.layers[0]))
    }
    inputs = {
        "x": draw.standard_normal((2, HIDDEN), dtype=np.float32),
        "positions": np.array([130_001, 130_002]),
        "key_cache": draw.standard_normal((a.kv_heads, 3, a.head_dim), dtype=np.float32),
        "value_cache": draw.standard_normal((a.kv_heads, 3, a.value_dim), dtype=np.float32),
    }
    with torch.no_grad():
        wanted = torch.func.functional_call(stage, numbers, tuple(map(torch.from_numpy, inputs.values())))
    found = answer(session(folder / "stages/layer-0.attention.onnx"), inputs)
    for name, one in zip(("residual", "normed", "keys", "values"), wanted, strict=False):
        np.testing.assert_allclose(found[name], one.numpy(), atol=2e-5)


def test_graphs_hold_nothing_of_the_machine_and_are_the_same_every_time(made, tmp_path):
    source, plan, folder, manifest = made
    for template in ("attention_template", "feed_forward_template", "head_template"):
        getattr(onnx_decoder_stages, template).cache_clear()
    again = export_onnx_decoder(source, plan, tmp_path / "again")
    assert again == manifest
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    for one in manifest.programs:
        raw = (folder / one.path).read_bytes()
        assert b".py" not in raw
        assert b"pkg.torch" not in raw
        assert str(folder.parent).encode() not in raw


def test_the_callers_measurement_of_the_written_numbers_goes_into_the_manifest(tmp_path):
    graph = family_graph("qwen2_moe")
    source = source_of(graph, tmp_path / "model")

    def measured(weights):
        tokens = Reference(source, weights).generate((1, 2, 3), 4)
        return {"measured_kl": 0.25, "expected": (Expected(prompt=(1, 2, 3), tokens=tokens),)}

    manifest = export_onnx_decoder(source, kind_plan(graph), tmp_path / "bundle", measured=measured)
    assert manifest.measured_kl == 0.25
    assert dict(measured(BundleWeights(tmp_path / "bundle", manifest.matrices, source))) == {
        "measured_kl": 0.25,
        "expected": manifest.expected,
    }


# --- what is refused -----------------------------------------------------------------------------------


def refused(source: Any, folder: Path, manifest: DecoderManifest) -> tuple[str, str]:
    """Return what reading back and running say of a damaged bundle."""
    weights = BundleWeights(folder, manifest.matrices, source)
    with pytest.raises(UnsupportedError) as read:
        compare_stages(folder, source, manifest.matrices, manifest.programs)
    with pytest.raises(UnsupportedError) as run:
        check_stages(source, weights, manifest.programs, Silent())
    return str(read.value), str(run.value)


def test_weights_at_each_others_places_are_noticed_by_reading_and_by_running(copied):
    source, folder, manifest = copied
    path = folder / "stages/layer-1.attention.onnx"
    model = onnx.load(str(path), load_external_data=False)
    first, second = (
        next(one for one in model.graph.initializer if one.name == name) for name in ("input_norm", "post_norm")
    )
    first.name, second.name = second.name, first.name
    path.write_bytes(model.SerializeToString())
    read, run = refused(source, folder, manifest)
    assert "stages/layer-1.attention.onnx: input_norm is not what lies at" in read
    assert "post_norm is not what lies at" in read
    assert "stages/layer-1.attention.onnx" in run
    assert "differs from the reference" in run


def test_a_template_of_another_precision_is_noticed(copied):
    source, folder, manifest = copied
    shutil.copyfile(folder / "stages/expert-32.fp32.onnx", folder / "stages/expert-32.int8-dynamic.onnx")
    with pytest.raises(UnsupportedError, match="gate_up is held as fp32, the plan says int8-dynamic"):
        compare_stages(folder, source, manifest.matrices, manifest.programs)


def test_a_scaled_product_is_noticed_by_running(copied):
    source, folder, manifest = copied
    path = folder / "stages/expert-32.int4-group32.onnx"
    model = onnx.load(str(path))
    last = next(node for node in model.graph.node if list(node.output) == ["out"])
    last.attribute.append(onnx.helper.make_attribute("alpha", 1.0005))
    path.write_bytes(model.SerializeToString())
    compare_stages(folder, source, manifest.matrices, manifest.programs)
    with pytest.raises(UnsupportedError, match=r"expert-32\.int4-group32\.onnx with layers\..*differs from"):
        check_stages(source, BundleWeights(folder, manifest.matrices, source), manifest.programs, Silent())


def test_a_stage_that_onnxruntime_cannot_load_is_refused(copied):
    source, folder, manifest = copied
    (folder / "stages/head.onnx").write_bytes(b"no graph")
    with pytest.raises(UnsupportedError, match=r"ONNX Runtime cannot load head\.onnx"):
        check_stages(source, BundleWeights(folder, manifest.matrices, source), manifest.programs, Silent())


def test_a_graph_that_uses_a_matrix_otherwise_is_refused():
    model = onnx_decoder_stages.feed_forward_template(HIDDEN, 32, gated=True)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.node.append(onnx.helper.make_node("Identity", ["down"], ["again"]))
    with pytest.raises(UnsupportedError, match="down: the exported graph does not multiply with it once"):
        enter_weight(changed, "down", INT8, HIDDEN, 32, constant=True)


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
    graph = family_graph("olmoe")
    source = source_of(graph, tmp_path / "model")
    with pytest.raises(InputError, match=said):
        export_onnx_decoder(source, kind_plan(graph, **change), tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_precision_of_no_decoder_kernel_is_refused(tmp_path):
    graph = family_graph("olmoe")
    source = source_of(graph, tmp_path / "model")
    choices = tuple(Choice(subject=unit, option="int4-block64") for unit in units_of(graph))
    with pytest.raises(UnsupportedError, match="decoders do not run int4-block64"):
        export_onnx_decoder(source, kind_plan(graph, choices=choices), tmp_path / "bundle")


def test_an_export_that_fails_late_leaves_what_was_there(made, tmp_path):
    source, plan, folder, manifest = made
    bundle = tmp_path / "bundle"
    shutil.copytree(folder, bundle)

    def failing(weights):
        raise InputError("the text is too short.")

    with pytest.raises(InputError, match="is not empty"):
        export_onnx_decoder(source, plan, bundle)
    with pytest.raises(InputError, match="too short"):
        export_onnx_decoder(source, plan, bundle, overwrite=True, measured=failing)
    assert open_decoder_bundle(bundle).manifest == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
    whole = export_onnx_decoder(source, kind_plan(source.graph, "fp32"), bundle, overwrite=True)
    assert open_decoder_bundle(bundle).manifest == whole
    assert not (bundle / "stages/expert-32.int4-group32.onnx").exists()
