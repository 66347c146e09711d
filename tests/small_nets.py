"""Small networks that hold everything the transforms must get right, as dynamic models with fixed weights."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeflex.models import DynamicModel, Recipe, assemble
from edgeflex.transforms import record_ranges

CLASSES = ("a", "b", "c", "d")


class Residual(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return functional.relu(x + self.conv2(functional.relu(self.conv1(x))))


class ResidualNet(nn.Module):
    """Stem and residual block (where an exit can stand), then three linear layers on pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.block = Residual(32)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.wide = nn.Linear(64, 64)
        self.narrow = nn.Linear(64, 32)
        self.last = nn.Linear(32, len(CLASSES))

    def forward(self, x):
        x = self.block(functional.relu(self.stem(x)))
        x = functional.relu(self.down(x))
        x = torch.mean(x, (2, 3), keepdim=True).flatten(1)
        return self.last(functional.relu(self.narrow(functional.relu(self.wide(x)))))


class TwoBlocks(nn.Module):
    """Two residual blocks in a row; a cut between them feeds both the second's convolution and its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.first = Residual(16)
        self.second = Residual(16)
        self.last = nn.Linear(16, len(CLASSES))

    def forward(self, x):
        x = self.second(self.first(functional.relu(self.stem(x))))
        return self.last(torch.mean(x, (2, 3), keepdim=True).flatten(1))


class Chain(nn.Module):
    """Two convolutions in a row and a linear layer: the least that can be quantised throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.last = nn.Linear(8, len(CLASSES))

    def forward(self, x):
        x = functional.relu(self.second(functional.relu(self.first(x))))
        return self.last(torch.mean(x, (2, 3), keepdim=True).flatten(1))


def images(count: int, seed: int = 0, size: int = 8) -> Tensor:
    """Return float32 [count, 1, size, size]."""
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def livened(model: DynamicModel) -> DynamicModel:
    """Return ``model`` with weights that keep signals strong, so that wrong numbers show in the outputs."""
    generator = torch.Generator().manual_seed(1)
    layers = {name: layer for segment in model.segments for name, layer in segment.named_modules()}
    for name in sorted(layers):
        layer = layers[name]
        if isinstance(layer, nn.Conv2d | nn.Linear):
            gain = (2.0 if layer.out_features > len(CLASSES) else 8.0) if isinstance(layer, nn.Linear) else 2.0
            spread = (gain / layer.weight[0].numel()) ** 0.5
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) * spread)
    return model


def dynamic(module: type[nn.Module], stages: tuple[str, ...] = (), size: int = 8) -> DynamicModel:
    """Return ``module`` with weights of seed 0, cut after ``stages``, a linear head at each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = module()
    recipe = Recipe.model_validate(
        {
            "source": f"test:{module.__name__}",
            "stages": stages,
            "head": {"kind": "linear"},
            "input_shape": (1, size, size),
            "classes": CLASSES,
        }
    )
    return livened(assemble(made, recipe))


@cache
def residual_model() -> DynamicModel:
    """Return the residual network with an exit after its block."""
    return dynamic(ResidualNet, ("block",))


@cache
def chain_model() -> DynamicModel:
    """Return the chain, one segment."""
    return dynamic(Chain)


def ranges_of(model: DynamicModel) -> dict[str, tuple[float, float]]:
    """Return activation ranges over 64 inputs of the model's size."""
    return record_ranges(model, [images(64, seed=5, size=model.graph.input_shape[-1])])
