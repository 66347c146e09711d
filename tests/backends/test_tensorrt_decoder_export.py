"""A planned decoder becomes graphs for TensorRT that take every weight as it lies on disk, and what builds engines."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeflex import flow
from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.errors import BundleError, DeviceError, InputError, UnsupportedError
from edgeflex.exporters import onnx_decoder_check
from edgeflex.exporters.decoder_files import BundleWeights, unit_of
from edgeflex.exporters.onnx_decoder import export_onnx_decoder
from edgeflex.exporters.onnx_decoder_check import check_stages
from edgeflex.exporters.onnx_lint import lint_versions
from edgeflex.exporters.tensorrt_decoder import (
    StageNumbers,
    compare_borders,
    export_tensorrt_decoder,
    widened_session,
)
from edgeflex.exporters.tensorrt_decoder_rows import GATHER_STAGE, check_rows
from edgeflex.models.decoder_reference import Reference
from edgeflex.progress import Silent
from edgeflex.runtimes.tensorrt_build import build, read_recipe
from edgeflex.schema import Choice, Precision
from edgeflex.schema_moe import Expected
from edgeflex.schema_trt import SUPPORTED_VERSIONS, BuildRecipe
from edgeflex.transforms.decoder_weights import quantize_matrix
from tests.fake_cuda import Device, FakeCuda
from tests.random_decoder import FAMILIES, FAMILY_EXPERTS, FAMILY_VOCABULARY, RandomSource, family_graph, kind_plan
from tests.toy_engines import install

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.schema_moe import DecoderManifest, MatrixRecord

    Float32 = NDArray[np.float32]

FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32
KINDS = ("fp32", "int8-dynamic", "int4-group32", "mixed")
BFLOAT16 = 16
RUBBISH = 1e20  # in rows of the cache that nothing was written to
# Of the largest number of an answer: activations rounded to fp16, in one stage, and in all of them one after another.
HALF_STAGE, HALF_LOGITS = 2e-3, 5e-3
VALUES = {"x", "y", "positions", "key_cache", "value_cache"}


pytestmark = pytest.mark.usefixtures("one_thread")  # of tests/conftest.py


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The mixed bundle of the decoder with most in it, in half precision: source, plan, folder, manifest."""
    folder = tmp_path_factory.mktemp("mixed")
    graph = family_graph("qwen2_moe")
    source: Any = RandomSource(graph, folder / "model")
    plan = kind_plan(graph)
    return source, plan, folder / "bundle", export_tensorrt_decoder(source, plan, folder / "bundle")


@pytest.fixture
def copied(made, tmp_path):
    """The same bundle, to be damaged."""
    source, _, folder, manifest = made
    shutil.copytree(folder, tmp_path / "bundle")
    return source, tmp_path / "bundle", manifest


# --- a host that knows nothing but manifest and recipe -------------------------------------------------


class Opened:
    """A graph, run by ONNX Runtime, or by ONNX's own evaluator, which rounds every operator to its type."""

    def __init__(self, path: Path, *, rounded: bool = False) -> None:
        model = onnx.load(str(path))
        self.inputs = {one.name: one.type.tensor_type for one in model.graph.input}
        self._evaluator = ReferenceEvaluator(model) if rounded else None
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [one.name for one in model.graph.output]

    def __call__(self, feeds: dict[str, Any]) -> dict[str, NDArray[Any]]:
        """Return all outputs; raw bytes are viewed as what each input is."""
        kinds = {TensorProto.UINT8: np.uint8, TensorProto.BFLOAT16: ml_dtypes.bfloat16}
        given = {}
        for name, kind in self.inputs.items():
            value = feeds[name]
            if isinstance(value, bytes):
                shape = [axis.dim_value for axis in kind.shape.dim]
                value = np.frombuffer(value, kinds.get(kind.elem_type, np.float32)).reshape(shape)
            given[name] = value
        if self._evaluator is not None:
            return dict(zip(self._names, map(np.asarray, self._evaluator.run(None, given)), strict=True))
        values = {name: _value(value) for name, value in given.items()}
        found = self._session.run_with_ort_values(self._names, values)
        return {name: one.numpy() for name, one in zip(self._names, found, strict=True)}


def _value(value: NDArray[Any]) -> Any:
    if value.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(np.uint16), BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(value)


