"""Shared values: after pruning, in training, and where there is nothing to share."""

import torch
from torch import nn

from trimpoint.compress import compress
from trimpoint.graph import baked
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.methods.share_weights import ShareWeights
from trimpoint.plan import Plan
from trimpoint.task import Task


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)).eval()


def test_pruned_weights_stay_zero_and_the_rest_takes_few_values():
    made = baked(compress(network(), Plan().then(PruneWeights(ratio=0.5), ShareWeights(clusters=4))).module)
    for layer in (made[0], made[3]):
        kept = layer.weight[layer.weight != 0]
        assert kept.numel() == layer.weight.numel() // 2
        assert 2 <= len(kept.unique()) <= 4


def test_the_higher_the_price_of_a_bit_the_fewer_values_are_left():
    values = [
        len(baked(compress(network(), Plan().then(ShareWeights(entropy=price))).module)[3].weight.unique())
        for price in (0.0, 0.03, 0.1, 0.8)
    ]
    assert values == sorted(set(values), reverse=True)
    assert values[0] == 16


def test_weights_that_cannot_be_shared_say_why():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[2].weight.zero_()
    changes = compress(model.eval(), Plan().then(ShareWeights())).changes
    assert {change.origin: change.reason for change in changes} == {
        "0": "its weight is tied to another module's",
        "1": "its weight is tied to another module's",
        "2": "all its weights are zero",
    }


def test_weights_that_read_zeros_alone_take_the_nearest_value():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16)).eval()
    inputs = torch.randn(64, 8)
    inputs[:, 3] = 0.0
    data = [(row, 0) for row in inputs]
    task = Task.classification(None, data, data).with_(calibrate=data)
    made = baked(compress(model, Plan().then(ShareWeights(clusters=4, importance="inputs")), task).module)[0].weight
    values = made.unique()
    nearest = values[(model[0].weight[:, 3, None] - values).abs().argmin(1)]
    assert torch.equal(made[:, 3], nearest)
