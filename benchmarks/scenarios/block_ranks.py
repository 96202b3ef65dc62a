"""The rules by which `drop-blocks` chooses, on one network: before recovery, and after a short one.

Every rule removes four of the seven removable blocks of the demo's ResNet-20. What is left differs in time and size
as well: the early blocks cost time, the late ones parameters. The collapse right after removal is shown beside what
is left after recovery, because the one predicts little of the other. Nothing is timed.
"""

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.comparison import UNMODIFIED, Comparison, goal

from trimpoint import demo
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.plan import Plan, Step

QUESTION = "Which blocks of a ResNet-20 can go: what do the rules know that an even spacing does not?"
RULES = ("even", "last", "influence", "loss", "greedy")
DEFAULT = "even"
RATIO = 4 / 7
SEEDS = (0, 1, 2)
RECOVERY = Distill(epochs=1.0, precision="bfloat16")
Row = dict[str, Any]


def run(resume_dir: Path) -> dict[str, Any]:
    """Remove four blocks by each rule, or go on, and rank the rules by what recovers."""
    systems = Comparison(resume_dir, demo.model(), demo.task())
    rows = [row(systems, rule) for rule in RULES]
    rows.sort(key=lambda found: -found["recovered"])
    recovered = {found["rule"]: found["recovered"] for found in rows}
    best = max(recovered, key=recovered.__getitem__)
    return {
        "rows": [{**systems.add(UNMODIFIED, lambda: systems.model)}, *rows],
        "goals": [
            goal(
                f"greedily, with recovery in between, over {DEFAULT}",
                (recovered["greedy"] - recovered[DEFAULT]) * 100,
                None,
                0.5,
                unit="points",
            ),
            goal(
                f"{DEFAULT} below the best rule ({best})",
                (recovered[best] - recovered[DEFAULT]) * 100,
                None,
                0.5,
                better="lower",
                unit="points",
            ),
        ],
    }


def row(systems: Comparison, rule: str) -> Row:
    """Return what a rule comes to: accuracy on `select` right after removal, and after recovery from each seed."""
    drop = Step(DropBlocks(ratio=RATIO, rank=rule))
    pruned = systems.add(f"{rule}, pruned", Plan((drop,)))
    found = [systems.add(f"{rule}, seed {seed}", Plan((drop, Step(RECOVERY)), seed), seed=seed) for seed in SEEDS]
    accuracies = [figures["select"] for figures in found]
    return {
        "system": rule,
        "rule": rule,
        "pruned": pruned["select"],
        "recovered": mean(accuracies),
        "recovered_by_seed": accuracies,
        **{key: [figures[key] for figures in found] for key in ("params", "macs")},
    }
