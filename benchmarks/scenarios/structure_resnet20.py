"""Structure alone on ResNet-20 and CIFAR-10: blocks and aligned channels against Torch-Pruning, float32."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.checkpoints import resnet20_cifar10
from benchmarks.comparison import Comparison, best_ratio, goal, recovered
from torch import Tensor, nn

from trimpoint.compress import compress
from trimpoint.demo.resnet import ResNet
from trimpoint.method import Method
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.finetune import Finetune
from trimpoint.plan import Plan, Step
from trimpoint.task import Task

QUESTION = "How much faster does structure alone make a ResNet-20 on CIFAR-10, against pruning channels by group norm?"
EPOCHS, SCRATCH_EPOCHS = 10.0, 20.0
"""Length of every recovery, in passes over the training data; a network without any training gets more."""
PLAIN = Distill(epochs=EPOCHS, precision="bfloat16", hints=0.0, lr=0.05, views=int(EPOCHS))
"""What peers get as well, at the learning rate that is the better one without hints; no view is seen twice."""
HINTED = Distill(epochs=EPOCHS, precision="bfloat16")
MARGIN, FINALISTS = 0.01, 2
SEEDS = (0, 1, 2)
CONTROL = "unmodified, trained as long"
FIRST = ("stages.0.0", "stages.0.1", "stages.0.2")
STRUCTURES: dict[str, tuple[Method, ...]] = {
    "2 of 9 blocks removed": (DropBlocks(blocks=FIRST[1:]),),
    "3 of 9 blocks removed": (DropBlocks(blocks=(*FIRST[1:], "stages.1.2")),),
    "3 of 9 blocks removed, all of the first stage": (DropBlocks(blocks=FIRST),),
    "4 of 9 blocks removed": (DropBlocks(blocks=(*FIRST, "stages.1.2")),),
}
"""All blocks have equally many MACs, but those of the first stage, with 16 channels, cost most time."""
Answers = dict[str, Tensor]
PEER_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


def run(resume_dir: Path) -> dict[str, Any]:
    """Compress, measure and certify."""
    model, task = resnet20_cifar10.model(), resnet20_cifar10.task()
    comparison = Comparison(resume_dir, model, task)
    answers: Answers = {}
    comparison.add_one_line_int8()
    control = Plan((Step(Finetune(epochs=EPOCHS, precision="bfloat16")),))
    comparison.add(CONTROL, lambda: compress(model, control, task))
    comparison.refer_to(CONTROL)
    ours = {f"trimpoint: {name}": methods for name, methods in STRUCTURES.items()}
    for kind, recovery in ((", hints", HINTED), ("", PLAIN)):
        for name, methods in ours.items():
            plan = Plan((*map(Step, methods), Step(recovery)))
            comparison.add(name + kind, partial(compress, model, plan, task, cache=answers))
    peers = [
        name
        for spread in ("uniform", "global")
        for round_to in (None, 8)
        for name in _peers(comparison, spread, round_to, answers)
    ]
    scratch = replace(PLAIN, epochs=SCRATCH_EPOCHS)
    comparison.add(
        f"8/16/32 from scratch, distilled for {SCRATCH_EPOCHS:g} epochs", lambda: _small(model, task, scratch)
    )
    timed = comparison.timed()
    rows = {row["system"]: row for row in comparison.rows(timed)}
    fitting = [name for name in (f"{name}, hints" for name in ours) if comparison.expected_bound(name) <= MARGIN]
    finalists = sorted(fitting, key=lambda name: -timed[name].ratio)[:FINALISTS]
    certificates = comparison.certify(finalists, MARGIN, "structure-resnet20") if finalists else {}
    for name in finalists:
        for seed in SEEDS[1:]:
            plan = Plan((*map(Step, ours[name.removesuffix(", hints")]), Step(HINTED)), seed)
            comparison.add(f"{name}, seed {seed}", partial(compress, model, plan, task))
    passed = [name for name, certificate in certificates.items() if certificate.status == "passed"]
    alike = best_ratio([rows[name] for name in ours], MARGIN) / best_ratio([rows[name] for name in peers], MARGIN)
    return {
        "rows": comparison.rows(timed, certificates),
        "goals": [
            goal(
                "times faster at a certified drop of at most 1 point",
                max((timed[name].ratio for name in passed), default=None),
                1.5,
                2.0,
            ),
            goal(
                "times faster than the best of Torch-Pruning, same recovery, drop bounded by 1 point", alike, 1.3, 1.6
            ),
        ],
    }


def _small(model: nn.Module, task: Task, recovery: Distill) -> nn.Module:
    torch.manual_seed(0)
    return recovered(ResNet(widths=(8, 16, 32), depth=3, channels=3), model, task, recovery)


def _peers(comparison: Comparison, spread: str, round_to: int | None, answers: Answers) -> list[str]:
    """Add Torch-Pruning at growing ratios until one loses too much, and return their names.

    More of the same costs more accuracy; ratios that rounding makes equal are one system.

    Args:
        comparison: to which they are added.
        spread: `uniform` or `global`.
        round_to: multiple that widths are rounded to.
        answers: of the teacher, shared by all that see the same views.
    """
    names, seen = [], set()
    for ratio in PEER_RATIOS:
        pruned = _pruned(comparison.model, comparison.task, ratio, spread == "global", round_to)
        sizes = tuple(tuple(parameter.shape) for parameter in pruned.parameters())
        if sizes in seen:
            continue
        seen.add(sizes)
        names.append(f"Torch-Pruning: {spread} {ratio:.0%}" + (f", round_to={round_to}" if round_to else ""))
        make = partial(recovered, pruned, comparison.model, comparison.task, PLAIN, cache=answers)
        row = comparison.add(names[-1], make, round_to=round_to)
        if (row["drop_select_upper95"] or 0.0) > MARGIN:
            break
    return names


def _pruned(model: nn.Module, task: Task, ratio: float, everywhere: bool, round_to: int | None) -> nn.Module:
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
    return pruned
