"""What an edit is checked on: batches that hide nothing, in float64, against what the edit takes away."""

import copy
import math

import pytest
import torch
from torch import nn

from trimpoint.errors import SurgeryError
from trimpoint.graph import coupled_groups, find_groups, remove_units_, trace
from trimpoint.graph.running import UNCHECKED, compare, drawn_around, evaluating, probing, run_probe
from trimpoint.losses import call

WIDTH = 16


class FixedHeads(nn.Module):
    """Attention whose number of heads stands in the code."""

    def __init__(self, std=0.3, cast=False):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.head, self.cast = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3), cast
        for layer in (self.q, self.k):
            nn.init.normal_(layer.weight, std=std)

    def forward(self, x):
        if self.cast:
            x = x.float()
        q, k, v = (layer(x).view(*x.shape[:2], 4, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.head(self.norm(x + self.o(mixed.transpose(1, 2).flatten(2))).mean(1))


class Swapped(nn.Module):
    """Halves of a layer change places at a fixed position, in a branch that is scaled down."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.first, self.second, self.skip = nn.Linear(8, 48, bias=False), nn.Linear(48, 16), nn.Linear(8, 16)
        self.head, self.scale = nn.Linear(16, 3), nn.Parameter(scale * torch.ones(16))

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.head(self.second(torch.cat([h[:, 24:], h[:, :24]], 1)) * self.scale + self.skip(x))


class Casting(nn.Module):
    """A model that may cast its inputs, or refuse those that are not float32."""

    def __init__(self, how="float"):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(4, 6), nn.Linear(6, 3), how

    def forward(self, x):
        if self.how == "float32 only":
            assert x.dtype == torch.float32
            x = x.to(self.first.weight.dtype)
        elif self.how == "numpy":
            x = torch.from_numpy(x.numpy().astype("float32"))
        else:
            x = {"float": x.float, "to": lambda: x.to(torch.float32), "named": lambda: x.to(dtype=torch.half)}[
                self.how
            ]()
        return self.second(torch.relu(self.first(x)))


class Lookup(nn.Module):
    """Embedded tokens in an order that fixed positions are taken from."""

    def __init__(self):
        super().__init__()
        self.table, self.heads = nn.Embedding(9, WIDTH), FixedHeads()

    def forward(self, ids):
        return self.heads(self.table(ids))


def removed(module, inputs, kind="channels", name=None):
    """Remove every other unit of the groups of a kind, or of one; return which are left whole, with their reasons."""
    module.eval()
    groups = [g for g in find_groups(module, inputs) if g.kind == kind and not g.reason and name in (None, g.name)]
    assert groups
    return remove_units_(module, groups, {g.name: range(0, g.size, 2) for g in groups}, inputs)


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(2, 5, WIDTH), torch.ones(2, 5, WIDTH), torch.full((2, 5, WIDTH), math.nan), torch.randn(2, 5, WIDTH)],
    ids=["zeros", "ones", "nan", "random"],
)
@pytest.mark.parametrize(("std", "cast"), [(0.3, False), (0.02, True)])
def test_a_fixed_number_of_heads_is_seen_on_inputs_that_hide_it(inputs, std, cast):
    torch.manual_seed(0)
    module = FixedHeads(std, cast)
    before = copy.deepcopy(module.state_dict())
    edits, failed = removed(module, inputs, "heads")
    assert edits == []
    assert all("not compute what it computes" in reason for reason in failed.values())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("ids", [torch.zeros(2, 5, dtype=torch.long), torch.full((2, 5), 7)], ids=["zeros", "sevens"])
def test_tokens_that_are_all_the_same_hide_nothing(ids):
    torch.manual_seed(0)
    edits, failed = removed(Lookup(), ids, "heads")
    assert edits == []
    assert all("not compute what it computes" in reason for reason in failed.values())


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("inputs", [torch.zeros(2, 8), torch.randn(2, 8)], ids=["zeros", "random"])
def test_a_fixed_position_is_seen_in_a_small_branch(scale, inputs):
    torch.manual_seed(0)
    edits, failed = removed(Swapped(scale), inputs, name="first")
    assert edits == []
    assert "not compute what it computes" in failed["first"]


@pytest.mark.parametrize("how", ["float", "to", "named", "float32 only", "numpy"])
def test_models_that_cast_their_inputs(how):
    torch.manual_seed(0)
    module, inputs = Casting(how), torch.randn(2, 4)
    with evaluating(module), probing(module, inputs) as probe:
        kind = torch.float32 if how == "numpy" else torch.float64
        assert run_probe(module, probe)[0].dtype == kind == probe.outputs[0].dtype
        assert module.first.weight.dtype == kind
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    if how != "numpy":
        plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        groups = coupled_groups(trace(plain, inputs))
        assert remove_units_(plain, groups, {"0": [1]}, inputs)[1] == {}


def test_what_has_no_finite_output_cannot_be_checked():
    class Lost(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.second(torch.relu(self.first(x))) * math.nan

    edits, failed = removed(Lost(), torch.randn(2, 4))
    assert edits == []
    assert failed == {"first": UNCHECKED}
    assert "cannot be checked" in UNCHECKED
    assert compare([torch.full((2,), math.nan)], [torch.full((2,), math.nan)]) == UNCHECKED


def test_what_does_not_run_on_random_inputs_is_checked_on_the_given_ones():
    class Choosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(3, 6), nn.Linear(6, 3)

        def forward(self, ids):
            if bool((ids[1] != 0).any()):
                raise ValueError("only the first token is known")
            return self.head(self.table(ids))

    module, ids = Choosy().eval(), torch.zeros(2, 4, dtype=torch.long)
    with evaluating(module), probing(module, ids) as probe:
        assert torch.equal(probe.inputs, ids)


def test_the_first_sample_and_masks_stay_and_the_others_are_random():
    batch = {
        "x": torch.cat([torch.zeros(1, 64), torch.rand(2, 64)]),
        "ids": torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0], [2, 8, 9, 1]]),
        "attention_mask": torch.tensor([[1.0, 1, 1, 0]] * 3),
        "types": torch.zeros(3, 4, dtype=torch.long),
        "keep": torch.ones(3, 4, dtype=torch.bool),
        "length": torch.tensor([4, 3, 4]),
    }
    batch["x"][1, 0] = math.nan
    drawn, again = drawn_around(batch), drawn_around(batch)
    assert all(torch.equal(drawn[key], again[key]) for key in batch)
    assert all(torch.equal(drawn[key][:1], batch[key][:1]) for key in batch)
    assert all(drawn[key] is batch[key] for key in ("attention_mask", "types", "keep", "length"))
    assert drawn["x"].isfinite().all()
    assert float(drawn["x"].min()) >= 0
    assert not torch.equal(drawn["x"][1:], batch["x"][1:].nan_to_num())
    assert not torch.equal(drawn["ids"], batch["ids"])
    assert torch.equal(drawn["ids"].sort().values, batch["ids"].sort().values)
    assert float(drawn_around(torch.zeros(2, 99))[1].min()) < 0
    assert not torch.equal(drawn_around(torch.zeros(1, 9)), torch.zeros(1, 9))


def test_a_difference_is_measured_by_what_the_zeros_change():
    want = torch.ones(3, dtype=torch.float64)
    assert compare([want + 1e-10], [want], [want + 1e-3]) == ""
    assert "not compute" in compare([want + 1e-10], [want], [want + 1e-10])
    assert compare([want + 1e-13], [want], [want]) == ""
    assert "not compute" in compare([want + 1e-8], [want], [want + 1])
    assert compare([want + 1e-10], [want], [want * math.inf]) != ""
    assert compare([want], [want + 1e-10]) == ""


def test_the_random_state_and_modes_are_left_alone():
    module = Casting("to").train()
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    removed(copy.deepcopy(module), torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(1), wanted)
    assert call(module, torch.ones(1, 4)).dtype == torch.float32


def test_the_whole_model_is_no_block():
    from trimpoint.graph import bypass_

    with pytest.raises(SurgeryError, match="whole model"):
        bypass_(nn.Linear(4, 4), "", torch.ones(2, 4))
