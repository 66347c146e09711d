"""Networks that edgeflex brings along: CIFAR ResNets, a small ViT, and a CNN for scikit-learn's digits.

The ResNets follow He et al. 2015, section 4.2 (arXiv:1512.03385), with option-A shortcuts; their parameter
names are those of the published ``akamaster/pytorch_resnet_cifar10`` checkpoints, which load as they are.
The ViT follows Dosovitskiy et al. 2020 (arXiv:2010.11929) with mean pooling instead of a class token; its
Linear layers have widths that are multiples of 32, so that grouped 4-bit kernels exist for all of them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeflex.errors import InputError
from edgeflex.models.training import train
from edgeflex.schema import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgeflex.images import ImageFolder
    from edgeflex.progress import Progress


def _padded_identity(in_channels: int, out_channels: int) -> Tensor:
    """Return the 1×1 kernel that copies channels into the middle of ``out_channels``, zeros around."""
    weight = torch.zeros(out_channels, in_channels, 1, 1)
    first = (out_channels - in_channels) // 2
    weight[first : first + in_channels, :, 0, 0] = torch.eye(in_channels)
    return weight


def _padded_shortcut(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return the option-A shortcut (every second pixel, zero-padded channels) as a fixed convolution.

    The same numbers as slicing and padding, but strided slices leave the XNNPACK delegate: measured on
    ResNet-56, two programs fewer and 5 % less time.
    """
    shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
    shortcut.weight = nn.Parameter(_padded_identity(in_channels, out_channels), requires_grad=False)
    return shortcut


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Sequential() if same else _padded_shortcut(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, channels, H/stride, W/stride]."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers for 32×32 images."""

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _resnet_stage(16, 16, blocks, stride=1)
        self.layer2 = _resnet_stage(16, 32, blocks, stride=2)
        self.layer3 = _resnet_stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)
        self.register_load_state_dict_pre_hook(_supply_shortcuts)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 3, 32, 32] to logits [B, classes]."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(torch.mean(out, (2, 3), keepdim=True).flatten(1))


def _supply_shortcuts(module: nn.Module, state: dict[str, Tensor], prefix: str, *_rest: object) -> None:
    # The published checkpoints hold no shortcut weights: theirs are slices and zeros.
    for name, own in module.state_dict().items():
        if ".shortcut." in name:
            state.setdefault(prefix + name, own)


def _resnet_stage(in_channels: int, channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


class Attention(nn.Module):
    """Multi-head self-attention over a fixed number of tokens."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.heads, self.tokens, self.size = heads, tokens, width // heads
        self.scale = self.size**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        heads = x.reshape(-1, self.tokens, self.heads, self.size).permute(0, 2, 1, 3)
        return heads.reshape(-1, self.tokens, self.size)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, T, width] to the same shape.

        Slices and three-dimensional matrix products instead of the fused function: XNNPACK takes these
        without leaving the delegate.
        """
        mixed, width = self.qkv(x), self.heads * self.size
        query = self._split(mixed[:, :, :width])
        key = self._split(mixed[:, :, width : 2 * width])
        value = self._split(mixed[:, :, 2 * width :])
        weights = torch.softmax(torch.bmm(query * self.scale, key.permute(0, 2, 1)), dim=-1)
        heads = torch.bmm(weights, value).reshape(-1, self.heads, self.tokens, self.size)
        return self.proj(heads.permute(0, 2, 1, 3).reshape(-1, self.tokens, width))


class Mlp(nn.Module):
    """The feed-forward half of a transformer block."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, T, width] to the same shape."""
        return self.fc2(functional.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, tokens)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, T, width] to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A vision transformer for 32×32 images: 4×4 patches, 64 tokens."""

    def __init__(self, classes: int, *, width: int = 192, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.width, self.tokens = width, 64
        self.position = nn.Parameter(torch.empty(1, self.tokens, width).normal_(std=0.02))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, self.tokens) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 3, 32, 32] to logits [B, classes]."""
        tokens = self.patch(x).reshape(-1, self.width, self.tokens).permute(0, 2, 1)
        # The contiguous operand first: the sum takes its layout, and programs need contiguous inputs.
        out = self.norm(self.blocks(self.position + tokens))
        return self.head(torch.mean(out, 1))


