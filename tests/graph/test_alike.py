"""Kinds of units, and groups that keep equally many of them."""

import numpy as np
import pytest
import torch

from trimpoint.errors import SurgeryError
from trimpoint.graph.alike import check_alike, kept_alike, kinds_of, together
from trimpoint.graph.atoms import Atoms
from trimpoint.parts import Group, Member


def group(name, size=4, alike="", reason=""):
    member = Member(path=name, parameter="weight", dim=0, indices=tuple((u,) for u in range(size)), role="out")
    return Group(members=(member,), size=size, alike=alike, reason=reason)


def marked(*sets):
    """Return atoms with sets of units, `(first atom, count, alike)`."""
    atoms = Atoms()
    for start, count, alike in sets:
        atoms.mark(torch.arange(start, start + count), "hidden", alike)
    return atoms


def test_groups_that_are_alike_stand_together():
    groups = [group("a"), group("b", alike="m"), group("c"), group("d", alike="m"), group("e", alike="n")]
    assert together(groups) == [["a"], ["b", "d"], ["c"], ["e"]]


def test_equal_numbers_are_asked_for():
    groups = [group("a"), group("b", alike="m"), group("d", alike="m"), group("e", alike="n")]
    check_alike(groups, {"a": 1, "b": 2, "d": 2})
    check_alike(groups, {"e": 3})
    with pytest.raises(SurgeryError, match=r"The groups of `m`, .* Got 2 of 'b', 0 of 'd'") as error:
        check_alike(groups, {"a": 1, "b": 2})
    assert error.value.hint


def test_units_of_two_kinds_stay():
    atoms = marked((0, 4, None))
    atoms.mark(torch.tensor([2, 5]), "heads")
    kinds, reasons = kinds_of(atoms, np.arange(6))
    assert kinds == {0: "hidden", 1: "hidden", 2: "hidden", 3: "hidden", 5: "heads"}
    assert reasons == {2: "it is a hidden unit and an attention head at once"}


def test_what_is_marked_twice_counts_once():
    atoms = marked((0, 4, "m"), (0, 4, "m"))
    groups, labels = [group("a")], [[0, 1, 2, 3]]
    assert kept_alike(atoms, np.arange(4), groups, labels) == groups


def test_sets_of_a_module_are_alike():
    atoms = marked((0, 4, "m"), (4, 4, "m"))
    found = kept_alike(atoms, np.arange(9), [group("a"), group("b"), group("c", 1)], [[0, 1, 2, 3], [4, 5, 6, 7], [8]])
    assert [(g.alike, g.reason) for g in found] == [("m", ""), ("m", ""), ("", "")]


def test_modules_that_share_a_group_ask_together():
    """The second sets of two modules are one group; so all three groups are alike, under the first name."""
    atoms = marked((0, 4, "n"), (4, 4, "n"), (8, 4, "m"), (12, 4, "m"))
    classes = np.array([*range(8), 8, 9, 10, 11, 4, 5, 6, 7])
    labels = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    found = kept_alike(atoms, classes, [group("a"), group("b"), group("c")], labels)
    assert [g.alike for g in found] == ["m", "m", "m"]
    kept = kept_alike(atoms, classes, [group("a"), group("b"), group("c", reason="no")], labels)
    assert [g.reason for g in kept] == [*["one size with units that must stay: no"] * 2, "no"]
    assert not any(g.alike for g in kept)


def test_sets_in_groups_of_different_sizes_stay():
    atoms = marked((0, 4, "m"), (4, 4, "m"))
    split = kept_alike(atoms, np.arange(8), [group("a"), group("b", 2), group("c", 2)], [[0, 1, 2, 3], [4, 5], [6, 7]])
    paired = kept_alike(atoms, np.array([0, 1, 2, 3, 4, 4, 5, 5]), [group("a"), group("b", 2)], [[0, 1, 2, 3], [4, 5]])
    for found in (split, paired):
        assert all("in different ways" in g.reason and not g.alike for g in found)
