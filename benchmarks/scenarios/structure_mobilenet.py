"""Structure alone on a depthwise-separable network at 96 pixels, float32: layers, channels, and both.

Such networks have no residual blocks: what goes are layers whose output has the shape of their input, named one by one.
There is nothing between blocks to learn from either, so distillation is of the answers alone.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.checkpoints import mobilenet_cifar10
from benchmarks.comparison import Comparison, goal, recovered
from benchmarks.models.mobilenet import MobileNet
from torch import nn

from trimpoint.method import Method
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.plan import Plan, Step

QUESTION = "How much faster does structure alone make a MobileNet of a quarter of its width, at 1 point of accuracy?"
EPOCHS, SCRATCH_EPOCHS = 6.0, 12.0
"""Length of every recovery, in passes over the training data; a network without any training gets more."""
RECOVERY = Distill(epochs=EPOCHS, precision="bfloat16", hints=0.0, lr=0.05, views=int(EPOCHS))
"""At the learning rate that was better on ResNet-20 without hints; no view comes twice."""
MARGIN = 0.01
CONTROL = "unmodified, trained as long"
QUARTER = PruneChannels(ratio=0.25, round_to=8)
STRUCTURES: dict[str, tuple[Method, ...]] = {
    "2 of 13 layers removed": (DropBlocks(blocks=("layers.2", "layers.4")),),
    "4 of 13 layers removed": (DropBlocks(blocks=("layers.2", "layers.4", "layers.7", "layers.9")),),
    "a quarter of the channels removed": (QUARTER,),
    "2 of 13 layers and a quarter of the channels removed": (DropBlocks(blocks=("layers.2", "layers.4")), QUARTER),
    "6 of 13 depthwise filters and a quarter of the channels removed": (
        DropBlocks(blocks=tuple(f"layers.{layer}.depthwise" for layer in (6, 7, 8, 9, 10, 12))),
        QUARTER,
    ),
}
"""The early layers cost as much time as the late ones, and hold few parameters; late depthwise filters see little."""


def run(resume_dir: Path) -> dict[str, Any]:
    """Compress and measure all, certify the fastest that is likely to pass by what it shows on `select`."""
    model, task = mobilenet_cifar10.model(), mobilenet_cifar10.task()
    comparison = Comparison(resume_dir, model, task)
    comparison.add_one_line_int8()
    comparison.add(CONTROL, Plan((Step(Finetune(epochs=EPOCHS, precision="bfloat16")),)))
    comparison.refer_to(CONTROL)
    plans = {name: Plan((*map(Step, methods), Step(RECOVERY))) for name, methods in STRUCTURES.items()}
    for name, plan in plans.items():
        comparison.add(name, plan)
    scratch = replace(RECOVERY, epochs=SCRATCH_EPOCHS)

    def by_hand() -> nn.Module:
        torch.manual_seed(0)
        return recovered(MobileNet(0.125), model, task, scratch, cache=comparison.answers)

    name = f"an eighth of the width from scratch, distilled for {SCRATCH_EPOCHS:g} epochs"
    comparison.add(name, by_hand, str(scratch))
    timed = comparison.timed()
    certificates, best = comparison.examine(plans, timed, MARGIN, "structure-mobilenet")
    ratio = None if best is None else timed[best].ratio
    return {
        "rows": comparison.rows(timed, certificates),
        "goals": [goal("times faster at a certified drop of at most 1 point", ratio, 1.3, 1.6)],
    }
