"""Which blocks go, and what is left."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.demo.resnet import ResNet
from trimpoint.errors import DataError, InvalidParameterError, ModelError, SurgeryError, UnknownNameError
from trimpoint.filters import Glob
from trimpoint.graph import Bypass
from trimpoint.method import Fact
from trimpoint.methods.drop_blocks import DropBlocks, least, spread
from trimpoint.parts import Block
from trimpoint.plan import Plan, Step
from trimpoint.task import Task, cross_entropy


def make_blocks(*families):
    return [
        Block(path=f"{f}.{i}", shape=(1, 2), params=1, family=str(f)) for f, n in enumerate(families) for i in range(n)
    ]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ResNet(widths=(8, 16), depth=3).eval()


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    return Task(calibrate=TensorDataset(torch.randn(6, 1, 8, 8, generator=generator), torch.zeros(6)), batch_size=4)


def dropped(compressed):
    return [path for path, module in compressed.module.named_modules() if isinstance(module, Bypass)]


@pytest.mark.parametrize(
    ("families", "count", "expected"),
    [
        ((4,), 2, ["0.1", "0.3"]),
        ((6,), 3, ["0.1", "0.3", "0.5"]),
        ((6,), 2, ["0.2", "0.5"]),
        ((3, 2, 2), 4, ["0.1", "0.2", "1.1", "2.1"]),
        ((3, 2, 2), 7, ["0.0", "0.1", "0.2", "1.0", "1.1", "2.0", "2.1"]),
        ((3, 2, 2), 0, []),
    ],
)
def test_even_spread(families, count, expected):
    assert spread(make_blocks(*families), count) == expected


def test_last_ones():
    assert spread(make_blocks(4, 2), 3, last=True) == ["0.2", "0.3", "1.1"]


@pytest.mark.parametrize("count", range(8))
def test_spread_always_chooses_as_many_as_asked(count):
    for families in ((7,), (3, 4), (1, 1, 5), (1,) * 7):
        assert len(set(spread(make_blocks(*families), count))) == count


def test_least_influence_keeps_the_order_of_execution():
    assert least({"a": 0.3, "b": 0.1, "c": 0.2}, 2) == ["b", "c"]


def test_half_of_the_blocks_of_a_resnet(model, task):
    compressed = compress(model, Plan((Step(DropBlocks(ratio=0.5)),)), task)
    assert dropped(compressed) == ["stages.0.1", "stages.0.2", "stages.1.2"]
    kinds = {change.origin: change.kind for change in compressed.changes}
    assert sorted(kinds.values()) == ["bypassed"] * 3 + ["skipped"] * 2
    assert all(change.reason for change in compressed.changes)
    for path in dropped(compressed):
        assert Fact.PRESENT not in compressed.facts[f"{path}.conv1"]
    assert Fact.PRESENT in compressed.facts["stages.1.0.conv1"]
    assert compressed.module(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_bypassed_blocks_hand_their_input_on(model, task):
    compressed = compress(model, Plan((Step(DropBlocks(blocks=("stages.0.1", "stages.1.2"))),)), task)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        y = model.stages[0][2](model.stages[0][0](model.stem(x)))
        y = model.stages[1][1](model.stages[1][0](y))
        expected = model.head(model.flatten(model.pool(y)))
        assert torch.allclose(compressed.module(x), expected, atol=1e-6)


def test_ratio_zero_is_exactly_nothing(model, task):
    compressed = compress(model, Plan((Step(DropBlocks(ratio=0.0)),)), task)
    assert {change.kind for change in compressed.changes} == {"skipped"}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), compressed.module.parameters(), strict=True))


def test_ratio_one_leaves_what_changes_the_shape(model, task):
    compressed = compress(model, Plan((Step(DropBlocks(ratio=1.0)),)), task)
    assert dropped(compressed) == ["stages.0.0", "stages.0.1", "stages.0.2", "stages.1.1", "stages.1.2"]


def test_where_limits_the_choice(model, task):
    compressed = compress(model, Plan((Step(DropBlocks(ratio=1.0), Glob("stages.1")),)), task)
    assert dropped(compressed) == ["stages.1.1", "stages.1.2"]


def test_scope_without_blocks_is_told(model, task):
    (change,) = compress(model, Plan((Step(DropBlocks(), Glob("head")),)), task).changes
    assert (change.kind, change.origin) == ("skipped", "")
    assert "nothing in scope" in change.reason


class Scaled(nn.Module):
    """Residual layers whose influence is known: `cos(x, x + s·rotate(x)) = 1 / sqrt(1 + s²)`."""

    class Layer(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.turn = nn.Linear(2, 2, bias=False)
            self.turn.weight.data = scale * torch.tensor([[0.0, -1.0], [1.0, 0.0]])

        def forward(self, x):
            return x + self.turn(x)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(self.Layer(scale) for scale in (1.0, 0.1, 3.0, 0.5)))

    def forward(self, x):
        return self.layers(x)


def test_influence_ranks_by_the_known_angle():
    task = Task(calibrate=TensorDataset(torch.randn(16, 2), torch.zeros(16)))
    compressed = compress(Scaled(), Plan((Step(DropBlocks(ratio=0.5, rank="influence")),)), task)
    told = {change.origin: change.reason for change in compressed.changes if change.kind == "bypassed"}
    assert told == {f"layers.{i}": f"influence {1 - 1 / math.sqrt(1 + s * s):.4f}" for i, s in ((1, 0.1), (3, 0.5))}


def test_influence_needs_calibration_data(model, task):
    plan = Plan((Step(DropBlocks(rank="influence")),))
    with pytest.raises(DataError, match="no `calibrate` data"):
        compress(model, plan, Task(example=torch.zeros(1, 8, 8)))


def test_named_block_that_cannot_go(model, task):
    with pytest.raises(UnknownNameError, match=r"no block in scope that can be removed[\s\S]*hint"):
        compress(model, Plan().then(DropBlocks(blocks=("stages.9.9",))), task)
    with pytest.raises(SurgeryError, match="must have the shape of its first input"):
        compress(model, Plan().then(DropBlocks(blocks=("stages.1.0",))), task)


@pytest.mark.parametrize("wrong", [{"ratio": 1.5}, {"rank": "first"}, {"blocks": "layer.0"}])
def test_parameters_out_of_range(wrong):
    with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
        DropBlocks(**wrong)


# Ranks that look at the loss


@pytest.fixture(scope="module")
def trained():
    """A small residual network that has learnt something, its task, and the loss without each of its blocks."""
    torch.manual_seed(0)
    model = ResNet(widths=(8, 16), depth=3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(192, 1, 8, 8, generator=generator)
    y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
    data = TensorDataset(x[:128], y[:128])
    task = Task(train=data, calibrate=TensorDataset(x[128:], y[128:]), loss=cross_entropy, batch_size=32)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(40):
        for start in range(0, 128, 32):
            optimizer.zero_grad()
            cross_entropy(model(x[start : start + 32]), y[start : start + 32]).backward()
            optimizer.step()
    return model.eval(), task


def loss_without(model, task, *paths):
    made = compress(model, Plan().then(DropBlocks(blocks=paths)), task).module
    (batch,) = list(task.batches("calibrate", size=64))
    with torch.no_grad():
        return float(cross_entropy(made(batch[0]), batch[1]))


def test_blocks_without_which_the_loss_rises_least_go(trained):
    model, task = trained
    paths = [f"stages.{s}.{i}" for s in (0, 1) for i in range(3) if (s, i) != (1, 0)]
    losses = {path: loss_without(model, task, path) for path in paths}
    result = compress(model, Plan().then(DropBlocks(ratio=0.4, rank="loss")), task)
    assert dropped(result) == least(losses, 2)
    (reason,) = [c.reason for c in result.changes if c.origin == dropped(result)[0]]
    assert reason == f"a loss of {losses[dropped(result)[0]]:.4g} without it"


def test_greedy_without_recovery_ranks_anew_after_each_removal(trained):
    model, task = trained
    paths = [f"stages.{s}.{i}" for s in (0, 1) for i in range(3) if (s, i) != (1, 0)]
    chosen = []
    for _ in range(3):
        rest = {p: loss_without(model, task, *chosen, p) for p in paths if p not in chosen}
        chosen.append(min(rest, key=rest.get))
    result = compress(model, Plan().then(DropBlocks(ratio=0.6, rank="greedy", rank_steps=0)), task)
    assert dropped(result) == [path for path in paths if path in chosen]


def test_greedy_with_recovery_leaves_the_weights_alone(trained):
    model, task = trained
    plan = Plan().then(DropBlocks(ratio=0.4, rank="greedy", rank_steps=4))
    first, again = (compress(model, plan, task) for _ in range(2))
    assert len(dropped(first)) == 2
    assert dropped(first) == dropped(again)
    own = dict(model.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in first.module.named_parameters())


@pytest.mark.parametrize(("rank", "role"), [("loss", "calibrate"), ("loss", "loss"), ("greedy", "train")])
def test_ranks_by_the_loss_need_data(trained, rank, role):
    model, task = trained
    with pytest.raises(DataError, match=f"needs {role}"):
        compress(model, Plan().then(DropBlocks(rank=rank)), task.with_(**{role: None}))


def test_a_module_that_adds_nothing_to_its_input_goes_if_it_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)).eval()
    task = Task(calibrate=TensorDataset(torch.randn(4, 4), torch.zeros(4)))
    result = compress(model, Plan().then(DropBlocks(blocks=("1",))), task)
    assert dropped(result) == ["1"]
    with pytest.raises(UnknownNameError):
        compress(model, Plan().then(DropBlocks(blocks=("7",))), task)


class Chain(nn.Module):
    """Four residual layers behind a projection, called as `call` says: `[batch, 6]` to `[batch, 3]`."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, flag, x):
            return x + self.a(x).relu()

    def __init__(self, call=lambda layer, x: layer(True, x), twice=False):
        super().__init__()
        self.enter, self.leave, self.call = nn.Linear(6, 8), nn.Linear(8, 3), call
        layers = [self.Layer() for _ in range(4)]
        self.layers = nn.ModuleList([*layers[:2], layers[1], layers[3]] if twice else layers)

    def forward(self, x):
        x = self.enter(x)
        for layer in self.layers:
            x = self.call(layer, x)
        return self.leave(x)


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return Chain().eval()


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator))
    return Task(train=data, calibrate=data, loss=cross_entropy, batch_size=8)


