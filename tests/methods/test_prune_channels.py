"""Which channels go: criteria, scopes, aligned widths, and exactness of the surgery."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trimpoint.build import Build
from trimpoint.compress import compress
from trimpoint.demo.resnet import ResNet
from trimpoint.errors import DataError, InvalidParameterError, ModelError, UnknownNameError
from trimpoint.filters import Glob
from trimpoint.graph import coupled_groups, trace
from trimpoint.importance import NAMES
from trimpoint.method import Fact
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels, structure
from trimpoint.parts import Group, Member
from trimpoint.plan import Plan, Step
from trimpoint.task import Task, cross_entropy


class Plain(nn.Module):
    def __init__(self, width=16, hidden=32):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, hidden, 3, padding=1)
        self.head = nn.Linear(hidden, 3)

    def forward(self, x):
        return self.head(F.relu(self.conv2(F.relu(self.norm(self.conv1(x))))).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Plain().eval()


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(12, 1, 6, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator))
    return Task(calibrate=data, loss=cross_entropy, batch_size=6)


def prune(model, task, where="*", **params):
    return compress(model, Plan((Step(PruneChannels(**params), Glob(where)),)), task)


def make_group(size, channels=1):
    indices = tuple(tuple(range(u * channels, (u + 1) * channels)) for u in range(size))
    return Group(members=(Member(path="a", parameter="weight", dim=0, indices=indices, role="out"),), size=size)


def test_widths_and_facts(model, task):
    compressed = prune(model, task, ratio=0.5)
    small = compressed.module
    assert (small.conv1.out_channels, small.conv2.in_channels, small.conv2.out_channels) == (8, 8, 16)
    assert small.head.in_features == 16
    assert small.norm.num_features == 8
    assert small(torch.zeros(2, 1, 6, 6)).shape == (2, 3)
    assert Fact.ORIGINAL_SHAPE not in compressed.facts["conv1"]
    change = next(change for change in compressed.changes if change.origin == "conv2")
    assert (change.kind, change.before, change.after) == ("resized", "Conv2d 16→32", "Conv2d 8→16")
    assert model.conv1.out_channels == 16


def test_removing_channels_without_effect_changes_no_output(model, task):
    """Channels that are zero everywhere are found by every criterion that looks at them, and nothing is lost."""
    with torch.no_grad():
        for channel in (0, 3, 5, 6, 9, 11, 12, 15):
            model.conv1.weight[channel] = 0
            model.conv1.bias[channel] = 0
            model.norm.weight[channel] = 0
            model.norm.bias[channel] = 0
            model.conv2.weight[:, channel] = 0
    x = torch.randn(3, 1, 6, 6)
    for importance in (name for name in NAMES if name not in ("random", "geometric-median")):
        small = prune(model, task, where="conv1", ratio=0.5, importance=importance).module
        assert small.conv1.out_channels == 8
        with torch.no_grad():
            assert torch.allclose(small(x), model(x), atol=1e-6)


@pytest.mark.parametrize("missing", [{"loss": None}, {"calibrate": None}])
def test_taylor_without_its_data(model, task, missing):
    with pytest.raises(DataError, match="taylor"):
        prune(model, task.with_(example=torch.zeros(1, 6, 6), **missing), importance="taylor")


@pytest.mark.parametrize(
    ("size", "channels", "wanted", "round_to", "kept"),
    [
        (16, 1, 8, 8, 8),
        (64, 1, 45, 8, 48),
        (64, 1, 1, 8, 8),
        (20, 1, 19, 8, 16),
        (20, 1, 20, 8, 20),
        (10, 1, 3, 1, 3),
        (12, 64, 7, 8, 7),
        (12, 4, 7, 8, 8),
        (24, 1, 20, 16, 16),
        (2, 1, 0, 1, 1),
    ],
)
def test_aligned_widths(size, channels, wanted, round_to, kept):
    assert PruneChannels(round_to=round_to).rounded([make_group(size, channels)], wanted) == kept


def test_narrow_groups_and_outputs_are_told(model, task):
    compressed = prune(model, task, ratio=0.5, round_to=16)
    reasons = {change.origin: change.reason for change in compressed.changes if change.kind == "skipped"}
    assert "no more than round_to=16" in reasons["conv1"]
    assert compressed.module.conv1.out_channels == 16
    assert compressed.module.conv2.out_channels == 16


def test_ratio_that_would_empty_a_layer_keeps_one_multiple(model, task):
    small = prune(model, task, ratio=0.99, round_to=8).module
    assert (small.conv1.out_channels, small.conv2.out_channels) == (8, 8)
    narrow = prune(model, task, ratio=0.99, round_to=1).module
    assert (narrow.conv1.out_channels, narrow.conv2.out_channels) == (1, 1)
    with pytest.raises(InvalidParameterError, match=r"\[0, 1\)"):
        PruneChannels(ratio=1.0)


def test_ratio_zero_is_exactly_nothing(model, task):
    compressed = prune(model, task, ratio=0.0)
    assert {change.kind for change in compressed.changes} == {"skipped"}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), compressed.module.parameters(), strict=True))


def test_global_scope_takes_from_the_redundant_layer(model, task):
    with torch.no_grad():
        model.conv2.weight[8:] *= 1e-3
        model.conv2.bias[8:] *= 1e-3
        model.head.weight[:, 8:] *= 1e-3
    small = prune(model, task, ratio=0.5, scope="global").module
    assert (small.conv1.out_channels, small.conv2.out_channels) == (16, 8)


def test_where_limits_the_producing_modules(model, task):
    compressed = prune(model, task, where="conv2", ratio=0.5)
    assert (compressed.module.conv1.out_channels, compressed.module.conv2.out_channels) == (16, 16)


def test_residual_streams_are_pruned_together_or_not_at_all(task):
    torch.manual_seed(0)
    model = ResNet(widths=(16, 16), depth=2, classes=3).eval()
    small = prune(model, task, ratio=0.5).module
    assert {m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)} == {8}
    assert small(torch.zeros(2, 1, 6, 6)).shape == (2, 3)
    partly = prune(model, task, where="stem", ratio=0.5)
    reason = next(change.reason for change in partly.changes if change.origin == "stem.conv")
    assert "coupled with" in reason
    assert "out of scope" in reason


@pytest.mark.parametrize("wrong", [{"importance": "l3"}, {"round_to": 0}, {"round_to": 1.5}, {"scope": "layer"}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
        PruneChannels(**wrong)


@pytest.mark.parametrize("importance", NAMES)
@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_every_criterion_in_every_scope(importance, scope, model, task):
    small = prune(model, task, ratio=0.5, importance=importance, scope=scope, round_to=4).module
    widths = small.conv1.out_channels, small.conv2.out_channels
    assert all(width % 4 == 0 and width >= 4 for width in widths)
    assert widths == (8, 16) if scope == "local" else 20 <= sum(widths) <= 28
    assert small(torch.zeros(2, 1, 6, 6)).shape == (2, 3)


def last_first(group, evidence):
    return torch.arange(group.size)


def test_a_criterion_of_ones_own(model, task, monkeypatch):
    module = types.ModuleType("own_criterion")
    module.last_first = last_first
    monkeypatch.setitem(sys.modules, "own_criterion", module)
    small = prune(model, task, where="conv1", ratio=0.5, importance="own_criterion:last_first").module
    assert torch.equal(small.conv1.weight, model.conv1.weight[8:])
    plan = Plan((Step(PruneChannels(importance="own_criterion:last_first")),))
    assert Plan.from_data(plan.to_data()) == plan
    with pytest.raises(UnknownNameError, match="first_last"):
        prune(model, task, importance="own_criterion:first_last")


def test_random_follows_the_seed(model, task):
    def kept(seed):
        plan = Plan((Step(PruneChannels(importance="random")),), seed=seed)
        return compress(model, plan, task).module.conv1.weight

    assert torch.equal(kept(0), kept(0))
    assert not torch.equal(kept(0), kept(1))


def test_lamp_is_compared_between_groups_as_it_is(model, task):
    """Two groups of one shape and different size of the weights: LAMP takes from both alike, and does so exactly."""
    torch.manual_seed(0)
    model = Plain(32, 32).eval()
    with torch.no_grad():
        model.conv2.weight *= 100
    small = prune(model, task, ratio=0.5, scope="global", importance="lamp", round_to=1).module
    assert 8 < small.conv1.out_channels < 24
    assert small.conv1.out_channels + small.conv2.out_channels == 32


class Twins(nn.Module):
    """Two convolutions of one structure, and two linear layers of another: `[batch, 1, 6, 6]` to `[batch, 3]`."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(32, 3)
        self.pairs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)) for _ in range(2)
        )
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 32)

    def forward(self, x):
        x = self.stem(x)
        for pair in self.pairs:
            x = x + pair(x)
        return self.head(F.relu(self.down(F.relu(self.up(x.mean((2, 3)))))))


