"""Structure alone on a depthwise-separable network at 96 pixels, float32: layers, channels, and both.

Such networks have no residual blocks: what goes are layers whose output has the shape of their input, named one by one.
"""

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import mobilenet_cifar10
from benchmarks.comparison import Comparison, goal
from torch import nn

from trimpoint.compress import Compressed, compress
from trimpoint.method import Method
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.plan import Plan, Step
from trimpoint.task import Task

QUESTION = "How much faster does structure alone make a MobileNet of a quarter of its width, at 1 point of accuracy?"
EPOCHS = 4.0
MARGIN = 0.01
SEEDS = (0, 1, 2)
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
    comparison.add(CONTROL, lambda: compress(model, Plan((Step(Finetune(epochs=EPOCHS, precision="bfloat16")),)), task))
    comparison.refer_to(CONTROL)
    for name in STRUCTURES:
        comparison.add(_of(name), partial(_ours, model, task, name, SEEDS[0]))
    timed = comparison.timed()
    fitting = [name for name in STRUCTURES if comparison.expected_bound(_of(name)) <= MARGIN]
    fastest = sorted(fitting, key=lambda name: -timed[_of(name)].ratio)[:1]
    certificates = comparison.certify(list(map(_of, fastest)), MARGIN, "structure-mobilenet") if fastest else {}
    for name in fastest:
        for seed in SEEDS[1:]:
            comparison.add(_of(name, seed), partial(_ours, model, task, name, seed))
    passed = [name for name, found in certificates.items() if found.status == "passed"]
    ratio = max((timed[name].ratio for name in passed), default=None)
    return {
        "rows": comparison.rows(timed, certificates),
        "goals": [goal("times faster at a certified drop of at most 1 point", ratio, 1.3, 1.6)],
    }


def _of(name: str, seed: int = SEEDS[0]) -> str:
    return f"{name}, seed {seed}"


def _ours(model: nn.Module, task: Task, name: str, seed: int) -> Compressed:
    return compress(
        model, Plan((*map(Step, STRUCTURES[name]), Step(Distill(epochs=EPOCHS, precision="bfloat16"))), seed), task
    )
