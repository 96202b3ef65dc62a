"""Means and covariances of a stream of batches, in memory that does not grow with it."""

import torch
from torch import Tensor

_ROUNDING = 1e-24


class Moments:
    """Mean and covariance of row vectors, updated batch by batch.

    Args:
        size: of a row.

    References:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), for the merging of batches.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self._scatter = torch.zeros(size, size, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Take in rows, `[count, size]`; products are taken in float32 after centring and scaling."""
        if not len(rows):
            return
        rows = rows.detach().cpu()
        mean = rows.double().mean(0)
        self._scatter += _scatter_of(rows, mean)
        step = mean - self.mean
        total = self.count + len(rows)
        self._scatter += torch.outer(step, step) * (self.count * len(rows) / total)
        self.mean += step * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """`[size, size]`, around the mean; the mean of squares, not an unbiased estimate."""
        return self._scatter / max(1, self.count)

    @property
    def second_moment(self) -> Tensor:
        """`[size, size]`, around zero."""
        return self.covariance + torch.outer(self.mean, self.mean)

    def metric(self, centred: bool) -> Tensor | None:
        """Return the covariance or the second moment; `None` where it is zero but for rounding, and so says nothing."""
        found = self.covariance if centred else self.second_moment
        return None if bool(found.trace() <= _ROUNDING * self.mean.square().sum()) else found


def shrunk(moment: Tensor, count: float) -> Tensor:
    """Draw a covariance or second moment towards a multiple of the identity: the oracle approximating shrinkage (OAS).

    How far is a closed form of the moment and the number of rows: the limit of the iteration towards the least expected
    squared error, for normally distributed rows. From one row or few it is all the way.

    Args:
        moment: `[size, size]`.
        count: number of independent rows that it is the mean of.

    References:
        Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation" (2010), equation 23.

    Example:
        >>> shrunk(torch.diag(torch.tensor([2.0, 0.0])), 1)
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    moment = moment.double()
    size = len(moment)
    total, squares = float(moment.trace()), float(moment.square().sum())
    spread = (count + 1 - 2 / size) * (squares - total**2 / size)
    share = 1.0 if spread <= 0 else min(1.0, ((1 - 2 / size) * squares + total**2) / spread)
    return (1 - share) * moment + share * total / size * torch.eye(size, dtype=torch.float64)


def _scatter_of(rows: Tensor, mean: Tensor) -> Tensor:
    """Return the sum of outer products of the centred rows; scaled, so that no size overflows float32."""
    centred = rows.double() - mean
    size = float(centred.abs().max())
    scaled = (centred / size if size else centred).float()
    return (scaled.T @ scaled).double() * (size * size)
