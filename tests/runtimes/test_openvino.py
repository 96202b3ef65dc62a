import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import openvino
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.runtimes import networks
from trimpoint.compress import compress
from trimpoint.data import as_numpy
from trimpoint.errors import LoweringError, MissingDependencyError
from trimpoint.graph import baked
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.runtimes.verify import check_parity
from trimpoint.task import Task

RUNTIME = get_runtime("openvino")


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_package_says_what_to_install(package, cases, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    _, inputs, exported, _ = cases["cnn"]
    with pytest.raises(MissingDependencyError) as caught:
        RUNTIME.lower_one_line_int8(exported, tmp_path, [as_numpy(inputs())])
    assert caught.value.hint == '`pip install "trimpoint[openvino]"`'


def test_static_int8_needs_no_nncf(cases, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    module, inputs, exported, _ = cases["cnn"]
    lowered = RUNTIME.lower(exported, tmp_path, formats=networks.int8(module), calibration=[as_numpy(inputs())])
    assert lowered.unmapped == ()


class Pooled(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.first, self.head, self.mean = nn.Linear(16, 16), nn.Linear(16, 5), mean

    def forward(self, x):
        return self.head(self.mean(self.first(x)))


@pytest.mark.parametrize("mean", [lambda x: x.mean(1), lambda x: x.amax(1), lambda x: x.sum(1)])
def test_what_is_rounded_behind_a_reduction_is_right(mean, tmp_path):
    torch.manual_seed(0)
    module, x = Pooled(mean).eval(), torch.randn(8, 12, 16)
    exported = export(module, x, {"input": networks.BATCH})
    lowered = RUNTIME.lower(exported, tmp_path, formats=networks.int8(module), calibration=[x.numpy()])
    assert lowered.unmapped == ()
    assert check_parity(module, RUNTIME.open(tmp_path, lowered), [x.numpy()]).sqnr_db > 25


def test_operators_that_it_cannot_read_are_named(tmp_path):
    module = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")).eval()
    exported = export(module, torch.randn(2, 4, 16), {"input": networks.BATCH})
    with pytest.raises(LoweringError, match=r"exported model: .*Pad: Unsupported padding mode: \[wrap\]") as caught:
        RUNTIME.lower(exported, tmp_path)
    assert "--runtime onnxruntime" in caught.value.hint


def test_float32_arithmetic_is_pinned(cases, tmp_path):
    lowered = RUNTIME.lower(cases["cnn"][2], tmp_path)
    session = RUNTIME.open(tmp_path, lowered, threads=2)
    compiled = session.request.get_compiled_model()
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2


def test_weights_are_stored_in_int8_and_the_graph_without_debris(cases, tmp_path):
    module = cases["resnet8"][0]
    torch.manual_seed(1)
    RUNTIME.lower(
        cases["resnet8"][2], tmp_path, formats=networks.int8(module), calibration=[as_numpy(cases["resnet8"][1]())]
    )
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
    assert weights < (tmp_path / "model.bin").stat().st_size < 1.1 * weights
    tree = ElementTree.parse(tmp_path / "model.xml")
    assert tree.getroot().find("rt_info") is None
    assert "fused_names" not in (tmp_path / "model.xml").read_text()
    assert {port.get("names") for port in tree.iter("port")} == {None, "input", "output"}
    constants = [layer.find("data").attrib for layer in tree.iter("layer") if layer.get("type") == "Const"]
    places = [tuple(sorted(about.items())) for about in constants]
    assert len(places) == len(set(places))


def test_layers_between_int8_layers_are_computed_in_int8(cases, lowering):
    directory, lowered = lowering("openvino", "resnet8", int8=True)
    compiled = RUNTIME.open(directory, lowered).request.get_compiled_model().get_runtime_model()
    about = [op.get_rt_info() for op in compiled.get_ordered_ops()]
    kinds = [(each["layerType"].value, each["runtimePrecision"].value) for each in about]
    weighted = [kind for kind in kinds if kind[0] in ("Convolution", "FullyConnected")]
    assert set(weighted) == {("Convolution", "u8"), ("FullyConnected", "u8")}
    assert len(weighted) == 10
    assert not {"Eltwise", "Relu"} & {kind for kind, _ in kinds}


def test_int8_gives_the_answers_of_onnx_runtime(cases, lowering):
    inputs = as_numpy(cases["cnn"][1](64))
    answers = []
    for name in ("openvino", "onnxruntime"):
        directory, lowered = lowering(name, "cnn", int8=True)
        answers.append(get_runtime(name).open(directory, lowered)(inputs))
    floats = cases["cnn"][0](torch.from_numpy(inputs)).detach().numpy()
    between, lost = (np.square(answers[0] - other).sum() for other in (answers[1], floats))
    assert lost > 0
    assert between < 0.2 * lost


def test_layers_whose_sums_can_overflow_are_named(cases, lowering, tmp_path):
    module, inputs, exported, _ = cases["cnn"]
    formats = {
        path: {"weight": networks.Format(dtype="int8", granularity="channel"), "input": networks.INPUT}
        for path in networks.int8(module)
    }
    lowered = RUNTIME.lower(exported, tmp_path, formats=formats, calibration=[as_numpy(inputs(8))])
    assert any("16-bit sums can overflow" in note for note in lowered.notes)
    assert {note.partition(":")[0] for note in lowered.notes} <= formats.keys()
    assert lowering("openvino", "cnn", int8=True)[1].notes == ()


def test_what_was_learned_and_chosen_reaches_the_file(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(64, 3, 8, 8)
    data = TensorDataset(inputs, torch.arange(64) % 5)
    task = Task.classification(data, data).with_(calibrate=data)
    plan = Plan().then(QuantizeStatic(bits=4, learned_steps=True), Finetune(epochs=3, lr=0.05))
    made = compress(networks.Mixed().eval(), plan, task)
    exported = export(made.module, inputs[:2], {"input": {0: "batch"}})
    lowered = RUNTIME.lower(exported, tmp_path, formats=made.formats, calibration=[inputs.numpy()])
    assert lowered.unmapped == ()
    ops = openvino.Core().read_model(str(tmp_path / "model.xml")).get_ordered_ops()
    rounded = [op for op in ops if op.get_type_name() == "FakeQuantize"]
    ranges = [[float(op.input_value(place).get_node().data.item()) for place in (1, 2)] for op in rounded]
    for low, high in exported.ranges.values():
        assert any(np.subtract(*reversed(each)) == pytest.approx(high - low, rel=1e-5) for each in ranges)
    stored = [op.data for op in ops if op.get_type_name() == "Constant" and op.get_element_type().to_string() == "i8"]
    for grid in exported.grids.values():
        # Weights of products are transposed in the graph.
        alike = [codes.reshape(grid.codes.shape) for codes in stored if codes.size == grid.codes.size]
        alike += [codes.T for codes in stored if codes.T.shape == grid.codes.shape]
        assert any(np.array_equal(abs(codes.astype(int)), abs(grid.codes.astype(int))) for codes in alike)
    opened = RUNTIME.open(tmp_path, lowered)
    simulated, plain = (check_parity(each, opened, [inputs]).sqnr_db for each in (made.module, baked(made.module)))
    assert simulated > 30
    assert simulated > plain


def test_unused_inputs_and_outputs_that_are_inputs_keep_their_names(cases, lowering):
    directory, lowered = lowering("openvino", "pair", int8=True)
    x, y = (tensor.numpy() for tensor in cases["pair"][1]())
    assert np.array_equal(RUNTIME.open(directory, lowered)((x, y))[1][1], y)


def test_dynamic_formats_are_eight_bit_weights_and_what_differs_is_told(tmp_path):
    torch.manual_seed(0)
    model = networks.Recurrent().eval()
    model.table = nn.Embedding(4, 8)  # nothing runs it
    made = compress(model, Plan().then(QuantizeDynamic()))
    x = torch.randn(2, 5, 8)
    exported = export(model, x, {"input": networks.OPEN})
    result = RUNTIME.lower(exported, tmp_path, formats=made.formats)
    reasons = dict(text.split(": ", 1) for text in result.unmapped)
    assert reasons.keys() == {"lstm", "activations", "table"}
    assert "finds none of it" in reasons["lstm"]
    assert "with VNNI only" in reasons["activations"]
    assert 'element_type="i8"' in (tmp_path / "model.xml").read_text()
    answer, expected = RUNTIME.open(tmp_path, result)(x.numpy()), model(x).detach().numpy()
    assert 0 < abs(answer - expected).max() < 0.02 * abs(expected).max()


@pytest.mark.parametrize("symmetric", [True, False])
def test_transposed_convolutions_with_one_scale_per_tensor_get_one_per_channel(symmetric, tmp_path):
    torch.manual_seed(0)
    layers = nn.ConvTranspose2d(6, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2)
    model, x = nn.Sequential(*layers).eval(), torch.randn(32, 6, 5, 5)
    method = QuantizeStatic(granularity="tensor", symmetric_activations=symmetric)
    made = compress(model, Plan().then(method), Task(calibrate=TensorDataset(x, torch.zeros(32))))
    exported = export(made.module, x, {"input": networks.BATCH})
    result = RUNTIME.lower(exported, tmp_path, formats=made.formats, calibration=[as_numpy(x)])
    assert [text.split(": ")[0] for text in result.unmapped] == ["0"]
    assert check_parity(model, RUNTIME.open(tmp_path, result), [x]).sqnr_db > 25
