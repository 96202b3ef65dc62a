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


def tucker2(kernel: Tensor, rank_in: int, rank_out: int, metric: Tensor | None = None) -> TuckerFactors:
    """Decompose a kernel over its input and output channels.

    Without a metric it is the higher-order singular value decomposition, whose squared error is at most the sum of both
    tails. With one, the outlet is the best for the outputs, the inlet the best for the channels of the inputs, and the
    core is then fitted to both with least squares.

    Args:
        kernel: `[out, in, *kernel]`.
        rank_in: number of channels that go into the core; no more are made than it can use.
        rank_out: number of channels that come out of the core, likewise.
        metric: second moment of what the kernel is multiplied with, `[in · kernel, in · kernel]`.

    References:
        De Lathauwer, De Moor and Vandewalle, "A multilinear singular value decomposition" (2000); Kim et al.,
        "Compression of deep convolutional neural networks for fast and low power mobile applications" (2016); for
        outputs instead of weights Zhang et al., "Accelerating very deep convolutional networks for classification and
        detection" (2016).
    """
    kernel = kernel.detach().double()
    positions = kernel[0, 0].numel()
    rank_in, rank_out = min(rank_in, rank_out * positions), min(rank_out, rank_in * positions)
    inlet, outlet = _leading(kernel, 1, rank_in), _leading(kernel, 0, rank_out)
    if metric is not None:
        return _observed_tucker2(kernel, inlet, outlet, metric)
    core = torch.einsum("oi...,or,is->rs...", kernel, outlet, inlet)
    scale = _unit(core.norm()) ** (1 / 3)
    return TuckerFactors(inlet.T * scale, core / scale**2, outlet * scale)


def _observed_tucker2(kernel: Tensor, inlet: Tensor, outlet: Tensor, metric: Tensor) -> TuckerFactors:
    out, channels, *size = kernel.shape
    (rank_in, rank_out), matrix = (inlet.shape[1], outlet.shape[1]), kernel.flatten(1)
    if rank_out < out:
        outlet = decompose(matrix, metric).left[:, :rank_out]
    reader = inlet.T
    if rank_in < channels:
        root = root_of(channel_moment(metric, channels))
        directions = torch.linalg.svd(root.T @ unfolded(kernel, 1), full_matrices=False)[0][:, :rank_in]
        reader = torch.linalg.qr(torch.linalg.solve(root.T, directions))[0].T
    positions = math.prod(size)
    expand = torch.kron(reader.contiguous(), torch.eye(positions, dtype=torch.float64))
    start = outlet.T @ matrix @ expand.T
    core = regression(start, expand @ metric @ expand.T, outlet.T @ matrix @ metric @ expand.T, RIDGE)
    core = core.reshape(rank_out, rank_in, *size)
    scale = _unit(core.norm()) ** (1 / 3)
    return TuckerFactors(reader * scale, core / scale**2, outlet * scale)


def channel_moment(metric: Tensor, channels: int) -> Tensor:
    """Return the second moment of the channels alone, `[in, in]`: the mean over the positions of the kernel."""
    positions = len(metric) // channels
    blocks = metric.double().reshape(channels, positions, channels, positions)
    return blocks.diagonal(dim1=1, dim2=3).mean(-1)


def spatial(kernel: Tensor, rank: int, metric: Tensor | None = None) -> SpatialFactors:
    """Decompose a two-dimensional kernel into a column and a row, with `rank` channels between; the best of that rank.

    With a metric the row is then fitted with least squares to the outputs, given the column.

    Args:
        kernel: `[out, in, height, width]`.
        rank: number of channels between them.
        metric: second moment of what the kernel is multiplied with, `[in · kernel, in · kernel]`.

    References:
        Jaderberg, Vedaldi and Zisserman, "Speeding up convolutional neural networks with low rank expansions" (2014),
        scheme 2, in the closed form of Tai et al., "Convolutional neural networks with low-rank regularization" (2016).
    """
    out, channels, height, width = kernel.shape
    first, second = decompose(side_by_side(kernel)).at(rank)
    row = second.reshape(out, width, rank).permute(0, 2, 1)
    if metric is not None:
        expand = torch.kron(first.contiguous(), torch.eye(width, dtype=torch.float64))
        matrix = kernel.detach().double().flatten(1)
        cross = matrix @ metric @ expand.T
        row = regression(row.reshape(out, rank * width), expand @ metric @ expand.T, cross, RIDGE)
        row = row.reshape(out, rank, width)
    return SpatialFactors(first.reshape(rank, channels, height, 1), row[:, :, None])


def side_by_side(kernel: Tensor) -> Tensor:
    """Return the matrix `[out · width, in · height]` whose rank is that of the spatial decomposition."""
    out, channels, height, width = kernel.shape
    return kernel.detach().double().permute(0, 3, 1, 2).reshape(out * width, channels * height)


def _leading(kernel: Tensor, dim: int, rank: int) -> Tensor:
    """Return the leading left singular vectors of an unfolding, `[size of dim, rank]`; all of them as the identity."""
    matrix = unfolded(kernel, dim)
    if rank == len(matrix):
        return torch.eye(rank, dtype=torch.float64)
    left: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
    return left[:, :rank]


def _unit(value: Tensor) -> Tensor:
    return value if bool(value > 0) else torch.ones_like(value)
