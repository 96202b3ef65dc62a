import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.runtimes import networks
from trimpoint.data import as_numpy
from trimpoint.errors import ArtifactError, DataError, LoweringError, MissingDependencyError
from trimpoint.measure.process import ArtifactFiles, run_child
from trimpoint.quantization.grid import Grid
from trimpoint.runtimes import executorch, get_runtime
from trimpoint.runtimes.base import Exported
from trimpoint.runtimes.export import export
from trimpoint.runtimes.verify import check_parity, require_parity

RUNTIME = get_runtime("executorch")
INT4 = networks.Format(dtype="int4", granularity="channel")
pytestmark = pytest.mark.xdist_group("executorch")


def traced(module, inputs, dims=networks.BATCH):
    return export(module.eval(), inputs, {"input": dims}, sources=("program",))


@pytest.mark.parametrize(
    ("package", "said"), [("executorch", "ExecuTorch is not installed"), ("torch", "takes tensors of PyTorch")]
)
def test_a_missing_package_says_what_to_install(package, said, lowering, monkeypatch):
    directory, lowered = lowering("executorch", "pair")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=said) as caught:
        RUNTIME.open(directory, lowered)
    assert caught.value.hint == '`pip install "trimpoint[executorch]"`'


def test_an_export_without_the_program_is_refused(cases, tmp_path):
    exported = cases["pair"][2]
    with pytest.raises(LoweringError, match="does not hold") as caught:
        RUNTIME.lower(Exported(signature=exported.signature, onnx=exported.onnx), tmp_path)
    assert 'sources=("program",)' in caught.value.hint


def test_each_session_runs_with_its_own_threads(cases, lowering):
    inputs = as_numpy(cases["cnn"][1]())
    directory, lowered = lowering("executorch", "cnn")
    count = executorch._import()._threadpool_get_thread_count
    one, two = (RUNTIME.open(directory, lowered, threads=threads) for threads in (1, 2))
    assert count() == 2
    answers = []
    for session in (one, two, one):
        answers.append(session(inputs))
        assert count() == session.threads
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(answers[0], answers[2])


def test_larger_inputs_than_memory_was_planned_for_are_refused(cases, lowering):
    inputs = cases["transformer"][1]
    directory, lowered = lowering("executorch", "transformer")
    assert lowered.signature.limits == {"batch": 64, "length": 128}
    assert any("memory is planned for at most 128" in note for note in lowered.notes)
    session = RUNTIME.open(directory, lowered)
    assert session(as_numpy(inputs(64, 128)))["hidden"].shape == (64, 128, 16)
    with pytest.raises(DataError, match=r"'length' must be at most 128.* Got 129"):
        session(as_numpy(inputs(1, 129)))


def test_arrays_in_any_memory_layout_are_taken(cases, lowering):
    inputs = cases["cnn"][1]
    session = RUNTIME.open(*lowering("executorch", "cnn"))
    x = as_numpy(inputs(3))
    strided = np.asfortranarray(x)
    strided.flags.writeable = False
    np.testing.assert_array_equal(session(strided), session(x))


def test_a_measuring_process_imports_torch_and_nothing_else(cases, lowering):
    directory, lowered = lowering("executorch", "pair")
    inputs = as_numpy(cases["pair"][1](1))
    files = ArtifactFiles(directory=directory, lowered=lowered)
    result, arrays = run_child("outputs", {"main": files}, {"x": inputs}, threads=1, timeout=120)
    assert result["modules"] == []
    np.testing.assert_array_equal(arrays["x_0"], RUNTIME.open(directory, lowered)(inputs)[0])


class Types(nn.Module):
    """Integers, truth values and a number; a dimension that ExecuTorch leaves open; no weight."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"more": x + 1, "odd": x % 2 == 1, "half": x.float().mean(1) / 2}


def test_integers_stay_integers(tmp_path):
    exported = traced(Types(), torch.arange(12).reshape(4, 3), networks.OPEN)
    lowered = RUNTIME.lower(exported, tmp_path)
    session = RUNTIME.open(tmp_path, lowered)
    x = torch.arange(10).reshape(2, 5)
    answer = session(as_numpy(x))
    assert {name: value.dtype.name for name, value in answer.items()} == {
        "more": "int64",
        "odd": "bool",
        "half": "float32",
    }
    require_parity(Types(), session, [x])


class Weights(nn.Module):
    """A convolution whose batch normalisation is folded in, a transposed one, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))


