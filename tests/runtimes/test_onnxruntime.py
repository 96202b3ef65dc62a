import collections
import copy
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.runtimes import networks
from trimpoint.compress import compress
from trimpoint.data import as_numpy
from trimpoint.errors import ArtifactError, MissingDependencyError
from trimpoint.graph import OnGrid, baked, input_ranges, put_on_grid_
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.methods.quantize_weights import QuantizeWeights
from trimpoint.plan import Plan
from trimpoint.quantization.grid import Grid
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.runtimes.verify import check_parity
from trimpoint.task import Task
from trimpoint.values import Format

RUNTIME = get_runtime("onnxruntime")


def lower(case, directory, formats, **settings):
    _, inputs, exported, _ = case
    torch.manual_seed(1)
    return RUNTIME.lower(exported, directory, formats=formats, calibration=[as_numpy(inputs(8))], **settings)


def kinds(path):
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def test_no_convolution_of_resnet8_stays_in_float32(cases, tmp_path):
    lower(cases["resnet8"], tmp_path, networks.int8(cases["resnet8"][0]))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    opened = kinds(tmp_path / "opened.onnx")
    assert opened["QLinearConv"] == 9
    assert opened["QLinearAdd"] == 3
    assert opened["QGemm"] == 1
    # One conversion in, none between two int8 kernels; the last product writes float32 itself.
    assert (opened["QuantizeLinear"], opened["DequantizeLinear"]) == (1, 0)
    assert not {"Conv", "Add", "Relu", "Gemm"} & set(opened)


def test_int8_resnet8_has_little_beside_its_weights(cases, tmp_path):
    module = cases["resnet8"][0]
    lower(cases["resnet8"], tmp_path, networks.int8(module))
    weights = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
    channels = sum(part.weight.shape[0] for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear)))
    # Beside each weight's byte: a 32-bit scale and a 32-bit bias per channel, and the graph.
    assert (tmp_path / "model.onnx").stat().st_size < weights + 8 * channels + 6_000


def test_fused_file_gives_bitwise_the_answers_of_the_quantisers(cases, tmp_path, monkeypatch):
    from trimpoint.runtimes import onnx_quantize

    module, inputs, _, _ = cases["cnn"]
    sessions = []
    for name in ("fused", "separate"):
        (tmp_path / name).mkdir()
        lowered = lower(cases["cnn"], tmp_path / name, networks.int8(module))
        sessions.append(RUNTIME.open(tmp_path / name, lowered))
        monkeypatch.setattr(onnx_quantize, "same_answers", lambda *_: False)
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("fused", "separate")]
    assert sizes[0] < sizes[1]
    assert "QLinearConv" in kinds(tmp_path / "fused" / "model.onnx")
    assert "DequantizeLinear" in kinds(tmp_path / "separate" / "model.onnx")
    x = as_numpy(inputs(16))
    np.testing.assert_array_equal(sessions[0](x), sessions[1](x))


def test_reduce_range_uses_seven_bits(cases, tmp_path):
    module = cases["cnn"][0]
    weight = Format(dtype="int8", granularity="channel", reduce_range=True)
    formats = {path: {"weight": weight, "input": networks.INPUT} for path in networks.int8(module)}
    lower(cases["cnn"], tmp_path, formats)
    tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer]
    weights = [tensor for tensor in tensors if tensor.dtype == np.int8 and tensor.ndim > 1]
    assert len(weights) == 3
    assert all(np.abs(tensor.astype(int)).max() == 64 for tensor in weights)


def test_one_module_may_differ_from_the_others(cases, tmp_path):
    module = cases["cnn"][0]
    formats = networks.int8(module)
    formats["4"] = {"weight": Format(dtype="int8", granularity="tensor"), "input": networks.INPUT}
    lower(cases["cnn"], tmp_path, formats)
    model = onnx.load(tmp_path / "model.onnx")
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    scales = [sizes[node.input[4]] for node in model.graph.node if node.op_type == "QLinearConv"]
    assert scales == [8, 1]


