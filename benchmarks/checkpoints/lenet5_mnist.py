"""LeNet-5 on MNIST: the checkpoint, and how it is made.

TRIMPOINT_DATA=data python -m benchmarks.checkpoints.lenet5_mnist    # minutes on one core
"""

from pathlib import Path
from typing import Any

import torch
from benchmarks.datasets import crop_and_flip, mnist
from benchmarks.models.lenet import LeNet5
from benchmarks.training import Recipe, main, restore
from safetensors.torch import load_file
from torch import Tensor, nn

from trimpoint.task import Task

WEIGHTS = Path(__file__).with_suffix(".safetensors")


def shifted(inputs: Tensor, targets: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
    """Shift each image `[batch, 1, 28, 28]` by up to two pixels, each way."""
    return crop_and_flip(inputs, targets, generator, pad=2, flipped=0.0)


RECIPE = Recipe(build=LeNet5, data=mnist, cycles=(20,), lr=0.05, weight_decay=5e-4, augment=shifted)


def model() -> nn.Module:
    """Return the trained network, in evaluation mode."""
    return restore(LeNet5(), load_file(WEIGHTS))


def task() -> Task:
    """Return its task; `certify` is the official test set."""
    return mnist().task(augment=shifted)


if __name__ == "__main__":
    main(RECIPE, "lenet5_mnist", __doc__)
