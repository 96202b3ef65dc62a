"""What layers see: patches of kernels, the Fisher information against gradients by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trimpoint.low_rank import observed
from trimpoint.low_rank.observed import input_fisher, patches_of
from trimpoint.task import Task, squared_error

LAYERS = [
    nn.Conv2d(3, 4, 3, padding=1),
    nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2), padding_mode="circular"),
    nn.Conv1d(3, 4, 3, padding="same", dilation=2),
    nn.Conv3d(2, 4, (1, 2, 3), stride=2, padding=1, padding_mode="replicate"),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_patches_times_the_kernel_are_the_outputs(layer):
    dims = len(layer.kernel_size)
    x = torch.randn(2, layer.in_channels, *(5, 6, 7)[:dims], generator=torch.Generator().manual_seed(0))
    rows = patches_of(layer, x, 10**6, np.random.default_rng(0))
    expected = layer(x).movedim(1, -1).reshape(-1, layer.out_channels)
    assert torch.allclose(F.linear(rows, layer.weight.flatten(1), layer.bias), expected, atol=1e-5)
    some = patches_of(layer, x[0], 3, np.random.default_rng(0))
    assert some.shape == (3, rows.shape[1])


def test_the_fisher_information_is_that_of_gradients_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(6, 5), torch.randn(6, 1)
    task = Task(calibrate=list(zip(x, y, strict=True)), loss=squared_error, batch_size=3)
    found = input_fisher(model, task, {"0": lambda m: m.weight.grad})["0"]
    expected = torch.zeros(5)
    for one, target in zip(x, y, strict=True):
        (grad,) = torch.autograd.grad(F.mse_loss(model(one[None]), target[None]), model[0].weight)
        expected += grad.square().sum(0) / 6
    assert torch.allclose(found.float(), expected, rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_covariances_that_do_not_fit_together_take_several_passes(monkeypatch):
    monkeypatch.setattr(observed, "MOST_BYTES", 8 * 200)
    assert list(observed._passes({"a": 10, "b": 10, "c": 10, "d": 30, "e": 1})) == [["a", "b"], ["c"], ["d"], ["e"]]
