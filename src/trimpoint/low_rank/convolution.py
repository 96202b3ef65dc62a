"""Decompositions of convolution kernels: over channels (Tucker-2), and over the two sides of the kernel (spatial)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimpoint.low_rank.decomposition import RIDGE, decompose, regression, root_of


@dataclass(frozen=True)
class TuckerFactors:
    """A kernel as a small kernel between two changes of channels.

    Args:
        inlet: `[rank_in, in]`.
        core: `[rank_out, rank_in, *kernel]`.
        outlet: `[out, rank_out]`.
    """

    inlet: Tensor
    core: Tensor
    outlet: Tensor

    def kernel(self) -> Tensor:
        """Return the kernel that they make, `[out, in, *kernel]`."""
        return torch.einsum("or,rs...,si->oi...", self.outlet, self.core, self.inlet)


@dataclass(frozen=True)
class SpatialFactors:
    """A two-dimensional kernel as a column followed by a row.

    Args:
        column: `[rank, in, height, 1]`.
        row: `[out, rank, 1, width]`.
    """

    column: Tensor
    row: Tensor

    def kernel(self) -> Tensor:
        """Return the kernel that they make, `[out, in, height, width]`."""
        return torch.einsum("rih,orw->oihw", self.column[..., 0], self.row[:, :, 0])


def unfolded(kernel: Tensor, dim: int) -> Tensor:
    """Return the kernel as a matrix with one row for each position along `dim`."""
    return kernel.detach().double().movedim(dim, 0).flatten(1)


class Tucker:
    """The decompositions of a kernel over its input and output channels, for any pair of ranks.

    Without a metric it is the higher-order singular value decomposition, whose squared error is at most the sum of both
    tails. With one, the outlet is the best for the outputs, the inlet the best for the channels of the inputs, and the
    core is then fitted to both with least squares.

    Args:
        kernel: `[out, in, *kernel]`.
        metric: second moment of what the kernel is multiplied with, `[in · kernel, in · kernel]`.

    References:
        De Lathauwer, De Moor and Vandewalle, "A multilinear singular value decomposition" (2000); Kim et al.,
        "Compression of deep convolutional neural networks for fast and low power mobile applications" (2016); for
        outputs instead of weights Zhang et al., "Accelerating very deep convolutional networks for classification and
        detection" (2016).
    """

    values: tuple[Tensor, Tensor]
    """Singular values of the unfoldings along inputs and outputs, weighted by the metric."""

    def __init__(self, kernel: Tensor, metric: Tensor | None = None) -> None:
        self.kernel = kernel.detach().double()
        self.metric = None if metric is None else metric.double()
        inputs = unfolded(kernel, 1)
        outlet = decompose(unfolded(kernel, 0), metric)
        if self.metric is None:
            readers, values, _ = torch.linalg.svd(inputs, full_matrices=False)
        else:
            root = root_of(channel_moment(self.metric, len(inputs)))
            directions, values, _ = torch.linalg.svd(root.T @ inputs, full_matrices=False)
            readers = torch.linalg.qr(torch.linalg.solve(root.T, directions))[0]
        self._readers, self._outlet, self.values = readers, outlet.left, (values, outlet.values)

    def at(self, rank_in: int, rank_out: int) -> TuckerFactors:
        """Return the factors of two ranks; of no more channels than the core can use."""
        out, channels, *size = self.kernel.shape
        positions = math.prod(size)
        rank_in, rank_out = min(rank_in, rank_out * positions), min(rank_out, rank_in * positions)
        reader, outlet = _leading(self._readers, rank_in, channels).T, _leading(self._outlet, rank_out, out)
        wanted = outlet.T @ self.kernel.flatten(1)
        core = torch.einsum("ocp,rc->orp", wanted.reshape(rank_out, channels, positions), reader).flatten(1)
        if self.metric is not None:
            half = torch.einsum("rc,cpx->rpx", reader, self.metric.reshape(channels, positions, -1)).flatten(0, 1)
            inputs = torch.einsum("xcp,rc->xrp", half.reshape(-1, channels, positions), reader).flatten(1)
            core = regression(core, inputs, wanted @ half.T, RIDGE)
        core = core.reshape(rank_out, rank_in, *size)
        scale = _unit(core.norm()) ** (1 / 3)
        return TuckerFactors(reader * scale, core / scale**2, outlet * scale)


def tucker2(kernel: Tensor, rank_in: int, rank_out: int, metric: Tensor | None = None) -> TuckerFactors:
    """Decompose a kernel over its channels with two ranks, see `Tucker`."""
    return Tucker(kernel, metric).at(rank_in, rank_out)


def channel_moment(metric: Tensor, channels: int) -> Tensor:
    """Return the second moment of the channels alone, `[in, in]`: the mean over the positions of the kernel."""
    positions = len(metric) // channels
    blocks = metric.double().reshape(channels, positions, channels, positions)
    return blocks.diagonal(dim1=1, dim2=3).mean(-1)


class Spatial:
    """The decompositions of a two-dimensional kernel into a column and a row, for any rank; the best of that rank.

    With a metric the row is then fitted with least squares to the outputs, given the column.

    Args:
        kernel: `[out, in, height, width]`.
        metric: second moment of what the kernel is multiplied with, `[in · kernel, in · kernel]`.

    References:
        Jaderberg, Vedaldi and Zisserman, "Speeding up convolutional neural networks with low rank expansions" (2014),
        scheme 2, in the closed form of Tai et al., "Convolutional neural networks with low-rank regularization" (2016).
    """

    def __init__(self, kernel: Tensor, metric: Tensor | None = None) -> None:
        self.kernel = kernel.detach().double()
        self.metric = None if metric is None else metric.double()
        self._found = decompose(side_by_side(kernel))

    def at(self, rank: int) -> SpatialFactors:
        """Return the factors with `rank` channels between them."""
        out, channels, height, width = self.kernel.shape
        first, second = self._found.at(rank)
        row = second.reshape(out, width, rank).permute(0, 2, 1)
        if self.metric is not None:
            metric = self.metric.reshape(channels * height, width, -1)
            half = torch.einsum("rk,kwx->rwx", first, metric).flatten(0, 1)
            inputs = torch.einsum("xkw,rk->xrw", half.reshape(len(half), -1, width), first).flatten(1)
            cross = self.kernel.flatten(1) @ half.T
            row = regression(row.flatten(1), inputs, cross, RIDGE).reshape(out, rank, width)
        return SpatialFactors(first.reshape(rank, channels, height, 1), row[:, :, None])


def spatial(kernel: Tensor, rank: int, metric: Tensor | None = None) -> SpatialFactors:
    """Decompose a two-dimensional kernel into a column and a row, see `Spatial`."""
    return Spatial(kernel, metric).at(rank)


def side_by_side(kernel: Tensor) -> Tensor:
    """Return the matrix `[out · width, in · height]` whose rank is that of the spatial decomposition."""
    out, channels, height, width = kernel.shape
    return kernel.detach().double().permute(0, 3, 1, 2).reshape(out * width, channels * height)


def _leading(directions: Tensor, rank: int, size: int) -> Tensor:
    """Return the first directions, `[size, rank]`; all of them as the identity."""
    return torch.eye(size, dtype=torch.float64) if rank == size else directions[:, :rank]


def _unit(value: Tensor) -> Tensor:
    return value if bool(value > 0) else torch.ones_like(value)