def test_symmetric_activations_have_their_zero_in_the_middle(cases, tmp_path):
    module, inputs, _, _ = cases["cnn"]
    symmetric = Format(dtype="int8", symmetric=True)
    formats = {path: {"weight": networks.WEIGHT, "input": symmetric} for path in networks.int8(module)}
    lowered = lower(cases["cnn"], tmp_path, formats)
    zeros = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert {int(zero) for zero in zeros if zero.dtype == np.uint8} == {128}
    assert check_parity(module, RUNTIME.open(tmp_path, lowered), [inputs(64)]).agreement > 0.95


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_file_holds_the_integers_that_were_chosen(bits, tmp_path):
    torch.manual_seed(0)
    module = networks.Mixed().eval()
    layers = ("conv", "grouped", "up", "tokens", "head")
    for name in layers:
        weight, axis = module.get_submodule(name).weight.detach(), 1 if name == "up" else 0
        # Scales that rounding to nearest would not take: the greatest code is not reached, or clips.
        scale = (
            weight.abs().movedim(axis, 0).flatten(1).amax(1)
            / (2 ** (bits - 1))
            * torch.linspace(0.8, 1.3, weight.shape[axis])
        )
        put_on_grid_(module.get_submodule(name), "weight", OnGrid(scale, bits, axis))
    exported = export(module, torch.randn(2, 3, 8, 8), {"input": {0: "batch"}})
    assert sorted(exported.grids) == sorted(layers)
    kind = {"weight": Format(dtype=f"int{bits}", granularity="channel"), "input": networks.INPUT}
    lowered = RUNTIME.lower(
        exported, tmp_path, formats=dict.fromkeys(layers, kind), calibration=[torch.randn(64, 3, 8, 8).numpy()]
    )
    assert lowered.unmapped == ()
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
    integers = [
        np.sort(abs(array.astype(int)).ravel()) for array in stored if array.dtype == np.int8 and array.ndim > 1
    ]
    for name in layers:
        codes = np.sort(abs(exported.grids[name].codes.astype(int)).ravel())
        assert any(np.array_equal(codes, array) for array in integers), name
    if bits < 8:  # with 8, sums of 16 bits saturate on a processor without VNNI
        assert check_parity(module, RUNTIME.open(tmp_path, lowered), [torch.randn(16, 3, 8, 8)]).sqnr_db > 25


def test_weights_that_left_their_grid_on_the_way_are_named(cases, tmp_path):
    module = copy.deepcopy(cases["cnn"][0])
    exported = cases["cnn"][2]
    grids = {"0": Grid(codes=np.ones(module[0].weight.shape, dtype=np.int8), scale=np.ones(1), axis=0, bits=8)}
    lowered = lower((module, cases["cnn"][1], replace(exported, grids=grids), None), tmp_path, networks.int8(module))
    assert lowered.unmapped == ("0: its weight is not on its grid in the graph, and is rounded anew",)


def test_embeddings_get_smaller_where_they_have_a_format(cases, tmp_path):
    module = cases["transformer"][0]
    formats = networks.int8(module) | {"embedding": {"weight": Format(dtype="uint8", symmetric=False)}}
    lowered = lower(cases["transformer"], tmp_path, formats)
    assert lowered.unmapped == ()
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    table = next(tensor for tensor in stored if list(tensor.dims) == [50, 16])
    assert table.data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)


def test_a_missing_onnxruntime_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError) as caught:
        RUNTIME.version()
    assert caught.value.hint == "`pip install onnxruntime`"


def test_convolutions_with_groups_and_transposed_ones(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(256, 3)
    ).eval()
    exported = export(module, torch.randn(2, 4, 6, 6), {"input": {0: "batch"}})
    formats = networks.int8(module) | {"2": {"weight": networks.WEIGHT, "input": networks.INPUT}}
    calibration = [torch.randn(16, 4, 6, 6).numpy()]
    lowered = RUNTIME.lower(exported, tmp_path, formats=formats, calibration=calibration)
    assert lowered.unmapped == ()
    assert check_parity(module, RUNTIME.open(tmp_path, lowered), [torch.randn(8, 4, 6, 6)]).sqnr_db > 20


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_transposed_convolutions_in_groups_have_one_scale(kind, tmp_path):
    """ONNX Runtime has no scale per channel for the bias of several groups."""
    torch.manual_seed(0)
    size = (10,) if kind is nn.ConvTranspose1d else (10, 10)
    module = nn.Sequential(kind(4, 6, 2, groups=2)).eval()
    exported = export(module, torch.randn(2, 4, *size), {"input": {0: "batch"}})
    formats = {"0": {"weight": networks.WEIGHT, "input": networks.INPUT}}
    lowered = RUNTIME.lower(exported, tmp_path, formats=formats, calibration=[torch.randn(16, 4, *size).numpy()])
    assert lowered.unmapped == ()
    assert check_parity(module, RUNTIME.open(tmp_path, lowered), [torch.randn(8, 4, *size)]).sqnr_db > 20


