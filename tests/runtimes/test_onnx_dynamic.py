"""Dynamic int8 in ONNX Runtime against what its operators' documentation says, in NumPy, and its own quantiser."""

import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from trimpoint.compress import compress
from trimpoint.errors import ExportError
from trimpoint.filters import Glob, Type
from trimpoint.graph import OnGrid, put_on_grid_
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan, Step
from trimpoint.quiet import quiet
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.runtimes.verify import check_parity
from trimpoint.task import Task
from trimpoint.values import Format

RUNTIME = get_runtime("onnxruntime")
SEQUENCE = {"input": {0: "batch", 1: "length"}}
WEIGHT, INPUT = Format(dtype="int8", reduce_range=True), Format(dtype="uint8", symmetric=False, dynamic=True)


class First(nn.Module):
    """The first output of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


def lowered(model, x, directory, dims=SEQUENCE, method=None):
    torch.manual_seed(1)
    made = compress(model, Plan().then(method or QuantizeDynamic()))
    result = RUNTIME.lower(export(made.module, x, dims), directory, formats=made.formats)
    return result, RUNTIME.open(directory, result)


def kinds(directory):
    return collections.Counter(node.op_type for node in onnx.load(directory / "model.onnx").graph.node)


def rounded(x):
    """Return integers less their zero point, and the scale, as `DynamicQuantizeLinear` is defined."""
    low, high = min(0, x.min()), max(0, x.max())
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.clip(np.rint(x / scale) + zero, 0, 255) - zero, scale


def codes(weight, granularity):
    """Return `[outputs, inputs]` as integers of 7 bits, and their scales."""
    top = abs(weight).max(1) if granularity == "channel" else abs(weight).max()
    scale = (top / 64).astype(np.float32)
    return np.rint(weight / (scale[:, None] if scale.ndim else scale)), scale


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("rows", [(), (5,)])  # one product of matrices with its bias, or a product and an addition
def test_a_linear_layer_computes_what_the_operators_say(granularity, rows, tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(24, 16).eval()
    x = torch.randn(3, *rows, 24)
    model = nn.Sequential(layer)
    _, session = lowered(model, x, tmp_path, {"input": {0: "batch"}}, QuantizeDynamic(granularity=granularity))
    given, a = rounded(x.numpy())
    weight, b = codes(layer.weight.detach().numpy(), granularity)
    expected = (given @ weight.T) * (a * b) + layer.bias.detach().numpy()
    np.testing.assert_allclose(session(x.numpy()), expected, rtol=1e-5, atol=1e-5)
    assert kinds(tmp_path) == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 1}


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_an_lstm_computes_what_its_operator_says(granularity, tmp_path):
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 12, batch_first=True).eval()
    x = torch.randn(2, 7, 8)
    _, session = lowered(First(lstm), x, tmp_path, method=QuantizeDynamic(granularity=granularity))
    (w, v), (r, u) = (codes(p.detach().numpy(), granularity) for p in (lstm.weight_ih_l0, lstm.weight_hh_l0))
    given, a = rounded(x.numpy())  # the whole sequence at once, the state anew at each step
    bias = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().numpy()
    h, c, made = np.zeros((2, 12), np.float32), np.zeros((2, 12), np.float32), []
    for step in range(7):
        state, s = rounded(h) if step else (h, np.float32(1))
        gates = (given[:, step] @ w.T) * (a * v) + (state @ r.T) * (s * u) + bias
        i, f, g, o = np.split(gates, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = (o * np.tanh(c)).astype(np.float32)
        made.append(h)
    np.testing.assert_allclose(session(x.numpy()), np.stack(made, 1), atol=2e-5)
    assert "DynamicQuantizeLSTM" in kinds(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"granularity": "tensor", "reduce_range": False}], ids=str)
def test_answers_are_those_of_the_one_line_quantiser(settings, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(First(nn.LSTM(16, 24, batch_first=True, bidirectional=True)), nn.ReLU(), nn.Linear(48, 5))
    model, x, one = model.eval(), torch.randn(2, 9, 16), tmp_path / "one.onnx"
    (tmp_path / "ours").mkdir()
    (tmp_path / "one.onnx").write_bytes(export(model, x, SEQUENCE).onnx)
    _, session = lowered(model, x, tmp_path / "ours", method=QuantizeDynamic(**settings))
    with quiet():
        quant_pre_process(one, one, skip_symbolic_shape=True)
        quantize_dynamic(
            one,
            one,
            per_channel=settings.get("granularity") != "tensor",
            reduce_range=settings.get("reduce_range", True),
            weight_type=QuantType.QInt8,
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1  # with more, the state is rounded in parts
    theirs = onnxruntime.InferenceSession(one, options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session(x.numpy()), theirs.run(None, {"input": x.numpy()})[0], atol=1e-6)
    assert (tmp_path / "ours" / "model.onnx").stat().st_size <= one.stat().st_size


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.LSTM(8, 12, 2, batch_first=True), {"DynamicQuantizeLSTM": 2}),
        (nn.LSTM(8, 12, bidirectional=True, batch_first=True), {"DynamicQuantizeLSTM": 1}),
        (nn.LSTM(8, 12, bias=False, batch_first=True), {"DynamicQuantizeLSTM": 1}),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), {"MatMulIntegerToFloat": 4, "MatMul": 2}),
    ],
    ids=["layers", "bidirectional", "without bias", "attention"],
)
def test_layers_that_have_kernels(layer, kind, tmp_path):
    torch.manual_seed(0)
    model, x = (First(layer) if isinstance(layer, nn.LSTM) else layer).eval(), torch.randn(2, 6, 8)
    result, session = lowered(model, x, tmp_path)
    assert not result.unmapped
    assert {name: kinds(tmp_path)[name] for name in kind} == kind
    for length in (1, 6, 9):
        x = torch.randn(3, length, 8)
        expected = model(x).detach().numpy()
        assert abs(session(x.numpy()) - expected).max() < 0.05 * abs(expected).max()


def test_a_gru_stays_in_float32_and_its_cell_does_not(tmp_path):
    (tmp_path / "layer").mkdir()
    (tmp_path / "cell").mkdir()
    x = torch.randn(2, 4, 8)
    result, _ = lowered(First(nn.GRU(8, 12, batch_first=True)), x, tmp_path / "layer")
    assert result.unmapped == ("module: ONNX Runtime has no dynamic int8 kernel for GRU",)
    result, _ = lowered(nn.GRUCell(8, 12), x[:, 0], tmp_path / "cell", {"input": {0: "batch"}})
    assert not result.unmapped
    assert kinds(tmp_path / "cell")["MatMulIntegerToFloat"] == 2


def test_an_lstm_with_projections_is_refused_before_it_is_written_wrongly():
    with pytest.raises(ExportError, match=r"'module' projects its hidden state \(proj_size=4\)"):
        export(First(nn.LSTM(8, 12, proj_size=4, batch_first=True)), torch.randn(2, 4, 8), SEQUENCE)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


def test_packed_sequences_are_refused_with_a_way_out():
    with pytest.raises(ExportError, match=r"'lstm'.* reads packed sequences") as caught:
        export(Packed().eval(), (torch.randn(2, 5, 8), torch.tensor([5, 3])), {"input_0": {0: "batch"}})
    assert "pad the sequences" in caught.value.hint


def test_an_embedding_has_a_scale_per_row(tmp_path):
    torch.manual_seed(0)
    table = nn.Embedding(40, 16)
    with torch.no_grad():
        table.weight *= torch.logspace(-3, 1, 40)[:, None]
    ids = torch.arange(40).view(4, 10)
    _, session = lowered(table, ids, tmp_path)
    expected = table(ids).detach().numpy()
    error = abs(session(ids.numpy()) - expected).max(-1) / abs(expected).max(-1)
    assert error.max() < 0.51 / 127
    assert (tmp_path / "model.onnx").stat().st_size < 40 * 16 + 4 * 40 + 500


def test_integers_that_were_chosen_are_those_in_the_file(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(24, 16)
    put_on_grid_(layer, "weight", OnGrid(layer.weight.detach().abs().amax(1) / 7, 4))
    exported = export(layer, torch.randn(3, 24), {"input": {0: "batch"}})
    weight = Format(dtype="int4", granularity="channel")
    result = RUNTIME.lower(exported, tmp_path, formats={"": {"weight": weight, "input": INPUT}})
    assert not result.unmapped
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer]
    (found,) = [array for array in stored if array.dtype == np.int8]
    np.testing.assert_array_equal(found.T, exported.grids[""].codes)


@pytest.mark.parametrize(
    ("formats", "reason"),
    [
        ({"weight": Format(dtype="int4"), "input": INPUT}, "has no int4 for its weight"),
        ({"weight": WEIGHT, "input": Format(dtype="int8", dynamic=True)}, "rounds its input to uint8"),
        ({"weight": Format(dtype="int8", granularity="group"), "input": INPUT}, "symmetric weights with a scale per"),
        ({"input": INPUT}, "needs a format for its weight too"),
    ],
)
def test_formats_without_a_kernel_are_told(formats, reason, tmp_path):
    exported = export(nn.Linear(8, 4), torch.randn(3, 8), {"input": {0: "batch"}})
    result = RUNTIME.lower(exported, tmp_path, formats={"": formats})
    assert reason in result.unmapped[0]
    assert "MatMulIntegerToFloat" not in kinds(tmp_path)


class Speech(nn.Module):
    """Convolutions before an LSTM, as for spectrograms."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1))
        self.lstm, self.head = nn.LSTM(16, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.lstm(self.conv(x.mT).mT)[0].mean(1))


