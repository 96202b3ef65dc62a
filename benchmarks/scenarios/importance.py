"""The criteria of importance on one network, against channels drawn at random: before recovery, and after a short one.

Each criterion removes the same share of every group of channels, so that all networks of one share have the same
widths and the same speed; only which channels are left differs. `lamp` is `magnitude` made comparable between groups
and chooses the same channels here, so it is left out. Nothing is timed.

Right after the removal the statistics of the batch norms no longer fit, which hides what the criteria are worth: so the
accuracy is also taken with statistics of the calibration data, without any training.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from benchmarks.comparison import UNMODIFIED, Comparison, goal
from torch import nn

from trimpoint import demo
from trimpoint.compress import compress
from trimpoint.importance import NAMES
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.plan import Plan, Step

QUESTION = "Which channels of a ResNet-20 can go: what do criteria of importance know that chance does not?"
RATIOS = (0.25, 0.5)
SEEDS = (0, 1, 2)
RECOVERY = Finetune(epochs=0.4, precision="bfloat16")
CONTROL, DEFAULT = "random", "magnitude"
CRITERIA = tuple(name for name in NAMES if name != "lamp")
PAGE = "importance.md"
Row = dict[str, Any]


def run(resume_dir: Path) -> dict[str, Any]:
    """Remove channels by each criterion, or go on, and rank the criteria by what is left of the accuracy."""
    rows = ranked(Comparison(resume_dir, demo.model(), demo.task()))
    better = [name for name in CRITERIA if beats_chance(rows, name, RATIOS[0], "settled")]
    return {
        "rows": rows,
        "goals": [
            goal(
                "criteria above every random draw, a quarter removed, norms settled",
                len(better),
                7,
                8,
                unit="criteria",
            ),
            goal(
                f"{DEFAULT} over chance, half removed, after recovery",
                gain(rows, DEFAULT, RATIOS[1], "recovered") * 100,
                0.0,
                1.0,
                unit="points",
            ),
        ],
    }


def ranked(systems: Comparison, recovery: Finetune = RECOVERY) -> list[Row]:
    """Return a row for the unmodified model and for each criterion and ratio, the best after recovery first.

    Args:
        systems: of the unmodified model.
        recovery: what each of them is given.

    Returns:
        rows with `pruned`, the accuracy on `select` right after the removal, `settled`, with new statistics of the
        norms, and `recovered`, after recovery; each the mean of the seeds, with `…_by_seed`.
    """
    rows = [row(systems, importance, ratio, recovery) for ratio in RATIOS for importance in CRITERIA]
    rows.sort(key=lambda found: (found["ratio"], -found["recovered"]))
    return [{**systems.add(UNMODIFIED, lambda: systems.model)}, *rows]


def row(systems: Comparison, importance: str, ratio: float, recovery: Finetune) -> Row:
    """Return what one criterion and ratio come to; only chance differs by seed before anything is trained."""
    name = f"{importance}, {100 * ratio:g} % removed"
    prune = Step(PruneChannels(ratio=ratio, importance=importance, round_to=4))
    found: dict[str, list[float]] = {"pruned": [], "settled": [], "recovered": []}
    figures: Mapping[str, Any] = {}
    for seed in SEEDS:
        plan = Plan((prune,), seed)
        if importance == CONTROL or seed == SEEDS[0]:
            found["pruned"].append(systems.add(f"{name}, seed {seed}, pruned", plan)["select"])
            settled = systems.add(f"{name}, seed {seed}, settled", partial(settled_norms, systems, plan), plan.hash)
            found["settled"].append(settled["select"])
        figures = systems.add(f"{name}, seed {seed}, recovered", plan.then(recovery))
        found["recovered"].append(figures["select"])
    sizes = {key: figures[key] for key in ("params", "macs", "file_bytes")}
    by_seed = {f"{key}_by_seed": values for key, values in found.items()}
    means = {key: mean(values) for key, values in found.items()}
    return {"system": name, "importance": importance, "ratio": ratio, **means, **by_seed, **sizes}


@torch.no_grad()
def settled_norms(systems: Comparison, plan: Plan) -> nn.Module:
    """Return what a plan makes, with the statistics of its batch norms taken anew from the calibration data."""
    model, task = compress(systems.model, plan, systems.task).module, systems.task
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
    model.train()
    for inputs, _ in task.batches("calibrate"):
        model(inputs)
    return model.eval()


def gain(rows: Sequence[Row], importance: str, ratio: float, key: str) -> float:
    """Return by how much a criterion is better than channels drawn at random."""
    found = {row["importance"]: row[key] for row in rows if row.get("ratio") == ratio}
    return float(found[importance] - found[CONTROL])


def beats_chance(rows: Sequence[Row], importance: str, ratio: float, key: str) -> bool:
    """Return whether every seed of a criterion is better than every random draw."""
    found = {row["importance"]: row[f"{key}_by_seed"] for row in rows if row.get("ratio") == ratio}
    return importance != CONTROL and min(found[importance]) > max(found[CONTROL])


def page(result: Mapping[str, Any]) -> str:
    """Return the ranking as a page to be read."""
    rows = result["rows"]
    lines = [
        "# Criteria of importance",
        "",
        "Made by `make bench SCENARIO=importance`; do not edit. The demo's ResNet-20 on Fashion-MNIST loses the same",
        "share of every group of channels by each criterion of `prune-channels`. Accuracy on `select` in %, unmodified",
        f"{100 * rows[0]['select']:.2f}: right after the removal, with the statistics of the batch norms taken anew",
        f"from the calibration data, and after {RECOVERY.epochs:g} epochs of fine-tuning (mean and range of",
        f"{len(SEEDS)} seeds). `lamp` chooses the same channels as `magnitude` where every group loses the same share.",
    ]
    for ratio in RATIOS:
        lines += ["", f"## {100 * ratio:g} % of the channels removed", ""]
        lines += [
            "| criterion | right after | norms settled | recovered | over chance |",
            "| --- | --: | --: | --: | --: |",
        ]
        for row in (row for row in rows if row.get("ratio") == ratio):
            cells = (_percent(row, key) for key in ("pruned", "settled", "recovered"))
            over = gain(rows, row["importance"], ratio, "recovered") * 100
            lines.append(f"| {row['importance']} | {' | '.join(cells)} | {over:+.2f} |")
    lines += ["", *_verdict(rows)]
    return "\n".join(lines) + "\n"


def _verdict(rows: Sequence[Row]) -> list[str]:
    """Say which criteria are better than the best of the random draws."""
    sentences = []
    for ratio in RATIOS:
        sure = [row["importance"] for row in rows if row.get("ratio") == ratio]
        sure = [importance for importance in sure if beats_chance(rows, importance, ratio, "recovered")]
        names = ", ".join(sure) or "no criterion"
        sentences.append(f"At {100 * ratio:g} % every seed of {names} beats every random draw after recovery.")
    return sentences


def _percent(row: Row, key: str) -> str:
    values = [100 * value for value in row[f"{key}_by_seed"]]
    text = f"{100 * row[key]:.2f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f}–{max(values):.2f})"
