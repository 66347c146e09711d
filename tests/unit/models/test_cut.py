"""Cutting: segments compose to the network, names stay, unclean cuts are refused with the reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.models import cut, graph_from_module, zoo
from edgeflex.schema import LayerKind

SHAPES = {"resnet20": (3, 32, 32), "vit-small": (3, 32, 32), "digits-cnn": (1, 16, 16)}


def warmed(name: str) -> nn.Module:
    """Return a zoo network whose BatchNorms hold other statistics than zero and one."""
    module = zoo.build(name, seed=1)
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = torch.randn(part.num_features, generator=generator) * 0.1
            part.running_var = torch.rand(part.num_features, generator=generator) + 0.5
    return module


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_segments_compose_to_the_network(name: str, count: int) -> None:
    module = warmed(name)
    traced = cut.trace(module, SHAPES[name])
    segments = cut.cut(traced, cut.default_stages(cut.stages(traced), count))
    assert len(segments) == count + 1
    x = torch.randn(3, *SHAPES[name], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, value = module(x), x
        for segment in segments:
            value = segment(value)
    assert float((value - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_clean_cuts_compose_to_the_network(data: st.DataObject) -> None:
    module = warmed("resnet20")
    traced = cut.trace(module, SHAPES["resnet20"])
    places = {stage.node: stage.name for stage in cut.stages(traced)}
    picked = data.draw(st.lists(st.sampled_from(range(len(places))), min_size=1, max_size=4, unique=True))
    names = [list(places.values())[index] for index in sorted(picked)]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        value = x
        for segment in cut.cut(traced, names):
            value = segment(value)
        assert torch.allclose(value, module(x), atol=1e-5, rtol=1e-4)


def test_tracing_leaves_the_network_as_it_was() -> None:
    module = warmed("digits-cnn")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cut.trace(module, SHAPES["digits-cnn"])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_layers_keep_their_names_and_batchnorm_is_gone() -> None:
    traced = cut.trace(warmed("resnet20"), SHAPES["resnet20"])
    segments = cut.cut(traced, ["layer1", "layer2"])
    names = [layer.name for number, part in enumerate(segments) for layer in cut.describe(part, number)[0]]
    convolutions = [n for n, part in zoo.build("resnet20").named_modules() if isinstance(part, nn.Conv2d)]
    assert sorted(names) == sorted([*convolutions, "linear"])
    assert not any(isinstance(part, nn.BatchNorm2d) for segment in segments for part in segment.modules())


def test_stages_are_in_order_with_rising_shares() -> None:
    found = cut.stages(cut.trace(zoo.build("resnet20"), SHAPES["resnet20"]))
    shares = [stage.mac_share for stage in found]
    assert shares == sorted(shares)
    names = [stage.name for stage in found]
    assert names.index("layer1") < names.index("layer2.0") < names.index("layer3")
    assert "layer1.0.conv1" not in names  # inside a residual two tensors are alive


def test_default_stages_split_the_work_evenly() -> None:
    found = cut.stages(cut.trace(zoo.build("vit-small"), SHAPES["vit-small"]))
    assert cut.default_stages(found, 2) == ("blocks.1", "blocks.3")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["layer9"], "near"),
        (["layer1.0.conv1"], "more than one tensor"),
        (["linear"], "after the last layer"),
        (["layer2", "layer1"], "in the order"),
        (["layer1", "layer1.2"], "different places"),
        (["nope", "layer2.0.conv1"], "2 faults"),
    ],
)
def test_stages_that_cannot_be_cut_are_refused_with_the_reason(names: list[str], reason: str) -> None:
    traced = cut.trace(zoo.build("resnet20"), SHAPES["resnet20"])
    with pytest.raises(InputError, match=reason):
        cut.cut(traced, names)


@pytest.mark.parametrize("count", [0, 99])
def test_more_exits_than_places_are_refused(count: int) -> None:
    traced = cut.trace(zoo.build("digits-cnn"), SHAPES["digits-cnn"])
    with pytest.raises(InputError, match="places to cut"):
        cut.default_stages(cut.stages(traced), count)


def test_macs_and_rows_are_those_counted_by_hand() -> None:
    (segment,) = cut.cut(cut.trace(zoo.build("vit-small"), SHAPES["vit-small"]), ())
    layers = {layer.name: layer.shape for layer in cut.describe(segment, 0)[0]}
    assert layers["patch"].macs == 192 * 3 * 16 * 64
    assert layers["blocks.0.attn.qkv"].rows == 64
    assert layers["blocks.0.attn.qkv"].macs == 192 * 576 * 64
    assert layers["head"].rows == 1
    assert layers["head"].kind is LayerKind.LINEAR


def test_edges_follow_the_tensors_of_a_residual_block() -> None:
    (segment,) = cut.cut(cut.trace(zoo.build("resnet20"), SHAPES["resnet20"]), ())
    edges = {(edge.source, edge.target): edge.elements for edge in cut.describe(segment, 0)[1]}
    assert edges["", "conv1"] == 3 * 32 * 32
    assert edges["conv1", "layer1.0.conv1"] == 16 * 32 * 32
    assert edges["layer1.0.conv1", "layer1.0.conv2"] == 16 * 32 * 32
    assert edges["conv1", "layer1.0.conv2"] == 16 * 32 * 32  # the skip meets the sum
    assert edges["layer3.2.conv2", "linear"] == 64
    assert edges["linear", ""] == 10
    # input; into and inside 9 blocks; 7 plain skips; 2 shortcut layers with 2 edges each; into and out of linear
    assert len(edges) == 1 + 9 + 9 + 7 + 4 + 2


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Unlike(nn.Module):
    """Uses one convolution twice, once with and once without the norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.norm.running_mean = torch.tensor([0.3, -0.2])
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(self.conv(x))).mean((2, 3)))
        return logits


def test_weights_applied_by_function_calls_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="linear"):
        cut.trace(Functional(), (4,))


def test_a_forward_that_branches_on_values_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot be traced"):
        cut.trace(Branching(), (4,))


def test_a_wrong_input_shape_is_named() -> None:
    with pytest.raises(InputError, match=r"\(3, 16, 16\)"):
        cut.trace(zoo.build("digits-cnn"), (3, 16, 16))


def test_a_convolution_used_twice_is_not_folded() -> None:
    module = Unlike().eval()
    (segment,) = cut.cut(cut.trace(module, (2, 4, 4)), ())
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(segment(x), module(x), atol=1e-6)
    with pytest.raises(UnsupportedError, match="conv are called more than once"):
        graph_from_module(module, source="own:unlike", input_shape=(2, 4, 4))


def test_a_sequential_trunk_offers_its_children() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    traced = cut.trace(module, (1, 8, 8))
    assert cut.default_stages(cut.stages(traced), 1) == ("2",)
    assert len(cut.cut(traced, ["2", "4"])) == 3
