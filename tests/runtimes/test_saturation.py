"""Sums of 16 bits: the emulation against the kernels of this machine where it has them, and no false clean bill."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tests.runtimes import networks
from trimpoint.measure.environment import instruction_set
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.runtimes.onnx_dynamic import INPUT
from trimpoint.runtimes.saturation import HIGH, overflows, saturating_product, saturations
from trimpoint.values import Format

RUNTIME = get_runtime("onnxruntime")
SATURATES = "vnni" not in instruction_set().lower() and "avx2" in instruction_set().lower()


def product(activations, weight):
    """Return what the integer kernel of this machine computes."""
    node = helper.make_node("MatMulInteger", ["a", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, activations.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"a": activations})[0]


@pytest.mark.parametrize("shape", [(1, 8, 16), (5, 37, 20), (64, 64, 33), (1, 128, 1), (3, 5, 7)])
def test_products_are_those_of_the_kernel(shape):
    rng = np.random.default_rng(0)
    rows, inner, columns = shape
    activations = rng.integers(100, 256, (rows, inner), dtype=np.uint8)
    weight = rng.integers(60, 128, (inner, columns)).astype(np.int8)
    exact = activations.astype(np.int64) @ weight.astype(np.int64)
    emulated = saturating_product(activations, weight)
    assert (emulated < exact).any()
    np.testing.assert_array_equal(product(activations, weight), emulated if SATURATES else exact)


def test_overflows_are_counted():
    activations = np.array([[255, 255, 255, 0], [1, 1, 255, 255]], dtype=np.uint8)
    weight = np.array([[127, -128], [127, -128], [127, 1], [0, 1]], dtype=np.int8)
    # 255 · 254 = 64,770 and −255 · 256 = −65,280 overflow; 255 · 127 = 32,385 does not.
    assert HIGH > 255 * 127
    assert overflows(activations, weight) == 2


def lowered(module, inputs, directory, *, reduce_range=False, calibration=None):
    exported = export(module.eval(), inputs[:2], {"input": {0: "batch"}})
    weight = Format(dtype="int8", granularity="channel", reduce_range=reduce_range)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    formats = {
        path: {"weight": weight, "input": networks.INPUT} for path, m in module.named_modules() if isinstance(m, kinds)
    }
    data = inputs if calibration is None else calibration
    directory.mkdir(exist_ok=True)
    return RUNTIME.lower(exported, directory, formats=formats, calibration=[data.numpy()])


def loaded(module):
    """Give a layer weights of which all are among the largest."""
    with torch.no_grad():
        module.weight.copy_(torch.where(module.weight >= 0, 1.0, -1.0) * (1 + 0.01 * module.weight.abs()))
    return module


LAYERS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), loaded(nn.Linear(72, 5))),
    "conv": lambda: nn.Sequential(loaded(nn.Conv2d(8, 6, 2))),
    "strided, padded, dilated": lambda: nn.Sequential(loaded(nn.Conv2d(8, 6, 2, stride=2, padding=1, dilation=2))),
    "groups": lambda: nn.Sequential(loaded(nn.Conv2d(8, 6, 2, groups=2))),
    "1d": lambda: nn.Sequential(nn.Flatten(2), loaded(nn.Conv1d(8, 4, 3))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_overflow_are_flagged_and_seven_bits_clear_them(name, tmp_path):
    torch.manual_seed(0)
    module, inputs = LAYERS[name](), torch.rand(16, 8, 3, 3) * 0.3 + 0.7
    (note,) = lowered(module, inputs, tmp_path / "eight").notes
    assert note.startswith(f"{len(module) - 1}: ")
    assert " % did" in note
    assert "reduce_range" in note
    assert lowered(module, inputs, tmp_path / "seven", reduce_range=True).notes == ()


def test_what_could_overflow_but_was_not_seen_to_is_no_clean_bill(tmp_path):
    torch.manual_seed(0)
    module, inputs = LAYERS["linear"](), torch.zeros(16, 8, 3, 3)
    inputs[:, ::2] = torch.rand(16, 4, 3, 3)
    inputs[0] = 0.0
    inputs[0, 0, 0, 0] = 8.0  # an outlier alone, that makes all others small
    (note,) = lowered(module, inputs, tmp_path).notes
    assert "none of" in note


def test_small_weights_and_depthwise_convolutions_cannot_overflow(tmp_path):
    torch.manual_seed(0)
    small = nn.Linear(72, 5)
    with torch.no_grad():
        small.weight.uniform_(-0.4, 0.4)
        small.weight[:, 0], small.weight[:, 1] = 1.0, 0.0
    inputs = torch.rand(16, 8, 3, 3)
    assert lowered(nn.Sequential(nn.Flatten(), small), inputs, tmp_path / "small").notes == ()
    deep = nn.Sequential(loaded(nn.Conv2d(8, 8, 2, groups=8)))
    assert lowered(deep, inputs, tmp_path / "deep").notes == ()


@pytest.mark.parametrize("seed", range(8))
def test_no_layer_that_answers_otherwise_on_such_a_cpu_goes_without_a_warning(seed, tmp_path):
    """The layer as such a CPU computes it, and exactly; whatever differs must have been flagged."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    width, outputs = int(rng.integers(2, 40)), int(rng.integers(1, 8))
    layer = nn.Linear(width, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(rng.normal(size=(outputs, width)) * rng.uniform(0, 1, (1, width))))
    inputs = torch.from_numpy(rng.uniform(0, 1, (64, width)) ** rng.uniform(0.2, 3)).float()
    made = lowered(nn.Sequential(layer), inputs, tmp_path)
    weight = layer.weight.detach().numpy()
    codes = np.rint(weight / (np.abs(weight).max(1, keepdims=True) / 127)).astype(np.int8).T
    activations = np.rint(inputs.numpy() / (inputs.max().item() / 255)).astype(np.uint8)
    exact = activations.astype(np.int64) @ codes.astype(np.int64)
    differs = (saturating_product(activations, codes) != exact).any()
    seen = [note for note in made.notes if " % did" in note]
    assert bool(differs) == bool(seen)
    assert onnx.load(tmp_path / "model.onnx").graph.node


