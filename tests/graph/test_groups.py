"""Coupled groups against groups derived by hand."""

import pytest
import torch
from torch import nn

from tests.graph.networks import NETWORKS, Fixed, Layer, build, inputs_of, settle
from trimpoint.demo.resnet import resnet20
from trimpoint.graph import coupled_groups, trace


def summary(groups):
    """Name → (size, {(path.parameter, dim, role, positions a unit)}) of the groups that may be touched."""
    return {
        group.name: (
            group.size,
            {(f"{m.path}.{m.parameter}".lstrip("."), m.dim, m.role, len(m.indices[0])) for m in group.members},
        )
        for group in groups
        if not group.reason
    }


def kept(groups):
    return {group.name: group.reason for group in groups if group.reason}


def layer(path, dim, role, positions=1):
    """What a layer's weight loses, and its bias where it makes the channels."""
    found = {(f"{path}.weight", dim, role, positions)}
    return found if role == "in" else found | {(f"{path}.bias", 0, role, positions)}


def norm(path, positions=1, running=True):
    names = ["weight", "bias"] + ["running_mean", "running_var"] * running
    return {(f"{path}.{name}", 0, "through", positions) for name in names}


def out(path, positions=1):
    return layer(path, 0, "out", positions)


def bare(path, dim=0, role="out", positions=1):
    return {(f"{path}.weight", dim, role, positions)}


