import pytest
import torch
from torch import nn

from trimpoint.measure.profile import measure_model
from trimpoint.measure.quality import evaluate
from trimpoint.target import METRICS, Target
from trimpoint.task import Task
from trimpoint.values import Profile, from_data, to_data


def digits(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    return [(image, int(image[0, :4].sum() > image[0, 4:].sum())) for image in x]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 2)
    )


def test_everything_is_measured(model):
    task = Task(select=digits(200, 0), train=digits(300, 1), certify=digits(100, 2))
    steps = []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    measured = measure_model(model, task, rounds=3, on_step=steps.append)
    profile = measured.profile
    assert set(METRICS) <= set(profile)
    assert {"latency_p95_ms", "accuracy[select]", "generalisation_gap"} <= set(profile)
    assert profile["params"].value == sum(p.numel() for p in model.parameters())
    assert profile["macs"].value == 64 * 8 * 9 + 8 * 64 * 2
    assert profile["accuracy[select]"].value == pytest.approx(evaluate(model, task, "select").value, abs=0.01)
    assert profile["file_bytes"].value > 4 * profile["params"].value
    assert 1000 < profile["coded_bytes"].value < profile["file_bytes"].value
    assert profile["latency_ms"].low <= profile["latency_ms"].value <= profile["latency_ms"].high
    assert "energy_j" in profile.missing
    assert any("not counted in macs" in note and "relu ×1" in note for note in profile.notes)
    assert any(operator.module == "4" for operator in measured.operators)
    assert [op.ms for op in measured.operators] == sorted((op.ms for op in measured.operators), reverse=True)
    assert steps == ["counting", "exporting", "timing", "coding", "scoring"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert from_data(Profile, to_data(profile)) == profile


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "executorch"])
def test_an_example_is_enough(model, runtime):
    measured = measure_model(model, Task(example=torch.randn(1, 8, 8)), Target(runtime=runtime, batch=3), rounds=3)
    assert set(METRICS) <= set(measured.profile)
    assert "batch 3" in measured.profile["latency_ms"].how
    assert measured.profile.missing["accuracy[select]"] == "the task has no `select` data"
    assert measured.qualities == ()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).mean(1)


def test_every_length_is_measured():
    example = torch.randn(6, 4)
    task = Task(example=example, dims={"input": {1: "length"}})
    measured = measure_model(Recurrent(), task, Target(lengths={"length": (2, 8, 32)}), rounds=3)
    assert {"latency_ms", "latency_ms[length=2]", "latency_ms[length=32]"} <= set(measured.profile)
    assert "latency_ms[length=8]" not in measured.profile
    assert "latency_ms is for length=8" in measured.profile.notes
    assert measured.profile["macs"].value == 8 * 16
