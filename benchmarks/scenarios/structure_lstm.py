"""Half of the hidden units of an LSTM on spoken digits, each speaker left out once: time and accuracy.

Six networks, each of which never heard one speaker; their answers for the recordings of that speaker are pooled, 3,000
in all. Whatever is made smaller here learns for the same number of epochs from the unmodified network of its fold; the
unmodified network itself is trained on as long with its own loss. The recovery is the third that was tried, each of
them scored on these recordings: that shows how it was developed and certifies nothing. Recordings of one voice are
alike, so the bound over the six speakers stands beside those that take all 3,000 as independent.

There is no peer: Torch-Pruning leaves `nn.LSTM` as it is (its issues 44, 276 and 404), and the pruner for it in
`torch.ao.pruning._experimental` chooses the rows of each gate apart: the gates that are left are of different units.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.checkpoints.lstm_fsdd import model, task
from benchmarks.comparison import UNMODIFIED, Comparison, goal, recovered
from benchmarks.datasets import SPEAKERS
from benchmarks.models.lstm import LstmClassifier
from scipy import stats
from torch import nn

from trimpoint.measure.environment import instruction_set
from trimpoint.measure.latency import LatencyResult
from trimpoint.measure.quality import evaluate
from trimpoint.methods.distill import Distill
from trimpoint.methods.finetune import Finetune
from trimpoint.methods.prune_recurrent import PruneRecurrent
from trimpoint.plan import Plan, Step
from trimpoint.score import Accuracy, Records
from trimpoint.task import Task
from trimpoint.trust.certify import certify
from trimpoint.trust.ledger import Ledger
from trimpoint.values import Certificate

QUESTION = "What do half of an LSTM's hidden units cost in accuracy, and what does their removal bring in time?"
SEEDS = (0, 1, 2)
RECOVERY = Distill(epochs=40.0, alpha=0.5, precision="bfloat16")
MARGIN = 0.01
ROUNDS = 31
INT8, TRAINED_ON, PRUNED, BY_HAND = "one-line int8", "trained on", "half of the hidden units removed", "128 by hand"
MADE = (TRAINED_ON, PRUNED, BY_HAND)
"""What is made anew for each seed."""


def run(resume_dir: Path) -> dict[str, Any]:
    """Make the systems of all folds and seeds, or go on; time one of each kind together; compare what is pooled."""
    folds = {speaker: fold(resume_dir / speaker, model(speaker), task(speaker)) for speaker in SPEAKERS}
    pooled = {name: _pooled(folds, [name]) for name in (UNMODIFIED, INT8)}
    pooled |= {name: _pooled(folds, [_of(name, seed) for seed in SEEDS]) for name in MADE}
    first = folds[SPEAKERS[0]]
    timed = first.timed([UNMODIFIED, INT8, *(_of(name, SEEDS[0]) for name in MADE)], rounds=ROUNDS)
    certificates = [_certificate(folds, pooled, at) for at in range(len(SEEDS))]
    drop = float(np.mean([found.drop for found in certificates]))
    figures = {row["system"]: row for row in first.rows(timed)}
    return {
        "rows": [
            _row(name, figures[_of(name, SEEDS[0]) if name in MADE else name], runs, certificates)
            for name, runs in pooled.items()
        ],
        "goals": [
            goal("times faster than unmodified", _ratio(timed, PRUNED), 1.7, 2.2),
            goal("drop, mean of the seeds", drop * 100, 1.0, None, better="lower", unit="points"),
            goal(
                "upper bound of that drop over speakers",
                over_speakers(folds, pooled) * 100,
                None,
                1.0,
                better="lower",
                unit="points",
            ),
        ],
    }


def fold(out: Path, network: nn.Module, data: Task, recovery: Distill = RECOVERY) -> Comparison:
    """Return all systems of a fold, those that were made before read back.

    Args:
        out: where they are kept.
        network: the fold's, unmodified.
        data: its task.
        recovery: what each of them is given.
    """
    found = Comparison(out, network, data)
    found.add_one_line_int8()
    for seed in SEEDS:
        facts = {"seed": seed, "epochs": recovery.epochs}
        training = Finetune(epochs=recovery.epochs, precision=recovery.precision)
        found.add(_of(TRAINED_ON, seed), Plan((Step(training),), seed), **facts)
        found.add(_of(PRUNED, seed), plan(recovery, seed), **facts)
        found.add(_of(BY_HAND, seed), partial(_by_hand, network, data, recovery, seed), str(recovery), **facts)
    return found


def plan(recovery: Distill, seed: int) -> Plan:
    """Return the plan that is examined: half of the hidden units, then recovery."""
    return Plan((Step(PruneRecurrent(ratio=0.5)), Step(recovery)), seed)


def _by_hand(network: nn.Module, data: Task, recovery: Distill, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return recovered(LstmClassifier(hidden=128), network, data, recovery, seed)


def _of(name: str, seed: int) -> str:
    return f"{name}, seed {seed}"


def _pooled(folds: Mapping[str, Comparison], names: list[str]) -> list[Records]:
    """Return the records of each system on the recordings of all speakers, each by the fold that left him out."""
    return [np.concatenate([_certify_records(found, name) for found in folds.values()]) for name in names]


def _certify_records(found: Comparison, name: str) -> Records:
    files = found.systems[name].files
    session = found.runtime.open(files.directory, files.lowered, threads=found.target.threads)
    return evaluate(session, found.task, "certify").records


def _certificate(folds: Mapping[str, Comparison], pooled: Mapping[str, list[Records]], at: int) -> Certificate:
    first = next(iter(folds.values()))
    return certify(
        _references(pooled)[at],
        pooled[PRUNED][at],
        Accuracy(),
        MARGIN,
        data_hash="/".join(found.task.fingerprint("certify")[:16] for found in folds.values()),
        ledger=Ledger(),
        artifact_digest="/".join(f.systems[_of(PRUNED, SEEDS[at])].files.digest[:16] for f in folds.values()),
        finalists=len(SEEDS),
        batch="structure_lstm",
        runtime=f"{first.runtime.name} {first.runtime.version()}",
        instruction_set=instruction_set(),
    )


def over_speakers(folds: Mapping[str, Comparison], pooled: Mapping[str, list[Records]]) -> float:
    """Return the one-sided 95 % upper bound of the drop, by Student's t over the mean drops of the speakers."""
    ends = np.cumsum([len(found.task.data("certify")) for found in folds.values()])[:-1]
    lost = np.mean([b - a for b, a in zip(_references(pooled), pooled[PRUNED], strict=True)], axis=0)
    drops = np.array([part.mean() for part in np.split(lost, ends)])
    spread = float(drops.std(ddof=1)) / math.sqrt(len(drops))
    return float(drops.mean() + stats.t.ppf(0.95, len(drops) - 1) * spread)