def test_chosen_integers_are_what_the_file_holds():
    from trimpoint.runtimes import pt2e_quantize

    torch.manual_seed(3)
    module = Weights().eval()
    module.norm.running_var.uniform_(0.2, 3.0)
    module.norm.weight.data.uniform_(-2.0, 2.0)
    grids = {}
    for path, axis in (("conv", 0), ("up", 1), ("head", 0)):
        weight = module.get_submodule(path).weight
        codes = torch.randint(-7, 8, weight.shape, dtype=torch.int8)
        shape = [1] * weight.dim()
        shape[axis] = -1
        scale = torch.rand(weight.shape[axis]) + 0.01
        weight.data = codes * scale.view(shape)
        grids[path] = Grid(codes=codes.numpy(), scale=scale.numpy(), axis=axis, bits=4)
    exported = traced(module, torch.randn(2, 3, 6, 6))
    exported = Exported(signature=exported.signature, program=exported.program, grids=grids)
    formats = {path: {"weight": INT4, "input": networks.INPUT} for path in grids}
    data = [np.random.default_rng(0).normal(size=(16, 3, 6, 6)).astype("float32")]
    program, unmapped, owners = pt2e_quantize.quantize(exported.program, exported, formats, data)
    assert unmapped == ()
    stored = {**program.state_dict, **program.constants}
    assert sorted(owners.values()) == ["conv", "head", "up"]
    for name, path in owners.items():
        held = stored[name].numpy()
        assert held.dtype == np.int8
        # A negative factor of the batch normalisation turns the integers of its channel around.
        assert np.array_equal(abs(held), abs(grids[path].codes)), path
    beside = {path: Grid(codes=g.codes + 1, scale=g.scale, axis=g.axis, bits=4) for path, g in grids.items()}
    exported = Exported(signature=exported.signature, program=exported.program, grids=beside)
    _, unmapped, _ = pt2e_quantize.quantize(exported.program, exported, formats, data)
    assert sorted(unmapped) == [
        f"{path}: its weight is not on its grid in the graph, and is rounded anew" for path in sorted(grids)
    ]


@pytest.mark.parametrize("observer", ["minmax", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_have_the_range_of_their_rule(observer, symmetric):
    from trimpoint.quantization.histogram import Histogram
    from trimpoint.quantization.ranges import range_of
    from trimpoint.runtimes.pt2e_observers import activation_spec

    kind = networks.Format(dtype="int8", symmetric=symmetric, observer=observer, percentile=99.0)
    spec = activation_spec(kind)
    watch = spec.observer_or_fake_quant_ctr(
        dtype=spec.dtype, quant_min=spec.quant_min, quant_max=spec.quant_max, qscheme=spec.qscheme
    )
    values = np.random.default_rng(0).standard_t(3, size=(4, 1000)).astype("float32")
    histogram = Histogram()
    for row in values:
        watch(torch.from_numpy(row))
        histogram.add(row)
    low, high = range_of(histogram, kind)
    scale, zero = (float(number) for number in watch.calculate_qparams())
    if symmetric:
        assert zero == 0
        assert scale == pytest.approx(max(-low, high) / 127, rel=1e-5)
    else:
        assert scale == pytest.approx((high - low) / 255, rel=1e-5)
        assert zero == pytest.approx(-128 - low / scale, abs=0.51)
    with pytest.raises(DataError, match="not finite"):
        watch(torch.tensor([1.0, float("nan")]))


def test_a_weight_format_alone_quantises_the_input_as_it_comes(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    formats = {path: {"weight": networks.WEIGHT} for path in ("0", "2")}
    lowered = RUNTIME.lower(traced(module, torch.randn(2, 64)), tmp_path, formats=formats)
    assert lowered.unmapped == ()
    session = RUNTIME.open(tmp_path, lowered)
    x = torch.randn(16, 64)
    # With ranges found at run time, inputs of any scale keep their resolution.
    for batch in (x, 100 * x, x / 100):
        assert check_parity(module, session, [batch]).sqnr_db > 25
    kinds = {(o.kind, o.module) for o in RUNTIME.operators(tmp_path, lowered, as_numpy(x[:1]), repeats=2)}
    # XNNPACK takes signed inputs, QD8, or with 8-bit dot products of AVX-512 unsigned ones, QDU8.
    assert {module for kind, module in kinds if ("QD8" in kind or "QDU8" in kind) and "Fully" in kind} == {"0", "2"}


class Halves(nn.Module):
    """A layer of bfloat16 beside one of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.whole = nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.short(x.bfloat16()).float())


def test_weights_that_are_not_float32_are_left_as_they_are(tmp_path):
    torch.manual_seed(0)
    module, x = Halves().eval(), torch.randn(4, 8)
    formats = {path: {"weight": networks.WEIGHT, "input": networks.INPUT} for path in ("short", "whole")}
    lowered = RUNTIME.lower(traced(module, x), tmp_path, formats=formats, calibration=[as_numpy(x)])
    assert lowered.unmapped == ("short: XNNPACK has int8 kernels for weights of float32, not bfloat16",)
    assert check_parity(module, RUNTIME.open(tmp_path, lowered), [x]).sqnr_db > 25


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.i0(x)


def test_an_operator_that_executorch_lacks_is_named(tmp_path):
    with pytest.raises(LoweringError, match="i0") as caught:
        RUNTIME.lower(traced(Unsupported(), torch.rand(2, 3)), tmp_path)
    assert "another runtime" in caught.value.hint


def test_errors_of_the_runtime_are_ours(cases, lowering):
    session = RUNTIME.open(*lowering("executorch", "pair"))
    with pytest.raises(ArtifactError, match=r"cannot run 'model\.pte' on these inputs") as caught:
        session.run_flat([np.zeros((1, 4), np.float64)] * 2)
    assert "another runtime" in caught.value.hint


def test_the_extension_is_found_where_executorch_is_installed():
    assert importlib.util.find_spec("executorch.extension.pybindings._C") is not None
