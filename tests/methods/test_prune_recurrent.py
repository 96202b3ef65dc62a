"""Which hidden units go: the same number in each layer, each layer's own; exact, exported, trained on."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.filters import Glob
from trimpoint.graph import coupled_groups, trace
from trimpoint.importance import NAMES
from trimpoint.method import Fact
from trimpoint.methods.prune_recurrent import PruneRecurrent
from trimpoint.parts import Group, Member
from trimpoint.plan import Plan, Step
from trimpoint.runtimes.export import export
from trimpoint.task import Task, cross_entropy
from trimpoint.testing import zoo

HIDDEN, STEPS, FEATURES = 24, 6, 5


class Reader(nn.Module):
    """A recurrent module and a head that reads the mean of what it makes."""

    def __init__(self, kind="LSTM", **options):
        super().__init__()
        self.rnn = getattr(nn, kind)(FEATURES, HIDDEN, **{"num_layers": 2, "batch_first": True} | options)
        self.head = nn.Linear(HIDDEN * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, x):
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        return self.head(self.rnn(x)[0].mean(1 if self.rnn.batch_first else 0))


class Residual(nn.Module):
    """Layers of 24 and 16 units, the first with a residual and the second before a normalisation."""

    def __init__(self):
        super().__init__()
        self.inlet = nn.Linear(FEATURES, HIDDEN)
        self.first = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.second = nn.LSTM(HIDDEN, 16, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.up, self.head = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = self.inlet(x)
        x = self.norm(self.second(x + self.first(x)[0])[0][:, -1])
        return self.head(torch.relu(self.up(x)))


def make(kind=Reader, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options).eval()


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, STEPS, FEATURES, generator=generator)
    return Task(
        train=TensorDataset(x, x.mean((1, 2)).gt(0).long()),
        calibrate=TensorDataset(x[:8], x[:8].mean((1, 2)).gt(0).long()),
        loss=cross_entropy,
        batch_size=4,
    )


@pytest.fixture
def inputs():
    return torch.randn(4, STEPS, FEATURES, generator=torch.Generator().manual_seed(1))


def prune(model, task, where="*", **params):
    return compress(model, Plan((Step(PruneRecurrent(**params), Glob(where)),)), task)


def hidden_groups(model, inputs):
    return [g for g in coupled_groups(trace(model, inputs)) if g.kind == "hidden"]


def zeroed(model, groups, removals):
    """Return a copy with zeros wherever a removed unit is made or read."""
    model = copy.deepcopy(model)
    for group in groups:
        for member in group.members:
            tensor = model.get_submodule(member.path).get_parameter(member.parameter)
            at = [position for unit in removals[group.name] for position in member.indices[unit]]
            tensor.data.index_fill_(member.dim, torch.tensor(at), 0)
    return model


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"bidirectional": True}),
        ("GRU", {"batch_first": False, "num_layers": 3}),
        ("RNN", {"num_layers": 1}),
    ],
)
def test_smaller_layers_of_the_largest_units_exactly(kind, options, task, inputs):
    model = make(Reader, kind, **options)
    compressed = prune(model, task, ratio=0.5)
    small = compressed.module
    assert (small.rnn.hidden_size, small.rnn.input_size, model.rnn.hidden_size) == (16, FEATURES, HIDDEN)
    assert small.head.in_features == 16 * (2 if small.rnn.bidirectional else 1)
    groups = hidden_groups(model, inputs)
    removals = {}
    for group in groups:
        parts = []
        for member in group.members:
            if "bias" not in member.parameter:
                weight = model.get_submodule(member.path).get_parameter(member.parameter).detach().double()
                rows = weight.movedim(member.dim, 0).square().flatten(1).sum(1)
                squared = torch.stack([rows[list(at)].sum() for at in member.indices])
                parts.append(squared / squared.mean())
        removals[group.name] = torch.stack(parts).mean(0).argsort()[:8].tolist()
    assert len({tuple(sorted(units)) for units in removals.values()}) == len(groups)  # each layer loses its own
    with torch.no_grad():
        assert torch.allclose(small(inputs), zeroed(model, groups, removals)(inputs), atol=1e-6)
    change = next(change for change in compressed.changes if change.origin == "rnn")
    assert (change.kind, change.before, change.after) == ("resized", f"{kind} 5→24", f"{kind} 5→16")
    assert Fact.ORIGINAL_SHAPE not in compressed.facts["rnn"]


def test_units_without_effect_go_first(task, inputs):
    model = make()
    groups = hidden_groups(model, inputs)
    dead = {group.name: list(range(start, start + 8)) for start, group in enumerate(groups)}
    model = zeroed(model, groups, dead)
    for importance in ("magnitude", "taylor", "activation"):
        small = prune(model, task, ratio=1 / 3, importance=importance).module
        assert small.rnn.hidden_size == 16
        with torch.no_grad():
            assert torch.allclose(small(inputs), model(inputs), atol=1e-6)


@pytest.mark.parametrize("importance", NAMES)
def test_every_importance(importance, task, inputs):
    small = prune(make(), task, importance=importance).module
    assert small.rnn.hidden_size == 16
    assert small(inputs).isfinite().all()


def test_of_ones_own(task):
    small = prune(make(), task, importance=f"{__name__}:last_units_first").module
    assert torch.equal(small.rnn.weight_ih_l0[:16], make().rnn.weight_ih_l0[8:HIDDEN])


def last_units_first(group, _):
    return torch.arange(group.size)


@pytest.mark.parametrize(
    ("ratio", "round_to", "left"), [(0.5, 8, 16), (0.5, 1, 12), (0.25, 8, 16), (0.9, 8, 8), (0.75, 5, 5), (0.7, 16, 16)]
)
def test_aligned_sizes(ratio, round_to, left, task):
    assert prune(make(), task, ratio=ratio, round_to=round_to).module.rnn.hidden_size == left


def test_residual_and_norm(task, inputs):
    compressed = prune(make(Residual), task)
    small, reasons = compressed.module, {c.origin: c.reason for c in compressed.changes if c.kind == "skipped"}
    assert (small.inlet.out_features, small.first.input_size, small.first.hidden_size) == (16, 16, 16)
    assert (small.second.input_size, small.second.hidden_size, small.norm.normalized_shape) == (16, 16, (16,))
    assert reasons["up"] == "its units are channels, no hidden units of a recurrent layer"
    assert small(inputs).shape == (4, 3)
    other = prune(make(Residual), task, where="second")
    assert all(change.kind == "skipped" for change in other.changes)
    assert "layer_norm" in next(change.reason for change in other.changes if change.origin == "second")


def test_a_layer_coupled_with_what_is_out_of_scope(task):
    compressed = prune(make(Residual), task, where="first")
    assert [(change.origin, change.kind) for change in compressed.changes] == [("first", "skipped")]
    assert compressed.changes[0].reason == "its channels are coupled with `inlet`, which is out of scope"


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.LSTM(FEATURES, HIDDEN, 2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x):
        return self.head((self.one(x)[0] + self.two(x)[0])[:, -1])


def test_two_modules_coupled_by_an_addition(task, inputs):
    model = make(Coupled)
    small = prune(model, task).module
    assert small.one.hidden_size == small.two.hidden_size == 16
    assert small(inputs).shape == (4, 3)
    alone = prune(model, task, where="one")  # its first layer could go, but not without the second
    assert [change.kind for change in alone.changes] == ["skipped"]
    assert "coupled with `two`, which is out of scope" in alone.changes[0].reason


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"ratio": 0.0}, "the ratio is 0"),
        ({"round_to": 24}, "its 24 hidden units are no more than round_to=24"),
        ({"ratio": 0.1}, "removing 2 of 24 hidden units rounds to none"),
    ],
)
def test_left_alone(params, words, task, inputs):
    model = make()
    compressed = prune(model, task, **params)
    assert words in {c.origin: c.reason for c in compressed.changes}["rnn"]
    with torch.no_grad():
        assert torch.equal(compressed.module(inputs), model(inputs))


@pytest.mark.parametrize("params", [{"ratio": 1.0}, {"ratio": -0.1}, {"round_to": 0}, {"importance": "size"}])
def test_bad_parameters(params):
    with pytest.raises(InvalidParameterError, match=next(iter(params))):
        PruneRecurrent(**params)


def test_missing_data(task, inputs):
    with pytest.raises(DataError, match="taylor"):
        prune(make(), task.with_(example=inputs[0], calibrate=None), importance="taylor")


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_exported_file_is_smaller_and_answers_the_same(kind, task, inputs):
    model = make(Reader, kind, bidirectional=True)
    small = prune(model, task).module
    file = export(small, inputs, {"input": {0: "batch"}}).onnx
    assert len(file) < 0.7 * sum(4 * parameter.numel() for parameter in model.parameters())
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (inputs, inputs[:1], inputs.flip(1)):
        (answer,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        with torch.no_grad():
            assert np.abs(answer - small(batch).numpy()).max() < 1e-5


def test_plain_training_goes_on(task):
    small = prune(make(Reader, "GRU", bidirectional=True), task).module.train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        for batch in task.batches("train"):
            loss = task.loss_of(small, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])


def test_bfloat16_and_seeds(task, inputs):
    model = make().bfloat16()
    half = task.with_(example=inputs[0].bfloat16(), calibrate=None, train=None)
    small = prune(model, half).module
    assert small.rnn.hidden_size == 16
    assert small.rnn.weight_hh_l1.dtype is torch.bfloat16
    states = [prune(make(), task, importance="random").module.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_forecast_and_variants(task, inputs):
    model = make(Reader, num_layers=2, bidirectional=True)
    groups = coupled_groups(trace(model, inputs))
    assert [method.ratio for method in PruneRecurrent.variants((), groups)] == [0.25, 0.5, 0.75]
    forecast = PruneRecurrent(ratio=0.5).forecast(model, (), groups)
    assert set(forecast) == {"rnn", "head"}
    assert forecast["head"] == pytest.approx(size(prune(model, task).module.head) / size(model.head))
    small = prune(model, task).module
    assert size(small.rnn) / size(model.rnn) == pytest.approx(forecast["rnn"])
    assert PruneRecurrent(ratio=0.0).forecast(model, (), groups) == {}
    convolutions, _ = zoo()["cnn"].make()
    found = coupled_groups(trace(convolutions, torch.zeros(2, 3, 8, 8)))
    assert PruneRecurrent().forecast(convolutions, (), found) == {}


def test_coupled_pairs_of_units_keep_an_aligned_hidden_size():
    """Where two hidden units of a layer are one unit of the group, four units are kept for `round_to` 8."""

    def group(name, per):
        rows = tuple(tuple(range(u * per, (u + 1) * per)) for u in range(12))
        members = tuple(
            Member(path="rnn", parameter=f"weight_hh_{name}", dim=dim, indices=rows, role=role)
            for dim, role in ((0, "out"), (1, "in"))
        )
        return Group(members=members, size=12, label=name, kind="hidden", alike="rnn")

    for ratio, first, kept in ((0.5, 1, 8), (0.6, 2, 4)):
        method, alike = PruneRecurrent(ratio=ratio), [group("l0", first), group("l1", 2)]
        assert method.rounded(alike, method.kept(alike[0])) == kept
    method, alike = PruneRecurrent(ratio=0.6), [group("l0", 1), group("l1", 1)]
    assert method.rounded(alike, method.kept(alike[0])) == 8
