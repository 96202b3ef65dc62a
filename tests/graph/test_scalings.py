"""Where channels can be scaled: every claim is checked by scaling at random and comparing the answers."""

import copy

import pytest
import torch
from torch import nn

from tests.graph.networks import NETWORKS, build
from trimpoint.errors import SurgeryError
from trimpoint.graph import mask_, trace
from trimpoint.graph.scalings import find_scalings, rescale_
from trimpoint.parts import Group

ALL_KEPT = {"Depthwise", "Shared"}
"""Networks whose activations are not homogeneous, or whose layers are used twice."""


def groups(module, inputs):
    return {group.name: group for group in find_scalings(trace(module.eval(), inputs)).groups}


def randomised(module):
    """Give batch norms statistics and affine parts of their own."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2)
            part.weight.data.uniform_(-1.5, 1.5)
            part.bias.data.uniform_(-1, 1)
    return module.eval()


def factors(found, seed=0):
    generator = torch.Generator().manual_seed(seed)
    free = [group for group in found.values() if not group.reason]
    return {group: torch.exp2(torch.empty(group.size).uniform_(-3, 3, generator=generator)) for group in free}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8 * 9, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.point(self.deep(x).relu())
        return self.head(self.pool(x).flatten(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, dropout=0.0)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def test_channels_run_through_residuals_depthwise_pooling_and_flattening():
    module = randomised(Residual())
    found = groups(module, torch.randn(2, 3, 6, 6))
    roles = {
        name: sorted((m.path, m.parameter, m.role) for m in group.members if m.parameter == "weight")
        for name, group in found.items()
        if not group.reason
    }
    assert roles == {
        "norm": [
            ("deep", "weight", "in"),
            ("head", "weight", "in"),
            ("norm", "weight", "out"),
            ("point", "weight", "out"),
            ("stem", "weight", "through"),
        ],
        "deep": [("deep", "weight", "out"), ("point", "weight", "in")],
    }
    assert [len(m.indices[0]) for m in found["norm"].members if m.path == "head"] == [9]


def test_attention_passes_its_values_and_norms_begin_channels():
    found = groups(Encoder(), torch.randn(2, 5, 16)).values()
    free = {group.members[0].path: group.size for group in found if not group.reason}
    assert free == {"layer.norm1": 16, "layer.self_attn": 16, "layer.norm2": 16, "layer.linear1": 32}


@pytest.mark.parametrize("make", [Residual, Encoder])
@pytest.mark.parametrize("seed", range(3))
def test_any_factors_leave_the_answers_as_they_are(make, seed):
    torch.manual_seed(seed)
    inputs = torch.randn(4, 3, 6, 6) if make is Residual else torch.randn(4, 5, 16)
    module = randomised(make()).double()
    before = copy.deepcopy(module)
    inputs = inputs.double()
    chosen = factors(groups(module, inputs), seed)
    rescale_(module, chosen, inputs)
    torch.testing.assert_close(module(inputs), before(inputs), rtol=1e-9, atol=1e-9)
    changed = [name for name, p in module.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert len(changed) >= 6


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_found_in_networks_of_all_kinds_holds(name):
    module, inputs = build(name)
    found = groups(module, inputs)
    rescale_(module, factors(found), inputs)
    assert any(not group.reason for group in found.values()) == (name not in ALL_KEPT)


@pytest.mark.parametrize("between", [nn.GELU(), nn.Sigmoid(), nn.ReLU6(), nn.Softmax(1), nn.LayerNorm(6)])
def test_what_is_not_homogeneous_ends_channels(between):
    module = nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 2)).eval()
    found = groups(module, torch.randn(2, 4))
    assert not any("0" in {m.path for m in group.members} for group in found.values() if not group.reason)


def test_layers_used_twice_and_weights_that_are_held_are_left():
    shared = nn.Linear(6, 6)
    module = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 2)).eval()
    assert all(group.reason for group in groups(module, torch.randn(2, 6)).values())
    held = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    mask_(held[2], "weight", torch.ones(2, 6, dtype=torch.bool))
    assert all(group.reason for group in groups(held, torch.randn(2, 6)).values())


def test_a_scaling_that_changes_the_answers_is_undone():
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    inputs = torch.randn(2, 4)
    (group,) = (group for group in groups(module, inputs).values() if not group.reason)
    wrong = Group(members=tuple(m for m in group.members if m.role == "out"), size=6)
    before = copy.deepcopy(module)
    with pytest.raises(SurgeryError, match="answers otherwise"):
        rescale_(module, {wrong: torch.full((6,), 2.0)}, inputs)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before.parameters(), strict=True))