class Host:
    """Runs a bundle: its own cache, its own routing, its own errors carried on."""

    def __init__(self, folder: Path, manifest: DecoderManifest, *, rounded: bool = False) -> None:
        self.folder, self.manifest = folder, manifest
        self.records = {one.name: one for one in manifest.matrices}
        self.opened = {one.path: Opened(folder / one.path, rounded=rounded) for one in manifest.programs}
        self.paths: dict[tuple[str, int | None, Precision | None], str] = {
            (one.role, one.layer, one.precision): one.path for one in manifest.programs
        }

    def raw(self, record: MatrixRecord) -> tuple[bytes, bytes]:
        raw = (self.folder / record.file).read_bytes()
        scales = record.scales_offset or 0
        codes = raw[record.offset : record.offset + record.weights_bytes]
        return codes, raw[scales : scales + record.scales_bytes]

    def has(self, role: str, layer: int | None) -> bool:
        return (role, layer, None) in self.paths

    def run(
        self, role: str, layer: int | None, values: dict[str, Any], *starts: str, kind: Precision | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run a stage with the weights whose full names are one of ``starts`` and the name of an input."""
        held = self.opened[self.paths[role, layer, kind]]
        feeds = dict(values)
        for one in held.inputs:
            if one in feeds or one.endswith("_scales"):
                continue
            record = next(self.records[start + one] for start in starts if start + one in self.records)
            feeds[one], feeds[f"{one}_scales"] = self.raw(record)
        return held(feeds)

    def embedding(self, tokens: Sequence[int]) -> Float32:
        """Look rows up as the layout's words say, without the package's own reading."""
        record = self.records["embedding"]
        codes, scales = self.raw(record)
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

    def experts(self, layer: int, y: Float32, chosen: NDArray[np.int32]) -> tuple[Float32, NDArray[np.int32]]:
        """Return the chosen experts' outputs, expert by expert, and the row of each choice in them."""
        places, outputs = np.zeros_like(chosen), []
        row = 0
        for expert in np.unique(chosen).tolist():
            tokens, ranks = np.where(chosen == expert)
            gathered = self.run("gather", None, {"y": y, "rows": tokens.astype(np.int32)})["out"]
            start = f"layers.{layer}.experts.{expert}."
            kind = self.records[f"{start}down"].precision
            outputs.append(self.run("expert", None, {"y": gathered}, start, kind=kind)["out"])
            places[tokens, ranks] = np.arange(row, row + len(tokens))
            row += len(tokens)
        return np.concatenate(outputs), places

    def logits(self, tokens: Sequence[int], calls: Sequence[int]) -> Float32:
        graph, a = self.manifest.graph, self.manifest.graph.attention
        caches = [
            [np.full((a.kv_heads, rows, dim), RUBBISH, np.float32) for dim in (a.head_dim, a.value_dim)]
            for rows in range(len(tokens), len(tokens) + len(graph.layers))
        ]
        logits, start = [], 0
        for count in calls:
            positions = np.arange(start, start + count, dtype=np.int32)
            x = self.embedding(tokens[start : start + count])
            for layer, (keys, values) in zip(graph.layers, caches, strict=True):
                index, name = layer.index, f"layers.{layer.index}."
                feeds = {"x": x, "positions": positions, "key_cache": keys, "value_cache": values}
                found = self.run("attention", index, feeds, name)
                keys[:, start : start + count], values[:, start : start + count] = found["keys"], found["values"]
                parts = {"residual": found["residual"]}
                if self.has("dense", index):
                    starts = (f"{name}mlp.", f"{name}shared.", name)
                    parts["dense"] = self.run("dense", index, {"y": found["normed"]}, *starts)["out"]
                if layer.routing is not None:
                    parts["weights"] = found["weights"]
                    parts["outputs"], parts["places"] = self.experts(index, found["normed"], found["experts"])
                x = self.run("sum", index, parts)["hidden"]
            logits += [self.run("head", None, {"x": x[row : row + 1]}, "")["logits"] for row in range(count)]
            start += count
        return np.concatenate(logits)


def error_of(
    folder: Path, source: Any, manifest: DecoderManifest, kind: str, calls: Sequence[int], *, rounded: bool
) -> float:
    """Return the largest difference of chained stages from the reference, over the largest logit."""
    tokens = np.random.default_rng(3).integers(0, FAMILY_VOCABULARY, size=sum(calls)).tolist()
    # what is not rounded comes from the source itself, so that nothing read from the bundle vouches for itself
    weights = None if kind == "fp32" else BundleWeights(folder, manifest.matrices, source)
    wanted = Reference(source, weights).logits(torch.tensor([tokens]))[0].numpy()
    found = Host(folder, manifest, rounded=rounded).logits(tokens, calls)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_chained_stages_give_the_reference_logits_and_every_version_takes_them(family, tmp_path):
    graph = family_graph(family)
    source: Any = RandomSource(graph, tmp_path / "model")
    for kind in KINDS:
        for half, limit in ((False, 1e-5), (True, 1e-5 if kind == "fp32" else HALF_LOGITS)):
            bundle = tmp_path / f"{kind}-{half}"
            manifest = export_tensorrt_decoder(source, kind_plan(graph, kind), bundle, half=half)
            error = error_of(bundle, source, manifest, kind, (1, 5, 1, 2), rounded=half)
            assert error < limit, (family, kind, half)
            assert (error > 1e-5) == (half and kind != "fp32")  # it is rounded to fp16 where it is said to be
            recipe = BuildRecipe.parse((bundle / "build.json").read_bytes(), "build.json")
            assert recipe.versions == SUPPORTED_VERSIONS, (family, kind, half)
            for one in {program.path for program in manifest.programs}:
                found = lint_versions(bundle / one, SUPPORTED_VERSIONS)
                assert {version: [str(fault) for fault in faults] for version, faults in found.items() if faults} == {}


# --- what is on disk -----------------------------------------------------------------------------------


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


def test_four_bit_weights_take_half_a_byte_each_and_nothing_is_stored_twice(tmp_path):
    graph = family_graph("olmoe")
    source: Any = RandomSource(graph, tmp_path / "model")
    manifest = export_tensorrt_decoder(source, kind_plan(graph, "int4-group32"), tmp_path / "bundle")
    matrices = [one for one in manifest.matrices if one.precision is INT4]
    numbers = sum(one.rows * one.columns for one in matrices)
    assert numbers == sum(int(np.prod(shape)) for shape in graph.matrix_shapes().values())
    pieces = [
        (one.file, start, size)
        for one in manifest.matrices
        for start, size in ((one.offset, one.weights_bytes), (one.scales_offset, one.scales_bytes))
        if start is not None
    ]
    assert sum(one.weights_bytes for one in matrices) * 2 == numbers
    assert sum(one.scales_bytes for one in matrices) * 16 == numbers
    ends: dict[str, int] = {}
    for file, start, size in sorted(pieces):
        assert start >= ends.get(file, 0), "two pieces share bytes"
        ends[file] = start + size
    assert set(ends) == {one.path for one in manifest.files if one.path.endswith(".bin")}
    for file, end in ends.items():
        assert (tmp_path / "bundle" / file).stat().st_size == -(-end // 4096) * 4096


def test_pieces_lie_where_an_engine_may_read_them(made):
    _, _, _, manifest = made
    for one in manifest.matrices:
        step = 256 if ".experts." in one.name else 64
        assert one.offset % step == 0
        assert (one.scales_offset or 0) % step == 0
    files = {one.file for one in manifest.matrices if ".experts." in one.name}
    assert files == {f"experts/layer-{layer}/expert-{one}.bin" for layer in (0, 1) for one in range(FAMILY_EXPERTS)}
    rest = {one.file for one in manifest.matrices} - files
    assert rest == {f"weights/{one}.bin" for one in ("embedding", "layer-0", "layer-1", "head")}
    embedding = next(one for one in manifest.matrices if one.name == "embedding")
    assert embedding.scales_offset == embedding.offset + -(-embedding.weights_bytes // 64) * 64


def test_a_tied_head_and_the_embedding_are_the_same_bytes(tmp_path):
    graph = family_graph("mixtral")
    source: Any = RandomSource(graph, tmp_path / "model")
    manifest = export_tensorrt_decoder(source, kind_plan(graph, "int4-group32"), tmp_path / "bundle")
    records = {one.name: one for one in manifest.matrices}
    assert records["head"].model_copy(update={"name": "embedding"}) == records["embedding"]
    assert [one.name for one in manifest.matrices if one.file == "weights/head.bin"] == ["norm"]


def test_the_bundle_opens_with_every_hash_right_and_nothing_left_beside_it(made):
    _, _, folder, manifest = made
    bundle = open_decoder_bundle(folder)
    assert (bundle.manifest, manifest.backend) == (manifest, "tensorrt")
    bundle.check_all()
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert on_disk == {entry.path for entry in manifest.files} | {"manifest.json"}
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    roles = {entry.role: entry.path for entry in manifest.files}
    assert (roles["recipe"], roles["build_script"]) == ("build.json", "build.sh")


def test_graphs_hold_no_weights_nothing_of_the_machine_and_are_the_same_every_time(made, tmp_path):
    source, plan, folder, manifest = made
    again = export_tensorrt_decoder(source, plan, tmp_path / "again")
    assert again == manifest
    for name in ("manifest.json", "build.json", "build.sh", *(one.path for one in manifest.programs)):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    for one in manifest.programs:
        raw = (folder / one.path).read_bytes()
        assert len(raw) < 24_000
        assert not any(word in raw for word in (b".py", b"pkg.torch", str(folder.parent).encode()))
        constants = onnx.load(str(folder / one.path)).graph.initializer
        assert max((int(np.prod(tensor.dims)) for tensor in constants), default=0) <= 16
        assert all(tensor.data_location == TensorProto.DEFAULT for tensor in constants)
        assert one.data == ()


def test_layers_of_one_structure_and_precision_share_their_graphs(tmp_path):
    graph = family_graph("deepseek_v2")
    source: Any = RandomSource(graph, tmp_path / "model")
    manifest = export_tensorrt_decoder(source, kind_plan(graph, "int8-dynamic"), tmp_path / "bundle")
    paths = {(one.role, one.layer): one.path for one in manifest.programs}
    assert paths == {
        ("attention", 0): "stages/attention-0.onnx",  # no router
        ("attention", 1): "stages/attention-1.onnx",
        ("attention", 2): "stages/attention-1.onnx",
        ("dense", 0): "stages/dense-0.onnx",  # a dense layer's and two shared experts have one width here
        ("dense", 1): "stages/dense-0.onnx",
        ("dense", 2): "stages/dense-0.onnx",
        ("sum", 0): "stages/sum-0.onnx",
        ("sum", 1): "stages/sum-1.onnx",
        ("sum", 2): "stages/sum-1.onnx",
        ("gather", None): GATHER_STAGE,
        ("expert", None): "stages/expert-32.int8-dynamic.onnx",
        ("head", None): "stages/head.onnx",
    }
    assert {one.path for one in manifest.files if one.path.startswith("stages/")} == set(paths.values())


def test_borders_are_bytes_floats_and_int32(made):
    _, _, folder, manifest = made
    paths = {(one.role, one.layer): one.path for one in manifest.programs if one.role != "expert"}
    graph = onnx.load(str(folder / paths["attention", 0])).graph
    kinds = {one.name: one.type.tensor_type.elem_type for one in (*graph.input, *graph.output)}
    assert kinds["positions"] == kinds["experts"] == TensorProto.INT32
    assert TensorProto.INT64 not in kinds.values()
    head = onnx.load(str(folder / paths["head", None])).graph
    shapes = {one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in head.input}
    kinds = {one.name: one.type.tensor_type.elem_type for one in head.input}
    assert shapes == {"x": [1, 64], "head": [96, 32], "head_scales": [96, 2], "norm": [64]}
    assert (kinds["head"], kinds["head_scales"]) == (TensorProto.UINT8, TensorProto.BFLOAT16)
    assert {one.name for one in manifest.matrices if one.file == "weights/head.bin"} == {"head", "norm"}


# --- numbers -------------------------------------------------------------------------------------------


def test_half_precision_bears_any_size_of_activations(made):
    source, _, folder, manifest = made
    host = Host(folder, manifest, rounded=True)
    weights = BundleWeights(folder, manifest.matrices, source)
    y = np.random.default_rng(1).standard_normal((3, 64), dtype=np.float32)
    for kind in (INT8, INT4):
        name = next(one.name for one in manifest.matrices if ".experts." in one.name and one.precision is kind)
        start = name.rpartition(".")[0] + "."
        for factor in (1e-12, 1.0, 3e4, 1e9):
            wide = y * np.float32(factor)
            wide[1] = 0.0
            wanted = Reference(source, weights).swiglu(start[:-1], torch.from_numpy(wide)).numpy()
            with np.errstate(over="ignore", invalid="ignore"):  # the evaluator's own sigmoid
                found = host.run("expert", None, {"y": wide}, start, kind=kind)["out"]
            assert np.abs(found - wanted).max() <= HALF_STAGE * np.abs(wanted).max(), (kind, factor)
            np.testing.assert_array_equal(found[1], 0.0)


def test_far_positions_turn_as_they_do_in_the_bundle_for_onnxruntime(made, tmp_path):
    source, plan, folder, manifest = made
    plain = export_onnx_decoder(source, plan, tmp_path / "onnx")
    a, draw = source.graph.attention, np.random.default_rng(5)
    inputs = {
        "x": draw.standard_normal((2, 64), dtype=np.float32),
        "positions": np.array([130_001, 130_002], np.int32),
        "key_cache": draw.standard_normal((a.kv_heads, 3, a.head_dim), dtype=np.float32),
        "value_cache": draw.standard_normal((a.kv_heads, 3, a.value_dim), dtype=np.float32),
    }
    path = next(one.path for one in plain.programs if (one.role, one.layer) == ("attention", 0))
    wanted = Opened(tmp_path / "onnx" / path)({**inputs, "positions": inputs["positions"].astype(np.int64)})
    found = Host(folder, manifest).run("attention", 0, inputs, "layers.0.")
    for name, one in wanted.items():
        limit = HALF_STAGE * np.abs(one).max()
        assert np.abs(found[name] - one).max() <= limit, name


def test_equal_experts_are_chosen_from_the_lowest_number_on(tmp_path):
    graph = family_graph("qwen2_moe")
    source: Any = RandomSource(graph, tmp_path / "model")
    given = source.tensor
    source.tensor = lambda name: given(name) * np.float32(not name.endswith("router"))
    manifest = export_tensorrt_decoder(source, kind_plan(graph), tmp_path / "bundle")
    a = graph.attention
    caches = {"key_cache": (a.kv_heads, 1, a.head_dim), "value_cache": (a.kv_heads, 1, a.value_dim)}
    feeds: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in caches.items()}
    feeds |= {"x": np.ones((2, 64), np.float32), "positions": np.arange(2, dtype=np.int32)}
    found = Host(tmp_path / "bundle", manifest).run("attention", 0, feeds, "layers.0.")
    np.testing.assert_array_equal(found["experts"], [[0, 1, 2]] * 2)
    np.testing.assert_allclose(found["weights"], 1 / 3, rtol=1e-6)


def test_the_callers_measurement_of_the_written_numbers_goes_into_the_manifest(tmp_path):
    graph = family_graph("olmoe")
    source: Any = RandomSource(graph, tmp_path / "model")

    def measured(weights):
        tokens = Reference(source, weights).generate((1, 2, 3), 4)
        return {"measured_kl": 0.25, "expected": (Expected(prompt=(1, 2, 3), tokens=tokens),)}

    manifest = export_tensorrt_decoder(source, kind_plan(graph), tmp_path / "bundle", measured=measured)
    assert manifest.measured_kl == 0.25
    assert manifest.expected == measured(BundleWeights(tmp_path / "bundle", manifest.matrices, source))["expected"]


# --- the recipe, and building --------------------------------------------------------------------------


def test_the_recipe_has_an_engine_a_graph_with_ranges_for_a_token_and_for_a_chunk(made):
    _, plan, folder, manifest = made
    recipe = read_recipe(open_decoder_bundle(folder))
    segments = {one.onnx: one for one in recipe.segments}
    assert set(segments) == {one.path for one in manifest.programs}
    assert all(one.data is None and one.engine == f"engines/{one.name}.engine" for one in recipe.segments)
    top_k, chunk, context = 3, plan.prefill_chunk_tokens, plan.context_tokens
    assert (chunk, context) == (8, 64)

    def ranges(path: str, name: str) -> dict[str, list[tuple[int, int, int]]]:
        profiles = {one.name: one for one in segments[path].profiles}
        return {
            given: list(zip(bounds.least, bounds.best, bounds.most, strict=True))
            for given, bounds in profiles[name].shapes.items()
        }

    path = next(one.path for one in manifest.programs if one.role == "attention")
    assert [one.name for one in segments[path].profiles] == ["decode", "prefill"]
    fixed = (64, 64, 64)
    assert ranges(path, "decode")["x"] == [(1, 1, 1), fixed]
    assert ranges(path, "prefill")["x"] == [(1, chunk, chunk), fixed]
    assert ranges(path, "prefill")["positions"] == [(1, chunk, chunk)]
    for name in ("decode", "prefill"):
        assert ranges(path, name)["key_cache"][1] == (1, context, context)
    weights = {one.name: one for one in segments[path].inputs if one.name not in VALUES}
    assert not any(one.dynamic for one in weights.values())
    for expert in (one.path for one in manifest.programs if one.role == "expert"):
        assert ranges(expert, "decode") == {"y": [(1, 1, 1), fixed]}
        assert ranges(expert, "prefill") == {"y": [(1, chunk, chunk), fixed]}
    total = next(one.path for one in manifest.programs if one.role == "sum")
    assert ranges(total, "decode")["outputs"] == [(top_k,) * 3, fixed]
    assert ranges(total, "prefill")["outputs"] == [(top_k, chunk * top_k, chunk * top_k), fixed]
    assert list(ranges(GATHER_STAGE, "prefill")["rows"]) == [(1, chunk * top_k, chunk * top_k)]
    assert segments["stages/head.onnx"].profiles == ()
    script = (folder / "build.sh").read_text()
    assert subprocess.run(["sh", "-n", str(folder / "build.sh")], check=False).returncode == 0
    assert "'--profile=1' '--minShapes=x:1x64,positions:1,key_cache:2x1x16,value_cache:2x1x16'" in script
    assert [f"build '{one.name}' '{one.onnx}'" in script for one in recipe.segments].count(False) == 0
    assert recipe.least_capability == (8, 0)  # scales of int4 are bfloat16
    assert not recipe.cuda_graph


def test_a_decoder_without_four_bits_asks_for_no_newer_gpu_than_tensorrt_does(tmp_path):
    graph = family_graph("olmoe")
    source: Any = RandomSource(graph, tmp_path / "model")
    export_tensorrt_decoder(source, kind_plan(graph, "int8-dynamic"), tmp_path / "bundle")
    assert read_recipe(open_decoder_bundle(tmp_path / "bundle")).least_capability == (7, 5)


@pytest.mark.parametrize("version", ["10.3", "11.4"])
def test_engines_of_a_decoder_are_built_kept_and_indexed(copied, monkeypatch, version):
    _, folder, manifest = copied
    trt = install(monkeypatch, version)
    index = build(open_decoder_bundle(folder), library=trt.cuda)
    rivals = read_recipe(open_decoder_bundle(folder)).refits
    graphs = [*dict.fromkeys(one.path for one in manifest.programs), *(one.onnx for one in rivals)]
    names = [path.rpartition("/")[2] for path in graphs]
    assert [name for name, _, _ in trt.named("Builder.build_serialized_network")] == names
    assert [f"{one.segment}.onnx" for one in index.engines] == names
    assert set(index.key.hashes) == {*graphs, *(one.data for one in rivals)}
    for entry in index.engines:
        raw = (folder / entry.file).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (entry.size_bytes, entry.sha256)
    given = {name for name, *_ in trt.named("IOptimizationProfile.set_shape")}
    assert given == {"x", "y", "positions", "key_cache", "value_cache", *("residual", "outputs", "places"), "rows"} | {
        "weights",
        "dense",
    }
    build(open_decoder_bundle(folder), library=trt.cuda)
    assert len(trt.named("Builder.build_serialized_network")) == len(graphs)
    assert trt.cuda.alive == []


def test_building_by_the_flow_reads_what_kind_of_bundle_it_is(copied, monkeypatch):
    _, folder, _ = copied
    trt, found = install(monkeypatch), ctypes.CDLL

    def load(name: Any, *rest: Any, **options: Any) -> Any:
        return trt.cuda if "cuda" in str(name) else found(name, *rest, **options)

    monkeypatch.setattr(ctypes, "CDLL", load)
    index = flow.build(folder)
    assert (folder / "engines/index.json").is_file()
    recipe = read_recipe(open_decoder_bundle(folder))
    assert len(index.engines) == len(recipe.segments) + len(recipe.refits)
    assert {one.segment for one in index.experts} == {one.name for one in recipe.segments if "expert-" in one.name}


def test_a_bundle_for_another_target_is_not_built(made, tmp_path, monkeypatch):
    source, plan, *_ = made
    export_onnx_decoder(source, plan, tmp_path / "onnx")
    trt = install(monkeypatch)
    with pytest.raises(UnsupportedError, match=r"exported for 'onnx'.*Export its plan with --target tensorrt"):
        build(open_decoder_bundle(tmp_path / "onnx"), library=trt.cuda)


def test_a_graph_that_changed_after_the_export_is_not_built(copied, monkeypatch):
    _, folder, _ = copied
    trt = install(monkeypatch)
    path = folder / "stages/head.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match="changed since the export"):
        build(open_decoder_bundle(folder), library=trt.cuda)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(one for one in manifest["files"] if one["role"] == "recipe")
    (folder / "build.json").write_bytes((folder / "build.json").read_bytes()[:-1] + b" ")
    assert (folder / "build.json").stat().st_size == entry["size_bytes"]
    with pytest.raises(BundleError, match=r"build\.json: the content differs"):
        read_recipe(open_decoder_bundle(folder))


def test_a_gpu_without_bfloat16_is_refused_before_anything_is_built(copied, monkeypatch):
    _, folder, _ = copied
    trt = install(monkeypatch, cuda=FakeCuda(devices=(Device(name="Tegra", capability=(7, 5)),)))
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5.*BF16 numbers"):
        build(open_decoder_bundle(folder), library=trt.cuda)
    assert not (folder / "engines").exists()


def test_a_builder_that_fails_says_which_stage(copied, monkeypatch):
    _, folder, _ = copied
    trt = install(monkeypatch, fail={"plan head"})
    with pytest.raises(DeviceError, match=r"could not build head: .*out of memory"):
        build(open_decoder_bundle(folder), library=trt.cuda)


# --- what is refused -----------------------------------------------------------------------------------


def refused(source: Any, folder: Path, manifest: DecoderManifest) -> str:
    """Return what reading back says of a damaged bundle."""
    plan = {one.subject: Precision(one.option) for one in manifest.plan.choices}
    with pytest.raises(UnsupportedError) as read:
        compare_borders(folder, source.graph, plan, manifest.programs)
    return str(read.value)


def test_a_template_of_another_precision_is_noticed(copied):
    source, folder, manifest = copied
    shutil.copyfile(folder / "stages/expert-32.int4-group32.onnx", folder / "stages/expert-32.int8-dynamic.onnx")
    said = refused(source, folder, manifest)
    wanted = "stages/expert-32.int8-dynamic.onnx: gate_up is UINT8 [64, 32] instead of UINT8 [64, 64], as int8-dynamic"
    assert wanted in said
    assert "gate_up_scales is BFLOAT16 [64, 2] instead of FLOAT [64]" in said


def test_a_weight_that_a_graph_holds_or_lacks_is_noticed(copied):
    source, folder, manifest = copied
    path = folder / "stages/head.onnx"
    model = onnx.load(str(path))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(64, np.float32), "norm"))
    scales = next(one for one in model.graph.input if one.name == "head_scales")
    model.graph.input.remove(scales)
    path.write_bytes(model.SerializeToString())
    said = refused(source, folder, manifest)
    assert "stages/head.onnx: norm is a constant of the graph" in said
    assert "stages/head.onnx: there is no input head_scales" in said


@pytest.mark.parametrize("path", ["stages/expert-32.int4-group32.onnx", "stages/expert-32.int8-dynamic.onnx"])
def test_a_product_that_is_off_is_noticed_by_running(copied, path):
    source, folder, manifest = copied
    model = onnx.load(str(folder / path))
    last = model.graph.node[-1]
    last.output[0], out = "before", last.output[0]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.0005), "off"))
    model.graph.node.append(helper.make_node("Mul", ["before", "off"], [out]))
    (folder / path).write_bytes(model.SerializeToString())
    weights = BundleWeights(folder, manifest.matrices, source)
    numbers = StageNumbers(source.graph, weights)
    with pytest.raises(UnsupportedError, match=r"expert-32\..*\.onnx with layers\..*differs from the reference"):
        check_stages(source, weights, manifest.programs, Silent(), given=numbers, opened=widened_session)


def test_layers_whose_numbers_are_exchanged_are_noticed_by_running(made):
    source, _, folder, manifest = made
    weights = BundleWeights(folder, manifest.matrices, source)
    numbers = StageNumbers(source.graph, weights)

    def exchanged(program):
        found = dict(numbers(program))
        if "input_norm" in found:
            found["input_norm"], found["post_norm"] = found["post_norm"], found["input_norm"]
        return found

    check_stages(source, weights, manifest.programs, Silent(), given=numbers, opened=widened_session)
    with pytest.raises(UnsupportedError, match="attention-0"):
        check_stages(source, weights, manifest.programs, Silent(), given=exchanged, opened=widened_session)


