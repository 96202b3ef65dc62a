from itertools import pairwise

import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import OperatorTime
from trimpoint.runtimes.export import export
from trimpoint.search import precision
from trimpoint.search.precision import precision_by_layer
from trimpoint.search.workbench import Workbench
from trimpoint.task import Task

LAYERS = ("0", "2", "4", "6")
FLOAT = {"0": 4.0, "2": 3.0, "4": 2.0, "6": 1.0, "": 1.0}
INT8 = {"0": 1.0, "2": 1.0, "4": 1.0, "6": 2.0, "": 0.5}
CONVERSION = 0.5


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    ).eval()


@pytest.fixture
def task():
    x = torch.randn(64, 8)
    data = TensorDataset(x, x[:, :3].argmax(1))
    return Task.classification(data, data, data)


@pytest.fixture(autouse=True)
def _known_times(monkeypatch):
    """Let each layer take a known time, and each step from int8 to float32 some more, which no layer shows."""

    def of_layers(_, plan):
        times = INT8 if plan.steps else FLOAT
        return [OperatorTime(name=path, kind="Gemm", module=path, ms=ms) for path, ms in times.items()]

    def whole(_, plan):
        chosen = [path for path in LAYERS if plan.steps[0].where.matches(path, ())]
        borders = sum((one in chosen) != (other in chosen) for one, other in pairwise(LAYERS))
        taken = sum((INT8 if path in chosen else FLOAT)[path] for path in LAYERS) + FLOAT[""]
        return {"latency_ms": (taken + CONVERSION * borders) / sum(FLOAT.values()), "file_bytes": 1.0}

    monkeypatch.setattr(Workbench, "operators", of_layers)
    monkeypatch.setattr(Workbench, "shape", whole)


def test_the_layers_that_cost_least_are_chosen_and_the_file_is_as_fast_as_asked(model, task, monkeypatch):
    monkeypatch.setattr(precision, "layer_costs", lambda *_: {"0": 5.0, "2": 1.0, "4": 2.0, "6": 0.1})
    found = precision_by_layer(model, task, latency=0.92)
    assert [layer.path for layer in found.layers if layer.int8] == ["2"]
    assert found.latency == pytest.approx((4 + 1 + 2 + 1 + 1 + 2 * CONVERSION) / 11)
    fast = precision_by_layer(model, task, latency=0.6)
    assert [layer.path for layer in fast.layers if layer.int8] == ["0", "2"]
    assert fast.latency <= 0.6


def test_conversions_that_no_layer_shows_are_made_up_for(model, task, monkeypatch):
    monkeypatch.setattr(precision, "layer_costs", lambda *_: {"0": 1.0, "2": 5.0, "4": 0.1, "6": 1.0})
    # With `0` and `4` the layers take 7 of 11, and 8.5 with the three conversions.
    found = precision_by_layer(model, task, latency=0.7)
    assert [latency for _, latency in found.tried] == pytest.approx([8.5 / 11, 6.5 / 11])
    assert [layer.path for layer in found.layers if layer.int8] == ["0", "2"]


def test_where_conversions_take_more_than_a_layer_gains_all_are_int8(model, task, monkeypatch):
    monkeypatch.setattr("tests.search.test_precision.CONVERSION", 2.0)
    found = precision_by_layer(model, task, latency=0.6)
    assert all(layer.int8 for layer in found.layers)
    assert found.latency == pytest.approx(6 / 11)
    assert [layers for layers, _ in found.tried] == [2, 3, 4]


def test_a_layer_that_int8_slows_down_stays_in_float32(model, task):
    found = precision_by_layer(model, task, latency=0.6)
    last = found.layers[-1]
    assert (last.path, last.int8) == ("6", False)
    assert (last.float32_ms, last.int8_ms) == (1.0, 2.0)
    assert all(layer.cost > 0 for layer in found.layers)


def test_a_limit_that_nothing_meets_says_how_fast_it_gets(model, task):
    with pytest.raises(InvalidParameterError, match=r"fastest of those tried takes 0\.5") as caught:
        precision_by_layer(model, task, latency=0.3)
    assert "latency" in caught.value.hint


@pytest.mark.parametrize("latency", [0, 1.0, -1, float("nan"), "0.5"])
def test_a_limit_out_of_range_is_refused(model, task, latency):
    with pytest.raises(InvalidParameterError, match=r"must be in \(0, 1\)"):
        precision_by_layer(model, task, latency=latency)


def test_calibration_data_is_asked_for(model):
    data = TensorDataset(torch.randn(8, 8), torch.zeros(8, dtype=torch.long))
    with pytest.raises(DataError, match="calibrate"):
        precision_by_layer(model, Task(select=data, example=torch.randn(2, 8)), latency=0.5)


def test_the_step_makes_a_file_in_which_only_those_layers_are_int8(model, task, tmp_path):
    found = precision_by_layer(model, task, latency=0.5)
    made = compress(model, Plan((found.step,)), task)
    assert set(made.formats) == {layer.path for layer in found.layers if layer.int8} == {"0", "2", "4"}
    x = torch.randn(4, 8)
    exported = export(made.module, x, task.dynamic_dims())
    get_runtime("onnxruntime").lower(exported, tmp_path, formats=made.formats, calibration=[x.numpy()])
    kinds = [
        tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer if len(tensor.dims) == 2
    ]
    assert sorted(kinds) == [onnx.TensorProto.FLOAT, *[onnx.TensorProto.INT8] * 3]
