"""Groups and criteria against those of Torch-Pruning, on every group of a ResNet-20.

Torch-Pruning adds the members of a group up and divides the sum by its mean; here each member is divided by its own.
So its raw figures for each member are taken and put together as the docstrings of the criteria say.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.importance.cases import context
from trimpoint.demo.resnet import resnet20
from trimpoint.graph import coupled_groups, trace
from trimpoint.importance import scores
from trimpoint.task import Task, cross_entropy

tp = pytest.importorskip("torch_pruning")
WEIGHTED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = resnet20(channels=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 10, (8,), generator=generator)
    return Task(calibrate=TensorDataset(images, labels), loss=cross_entropy, batch_size=8)


@pytest.fixture
def pairs(network):
    """Return each group beside the one that Torch-Pruning finds from the same convolution."""
    example = torch.zeros(2, 3, 32, 32)
    graph = tp.DependencyGraph().build_dependency(network, example_inputs=example)
    ours = [group for group in coupled_groups(trace(network, example)) if group.name != "head"]
    return [
        (
            group,
            graph.get_pruning_group(
                network.get_submodule(group.name), tp.prune_conv_out_channels, idxs=list(range(group.size))
            ),
        )
        for group in ours
    ]


def raw(importance, group):
    """Return what a criterion of Torch-Pruning gives for each member, `[members, units]`, unreduced."""
    importance.group_reduction, importance.normalizer = None, None
    return torch.stack([values.double() for values in importance(group).unbind(0)])


def test_the_same_modules_are_coupled(pairs, network):
    assert len(pairs) == 12
    for ours, theirs in pairs:
        mine = {(m.path, m.role == "in") for m in ours.members if m.parameter == "weight"}
        peer = {
            (path, "in_channels" in dependency.handler.__name__)
            for dependency, _ in theirs
            for path, module in network.named_modules()
            if module is dependency.target.module and isinstance(module, WEIGHTED)
        }
        assert mine == peer


@pytest.mark.parametrize(("name", "power"), [("magnitude", 2), ("l1", 1)])
def test_size_of_the_weights(pairs, network, task, name, power):
    found = scores(context(network, task), [ours for ours, _ in pairs], name)
    for ours, theirs in pairs:
        members = raw(tp.importance.GroupMagnitudeImportance(p=power), theirs)
        expected = (members / members.mean(1, keepdim=True)).mean(0)
        assert torch.allclose(found[ours.name], expected, rtol=1e-5), ours.name


def test_bn_scale(pairs, network, task):
    found = scores(context(network, task), [ours for ours, _ in pairs], "bn-scale")
    for ours, theirs in pairs:
        expected = raw(tp.importance.BNScaleImportance(), theirs).mean(0)
        assert torch.allclose(found[ours.name], expected), ours.name


def test_lamp(pairs, network, task):
    groups = [ours for ours, _ in pairs]
    sizes, found = (scores(context(network, task), groups, name) for name in ("magnitude", "lamp"))
    for group in groups:
        expected = tp.importance.LAMPImportance()._lamp(sizes[group.name].float()).double()
        assert torch.allclose(found[group.name], expected, rtol=1e-5), group.name


def test_taylor_on_one_batch(pairs, network, task):
    images, labels = task.data("calibrate").tensors
    nn.functional.cross_entropy(network(images), labels).backward()
    importance = tp.importance.GroupTaylorImportance(multivariable=True, target_types=list(WEIGHTED[:2]))
    found = scores(context(network, task), [ours for ours, _ in pairs], "taylor")
    for ours, theirs in pairs:
        expected = raw(importance, theirs).square().sum(0)
        for member in ours.members:
            if member.role == "through" and member.parameter == "weight":  # batch norms count with their biases here
                norm = network.get_submodule(member.path)
                expected = expected + (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach().square()
        assert torch.allclose(found[ours.name], expected, rtol=1e-3), ours.name
