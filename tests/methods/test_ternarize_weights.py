"""Binary and ternary weights in a plan: what is left alone, what training brings back, what is in the file."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.coding import code_model
from trimpoint.compress import compress
from trimpoint.errors import InvalidParameterError
from trimpoint.graph import mask_
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.ternarize_weights import TernarizeWeights
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.task import Task


class Backwards(nn.Module):
    """A perceptron whose layers are defined from the last to the first."""

    def __init__(self):
        super().__init__()
        self.head, self.middle, self.stem = nn.Linear(16, 4), nn.Linear(32, 16), nn.Linear(12, 32)

    def forward(self, x):
        return self.head(self.middle(self.stem(x).relu()).relu())


@pytest.fixture
def given():
    torch.manual_seed(0)
    centers = 1.2 * torch.randn(4, 12)
    labels = torch.arange(1024) % 4
    inputs = centers[labels] + torch.randn(1024, 12)
    model = Backwards()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    data = TensorDataset(inputs, labels)
    return model.eval(), Task(train=data, loss=nn.functional.cross_entropy, batch_size=64), inputs, labels


def made_of(model, task, **params):
    return compress(model, Plan().then(TernarizeWeights(**params)), task)


def loss_of(module, inputs, labels):
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module(inputs), labels))


def test_the_first_and_last_layer_called_stay_in_float(given):
    model, task, *_ = given
    reasons = {change.origin: change.reason for change in made_of(model, task).changes}
    assert reasons["stem"].startswith("the first layer stays")
    assert reasons["head"].startswith("the last layer stays")
    assert "zeros" in reasons["middle"]
    by_definition = made_of(model, None).changes
    assert {change.origin for change in by_definition if "first layer" in change.reason} == {"head"}
    assert {change.kind for change in made_of(model, task, keep_ends=False).changes} == {"assigned"}


@pytest.mark.parametrize(
    ("params", "count"),
    [
        ({"values": 2}, 2),
        ({"values": 2, "granularity": "channel"}, 2),
        ({}, 3),
        ({"scales": "learned"}, 3),
        ({"values": 2, "scales": "learned"}, 2),
    ],
    ids=str,
)
def test_training_beats_rounding_and_the_file_holds_so_many_values(given, tmp_path, params, count):
    model, task, inputs, labels = given
    plan = Plan().then(TernarizeWeights(keep_ends=False, **params))
    rounded = compress(model, plan, task)
    trained = compress(model, plan.then(Finetune(epochs=6.0, lr=0.005)), task)
    assert loss_of(trained.module, inputs, labels) < 0.8 * loss_of(rounded.module, inputs, labels)
    lowered = get_runtime("onnxruntime").lower(export(trained.module, inputs[:2], task.dynamic_dims()), tmp_path)
    stored = onnx.load(tmp_path / lowered.files["main"][0]).graph.initializer
    weights = [array for tensor in stored if (array := onnx.numpy_helper.to_array(tensor)).ndim == 2]
    assert sorted(w.size for w in weights) == [64, 384, 512]
    for weight in weights:
        outputs = weight if weight.shape in ((4, 16), (16, 32), (32, 12)) else weight.T
        rows = outputs if params.get("granularity") == "channel" else [weight]
        assert all(len(np.unique(row)) == count for row in rows)


def test_the_coded_file_takes_as_many_bits_as_there_are_values(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
    task = Task(example=torch.randn(2, 128))
    sizes = []
    for number, values in enumerate((2, 3)):
        made = made_of(model, task, values=values, keep_ends=False)
        out = tmp_path / str(number)
        out.mkdir()
        lowered = get_runtime("onnxruntime").lower(export(made.module, task.example, task.dynamic_dims()), out)
        code_model(tmp_path / f"{number}.tpz", out, lowered)
        sizes.append((tmp_path / f"{number}.tpz").stat().st_size - 4 * 384)  # the biases stay in float
    bits = [8 * size / (2 * 128 * 256) for size in sizes]
    assert 0.98 < bits[0] < 1.1
    assert 1.5 < bits[1] < 1.7


def test_what_cannot_be_held_says_why():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[2].weight.zero_()
    mask_(model[3], "weight", torch.eye(4, dtype=torch.bool))
    changes = made_of(model.eval(), None, values=2, keep_ends=False).changes
    assert {change.origin: change.reason for change in changes} == {
        "0": "its weight is tied to another module's",
        "1": "its weight is tied to another module's",
        "2": "all its weights are zero",
        "3": "a mask holds weights at zero, which would be a third value",
    }


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"values": 4}, "range"),
        ({"scales": "trained"}, "one of"),
        ({"threshold": 1.0}, "range"),
        ({"values": 2, "threshold": 0.1}, "None with two values"),
    ],
)
def test_parameters_that_cannot_be(params, words):
    with pytest.raises(InvalidParameterError, match=words):
        TernarizeWeights(**params)
