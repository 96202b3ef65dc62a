"""Removing units and blocks: zero channels are removed without a trace, and what cannot be removed stays whole."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.graph.networks import NETWORKS, Fixed, InvertedResidual, build, inputs_of, settle
from trimpoint.demo.resnet import resnet20
from trimpoint.errors import SurgeryError, UnknownNameError
from trimpoint.graph import (
    AttributeEdit,
    Bypass,
    BypassEdit,
    ResizeEdit,
    apply_edits_,
    bypass_,
    coupled_groups,
    edits_from_data,
    edits_to_data,
    remove_units_,
    trace,
)
from trimpoint.losses import call, main_tensor


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, num_labels=3
    )
    tokens = {"input_ids": inputs_of((2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    return settle(BertForSequenceClassification(config)), tokens


CASES = {**{name: lambda name=name: build(name) for name in NETWORKS}, "bert": bert}
CASES["resnet20"] = lambda: (settle(resnet20()), inputs_of((2, 1, 28, 28)))


def choose(groups):
    """Return about a third of the units of every group that may be touched, spread over it."""
    rng = np.random.default_rng(0)
    return {
        group.name: sorted(rng.choice(group.size, max(1, group.size // 3), replace=False).tolist())
        for group in groups
        if not group.reason
    }


def zero_(module, groups, removals):
    """Hold the removed channels at zero where they are made and normalised, as magnitude pruning would find them."""
    for group in groups:
        for member in group.members:
            if member.role == "in" or member.parameter.startswith("running"):
                continue
            tensor = getattr(module.get_submodule(member.path), member.parameter)
            positions = [p for unit in removals.get(group.name, ()) for p in member.indices[unit]]
            tensor.data.index_fill_(member.dim, torch.tensor(positions, dtype=torch.long), 0)


@pytest.mark.parametrize("case", sorted(CASES))
def test_removing_zero_channels_changes_nothing(case):
    module, inputs = CASES[case]()
    groups = coupled_groups(trace(module, inputs))
    removals = choose(groups)
    if case == "Gated":
        removals.pop("squeeze")  # its zero channels end in a sigmoid, which is not zero at zero
        del removals["first"]
        removals["first"] = [1]
    zero_(module, groups, removals)
    with torch.no_grad():
        before = main_tensor(call(module, inputs))
    sizes = {id(p): list(p.shape) for p in module.parameters()}
    for group in groups:
        for member in group.members:
            tensor = getattr(module.get_submodule(member.path), member.parameter)
            if id(tensor) in sizes:
                gone = {p for unit in removals.get(group.name, ()) for p in member.indices[unit]}
                sizes[id(tensor)][member.dim] -= len(gone)
    identities = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    untouched = copy.deepcopy(module)
    edits, failed = remove_units_(module, groups, removals, inputs)
    assert failed == {}
    with torch.no_grad():
        after = main_tensor(call(module, inputs))
    assert torch.allclose(before, after, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in module.parameters()) == sum(int(np.prod(shape)) for shape in sizes.values())
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in untouched.parameters())
    assert identities == {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    apply_edits_(untouched, edits_from_data(edits_to_data(edits)))
    with torch.no_grad():
        assert torch.equal(main_tensor(call(untouched, inputs)), after)


def test_parameter_counts_follow_the_widths():
    module = resnet20()
    inputs = torch.randn(2, 1, 28, 28)
    groups = coupled_groups(trace(module, inputs))
    edits, failed = remove_units_(module, groups, {g.name: range(g.size // 2) for g in groups if not g.reason}, inputs)
    from trimpoint.demo.resnet import ResNet

    half = ResNet(widths=(8, 16, 32))
    assert failed == {}
    assert [(n, p.shape) for n, p in module.state_dict().items()] == [
        (n, p.shape) for n, p in half.state_dict().items()
    ]
    assert {n: repr(m) for n, m in module.named_modules()} == {n: repr(m) for n, m in half.named_modules()}
    assert edits


@pytest.mark.parametrize("case", ["Depthwise", "Shuffle", "Gated", "UNet", "Tied", "bert"])
def test_attributes_state_the_new_sizes(case):
    module, inputs = CASES[case]()
    groups = coupled_groups(trace(module, inputs))
    remove_units_(module, groups, choose(groups), inputs)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            assert part.weight.shape == (part.out_features, part.in_features)
        elif isinstance(part, nn.ConvTranspose2d):
            assert part.weight.shape[:2] == (part.in_channels, part.out_channels // part.groups)
        elif isinstance(part, nn.Conv2d):
            assert part.weight.shape[:2] == (part.out_channels, part.in_channels // part.groups)
        elif isinstance(part, nn.BatchNorm2d):
            assert part.running_mean.shape == (part.num_features,)
        elif isinstance(part, nn.GroupNorm):
            assert (part.num_channels, part.num_groups) == (6, 3)
        elif isinstance(part, nn.Embedding):
            assert part.weight.shape == (part.num_embeddings, part.embedding_dim)
    if case == "Tied":
        assert module.head.weight is module.embedding.weight


def test_types_modes_and_frozen_parameters_stay():
    module = build("Flat")[0].to(torch.bfloat16).train()
    inputs = inputs_of((2, 3, 8, 8)).to(torch.bfloat16)
    module.conv1.weight.requires_grad_(False)
    module.norm.eval()
    groups = coupled_groups(trace(module, inputs))
    edits, failed = remove_units_(module, groups, {"conv1": [0, 1]}, inputs)
    assert failed == {}
    assert len(edits) > 5
    assert module.conv1.weight.dtype == torch.bfloat16
    assert not module.conv1.weight.requires_grad
    assert module.conv2.weight.requires_grad
    assert module.training
    assert not module.norm.training


def test_guilty_groups_are_left_whole_and_named():
    torch.manual_seed(0)
    module, inputs = Fixed(), inputs_of((2, 3, 8, 8))
    before = {name: p.clone() for name, p in module.named_parameters()}
    groups = coupled_groups(trace(module, inputs))
    chosen = {group.name: [0] for group in groups if not group.reason}
    edits, failed = remove_units_(module, groups, chosen, inputs)
    assert set(failed) == set(chosen) - {"fc1"}
    assert "does not run" in failed["conv"]
    assert module.fc1.out_features == 7
    assert {e.path for e in edits} == {"fc1", "fc2"}
    for name in ("conv.weight", "conv.bias", "fc3.weight", "fc3.bias", "fc2.bias"):
        assert torch.equal(before[name], module.get_parameter(name))


class Sliced(nn.Module):
    """Runs after its first channels are removed, but reads the wrong ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.first(x)[:, 2:6] + self.second(x))


