"""Training batches that are the same each time they are asked for, whatever in the user's data draws random numbers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from trimpoint.task import Batch, Task


def mix(*numbers: int) -> int:
    """Return a seed of 32 bits made of several numbers, well spread.

    Example:
        >>> mix(0, 1) == mix(0, 1), mix(0, 1) == mix(1, 0)
        (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def fixed_random(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python inside, and put them back afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def epoch_batches(task: Task, seed: int) -> Iterator[tuple[int, Batch]]:
    """Yield the numbered batches of one epoch, in an order and with an augmentation fixed by `seed`.

    Transforms inside the data set may draw from the global generators of torch, NumPy or Python: they are seeded anew
    for each batch, so that a batch does not depend on what else was drawn in between.
    """
    stream = task.training_batches(seed)
    index = 0
    while True:
        with fixed_random(mix(seed, index)):
            batch = next(stream, None)
        if batch is None:
            return
        yield index, batch
        index += 1