def test_a_head_is_checked_by_blocks_of_rows_to_the_last_one(copied, monkeypatch):
    source, folder, manifest = copied
    monkeypatch.setattr(onnx_decoder_check, "_HEAD_ROWS", 40)  # 40, 40 and 16
    weights = BundleWeights(folder, manifest.matrices, source)
    numbers = StageNumbers(source.graph, weights)

    def last_row_off(program):
        found = dict(numbers(program))
        if "head" in found:
            found["head"] = found["head"].copy()
            found["head"][-1] ^= 0x55
        return found

    check_stages(source, weights, manifest.programs, Silent(), given=numbers, opened=widened_session)
    with pytest.raises(UnsupportedError, match=r"head\.onnx: the stage differs"):
        check_stages(source, weights, manifest.programs, Silent(), given=last_row_off, opened=widened_session)


def test_outputs_that_are_added_wrongly_are_noticed(copied):
    _, folder, manifest = copied
    path = next(one.path for one in manifest.programs if one.role == "sum")
    check_rows(folder, path, 3)
    model = onnx.load(str(folder / path))
    mul = next(node for node in model.graph.node if node.op_type == "Mul")
    mul.op_type = "Add"
    (folder / path).write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match="the stage differs by"):
        check_rows(folder, path, 3)


def test_weights_that_half_precision_cannot_hold_are_refused_and_fp32_takes_them(tmp_path):
    graph = family_graph("olmoe")
    source: Any = RandomSource(graph, tmp_path / "model")
    given = source.tensor
    source.tensor = lambda name: given(name) * np.float32(1e-6 if name == "layers.1.experts.2.down" else 1)
    plan = kind_plan(graph, "int4-group32")
    with pytest.raises(UnsupportedError, match=r"layers\.1\.experts\.2\.down: its largest scale"):
        export_tensorrt_decoder(source, plan, tmp_path / "half")
    assert not (tmp_path / "half").exists()
    export_tensorrt_decoder(source, plan, tmp_path / "whole", half=False)


