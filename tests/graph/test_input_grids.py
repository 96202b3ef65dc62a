"""Learned steps: their gradients against the published formulas, and what survives training, copying and saving."""

import copy
import json

import pytest
import torch
from torch import nn

from trimpoint.errors import ArtifactError, SurgeryError
from trimpoint.graph import (
    GridEdit,
    InputGrid,
    InputGridEdit,
    OnGrid,
    baked,
    input_ranges,
    put_input_on_grid_,
    put_on_grid_,
    rebuild,
    save_structure,
)
from trimpoint.graph.edits import edits_from_data, edits_to_data
from trimpoint.graph.grids import grid_to_data


def model():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    put_input_on_grid_([module[0]], InputGrid(-2.0, 2.0))
    put_input_on_grid_([module[2]], InputGrid(0.0, 1.5))
    return module


def test_values_are_rounded_as_uint8_with_a_zero_point():
    values = torch.linspace(-3, 3, 1001)
    grid = InputGrid(-0.7, 1.9)
    step = 2.6 / 255
    zero = round(0.7 / step)
    codes = torch.clamp((values / step).round() + zero, 0, 255)
    torch.testing.assert_close(grid(values).detach(), (codes - zero) * step)
    assert float(grid(torch.zeros(1)).detach()) == 0.0
    assert len(grid(values).unique()) == 256


def test_the_gradient_of_a_learned_scale_is_that_of_the_paper():
    """Esser et al., equation 3 and section 2.2: −v/s + round(v/s) inside, ±Q outside, times 1 / √(N·Q)."""
    torch.manual_seed(0)
    module = nn.Linear(40, 1, bias=False)
    scale, top = torch.tensor([0.04]), 3
    put_on_grid_(module, "weight", OnGrid(scale, 3, learned=True))
    weight = module.parametrizations.weight.original.detach().double()
    outside = torch.randn(1, 40, dtype=torch.float64)
    (module.weight * outside).sum().backward()
    ratio = weight / 0.04
    inner = torch.where(ratio.abs() <= top, ratio.round() - ratio, ratio.sign() * top)
    expected = float((inner * outside).sum()) / (40 * top) ** 0.5
    assert float(module.parametrizations.weight[0].scale.grad) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_of_a_learned_range_is_that_of_its_step():
    """With the least level at 0 there is one step s = high / 255, with the gradient of the same paper."""
    values = torch.rand(4, 30, dtype=torch.float64) * 2.0
    grid = InputGrid(0.0, 1.5).double()
    outside = torch.randn(4, 30, dtype=torch.float64)
    (grid(values) * outside).sum().backward()
    step = 1.5 / 255
    ratio = values / step
    inner = torch.where(ratio <= 255, ratio.round() - ratio, torch.full_like(ratio, 255.0))
    expected = float((inner * outside).sum()) / 255 / (30 * 255) ** 0.5
    assert float(grid.high.grad) == pytest.approx(expected, rel=1e-3)
    assert grid.low.grad is None
    assert not grid.low.requires_grad


@pytest.mark.parametrize("name", ["low", "high"])
def test_gradients_of_ranges_agree_with_finite_differences_of_what_is_clipped(name):
    values = torch.tensor([[-5.0, 5.0, -4.0, 6.0]], dtype=torch.float64)
    grid = InputGrid(-1.0, 2.0).double()
    grid(values).sum().backward()
    # Two values lie beyond each end; each moves with it.
    assert float(getattr(grid, name).grad) == pytest.approx(2.0 / (4 * 255) ** 0.5, rel=0.05)


def test_any_loop_learns_ranges_and_scales():
    module = model()
    for at in (0, 2):
        weight = module[at].weight.detach()
        put_on_grid_(module[at], "weight", OnGrid(weight.abs().amax(1) / 3, 3, learned=True))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    learned = [name for name in before if name.endswith((".high", ".scale"))]
    assert len(learned) == 4
    assert all(not torch.equal(before[name], module.get_parameter(name)) for name in learned)
    assert torch.equal(module[2].input_grid.low, before["2.input_grid.low"])


def test_copies_are_their_own_and_baking_takes_the_grids_out():
    module = model()
    twin = copy.deepcopy(module)
    twin[0].input_grid.high.data.fill_(0.1)
    x = torch.randn(4, 6)
    assert not torch.equal(module(x), twin(x))
    plain = baked(module)
    assert list(plain.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not plain[0]._forward_pre_hooks
    torch.testing.assert_close(plain(x), module(x), atol=0.05, rtol=0)
    assert not torch.equal(plain(x), module(x))
    assert input_ranges(module) == {"0": (-2.0, 2.0), "2": (0.0, 1.5)}
    assert input_ranges(plain) == {}


def test_modules_that_read_one_tensor_share_a_grid_and_none_has_two():
    first, second = nn.Linear(4, 2), nn.Linear(4, 3)
    put_input_on_grid_([first, second], InputGrid(-1.0, 1.0))
    assert first.input_grid is second.input_grid
    with pytest.raises(SurgeryError, match="already"):
        put_input_on_grid_([second], InputGrid(-1.0, 1.0))


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x):
        return self.inner(input=x)


def test_inputs_given_by_name_are_rounded_too():
    module = ByName().eval()
    plain = copy.deepcopy(module)
    put_input_on_grid_([module.inner], InputGrid(-0.1, 0.1))
    x = torch.randn(3, 4)
    torch.testing.assert_close(module(x), plain(x.clamp(-0.1, 0.1)), atol=1e-2, rtol=0)


def saved(directory, edit=None):
    module = model()
    put_on_grid_(module[0], "weight", OnGrid(torch.full((5,), 0.1), 4, learned=True))
    grid = GridEdit("0", "weight", grid_to_data(module[0].parametrizations.weight[0]))
    edits = [InputGridEdit("0", (), 8, False), InputGridEdit("2", (), 8, True), grid]
    assert edits_from_data(json.loads(json.dumps(edits_to_data(edits)))) == edits
    save_structure(directory, module, edits)
    if edit is not None:
        structure = json.loads((directory / "structure.json").read_text())
        structure["edits"][0].update(edit)
        (directory / "structure.json").write_text(json.dumps(structure))
    return module


def fresh():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def test_a_rebuilt_model_rounds_as_before(tmp_path):
    module = saved(tmp_path)
    made = rebuild(tmp_path, fresh).eval()
    x = torch.randn(8, 6)
    assert torch.equal(made(x), module(x))
    assert not made[2].input_grid.low.requires_grad
    assert made[0].input_grid.low.requires_grad
    assert isinstance(made[0].parametrizations.weight[0].scale, nn.Parameter)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"bits": 99}, "2 to 8 bits"),
        ({"also": "2"}, "list of paths"),
        ({"also": ["forward"]}, "no module"),
        ({"also": ["2"]}, "attribute 'input_grid' already"),
        ({"zero": 3}, "least level"),
    ],
)
def test_an_edit_that_was_tampered_with_is_refused(tmp_path, edit, words):
    saved(tmp_path, edit)
    with pytest.raises(ArtifactError, match=words):
        rebuild(tmp_path, fresh)
