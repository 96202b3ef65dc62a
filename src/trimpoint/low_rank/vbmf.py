"""The rank of a matrix under noise, found by variational Bayes: no parameter is to be chosen.

The global analytic solution of empirical variational Bayesian matrix factorisation keeps the components whose singular
value exceeds a threshold that depends on the shape and the variance of the noise, and estimates that variance by
minimising the free energy, which is a function of one variable.

References:
    Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
    factorization", Journal of Machine Learning Research 14 (2013), theorem 2, corollary 1 and theorem 3.
"""

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GRID, _SWEEPS = 400, 60
_FLOOR, _TINY = 1e-12, 1e-300


def vbmf_rank(matrix: Tensor) -> int:
    """Return how many components of `matrix` stand out of the noise: 0 for noise alone, or for zero."""
    squares = np.sort(torch.linalg.svdvals(matrix.detach().double()).square().numpy())[::-1]
    rows, columns = sorted(matrix.shape)
    if not squares[0] > 0:
        return 0
    variance = noise_variance(squares, columns)
    return int((squares > columns * variance * vbmf_threshold(rows / columns)).sum())


@cache
def vbmf_threshold(ratio: float) -> float:
    """Return the threshold of `γ² / (M σ²)`: singular value γ, longer side M, variance of the noise σ².

    Args:
        ratio: shorter side ÷ longer side, in (0, 1].

    Example:
        >>> round(vbmf_threshold(1.0), 2) > (1 + 1) ** 2
        True
    """

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    low, high = 1e-9, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if phi(middle) + phi(middle / ratio) > 0 else (low, middle)
    return (1 + low) * (1 + ratio / low)


def noise_variance(squares: NDArray[np.float64], longer: int) -> float:
    """Return the variance of the noise at which the free energy is least; rounding counts as noise.

    Args:
        squares: all squared singular values, descending.
        longer: the longer side of the matrix.
    """
    shorter = len(squares)
    ratio = shorter / longer
    threshold = vbmf_threshold(ratio)
    most = max(0, min(math.ceil(shorter / (1 + ratio)) - 1, shorter - 1))
    lowest = max(squares[most] / threshold, squares[most:].mean(), squares[0] * _FLOOR, _TINY) / longer
    highest = max(squares.sum() / (shorter * longer), lowest)
    grid = np.geomspace(lowest, highest, _GRID)
    energies = [_free_energy(squares / (longer * variance), ratio, threshold) for variance in grid]
    best = int(np.argmin(energies))
    low, high = math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, _GRID - 1)])
    share = (math.sqrt(5) - 1) / 2
    for _ in range(_SWEEPS):
        one, other = high - share * (high - low), low + share * (high - low)
        left, right = (_free_energy(squares / (longer * math.exp(at)), ratio, threshold) for at in (one, other))
        low, high = (low, other) if left < right else (one, high)
    return math.exp((low + high) / 2)


def _free_energy(x: NDArray[np.float64], ratio: float, threshold: float) -> float:
    """Return the free energy of all components, up to a constant; `x` is `γ² / (M σ²)`."""
    kept = x[x > threshold]
    half = kept - (1 + ratio)
    tau = (half + np.sqrt(half**2 - 4 * ratio)) / 2
    gain = np.log1p(tau) + ratio * np.log1p(tau / ratio) - tau
    return float((x - np.log(np.maximum(x, _TINY))).sum() + gain.sum())
