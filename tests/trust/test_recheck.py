"""An artifact measured and certified again: on two small artifacts that are lowered here."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint import Task
from trimpoint.artifact import write_artifact
from trimpoint.cli import main
from trimpoint.errors import ArtifactError, DataError, InvalidParameterError
from trimpoint.runtimes import get_runtime
from trimpoint.runtimes.export import export
from trimpoint.trust.ledger import Ledger
from trimpoint.trust.recheck import recertify, remeasure
from trimpoint.values import Profile


def network(width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def task() -> Task:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    return Task(certify=TensorDataset(x, network(256)(x).argmax(1)))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Return the directories of a wide network, of a narrow one that answers otherwise, and of the wide one again."""
    root, runtime, x = tmp_path_factory.mktemp("artifacts"), get_runtime("onnxruntime"), torch.zeros(1, 4)
    for name, width in (("wide", 256), ("narrow", 8), ("again", 256)):
        source = root / f"{name}-source"
        source.mkdir()
        lowered = runtime.lower(export(network(width), x, {"input": {0: "batch"}}), source)
        session = runtime.open(source, lowered)
        case = np.ones((2, 4), np.float32)
        parity = [(case, session(case))]
        write_artifact(root / name, source_dir=source, lowered=lowered, parity=parity, plan={}, profile=Profile())
    return root


def test_speed_and_size_beside_a_baseline(artifacts):
    for baseline in (artifacts / "wide", artifacts / "wide" / "model.onnx"):
        found = remeasure(artifacts / "narrow", baseline)
        size = (artifacts / "wide/model.onnx").stat().st_size / (artifacts / "narrow/model.onnx").stat().st_size
        assert found["size_ratio"].value == pytest.approx(size)
        ratio = found["latency_ratio"]
        assert ratio.low <= ratio.value <= ratio.high
        assert found["latency_ms"].value > 0


def test_certified_again_and_counted_once(artifacts, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    same = recertify(artifacts / "again", artifacts / "wide", task(), margin=0.02, ledger=ledger)
    assert (same.status, same.drop, same.n, same.looks) == ("passed", 0.0, 300, 1)
    assert same.reference == "the baseline 'wide' in the same runtime"
    other = recertify(artifacts / "narrow", artifacts / "wide", task(), margin=0.02, ledger=ledger)
    assert other.status == "failed"
    assert other.looks == 2
    assert recertify(artifacts / "narrow", artifacts / "wide", task(), margin=0.02, ledger=ledger) == other
    assert len(ledger.entries()) == 2


def test_what_does_not_do(artifacts, tmp_path):
    with pytest.raises(ArtifactError, match="must be an ONNX file or the directory of an artifact"):
        remeasure(artifacts / "narrow", tmp_path)
    with pytest.raises(InvalidParameterError, match="no certificate to take the allowed drop from"):
        recertify(artifacts / "narrow", artifacts / "wide", task())
    with pytest.raises(DataError, match="no `certify` data"):
        recertify(artifacts / "narrow", artifacts / "wide", Task(), margin=0.01)


def test_the_verb(artifacts, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tp_recheck", sys.modules[__name__])
    narrow, wide = str(artifacts / "narrow"), str(artifacts / "wide")
    assert main(["verify", narrow, "--data", "tp_recheck:task"]) == 2
    assert "--data needs --baseline" in capsys.readouterr().err
    asked = ["verify", narrow, "--baseline", wide, "--data", "tp_recheck:task", "--margin", "0.02"]
    assert main([*asked, "--format", "json"]) == 4
    data = json.loads(capsys.readouterr().out)
    assert data["certificate"]["status"] == "failed"
    assert {"latency_ms", "latency_ratio", "size_ratio"} == set(data["measured"]["metrics"])
    assert main(["verify", str(artifacts / "again"), *asked[2:]]) == 0
    out = capsys.readouterr().out
    assert "size_ratio" in out
    assert "passed" in out
    assert main(["verify", narrow, "--baseline", str(artifacts / "none")]) == 1
