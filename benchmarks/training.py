"""Train a starting point: cosine cycles, each twice as long, until one no longer helps; a killed run goes on.

After each epoch everything that the next one depends on is written in one piece: a run that was killed gives the same
bytes as one that was not, on the same machine and number of threads. After each cycle the model is compared on
`select`, and the best is kept. The test data is scored once, by `finish`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from benchmarks.datasets import Roles
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from trimpoint.recover.layout import suits_channels_last

Augment = Callable[[Tensor, Any, torch.Generator], tuple[Tensor, Any]]
STATE = Path("runs/checkpoints")


def _as_they_are(inputs: Tensor) -> Tensor:
    return inputs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a checkpoint is made.

    Args:
        build: the untrained network; its weights depend on torch's seed only.
        data: what it is trained on.
        cycles: epochs of each cycle; they end early where one brings less than `enough`.
        lr: the highest learning rate, reached after a tenth of a cycle.
        optimizer: SGD with Nesterov momentum, or AdamW.
        weight_decay: on weights; norms and biases are spared.
        batch: samples in a step.
        augment: of training batches.
        prepare: what is done to a batch of inputs before the network sees it, after `augment`.
        smoothing: of the labels.
        precision: of the forward pass; parameters stay float32. bfloat16 holds where the processor computes in it.
        enough: points of accuracy on `select` that a cycle must bring for another one to follow.
        seed: of weights, order and augmentation.
    """

    build: Callable[[], nn.Module]
    data: Callable[[], Roles]
    cycles: tuple[int, ...]
    lr: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    batch: int = 128
    augment: Augment | None = None
    prepare: Callable[[Tensor], Tensor] = _as_they_are
    smoothing: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    enough: float = 0.3
    seed: int = 0


@dataclass
class _Progress:
    """What a run has done: whole cycles, whole epochs of the one under way, and what the cycles brought."""

    cycle: int = 0
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> float:
        return max((cycle["select"] for cycle in self.history), default=0.0)


def accuracy(model: nn.Module, data: TensorDataset, recipe: Recipe, batch: int = 500) -> float:
    """Return the share of samples that `model` labels correctly."""
    model.eval()
    x, y = data.tensors
    with torch.inference_mode():
        answers = torch.cat([model(recipe.prepare(part)).argmax(-1) for part in torch.split(x, batch)])
    return int((answers == y).sum()) / len(y)


def has_bfloat16() -> bool:
    """Return whether the processor computes in bfloat16; elsewhere it is emulated slowly, and LSTM layers refuse it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def train(recipe: Recipe, state: Path, roles: Roles | None = None) -> list[dict[str, Any]]:
    """Train in cycles, from where an earlier run stopped; the best weights are `best.safetensors` in `state`.

    Args:
        recipe: what to do.
        state: directory of what must not be lost.
        roles: the recipe's data, where it was read already.

    Returns:
        for each cycle its epochs and its accuracy on `select`.
    """
    state.mkdir(parents=True, exist_ok=True)
    roles = roles or recipe.data()
    torch.manual_seed(recipe.seed)
    model = recipe.build()
    if suits_channels_last(model):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    done = _Progress()
    optimizer = _optimizer(model, recipe)
    _restore(state / "state.safetensors", model, optimizer, done)
    while done.cycle < len(recipe.cycles) and not _enough(recipe, done):
        if done.epoch == 0:
            optimizer = _optimizer(model, recipe)
        epochs = recipe.cycles[done.cycle]
        while done.epoch < epochs:
            started = time.perf_counter()
            loss = _epoch(model, optimizer, recipe, roles.train, done)
            done.epoch += 1
            seconds = time.perf_counter() - started
            print(f"cycle {done.cycle + 1} epoch {done.epoch}/{epochs}  loss {loss:.4f}  {seconds:.0f} s", flush=True)
            if done.epoch < epochs:
                _keep(state / "state.safetensors", model, optimizer, done)
        score = accuracy(model, roles.select, recipe)
        print(f"cycle {done.cycle + 1}: select {score:.4f} (best before {done.best:.4f})", flush=True)
        if score > done.best:
            _write(state / "best.safetensors", _contiguous(model.state_dict()))
        done.history.append({"epochs": epochs, "select": score})
        done.cycle, done.epoch = done.cycle + 1, 0
        _keep(state / "state.safetensors", model, optimizer, done)
    return done.history


def _enough(recipe: Recipe, done: _Progress) -> bool:
    """Whether the last cycle brought too little over all before it."""
    if len(done.history) < 2:
        return False
    before = max(cycle["select"] for cycle in done.history[:-1])
    return bool((done.history[-1]["select"] - before) * 100 < recipe.enough)


def _epoch(model: nn.Module, optimizer: Any, recipe: Recipe, data: TensorDataset, done: _Progress) -> float:
    """Train for one epoch and return its mean loss."""
    seed = int(np.random.SeedSequence([recipe.seed, done.cycle, done.epoch]).generate_state(1)[0])
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = data.tensors
    batches = torch.split(torch.randperm(len(y), generator=generator), recipe.batch)
    total, start = recipe.cycles[done.cycle] * len(batches), done.epoch * len(batches)
    suited = suits_channels_last(model)
    model.train()
    losses = 0.0
    for step, index in enumerate(batches, start):
        inputs, targets = x[index], y[index]
        if recipe.augment is not None:
            inputs, targets = recipe.augment(inputs, targets, generator)
        inputs = recipe.prepare(inputs)
        if inputs.dim() == 4 and suited:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * share(step, total)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16" and has_bfloat16()):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses += loss.item()
    return losses / len(batches)


def share(step: int, total: int, warmup: float = 0.1) -> float:
    """Return the share of the learning rate at a step of a cycle: linear rise, then cosine decay towards zero.

    Example:
        >>> [round(share(step, 100), 2) for step in (0, 9, 54, 99)]
        [0.1, 1.0, 0.5, 0.0]
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - rise) / (total - rise)))


