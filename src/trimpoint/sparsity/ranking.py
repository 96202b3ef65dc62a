"""The least of many numbers, exactly so many, and how many at each step of a schedule."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def least(keys: Sequence[Tensor], count: int) -> Tensor:
    """Return where the `count` least numbers of a tensor are, as booleans of its shape.

    Args:
        keys: tensors of one shape: ties in the first are settled by the second, and so on, the rest by position.
        count: how many, at least 0; more than there are numbers are all.

    Example:
        >>> least([torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3.0, 9.0, 2.0])], 2)
        tensor([False,  True,  True])
    """
    first = keys[0].reshape(-1)
    if count <= 0 or count >= len(first):
        return torch.full(keys[0].shape, count > 0, dtype=torch.bool, device=first.device)
    limit = first.kthvalue(count).values
    chosen = first < limit
    missing, tied = count - int(chosen.sum()), first == limit
    if int(tied.sum()) == missing:
        chosen |= tied
    elif len(keys) > 1:
        at = tied.nonzero().squeeze(1)
        chosen[at[least([key.reshape(-1)[at] for key in keys[1:]], missing)]] = True
    else:
        chosen |= tied & (tied.cumsum(0) <= missing)
    return chosen.reshape(keys[0].shape)


def least_of_each(keys: Sequence[Tensor], count: int, size: int) -> Tensor:
    """Return where the `count` least of every `size` consecutive numbers of the last dimension are.

    Args:
        keys: `[…, n]`, n a multiple of `size`; see `least`.
        count: how many of each, from 0 to `size`.
        size: of the runs.

    Example:
        >>> least_of_each([torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 1.0]])], 2, 4).int()
        tensor([[0, 0, 1, 1, 1, 1, 0, 0]], dtype=torch.int32)
    """
    runs = [key.reshape(-1, size) for key in keys]
    order = torch.arange(size, device=runs[0].device).expand_as(runs[0])
    for run in reversed(runs):
        order = order.gather(1, run.gather(1, order).argsort(dim=1, stable=True))
    chosen = torch.zeros_like(runs[0], dtype=torch.bool)
    return chosen.scatter_(1, order[:, :count], True).reshape(keys[0].shape)


def share_of(ratio: float, count: int) -> int:
    """Return how many of `count` weights a ratio removes: the nearest whole number, and never the last one.

    Example:
        >>> share_of(0.29, 100), share_of(0.99, 10)
        (29, 9)
    """
    return min(math.floor(ratio * count + 0.5), count - 1)


def cubic(step: int, steps: int, final: float, initial: float = 0.0) -> float:
    """Return the sparsity at a step of the cubic schedule (Zhu and Gupta 2018, equation 1).

    Example:
        >>> [round(cubic(step, 4, 0.8), 3) for step in (0, 2, 4)]
        [0.0, 0.7, 0.8]
    """
    left = 1.0 - min(max(step, 0), steps) / steps
    return final + (initial - final) * left**3


def comparable(weights: Sequence[Tensor], normalize: str) -> list[Tensor]:
    """Return magnitudes that can be ranked across layers, float64.

    Args:
        weights: of the layers.
        normalize: `none`: |w|. `l1`: |w| over the layer's mean |w|. `l2`: |w| over its root mean square. `lamp`: w²
            over the sum of the squares that are no smaller (Lee et al. 2021, equation 4).
    """
    return [_comparable(weight.detach().double().abs(), normalize) for weight in weights]


def _comparable(size: Tensor, normalize: str) -> Tensor:
    tiny = torch.finfo(torch.float64).tiny
    if normalize == "l1":
        return size / size.mean().clamp_min(tiny)
    if normalize == "l2":
        return size / size.square().mean().sqrt().clamp_min(tiny)
    if normalize == "lamp":
        squares, order = size.reshape(-1).square().sort(stable=True)
        rest = squares.flip(0).cumsum(0).flip(0)
        return torch.empty_like(squares).scatter_(0, order, squares / rest.clamp_min(tiny)).reshape(size.shape)
    return size


def least_of_all(scores: Sequence[Tensor], ratio: float) -> list[int]:
    """Return how many of each tensor are among the least of all; each tensor keeps its greatest number.

    Args:
        scores: comparable with each other.
        ratio: share of all numbers.

    Example:
        >>> least_of_all([torch.tensor([1.0, 2.0]), torch.tensor([9.0, 3.0, 8.0])], 0.4)
        [1, 1]
    """
    flat = [score.double().reshape(-1).clone() for score in scores]
    for score in flat:
        score[score.argmax()] = math.inf
    spare = sum(len(score) - 1 for score in flat)
    chosen = least([torch.cat(flat)], min(share_of(ratio, spare + len(flat)), spare))
    ends = [0, *itertools.accumulate(len(score) for score in flat)]
    return [int(chosen[start:end].sum()) for start, end in itertools.pairwise(ends)]
