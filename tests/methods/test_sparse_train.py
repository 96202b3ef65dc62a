"""Units fade while training goes on, and removing them then costs less than after training without the penalty."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.filters import Glob
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.methods.sparse_train import SparseTrain
from trimpoint.plan import Plan, Step
from trimpoint.task import Task, cross_entropy


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@pytest.fixture(scope="module")
def task(digits):
    images, labels = digits
    return Task(train=TensorDataset(images[:960], labels[:960]), loss=cross_entropy, batch_size=32)


@pytest.fixture(scope="module")
def model(task):
    torch.manual_seed(0)
    return run(Net(), Finetune(epochs=4.0), task).module


def run(model, method, task, where="*", **more):
    return compress(model, Plan((Step(method, Glob(where)),)), task, **more)


def unit_norms(model):
    """Return the size of all weights of each channel of `conv1`, `[16]`."""
    makes, reads = model.conv1.weight.flatten(1), model.conv2.weight.movedim(1, 0).flatten(1)
    return torch.cat([makes, model.norm1.weight[:, None], reads], 1).norm(dim=1).detach()


def test_removing_faded_units_costs_less(model, digits, task):
    """Digits, half of all channels, after equally long training: the loss of held-out images before any recovery."""
    images, labels = digits[0][960:], digits[1][960:]
    rise = {}
    for method in (Finetune(epochs=4.0), SparseTrain(epochs=4.0, strength=3e-3)):
        trained = run(model, method, task).module
        pruned = run(trained, PruneChannels(ratio=0.5), task).module
        with torch.no_grad():
            rise[method.name] = float(cross_entropy(pruned(images), labels) - cross_entropy(trained(images), labels))
    assert 0 < rise["sparse-train"] < 0.7 * rise["finetune"]


def test_units_whose_gates_close_go_for_nothing(model, digits, task):
    """Digits: what is zero after training with gates is what `prune-channels` takes first."""
    trained = run(model, SparseTrain(epochs=8.0, penalty="gates", strength=0.1), task).module
    closed = int((trained.conv2.weight.flatten(1).abs().sum(1) == 0).sum())
    assert closed >= 4
    pruned = run(trained, PruneChannels(ratio=closed / 32, round_to=1), task, where="conv2").module
    assert pruned.conv2.out_channels == 32 - closed
    with torch.no_grad():
        assert torch.allclose(pruned(digits[0]), trained(digits[0]), atol=1e-5)
    assert type(trained.head) is nn.Linear


def test_gates_leave_what_is_out_of_scope_alone(model, task):
    compressed = run(model, SparseTrain(epochs=1.0, penalty="gates", strength=1.0), task, where="conv1")
    assert [change.reason for change in compressed.changes if change.kind == "skipped"] == [
        "no group in scope that linear layers or convolutions read, all of them trained, can be removed, so that "
        "nothing is to fade"
    ]
    assert all(torch.equal(a, b) for a, b in zip(compressed.module.parameters(), model.parameters(), strict=True))


def test_units_spread_and_the_change_is_told(model, task):
    before = unit_norms(model)
    compressed = run(model, SparseTrain(epochs=3.0, strength=3e-3), task)
    after = unit_norms(compressed.module)
    assert float(after.min() / after.max()) < 0.8 * float(before.min() / before.max())
    [change] = [change for change in compressed.changes if change.kind == "trained"]
    assert "90 steps of sgd" in change.after
    assert torch.equal(unit_norms(model), before)


@pytest.mark.parametrize("penalty", ["groups", "scales"])
def test_what_is_trained_is_not_told_as_skipped(model, task, penalty):
    """The channels of the head cannot be removed; they are trained all the same."""
    compressed = run(model, SparseTrain(epochs=1.0, penalty=penalty), task)
    assert [(change.kind, change.origin) for change in compressed.changes] == [("trained", "")]
    assert not torch.equal(compressed.module.head.weight, model.head.weight)


@torch.no_grad()
def test_scales_fade_and_only_they_are_penalised(model, task):
    plain = run(model, Finetune(epochs=1.0), task).module
    sparse = run(model, SparseTrain(epochs=1.0, strength=0.1, penalty="scales", rise=0.0), task).module
    assert float(sparse.norm1.weight.abs().sum()) < 0.8 * float(plain.norm1.weight.abs().sum())
    assert float(sparse.conv2.weight.norm()) > 0.8 * float(plain.conv2.weight.norm())


def test_strength_zero_is_plain_training(model, task):
    plain = run(model, Finetune(epochs=1.0), task).module.state_dict()
    sparse = run(model, SparseTrain(epochs=1.0, strength=0.0), task).module.state_dict()
    assert all(torch.equal(plain[name], sparse[name]) for name in plain)


def test_no_length_changes_nothing(model, task):
    compressed = run(model, SparseTrain(epochs=0.0), task)
    assert {change.kind for change in compressed.changes} == {"skipped"}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), compressed.module.parameters(), strict=True))


@torch.no_grad()
def test_where_limits_what_fades(model, task):
    compressed = run(model, SparseTrain(epochs=1.0, strength=0.1), task, where="conv1")
    assert torch.equal(compressed.module.conv2.weight, model.conv2.weight)
    assert float(compressed.module.conv1.weight.norm()) < float(model.conv1.weight.norm())


def test_more_effort_goes_on_from_the_kept_state(model, task, tmp_path):
    method = SparseTrain(epochs=2.0, strength=1e-3)
    run(model, method, task, effort=0.5, state_dir=tmp_path)
    resumed = run(model, method, task, state_dir=tmp_path)
    whole = run(model, method, task)
    assert "went on from step" in next(c.reason for c in resumed.changes if c.kind == "trained")
    assert all(torch.equal(a, b) for a, b in zip(resumed.module.parameters(), whole.module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "reason"),
    [(SparseTrain(penalty="scales"), "runs through a batch norm"), (SparseTrain(), "can be removed")],
)
def test_nothing_to_fade_is_said(method, reason):
    data = TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,)))
    task = Task(train=data, loss=cross_entropy, batch_size=4)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)] if method.penalty == "scales" else [nn.Linear(4, 3)]
    model = nn.Sequential(*layers)
    compressed = run(model, method, task)
    assert any(reason in change.reason for change in compressed.changes if change.origin == "")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), compressed.module.parameters(), strict=True))


def test_missing_data_and_bad_parameters(model, task):
    with pytest.raises(DataError, match="`train` data"):
        run(model, SparseTrain(), task.with_(train=None, example=torch.zeros(1, 8, 8)))
    with pytest.raises(DataError, match="a loss"):
        run(model, SparseTrain(), task.with_(loss=None))
    for wrong in ({"penalty": "channels"}, {"strength": -1.0}, {"rise": -0.5}, {"strength": float("nan")}):
        with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
            SparseTrain(**wrong)
