import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from trimpoint.errors import DataError, ModelError
from trimpoint.measure.inputs import capture, core_inputs, resized, synthetic_like
from trimpoint.target import Target
from trimpoint.task import Task


def sentences():
    return [
        ({"ids": torch.arange(length) + 1, "mask": torch.ones(length, dtype=torch.long)}, length % 2)
        for length in (4, 5, 6, 8, 8, 9, 12, 30)
    ]


def padded(items):
    inputs = {key: pad_sequence([item[0][key] for item in items], batch_first=True) for key in ("ids", "mask")}
    return inputs, torch.tensor([item[1] for item in items])


def test_lengths_are_those_of_the_data_without_padding():
    task = Task(select=sentences(), collate=padded)
    inputs = core_inputs(nn.Identity(), task, Target(batch=2))
    shortest, middle, longest = task.lengths()["length"]
    assert list(inputs.shapes) == [f"length={size}" for size in (shortest, middle, longest)]
    assert inputs.middle == f"length={middle}"
    assert inputs.dims == {"ids": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
    assert inputs.shapes[f"length={longest}"]["ids"].shape == (2, longest)
    assert inputs.shapes[f"length={shortest}"]["mask"].tolist() == [[1] * shortest] * 2


def test_the_target_decides_lengths_and_batch():
    task = Task(select=sentences(), collate=padded)
    inputs = core_inputs(nn.Identity(), task, Target(lengths={"length": (16, 64)}))
    assert [value["ids"].shape for value in inputs.shapes.values()] == [(1, 16), (1, 64)]
    with pytest.raises(DataError, match=r"'width', but what varies in the model's inputs is: length"):
        core_inputs(nn.Identity(), task, Target(lengths={"width": (3,)}))


def test_fixed_shapes_have_one_nameless_entry():
    inputs = core_inputs(nn.Identity(), Task(example=torch.ones(3, 8)), Target(batch=4))
    assert list(inputs.shapes) == [inputs.middle] == [""]
    assert inputs.shapes[""].shape == (4, 3, 8)
    assert inputs.dims == {"input": {0: "batch"}}


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = nn.Linear(6, 2)


def test_behind_predict_the_core_shows_what_it_takes():
    def predict(run, inputs):
        return run(torch.cat([inputs, inputs], 1)).softmax(-1)

    task = Task(example=torch.randn(3), core="core", predict=predict)
    inputs = core_inputs(Pooled(), task, Target(batch=5))
    assert inputs.shapes[""].shape == (5, 6)
    assert not inputs.example.is_inference()
    with pytest.raises(ModelError, match="never called the core"):
        capture(Pooled(), task.with_(predict=lambda run, inputs: inputs), torch.zeros(1, 3))


def test_resizing_repeats_or_cuts():
    batch = {"x": np.arange(6).reshape(2, 3)}
    dims = {"x": {0: "batch", 1: "length"}}
    assert resized(batch, dims, {"length": 5})["x"].tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]
    assert resized(batch, dims, {"length": 2})["x"].tolist() == [[0, 1], [3, 4]]


def test_synthetic_inputs_keep_types_shapes_and_ranges_but_no_content():
    batch = {
        "pixels": np.random.default_rng(1).normal(5, 2, (4, 500)).astype(np.float32),
        "ids": np.array([[3, 9, 4, 7] * 20]),
        "mask": np.ones((1, 4), np.int64),
        "flag": np.ones((1, 2), bool),
    }
    made = synthetic_like(batch, seed=3)
    assert {key: (value.dtype, value.shape) for key, value in made.items()} == {
        key: (value.dtype, value.shape) for key, value in batch.items()
    }
    assert made["pixels"].mean() == pytest.approx(5, abs=0.3)
    assert not np.isin(made["pixels"], batch["pixels"]).all()
    assert (made["ids"].min(), made["ids"].max()) == (3, 9)
    assert made["mask"].all()
    assert made["flag"].all()
    np.testing.assert_array_equal(made["ids"], synthetic_like(batch, seed=3)["ids"])