class DigitsBlock(nn.Module):
    """Convolution, normalisation, activation."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, channels, H/stride, W/stride]."""
        return functional.relu(self.norm(self.conv(x)))


class DigitsCnn(nn.Module):
    """A small CNN for 16×16 grey digits; six blocks, so that leaving early saves something."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        plan = ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 1), (48, 64, 2), (64, 64, 1))
        self.trunk = nn.Sequential(*(DigitsBlock(*row) for row in plan))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 1, 16, 16] to logits [B, classes]."""
        return self.head(torch.mean(self.trunk(x), (2, 3), keepdim=True).flatten(1))


@dataclass(frozen=True)
class ZooEntry:
    """How a zoo network is made and fed."""

    make: Callable[[int], nn.Module]
    classes: int
    preprocessing: Preprocessing


_CIFAR = Preprocessing(height=32, width=32, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_DIGITS = Preprocessing(height=16, width=16, channels=1, mean=(0.5,), std=(0.5,))

_ZOO = {
    "resnet20": ZooEntry(lambda n: CifarResNet(3, n), 10, _CIFAR),
    "resnet32": ZooEntry(lambda n: CifarResNet(5, n), 10, _CIFAR),
    "resnet56": ZooEntry(lambda n: CifarResNet(9, n), 10, _CIFAR),
    "vit-small": ZooEntry(SmallViT, 10, _CIFAR),
    "digits-cnn": ZooEntry(DigitsCnn, 10, _DIGITS),
}


def names() -> tuple[str, ...]:
    """Return the names that ``zoo:NAME`` takes."""
    return tuple(_ZOO)


def entry(name: str) -> ZooEntry:
    """Return how ``name`` is made and fed.

    Raises:
        InputError: No such network; the nearest names are given.
    """
    if name in _ZOO:
        return _ZOO[name]
    near = difflib.get_close_matches(name, _ZOO, n=2, cutoff=0.4)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"the zoo has no network {name!r}.{meant} It holds {', '.join(_ZOO)}.")


def build(name: str, classes: int | None = None, seed: int = 0) -> nn.Module:
    """Return network ``name`` with fresh weights drawn from ``seed``, in eval mode.

    Args:
        name: One of ``names()``.
        classes: Number of classes, or None for the network's own.
        seed: Seed of the initial weights; the caller's random state is left as it was.

    Raises:
        InputError: No such network.
    """
    found = entry(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return found.make(classes or found.classes).eval()


def preprocessing(name: str) -> Preprocessing:
    """Return how images are made into inputs of ``name``.

    Raises:
        InputError: No such network.
    """
    return entry(name).preprocessing


def write_digits(folder: Path, *, dev_share: float = 0.4) -> None:
    """Write scikit-learn's 1,797 handwritten digits as PNG under ``folder``/train and ``folder``/dev.

    The images come with scikit-learn (UCI "Optical Recognition of Handwritten Digits"); nothing is
    downloaded. Which part an image goes to follows from its pixels alone.
    """
    import hashlib

    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.clip(np.asarray(digits.images) * 16.0, 0, 255).astype(np.uint8)
    for index, (grey, label) in enumerate(zip(pixels, digits.target, strict=True)):
        place = int.from_bytes(hashlib.sha256(grey.tobytes()).digest()[:8], "big") / 2.0**64
        part = "dev" if place < dev_share else "train"
        path = folder / part / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(path)


def train_digits(
    images: ImageFolder, *, epochs: int = 12, seed: int = 0, progress: Progress | None = None
) -> nn.Module:
    """Return the digits CNN trained on ``images`` (seconds on one core), in eval mode.

    Args:
        images: Digits, as ``write_digits`` leaves them under ``train``.
        epochs: Passes over the images.
        seed: Seed of weights and order.
        progress: Told about every step.

    Raises:
        InputError: Images are corrupt.
    """
    module = build("digits-cnn", len(images.classes), seed)
    pixels = images.load(range(len(images)), preprocessing("digits-cnn"))
    train(module, pixels, images.labels, epochs=epochs, seed=seed, batch_size=64, progress=progress)
    return module
