"""FSDD, spoken digits, as log-mel sequences, one speaker left out at a time."""

import io
import wave
from functools import cache
from typing import Any

import numpy as np
import torch
from benchmarks.datasets.archives import Source, read
from benchmarks.datasets.roles import Roles, make_roles
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from trimpoint.errors import DataError, UnknownNameError, suggest

FSDD = Source(
    name="fsdd.zip",
    digest="28efb44718ad4037b0cf1d720eec498ae22edbb0d5df4ac78660f33f090adbbc",
    holds="3,000 recordings: recordings/<digit>_<speaker>_<index>.wav",
    origin="https://github.com/Jakobovski/free-spoken-digit-dataset",
)
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
RATE = 8_000
"""Samples in a second."""
WINDOW, HOP, FFT = 200, 80, 512
"""Samples: windows of 25 ms every 10 ms, padded with zeros for the transform."""
MELS = 40
FLOOR = 1e-6
"""Energies below this share of a recording's highest one (60 dB) count as this share."""
FRAMES = 64
"""Frames of a sequence, 0.66 s: one recording in twenty is longer."""
SCALE = 2.5
"""About the standard deviation of the features, by which they are divided."""


def fsdd(speaker: str) -> Roles:
    """Return the fold of FSDD that leaves out a speaker: log-mel sequences `[64, 40]`, float32, and digits.

    The 2,500 recordings of the other five speakers are shared out as `train` 2,050, `select` 250 and `calibrate` 200,
    digits and speakers evenly; `certify` are the 500 of the speaker who was left out. The six folds together certify
    on all 3,000 recordings, each by a network that has never heard its speaker.

    Args:
        speaker: one of `SPEAKERS`.

    Raises:
        UnknownNameError: if there is no such speaker.
        DataError: if `fsdd.zip` is missing, damaged or another one.
    """
    if speaker not in SPEAKERS:
        raise UnknownNameError(f"FSDD has no speaker {speaker!r}.", suggest(speaker, SPEAKERS))
    features, digits, speakers = _features()
    out = speakers == SPEAKERS.index(speaker)
    return make_roles(
        features[~out],
        digits[~out],
        {"select": 250, "calibrate": 200},
        (features[out], digits[out]),
        strata=(digits * len(SPEAKERS) + speakers)[~out],
    )


@cache
def _features() -> tuple[Tensor, Tensor, Tensor]:
    """Return features `[3000, 64, 40]`, digits and speakers' indices of all recordings, in the order of their names."""
    rows, digits, speakers = [], [], []
    for name, content in read(FSDD).items():
        digit, speaker, _ = name.rpartition("/")[2].split("_")
        rows.append(sequence(log_mel(samples(content, name))))
        digits.append(int(digit))
        speakers.append(SPEAKERS.index(speaker))
    return torch.from_numpy(np.stack(rows)), torch.tensor(digits), torch.tensor(speakers)


def samples(content: bytes, name: str) -> NDArray[np.float64]:
    """Return the samples of a WAV file, in [−1, 1).

    Raises:
        DataError: if it is not mono, 16 bits, 8 kHz.
    """
    with wave.open(io.BytesIO(content)) as file:
        kind = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        if kind != (1, 2, RATE):
            raise DataError(f"{name} must have 1 channel, 2 bytes a sample, {RATE} samples a second. Got {kind}.")
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768.0


def mel(hertz: Any) -> Any:
    """Return a frequency on the mel scale, 2595 · log10(1 + f / 700), as O'Shaughnessy (1987) has it.

    Example:
        >>> round(float(mel(1000)), 1)
        1000.0
    """
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


@cache
def filters(count: int = MELS) -> NDArray[np.float64]:
    """Return triangular filters of height 1, evenly spaced in mel from 0 to 4,000 Hz: `[count, FFT / 2 + 1]`."""
    edges = np.linspace(0.0, mel(RATE / 2), count + 2)[:, None]
    at = mel(np.fft.rfftfreq(FFT, 1 / RATE))
    rising = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    triangles: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    return triangles


def log_mel(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithms of the energies in mel bands.

    Windows of 25 ms (Hann) every 10 ms, squared magnitudes of their Fourier transform, 40 triangular filters, natural
    logarithm, nothing lower than 60 dB below the highest energy of the recording.

    Args:
        signal: samples at 8 kHz, at least 200.

    Returns:
        `[1 + (samples − 200) // 80, 40]`.

    Raises:
        DataError: if the signal is shorter than a window, or silent.
    """
    if len(signal) < WINDOW or not np.any(signal):
        raise DataError(f"A recording must have at least {WINDOW} samples that are not all zero. Got {len(signal)}.")
    frames = np.lib.stride_tricks.sliding_window_view(signal, WINDOW)[::HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    energy: NDArray[np.float64] = np.abs(np.fft.rfft(frames * hann, FFT)) ** 2 @ filters().T
    logarithm: NDArray[np.float64] = np.log(np.maximum(energy, FLOOR * energy.max()))
    return logarithm


def sequence(features: NDArray[np.float64]) -> NDArray[np.float32]:
    """Bring features `[frames, 40]` to `[64, 40]`, each band's mean over the recording removed, divided by `SCALE`.

    Of a longer recording the 64 frames with the highest sum stay; a shorter one is followed by zeros.
    """
    if len(features) > FRAMES:
        sums = np.convolve(features.sum(1), np.ones(FRAMES), "valid")
        start = int(sums.argmax())
        features = features[start : start + FRAMES]
    level = (features - features.mean(0)) / SCALE
    return np.pad(level, ((0, FRAMES - len(level)), (0, 0))).astype(np.float32)


def vary_speech(inputs: Tensor, targets: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
    """Change speed, pitch, position and loudness of each sequence, and hide some bands and frames.

    Time and frequency axes are stretched by up to a fifth and a tenth, shifted by up to 4 frames and 2 bands, values
    are scaled by up to a tenth, and one run of up to 6 frames and one of up to 5 bands become zero.

    Args:
        inputs: `[batch, frames, bands]`; not changed.
        targets: returned as they are.
        generator: source of the random numbers.

    References:
        Park et al., "SpecAugment" (2019); Jaitly and Hinton, "Vocal tract length perturbation" (2013).
    """
    n, frames, bands = inputs.shape

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=generator)

    time = torch.arange(frames) * draw(0.8, 1.2) + draw(-4, 4)
    band = torch.arange(bands) * draw(0.9, 1.1) + draw(-2, 2)
    grid = torch.stack(
        [
            (2 * band / (bands - 1) - 1)[:, None, :].expand(n, frames, bands),
            (2 * time / (frames - 1) - 1)[:, :, None].expand(n, frames, bands),
        ],
        -1,
    )
    varied = F.grid_sample(inputs.unsqueeze(1), grid, align_corners=True, padding_mode="border").squeeze(1)
    varied = varied * draw(0.9, 1.1).unsqueeze(2)
    hidden_frames = _run(frames, draw(0, frames), draw(0, 6))[:, :, None]
    hidden_bands = _run(bands, draw(0, bands), draw(0, 5))[:, None, :]
    return varied.masked_fill(hidden_frames | hidden_bands, 0.0), targets


def _run(length: int, start: Tensor, size: Tensor) -> Tensor:
    at = torch.arange(length)
    return (at >= start) & (at < start + size)
