"""Weights that share values: what a module computes, how it trains, what is saved, and what a file may not say."""

import copy

import pytest
import torch
from torch import nn

from trimpoint.errors import ArtifactError, SurgeryError
from trimpoint.graph import CodebookEdit, OnGrid, baked, grids_of, mask_, put_on_grid_, rebuild, save_structure, share_
from trimpoint.graph.edits import edits_from_data, edits_to_data

CODES = torch.tensor([[0, 1, 2], [2, 2, 0]], dtype=torch.uint8)
VALUES = torch.tensor([-0.5, 0.25])
WEIGHT = torch.tensor([[0.0, -0.5, 0.25], [0.25, 0.25, 0.0]])


def layer():
    module = nn.Linear(3, 2)
    share_(module, "weight", CODES, VALUES)
    return module


def test_the_module_computes_with_shared_values():
    torch.testing.assert_close(layer().weight.detach(), WEIGHT)


def test_the_gradient_of_a_value_is_the_sum_over_the_weights_that_share_it():
    module, inputs = layer(), torch.tensor([[2.0, 3.0, 5.0]])
    module(inputs).sum().backward()
    book = module.parametrizations.weight[0]
    torch.testing.assert_close(book.values.grad, torch.tensor([3.0, 5.0 + 2.0 + 3.0]))
    assert module.parametrizations.weight.original.grad is None


def test_a_plain_loop_moves_the_values_and_leaves_codes_and_zeros():
    module = layer()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    weight = module.weight.detach()
    assert not torch.equal(weight, WEIGHT)
    assert bool(((weight == 0) == (CODES == 0)).all())
    assert len(weight[CODES == 2].unique()) == 1


def test_zeros_of_a_mask_stay_and_baked_weights_are_plain():
    module = nn.Sequential(nn.Linear(3, 2))
    mask_(module[0], "weight", CODES != 0)
    share_(module[0], "weight", CODES, VALUES)
    plain = baked(module)
    assert list(plain.state_dict()) == ["0.weight", "0.bias"]
    torch.testing.assert_close(plain[0].weight.detach(), WEIGHT)
    assert grids_of(module) == {}


def test_a_grid_gives_way_to_a_codebook_and_copies_are_apart():
    module = nn.Linear(3, 2)
    put_on_grid_(module, "weight", OnGrid(torch.tensor([0.1]), 4))
    share_(module, "weight", CODES, VALUES)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.parametrizations.weight[0].values.zero_()
    torch.testing.assert_close(module.weight.detach(), WEIGHT)


def test_saved_and_made_again(tmp_path):
    module = nn.Sequential(layer())
    edits = [CodebookEdit("0", "weight", {"values": 2})]
    assert edits_from_data(edits_to_data(edits)) == edits
    save_structure(tmp_path, module, edits)
    again = rebuild(tmp_path, lambda: nn.Sequential(nn.Linear(3, 2)))
    torch.testing.assert_close(again[0].weight, module[0].weight)


@pytest.mark.parametrize("tamper", [lambda b: b.codes.fill_(3), lambda b: b.values.data.fill_(float("nan"))])
def test_a_file_with_codes_or_values_that_are_none_is_refused(tmp_path, tamper):
    module = nn.Sequential(layer())
    tamper(module[0].parametrizations.weight[0])
    save_structure(tmp_path, module, [CodebookEdit("0", "weight", {"values": 2})])
    with pytest.raises(ArtifactError, match="must stand for values"):
        rebuild(tmp_path, lambda: nn.Sequential(nn.Linear(3, 2)))


@pytest.mark.parametrize(
    "data", [None, {}, {"values": 0}, {"values": 1 << 40}, {"values": True}, {"values": 2, "x": 1}]
)
def test_an_edit_that_makes_no_codebook_is_refused(data):
    with pytest.raises(ArtifactError, match="makes no codebook"):
        edits_from_data([{"edit": "codebook", "path": "", "parameter": "weight", "codebook": data}])


@pytest.mark.parametrize(
    ("codes", "values"),
    [
        (CODES[:1], VALUES),
        (CODES.int(), VALUES),
        (CODES, VALUES[:1]),
        (CODES, VALUES[None]),
        (CODES * 0, VALUES[:0]),
        (CODES, torch.zeros(256)),
    ],
)
def test_what_does_not_fit_is_refused(codes, values):
    with pytest.raises(SurgeryError):
        share_(nn.Linear(3, 2), "weight", codes, values)
