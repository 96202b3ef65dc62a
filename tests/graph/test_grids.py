"""Weights held on a grid: what a module computes, how it trains, what is saved, and what is handed to a runtime."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from trimpoint.errors import ArtifactError, SurgeryError
from trimpoint.graph import GridEdit, OnGrid, baked, grids_of, mask_, put_on_grid_, rebuild, save_structure
from trimpoint.graph.edits import edits_from_data, edits_to_data
from trimpoint.graph.grids import grid_to_data
from trimpoint.parts import MaskSchedule


def layer(bits=4):
    torch.manual_seed(0)
    module = nn.Linear(6, 3)
    scale = module.weight.detach().abs().amax(1) / (2 ** (bits - 1) - 1)
    put_on_grid_(module, "weight", OnGrid(scale, bits))
    return module


def test_the_module_computes_with_multiples_of_the_scale():
    module = layer()
    codes = module.weight / module.parametrizations.weight[0].scale[:, None]
    torch.testing.assert_close(codes, codes.round())
    assert float(codes.detach().abs().max()) == pytest.approx(7)
    grid = grids_of(module)[""]
    assert grid.codes.dtype == np.int8
    np.testing.assert_allclose(grid.codes * grid.scale[:, None], module.weight.detach(), rtol=1e-6)


def test_training_in_any_loop_keeps_weights_on_the_grid_and_moves_them():
    module = layer()
    before = module.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.ones(4, 6)).square().sum().backward()
        optimizer.step()
    after = module.weight.detach()
    assert not torch.equal(before, after)
    codes = after / module.parametrizations.weight[0].scale[:, None]
    torch.testing.assert_close(codes, codes.round())


def test_the_gradient_passes_rounding_and_stops_out_of_range():
    module = nn.Linear(3, 1, bias=False)
    put_on_grid_(module, "weight", OnGrid(torch.tensor([0.1]), 3), torch.tensor([[0.12, 5.0, -0.31]]))
    module(torch.tensor([[2.0, 3.0, 4.0]])).sum().backward()
    torch.testing.assert_close(module.parametrizations.weight.original.grad, torch.tensor([[2.0, 0.0, 0.0]]))
    torch.testing.assert_close(module.weight.detach(), torch.tensor([[0.1, 0.3, -0.3]]))


def test_zeros_of_a_mask_stay_zero():
    module = nn.Linear(6, 3)
    keep = torch.rand(3, 6) > 0.5
    mask_(module, "weight", keep)
    put_on_grid_(module, "weight", OnGrid(torch.full((3,), 0.01), 8))
    module.parametrizations.weight.original.data.fill_(0.5)
    assert (module.weight[~keep] == 0).all()
    assert (module.weight[keep] == 0.5).all()
    assert torch.equal(baked(module).weight, module.weight)


def test_a_grid_behind_a_mask_on_a_schedule_leaves_it_what_may_come_back():
    module = nn.Linear(6, 4)
    before = module.weight.detach().clone()
    mask_(module, "weight", schedule=MaskSchedule(removed=12, steps=10, curve="cubic"))
    module.eval()
    scale = torch.full((4,), 0.01)
    values = (module.weight.detach() / 0.01).round() * 0.01
    put_on_grid_(module, "weight", OnGrid(scale, 8), values)
    behind = module.parametrizations.weight.original.detach()
    gone = module.weight == 0
    assert int(gone.sum()) >= 12
    assert torch.equal(behind[gone], before[gone])
    torch.testing.assert_close(behind[~gone], values[~gone])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_shorter_type_leaves_scales_and_codes_as_they_are(dtype):
    module = layer(8)
    module.weight = module.weight.detach()
    codes, scale = grids_of(module)[""].codes, module.parametrizations.weight[0].scale.clone()
    module.to(dtype)
    assert torch.equal(module.parametrizations.weight[0].scale, scale)
    assert module.weight.dtype == dtype
    np.testing.assert_array_equal(grids_of(module)[""].codes, codes)


def test_a_mask_put_on_after_a_grid_comes_before_it():
    module = layer()
    keep = torch.rand(3, 6) > 0.5
    mask_(module, "weight", keep)
    assert [type(step).__name__ for step in module.parametrizations.weight] == ["Mask", "OnGrid"]
    assert (module.weight[~keep] == 0).all()


def test_a_second_grid_takes_the_place_of_the_first():
    module = layer()
    put_on_grid_(module, "weight", OnGrid(torch.tensor([1.0]), 2))
    assert len(module.parametrizations.weight) == 1
    assert set(module.weight.detach().unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_baking_gives_a_plain_module_and_leaves_the_other_as_it_is():
    module = nn.Sequential(layer(), nn.ReLU())
    plain = baked(module)
    assert list(plain.state_dict()) == ["0.weight", "0.bias"]
    assert torch.equal(plain[0].weight, module[0].weight)
    assert type(plain[0]) is nn.Linear
    assert grids_of(plain) == {}
    assert list(grids_of(module)) == ["0"]
    assert torch.equal(copy.deepcopy(module)[0].weight, module[0].weight)


def test_saved_and_made_again(tmp_path):
    module = nn.Sequential(layer(), nn.ReLU())
    edit = GridEdit("0", "weight", grid_to_data(module[0].parametrizations.weight[0]))
    assert edits_from_data(edits_to_data([edit])) == [edit]
    save_structure(tmp_path, module, [edit])
    again = rebuild(tmp_path, lambda: nn.Sequential(nn.Linear(6, 3), nn.ReLU()))
    assert torch.equal(again[0].weight, module[0].weight)
    np.testing.assert_array_equal(grids_of(again)["0"].codes, grids_of(module)["0"].codes)


@pytest.mark.parametrize(
    "grid",
    [
        None,
        {},
        {"bits": 4, "axis": 0},
        {"bits": 9, "axis": 0, "scales": 3, "learned": False},
        {"bits": 1, "axis": 0, "scales": 3, "learned": False},
        {"bits": 4, "axis": -1, "scales": 3, "learned": False},
        {"bits": 4, "axis": 0, "scales": 0, "learned": False},
        {"bits": True, "axis": 0, "scales": 3, "learned": False},
        {"bits": 4, "axis": 0, "scales": 1 << 31, "learned": False},
        {"bits": 4, "axis": 0, "scales": 3, "learned": 1},
        {"bits": 4, "axis": 0, "scales": 3, "learned": False, "more": 1},
    ],
)
def test_a_tampered_grid_is_refused(grid):
    with pytest.raises(ArtifactError, match="makes no grid"):
        edits_from_data([{"edit": "grid", "path": "0", "parameter": "weight", "grid": grid}])


@pytest.mark.parametrize(
    ("parameter", "grid"),
    [
        ("nothing", OnGrid(torch.ones(3), 4)),
        ("weight", OnGrid(torch.ones(2), 4)),
        ("weight", OnGrid(torch.ones(3), 4, axis=2)),
        ("weight", OnGrid(torch.ones(3, 1), 4)),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(parameter, grid):
    with pytest.raises(SurgeryError):
        put_on_grid_(nn.Linear(6, 3), parameter, grid)


class Indexed(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)
        self.ids = nn.Parameter(torch.arange(6), requires_grad=False)


@pytest.mark.parametrize(
    ("edit", "scale", "words"),
    [
        ({}, 0.0, "finite and positive"),
        ({}, -0.1, "finite and positive"),
        ({}, float("nan"), "finite and positive"),
        (
            {"grid": {"bits": 4, "axis": 0, "scales": 2**31 - 1, "learned": False}},
            0.1,
            "Got 2147483647 for dimension 0",
        ),
        ({"parameter": "ids"}, 0.1, "floating-point"),
        ({"parameter": "forward"}, 0.1, "is no parameter"),
    ],
)
def test_a_grid_that_was_tampered_with_is_refused(tmp_path, edit, scale, words):
    torch.manual_seed(0)
    module = Indexed()
    put_on_grid_(module, "weight", OnGrid(torch.tensor([0.1, scale, 0.1]), 4))
    save_structure(tmp_path, module, [GridEdit("", "weight", grid_to_data(module.parametrizations.weight[0]))])
    structure = json.loads((tmp_path / "structure.json").read_text())
    structure["edits"][0].update(edit)
    (tmp_path / "structure.json").write_text(json.dumps(structure))
    with pytest.raises(ArtifactError, match=words):
        rebuild(tmp_path, Indexed)


def test_a_scale_that_training_turned_negative_is_rebuilt(tmp_path):
    module = Indexed()
    put_on_grid_(module, "weight", OnGrid(torch.tensor([0.1, -0.1, 0.1]), 4, learned=True))
    save_structure(tmp_path, module, [GridEdit("", "weight", grid_to_data(module.parametrizations.weight[0]))])
    assert torch.equal(rebuild(tmp_path, Indexed).weight, module.weight)
