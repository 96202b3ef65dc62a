"""Each criterion against its formula, finite differences, loops over samples, or the true change of the loss."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.importance.cases import (
    Attention,
    Packed,
    Plain,
    Recurrent,
    attention_group,
    context,
    group_of,
    hidden_group,
    packed_group,
)
from trimpoint.graph import coupled_groups, trace
from trimpoint.importance import NAMES, scores
from trimpoint.task import Task, cross_entropy


def score(model, task, group, importance, seed=0):
    return scores(context(model, task, seed), [group], importance)[group.name]


def parts(model):
    """Return the weights of the units of `conv1` in its three members, `[16, weights]` each."""
    return [
        model.conv1.weight.double().flatten(1),
        model.norm.weight.double()[:, None],
        model.conv2.weight.double().movedim(1, 0).flatten(1),
    ]


def test_magnitude_against_the_formula(model, task):
    squared = [values.square().sum(1) for values in parts(model)]
    expected = torch.stack([values / values.mean() for values in squared]).mean(0)
    assert torch.allclose(score(model, task, group_of(model, "conv1"), "magnitude"), expected)


def test_l1_against_the_formula(model, task):
    absolute = [values.abs().sum(1) for values in parts(model)]
    expected = torch.stack([values / values.mean() for values in absolute]).mean(0)
    assert torch.allclose(score(model, task, group_of(model, "conv1"), "l1"), expected)


def test_bn_scale_is_the_absolute_scale(model, task):
    found = score(model, task, group_of(model, "conv1"), "bn-scale")
    assert torch.equal(found, model.norm.weight.detach().double().abs())


def test_bn_scale_without_a_norm_is_the_magnitude(model, task):
    group = group_of(model, "conv2")
    assert torch.equal(score(model, task, group, "bn-scale"), score(model, task, group, "magnitude"))


def test_geometric_median_against_all_pairs(model, task):
    filters = model.conv1.weight.detach().double().flatten(1).numpy()
    sums = np.array([sum(np.linalg.norm(one - other) for other in filters) for one in filters])
    expected = torch.from_numpy(sums / sums.mean())
    assert torch.allclose(score(model, task, group_of(model, "conv1"), "geometric-median"), expected, rtol=1e-6)


def test_geometric_median_finds_the_redundant_filter(model, task):
    """A filter that is the mean of the others is least important, although a smaller one is there."""
    with torch.no_grad():
        model.conv1.weight[3] = model.conv1.weight[4:].mean(0)
        model.conv1.weight[5] = 1e-3 * torch.randn(1, 3, 3) + 1
    assert int(score(model, task, group_of(model, "conv1"), "geometric-median").argmin()) == 3


def test_lamp_against_the_formula(model, task):
    group = group_of(model, "conv1")
    size = score(model, task, group, "magnitude")
    expected = torch.stack([one / size[size >= one].sum() for one in size])
    found = score(model, task, group, "lamp")
    assert torch.allclose(found, expected)
    assert float(found.max()) == 1
    assert torch.equal(found.argsort(), size.argsort())


def test_random_is_seeded(model, task):
    group = group_of(model, "conv1")
    assert torch.equal(score(model, task, group, "random"), score(model, task, group, "random"))
    assert not torch.equal(score(model, task, group, "random", seed=1), score(model, task, group, "random"))


def test_taylor_against_finite_differences_of_gates(model, task):
    """The sum of gradient times weight is the derivative of the loss by a gate on the unit (Molchanov et al. 2019)."""
    found = score(model, task, group_of(model, "conv2"), "taylor")
    expected = sum(2 * gates(model, batch).square() for batch in task.batches("calibrate"))
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-9)


def test_group_fisher_against_finite_differences_of_gates(model, task):
    found = score(model, task, group_of(model, "conv2"), "group-fisher")
    expected = sum(gates(model, batch).square() for batch in task.batches("calibrate", size=1)) / 12
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-9)


def gates(model, batch):
    """Return the derivative of the loss by a gate on each channel of `conv2`, by central differences, `[32]`."""
    double = copy.deepcopy(model).double()
    found = []
    for unit in range(32):
        losses = []
        for step in (1e-4, -1e-4):
            gate = torch.ones(32, dtype=torch.float64)
            gate[unit] += step
            handle = double.conv2.register_forward_hook(lambda m, i, o, g=gate: o * g[:, None, None])
            with torch.no_grad():
                losses.append(cross_entropy(double(batch[0].double()), batch[1]).item())
            handle.remove()
        found.append((losses[0] - losses[1]) / 2e-4)
    return torch.tensor(found, dtype=torch.float64)


def test_taylor_is_the_true_change_of_a_linear_loss():
    """Where the loss is linear in each unit, the expansion is exact: it is what removing the unit changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 1))
    data = TensorDataset(torch.randn(8, 5), torch.randn(8, 1))
    task = Task(calibrate=data, loss=lambda outputs, targets: (outputs * targets).mean(), batch_size=8)
    group = coupled_groups(trace(model, torch.zeros(2, 5)))[0]
    found = score(model, task, group, "taylor")
    x, y = next(task.batches("calibrate"))
    whole, expected = task.loss(model(x), y), []
    for unit in range(6):
        less = copy.deepcopy(model)
        with torch.no_grad():
            less[0].weight[unit], less[0].bias[unit] = 0, 0
        expected.append(2 * (whole - task.loss(less(x), y)).double() ** 2)  # its producer and its consumer
    assert torch.allclose(found, torch.stack(expected).detach(), rtol=1e-4)