def test_channels_read_at_fixed_positions_are_found_out():
    torch.manual_seed(0)
    module, inputs = Sliced(), torch.randn(3, 4)
    groups = coupled_groups(trace(module, inputs))
    unread = next(g for g in groups if not g.reason and len({m.path for m in g.members}) == 1)
    first = next(m for m in unread.members if m.parameter == "weight")
    assert first.indices[:2] == ((0,), (1,))
    edits, failed = remove_units_(module, groups, {unread.name: [0]}, inputs)
    assert edits == []
    assert "fixed in its code" in failed[unread.name]
    edits, failed = remove_units_(module, groups, {unread.name: [unread.size - 1]}, inputs)
    assert failed == {}
    assert module.first.out_features == 11


def test_refusals_name_the_group():
    module, inputs = build("Flat")
    groups = coupled_groups(trace(module, inputs))
    with pytest.raises(SurgeryError, match="All 6 units of the group 'conv1'"):
        remove_units_(module, groups, {"conv1": range(6)}, inputs)
    with pytest.raises(SurgeryError, match="'fc2' must not be touched: reaches the model's output"):
        remove_units_(module, groups, {"fc2": [0]}, inputs)
    with pytest.raises(SurgeryError, match="units 0 to 5"):
        remove_units_(module, groups, {"conv1": [6]}, inputs)
    with pytest.raises(UnknownNameError, match="conv9"):
        remove_units_(module, groups, {"conv9": [0]}, inputs)
    assert remove_units_(module, groups, {"conv1": []}, inputs) == ([], {})


