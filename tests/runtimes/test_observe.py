"""Ranges read from an ONNX graph: bounded pieces, no padding, clear errors; against the values that torch computes."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.runtimes import networks
from trimpoint.errors import DataError
from trimpoint.quantization.histogram import Histogram
from trimpoint.quantization.ranges import range_of
from trimpoint.runtimes import observe as observing
from trimpoint.runtimes import onnx_graph, onnx_quantize
from trimpoint.runtimes.base import calibration_feeds
from trimpoint.runtimes.export import export
from trimpoint.runtimes.observe import float_tensors, observe
from trimpoint.values import Format

RULES = [Format(dtype="uint8", symmetric=False, observer=name) for name in ("minmax", "percentile", "entropy", "mse")]


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    exported = export(module, torch.randn(2, 3, 8, 8), {"input": {0: "batch"}})
    return module, exported, onnx_quantize.preprocess(onnx_graph.parse(exported.onnx))


def images(n=40):
    return np.random.default_rng(0).normal(size=(n, 3, 8, 8)).astype(np.float32)


def convolution_inputs(model):
    return [node.input[0] for node in model.graph.node if node.op_type == "Conv"]


@pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.observer)
@pytest.mark.parametrize("memory", [1, 64 * 2**20], ids=["sample by sample", "at once"])
def test_ranges_are_those_of_the_values_however_batches_are_cut(cnn, monkeypatch, kind, memory):
    module, exported, model = cnn
    monkeypatch.setattr(observing, "MEMORY", memory)
    first, second = convolution_inputs(model)
    batches = np.array_split(images(), 3)
    found = observe(model, {first: kind, second: kind}, calibration_feeds(exported.signature, batches))
    with torch.no_grad():
        inside = module[:2](torch.from_numpy(images())).numpy()
    for name, values in ((first, images()), (second, inside)):
        histogram = Histogram()
        histogram.add(values)
        expected = range_of(histogram, kind)
        assert found[name] == pytest.approx(expected, rel=1e-2, abs=1e-4)
        assert found[name][0] <= 0.0 <= found[name][1]


def test_one_sample_is_enough(cnn):
    _, exported, model = cnn
    name = convolution_inputs(model)[0]
    found = observe(model, {name: RULES[0]}, calibration_feeds(exported.signature, [images(1)]))
    assert found[name] == pytest.approx((images(1).min(), images(1).max()))


@pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.observer)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_values_that_are_not_finite_are_named(cnn, kind, bad):
    _, exported, model = cnn
    broken = images(4)
    broken[2, 1, 3, 3] = bad
    name = convolution_inputs(model)[1]
    with pytest.raises(DataError, match=rf"not finite at `{name}` \(Relu\)"):
        observe(model, {name: kind}, calibration_feeds(exported.signature, [broken]))


def test_no_samples_are_an_error(cnn):
    _, _, model = cnn
    with pytest.raises(DataError, match="at least one sample"):
        observe(model, {convolution_inputs(model)[0]: RULES[0]}, [])


class Tokens(nn.Module):
    """Embeddings, and a layer whose values at padding are far out."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask):
        kept = attention_mask.unsqueeze(-1)
        return (self.linear(self.embed(input_ids)) * kept).sum(1) / kept.sum(1)


class Excluded(Tokens):
    """The same, told by the other kind of mask, and beside an input that no sample has for itself."""

    def forward(self, input_ids, key_padding_mask, shift):
        return super().forward(input_ids, 1 - key_padding_mask.long()) + shift