def test_two_formats_for_one_tensor_are_told(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    module = Two().eval()
    exported = export(module, torch.randn(2, 8), {"input": {0: "batch"}})
    formats = {
        path: {"weight": networks.WEIGHT, "input": Format(dtype="uint8", symmetric=False, observer=observer)}
        for path, observer in (("a", "minmax"), ("b", "percentile"))
    }
    lowered = RUNTIME.lower(exported, tmp_path, formats=formats, calibration=[torch.randn(16, 8).numpy()])
    assert lowered.unmapped == ("b: its input is also that of another module, whose settings are used",)


def test_what_training_learned_reaches_the_file(tmp_path):
    """Ranges and steps learned with batch norms between: the file answers as the simulation does."""
    torch.manual_seed(0)
    model = networks.Mixed().eval()
    inputs = torch.randn(64, 3, 8, 8)
    data = TensorDataset(inputs, torch.arange(64) % 5)
    task = Task.classification(data, data).with_(calibrate=data)
    plan = Plan().then(QuantizeStatic(bits=4, learned_steps=True), Finetune(epochs=3, lr=0.05))
    before = compress(model, plan.prefix(1), task).module
    made = compress(model, plan, task)
    module = made.module
    assert input_ranges(module)["head"] != input_ranges(before)["head"]
    assert not torch.equal(module.norm.running_mean, before.norm.running_mean)
    exported = export(module, inputs[:2], {"input": {0: "batch"}})
    lowered = RUNTIME.lower(exported, tmp_path, formats=made.formats, calibration=[inputs.numpy()])
    assert lowered.unmapped == ()
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales = [float(value) for value in stored.values() if value.dtype == np.float32 and value.size == 1]
    for low, high in exported.ranges.values():
        assert any(scale == pytest.approx((high - low) / 255, rel=1e-5) for scale in scales)
    opened = RUNTIME.open(tmp_path, lowered)
    simulated, plain = (check_parity(each, opened, [inputs]).sqnr_db for each in (module, baked(module)))
    assert simulated > 30
    assert simulated > plain


def test_a_kernel_that_does_what_follows_as_well_goes_by_its_product(cases, tmp_path):
    module, inputs, exported, _ = cases["resnet8"]
    lowered = RUNTIME.lower(exported, tmp_path)
    operators = RUNTIME.operators(tmp_path, lowered, as_numpy(inputs(1)), repeats=3)
    found = sorted(operator.module for operator in operators if operator.kind.endswith(("Conv", "Gemm")))
    assert found == sorted(n for n, part in module.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear)))
    assert "Relu" not in {operator.kind for operator in operators}  # each is part of a convolution's kernel


@pytest.mark.parametrize(
    ("bounds", "symmetric"),
    [(nn.Hardtanh(0.5, 1.0), False), (nn.Hardtanh(-1.0, -0.5), False), (nn.ReLU(), True), (nn.ReLU6(), False)],
)
def test_bounds_that_rounding_does_not_keep_are_computed(bounds, symmetric, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), bounds, nn.Linear(8, 3)).eval(), torch.randn(64, 16)
    formats = {
        "0": {"weight": networks.WEIGHT, "input": networks.INPUT},
        "2": {"weight": networks.WEIGHT, "input": replace(networks.INPUT, symmetric=symmetric)},
    }
    exported = export(model, x, {"input": networks.BATCH})
    made = RUNTIME.lower(exported, tmp_path, formats=formats, calibration=[as_numpy(x)])
    assert check_parity(model, RUNTIME.open(tmp_path, made), [x]).sqnr_db > 30


