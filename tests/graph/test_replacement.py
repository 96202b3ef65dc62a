"""A layer in the place of another: masks go over, ties and attributes are kept or made again, or it is refused."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from trimpoint.errors import ArtifactError, SurgeryError
from trimpoint.graph import MaskEdit, ReplaceEdit, mask_, masks_of, rebuild, replace_, save_structure
from trimpoint.graph.layers import LowRank
from trimpoint.graph.replacement import difference
from trimpoint.parts import MaskSchedule


class Scaled(nn.Linear):
    """A layer of the user's own: a plain number and an object tell what it computes."""

    def __init__(self, inputs, outputs, factor=1.0, activation=F.relu):
        super().__init__(inputs, outputs)
        self.factor, self.config = factor, SimpleNamespace(shift=0.0, activation=activation)

    def forward(self, x):
        return self.config.activation(super().forward(x)) * self.factor + self.config.shift


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.plain, self.own = nn.Linear(4, 6), Scaled(6, 5)

    def forward(self, x):
        return self.own(self.plain(self.norm(self.conv(x)).mean((2, 3))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.decoder = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.decoder.weight = self.table.weight

    def forward(self, ids):
        return self.decoder(self.table(ids))


IMAGES, IDS = torch.randn(2, 3, 8, 8), torch.randint(0, 9, (2, 5))


def made(kind=Net):
    torch.manual_seed(0)
    return kind().eval()


def rebuilt_like(model, edits, directory, inputs, kind=Net):
    save_structure(directory, model, edits)
    again = rebuild(directory, kind).eval()
    return torch.equal(again(inputs), model(inputs))


# Attributes


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("conv", nn.Conv2d(3, 4, 3, padding=1, stride=2)),
        ("conv", nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
        ("plain", nn.Linear(4, 6, bias=False)),
    ],
)
def test_a_layer_of_the_vocabulary_with_another_attribute_is_made_again(path, layer, tmp_path):
    model = made()
    _, edits = replace_(model, path, layer, IMAGES)
    assert [type(edit) for edit in edits] == [ReplaceEdit]
    assert rebuilt_like(model, edits, tmp_path, IMAGES)


def marked():
    layer = nn.Linear(4, 6)
    layer.factor = 3
    return layer


def hooked():
    layer = nn.Linear(4, 6)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def shifted():
    layer = Scaled(6, 5)
    layer.config.shift = 1.0
    return layer


@pytest.mark.parametrize(
    ("path", "layer", "words"),
    [
        ("own", Scaled(6, 5, factor=2.0), "A Scaled cannot stand"),
        ("own", Scaled(6, 5, activation=F.gelu), "A Scaled cannot stand"),
        ("own", shifted(), "A Scaled cannot stand"),
        ("norm", nn.BatchNorm2d(4, eps=0.5), "A BatchNorm2d cannot stand"),
        ("plain", marked(), "made again from its sizes: `factor` differs"),
        ("plain", hooked(), "made again from its sizes: `_forward_hooks` differs"),
        ("plain", nn.Linear(4, 6, dtype=torch.float64), "made again from its sizes: `weight` differs"),
        ("plain", parametrizations.weight_norm(nn.Linear(4, 6)), "`parametrizations` differs"),
    ],
)
def test_what_could_not_be_made_again_is_refused(path, layer, words):
    model = made()
    before, kept = model(IMAGES), model.get_submodule(path)
    with pytest.raises(SurgeryError, match=words):
        replace_(model, path, layer, IMAGES)
    assert model.get_submodule(path) is kept
    assert torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("path", ["conv", "norm", "plain", "own", ""])
def test_a_copy_with_other_values_needs_no_edit(path, tmp_path):
    model = made()
    layer = copy.deepcopy(model.get_submodule(path))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    model, edits = replace_(model, path, layer, IMAGES)
    assert edits == []
    assert rebuilt_like(model, edits, tmp_path, IMAGES)


def test_differences_are_found_in_whatever_a_module_holds():
    def part(**values):
        module = nn.Module()
        module.__dict__.update(values)
        return module

    same = {"a": [1, (2.0, None)], "b": {"k": torch.ones(2)}, "c": functools.partial(F.elu, alpha=2.0), "d": F.relu}
    assert difference(part(**same), part(**copy.deepcopy(same))) == ""
    others = {"a": [1, (2.0, 3)], "b": {"k": torch.zeros(2)}, "c": functools.partial(F.elu, alpha=1.0), "d": F.gelu}
    for name, value in others.items():
        assert difference(part(**same), part(**{**same, name: value})) == f"`{name}`"
    lstm = nn.LSTM(3, 4, num_layers=2)
    assert difference(lstm, nn.LSTM(3, 4, num_layers=2)) == ""
    assert difference(lstm, nn.LSTM(3, 4, num_layers=2, dropout=0.5)) == "`dropout`"
    assert difference(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU())) == "`1`"


