"""Binary and ternary weights: the identities of the papers, what is trained, what is saved, what is refused."""

import copy

import pytest
import torch
from torch import nn

from trimpoint.errors import ArtifactError, SurgeryError
from trimpoint.graph import GridEdit, OnSigns, baked, grids_of, mask_, put_on_grid_, rebuild, save_structure
from trimpoint.graph.edits import edits_from_data, edits_to_data
from trimpoint.graph.grids import grid_to_data


@pytest.fixture
def weight():
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(1))


def held(weight, signs):
    module = nn.Linear(weight.shape[1], weight.shape[0])
    signs.begin_(weight)
    put_on_grid_(module, "weight", signs, values=weight)
    return module


def error(weight, found):
    return float((weight - found).double().square().sum())


def test_binary_weights_are_the_nearest_of_all_signs_and_scales():
    weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    found = held(weight, OnSigns(2)).weight.detach()
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 8)
    best_scales = (every * weight).sum(1) / 8  # of the least squares for these signs
    least = min(error(weight, scale * signs) for scale, signs in zip(best_scales, every, strict=True))
    assert error(weight, found) == pytest.approx(least, rel=1e-5)
    torch.testing.assert_close(found, weight.abs().mean() * weight.sign())


def test_channels_have_scales_of_their_own(weight):
    found = held(weight, OnSigns(2, 0.0, len(weight))).weight.detach()
    torch.testing.assert_close(found, weight.abs().mean(1, keepdim=True) * weight.sign())
    kernel = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    along = OnSigns(2, 0.0, 6, 1)(kernel)
    torch.testing.assert_close(along, kernel.abs().mean((0, 2), keepdim=True) * kernel.sign())


@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_ternary_weights_are_nearly_the_nearest_of_all_thresholds(draw):
    weight = draw(1, 3000, generator=torch.Generator().manual_seed(3))
    found = held(weight, OnSigns(3)).weight.detach()
    sizes = weight.abs().flatten().sort(descending=True).values.double()
    gains = sizes.cumsum(0).square() / torch.arange(1, len(sizes) + 1)  # of the largest k, with their best scale
    least = float(sizes.square().sum() - gains.max())
    assert least <= error(weight, found) <= 1.03 * least
    large = weight.abs() > 0.7 * weight.abs().mean()
    torch.testing.assert_close(found, weight[large].abs().mean() * weight.sign() * large)


def test_gradients_of_computed_values_pass_as_they_are(weight):
    module = held(weight, OnSigns(3))
    module.weight.backward(weight.cos())
    torch.testing.assert_close(module.parametrizations.weight.original.grad, weight.cos())


@pytest.mark.parametrize("scales", [1, 6])
def test_gradients_of_learned_values_are_those_of_the_paper(weight, scales):
    module = held(weight, OnSigns(3, 0.05, scales, learned=True))
    signs, gradient = module.parametrizations.weight[0], torch.sin(7 * weight)
    with torch.no_grad():
        signs.positive.mul_(1.5)
        signs.negative.mul_(0.8)
    module.weight.backward(gradient)
    dims = [1] if scales > 1 else [0, 1]
    limit = 0.05 * weight.abs().amax(dims, keepdim=True)
    up, down = weight > limit, weight < -limit
    # Zhu et al. (2017), equations 7 and 8, W_p = positive and W_n = −negative.
    torch.testing.assert_close(signs.positive.grad, (gradient * up).sum(dims).view(-1))
    torch.testing.assert_close(signs.negative.grad, (gradient * down).sum(dims).view(-1))
    passed = torch.where(up, signs.positive[:, None], torch.where(down, -signs.negative[:, None], 1.0)) * gradient
    torch.testing.assert_close(module.parametrizations.weight.original.grad, passed.detach())


def test_learned_values_begin_with_the_means(weight):
    signs = held(weight, OnSigns(3, 0.05, learned=True)).parametrizations.weight[0]
    limit = 0.05 * weight.abs().max()
    assert float(signs.positive.detach()) == pytest.approx(float(weight[weight > limit].mean()), rel=1e-5)
    assert float(signs.negative.detach()) == pytest.approx(float(weight[weight < -limit].mean()), rel=1e-5)
    ones = held(torch.ones(2, 3), OnSigns(2, 0.0, learned=True)).parametrizations.weight[0]
    assert float(ones.negative.detach()) == -1.0


