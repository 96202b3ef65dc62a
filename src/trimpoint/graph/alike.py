"""Kinds of units, and groups that must keep equally many of them because one module has one size for all."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trimpoint.errors import SurgeryError
from trimpoint.graph.atoms import Atoms, Kind, compact
from trimpoint.parts import Group, Place

_KINDS = {"channels": "a channel", "heads": "an attention head", "hidden": "a hidden unit"}
_UNEVEN = "the sets of units that a module has one size for are grouped with others in different ways"


def kinds_of(atoms: Atoms, classes: np.ndarray) -> tuple[dict[int, Kind], dict[int, str]]:
    """Return the kind of the units that are marked, by class, and why those that are of two kinds must stay."""
    kinds: dict[int, Kind] = {}
    reasons: dict[int, str] = {}
    for entry in atoms.marked:
        for label in classes[entry.ids.numpy()].tolist():
            if kinds.setdefault(label, entry.kind) != entry.kind:
                reasons[label] = f"it is {_KINDS[kinds[label]]} and {_KINDS[entry.kind]} at once"
    return kinds, reasons


def places_of(shaped: Sequence[tuple[Tensor, str]], classes: np.ndarray, units: Sequence[int]) -> tuple[Place, ...]:
    """Return the modules that give tensors a shape in which units can be counted.

    Args:
        shaped: id tensors, and the path of the module that gave them their shape.
        classes: of the atoms.
        units: the classes of a group's units.
    """
    lookup = torch.from_numpy(np.append(classes, -1))
    places: dict[str, dict[int, int]] = defaultdict(dict)
    for ids, path in shaped:
        labels = compact(lookup[compact(ids)])
        dims = [dim for dim, size in enumerate(labels.shape) if size > 1]
        if len(dims) == 1:
            counts = {int((labels == unit).sum()) for unit in units}
            if len(counts) == 1 and counts != {0}:
                places[path][ids.shape[dims[0]]] = counts.pop()
    return tuple(Place(path=path, sizes=tuple(sizes.items())) for path, sizes in places.items())


@dataclass
class _Set:
    """Groups that must keep equally many units.

    Args:
        path: of the first module that asks for it.
        groups: their places.
        whole: whether each set of units of a module is one group.
    """

    path: str
    groups: set[int]
    whole: bool


def kept_alike(
    atoms: Atoms, classes: np.ndarray, groups: Sequence[Group], labels: Sequence[Sequence[int]]
) -> list[Group]:
    """Return groups with `alike`, and a reason where one of those that must stay as large has one.

    Args:
        atoms: with their marks.
        classes: of the atoms.
        groups: of the model.
        labels: the classes of each group's units.
    """
    home = {label: place for place, units in enumerate(labels) for label in units}
    asked: dict[str, list[set[int]]] = defaultdict(list)
    for entry in atoms.marked:
        if entry.alike is not None:
            asked[entry.alike].append({home[label] for label in classes[entry.ids.numpy()].tolist()})
    result = list(groups)
    for found in _merged(asked):
        members = [groups[place] for place in sorted(found.groups)]
        even = found.whole and len({group.size for group in members}) == 1
        reason = next((group.reason for group in members if group.reason), "" if even else _UNEVEN)
        for place in found.groups:
            own = groups[place].reason or (reason and f"one size with units that must stay: {reason}")
            result[place] = replace(groups[place], reason=own, alike="" if own else found.path)
    return result


def _merged(asked: dict[str, list[set[int]]]) -> list[_Set]:
    """Return what each module with several sets of units asks for; modules that share a group ask together."""
    merged: list[_Set] = []
    for path, sets in asked.items():
        if len(sets) < 2:
            continue
        new = _Set(path, set().union(*sets), all(len(part) == 1 for part in sets))
        for old in [old for old in merged if old.groups & new.groups]:
            merged.remove(old)
            new = _Set(min(old.path, new.path), old.groups | new.groups, old.whole and new.whole)
        merged.append(new)
    return merged


def check_alike(groups: Sequence[Group], removed: Mapping[str, int]) -> None:
    """Check that groups that are alike lose equally many units.

    Args:
        groups: of the model.
        removed: group name → number of units; groups that are not named lose none.

    Raises:
        SurgeryError: if they do not.
    """
    for alike in dict.fromkeys(group.alike for group in groups if group.alike and group.name in removed):
        counts = {group.name: removed.get(group.name, 0) for group in groups if group.alike == alike}
        if len(set(counts.values())) > 1:
            text = ", ".join(f"{count} of {name!r}" for name, count in counts.items())
            raise SurgeryError(
                f"The groups of `{alike}`, which has one size for all, must lose equally many units. Got {text}.",
                "choose units of each of these groups, the same number in all",
            )


def together(groups: Sequence[Group]) -> list[list[str]]:
    """Return the names of groups, those that are alike in one list."""
    sets: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        sets.setdefault((group.alike, "" if group.alike else group.name), []).append(group.name)
    return list(sets.values())