def _references(pooled: Mapping[str, list[Records]]) -> list[Records]:
    """Return, for each seed, the original or the original given the same training, whichever is better."""
    return [
        max(pooled[UNMODIFIED][0], trained, key=lambda records: float(records.mean())) for trained in pooled[TRAINED_ON]
    ]


def _ratio(timed: Mapping[str, LatencyResult], name: str) -> float:
    return timed[_of(name, SEEDS[0])].ratio


def _row(name: str, figures: Mapping[str, Any], runs: list[Records], certificates: list[Certificate]) -> dict[str, Any]:
    """Return the row of a system: speed and size of its first fold and seed, accuracy on all folds together."""
    kept = ("latency_ms", "latency_ratio", "latency_ratio_ci", "file_bytes", "params", "macs", "epochs")
    accuracies = [float(records.mean()) for records in runs]
    row = {"system": name} | {key: figures[key] for key in kept if key in figures}
    row |= {"n": len(runs[0]), "accuracy": float(np.mean(accuracies)), "accuracy_by_seed": accuracies}
    if name == PRUNED:
        row |= {
            "drop_by_seed": [found.drop for found in certificates],
            "drop_upper_by_seed": [found.upper for found in certificates],
            "level_by_seed": [found.level for found in certificates],
            "certificate_by_seed": [found.status for found in certificates],
        }
    return row
