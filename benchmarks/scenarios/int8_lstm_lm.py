"""An LSTM language model in int8 without data: whole windows in one call, and word by word with its state handed on.

Two layers of 448 units on WikiText-2, batch 1, one thread. Windows that training held out choose nothing but are
scored for every system; the first windows of the test text are scored for two of them.
"""

from pathlib import Path
from typing import Any

from benchmarks.checkpoints.lstm_wikitext2 import model
from benchmarks.comparison import UNMODIFIED, Comparison, goal
from benchmarks.datasets.text import wikitext2
from benchmarks.peers import quantize_dynamic_by
from torch import nn
from torch.utils.data import Subset

from trimpoint import streaming
from trimpoint.filters import parse
from trimpoint.methods.quantize_dynamic import QuantizeDynamic
from trimpoint.plan import Plan, Step
from trimpoint.score import Perplexity
from trimpoint.task import Task

QUESTION = "What do int8 LSTM layers without calibration cost a language model, and how much faster does it run?"
OURS = "int8"
PLANS = {
    OURS: Plan().then(QuantizeDynamic()),
    "int8, LSTM layers only": Plan((Step(QuantizeDynamic(), parse("lstm")),)),
    "int8, 8 bits of weights": Plan().then(QuantizeDynamic(reduce_range=False)),
    "int8, one scale per tensor": Plan().then(QuantizeDynamic(granularity="tensor")),
}
PEERS = {
    "quantize_dynamic": quantize_dynamic_by(),
    "quantize_dynamic, per channel, 7 bits": quantize_dynamic_by(per_channel=True, reduce_range=True),
}
WORD_BY_WORD = "word by word, "
CALIBRATE, TEST = 32, 512
"""Windows of 128 words: of those held out, for peers that ask for some; and of the test text."""


def run(resume_dir: Path) -> dict[str, Any]:
    """Make, time and score all systems in both forms; certify ours."""
    network, data = model(), task()
    whole = compared(resume_dir / "windows", network, data)
    core = streaming(network, data.example_batch(1)[:, :8])
    words = compared(resume_dir / "words", core, data.with_(predict=core.in_chunks(1)))
    timed, stepped = whole.timed(), words.timed()
    base = whole.systems[UNMODIFIED].evaluation.value
    certificates = whole.certify([OURS], 0.01 * base, "int8-lstm-lm")
    rows = whole.rows(timed, certificates)
    rows += [row | {"system": WORD_BY_WORD + row["system"]} for row in words.rows(stepped)]
    for row in rows:
        row["drop_select_percent"] = None if row["drop_select"] is None else 100 * row["drop_select"] / base
    certificate = certificates[OURS]
    share = 100 / (certificate.value - certificate.drop)
    return {
        "rows": rows,
        "goals": [
            goal("more perplexity on the test text", share * certificate.drop, 1.0, 0.3, better="lower", unit="%"),
            goal("upper bound of it", share * certificate.upper, 1.0, 0.3, better="lower", unit="%"),
            goal("times faster than float32, windows of 128 words", timed[OURS].ratio, 2.8, None),
            goal("times faster than float32, word by word", stepped[OURS].ratio, 2.8, None),
            goal("speed ÷ that of the fastest peer, windows", _over_peers(timed), None, 1.0),
            goal("speed ÷ that of the fastest peer, word by word", _over_peers(stepped), None, 1.0),
        ],
    }


def task() -> Task:
    """Return the task, one window in each call, as it is timed: what is in a batch decides the ranges."""
    roles, _ = wikitext2()
    held = range(len(roles["calibrate"]))
    return Task(
        score=Perplexity(),
        calibrate=Subset(roles["calibrate"], held[:CALIBRATE]),
        select=Subset(roles["calibrate"], held[CALIBRATE:]),
        certify=Subset(roles["test"], range(TEST)),
        batch_size=1,
    )


def compared(out: Path, network: nn.Module, data: Task) -> Comparison:
    """Return all systems of one form of the network, those that were made before read back."""
    found = Comparison(out, network, data)
    for name, lower in PEERS.items():
        found.add_lowered(name, lower, name)
    for name, plan in PLANS.items():
        found.add(name, plan)
    return found


def _over_peers(timed: Any) -> float:
    return float(timed[OURS].ratio / max(timed[peer].ratio for peer in PEERS))
