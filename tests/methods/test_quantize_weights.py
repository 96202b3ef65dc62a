"""Weights in groups: what is in the module, in its edits, and in the files of the runtimes."""

import json

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.errors import ArtifactError, DataError, InvalidParameterError
from trimpoint.graph import grids_of
from trimpoint.graph.rebuild import rebuild, save_structure
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.methods.quantize_weights import QuantizeWeights
from trimpoint.plan import Plan, Step
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.task import Task, cross_entropy


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(72), nn.Linear(72, 40), nn.Linear(40, 5)
        self.conv = nn.Conv1d(1, 1, 1)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(self.conv(x[:, None])[:, 0]))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    result = Mlp().eval()
    with torch.no_grad():
        result.norm.weight.copy_(torch.logspace(-1, 1, 72))
    return result


@pytest.fixture
def task():
    x = torch.randn(64, 72, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, torch.arange(64) % 5)
    return Task(calibrate=data, train=data, loss=cross_entropy, batch_size=16)


def made(model, task, **params):
    return compress(model, Plan().then(QuantizeWeights(**params)), task)


def lowered(compressed, task, directory, runtime="onnxruntime"):
    batch = task.example_batch(4)
    files = get_runtime(runtime).lower(
        export(compressed.module, batch, {"input": {0: "batch"}}), directory, formats=compressed.formats
    )
    return files, get_runtime(runtime).open(directory, files)(batch.numpy())


