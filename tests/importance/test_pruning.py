"""How many units go when groups are ranked together, and what is left of the modules they run through."""

import pytest
import torch
from torch import nn

from trimpoint.build import Build
from trimpoint.compress import compress
from trimpoint.importance.pruning import left, ranked_together, together
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.parts import Group, Member
from trimpoint.plan import Plan
from trimpoint.search.space import share_of
from trimpoint.task import Task, cross_entropy


def group(name, size, *members, alike=""):
    first = Member(path=name, parameter="weight", dim=0, indices=tuple((i,) for i in range(size)), role="out")
    return Group(members=members or (first,), size=size, label=name, alike=alike)


def member(path, parameter, dim, count, offset=0, per=1, role="out"):
    indices = tuple(tuple(range(offset + i * per, offset + (i + 1) * per)) for i in range(count))
    return Member(path=path, parameter=parameter, dim=dim, indices=indices, role=role)


def test_the_least_of_all_go():
    groups = [group("a", 4), group("b", 2)]
    found = {"a": torch.tensor([5.0, 1.0, 2.0, 3.0]), "b": torch.tensor([0.5, 4.0])}
    assert ranked_together(groups, found, 0.5) == {"a": 2, "b": 1}
    assert ranked_together(groups, found, 0.0) == {"a": 4, "b": 2}


def test_units_that_are_spared_are_made_up_for_by_others():
    groups = [group("a", 2), group("b", 4)]
    found = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    assert ranked_together(groups, found, 0.5) == {"a": 0, "b": 3}
    assert ranked_together(groups, found, 0.5, spared=1) == {"a": 1, "b": 2}
    assert ranked_together(groups, found, 0.9, spared=1) == {"a": 1, "b": 1}


def test_of_equal_units_the_first_group_loses_its_own():
    groups = [group("a", 4), group("b", 4)]
    assert ranked_together(groups, dict.fromkeys("ab", torch.ones(4)), 0.5) == {"a": 0, "b": 4}


def test_groups_of_one_size_are_together():
    groups = [group("a", 2, alike="rnn"), group("b", 2), group("c", 2, alike="rnn"), group("d", 2)]
    assert [[g.name for g in some] for some in together(groups)] == [["a", "c"], ["b"], ["d"]]


def test_what_is_left_counts_every_dimension_and_the_bias():
    model = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(16, 2)})
    groups = [
        group("a", 8, member("a", "weight", 0, 8), member("a", "bias", 0, 8), member("b", "weight", 1, 8, role="in")),
        group("x", 8, member("b", "weight", 1, 8, offset=8, role="in")),
    ]
    assert left(model, groups, {}) == {}
    assert left(model, groups, {"a": 6}) == {"a": 0.75, "b": pytest.approx((14 * 2 + 2) / 34)}
    assert left(model, groups, {"a": 4, "x": 4})["b"] == pytest.approx((8 * 2 + 2) / 34)


def test_what_is_left_of_a_module_inside_of_another_is_over_what_is_left_of_that():
    model = nn.ModuleDict({"m": nn.MultiheadAttention(8, 2, bias=False)})
    heads = (
        *(member("m", "in_proj_weight", 0, 2, offset=8 * part, per=4) for part in range(3)),
        member("m.out_proj", "weight", 1, 2, per=4, role="in"),
    )
    assert left(model, [group("m", 2, *heads)], {"m": 1}) == {"m": 0.5}


def test_tied_weights_are_cut_in_both_places_and_buffers_do_not_count():
    model = nn.ModuleDict({"e": nn.Embedding(10, 4), "h": nn.Linear(4, 10, bias=False), "n": nn.BatchNorm1d(4)})
    model["h"].weight = model["e"].weight
    members = (
        member("e", "weight", 1, 4),
        member("n", "weight", 0, 4, role="through"),
        member("n", "bias", 0, 4, role="through"),
        member("n", "running_mean", 0, 4, role="through"),
        member("h", "weight", 1, 4, role="in"),
    )
    assert left(model, [group("e", 4, *members)], {"e": 1}) == {"e": 0.25, "h": 0.25, "n": 0.25}


class Scaled(nn.Module):
    """Parameters at the root, beside layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 32, 1), nn.Conv2d(32, 32, 1), nn.Linear(32, 3)
        self.scale = nn.Parameter(torch.ones(32, 1, 1))

    def forward(self, x):
        return self.head(self.b(self.a(x) * self.scale).mean((2, 3)))


def test_parameters_at_the_root_do_not_disturb_what_is_below():
    model = Scaled().eval()
    task = Task(calibrate=[(torch.randn(1, 4, 4), 0)] * 2, loss=cross_entropy)
    method = PruneChannels(ratio=0.5)
    shares = method.forecast(model, (), Build(module=model, given=model, task=task).groups())
    made = dict(compress(model, Plan().then(method), task).module.named_modules())
    for path, module in model.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        rest = sum(p.numel() for p in made[path].parameters(recurse=False))
        assert share_of(path, shares) * own == pytest.approx(rest)
