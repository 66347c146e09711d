"""Fit ResNet-56 to CIFAR-10 as JPEG, with supervision along its depth: weights for `resnet56_exits.py`.

The published checkpoint lost ten points to JPEG and its middle layers are not made to be read early. Trunk and
throw-away heads are trained together on the 20,000 training images (SGD, cosine schedule, random crop and
flip, each head also taught by the end of the network); only the trunk is kept.

    python benchmarks/resnet56_tune.py --epochs 24 --out resnet56-jpeg.safetensors
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from edgeflex.images import open_images
from edgeflex.models import load_module, zoo
from tests.builders import needed_data

EXITS = (4, 8, 11, 14, 17, 20)
WEIGHTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.2)
BATCH = 128


class Head(nn.Module):
    """Reads a 2 x 2 summary of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4 * channels)
        self.linear = nn.Linear(4 * channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(functional.adaptive_avg_pool2d(x, 2).flatten(1)))


def logits(trunk: nn.Module, heads: nn.ModuleList, x: torch.Tensor) -> list[torch.Tensor]:
    x = functional.relu(trunk.bn1(trunk.conv1(x)))
    found = []
    for number, block in enumerate([*trunk.layer1, *trunk.layer2, *trunk.layer3]):
        x = block(x)
        if number in EXITS:
            found.append(heads[EXITS.index(number)](x))
    return [*found, trunk.linear(x.mean((2, 3)))]


def loss_of(outputs: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    outputs = [one.float() for one in outputs]
    teacher = functional.softmax(outputs[-1].detach() / 2, 1)
    total = outputs[-1].new_zeros(())
    for weight, one in zip(WEIGHTS, outputs, strict=True):
        total = total + weight * functional.cross_entropy(one, labels)
    for weight, one in zip(WEIGHTS, outputs[:-1], strict=False):
        student = functional.log_softmax(one / 2, 1)
        total = total + 2 * weight * functional.kl_div(student, teacher, reduction="batchmean")
    return total


def augmented(x: torch.Tensor) -> torch.Tensor:
    padded = functional.pad(x, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, len(x)))
    crops = [padded[i, :, down[i] : down[i] + 32, right[i] : right[i] + 32] for i in range(len(x))]
    out = torch.stack(crops)
    flip = torch.rand(len(x)) < 0.5
    out[flip] = out[flip].flip(-1)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images = open_images(needed_data("cifar10-jpeg", "train.zip"))
    pixels = torch.from_numpy(images.load(range(len(images)), zoo.preprocessing("resnet56")))
    labels = torch.from_numpy(np.asarray(images.labels))
    trunk = load_module("zoo:resnet56", needed_data("resnet-cifar10", "resnet56-4bfd9763.th"))
    channels = [16 if exit_ < 9 else 32 if exit_ < 18 else 64 for exit_ in EXITS]
    heads = nn.ModuleList(Head(one) for one in channels)
    trunk.to(memory_format=torch.channels_last)
    groups = [{"params": trunk.parameters(), "lr": 0.02}, {"params": heads.parameters(), "lr": 0.1}]
    optimiser = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rates = [group["lr"] for group in optimiser.param_groups]
    steps, step, start = arguments.epochs * (len(images) // BATCH), 0, time.time()
    for epoch in range(arguments.epochs):
        trunk.train()
        heads.train()
        order = torch.randperm(len(images))
        for first in range(0, len(images) - BATCH + 1, BATCH):
            warm = min(1.0, (step + 1) / 50)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            chosen = order[first : first + BATCH]
            x = augmented(pixels[chosen]).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = logits(trunk, heads, x)
            loss = loss_of(outputs, labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
        print(f"epoch {epoch + 1}/{arguments.epochs}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)
    state = {name: value.contiguous() for name, value in trunk.state_dict().items()}
    save_file(state, str(arguments.out))


if __name__ == "__main__":
    main()
