"""Weights held on a grid of integers: a parametrisation of the module that has them, as masks are.

What a quantise step chose (which integers, at which scale) is part of the module's state, and the module computes with
it. Before lowering it is baked in, and the integers go to the runtime beside the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimpoint.errors import SurgeryError
from trimpoint.graph.held import Held, held_by, hold_, parameter_behind
from trimpoint.graph.input_grids import rounded, slowed
from trimpoint.graph.signs import OnSigns
from trimpoint.quantization.grid import Grid, GroupGrid

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
        steps, top = self._along(weight), self._tops(weight)
        if self.learned:
            steps = slowed(steps, (self.top * weight.numel() / steps.numel()) ** -0.5)
        return (rounded(torch.clamp(weight.float() / steps, -top, top)) * steps).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the parameter for a weight that is assigned: the weight."""
        return weight

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integers of a weight, int8."""
        top = self._tops(weight)
        return torch.round(torch.clamp(weight.float() / self._along(weight), -top, top)).to(torch.int8)

    @property
    def top(self) -> int:
        """The greatest code."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 2 * self.top + 1

    def _tops(self, weight: Tensor) -> Tensor:
        """Return the greatest codes, in a shape that broadcasts."""
        return torch.tensor(float(self.top), device=weight.device)

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


class OnGates(OnGrid):
    """Round the weights of a recurrent layer, those of each gate to a number of bits of its own.

    Args:
        scale: of each row, one-dimensional, positive.
        gates: bits of each gate, whose rows follow each other and are equally many.
    """

    def __init__(self, scale: Tensor, gates: Sequence[int]) -> None:
        super().__init__(scale, max(gates))
        self.gates = tuple(gates)

    def _tops(self, weight: Tensor) -> Tensor:
        tops = torch.tensor([2.0 ** (bits - 1) - 1 for bits in self.gates], device=weight.device)
        return tops.repeat_interleave(weight.shape[0] // len(self.gates)).view(-1, *[1] * (weight.ndim - 1))

    def extra_repr(self) -> str:
        """Show the bits of each gate."""
        return f"gates={self.gates}, scales={self.scale.numel():,}"


class OnGroups(Held):
    """Round a matrix to multiples of a scale around a zero point, both of their own for each run of its inputs.

    In training the gradient passes rounding as if it were not there, and stops where a weight is out of range.

    Args:
        scale: `[outputs, groups]`, positive; it stays of its type whatever becomes of the module.
        zero: `[outputs, groups]`, whole numbers from 0 to `2 ** bits - 1`, of the scale's type.
        bits: of a code, 2 to 8; codes are 0 to `2 ** bits - 1`.
        group: inputs that share a scale; the last group may have fewer.
        factor: by which the weights of each input are divided before they are rounded and multiplied afterwards,
            `[inputs]`, positive.

    Attributes:
        scale: a buffer, as `zero` and `factor` are.

    References:
        Lin et al., "AWQ: activation-aware weight quantization for LLM compression and acceleration" (2023), for factors
        of inputs.
    """

    order = 1
    scale: Tensor
    zero: Tensor
    factor: Tensor

    def __init__(self, scale: Tensor, zero: Tensor, bits: int, group: int, factor: Tensor) -> None:
        super().__init__()
        self.bits, self.group = bits, group
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("factor", factor)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on the grid."""
        scale, zero = self._along(self.scale), self._along(self.zero)
        inside = torch.clamp(weight.float() / self.factor / scale + zero, 0, self.top)
        codes = inside + (torch.round(inside) - inside).detach()
        return ((codes - zero) * scale * self.factor).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the parameter for a weight that is assigned: the weight."""
        return weight

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integers of a weight, uint8."""
        places = weight.float() / self.factor / self._along(self.scale) + self._along(self.zero)
        return torch.round(torch.clamp(places, 0, self.top)).to(torch.uint8)

    @property
    def top(self) -> int:
        """The greatest code."""
        return int(2**self.bits - 1)

    @property
    def levels(self) -> int:
        """The number of codes."""
        return self.top + 1

    def _along(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.group, 1)[:, : self.factor.numel()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OnGroups":
        """Follow the module to another device, but not to a shorter type: codes would not be the same any more."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            if old is not None and cast(Tensor, getattr(self, name)).dtype != old.dtype:
                setattr(self, name, old.to(cast(Tensor, getattr(self, name)).device))
        return self

    def extra_repr(self) -> str:
        """Show bits and groups."""
        return f"bits={self.bits}, group={self.group}, scales={self.scale.numel():,}"


@torch.no_grad()
def put_on_grid_(
    module: nn.Module, parameter: str, grid: OnGrid | OnGroups | OnSigns, values: Tensor | None = None
) -> None:
    """Hold a parameter of a module on a grid, in place; it keeps its identity, a grid that it had gives way.

    Args:
        module: that has the parameter.
        parameter: its name.
        grid: with as many scales as the parameter has output channels, or one; or one for each group of inputs.
        values: that the parameter takes before.

    Raises:
        SurgeryError: if the module has no such parameter, or the grid does not fit it.
    """
    weight = parameter_behind(module, parameter)
    if isinstance(grid, OnGroups):
        shape = _groups_in(weight, grid.group)
        if not (list(grid.scale.shape) == list(grid.zero.shape) == shape and grid.factor.shape == weight.shape[1:]):
            raise SurgeryError(f"A grid for {list(weight.shape)} in groups of {grid.group} must have scales {shape}.")
    elif isinstance(grid, OnGates):
        _check_gates(weight, grid.scale.numel(), len(grid.gates))
    elif isinstance(grid, OnSigns):
        _check_fit(weight, grid.axis, grid.scales)
    else:
        _check_fit(weight, grid.axis, grid.scale.numel() if grid.scale.ndim == 1 else 0)
    if values is not None:
        # What a mask on a schedule holds at zero may come back as it was.
        zero = (values == 0) & (cast(Tensor, getattr(module, parameter)) == 0)
        weight.copy_(torch.where(zero, weight, values.to(weight)))
    hold_(module, parameter, grid)


def put_stored_grid_(module: nn.Module, parameter: str, data: Mapping[str, Any]) -> None:
    """Hold a parameter on the grid of sound JSON data, see `check_grid`, in place, with scales of one.

    Raises:
        SurgeryError: as `put_on_grid_`; before anything of the size that the data names is made.
    """
    weight = parameter_behind(module, parameter)
    if "group" in data:
        shape = _groups_in(weight, data["group"])
        ones = (torch.ones(shape), torch.zeros(shape), data["bits"], data["group"], torch.ones(weight.shape[1]))
        return put_on_grid_(module, parameter, OnGroups(*ones))
    if "gates" in data:
        gates = cast(Sequence[int], data["gates"])
        _check_gates(weight, data["scales"], len(gates))
        return put_on_grid_(module, parameter, OnGates(torch.ones(data["scales"]), gates))
    _check_fit(weight, data["axis"], data["scales"])
    if "signs" in data:
        signs = OnSigns(data["signs"], 0.0, data["scales"], data["axis"], learned=bool(data["learned"]))
        return put_on_grid_(module, parameter, signs)
    grid = OnGrid(torch.ones(data["scales"]), data["bits"], data["axis"], learned=bool(data["learned"]))
    return put_on_grid_(module, parameter, grid)


def wrong_scales(module: nn.Module) -> list[str]:
    """Return the paths of all grids of which a scale is not finite and positive, or a zero point is no code."""
    grids = [(path, part) for path, part in module.named_modules() if isinstance(part, (OnGrid, OnGroups, OnSigns))]
    return [path for path, grid in grids if not _sound(grid)]


def _sound(grid: OnGrid | OnGroups | OnSigns) -> bool:
    if isinstance(grid, OnSigns):
        return grid.sound()
    scales = [grid.scale, grid.factor] if isinstance(grid, OnGroups) else [grid.scale]
    free = isinstance(grid, OnGrid) and grid.learned  # of which the magnitude counts
    sound = all(bool((torch.isfinite(each) & (free | (each > 0))).all()) for each in scales)
    if isinstance(grid, OnGroups):
        sound = sound and bool(((grid.zero == grid.zero.round()) & (grid.zero >= 0) & (grid.zero <= grid.top)).all())
    return sound


def _groups_in(weight: Tensor, group: int) -> list[int]:
    """Return the shape of the scales of a matrix in groups."""
    if not (weight.is_floating_point() and weight.ndim == 2 and group <= weight.shape[1]):
        raise SurgeryError(
            f"A grid in groups of {group} inputs needs a floating-point matrix at least as wide. Got {weight.dtype} of "
            f"shape {list(weight.shape)}."
        )
    return [weight.shape[0], -(-weight.shape[1] // group)]


def _check_gates(weight: Tensor, scales: int, gates: int) -> None:
    _check_fit(weight, 0, scales)
    if weight.shape[0] != scales or scales % gates:
        raise SurgeryError(
            f"A grid of {gates} gates for {list(weight.shape)} must have a scale for each of its rows, equally many a "
            f"gate. Got {scales}."
        )


def _check_fit(weight: Tensor, axis: int, scales: int) -> None:
    if not weight.is_floating_point():
        raise SurgeryError(f"A grid needs floating-point weights. Got {weight.dtype}.")
    if not (axis < weight.ndim and scales in (1, weight.shape[axis])):
        raise SurgeryError(
            f"A grid for {list(weight.shape)} must have one scale, or one for each position of a dimension. "
            f"Got {scales} for dimension {axis}."
        )


@torch.no_grad()
def grids_of(module: nn.Module) -> dict[str, Grid | GroupGrid]:
    """Return the integers of all weights on grids, by the path of the module; those of gates by that of the weight."""
    found: dict[str, Grid | GroupGrid] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        chains = held_by(part)
        for name, steps in chains.items():
            if isinstance(gates := steps[-1], OnGates):
                weight = cast(Tensor, getattr(part, name))
                codes, scale = gates.codes(weight).cpu().numpy(), gates.scale.double().cpu().numpy()
                found[f"{path}.{name}".lstrip(".")] = Grid(codes=codes, scale=scale, axis=0, bits=gates.bits)
        chain = chains.get("weight")
        if chain is not None and isinstance(chain[-1], OnGrid):
            grid = chain[-1]
            codes = grid.codes(cast(Tensor, part.weight)).cpu().numpy()
            scale = grid._along(cast(Tensor, part.weight)).flatten().double().cpu().numpy()
            found[path] = Grid(codes=codes, scale=scale, axis=grid.axis, bits=grid.bits)
        elif chain is not None and isinstance(chain[-1], OnGroups):
            grouped = chain[-1]
            factor = None if bool((grouped.factor == 1).all()) else grouped.factor.cpu().numpy()
            found[path] = GroupGrid(
                codes=grouped.codes(cast(Tensor, part.weight)).cpu().numpy(),
                scale=grouped.scale.cpu().numpy(),
                zero=grouped.zero.to(torch.uint8).cpu().numpy(),
                group=grouped.group,
                bits=grouped.bits,
                factor=factor,
            )
    return found


def check_grid(data: Any) -> str:
    """Return what is wrong with the JSON form of a grid, or `""`."""
    if isinstance(data, Mapping) and set(data) == {"gates", "scales"}:
        return _check_gate_bits(data["gates"], data["scales"])
    signs = isinstance(data, Mapping) and set(data) == {"signs", "axis", "scales", "learned"}
    kinds = ({"bits", "axis", "scales", "learned"}, {"bits", "group"})
    if not signs and not (isinstance(data, Mapping) and set(data) in kinds):
        return f"a grid has bits or signs, axis, scales and whether they are learned, or bits and group. Got {data!r}"
    bad = [key for key, value in data.items() if type(value) is not (bool if key == "learned" else int)]
    if "group" in data:
        sound = not bad and BITS[0] <= data["bits"] <= BITS[1] and 1 <= data["group"] < 1 << 31
        return "" if sound else f"it has 2 to 8 bits and a size of its groups. Got {data!r}"
    count, (low, high) = ("signs", (2, 3)) if signs else ("bits", BITS)
    if bad or not (low <= data[count] <= high and 0 <= data["axis"] < 8 and 1 <= data["scales"] < 1 << 31):
        return f"it has {low} to {high} {count}, a dimension and a number of scales. Got {data!r}"
    return ""


def _check_gate_bits(gates: Any, scales: Any) -> str:
    sound = isinstance(gates, (list, tuple)) and 1 <= len(gates) <= 8
    sound = sound and all(type(bits) is int and BITS[0] <= bits <= BITS[1] for bits in gates)
    sound = sound and type(scales) is int and 1 <= scales < 1 << 31
    return "" if sound else f"it has 2 to 8 bits for each of 1 to 8 gates, and a number of scales. Got {gates!r}"


def grid_to_data(grid: OnGrid | OnGroups | OnSigns) -> dict[str, Any]:
    """Return the JSON form of a grid; its scales are part of the module's state."""
    if isinstance(grid, OnGates):
        return {"gates": list(grid.gates), "scales": grid.scale.numel()}
    if isinstance(grid, OnSigns):
        return {"signs": grid.values, "axis": grid.axis, "scales": grid.scales, "learned": grid.learned}
    if isinstance(grid, OnGroups):
        return {"bits": grid.bits, "group": grid.group}
    return {"bits": grid.bits, "axis": grid.axis, "scales": grid.scale.numel(), "learned": grid.learned}