def half_first(group, evidence):
    """Give `pairs.0` less than `pairs.1`, and everything else far less than both."""
    size = {"pairs.0.0": 100, "pairs.1.0": 200}.get(group.name, 0)
    return torch.arange(group.size) + size


def test_isomorphic_groups_are_ranked_among_themselves(task, monkeypatch):
    module = types.ModuleType("own_criterion")
    module.half_first = half_first
    monkeypatch.setitem(sys.modules, "own_criterion", module)
    torch.manual_seed(0)
    model = Twins().eval()
    small = prune(
        model, task, ratio=0.25, scope="isomorphic", round_to=1, importance="own_criterion:half_first", where="pairs.*"
    ).module
    assert [pair[0].out_channels for pair in small.pairs] == [8, 16]
    whole = prune(model, task, ratio=0.25, scope="isomorphic", round_to=1, importance="own_criterion:half_first").module
    assert [pair[0].out_channels for pair in whole.pairs] == [8, 16]
    assert whole.up.out_features + whole.down.out_features == 48
    assert whole.stem.out_channels == 6


def test_structure_tells_isomorphic_groups():
    task_model = Twins().eval()
    groups = {g.name: g for g in coupled_groups(trace(task_model, torch.zeros(2, 1, 6, 6)))}
    key = {name: structure(task_model, group) for name, group in groups.items()}
    assert key["pairs.0.0"] == key["pairs.1.0"]
    assert key["up"] == key["down"]
    assert len({key["pairs.0.0"], key["up"], key["stem"]}) == 3


