"""Training of starting points: a killed run gives the same bytes, cycles end, a checkpoint loses nothing in float16."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.checkpoints import lenet5_mnist, lenet_mnist, lstm_fsdd, mobilenet_cifar10, resnet20_cifar10
from benchmarks.datasets import Roles, crop_and_flip
from benchmarks.training import Recipe, accuracy, finish, restore, share, train
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import training
from trimpoint.demo.resnet import ResNet


def made_up(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return TensorDataset(torch.randn(n, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1), labels)


ROLES = Roles(train=made_up(48, 0), calibrate=made_up(6, 1), select=made_up(30, 2), certify=made_up(30, 3))


def small() -> nn.Module:
    return ResNet(widths=(4, 8), depth=1, channels=3, classes=3)


RECIPE = Recipe(build=small, data=lambda: ROLES, cycles=(2, 3), lr=0.05, batch=16, augment=crop_and_flip, enough=-100.0)


def same(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe, Path], None]:
    """Train with a kill at the second and the fourth epoch that is begun, and go on each time."""

    def run(recipe: Recipe, state: Path) -> None:
        real, begun = training._epoch, []

        def epoch(*arguments: object) -> float:
            begun.append(1)
            if len(begun) in (2, 4):
                raise KeyboardInterrupt
            return real(*arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(training, "_epoch", epoch)
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    train(recipe, state)
            train(recipe, state)

    return run


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_that_was_killed_gives_the_same_bytes(
    tmp_path: Path, killed: Callable[[Recipe, Path], None], optimizer: str
) -> None:
    recipe = replace(RECIPE, optimizer=optimizer)
    history = train(recipe, tmp_path / "whole")
    killed(recipe, tmp_path / "killed")
    for name in ("best.safetensors", "state.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "killed" / name)
    assert [cycle["epochs"] for cycle in history] == [2, 3]


def test_a_run_that_is_done_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(RECIPE, tmp_path)
    monkeypatch.setattr(training, "_epoch", None)
    assert train(RECIPE, tmp_path) == first


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(replace(RECIPE, seed=seed, cycles=(1,)), tmp_path / str(seed))
    assert not same(tmp_path / "0" / "best.safetensors", tmp_path / "1" / "best.safetensors")


def test_cycles_end_where_one_brings_too_little(tmp_path: Path) -> None:
    history = train(replace(RECIPE, cycles=(1, 1, 1, 1), enough=100.0), tmp_path)
    assert len(history) == 2


def test_the_best_cycle_is_kept_and_the_record_tells_both_precisions(tmp_path: Path) -> None:
    history = train(RECIPE, tmp_path / "state")
    record = finish(RECIPE, tmp_path / "state", tmp_path / "small.safetensors")
    assert record == json.loads((tmp_path / "small.json").read_text())
    assert record["cycles"] == history
    assert record["float32"]["select"] == max(cycle["select"] for cycle in history)
    assert record["bytes"] == (tmp_path / "small.safetensors").stat().st_size
    stored = load_file(tmp_path / "small.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16, torch.int64}
    network = restore(small(), stored)
    assert not network.training
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert accuracy(network, ROLES.certify, RECIPE) == record["float16"]["certify"]


def test_training_learns(tmp_path: Path) -> None:
    history = train(replace(RECIPE, cycles=(8,), augment=None), tmp_path)
    assert history[0]["select"] > 0.6


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [share(step, 200) for step in range(200)]
    peak = rates.index(max(rates))
    assert max(rates) == 1.0
    assert rates[:20] == sorted(rates[:20])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_images_are_enlarged_for_mobilenet() -> None:
    samples = [(torch.full((3, 32, 32), float(value)), torch.tensor(value)) for value in range(2)]
    images, labels = mobilenet_cifar10.collate(samples)
    assert (images.shape, labels.tolist()) == ((2, 3, 96, 96), [0, 1])
    assert torch.equal(images[1], torch.ones(3, 96, 96))


@pytest.mark.parametrize("module", [lenet_mnist, lenet5_mnist, resnet20_cifar10, mobilenet_cifar10])
def test_a_committed_checkpoint_loads_and_tells_its_accuracy(module: object) -> None:
    weights: Path = module.WEIGHTS  # type: ignore[attr-defined]
    if not weights.exists():
        assert not weights.with_suffix(".json").exists()
        return
    network = module.model()  # type: ignore[attr-defined]
    assert not network.training
    assert all(bool(torch.isfinite(p).all()) for p in network.parameters())
    record = json.loads(weights.with_suffix(".json").read_text())
    assert record["float16"]["certify"] == pytest.approx(record["float32"]["certify"], abs=0.001)
    assert record["bytes"] == weights.stat().st_size < 2_000_000


def test_lenet_is_as_good_as_the_comparison_needs() -> None:
    record = json.loads(lenet_mnist.WEIGHTS.with_suffix(".json").read_text())
    assert record["float16"]["certify"] >= 0.982


def test_each_fold_of_the_lstm_has_a_seed_of_its_own() -> None:
    seeds = {lstm_fsdd.recipe(speaker).seed for speaker in lstm_fsdd.SPEAKERS}
    assert seeds == set(range(6))
