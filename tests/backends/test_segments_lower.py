"""Segments go through ExecuTorch's XNNPACK backend, in one delegate where the network allows it."""

from __future__ import annotations

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn

from edgeflex.models import HeadSpec, Recipe, assemble, zoo


def lowered(module: nn.Module, x: Tensor) -> tuple[list[Tensor], list[str]]:
    """Return the outputs through XNNPACK and the operations left outside the delegates."""
    edge = to_edge_transform_and_lower(torch.export.export(module, (x,)), partitioner=[XnnpackPartitioner()])
    calls = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    program = Runtime.get().load_program(edge.to_executorch().buffer)
    return program.load_method("forward").execute([x]), [call for call in calls if "getitem" not in call]


@pytest.mark.parametrize(
    ("name", "stages", "kind", "outside"),
    [
        ("resnet20", ("layer1", "layer2.1"), "linear", 0),
        ("resnet20", ("layer2.0",), "conv", 0),
        ("digits-cnn", ("trunk.1", "trunk.3"), "linear", 0),
        ("vit-small", ("blocks.0", "blocks.1"), "linear", None),  # layer norms stay outside
    ],
)
def test_segments_equal_eager_through_xnnpack(
    name: str, stages: tuple[str, ...], kind: str, outside: int | None
) -> None:
    fed = zoo.preprocessing(name)
    recipe = Recipe(
        source=f"zoo:{name}",
        stages=stages,
        head=HeadSpec.model_validate({"kind": kind}),
        input_shape=(fed.channels, fed.height, fed.width),
        classes=tuple("0123456789"),
    )
    model = assemble(zoo.build(name), recipe)
    x = torch.randn(1, *recipe.input_shape, generator=torch.Generator().manual_seed(0))
    for number, segment in enumerate(model.segments[:2]):
        with torch.no_grad():
            expected = segment(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        got, calls = lowered(segment, x)
        for ours, theirs in zip(got, expected, strict=True):
            assert float((ours - theirs).abs().max()) < 1e-4, (name, number)
        if outside is not None:
            assert [call for call in calls if "delegate" not in call] == []
            assert len(calls) == 1
        x = expected[0]
