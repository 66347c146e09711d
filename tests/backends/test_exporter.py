"""Programs that ExecuTorch really wrote: what they hold, what they answer, and what is refused."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import Tensor, nn

from edgeflex.errors import UnsupportedError
from edgeflex.exporters import Written
from edgeflex.exporters.executorch import (
    EXECUTORCH,
    call_programs,
    compare_precisions,
    kernel_program,
    lower,
    program_from_prepared,
    segment_programs,
    stored_layers,
)
from edgeflex.models import DynamicModel, Recipe, assemble, zoo
from edgeflex.runtimes.executorch import ExecutorchSession, method_names, time_program
from edgeflex.runtimes.segments import all_exits
from edgeflex.schema import LayerKind, LayerShape, Precision
from edgeflex.transforms import PreparedModel, outputs, prepare, record_ranges
from tests.small_nets import dynamic, images, livened, residual_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FP32, STATIC, DYNAMIC = Precision.FP32, Precision.INT8_STATIC, Precision.INT8_DYNAMIC
CHANNEL, GROUP = Precision.INT4_CHANNEL, Precision.INT4_GROUP32

# every format that there is, in one model; the stem stays float so that the residual is added in float
MIXED = {
    "block.conv1": STATIC,
    "block.conv2": STATIC,
    "exit0.linear": DYNAMIC,
    "down": STATIC,
    "wide": GROUP,
    "narrow": CHANNEL,
    "last": STATIC,
}


class Joined(nn.Module):
    """Dense connections: each layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(8, 4, 3, padding=1)
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.cat([x, torch.relu(self.second(x))], 1)
        x = torch.cat([x, torch.relu(self.third(x))], 1)
        return self.last(torch.mean(x, (2, 3), keepdim=True).flatten(1))


def digits_model() -> DynamicModel:
    fed = zoo.preprocessing("digits-cnn")
    recipe = Recipe.model_validate(
        {
            "source": "zoo:digits-cnn",
            "stages": ("trunk.1", "trunk.3"),
            "head": {"kind": "linear"},
            "input_shape": (fed.channels, fed.height, fed.width),
            "classes": tuple("0123456789"),
        }
    )
    return livened(assemble(zoo.build("digits-cnn"), recipe))


def everything(model: DynamicModel, precision: Precision) -> dict[str, Precision]:
    return {layer.name: precision for layer in model.graph.layers}


@cache
def exported(kind: str) -> tuple[DynamicModel, PreparedModel, bytes]:
    """Return a model, prepared, with its program; each is lowered once."""
    model = {"digits": digits_model, "joined": lambda: dynamic(Joined)}.get(kind.partition(" ")[0], residual_model)()
    chosen: Mapping[str, Precision] = {
        "residual fp32": {},
        "residual mixed": MIXED,
        "residual static": everything(model, STATIC),
        "digits static": everything(model, STATIC),
        "joined static": everything(model, STATIC),
    }[kind]
    x = images(64, seed=5, size=model.graph.input_shape[-1])
    prepared = prepare(model, chosen, record_ranges(model, [x]))
    return model, prepared, program_from_prepared(prepared)


def run(path: Path, model: DynamicModel, prepared: PreparedModel, x: Tensor) -> np.ndarray:
    with ExecutorchSession(path, segment_programs(prepared, model.graph)) as session:
        return all_exits(session, [x.numpy()])


def written(folder: Path, program: bytes) -> Path:
    path = folder / "program.pte"
    path.write_bytes(program)
    return path


# --- what the file answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("residual fp32", 1e-5),
        # where the order of sums moves a value across a step of an int8 grid, answers move by that step
        ("residual mixed", 1e-2),
        ("residual static", 1e-2),
        ("digits static", 1e-2),
        ("joined static", 1e-2),
    ],
)
def test_the_program_answers_as_the_reference(tmp_path: Path, kind: str, tolerance: float):
    model, prepared, program = exported(kind)
    x = images(24, seed=11, size=model.graph.input_shape[-1])
    found = run(written(tmp_path, program), model, prepared, x)
    expected = outputs(prepared, x).numpy()
    assert found.shape == expected.shape == (24, model.graph.segment_count, len(model.graph.classes))
    assert float(np.abs(found - expected).max()) <= tolerance


def test_the_methods_are_the_segments_in_order(tmp_path: Path):
    model, prepared, program = exported("digits static")
    segments = segment_programs(prepared, model.graph)
    assert tuple(one.method for one in segments) == method_names(written(tmp_path, program))
    assert [one.input_shape for one in segments] == [(1, 1, 16, 16), (1, 32, 8, 8), (1, 48, 8, 8)]
    assert [one.output_shape for one in segments] == [(1, 32, 8, 8), (1, 48, 8, 8), None]
    assert [one.exit for one in segments] == ["exit0", "exit1", "final"]


# --- what the file holds -------------------------------------------------------------------------------


def test_every_layer_is_stored_in_the_precision_that_was_planned():
    model, prepared, program = exported("residual mixed")
    assert compare_precisions(program, model.graph, MIXED) == prepared.precisions
    held = [layer.precision for layer in stored_layers(program)]
    assert held == [FP32, STATIC, STATIC, DYNAMIC, STATIC, GROUP, CHANNEL, STATIC]


@pytest.mark.parametrize("kind", ["residual fp32", "residual static", "digits static", "joined static"])
def test_uniform_plans_are_read_back(kind: str):
    model, prepared, program = exported(kind)
    assert compare_precisions(program, model.graph, prepared.precisions) == prepared.precisions


