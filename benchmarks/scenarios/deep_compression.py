"""Deep Compression: LeNet-300-100 and LeNet-5 on MNIST, pruned, of shared values, coded, and certified."""

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import lenet5_mnist, lenet_mnist
from benchmarks.comparison import UNMODIFIED, Comparison, goal, kept
from torch import nn

from trimpoint.measure.process import ArtifactFiles
from trimpoint.measure.profile import coded_profile
from trimpoint.methods.distill import Distill
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.methods.share_weights import ShareWeights
from trimpoint.plan import Plan
from trimpoint.task import Task

QUESTION = "How small is a LeNet on MNIST as one coded file, at an accuracy that is certified within 0.2 points?"
MARGIN, BATCH = 0.002, 128
CONTROL = "unmodified, the same training"

Row = dict[str, Any]


def trained(epochs: float, lr: float, views: int = 1) -> Distill:
    """Return distillation from the unmodified network, whose answers to so many views of an image are asked for."""
    return Distill(epochs=epochs, optimizer="sgd", lr=lr, views=views, hints=0)


def plans(ratios: tuple[float, ...], steps: int, first: Distill, then: Distill) -> dict[str, Plan]:
    """Return the plans of a network by name, the control first.

    Args:
        ratios: shares of the weights that are zero.
        steps: of training after which they all are.
        first: recovery of what pruning left.
        then: training of the shared values.
    """
    found = {CONTROL: Plan(seed=0).then(first, then)}
    share = ShareWeights(clusters=8, entropy=0.01)
    for ratio in ratios:
        prune = PruneWeights(ratio=ratio, scope="global", normalize="lamp", schedule="cubic", steps=steps)
        found[f"{100 * ratio:g} % zeros, 8 values"] = Plan(seed=0).then(prune, first, share, then)
    return found


def compared(out: Path, network: str, model: nn.Module, task: Task, made: dict[str, Plan]) -> list[Row]:
    """Make and code the systems of a network, and certify the smallest that is likely to pass.

    The finalist is named by `select` alone; where none is likely to pass, it is the one that is closest to it.
    """
    comparison = Comparison(out, model, task)
    for name, plan in made.items():
        comparison.add(name, plan)
    comparison.refer_to(CONTROL)
    sizes: dict[str, Row] = {}
    for index, (name, system) in enumerate(comparison.systems.items()):
        sizes[name] = kept(out / f"coded-{index}.json", partial(_coded, system.files))
    candidates = [name for name in made if name != CONTROL]
    likely = [name for name in candidates if comparison.expected_bound(name) <= MARGIN]
    finalist = (
        min(likely, key=lambda name: sizes[name]["coded_bytes"])
        if likely
        else min(candidates, key=comparison.expected_bound)
    )
    key = "smallest" if len(candidates) == 1 else f"smallest-of-{len(candidates)}"
    certificates = comparison.certify([finalist], MARGIN, key)
    rows = comparison.rows({}, certificates)
    raw = 4 * next(row["params"] for row in rows if row["system"] == UNMODIFIED)
    return [
        {"network": network, "reference": comparison.reference, **row, **sizes[row["system"]]}
        | {"times_smaller": raw / sizes[row["system"]]["coded_bytes"]}
        for row in rows
    ]


def _coded(files: ArtifactFiles) -> Row:
    return {"coded_bytes": coded_profile(files)["coded_bytes"].value}


def run(resume_dir: Path) -> dict[str, Any]:
    """Make each network smaller, code it, certify it."""
    small = plans((0.93,), 2000, trained(10.0, 0.1), trained(3.0, 0.01))
    large = plans((0.96,), 2000, trained(16.0, 0.05, views=4), trained(4.0, 0.004, views=4))
    rows, goals = [], []
    for network, checkpoint, made, must, aim in (
        ("LeNet-300-100", lenet_mnist, small, 50.0, 65.0),
        ("LeNet-5", lenet5_mnist, large, 60.0, 160.0),
    ):
        task = checkpoint.task().with_(batch_size=BATCH)
        found = compared(resume_dir / checkpoint.WEIGHTS.stem, network, checkpoint.model(), task, made)
        last = next(row for row in found if "certificate" in row)
        rows += found
        goals += [
            goal(f"{network}: times smaller than its float32 parameters, coded", last["times_smaller"], must, aim),
            goal(
                f"{network}: upper bound of the drop on the test images",
                100 * last["drop_certified_upper"],
                100 * MARGIN,
                None,
                better="lower",
                unit="points",
            ),
        ]
    return {"rows": rows, "goals": goals}
