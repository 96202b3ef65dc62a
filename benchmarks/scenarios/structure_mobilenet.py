"""Structure alone on a depthwise-separable network at 96 pixels, float32: layers, channels, and both.

Such networks have no residual blocks: what goes are layers whose output has the shape of their input, named one by one.
"""

from pathlib import Path
from typing import Any

from benchmarks.checkpoints import mobilenet_cifar10
from benchmarks.comparison import Comparison, goal

from trimpoint.method import Method
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.plan import Plan, Step

QUESTION = "How much faster does structure alone make a MobileNet of a quarter of its width, at 1 point of accuracy?"
EPOCHS = 4.0
MARGIN = 0.01
CONTROL = "unmodified, trained as long"
QUARTER = PruneChannels(ratio=0.25, round_to=8)
STRUCTURES: dict[str, tuple[Method, ...]] = {
    "4 of 13 layers removed, early and late": (DropBlocks(blocks=("layers.2", "layers.4", "layers.7", "layers.9")),),
    "4 of 13 layers removed": (DropBlocks(blocks=("layers.7", "layers.8", "layers.9", "layers.10")),),
    "6 of 13 layers removed": (
        DropBlocks(blocks=("layers.2", "layers.4", "layers.7", "layers.8", "layers.9", "layers.10")),
    ),
    "a quarter of the channels removed": (QUARTER,),
    "4 of 13 layers and a quarter of the channels removed": (
        DropBlocks(blocks=("layers.7", "layers.8", "layers.9", "layers.10")),
        QUARTER,
    ),
}


def run(resume_dir: Path) -> dict[str, Any]:
    """Compress and measure all, certify the fastest that is likely to pass by what it shows on `select`."""
    model, task = mobilenet_cifar10.model(), mobilenet_cifar10.task()
    comparison = Comparison(resume_dir, model, task)
    comparison.add_one_line_int8()
    comparison.add(CONTROL, Plan((Step(Finetune(epochs=EPOCHS, precision="bfloat16")),)))
    comparison.refer_to(CONTROL)
    recovery = Step(Distill(epochs=EPOCHS, precision="bfloat16"))
    plans = {name: Plan((*map(Step, methods), recovery)) for name, methods in STRUCTURES.items()}
    for name, plan in plans.items():
        comparison.add(name, plan)
    timed = comparison.timed()
    certificates, best = comparison.examine(plans, timed, MARGIN, "structure-mobilenet")
    ratio = None if best is None else timed[best].ratio
    return {
        "rows": comparison.rows(timed, certificates),
        "goals": [goal("times faster at a certified drop of at most 1 point", ratio, 1.3, 1.6)],
    }
