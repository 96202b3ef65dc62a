"""What a linear layer or a convolution multiplies its weights with, as matrices.

A layer is one matrix product `[outputs, inputs] × [inputs, positions]` for each of its groups. The inputs of a
convolution are ordered by kernel position, and within one by channel, so that runs of inputs are runs of channels.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations

from trimpoint.errors import not_finite_at
from trimpoint.method import Context
from trimpoint.padding import calibrate_kept, rows_of

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that multiply with their weight as it is, unless a subclass has a forward pass of its own."""

_PIECE = 1 << 22
"""Numbers that are unfolded at once, at most (a single sample may be more)."""
_MOST_PRODUCTS = 1 << 27
"""Numbers in the products that are held at once, unless a single layer needs more (1 GiB)."""


def own_forward(module: nn.Module) -> str:
    """Return why what a layer multiplies with may be something else than its weight, or `""`."""
    if any(isinstance(module, kind) and type(module).forward is kind.forward for kind in PLAIN):
        return ""
    return f"its class {type_before_parametrizations(module).__name__} has a forward pass of its own"


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight `[outputs, channels, *kernel]` as `[outputs, kernel × channels]`, channels running fastest."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Undo `as_matrix`."""
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def groups_of(module: nn.Module) -> int:
    """Return the number of groups of a layer; a linear layer is one."""
    return cast(int, getattr(module, "groups", 1))


def unfolded(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Yield the inputs of a layer as float64 matrices `[groups, positions, inputs]`, piece by piece.

    Args:
        module: linear, or a convolution over one or two dimensions.
        inputs: `[…, features]`, or `[batch, channels, *size]` with or without the batch.
    """
    inputs = inputs.detach()
    if isinstance(module, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        step = max(1, _PIECE // rows.shape[1])
        for start in range(0, len(rows), step):
            yield rows[None, start : start + step].double()
        return
    conv = cast(nn.Conv2d, module)
    dims = len(conv.kernel_size)
    batch = inputs if inputs.ndim == dims + 2 else inputs[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    kernel, stride, dilation = (
        (1,) * (2 - dims) + tuple(sizes) for sizes in (conv.kernel_size, conv.stride, conv.dilation)
    )
    expansion = math.prod(kernel) * batch[0].numel()
    step = max(1, _PIECE // max(1, expansion))
    for start in range(0, len(batch), step):
        piece = batch[start : start + step]
        padded = F.pad(piece.double(), conv._reversed_padding_repeated_twice, mode=mode)
        columns = F.unfold(padded if dims == 2 else padded[:, :, None], kernel, dilation=dilation, stride=stride)
        channels = batch.shape[1] // conv.groups
        split = columns.reshape(len(piece), conv.groups, channels, -1, columns.shape[-1])
        yield split.permute(1, 0, 4, 3, 2).reshape(conv.groups, -1, split.shape[3] * channels)


@dataclass(kw_only=True)
class InputStatistics:
    """Sums over the inputs that a layer has seen.

    Args:
        products: whether to sum XᵀX, or only its diagonal.
        positions: that were seen.
        total: XᵀX `[groups, inputs, inputs]`, or its diagonal `[groups, inputs]`, float64; `None` before the first.
        sums: of each input, `[groups, inputs]`, float64.
    """

    products: bool
    positions: int = 0
    total: Tensor | None = field(default=None, repr=False)
    sums: Tensor | None = field(default=None, repr=False)

    def add(self, module: nn.Module, inputs: Tensor) -> None:
        """Add the inputs of one call of the layer."""
        for piece in unfolded(module, inputs):
            more = piece.transpose(1, 2) @ piece if self.products else piece.square().sum(1)
            self.total = more if self.total is None else self.total + more
            self.sums = piece.sum(1) if self.sums is None else self.sums + piece.sum(1)
            self.positions += piece.shape[1]


def gather(ctx: Context, modules: Mapping[str, nn.Module], *, products: bool) -> Iterator[tuple[str, InputStatistics]]:
    """Yield what layers see of the calibration data, one after the other; padding does not count.

    Layers whose products do not fit into a gigabyte together are seen in more than one pass over the data, each through
    the model as it is then.

    Args:
        ctx: of the step.
        modules: path → linear layer or convolution.
        products: see `InputStatistics`.

    Raises:
        DataError: if the task has no calibration data, or a layer reads what is not finite.
    """
    for paths in _parts(modules, products):
        found = {path: InputStatistics(products=products) for path in paths}

        def see(path: str, module: nn.Module, value: Tensor, kept: Tensor | None, into: Any = found) -> None:
            into[path].add(module, rows_of(value, kept) if isinstance(module, nn.Linear) else value)

        calibrate_kept(ctx, see, paths)
        for path in paths:
            seen = found.pop(path)
            if seen.total is not None and not bool(torch.isfinite(seen.total).all()):
                raise not_finite_at(path)
            yield path, seen


def _parts(modules: Mapping[str, nn.Module], products: bool) -> list[list[str]]:
    """Return the paths, in their order, in parts whose statistics fit into memory together."""
    parts: list[list[str]] = []
    used = math.inf
    for path, module in modules.items():
        inputs = cast(Tensor, module.weight)[0].numel()
        need = groups_of(module) * inputs ** (2 if products else 1)
        if used + need > _MOST_PRODUCTS:
            parts.append([])
            used = 0
        parts[-1].append(path)
        used += need
    return parts
