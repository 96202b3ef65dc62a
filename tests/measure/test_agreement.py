"""Answers of artifacts beside those of modules and of other runtimes: what differs is told."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import MissingDependencyError, ParityError
from trimpoint.measure.agreement import other_runtimes_profile, sample_inputs, simulation_profile
from trimpoint.measure.environment import instruction_set
from trimpoint.measure.inputs import core_inputs
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.base import Session
from trimpoint.runtimes.export import export
from trimpoint.target import Target
from trimpoint.task import Task

SATURATES = "vnni" not in instruction_set().lower() and "avx2" in instruction_set().lower()
ONNX = get_runtime("onnxruntime")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    with torch.no_grad():
        model[0].weight.abs_()  # sums of neighbours reach beyond 16 bits
    return model


@pytest.fixture
def task():
    x = 1 + torch.rand(64, 64, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, torch.arange(64) % 5)
    return Task.classification(data, data).with_(calibrate=data, select=data)


def made(model, task, directory, method=None):
    compressed = compress(model, Plan() if method is None else Plan().then(method), task)
    inputs = core_inputs(model, task, Target())
    exported = export(compressed.module, inputs.example, inputs.dims)
    calibration = [torch.stack([task.data("calibrate")[i][0] for i in range(64)]).numpy()]
    lowered = ONNX.lower(exported, directory, formats=compressed.formats or None, calibration=calibration)
    session = ONNX.open(directory, lowered)
    samples = sample_inputs(model, task, inputs, session)
    return compressed, session, exported, calibration, samples


def test_rounding_is_told_and_none_is_none(model, task, tmp_path):
    found = []
    for place, method in (("a", None), ("b", QuantizeStatic()), ("c", QuantizeStatic(bits=2, weights="largest"))):
        (tmp_path / place).mkdir()
        compressed, session, *_, samples = made(model, task, tmp_path / place, method)
        assert [len(batch) for batch in samples] == [16] * 4
        found.append(simulation_profile(compressed.module, session, samples, choices=True))
        assert found[-1]["agreement"].n == 64
    assert found[0]["sqnr_db"].value > 100
    assert found[0]["agreement"].value == 1
    assert 20 < found[1]["sqnr_db"].value < 70
    # At 2 bits the module has the rounded weights itself: what is left is the rounding of activations.
    assert found[2]["sqnr_db"].value > 20
    assert list(simulation_profile(compressed.module, session, samples, choices=False)) == ["sqnr_db"]


@pytest.mark.parametrize(("factor", "percentile"), [(1e6, None), (1e6, 95.0), (1e-6, None)])
def test_ranges_of_other_data_are_told(model, task, tmp_path, factor, percentile):
    """Of 4,096 numbers one is an outlier of a million, or all are a million times as small."""
    strange = task.data("calibrate").tensors[0].clone()
    strange[: 1 if factor > 1 else None, : 1 if factor > 1 else None] *= factor
    given = task.with_(calibrate=TensorDataset(strange, torch.zeros(64, dtype=torch.long)))
    method = QuantizeStatic(observer="percentile", percentile=percentile) if percentile else QuantizeStatic()
    compressed, session, *_, samples = made(model, given, tmp_path, method)
    found = simulation_profile(compressed.module, session, samples, choices=True)
    if percentile:
        assert found["sqnr_db"].value > 15
        assert not found.notes
    else:
        assert found["sqnr_db"].value < 10
        assert '`observer="percentile"`' in found.notes[0]


@pytest.mark.skipif(not SATURATES, reason="sums of 16 bits do not saturate on this processor")
def test_saturation_is_told(model, task, tmp_path):
    found = []
    for reduced in (True, False):
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        compressed, session, *_, samples = made(model, task, directory, QuantizeStatic(reduce_range=reduced))
        found.append(simulation_profile(compressed.module, session, samples, choices=True)["sqnr_db"].value)
    assert found[1] < found[0] - 10


def test_other_runtimes_beside_this_one(model, task, tmp_path):
    found = {}
    for place, method in (("a", None), ("b", QuantizeStatic())):
        (tmp_path / place).mkdir()
        compressed, session, exported, calibration, samples = made(model, task, tmp_path / place, method)
        found[place] = other_runtimes_profile(
            ONNX, session, exported, compressed.formats, calibration, samples, choices=True
        )
    assert list(found["a"]) == ["sqnr_db[openvino]", "agreement[openvino]"]
    assert found["a"]["sqnr_db[openvino]"].value > 100
    assert found["b"]["sqnr_db[openvino]"].value > 25
    assert not found["b"].missing
    assert not found["b"].notes


def test_a_runtime_that_takes_less_is_told(model, task, tmp_path, monkeypatch):
    compressed, session, exported, calibration, samples = made(model, task, tmp_path, QuantizeStatic())

    def without_formats(*args, **kwargs):
        kwargs["formats"] = None
        return real(*args, **kwargs)

    other = type(get_runtime("openvino"))
    real = other.lower.__get__(other())
    monkeypatch.setattr(other, "lower", lambda self, *args, **kwargs: without_formats(*args, **kwargs))
    profile = other_runtimes_profile(ONNX, session, exported, compressed.formats, calibration, samples, choices=True)
    # One is int8 and the other float32: they differ as the file differs from its module.
    own = simulation_profile(compressed.module, session, samples, choices=True)["sqnr_db"].value
    assert profile["sqnr_db[openvino]"].value == pytest.approx(own, abs=0.5)

    def missing(self, *args, **kwargs):
        raise MissingDependencyError("OpenVINO is not installed.", "install it")

    monkeypatch.setattr(other, "lower", missing)
    profile = other_runtimes_profile(ONNX, session, exported, compressed.formats, calibration, samples, choices=True)
    assert dict(profile.missing) == {"sqnr_db[openvino]": "OpenVINO is not installed."}
    assert not profile.metrics


def test_answers_that_are_not_finite_are_refused(model, task, tmp_path):
    compressed, session, *_, samples = made(model, task, tmp_path)

    class Broken(Session):
        def run_flat(self, arrays):
            return [np.full((len(arrays[0]), 5), np.nan, np.float32)]

    with pytest.raises(ParityError, match="must be finite"):
        simulation_profile(compressed.module, Broken("onnxruntime", session.signature), samples, choices=True)


def test_without_data_the_shapes_are_compared(model, tmp_path):
    task = Task(example=torch.randn(64))
    inputs = core_inputs(model, task, Target())
    exported = export(model, inputs.example, inputs.dims)
    session = ONNX.open(tmp_path, ONNX.lower(exported, tmp_path))
    assert len(sample_inputs(model, task, inputs, session)) == len(inputs.shapes)
