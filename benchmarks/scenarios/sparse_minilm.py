"""Single weights of MiniLM's encoder held at zero: half of them without recovery, 85 % of them while it trains on.

Which half can go, and what does the rest make up for? And is what training moves towards zero a better choice than what
is small, as movement pruning says of networks that were pretrained for something else? The network is that of
`examples/banking77_model.py`, fine-tuned on Banking77; the 3,080 test queries are scored on the exported file.
"""

import importlib
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.comparison import goal, kept
from benchmarks.scenarios._sparse import Row, measured
from torch.utils.data import Subset

from trimpoint.compress import compress
from trimpoint.filters import parse
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.plan import Plan, Step
from trimpoint.score import Accuracy

QUESTION = "Which single weights of MiniLM can go: what do Wanda, SparseGPT and movement know that magnitude does not?"
EXAMPLES = Path(__file__).parents[2] / "examples"
ENCODER = parse("bert.encoder.*")
METHODS = {
    "magnitude": PruneWeights(ratio=0.5),
    "wanda": PruneWeights(ratio=0.5, criterion="wanda"),
    "sparsegpt": PruneWeights(ratio=0.5, criterion="sparsegpt"),
    "sparsegpt, 2:4": PruneWeights(pattern="2:4", criterion="sparsegpt"),
    "magnitude, 2:4": PruneWeights(pattern="2:4"),
}
SEEDS = (0, 1, 2)
EPOCHS, STEPS = 3.0, 500
TRAINED = {
    criterion: PruneWeights(ratio=0.85, criterion=criterion, schedule="cubic", steps=STEPS)
    for criterion in ("magnitude", "movement")
}


def run(resume_dir: Path) -> dict[str, Any]:
    """Prune the encoder in each way, run the files on the test queries, and compare."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    banking = importlib.import_module("banking77_model")
    model, task = banking.model(), banking.task()
    task = task.with_(**{role: _by_length(task.data(role)) for role in ("calibrate", "select", "certify")})

    def row(name: str, plan: Plan, **more: Any) -> Row:
        def make() -> Row:
            made = compress(model, plan, task)
            return measured(made.module, task, (Accuracy(),), ("select", "certify"))

        return {"system": name, **more, **kept(resume_dir / f"{plan.hash}.json", make)}

    rows = [row("unmodified", Plan())]
    rows += [row(f"50 %, {name}", Plan((Step(method, ENCODER),))) for name, method in METHODS.items()]
    for seed in SEEDS:
        training = Finetune(epochs=EPOCHS, lr=2e-4, precision="bfloat16")
        rows += [
            row(_trained(name), Plan((Step(method, ENCODER), Step(training)), seed), seed=seed)
            for name, method in TRAINED.items()
        ]
    score = {r["system"]: r["accuracy_certify"] for r in rows}
    lost = score["unmodified"] - score["50 %, magnitude"]
    share = (score["50 %, sparsegpt"] - score["50 %, magnitude"]) / lost
    moved = _mean(rows, _trained("movement")) - _mean(rows, _trained("magnitude"))
    return {
        "rows": rows,
        "goals": [
            goal("share of the lost accuracy recovered, sparsegpt", share, 0.7, 0.85, unit="1"),
            goal("movement over magnitude, mean of the seeds", moved * 100, None, 0.5, unit="points"),
        ],
    }


def _trained(criterion: str) -> str:
    return f"85 %, {criterion}, cubic, {EPOCHS:g} epochs"


def _mean(rows: list[Row], system: str) -> float:
    return mean(row["accuracy_certify"] for row in rows if row["system"] == system)


def _by_length(queries: Any) -> Any:
    """Return queries in the order of their length: batches with little padding."""
    lengths = [len(queries[index][0]["input_ids"]) for index in range(len(queries))]
    return Subset(queries, sorted(range(len(lengths)), key=lengths.__getitem__))
