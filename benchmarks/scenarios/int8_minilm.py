"""MiniLM on Banking77 in int8: what each way costs in accuracy and brings in time, at the data's own lengths.

The network is that of `examples/banking77_model.py`, fine-tuned; batch 1, one thread, nothing is padded. The 3,080 test
queries are scored for the finalists. Peers are the quantisers of ONNX Runtime and NNCF on the same export, with the
same queries to calibrate on. The finalist is the fastest that is no worse on `select` than the fastest peer.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison, goal
from benchmarks.peers import nncf_by, quantize_dynamic_by, quantize_static_by
from torch.utils.data import Subset

from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.methods.quantize_static import QuantizeStatic
from trimpoint.methods.smooth_activations import SmoothActivations
from trimpoint.plan import Plan

QUESTION = "What does int8 cost and bring on a MiniLM, at batch 1 and the lengths of the queries?"
EXAMPLES = Path(__file__).parents[2] / "examples"
OURS, STATIC = "dynamic int8, smoothed", "static int8"
PLANS = {
    "dynamic int8": Plan().then(QuantizeDynamic()),
    "dynamic int8, 8 bits of weights": Plan().then(QuantizeDynamic(reduce_range=False)),
    OURS: Plan().then(SmoothActivations(), QuantizeDynamic()),
    STATIC: Plan().then(QuantizeStatic()),
    "static int8, ranges by squared error": Plan().then(QuantizeStatic(observer="mse")),
    "static int8, ranges of 99.99 %": Plan().then(QuantizeStatic(observer="percentile")),
    "static int8, biases corrected": Plan().then(QuantizeStatic(correct_bias=True)),
    "static int8, GPTQ": Plan().then(QuantizeStatic(rounding="gptq")),
    "static int8, two layers in float32": Plan().then(QuantizeStatic(keep_float=2)),
}
PEERS = {
    "quantize_dynamic": quantize_dynamic_by(),
    "quantize_dynamic, per channel, 7 bits": quantize_dynamic_by(per_channel=True, reduce_range=True),
    "quantize_static, per channel, 7 bits": quantize_static_by(),
    "NNCF, transformer": nncf_by(transformer=True),
}
MARGIN = 0.01


def run(resume_dir: Path) -> dict[str, Any]:
    """Make, time and score all; certify the finalist, and the static form with default settings."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    banking = importlib.import_module("banking77_model")
    model, task = banking.model(), banking.task()
    task = task.with_(batch_size=1, calibrate=_by_length(task.data("calibrate")))
    comparison = Comparison(resume_dir, model, task)
    comparison.add_one_line_int8()
    for name, lower in PEERS.items():
        comparison.add_lowered(name, lower, name)
    for name, plan in PLANS.items():
        comparison.add(name, plan)
    timed = comparison.timed()
    certificates = comparison.certify([OURS, STATIC], MARGIN, "int8-minilm-smoothed")
    rows = comparison.rows(timed, certificates)
    select = {row["system"]: row["select"] for row in rows}
    fastest = max(("one-line int8", *PEERS), key=lambda name: timed[name].ratio)
    return {
        "rows": rows,
        "goals": [
            goal("upper bound of the drop", 100 * certificates[OURS].upper, 1.0, None, better="lower", unit="points"),
            goal(f"speed ÷ that of the fastest peer, {fastest}", timed[OURS].ratio / timed[fastest].ratio, 1.0, None),
            goal(
                "accuracy on select above that of this peer",
                100 * (select[OURS] - select[fastest]),
                0.0,
                None,
                unit="points",
            ),
            goal("times faster than float32", timed[OURS].ratio, None, 3.0),
        ],
    }


def _by_length(queries: Any) -> Any:
    """Return queries in the order of their length: batches with little padding."""
    lengths = [len(queries[index][0]["input_ids"]) for index in range(len(queries))]
    return Subset(queries, sorted(range(len(lengths)), key=lengths.__getitem__))