def _optimizer(model: nn.Module, recipe: Recipe) -> Any:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _keep(path: Path, model: nn.Module, optimizer: Any, done: _Progress) -> None:
    """Write everything that the next epoch depends on."""
    tensors = {f"model.{name}": tensor for name, tensor in _contiguous(model.state_dict()).items()}
    for index, values in optimizer.state_dict()["state"].items():
        held = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in _contiguous(held).items()}
    _write(path, tensors, {"cycle": str(done.cycle), "epoch": str(done.epoch), "history": json.dumps(done.history)})


def _restore(path: Path, model: nn.Module, optimizer: Any, done: _Progress) -> None:
    """Go back to what `_keep` wrote, if anything."""
    if not path.exists():
        return
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    tensors = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            states.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    done.cycle, done.epoch, done.history = int(kept["cycle"]), int(kept["epoch"]), json.loads(kept["history"])


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata)
    part.chmod(0o644)
    part.replace(path)


def halve(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return floating-point tensors as float16; others as they are."""
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


def restore(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Load weights, stored in float16 or float32, into a float32 model and return it in evaluation mode."""
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    return model.eval()


def finish(recipe: Recipe, state: Path, out: Path, roles: Roles | None = None) -> dict[str, Any]:
    """Write the best weights in float16 to `out`, score them and the float32 ones, and write the record beside them.

    Args:
        recipe: how they were made.
        state: where `train` left them.
        out: the checkpoint, `*.safetensors`; the record is `*.json`.
        roles: the recipe's data, where it was read already.
    """
    roles = roles or recipe.data()
    whole = load_file(state / "best.safetensors")
    done = _Progress()
    with safe_open(state / "state.safetensors", "pt") as file:
        done.history = json.loads(file.metadata()["history"])
    torch.manual_seed(recipe.seed)
    model = recipe.build()
    record: dict[str, Any] = {"cycles": done.history, "seed": recipe.seed}
    for kind, tensors in (("float32", whole), ("float16", halve(whole))):
        restore(model, tensors)
        record[kind] = {
            "select": accuracy(model, roles.select, recipe),
            "certify": accuracy(model, roles.certify, recipe),
        }
    _write(out, halve(whole))
    record["bytes"] = out.stat().st_size
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def main(recipe: Recipe, name: str, description: str | None) -> None:
    """Train and finish a checkpoint from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("train", "finish"), help="train, or write what there is; by default both")
    parser.add_argument("--state", type=Path, default=STATE / name, help="where a killed run goes on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoints" / f"{name}.safetensors")
    parser.add_argument("--threads", type=int, default=1, help="the weights depend on it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    roles = recipe.data()
    if options.only != "finish":
        train(recipe, options.state, roles)
    if options.only != "train":
        print(json.dumps(finish(recipe, options.state, options.out, roles), indent=1))
