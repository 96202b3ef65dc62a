"""Which channels go: importances against formulas, aligned widths, and exactness of the surgery."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.demo.resnet import ResNet
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.filters import Glob
from trimpoint.graph import coupled_groups, trace
from trimpoint.method import Fact
from trimpoint.methods.prune_channels import PruneChannels, aligned, magnitude, taylor
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


def group_of(model, name):
    return next(g for g in coupled_groups(trace(model, torch.zeros(2, 1, 6, 6))) if g.name == name)


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
    """Channels that are zero everywhere are found by both importances, and nothing is lost with them."""
    with torch.no_grad():
        for channel in (0, 3, 5, 6, 9, 11, 12, 15):
            model.conv1.weight[channel] = 0
            model.conv1.bias[channel] = 0
            model.norm.weight[channel] = 0
            model.norm.bias[channel] = 0
            model.conv2.weight[:, channel] = 0
    x = torch.randn(3, 1, 6, 6)
    for importance in ("magnitude", "taylor"):
        small = prune(model, task, where="conv1", ratio=0.5, importance=importance).module
        assert small.conv1.out_channels == 8
        with torch.no_grad():
            assert torch.allclose(small(x), model(x), atol=1e-6)


def test_magnitude_against_the_formula(model):
    expected = torch.stack(
        [
            model.conv1.weight.double().square().sum((1, 2, 3)),
            model.norm.weight.double().square(),
            model.conv2.weight.double().square().sum((0, 2, 3)),
        ]
    )
    expected = (expected / expected.mean(1, keepdim=True)).mean(0)
    assert torch.allclose(magnitude(model, group_of(model, "conv1")), expected)


def test_taylor_against_finite_differences_of_gates(model, task):
    """The sum of gradient times weight is the derivative of the loss by a gate on the unit (Molchanov et al. 2019)."""
    group = group_of(model, "conv2")
    scores = taylor(model, [group], task)["conv2"]
    expected = torch.zeros(32, dtype=torch.float64)
    double = Plain().eval()
    double.load_state_dict(model.state_dict())
    double.double()
    for x, y in task.batches("calibrate"):
        for unit in range(32):
            losses = []
            for step in (1e-4, -1e-4):
                gate = torch.ones(32, dtype=torch.float64)
                gate[unit] += step
                handle = double.conv2.register_forward_hook(lambda m, i, o, g=gate: o * g[:, None, None])
                with torch.no_grad():
                    losses.append(cross_entropy(double(x.double()), y).item())
                handle.remove()
            expected[unit] += 2 * ((losses[0] - losses[1]) / 2e-4) ** 2  # the producer and the consumer
    assert torch.allclose(scores, expected, rtol=1e-2, atol=1e-9)


def test_taylor_leaves_the_model_and_its_gradients_alone(model, task):
    before = [p.clone() for p in model.parameters()]
    model.requires_grad_(False)
    scores = taylor(model, [group_of(model, "conv1")], task)["conv1"]
    assert float(scores.min()) >= 0
    assert float(scores.max()) > 0
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


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
    assert aligned(make_group(size, channels), wanted, round_to) == kept


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


@pytest.mark.parametrize("wrong", [{"importance": "l1"}, {"round_to": 0}, {"round_to": 1.5}, {"scope": "layer"}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
        PruneChannels(**wrong)
