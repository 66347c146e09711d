"""Which memory a plan's bytes are of: the profile knows whether a GPU has one of its own."""

from __future__ import annotations

import pytest

from edgeflex.flow.decide import memory_of
from edgeflex.profiles import load
from edgeflex.registry import NVIDIA_DEVICES


@pytest.mark.parametrize("name", NVIDIA_DEVICES)
def test_a_card_has_its_own_memory_and_a_board_shares_its(name: str):
    assert memory_of(load(name), "tensorrt") == ("gpu" if name.startswith("rtx") else "shared")
    for backend in ("executorch", "onnx"):
        assert memory_of(load(name), backend) is None


def test_a_profile_that_does_not_say_names_no_memory():
    unknown = load("rtx-4090").model_copy(update={"unified_memory": None})
    assert memory_of(unknown, "tensorrt") is None
