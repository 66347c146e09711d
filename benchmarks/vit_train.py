"""Train the zoo's small ViT on the 20,000 CIFAR-10 JPEGs: weights for `vit_mix.py`.

python benchmarks/vit_train.py --epochs 12 --out vit-small.safetensors
"""

from __future__ import annotations

import argparse
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from edgeflex.images import open_images
from edgeflex.models import zoo
from edgeflex.models.training import train
from tests.builders import needed_data


class Ticks:
    """Progress as a line every 200 steps."""

    @contextmanager
    def task(self, title: str, total: int):
        done, start = [0], time.time()

        def advance(count: int) -> None:
            done[0] += count
            if done[0] % 200 == 0:
                print(f"{title}: {done[0]}/{total} after {time.time() - start:.0f} s", flush=True)

        yield advance

    def note(self, text: str) -> None:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = open_images(needed_data("cifar10-jpeg", "train.zip"))
    pixels = images.load(range(len(images)), zoo.preprocessing("vit-small"))
    module = zoo.build("vit-small", 10, seed=0)
    train(
        module, pixels, images.labels, epochs=arguments.epochs, seed=0, learning_rate=1e-3, weight_decay=0.05,
        augment=True, precision="bf16", progress=Ticks(),
    )  # fmt: skip
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, str(arguments.out))


if __name__ == "__main__":
    main()
