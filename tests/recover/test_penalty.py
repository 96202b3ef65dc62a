"""Penalties against their formulas, and what a kept state says of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trimpoint.graph import coupled_groups, trace
from trimpoint.recover import Settings, train
from trimpoint.recover.penalty import Penalty, group_lasso, scale_lasso, scales


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(F.relu(self.hidden(F.relu(self.norm(self.conv(x))).mean((2, 3)))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    nn.init.normal_(net.norm.weight)
    return net


@pytest.fixture
def groups(net):
    return [group for group in coupled_groups(trace(net, torch.zeros(2, 1, 4, 4))) if not group.reason]


def units(net):
    """Return all weights of each channel of `conv`, and of each neuron of `hidden`, `[units, weights]`."""
    channels = torch.cat([net.conv.weight.flatten(1), net.norm.weight[:, None], net.hidden.weight.t()], 1)
    return channels, torch.cat([net.hidden.weight, net.head.weight.t()], 1)


def test_group_lasso_against_the_formula(net, groups):
    penalty = group_lasso(groups, 0.5, 0)
    expected = sum(0.5 * part.shape[1] ** 0.5 * part.norm(dim=1).sum() for part in units(net))
    assert torch.allclose(penalty.of(net, 0), expected)


def test_gradient_of_the_group_lasso_is_that_of_the_norm(net, groups):
    [channel] = [group for group in groups if group.name == "conv"]
    group_lasso([channel], 0.5, 0).of(net, 0).backward()
    weights = units(net)[0]
    expected = 0.5 * weights.shape[1] ** 0.5 * net.conv.weight / weights.norm(dim=1)[:, None, None, None]
    assert torch.allclose(net.conv.weight.grad, expected, rtol=1e-5)
    assert net.conv.bias.grad is None
    assert net.head.weight.grad is None


def test_units_of_zeros_have_a_finite_gradient(net, groups):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    group_lasso(groups, 1.0, 0).of(net, 0).backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in net.parameters())


def test_scale_lasso_against_the_formula(net, groups):
    assert torch.allclose(scale_lasso(groups, 0.5, 0).of(net, 0), 0.5 * net.norm.weight.abs().sum())
    assert [len(scales(net, group)) for group in groups] == [1, 0]


def test_frozen_weights_do_not_count(net, groups):
    net.hidden.weight.requires_grad_(False)
    net.norm.weight.requires_grad_(False)
    conv, head = net.conv.weight.flatten(1), net.head.weight.t()
    expected = 3 * conv.norm(dim=1).sum() + 3**0.5 * head.norm(dim=1).sum()
    assert torch.allclose(group_lasso(groups, 1.0, 0).of(net, 0), expected)
    assert float(scale_lasso(groups, 1.0, 0).of(net, 0)) == 0


@pytest.mark.parametrize("lasso", [group_lasso, scale_lasso])
def test_strength_rises_linearly_and_stays(net, groups, lasso):
    whole = float(lasso(groups, 1.0, 0).of(net, 0).detach())
    shares = [float(lasso(groups, 1.0, 3).of(net, step).detach()) / whole for step in (0, 1, 2, 3, 4, 100)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_bfloat16_weights(net, groups):
    expected = float(group_lasso(groups, 1.0, 0).of(net, 0).detach())
    found = group_lasso(groups, 1.0, 0).of(net.to(torch.bfloat16), 0)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(expected, rel=0.01)


def batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(4):
        yield torch.randn(8, 1, 4, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def run(net, steps, penalty, state=None):
    fresh = Net()
    fresh.load_state_dict(net.state_dict())
    done = train(fresh, loss_of, batches, Settings(steps=steps, lr=0.05), state=state, penalty=penalty)
    return fresh.state_dict(), done


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_is_that_of_the_batch_and_the_penalty(net, groups):
    penalty = group_lasso(groups, 0.01, 0)
    _, plain = run(net, 1, None)
    _, more = run(net, 1, penalty)
    assert more.first_loss == pytest.approx(plain.first_loss + float(penalty.of(net, 0).detach()), rel=1e-5)


def test_a_longer_run_goes_on_from_the_state_of_the_same_penalty_only(net, groups, tmp_path):
    state = tmp_path / "state.safetensors"
    penalty = group_lasso(groups, 0.01, 6)
    run(net, 10, penalty, state)
    kept = state.read_bytes()
    for other in (None, group_lasso(groups, 0.02, 6), group_lasso(groups, 0.01, 7), scale_lasso(groups, 0.01, 6)):
        state.write_bytes(kept)
        assert run(net, 20, other, state)[1].resumed == 0
    state.write_bytes(kept)
    resumed, done = run(net, 20, penalty, state)
    assert done.resumed == 7
    assert same(resumed, run(net, 20, penalty)[0])


def test_no_penalty_and_one_of_nothing_are_the_same(net):
    nothing = Penalty(of=lambda model, step: torch.zeros(()), key="nothing")
    assert same(run(net, 5, None)[0], run(net, 5, nothing)[0])
