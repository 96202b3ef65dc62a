"""Heads behind masks of padded keys and behind keys from elsewhere: found, told in the model's terms, removed."""

import copy

import pytest
import torch
from torch import nn

from tests.graph.attentions import HEADS, WIDTH, strengthen
from trimpoint.compress import compress
from trimpoint.graph import (
    PrunedAttention,
    coupled_groups,
    find_groups,
    mask_,
    pruned_attention,
    rebuild,
    remove_units_,
    replace_,
    save_structure,
    trace,
    why_unprunable,
)
from trimpoint.losses import squared_error
from trimpoint.methods.prune_heads import PruneHeads
from trimpoint.plan import Plan
from trimpoint.task import Task

SIZE = WIDTH // HEADS


class Encoder(nn.Module):
    """Two encoder layers that do not read padding."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 3)

    def forward(self, x, padding):
        return self.head(self.layers(x, src_key_padding_mask=padding)) * ~padding[..., None]


class Decoder(nn.Module):
    """A decoder layer that reads a memory with padding, and what came before."""

    def __init__(self):
        super().__init__()
        self.memory = nn.Linear(6, WIDTH)
        self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, memory, padding):
        past = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        read = self.layer(x, self.memory(memory), tgt_mask=past, tgt_is_causal=True, memory_key_padding_mask=padding)
        return self.head(read)


class Cross(nn.Module):
    """Attention with keys and values of other widths."""

    def __init__(self, bias=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=10, bias=bias, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, keys, values):
        return self.head(self.attention(x, keys, values, need_weights=False)[0])


class Biasless(Cross):
    def __init__(self):
        super().__init__(bias=False)


PADDING = torch.zeros(4, 7, dtype=torch.bool)
PADDING[1, 5:] = PADDING[3, 2:] = True
CASES = {
    "padded encoder": (Encoder, (7, WIDTH), PADDING, ["layers.layers.0.self_attn", "layers.layers.1.self_attn"]),
    "decoder": (Decoder, (5, WIDTH), (7, 6), PADDING, ["layer.self_attn", "layer.multihead_attn"]),
    "other widths": (Cross, (5, WIDTH), (7, 6), (7, 10), ["attention"]),
    "other widths, no bias": (Biasless, (5, WIDTH), (7, 6), (7, 10), ["attention"]),
}


def case(name):
    kind, *parts, paths = CASES[name]
    torch.manual_seed(0)
    model = strengthen(kind()).eval()
    inputs = tuple(p if isinstance(p, torch.Tensor) else torch.randn(4, *p) for p in parts)
    return kind, model, inputs, paths


def task_of(model, inputs):
    with torch.no_grad():
        targets = torch.zeros_like(model(*inputs))
    samples = [(tuple(part[i] for part in inputs), targets[i]) for i in range(4)]
    return Task(train=samples, calibrate=samples, loss=squared_error, batch_size=2)


def silenced(model, heads):
    """Return a copy in which the output projections do not read some heads."""
    copied = copy.deepcopy(model)
    for path, gone in heads.items():
        for head in gone:
            copied.get_submodule(path).out_proj.weight.data[:, head * SIZE : (head + 1) * SIZE] = 0
    return copied


@pytest.mark.parametrize("name", CASES)
def test_each_unit_is_one_head_of_the_models_own_parameters(name):
    _, model, inputs, paths = case(name)
    found = {group.name: group for group in find_groups(model, inputs) if group.kind == "heads"}
    assert sorted(found) == sorted(paths)
    for path, group in found.items():
        attention = model.get_submodule(path)
        assert (group.size, group.reason) == (HEADS, "")
        rows = {(m.parameter, m.dim): m.indices for m in group.members if m.path == path}
        ((unread,),) = [[m.indices for m in group.members if m.path == f"{path}.out_proj"]]
        for head in range(HEADS):
            own = tuple(range(head * SIZE, (head + 1) * SIZE))
            every = (*own, *(WIDTH + p for p in own), *(2 * WIDTH + p for p in own))
            assert unread[head] == own
            if attention.in_proj_bias is not None:
                assert rows["in_proj_bias", 0][head] == every
            if attention.in_proj_weight is not None:
                assert rows["in_proj_weight", 0][head] == every
            else:
                assert all(rows[f"{part}_proj_weight", 0][head] == own for part in "qkv")


@pytest.mark.parametrize(
    ("name", "importance"),
    [*((name, "contribution") for name in CASES), ("decoder", "magnitude"), ("decoder", "taylor")],
)
def test_half_of_the_heads_go_and_the_others_compute_the_same(name, importance, tmp_path):
    kind, model, inputs, paths = case(name)
    weak = {path: [(index + 1) % HEADS, (index + 3) % HEADS] for index, path in enumerate(paths)}
    for path, heads in weak.items():
        for head in heads:
            model.get_submodule(path).out_proj.weight.data[:, head * SIZE : (head + 1) * SIZE] *= 0.01
    made = compress(model, Plan().then(PruneHeads(importance=importance)), task_of(model, inputs))
    for path in paths:
        attention = made.module.get_submodule(path)
        assert isinstance(attention, PrunedAttention)
        assert (attention.num_heads, attention.q_proj.out_features) == (HEADS // 2, WIDTH // 2)
    kinds = {change.origin: change.kind for change in made.changes if change.origin in paths}
    assert kinds == dict.fromkeys(paths, "replaced")
    if importance == "contribution":
        expected = silenced(model, weak)(*inputs)
        torch.testing.assert_close(made.module(*inputs), expected, rtol=1e-4, atol=1e-5)
    save_structure(tmp_path, made.module, made.edits)
    assert torch.equal(rebuild(tmp_path, kind).eval()(*inputs), made.module(*inputs))


@pytest.mark.parametrize("name", ["padded encoder", "decoder", "other widths"])
def test_any_heads_can_go(name):
    """With the attention replaced, removal of any heads gives the outputs of the model that does not read them."""
    _, model, inputs, paths = case(name)
    expected = silenced(model, {path: [0, 3] for path in paths})(*inputs)
    for path in paths:
        replace_(model, path, pruned_attention(model.get_submodule(path)), inputs)
    groups = find_groups(model, inputs)
    heads = {group.name: [0, 3] for group in groups if group.kind == "heads"}
    _, failed = remove_units_(model, groups, heads, inputs)
    assert failed == {}
    assert len(heads) == len(paths)
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_is_and_other_groups_too():
    _, model, inputs, paths = case("decoder")
    before = copy.deepcopy(model)
    found = find_groups(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert [type(part) for part in model.modules()] == [type(part) for part in before.modules()]
    plain = coupled_groups(trace(model, inputs))
    assert [group for group in found if group.name != paths[1]] == list(plain)


def test_heads_that_stay_keep_their_first_reason():
    class Returned(Cross):
        def forward(self, x, keys, values):
            mixed, weights = self.attention(x, keys, values, average_attn_weights=False)
            return self.head(mixed), weights

    model, inputs = Returned().eval(), (torch.randn(2, 5, WIDTH), torch.randn(2, 7, 6), torch.randn(2, 7, 10))
    assert find_groups(model, inputs) == coupled_groups(trace(model, inputs))


@pytest.mark.parametrize("change", ["masked", "tied", "zero key", "hook"])
def test_attention_that_could_not_be_replaced_is_not_opened(change):
    _, model, inputs, _ = case("other widths")
    if change == "masked":
        mask_(model.attention.out_proj, "weight", model.attention.out_proj.weight > 0)
    elif change == "tied":
        model.again = nn.Linear(WIDTH, WIDTH)
        model.again.weight = model.attention.out_proj.weight
    elif change == "hook":
        model.attention.register_forward_pre_hook(lambda _module, inputs: tuple(3 * part for part in inputs))
    else:
        model.attention.add_zero_attn = True
    assert not [group for group in find_groups(model, inputs) if group.kind == "heads" and not group.reason]


def test_a_bias_on_one_side_would_be_lost():
    attention = nn.MultiheadAttention(WIDTH, 2)
    assert not why_unprunable(attention)
    attention.in_proj_bias = None
    assert why_unprunable(attention) == "it has a bias on one side only"
