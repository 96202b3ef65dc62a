"""The trials that nothing beats: non-dominated sets, their knee, their hypervolume."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimpoint.errors import InvalidParameterError, UnknownNameError, suggest
from trimpoint.target import METRICS
from trimpoint.values import Trial

SCORE = "score"


def costs(trials: Sequence[Trial], objectives: Sequence[str]) -> NDArray[np.float64]:
    """Return `[trials, objectives]`, each column to be minimised; `"score"` is the quality on `select`."""
    return np.array([[_cost(trial, name) for name in objectives] for trial in trials], dtype=np.float64).reshape(
        len(trials), len(objectives)
    )


def _cost(trial: Trial, name: str) -> float:
    if name == SCORE:
        if trial.quality is None:
            return np.inf
        return trial.quality.value if trial.quality.better == "lower" else -trial.quality.value
    if name not in METRICS:
        raise UnknownNameError(f"There is no metric {name!r}.", suggest(name, [*METRICS, SCORE]))
    if name not in trial.profile:
        return np.inf
    value = trial.profile[name].value
    return value if METRICS[name] == "lower" else -value


def non_dominated(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rows no other row dominates (no worse in every column, better in one); of equal rows the first.

    Args:
        points: `[n, k]`, to be minimised.
    """
    n = len(points)
    keep = np.ones(n, dtype=bool)
    for i in range(n):
        no_worse = (points <= points[i]).all(1)
        better = (points < points[i]).any(1)
        equal_before = (points[:i] == points[i]).all(1).any()
        keep[i] = not (no_worse & better).any() and not equal_before
    return keep


def hypervolume(points: NDArray[np.float64], reference: Sequence[float]) -> float:
    """Return the volume that `points` dominate below `reference`, by slicing along the last objective.

    Args:
        points: `[n, k]`, to be minimised.
        reference: the upper corner, one number for each objective.

    References:
        E. Zitzler and L. Thiele, "Multiobjective Optimization Using Evolutionary Algorithms", 1998.
    """
    ref = np.asarray(reference, dtype=np.float64)
    points = points[(points < ref).all(1)]
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(ref[0] - points[:, 0].min())
    order = np.argsort(points[:, -1], kind="stable")
    levels = np.append(points[order, -1], ref[-1])
    slices = [
        (levels[i + 1] - levels[i]) * hypervolume(points[order[: i + 1], :-1], list(ref[:-1]))
        for i in range(len(order))
        if levels[i + 1] > levels[i]
    ]
    return float(sum(slices))


@dataclass(frozen=True, repr=False)
class Frontier:
    """Non-dominated trials, in the order of the first objective.

    Args:
        trials: the members.
        objectives: what they were compared in: metrics, and `"score"`.
    """

    trials: tuple[Trial, ...]
    objectives: tuple[str, ...]

    @classmethod
    def of(cls, trials: Sequence[Trial], objectives: Sequence[str]) -> "Frontier":
        """Return the frontier of the complete trials among `trials`."""
        done = [t for t in trials if t.state == "complete" and np.isfinite(costs([t], objectives)).all()]
        points = costs(done, objectives)
        keep = [trial for trial, kept in zip(done, non_dominated(points), strict=True) if kept]
        return cls(tuple(sorted(keep, key=lambda t: _cost(t, objectives[0]))), tuple(objectives))

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    def __len__(self) -> int:
        return len(self.trials)

    def __getitem__(self, index: int) -> Trial:
        return self.trials[index]

    def __repr__(self) -> str:
        members = "".join(f"\n  {trial}" for trial in self.trials)
        return f"Frontier({len(self.trials)} trials by {', '.join(self.objectives)}){':' if members else ''}{members}"

    def hypervolume(self, ref: Mapping[str, float]) -> float:
        """Return the hypervolume up to the reference point `ref` (objective → its worst value, in its own unit)."""
        signs = [1 if name != SCORE and METRICS[name] == "lower" else -1 for name in self.objectives]
        if SCORE in self.objectives and self.trials and self.trials[0].quality:
            signs[self.objectives.index(SCORE)] = 1 if self.trials[0].quality.better == "lower" else -1
        corner = [sign * ref[name] for sign, name in zip(signs, self.objectives, strict=True)]
        return hypervolume(costs(self.trials, self.objectives), corner)

    def knee(self) -> Trial:
        """Return the trial farthest from the line between the extremes, each objective scaled to [0, 1].

        With more than two objectives, the one nearest to the ideal point.

        Raises:
            InvalidParameterError: if the frontier is empty.

        References:
            I. Das, "On characterizing the knee of the Pareto curve", 1999.
        """
        if not self.trials:
            raise InvalidParameterError("An empty frontier has no knee.", "no trial is complete yet")
        points = costs(self.trials, self.objectives)
        span = np.ptp(points, axis=0)
        scaled = (points - points.min(0)) / np.where(span > 0, span, 1)
        if points.shape[1] == 2:
            return self.trials[int(np.argmax(1 - scaled.sum(1)))]
        return self.trials[int(np.argmin(np.linalg.norm(scaled, axis=1)))]

    def pick(self, **limits: float) -> Trial:
        """Return the trial with the best score among those within the limits.

        Args:
            limits: metric → the most it may be (the least, where higher is better); `score` is a bound as well.

        Raises:
            InvalidParameterError: if none is within them; the hint names the nearest.
        """
        names = list(limits)
        within = costs(self.trials, names)
        bounds = np.array([limits[n] if self._minimised(n) else -limits[n] for n in names])
        fitting = [t for t, row in zip(self.trials, within, strict=True) if (row <= bounds).all()]
        if fitting:
            return min(fitting, key=lambda t: _cost(t, SCORE))
        if not self.trials:
            raise InvalidParameterError("No trial is complete yet.", "let the search run on: `trimpoint resume`")
        excess = ((within - bounds) / np.maximum(np.abs(bounds), 1e-12)).clip(0).max(1)
        near = self.trials[int(np.argmin(excess))]
        raise InvalidParameterError(
            f"No trial is within {limits}.", f"trial {near.number} ({near.label}) comes nearest, {excess.min():.0%} off"
        )

    def _minimised(self, name: str) -> bool:
        if name == SCORE:
            return any(t.quality is not None and t.quality.better == "lower" for t in self.trials)
        return METRICS.get(name) == "lower"
