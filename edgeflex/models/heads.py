"""Exit heads: small classifiers on the features where a segment ends.

A head is pooling, normalisation and a linear layer, optionally after a small convolution. Normalisation is
folded into the layers once trained, so that a finished head is at most one convolution and one linear layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.schema import Noun

if TYPE_CHECKING:
    from collections.abc import Sequence


class HeadSpec(Noun):
    """Which head stands at every exit but the last.

    ``linear`` pools the features and classifies them; ``grid`` pools maps to 2×2 instead of one value, which
    early layers need (where something is still matters there); ``conv`` first applies a 3×3 convolution of stride 2 to
    ``channels`` maps (None: as many as the features have).
    """

    kind: Literal["linear", "grid", "conv"] = "linear"
    channels: int | None = None

    @property
    def grid(self) -> int:
        """Pooled cells along each side of a map."""
        return 2 if self.kind == "grid" else 1


class ExitHead(nn.Module):
    """The layers of a finished head; ``attach`` writes their calls into a segment's graph."""

    def __init__(self, conv: nn.Conv2d | None, linear: nn.Linear, grid: int = 1) -> None:
        super().__init__()
        self.conv = conv
        self.linear = linear
        self.grid = grid

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, C, H, W], [B, T, D] or [B, D] to logits [B, classes]."""
        maps = features if self.conv is None else functional.relu(self.conv(features))
        return self.linear(pool(maps, self.grid))


def pool(features: Tensor, grid: int = 1) -> Tensor:
    """Return the mean over pixels of [B, C, H, W] or over tokens of [B, T, D]; [B, D] stays.

    With ``grid`` above 1, maps are averaged in grid × grid cells: [B, C · grid²].

    Tokens go through a four-dimensional mean over the last two axes, the one form that XNNPACK takes.
    """
    if features.dim() == 2:
        return features
    if grid > 1:
        cell = (features.shape[-2] // grid, features.shape[-1] // grid)
        return functional.avg_pool2d(features, cell).flatten(1)
    if features.dim() == 3:
        tokens, width = features.shape[1], features.shape[2]
        features = features.permute(0, 2, 1).reshape(-1, width, tokens, 1)
    return torch.mean(features, (2, 3), keepdim=True).flatten(1)


def make_head(spec: HeadSpec, feature_shape: Sequence[int], classes: int) -> ExitHead:
    """Return a head with fresh weights for features of ``feature_shape`` (without the batch).

    Raises:
        InputError: A convolution was asked for on features that are no maps, or on too small ones.
    """
    if len(feature_shape) not in {1, 2, 3}:
        raise InputError(f"features of shape {tuple(feature_shape)} cannot feed an exit head; name another stage.")
    width = int(feature_shape[-1] if len(feature_shape) < 3 else feature_shape[0])
    if spec.kind == "linear":
        return ExitHead(None, nn.Linear(width, classes))
    odd = len(feature_shape) == 3 and any(side % spec.grid for side in feature_shape[1:])
    if len(feature_shape) != 3 or min(feature_shape[1:]) < 2 or odd:
        needed = "maps of at least 2×2 with even sides" if spec.grid > 1 else "maps of at least 2×2"
        raise InputError(
            f"a {spec.kind} head needs {needed}; the stage gives shape {tuple(feature_shape)}. "
            "Use linear heads or name another stage."
        )
    if spec.grid > 1:
        return ExitHead(None, nn.Linear(width * spec.grid**2, classes), spec.grid)
    channels = spec.channels or width
    return ExitHead(nn.Conv2d(width, channels, 3, stride=2, padding=1), nn.Linear(channels, classes))


def attach(segment: fx.GraphModule, name: str, head: ExitHead, feature_shape: Sequence[int]) -> fx.GraphModule:
    """Return ``segment`` with ``head`` called ``name`` at its end: x → (features, logits).

    ``segment`` also receives the head as a child, so use the result from here on.

    Raises:
        InputError: The network already has a module of that name.
    """
    if any(child == name for child, _ in segment.named_children()):
        raise InputError(f"the network has a module named {name!r}, the name of an exit head. Rename it.")
    graph = fx.Graph()
    features = graph.graph_copy(segment.graph, {})
    if not isinstance(features, fx.Node):
        raise UnsupportedError(f"the segment before {name!r} returns several values; one tensor is needed.")
    segment.add_module(name, head)
    graph.output((features, _head_nodes(graph, name, head, features, feature_shape)))
    graph.lint()
    return fx.GraphModule(segment, graph)


def _head_nodes(graph: fx.Graph, name: str, head: ExitHead, features: fx.Node, feature_shape: Sequence[int]) -> fx.Node:
    maps = features
    if head.conv is not None:
        maps = graph.call_function(functional.relu, (graph.call_module(f"{name}.conv", (features,)),))
    if len(feature_shape) == 2:
        turned = graph.call_method("permute", (maps, 0, 2, 1))
        maps = graph.call_method("reshape", (turned, -1, int(feature_shape[1]), int(feature_shape[0]), 1))
    if head.grid > 1:
        cell = tuple(int(side) // head.grid for side in feature_shape[1:])
        maps = graph.call_method("flatten", (graph.call_function(functional.avg_pool2d, (maps, cell)), 1))
    elif len(feature_shape) > 1:
        mean = graph.call_function(torch.mean, (maps, (2, 3)), {"keepdim": True})
        maps = graph.call_method("flatten", (mean, 1))
    return graph.call_module(f"{name}.linear", (maps,))
