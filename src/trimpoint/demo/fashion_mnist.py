"""Fashion-MNIST for the demo: tensors, roles and augmentation."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from trimpoint.demo.files import Part, read
from trimpoint.score import Accuracy
from trimpoint.task import Task, cross_entropy

MEAN, STD = 0.2860, 0.3530
SELECT, CALIBRATE = 6_000, 1_000
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images in memory with their class indices; an item is `(image [channels, height, width], class index)`.

    Args:
        images: `[n, channels, height, width]`.
        labels: `[n]`.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def load_images(part: Part) -> tuple[Tensor, Tensor]:
    """Return normalised images `[n, 1, 28, 28]`, float32, and class indices `[n]`, int64.

    Args:
        part: `"train"` (60,000) or `"test"` (10,000).

    Raises:
        DataError: if the files cannot be had, are damaged or are others.
    """
    images, labels = read(part)
    x = (torch.from_numpy(images.astype(np.float32)) / 255 - MEAN) / STD
    return x.unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def split_indices(n: int = 60_000) -> dict[str, Tensor]:
    """Return which of the 60,000 images make up `select`, `calibrate` and `train`: always the same ones."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(n))
    return {
        "select": order[:SELECT],
        "calibrate": order[SELECT : SELECT + CALIBRATE],
        "train": order[SELECT + CALIBRATE :],
    }


def fashion_mnist() -> Task:
    """Return the demo's task: three roles from the 60,000 images, and the official 10,000 to certify on.

    Raises:
        DataError: if the files cannot be had, are damaged or are others.
    """
    development = LabelledImages(*load_images("train"))
    indices = split_indices()
    return Task(
        train=Subset(development, indices["train"].tolist()),
        calibrate=Subset(development, indices["calibrate"].tolist()),
        select=Subset(development, indices["select"].tolist()),
        certify=LabelledImages(*load_images("test")),
        score=Accuracy(),
        loss=cross_entropy,
        augment=augment_batch,
        batch_size=128,
    )


def augment_batch(inputs: Tensor, targets: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
    """Augment the images of a training batch (see `augment`); the targets stay."""
    return augment(inputs, generator), targets


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images left to right and shift each by up to two pixels.

    Args:
        images: `[batch, 1, height, width]`; not changed.
        generator: source of the random numbers.

    Returns:
        A new tensor of the same shape.
    """
    n, _, height, width = images.shape
    shift = torch.randint(-2, 3, (n, 2), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    rows = (torch.arange(height) + shift[:, :1]).unsqueeze(2)
    columns = (torch.arange(width) + shift[:, 1:]).unsqueeze(1)
    columns = torch.where(flip[:, None, None], width - 1 - columns, columns)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    picked = images[torch.arange(n)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    return torch.where(inside.unsqueeze(1), picked, images.amin())
