"""Heads of attention: found in the graph, removed whole, and nothing else is changed."""

import copy
import itertools
import json
from functools import cache

import pytest
import torch
from torch import nn

from tests.graph.attentions import HEADS, LENGTH, NAMES, WIDTH, Constant, Grouped, Plain, Talking, make, strengthen
from trimpoint.graph import (
    AttributeEdit,
    PrunedAttention,
    coupled_groups,
    pruned_attention,
    rebuild,
    remove_units_,
    save_structure,
    trace,
    why_unprunable,
)
from trimpoint.graph.attention import _einsum_labels
from trimpoint.graph.head_sizes import head_sizes
from trimpoint.graph.layers import check_layer, layer_from_data, layer_to_data
from trimpoint.losses import call
from trimpoint.parts import Group, Member, Place

STATED = {
    "fused": ("", {"num_heads": 2}),
    "einsum": ("", {"h": 2}),
    "batched": ("", {"count": 2}),
    "grouped": ("", {"heads": 1}),
    "bert": ("bert.encoder.layer.0.attention.self", {"num_attention_heads": 2, "all_head_size": 12}),
    "gpt2": ("transformer.h.0.attn", {"num_heads": 2, "split_size": 12}),
    "t5": ("encoder.block.1.layer.0.SelfAttention", {"n_heads": 2}),
    "qwen3": ("model.layers.1.self_attn", {}),
}


@cache
def prepared(name):
    module, inputs = make(name)
    return module, inputs, heads_of(module, inputs)


def heads_of(module, inputs):
    return {g.name: g for g in coupled_groups(trace(module, inputs)) if g.kind == "heads"}


def outputs(module, inputs):
    with torch.no_grad():
        found = call(module, inputs)
    return found if isinstance(found, torch.Tensor) else next(iter(found.values()))


