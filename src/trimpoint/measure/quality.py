"""Quality: one evaluation for modules and sessions, with a record per sample, so that everything later is paired."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Subset

from trimpoint.data import as_numpy, as_tensors
from trimpoint.errors import DataError, ModelError
from trimpoint.losses import call, explained
from trimpoint.measure.intervals import (
    bootstrap_interval,
    paired_bootstrap_upper,
    paired_score_upper,
    score_value,
    wilson,
)
from trimpoint.measure.static import evaluating
from trimpoint.runtimes.base import Session
from trimpoint.score import Records, Score
from trimpoint.signature import BATCH, flatten
from trimpoint.task import Role, Task
from trimpoint.values import Measurement, Quality

Run = nn.Module | Session


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What a model scored on one role, sample by sample.

    Args:
        score: that was applied.
        role: of the data.
        records: `[samples, k]`, in the order of the data.
        value: the score over all samples.
        infinite: samples with an infinite value among their outputs (masked logits, for example); NaN is an error.
    """

    score: Score
    role: Role
    records: Records
    value: float
    infinite: int = 0

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.records)


def evaluate(run: Run, task: Task, role: Role, *, limit: int | None = None) -> Evaluation:
    """Score a module or a session on the data of a role, through the same code.

    Args:
        run: a module (in evaluation mode meanwhile, on the CPU), or a session of its exported core.
        task: gives data, score, `predict` and the batch size; a session with a fixed batch gets batches of that size.
        role: which data.
        limit: use the first so many samples only.

    Raises:
        DataError: if there is no such data, or outputs and targets do not fit together.
        ModelError: if the model does not run, or outputs or records are not finite.
    """
    parts, infinite, start = [], 0, 0
    with ExitStack() as stack:
        if isinstance(run, nn.Module):
            stack.enter_context(evaluating(run))
            stack.enter_context(torch.inference_mode())
        predict = _predictor(run, task)
        for count, (inputs, targets) in _batches(run, task, role, limit):
            outputs = _outputs(predict, inputs)
            infinite += _check_finite(outputs, count, role, start)
            parts.append(_records(task.score, outputs, as_numpy(targets), role)[:count])
            start += count
    records = np.concatenate(parts)
    value = score_value(task.score, records)
    return Evaluation(score=task.score, role=role, records=records, value=value, infinite=infinite)


def quality(evaluation: Evaluation, baseline: Evaluation | None = None, *, level: float = 0.95) -> Quality:
    """Return a score with its interval and, paired with the baseline's records, its drop with an upper bound.

    Proportions: Wilson's interval, and Tango's score bound of the drop. Other scores: bootstrap (BCa), paired.

    Args:
        evaluation: of the model.
        baseline: of the reference, on the same samples in the same order.
        level: of the two-sided interval and of the one-sided bound.

    Raises:
        DataError: if the two evaluations are not of the same samples and score.
    """
    score, records = evaluation.score, evaluation.records
    if score.proportion:
        low, high = wilson(float(records[:, 0].sum()), len(records), level)
    else:
        low, high = bootstrap_interval(score, records, level=level)
    drop, upper = (None, None) if baseline is None else drop_upper(evaluation, baseline, level=level)
    return Quality(
        name=score.name,
        value=evaluation.value,
        n=evaluation.n,
        split=evaluation.role,
        better=score.better,
        low=low,
        high=high,
        drop=drop,
        drop_upper=upper,
    )


def drop_upper(evaluation: Evaluation, baseline: Evaluation, *, level: float = 0.95) -> tuple[float, float]:
    """Return how much worse than the baseline a model is (positive is worse), and the one-sided upper bound of it.

    Raises:
        DataError: if the two evaluations are not of the same samples and score.
    """
    pairs = (baseline, evaluation)
    if baseline.score != evaluation.score or baseline.role != evaluation.role or baseline.n != evaluation.n:
        described = " and ".join(f"{one.score.name} on {one.n:,} samples of `{one.role}`" for one in pairs)
        raise DataError(f"Evaluations can only be compared on the same samples by the same score. Got {described}.")
    if not evaluation.score.proportion:
        return paired_bootstrap_upper(evaluation.score, baseline.records, evaluation.records, level=level)
    lost, gained = discordant(evaluation, baseline)
    return (lost - gained) / evaluation.n, paired_score_upper(lost, gained, evaluation.n, level)


def forecast_upper(quality: Quality, n: int, *, level: float = 0.95, power: float = 0.8) -> float | None:
    """Return the upper bound of the drop that fresh samples will prove with a chance of `power`; or a lower one.

    The drop that is estimated here differs from the one estimated there by the noise of both (a prediction interval,
    normal approximation); the bound adds `level` of the noise there. It is what keeps a candidate that is just good
    enough on `select` from being certified and found unproven.

    Args:
        quality: paired with the reference's, its bound at `level`.
        n: number of fresh samples.
        level: of the one-sided bound.
        power: chance that the bound comes out at most so high.
    """
    if quality.drop is None or quality.drop_upper is None:
        return None
    bound, room = NormalDist().inv_cdf(level), NormalDist().inv_cdf(power)
    here = (quality.drop_upper - quality.drop) / bound
    there = here * math.sqrt(quality.n / n)
    return quality.drop + bound * there + room * math.hypot(here, there)


def discordant(evaluation: Evaluation, baseline: Evaluation) -> tuple[int, int]:
    """Return how many samples the baseline got right and the model wrong, and the reverse (proportions only)."""
    right, other = baseline.records[:, 0] > 0.5, evaluation.records[:, 0] > 0.5
    return int((right & ~other).sum()), int((other & ~right).sum())


