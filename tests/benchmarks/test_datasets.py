"""Roles, loaders and features of the benchmarks' data, on tiny archives made up here."""

import hashlib
import io
import struct
import wave
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.datasets import (
    SPEAKERS,
    archives,
    cifar10,
    crop_and_flip,
    fsdd,
    images,
    mnist,
    roles,
    speech,
    vary_speech,
)

from trimpoint.errors import DataError, UnknownNameError

Pack = Callable[[archives.Source, dict[str, bytes]], None]
ROLES = ("train", "calibrate", "select", "certify")


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pack:
    """Write an archive that passes for the real one; every real place is out of sight."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("TRIMPOINT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(source: archives.Source, members: dict[str, bytes]) -> None:
        with zipfile.ZipFile(tmp_path / "data" / source.name, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        module, constant = {"mnist": (images, "MNIST"), "cifar10-jpeg": (images, "CIFAR10"), "fsdd": (speech, "FSDD")}[
            Path(source.name).stem
        ]
        monkeypatch.setattr(module, constant, replace(source, digest=archives.content_digest(members)))
        speech._features.cache_clear()

    yield write
    speech._features.cache_clear()


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def jpeg(shade: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new(mode, size, (shade,) * 3 if mode == "RGB" else shade).save(buffer, "jpeg")
    return buffer.getvalue()


def wav(signal: np.ndarray, rate: int = 8_000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((signal * 32_767).astype("<i2").tobytes())
    return buffer.getvalue()


def small_mnist(n: int = 60_000) -> dict[str, bytes]:
    """Return MNIST's files with the index of each image in its first four pixels."""
    members = {}
    for prefix, count in (("train", n), ("t10k", 10)):
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:, 0, :4] = np.frombuffer(np.arange(count, dtype="<u4").tobytes(), np.uint8).reshape(-1, 4)
        members[f"{prefix}-images-idx3-ubyte"] = idx(pixels)
        members[f"{prefix}-labels-idx1-ubyte"] = idx((np.arange(count) % 10).astype(np.uint8))
    return members


# Roles


def test_roles_are_disjoint_and_complete() -> None:
    labels = np.arange(1_000) % 7
    parts = roles.even_split(labels, {"select": 100, "calibrate": 30})
    assert {role: len(part) for role, part in parts.items()} == {"select": 100, "calibrate": 30, "train": 870}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1_000))


@pytest.mark.parametrize("seed", range(5))
def test_every_class_has_its_share_of_every_role(seed: int) -> None:
    labels = np.random.default_rng(seed).choice(5, 2_000, p=[0.05, 0.1, 0.15, 0.3, 0.4])
    parts = roles.even_split(labels, {"select": 200, "calibrate": 100}, seed)
    for part in parts.values():
        fair = np.bincount(labels, minlength=5) * len(part) / len(labels)
        assert np.abs(np.bincount(labels[part], minlength=5) - fair).max() < 2


def test_the_order_is_random_and_always_the_same() -> None:
    parts = roles.even_split(np.arange(1_000) % 10, {"select": 100})
    digests = {role: hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:16] for role, part in parts.items()}
    assert digests == {"select": "7771aca9f5de8381", "train": "c3e35ffcc8734551"}
    assert not np.array_equal(parts["select"], np.sort(parts["select"]))
    other = roles.even_split(np.arange(1_000) % 10, {"select": 100}, seed=1)
    assert not np.array_equal(parts["select"], other["select"])


# MNIST


