"""Coupled groups: which channels can only be removed together, over the whole model.

The idea of grouping parameters that share channels is that of DepGraph (Fang et al., "DepGraph: Towards Any Structural
Pruning", 2023); here the groups follow from the exported graph alone, element by element, and not from the classes of
modules.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trimpoint.graph.alike import kept_alike, kinds_of, places_of
from trimpoint.graph.atoms import Atoms, Dimension, Kind, Owner, Role, compact, ragged
from trimpoint.graph.propagate import Propagation
from trimpoint.graph.trace import Trace
from trimpoint.parts import Group, Member

_ONE = "has a single unit"
_TWICE = "a parameter is used both in a layer and as a plain tensor"
Slot = tuple[Owner, int]


def coupled_groups(trace: Trace) -> tuple[Group, ...]:
    """Return the coupled groups of a model, in the order in which they are made.

    A unit of a group is a class of positions that can only go together; units that run through the same dimensions of
    the same parameters form a group. Groups that must not be touched carry a `reason`.

    Args:
        trace: of the model.
    """
    propagation, classes, reasons = _solved(trace, None)
    heads = propagation.atoms.tied_heads(classes)
    if heads is not None:
        propagation, classes, reasons = _solved(trace, heads)
    atoms = propagation.atoms
    kinds, mixed = kinds_of(atoms, classes)
    groups, families = grouped(atoms, classes, mixed | reasons, kinds)
    groups = [
        replace(group, places=places_of(propagation.shaped, classes, labels)) if group.kind == "heads" else group
        for group, labels in zip(groups, families, strict=True)
    ]
    groups = kept_alike(atoms, classes, groups, families)
    return named([group for group in groups if any(member.role == "out" for member in group.members)])


def grouped(
    atoms: Atoms, classes: np.ndarray, reasons: Mapping[int, str], kinds: Mapping[int, Kind]
) -> tuple[list[Group], list[list[int]]]:
    """Return as one group the classes that run through the same dimensions, and the classes of each group.

    Args:
        atoms: of the model.
        classes: of each atom.
        reasons: class → why it must not be touched.
        kinds: class → its kind, where that is not channels.
    """
    slots = _slots(atoms, classes)
    units: dict[int, dict[Slot, list[int]]] = defaultdict(dict)
    for slot, positions in slots.items():
        for label, at in positions.items():
            units[label][slot] = at
    families: dict[tuple[object, str, Kind], list[int]] = defaultdict(list)
    for label, found in units.items():
        shape = tuple(sorted((slot, len(positions)) for slot, positions in found.items()))
        families[shape, reasons.get(label, ""), kinds.get(label, "channels")].append(label)
    roles = {(entry.owner, d): entry.role for entry in atoms.dimensions.values() for d in _dims(entry)}
    order = {slot: index for index, slot in enumerate(slots)}
    groups = [
        _group([units[label] for label in labels], roles, order, reason, kind)
        for (_, reason, kind), labels in families.items()
    ]
    return groups, list(families.values())


def _solved(trace: Trace, heads: Tensor | None) -> tuple[Propagation, np.ndarray, dict[int, str]]:
    propagation = Propagation(trace, heads=heads)
    atoms = propagation.run()
    for owner, dim in list(atoms.dimensions):
        if dim is None and any(other == owner and d is not None for other, d in atoms.dimensions):
            atoms.freeze_owner(owner, _TWICE)
    return propagation, *atoms.solve()


def _dims(entry: Dimension) -> list[int]:
    return [entry.dim] if entry.dim is not None else list(range(len(entry.shape)))


def _slots(atoms: Atoms, classes: np.ndarray) -> dict[Slot, dict[int, list[int]]]:
    """Return for each dimension of each parameter the positions of every class, in the order of their making."""
    slots: dict[Slot, dict[int, list[int]]] = {}
    for entry in atoms.dimensions.values():
        labels = torch.from_numpy(classes[entry.ids.numpy()])
        if entry.dim is not None:
            slots[entry.owner, entry.dim] = _positions(labels.tolist())
            continue
        small = compact(labels)
        split = set(ragged(small).tolist())
        for dim, size in enumerate(small.shape):
            if size > 1 and sum(s > 1 for s in small.shape) == 1:
                found = _positions(small.flatten().tolist())
                slots[entry.owner, dim] = {label: at for label, at in found.items() if label not in split}
    return slots


def _positions(labels: list[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        found[label].append(position)
    return found


def _group(
    units: list[dict[Slot, list[int]]], roles: dict[Slot, Role], order: dict[Slot, int], reason: str, kind: Kind
) -> Group:
    slots = sorted(units[0], key=lambda slot: order[slot])
    first = next((slot for slot in slots if roles[slot] == "out"), slots[0])
    units = sorted(units, key=lambda unit: unit[first])
    members = tuple(
        Member(
            path=path,
            parameter=name,
            dim=dim,
            indices=tuple(tuple(unit[(path, name), dim]) for unit in units),
            role=roles[(path, name), dim],
        )
        for (path, name), dim in slots
    )
    return Group(members=members, size=len(units), reason=reason or (_ONE if len(units) == 1 else ""), kind=kind)


def named(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Tell groups of one producer apart: the second one of `path` is `path#2`."""
    seen: dict[str, int] = defaultdict(int)
    result = []
    for group in groups:
        seen[group.name] += 1
        count = seen[group.name]
        result.append(group if count == 1 else replace(group, label=f"{group.name}#{count}"))
    return tuple(result)