def test_fisher_against_a_loop_over_samples(model, task):
    group = group_of(model, "conv1")
    expected = torch.zeros(16, dtype=torch.float64)
    for x, y in task.batches("calibrate", size=1):
        double = copy.deepcopy(model).double()
        cross_entropy(double(x.double()), y).backward()
        for layer in (double.conv1, double.norm):
            for p in (layer.weight, layer.bias):
                expected += (p.detach() * p.grad).square().flatten(1).sum(1) if p.ndim > 1 else (p * p.grad).square()
        w = double.conv2.weight
        expected += (w.detach() * w.grad).square().sum((0, 2, 3))
    found = score(model, task, group, "fisher")
    assert torch.allclose(found, expected.detach() / 2 / 12, rtol=1e-4)


def test_fisher_is_the_change_of_a_quadratic_loss():
    """For logistic regression on drawn labels, half of Fisher times squared weight is the expected second-order term.

    With one input that is not zero in each sample the Hessian is diagonal, and OBD's saliency is exact to second order.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.eye(4).repeat(64, 1)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[1].weight.copy_(0.05 * torch.randn(2, 4, generator=generator))
    labels = torch.multinomial(model(inputs).softmax(-1), 1, generator=generator).flatten()
    task = Task(calibrate=TensorDataset(inputs, labels), loss=cross_entropy)
    group = coupled_groups(trace(model, torch.zeros(2, 4)))[0]
    found = score(model, task, group, "fisher")
    weight = model[1].weight.detach().double()
    # Near p = 1/2 the Fisher information of each logit is 1/4, a quarter of the samples shows each input; the first
    # layer has one weight of 1 in each unit, whose gradient is that of the second layer along its weights.
    second = 0.5 * 0.25 * 0.25 * weight.square().sum(0)
    first = 0.5 * 0.25 * 0.25 * (weight[0] - weight[1]).square()
    assert torch.allclose(found, second + first, rtol=0.05)


def test_activation_is_that_of_the_reader(model, task):
    found = score(model, task, group_of(model, "conv1"), "activation")
    seen = []
    with torch.no_grad():
        for x, _ in task.batches("calibrate"):
            seen.append(F.relu(model.norm(model.conv1(x))))
    expected = torch.cat(seen).double().abs().mean((0, 2, 3))
    assert torch.allclose(found, expected / expected.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "group"),
    [
        (Attention, attention_group()),
        (Packed, packed_group()),
        (Recurrent, hidden_group(0)),
        (Recurrent, hidden_group(1)),
        (Recurrent, hidden_group(1, "_reverse")),
    ],
    ids=["heads", "packed-heads", "hidden-inner", "hidden", "hidden-reverse"],
)
@pytest.mark.parametrize("importance", NAMES)
def test_a_unit_without_effect_is_the_least_important_of_any_kind(make, group, importance, sequences):
    torch.manual_seed(0)
    model = make().eval()
    useless = group.size - 1
    with torch.no_grad():
        for member in group.members:
            parameter = getattr(model.get_submodule(member.path), member.parameter)
            parameter.index_fill_(member.dim, torch.tensor(member.indices[useless]), 0)
    found = score(model, sequences, group, importance)
    assert found.shape == (group.size,)
    assert found.dtype == torch.float64
    if importance == "geometric-median" and group.size == 2:
        assert found[0] == found[1]  # of two units, both are as far from the other
    elif importance not in ("random", "geometric-median"):
        assert int(found.argmin()) == useless
        assert float(found[useless]) == 0


@pytest.mark.parametrize("importance", NAMES)
def test_bfloat16_models(importance, task):
    torch.manual_seed(0)
    model = Plain()
    nn.init.normal_(model.norm.weight)
    model = model.eval().to(torch.bfloat16)
    data = TensorDataset(torch.randn(6, 1, 6, 6).to(torch.bfloat16), torch.randint(0, 3, (6,)))
    groups = [g for g in coupled_groups(trace(model, data[:2][0])) if not g.reason]
    found = scores(context(model, task.with_(calibrate=data)), groups, importance)
    assert set(found) == {"conv1", "conv2"}
    assert all(values.dtype == torch.float64 and float(values.std()) > 0 for values in found.values())


@pytest.mark.parametrize("importance", [name for name in NAMES if name != "random"])
def test_scores_of_a_group_do_not_depend_on_the_others(importance, model, task):
    groups = [group for group in coupled_groups(trace(model, torch.zeros(2, 1, 6, 6))) if not group.reason]
    together = scores(context(model, task), groups, importance)
    for group in groups:
        assert torch.equal(together[group.name], score(model, task, group, importance))


def test_the_model_and_its_gradients_are_left_alone(model, task):
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for importance in NAMES:
        score(model, task, group_of(model, "conv1"), importance)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(part._forward_hooks for part in model.modules())
