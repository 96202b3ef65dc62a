"""Confidence intervals: of one proportion, and of the drop between two models scored on the same samples."""

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trimpoint.errors import DataError, InvalidParameterError

if TYPE_CHECKING:
    from trimpoint.score import Records, Score

_GROUPS = 200
_CHUNK = 2_000_000
_BATCH = 4_000_000  # weights held at once


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the two-sided Wilson score interval of a proportion.

    Args:
        successes: how many of the samples count as a success.
        n: number of samples.
        level: of confidence, in (0, 1).

    Raises:
        DataError: if there are no samples, or more successes than samples.
        InvalidParameterError: if `level` is not in (0, 1).

    Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Example:
        >>> [round(end, 4) for end in wilson(81, 263)]
        [0.2553, 0.3662]
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"A proportion needs 0 ≤ successes ≤ n and n ≥ 1. Got {successes} of {n}.")
    z = _normal_quantile(0.5 + _checked(level) / 2)
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return (0.0 if successes == 0 else low, 1.0 if successes == n else high)


def paired_score_upper(lost: int, gained: int, n: int, level: float = 0.95) -> float:
    """Return the one-sided upper bound of the drop `(lost − gained) / n` between two paired proportions.

    The bound is the largest drop that the score test does not reject. It stays valid where samples disagree rarely or
    never, where an interval around the estimate collapses.

    Args:
        lost: samples that the reference got right and the other model wrong.
        gained: the reverse.
        n: number of samples, those on which both agree included.
        level: of confidence, in (0.5, 1).

    Raises:
        DataError: if the counts do not fit together.
        InvalidParameterError: if `level` is not in (0.5, 1).

    Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design"
    (Statistics in Medicine 17, 1998), equations 10 and 11.

    Example:
        >>> round(paired_score_upper(30, 20, 2_000), 4)
        0.0111
    """
    if n < 1 or lost < 0 or gained < 0 or lost + gained > n:
        raise DataError(f"Paired counts must satisfy lost + gained ≤ n, none below 0. Got {lost}, {gained} of {n}.")
    if not 0.5 < level < 1:
        raise InvalidParameterError(f"The 'level' of a one-sided bound must be in the range (0.5, 1). Got {level!r}.")
    z = _normal_quantile(level)
    low, high = (lost - gained) / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _score_statistic(lost, gained, n, middle) >= -z:
            low = middle
        else:
            high = middle
    return high


def _score_statistic(lost: int, gained: int, n: int, drop: float) -> float:
    """Return Tango's standardised difference from `drop`, with its variance at the restricted maximum likelihood."""
    a, b, c = 2 * n, (2 * n - lost + gained) * drop - lost - gained, -gained * drop * (1 - drop)
    restricted = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * restricted + drop * (1 - drop))
    difference = lost - gained - n * drop
    return difference / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, difference) * bool(difference)


