"""Structure and recovery on MiniLM as a 77-way classifier of Banking77, float32, at the data's own lengths.

What is compressed is the fine-tuned network after eight more epochs, by which it still gained. Beside what structure
makes of it stand the unmodified one trained as long at the same learning rate, and a small one that starts from random
weights and learns from the same teacher. The vocabulary is half of the file and none of the time: one structure is
tried with and without it. Finalists, those that are likely to pass by what they show on `select`, are certified two by
two, the fastest first, until one passes; each look weakens the next. Two more seeds of that one show how much chance is
in its drop.
"""

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.comparison import Comparison, goal, recovered
from safetensors.torch import load_file, save_file
from torch import nn

from trimpoint.compress import Compressed, compress
from trimpoint.filters import parse
from trimpoint.method import Method
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.methods.prune_heads import PruneHeads
from trimpoint.methods.prune_vocabulary import PruneVocabulary
from trimpoint.plan import Plan, Step
from trimpoint.task import Task
from trimpoint.values import Certificate

QUESTION = "How much faster does structure alone make MiniLM on Banking77, at 1.5 points of accuracy?"
EXAMPLES = Path(__file__).parents[2] / "examples"
SEEDS = (0, 1, 2)
ORIGINAL = Finetune(epochs=8.0, lr=2e-4, precision="bfloat16")
RECOVERY = Distill(epochs=16.0, lr=2e-4, precision="bfloat16")
MARGIN, TIGHT, FINALISTS = 0.015, 0.01, 2
CONTROL = "unmodified, trained as long"
LAYERS = parse("bert.encoder.*")
THREE, FOUR = (DropBlocks(ratio=0.5), False), (DropBlocks(ratio=1 / 3), False)
HEADS, NEURONS = (PruneHeads(ratio=0.34), True), (PruneChannels(ratio=0.5), True)
STRUCTURES: dict[str, tuple[tuple[Method, bool], ...]] = {
    "3 of 6 layers, half of their neurons": (THREE, NEURONS),
    "3 of 6 layers, half of their neurons, a third of their heads": (THREE, HEADS, NEURONS),
    "4 of 6 layers, half of their neurons": (FOUR, NEURONS),
    "4 of 6 layers, half of their neurons, a third of their heads": (FOUR, HEADS, NEURONS),
    "4 of 6 layers, half of their neurons, a third of their heads, known words": (
        FOUR,
        HEADS,
        NEURONS,
        (PruneVocabulary(), False),
    ),
}
"""Each with whether a method is held to the encoder."""


def run(resume_dir: Path) -> dict[str, Any]:
    """Compress and measure all; certify the fastest that is good enough on `select`, each of its seeds."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    banking = importlib.import_module("banking77_model")
    task = banking.task()
    model = _original(banking.model(), task, resume_dir / "original.safetensors")
    comparison = Comparison(resume_dir, model, task)
    comparison.add_one_line_int8()
    control = Finetune(epochs=RECOVERY.epochs, lr=RECOVERY.lr, precision=RECOVERY.precision)
    comparison.add(CONTROL, lambda: compress(model, Plan((Step(control),)), task))
    comparison.refer_to(CONTROL)
    comparison.add("2 layers from random weights, distilled as long", lambda: _small(model, task))
    comparison.add("the vocabulary alone, not trained", lambda: compress(model, Plan((Step(PruneVocabulary()),)), task))
    for name in STRUCTURES:
        comparison.add(_of(name), partial(_ours, model, task, name, SEEDS[0]))
    timed = comparison.timed()
    fitting = [name for name in map(_of, STRUCTURES) if comparison.expected_bound(name) <= MARGIN]
    ranked = sorted(fitting, key=lambda name: -timed[name].ratio)
    certificates: dict[str, Certificate] = {}
    passed: list[str] = []
    while not passed and (waiting := [name for name in ranked if name not in certificates]):
        key = f"structure-minilm-{len(certificates) // FINALISTS + 1}".removesuffix("-1")
        certificates |= comparison.certify(waiting[:FINALISTS], MARGIN, key)
        passed = [name for name, found in certificates.items() if found.status == "passed"]
    best = max(passed, key=lambda name: timed[name].ratio, default=None)
    if best is not None:
        others = [_of(best.rpartition(", seed ")[0], seed) for seed in SEEDS[1:]]
        for name, seed in zip(others, SEEDS[1:], strict=True):
            comparison.add(name, partial(_ours, model, task, best.rpartition(", seed ")[0], seed))
        certificates |= comparison.certify(others, MARGIN, "structure-minilm-seeds")
    tight = [name for name in passed if certificates[name].upper <= TIGHT]
    return {
        "rows": comparison.rows(timed, certificates),
        "goals": [
            goal(
                f"times faster at a certified drop of at most {margin * 100:g} points",
                max((timed[name].ratio for name in names), default=None),
                must,
                aim,
            )
            for margin, names, must, aim in ((MARGIN, passed, 2.5, None), (TIGHT, tight, None, 4.0))
        ],
    }


def _original(network: nn.Module, task: Task, weights: Path) -> nn.Module:
    """Return the network that is compressed: read from `weights`, or trained now and kept there."""
    if not weights.exists():
        trained = compress(network, Plan((Step(ORIGINAL),)), task).module
        part = weights.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in trained.state_dict().items()}, part)
        part.replace(weights)
    network.load_state_dict(load_file(weights))
    return network


def _of(name: str, seed: int = SEEDS[0]) -> str:
    return f"{name}, seed {seed}"


def _ours(model: nn.Module, task: Task, name: str, seed: int) -> Compressed:
    steps = tuple(Step(method, LAYERS) if held else Step(method) for method, held in STRUCTURES[name])
    return compress(model, Plan((*steps, Step(RECOVERY)), seed), task)


def _small(model: nn.Module, task: Task) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig.from_dict({**model.config.to_dict(), "num_hidden_layers": 2})
    return recovered(BertForSequenceClassification(config), model, task, RECOVERY)