@pytest.mark.parametrize("method", [QuantizeStatic(), QuantizeDynamic()])
def test_float64_stays_as_it_is_with_the_reason(method, tmp_path):
    """Methods give it no formats; whoever does is told here."""
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    data = torch.randn(16, 8, dtype=torch.float64)
    exported = export(module, data[:2], {"input": {0: "batch"}})
    formats = dict.fromkeys(("0", "2"), method.formats)
    lowered = RUNTIME.lower(exported, tmp_path, formats=formats, calibration=[data.numpy()])
    assert [reason.split(":")[0] for reason in lowered.unmapped] == ["0", "2"]
    assert all("float64" in reason for reason in lowered.unmapped)
    answers = RUNTIME.open(tmp_path, lowered)(data.numpy())
    np.testing.assert_allclose(answers, module(data).detach().numpy(), rtol=1e-6)


def test_weights_in_groups_that_became_float64_stay_so_with_the_reason(tmp_path):
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    made = compress(module, Plan().then(QuantizeWeights(rounding="nearest")), Task(calibrate=[(torch.zeros(64), 0)]))
    doubled, data = made.module.double(), torch.randn(4, 64, dtype=torch.float64)
    lowered = RUNTIME.lower(export(doubled, data, {}), tmp_path, formats=made.formats)
    assert sorted(made.formats) == [reason.partition(":")[0] for reason in lowered.unmapped]
    assert all("its weight is float64" in reason for reason in lowered.unmapped)
    answers = RUNTIME.open(tmp_path, lowered)(data.numpy())
    np.testing.assert_allclose(answers, doubled(data).detach().numpy(), rtol=1e-6)


def test_a_type_that_has_no_kernel_is_told_what_to_do(tmp_path):
    module = nn.Conv2d(3, 4, 3).double().eval()
    lowered = RUNTIME.lower(export(module, torch.randn(1, 3, 8, 8, dtype=torch.float64), {}), tmp_path)
    with pytest.raises(ArtifactError, match=r"`model.float\(\)`"):
        RUNTIME.open(tmp_path, lowered)


def _between(kept: nn.Module, images: bool) -> tuple[nn.Module, torch.Tensor]:
    """Return a network that has a layer between two that are quantised, and inputs."""
    if images:
        first, last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        return nn.Sequential(first, nn.ReLU(), kept, nn.ReLU6(), nn.MaxPool2d(2), last), torch.randn(16, 3, 8, 8)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), kept, nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 12)


@pytest.mark.parametrize(
    ("kept", "images"),
    [
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), True),
        (nn.Conv2d(8, 8, 3, padding=1, bias=False), True),
        (nn.ConvTranspose2d(8, 8, 3), True),
        (nn.Linear(8, 8), False),
    ],
    ids=["depthwise", "convolution", "transposed", "linear"],
)
def test_a_layer_that_is_kept_in_float32_stays_so_between_others(kept, images, tmp_path):
    """ONNX Runtime would round such weights to 8 bits with one scale, each time that it opens the file."""
    model, inputs = _between(kept, images)
    model.eval()
    int8 = {"weight": networks.WEIGHT, "input": networks.INPUT}
    formats = {"0": int8, "5" if images else "4": int8}
    exported = export(model, inputs, {"input": networks.BATCH})
    lowered = RUNTIME.lower(exported, tmp_path, formats=formats, calibration=[inputs.numpy()])
    assert lowered.unmapped == ()
    opened, options = tmp_path / "opened.onnx", onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(opened)
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    stored = [onnx.numpy_helper.to_array(each) for each in onnx.load(opened).graph.initializer]
    assert [each.dtype for each in stored if each.size == kept.weight.numel()] == [np.float32]
    assert check_parity(model, RUNTIME.open(tmp_path, lowered), [inputs]).sqnr_db > 25


@pytest.mark.parametrize("dynamic", [False, True])
def test_linear_layers_over_sequences_of_fixed_shapes_are_quantised(dynamic, tmp_path):
    """ONNX Runtime fuses the product with its bias under another name, where it knows all shapes."""
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5)).eval(), torch.randn(2, 4, 12)
    source = replace(networks.INPUT, dynamic=dynamic)
    formats = {path: {"weight": networks.WEIGHT, "input": source} for path in ("0", "2")}
    exported = export(module, inputs, {})
    made = RUNTIME.lower(exported, tmp_path, formats=formats, calibration=[inputs.numpy()])
    assert made.unmapped == ()
    (found,) = RUNTIME.open(tmp_path, made).run_flat([inputs.numpy()])
    wanted = module(inputs).detach().numpy()
    assert abs(found - wanted).max() < 0.05 * abs(wanted).max()
