"""Heads of `nn.MultiheadAttention` that its own code hides, and the coupled groups of a model with them.

Where keys are masked, or come from elsewhere than queries, `nn.MultiheadAttention` fixes the number of heads in shapes,
or cuts its packed weight in two. The same attention with projections of their own does not: its groups are found on a
copy of the model, and told in terms of the parameters that there are.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from trimpoint.errors import TraceError
from trimpoint.graph.edits import replace_everywhere_
from trimpoint.graph.groups import coupled_groups, named
from trimpoint.graph.pruned_attention import pruned_attention, why_unprunable
from trimpoint.graph.trace import trace
from trimpoint.parts import Group, Member

_PARTS = ("q_proj", "k_proj", "v_proj")
_Slot = tuple[str, str, int]


def find_groups(module: nn.Module, inputs: Any) -> tuple[Group, ...]:
    """Return the coupled groups of a model.

    Heads of an `nn.MultiheadAttention` can go once a `PrunedAttention` stands in its place.

    Args:
        module: the model; it is not changed.
        inputs: one batch, as for `trimpoint.task.call`.

    Raises:
        TraceError: if the model cannot be traced.
    """
    groups = coupled_groups(trace(module, inputs))
    hidden = _hidden(module, groups)
    if not hidden:
        return groups
    opened = copy.deepcopy(module)
    for path in hidden:
        attention: Any = opened.get_submodule(path)
        opened = replace_everywhere_(opened, path, pruned_attention(attention))
    try:
        found = coupled_groups(trace(opened, inputs))
    except TraceError:
        return groups
    told = [_told(group, module, hidden) for group in found if group.kind == "heads" and not group.reason]
    return _with(groups, [group for group in told if group is not None])


def _hidden(module: nn.Module, groups: Sequence[Group]) -> list[str]:
    """Return the paths of the attention whose heads are in no group that can be removed, and that could be replaced."""
    seen = {m.path for group in groups if group.kind == "heads" and not group.reason for m in group.members}
    holders: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return [
        path
        for path, part in module.named_modules()
        if path not in seen
        and not why_unprunable(part)
        and not any(is_parametrized(inner) for inner in part.modules())
        and all(holders[id(parameter)] == 1 for parameter in part.parameters())
    ]


def _told(group: Group, module: nn.Module, hidden: Sequence[str]) -> Group | None:
    """Return a group of the copy in terms of the model's own parameters; `None` if it is not one of hidden heads."""
    slots: dict[_Slot, list[Member]] = {}
    for member in group.members:
        path, _, part = member.path.rpartition(".")
        if path in hidden and part in _PARTS:
            if member.dim != 0:
                return None
            attention: Any = module.get_submodule(path)
            packed = member.parameter == "bias" or attention.in_proj_weight is not None
            name = f"in_proj_{member.parameter}" if packed else f"{part}_weight"
            start = _PARTS.index(part) * attention.embed_dim if packed else 0
            indices = tuple(tuple(start + position for position in unit) for unit in member.indices)
            member = replace(member, path=path, parameter=name, indices=indices)
        slots.setdefault((member.path, member.parameter, member.dim), []).append(member)
    if not any(path in hidden for path, _, _ in slots):
        return None
    return replace(group, members=tuple(map(_joined, slots.values())), label="")


def _joined(members: Sequence[Member]) -> Member:
    """Return one member for several parts of one dimension."""
    units = zip(*(member.indices for member in members), strict=True)
    return replace(members[0], indices=tuple(tuple(sorted(sum(unit, ()))) for unit in units))


def _with(groups: Sequence[Group], found: Sequence[Group]) -> tuple[Group, ...]:
    """Return groups, those found in the place of what stood for the same dimensions alone."""
    result = list(groups)
    for new in found:
        slots = {(member.path, member.parameter, member.dim) for member in new.members}
        old = [g for g in result if slots >= {(member.path, member.parameter, member.dim) for member in g.members}]
        place = result.index(old[0]) if old else len(result)
        result[place:place] = [new]
        result = [group for group in result if not any(group is other for other in old)]
    return named(result)