def silenced(module, group, units):
    """A copy in which nothing reads what the heads make: zeros in the output projection, by hand."""
    copied = copy.deepcopy(module)
    for member in group.members:
        if member.role == "in":
            weight = getattr(copied.get_submodule(member.path), member.parameter)
            positions = [position for unit in units for position in member.indices[unit]]
            weight.data.index_fill_(member.dim, torch.tensor(positions), 0)
    return copied


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("plain", "encoder")])
def test_heads_go_whole_and_the_rest_stays(name, tmp_path):
    module, inputs, groups = prepared(name)
    units = {"grouped": 2, "qwen3": 2}.get(name, HEADS)
    assert len(groups) == {"t5": 1, "fused": 1, "einsum": 1, "batched": 1, "grouped": 1}.get(name, 2)
    assert {g.size for g in groups.values()} == {units}
    assert {g.reason for g in groups.values()} == {""}
    for group in groups.values():
        read = next(m for m in group.members if m.role == "in")
        assert read.indices[1] == tuple(range(WIDTH // units, 2 * WIDTH // units))
    removals = {group: [1, 3][: units // 2] if index else [0, 2][: units // 2] for index, group in enumerate(groups)}
    expected = module
    for group, gone in removals.items():
        expected = silenced(expected, groups[group], gone)
    small = copy.deepcopy(module)
    edits, failed = remove_units_(small, list(groups.values()), removals, inputs)
    assert failed == {}
    torch.testing.assert_close(outputs(small, inputs), outputs(expected, inputs), rtol=1e-4, atol=1e-4)
    assert (outputs(small, inputs) - outputs(module, inputs)).abs().max() > 1e-2
    for group in groups.values():
        for member in group.members:
            sizes = [getattr(m.get_submodule(member.path), member.parameter).shape for m in (module, small)]
            assert sizes[1][member.dim] * 2 == sizes[0][member.dim]
    path, stated = STATED.get(name, ("", {}))
    assert {e.name: e.value for e in edits if isinstance(e, AttributeEdit) and e.path == path} == stated
    save_structure(tmp_path, small, edits)
    again = rebuild(tmp_path, lambda: make(name)[0]).eval()
    assert torch.equal(outputs(again, inputs), outputs(small, inputs))


def test_heads_of_an_encoder_share_relative_positions():
    (group,) = prepared("t5")[2].values()
    paths = {member.path for member in group.members}
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias" in paths
    assert {f"encoder.block.{i}.layer.0.SelfAttention.q" for i in (0, 1)} <= paths


def test_one_head_of_keys_for_all_stays_and_query_heads_go():
    module, inputs = strengthen(Grouped(4)), torch.randn(2, LENGTH, WIDTH)
    groups = {g.name: g for g in coupled_groups(trace(module, inputs))}
    assert (groups["q"].kind, groups["q"].size, groups["q"].reason) == ("heads", HEADS, "")
    assert groups["k"].reason == groups["v"].reason == "shared by all heads of attention"
    expected = silenced(module, groups["q"], [1])
    edits, failed = remove_units_(module, list(groups.values()), {"q": [1]}, inputs)
    assert failed == {}
    assert AttributeEdit("", "shared", 3) in edits
    torch.testing.assert_close(outputs(module, inputs), outputs(expected, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [Constant, Plain])
def test_a_number_of_heads_in_the_code_is_a_reason(model):
    module, inputs = strengthen(model()), torch.randn(2, LENGTH, WIDTH)
    before = outputs(module, inputs)
    (group,) = heads_of(module, inputs).values()
    edits, failed = remove_units_(module, [group], {group.name: [0]}, inputs)
    assert edits == []
    assert "how many heads there are stands in the code" in failed[group.name]
    assert torch.equal(outputs(module, inputs), before)


def test_returned_weights_of_attention_keep_the_heads():
    groups = heads_of(Talking().eval(), torch.randn(2, LENGTH, WIDTH))
    assert {name: "mean" in g.reason for name, g in groups.items()} == {"attention": True}


def test_sets_of_attributes_come_in_a_sensible_order():
    module = nn.Module()
    module.width, module.num_heads, module.head_dim, module.layer_idx, module.other = 8, 4, 4, 4, 4
    module.flag, module._private = True, 4
    member = Member(path="", parameter="w", dim=0, indices=((0,),) * 4, role="out")
    group = Group(members=(member,), size=4, kind="heads", places=(Place(path="", sizes=((4, 1), (8, 2))),))
    tried = [{e.name: e.value for e in edits} for edits in head_sizes(module, {"g": (group, [0])})]
    assert tried[:3] == [{"num_heads": 3}, {"width": 6, "num_heads": 3}, {}]
    assert len(tried) == 16
    assert all(set(names) <= {"width", "num_heads", "head_dim", "other"} for names in tried)
    assert list(head_sizes(module, {"g": (Group(members=(member,), size=4), [0])})) == [[]]


@pytest.mark.parametrize(
    ("equation", "dims", "labels"),
    [
        ("ij,jk", [2, 2], [["i", "j"], ["j", "k"], ["i", "k"]]),
        ("...qd, kd -> ...qk", [4, 2], [["0", "1", "q", "d"], ["k", "d"], ["0", "1", "q", "k"]]),
        ("ii->i", [2], None),
        ("ij->ij", [2, 2], None),
    ],
)
def test_einsum_equations(equation, dims, labels):
    assert _einsum_labels(equation, dims) == labels


# nn.MultiheadAttention and what stands in its place


def _case(batch_first, bias, other):
    torch.manual_seed(0)
    widths = {"kdim": 12, "vdim": 10} if other else {}
    attention = nn.MultiheadAttention(18, 3, batch_first=batch_first, bias=bias, **widths)
    if bias:
        nn.init.normal_(attention.in_proj_bias)
        nn.init.normal_(attention.out_proj.bias)
    tensors = [torch.randn(2, 5, 18), torch.randn(2, 7, 12 if other else 18), torch.randn(2, 7, 10 if other else 18)]
    return attention, tensors if batch_first else [t.transpose(0, 1) for t in tensors]


def _masks():
    two, three = torch.rand(5, 7) > 0.6, torch.rand(6, 5, 7) > 0.6
    two[:, 0], three[..., 0] = False, False
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    yield from ({}, {"attn_mask": two}, {"attn_mask": three}, {"key_padding_mask": padding})
    yield {"attn_mask": two, "key_padding_mask": padding}
    yield {"attn_mask": torch.randn(5, 7), "key_padding_mask": torch.randn(2, 7)}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("other", [True, False])
def test_it_computes_what_multihead_attention_does(batch_first, bias, other):
    attention, tensors = _case(batch_first, bias, other)
    own = pruned_attention(attention)
    for training, masks, weights, average in itertools.product((True, False), _masks(), (True, False), (True, False)):
        options = {**masks, "need_weights": weights, "average_attn_weights": average}
        want, got = (part.train(training)(*tensors, **options) for part in (attention, own))
        torch.testing.assert_close(got[0], want[0])
        assert (got[1] is None) == (not weights)
        if weights:
            torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("weights", [True, False])
def test_without_batch_and_causal(weights):
    attention, (x, _, _) = _case(True, True, False)
    own = pruned_attention(attention)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    for tensor in (x, x[0]):
        options = {"attn_mask": causal, "is_causal": True, "need_weights": weights}
        want, got = (part(tensor, tensor, tensor, **options) for part in (attention, own))
        torch.testing.assert_close(got[0], want[0])
        if weights:
            torch.testing.assert_close(got[1], want[1])
    with pytest.raises(RuntimeError, match="must come with one"):
        own(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match=r"\[5, 5\] or \[6, 5, 5\]. Got \[4, 5, 5\]"):
        own(x, x, x, attn_mask=torch.zeros(4, 5, 5))


def test_dropout_is_that_of_multihead_attention():
    attention = nn.MultiheadAttention(18, 3, dropout=0.5, batch_first=True)
    own, x = pruned_attention(attention), torch.randn(64, 5, 18)
    assert own.dropout == 0.5
    dropped = own(x, x, x)[1]
    assert abs(float((own(x, x, x, average_attn_weights=False)[1] == 0).float().mean()) - 0.5) < 0.05
    assert not torch.equal(dropped, own(x, x, x)[1])
    assert torch.equal(own.eval()(x, x, x)[1], own(x, x, x)[1])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformer_layers_take_it_in_every_mode(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=batch_first), 2)
    others = copy.deepcopy(encoder), copy.deepcopy(decoder)
    for part in others[0].layers:
        part.self_attn = pruned_attention(part.self_attn)
    for part in others[1].layers:
        part.self_attn, part.multihead_attn = pruned_attention(part.self_attn), pruned_attention(part.multihead_attn)
    x = torch.randn(2, LENGTH, WIDTH)
    x = x if batch_first else x.transpose(0, 1)
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[1, 3:] = True
    visible = ~padding if batch_first else ~padding.T
    for training, gradients, mask in itertools.product((True, False), (True, False), (None, padding)):
        for part in (encoder, decoder, *others):
            part.train(training)
        keep = slice(None) if mask is None else visible
        with torch.set_grad_enabled(gradients):
            want, got = (part(x, src_key_padding_mask=mask)[keep] for part in (encoder, others[0]))
            torch.testing.assert_close(got, want)
            want, got = (part(x, x, tgt_key_padding_mask=mask)[keep] for part in (decoder, others[1]))
            torch.testing.assert_close(got, want)


def test_types_and_frozen_parameters_are_kept():
    attention = nn.MultiheadAttention(WIDTH, HEADS).bfloat16().eval()
    attention.in_proj_weight.requires_grad_(False)
    own = pruned_attention(attention)
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}
    assert not own.training
    assert {n: p.requires_grad for n, p in own.named_parameters() if not p.requires_grad} == dict.fromkeys(
        ("q_proj.weight", "k_proj.weight", "v_proj.weight"), False
    )


def test_it_is_made_again_from_json():
    attention = pruned_attention(_case(True, False, True)[0].bfloat16())
    data = json.loads(json.dumps(layer_to_data(attention)))
    assert check_layer(data) == ""
    made = layer_from_data(data, attention)
    assert {n: (p.shape, p.dtype) for n, p in made.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in attention.named_parameters()
    }
    assert (made.batch_first, made.bias) == (True, None)
    for key, value in [("num_heads", 0), ("dropout", 1.5), ("dropout", True), ("batch_first", 1), ("bias", None)]:
        assert repr(key) in check_layer(data | {key: value})


def test_what_cannot_be_replaced_is_told():
    assert why_unprunable(nn.MultiheadAttention(8, 2)) == ""
    assert "add_bias_kv" in why_unprunable(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    assert "add_zero_attn" in why_unprunable(nn.MultiheadAttention(8, 2, add_zero_attn=True))
    assert "no plain nn.MultiheadAttention" in why_unprunable(PrunedAttention(8, 2, 4, 8, 8))
