"""Which values travel as int8, what stays float to the bit, and the numbers of a net worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.schema import LayerKind, Precision
from edgeflex.transforms import (
    activation_grid,
    outputs,
    prepare,
    prepare_segment,
    quantize_weight,
    record_ranges,
)
from tests.small_nets import Chain, chain_model, dynamic, images, ranges_of, residual_model

STATIC = Precision.INT8_STATIC
DYNAMIC = Precision.INT8_DYNAMIC
QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


def rounded_values(segment: fx.GraphModule) -> set[str]:
    """Return the names of the nodes whose value is rounded to int8."""
    return {str(node.args[0]) for node in segment.graph.nodes if node.target is QUANTIZE}


def fake(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Round to the int8 grid of a range and back, in float32."""
    scale, zero_point = activation_grid(low, high)
    inverse = 1.0 / torch.tensor(scale, dtype=torch.float64)
    steps = torch.clamp(torch.round(x * inverse.float()) + zero_point, -128, 127)
    return (steps - zero_point) * torch.tensor(scale, dtype=torch.float32)


def segment_of(module: nn.Module, size: int = 8) -> tuple[fx.GraphModule, dict[str, tuple[float, float]]]:
    """Return a module traced by itself with ranges 0 to 4 for every tensor."""
    traced = fx.symbolic_trace(module.eval())
    return traced, {f"0:{node.name}": (-4.0, 4.0) for node in traced.graph.nodes}


# --- which values travel as int8 -----------------------------------------------------------------------


def test_a_residual_of_int8_layers_is_added_in_int8():
    model = residual_model()
    static = {"stem": STATIC, "block.conv1": STATIC, "block.conv2": STATIC}
    prepared = prepare_segment(model.segments[0], 0, static, ranges_of(model))
    # the head's mean is taken in int8 too, and laid flat on the mean's grid
    assert rounded_values(prepared) == {"x", "relu", "relu_1", "block_conv2", "relu_2", "mean", "flatten"}


def test_a_residual_with_one_float_branch_is_added_in_float():
    model = residual_model()
    static = {"block.conv1": STATIC, "block.conv2": STATIC}
    prepared = prepare_segment(model.segments[0], 0, static, ranges_of(model))
    # the stem's output is rounded for conv1 alone; the addition reads it as it was
    assert rounded_values(prepared) == {"relu", "relu_1", "block_conv2"}
    add = next(node for node in prepared.graph.nodes if node.name == "add")
    sources = {source.target if source.target is DEQUANTIZE else source.name for source in add.all_input_nodes}
    assert sources == {"relu", DEQUANTIZE}


def test_every_reader_of_an_int8_value_restores_it_for_itself():
    model = residual_model()
    static = {"stem": STATIC, "block.conv1": STATIC, "block.conv2": STATIC}
    prepared = prepare_segment(model.segments[0], 0, static, ranges_of(model))
    for node in prepared.graph.nodes:
        if node.target is DEQUANTIZE:
            assert len(node.users) == 1


class Pooled(nn.Module):
    """Convolution, pooling that keeps the grid, a second convolution."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.first, self.pool, self.second = nn.Conv2d(1, 4, 3), pool, nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.second(self.pool(self.first(x)))


def test_a_maximum_is_taken_on_the_grid_of_its_input_and_a_mean_on_its_own():
    for pool, same in ((nn.MaxPool2d(2), True), (nn.AdaptiveAvgPool2d(1), False)):
        traced, ranges = segment_of(Pooled(pool))
        ranges["0:pool"] = (-1.0, 1.0)
        prepared = prepare_segment(traced, 0, {"first": STATIC, "second": STATIC}, ranges)
        grids = {str(node.args[0]): node.args[1:3] for node in prepared.graph.nodes if node.target is QUANTIZE}
        assert (grids["pool"] == grids["first"]) is same


class Joined(nn.Module):
    """Two convolutions side by side, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.after = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.after(torch.cat([self.left(x), self.right(x)], dim=1))


def test_a_concatenation_is_rounded_for_the_layer_that_reads_it():
    traced, ranges = segment_of(Joined())
    prepared = prepare_segment(traced, 0, {"left": STATIC, "right": STATIC, "after": STATIC}, ranges)
    assert "cat" in rounded_values(prepared)


# --- what stays as it was --------------------------------------------------------------------------------


def test_layers_that_are_not_named_stay_float_to_the_bit():
    model = residual_model()
    x = images(4)
    prepared = prepare(model, {}, {})
    logits = model.exit_logits(x)
    assert torch.equal(outputs(prepared, x), torch.stack([torch.softmax(one, -1) for one in logits], dim=1))
    assert set(prepared.precisions.values()) == {Precision.FP32}


def test_a_precision_in_the_second_segment_leaves_the_first_exit_as_it_was():
    model = residual_model()
    x = images(4)
    found = outputs(prepare(model, {"wide": DYNAMIC}, {}), x)
    plain = outputs(prepare(model, {}, {}), x)
    assert torch.equal(found[:, 0], plain[:, 0])
    assert not torch.equal(found[:, 1], plain[:, 1])


def test_preparing_leaves_the_model_as_it_was():
    model = residual_model()
    x = images(4)
    before = model.exit_logits(x)
    layers = {layer.name: STATIC for layer in model.graph.layers}
    prepare(model, layers, ranges_of(model))
    assert all(torch.equal(one, other) for one, other in zip(model.exit_logits(x), before, strict=True))


