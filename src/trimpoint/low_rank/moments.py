"""Means and covariances of a stream of batches, in memory that does not grow with it."""

import torch
from torch import Tensor


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


def _scatter_of(rows: Tensor, mean: Tensor) -> Tensor:
    """Return the sum of outer products of the centred rows; scaled, so that no size overflows float32."""
    centred = rows.double() - mean
    size = float(centred.abs().max())
    scaled = (centred / size if size else centred).float()
    return (scaled.T @ scaled).double() * (size * size)