def test_mnist_is_shared_out_and_its_test_set_kept_in_order(pack: Pack) -> None:
    pack(images.MNIST, small_mnist())
    found = mnist()
    assert [len(getattr(found, role)) for role in ROLES] == [54_000, 1_000, 5_000, 10]
    assert found.certify.tensors[1].tolist() == list(range(10))
    indices = []
    for role in ("train", "calibrate", "select"):
        x, y = getattr(found, role).tensors
        pixels = (x[:, 0, 0, :4] * images.MNIST_STD + images.MNIST_MEAN).mul(255).round().long()
        index = (pixels * torch.tensor([1, 256, 65_536, 16_777_216])).sum(1)
        assert torch.equal(index % 10, y), "an image keeps its label"
        assert torch.bincount(y).tolist() == [len(y) // 10] * 10
        indices.append(index)
    assert torch.equal(torch.cat(indices).sort().values, torch.arange(60_000))


def test_the_task_has_all_roles_and_no_sample_twice(pack: Pack) -> None:
    pack(images.MNIST, small_mnist())
    task = mnist().task(batch_size=32)
    assert (task.score.name, task.batch_size, task.loss is not None) == ("accuracy", 32, True)
    assert [len(task.data(role)) for role in ROLES] == [54_000, 1_000, 5_000, 10]
    again = mnist().task()
    assert task.fingerprint("calibrate") == again.fingerprint("calibrate")


def test_a_missing_archive_says_what_to_put_where(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mnist\.zip must lie in") as raised:
        mnist()
    assert str(tmp_path / "data") in str(raised.value)
    assert "set TRIMPOINT_DATA to it" in str(raised.value.hint)
    assert "train-images-idx3-ubyte" in str(raised.value.hint)


def test_another_archive_is_not_taken(pack: Pack, tmp_path: Path) -> None:
    pack(images.MNIST, small_mnist(100))
    with zipfile.ZipFile(tmp_path / "data" / "mnist.zip", "a") as archive:
        archive.writestr("more", b"1")
    with pytest.raises(DataError, match="holds something else"):
        mnist()


def test_a_damaged_archive_is_not_taken(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "data" / "mnist.zip").write_bytes(b"PK no archive")
    with pytest.raises(DataError, match="cannot be read"):
        mnist()


def test_the_digest_is_of_the_content_not_of_the_packing() -> None:
    members = {"a": b"12", "b": b"3"}
    assert archives.content_digest(members) == archives.content_digest(dict(reversed(members.items())))
    assert archives.content_digest(members) != archives.content_digest({"a": b"1", "b": b"23"})


# CIFAR-10


def small_cifar() -> dict[str, bytes]:
    """Return 60 images, six of a class: five to train on and one to test; a class's shade is 20 times its index."""
    return {
        f"{part}/{label}/{index:04d}.jpg": jpeg(20 * position)
        for position, label in enumerate(images.CIFAR10_CLASSES)
        for part, count in (("train", 5), ("test", 1))
        for index in range(count)
    }


def test_cifar10_is_decoded_labelled_and_kept(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(images.CIFAR10, small_cifar())
    arrays = archives.decoded(images.CIFAR10, images.decode_cifar10)
    assert arrays["train_images"].shape == (50, 32, 32, 3)
    assert arrays["test_labels"].tolist() == list(range(10))
    shades = arrays["train_images"].reshape(50, -1).mean(1)
    assert np.abs(shades - 20 * arrays["train_labels"]).max() <= 1

    def decode(_: object) -> archives.Arrays:
        raise AssertionError("it was decoded a second time")

    (tmp_path / "data" / "cifar10-jpeg.zip").unlink()
    again = archives.decoded(images.CIFAR10, decode)
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
    kept = next((tmp_path / "cache").rglob("*.npz"))
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 255
    kept.write_bytes(content)
    with pytest.raises(DataError, match=r"cifar10-jpeg\.zip must lie in"):
        archives.decoded(images.CIFAR10, decode)


def test_cifar10_gives_normalised_images(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat(np.arange(10), 610)
    shades = (20 * labels).astype(np.uint8)
    pixels = np.tile(shades[:, None, None, None], (1, 32, 32, 3))
    arrays = {"train_images": pixels, "train_labels": labels, "test_images": pixels[:5], "test_labels": labels[:5]}
    monkeypatch.setattr(images, "decoded", lambda source, decode: arrays)
    found = cifar10()
    assert [len(getattr(found, role)) for role in ROLES] == [100, 1_000, 5_000, 5]
    x, y = found.select.tensors
    assert (x.shape[1:], x.dtype, x.is_contiguous()) == ((3, 32, 32), torch.float32, True)
    assert torch.bincount(y).tolist() == [500] * 10
    mean, std = torch.tensor(images.CIFAR10_MEAN), torch.tensor(images.CIFAR10_STD)
    expected = (y[:, None] * 20 / 255 - mean) / std
    assert torch.allclose(x.mean((2, 3)), expected, atol=1e-5)


@pytest.mark.parametrize("wrong", [jpeg(1, (31, 32)), jpeg(1, mode="L")])
def test_an_image_of_another_kind_is_refused(wrong: bytes) -> None:
    with pytest.raises(DataError, match="must be RGB, 32 × 32 pixels"):
        images.decode_cifar10({"train/cat/0000.jpg": wrong})


def test_crop_and_flip_moves_pixels_and_fills_with_zeros() -> None:
    x = torch.arange(1, 1 + 64 * 64, dtype=torch.float32).view(64, 1, 8, 8)
    kept = x.clone()
    varied, targets = crop_and_flip(x, "labels", torch.Generator().manual_seed(0), pad=2)
    assert targets == "labels"
    assert torch.equal(x, kept)
    flipped = 0
    for before, after in zip(x[:, 0], varied[:, 0], strict=True):
        candidates = {
            (dy, dx, flip): torch.nn.functional.pad(before, (2, 2, 2, 2))[dy : dy + 8, dx : dx + 8]
            for dy in range(5)
            for dx in range(5)
            for flip in (False, True)
        }
        match = [key for key, image in candidates.items() if torch.equal(image.flip(1) if key[2] else image, after)]
        assert len(match) == 1
        flipped += match[0][2]
    assert 16 < flipped < 48


# FSDD


def small_fsdd(each: int = 2) -> dict[str, bytes]:
    """Return recordings of all digits and speakers: noise of 0.1 to 1 second."""
    rng = np.random.default_rng(0)
    return {
        f"recordings/{digit}_{speaker}_{index}.wav": wav(rng.uniform(-0.5, 0.5, int(rng.integers(800, 8_000))))
        for digit in range(10)
        for speaker in SPEAKERS
        for index in range(each)
    }


def test_a_fold_certifies_on_the_speaker_it_leaves_out(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(speech.FSDD, small_fsdd(10))
    found = fsdd("theo")
    assert [len(getattr(found, role)) for role in ROLES] == [50, 200, 250, 100]
    assert found.certify.tensors[0].shape == (100, 64, 40)
    assert torch.bincount(found.certify.tensors[1]).tolist() == [10] * 10
    assert torch.bincount(found.select.tensors[1]).tolist() == [25] * 10
    rows = {role: {row.numpy().tobytes() for row in getattr(found, role).tensors[0]} for role in ROLES}
    assert sum(map(len, rows.values())) == len(set.union(*rows.values())) == 600
    features, _, speakers = speech._features()
    theirs = {row.numpy().tobytes() for row in features[speakers == SPEAKERS.index("theo")]}
    assert rows["certify"] == theirs
    pooled = torch.cat([fsdd(speaker).certify.tensors[0] for speaker in SPEAKERS])
    assert {row.numpy().tobytes() for row in pooled} == {row.numpy().tobytes() for row in features}


def test_an_unknown_speaker_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="no speaker 'teho'") as raised:
        fsdd("teho")
    assert "theo" in str(raised.value.hint)


def test_a_recording_of_another_rate_is_refused() -> None:
    with pytest.raises(DataError, match="8000 samples a second"):
        speech.samples(wav(np.zeros(400), rate=16_000), "a.wav")


def test_samples_are_read_as_they_were_written() -> None:
    signal = np.sin(np.arange(400) / 7) / 2
    assert np.abs(speech.samples(wav(signal), "a.wav") - signal).max() < 1e-4


# Features


def test_log_mel_agrees_with_a_sum_over_the_definition() -> None:
    """Discrete Fourier transform, filters and logarithm written out for a few frames, bands and bins."""
    rng = np.random.default_rng(0)
    signal = np.sin(2 * np.pi * 700 * np.arange(1_000) / 8_000) + 0.1 * rng.standard_normal(1_000)
    found = speech.log_mel(signal)
    assert found.shape == (1 + (1_000 - 200) // 80, 40)
    top = 2595 * np.log10(1 + 4_000 / 700)
    corners = [700 * (10 ** (top * i / 41 / 2595) - 1) for i in range(42)]
    energies = np.zeros((2, 40))
    for row, frame in enumerate((0, 7)):
        n = np.arange(200)
        windowed = signal[80 * frame : 80 * frame + 200] * np.sin(np.pi * n / 200) ** 2
        for k in range(257):
            power = abs(np.sum(windowed * np.exp(-2j * np.pi * k * n / 512))) ** 2
            hertz = k * 8_000 / 512
            at = 2595 * np.log10(1 + hertz / 700)
            for band in range(40):
                low, middle, high = (2595 * np.log10(1 + corners[band + i] / 700) for i in range(3))
                if low < at < high:
                    slope = (at - low) / (middle - low) if at < middle else (high - at) / (high - middle)
                    energies[row, band] += slope * power
    floor = np.exp(found.max()) * 1e-6
    assert np.allclose(found[[0, 7]], np.log(np.maximum(energies, floor)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hertz", [200.0, 440.0, 1_000.0, 2_500.0, 3_500.0])
def test_a_tone_is_loudest_in_the_band_that_is_centred_next_to_it(hertz: float) -> None:
    tone = np.sin(2 * np.pi * hertz * np.arange(2_000) / 8_000)
    centres = np.linspace(0, float(speech.mel(4_000)), 42)[1:-1]
    expected = int(np.abs(centres - float(speech.mel(hertz))).argmin())
    assert set(speech.log_mel(tone).argmax(1).tolist()) == {expected}


def test_every_filter_sees_something_and_their_sum_is_flat() -> None:
    filters = speech.filters()
    assert (filters.max(1) > 0.5).all()
    centres = np.linspace(0, float(speech.mel(4_000)), 42)
    inner = (speech.mel(np.fft.rfftfreq(512, 1 / 8_000)) >= centres[1]) & (
        speech.mel(np.fft.rfftfreq(512, 1 / 8_000)) <= centres[-2]
    )
    assert np.allclose(filters.sum(0)[inner], 1.0)


def test_features_do_not_depend_on_loudness() -> None:
    signal = np.random.default_rng(0).standard_normal(3_000)
    quiet = speech.sequence(speech.log_mel(signal / 50))
    assert np.allclose(speech.sequence(speech.log_mel(signal)), quiet, atol=1e-5)


def test_a_short_recording_is_followed_by_zeros_and_a_long_one_is_cut_to_its_loudest_part() -> None:
    short = speech.sequence(np.random.default_rng(0).standard_normal((20, 40)))
    assert (short.shape, short.dtype) == ((64, 40), np.float32)
    assert (short[20:] == 0).all()
    assert np.allclose(short[:20].mean(0), 0, atol=1e-6)
    long = np.zeros((100, 40))
    long[30:94] = 5 + np.random.default_rng(1).standard_normal((64, 40))
    loud = long[30:94]
    assert np.allclose(speech.sequence(long), (loud - loud.mean(0)) / speech.SCALE, atol=1e-6)


@pytest.mark.parametrize("signal", [np.ones(199), np.zeros(1_000)])
def test_silence_and_less_than_a_window_are_refused(signal: np.ndarray) -> None:
    with pytest.raises(DataError, match="at least 200 samples"):
        speech.log_mel(signal)


def test_speech_is_varied_by_the_generator_only() -> None:
    x = torch.randn(16, 64, 40, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    varied = [vary_speech(x, None, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(x, kept)
    assert varied[0].shape == x.shape
    assert torch.equal(varied[0], varied[1])
    assert not torch.equal(varied[0], varied[2])
    assert torch.isfinite(varied[0]).all()


def test_varied_speech_stays_close_to_what_was_said() -> None:
    """A smooth pattern, stretched and shifted a little, still correlates with itself."""
    time, band = torch.arange(64) / 64, torch.arange(40) / 40
    x = (torch.sin(3 * time)[:, None] * torch.cos(2 * band)[None]).expand(32, 64, 40)
    varied, _ = vary_speech(x, None, torch.Generator().manual_seed(0))
    alike = torch.nn.functional.cosine_similarity(x.flatten(1), varied.flatten(1))
    assert alike.min() > 0.7
    assert alike.max() < 1.0