def test_a_layer_in_another_format_is_named_with_both_formats():
    model, _, program = exported("residual mixed")
    wanted = {**MIXED, "stem": STATIC, "wide": CHANNEL, "exit0.linear": FP32}
    with pytest.raises(UnsupportedError) as raised:
        compare_precisions(program, model.graph, wanted)
    message = str(raised.value)
    assert "stem is stored as fp32, the plan says int8-static" in message
    assert "wide is stored as int4-group32, the plan says int4-channel" in message
    assert "exit0.linear is stored as int8-dynamic, the plan says fp32" in message
    assert "narrow" not in message


def test_a_program_of_another_network_is_refused():
    model, _, _ = exported("residual fp32")
    _, _, other = exported("digits static")
    with pytest.raises(UnsupportedError, match="the model has"):
        compare_precisions(other, model.graph, {})


def test_a_layer_that_xnnpack_did_not_take_is_counted_as_missing():
    model = residual_model()
    prepared = prepare(model, {}, {})
    bare = lower(
        {
            "segment0": (prepared.segments[0], torch.zeros(1, 1, 8, 8)),
            "segment1": (torch.nn.Identity(), torch.zeros(1, 4)),
        }
    )
    with pytest.raises(UnsupportedError, match="segment1 holds 0 layers in XNNPACK, the model has 4"):
        compare_precisions(bare, model.graph, {})


@pytest.mark.parametrize("kind", ["digits static", "residual mixed", "residual fp32", "joined static"])
def test_a_convolutional_segment_is_one_delegate_with_no_operation_beside_it(kind: str):
    _, _, program = exported(kind)
    plans = deserialize_pte_binary(program).program.execution_plan
    assert [(len(plan.delegates), [one.name for one in plan.operators]) for plan in plans] == [(1, [])] * len(plans)


def test_weights_stand_once_in_the_file_however_many_methods_use_them():
    torch.manual_seed(0)
    layer = nn.Linear(256, 256).requires_grad_(requires_grad=False)
    once = lower({"a": (layer, torch.zeros(1, 256))})
    twice = lower({"a": (layer, torch.zeros(1, 256)), "b": (layer, torch.zeros(4, 256))})
    weights_bytes = 4 * 256 * 256
    assert len(once) > weights_bytes
    assert len(twice) < weights_bytes * 1.1


def test_eight_bits_take_about_a_quarter_of_the_file():
    assert len(exported("residual static")[2]) < 0.4 * len(exported("residual fp32")[2])


# --- size on disk ----------------------------------------------------------------------------------------


def test_a_program_filled_up_to_its_promise_still_runs(tmp_path: Path):
    model, prepared, program = exported("residual mixed")
    size = len(program) + 12_345
    there = EXECUTORCH.write(prepared, model.graph, tmp_path)
    assert (tmp_path / "program.pte").read_bytes() == program
    EXECUTORCH.pad(there, tmp_path, size)
    filled = (tmp_path / "program.pte").read_bytes()
    assert len(filled) == size
    x = images(3)
    first = run(written(tmp_path, program), model, prepared, x)
    assert np.array_equal(run(written(tmp_path, filled), model, prepared, x), first)
    assert compare_precisions(filled, model.graph, MIXED) == prepared.precisions == there.precisions


def test_a_program_larger_than_its_promise_is_refused_with_both_sizes(tmp_path: Path):
    there = Written({"program": "program.pte"}, (), {}, size_bytes=5)
    with pytest.raises(UnsupportedError, match="needs 5 bytes, the plan promised 4"):
        EXECUTORCH.pad(there, tmp_path, 4)


# --- what cannot be lowered ------------------------------------------------------------------------------


class DependsOnData(nn.Module):
    """A branch that no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


def test_a_module_that_cannot_be_lowered_is_named():
    with pytest.raises(UnsupportedError, match="cannot lower segment3"):
        lower({"segment3": (DependsOnData(), torch.zeros(2))})


# --- programs to measure with ----------------------------------------------------------------------------

CONV = LayerShape(kind=LayerKind.CONV2D, in_channels=8, out_channels=8, kernel=3, padding=1, height=8, width=8)
DEPTHWISE = CONV.model_copy(update={"groups": 8, "stride": 2})
LINEAR = LayerShape(kind=LayerKind.LINEAR, in_channels=64, out_channels=32, rows=4)


@pytest.mark.parametrize(
    ("shape", "precision"),
    [
        (CONV, FP32),
        (CONV, STATIC),
        (DEPTHWISE, STATIC),
        (LINEAR, FP32),
        (LINEAR, Precision.FP16),
        (LINEAR, STATIC),
        (LINEAR, DYNAMIC),
        (LINEAR, CHANNEL),
        (LINEAR, GROUP),
    ],
)
def test_a_kernel_program_holds_that_one_layer_in_that_precision(shape: LayerShape, precision: Precision):
    program, example = kernel_program(shape, precision)
    (stored,) = stored_layers(program)
    assert (stored.kind, stored.precision) == (shape.kind, precision)
    assert int(np.prod(stored.weight_shape)) == shape.weight_count
    assert all(seconds > 0 for seconds in time_program(program, [example], threads=1, repeats=2))


def test_call_programs_have_none_one_and_two_delegates():
    counts = []
    for program, example in call_programs():
        (plan,) = deserialize_pte_binary(program).program.execution_plan
        counts.append(len(plan.delegates))
        assert len(time_program(program, [example], threads=1, repeats=2)) == 2
    assert counts == [0, 1, 2]