TRUTH = {
    "Flat": {
        "conv1": (6, out("conv1") | norm("norm") | bare("conv2", 1, "in")),
        "conv2": (4, out("conv2") | bare("fc1", 1, "in", 16)),
        "fc1": (10, out("fc1") | bare("fc2", 1, "in")),
    },
    "Depthwise": {
        "stem": (
            8,
            out("stem")
            | bare("block.expand.0", 1, "in")
            | bare("block.project.0")
            | norm("block.project.1")
            | layer("twice", 0, "through", 2)
            | bare("head", 1, "in", 2),
        ),
        "block.expand.0": (
            16,
            bare("block.expand.0")
            | norm("block.expand.1")
            | bare("block.depth.0", 0, "through")
            | norm("block.depth.1")
            | bare("block.project.0", 1, "in"),
        ),
    },
    "Shuffle": {
        "first": (4, out("first", 2) | bare("grouped", 1, "in")),
        "grouped": (6, out("grouped", 2) | bare("last", 1, "in", 2)),
        "last": (6, out("last") | bare("head", 1, "in")),
    },
    "Gated": {
        "first": (
            4,
            out("first", 2)
            | norm("norm", 2, running=False)
            | bare("squeeze", 1, "in", 2)
            | out("excite", 2)
            | bare("both", 1, "in", 2),
        ),
        "squeeze": (4, out("squeeze") | bare("excite", 1, "in")),
        "both": (6, out("both", 2) | bare("last", 1, "in")),
        "last": (5, out("last") | bare("head", 1, "in", 16)),
    },
    "Dense": {
        "stem": (
            8,
            out("stem")
            | norm("norm1")
            | norm("norm2")
            | norm("norm3")
            | bare("conv1", 1, "in")
            | bare("conv2", 1, "in")
            | bare("head", 1, "in"),
        ),
        "conv1": (
            4,
            out("conv1") | norm("norm2") | norm("norm3") | bare("conv2", 1, "in") | bare("head", 1, "in"),
        ),
        "conv2": (4, out("conv2") | norm("norm3") | bare("head", 1, "in")),
    },
    "UNet": {
        "enter": (8, out("enter") | bare("down", 1, "in") | bare("merge", 1, "in")),
        "down": (12, out("down") | bare("up", 0, "in")),
        "up": (6, bare("up", 1) | {("up.bias", 0, "out", 1)} | bare("merge", 1, "in")),
        "merge": (7, out("merge") | bare("leave", 1, "in")),
    },
    "Recurrent": {
        "embedding": (8, bare("embedding", 1) | {("lstm.weight_ih_l0", 1, "in", 1)}),
        "lstm": (
            6,
            {(f"lstm.{name}_l0", 0, "out", 4) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            | {("lstm.weight_hh_l0", 1, "in", 1)}
            | bare("hidden", 1, "in"),
        ),
        "hidden": (10, out("hidden") | bare("head", 1, "in")),
    },
    "Tied": {
        "embedding": (
            8,
            bare("embedding", 1)
            | {("positions", 1, "through", 1), ("scale", 0, "through", 1)}
            | bare("up", 1, "in")
            | out("down"),
        ),
        "up": (16, out("up") | bare("down", 1, "in")),
    },
    "Tokens": {
        "patches": (
            8,
            out("patches")
            | {("token", 2, "through", 1), ("positions", 2, "through", 1)}
            | bare("up", 1, "in")
            | out("down")
            | bare("head", 1, "in"),
        ),
        "up": (16, out("up") | bare("down", 1, "in")),
    },
    "Shared": {
        "stem": (8, out("stem") | bare("conv", 1, "in") | out("conv") | norm("norm") | bare("head", 1, "in")),
    },
    "Transformer": {f"layers.{i}.up": (12, out(f"layers.{i}.up") | bare(f"layers.{i}.down", 1, "in")) for i in range(2)}
    | {f"layers.{i}.qkv": (2, out(f"layers.{i}.qkv", 12) | bare(f"layers.{i}.out", 1, "in", 4)) for i in range(2)},
    "Single": {
        "query": (8, out("query") | out("key")),
        "value": (10, out("value") | bare("out", 1, "in")),
    },
    "Mixer": {
        "enter": (8, out("enter") | bare("up", 1, "in") | out("down") | bare("head", 1, "in")),
        "up": (12, out("up") | bare("down", 1, "in")),
    },
}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_groups_are_those_derived_by_hand(name):
    module, inputs = build(name)
    groups = coupled_groups(trace(module, inputs))
    assert summary(groups) == TRUTH[name]
    assert len({group.name for group in groups}) == len(groups)
    head = "leave" if name == "UNet" else "out" if name == "Single" else "head" if name != "Flat" else "fc2"
    if name != "Tied":
        assert "output" in kept(groups)[head]


def test_concatenation_and_shuffle_know_their_positions():
    module, inputs = build("Dense")
    groups = {group.name: group for group in coupled_groups(trace(module, inputs))}
    head = {
        name: next(m for m in groups[name].members if m.path == "head").indices for name in ("stem", "conv1", "conv2")
    }
    assert head["stem"] == tuple((i,) for i in range(8))
    assert head["conv1"] == tuple((i,) for i in range(8, 12))
    assert head["conv2"] == tuple((i,) for i in range(12, 16))
    module, inputs = build("Shuffle")
    groups = {group.name: group for group in coupled_groups(trace(module, inputs))}
    members = {m.path: m for m in groups["grouped"].members}
    # Output channel j of either half of the convolution lands at 2j and 2j + 1.
    assert members["grouped"].indices[2] == (2, 8)
    assert members["last"].indices[2] == (4, 5)


def test_flatten_maps_a_channel_to_its_positions():
    module, inputs = build("Flat")
    group = next(g for g in coupled_groups(trace(module, inputs)) if g.name == "conv2")
    fc = next(m for m in group.members if m.path == "fc1")
    assert fc.indices[1] == tuple(range(16, 32))


def test_resnet_has_inner_groups_and_one_stream_a_stage():
    groups = coupled_groups(trace(resnet20(), torch.randn(2, 1, 28, 28)))
    found = summary(groups)
    inner = {f"stages.{s}.{b}.conv1": 16 * 2**s for s in range(3) for b in range(3)}
    assert {name: size for name, (size, _) in found.items()} == inner | {
        "stem.conv": 16,
        "stages.1.0.conv2": 32,
        "stages.2.0.conv2": 64,
    }
    block = "stages.1.1"
    assert found[f"{block}.conv1"][1] == bare(f"{block}.conv1") | norm(f"{block}.norm1") | bare(
        f"{block}.conv2", 1, "in"
    )
    stream = bare("stages.2.0.conv2") | bare("stages.2.0.shortcut.conv") | norm("stages.2.0.norm2")
    stream |= norm("stages.2.0.shortcut.norm") | bare("head", 1, "in")
    for b in (1, 2):
        stream |= bare(f"stages.2.{b}.conv1", 1, "in") | bare(f"stages.2.{b}.conv2") | norm(f"stages.2.{b}.norm2")
    assert found["stages.2.0.conv2"][1] == stream
    assert kept(groups) == {"head": "reaches the model's output"}


def test_reasons_say_what_keeps_a_group():
    for name, producer, words in [
        ("Transformer", "embedding", "layer_norm"),
        ("Mixer", "tokens1", "mixes positions"),
    ]:
        module, inputs = build(name)
        assert words in kept(coupled_groups(trace(module, inputs)))[producer]


def test_bert_neurons_and_pooler():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, num_labels=3
    )
    module = settle(BertForSequenceClassification(config))
    tokens = {"input_ids": inputs_of((2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    groups = coupled_groups(trace(module, tokens))
    truth = {
        f"bert.encoder.layer.{i}.intermediate.dense": (
            20,
            out(f"bert.encoder.layer.{i}.intermediate.dense") | bare(f"bert.encoder.layer.{i}.output.dense", 1, "in"),
        )
        for i in range(2)
    }
    for attention in (f"bert.encoder.layer.{i}.attention" for i in range(2)):
        heads = set().union(*(out(f"{attention}.self.{part}", 8) for part in ("query", "key", "value")))
        truth[f"{attention}.self.query"] = (2, heads | bare(f"{attention}.output.dense", 1, "in", 8))
    truth["bert.pooler.dense"] = (16, out("bert.pooler.dense") | bare("classifier", 1, "in"))
    assert summary(groups) == truth
    assert "layer_norm" in kept(groups)["bert.embeddings.word_embeddings"]


def test_fused_transformer_layer_is_seen_through():
    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1, enable_nested_tensor=False
    )
    found = summary(coupled_groups(trace(module.eval(), torch.randn(2, 4, 8))))
    attention = "layers.0.self_attn"
    packed = {(f"{attention}.in_proj_{name}", 0, "out", 12) for name in ("weight", "bias")}
    assert found == {
        "layers.0.linear1": (12, out("layers.0.linear1") | bare("layers.0.linear2", 1, "in")),
        attention: (2, packed | bare(f"{attention}.out_proj", 1, "in", 4)),
    }


class Widened(nn.Module):
    """A residual that is widened by zeros, as in option A of the residual network paper."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        y = self.first(x)
        return self.head((self.wide(y) + nn.functional.pad(y, (0, 0, 0, 0, 2, 2))).mean((2, 3)))


class Normalised(nn.Module):
    """A weight that is computed from another one."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.first(x))


class Buffered(nn.Module):
    """Channels meet a buffer, a constant in the code and a channel-wise slope."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1)
        self.slope = nn.PReLU(4)
        self.register_buffer("offset", torch.randn(1, 4, 1, 1))

    def forward(self, x):
        return self.head(self.second(self.slope(self.first(x) + self.offset)) * torch.arange(5.0).view(1, 5, 1, 1))


class Masked(nn.Module):
    """One channel of a mask is broadcast over many."""

    def __init__(self):
        super().__init__()
        self.first, self.mask, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.first(x) * torch.sigmoid(self.mask(x)))


def test_padding_keeps_what_meets_nothing():
    groups = coupled_groups(trace(Widened(), torch.randn(2, 3, 4, 4)))
    assert summary(groups) == {"first": (4, out("first") | bare("wide", 1, "in") | out("wide") | bare("head", 1, "in"))}
    wide = next(m for g in groups if g.name == "first" for m in g.members if (m.path, m.dim) == ("wide", 0))
    assert wide.indices == ((2,), (3,), (4,), (5,))
    assert "fixed size" in kept(groups)["wide"]


def test_computed_weights_are_left_alone():
    groups = coupled_groups(trace(Normalised(), torch.randn(2, 4)))
    assert summary(groups) == {}


def test_buffers_follow_and_constants_hold():
    groups = coupled_groups(trace(Buffered(), torch.randn(2, 3, 4, 4)))
    assert summary(groups) == {
        "first": (
            4,
            out("first") | {("offset", 1, "through", 1), ("slope.weight", 0, "through", 1)} | bare("second", 1, "in"),
        )
    }
    assert "fixed size" in kept(groups)["second"]


def test_a_broadcast_channel_stays():
    groups = coupled_groups(trace(Masked(), torch.randn(2, 3, 4, 4)))
    assert summary(groups) == {"first": (4, out("first") | bare("head", 1, "in"))}
    assert kept(groups)["mask"]


class OverNothing(nn.Module):
    """Sums no positions at all, as a cache does before its first step."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.head(hidden + hidden[:, :0].sum(1, keepdim=True) + hidden[:, :0].sum((1,)).unsqueeze(1))


def test_a_sum_over_nothing_keeps_its_channels():
    groups = coupled_groups(trace(OverNothing(), torch.randn(2, 5, 4)))
    assert "fixed size" in kept(groups)["first"]


def test_hidden_sizes_are_left_to_the_forward_check():
    names = set(summary(coupled_groups(trace(Fixed(), inputs_of((2, 3, 8, 8))))))
    assert names == {"conv", "fc1"} | {name for name in names if name.startswith("fc2")}


def test_layer_alone_ends_at_the_output():
    groups = coupled_groups(trace(Layer(8, 2, 12), torch.randn(2, 3, 8)))
    assert set(summary(groups)) == {"up", "qkv"}
