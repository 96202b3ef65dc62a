"""Single weights of LeNet-300-100 on MNIST held at zero: 60 % and 90 % of all, without and with recovery."""

from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.checkpoints import lenet_mnist
from benchmarks.comparison import goal, kept
from benchmarks.scenarios._sparse import Row, measured

from trimpoint.compress import compress
from trimpoint.methods.distill import Distill
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.plan import Plan
from trimpoint.score import Accuracy, RocAuc

QUESTION = "How many of LeNet-300-100's weights can be zero on MNIST, at no loss of macro one-vs-rest AUC or accuracy?"
SEEDS = (0, 1, 2)
SCORES = (Accuracy(), RocAuc())
ROLES = ("select", "certify")
BATCH = 128


def plans() -> dict[str, Plan]:
    """Return the plans that are not trained, by name."""
    every = Plan()
    return {
        "unmodified": every,
        "60 %, magnitude, per layer": every.then(PruneWeights(ratio=0.6)),
        "60 %, magnitude, global": every.then(PruneWeights(ratio=0.6, scope="global")),
        "60 %, magnitude, global, lamp": every.then(PruneWeights(ratio=0.6, scope="global", normalize="lamp")),
        "60 %, wanda": every.then(PruneWeights(ratio=0.6, criterion="wanda")),
        "60 %, sparsegpt": every.then(PruneWeights(ratio=0.6, criterion="sparsegpt")),
        "90 %, magnitude, per layer": every.then(PruneWeights(ratio=0.9)),
        "90 %, magnitude, global, lamp": every.then(PruneWeights(ratio=0.9, scope="global", normalize="lamp")),
        "90 %, sparsegpt": every.then(PruneWeights(ratio=0.9, criterion="sparsegpt")),
    }


def recovered(seed: int) -> dict[str, Plan]:
    """Return the plans that are trained, by name: two epochs at 60 %, six at 90 % and for the control."""
    short, long = (Distill(epochs=epochs, optimizer="sgd", lr=0.05) for epochs in (2.0, 6.0))
    lamp = {"scope": "global", "normalize": "lamp"}
    control = Finetune(epochs=long.epochs, optimizer="sgd", lr=long.lr)
    return {
        "unmodified, six more epochs": Plan(seed=seed).then(control),
        "60 %, lamp, two epochs": Plan(seed=seed).then(PruneWeights(ratio=0.6, **lamp), short),
        "90 %, lamp, cubic, six epochs": Plan(seed=seed).then(
            PruneWeights(ratio=0.9, schedule="cubic", steps=1200, **lamp), long
        ),
    }


def run(resume_dir: Path) -> dict[str, Any]:
    """Make each network, run its file on the test data, and compare."""
    model, task = lenet_mnist.model(), lenet_mnist.task().with_(batch_size=BATCH)

    def row(name: str, plan: Plan, **more: Any) -> Row:
        def make() -> Row:
            made = compress(model, plan, task)
            return measured(made.module, task, SCORES, ROLES)

        return {"system": name, **more, **kept(resume_dir / f"{plan.hash}.json", make)}

    rows = [row(name, plan) for name, plan in plans().items()]
    for seed in SEEDS:
        rows += [row(name, plan, seed=seed) for name, plan in recovered(seed).items()]
    area = rows[0]["roc_auc_certify"] - _mean(rows, "60 %, lamp, two epochs", "roc_auc_certify")
    points = 100 * (rows[0]["accuracy_certify"] - _mean(rows, "90 %, lamp, cubic, six epochs", "accuracy_certify"))
    return {
        "rows": rows,
        "goals": [
            goal(
                "loss of macro one-vs-rest AUC at 60 % zeros, mean of the seeds",
                area,
                1e-4,
                None,
                better="lower",
                unit="1",
            ),
            goal("loss of accuracy at 90 % zeros, mean of the seeds", points, None, 0.1, better="lower", unit="points"),
        ],
    }


def _mean(rows: list[Row], system: str, figure: str) -> float:
    return float(np.mean([row[figure] for row in rows if row["system"] == system]))