def generalisation_gap(run: Run, task: Task, select: Evaluation, *, seed: int = 0) -> Measurement:
    """Return by how much the score on training data is better than on `select`, with its 95 % interval.

    As many training samples are drawn as `select` has, at most all of them, without augmentation. The two intervals
    are joined by the method of variance estimates recovery (Newcombe, "Interval estimation for the difference between
    independent proportions", 1998, method 10; Zou and Donner, 2008, for other scores).

    Args:
        run: a module or a session.
        task: with `train` data.
        select: the model's evaluation on `select`.
        seed: of the draw.

    Raises:
        DataError: if the task has no training data.
    """
    data = task.data("train")
    picked = np.random.default_rng(seed).permutation(len(data))[: select.n]
    drawn = task.with_(train=Subset(data, np.sort(picked).tolist()))  # type: ignore[arg-type]
    train, other = quality(evaluate(run, drawn, "train")), quality(select)
    better, worse = (train, other) if task.score.better == "higher" else (other, train)
    gap = better.value - worse.value
    low = gap - float(np.hypot(better.value - _end(better.low), _end(worse.high) - worse.value))
    high = gap + float(np.hypot(_end(better.high) - better.value, worse.value - _end(worse.low)))
    return Measurement(
        value=gap,
        unit="1",
        better="lower",
        n=train.n,
        low=low,
        high=high,
        how=f"{task.score.name} on {train.n:,} samples of `train` ({train.value:.4g}) against {other.n:,} of `select` "
        f"({other.value:.4g}), positive is better on `train`",
    )


def _end(value: float | None) -> float:
    return float("nan") if value is None else value


def _predictor(run: Run, task: Task) -> Callable[[Any], Any]:
    """Return inputs (tensors) → outputs, with what surrounds the core where the task says so."""
    if isinstance(run, nn.Module):
        core = task.core_of(run)
        if task.predict is None:
            return lambda inputs: call(run, inputs)
        around = task.predict
        return lambda inputs: around(lambda value: call(core, value), inputs)
    if task.predict is None:
        return lambda inputs: run(as_numpy(inputs))
    around = task.predict
    return lambda inputs: around(lambda value: as_tensors(run(as_numpy(value))), inputs)


def _batches(run: Run, task: Task, role: Role, limit: int | None) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """Yield the number of samples that count and a batch; a short last one is filled up where the batch is fixed."""
    data = task.data(role)
    total = len(data) if limit is None else min(limit, len(data))
    fixed = None if task.predict is not None else _fixed_batch(run)
    size = fixed or _open_batch(run, task.batch_size)
    for start in range(0, total, size):
        chosen = list(range(start, min(start + size, total)))
        filled = chosen + chosen[-1:] * (size - len(chosen)) if fixed else chosen
        yield len(chosen), task.collate_checked([data[i] for i in filled], role)


def _fixed_batch(run: Run) -> int | None:
    if isinstance(run, nn.Module) or not run.signature.inputs or not run.signature.inputs[0].shape:
        return None
    first = run.signature.inputs[0].shape[0]
    return first if isinstance(first, int) else None


def _open_batch(run: Run, wanted: int) -> int:
    """Return the wanted size of a batch, or the largest that memory was planned for."""
    return wanted if isinstance(run, nn.Module) else min(wanted, run.signature.limits.get(BATCH, wanted))


def _outputs(predict: Callable[[Any], Any], inputs: Any) -> Any:
    with explained(inputs):
        return as_numpy(predict(inputs))


def _check_finite(outputs: Any, count: int, role: Role, start: int) -> int:
    """Return how many samples have an infinite output.

    Raises:
        ModelError: if one of them has a NaN.
    """
    infinite = np.zeros(count, bool)
    for leaf in flatten(outputs):
        array = np.asarray(leaf)
        if array.dtype.kind != "f":
            continue
        if array.shape[:1] < (count,):
            array = np.broadcast_to(array.reshape(1, -1), (count, array.size))
        array = array[:count].reshape(count, -1)
        undefined = np.isnan(array).any(1)
        if undefined.any():
            raise ModelError(
                f"The model's output is not a number (NaN) for {undefined.sum()} of {count} samples of `{role}`; the "
                f"first is sample {start + int(undefined.argmax())}.",
                "look for weights or data that are not finite, or for a format with too small a range",
            )
        infinite |= np.isinf(array).any(1)
    return int(infinite.sum())


def _records(score: Score, outputs: Any, targets: Any, role: Role) -> NDArray[np.float64]:
    try:
        records = score.records(outputs, targets)
    except (ValueError, IndexError, TypeError, KeyError) as error:
        raise _misfit(score, outputs, targets, role, str(error)) from error
    samples = next((len(leaf) for leaf in flatten(targets) if np.ndim(leaf)), None)
    if records.ndim != 2 or (samples is not None and len(records) != samples):
        raise _misfit(score, outputs, targets, role, f"it gave records of shape {list(records.shape)}")
    if not np.isfinite(records).all():
        bad = int((~np.isfinite(records)).any(1).sum())
        raise ModelError(
            f"The {score.name} of {bad} of {len(records)} samples in a batch of `{role}` is not finite.",
            "look for outputs or targets that are not finite",
        )
    return records


def _misfit(score: Score, outputs: Any, targets: Any, role: Role, why: str) -> DataError:
    shapes = [", ".join(str(list(np.shape(leaf))) for leaf in flatten(value)) for value in (outputs, targets)]
    return DataError(
        f"The {score.name} does not fit the model's outputs and the targets of `{role}`: outputs of shape {shapes[0]}, "
        f"targets of shape {shapes[1]}; {why}.",
        "choose another score, or bring targets into the shape it expects with `collate`",
    )
