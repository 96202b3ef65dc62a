"""Weights held on a grid of integers: a parametrisation of the module that has them, as masks are.

What a quantise step chose (which integers, at which scale) is part of the module's state, and the module computes with
it. Before lowering it is baked in, and the integers go to the runtime beside the weights.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimpoint.errors import SurgeryError
from trimpoint.graph.held import Held, chain_of, held_by
from trimpoint.quantization.grid import Grid

BITS = (2, 8)


class OnGrid(Held):
    """Round weights to multiples of a scale, at most `2 ** (bits - 1) - 1` of them to either side of zero.

    In training the gradient passes rounding as if it were not there, and stops where a weight is out of range.

    Args:
        scale: of each position along dimension `axis` of the weight, or a single one, one-dimensional, positive.
        bits: of a code, 2 to 8.
        axis: the dimension of the output channels.

    Attributes:
        scale: a buffer.

    References:
        Jacob et al. (2018); Bengio, Léonard, Courville, "Estimating or propagating gradients through stochastic
        neurons for conditional computation" (2013), for the gradient.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, bits: int, axis: int = 0) -> None:
        super().__init__()
        self.bits, self.axis = bits, axis
        self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on the grid."""
        steps, top = self._along(weight), self.top
        inside = torch.clamp(weight / steps, -top, top)
        codes = inside + (torch.round(inside) - inside).detach()
        return codes * steps

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the parameter for a weight that is assigned: the weight."""
        return weight

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integers of a weight, int8."""
        return torch.round(torch.clamp(weight / self._along(weight), -self.top, self.top)).to(torch.int8)

    @property
    def top(self) -> int:
        """The greatest code."""
        return int(2 ** (self.bits - 1) - 1)

    def _along(self, weight: Tensor) -> Tensor:
        shape = [1] * weight.ndim
        shape[self.axis] = -1
        return self.scale.to(weight.dtype).view(shape)

    def extra_repr(self) -> str:
        """Show bits and scales."""
        return f"bits={self.bits}, scales={self.scale.numel():,}"


def put_on_grid_(module: nn.Module, parameter: str, grid: OnGrid, values: Tensor | None = None) -> None:
    """Hold a parameter of a module on a grid, in place; it keeps its identity, a grid that it had gives way.

    Args:
        module: that has the parameter.
        parameter: its name.
        grid: with as many scales as the parameter has output channels, or one.
        values: that the parameter takes before.

    Raises:
        SurgeryError: if the module has no such parameter, or the grid does not fit it.
    """
    held = parameter in held_by(module)
    weight = cast(Tensor | None, chain_of(module, parameter).original if held else module._parameters.get(parameter))
    if weight is None or (parametrize.is_parametrized(module, parameter) and not held):
        raise SurgeryError(f"A {type(module).__name__} has no plain parameter {parameter!r} to hold on a grid.")
    if not (grid.axis < weight.ndim and grid.scale.numel() in (1, weight.shape[grid.axis]) and grid.scale.ndim == 1):
        raise SurgeryError(
            f"A grid for {list(weight.shape)} must have one scale, or one for each position of a dimension. "
            f"Got {list(grid.scale.shape)} for dimension {grid.axis}."
        )
    if values is not None:
        weight.data.copy_(values)
    grid.train(module.training)
    if not held:
        with torch.no_grad():
            parametrize.register_parametrization(module, parameter, grid)
        return
    chain = chain_of(module, parameter)
    if isinstance(chain[-1], OnGrid):
        chain[len(chain) - 1] = grid
    else:
        chain.append(grid)


@torch.no_grad()
def grids_of(module: nn.Module) -> dict[str, Grid]:
    """Return the integers of all weights on grids, by the path of the module."""
    found = {}
    for path, part in module.named_modules(remove_duplicate=False):
        chain = held_by(part).get("weight")
        if chain is not None and isinstance(chain[-1], OnGrid):
            grid = chain[-1]
            codes = grid.codes(cast(Tensor, part.weight)).cpu().numpy()
            found[path] = Grid(codes=codes, scale=grid.scale.double().cpu().numpy(), axis=grid.axis, bits=grid.bits)
    return found


def check_grid(data: Any) -> str:
    """Return what is wrong with the JSON form of a grid, or `""`."""
    if not isinstance(data, Mapping) or set(data) != {"bits", "axis", "scales"}:
        return f"a grid has bits, axis and scales. Got {data!r}"
    bad = [key for key, value in data.items() if type(value) is not int]
    if bad or not (BITS[0] <= data["bits"] <= BITS[1] and 0 <= data["axis"] < 8 and 1 <= data["scales"] < 1 << 31):
        return f"it has 2 to 8 bits, a dimension and a number of scales. Got {data!r}"
    return ""


def grid_to_data(grid: OnGrid) -> dict[str, int]:
    """Return the JSON form of a grid; its scales are part of the module's state."""
    return {"bits": grid.bits, "axis": grid.axis, "scales": grid.scale.numel()}


def grid_from_data(data: Mapping[str, int]) -> OnGrid:
    """Return the grid of sound JSON data, see `check_grid`, with scales of one."""
    return OnGrid(torch.ones(data["scales"], dtype=torch.float32), data["bits"], data["axis"])
