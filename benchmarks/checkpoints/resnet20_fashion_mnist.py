"""Train the demo's checkpoint: ResNet-20 on Fashion-MNIST, until more training no longer helps.

Trains in cosine cycles on the demo's `train` role and, after each cycle, compares accuracy on `select`. It stops when
a cycle brings less than `--enough` points. The 10,000 official test images are scored once, at the end. The best
weights and a record are kept after each cycle: a killed run goes on with the cycle that it was in.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from benchmarks.training import has_bfloat16
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trimpoint.demo.fashion_mnist import augment, load_images, split_indices
from trimpoint.demo.resnet import resnet20


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of `images` that `model` labels correctly."""
    model.eval()
    with torch.inference_mode():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return right / len(labels)


def train_cycle(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float, seed: int) -> None:
    """Train `model` in place for one warm-up and cosine decay to zero."""
    generator = torch.Generator().manual_seed(seed)
    batch = 128
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    total = epochs * math.ceil(len(images) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=0.1)
    for epoch in range(epochs):
        model.train()
        started, losses = time.perf_counter(), []
        for index in torch.randperm(len(images), generator=generator).split(batch):
            x = augment(images[index], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
                loss = F.cross_entropy(model(x), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}/{epochs}  loss {sum(losses) / len(losses):.4f}  {seconds:.0f} s", flush=True)


def main() -> None:
    """Run cycles until one no longer helps; write the best checkpoint and a record beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("src/trimpoint/demo/resnet20-fashion-mnist.safetensors"))
    parser.add_argument("--epochs", type=int, default=24, help="of one cycle")
    parser.add_argument("--enough", type=float, default=0.1, help="points on select that a cycle must bring")
    parser.add_argument("--most", type=int, default=8, help="cycles at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images, labels = load_images("train")
    roles = split_indices()
    train, select = roles["train"], roles["select"]
    model = resnet20().to(memory_format=torch.channels_last)
    best, history = 0.0, []
    record = args.out.with_suffix(".json")
    if record.exists():
        history = json.loads(record.read_text())["cycles"]
        best = max(cycle["select_accuracy"] for cycle in history)
        model.load_state_dict(load_file(args.out))
    for cycle in range(len(history), args.most):
        train_cycle(
            model, images[train], labels[train], args.epochs, 0.1 if cycle == 0 else 0.05, args.seed * 100 + cycle
        )
        score = accuracy(model, images[select], labels[select])
        history.append({"epochs": args.epochs, "select_accuracy": score})
        print(f"cycle {cycle + 1}: select {score:.4f} (best before: {best:.4f})", flush=True)
        gained = score - best
        if gained > 0:
            best = score
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.out)
        record.write_text(json.dumps({"cycles": history}, indent=1))
        if gained * 100 < args.enough:
            break
    model.load_state_dict(load_file(args.out))
    test = accuracy(model, *load_images("test"))
    record.write_text(json.dumps({"cycles": history, "test_accuracy": test}, indent=1) + "\n")
    print(f"test {test:.4f}")


if __name__ == "__main__":
    main()
