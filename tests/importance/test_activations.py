"""Where activations are watched: at readers of every shape, in recurrent layers, in attention."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.importance.cases import (
    Attention,
    Packed,
    Recurrent,
    attention_group,
    context,
    hidden_group,
    member,
    packed_group,
)
from trimpoint.importance import Evidence
from trimpoint.parts import Group


def seen(model, task, group):
    return Evidence(context(model, task), [group]).activations(group)


def make(kind):
    torch.manual_seed(0)
    return kind().eval()


@torch.no_grad()
def test_heads_are_watched_where_they_are_joined(sequences):
    model = make(Attention)
    inputs = []
    handle = model.output.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    for x, _ in sequences.batches("calibrate"):
        model(x)
    handle.remove()
    expected = torch.cat(inputs).double().abs().unflatten(-1, (2, 4)).mean((0, 1, 3))
    [(path, found)] = seen(model, sequences, attention_group())
    assert path == "output"
    assert torch.allclose(found, expected)


@torch.no_grad()
def test_heads_inside_a_module_are_watched_by_their_projections(sequences):
    model = make(Packed)
    weight, bias = model.attention.in_proj_weight, model.attention.in_proj_bias
    x = torch.cat([inputs for inputs, _ in sequences.batches("calibrate")])
    expected = F.linear(x, weight, bias).double().abs().unflatten(-1, (3, 2, 4)).mean((0, 1, 2, 4))
    [(path, found)] = seen(model, sequences, packed_group())
    assert path == "attention"
    assert torch.allclose(found, expected)


@torch.no_grad()
@pytest.mark.parametrize(("layer", "reverse", "state"), [(0, "", 0), (0, "_reverse", 1)])
def test_hidden_units_of_inner_layers_are_watched_by_their_last_state(layer, reverse, state, sequences):
    model = make(Recurrent)
    x = torch.cat([inputs for inputs, _ in sequences.batches("calibrate")])
    expected = model.lstm(x)[1][0][state].double().abs().mean(0)
    found = seen(model, sequences, hidden_group(layer, reverse))
    assert {path for path, _ in found} == {"lstm"}
    assert all(torch.allclose(values, expected) for _, values in found)


@torch.no_grad()
def test_hidden_units_of_the_last_layer_are_watched_where_they_are_read(sequences):
    model = make(Recurrent)
    x = torch.cat([inputs for inputs, _ in sequences.batches("calibrate")])
    [(path, found)] = seen(model, sequences, hidden_group(1))
    assert path == "head"
    assert torch.allclose(found, model.lstm(x)[0].mean(1).double().abs().mean(0)[:6])


@torch.no_grad()
def test_channels_that_a_grouped_convolution_reads(task):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)).eval()
    pairs = [[unit, unit + 4] for unit in range(4)]
    group = Group(
        members=(
            member("0", "weight", 0, "out", pairs),
            member("0", "bias", 0, "out", pairs),
            member("2", "weight", 1, "in", [[unit] for unit in range(4)]),
        ),
        size=4,
    )
    x = torch.cat([inputs for inputs, _ in task.batches("calibrate")])
    [(path, found)] = seen(model, task, group)
    assert path == "2"
    assert torch.allclose(found, model[:2](x).double().abs().mean((0, 2, 3)).view(2, 4).mean(0))


@torch.no_grad()
def test_nothing_where_no_module_sees_the_units(sequences):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(3, 6))

        def forward(self, x):
            return F.linear(F.linear(x.mean(1), self.first).relu(), self.second)

    one = [[unit] for unit in range(6)]
    group = Group(members=(member("", "first", 0, "out", one), member("", "second", 1, "in", one)), size=6)
    assert seen(make(Bare), sequences, group) == []


def test_weights_that_are_changed_afterwards_do_not_change_what_was_seen(sequences):
    model = make(Attention)
    evidence = Evidence(context(model, sequences), [attention_group()])
    [(_, before)] = evidence.activations(attention_group())
    kept = copy.deepcopy(before)
    nn.init.zeros_(model.value.weight)
    assert torch.equal(evidence.activations(attention_group())[0][1], kept)