def test_a_grouped_convolution_with_several_outputs_of_a_channel_is_no_depthwise_one(tmp_path):
    """ONNX Runtime has the kernel of its own for one output of each channel only."""
    torch.manual_seed(0)
    wide = nn.Sequential(loaded(nn.Conv2d(8, 16, 2, groups=8)))
    (note,) = lowered(wide, torch.rand(16, 8, 3, 3) * 0.3 + 0.7, tmp_path).notes
    assert " % did" in note


DYNAMIC = {
    "linear": lambda: loaded(nn.Linear(12, 5)),
    "lstm": lambda: nn.LSTM(12, 6, batch_first=True),
    "two directions": lambda: nn.LSTM(12, 6, batch_first=True, bidirectional=True),
}


class First(nn.Module):
    """A layer's first result."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        made = self.layer(x)
        return made[0] if isinstance(made, tuple) else made


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_layers_that_overflow_are_flagged_and_seven_bits_clear_them(name, tmp_path):
    torch.manual_seed(0)
    module, inputs = First(DYNAMIC[name]()).eval(), torch.rand(16, 4, 12) * 0.3 + 0.7
    if name != "linear":
        with torch.no_grad():
            for number, parameter in enumerate(module.parameters()):
                if parameter.ndim == 2:  # weights that read the hidden state are small, or the states would be
                    parameter.copy_(torch.where(parameter >= 0, 1.0, -1.0) * (0.5 if number % 4 == 0 else 0.1))
    exported = export(module, inputs[:2], {"input": {0: "batch"}})
    for reduce_range in (False, True):
        weight = Format(dtype="int8", granularity="channel", reduce_range=reduce_range)
        formats = {"layer": {"weight": weight, "input": INPUT}}
        for data in ([inputs.numpy()], []):
            made = RUNTIME.lower(exported, tmp_path, formats=formats, calibration=data)
            assert not made.unmapped
            if reduce_range:
                assert made.notes == ()
                continue
            (note,) = made.notes
            assert note.startswith("layer: ")
            assert (" % did" if data else "no calibration data") in note


def test_an_lstm_is_counted_with_the_states_that_it_reads(tmp_path):
    """Inputs that are zero overflow nothing; the hidden states do, except the first."""
    torch.manual_seed(0)
    layer = nn.LSTM(3, 8, batch_first=True)
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.fill_(0.1)
        layer.bias_ih_l0.fill_(3.0)
    module, inputs = First(layer).eval(), torch.zeros(4, 5, 3)
    exported = export(module, inputs[:2], {"input": {0: "batch"}})
    weight = Format(dtype="int8", granularity="channel")
    made = RUNTIME.lower(exported, tmp_path, formats={"layer": {"weight": weight, "input": INPUT}}, calibration=[])
    model = onnx.load(tmp_path / "model.onnx")
    assert len(made.notes) == 1
    (found,) = saturations(model, [{"input": inputs.numpy()}])
    # Of 32 rows: two pairs of inputs and four of states, in 5 steps of 4 sequences; the first state is zero.
    assert found.sums == 32 * (2 * 20 + 4 * 20)
    assert found.seen == 32 * 4 * 16 / found.sums


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_overflow_where_they_are_computed_on_integers(groups, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(loaded(nn.ConvTranspose2d(8, 6, 2, stride=2, groups=groups))).eval()
    inputs = torch.rand(16, 8, 3, 3) * 0.3 + 0.7
    exported = export(module, inputs[:2], {"input": {0: "batch"}})
    made = {}
    for runtime in ("onnxruntime", "openvino"):
        (tmp_path / runtime).mkdir()
        formats = {"0": {"weight": Format(dtype="int8"), "input": networks.INPUT}}
        lower = get_runtime(runtime).lower
        made[runtime] = lower(exported, tmp_path / runtime, formats=formats, calibration=[inputs.numpy()])
    assert made["onnxruntime"].notes == ()
    (note,) = made["openvino"].notes
    assert " % did" in note
