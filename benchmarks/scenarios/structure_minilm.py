"""Structure and recovery on MiniLM as a 77-way classifier of Banking77, float32, at the data's own lengths."""

import importlib
import sys
from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison, goal

from trimpoint.compress import compress
from trimpoint.filters import parse
from trimpoint.method import Method
from trimpoint.methods.distill import Distill
from trimpoint.methods.drop_blocks import DropBlocks
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_channels import PruneChannels
from trimpoint.methods.prune_heads import PruneHeads
from trimpoint.methods.prune_vocabulary import PruneVocabulary
from trimpoint.plan import Plan, Step

QUESTION = "How much faster does structure alone make MiniLM on Banking77, at 1.5 points of accuracy?"
EXAMPLES = Path(__file__).parents[2] / "examples"
EPOCHS = 8.0
MARGIN, TIGHT = 0.015, 0.01
LAYERS = parse("bert.encoder.*")
STRUCTURES: dict[str, tuple[tuple[Method, bool], ...]] = {
    "3 of 6 layers": ((DropBlocks(ratio=0.5), False),),
    "3 of 6 layers, half of their neurons": ((DropBlocks(ratio=0.5), False), (PruneChannels(ratio=0.5), True)),
    "3 of 6 layers, half of their neurons, a third of their heads": (
        (DropBlocks(ratio=0.5), False),
        (PruneHeads(ratio=0.34), True),
        (PruneChannels(ratio=0.5), True),
    ),
    "2 of 6 layers": ((DropBlocks(ratio=2 / 3), False),),
    "2 of 6 layers, half of their neurons": ((DropBlocks(ratio=2 / 3), False), (PruneChannels(ratio=0.5), True)),
}
"""Each with whether a method is held to the encoder."""


def run(resume_dir: Path) -> dict[str, Any]:
    """Compress, measure, and certify the three fastest that are good enough on `select`."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    banking = importlib.import_module("banking77_model")
    model, task = banking.model(), banking.task()
    comparison = Comparison(resume_dir, model, task)
    comparison.add_one_line_int8()
    control = Plan((Step(Finetune(epochs=EPOCHS, precision="bfloat16")),))
    comparison.add("unmodified, trained as long", lambda: compress(model, control, task))
    comparison.refer_to("unmodified, trained as long")
    recovery = Step(Distill(epochs=EPOCHS, lr=2e-4, precision="bfloat16"))
    vocabulary = Step(PruneVocabulary())
    for name, methods in STRUCTURES.items():
        steps = tuple(Step(method, LAYERS) if held else Step(method) for method, held in methods)
        plan = Plan((*steps, vocabulary, recovery))
        comparison.add(name, lambda plan=plan: compress(model, plan, task))  # type: ignore[misc]
    timed = comparison.timed()
    rows = {row["system"]: row for row in comparison.rows(timed)}
    fitting = [name for name in STRUCTURES if (rows[name]["drop_select"] or 0.0) <= MARGIN]
    fastest = sorted(fitting, key=lambda name: -rows[name]["latency_ratio"])[:3]
    wide = comparison.certify(fastest, MARGIN, "structure-minilm") if fastest else {}
    passed = [name for name, certificate in wide.items() if certificate.status == "passed"]
    tight = [name for name in passed if wide[name].upper <= TIGHT]
    return {
        "rows": comparison.rows(timed, wide),
        "goals": [
            goal(
                f"times faster at a certified drop of at most {margin * 100:g} points",
                max((timed[name].ratio for name in names), default=None),
                must,
                aim,
            )
            for margin, names, must, aim in ((MARGIN, passed, 2.5, None), (TIGHT, tight, None, 4.0))
        ],
    }
