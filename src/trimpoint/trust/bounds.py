"""Bounds on a drop of quality that a certificate may rest on, and the number of samples that it takes."""

import math
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trimpoint.errors import DataError, InvalidParameterError

if TYPE_CHECKING:
    from trimpoint.score import Records, Score

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_RESTRICTION = 0.01  # share of the error that the restriction of the nuisance parameter may use up
_GRID = 48
_ENOUGH = 50  # changed samples from which the bootstrap stands alone
_FEW = 10  # changed samples below which the worst of them is not yet known
_LOOKED_AT = 256
_TAIL = 6  # effective changes below which the worst of them counts in full
_PARTS = 2_000  # in which the samples are put to measure their influence
_CHUNK = 2_000_000  # weights held at once


@lru_cache(maxsize=256)
def exact_paired_upper(lost: int, gained: int, n: int, level: float = 0.95) -> float:
    """Return the exact one-sided upper bound of the drop between two proportions on the same samples.

    The largest drop that the exact unconditional test does not reject. Unlike the score bound (Tango 1998), whose
    asymptotic level is missed by up to 1.7 points where few samples are discordant, it holds its level at every n.

    Args:
        lost: samples that the reference got right and the other model wrong.
        gained: the reverse.
        n: number of samples, those on which both agree included.
        level: of confidence, in (0.5, 1).

    Raises:
        DataError: if the counts do not fit together.
        InvalidParameterError: if `level` is not in (0.5, 1).

    References:
        Hsueh, Liu and Chen, "Unconditional exact tests for equivalence or noninferiority for paired binary endpoints",
        Biometrics 57 (2001). Berger and Boos, "P values maximized over a confidence set for the nuisance parameter",
        JASA 89 (1994).

    Example:
        >>> round(exact_paired_upper(30, 20, 2_000), 4)
        0.0111
    """
    if n < 1 or lost < 0 or gained < 0 or lost + gained > n:
        raise DataError(f"Paired counts must satisfy lost + gained ≤ n, none below 0. Got {lost}, {gained} of {n}.")
    _check_level(level)
    if lost == n:
        return 1.0
    low, high = (lost - gained) / n, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if exact_paired_p_value(lost, gained, n, middle, level) > 1 - level:
            low = middle
        else:
            high = middle
    return high


def exact_paired_p_value(lost: int, gained: int, n: int, drop: float, level: float = 0.95) -> float:
    """Return the exact unconditional p-value of "the true drop is at least `drop`".

    Samples are ordered by Tango's score statistic; its tail probability is maximised over the probability of `gained`
    in its Clopper-Pearson interval, whose own error, 1 % of `1 - level`, is added.

    Args:
        lost: samples that the reference got right and the other model wrong.
        gained: the reverse.
        n: number of samples.
        drop: in (-1, 1).
        level: of the bound that it is for.
    """
    from scipy import stats

    spent = _RESTRICTION * (1 - level)
    lowest = stats.beta.ppf(spent / 2, gained, n - gained + 1) if gained else 0.0
    highest = stats.beta.ppf(1 - spent / 2, gained + 1, n - gained) if gained < n else 1.0
    least, most = max(0.0, -drop), (1 - drop) / 2  # both probabilities of a discordant sample lie in [0, 1]
    low, high = min(max(lowest, least), most), min(max(highest, least), most)
    nuisance = np.linspace(math.sqrt(low), math.sqrt(high), _GRID) ** 2
    spread = 8 * math.sqrt(n * high) + 30
    counts = np.arange(max(0, math.floor(n * low - spread)), min(n, math.ceil(n * high + spread)) + 1)
    observed = float(_score_statistic(np.array([lost]), np.array([gained]), n, drop)[0])
    worst = _largest_lost(counts, n, drop, observed)
    share = np.clip((nuisance + drop) / np.maximum(1 - nuisance, 1e-300), 0.0, 1.0)
    tails = stats.binom.pmf(counts, n, nuisance[:, None]) * stats.binom.cdf(worst, n - counts, share[:, None])
    return min(1.0, float(tails.sum(axis=1).max()) + spent)


