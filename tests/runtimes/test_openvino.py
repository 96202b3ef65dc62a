import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

from tests.runtimes import networks
from trimpoint.compress import compress
from trimpoint.data import as_numpy
from trimpoint.errors import MissingDependencyError
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.plan import Plan
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export

RUNTIME = get_runtime("openvino")


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_package_says_what_to_install(package, cases, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    module, inputs, exported, _ = cases["cnn"]
    with pytest.raises(MissingDependencyError) as caught:
        RUNTIME.lower(exported, tmp_path, formats=networks.int8(module), calibration=[as_numpy(inputs())])
    assert caught.value.hint == '`pip install "trimpoint[openvino]"`'


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
