"""What is known of kernels, held to what lowering makes of the same formats."""

import pytest
import torch
from torch import nn

from trimpoint.compress import compress
from trimpoint.methods.cast_weights import CastWeights
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.methods.quantize_weights import QuantizeWeights
from trimpoint.methods.smooth_activations import SmoothActivations
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.runtimes.kernels import drawback
from trimpoint.task import Task

AVX2, AVX512 = "avx2", "avx2 avx512_vnni avx512f"


def said(method, runtime="onnxruntime", instructions=AVX2, **more):
    return drawback(runtime, method.formats, instructions=instructions, **more)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "executorch"])
def test_eight_bits_are_not_warned_of(runtime):
    assert said(QuantizeStatic(), runtime) == ""
    assert said(QuantizeDynamic(), runtime, layer="Linear") == ""


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_fewer_bits_in_static_products_gain_nothing_over_eight(bits):
    assert "no faster than with 8 bits, and its file no smaller" in said(QuantizeStatic(bits=bits))
    assert said(QuantizeStatic(bits=bits), "openvino") == said(QuantizeStatic(bits=bits))


@pytest.mark.parametrize(("bits", "expected"), [(2, ""), (3, "than with 4 bits"), (4, ""), (6, "than with 8"), (8, "")])
def test_weights_are_held_in_containers(bits, expected):
    text = said(QuantizeWeights(bits=bits))
    assert expected in text
    assert bool(text) == bool(expected)


def test_float_activations_and_batches_do_not_suit_kernels_of_few_bits():
    four = QuantizeWeights(activations="float32")
    assert "slower on this CPU" in said(four)
    assert said(four, instructions=AVX512) == ""
    assert "int8 activations" in said(QuantizeWeights(bits=8, activations="float32"), instructions=AVX512)
    assert said(QuantizeWeights(), batch=7) == ""
    assert "at a batch of 8" in said(QuantizeWeights(), batch=8)


def test_bfloat16_is_computed_with_by_one_runtime_on_processors_that_can():
    both = CastWeights(dtype="bfloat16", activations="bfloat16")
    assert said(both, "openvino", f"{AVX512} avx512_bf16") == ""
    assert "no products of bfloat16" in said(both, "openvino", AVX512)
    assert said(both, "openvino", "neon") == ""
    assert "only OpenVINO computes in bfloat16" in said(both, instructions=f"{AVX512} avx512_bf16")
    assert "cast to float32" in said(CastWeights(dtype="bfloat16"), "openvino", f"{AVX512} avx512_bf16")


def test_nothing_is_said_of_what_is_not_known():
    assert drawback("elsewhere", QuantizeWeights(bits=3).formats, instructions=AVX2) == ""
    assert drawback("onnxruntime", {}, instructions=AVX2) == ""


class Sequence(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(8, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


def lowered(module, method, runtime, shape, directory):
    task = Task(calibrate=[(torch.rand(shape), torch.tensor(0)) for _ in range(4)], example=torch.rand(2, *shape))
    made = compress(module.eval(), Plan().then(method), task)
    batch = torch.rand(2, *shape)
    exported = export(made.module, batch, {})
    directory.mkdir()
    files = get_runtime(runtime).lower(exported, directory, formats=made.formats, calibration=[batch.numpy()])
    return files, sum(file.stat().st_size for file in directory.iterdir())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_without_a_kernel_are_those_that_lowering_leaves_in_float32(kind, tmp_path):
    method = QuantizeDynamic()
    files, _ = lowered(Sequence(kind), method, "onnxruntime", (3, 8), tmp_path / "a")
    assert bool(files.unmapped) == bool(said(method, layer=kind.__name__))
    assert "stays in float32" in said(method, "openvino", layer=kind.__name__)


def test_files_of_warned_bits_are_as_large_as_those_that_the_warning_names(tmp_path):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64))
    sizes = {
        bits: lowered(
            layer, QuantizeWeights(bits=bits, rounding="nearest"), "onnxruntime", (64,), tmp_path / f"{bits}"
        )[1]
        for bits in (2, 3, 4, 6, 8)
    }
    assert sizes[3] == pytest.approx(sizes[4], rel=0.01)
    assert sizes[6] == pytest.approx(sizes[8], rel=0.01)
    assert sizes[2] < 0.9 * sizes[4] < 0.9 * 0.9 * sizes[8]
    static = {
        bits: lowered(layer, QuantizeStatic(bits=bits), "onnxruntime", (64,), tmp_path / f"static {bits}")[1]
        for bits in (4, 8)
    }
    assert static[4] == pytest.approx(static[8], rel=0.01)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_sixteen_bits_make_a_smaller_file_and_no_faster_model(runtime, tmp_path):
    pytest.importorskip(runtime)
    layer = nn.Sequential(nn.Linear(64, 64))
    small, whole = (
        lowered(layer, method, runtime, (64,), tmp_path / method.name)[1]
        for method in (CastWeights(), SmoothActivations())
    )
    assert small < 0.7 * whole
    assert "not the model faster" in said(CastWeights(), runtime)


def test_openvino_holds_weights_in_groups_in_as_many_bits_as_it_is_said_to(tmp_path):
    pytest.importorskip("openvino")
    layer = nn.Sequential(nn.Linear(64, 64))
    sizes = {}
    for bits in (2, 3, 4, 8):
        method = QuantizeWeights(bits=bits, rounding="nearest")
        files, sizes[bits] = lowered(layer, method, "openvino", (64,), tmp_path / str(bits))
        assert files.unmapped == ()
        assert bool(said(method, "openvino")) == (bits == 3)
    assert sizes[3] == pytest.approx(sizes[4], rel=0.01)
    assert sizes[2] < sizes[4] < sizes[8]
