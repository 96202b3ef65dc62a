"""Small models and their groups of every kind."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trimpoint.build import Build
from trimpoint.context import _Context
from trimpoint.graph import coupled_groups, trace
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.parts import Group, Member
from trimpoint.plan import Step
from trimpoint.task import Task, cross_entropy


class Plain(nn.Module):
    """Two convolutions, a batch norm, a head: `[batch, 1, 6, 6]` to `[batch, 3]`."""

    def __init__(self, width=16, hidden=32):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, hidden, 3, padding=1)
        self.head = nn.Linear(hidden, 3)

    def forward(self, x):
        return self.head(F.relu(self.conv2(F.relu(self.norm(self.conv1(x))))).mean((2, 3)))


class Attention(nn.Module):
    """Attention of two heads by hand: `[batch, 5, 8]` to `[batch, 3]`."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        split = [part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return self.head(self.output(mixed).mean(1))


class Packed(nn.Module):
    """`nn.MultiheadAttention` of two heads: `[batch, 5, 8]` to `[batch, 3]`."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """Two LSTM layers, both directions, of six hidden units: `[batch, 5, 8]` to `[batch, 3]`."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0].mean(1))


def member(path, parameter, dim, role, indices):
    return Member(path=path, parameter=parameter, dim=dim, role=role, indices=tuple(map(tuple, indices)))


HEADS = [[0, 1, 2, 3], [4, 5, 6, 7]]
GATES = [[unit, unit + 6, unit + 12, unit + 18] for unit in range(6)]


def attention_group():
    made = [
        member(path, parameter, 0, "out", HEADS)
        for path in ("query", "key", "value")
        for parameter in ("weight", "bias")
    ]
    return Group(members=(*made, member("output", "weight", 1, "in", HEADS)), size=2, kind="heads")


def packed_group():
    rows = [[row + 8 * part for part in range(3) for row in head] for head in HEADS]
    return Group(
        members=(
            member("attention", "in_proj_weight", 0, "out", rows),
            member("attention", "in_proj_bias", 0, "out", rows),
            member("attention.out_proj", "weight", 1, "in", HEADS),
        ),
        size=2,
        kind="heads",
        label="attention",
    )


def hidden_group(layer=1, reverse=""):
    name = f"l{layer}{reverse}"
    offset = 6 if reverse else 0
    one = [[unit + offset] for unit in range(6)]
    reader = (
        [member("head", "weight", 1, "in", one)]
        if layer == 1
        else [member("lstm", f"weight_ih_l1{direction}", 1, "in", one) for direction in ("", "_reverse")]
    )
    return Group(
        members=(
            member("lstm", f"weight_ih_{name}", 0, "out", GATES),
            member("lstm", f"weight_hh_{name}", 0, "out", GATES),
            member("lstm", f"bias_ih_{name}", 0, "out", GATES),
            member("lstm", f"bias_hh_{name}", 0, "out", GATES),
            member("lstm", f"weight_hh_{name}", 1, "in", [[unit] for unit in range(6)]),
            *reader,
        ),
        size=6,
        kind="hidden",
        label=f"lstm.{name}",
    )


def data_of(shape, samples=12, batch_size=6):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(samples, *shape, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )
    return Task(calibrate=data, loss=cross_entropy, batch_size=batch_size)


def context(model, task, seed=0):
    return _Context(Build(module=model, given=model, task=task), Step(PruneChannels()), 0, seed)


def group_of(model, name):
    return next(g for g in coupled_groups(trace(model, torch.zeros(2, 1, 6, 6))) if g.name == name)