class Custom(nn.Linear):
    """A layer of the user's own, known only by its attributes."""

    def forward(self, x):
        return torch.relu(nn.functional.linear(x, self.weight, self.bias))


def test_layers_are_known_by_their_attributes():
    module = nn.Sequential(Custom(4, 6), Custom(6, 3))
    inputs = torch.randn(2, 4)
    groups = coupled_groups(trace(module, inputs))
    assert remove_units_(module, groups, {"0": [1, 2]}, inputs)[1] == {}
    assert (module[0].out_features, module[1].in_features) == (4, 4)


def test_a_convolution_of_hugging_face_is_resized():
    from transformers.pytorch_utils import Conv1D

    module = nn.Sequential(Conv1D(6, 4), nn.ReLU(), Conv1D(3, 6))
    inputs = torch.randn(2, 5, 4)
    groups = coupled_groups(trace(module, inputs))
    edits, failed = remove_units_(module, groups, {"0": [5]}, inputs)
    assert failed == {}
    assert AttributeEdit("0", "nf", 5) in edits
    assert module[0].nf == 5


# Blocks


def test_bypass_hands_its_input_on():
    module, inputs = settle(resnet20()), inputs_of((2, 1, 28, 28))
    other = copy.deepcopy(module)
    edits = bypass_(module, "stages.0.1", inputs)
    assert edits == [BypassEdit("stages.0.1", "first")]
    other.stages[0][1] = nn.Identity()
    with torch.no_grad():
        assert torch.equal(module(inputs), other(inputs))
    assert [n for n, _ in module.named_modules() if n.startswith("stages.0.1")] == ["stages.0.1"]


