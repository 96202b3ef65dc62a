"""The demo's task and network."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import trimpoint.demo
from trimpoint.demo import CHECKPOINT, files, model, task
from trimpoint.demo.fashion_mnist import LabelledImages, augment, load_images, split_indices
from trimpoint.demo.resnet import resnet20
from trimpoint.errors import ModelError
from trimpoint.task import Task


@pytest.fixture(scope="module")
def demo() -> Task:
    return task()


def test_roles(demo: Task) -> None:
    sizes = {role: len(demo.data(role)) for role in ("train", "calibrate", "select", "certify")}
    assert sizes == {"train": 53_000, "calibrate": 1_000, "select": 6_000, "certify": 10_000}
    assert demo.batch_size == 128
    assert demo.dynamic_dims() == {"input": {0: "batch"}}


def test_the_split_is_a_partition_and_never_moves() -> None:
    parts = split_indices()
    assert torch.cat(list(parts.values())).sort().values.equal(torch.arange(60_000))
    assert parts["select"][:5].tolist() == [4_013, 23_840, 29_603, 43_011, 58_703]
    assert parts["train"][-3:].tolist() == [48_632, 55_073, 33_375]


def test_certify_is_the_official_test_set_normalised(demo: Task) -> None:
    images, labels = files.read("test")
    image, label = demo.data("certify")[17]
    assert label == labels[17]
    assert image.shape == (1, 28, 28)
    np.testing.assert_allclose(image.numpy()[0] * 0.3530 + 0.2860, images[17] / 255, atol=1e-6)


def test_training_pixels_have_mean_zero_and_deviation_one() -> None:
    x, y = load_images("train")
    assert abs(x.mean().item()) < 1e-3
    assert abs(x.std().item() - 1) < 1e-3
    assert y.bincount().tolist() == [6_000] * 10


def test_augment_flips_and_shifts_and_leaves_its_input() -> None:
    images = torch.rand(64, 1, 9, 11)
    before = images.clone()
    once = augment(images, torch.Generator().manual_seed(3))
    assert once.equal(augment(images, torch.Generator().manual_seed(3)))
    assert images.equal(before)
    padded = F.pad(images, (2, 2, 2, 2), value=images.min().item())
    flipped = padded.flip(3)
    kinds = set()
    for index in range(64):
        found = [
            (source is flipped, down, right)
            for source in (padded, flipped)
            for down in range(5)
            for right in range(5)
            if source[index, :, down : down + 9, right : right + 11].equal(once[index])
        ]
        assert len(found) == 1
        kinds |= set(found)
    assert {flip for flip, _, _ in kinds} == {False, True}
    assert len(kinds) > 20


def test_a_training_batch_is_augmented_and_reproducible() -> None:
    images, labels = torch.rand(40, 1, 28, 28), torch.arange(40) % 10
    small = Task(
        train=LabelledImages(images, labels), augment=trimpoint.demo.fashion_mnist.augment_batch, batch_size=20
    )
    first, again = (list(small.training_batches(5)) for _ in range(2))
    assert len(first) == 2
    assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in zip(first, again, strict=True))
    assert not any(first[0][0][0].equal(image) for image in images)


def test_the_network_has_the_papers_shape() -> None:
    network = resnet20()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 19  # and the head: 20 weighted layers
    assert sum(p.numel() for p in network.parameters()) == 272_186
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_checkpoint_scores_what_its_record_says(demo: Task) -> None:
    record = json.loads(CHECKPOINT.with_suffix(".json").read_text())
    network = model()
    assert not network.training
    images, labels = load_images("train")
    chosen = split_indices()["select"]
    with torch.inference_mode():
        right = sum(int((network(images[part]).argmax(1) == labels[part]).sum()) for part in chosen.split(500))
    assert right / len(chosen) == pytest.approx(max(c["select_accuracy"] for c in record["cycles"]), abs=5e-4)
    assert record["test_accuracy"] >= 0.93


@pytest.mark.parametrize("content", [None, b"", b"\x08" + b"\0" * 30], ids=["missing", "empty", "damaged"])
def test_a_broken_installation_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, content: bytes | None
) -> None:
    path = tmp_path / "x.safetensors"  # type: ignore[operator]
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(trimpoint.demo, "CHECKPOINT", path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        model()
