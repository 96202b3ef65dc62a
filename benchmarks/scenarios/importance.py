"""The criteria of importance on one network, against channels drawn at random: before recovery, and after a short one.

Each criterion removes the same share of every group of channels, so that all networks of one share have the same
widths and the same speed; only which channels are left differs. Nothing is timed here.

Right after the removal the statistics of the batch norms no longer fit, which hides what the criteria are worth: so the
accuracy is also taken with statistics of the calibration data, without any training.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from benchmarks.comparison import UNMODIFIED, Comparison, goal
from torch import nn

from trimpoint import demo
from trimpoint.compress import Compressed, compress
from trimpoint.importance import NAMES
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.plan import Plan, Step
from trimpoint.task import Task

QUESTION = "Which channels of a ResNet-20 can go: what do criteria of importance know that chance does not?"
RATIOS = (0.25, 0.5)
SEEDS = (0, 1, 2)
RECOVERY = Finetune(epochs=0.4)
CONTROL, DEFAULT = "random", "magnitude"


def run(resume_dir: Path) -> dict[str, Any]:
    """Remove channels by each criterion, or go on, and rank the criteria by what is left of the accuracy."""
    rows = ranked(Comparison(resume_dir, demo.model(), demo.task()))
    means = {ratio: control(rows, ratio) for ratio in RATIOS}
    found = {(row["importance"], row["ratio"]): row for row in rows if row.get("importance") not in (None, CONTROL)}
    better = [name for name in NAMES if name != CONTROL and _gain(found, means, name, 0.25, "settled") > 0]
    best = max(_gain(found, means, name, 0.5, "select") for name in NAMES if name != CONTROL)
    return {
        "rows": rows,
        "goals": [
            goal("criteria better than chance, a quarter removed, norms settled", len(better), 7, 9, unit="criteria"),
            goal(
                f"{DEFAULT} over chance, half removed, after recovery",
                _gain(found, means, DEFAULT, 0.5, "select") * 100,
                0.0,
                1.0,
                unit="points",
            ),
            goal("best over chance, half removed, after recovery", best * 100, 0.5, 2.0, unit="points"),
        ],
    }


def ranked(systems: Comparison, recovery: Finetune = RECOVERY) -> list[dict[str, Any]]:
    """Return a row for the unmodified model and for each criterion, ratio and seed, the best after recovery first.

    `pruned` is the accuracy on `select` right after the removal, `settled` that with new statistics of the norms,
    `select` the one after recovery.

    Args:
        systems: of the unmodified model.
        recovery: what each of them is given.
    """
    rows = [
        row(systems, importance, ratio, seed, recovery)
        for ratio in RATIOS
        for importance in NAMES
        for seed in (SEEDS if importance == CONTROL else SEEDS[:1])
    ]
    rows.sort(key=lambda found: (found["ratio"], -found["select"]))
    return [dict(systems.add(UNMODIFIED, lambda: systems.model)), *rows]


def row(systems: Comparison, importance: str, ratio: float, seed: int, recovery: Finetune) -> dict[str, Any]:
    """Return what one criterion, ratio and seed come to."""
    name = f"{importance}, {100 * ratio:g} % removed, seed {seed}"
    prune = Step(PruneChannels(ratio=ratio, importance=importance, round_to=4))
    make = partial(made, systems.model, systems.task)
    before = systems.add(f"{name}, as pruned", partial(make, Plan((prune,), seed=seed)))
    settled = systems.add(
        f"{name}, norms settled", lambda: settle_(make(Plan((prune,), seed=seed)).module, systems.task)
    )
    after = systems.add(f"{name}, recovered", partial(make, Plan((prune, Step(recovery)), seed=seed)))
    accuracies = {"pruned": before["select"], "settled": settled["select"]}
    return {**after, "importance": importance, "ratio": ratio, "seed": seed, **accuracies, "system": name}


def made(model: nn.Module, task: Task, plan: Plan) -> Compressed:
    """Return what a plan makes of the model."""
    return compress(model, plan, task)


@torch.no_grad()
def settle_(model: nn.Module, task: Task) -> nn.Module:
    """Take the statistics of a model's batch norms anew from the calibration data, in place, and return it."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
    model.train()
    for inputs, _ in task.batches("calibrate"):
        model(inputs)
    return model.eval()


def control(rows: list[dict[str, Any]], ratio: float) -> dict[str, float]:
    """Return the mean accuracies of the channels drawn at random."""
    drawn = [found for found in rows if found.get("importance") == CONTROL and found["ratio"] == ratio]
    return {key: mean(found[key] for found in drawn) for key in ("pruned", "settled", "select")}


def _gain(
    found: Mapping[tuple[str, float], Mapping[str, Any]],
    means: Mapping[float, Mapping[str, float]],
    name: str,
    ratio: float,
    key: str,
) -> float:
    return float(found[name, ratio][key]) - means[ratio][key]
