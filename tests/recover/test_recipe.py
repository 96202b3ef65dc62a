"""What a recipe means for a model and a task."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.methods.distill import Distill
from trimpoint.methods.finetune import Finetune
from trimpoint.recover.recipe import check_batches, prefers_adamw, steps_in_epoch
from trimpoint.task import Task


def make_task(count=50, batch_size=8):
    return Task(train=TensorDataset(torch.zeros(count, 2), torch.zeros(count)), batch_size=batch_size)


@pytest.mark.parametrize(
    ("model", "adamw"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), False),
        (nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2)), True),
        (nn.TransformerEncoderLayer(8, 2), True),
        (nn.Sequential(nn.Embedding(3, 2), nn.BatchNorm1d(2)), False),
        (nn.Linear(2, 2), True),
    ],
)
def test_optimizer_by_model(model, adamw):
    assert prefers_adamw(model) is adamw
    settings = Finetune().settings(model, make_task())
    assert settings.optimizer == ("adamw" if adamw else "sgd")
    rate = 1e-3 if isinstance(model, nn.Linear) else 1e-4
    assert (settings.lr, settings.weight_decay) == ((rate, 0.01) if adamw else (0.05, 5e-4))
    assert Distill().settings(model, make_task()).lr == (rate if adamw else 0.1)


def test_given_values_go_before_defaults():
    settings = Finetune(lr=0.5, weight_decay=0.0, optimizer="adamw").settings(nn.Linear(2, 2), make_task())
    assert (settings.lr, settings.weight_decay, settings.optimizer) == (0.5, 0.0, "adamw")


def test_effort_scales_the_steps_but_not_the_warmup():
    full = Finetune(epochs=4.0, warmup=0.5).settings(nn.Linear(2, 2), make_task())
    half = Finetune(epochs=4.0, warmup=0.5).settings(nn.Linear(2, 2), make_task(), effort=0.5)
    assert (full.steps, half.steps, full.warmup, half.warmup) == (24, 12, 3, 3)
    assert Finetune(epochs=0.001).settings(nn.Linear(2, 2), make_task()).steps == 1


@pytest.mark.parametrize(("count", "size"), [(50, 8), (5, 8), (8, 8), (1, 8)])
def test_steps_in_epoch_are_those_of_the_task(count, size):
    task = make_task(count, size)
    assert steps_in_epoch(task) == len(list(task.training_batches(0)))


def test_batch_norm_and_batches_of_one_sample():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(DataError, match="batches of one sample"):
        check_batches(model, make_task(1))
    check_batches(model, make_task(2))
    check_batches(nn.Linear(2, 2), make_task(1))


@pytest.mark.parametrize(
    "wrong", [{"epochs": -1}, {"lr": 0}, {"cooldown": 1.5}, {"optimizer": "adam"}, {"momentum": 1}]
)
def test_parameters_out_of_range(wrong):
    with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
        Finetune(**wrong)
