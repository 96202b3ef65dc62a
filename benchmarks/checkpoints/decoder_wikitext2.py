"""A small decoder on WikiText-2: the checkpoint, and how it is made.

TRIMPOINT_DATA=data python -m benchmarks.checkpoints.decoder_wikitext2    # a quarter of an hour on one core
"""

import json
import math
import time
from pathlib import Path

import torch
from benchmarks.datasets.text import wikitext2
from benchmarks.models.decoder import Decoder
from benchmarks.training import halve, restore
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

WEIGHTS = Path(__file__).with_suffix(".safetensors")
EPOCHS, BATCH, LR, DECAY, SEED = 6, 8, 3e-3, 0.1, 0


def model() -> nn.Module:
    """Return the trained network, in evaluation mode."""
    return restore(Decoder(wikitext2()[1]), load_file(WEIGHTS))


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits `[batch, positions, words]`."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@torch.inference_mode()
def perplexity(network: nn.Module, data: TensorDataset, batch: int = 32) -> float:
    """Return the perplexity per word, each window on its own."""
    pieces = zip(*(torch.split(tensor, batch) for tensor in data.tensors), strict=True)
    total = sum(float(loss(network(x), y)) * y.numel() for x, y in pieces)
    return math.exp(total / data.tensors[1].numel())


def train() -> nn.Module:
    """Return a network trained from its seed: AdamW, one cosine cycle after a short rise."""
    roles, words = wikitext2()
    torch.manual_seed(SEED)
    network, (x, y) = Decoder(words), roles["train"].tensors
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=DECAY, betas=(0.9, 0.95))
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    for epoch in range(EPOCHS):
        started, total = time.perf_counter(), 0.0
        for part in torch.split(torch.randperm(len(x)), BATCH):
            value = loss(network.train()(x[part]), y[part])
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(value.detach()) * len(part)
        print(f"epoch {epoch + 1}: loss {total / len(x):.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return network.eval()


def main() -> None:
    """Train, write the weights in float16 and the record beside them."""
    torch.set_num_threads(1)
    network = train()
    save_file(halve({name: tensor.contiguous() for name, tensor in network.state_dict().items()}), WEIGHTS)
    roles = wikitext2()[0]
    record = {"epochs": EPOCHS, "seed": SEED, "bytes": WEIGHTS.stat().st_size}
    record |= {f"perplexity_{role}": perplexity(model(), roles[role]) for role in ("calibrate", "test")}
    WEIGHTS.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
