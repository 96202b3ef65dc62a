"""Fine-tuning within a plan: scope, what cannot be trained, and a real slice of images."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.compress import compress
from trimpoint.demo.fashion_mnist import augment, load_images
from trimpoint.demo.resnet import ResNet
from trimpoint.errors import DataError, TrainingError
from trimpoint.filters import Glob
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.finetune import Finetune
from trimpoint.plan import Plan, Step
from trimpoint.task import Task, cross_entropy


def make_task(count=32, **more):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return Task(train=TensorDataset(x, (x.sum(1) > 0).long()), loss=cross_entropy, batch_size=8, **more)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("method", [Finetune(epochs=3.0), Distill(epochs=3.0)])
def test_training_is_recorded_as_one_change(method):
    (change,) = compress(make_model(), Plan().then(method), make_task()).changes
    assert (change.kind, change.origin) == ("trained", "")
    assert change.after.startswith("12 steps of sgd, loss ")


def test_where_limits_what_is_trained_and_flags_are_put_back():
    model = make_model()
    made = compress(model, Plan((Step(Finetune(), Glob("3")),)), make_task())
    changed = {n for n, v in made.module.state_dict().items() if not torch.equal(v, model.state_dict()[n])}
    assert changed == {"3.weight", "3.bias"}
    assert all(p.requires_grad for p in made.module.parameters())
    assert made.changes[0].reason == "at 3"


@pytest.mark.parametrize("method", [Finetune(epochs=0.0), Distill(epochs=0.0)])
def test_no_epochs_change_nothing(method):
    model = make_model()
    made = compress(model, Plan().then(method), make_task())
    assert [(c.kind, c.reason) for c in made.changes] == [("skipped", "its length is 0 epochs")]
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in made.module.state_dict().items())


@pytest.mark.parametrize("where", ["*", "2"])
def test_nothing_to_train_is_skipped_with_the_reason(where):
    model = make_model().requires_grad_(where != "*")
    (change,) = compress(model, Plan((Step(Finetune(), Glob(where)),)), make_task()).changes
    assert change.kind == "skipped"
    assert "no parameter requires a gradient" in change.reason


def test_batch_norm_with_one_sample():
    with pytest.raises(DataError, match="batches of one sample"):
        compress(make_model(), Plan().then(Finetune()), make_task(1))


def test_data_that_is_not_finite():
    task = make_task()
    task.train.tensors[0][3] = float("nan")
    with pytest.raises(TrainingError, match="batch itself"):
        compress(make_model(), Plan().then(Finetune()), task)


def test_distill_without_labels_learns_the_original():
    model = make_model().eval()
    x = torch.randn(128, 5, generator=torch.Generator().manual_seed(1))
    task = Task(train=TensorDataset(x, torch.zeros(128, dtype=torch.long)), batch_size=16)
    student = make_model()
    with torch.no_grad():
        student[3].weight.zero_()
    start = compress(student, Plan())
    plan = Plan().then(Distill(epochs=30.0, alpha=1.0, lr=0.02))
    from trimpoint.compress import Compressed

    made = compress(model, plan, task, start=Compressed(module=start.module, plan=Plan()))
    with torch.no_grad():
        agree = (made.module(x).argmax(1) == model(x).argmax(1)).float().mean()
    assert agree > 0.95


def test_teacher_and_student_of_different_outputs():
    from trimpoint.compress import Compressed
    from trimpoint.errors import ModelError

    other = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(ModelError, match="one shape"):
        compress(make_model(), Plan().then(Distill()), make_task(), start=Compressed(module=other, plan=Plan()))


def test_recovers_dropped_blocks_on_real_images():
    """A small network learns 1,500 Fashion-MNIST images, loses half of its blocks, and wins the accuracy back."""
    images, labels = load_images("train")
    images = nn.functional.avg_pool2d(images[:2_000], 2)
    labels = labels[:2_000]
    task = Task(
        train=TensorDataset(images[:1_500], labels[:1_500]),
        loss=cross_entropy,
        augment=lambda x, y, generator: (augment(x, generator), y),
        batch_size=50,
    )
    torch.manual_seed(0)
    trained = compress(ResNet(widths=(8, 16), depth=2), Plan().then(Finetune(epochs=6.0)), task).module

    def accuracy(model):
        with torch.no_grad():
            return float((model(images[1_500:]).argmax(1) == labels[1_500:]).float().mean())

    dropped = compress(trained, Plan().then(DropBlocks(ratio=0.67)), task)
    plan = dropped.plan.then(Distill(epochs=4.0))
    recovered = compress(trained, plan, task, start=dropped)
    before, broken, after = accuracy(trained), accuracy(dropped.module), accuracy(recovered.module)
    assert before > 0.65
    assert broken < before - 0.1
    assert after > before - 0.05
