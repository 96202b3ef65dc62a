"""Half of the single weights of MiniLM's encoder held at zero, without recovery: which, and what the rest makes up for.

The network is that of `examples/banking77_model.py`, fine-tuned on Banking77; the 3,080 test queries are scored on the
exported file.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from benchmarks.comparison import goal, kept
from benchmarks.scenarios._sparse import Row, measured
from torch.utils.data import Subset

from trimpoint.compress import compress
from trimpoint.filters import parse
from trimpoint.methods.prune_weights import PruneWeights
from trimpoint.plan import Plan, Step
from trimpoint.score import Accuracy

QUESTION = "How much of what magnitude pruning of half of MiniLM's encoder loses do Wanda and SparseGPT keep?"
EXAMPLES = Path(__file__).parents[2] / "examples"
ENCODER = parse("bert.encoder.*")
METHODS = {
    "magnitude": PruneWeights(ratio=0.5),
    "wanda": PruneWeights(ratio=0.5, criterion="wanda"),
    "sparsegpt": PruneWeights(ratio=0.5, criterion="sparsegpt"),
    "sparsegpt, 2:4": PruneWeights(pattern="2:4", criterion="sparsegpt"),
    "magnitude, 2:4": PruneWeights(pattern="2:4"),
}


def run(resume_dir: Path) -> dict[str, Any]:
    """Prune the encoder in each way, run the files on the test queries, and compare."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    banking = importlib.import_module("banking77_model")
    model, task = banking.model(), banking.task()
    task = task.with_(**{role: _by_length(task.data(role)) for role in ("calibrate", "select", "certify")})

    def row(name: str, plan: Plan) -> Row:
        def make() -> Row:
            made = compress(model, plan, task)
            return measured(made.module, task, (Accuracy(),), ("select", "certify"))

        return {"system": name, **kept(resume_dir / f"{plan.hash}.json", make)}

    rows = [row("unmodified", Plan())]
    rows += [row(f"50 %, {name}", Plan((Step(method, ENCODER),))) for name, method in METHODS.items()]
    score = {r["system"]: r["accuracy_certify"] for r in rows}
    lost = score["unmodified"] - score["50 %, magnitude"]
    share = (score["50 %, sparsegpt"] - score["50 %, magnitude"]) / lost
    text = "share of the lost accuracy recovered, sparsegpt"
    return {"rows": rows, "goals": [goal(text, share, 0.7, 0.85, better="higher", unit="1")]}


def _by_length(queries: Any) -> Any:
    """Return queries in the order of their length: batches with little padding."""
    lengths = [len(queries[index][0]["input_ids"]) for index in range(len(queries))]
    return Subset(queries, sorted(range(len(lengths)), key=lengths.__getitem__))