def test_rounds_with_recovery_in_between_are_a_plan(model, task):
    """The ratio is a share of what is there when a step begins."""
    data = task.calibrate
    steps = (Step(PruneChannels(ratio=0.5, round_to=1)), Step(Finetune(epochs=2, lr=0.01)))
    compressed = compress(model, Plan(steps * 2), task.with_(train=data))
    assert (compressed.module.conv1.out_channels, compressed.module.conv2.out_channels) == (4, 8)
    widths = [change.after for change in compressed.changes if change.origin == "conv1" and change.kind == "resized"]
    assert widths == ["Conv2d 1→8", "Conv2d 1→4"]
    assert [change.kind for change in compressed.changes if change.kind == "trained"] == ["trained"] * 2


@pytest.mark.parametrize(("kind", "reason"), [("heads", "attention heads"), ("hidden", "recurrent layer")])
def test_units_that_are_no_channels_are_left_with_the_reason(kind, reason, model, task, monkeypatch):
    groups = Build.groups
    monkeypatch.setattr(Build, "groups", lambda build: tuple(replace(g, kind=kind) for g in groups(build)))
    compressed = prune(model, task, ratio=0.5)
    skipped = {change.origin: change.reason for change in compressed.changes if change.kind == "skipped"}
    assert reason in skipped["conv1"]
    assert reason in skipped["conv2"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), compressed.module.parameters(), strict=True))


class Frozen(Plain):
    """The backbone takes no gradient."""

    def __init__(self):
        super().__init__()
        self.between, self.bound = nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x):
        with torch.no_grad():
            x = F.relu(self.conv2(F.relu(self.norm(self.conv1(x))))).mean((2, 3))
        return self.bound(F.relu(self.between(x)))


@pytest.mark.parametrize("importance", ["taylor", "fisher", "group-fisher"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_groups_without_a_gradient_are_not_ranked_by_it(importance, scope, task):
    torch.manual_seed(0)
    result = prune(Frozen().eval(), task, importance=importance, scope=scope)
    (change,) = [c for c in result.changes if c.origin == "conv1"]
    assert change.kind == "skipped"
    assert "the loss has no gradient there" in change.reason
    assert result.module.between.out_features < 32


def test_a_loss_without_any_gradient_ranks_nothing(model, task):
    still = task.with_(loss=lambda outputs, targets: outputs.detach().sum())
    result = prune(model, still, importance="taylor")
    assert {change.kind for change in result.changes} == {"skipped"}


class Counting(Plain):
    """A buffer follows the mean of the activations, in evaluation mode too."""

    def __init__(self, width=16):
        super().__init__(width)
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        return self.head(F.relu(self.conv2(x - self.mean[:, None, None])).mean((2, 3)))


def test_buffers_that_keep_what_was_computed_do_not_disturb_gradients(task):
    torch.manual_seed(0)
    for importance in ("taylor", "group-fisher"):
        assert prune(Counting().eval(), task, importance=importance).module.conv2.out_channels == 16


def test_outputs_that_no_loss_can_read_are_told(task):
    class Silent(Plain):
        def forward(self, x):
            super().forward(x)

    with pytest.raises(ModelError, match=r"must be a tensor. Got NoneType"):
        prune(Silent().eval(), task, importance="taylor")


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_a_convolution_that_computes_its_weight_has_that_reason(model, task):
    model.conv1 = Standardised(1, 16, 3, padding=1)
    (change,) = [c for c in prune(model, task).changes if c.origin == "conv1"]
    assert change.reason == "no removable group begins here: its class Standardised has a forward pass of its own"


def test_rounding_takes_nothing_where_nothing_was_asked_for(task):
    torch.manual_seed(0)
    model = Plain(11, 32).eval()
    assert prune(model, task, ratio=0.001).module.conv1.out_channels == 11
    assert prune(model, task, ratio=0.1).module.conv1.out_channels == 8
    assert PruneChannels(ratio=0.29, round_to=1).kept(make_group(100)) == 71
