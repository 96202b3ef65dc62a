"""Criteria by name and by reference, and what is said where they cannot be used."""

import sys
import types

import pytest
import torch

from tests.importance.cases import context, group_of
from trimpoint.errors import DataError, ModelError, UnknownNameError
from trimpoint.importance import NAMES, between_groups, scores

OWN = """
import torch

def last_first(group, evidence):
    return torch.arange(group.size)

def by_evidence(group, evidence):
    (member, weights), *_ = evidence.weights(group)
    (_, read), *_ = evidence.activations(group)
    (_, products), *_ = evidence.batch_products(group)
    assert weights.shape[0] == read.shape[0] == products.shape[1] == group.size
    return weights.abs().amax(1) * read

def as_list(group, evidence):
    return [1.0] * group.size

def short(group, evidence):
    return torch.ones(3)

def matrix(group, evidence):
    return torch.ones(group.size, 1)

def nothing(group, evidence):
    return None

def nan(group, evidence):
    return torch.full((group.size,), float("nan"))

def broken(group, evidence):
    return 1 / 0

def two():
    return 1

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def own(monkeypatch):
    module = types.ModuleType("own_criteria")
    exec(OWN, module.__dict__)
    monkeypatch.setitem(sys.modules, "own_criteria", module)


def test_a_function_of_ones_own(model, task):
    groups = [group_of(model, "conv1"), group_of(model, "conv2")]
    found = scores(context(model, task), groups, "own_criteria:last_first")
    assert {name: values.tolist() for name, values in found.items()} == {
        "conv1": list(range(16)),
        "conv2": list(range(32)),
    }
    assert all(values.dtype == torch.float64 for values in found.values())
    assert scores(context(model, task), groups, "own_criteria:as_list")["conv1"].tolist() == [1.0] * 16


def test_evidence_of_a_function_of_ones_own(model, task):
    found = scores(context(model, task), [group_of(model, "conv1")], "own_criteria:by_evidence")["conv1"]
    assert float(found.min()) > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"must be 16 finite numbers, one for each unit. Got shape \[3\]"),
        ("matrix", r"Got shape \[16, 1\]"),
        ("nothing", "Got NoneType"),
        ("nan", "Got 16 that are not finite"),
        ("broken", "failed on the group `conv1` with ZeroDivisionError"),
        ("two", "failed on the group `conv1` with TypeError"),
        ("NUMBER", "failed on the group `conv1` with TypeError"),
    ],
)
def test_a_wrong_function_of_ones_own(name, message, model, task):
    with pytest.raises(ModelError, match=message):
        scores(context(model, task), [group_of(model, "conv1")], f"own_criteria:{name}")


def test_a_reference_to_nothing(model, task):
    with pytest.raises(UnknownNameError, match="no_such_module"):
        scores(context(model, task), [group_of(model, "conv1")], "no_such_module:f")
    with pytest.raises(UnknownNameError, match="shorter"):
        scores(context(model, task), [group_of(model, "conv1")], "own_criteria:shorter")


@pytest.mark.parametrize("importance", ["taylor", "fisher", "group-fisher", "activation"])
def test_missing_data(importance, model, task):
    with pytest.raises(DataError, match=f'importance="{importance}" needs `calibrate` data') as caught:
        scores(context(model, task.with_(calibrate=None)), [group_of(model, "conv1")], importance)
    assert "magnitude" in caught.value.hint


@pytest.mark.parametrize("importance", NAMES)
def test_what_needs_a_loss_and_what_does_not(importance, model, task):
    ctx = context(model, task.with_(loss=None))
    if importance in ("taylor", "fisher", "group-fisher"):
        with pytest.raises(DataError, match="a loss"):
            scores(ctx, [group_of(model, "conv1")], importance)
    else:
        assert scores(ctx, [group_of(model, "conv1")], importance)["conv1"].shape == (16,)


def test_scores_between_groups(model, task):
    groups = [group_of(model, "conv1"), group_of(model, "conv2")]
    found = scores(context(model, task), groups, "taylor")
    for name, values in between_groups(found, "taylor").items():
        assert torch.allclose(values, found[name] / found[name].mean())
    lamp = scores(context(model, task), groups, "lamp")
    assert all(torch.equal(values, lamp[name]) for name, values in between_groups(lamp, "lamp").items())
