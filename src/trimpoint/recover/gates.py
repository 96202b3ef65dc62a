"""Learned gates: a factor for each unit that is trained with the weights, and closes where the unit is not needed."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from trimpoint.graph.running import compare, evaluating, run
from trimpoint.importance.evidence import tensor_of
from trimpoint.parts import Group, Member
from trimpoint.recover.penalty import Penalty, risen


class _Gates(nn.Module):
    """One factor for each unit of a group, at least 0; a gate that has closed takes no gradient and stays closed."""

    def __init__(self, units: int, pace: float) -> None:
        super().__init__()
        self.pace = pace
        self.raw = nn.Parameter(torch.full((units,), 1 / pace))

    def forward(self) -> Tensor:
        return F.relu(self.raw * self.pace)


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


def gated(model: nn.Module, groups: Sequence[Group], trained: Callable[[str], bool]) -> tuple[Group, ...]:
    """Return the groups that can have gates: what reads them are weights of linear layers and convolutions alone.

    What makes or reads their units is trained, shared with no other module, and not computed from other tensors.

    Args:
        model: that the groups belong to.
        groups: with removable units.
        trained: whether the module at a path is to be changed.
    """
    holders = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))

    def fits(member: Member) -> bool:
        module, tensor = model.get_submodule(member.path), tensor_of(model, member)
        if member.role == "through" or not isinstance(tensor, nn.Parameter):
            return True
        reads = member.role == "out" or isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        plain = not parametrize.is_parametrized(module) and holders[id(tensor)] == 1
        return reads and plain and tensor.requires_grad and trained(member.path)

    return tuple(group for group in groups if _readers(group) and all(map(fits, group.members)))


def gate_lasso(
    groups: Sequence[Group], strength: float, rise: int, *, pace: float = 1.0, inputs: Any = None
) -> Penalty:
    """Return the L1 norm of a gate for each unit; the gates are there while the training lasts.

    A gate multiplies all weights that read its unit. It begins at 1 and is trained with the weights (Huang and Wang,
    "Data-driven sparse structure selection for deep neural networks", 2018; here a rectifier closes it, there a
    proximal step). At the end gates are multiplied into the weights that read. Where that leaves the outputs as they
    are, a unit whose gate has closed becomes zero in what makes it and what it runs through as well, so that every
    criterion finds it; it does not where something else reads the unit, such as a product of two activations.

    Args:
        groups: from `gated`.
        strength: factor, once it has risen.
        rise: steps of linear increase from zero.
        pace: by how much a gate changes when the parameter behind it changes by 1.
        inputs: a batch on which outputs are compared; without one, closed units are zero to what reads them alone.
    """
    gates: list[_Gates] = []

    def penalty(_model: nn.Module, step: int) -> Tensor:
        return torch.stack([gate().sum() for gate in gates]).sum() * risen(strength, step, rise)

    @contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        orders = {module: list(module._parameters) for module in model.modules()}
        for group in groups:
            device = tensor_of(model, _readers(group)[0]).device
            gates.append(_Gates(group.size, pace).to(device))
            for member in _readers(group):
                module = model.get_submodule(member.path)
                gate = _Gated(gates[-1], tensor_of(model, member), member)
                parametrize.register_parametrization(module, member.parameter, gate)
        try:
            yield
        finally:
            for path, name in {(m.path, m.parameter) for group in groups for m in _readers(group)}:
                parametrize.remove_parametrizations(model.get_submodule(path), name)
            for module, order in orders.items():
                module._parameters = {name: module._parameters[name] for name in order}
            closed = [gate().detach() == 0 for gate in gates]
            gates.clear()
        for group, units in zip(groups, closed, strict=True):
            if inputs is not None and bool(units.any()):
                _close_(model, group, units.nonzero().flatten().tolist(), inputs)

    return Penalty(of=penalty, key=f"gates {strength!r} {rise} {[group.name for group in groups]}", around=around)


def _readers(group: Group) -> tuple[Member, ...]:
    return tuple(member for member in group.members if member.role == "in")


def _close_(model: nn.Module, group: Group, units: Sequence[int], inputs: Any) -> None:
    """Make units that nothing reads zero in what makes them and what they run through, unless outputs change by it."""
    saved: list[tuple[Tensor, Tensor]] = []
    with evaluating(model):
        before = run(model, inputs)
        for member in group.members:
            tensor = tensor_of(model, member)
            if member.role != "in" and tensor.requires_grad:
                saved.append((tensor, tensor.detach().clone()))
                at = [position for unit in units for position in member.indices[unit]]
                tensor.index_fill_(member.dim, torch.tensor(at, device=tensor.device), 0)
        if compare(run(model, inputs), before):
            for tensor, values in reversed(saved):
                tensor.copy_(values)