class Talkative(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.inner, self.extra = nn.Linear(4, 4), extra

    def forward(self, x, bias=None):
        return self.extra(x + self.inner(x), x, bias)


class Listener(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.block, self.head = Talkative(extra), nn.Linear(4, 2)

    def forward(self, x):
        found = self.block(x, bias=x[0])
        y = found if isinstance(found, torch.Tensor) else found["y"] if isinstance(found, dict) else found[0]
        return self.head(y)


@pytest.mark.parametrize(
    ("extra", "structure"),
    [
        (lambda y, x, b: y, "first"),
        (lambda y, x, b: (y, None), {"tuple": ["first", None]}),
        (lambda y, x, b: (y, b, True), {"tuple": ["first", {"argument": "bias"}, {"value": True}]}),
        (lambda y, x, b: [y, (x, None)], {"list": ["first", {"tuple": [{"argument": 0}, None]}]}),
        (lambda y, x, b: {"y": y, "b": b}, {"dict": {"y": "first", "b": {"argument": "bias"}}}),
    ],
)
def test_bypass_returns_what_the_block_returned(extra, structure):
    module, inputs = Listener(extra), torch.randn(2, 4)
    edits = bypass_(module, "block", inputs)
    assert edits == edits_from_data(edits_to_data(edits)) == [BypassEdit("block", structure)]
    assert torch.equal(module(inputs), module.head(inputs))


def test_blocks_that_make_more_than_their_output_stay():
    module, inputs = Listener(lambda y, x, b: (y, y.mean(0))), torch.randn(2, 4)
    with pytest.raises(SurgeryError, match="`block` cannot be bypassed: it also returns"):
        bypass_(module, "block", inputs)
    assert isinstance(module.block, Talkative)
    with pytest.raises(SurgeryError, match="shape of its first input"):
        bypass_(module, "head", inputs)
    with pytest.raises(SurgeryError, match="did you mean `block`"):
        bypass_(module, "blok", inputs)
    with pytest.raises(SurgeryError, match="whole model"):
        apply_edits_(module, [BypassEdit("")])
    with pytest.raises(SurgeryError, match="whole model"):
        bypass_(module, "", inputs)


@pytest.mark.parametrize("number", [lambda x: x.shape[0], lambda x: 0.5])
def test_numbers_that_a_block_makes_may_be_others_another_time(number):
    module, inputs = Listener(lambda y, x, b: (y, number(x))), torch.randn(2, 4)
    with pytest.raises(SurgeryError, match="also returns the number"):
        bypass_(module, "block", inputs)
    assert isinstance(module.block, Talkative)


def test_numbers_that_a_block_hands_on_are_handed_on():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, count):
            return x + self.inner(x), count

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Counting()

        def forward(self, x):
            y, count = self.block(x, x.shape[0])
            return y.sum(0) / count

    module = Parent()
    bypass_(module, "block", torch.randn(2, 4))
    assert torch.allclose(module(torch.ones(5, 4)), torch.ones(4))


class Asking(nn.Module):
    """A parent that reads an attribute of its child, and one that calls a method of it."""

    def __init__(self, method):
        super().__init__()
        self.block, self.method = InvertedResidual(3, 4), method
        self.block.width = 3
        self.block.bias_free = lambda: True

    def forward(self, x):
        return self.block(x) * (self.block.bias_free() if self.method else self.block.width)


def test_plain_attributes_of_a_bypassed_block_stay_readable():
    inputs = torch.randn(2, 3, 4, 4)
    module = Asking(method=False).eval()
    bypass_(module, "block", inputs)
    assert torch.equal(module(inputs), inputs * 3)
    assert module.block.project is not None
    module = Asking(method=True).eval()
    with pytest.raises(SurgeryError, match="does not run"):
        bypass_(module, "block", inputs)
    assert isinstance(module.block, InvertedResidual)


def test_shared_blocks_are_bypassed_together():
    block = InvertedResidual(3, 4)
    module = nn.ModuleDict({"a": block, "b": block})
    apply_edits_(module, [BypassEdit("a")])
    assert module["a"] is module["b"]
    assert isinstance(module["b"], Bypass)


def test_transformer_encoder_asks_its_first_layer():
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
    inputs = torch.randn(2, 4, 8)
    module.eval()
    bypass_(module, "layers.0", inputs)
    bypass_(module, "layers.1", inputs)
    assert torch.equal(module(inputs), inputs)


class Averaging(nn.Module):
    """Keeps a running scale in evaluation mode too, in a new tensor each time."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("scale", torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.scale = 0.9 * self.scale + 0.1
        self.calls += 1
        return self.second(torch.relu(self.first(x)) * self.scale)


def test_a_model_that_changes_its_buffers_as_it_runs():
    module, inputs = Averaging(), torch.randn(2, 4)
    groups = coupled_groups(trace(module, inputs))
    name = next(group.name for group in groups if group.size == 8 and not group.reason)
    _, rejected = remove_units_(module, groups, {name: [1, 6]}, inputs)
    assert not rejected
    assert (module.scale.shape, module.first.out_features, module.second.in_features) == ((6,), 6, 6)
    assert torch.equal(module.scale, torch.ones(6))
    assert module.calls == 0


# Edits as data


def test_edits_survive_json():
    edits = [
        BypassEdit("a.b", {"tuple": ["first", None]}),
        ResizeEdit("conv", "weight", 1, (0, 1, 4, 7, 8)),
        AttributeEdit("conv", "in_channels", 5),
        AttributeEdit("norm", "normalized_shape", (5,)),
    ]
    assert edits_from_data(edits_to_data(edits)) == edits
    assert edits_to_data(edits)[1]["keep"] == [[0, 2], [4, 5], [7, 9]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (ResizeEdit("0", "weight", 0, (9,)), r"`0.weight` has shape \[6, 4\]"),
        (ResizeEdit("0", "weight", 2, (0,)), "of dimension 2"),
        (ResizeEdit("0", "wait", 0, (0,)), "no parameter or buffer `0.wait`"),
        (ResizeEdit("7", "weight", 0, (0,)), "no module `7`"),
        (AttributeEdit("0", "groups", 2), "no attribute 'groups'"),
        (AttributeEdit("0", "forward", 2), "no attribute 'forward'"),
    ],
)
def test_edits_that_do_not_fit(edit, message):
    with pytest.raises(SurgeryError, match=message):
        apply_edits_(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), [edit])