class Convolved(Tokens):
    """A text of fewer than three tokens is too short for it without its padding."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)

    def forward(self, input_ids, attention_mask):
        return self.conv(self.linear(self.embed(input_ids)).transpose(1, 2)).amax(2) + attention_mask.sum()


def test_both_kinds_of_masks_tell_padding_and_inputs_without_samples_are_read_whole(monkeypatch):
    monkeypatch.setattr(observing, "MEMORY", 1)
    torch.manual_seed(0)
    module = Excluded().eval()
    with torch.no_grad():
        module.embed.weight[0] = 1000.0
    ids, mask = torch.randint(1, 10, (6, 7)), torch.zeros(6, 7, dtype=torch.bool)
    ids[2:, 3:], mask[2:, 3:] = 0, True
    names = {0: "batch", 1: "length"}
    inputs = {"input_ids": ids, "key_padding_mask": mask, "shift": torch.ones(4)}
    exported = export(module, inputs, {"input_ids": names, "key_padding_mask": names})
    assert max(abs(value) for value in input_range(exported, [inputs])) < 10.0


def test_a_text_that_is_too_short_without_padding_is_seen_with_it():
    torch.manual_seed(0)
    module = Convolved().eval()
    with torch.no_grad():
        module.embed.weight[0] = 5.0
    ids, mask = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    names = {0: "batch", 1: "length"}
    exported = export(module, {"input_ids": ids, "attention_mask": mask}, {"input_ids": names, "attention_mask": names})
    long, both = ({"input_ids": ids[:n], "attention_mask": mask[:n]} for n in (1, 2))
    assert input_range(exported, [long])[1] < 5.0
    assert input_range(exported, [both])[1] == pytest.approx(5.0)


def input_range(exported, batches, kind=RULES[0]):
    """Return the range of what the linear layer reads."""
    model = onnx_quantize.preprocess(onnx_graph.parse(exported.onnx))
    product = next(node for node in model.graph.node if node.op_type in ("MatMul", "Gemm"))
    arrays = [{key: value.numpy() for key, value in batch.items()} for batch in batches]
    return observe(model, {product.input[0]: kind}, calibration_feeds(exported.signature, arrays))[product.input[0]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", RULES[:2], ids=lambda kind: kind.observer)
def test_padding_is_not_seen(side, kind):
    torch.manual_seed(0)
    module = Tokens().eval()
    with torch.no_grad():
        module.embed.weight[0] = 1000.0  # the row of padding
    ids, mask = torch.randint(1, 10, (6, 7)), torch.ones(6, 7, dtype=torch.int64)
    for row, length in enumerate((7, 3, 5, 3, 1, 7)):
        cut = slice(length, None) if side == "right" else slice(None, 7 - length)
        ids[row, cut], mask[row, cut] = 0, 0
    names = {0: "batch", 1: "length"}
    inputs = {"input_ids": ids, "attention_mask": mask}
    exported = export(module, inputs, {"input_ids": names, "attention_mask": names})
    low, high = input_range(exported, [inputs], kind)
    seen = module.embed.weight.detach()[ids[mask == 1]]
    assert high == pytest.approx(float(seen.max()), rel=0.02)
    assert low == pytest.approx(float(seen.min()), rel=0.02)


def test_float_tensors_are_those_computed(cnn):
    _, _, model = cnn
    assert set(convolution_inputs(model)) <= float_tensors(model)
    assert not float_tensors(model) & {tensor.name for tensor in model.graph.initializer}


def test_more_samples_than_fit_are_read_in_pieces(cnn, monkeypatch):
    """What is held at once is bounded: the session is run on few samples at a time."""
    _, exported, model = cnn
    monkeypatch.setattr(observing, "MEMORY", 40_000)
    sizes = []
    real = observing._pieces

    def spy(*arguments):
        for piece in real(*arguments):
            sizes.append(len(next(iter(piece.values()))))
            yield piece

    monkeypatch.setattr(observing, "_pieces", spy)
    observe(
        model, dict.fromkeys(convolution_inputs(model), RULES[1]), calibration_feeds(exported.signature, [images()])
    )
    sample = 4 * (3 * 8 * 8 + 8 * 6 * 6)
    assert sum(sizes) == 40
    assert max(sizes) == 40_000 // sample


def test_observers_reach_the_file(cnn, tmp_path):
    """An outlier stretches the scale of min-max, and not that of percentiles."""
    from trimpoint.runtimes.onnxruntime import OnnxRuntime

    _, exported, _ = cnn
    calibration = images(200)
    calibration[0, 0, 0, 0] = 1e3
    scales = {}
    for kind in RULES[:2]:
        directory = tmp_path / kind.observer
        directory.mkdir()
        formats = {path: {"weight": networks.WEIGHT, "input": kind} for path in ("0", "2", "4")}
        OnnxRuntime().lower(exported, directory, formats=formats, calibration=[calibration])
        graph = onnx.load(directory / "model.onnx").graph
        first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        scales[kind.observer] = float(stored[first.input[1]])
    assert scales["minmax"] == pytest.approx((1e3 - calibration.min()) / 255, rel=1e-3)
    assert scales["percentile"] < scales["minmax"] / 50
