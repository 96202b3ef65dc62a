"""Weights of 16 bits: the file halves, the answers stay, and what 16 bits cannot hold is left alone."""

import numpy as np
import onnx
import openvino
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import InvalidParameterError
from trimpoint.methods.cast_weights import CastWeights
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.runtimes.openvino_halves import CAPABILITY, precision
from trimpoint.task import Task, cross_entropy


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv, self.norm = nn.Embedding(200, 32), nn.Conv1d(32, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.lstm, self.head = nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 200)

    def forward(self, x):
        return self.head(self.lstm(self.norm(self.conv(self.table(x).transpose(1, 2))).transpose(1, 2))[0])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Words().eval()


def lowered(module, inputs, formats, directory, runtime):
    directory.mkdir(parents=True)
    exported = export(module, inputs, {"input": {0: "batch"}})
    files = get_runtime(runtime).lower(exported, directory, formats=formats, calibration=[inputs.numpy()])
    return files, get_runtime(runtime).open(directory, files)(inputs.numpy())


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-10), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_file_halves_and_the_answers_stay(model, tmp_path, runtime, dtype, error):
    made = compress(model, Plan().then(CastWeights(dtype=dtype)))
    assert sorted(made.formats) == ["conv", "head", "lstm", "table"]
    x = torch.arange(10).reshape(2, 5)
    files, before = lowered(model, x, {}, tmp_path / "before", runtime)
    files, after = lowered(made.module, x, made.formats, tmp_path / "after", runtime)
    assert files.unmapped == ()
    sizes = [(tmp_path / name / files.files["main"][-1]).stat().st_size for name in ("before", "after")]
    assert sizes[1] < 0.57 * sizes[0]
    assert 0 < np.abs(after - before).max() < error * np.abs(before).max()


def test_what_16_bits_cannot_hold_stays_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight[0, 0] = 7e4
        model[1].weight *= 1e-7
        model[2].weight.zero_()
    made = compress(model, Plan().then(CastWeights()))
    assert sorted(made.formats) == ["2", "3"]
    reasons = {change.origin: change.reason for change in made.changes if change.kind == "skipped"}
    assert reasons["0"] == "a weight of 7e+04 is beyond the range of float16"
    assert "too small for float16" in reasons["1"]
    assert sorted(compress(model, Plan().then(CastWeights(dtype="bfloat16"))).formats) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_weight_that_grows_beyond_the_range_on_export_stays_in_float32(runtime, tmp_path):
    """Batch normalisation is folded into the weight in front, which the method has not seen so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).eval()
    model[1].weight.data[0] = 1e7
    made = compress(model, Plan().then(CastWeights()))
    assert sorted(made.formats) == ["0", "3"]
    x = torch.randn(2, 3, 6, 6)
    files, answers = lowered(made.module, x, made.formats, tmp_path / "a", runtime)
    (reason,) = files.unmapped
    assert reason.startswith("0: a weight of ")
    assert "beyond the range of float16" in reason
    expected = model(x).detach().numpy()
    assert np.abs(answers - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_beside_int8(runtime, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)).eval()
    x = torch.randn(32, 64)
    data = TensorDataset(x, torch.arange(32) % 8)
    task = Task(calibrate=data, loss=cross_entropy, batch_size=16)
    plan = Plan((Step(QuantizeStatic(), where="0"), Step(CastWeights())))
    made = compress(model, plan, task)
    assert {path: tensors["weight"].dtype for path, tensors in made.formats.items()} == {
        "0": "int8",
        "2": "float16",
        "4": "float16",
    }
    files, answers = lowered(made.module, x, made.formats, tmp_path / "a", runtime)
    assert files.unmapped == ()
    expected = model(x).detach().numpy()
    assert np.abs(answers - expected).max() < 0.05 * np.abs(expected).max()
    weights = 64 * 128 + 2 * (128 * 128 + 128 * 8) + 4 * (128 + 128 + 8)
    assert weights < (tmp_path / "a" / files.files["main"][-1]).stat().st_size < weights + 3000


def test_tied_weights_are_stored_once(tmp_path):
    model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 100, bias=False)).eval()
    model[1].weight = model[0].weight
    made = compress(model, Plan().then(CastWeights()))
    lowered(made.module, torch.arange(4).reshape(2, 2), made.formats, tmp_path / "a", "onnxruntime")
    graph = onnx.load(tmp_path / "a" / "model.onnx").graph
    assert [t.data_type for t in graph.initializer if len(t.dims) > 1].count(onnx.TensorProto.FLOAT16) <= 2
    assert not [t for t in graph.initializer if len(t.dims) > 1 and t.data_type == onnx.TensorProto.FLOAT]


def test_other_types_are_refused():
    with pytest.raises(InvalidParameterError, match="dtype"):
        CastWeights(dtype="float8")
    with pytest.raises(InvalidParameterError, match="activations"):
        CastWeights(activations="float16")


COMPUTED = CastWeights(dtype="bfloat16", activations="bfloat16")
FAST = CAPABILITY in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
HERE = "bf16" if FAST else "f32"


def computed_in(directory, files, inputs):
    """Return each convolution's, product's and recurrent layer's module and what it is computed in on this CPU."""
    session = get_runtime("openvino").open(directory, files, profile=True)
    session(inputs.numpy())
    found = {}
    for entry in session.request.get_profiling_info():
        name = entry.node_name
        module = files.scopes.get(name) or files.scopes.get(name.partition("/")[0])
        if module and entry.node_type.startswith(("Convolution", "FullyConnected", "MatMul", "LSTM", "RNN")):
            found[module] = entry.exec_type.rpartition("_")[2]
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_computed_in_bfloat16_where_the_processor_can(model, tmp_path, dtype):
    made = compress(model, Plan().then(CastWeights(dtype=dtype, activations="bfloat16")))
    x = torch.arange(10).reshape(2, 5)
    files, answers = lowered(made.module, x, made.formats, tmp_path / "a", "openvino")
    assert files.unmapped == ()
    assert "AVX512-BF16" in files.notes[0]
    assert computed_in(tmp_path / "a", files, x) == {"conv": HERE, "lstm": HERE, "head": HERE}
    expected = model(x).detach().numpy()
    assert 0 < np.abs(answers - expected).max() < 0.02 * np.abs(expected).max()


