"""How large the activations of units are, watched at the modules that read or make them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from trimpoint.parts import Group, Member


class Watch:
    """Mean absolute activations of the channels of some modules.

    Args:
        module: the model.
        groups: whose units are watched.
    """

    def __init__(self, module: nn.Module, groups: Sequence[Group]) -> None:
        self._module = module
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._counts: dict[tuple[str, str], int] = {}
        ends = [member for group in groups for member in group.members if member.role != "through"]
        self.paths: list[str] = list(dict.fromkeys(member.path for member in ends))

    def observe(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Add one call of the module at `path`."""
        if inputs:
            self._add(path, "in", _tensor(inputs[0]), module)
        if isinstance(module, nn.MultiheadAttention):
            self._project(path, module, inputs)
        elif isinstance(module, nn.RNNBase):
            state = output[1][0] if isinstance(output[1], tuple) else output[1]
            for layer, values in enumerate(state.unflatten(0, (module.num_layers, -1))):
                for reverse, last in enumerate(values):
                    self._add(path, f"_l{layer}{'_reverse' * reverse}", last, module)
        else:
            self._add(path, "out", _tensor(output), module)

    def of(self, group: Group) -> list[tuple[str, Tensor]]:
        """Return the mean absolute activations of the units, `[units]`, at each module where they can be seen."""
        read = [(m.path, values) for m in group.members if (values := self._reading(m)) is not None]
        made = [(m.path, values) for m in group.members if (values := self._making(m)) is not None]
        return read or made

    def _reading(self, member: Member) -> Tensor | None:
        owner = self._module.get_submodule(member.path)
        inner = isinstance(owner, nn.RNNBase) and not member.parameter.startswith("weight_ih_l0")
        if member.role != "in" or inner or isinstance(owner, nn.RNNCellBase):
            return None
        return self._channels(member, "in", getattr(owner, "groups", 1))

    def _making(self, member: Member) -> Tensor | None:
        owner = self._module.get_submodule(member.path)
        if member.role != "out":
            return None
        if isinstance(owner, nn.MultiheadAttention):
            parts = [self._mean(member.path, f"projection {at}") for at in range(3)]
            found = [part for part in parts if part is not None]
            fits = member.parameter == "in_proj_weight" and len(found) == 3
            return torch.cat(found)[torch.tensor(member.indices)].mean(1) if fits else None
        if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
            layer = member.parameter[member.parameter.find("_l") :] if isinstance(owner, nn.RNNBase) else "out"
            hidden = self._mean(member.path, layer)
            positions = torch.tensor(member.indices)[:, 0]
            fits = hidden is not None and len(hidden) == owner.hidden_size and "bias" not in member.parameter
            return hidden[positions % owner.hidden_size] if hidden is not None and fits else None
        return self._channels(member, "out", 1)

    def _channels(self, member: Member, side: str, groups: int) -> Tensor | None:
        """Return the means at a member's positions; a grouped convolution reads each of them once in each group."""
        weight = getattr(self._module.get_submodule(member.path), member.parameter)
        values = self._mean(member.path, side)
        size = weight.shape[member.dim]
        if weight.ndim < 2 or values is None or len(values) not in (size, size * groups):
            return None
        return values.view(-1, size).mean(0)[torch.tensor(member.indices)].mean(1)

    def _project(self, path: str, module: nn.MultiheadAttention, inputs: tuple[Any, ...]) -> None:
        """Add the queries, keys and values that the module makes of its inputs; no module of their own does it."""
        weight, bias = module.in_proj_weight, module.in_proj_bias
        if weight is not None and len(inputs) >= 3:
            biases = bias.chunk(3) if bias is not None else (None, None, None)
            for at, (values, rows, more) in enumerate(zip(inputs[:3], weight.chunk(3), biases, strict=True)):
                self._add(path, f"projection {at}", F.linear(values, rows, more), module)

    def _mean(self, path: str, side: str) -> Tensor | None:
        total = self._sums.get((path, side))
        return None if total is None else total / self._counts[path, side]

    def _add(self, path: str, side: str, values: Tensor | None, module: nn.Module) -> None:
        if values is None or not values.is_floating_point() or values.ndim == 0:
            return
        weight = getattr(module, "weight", None)
        inner = weight.ndim - 2 if isinstance(weight, Tensor) and weight.ndim > 2 else 0
        if values.ndim <= inner:
            return
        rows = values.detach().double().abs().movedim(values.ndim - inner - 1, -1).flatten(0, -2)
        total, key = rows.sum(0), (path, side)
        if key in self._sums and self._sums[key].shape != total.shape:
            return
        self._sums[key] = self._sums[key] + total if key in self._sums else total
        self._counts[key] = self._counts.get(key, 0) + len(rows)


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, PackedSequence):
        return value.data
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None
