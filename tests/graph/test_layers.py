"""Layers that stand in the place of others: made again from data, refused where the model cannot use them."""

import json

import pytest
import torch
from torch import nn

from trimpoint.errors import ArtifactError, SurgeryError
from trimpoint.graph import LowRank, apply_edits_, edits_from_data, edits_to_data, rebuild, replace_, save_structure
from trimpoint.graph.layers import LowRankRecurrent, check_layer, layer_from_data, layer_to_data

LAYERS = [
    nn.Linear(8, 4, bias=False),
    nn.Conv1d(4, 8, 3, padding="same"),
    nn.Conv2d(8, 4, (3, 1), stride=(2, 1), padding=(1, 0), groups=2, padding_mode="reflect"),
    nn.Conv3d(4, 4, 3, dilation=2),
    nn.Embedding(10, 4, padding_idx=0),
    LowRank(nn.Linear(8, 2, bias=False), nn.Linear(2, 4)),
    LowRankRecurrent("LSTM", 8, 3, 4, num_layers=2, batch_first=True, dropout=0.1, bidirectional=True),
    LowRankRecurrent("GRU", 8, 3, 4, bias=False),
    LowRank(nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(2, 2, 3, bias=False), nn.Conv2d(2, 4, 1)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_layer_is_made_again_from_json(layer):
    data = json.loads(json.dumps(layer_to_data(layer)))
    assert check_layer(data) == ""
    again = layer_from_data(data, nn.Linear(1, 1, dtype=torch.bfloat16))
    assert repr(again) == repr(layer)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    again.float().load_state_dict(layer.state_dict())


def test_making_a_layer_takes_no_random_number():
    like, state = nn.Linear(1, 1), torch.get_rng_state()
    layer_from_data(layer_to_data(LAYERS[-1]), like)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("linear", "a mapping"),
        ({"layer": "os.system"}, "the layers are"),
        ({"layer": "linear", "in_features": 1, "out_features": 1}, "a linear has"),
        ({"layer": "linear", "in_features": -1, "out_features": 1, "bias": True}, "in_features"),
        ({"layer": "linear", "in_features": True, "out_features": 1, "bias": True}, "in_features"),
        ({"layer": "linear", "in_features": 1 << 40, "out_features": 1, "bias": True}, "in_features"),
        ({"layer": "low_rank_recurrent", "mode": "RNN"}, "a low_rank_recurrent has"),
        ({**layer_to_data(LowRankRecurrent("GRU", 8, 3, 4)), "mode": "RNN"}, "'mode'"),
        ({"layer": "low_rank", "parts": []}, "one to eight"),
        ({"layer": "low_rank", "parts": [{"layer": "low_rank", "parts": []}]}, "does not hold another"),
        ({"layer": "low_rank", "parts": [{"layer": "embedding"}]}, "an embedding has|a embedding has"),
        ({"layer": "embedding", "num_embeddings": 1, "embedding_dim": 1, "padding_idx": "x"}, "padding_idx"),
    ],
)
def test_what_is_no_layer_is_refused(data, words):
    with pytest.raises(ArtifactError, match=words):
        edits_from_data([{"edit": "replace", "path": "a", "layer": data}])


class Parent(nn.Module):
    """Calls one of its layers and reads the weight of the other."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


def thin(seed=0):
    torch.manual_seed(seed)
    return LowRank(nn.Linear(8, 2, bias=False), nn.Linear(2, 8))


def test_a_replaced_layer_survives_rebuilding(tmp_path):
    model, inputs = Parent(), torch.randn(2, 8)
    made, edits = replace_(model, "called", thin(), inputs)
    assert made is model
    save_structure(tmp_path, model, edits_from_data(edits_to_data(edits)))
    assert torch.equal(rebuild(tmp_path, Parent)(inputs), model(inputs))


def test_the_root_can_be_replaced(tmp_path):
    inputs = torch.randn(2, 8)
    made, edits = replace_(nn.Linear(8, 8), "", thin(), inputs)
    assert isinstance(made, LowRank)
    save_structure(tmp_path, made, edits)
    assert torch.equal(rebuild(tmp_path, lambda: nn.Linear(8, 8))(inputs), made(inputs))
    assert isinstance(apply_edits_(nn.Linear(8, 8), edits), LowRank)


@pytest.mark.parametrize(
    ("path", "layer", "words"),
    [
        ("read", thin(), "reads the weight"),
        ("called", nn.Linear(8, 7), "does not run"),
        ("called", nn.Bilinear(8, 8, 8), "cannot stand"),
    ],
)
def test_a_layer_that_the_model_cannot_use_is_refused(path, layer, words):
    model, inputs = Parent(), torch.randn(2, 8)
    before, kept = model(inputs), model.get_submodule(path)
    with pytest.raises(SurgeryError, match=words):
        replace_(model, path, layer, inputs)
    assert model.get_submodule(path) is kept
    assert torch.equal(model(inputs), before)


def test_other_values_of_the_same_layer_need_no_edit():
    model, inputs = Parent(), torch.randn(2, 8)
    made, edits = replace_(model, "called", nn.Linear(8, 8), inputs)
    assert edits == []
    assert made is model


def test_what_asks_for_the_replaced_layers_weight_finds_it():
    layer, x = thin(), torch.randn(3, 8)
    assert torch.allclose(nn.functional.linear(x, layer.weight, layer.bias), layer(x), atol=1e-6)
    assert (layer.in_features, layer.out_features) == (8, 8)
    table = LowRank(nn.Embedding(5, 2), nn.Linear(2, 4, bias=False))
    assert torch.allclose(table.weight, table(torch.arange(5)), atol=1e-6)
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (5, 4, None)


@pytest.mark.parametrize(
    "parts",
    [
        [nn.Conv2d(6, 3, 1, bias=False), nn.Conv2d(3, 2, 3, 2, 1, 1, bias=False), nn.Conv2d(2, 4, 1)],
        [nn.Conv2d(6, 3, (3, 1), (2, 1), (1, 0), bias=False), nn.Conv2d(3, 4, (1, 5), (1, 2), (0, 2))],
        [nn.Conv1d(6, 2, 3, dilation=2, bias=False), nn.Conv1d(2, 4, 1)],
    ],
    ids=["tucker", "spatial", "1d"],
)
def test_convolutions_in_a_row_are_one_convolution(parts):
    layer = LowRank(*parts)
    one = {1: nn.functional.conv1d, 2: nn.functional.conv2d}[len(layer.kernel_size)]
    x = torch.randn(2, 6, *(11,) * len(layer.kernel_size))
    whole = one(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation)
    assert torch.allclose(whole, layer(x), atol=1e-5)
    assert layer.weight.shape[2:] == layer.kernel_size
    assert (layer.in_channels, layer.out_channels) == (6, 4)


@pytest.mark.parametrize(("padding", "mode"), [("same", "circular"), ("valid", "zeros"), (1, "reflect")])
def test_padding_in_words_and_what_pads(padding, mode):
    core = nn.Conv2d(3, 2, 3, padding=padding, padding_mode=mode, bias=False)
    layer = LowRank(nn.Conv2d(6, 3, 1, bias=False), core, nn.Conv2d(2, 4, 1))
    assert layer.padding == (padding if isinstance(padding, str) else (1, 1))
    assert (layer.padding_mode, layer.groups) == (mode, 1)


def test_a_row_of_linear_layers_has_nothing_of_a_convolution():
    for name in ("groups", "padding_mode", "padding", "stride"):
        assert not hasattr(thin(), name)
