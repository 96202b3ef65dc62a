"""Batches that repeat exactly, whatever draws random numbers."""

import random

import numpy as np
import torch

from trimpoint.recover.batches import epoch_batches, fixed_random
from trimpoint.task import Task


class Jittery(torch.utils.data.Dataset):
    """Samples that differ each time, drawing from all three global generators."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        noise = torch.rand(()) + float(np.random.rand()) + random.random()
        return torch.full((2,), float(index)) + noise, index % 2


def contents(task, seed, disturb=False):
    result = []
    for index, (x, y) in epoch_batches(task, seed):
        result.append((index, x.tolist(), y.tolist()))
        if disturb:
            torch.rand(3), np.random.rand(), random.random()
    return result


def test_same_seed_same_batches_though_others_draw_in_between():
    task = Task(train=Jittery(), batch_size=3, augment=lambda x, y, g: (x + torch.rand(x.shape, generator=g), y))
    once = contents(task, 5)
    assert [index for index, _, _ in once] == [0, 1, 2]
    assert once == contents(task, 5, disturb=True)
    assert once != contents(task, 6)


def test_global_generators_are_put_back():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(2).tolist(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with fixed_random(3):
        torch.rand(5), np.random.rand(), random.random()
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected
