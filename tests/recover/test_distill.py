"""Distillation: losses against a formula in NumPy, the teacher's memory, losses inside the model."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import nn
from torch.nn import functional as F

from trimpoint.errors import ModelError
from trimpoint.recover import Distillation, Teacher, distillation_loss
from trimpoint.recover.distill import DistillationLoss
from trimpoint.task import Task, cross_entropy, squared_error


def numpy_kl(student, teacher, temperature):
    s, t = log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1)
    return float((np.exp(t) * (t - s)).sum(-1).mean() * temperature**2)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(6, 4, generator=generator) * 3 for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_class_logits_against_numpy(logits, temperature):
    loss = distillation_loss(*logits, torch.zeros(6, dtype=torch.long), temperature=temperature)
    assert float(loss) == pytest.approx(numpy_kl(logits[0].numpy(), logits[1].numpy(), temperature), rel=1e-5)


def test_equal_logits_cost_nothing(logits):
    assert float(distillation_loss(logits[0], logits[0], torch.zeros(6, dtype=torch.long))) == pytest.approx(
        0, abs=1e-6
    )


def test_gradient_at_temperature_one_is_the_difference_of_probabilities(logits):
    student = logits[0].clone().requires_grad_()
    distillation_loss(student, logits[1], torch.zeros(6, dtype=torch.long), temperature=1.0).backward()
    expected = (student.detach().softmax(-1) - logits[1].softmax(-1)) / 6
    assert torch.allclose(student.grad, expected, atol=1e-6)


def test_masked_tokens_do_not_count(logits):
    targets = torch.tensor([[0, -100, 1], [-100, 2, -100]])
    student, teacher = (t.reshape(2, 3, 4) for t in logits)
    kept = (targets != -100).reshape(-1)
    expected = numpy_kl(logits[0][kept].numpy(), logits[1][kept].numpy(), 4.0)
    assert float(distillation_loss(student, teacher, targets)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(student, teacher, torch.full((2, 3), -100))) == 0.0


def test_classes_in_dimension_one(logits):
    student, teacher = (t.reshape(2, 3, 4).movedim(-1, 1) for t in logits)
    loss = distillation_loss(student, teacher, torch.zeros(2, 3, dtype=torch.long))
    assert float(loss) == pytest.approx(numpy_kl(logits[0].numpy(), logits[1].numpy(), 4.0), rel=1e-5)


@pytest.mark.parametrize("targets", [torch.zeros(6), torch.zeros(6, 4), None, {"boxes": torch.zeros(1)}])
def test_other_targets_mean_squared_error(logits, targets):
    assert float(distillation_loss(*logits, targets)) == pytest.approx(float(((logits[0] - logits[1]) ** 2).mean()))


def test_match_overrides_the_targets(logits):
    softmax = distillation_loss(*logits, None, match="softmax")
    assert float(softmax) == pytest.approx(numpy_kl(logits[0].numpy(), logits[1].numpy(), 4.0), rel=1e-5)
    squared = distillation_loss(*logits, torch.zeros(6, dtype=torch.long), match="mse")
    assert float(squared) == pytest.approx(float(F.mse_loss(*logits)))


def test_shapes_that_differ(logits):
    with pytest.raises(ModelError, match="one shape"):
        distillation_loss(logits[0], logits[1][:, :3], torch.zeros(6, dtype=torch.long))


def test_teacher_remembers_by_content_and_does_not_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3)).train()
    before, memory = copy.deepcopy(model.state_dict()), {}
    teacher = Teacher(model, memory)
    batches = [torch.randn(4, 1, 6, 6) for _ in range(3)]
    first = [teacher.main_output(x) for x in batches]
    again = [teacher.main_output(x.clone()) for x in batches]
    assert (teacher.asked, teacher.remembered, len(memory)) == (6, 3, 3)
    expected = [copy.deepcopy(model).eval()(x) for x in batches]
    for one, other, right in zip(first, again, expected, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(one, right, atol=1e-5)
        assert not one.requires_grad
        assert not one.is_inference()
    assert model.training
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    other = Teacher(nn.Sequential(copy.deepcopy(model), nn.Identity()), memory)
    other.main_output(batches[0])
    assert other.remembered == 0


def test_memory_has_a_limit(monkeypatch):
    monkeypatch.setattr("trimpoint.recover.distill.MEMORY_LIMIT", 30)
    memory = {}
    teacher = Teacher(nn.Linear(2, 3), memory)
    for seed in range(4):
        teacher.main_output(torch.randn(2, 2, generator=torch.Generator().manual_seed(seed)))
    assert len(memory) == 1


def test_mixture_of_teacher_and_task():
    torch.manual_seed(0)
    model, student = nn.Linear(3, 4), nn.Linear(3, 4)
    batch = (torch.randn(5, 3), torch.randint(0, 4, (5,)))
    task = Task(loss=cross_entropy)
    parts = [
        DistillationLoss(task, Teacher(model), Distillation(alpha=alpha))(student, batch).item()
        for alpha in (1, 0, 0.3)
    ]
    assert parts[1] == pytest.approx(F.cross_entropy(student(batch[0]), batch[1]).item())
    assert parts[2] == pytest.approx(0.3 * parts[0] + 0.7 * parts[1], rel=1e-5)


def test_without_a_loss_only_the_teacher_counts():
    model, student = nn.Linear(3, 4), nn.Linear(3, 4)
    batch = (torch.randn(5, 3), torch.randint(0, 4, (5,)))
    loss = DistillationLoss(Task(), Teacher(model), Distillation(alpha=0.3))(student, batch)
    expected = distillation_loss(student(batch[0]), model(batch[0]), batch[1])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_regression_outputs():
    model, student = nn.Linear(3, 1), nn.Linear(3, 1)
    batch = (torch.randn(5, 3), torch.randn(5))
    loss = DistillationLoss(Task(loss=squared_error), Teacher(model), Distillation(alpha=1.0))(student, batch)
    assert loss.item() == pytest.approx(F.mse_loss(student(batch[0]), model(batch[0])).item(), rel=1e-5)


class LossInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x, labels=None):
        logits = self.head(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_loss_inside_the_model_runs_the_student_once():
    torch.manual_seed(0)
    model, student, calls = LossInside(), LossInside(), []
    student.register_forward_hook(lambda *_: calls.append(1))
    task = Task(step=lambda m, batch: m(batch[0]["x"], labels=batch[1])["loss"])
    x, y = torch.randn(5, 3), torch.randint(0, 4, (5,))
    loss = DistillationLoss(task, Teacher(model), Distillation(alpha=0.5))(student, ({"x": x}, y))
    assert calls == [1]
    far = distillation_loss(student.head(x), model.head(x), y)
    expected = 0.5 * far + 0.5 * F.cross_entropy(student.head(x), y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_step_that_goes_around_the_model():
    task = Task(step=lambda m, batch: F.cross_entropy(m.head(batch[0]), batch[1]))
    batch = (torch.randn(5, 3), torch.randint(0, 4, (5,)))
    with pytest.raises(ModelError, match="did not call the model"):
        DistillationLoss(task, Teacher(LossInside()), Distillation())(LossInside(), batch)


def test_core_is_taught_where_the_model_returns_something_else():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = nn.Linear(3, 4)

        def forward(self, x, targets=None):
            grid = self.core(x)
            return [row[row > 0] for row in grid] if targets is None else F.mse_loss(grid.sum(1), targets)

    torch.manual_seed(0)
    model, student, memory = Around(), Around(), {}
    task = Task(step=lambda m, batch: m(*batch), core="core", predict=lambda run, inputs: run(inputs))
    x, y = torch.randn(5, 3), torch.randn(5)
    loss = DistillationLoss(task, Teacher(model, memory, "core"), Distillation(alpha=0.5))
    far = F.mse_loss(student.core(x), model.core(x))
    for _ in range(2):
        assert loss(student, (x, y)).item() == pytest.approx((0.5 * far + 0.5 * student(x, y)).item(), rel=1e-5)
    assert loss.teacher.remembered == 1
