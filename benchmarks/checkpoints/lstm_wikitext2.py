"""An LSTM language model on WikiText-2: the checkpoint, and how it is made.

    TRIMPOINT_DATA=data python -m benchmarks.checkpoints.lstm_wikitext2    # a quarter of an hour on one core

The windows and words are those of `decoder_wikitext2`.
"""

import json
import time
from pathlib import Path

import torch
from benchmarks.checkpoints.decoder_wikitext2 import loss, perplexity
from benchmarks.datasets.text import wikitext2
from benchmarks.models.lstm import LstmLanguageModel
from benchmarks.training import halve, restore, share
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = Path(__file__).with_suffix(".safetensors")
EPOCHS, BATCH, LR, DECAY, SEED = 7, 8, 3e-3, 0.02, 0


def model() -> nn.Module:
    """Return the trained network, in evaluation mode."""
    weights = load_file(WEIGHTS)
    return restore(LstmLanguageModel(wikitext2()[1]), weights | {"head.weight": weights["words.weight"]})


def train() -> nn.Module:
    """Return a network trained from its seed: AdamW, one cosine cycle after a short rise."""
    roles, words = wikitext2()
    torch.manual_seed(SEED)
    network, (x, y) = LstmLanguageModel(words), roles["train"].tensors
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=DECAY, betas=(0.9, 0.95))
    steps = EPOCHS * -(-len(x) // BATCH)
    step = 0
    for epoch in range(EPOCHS):
        started, total = time.perf_counter(), 0.0
        for part in torch.split(torch.randperm(len(x)), BATCH):
            for group in optimizer.param_groups:
                group["lr"] = LR * share(step, steps)
            value = loss(network.train()(x[part]), y[part])
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            step += 1
            total += float(value.detach()) * len(part)
        held = perplexity(network.eval(), roles["calibrate"])
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}: loss {total / len(x):.3f}, held out {held:.1f}, {seconds:.0f} s", flush=True)
    return network.eval()


def main() -> None:
    """Train, write the weights in float16 and the record beside them."""
    torch.set_num_threads(1)
    network = train()
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items() if name != "head.weight"}
    save_file(halve(tensors), WEIGHTS)
    roles = wikitext2()[0]
    record = {"epochs": EPOCHS, "seed": SEED, "bytes": WEIGHTS.stat().st_size}
    record |= {f"perplexity_{role}": perplexity(model(), roles[role]) for role in ("calibrate", "test")}
    WEIGHTS.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