def test_buffers_that_are_not_saved_count_with_their_values():
    def part(value, persistent):
        module = nn.Module()
        module.register_buffer("table", torch.full((3,), value), persistent=persistent)
        return module

    assert difference(part(1.0, True), part(2.0, True)) == ""
    assert difference(part(1.0, False), part(1.0, False)) == ""
    assert difference(part(1.0, False), part(2.0, False)) == "`table`"
    assert difference(part(1.0, False), part(1.0, True)) == "`table`"


# Ties


@pytest.mark.parametrize("path", ["table", "decoder"])
def test_a_tie_that_is_torn_is_torn_in_what_is_rebuilt(path, tmp_path):
    model = made(Tied)
    layer = nn.Embedding(9, 4) if path == "table" else nn.Linear(4, 9, bias=False)
    _, edits = replace_(model, path, layer, IDS)
    assert [type(edit) for edit in edits] == [ReplaceEdit]
    assert rebuilt_like(model, edits, tmp_path, IDS, Tied)
    assert model.decoder.weight is not model.table.weight


def test_a_tie_that_is_kept_needs_no_edit(tmp_path):
    model = made(Tied)
    layer = nn.Linear(4, 9, bias=False)
    layer.weight = model.table.weight
    _, edits = replace_(model, "decoder", layer, IDS)
    assert edits == []
    assert rebuilt_like(model, edits, tmp_path, IDS, Tied)


def test_a_new_tie_is_refused():
    class Untied(Tied):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(4, 9, bias=False)

    model = made(Untied)
    layer = nn.Linear(4, 9, bias=False)
    layer.weight = model.table.weight
    with pytest.raises(SurgeryError, match="shares its weight with other modules"):
        replace_(model, "decoder", layer, IDS)


def test_a_tie_that_only_the_factory_makes_is_refused(tmp_path):
    model = made(Tied)
    model.decoder = nn.Linear(4, 9, bias=False)
    save_structure(tmp_path, model, [])
    with pytest.raises(ArtifactError, match=r"decoder\.weight: not tied to table\.weight when it was saved"):
        rebuild(tmp_path, Tied)


# Masks


def masked(schedule=None):
    model = made()
    mask_(model.plain, "weight", model.plain.weight > 0, schedule)
    return model.eval()


def masked_net():
    return masked()


def test_a_mask_goes_over_to_a_layer_of_the_same_sizes(tmp_path):
    model = masked()
    keep = masks_of(model.plain)["weight"].keep.clone()
    _, edits = replace_(model, "plain", nn.Linear(4, 6), IMAGES)
    assert edits == []
    assert torch.equal(masks_of(model.plain)["weight"].keep, keep)
    assert torch.equal(model.plain.weight == 0, ~keep)
    assert rebuilt_like(model, edits, tmp_path, IMAGES, masked_net)


def test_a_mask_goes_over_with_its_schedule_and_where_it_is():
    schedule = MaskSchedule(removed=12, steps=10, rank="movement", start=0)
    model = masked(schedule).train()
    for _ in range(3):
        model(IMAGES).sum().backward()
    model.eval()
    layer = nn.Linear(4, 6)
    layer.load_state_dict({"weight": model.plain.weight.detach(), "bias": model.plain.bias.detach()})
    before = masks_of(model.plain)["weight"]
    replace_(model, "plain", layer, IMAGES)
    after = masks_of(model.plain)["weight"]
    assert after is not before
    assert after.schedule == schedule
    assert int(after.step) == 3
    assert torch.equal(after.scores, before.scores)


def test_a_mask_of_a_layer_that_is_made_again_is_made_again(tmp_path):
    model = masked()
    _, edits = replace_(model, "plain", nn.Linear(4, 6, bias=False), IMAGES)
    assert [type(edit) for edit in edits] == [ReplaceEdit, MaskEdit]
    assert rebuilt_like(model, edits, tmp_path, IMAGES, masked_net)


def test_a_mask_that_comes_with_the_layer_is_made_again(tmp_path):
    model, layer = made(), nn.Linear(4, 6)
    mask_(layer, "weight", layer.weight > 0)
    _, edits = replace_(model, "plain", layer, IMAGES)
    assert [type(edit) for edit in edits] == [ReplaceEdit, MaskEdit]
    assert rebuilt_like(model, edits, tmp_path, IMAGES)


def test_a_layer_that_cannot_take_the_mask_is_refused():
    model = masked()
    kept = model.plain
    words = r"A mask holds \d+ of the 24 numbers of its weight at zero, and does not fit a LowRank"
    with pytest.raises(SurgeryError, match=words) as error:
        replace_(model, "plain", LowRank(nn.Linear(4, 2), nn.Linear(2, 6)), IMAGES)
    assert "trimpoint.bake" in error.value.hint
    assert model.plain is kept
    with pytest.raises(SurgeryError, match=r"of its plain\.weight at zero"):
        replace_(nn.Sequential(model), "0", nn.Linear(3, 5), None)
