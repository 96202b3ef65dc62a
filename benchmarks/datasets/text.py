"""WikiText-2, its validation and test texts, as windows of word indices for language models."""

from collections import Counter
from functools import cache

import numpy as np
import torch
from benchmarks.datasets.archives import Source, read
from torch import Tensor
from torch.utils.data import TensorDataset

WIKITEXT2 = Source(
    name="wikitext2-valid-test.zip",
    digest="365eedfbc05b7b0742450dcb94c0558555ec0e0944198a68ff60f38a8f848142",
    holds="valid.txt and test.txt",
    origin="Merity et al., https://arxiv.org/abs/1609.07843",
)
CONTEXT, LEAST = 128, 10
"""Words of a window, and how often a word must stand in the validation text to be one of the vocabulary."""
CALIBRATE = 128
"""Windows of the validation text, evenly spread, that are set aside."""


@cache
def wikitext2() -> tuple[dict[str, TensorDataset], int]:
    """Return windows by role and the size of the vocabulary; samples are words `[128]` and the words behind each.

    Train and calibrate are WikiText-2's validation text (217,646 words with ends of lines), test is its test text.
    Words are those that the validation text has ten times or more; all others are one, the index 0.

    Raises:
        DataError: if the archive is missing, damaged or another one.
    """
    members = read(WIKITEXT2)
    texts = {name: _words(members[f"{name}.txt"].decode("utf-8")) for name in ("valid", "test")}
    counts = Counter(texts["valid"])
    known = sorted((word for word, count in counts.items() if count >= LEAST and word != "<unk>"))
    index = {word: place for place, word in enumerate(known, 1)}
    windows = {name: _windows([index.get(word, 0) for word in words]) for name, words in texts.items()}
    inputs, targets = windows["valid"]
    aside = torch.zeros(len(inputs), dtype=torch.bool)
    aside[torch.linspace(0, len(inputs) - 1, CALIBRATE).round().long()] = True
    return {
        "train": TensorDataset(inputs[~aside], targets[~aside]),
        "calibrate": TensorDataset(inputs[aside], targets[aside]),
        "test": TensorDataset(*windows["test"]),
    }, len(known) + 1


def _words(text: str) -> list[str]:
    return [word for line in text.splitlines() for word in (*line.split(), "<eos>")]


def _windows(words: list[int]) -> tuple[Tensor, Tensor]:
    count = (len(words) - 1) // CONTEXT
    stream = torch.from_numpy(np.asarray(words[: count * CONTEXT + 1], dtype=np.int64))
    return stream[:-1].view(count, CONTEXT), stream[1:].view(count, CONTEXT)
