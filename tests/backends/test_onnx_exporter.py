"""What is written as ONNX: the same numbers as the prepared modules, in the formats that were planned, nothing else.

ONNX Runtime runs the graphs as they stand (ORT_DISABLE_ALL), with one thread. Where activations are rounded to 8 bits,
a sum that ends within float32's rounding of a tie may fall on either side, as the order of summation is not the same:
on grids whose scales are powers of two every sum is exact and so must be the answer, on natural grids a few images
may differ by such a step.
"""

from __future__ import annotations

import copy
import socket
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeflex.errors import UnsupportedError
from edgeflex.exporters.onnx import HALF, ONNX, OnnxExporter, compare_precisions, stored_precisions
from edgeflex.exporters.onnx_graph import Skeletons
from edgeflex.models import DynamicModel, Recipe, assemble, zoo
from edgeflex.schema import LayerKind, Precision
from edgeflex.transforms import ExplicitLayer, PreparedModel, outputs, record_ranges
from edgeflex.transforms.quantize import as_half, from_fp8, to_fp8
from tests.small_nets import CLASSES, Chain, ResidualNet, TwoBlocks, dynamic, livened

STATIC, FP8, FP16, FP32 = Precision.INT8_STATIC, Precision.FP8, Precision.FP16, Precision.FP32
BLOCK64, BLOCK128 = Precision.INT4_BLOCK64, Precision.INT4_BLOCK128
EXACT = 1e-5


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assembled(module: nn.Module, stages: tuple[str, ...], shape: tuple[int, ...]) -> DynamicModel:
    recipe = {"source": "test:net", "stages": stages, "head": {"kind": "linear"}, "input_shape": shape}
    return assemble(module.eval(), Recipe.model_validate({**recipe, "classes": CLASSES}))


def resnet() -> DynamicModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return livened(assembled(zoo.CifarResNet(1, len(CLASSES)), ("layer1", "layer2"), (3, 32, 32)))


def vit() -> DynamicModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = zoo.SmallViT(len(CLASSES), width=128, depth=2, heads=2)
        return assembled(network, ("blocks.0",), (3, 32, 32))


MAKERS = {
    "small-resnet": lambda: dynamic(ResidualNet, ("block",)),
    "cifar-resnet": resnet,
    "vit": vit,
    "tiny-cnn": lambda: dynamic(Chain),
}
NETS = tuple(MAKERS)


@cache
def net(name: str) -> DynamicModel:
    return MAKERS[name]()


def inputs_of(model: DynamicModel, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *model.graph.input_shape, generator=torch.Generator().manual_seed(seed))


@cache
def ranges_of(name: str) -> dict[str, tuple[float, float]]:
    return record_ranges(net(name), [inputs_of(net(name), 32, seed=2)])


def plan_of(model: DynamicModel, precision: Precision) -> dict[str, Precision]:
    """Return the precision for every layer that can have it."""

    def can(layer) -> bool:
        linear = layer.shape.kind is LayerKind.LINEAR
        divides = layer.shape.in_channels % (precision.group_size or 1) == 0
        return divides and (linear or precision in {FP32, FP16, STATIC})

    return {layer.name: precision for layer in model.graph.layers if can(layer)}