def test_convolutions_and_recurrent_layers_can_stay_in_float32(model, tmp_path):
    made = compress(model, Plan((Step(COMPUTED, where="!conv & !lstm"),)))
    x = torch.arange(10).reshape(2, 5)
    files, _ = lowered(made.module, x, made.formats, tmp_path / "a", "openvino")
    assert files.unmapped == ()
    assert computed_in(tmp_path / "a", files, x) == {"conv": "f32", "lstm": "f32", "head": HERE}


def test_one_matrix_product_in_float32_keeps_all_there(model, tmp_path):
    made = compress(model, Plan((Step(COMPUTED, where="!head"),)))
    x = torch.arange(10).reshape(2, 5)
    files, _ = lowered(made.module, x, made.formats, tmp_path / "a", "openvino")
    reason = "is computed in float32, as the matrix products of head must be, and OpenVINO has one setting"
    assert files.unmapped == tuple(f"{path}: {reason}" for path in ("conv", "lstm", "table"))
    assert files.notes == ()
    assert computed_in(tmp_path / "a", files, x) == {"conv": "f32", "lstm": "f32", "head": "f32"}


@pytest.mark.parametrize("method", [QuantizeStatic(), QuantizeDynamic()])
def test_int8_products_do_not_forbid_it(method, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8)).eval()
    x = torch.randn(32, 64)
    task = Task(calibrate=TensorDataset(x, torch.arange(32) % 8), loss=cross_entropy, batch_size=16)
    made = compress(model, Plan((Step(method, where="2"), Step(COMPUTED))), task)
    files, answers = lowered(made.module, x, made.formats, tmp_path / "a", "openvino")
    assert not [reason for reason in files.unmapped if "is computed in float32" in reason]
    kinds = computed_in(tmp_path / "a", files, x)
    assert (kinds["0"], kinds["4"]) == (HERE, HERE)
    each_call = method.name == "quantize-dynamic"  # its kernel is named after what it writes
    assert kinds["2"] == HERE if each_call else "8" in kinds["2"]
    expected = model(x).detach().numpy()
    assert np.abs(answers - expected).max() < 0.05 * np.abs(expected).max()


def test_other_runtimes_say_that_they_compute_in_float32(model, tmp_path):
    made = compress(model, Plan().then(COMPUTED))
    x = torch.arange(10).reshape(2, 5)
    files, answers = lowered(made.module, x, made.formats, tmp_path / "a", "onnxruntime")
    assert len(files.unmapped) == 4
    assert all("is computed in float32: " in reason for reason in files.unmapped)
    stored, same = lowered(
        made.module,
        x,
        {path: {"weight": tensors["weight"]} for path, tensors in made.formats.items()},
        tmp_path / "b",
        "onnxruntime",
    )
    assert stored.unmapped == ()
    np.testing.assert_array_equal(answers, same)


class Core:
    """A processor without products of bfloat16."""

    def get_property(self, device, name):
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return ["FP32", "INT8"]


def test_a_processor_without_its_products_does_not_imitate_them(model, tmp_path):
    made = compress(model, Plan().then(COMPUTED))
    x = torch.arange(10).reshape(2, 5)
    for formats, here in ((made.formats, HERE), ({}, "f32")):
        lowered(made.module, x, formats, tmp_path / here, "openvino")
        read = openvino.Core().read_model(tmp_path / here / "model.xml")
        assert precision(openvino.Core(), read) == here
        assert precision(Core(), read) == "f32"
