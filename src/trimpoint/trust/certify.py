"""Certificates: what held-out data proves about the quality of an artifact.

The reasons for the bounds and for the correction are in `docs/design/0004-certificates.md`.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import numpy as np

from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.trust.bounds import exact_paired_upper, resampled_upper, samples_needed
from trimpoint.trust.ledger import Ledger
from trimpoint.values import Certificate

if TYPE_CHECKING:
    from trimpoint.measure.quality import Run
    from trimpoint.score import Records, Score
    from trimpoint.task import Task

_POWER = 0.8


def certify(
    reference_records: "Records",
    artifact_records: "Records",
    score: "Score",
    margin: float,
    *,
    data_hash: str,
    ledger: Ledger,
    artifact_digest: str,
    finalists: int = 1,
    batch: str = "",
    level: float = 0.95,
    runtime: str = "",
    instruction_set: str = "",
) -> Certificate:
    """Compare an artifact with its reference, sample by sample, on data that took no part in making it.

    The artifact passes if the one-sided upper bound of its drop is within the margin. For proportions the bound is the
    exact one for paired samples, for other scores a paired bootstrap with an allowance for unseen changes.

    The error `1 - level` is divided by the number of looks at this data that the ledger knows of, every finalist that
    was declared included (Bonferroni): the chance that any of them, judged at this level, passes although its drop is
    larger stays below `1 - level`, whatever they have in common. A look is recorded before anything is computed; the
    same artifact again is not a further look.

    Args:
        reference_records: `[samples, k]`, of the reference.
        artifact_records: `[samples, k]`, of the artifact, in the same order.
        score: that the records are of.
        margin: the drop that is allowed, in the score's own unit, ≥ 0.
        data_hash: SHA-256 of the data.
        ledger: of the looks at it.
        artifact_digest: what tells this artifact from every other.
        finalists: how many artifacts will be looked at together, this one included, fixed before the first look.
        batch: what those finalists share, such as the study's name; without it each counts as a declaration of its own.
        level: of confidence before the correction, in (0.5, 1).
        runtime: that gave the answers, with its version.
        instruction_set: of the CPU that gave the answers.

    Returns:
        The certificate: `passed`; `failed`, if the estimated drop exceeds the margin; else `unproven`, with the number
        of samples that would be needed.

    Raises:
        DataError: if the records are not paired, or the score is not defined on them.
        InvalidParameterError: if `margin` or `level` is out of range.
        StorageError: if the look cannot be recorded.
    """
    _check(reference_records, artifact_records, margin, level)
    looks = ledger.record(data_hash, artifact_digest, score.name, finalists=finalists, batch=batch)
    corrected = 1 - (1 - level) / looks
    baseline, value = score.aggregate(reference_records), score.aggregate(artifact_records)
    if not (math.isfinite(baseline) and math.isfinite(value)):
        raise DataError(
            f"The score {score.name!r} is not defined on the certification data. Got {baseline} for the reference and "
            f"{value} for the artifact.",
            "check that every class occurs in it and that the outputs are finite",
        )
    compare = _compare_proportions if score.proportion else _compare_resampled
    found = compare(reference_records, artifact_records, score, margin, corrected)
    status: Literal["passed", "unproven", "failed"] = "unproven"
    if found.drop > margin:
        status = "failed"
    elif found.upper <= margin:
        status = "passed"
    needed = found.needed
    if status == "unproven" and needed is not None:
        needed = max(needed, len(reference_records) + 1)
    return Certificate(
        status=status,
        score=score.name,
        margin=float(margin),
        drop=found.drop,
        upper=found.upper,
        level=corrected,
        n=len(reference_records),
        baseline=baseline,
        value=value,
        lost=found.lost,
        gained=found.gained,
        needed=needed,
        looks=looks,
        method=found.method,
        data=data_hash,
        runtime=runtime,
        instruction_set=instruction_set,
    )


def certify_runs(
    reference_run: "Run",
    artifact_run: "Run",
    task: "Task",
    margin: float,
    *,
    ledger: Ledger,
    artifact_digest: str,
    finalists: int = 1,
    batch: str = "",
    level: float = 0.95,
    runtime: str = "",
    instruction_set: str = "",
) -> Certificate:
    """Run a reference and an artifact on the task's `certify` data and compare them.

    Nothing else in trimpoint runs a model on that role. The look is recorded before the first sample is run.

    Args:
        reference_run: module, or session of its exported core, of the reference.
        artifact_run: the same, of the artifact.
        task: with `certify` data.
        margin: see `certify`, as all that follow.
        ledger: of the looks at the data.
        artifact_digest: what tells this artifact from every other.
        finalists: how many artifacts will be looked at together.
        batch: what those finalists share.
        level: of confidence before the correction.
        runtime: that gives the answers.
        instruction_set: of the CPU that gives the answers.

    Raises:
        DataError: if the task has no `certify` data, or the score is not defined on it.
        InvalidParameterError: if `margin` or `level` is out of range.
        StorageError: if the look cannot be recorded.
    """
    from trimpoint.measure.quality import evaluate

    _check_range(margin, level)
    data_hash = task.fingerprint("certify")
    ledger.record(data_hash, artifact_digest, task.score.name, finalists=finalists, batch=batch)
    return certify(
        evaluate(reference_run, task, "certify").records,
        evaluate(artifact_run, task, "certify").records,
        task.score,
        margin,
        data_hash=data_hash,
        ledger=ledger,
        artifact_digest=artifact_digest,
        finalists=finalists,
        batch=batch,
        level=level,
        runtime=runtime,
        instruction_set=instruction_set,
    )


@dataclass(frozen=True)
class _Comparison:
    drop: float
    upper: float
    needed: int | None
    method: str
    lost: int | None = None
    gained: int | None = None


def _compare_proportions(
    reference: "Records",
    artifact: "Records",
    score: "Score",  # noqa: ARG001
    margin: float,
    level: float,
) -> _Comparison:
    n, right_before, right_now = len(reference), reference[:, 0] == 1, artifact[:, 0] == 1
    lost, gained = int((right_before & ~right_now).sum()), int((~right_before & right_now).sum())
    drop = (lost - gained) / n
    needed = samples_needed((lost + gained) / n, margin, drop, level, _POWER)
    method = "exact unconditional bound by the score statistic"
    return _Comparison(drop, exact_paired_upper(lost, gained, n, level), needed, method, lost, gained)


def _compare_resampled(
    reference: "Records", artifact: "Records", score: "Score", margin: float, level: float
) -> _Comparison:
    resamples = min(20_000, max(2_000, math.ceil(100 / (1 - level))))
    drop, upper, unseen = resampled_upper(score, reference, artifact, level=level, resamples=resamples)
    z, power = NormalDist().inv_cdf(level), NormalDist().inv_cdf(_POWER)
    needed = None
    if drop < margin:
        # With r times the samples the bound of the mean falls as 1/√r and the allowance as 1/r, or faster.
        noise, room = (z + power) / z * max(upper - unseen - drop, 0.0), margin - drop
        needed = math.ceil(len(reference) * ((noise + math.sqrt(noise**2 + 4 * unseen * room)) / (2 * room)) ** 2)
    return _Comparison(drop, upper, needed, f"paired bootstrap, {resamples:,} resamples")


def _check(reference: "Records", artifact: "Records", margin: float, level: float) -> None:
    _check_range(margin, level)
    if reference.shape != artifact.shape or reference.ndim != 2 or len(reference) == 0:
        raise DataError(
            f"A certificate needs records of the same samples, at least one. Got {list(reference.shape)} and "
            f"{list(artifact.shape)}.",
            "evaluate both on the same data in the same order",
        )
    if not (np.isfinite(reference).all() and np.isfinite(artifact).all()):
        raise DataError("A certificate needs finite records. Got some that are not.", "look for NaN in the outputs")


def _check_range(margin: float, level: float) -> None:
    if not (math.isfinite(margin) and margin >= 0):
        raise InvalidParameterError(
            f"The 'margin' of a certificate must be a number ≥ 0 in the unit of the score. Got {margin!r}.",
            "write one point of accuracy as 0.01",
        )
    if not 0.5 < level < 1:
        raise InvalidParameterError(f"The 'level' of a one-sided bound must be in the range (0.5, 1). Got {level!r}.")
