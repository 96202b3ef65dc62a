"""Structure alone on ResNet-20 and CIFAR-10: blocks against channels pruned by Torch-Pruning, float32.

Torch-Pruning takes its group norm over all channels, with uniform or global ratios and widths rounded to 8 or not, or
leaves the residual stream and prunes inside of the blocks alone. Each family goes up in ratios until two in a row lose
too much. Everything has the same recovery; ours is shown with and without the hints, which peers cannot have, and
what shows more of the two on `select` may be certified.
"""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.checkpoints import resnet20_cifar10
from benchmarks.comparison import Comparison, best_ratio, goal, recovered
from torch import nn

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
"""What peers get as well, at the learning rate that is better for them and us without hints; no view comes twice."""
HINTED = Distill(epochs=EPOCHS, precision="bfloat16")
MARGIN = 0.01
CONTROL = "unmodified, trained as long"
FIRST = ("stages.0.0", "stages.0.1", "stages.0.2")
STRUCTURES: dict[str, tuple[Method, ...]] = {
    "2 of 9 blocks removed": (DropBlocks(blocks=FIRST[1:]),),
    "3 of 9 blocks removed": (DropBlocks(blocks=(*FIRST[1:], "stages.1.2")),),
    "3 of 9 blocks removed, all of the first stage": (DropBlocks(blocks=FIRST),),
    "4 of 9 blocks removed": (DropBlocks(blocks=(*FIRST, "stages.1.2")),),
    "5 of 9 blocks removed": (DropBlocks(blocks=(*FIRST, "stages.1.1", "stages.1.2")),),
}
"""All blocks have equally many MACs, but those of the first stage, with 16 channels, cost most time."""
FAMILIES = (("uniform", None), ("uniform", 8), ("global", None), ("global", 8), ("inside of blocks", 8))
PEER_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


def run(resume_dir: Path) -> dict[str, Any]:
    """Compress, measure and certify."""
    model, task = resnet20_cifar10.model(), resnet20_cifar10.task()
    comparison = Comparison(resume_dir, model, task)
    comparison.add_one_line_int8()
    comparison.add(CONTROL, Plan((Step(Finetune(epochs=EPOCHS, precision="bfloat16")),)))
    comparison.refer_to(CONTROL)
    hinted = {f"trimpoint: {name}, hints": _plan(methods, HINTED) for name, methods in STRUCTURES.items()}
    plain = {f"trimpoint: {name}": _plan(methods, PLAIN) for name, methods in STRUCTURES.items()}
    shown = {name: comparison.add(name, plan)["select"] for name, plan in (hinted | plain).items()}
    better = [max(pair, key=lambda name: shown[name]) for pair in zip(hinted, plain, strict=True)]
    peers = [name for family in FAMILIES for name in _peers(comparison, *family)]
    scratch = replace(PLAIN, epochs=SCRATCH_EPOCHS)
    by_hand = f"8/16/32 from scratch, distilled for {SCRATCH_EPOCHS:g} epochs"
    comparison.add(by_hand, lambda: _small(model, task, scratch), str(scratch))
    timed = comparison.timed()
    certificates, best = comparison.examine(
        {n: (hinted | plain)[n] for n in better}, timed, MARGIN, "structure-resnet20"
    )
    rows = {row["system"]: row for row in comparison.rows(timed, certificates)}
    alike = best_ratio([rows[name] for name in plain], MARGIN) / best_ratio([rows[name] for name in peers], MARGIN)
    ratio = None if best is None else timed[best].ratio
    return {
        "rows": list(rows.values()),
        "goals": [
            goal("times faster at a certified drop of at most 1 point", ratio, 1.5, 2.0),
            goal(
                "times faster than the best of Torch-Pruning, same recovery, drop bounded by 1 point", alike, 1.3, 1.6
            ),
        ],
    }


def _plan(methods: tuple[Method, ...], recovery: Distill) -> Plan:
    return Plan((*map(Step, methods), Step(recovery)))


def _small(model: nn.Module, task: Task, recovery: Distill) -> nn.Module:
    torch.manual_seed(0)
    return recovered(ResNet(widths=(8, 16, 32), depth=3, channels=3), model, task, recovery)


def _peers(comparison: Comparison, kind: str, round_to: int | None) -> list[str]:
    """Add Torch-Pruning at growing ratios until two in a row lose too much, and return their names.

    Ratios that rounding makes equal are one system.
    """
    names: list[str] = []
    seen, failed = set(), 0
    for ratio in PEER_RATIOS:
        pruned = _pruned(comparison.model, comparison.task, ratio, kind, round_to)
        sizes = tuple(tuple(parameter.shape) for parameter in pruned.parameters())
        if sizes in seen or failed == 2:
            continue
        seen.add(sizes)
        names.append(f"Torch-Pruning: {kind} {ratio:.0%}" + (f", round_to={round_to}" if round_to else ""))
        make = partial(recovered, pruned, comparison.model, comparison.task, PLAIN, cache=comparison.answers)
        row = comparison.add(names[-1], make, f"{sizes} {PLAIN}", round_to=round_to)
        failed = failed + 1 if (row["drop_select_upper95"] or 0.0) > MARGIN else 0
    return names


def _pruned(model: nn.Module, task: Task, ratio: float, kind: str, round_to: int | None) -> nn.Module:
    import torch_pruning as tp

    pruned = copy.deepcopy(model)
    kept = [pruned.get_submodule("head")]
    if kind == "inside of blocks":
        kept += [m for path, m in pruned.named_modules() if isinstance(m, nn.Conv2d) and not path.endswith("conv1")]
    pruner = tp.pruner.BasePruner(
        pruned,
        task.example_batch(1),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=kind == "global",
        round_to=round_to,
        ignored_layers=kept,
    )
    pruner.step()
    return pruned
