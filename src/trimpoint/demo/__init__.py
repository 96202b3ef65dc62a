"""The demo's network and its data: `trimpoint.demo:model` and `trimpoint.demo:task`."""

from pathlib import Path
from typing import TYPE_CHECKING

from trimpoint.errors import ModelError

if TYPE_CHECKING:
    from trimpoint.demo.resnet import ResNet
    from trimpoint.task import Task

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
