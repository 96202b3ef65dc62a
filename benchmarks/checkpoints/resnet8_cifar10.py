"""ResNet-8 on CIFAR-10 encoded again as JPEG: the checkpoint, and how it is made.

    TRIMPOINT_DATA=data python -m benchmarks.checkpoints.resnet8_cifar10

trains in cycles of 10, 20, 40, … epochs until one brings less than 0.3 points on `select`; hours on one core. A run
that was killed goes on with the epoch that it was in. The committed weights are those after the first cycle, in which
the learning rate of the first nine epochs still followed longer cycles, of 25 and 13 epochs: they are undertrained, and
another run of that cycle gives slightly other ones.
"""

from pathlib import Path

from benchmarks.datasets import cifar10, crop_and_flip
from benchmarks.models.resnet8 import ResNet8
from benchmarks.training import Recipe, main, restore
from safetensors.torch import load_file
from torch import nn

from trimpoint.task import Task

WEIGHTS = Path(__file__).with_suffix(".safetensors")


def build() -> ResNet8:
    """Return the untrained network for `[batch, 3, 32, 32]`."""
    return ResNet8()


RECIPE = Recipe(
    build=build,
    data=cifar10,
    cycles=(10, 20, 40, 80, 160),
    lr=0.05,
    weight_decay=2e-4,
    batch=64,
    augment=crop_and_flip,
)


def model() -> nn.Module:
    """Return the trained network, in evaluation mode."""
    return restore(build(), load_file(WEIGHTS))


def task() -> Task:
    """Return its task; `certify` is the official test set."""
    return cifar10().task(augment=crop_and_flip)


if __name__ == "__main__":
    main(RECIPE, "resnet8_cifar10", __doc__)
