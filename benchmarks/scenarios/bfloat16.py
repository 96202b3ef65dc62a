"""Computing in bfloat16 with OpenVINO, beside int8: a convolutional network, a transformer and a recurrent network.

Batch 1, one thread; all are scored on `select` or held-out windows, nothing is certified. On a processor without
products of bfloat16 its rows are computed in float32 and the goals are missed.
"""

from pathlib import Path
from typing import Any

from benchmarks.checkpoints import decoder_wikitext2, lstm_wikitext2, resnet20_cifar10
from benchmarks.comparison import UNMODIFIED, Comparison, goal
from benchmarks.datasets.text import wikitext2
from torch import nn
from torch.utils.data import Subset

from trimpoint.methods.cast_weights import CastWeights
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.plan import Plan
from trimpoint.score import Perplexity
from trimpoint.target import Target
from trimpoint.task import Task

QUESTION = "What does computing in bfloat16 cost and bring beside int8, in OpenVINO?"
OURS = "bfloat16"
PLANS = {
    OURS: Plan().then(CastWeights(dtype="bfloat16", activations="bfloat16")),
    "bfloat16, stored only": Plan().then(CastWeights(dtype="bfloat16")),
    "int8": Plan().then(QuantizeStatic()),
    "int8 weights, ranges of each call": Plan().then(QuantizeDynamic()),
}
CALIBRATE, WINDOWS = 32, 96
"""Windows of 128 words of those that training held out."""


def run(resume_dir: Path) -> dict[str, Any]:
    """Make, time and score all systems of the three networks."""
    networks: dict[str, tuple[nn.Module, Task]] = {
        "ResNet-20": (resnet20_cifar10.model(), resnet20_cifar10.task()),
        "decoder": (decoder_wikitext2.model(), language()),
        "LSTM": (lstm_wikitext2.model(), language()),
    }
    rows, goals = [], []
    for network, (model, task) in networks.items():
        compared = Comparison(resume_dir / network.lower(), model, task, Target(runtime="openvino"))
        for name, plan in PLANS.items():
            compared.add(name, plan)
        timed = compared.timed()
        found = compared.rows(timed)
        base = compared.systems[UNMODIFIED].evaluation.value
        ours = next(row for row in found if row["system"] == OURS)
        goals += [
            goal(f"{network}, times faster than float32", timed[OURS].ratio, None, 1.5),
            goal(
                f"{network}, upper bound of the drop",
                100 * ours["drop_select_upper95"] / base,
                None,
                0.2,
                better="lower",
                unit="% of the score",
            ),
        ]
        rows += [row | {"system": f"{network}, {row['system']}"} for row in found]
    return {"rows": rows, "goals": goals}


def language() -> Task:
    """Return the task of a language model on windows that training held out."""
    windows = wikitext2()[0]["calibrate"]
    return Task(
        score=Perplexity(),
        calibrate=Subset(windows, range(CALIBRATE)),
        select=Subset(windows, range(CALIBRATE, CALIBRATE + WINDOWS)),
        batch_size=1,
    )
