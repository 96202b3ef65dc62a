"""Saved structure and weights, made again by the caller's factory; every mismatch is one clear message."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.graph.networks import Flat, Tied, build, settle
from trimpoint.demo.resnet import ResNet, resnet20
from trimpoint.errors import ArtifactError
from trimpoint.graph import apply_edits_, bypass_, coupled_groups, rebuild, remove_units_, save_structure, trace


def compress(module, inputs):
    groups = coupled_groups(trace(module, inputs))
    edits, failed = remove_units_(module, groups, {g.name: [0, 1] for g in groups if not g.reason}, inputs)
    assert failed == {}
    return edits


@pytest.mark.parametrize("kind", [Flat, Tied])
def test_rebuilt_module_gives_the_same_outputs(kind, tmp_path):
    module, inputs = build(kind.__name__)
    save_structure(tmp_path, module, compress(module, inputs))
    again = rebuild(tmp_path, kind).eval()
    with torch.no_grad():
        assert torch.equal(again(inputs), module(inputs))
    assert {path.name for path in tmp_path.iterdir()} == {"weights.safetensors", "structure.json"}
    if kind is Tied:
        assert again.head.weight is again.embedding.weight
        assert "head.weight" not in safetensors.torch.load_file(tmp_path / "weights.safetensors")


def test_blocks_and_channels_together(tmp_path):
    module, inputs = settle(resnet20()), torch.randn(2, 1, 28, 28)
    edits = bypass_(module, "stages.1.1", inputs)
    edits += compress(module, inputs)
    save_structure(tmp_path / "new", module, edits)
    again = rebuild(tmp_path / "new", resnet20).eval()
    with torch.no_grad():
        assert torch.equal(again(inputs), module(inputs))
    other = resnet20()
    apply_edits_(other, edits)
    assert [p.shape for p in other.parameters()] == [p.shape for p in module.parameters()]


@pytest.fixture
def saved(tmp_path):
    module, inputs = build("Flat")
    save_structure(tmp_path, module, compress(module, inputs))
    return tmp_path


def test_another_architecture_is_refused(saved):
    with pytest.raises(ArtifactError, match="edits do not fit"):
        rebuild(saved, lambda: ResNet(widths=(4, 8, 8)))
    with pytest.raises(ArtifactError, match=r"must return a torch\.nn\.Module"):
        rebuild(saved, lambda: None)


class Longer(Flat):
    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(10, 4)
        self.extra = nn.Linear(1, 1)


def test_weights_that_do_not_fit_are_listed(saved):
    with pytest.raises(ArtifactError) as caught:
        rebuild(saved, Longer)
    assert "1. extra.weight: only in the model" in caught.value.message
    assert "fc2.weight: shape [4, 8] expected, [3, 8] found" in caught.value.message
    with pytest.raises(ArtifactError, match=r"type torch.bfloat16 expected, torch.float32 found"):
        rebuild(saved, lambda: Flat().bfloat16())


class Untied(Tied):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 20, bias=False)


def test_ties_must_be_the_same(tmp_path):
    module, _ = build("Tied")
    save_structure(tmp_path, module, [])
    with pytest.raises(ArtifactError, match=r"head.weight: tied to embedding.weight when it was saved"):
        rebuild(tmp_path, Untied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 1"),
        (lambda d: d.pop("tied"), "must hold version, edits and tied"),
        (lambda d: d.update(tied=[1]), "must map names to names"),
        (lambda d: d.update(tied={"a": "nowhere"}), "does not hold"),
        (lambda d: d.update(edits={}), "must be a list"),
        (lambda d: d["edits"].append({"edit": "import", "path": "os"}), "Got {'edit': 'import'"),
        (lambda d: d["edits"].append({"edit": "bypass", "path": "conv1"}), "must have path, structure"),
        (lambda d: d["edits"].append({"edit": "bypass", "path": "conv1", "structure": {"call": "x"}}), "structure of"),
        (
            lambda d: d["edits"].append({"edit": "attribute", "path": "", "name": "forward", "value": 1}),
            "no attribute 'forward'",
        ),
        (
            lambda d: d["edits"].append({"edit": "attribute", "path": "", "name": "_modules", "value": 1}),
            "sets '_modules'",
        ),
        (
            lambda d: d["edits"].append({"edit": "attribute", "path": "conv1", "name": "groups", "value": 0}),
            "whole number ≥ 1",
        ),
        (
            lambda d: d["edits"].append({"edit": "attribute", "path": "conv1", "name": "training", "value": 1}),
            "no attribute 'training'",
        ),
        (
            lambda d: d["edits"].append({"edit": "attribute", "path": "conv1", "name": "stride", "value": [1, 1, 1]}),
            "no attribute 'stride'",
        ),
        (
            lambda d: d["edits"].append({"edit": "attribute", "path": "conv1", "name": "fresh", "value": 1}),
            "no attribute 'fresh'",
        ),
        (
            lambda d: d["edits"].append({"edit": "attribute", "path": "conv1", "name": "groups", "value": "1"}),
            "whole number",
        ),
        (
            lambda d: d["edits"].append({"edit": "resize", "path": "fc1", "parameter": "bias", "dim": 0, "keep": [5]}),
            "must keep runs",
        ),
        (
            lambda d: d["edits"].append(
                {"edit": "resize", "path": "fc1", "parameter": "bias", "dim": 0, "keep": [[0, 99]]}
            ),
            "edits do not fit",
        ),
    ],
)
def test_files_that_are_not_sound_are_refused(saved, change, message):
    data = json.loads((saved / "structure.json").read_text())
    change(data)
    (saved / "structure.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=message):
        rebuild(saved, Flat)


def test_files_that_cannot_be_read_are_refused(saved):
    (saved / "weights.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ArtifactError, match=r"weights.safetensors cannot be read"):
        rebuild(saved, Flat)
    (saved / "structure.json").unlink()
    with pytest.raises(ArtifactError, match=r"structure.json cannot be read"):
        rebuild(saved, Flat)
