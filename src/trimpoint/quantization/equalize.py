"""What the channels of weights have to do with each other: for equalising them."""

from typing import cast

import torch
from torch import Tensor, nn

from trimpoint.parts import Member


def folded_scale(norm: nn.Module) -> Tensor:
    """Return by what a batch norm in evaluation mode multiplies its channels, float64 `[channels]`."""
    norm = cast(nn.BatchNorm2d, norm)
    variance = cast(Tensor, norm.running_var).double()
    return norm.weight.detach().double() / (variance + norm.eps).sqrt()


def sizes_along(tensor: Tensor, member: Member, size: int) -> Tensor:
    """Return the largest magnitude of each unit of a group in one of its tensors, `[size]`, float64; 0 of none."""
    rows = tensor.detach().double().abs().movedim(member.dim, 0).flatten(1)
    return sizes_of(rows.amax(1) if rows.numel() else rows.new_zeros(len(rows)), member, size)


def sizes_of(largest: Tensor, member: Member, size: int) -> Tensor:
    """Return the largest of the numbers at the positions of each unit of a group, `[size]`."""
    return torch.stack([largest[list(member.indices[unit])].max() for unit in range(size)])