def test_rows_that_no_address_may_begin_at_are_refused(tmp_path):
    graph = family_graph("olmoe").model_copy(update={"hidden_dim": 96})
    source: Any = RandomSource(graph, tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"rows of 96 numbers take 384 bytes.*multiples of 256"):
        export_tensorrt_decoder(source, kind_plan(graph, "int8-dynamic"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"graph_digest": "1" * 64}, "another decoder"),
        ({"verdict": "decline", "reasons": ("too slow",)}, "too slow"),
        ({"choices": (Choice(subject="layers.9", option="fp32"),)}, "layers.9 is no unit"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, change, said):
    graph = family_graph("olmoe")
    source: Any = RandomSource(graph, tmp_path / "model")
    with pytest.raises(InputError, match=said):
        export_tensorrt_decoder(source, kind_plan(graph, **change), tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_export_that_fails_late_leaves_what_was_there(copied):
    source, folder, manifest = copied

    def failing(weights):
        raise InputError("the text is too short.")

    with pytest.raises(InputError, match="is not empty"):
        export_tensorrt_decoder(source, manifest.plan, folder)
    with pytest.raises(InputError, match="too short"):
        export_tensorrt_decoder(source, manifest.plan, folder, overwrite=True, measured=failing)
    assert open_decoder_bundle(folder).manifest == manifest
