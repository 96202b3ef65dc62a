"""Structure alone on ResNet-20 and CIFAR-10: blocks and aligned channels against Torch-Pruning, float32."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.checkpoints import resnet20_cifar10
from benchmarks.comparison import Comparison, best_ratio, goal, recovered
from torch import nn

from trimpoint.compress import compress
from trimpoint.demo.resnet import ResNet
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.plan import Plan, Step
from trimpoint.task import Task

QUESTION = "How much faster does structure alone make a ResNet-20 on CIFAR-10, against pruning channels by group norm?"
EPOCHS = 6.0
"""Length of every recovery, in passes over the training data."""
MARGIN = 0.01
SEEDS = (0, 1, 2)
BLOCKS = {
    "1 of 9 blocks removed": ("stages.0.2",),
    "2 of 9 blocks removed": ("stages.0.2", "stages.1.2"),
    "3 of 9 blocks removed": ("stages.0.1", "stages.0.2", "stages.1.2"),
    "4 of 9 blocks removed": ("stages.0.1", "stages.0.2", "stages.1.2", "stages.2.2"),
}
"""Nested choices: the wide early stages cost most time, the last one most parameters."""
PEER_RATIOS = (0.15, 0.3, 0.45)


def run(resume_dir: Path) -> dict[str, Any]:
    """Compress, measure and certify."""
    model, task = resnet20_cifar10.model(), resnet20_cifar10.task()
    comparison = Comparison(resume_dir, model, task)
    comparison.add_one_line_int8()
    recovery = Distill(epochs=EPOCHS, precision="bfloat16")
    train_more = Plan((Step(Finetune(epochs=EPOCHS, precision="bfloat16")),))
    comparison.add("unmodified, trained as long", lambda: compress(model, train_more, task))
    comparison.add("8/16/32 from scratch, distilled as long", lambda: _from_scratch(model, task, recovery))
    ours, peers = [], []
    for name, blocks in BLOCKS.items():
        plan = Plan((Step(DropBlocks(blocks=blocks)), Step(recovery)))
        ours.append(_add(comparison, f"trimpoint: {name}", plan, model, task))
    plan = Plan(
        (Step(DropBlocks(blocks=BLOCKS["2 of 9 blocks removed"])), Step(PruneChannels(ratio=0.25)), Step(recovery))
    )
    ours.append(_add(comparison, "trimpoint: 2 of 9 blocks and a quarter of the channels removed", plan, model, task))
    for spread in ("uniform", "global"):
        for round_to in (None, 8):
            for ratio in PEER_RATIOS:
                name = f"Torch-Pruning: {spread} {ratio:.0%}" + (f", round_to={round_to}" if round_to else "")
                make = _peer(model, task, recovery, ratio, spread == "global", round_to)
                peers.append(name)
                comparison.add(name, make)
    timed = comparison.timed()
    rows = {row["system"]: row for row in comparison.rows(timed)}
    fitting = [n for n in ours if (rows[n]["drop_select_upper95"] or 0) <= MARGIN]
    finalist = max(fitting or ours[:1], key=lambda name: rows[name]["latency_ratio"])
    certificate = comparison.certify([finalist], MARGIN, "structure-resnet20")[finalist]
    for seed in SEEDS[1:]:
        plan = Plan((*_plan_of(finalist, recovery).steps,), seed)
        comparison.add(f"{finalist}, seed {seed}", lambda plan=plan: compress(model, plan, task))  # type: ignore[misc]
    ratio = timed[finalist].ratio
    peer = best_ratio([rows[name] for name in peers], rows[finalist]["drop_select_upper95"] or 0.0)
    reached = ratio if certificate.status == "passed" else None
    return {
        "rows": comparison.rows(timed, {finalist: certificate}),
        "goals": [
            goal("times faster at a certified drop of at most 1 point", reached, 1.5, 2.0),
            goal(
                "times faster than the best of Torch-Pruning that is as good", ratio / peer if peer else None, 1.3, 1.6
            ),
        ],
    }


def _plan_of(name: str, recovery: Distill) -> Plan:
    blocks = next((b for key, b in BLOCKS.items() if name.endswith(key)), BLOCKS["2 of 9 blocks removed"])
    channels = (Step(PruneChannels(ratio=0.25)),) if "channels" in name else ()
    return Plan((Step(DropBlocks(blocks=blocks)), *channels, Step(recovery)))


def _add(comparison: Comparison, name: str, plan: Plan, model: nn.Module, task: Task) -> str:
    comparison.add(name, lambda: compress(model, plan, task))
    return name


def _from_scratch(model: nn.Module, task: Task, recovery: Distill) -> nn.Module:
    torch.manual_seed(0)
    return recovered(ResNet(widths=(8, 16, 32), depth=3, channels=3), model, task, recovery)


def _peer(
    model: nn.Module, task: Task, recovery: Distill, ratio: float, everywhere: bool, round_to: int | None
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torch_pruning as tp

        pruned = copy.deepcopy(model)
        pruner = tp.pruner.BasePruner(
            pruned,
            task.example_batch(1),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            global_pruning=everywhere,
            round_to=round_to,
            ignored_layers=[pruned.get_submodule("head")],
        )
        pruner.step()
        return recovered(pruned, model, task, recovery)

    return make
