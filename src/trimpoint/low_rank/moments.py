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
        self._scatter += _product(rows, mean, rows, mean)
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


class CrossMoments:
    """Means and joint covariance of pairs of row vectors, updated batch by batch.

    Args:
        inputs: size of the first of a pair.
        outputs: size of the second.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.inputs = Moments(inputs)
        self.mean = torch.zeros(outputs, dtype=torch.float64)
        self._scatter = torch.zeros(outputs, inputs, dtype=torch.float64)

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in pairs: `[count, inputs]` and `[count, outputs]`."""
        if not len(inputs):
            return
        inputs, outputs = inputs.detach().cpu(), outputs.detach().cpu()
        before, count = self.inputs.count, len(inputs)
        means = inputs.double().mean(0), outputs.double().mean(0)
        steps = means[0] - self.inputs.mean, means[1] - self.mean
        self._scatter += _product(outputs, means[1], inputs, means[0])
        self._scatter += torch.outer(steps[1], steps[0]) * (before * count / (before + count))
        self.mean += steps[1] * (count / (before + count))
        self.inputs.update(inputs)

    @property
    def covariance(self) -> Tensor:
        """`[outputs, inputs]`, around the means."""
        return self._scatter / max(1, self.inputs.count)


def _product(one: Tensor, one_mean: Tensor, other: Tensor, other_mean: Tensor) -> Tensor:
    """Return the sum of outer products of the centred rows; scaled, so that no size overflows float32."""
    parts, scale = [], 1.0
    for rows, mean in ((one, one_mean), (other, other_mean)):
        centred = rows.double() - mean
        size = float(centred.abs().max())
        scale *= size
        parts.append((centred / size if size else centred).float())
    return (parts[0].T @ parts[1]).double() * scale
