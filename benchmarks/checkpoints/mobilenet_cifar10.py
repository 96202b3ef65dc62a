"""MobileNet of quarter width on CIFAR-10 encoded again as JPEG, at 96 pixels: the checkpoint, and how it is made.

    TRIMPOINT_DATA=data python -m benchmarks.checkpoints.mobilenet_cifar10

trains in cycles of 4, 8, 16 and 32 epochs, fewer if one brings less than 0.3 points on `select`; an hour and a half on
one core. A run that was killed goes on with the epoch that it was in. The images carry no more detail at 96 pixels than
at 32: what the size gives is the amount of work per layer that such networks have in use; width and size are those of
MLPerf Tiny's visual wake words.
"""

from pathlib import Path
from typing import Any

import torch
from benchmarks.datasets import cifar10, crop_and_flip
from benchmarks.models.mobilenet import MobileNet
from benchmarks.training import Recipe, main, restore
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from trimpoint.task import Task

WEIGHTS = Path(__file__).with_suffix(".safetensors")
SIZE = 96


def build() -> MobileNet:
    """Return the untrained network for `[batch, 3, 96, 96]`."""
    return MobileNet(0.25)


def enlarge(images: Tensor) -> Tensor:
    """Bring images `[batch, 3, 32, 32]` to `[batch, 3, 96, 96]`, bilinearly."""
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Make a batch of samples and enlarge its images."""
    images, labels = default_collate(samples)
    return enlarge(images), labels


def crop_flip_enlarged(inputs: Tensor, targets: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
    """Shift enlarged images by up to 12 pixels and flip half of them."""
    return crop_and_flip(inputs, targets, generator, pad=12)


RECIPE = Recipe(
    build=build,
    data=cifar10,
    cycles=(4, 8, 16, 32),
    lr=0.1,
    weight_decay=2e-4,
    augment=crop_and_flip,
    prepare=enlarge,
    precision="bfloat16",
)


def model() -> nn.Module:
    """Return the trained network, in evaluation mode."""
    return restore(build(), load_file(WEIGHTS))


def task() -> Task:
    """Return its task on images of 96 pixels; `certify` is the official test set."""
    return cifar10().task(collate=collate, augment=crop_flip_enlarged)


if __name__ == "__main__":
    main(RECIPE, "mobilenet_cifar10", __doc__)
