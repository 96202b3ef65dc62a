"""Learned gates: open they change nothing, what has closed can go, and nothing of them is left in the model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trimpoint.graph import coupled_groups, remove_units_, trace
from trimpoint.recover import Settings, train
from trimpoint.recover.gates import gate_lasso, gated


class Net(nn.Module):
    """A residual stream with two readers, one of them on a concatenation, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.side = nn.Conv2d(1, 4, 1)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        stream = F.relu(self.norm(self.stem(x)))
        stream = stream + self.conv(stream)
        return self.head(torch.cat([stream, F.relu(self.side(x))], 1).mean((2, 3)))


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(8, 1, 5, 5)


def every(_path):
    return True


def groups_of(net):
    return [group for group in coupled_groups(trace(net, torch.zeros(2, 1, 5, 5))) if not group.reason]


def batches(_epoch):
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        x = torch.randn(16, 1, 5, 5, generator=generator)
        yield x, (x.mean((1, 2, 3)) > 0).long()


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(net, penalty, steps=40, **more):
    with penalty.around(net):
        train(net, loss_of, batches, Settings(steps=steps, lr=0.05), penalty=penalty, **more)
    return net.eval()


def test_open_gates_change_nothing_and_leave_nothing_behind(net, x):
    before, state = net(x), net.state_dict()
    parameters = dict(net.named_parameters())
    with gate_lasso(gated(net, groups_of(net), every), 0.1, 0).around(net):
        assert torch.equal(net(x), before)
        assert len(list(net.parameters())) > len(parameters)
    assert torch.equal(net(x), before)
    assert list(net.state_dict()) == list(state)
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert type(net.head) is nn.Linear


def test_the_penalty_is_the_sum_of_the_gates_and_rises(net):
    groups = gated(net, groups_of(net), every)
    penalty = gate_lasso(groups, 0.5, 3)
    with penalty.around(net):
        units = sum(group.size for group in groups)
        assert penalty.of(net, 9).item() == pytest.approx(0.5 * units)
        assert penalty.of(net, 0).item() == pytest.approx(0.5 * units / 4)


def test_gates_are_multiplied_into_what_reads(net, x):
    groups = gated(net, groups_of(net), every)
    penalty = gate_lasso(groups, 0.1, 0)
    with penalty.around(net):
        gates = {id(m): m for m in net.modules() if type(m).__name__ == "_Gates"}
        with torch.no_grad():
            for gate in gates.values():
                gate.raw.uniform_(-1, 1)
        inside = net(x)
    assert len(gates) == len(groups) == 2
    assert torch.allclose(net(x), inside, atol=1e-6)


def test_units_whose_gate_has_closed_are_zero_and_go_for_nothing(net, x):
    groups = gated(net, groups_of(net), every)
    trained(net, gate_lasso(groups, 0.3, 0, inputs=x))
    assert torch.equal(net.norm.weight == 0, (net.stem.weight == 0).flatten(1).all(1))
    closed = {}
    for group in groups:
        tensor = net.get_submodule(group.name).weight
        closed[group.name] = [
            unit for unit in range(group.size) if not tensor[list(group.members[0].indices[unit])].any()
        ]
    assert sum(map(len, closed.values())) > 2
    before = net(x)
    closed = {name: units[: len(units) - 1] for name, units in closed.items()}
    _, failed = remove_units_(net, groups, closed, torch.zeros(2, 1, 5, 5))
    assert not failed
    assert torch.allclose(net(x), before, atol=1e-5)


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path):
    nets = []
    for kept in (True, False):
        torch.manual_seed(0)
        net = Net()
        penalty = gate_lasso(gated(net, groups_of(net), every), 0.05, 4)
        state = tmp_path / "state.safetensors" if kept else None
        if kept:
            torch.manual_seed(0)
            trained(Net(), penalty, 20, state=state)
        trained(net, penalty, 40, state=state)
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in nets), strict=True))


class Product(nn.Module):
    """A unit that a product reads beside a layer: it is not zero to the product when its gate has closed."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)
        self.side = nn.Linear(6, 1)

    def forward(self, x):
        left, right = F.relu(self.left(x)), F.relu(self.right(x))
        return self.side(left) + (left * right).sum(-1, keepdim=True)


def test_what_is_handed_back_is_what_was_trained():
    net, x = Product().eval(), torch.randn(8, 4)
    groups = gated(net, coupled_groups(trace(net, x[:2])), every)
    assert groups
    penalty = gate_lasso(groups, 0.1, 0, inputs=x)
    with penalty.around(net):
        with torch.no_grad():
            next(m for m in net.modules() if type(m).__name__ == "_Gates").raw[:3] = 0
        inside = net(x)
    assert torch.allclose(net(x), inside, atol=1e-6)


def test_gates_close_under_adamw(net, x):
    groups = gated(net, groups_of(net), every)
    penalty = gate_lasso(groups, 0.3, 0, pace=0.01 / 1e-4, inputs=x)
    with penalty.around(net):
        train(net, loss_of, batches, Settings(steps=150, lr=1e-4, optimizer="adamw", cooldown=0.0), penalty=penalty)
    assert int((net.stem.weight == 0).flatten(1).all(1).sum()) > 0


def test_frozen_and_shared_readers_have_no_gates(net):
    groups = groups_of(net)
    assert {group.name for group in gated(net, groups, every)} == {"stem", "side"}
    net.head.weight.requires_grad_(False)
    assert not gated(net, groups, every)
    net.head.weight.requires_grad_(True)
    assert {group.name for group in gated(net, groups, lambda path: path != "side")} == {"stem"}
    net.stem.weight.requires_grad_(False)
    assert {group.name for group in gated(net, groups, every)} == {"side"}
    net.again = nn.Linear(10, 3)
    net.again.weight = net.head.weight
    assert not gated(net, groups, every)
