"""Which tensors get which format, and that the module stays as it is."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.filters import Glob
from trimpoint.method import Fact
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.task import Task
from trimpoint.values import Format


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm1d(2)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.second(self.first(self.norm(self.conv(x)))))


@pytest.fixture
def task():
    return Task(calibrate=TensorDataset(torch.randn(4, 1, 4), torch.zeros(4)))


def quantise(task, where="*", **params):
    model = Shared().eval()
    return model, compress(model, Plan((Step(QuantizeStatic(**params), Glob(where)),)), task)


def test_formats_by_default(task):
    model, compressed = quantise(task)
    assert sorted(compressed.formats) == ["conv", "first", "head", "second"]
    assert compressed.formats["conv"] == {
        "weight": Format(dtype="int8", granularity="channel", symmetric=True, reduce_range=True),
        "input": Format(dtype="uint8", granularity="tensor", symmetric=False),
    }
    assert [(c.origin, c.kind) for c in compressed.changes] == [(p, "assigned") for p in ("conv", "first", "head")]
    assert compressed.changes[0].after == "weight int8 per channel, input uint8 per tensor"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), compressed.module.parameters(), strict=True))


def test_formats_by_parameters(task):
    _, compressed = quantise(task, granularity="tensor", symmetric_activations=True, reduce_range=False)
    assert compressed.formats["head"] == {
        "weight": Format(dtype="int8", granularity="tensor"),
        "input": Format(dtype="int8", granularity="tensor", symmetric=True),
    }


def test_where_and_facts(task):
    _, compressed = quantise(task, where="head")
    assert list(compressed.formats) == ["head"]
    assert Fact.FLOAT_WEIGHT not in compressed.facts["head"]
    assert Fact.FLOAT_WEIGHT in compressed.facts["conv"]


def test_a_second_time_is_skipped_with_the_reason(task):
    model = Shared().eval()
    plan = Plan((Step(QuantizeStatic(), Glob("head")), Step(QuantizeStatic(granularity="tensor"))))
    compressed = compress(model, plan, task)
    assert compressed.formats["head"]["weight"].granularity == "channel"
    assert compressed.formats["conv"]["weight"].granularity == "tensor"
    (change,) = [c for c in compressed.changes if c.kind == "skipped"]
    assert change.origin == "head"
    assert "float_weight" in change.reason


def test_needs_calibration_data():
    with pytest.raises(DataError, match="needs `calibrate` data"):
        quantise(Task())


def test_parameters_out_of_range():
    with pytest.raises(InvalidParameterError, match="granularity"):
        QuantizeStatic(granularity="group")
    with pytest.raises(InvalidParameterError, match="reduce_range"):
        QuantizeStatic(reduce_range="yes")
