"""What a layer reads, rounded as the runtime will round it, between numbers that training may learn.

A submodule and a hook of the layer, so that every training loop learns with it; before lowering both are taken out, and
the range goes to the runtime.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimpoint.errors import SurgeryError

NAME = "input_grid"
_LEAST = 1e-12


def rounded(values: Tensor) -> Tensor:
    """Round; the gradient passes as if nothing had been rounded."""
    return values + (values.round() - values).detach()


def slowed(values: Tensor, factor: float) -> Tensor:
    """Return the values as they are, with a gradient that is multiplied by `factor`."""
    return (values - values * factor).detach() + values * factor


class InputGrid(nn.Module):
    """Round values to `2 ** bits` levels between two numbers that are learned; zero is one of the levels.

    Args:
        low: the least level, at most 0; where it is 0, as behind a ReLU, it stays.
        high: the greatest level.
        bits: of a level's number.

    References:
        Esser, McKinstry, Bablani, Appuswamy and Modha, "Learned step size quantization" (2020), for the gradients and
        their scale; Bhalgat, Lee, Nagel, Blankevoort and Kwak, "LSQ+: improving low-bit quantization through learnable
        offsets and better initialization" (2020), for two numbers instead of one.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, bits: int = 8) -> None:
        super().__init__()
        self.bits = bits
        self.low = nn.Parameter(torch.tensor(float(low)), requires_grad=low < 0)
        self.high = nn.Parameter(torch.tensor(float(high)))

    def forward(self, values: Tensor) -> Tensor:
        """Return the nearest levels, of the same shape."""
        count = 2**self.bits - 1
        factor = 1.0 / (count * max(1, values[:1].numel())) ** 0.5
        low, high = (slowed(end, factor) for end in (self.low.clamp(max=0.0), self.high.clamp(min=0.0)))
        step = (high - low).clamp_min(_LEAST) / count
        zero = rounded(-low / step)
        codes = (rounded(values.float() / step) + zero).clamp(0, count)
        found: Tensor = (codes - zero) * step
        return found.to(values.dtype)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest level."""
        return min(0.0, float(self.low.detach())), max(0.0, float(self.high.detach()))

    def extra_repr(self) -> str:
        """Show bits and range."""
        low, high = self.range
        return f"bits={self.bits}, {low:.4g} to {high:.4g}"


def _hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    grid = cast(InputGrid, module._modules[NAME])
    if args:
        return (grid(args[0]), *args[1:]), kwargs
    first, *others = kwargs
    return args, {first: grid(kwargs[first]), **{name: kwargs[name] for name in others}}


def put_input_on_grid_(modules: Sequence[nn.Module], grid: InputGrid) -> None:
    """Round what modules read, in place; modules that read the same tensor share a grid.

    Raises:
        SurgeryError: if a module rounds what it reads already.
    """
    for module in modules:
        if hasattr(module, NAME):
            raise SurgeryError(f"A {type(module).__name__} has an attribute {NAME!r} already.")
    for module in modules:
        module.add_module(NAME, grid)
        module.register_forward_pre_hook(_hook, with_kwargs=True)


def take_off_grids_(module: nn.Module) -> None:
    """Let all modules read what they are given, in place."""
    for part in module.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if hook is _hook:
                del part._forward_pre_hooks[key]
                part._forward_pre_hooks_with_kwargs.pop(key, None)
                del part._modules[NAME]


def input_ranges(module: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the range of what each module reads, by its path, where that is rounded."""
    parts = module.named_modules(remove_duplicate=False)
    return {path: grid.range for path, part in parts if isinstance(grid := part._modules.get(NAME), InputGrid)}


def wrong_ranges(module: nn.Module) -> list[str]:
    """Return the paths of all grids whose ends are not finite."""
    grids = [(path, part) for path, part in module.named_modules() if isinstance(part, InputGrid)]
    return [path for path, grid in grids if not all(bool(torch.isfinite(end)) for end in (grid.low, grid.high))]


def check_input_grid(data: Mapping[str, Any]) -> str:
    """Return what is wrong with the JSON form of an edit that rounds inputs, or `""`."""
    also = data["also"]
    if not isinstance(also, (list, tuple)) or not all(isinstance(path, str) for path in also):
        return f"the other modules are a list of paths. Got {also!r}"
    sound = type(data["bits"]) is int and 2 <= data["bits"] <= 8 and type(data["zero"]) is bool
    return "" if sound else f"it has 2 to 8 bits, and a least level of 0 or not. Got {dict(data)!r}"