@pytest.mark.parametrize("values", [2, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_a_plain_loop_changes_the_values_and_keeps_their_number(weight, values, learned):
    module = held(weight, OnSigns(values, 0.0 if values == 2 else 0.05, learned=learned))
    before, data = module.weight.detach().clone(), torch.randn(64, 40, generator=torch.Generator().manual_seed(4))
    target = data @ weight.T.roll(1, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(data) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = baked(module).weight.detach()
    assert losses[-1] < 0.6 * losses[0]
    assert bool((after.sign() != before.sign()).any())
    assert len(after.unique()) == values


def test_zeros_of_a_mask_stay_and_do_not_count(weight):
    keep = weight.abs() > 1
    module = nn.Linear(40, 6)
    mask_(module, "weight", keep, values=weight)
    put_on_grid_(module, "weight", OnSigns(3, 0.5))
    found = module.weight.detach()
    assert bool((found[~keep] == 0).all())
    torch.testing.assert_close(found, weight[keep].abs().mean() * weight.sign() * keep)


def test_weights_of_zeros_and_of_one_size_stay_finite():
    for weight in (torch.zeros(2, 3), torch.full((2, 3), 0.25), torch.full((2, 3), -1e-30)):
        for signs in (OnSigns(2), OnSigns(3, 0.7, 2), OnSigns(3, 0.05, learned=True)):
            found = held(weight, copy.deepcopy(signs)).weight.detach()
            torch.testing.assert_close(found, weight)


def test_short_types_keep_the_number_of_values(weight):
    module = held(weight, OnSigns(3)).half()
    assert module.parametrizations.weight[0].threshold.dtype == torch.float32
    assert len(module.weight.unique()) == 3


@pytest.mark.parametrize("learned", [False, True])
def test_saved_and_made_again(tmp_path, weight, learned):
    module = nn.Sequential(held(weight, OnSigns(3, 0.3, learned=learned)))
    edits = [GridEdit("0", "weight", grid_to_data(module[0].parametrizations.weight[0]))]
    assert edits_from_data(edits_to_data(edits)) == edits
    assert grids_of(module) == {}
    save_structure(tmp_path, module, edits)
    again = rebuild(tmp_path, lambda: nn.Sequential(nn.Linear(40, 6)))
    assert torch.equal(again[0].weight, module[0].weight)


@pytest.mark.parametrize("tamper", [lambda s: s.threshold.fill_(-1.0), lambda s: s.positive.data.fill_(torch.inf)])
def test_a_file_with_numbers_that_cannot_be_is_refused(tmp_path, weight, tamper):
    module = nn.Sequential(held(weight, OnSigns(3, 0.3, learned=True)))
    tamper(module[0].parametrizations.weight[0])
    save_structure(tmp_path, module, [GridEdit("0", "weight", {"signs": 3, "axis": 0, "scales": 1, "learned": True})])
    with pytest.raises(ArtifactError, match="finite and positive"):
        rebuild(tmp_path, lambda: nn.Sequential(nn.Linear(40, 6)))


@pytest.mark.parametrize(
    "change", [{"signs": 4}, {"signs": True}, {"axis": 9}, {"scales": 0}, {"learned": 1}, {"x": 1}]
)
def test_an_edit_that_makes_no_signs_is_refused(change):
    data = {"signs": 3, "axis": 0, "scales": 1, "learned": False} | change
    with pytest.raises(ArtifactError, match="makes no grid"):
        edits_from_data([{"edit": "grid", "path": "", "parameter": "weight", "grid": data}])


def test_scales_that_do_not_fit_are_refused():
    with pytest.raises(SurgeryError, match="one scale, or one for each"):
        put_on_grid_(nn.Linear(3, 2), "weight", OnSigns(3, 0.7, 3))