def bootstrap_interval(
    score: "Score", records: "Records", *, level: float = 0.95, resamples: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """Return the two-sided bias-corrected and accelerated (BCa) bootstrap interval of a score.

    Args:
        score: aggregates records.
        records: `[samples, k]`.
        level: of confidence, in (0, 1).
        resamples: how many.
        seed: of the resampling.

    Raises:
        DataError: if there are no samples.
        InvalidParameterError: if `level` is not in (0, 1).
    """
    tail = (1 - _checked(level)) / 2
    low, high = _bca(_Statistic(score, (records,)), (tail, 1 - tail), resamples, seed)
    return low, high


def paired_bootstrap_upper(
    score: "Score",
    baseline_records: "Records",
    records: "Records",
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the drop of a score and its one-sided upper bound, by resampling samples in pairs.

    The interval is bias-corrected and accelerated (BCa); the acceleration comes from a delete-group jackknife with at
    most 200 groups. Where no record differs between the two models the bound is zero: the bootstrap cannot see what
    did not occur in the sample.

    Args:
        score: aggregates records.
        baseline_records: `[samples, k]`, of the reference.
        records: `[samples, k]`, of the other model, in the same order.
        level: of confidence, in (0, 1).
        resamples: how many.
        seed: of the resampling.

    Returns:
        The drop (positive is worse, whichever way the score points) and its upper bound.

    Raises:
        DataError: if the records are not paired or there are none.
        InvalidParameterError: if `level` is not in (0, 1).

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 14.
    """
    if baseline_records.shape != records.shape:
        raise DataError(
            f"Paired records must have one shape. Got {list(baseline_records.shape)} and {list(records.shape)}.",
            "evaluate both models on the same samples in the same order",
        )
    statistic = _Statistic(score, (baseline_records, records))
    (upper,) = _bca(statistic, (_checked(level),), resamples, seed)
    return statistic.estimate, upper


class _Statistic:
    """A score, or the drop between two, as a function of the weights of the samples."""

    def __init__(self, score: "Score", records: "tuple[Records, ...]") -> None:
        self.score, self.records, self.n = score, records, len(records[0])
        if self.n == 0:
            raise DataError("An interval needs at least one sample. Got none.")

    @property
    def estimate(self) -> float:
        """The value on the samples as they are."""
        return float(self._drop([score_value(self.score, records) for records in self.records]))

    def many(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values for `[resamples, samples]` weights."""
        return np.asarray(self._drop([self.score.aggregate_many(records, weights) for records in self.records]))

    def _drop(self, values: list[Any]) -> Any:
        if len(values) == 1:
            return values[0]
        return values[0] - values[1] if self.score.better == "higher" else values[1] - values[0]


def score_value(score: "Score", records: "Records") -> float:
    """Return the score of the records.

    Raises:
        DataError: if it is not defined on them.
    """
    value = score.aggregate(records)
    if not math.isfinite(value):
        raise DataError(
            f"The {score.name} of {len(records):,} samples must be a finite number. Got {value}.",
            "the score may be undefined on this data, such as an AUC with only one class",
        )
    return value


def _bca(statistic: _Statistic, quantiles: tuple[float, ...], resamples: int, seed: int) -> tuple[float, ...]:
    rng, n, estimate = np.random.default_rng(seed), statistic.n, statistic.estimate
    chunk = max(1, _CHUNK // n)
    draws = np.concatenate(
        [
            statistic.many(np.stack([_resample(rng, n) for _ in range(min(chunk, resamples - start))]))
            for start in range(0, resamples, chunk)
        ]
    )
    draws = np.sort(draws[np.isfinite(draws)])
    if len(draws) == 0:
        raise DataError("The score is not finite on any resample of the data.", "give more samples, of every class")
    below = (np.count_nonzero(draws < estimate) + np.count_nonzero(draws <= estimate)) / 2 / len(draws)
    bias = _normal_quantile(min(max(below, 1 / (len(draws) + 1)), 1 - 1 / (len(draws) + 1)))
    acceleration = _acceleration(statistic, rng)
    ends = []
    for quantile in quantiles:
        z = bias + _normal_quantile(quantile)
        adjusted = NormalDist().cdf(bias + z / max(1 - acceleration * z, 1e-6))
        ends.append(float(np.quantile(draws, adjusted)))
    return tuple(ends)


def _resample(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)


def _acceleration(statistic: _Statistic, rng: np.random.Generator) -> float:
    """Return BCa's acceleration by the delete-group jackknife.

    It does not depend on the size g of the groups: their sums have g times the third moment, and are g times fewer.
    """
    n = statistic.n
    if n < 2:
        return 0.0
    groups = rng.permutation(n) % min(n, _GROUPS)
    chunk = max(1, _CHUNK // n)
    names = np.arange(groups.max() + 1)
    values = np.concatenate(
        [
            statistic.many((groups[None] != names[start : start + chunk, None]).astype(np.float64))
            for start in range(0, len(names), chunk)
        ]
    )
    values = values[np.isfinite(values)]
    deviations = values.mean() - values if len(values) else values
    scale = float((deviations**2).sum()) ** 1.5
    return float((deviations**3).sum()) / (6 * scale) if scale > 0 else 0.0


def _normal_quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise InvalidParameterError(f"The 'level' of an interval must be in the range (0, 1). Got {level!r}.")
    return level