def _score_statistic(lost: NDArray[Any], gained: NDArray[Any], n: int, drop: float) -> Floats:
    """Return Tango's standardised difference from `drop` (Statistics in Medicine 17, 1998, equation 10)."""
    linear = (2 * n - lost + gained) * drop - lost - gained
    root = np.sqrt(np.maximum(linear**2 + 8 * n * gained * drop * (1 - drop), 0.0))
    variance = n * ((root - linear) / (2 * n) + drop * (1 - drop))
    difference = lost - gained - n * drop
    infinite = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    deviation: Floats = np.sqrt(np.maximum(variance, 0.0))
    standardised: Floats = np.divide(difference, deviation, out=infinite, where=variance > 1e-12)
    return standardised


def _largest_lost(gained: Ints, n: int, drop: float, observed: float) -> Ints:
    """Return for each count of `gained` the largest count of `lost` whose statistic is at most the observed one."""
    low, high = np.full(len(gained), -1), n - gained + 1
    while (open_ := high - low > 1).any():
        middle = (low + high) // 2
        within = _score_statistic(middle, gained, n, drop) <= observed + 1e-9
        low, high = np.where(open_ & within, middle, low), np.where(open_ & ~within, middle, high)
    return low


def resampled_upper(
    score: "Score",
    reference: "Records",
    artifact: "Records",
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the drop of any score, its one-sided upper bound by a paired bootstrap, and the bound's allowance.

    The bootstrap (BCa) knows only the changes that occur in the sample, and is too sure of itself where they are few or
    skew. So the bound is raised by as many further changes as may have gone unseen, −ln(1 − level) of them, 3.0 at 95 %
    (the rule of three), each like the worst change that was seen.

    - Where fewer than 50 records differ they count in full; with fewer than 10, each at least like a sample that goes
      from the best record of the reference to its worst.
    - Where more differ they count by 6 / e, at most in full. e is the effective number of changes: (Σc²)² / Σc⁴ of the
      influences c of the samples on the drop. It is k if k samples change alike, a third of n for normal changes, and
      small where a few carry the drop, that is, where a worse one may well be missing. The 6 was found by simulation.

    Args:
        score: aggregates records.
        reference: `[samples, k]`.
        artifact: `[samples, k]`, in the same order.
        level: of confidence, in (0.5, 1).
        resamples: how many.
        seed: of the resampling.

    Returns:
        The drop, its upper bound, and the part of the bound that is the allowance: it falls at least as 1 / n.

    Raises:
        DataError: if the records are not paired or there are none.
        InvalidParameterError: if `level` is not in (0.5, 1).

    References:
        Hanley and Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 249 (1983), for the rule of
        three. Kish, "Survey Sampling" (1965), for the effective number.
    """
    from trimpoint.measure.intervals import paired_bootstrap_upper

    _check_level(level)
    drop, upper = paired_bootstrap_upper(score, reference, artifact, level=level, resamples=resamples, seed=seed)
    changed = np.flatnonzero((reference != artifact).any(axis=1))
    share, n = 1.0, len(reference)
    if len(changed) >= _ENOUGH:
        changes = _influence_on_drop(score, reference, artifact, np.random.default_rng(seed).permutation(n) % _PARTS)
        squares = np.square(changes - changes.mean())
        worst = float(changes.max())
        share = min(1.0, _TAIL * float(np.square(squares).sum()) / max(float(squares.sum()) ** 2, 1e-300))
    else:
        parts = np.full(n, -1)
        parts[changed] = np.arange(len(changed))
        worst = float(np.nanmax(_influence_on_drop(score, reference, artifact, parts), initial=0.0))
        if len(changed) < _FEW:
            some = np.unique(np.linspace(0, n - 1, _LOOKED_AT).astype(int))
            parts = np.full(n, -1)
            parts[some] = np.arange(len(some))
            influence = _influence(score, reference, parts)
            worst = max(worst, float(np.nanmax(influence) - np.nanmin(influence)))
        upper = max(upper, drop)
    unseen = -share * math.log(1 - level) * max(worst, 0.0)
    return drop, upper + unseen, unseen


def _influence_on_drop(score: "Score", reference: "Records", artifact: "Records", parts: Ints) -> Floats:
    change = _influence(score, reference, parts) - _influence(score, artifact, parts)
    return change if score.better == "higher" else -change


def _influence(score: "Score", records: "Records", parts: Ints) -> Floats:
    """Return by how much the score grows when each part of the samples occurs once more; those of part −1 never do."""
    count = int(parts.max()) + 1
    change, rows = np.empty(count), max(1, _CHUNK // len(records))
    for start in range(0, count, rows):
        names = np.arange(start, min(start + rows, count))
        change[names] = score.aggregate_many(records, 1.0 + (parts == names[:, None]))
    return change - score.aggregate(records)


def label_free_upper(changed: int, n: int, level: float = 0.95) -> float:
    """Return an upper bound of the drop of accuracy from unlabelled samples.

    A prediction that has not changed is right as often as before, so the drop never exceeds the probability that a
    prediction changes; this is the exact (Clopper-Pearson) upper bound of that.

    Args:
        changed: samples whose predicted class differs between the two models.
        n: number of samples.
        level: of confidence, in (0.5, 1).

    Raises:
        DataError: if there are no samples, or more changed ones than samples.
        InvalidParameterError: if `level` is not in (0.5, 1).

    Example:
        >>> round(label_free_upper(0, 300), 5)
        0.00994
    """
    from scipy import stats

    if n < 1 or not 0 <= changed <= n:
        raise DataError(f"Changed predictions must satisfy 0 ≤ changed ≤ n and n ≥ 1. Got {changed} of {n}.")
    _check_level(level)
    return 1.0 if changed == n else float(stats.beta.ppf(level, changed + 1, n - changed))


def samples_needed(
    discordant: float, margin: float, drop: float = 0.0, level: float = 0.95, power: float = 0.8
) -> int | None:
    """Return how many samples it takes to prove a drop below a margin; `None` if no number does.

    The normal approximation for the difference of paired proportions, and at least what it takes when no sample at all
    is discordant.

    Args:
        discordant: share of samples that exactly one of the two models gets right.
        margin: the drop that is to be excluded.
        drop: the true drop.
        level: of the one-sided bound.
        power: probability that the proof succeeds.

    References:
        Liu, Hsueh, Hsieh and Chen, "Tests for equivalence or non-inferiority for paired binary data", Statistics in
        Medicine 21 (2002).

    Example:
        >>> [samples_needed(share, 0.01) for share in (0.02, 0.05, 0.1)]
        [1237, 3092, 6183]
    """
    if not abs(drop) <= discordant <= 1:
        raise InvalidParameterError(
            f"'discordant' must be a share of at least |drop| = {abs(drop):g}. Got {discordant}."
        )
    _check_level(level)
    if not 0 < power < 1:
        raise InvalidParameterError(f"The 'power' must be in the range (0, 1). Got {power!r}.")
    if drop >= margin or margin <= 0:
        return None
    z = NormalDist().inv_cdf(level) + NormalDist().inv_cdf(power)
    fewest = 1 if margin >= 1 else math.ceil(math.log(1 - level) / math.log1p(-margin))
    return max(fewest, math.ceil(z * z * (discordant - drop * drop) / (margin - drop) ** 2))


def _check_level(level: float) -> None:
    if not 0.5 < level < 1:
        raise InvalidParameterError(f"The 'level' of a one-sided bound must be in the range (0.5, 1). Got {level!r}.")
