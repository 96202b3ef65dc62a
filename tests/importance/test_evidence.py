"""Slices by unit, lazy passes over the data, and gradients that are those of the model."""

import copy

import pytest
import torch

from tests.importance.cases import Recurrent, context, group_of, hidden_group
from trimpoint.importance import Evidence
from trimpoint.importance.evidence import SAMPLES, by_unit, slices
from trimpoint.task import Task, cross_entropy


def test_slices_hold_what_goes_with_each_unit():
    torch.manual_seed(0)
    model, group = Recurrent(), hidden_group(1)
    for member in group.members:
        values = getattr(model.get_submodule(member.path), member.parameter).detach().double()
        found, sums = slices(values, member), by_unit(values, member)
        for unit, positions in enumerate(member.indices):
            part = values.index_select(member.dim, torch.tensor(positions))
            assert torch.equal(found[unit].sort().values, part.flatten().sort().values)
            assert torch.allclose(sums[unit], part.sum())


def test_biases_statistics_and_zeros_are_no_weights(model, task):
    with torch.no_grad():
        model.norm.weight.zero_()
    group = group_of(model, "conv1")
    found = Evidence(context(model, task), [group]).weights(group)
    assert [(member.path, member.parameter) for member, _ in found] == [("conv1", "weight"), ("conv2", "weight")]
    assert [tuple(values.shape) for _, values in found] == [(16, 9), (16, 9 * 32)]


def test_products_sum_to_gradient_times_weight(model, task):
    groups = [group_of(model, name) for name in ("conv1", "conv2")]
    evidence = Evidence(context(model, task), groups)
    probe = copy.deepcopy(model)
    for row, batch in enumerate(task.batches("calibrate")):
        probe.zero_grad()
        cross_entropy(probe(batch[0]), batch[1]).backward()
        for group in groups:
            for member, products in evidence.batch_products(group):
                tensor = getattr(probe.get_submodule(member.path), member.parameter)
                assert torch.allclose(products[row].sum(), (tensor * tensor.grad).double().sum(), atol=1e-6)
    assert all(products.shape == (2, 16) for _, products in evidence.batch_products(groups[0]))
    assert all(products.shape == (12, 16) for _, products in evidence.sample_products(groups[0]))


def test_samples_are_limited(model):
    data = torch.utils.data.TensorDataset(torch.randn(SAMPLES + 5, 1, 6, 6), torch.zeros(SAMPLES + 5, dtype=torch.long))
    group = group_of(model, "conv1")
    evidence = Evidence(context(model, Task(calibrate=data, loss=cross_entropy)), [group])
    assert evidence.sample_products(group)[0][1].shape == (SAMPLES, 16)


@pytest.mark.parametrize(
    ("ask", "passes"),
    [("weights", 0), ("batch_products", 1), ("sample_products", 1), ("squared_gradients", 1), ("activations", 1)],
)
def test_the_data_is_read_once_for_all_groups_and_only_if_asked_for(ask, passes, model, task, monkeypatch):
    reads = []
    batches = Task.batches
    monkeypatch.setattr(Task, "batches", lambda self, role, **more: reads.append(role) or batches(self, role, **more))
    groups = [group_of(model, name) for name in ("conv1", "conv2")]
    evidence = Evidence(context(model, task), groups)
    for group in (*groups, *groups):
        getattr(evidence, ask)(group)
    assert reads == ["calibrate"] * passes


def test_loss_inside_the_model_with_dropout_is_the_same_each_time():
    class Inner(Recurrent):
        def __init__(self):
            super().__init__()
            self.lstm.dropout = 0.5

        def forward(self, x, y=None):
            scores = torch.nn.functional.dropout(super().forward(x), 0.5, self.training)
            return scores if y is None else cross_entropy(scores, y)

    torch.manual_seed(0)
    model = Inner().eval()
    data = torch.utils.data.TensorDataset(torch.randn(6, 5, 8), torch.randint(0, 3, (6,)))
    task = Task(calibrate=data, step=lambda m, batch: m(*batch), batch_size=3)
    group = hidden_group(1)
    first, second = (Evidence(context(model, task), [group]).batch_products(group) for _ in range(2))
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(first, second, strict=True))
