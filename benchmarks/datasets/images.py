"""MNIST and CIFAR-10 (encoded again as JPEG) in fixed roles, with the usual augmentation of the latter."""

import io
from typing import Any

import numpy as np
import torch
from benchmarks.datasets.archives import Arrays, Source, decoded, read
from benchmarks.datasets.roles import Roles, make_roles
from numpy.typing import NDArray
from torch import Tensor

from trimpoint.demo.files import parse_idx
from trimpoint.errors import DataError

MNIST = Source(
    name="mnist.zip",
    digest="5ca8df6f5f1ba7fdd52aa5e4b4d9097ab1d076d6300d8cd6f9d5171e38d42906",
    holds="the four official IDX files, unpacked: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…",
    origin="https://yann.lecun.com/exdb/mnist/",
)
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
CIFAR10 = Source(
    name="cifar10-jpeg.zip",
    digest="50ad6748b6e21784d69d60c380dbc30b9b8ec21336aff1d7db52f1607abb89c4",
    holds="the 60,000 images as JPEG: train/<class>/nnnn.jpg, test/<class>/nnnn.jpg",
    origin="https://www.cs.toronto.edu/~kriz/cifar.html, encoded again",
)
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def mnist() -> Roles:
    """Return MNIST: images `[1, 28, 28]`, float32, normalised, and digits.

    The 60,000 training images are shared out as `train` 54,000, `select` 5,000 and `calibrate` 1,000; `certify` is the
    official 10,000.

    Raises:
        DataError: if `mnist.zip` is missing, damaged or another one.
    """
    members = read(MNIST)
    parts = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = parse_idx(members[f"{prefix}-images-idx3-ubyte"], f"{prefix}-images-idx3-ubyte")
        labels = parse_idx(members[f"{prefix}-labels-idx1-ubyte"], f"{prefix}-labels-idx1-ubyte")
        x = (torch.from_numpy(images.astype(np.float32)) / 255 - MNIST_MEAN) / MNIST_STD
        parts[part] = (x.unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))
    return make_roles(*parts["train"], {"select": 5_000, "calibrate": 1_000}, parts["test"])


def cifar10() -> Roles:
    """Return CIFAR-10, encoded again as JPEG: images `[3, 32, 32]`, float32, normalised, and class indices.

    The 50,000 training images are shared out as `train` 44,000, `select` 5,000 and `calibrate` 1,000; `certify` is the
    official 10,000. A network loses about ten points of accuracy on these files against the original ones.

    Raises:
        DataError: if `cifar10-jpeg.zip` is missing, damaged or another one.
    """
    arrays = decoded(CIFAR10, decode_cifar10)
    parts = {part: (normalise(arrays[f"{part}_images"]), _labels(arrays, part)) for part in ("train", "test")}
    return make_roles(*parts["train"], {"select": 5_000, "calibrate": 1_000}, parts["test"])


def decode_cifar10(members: dict[str, bytes]) -> Arrays:
    """Decode the JPEG files: images `[n, 32, 32, 3]`, uint8, and class indices `[n]`, of `train` and `test`.

    Raises:
        DataError: if a file is no colour image of 32 × 32 pixels.
    """
    from PIL import Image

    found: Arrays = {}
    for part in ("train", "test"):
        names = sorted(name for name in members if name.startswith(f"{part}/"))
        images = np.empty((len(names), 32, 32, 3), np.uint8)
        for index, name in enumerate(names):
            with Image.open(io.BytesIO(members[name])) as image:
                if (image.mode, image.size) != ("RGB", (32, 32)):
                    raise DataError(f"{name} must be RGB, 32 × 32 pixels. Got {image.mode}, {image.size}.")
                images[index] = np.asarray(image)
        found[f"{part}_images"] = images
        found[f"{part}_labels"] = np.array([CIFAR10_CLASSES.index(name.split("/")[1]) for name in names])
    return found


def normalise(images: NDArray[Any]) -> Tensor:
    """Return images `[n, height, width, 3]`, uint8, as `[n, 3, height, width]`, float32, of mean 0 and variance 1."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return x.div_(255).sub_(mean).div_(std)


def _labels(arrays: Arrays, part: str) -> Tensor:
    return torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64))


def crop_and_flip(
    inputs: Tensor, targets: Any, generator: torch.Generator, pad: int = 4, flipped: float = 0.5
) -> tuple[Tensor, Any]:
    """Shift each image by up to `pad` pixels, filling with zeros, and flip some of them left to right.

    Args:
        inputs: `[batch, channels, height, width]`; not changed.
        targets: returned as they are.
        generator: source of the random numbers.
        pad: most pixels of a shift, each way.
        flipped: share of the images that are flipped, about.
    """
    n, _, height, width = inputs.shape
    shift = torch.randint(0, 2 * pad + 1, (n, 2), generator=generator)
    flip = torch.rand(n, generator=generator) < flipped
    rows = torch.arange(height) + shift[:, :1]
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + shift[:, 1:]
    padded = torch.nn.functional.pad(inputs, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    picked = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous(), targets
