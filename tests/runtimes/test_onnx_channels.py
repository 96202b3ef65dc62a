"""Channels of zeros in front of quantised convolutions: the same answers, and only where the kernel wants them."""

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from trimpoint.runtimes import get_runtime, onnx_channels
from trimpoint.runtimes.export import export
from trimpoint.values import Format

RUNTIME = get_runtime("onnxruntime")
FORMATS = {
    "weight": Format(dtype="int8", granularity="channel", reduce_range=True),
    "input": Format(dtype="uint8", symmetric=False),
}


class Branches(nn.Module):
    """Two convolutions that read the same ten channels, one with too few outputs for the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 16, 1), nn.Conv2d(10, 6, 1)
        self.wider, self.head = nn.Conv2d(10, 32, 1), nn.Linear(54, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.wide(x).relu(), self.narrow(x).relu(), self.wider(x).relu()], 1)
        return self.head(x.mean((2, 3)))


def lowered(module, inputs, directory):
    """Return the graph of an int8 file, and its answers."""
    directory.mkdir()
    formats = {path: FORMATS for path, part in module.named_modules() if hasattr(part, "weight")}
    exported = export(module.eval(), inputs[:2], {"input": {0: "batch"}})
    made = RUNTIME.lower(exported, directory, formats=formats, calibration=[inputs.numpy()])
    assert made.unmapped == ()
    return onnx.load(directory / "model.onnx"), made, RUNTIME.open(directory, made)(inputs.numpy())


def widths(model):
    """Return how many input channels each convolution's weight has, in order."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    return [stored[node.input[3]].dims[1] for node in model.graph.node if node.op_type == "QLinearConv"]


def stem(channels, outputs, groups=1):
    """Return a network that begins with a convolution of so many channels."""
    return nn.Sequential(nn.Conv2d(channels, outputs, 3, groups=groups), nn.ReLU(), nn.Conv2d(outputs, 16, 1))


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (stem(3, 16), (3, 8, 8), [4, 16]),
        (stem(6, 32), (6, 8, 8), [8, 32]),
        (nn.Sequential(nn.Conv1d(5, 16, 3), nn.ReLU(), nn.Conv1d(16, 16, 1)), (5, 12), [8, 16]),
        (Branches(), (3, 8, 8), [3, 12, 10, 12]),
        (stem(1, 16), (1, 8, 8), [1, 16]),
        (stem(4, 16), (4, 8, 8), [4, 16]),
        (stem(3, 12), (3, 8, 8), [3, 12]),
        (stem(6, 18, groups=2), (6, 8, 8), [3, 20]),
        (stem(30, 16), (30, 8, 8), [30, 16]),
    ],
    ids=["three", "six", "1-d", "branches", "one", "four", "few outputs", "groups", "many"],
)
def test_answers_stay_bit_for_bit_and_only_what_gains_is_completed(module, shape, expected, tmp_path, monkeypatch):
    torch.manual_seed(0)
    inputs = torch.randn(8, *shape)
    model, made, answers = lowered(module, inputs, tmp_path / "completed")
    assert widths(model) == expected
    pads = [node for node in model.graph.node if node.op_type == "Pad"]
    changed = sum(have != want for have, want in zip(expected, before(module), strict=True))
    assert len(pads) == min(changed, 1)  # those that read the same share it
    monkeypatch.setattr(onnx_channels, "complete", lambda _: None)
    plain, _, same = lowered(module, inputs, tmp_path / "plain")
    assert widths(plain) == before(module)
    np.testing.assert_array_equal(answers, same)
    assert {made.scopes.get(node.name, "") for node in model.graph.node} >= {
        path for path, part in module.named_modules() if isinstance(part, (nn.Conv1d, nn.Conv2d))
    }


def before(module):
    """Return how many channels each convolution of a module reads, of one group."""
    return [part.weight.shape[1] for part in module.modules() if isinstance(part, (nn.Conv1d, nn.Conv2d))]


def test_a_weight_that_two_layers_share_is_left_as_it_is(tmp_path):
    torch.manual_seed(0)
    first, second = nn.Conv2d(6, 18, 1), nn.Conv2d(6, 18, 1)
    second.weight = first.weight

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x.relu())

    model, _, answers = lowered(Twice(), torch.randn(8, 6, 4, 4), tmp_path / "a")
    assert widths(model) == [6, 6]
    assert np.isfinite(answers).all()
