import copy

import pytest
import torch
from torch import nn

from trimpoint import Plan, Task
from trimpoint.compress import compress
from trimpoint.demo.resnet import ResNet
from trimpoint.graph import Bypass
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.recover.hints import hint_loss, recording


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x)


def stack(depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*[Residual() for _ in range(depth)])


def record(model, x, paths):
    with recording(model, paths) as outputs:
        model(x)
    return outputs


def test_equal_networks_have_no_distance():
    model, x = stack(), torch.randn(8, 4)
    outputs = record(model, x, ["0", "1", "2"])
    assert hint_loss(outputs, record(copy.deepcopy(model), x, ["0", "1", "2"])) == 0


def test_a_removed_block_is_compared_with_what_it_handed_on():
    teacher, x = stack(), torch.randn(8, 4)
    student = copy.deepcopy(teacher)
    student[1] = Bypass("first")
    outputs = record(student, x, ["0", "1", "2"])
    assert outputs["0"] is outputs["1"]
    goals = record(teacher, x, ["0", "1", "2"])
    expected = [
        ((outputs["1"] - goals["1"]) ** 2).mean() / goals["1"].var(correction=0),
        ((outputs["2"] - goals["2"]) ** 2).mean() / goals["2"].var(correction=0),
    ]
    torch.testing.assert_close(hint_loss(outputs, goals), sum(expected) / 2)


def test_places_of_another_shape_or_that_are_gone_are_passed_over():
    goals = {"a": torch.randn(4, 3), "b": torch.randn(4, 5)}
    assert hint_loss({"a": torch.randn(4, 2)}, goals) is None
    mine = torch.randn(4, 5)
    assert hint_loss({"a": torch.randn(4, 2), "b": mine, "c": torch.randn(1)}, goals) == pytest.approx(
        float(((mine - goals["b"]) ** 2).mean() / goals["b"].var(correction=0))
    )


def test_recording_leaves_no_hook_behind():
    model = stack()
    record(model, torch.randn(2, 4), ["0", "missing"])
    assert all(not module._forward_hooks for module in model.modules())


def test_hints_recover_inner_outputs_better_than_logits_alone():
    torch.manual_seed(0)
    model = ResNet(widths=(8, 16), depth=3).eval()
    images = torch.randn(256, 1, 12, 12)
    data = [(image, int(label)) for image, label in zip(images, model(images).argmax(1), strict=True)]
    task = Task.classification(data, data[:32], data[32:64], batch_size=32)
    paths = [f"stages.{stage}.{block}" for stage in (0, 1) for block in range(3)]

    def distance(hints):
        distill = Distill(epochs=3, lr=0.02, warmup=0.0, hints=hints, alpha=1.0)
        plan = Plan().then(DropBlocks(blocks=("stages.0.1", "stages.1.2")), distill)
        made = compress(model, plan, task).module
        with torch.no_grad():
            return float(hint_loss(record(made, images, paths), record(model, images, paths)))

    assert distance(3.0) < 0.8 * distance(0.0)
