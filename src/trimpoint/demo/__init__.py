"""The demo's network, its data and what is asked of it: `trimpoint.demo:model`, `trimpoint.demo:task` and `GOAL`."""

from pathlib import Path
from typing import TYPE_CHECKING

from trimpoint.errors import ModelError
from trimpoint.target import Goal

if TYPE_CHECKING:
    from trimpoint.demo.resnet import ResNet
    from trimpoint.task import Task

GOAL = Goal(max_drop=0.01, limits={"file_bytes": "0.1666x"})
"""As fast as can be, in a sixth of the bytes, at the price of at most one point of accuracy."""
CHECKPOINT = Path(__file__).with_name("resnet20-fashion-mnist.safetensors")


def model() -> "ResNet":
    """Return the trained ResNet-20 for Fashion-MNIST, in evaluation mode.

    Raises:
        ModelError: if its checkpoint, which belongs to this package, is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from trimpoint.demo.resnet import resnet20

    network = resnet20()
    try:
        network.load_state_dict(load_file(CHECKPOINT))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"The demo's checkpoint {CHECKPOINT} cannot be loaded: {error}.", "install trimpoint again"
        ) from error
    return network.eval()


def task() -> "Task":
    """Return the demo's task: Fashion-MNIST, scored by accuracy, certified on the official 10,000 test images.

    Raises:
        DataError: if the data cannot be had, is damaged or is another one.
    """
    from trimpoint.demo.fashion_mnist import fashion_mnist

    return fashion_mnist()