def answers(folder: Path, segments: int, x: torch.Tensor) -> np.ndarray:
    """Return probabilities [n, exits, classes], image by image, as the files say."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions = [
        onnxruntime.InferenceSession(folder / f"segment{index}.onnx", options, providers=["CPUExecutionProvider"])
        for index in range(segments)
    ]
    rows = []
    for image in x.numpy():
        values, exits = image[None], []
        for session in sessions:
            names = [one.name for one in session.get_outputs() if one.name != "confidence"]
            found = session.run(names, {"x": values})
            values = found[0]
            exits.append(found[-1][0])
        rows.append(np.stack(exits))
    return np.stack(rows)


def written(exporter: OnnxExporter, prepared: PreparedModel, model: DynamicModel, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    exporter.write(prepared, model.graph, folder)
    return folder


def distances(prepared: PreparedModel, folder: Path, x: torch.Tensor) -> np.ndarray:
    """Return how far any probability of each image is from the prepared modules."""
    found = answers(folder, len(prepared.segments), x)
    return np.asarray(np.abs(found - outputs(prepared, x, batch=1).numpy()).max(axis=(1, 2)))


def graphs(folder: Path) -> list[onnx.ModelProto]:
    return [onnx.load(path, load_external_data=False) for path in sorted(folder.glob("*.onnx"))]


# --- the same numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_fp32_segments_give_what_torch_gives(name: str, tmp_path: Path):
    model, x = net(name), inputs_of(net(name), 6)
    prepared = ONNX.prepare(model, {}, {})
    found = answers(written(ONNX, prepared, model, tmp_path), len(model.segments), x)
    expected = torch.stack([torch.softmax(logits, -1) for logits in model.exit_logits(x)], dim=1).numpy()
    assert np.abs(found - expected).max() < EXACT


@pytest.mark.parametrize("name", ["small-resnet", "vit"])
@pytest.mark.parametrize("precision", [BLOCK64, BLOCK128])
def test_int4_blocks_give_what_the_prepared_modules_give(name: str, precision: Precision, tmp_path: Path):
    model = net(name)
    plan = plan_of(model, precision)
    if not plan:
        plan = {"wide": BLOCK64}  # the small net has no layer of 128 inputs
    prepared = ONNX.prepare(model, plan, {})
    folder = written(ONNX, prepared, model, tmp_path)
    assert distances(prepared, folder, inputs_of(model, 6)).max() < EXACT
    plain = ONNX.prepare(model, {}, {})
    assert distances(plain, folder, inputs_of(model, 6)).max() > 100 * EXACT


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("precision", [STATIC, FP8])
def test_eight_bits_give_what_the_prepared_modules_give_but_for_steps_at_ties(
    name: str, precision: Precision, tmp_path: Path
):
    model = net(name)
    prepared = ONNX.prepare(model, plan_of(model, precision), ranges_of(name))
    found = distances(prepared, written(ONNX, prepared, model, tmp_path), inputs_of(model, 16))
    assert (found > EXACT).mean() <= 0.25
    assert found.max() < 0.02


def on_exact_grids(model: DynamicModel) -> dict[str, tuple[float, float]]:
    """Give ``model`` weights, and return ranges, whose scales are powers of two: every sum is exact in float32."""
    generator = torch.Generator().manual_seed(3)
    for layer in (one for segment in model.segments for one in segment.modules()):
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        codes = torch.round(torch.randn(layer.weight.shape, generator=generator) * 40).clamp(-127, 127)
        codes.reshape(len(codes), -1)[:, 0] = 127
        step = 2.0 ** round(np.log2((2 / layer.weight[0].numel()) ** 0.5 / 40))
        layer.weight.data.copy_(codes * step)
        if layer.bias is not None:
            layer.bias.data.copy_(torch.round(layer.bias.data * 16) / 16)
    found = record_ranges(model, [inputs_of(model, 32, seed=2)])
    steps = {key: 2.0 ** np.ceil(np.log2(max(-low, high, 1e-3) / 127)) for key, (low, high) in found.items()}
    return {key: (-127 * step, 127 * step) for key, step in steps.items()}


@pytest.mark.parametrize("name", ["small-resnet", "cifar-resnet", "tiny-cnn"])
def test_int8_on_exact_grids_gives_just_what_the_prepared_modules_give(name: str, tmp_path: Path):
    model = MAKERS[name]()
    ranges = on_exact_grids(model)
    prepared = ONNX.prepare(model, plan_of(model, STATIC), ranges)
    assert distances(prepared, written(ONNX, prepared, model, tmp_path), inputs_of(model, 16)).max() < 1e-6


MIXED = {
    "blocks.0.attn.qkv": STATIC,
    "blocks.0.mlp.fc1": FP8,
    "blocks.1.attn.qkv": STATIC,
    "blocks.1.attn.proj": BLOCK128,
    "blocks.1.mlp.fc1": FP8,
    "blocks.1.mlp.fc2": FP16,
    "patch": FP16,
    "exit0.linear": BLOCK64,
}


def without_half_results(prepared: PreparedModel) -> PreparedModel:
    """Return modules as ONNX Runtime's processor kernels compute them.

    They have no half precision: its casts between nodes are dropped, and only weights, and what QuantizeLinear reads,
    are still rounded to it.
    """

    class Plain(ExplicitLayer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.activation_scale is not None:
                x = from_fp8(to_fp8(as_half(x), self.activation_scale), self.activation_scale)
            return self._product(x)

    segments = copy.deepcopy(prepared.segments)
    for layer in (one for segment in segments for one in segment.modules()):
        if isinstance(layer, ExplicitLayer) and layer.half_precision:
            layer.__class__ = Plain
    return PreparedModel(segments, prepared.precisions, prepared.examples)


def test_five_precisions_in_one_graph_run_and_give_what_the_prepared_modules_give(tmp_path: Path):
    model = net("vit")
    prepared = HALF.prepare(model, MIXED, ranges_of("vit"))
    folder = written(HALF, prepared, model, tmp_path)
    last = graphs(folder)[1].graph
    types = {
        tensor.data_type for tensor in last.initializer if tensor.name.endswith(".weight") and len(tensor.dims) > 1
    }
    names = onnx.TensorProto
    assert types == {names.INT8, names.INT4, names.FLOAT8E4M3FN, names.FLOAT16, names.FLOAT}
    x = inputs_of(model, 8)
    # rounding a result to half precision moves it by up to 2**-11 of itself, and one 8-bit step may follow
    assert distances(prepared, folder, x).max() < 5e-3
    exact = distances(without_half_results(prepared), folder, x)
    assert np.median(exact) < EXACT
    assert (exact > EXACT).mean() <= 0.25


@pytest.mark.parametrize("exporter", [ONNX, HALF])
def test_mixed_plans_give_what_the_prepared_modules_give(exporter: OnnxExporter, tmp_path: Path):
    model, x = net("small-resnet"), inputs_of(net("small-resnet"), 16)
    plan = {"stem": STATIC, "block.conv2": FP16, "down": STATIC, "wide": BLOCK64, "narrow": FP8}
    prepared = exporter.prepare(model, plan, ranges_of("small-resnet"))
    folder = written(exporter, prepared, model, tmp_path)
    found = distances(without_half_results(prepared), folder, x)
    assert np.median(found) < EXACT
    assert (found > EXACT).mean() <= 0.25
    assert distances(prepared, folder, x).max() < 0.05


# --- in the formats that were planned ------------------------------------------------------------------------


def test_int4_weights_take_exactly_half_a_byte_each_and_scales_are_positive(tmp_path: Path):
    model = net("vit")
    prepared = HALF.prepare(model, plan_of(model, BLOCK128), {})
    folder = written(HALF, prepared, model, tmp_path)
    seen = 0
    for proto in graphs(folder):
        assert [(one.domain, one.version) for one in proto.opset_import] == [("", 21)]
        assert proto.ir_version == 10
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT4:
                length = next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
                assert len(tensor.dims) == 2
                assert length * 2 == tensor.dims[0] * tensor.dims[1]
                seen += 1
        full = onnx.load(folder / f"{proto.graph.name}.onnx")
        scales = [onnx.numpy_helper.to_array(one) for one in full.graph.initializer if one.name.endswith(".scale")]
        assert all((one.astype(np.float32) > 0).all() for one in scales)
    assert seen == len(plan_of(model, BLOCK128))


def test_weights_lie_once_on_the_disk_in_their_own_format(tmp_path: Path):
    model = net("cifar-resnet")
    for exporter, precision, size in ((ONNX, FP32, 4), (ONNX, STATIC, 1), (HALF, FP16, 2)):
        prepared = exporter.prepare(model, plan_of(model, precision), ranges_of("cifar-resnet"))
        folder = written(exporter, prepared, model, tmp_path / precision.value)
        weights = sum(layer.shape.weight_count for layer in model.graph.layers)
        channels = sum(layer.shape.out_channels for layer in model.graph.layers)
        stored = sum(path.stat().st_size for path in folder.glob("*.data"))
        assert size * weights <= stored <= size * weights + 8 * channels + 48 * len(model.graph.layers)
        assert {one.opset_import[0].version for one in graphs(folder)} == {20}


@pytest.mark.parametrize("name", ["small-resnet", "cifar-resnet", "vit"])
def test_a_tensor_is_quantised_once_for_all_its_readers_with_an_explicit_zero_point(name: str, tmp_path: Path):
    model = net(name)
    prepared = HALF.prepare(model, plan_of(model, STATIC), ranges_of(name))
    for proto in graphs(written(HALF, prepared, model, tmp_path)):
        rounded = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
        assert rounded
        assert len({node.input[0] for node in rounded}) == len(rounded)
        kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
        assert {kinds[node.input[2]] for node in rounded} == {onnx.TensorProto.INT8}
        operations = {node.op_type for node in proto.graph.node}
        assert not operations & {"Identity", "Cast", "Clip", "DynamicQuantizeLinear", "Constant"}
        assert {node.domain for node in proto.graph.node} == {""}


def test_read_back_says_what_is_stored_and_lists_every_difference_from_another_plan(tmp_path: Path):
    model = net("small-resnet")
    plan = {"stem": STATIC, "block.conv1": FP16, "wide": BLOCK64, "narrow": FP8}
    prepared = HALF.prepare(model, plan, ranges_of("small-resnet"))
    folder = written(HALF, prepared, model, tmp_path)
    stored = stored_precisions(folder, model.graph)
    assert stored == {layer.name: plan.get(layer.name, FP32) for layer in model.graph.layers}
    with pytest.raises(UnsupportedError) as raised:
        compare_precisions(folder, model.graph, {**plan, "stem": FP32, "wide": STATIC})
    assert "stem is stored as int8-static" in str(raised.value)
    assert "wide is stored as int4-block64 (2048 bytes), the plan says int8-static" in str(raised.value)
    assert str(raised.value).count("\n  - ") == 2


def planted(folder: Path, change) -> None:
    path = folder / "segment1.onnx"
    proto = onnx.load(path, load_external_data=False)
    change(proto.graph, {tensor.name: tensor for tensor in proto.graph.initializer})
    path.write_bytes(proto.SerializeToString())


def _other_block(graph, tensors):
    node = next(node for node in graph.node if node.input[0] == "wide.weight")
    next(one for one in node.attribute if one.name == "block_size").i = 32


def _floats_in_place(graph, tensors):
    tensors["down.weight"].data_type = onnx.TensorProto.FLOAT


def _no_activation_rounding(graph, tensors):
    node = next(node for node in graph.node if node.op_type == "Conv")
    node.input[0] = "x"


def _unpacked(graph, tensors):
    entry = next(one for one in tensors["wide.weight"].external_data if one.key == "length")
    entry.value = str(2 * int(entry.value))


def _other_name(graph, tensors):
    tensors["narrow.weight"].name = "other.weight"
    for node in graph.node:
        node.input[:] = ["other.weight" if name == "narrow.weight" else name for name in node.input]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_other_block, "wide is stored as an unknown format"),
        (_floats_in_place, "down is stored as an unknown format"),
        (_no_activation_rounding, "down is stored as an unknown format"),
        (_unpacked, "wide is stored as an unknown format"),
        (_other_name, "narrow is not there"),
    ],
)
def test_a_planted_difference_is_found(change, fault: str, tmp_path: Path):
    model = net("small-resnet")
    plan = {"down": STATIC, "wide": BLOCK64, "narrow": FP8}
    prepared = ONNX.prepare(model, plan, ranges_of("small-resnet"))
    folder = written(ONNX, prepared, model, tmp_path)
    planted(folder, change)
    with pytest.raises(UnsupportedError, match=fault):
        compare_precisions(folder, model.graph, plan)


# --- files ---------------------------------------------------------------------------------------------------


def test_the_same_model_is_the_same_bytes_and_nothing_tells_the_machine(tmp_path: Path):
    model = net("small-resnet")
    plan = {"stem": STATIC, "wide": BLOCK64}
    folders = []
    for number in range(2):
        exporter = OnnxExporter(half=False, skeletons=Skeletons())
        prepared = exporter.prepare(model, plan, ranges_of("small-resnet"))
        folders.append(written(exporter, prepared, model, tmp_path / str(number)))
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["segment0.data", "segment0.onnx", "segment1.data", "segment1.onnx"]
    for name in names:
        raw = (folders[0] / name).read_bytes()
        assert raw == (folders[1] / name).read_bytes()
        if name.endswith(".onnx"):
            for told in (str(Path.cwd()), sys.prefix, socket.gethostname(), str(tmp_path), ".py", "site-packages"):
                assert told.encode() not in raw


def test_roles_sizes_and_segments_are_what_was_written(tmp_path: Path):
    model = net("small-resnet")
    found = ONNX.write(ONNX.prepare(model, {}, {}), model.graph, tmp_path)
    assert found.files == {
        "program:segment0": "segment0.onnx",
        "program:segment0.data": "segment0.data",
        "program:segment1": "segment1.onnx",
        "program:segment1.data": "segment1.data",
    }
    assert found.size_bytes == sum((tmp_path / path).stat().st_size for path in found.files.values())
    assert [(one.input_shape, one.output_shape) for one in found.segments] == [
        ((1, 1, 8, 8), (1, 32, 8, 8)),
        ((1, 32, 8, 8), None),
    ]
    for proto, names in zip(graphs(tmp_path), (["activations", "probabilities"], ["probabilities"]), strict=True):
        assert [value.name for value in proto.graph.input] == ["x"]
        assert [value.name for value in proto.graph.output] == names
        kinds = {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}
        assert kinds == {onnx.TensorProto.FLOAT}


def test_padding_makes_the_program_exactly_as_large_and_changes_no_answer(tmp_path: Path):
    model, x = net("small-resnet"), inputs_of(net("small-resnet"), 2)
    found = ONNX.write(ONNX.prepare(model, {}, {}), model.graph, tmp_path)
    before = answers(tmp_path, 2, x)
    for extra in (0, 1, 4096):
        ONNX.pad(found, tmp_path, found.size_bytes + extra)
        assert sum((tmp_path / path).stat().st_size for path in found.files.values()) == found.size_bytes + extra
    np.testing.assert_array_equal(answers(tmp_path, 2, x), before)
    with pytest.raises(UnsupportedError, match="the plan promised 10"):
        ONNX.pad(found, tmp_path, 10)


def test_a_second_mix_of_a_model_needs_no_second_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = net("small-resnet")
    exporter = OnnxExporter(half=True, skeletons=Skeletons())
    written(exporter, exporter.prepare(model, {}, {}), model, tmp_path / "first")
    monkeypatch.delattr(torch.onnx, "export")
    prepared = exporter.prepare(model, plan_of(model, STATIC), ranges_of("small-resnet"))
    folder = written(exporter, prepared, model, tmp_path / "second")
    assert (distances(prepared, folder, inputs_of(model, 8)) < EXACT).mean() >= 0.75


class Averaged(nn.Module):
    """A pool whose border counts or not, which its printed form does not say."""

    def __init__(self, *, border: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=border)
        self.last = nn.Linear(8, len(CLASSES))

    def forward(self, x):
        return self.last(torch.mean(self.pool(functional.relu(self.first(x)))[:, :, :1], (2, 3)))


def test_networks_that_only_look_alike_are_not_taken_for_each_other(tmp_path: Path):
    found = []
    for border in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = livened(assembled(Averaged(border=border), (), (1, 8, 8)))
        prepared = ONNX.prepare(model, {}, {})
        folder = written(ONNX, prepared, model, tmp_path / str(border))
        assert distances(prepared, folder, inputs_of(model, 2)).max() < EXACT
        found.append(answers(folder, 1, inputs_of(model, 2)))
    assert np.abs(found[0] - found[1]).max() > 0.001


def test_two_blocks_in_a_row_hand_their_cut_over_as_floats(tmp_path: Path):
    model = dynamic(TwoBlocks, ("first",))
    ranges = on_exact_grids(model)
    prepared = ONNX.prepare(model, plan_of(model, STATIC), ranges)
    folder = written(ONNX, prepared, model, tmp_path)
    assert graphs(folder)[1].graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert distances(prepared, folder, inputs_of(model, 8)).max() < 1e-6


# --- what cannot be written ------------------------------------------------------------------------------------


class Bessel(nn.Module):
    """Applies what ONNX has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, len(CLASSES))

    def forward(self, x):
        return self.last(torch.special.bessel_j0(x.flatten(1)))


class Mirrored(nn.Module):
    """Pads by reflection inside a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, padding_mode="reflect")
        self.last = nn.Linear(512, len(CLASSES))

    def forward(self, x):
        return self.last(self.first(x).flatten(1))


class Overwritten(nn.Module):
    """Adds what a ReLU has changed in place before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(512, len(CLASSES))

    def forward(self, x):
        x = self.first(x)
        return self.last((self.relu(x) + x).flatten(1))


@pytest.mark.parametrize(
    ("module", "fault"),
    [
        (Bessel, "torch.onnx cannot export segment0"),
        (Mirrored, "pads with 'reflect'"),
        (Overwritten, "'relu' changes 'first' in place"),
    ],
)
def test_what_a_graph_cannot_say_is_refused_with_the_reason(module, fault: str, tmp_path: Path):
    model = assembled(module(), (), (1, 8, 8))
    with pytest.raises(UnsupportedError, match=fault):
        ONNX.write(ONNX.prepare(model, {}, {}), model.graph, tmp_path)
