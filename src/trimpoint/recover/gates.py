"""Learned gates: a factor for each unit that is trained with the weights, and closes where the unit is not needed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from trimpoint.importance.evidence import tensor_of
from trimpoint.parts import Group, Member
from trimpoint.recover.penalty import Penalty, risen


class _Gates(nn.Module):
    """One factor for each unit of a group, at least 0; a gate that has closed takes no gradient and stays closed."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.ones(units))

    def forward(self) -> Tensor:
        return F.relu(self.raw)


class _Gated(nn.Module):
    """Multiply what reads the units of a group by their gates: to all readers a unit is as large as its gate says."""

    unit: Tensor

    def __init__(self, gates: _Gates, weight: Tensor, member: Member) -> None:
        super().__init__()
        self.gates, self.dim = gates, member.dim
        units = torch.full((weight.shape[member.dim],), len(gates.raw), device=weight.device)
        for index, positions in enumerate(member.indices):
            units[list(positions)] = index
        self.register_buffer("unit", units)

    def forward(self, weight: Tensor) -> Tensor:
        factors = F.pad(self.gates(), (0, 1), value=1.0)[self.unit]
        shape = [-1 if dim == self.dim else 1 for dim in range(weight.ndim)]
        return weight * factors.view(shape).to(weight.dtype)


def gated(model: nn.Module, groups: Sequence[Group]) -> tuple[Group, ...]:
    """Return the groups that can have gates: what reads them are weights of linear layers and convolutions alone.

    Weights that several modules share, that are computed from others already, or that are not trained, have none.
    """
    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return tuple(group for group in groups if _readers(group) and all(_fits(model, m, shared) for m in _readers(group)))


def gate_lasso(groups: Sequence[Group], strength: float, rise: int) -> Penalty:
    """Return the L1 norm of a gate for each unit; the gates are there while the training lasts.

    A gate multiplies all weights that read its unit. It begins at 1 and is trained with the weights (Huang and Wang,
    "Data-driven sparse structure selection for deep neural networks", 2018; here a rectifier closes it, there a
    proximal step). At the end gates are multiplied into the weights that read, and a unit whose gate has closed is zero
    in what makes it as well: removing it changes nothing.

    Args:
        groups: from `gated`.
        strength: factor, once it has risen.
        rise: steps of linear increase from zero.
    """
    gates: list[_Gates] = []

    def penalty(_model: nn.Module, step: int) -> Tensor:
        return torch.stack([gate().sum() for gate in gates]).sum() * risen(strength, step, rise)

    @contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        orders = {module: list(module._parameters) for module in model.modules()}
        for group in groups:
            device = tensor_of(model, _readers(group)[0]).device
            gates.append(_Gates(group.size).to(device))
            for member in _readers(group):
                module = model.get_submodule(member.path)
                parametrize.register_parametrization(
                    module, member.parameter, _Gated(gates[-1], tensor_of(model, member), member)
                )
        try:
            yield
        finally:
            for path, name in {(m.path, m.parameter) for group in groups for m in _readers(group)}:
                parametrize.remove_parametrizations(model.get_submodule(path), name)
            for module, order in orders.items():
                module._parameters = {name: module._parameters[name] for name in order}
            for group, gate in zip(groups, gates, strict=True):
                _close_(model, group, gate().detach() == 0)
            gates.clear()

    return Penalty(of=penalty, key=f"gates {strength!r} {rise} {[group.name for group in groups]}", around=around)


def _readers(group: Group) -> tuple[Member, ...]:
    return tuple(member for member in group.members if member.role == "in")


def _fits(model: nn.Module, member: Member, shared: "Counter[int]") -> bool:
    module, weight = model.get_submodule(member.path), tensor_of(model, member)
    plain = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not parametrize.is_parametrized(module)
    return plain and weight.requires_grad and shared[id(weight)] == 1


@torch.no_grad()
def _close_(model: nn.Module, group: Group, closed: Tensor) -> None:
    for member in group.members:
        if member.role == "out":
            positions = [at for unit in closed.nonzero().flatten().tolist() for at in member.indices[unit]]
            tensor = tensor_of(model, member)
            tensor.index_fill_(member.dim, torch.tensor(positions, dtype=torch.int64, device=tensor.device), 0)