def test_static_and_dynamic_int8_in_one_file(tmp_path):
    torch.manual_seed(0)
    model, data = Speech().eval(), torch.randn(8, 20, 8)
    task = Task(calibrate=[(x, 0) for x in data])
    plan = Plan((Step(QuantizeStatic(), Type("Conv1d")), Step(QuantizeDynamic(), Glob("*"))))
    made = compress(model, plan, task)
    exported = export(made.module, data, SEQUENCE)
    result = RUNTIME.lower(exported, tmp_path, formats=made.formats, calibration=[data.numpy()])
    assert not result.unmapped
    found = kinds(tmp_path)
    assert (found["QLinearConv"], found["DynamicQuantizeLSTM"], found["DynamicQuantizeMatMul"]) == (2, 1, 1)
    answer, expected = RUNTIME.open(tmp_path, result)(data.numpy()), model(data).detach().numpy()
    assert np.linalg.norm(answer - expected) < 0.05 * np.linalg.norm(expected)


class Tied(nn.Module):
    """Words to words by one table: an embedding whose rows a linear layer reads, and an expanded function behind it."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(nn.functional.mish(self.middle(self.embed(ids))))


def test_a_linear_layer_reads_an_embedding_and_nothing_is_calibrated(tmp_path):
    module, ids = Tied().eval(), torch.randint(0, 50, (4, 7))
    made, session = lowered(module, ids, tmp_path)
    assert made.unmapped == ()
    assert check_parity(module, session, [ids]).max_rel < 0.05
    assert kinds(tmp_path).keys() & {"QuantizeLinear", "DequantizeLinear"} == set()


@pytest.mark.parametrize("dims", [{}, {"input": {0: "batch"}}])
@pytest.mark.parametrize("form", [{}, {"num_layers": 2, "bidirectional": True}])
def test_plain_recurrent_layers_are_exported_step_by_step_and_computed_in_int8(form, dims, tmp_path):
    torch.manual_seed(0)
    model, x = First(nn.RNN(64, 64, batch_first=True, **form)).eval(), torch.randn(2, 6, 64)
    made, session = lowered(model, x, tmp_path, dims)
    assert made.unmapped == ()
    assert kinds(tmp_path)["MatMulIntegerToFloat"] >= 6
    assert "MatMul" not in kinds(tmp_path)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert weights < (tmp_path / "model.onnx").stat().st_size < 1.6 * weights  # stored once, for all steps
    assert check_parity(model, session, [x]).sqnr_db > 30