def test_the_prepared_model_says_every_precision_and_every_input_shape():
    model = residual_model()
    prepared = prepare(model, {"wide": DYNAMIC}, {})
    assert prepared.precisions == {
        layer.name: DYNAMIC if layer.name == "wide" else Precision.FP32 for layer in model.graph.layers
    }
    assert [tuple(one.shape) for one in prepared.examples] == [(1, 1, 8, 8), (1, 32, 8, 8)]


def test_batches_do_not_show_in_the_outputs():
    model = residual_model()
    prepared = prepare(model, {"block.conv1": STATIC, "wide": STATIC}, ranges_of(model))
    x = images(10)
    assert torch.allclose(outputs(prepared, x, batch=3), outputs(prepared, x), atol=1e-6)


# --- the numbers -----------------------------------------------------------------------------------------


def test_static_int8_is_the_forward_pass_worked_out_by_hand():
    model = chain_model()
    ranges = ranges_of(model)
    x = images(16, seed=9)
    layers = dict(model.segments[0].named_modules())
    first, second, last = layers["first"], layers["second"], layers["last"]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert isinstance(last, nn.Linear)
    weight = {name: quantize_weight(layers[name].weight, STATIC).dequantize() for name in ("first", "second", "last")}
    names = [node.name for node in model.segments[0].graph.nodes]
    assert names == ["x", "first", "relu", "second", "relu_1", "mean", "flatten", "last", "output"]

    y = fake(x, *ranges["0:x"])
    y = fake(functional.relu(functional.conv2d(y, weight["first"], first.bias, padding=1)), *ranges["0:relu"])
    y = functional.relu(functional.conv2d(y, weight["second"], second.bias, stride=2, padding=1))
    y = fake(y, *ranges["0:relu_1"])
    y = fake(torch.mean(y, (2, 3), keepdim=True).flatten(1), *ranges["0:mean"])
    logits = fake(functional.linear(y, weight["last"], last.bias), *ranges["0:last"])

    prepared = prepare(model, dict.fromkeys(("first", "second", "last"), STATIC), ranges)
    assert torch.equal(outputs(prepared, x)[:, 0], torch.softmax(logits, dim=-1))


@pytest.mark.parametrize("precision", [DYNAMIC, Precision.INT4_CHANNEL, Precision.INT4_GROUP32])
def test_a_dynamic_linear_layer_rounds_weights_by_our_rule_and_each_row_of_inputs_by_its_own_range(
    precision: Precision,
):
    model = residual_model()
    segment = prepare_segment(model.segments[1], 1, {"wide": precision}, {})
    layer = model.segments[1].get_submodule("wide")
    assert isinstance(layer, nn.Linear)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-128 - low / scale)
    rows = (torch.clamp(torch.round(x / scale) + zero, -128, 127) - zero) * scale
    expected = functional.linear(rows, quantize_weight(layer.weight, precision).dequantize(), layer.bias)
    # torchao may round a row's zero point the other way; half a step of an input is the room for that
    assert torch.allclose(segment.get_submodule("wide")(x), expected, atol=float(scale.max()) * 0.5)


def test_ranges_are_the_extremes_over_all_batches_and_always_hold_zero():
    model = chain_model()
    x = torch.cat([images(3) + 5.0, images(3, seed=1) + 7.0])
    ranges = record_ranges(model, [x[:3], x[3:]])
    assert ranges["0:x"] == (0.0 if float(x.min()) > 0 else float(x.min()), float(x.max()))
    whole = record_ranges(model, [x])
    assert ranges.keys() == whole.keys()
    assert all(ranges[name] == pytest.approx(whole[name]) for name in whole)


# --- refusals ----------------------------------------------------------------------------------------------


def test_an_unknown_layer_is_named():
    with pytest.raises(InputError, match=r"no layer block\.conv9"):
        prepare(residual_model(), {"block.conv9": STATIC, "wide": DYNAMIC}, {})


def test_a_missing_range_is_named_with_what_to_do():
    model = residual_model()
    ranges = ranges_of(model)
    del ranges["0:relu_1"]
    with pytest.raises(InputError, match=r"no activation range was recorded for '0:relu_1'.*edgeflex calibrate"):
        prepare(model, {"block.conv1": STATIC}, ranges)


@pytest.mark.parametrize("endless", [(-math.inf, 1.0), (0.0, math.inf), (0.0, math.nan)])
def test_a_range_without_an_end_is_refused(endless: tuple[float, float]):
    model = residual_model()
    ranges = {**ranges_of(model), "0:relu_1": endless}
    with pytest.raises(InputError, match=r"activations of '0:relu_1' reached .* no 8-bit grid covers"):
        prepare(model, {"block.conv1": STATIC}, ranges)


@pytest.mark.parametrize("precision", [Precision.INT4_CHANNEL, Precision.INT4_GROUP32, DYNAMIC, Precision.FP16])
def test_a_convolution_is_refused_what_it_has_no_kernel_for(precision: Precision):
    with pytest.raises(UnsupportedError, match=f"'down' is a Conv2d; {precision.value} does not exist"):
        prepare(residual_model(), {"down": precision}, {})


def test_four_bits_for_a_layer_of_odd_width_are_refused():
    model = dynamic(Chain)
    assert next(layer for layer in model.graph.layers if layer.name == "last").shape.kind is LayerKind.LINEAR
    with pytest.raises(UnsupportedError, match="multiples of 32; a weight has 8"):
        prepare(model, {"last": Precision.INT4_GROUP32}, {})
