"""Tasks: all forms of inputs, what the data tells, presets, and data that does not do."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from trimpoint.errors import DataError, InvalidParameterError, UnknownNameError
from trimpoint.score import Accuracy, EntityF1, MeanSquaredError, Perplexity
from trimpoint.task import Task, call, cross_entropy, main_tensor, squared_error

LENGTHS = [3, 9, 5, 4, 7, 5, 6, 8]


def images(n=40, classes=3):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 1, 4, 4, generator=generator), torch.arange(n) % classes)


def sentences():
    return [({"ids": torch.arange(n), "mask": torch.ones(n)}, index % 2) for index, n in enumerate(LENGTHS)]


def pad(samples):
    longest = max(len(inputs["ids"]) for inputs, _ in samples)
    batch = {
        key: torch.stack([nn.functional.pad(inputs[key], (0, longest - len(inputs[key]))) for inputs, _ in samples])
        for key in ("ids", "mask")
    }
    return batch, torch.tensor([target for _, target in samples])


FORMS = {
    "tensor": (torch.ones(3), lambda x: x),
    "tuple": ((torch.ones(3), torch.zeros(3)), lambda x, y: x + y),
    "dict": ({"x": torch.ones(3), "y": torch.zeros(3)}, lambda x, y: x + y),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_inputs(form):
    inputs, function = FORMS[form]
    task = Task(select=[(inputs, 1)] * 5, batch_size=2)
    batches = list(task.batches("select"))
    assert [len(targets) for _, targets in batches] == [2, 2, 1]
    for batch, _ in batches:
        assert torch.equal(call(function, batch), torch.ones(len(next(iter(_leaves(batch)))), 3))
    assert len(list(task.batches("select", size=5))) == 1
    assert sum(len(t) for _, t in task.batches("select", limit=3)) == 3
    example = task.example_batch(3)
    assert next(iter(_leaves(example))).shape == (3, 3)
    from_example = Task(example=inputs).example_batch(2)
    assert call(function, from_example).shape == (2, 3)
    names = {"tensor": ["input"], "tuple": ["input_0", "input_1"], "dict": ["x", "y"]}[form]
    assert task.dynamic_dims() == {name: {0: "batch"} for name in names}
    assert task.lengths() == {}


def _leaves(batch):
    return batch.values() if isinstance(batch, dict) else [batch] if isinstance(batch, torch.Tensor) else batch


def test_variable_lengths_are_found_in_the_data():
    task = Task(calibrate=sentences(), collate=pad, batch_size=4)
    assert task.dynamic_dims() == {"ids": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
    assert task.lengths() == {"length": (3, 6, 9)} or task.lengths() == {"length": (3, 5, 9)}
    (first, targets), _ = task.batches("calibrate")
    assert first["ids"].shape == (4, 9)
    assert targets.tolist() == [0, 1, 0, 1]


def test_dimensions_that_vary_apart_have_names_of_their_own():
    data = [((torch.ones(n), torch.ones(m)), 0) for n, m in ((1, 5), (2, 6), (3, 6))]
    task = Task(select=data)
    assert task.dynamic_dims() == {"input_0": {0: "batch", 1: "length"}, "input_1": {0: "batch", 1: "length_2"}}
    assert set(task.lengths()) == {"length", "length_2"}


def test_dimensions_given_by_name():
    task = Task(select=sentences(), collate=pad, dims={"ids": {1: "tokens"}, "mask": {1: "tokens"}})
    assert task.dynamic_dims()["ids"] == {0: "batch", 1: "tokens"}
    assert set(task.lengths()) == {"tokens"}
    with pytest.raises(UnknownNameError, match="input 'idss'") as caught:
        task.with_(dims={"idss": {1: "tokens"}}).dynamic_dims()
    assert "`ids`" in caught.value.hint


def test_samples_of_different_rank():
    with pytest.raises(DataError, match="equal number and rank"):
        Task(select=[(torch.ones(2), 0), (torch.ones(2, 2), 0)]).dynamic_dims()


class Inner(nn.Module):
    """A model that computes its own loss from its inputs."""

    def __init__(self):
        super().__init__()
        self.core = nn.Linear(16, 3)

    def forward(self, x, labels=None):
        logits = self.core(x.flatten(1))
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def test_a_loss_inside_the_model():
    model = Inner()
    task = Task(train=images(), step=lambda model, batch: model(batch[0], labels=batch[1])["loss"], batch_size=8)
    batch = next(task.training_batches(0))
    assert task.has("loss")
    assert torch.equal(task.loss_of(model, batch), Task(loss=cross_entropy).loss_of(model, batch))


def test_core_and_what_is_around_it():
    model = Inner()
    task = Task(select=images(), core="core", predict=lambda run, inputs: run(inputs.flatten(1)))
    assert task.core_of(model) is model.core
    assert Task(select=images()).core_of(model) is model
    (inputs, _) = next(task.batches("select", size=4))
    assert torch.equal(task.predict(task.core_of(model), inputs), model(inputs)["logits"])
    with pytest.raises(UnknownNameError, match="no submodule 'coer'") as caught:
        task.with_(core="coer").core_of(model)
    assert "core" in caught.value.hint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"core": "core"}, "needs `predict`"),
        ({"score": Accuracy}, "must be a Score"),
        ({"batch_size": 0}, "whole number"),
        ({"batch_size": 2.5}, "whole number"),
    ],
)
def test_fields_that_do_not_do(fields, message):
    with pytest.raises(InvalidParameterError, match=message):
        Task(**fields)


def test_training_batches_are_shuffled_reproducibly_and_augmented():
    task = Task(train=images(10), batch_size=4)
    order = [targets.tolist() for _, targets in task.training_batches(1)]
    assert [len(targets) for targets in order] == [4, 4]
    assert order == [targets.tolist() for _, targets in task.training_batches(1)]
    assert order != [targets.tolist() for _, targets in task.training_batches(2)]
    noisy = task.with_(augment=lambda x, y, generator: (x + torch.rand(x.shape, generator=generator), y))
    first, again = (next(noisy.training_batches(1))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, next(task.training_batches(1))[0])


def test_classification_preset():
    task = Task.classification(images(100), images(30), images(20), batch_size=7)
    assert [len(task.data(role)) for role in ("train", "calibrate", "select", "certify")] == [90, 10, 30, 20]
    assert (task.score, task.loss, task.batch_size) == (Accuracy(), cross_entropy, 7)
    halved = Task.classification(None, images(30))
    assert [len(halved.data(role)) for role in ("select", "certify")] == [15, 15]
    assert not halved.has("train")
    assert task.check()  # three copies of one data set: equal content is warned of


def test_other_presets():
    assert Task.regression(None, images(), images()).score == MeanSquaredError()
    assert Task.language_modelling(None, images(), images()).score == Perplexity()
    assert Task.tagging(None, images(), images(), labels=["O", "B-x"]).score == EntityF1(labels=("O", "B-x"))
    assert Task.classification(None, images(), score=MeanSquaredError()).score == MeanSquaredError()


def test_split_into_roles():
    data = images(100)
    task = Task(**Task.split(data, calibrate=10, select=0.2, certify=20, seed=1))
    assert [len(task.data(role)) for role in ("train", "calibrate", "select", "certify")] == [50, 10, 20, 20]
    assert task.check() == []
    assert task.fingerprint("select") == Task(
        **Task.split(data, calibrate=10, select=0.2, certify=20, seed=1)
    ).fingerprint("select")
    assert task.fingerprint("select") != task.fingerprint("certify")


def test_overlap_and_values_that_are_not_finite():
    data = images()
    with pytest.raises(DataError, match="both in `train` and in `select`"):
        Task(train=data, select=Subset(data, [3])).check()
    with pytest.raises(DataError, match="Sample 0 of `select`"):
        Task(select=[(torch.tensor([math.nan]), 0)]).check()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.ones(2), 0)])


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (DataLoader(images(), 4), r"Got a DataLoader\.\n\nhint: give the loader's `\.dataset`"),
        (Stream(), r"Got a Stream\.\n\nhint: give a list"),
        ((sample for sample in [1]), "Got a generator"),
    ],
)
def test_data_without_a_length_or_items(data, hint):
    with pytest.raises(DataError, match=f"The `train` data must have a length and items.*{hint}"):
        Task(train=data)
    with pytest.raises(DataError, match=f"The `train` data must have a length and items.*{hint}"):
        Task.classification(data, images())
    with pytest.raises(DataError, match=f"The `val` data must have a length and items.*{hint}"):
        Task.regression(None, data)
    with pytest.raises(DataError, match=hint):
        Task.split(data)


def test_missing_and_empty_roles():
    task = Task(select=[])
    with pytest.raises(DataError, match="`select` data of the task is empty") as caught:
        task.data("select")
    assert caught.value.hint
    with pytest.raises(DataError, match="no `train` data") as caught:
        task.data("train")
    assert "Task(train=...)" in caught.value.hint
    with pytest.raises(UnknownNameError, match="no role 'certfy'") as caught:
        task.data("certfy")
    assert "`certify`" in caught.value.hint
    with pytest.raises(DataError, match="neither data nor an `example`"):
        Task().example_batch()
    with pytest.raises(DataError, match="no loss") as caught:
        Task().loss_of(nn.Identity(), (torch.ones(1), torch.ones(1)))
    assert "step" in caught.value.hint
    with pytest.raises(DataError, match="empty"):
        task.check()


@pytest.mark.parametrize(
    "data",
    [
        [torch.ones(2), torch.ones(2)],  # two tensors would unpack as a pair
        [(torch.ones(2), 0, 1)] * 2,
        [(torch.ones(2), 0), (torch.ones(3), 0)],
        [(torch.ones(2), None)] * 2,
        [({"a": torch.ones(1)}, 0), ({"b": torch.ones(1)}, 0)],
    ],
)
@pytest.mark.parametrize("role", ["select", "train"])
def test_samples_that_do_not_collate(data, role):
    task = Task(**{role: data})
    with pytest.raises(DataError, match=f"`{role}` sample") as caught:
        list(task.batches(role) if role == "select" else task.training_batches(0))
    assert "padding `collate`" in caught.value.hint


def test_errors_of_a_collate_of_ones_own_come_through():
    def broken(samples):
        return len(3)

    with pytest.raises(TypeError, match="object of type 'int' has no len"):
        next(Task(select=images(), collate=broken).batches("select"))
    with pytest.raises(DataError, match=r"`collate` must return \(inputs, targets\). Got a Tensor of shape \[2, 3\]"):
        next(Task(select=images(), collate=lambda samples: torch.ones(2, 3)).batches("select"))


def test_losses_against_their_definition():
    logits = torch.randn(2, 5, 3)
    targets = torch.tensor([[0, 1, 2, -100, -100], [1, -100, 0, 0, 2]])
    chosen = targets != -100
    expected = -logits.log_softmax(-1)[chosen].gather(1, targets[chosen][:, None]).mean()
    assert torch.allclose(cross_entropy({"hidden": logits * 0, "logits": logits}, targets), expected)
    assert squared_error((torch.tensor([[1.0], [3.0]]),), torch.tensor([0.0, 1.0])).item() == 2.5
    assert main_tensor([(logits,)]) is logits


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (cross_entropy, torch.ones(4, 3), torch.zeros(5, dtype=torch.long)),
        (cross_entropy, torch.ones(4), torch.zeros(4, dtype=torch.long)),
        (squared_error, torch.ones(4, 2), torch.ones(4)),
    ],
)
def test_shapes_that_do_not_fit_the_loss(loss, outputs, targets):
    with pytest.raises(DataError, match="The loss needs outputs") as caught:
        loss(outputs, targets)
    assert "Task(loss=...)" in caught.value.hint


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 7]), "class indices from 0 to 2: the model has 3 outputs. Got 7"),
        (torch.tensor([-1, -100]), "Got -1"),
        (torch.tensor([0.5, 1.0]), "must be class indices. Got torch.float32"),
    ],
)
def test_targets_that_are_no_classes(targets, message):
    with pytest.raises(DataError, match=message):
        cross_entropy(torch.zeros(2, 3), targets)
    assert torch.isfinite(cross_entropy(torch.zeros(2, 3), torch.tensor([2, -100], dtype=torch.int32)))