def unpacked(node, tensors):
    """Return codes − zero points of a `MatMulNBits`, read as its documentation says."""
    settings = {a.name: a.i for a in node.attribute}
    bits, block, inputs = settings["bits"], settings["block_size"], settings["K"]
    read = lambda data: np.stack([(data >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)], -1)  # noqa: E731
    codes = read(tensors[node.input[1]]).reshape(settings["N"], -1).astype(int)
    blocks = codes.shape[1] // block
    zero = np.full((settings["N"], blocks), 2 ** (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        zero = (
            read(tensors[node.input[3]].reshape(settings["N"], -1)).reshape(settings["N"], -1)[:, :blocks].astype(int)
        )
    return (codes - np.repeat(zero, block, 1))[:, :inputs]


@pytest.mark.parametrize(
    ("rounding", "bits", "group", "symmetric"),
    [("gptq", 4, 32, False), ("nearest", 3, 0, True), ("awq", 2, 16, False), ("hqq", 8, 64, False)],
)
def test_the_file_holds_the_integers_that_were_chosen(model, task, tmp_path, rounding, bits, group, symmetric):
    compressed = made(model, task, bits=bits, group=group, rounding=rounding, symmetric=symmetric)
    grids = grids_of(compressed.module)
    _, outputs = lowered(compressed, task, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = {a.i: node for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "K"}
    assert sorted(nodes) == [40, 72]
    for name, inputs in (("up", 72), ("down", 40)):
        grid = grids[name]
        chosen = grid.codes.astype(int) - np.repeat(grid.zero.astype(int), grid.group, 1)[:, :inputs]
        assert np.array_equal(unpacked(nodes[inputs], tensors), chosen)
        assert len(np.unique(grid.codes)) > 2
    with torch.no_grad():
        want = compressed.module(task.example_batch(4)).numpy()
    assert np.abs(outputs - want).max() < 0.03 * np.abs(want).max()


def steps_of(product):
    """Return codes − zero points of a product of OpenVINO, whose weight is Reshape((codes − zero) · scale)."""
    source = lambda op, place: op.input_value(place).get_node()  # noqa: E731
    difference = source(source(source(product, 1), 0), 0)
    values = []
    for place in (0, 1):
        stored = source(source(difference, place), 0)
        bits = int(stored.get_element_type().get_type_name()[1:])
        parts = [(stored.data.reshape(-1) >> (at * bits)) & (2**bits - 1) for at in range(8 // bits)]
        count = int(np.prod(stored.get_output_shape(0)))
        values.append(np.stack(parts, -1).reshape(-1)[:count].reshape(stored.get_output_shape(0)).astype(int))
    return (values[0] - values[1]).reshape(len(values[0]), -1)


@pytest.mark.parametrize(
    ("rounding", "bits", "group", "symmetric", "container"),
    [
        ("gptq", 4, 32, False, "u4"),
        ("nearest", 3, 0, True, "u4"),
        ("awq", 2, 16, False, "u2"),
        ("nearest", 8, 64, True, "u8"),
        ("nearest", 2, 32, True, "u2"),
    ],
)
def test_openvino_holds_and_keeps_the_integers(model, task, tmp_path, rounding, bits, group, symmetric, container):
    compressed = made(model, task, bits=bits, group=group, rounding=rounding, symmetric=symmetric)
    grids = grids_of(compressed.module)
    files, outputs = lowered(compressed, task, tmp_path, "openvino")
    assert files.unmapped == ()
    read = openvino.Core().read_model(str(tmp_path / "model.xml"))
    products = [op for op in read.get_ordered_ops() if op.get_type_name() == "MatMul"]
    assert len(products) == 2
    for product, (name, inputs) in zip(products, (("up", 72), ("down", 40)), strict=True):
        grid = grids[name]
        chosen = grid.codes.astype(int) - np.repeat(grid.zero.astype(int), grid.group, 1)[:, :inputs]
        assert np.array_equal(steps_of(product)[:, :inputs], chosen)
    with torch.no_grad():
        want = compressed.module(task.example_batch(4)).numpy()
    assert np.abs(outputs - want).max() < 0.03 * np.abs(want).max()
    compiled = openvino.Core().compile_model(str(tmp_path / "model.xml"), "CPU").get_runtime_model()
    about = [op.get_rt_info() for op in compiled.get_ordered_ops()]
    products = [i["runtimePrecision"].value for i in about if i["layerType"].value == "FullyConnected"]
    assert products == [container] * 2


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_int8_the_file_computes_what_the_module_does(model, task, tmp_path, bits, runtime):
    compressed = made(model, task, bits=bits, rounding="awq", activations="float32")
    files, outputs = lowered(compressed, task, tmp_path, runtime)
    with torch.no_grad():
        want = compressed.module(task.example_batch(4)).numpy()
    assert np.abs(outputs - want).max() < 1e-5 * np.abs(want).max()
    assert files.unmapped == ()


def test_openvino_rounds_inputs_only_where_that_is_allowed(model, task, tmp_path):
    plan = Plan((Step(QuantizeWeights(activations="float32"), where="up"), Step(QuantizeDynamic(), where="down")))
    for chosen, size, words in ((plan, 0, ["down: its inputs"]), (Plan().then(QuantizeWeights()), 32, [])):
        directory = tmp_path / str(size)
        directory.mkdir()
        files, _ = lowered(compress(model, chosen, task), task, directory, "openvino")
        session = get_runtime("openvino").open(directory, files)
        assert session.request.get_compiled_model().get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == size
        assert [text for text in files.unmapped if "its inputs" in text] == [
            "down: its inputs stay in float32, as those of up do" for _ in words
        ]


def test_the_file_shrinks_in_openvino(task, tmp_path):
    wide = nn.Sequential(nn.Linear(72, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    floats = sum(parameter.numel() * 4 for parameter in wide.parameters())
    for bits, share in ((8, 0.32), (4, 0.19), (2, 0.13)):
        directory = tmp_path / str(bits)
        directory.mkdir()
        lowered(made(wide, task, bits=bits, rounding="nearest"), task, directory, "openvino")
        assert (directory / "model.bin").stat().st_size < share * floats


def test_factors_go_into_the_normalisation(model, task, tmp_path):
    compressed = made(model, task, bits=3, rounding="awq")
    factor = grids_of(compressed.module)["up"].factor
    assert factor is not None
    assert factor.max() > 2 * factor.min()
    lowered(compressed, task, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    source = next(n.input[0] for n in graph.node if any(a.name == "K" and a.i == 72 for a in n.attribute))
    assert next(n.op_type for n in graph.node if source in n.output) == "LayerNormalization"


def test_rebuilt_with_its_grids_and_trained_on_them(model, task, tmp_path):
    plan = Plan().then(QuantizeWeights(bits=3, rounding="awq")).then(Finetune(epochs=1))
    compressed = compress(model, plan, task)
    save_structure(tmp_path, compressed.module, compressed.edits)
    again = rebuild(tmp_path, Mlp)
    for name, grid in grids_of(compressed.module).items():
        assert np.array_equal(grids_of(again)[name].codes, grid.codes)
    x = task.example_batch(4)
    assert torch.equal(again.eval()(x), compressed.module(x))


def test_tampered_grids(model, task, tmp_path):
    compressed = made(model, task, bits=3)
    save_structure(tmp_path, compressed.module, compressed.edits)
    path = tmp_path / "structure.json"
    data = json.loads(path.read_text())
    for change in ({"group": 0}, {"group": 1 << 40}, {"bits": 9}, {"group": True}, {"axis": 0}):
        edits = [{**e, "grid": {**e["grid"], **change}} for e in data["edits"]]
        path.write_text(json.dumps({**data, "edits": edits}))
        with pytest.raises(ArtifactError, match="makes no grid"):
            rebuild(tmp_path, Mlp)
    path.write_text(
        json.dumps({**data, "edits": [{**e, "grid": {"bits": 3, "group": 1 << 30}} for e in data["edits"]]})
    )
    with pytest.raises(ArtifactError, match="do not fit"):
        rebuild(tmp_path, Mlp)
    path.write_text(json.dumps(data))
    for wrong in (0.5, 9.0, float("nan")):
        parametrization = compressed.module.up.parametrizations.weight[0]
        parametrization.zero[0, 0] = wrong
        save_structure(tmp_path, compressed.module, compressed.edits)
        with pytest.raises(ArtifactError, match="scales"):
            rebuild(tmp_path, Mlp)


def test_grids_keep_their_types(model, task):
    module = made(model, task, bits=4).module
    before = grids_of(module)["up"].codes
    assert np.array_equal(grids_of(module.half().float())["up"].codes, before)


def test_refusals_and_skips(model, task):
    with pytest.raises(InvalidParameterError, match="group"):
        QuantizeWeights(group=48)
    with pytest.raises(InvalidParameterError, match="bits"):
        QuantizeWeights(bits=1)
    with pytest.raises(InvalidParameterError, match="symmetric"):
        QuantizeWeights(rounding="hqq", symmetric=True)
    with pytest.raises(DataError, match="calibrate"):
        made(model, Task())


def test_shared_weights_are_left_alone(task):
    first = nn.Linear(72, 72)
    second = nn.Linear(72, 72)
    second.weight = first.weight
    compressed = made(nn.Sequential(first, second, nn.Linear(72, 5)).eval(), task)
    assert sorted(compressed.formats) == ["2"]
    reasons = {c.reason for c in compressed.changes if c.kind == "skipped"}
    assert "it shares a weight with another module" in reasons