def test_greedy_recovers_for_a_single_block_too(chain, rows, monkeypatch):
    lengths = []
    monkeypatch.setattr(
        "trimpoint.methods.drop_blocks.train",
        lambda model, loss, batches, settings: lengths.append(settings.steps),
    )
    plan = Plan().then(DropBlocks(ratio=0.25, rank="greedy", rank_steps=3))
    assert len(dropped(compress(chain, plan, rows))) == 1
    assert lengths == [3] * 4
    with pytest.raises(DataError, match="needs train"):
        compress(chain, plan, rows.with_(train=None))


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (("layers.2",), UnknownNameError, "`layers.2` is out of scope"),
        (("",), SurgeryError, "The whole model cannot be bypassed"),
        (("layers.1", "layers.1.a"), SurgeryError, r"`layers.1.a` is part of `layers.1`"),
        (("layers.1.a", "layers.1"), SurgeryError, r"`layers.1.a` is part of `layers.1`"),
    ],
)
def test_named_blocks_that_cannot_go_together_or_here(chain, rows, blocks, error, message):
    where = Glob("layers.1") if blocks == ("layers.2",) else Glob("*")
    with pytest.raises(error, match=message):
        compress(chain, Plan((Step(DropBlocks(blocks=blocks), where),)), rows)


