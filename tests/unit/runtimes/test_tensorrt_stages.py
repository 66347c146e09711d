"""A stage over its contexts: the first range that holds the shapes, and nothing set that is set already."""

from __future__ import annotations

from typing import Any

import pytest

from edgeflex.errors import BundleError, DeviceError
from edgeflex.runtimes.tensorrt_stages import EngineStage
from edgeflex.schema_trt import Profile, SegmentRecipe, ShapeRange, TensorSpec


class Context:
    """What is asked of an execution context, written down."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refused: tuple[int, ...] = ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.calls.append(("shape", name, shape))
        return shape != self.refused

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.calls.append(("place", name, address))
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.calls.append(("run", stream))
        return True


class Messages:
    def __init__(self) -> None:
        self.errors: list[str] = []


def profile(name: str, least: int, most: int) -> Profile:
    shape = ShapeRange(least=(least, 4), best=(most, 4), most=(most, 4))
    return Profile(name=name, shapes={"y": shape})


RECIPE = SegmentRecipe(
    name="expert",
    onnx="stages/expert.onnx",
    onnx_sha256="0" * 64,
    engine="engines/expert.engine",
    inputs=(
        TensorSpec(name="y", dtype="float32", shape=("tokens", 4)),
        TensorSpec(name="down", dtype="uint8", shape=(4, 8)),
        TensorSpec(name="down_scales", dtype="bfloat16", shape=(4, 1)),
    ),
    outputs=(TensorSpec(name="out", dtype="float32", shape=("tokens", 4)),),
    profiles=(profile("decode", 1, 1), profile("prefill", 1, 8)),
)
PLACES = {"y": 256, "down": 512, "down_scales": 768, "out": 1024}


@pytest.fixture
def made() -> tuple[EngineStage, Context, Context]:
    decode, prefill = Context(), Context()
    return EngineStage(RECIPE, (decode, prefill), 77, Messages()), decode, prefill


def test_one_token_takes_the_first_range_and_several_the_one_that_holds_them(made):
    stage, decode, prefill = made
    stage(PLACES, {"y": (1, 4)})
    assert decode.calls == [("shape", "y", (1, 4)), *(("place", *one) for one in PLACES.items()), ("run", 77)]
    assert prefill.calls == []
    stage(PLACES, {"y": (5, 4)})
    assert prefill.calls[0] == ("shape", "y", (5, 4))
    assert len(decode.calls) == 6


def test_only_what_changed_is_set_again(made):
    stage, decode, _ = made
    stage(PLACES, {"y": (1, 4)})
    decode.calls.clear()
    stage({**PLACES, "down": 4096}, {"y": (1, 4)})
    stage(PLACES, {"y": (1, 4)})
    assert decode.calls == [("place", "down", 4096), ("run", 77), ("place", "down", 512), ("run", 77)]


def test_after_a_shape_was_refused_the_earlier_one_is_set_again(made):
    stage, _, prefill = made
    stage(PLACES, {"y": (3, 4)})
    prefill.refused = (5, 4)
    with pytest.raises(DeviceError, match=r"expert: TensorRT refuses the shape \(5, 4\) of 'y'"):
        stage(PLACES, {"y": (5, 4)})
    prefill.calls.clear()
    stage(PLACES, {"y": (3, 4)})
    assert prefill.calls == [("shape", "y", (3, 4)), ("run", 77)]


def test_shapes_that_no_range_holds_are_said(made):
    stage, decode, prefill = made
    with pytest.raises(DeviceError, match=r"expert: no range of shapes .* holds y \[9, 4\]"):
        stage(PLACES, {"y": (9, 4)})
    assert decode.calls == prefill.calls == []


def test_an_input_must_be_as_large_as_what_it_is_given(made):
    stage, _, _ = made
    stage.require_bytes("down", 32, "the codes")
    stage.require_bytes("down_scales", 8, "the scales")
    for name, size in (("down", 31), ("down_scales", 16), ("y", 16), ("up", 32)):
        with pytest.raises(BundleError, match=f"as {name!r}, and it has {size}"):
            stage.require_bytes(name, size, "it")


def test_the_most_that_an_axis_may_be_is_that_of_all_ranges(made):
    stage, _, _ = made
    assert stage.most("y", 0) == 8
    assert stage.most("down", 1) == 8
    for name, axis in (("up", 0), ("y", 2)):
        with pytest.raises(BundleError, match="no input"):
            stage.most(name, axis)


def test_a_stage_of_its_own_has_a_new_context_for_the_range_that_holds_the_shapes():
    shared, alone, asked = (Context(), Context()), Context(), []

    def another(profile: int) -> Context:
        asked.append(profile)
        return alone

    stage = EngineStage(RECIPE, shared, 77, Messages(), another)
    own = stage.own({"y": (5, 4)})
    assert asked == [1]
    own(PLACES, {"y": (5, 4)})
    assert alone.calls[-1] == ("run", 77)
    assert shared[0].calls == shared[1].calls == []
    with pytest.raises(DeviceError, match="no range of shapes"):
        own(PLACES, {"y": (9, 4)})
