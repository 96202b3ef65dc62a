"""The best approximation of a matrix by one of low rank, where inputs do not all count the same."""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-8
"""Share of the mean variance that is added to a covariance: it decides where the data is silent, and only there."""


@dataclass(frozen=True)
class Decomposition:
    """A matrix `[out, in]` by the directions of its output, those that matter most first.

    Args:
        weight: the matrix, float64.
        left: `[out, k]`, orthonormal columns.
        values: `[k]`, descending: the error of rank r is the root of the sum of squares of `values[r:]`.
    """

    weight: Tensor
    left: Tensor
    values: Tensor

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors `first [rank, in]` and `second [out, rank]`, whose product is the best of this rank.

        Row i of the first and column i of the second have the same length, so that neither is much larger.
        """
        second = self.left[:, :rank]
        first = second.T @ self.weight
        length = first.norm(dim=1).sqrt()
        length = torch.where(length > 0, length, torch.ones_like(length))
        return first / length[:, None], second * length

    def error(self, rank: int) -> float:
        """Return the error of the best approximation of this rank."""
        return float(self.values[rank:].norm())

    def share(self, rank: int) -> float:
        """Return the share of the sum of squares that the best approximation of this rank loses."""
        total = self.error(0)
        return (self.error(rank) / total) ** 2 if total else 0.0


def decompose(weight: Tensor, metric: Tensor | None = None) -> Decomposition:
    """Decompose `weight` so that truncation minimises `‖(W − W')X‖_F`.

    With U the leading left singular vectors of `W C^½`, where C is the second moment of X, the minimum over all
    matrices of that rank is `U Uᵀ W`: nothing is inverted, so C may be singular.

    Args:
        weight: `[out, in]`.
        metric: what inputs count: their second moment `[in, in]`, a weight for each `[in]`, or all the same.

    References:
        Eckart and Young, "The approximation of one matrix by another of lower rank" (1936); for C from data: Wang et
        al., "SVD-LLM: truncation-aware singular value decomposition" (2024); for a weight for each input: Hsu et al.,
        "Language model compression with weighted low-rank factorization" (2022).
    """
    weight = weight.detach().double()
    left, values, _ = torch.linalg.svd(_weighted(weight, metric), full_matrices=False)
    return Decomposition(weight, left, values)


def regression(weight: Tensor, inputs: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return the matrix that maps inputs to targets with least squares, drawn towards `weight`.

    It minimises `‖Y − MX‖² + λ‖M − W‖²` for one sample on average, with λ the share `ridge` of the mean variance.

    Args:
        weight: W, `[out, in]`.
        inputs: covariance of X, `[in, in]`.
        cross: covariance of Y and X, `[out, in]`.
        ridge: above 0.
    """
    weight = weight.detach().double()
    damped = inputs.double() + _mean_variance(inputs) * ridge * torch.eye(len(inputs), dtype=torch.float64)
    if not bool(damped.any()):
        return weight
    change: Tensor = torch.linalg.solve(damped, (cross.double() - weight @ inputs.double()).T).T
    return weight + change


def lost_share(lost: Tensor, weight: Tensor, metric: Tensor | None = None) -> float:
    """Return the share of the sum of squares that is lost: `tr(D C Dᵀ) ÷ tr(W C Wᵀ)`, 0 where there is none to lose.

    Args:
        lost: D, a matrix `[out, in]` or a kernel.
        weight: W, likewise.
        metric: C, `[in, in]`; `None` where all inputs count the same.
    """
    sums = []
    for matrix in (lost.detach().double().flatten(1), weight.detach().double().flatten(1)):
        sums.append(float(((matrix if metric is None else matrix @ metric.double()) * matrix).sum()))
    return max(0.0, sums[0] / sums[1]) if sums[1] > 0 else 0.0


def _weighted(weight: Tensor, metric: Tensor | None) -> Tensor:
    if metric is None or not bool(metric.any()):
        return weight
    metric = metric.double()
    if metric.ndim == 1:
        scale: Tensor = (metric + RIDGE * metric.mean()).sqrt()
        return weight * scale
    return weight @ root_of(metric)


def root_of(metric: Tensor) -> Tensor:
    """Return a square root R of a second moment, `R Rᵀ = C` with the ridge added; its columns are orthogonal."""
    metric = metric.double()
    variances, directions = torch.linalg.eigh((metric + metric.T) / 2)
    root: Tensor = directions * (variances.clamp_min(0) + RIDGE * _mean_variance(metric)).sqrt()
    return root


def _mean_variance(covariance: Tensor) -> Tensor:
    mean: Tensor = covariance.double().diagonal().mean()
    return mean.clamp_min(0)
