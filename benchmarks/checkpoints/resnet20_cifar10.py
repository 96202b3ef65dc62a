"""ResNet-20 on CIFAR-10 encoded again as JPEG: the checkpoint, and how it is made.

    TRIMPOINT_DATA=data python -m benchmarks.checkpoints.resnet20_cifar10

trains in cycles of 10, 20, 40, … epochs until one brings less than 0.3 points on `select`; hours on one core. A run
that was killed goes on with the epoch that it was in.
"""

from pathlib import Path

from benchmarks.datasets import cifar10, crop_and_flip
from benchmarks.training import Recipe, main, restore
from safetensors.torch import load_file
from torch import nn

from trimpoint.demo.resnet import ResNet, resnet20
from trimpoint.task import Task

WEIGHTS = Path(__file__).with_suffix(".safetensors")


def build() -> ResNet:
    """Return the untrained network for `[batch, 3, 32, 32]`."""
    return resnet20(channels=3)


RECIPE = Recipe(
    build=build,
    data=cifar10,
    cycles=(10, 20, 40, 80, 160),
    lr=0.1,
    augment=crop_and_flip,
    precision="bfloat16",
)


def model() -> nn.Module:
    """Return the trained network, in evaluation mode."""
    return restore(build(), load_file(WEIGHTS))


def task() -> Task:
    """Return its task; `certify` is the official test set."""
    return cifar10().task(augment=crop_and_flip)


if __name__ == "__main__":
    main(RECIPE, "resnet20_cifar10", __doc__)