def test_a_block_that_is_named_twice_goes_once(chain, rows):
    result = compress(chain, Plan().then(DropBlocks(blocks=("layers.2", "layers.2"))), rows)
    assert dropped(result) == ["layers.2"]
    (change,) = [change for change in result.changes if change.kind == "bypassed"]
    assert change.before.startswith("Layer")
    again = compress(result.module, Plan().then(DropBlocks(blocks=("layers.2",))), rows)
    assert [c.reason for c in again.changes if c.origin == "layers.2"] == ["it was removed before"]


def test_a_block_under_two_paths_is_known_by_both(rows):
    torch.manual_seed(0)
    result = compress(Chain(twice=True).eval(), Plan().then(DropBlocks(blocks=("layers.2",))), rows)
    assert isinstance(result.module.layers[1], Bypass)
    assert result.module.layers[1] is result.module.layers[2]


@pytest.mark.parametrize(("rank", "name"), [("influence", "influence of"), ("loss", "loss without")])
def test_values_that_are_not_finite_rank_nothing(chain, rows, rank, name):
    x = torch.randn(16, 6)
    x[3, 0] = torch.nan
    bad = rows.with_(calibrate=TensorDataset(x, torch.zeros(16, dtype=torch.long)))
    with pytest.raises(ModelError, match=f"{name} the block `layers.0` must be finite. Got nan"):
        compress(chain, Plan().then(DropBlocks(rank=rank)), bad)


def test_a_block_without_which_the_loss_breaks_down_stays():
    assert least({"a": math.nan, "b": 2.0, "c": 1.0}, 2) == ["b", "c"]


@pytest.mark.parametrize("call", [lambda layer, x: layer(True, x), lambda layer, x: layer(flag=0, x=x)])
def test_influence_is_that_on_the_first_tensor(call, rows):
    torch.manual_seed(0)
    result = compress(Chain(call).eval(), Plan().then(DropBlocks(rank="influence")), rows)
    assert len(dropped(result)) == 2
