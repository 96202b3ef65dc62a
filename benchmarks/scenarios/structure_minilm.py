"""Structure and recovery on MiniLM as a 77-way classifier of Banking77, float32, at the data's own lengths.

What is compressed is the fine-tuned network after eight more epochs, by which it still gained. Beside what structure
makes of it stand the unmodified one trained as long at the same learning rate, and a small one that starts from random
weights and learns from the same teacher. The vocabulary is half of the file and none of the time: one structure is
tried with and without it. The three fastest of those that are likely to pass, by what they show on `select`, are
certified together; two more seeds of the fastest that does show how much chance is in its drop.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.comparison import Comparison, goal, recovered
from safetensors.torch import load_file, save_file
from torch import nn

from trimpoint.compress import compress
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

QUESTION = "How much faster does structure alone make MiniLM on Banking77, at 1.5 points of accuracy?"
EXAMPLES = Path(__file__).parents[2] / "examples"
ORIGINAL = Finetune(epochs=8.0, lr=2e-4, precision="bfloat16")
RECOVERY = Distill(epochs=16.0, lr=2e-4, precision="bfloat16")
MARGIN, TIGHT = 0.015, 0.01
CONTROL = "unmodified, trained as long"
LAYERS = parse("bert.encoder.*")
THREE, FOUR = (DropBlocks(ratio=0.5), False), (DropBlocks(ratio=1 / 3), False)
HEADS, NEURONS = (PruneHeads(ratio=0.34), True), (PruneChannels(ratio=0.5), True)
STRUCTURES: dict[str, tuple[tuple[Method, bool], ...]] = {
    "3 of 6 layers, half of their neurons": (THREE, NEURONS),
    "3 of 6 layers, half of their neurons, a third of their heads": (THREE, HEADS, NEURONS),
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
    comparison.add(CONTROL, Plan((Step(control),)))
    comparison.refer_to(CONTROL)
    comparison.add("2 layers from random weights, distilled as long", lambda: _small(model, task), str(RECOVERY))
    comparison.add("the vocabulary alone, not trained", Plan((Step(PruneVocabulary()),)))
    plans = {name: _plan(methods) for name, methods in STRUCTURES.items()}
    for name, plan in plans.items():
        comparison.add(name, plan)
    timed = comparison.timed()
    certificates, best = comparison.examine(plans, timed, MARGIN, "structure-minilm", finalists=3)
    ratio = None if best is None else timed[best].ratio
    tight = ratio if best is not None and certificates[best].upper <= TIGHT else None
    return {
        "rows": comparison.rows(timed, certificates),
        "goals": [
            goal(f"times faster at a certified drop of at most {MARGIN * 100:g} points", ratio, 2.5, None),
            goal(f"times faster at a certified drop of at most {TIGHT * 100:g} point", tight, None, 4.0),
        ],
    }


def _plan(methods: tuple[tuple[Method, bool], ...]) -> Plan:
    return Plan((*(Step(method, LAYERS) if held else Step(method) for method, held in methods), Step(RECOVERY)))


def _original(network: nn.Module, task: Task, weights: Path) -> nn.Module:
    """Return the network that is compressed: read from `weights`, or trained now and kept there."""
    if not weights.exists():
        trained = compress(network, Plan((Step(ORIGINAL),)), task).module
        part = weights.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in trained.state_dict().items()}, part)
        part.replace(weights)
    network.load_state_dict(load_file(weights))
    return network


def _small(model: nn.Module, task: Task) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig.from_dict({**model.config.to_dict(), "num_hidden_layers": 2})
    return recovered(BertForSequenceClassification(config), model, task, RECOVERY)
