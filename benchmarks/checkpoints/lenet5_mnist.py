"""LeNet-5 on MNIST: the checkpoint, and how it is made.

TRIMPOINT_DATA=data python -m benchmarks.checkpoints.lenet5_mnist    # minutes on one core
"""

from pathlib import Path

from benchmarks.datasets import mnist
from benchmarks.models.lenet import LeNet5
from benchmarks.training import Recipe, main, restore
from safetensors.torch import load_file
from torch import nn

from trimpoint.task import Task

WEIGHTS = Path(__file__).with_suffix(".safetensors")
RECIPE = Recipe(build=LeNet5, data=mnist, cycles=(10,), lr=0.05, weight_decay=5e-4)


def model() -> nn.Module:
    """Return the trained network, in evaluation mode."""
    return restore(LeNet5(), load_file(WEIGHTS))


def task() -> Task:
    """Return its task; `certify` is the official test set."""
    return mnist().task()


if __name__ == "__main__":
    main(RECIPE, "lenet5_mnist", __doc__)
