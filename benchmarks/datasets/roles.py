"""Four disjoint roles of one source of data, the same ones always."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from trimpoint.task import Task


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Samples `(inputs, class index)` in four roles; `roles.train.tensors` gives them as two tensors.

    Args:
        train: for training and recovery.
        calibrate: for ranges and importances.
        select: for choosing between candidates.
        certify: for the last comparison only.
    """

    train: TensorDataset
    calibrate: TensorDataset
    select: TensorDataset
    certify: TensorDataset

    def task(self, **more: Any) -> Task:
        """Return the classification task on this data: accuracy and cross-entropy; `more` are fields of `Task`."""
        return Task.classification(None, self.select, self.certify, **more).with_(
            train=self.train, calibrate=self.calibrate
        )


def even_split(labels: NDArray[np.integer], sizes: Mapping[str, int], seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Split samples so that each class is shared out evenly; what `sizes` leaves becomes `train`.

    Args:
        labels: class index of each sample, `[n]`.
        sizes: role → number of samples; a role's number in a class is its fair share,
            give or take two.
        seed: of the permutation.

    Returns:
        role → indices of its samples, in random order.

    Example:
        >>> parts = even_split(np.arange(100) % 10, {"select": 20, "calibrate": 10})
        >>> {role: len(part) for role, part in parts.items()}
        {'select': 20, 'calibrate': 10, 'train': 70}
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    # The rank of a sample within its class, as a share of the class, orders all so that every prefix is balanced.
    share = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    balanced = order[np.argsort(share[order], kind="stable")]
    parts: dict[str, NDArray[np.int64]] = {}
    start = 0
    for role, size in sizes.items():
        parts[role] = rng.permutation(balanced[start : start + size])
        start += size
    return parts | {"train": rng.permutation(balanced[start:])}


def make_roles(
    inputs: Tensor,
    labels: Tensor,
    sizes: Mapping[str, int],
    test: tuple[Tensor, Tensor],
    strata: Tensor | None = None,
) -> Roles:
    """Return the roles of a data set: `calibrate`, `select` and `train` by `even_split`, `certify` as given.

    Args:
        inputs: of all samples but those to certify on.
        labels: their class indices.
        sizes: role → number of samples.
        test: inputs and labels to certify on.
        strata: what is shared out evenly, where that is not the labels.
    """
    kinds = (labels if strata is None else strata).numpy()
    parts = {role: torch.from_numpy(part) for role, part in even_split(kinds, sizes).items()}
    data = {role: TensorDataset(inputs[part], labels[part]) for role, part in parts.items()}
    return Roles(certify=TensorDataset(*test), **data)
