"""Weights held on a grid of integers: a parametrisation of the module that has them, as masks are.

What a quantise step chose (which integers, at which scale) is part of the module's state, and the module computes with
it. Before lowering it is baked in, and the integers go to the runtime beside the weights.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimpoint.errors import SurgeryError
from trimpoint.graph.held import Held, held_by, hold_, parameter_behind
from trimpoint.graph.input_grids import rounded, slowed
from trimpoint.quantization.grid import Grid

BITS = (2, 8)
_LEAST = 1e-30


class OnGrid(Held):
    """Round weights to multiples of a scale, at most `2 ** (bits - 1) - 1` of them to either side of zero.

    In training the gradient passes rounding as if it were not there, and stops where a weight is out of range.

    Args:
        scale: of each position along dimension `axis` of the weight, or a single one, one-dimensional, positive; it
            stays of its type whatever becomes of the module, and numbers are rounded in that type.
        bits: of a code, 2 to 8.
        axis: the dimension of the output channels.
        learned: whether training learns the scales too.

    Attributes:
        scale: a buffer, or a parameter where it is learned.

    References:
        Esser, McKinstry, Bablani, Appuswamy and Modha, "Learned step size quantization" (2020), for learned scales;
        Jacob et al. (2018); Bengio, Léonard, Courville, "Estimating or propagating gradients through stochastic
        neurons for conditional computation" (2013), for the gradient.
    """

    order = 1
    scale: Tensor

    def __init__(self, scale: Tensor, bits: int, axis: int = 0, *, learned: bool = False) -> None:
        super().__init__()
        self.bits, self.axis, self.learned = bits, axis, learned
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on the grid."""
        steps, top = self._along(weight), self.top
        if self.learned:
            steps = slowed(steps, (top * weight.numel() / steps.numel()) ** -0.5)
        return (rounded(torch.clamp(weight.float() / steps, -top, top)) * steps).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the parameter for a weight that is assigned: the weight."""
        return weight

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integers of a weight, int8."""
        return torch.round(torch.clamp(weight.float() / self._along(weight), -self.top, self.top)).to(torch.int8)

    @property
    def top(self) -> int:
        """The greatest code."""
        return int(2 ** (self.bits - 1) - 1)

    def _along(self, weight: Tensor) -> Tensor:
        shape = [1] * weight.ndim
        shape[self.axis] = -1
        # A step of a learned scale beyond zero turns all signs of its weights.
        return (self.scale.abs().clamp_min(_LEAST) if self.learned else self.scale).view(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OnGrid":
        """Follow the module to another device, but not to a shorter type: codes would not be the same any more."""
        scale = self.scale.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != scale.dtype:
            self.scale.data = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Show bits and scales."""
        return f"bits={self.bits}, scales={self.scale.numel():,}"


@torch.no_grad()
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
    weight = parameter_behind(module, parameter)
    _check_fit(weight, grid.axis, grid.scale.numel() if grid.scale.ndim == 1 else 0)
    if values is not None:
        # What a mask on a schedule holds at zero may come back as it was.
        zero = (values == 0) & (cast(Tensor, getattr(module, parameter)) == 0)
        weight.copy_(torch.where(zero, weight, values.to(weight)))
    hold_(module, parameter, grid)


def put_stored_grid_(module: nn.Module, parameter: str, data: Mapping[str, int]) -> None:
    """Hold a parameter on the grid of sound JSON data, see `check_grid`, in place, with scales of one.

    Raises:
        SurgeryError: as `put_on_grid_`; before anything of the size that the data names is made.
    """
    _check_fit(parameter_behind(module, parameter), data["axis"], data["scales"])
    grid = OnGrid(torch.ones(data["scales"]), data["bits"], data["axis"], learned=bool(data["learned"]))
    put_on_grid_(module, parameter, grid)


def wrong_scales(module: nn.Module) -> list[str]:
    """Return the paths of all grids of which a scale is not finite and positive."""
    grids = [(path, part.scale) for path, part in module.named_modules() if isinstance(part, OnGrid)]
    return [path for path, scale in grids if not bool((torch.isfinite(scale) & (scale > 0)).all())]


def _check_fit(weight: Tensor, axis: int, scales: int) -> None:
    if not weight.is_floating_point():
        raise SurgeryError(f"A grid needs floating-point weights. Got {weight.dtype}.")
    if not (axis < weight.ndim and scales in (1, weight.shape[axis])):
        raise SurgeryError(
            f"A grid for {list(weight.shape)} must have one scale, or one for each position of a dimension. "
            f"Got {scales} for dimension {axis}."
        )


@torch.no_grad()
def grids_of(module: nn.Module) -> dict[str, Grid]:
    """Return the integers of all weights on grids, by the path of the module."""
    found = {}
    for path, part in module.named_modules(remove_duplicate=False):
        chain = held_by(part).get("weight")
        if chain is not None and isinstance(chain[-1], OnGrid):
            grid = chain[-1]
            codes = grid.codes(cast(Tensor, part.weight)).cpu().numpy()
            scale = grid._along(cast(Tensor, part.weight)).flatten().double().cpu().numpy()
            found[path] = Grid(codes=codes, scale=scale, axis=grid.axis, bits=grid.bits)
    return found


def check_grid(data: Any) -> str:
    """Return what is wrong with the JSON form of a grid, or `""`."""
    if not isinstance(data, Mapping) or set(data) != {"bits", "axis", "scales", "learned"}:
        return f"a grid has bits, axis, scales, and whether they are learned. Got {data!r}"
    bad = [key for key, value in data.items() if type(value) is not (bool if key == "learned" else int)]
    if bad or not (BITS[0] <= data["bits"] <= BITS[1] and 0 <= data["axis"] < 8 and 1 <= data["scales"] < 1 << 31):
        return f"it has 2 to 8 bits, a dimension and a number of scales. Got {data!r}"
    return ""


def grid_to_data(grid: OnGrid) -> dict[str, int | bool]:
    """Return the JSON form of a grid; its scales are part of the module's state."""
    return {"bits": grid.bits, "axis": grid.axis, "scales": grid.scale.numel(), "learned": grid.learned}
