from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from scipy import optimize, stats

from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.measure.intervals import bootstrap_interval, paired_bootstrap_upper, paired_score_upper, wilson
from trimpoint.score import Accuracy, Score


@dataclass(frozen=True, kw_only=True)
class MeanError(Score):
    name: ClassVar[str] = "mean-error"
    better: ClassVar[str] = "lower"

    def records(self, outputs, targets):
        return np.abs(outputs - targets)

    def aggregate(self, records, weights=None):
        return float(np.average(records[:, 0], weights=weights))


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (1, 29), (15, 148), (81, 263), (10, 10)])
def test_wilson_agrees_with_scipy(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


# Fagerland, Lydersen and Laake (2014), as reproduced by the R package `contingencytables`; `PropCIs::scoreci.mp` last.
PUBLISHED = [(7, 1, 21, 0.95, 0.026, 0.517), (16, 6, 161, 0.95, 0.0054, 0.1240), (28, 25, 618, 0.90, -0.0148, 0.0247)]


@pytest.mark.parametrize(("lost", "gained", "n", "level", "low", "high"), PUBLISHED)
def test_tango_agrees_with_published_intervals(lost, gained, n, level, low, high):
    one_sided = 0.5 + level / 2
    digits = 5e-4 if n == 21 else 5e-5
    assert paired_score_upper(lost, gained, n, one_sided) == pytest.approx(high, abs=digits)
    assert -paired_score_upper(gained, lost, n, one_sided) == pytest.approx(low, abs=digits)


def restricted_variance(lost, gained, n, drop):
    """Maximise the trinomial likelihood under P(lost) - P(gained) = drop numerically."""

    def negative(q):
        p = q + drop
        same = 1 - p - q
        parts = [(lost, p), (gained, q), (n - lost - gained, same)]
        return -sum(count * np.log(max(prob, 1e-300)) for count, prob in parts if count)

    result = optimize.minimize_scalar(
        negative, bounds=(max(0.0, -drop), (1 - drop) / 2), method="bounded", options={"xatol": 1e-12}
    )
    q = result.x
    return (2 * q + drop - drop**2) / n


@pytest.mark.parametrize(("lost", "gained", "n"), [(12, 5, 100), (30, 20, 2_000), (3, 9, 60), (0, 4, 50), (6, 0, 40)])
def test_tango_agrees_with_a_numerical_restricted_likelihood(lost, gained, n):
    z = stats.norm.ppf(0.95)
    estimate = (lost - gained) / n
    expected = optimize.brentq(
        lambda drop: (estimate - drop) / np.sqrt(restricted_variance(lost, gained, n, drop)) + z, estimate + 1e-9, 0.99
    )
    assert paired_score_upper(lost, gained, n) == pytest.approx(expected, abs=1e-5)


def test_tango_without_any_disagreement_stays_above_zero_and_shrinks():
    # With b = c = 0 the score equation solves to z² / (n + z²).
    z2 = stats.norm.ppf(0.95) ** 2
    assert paired_score_upper(0, 0, 100) == pytest.approx(z2 / (100 + z2), abs=1e-9)
    assert paired_score_upper(0, 0, 10_000) < 3e-4


def test_tango_holds_its_level_in_simulation():
    rng = np.random.default_rng(0)
    n, p_lost, p_gained = 1_000, 0.02, 0.01
    draws = rng.multinomial(n, [p_lost, p_gained, 1 - p_lost - p_gained], 3_000)
    covered = np.mean([paired_score_upper(int(b), int(c), n) >= p_lost - p_gained for b, c, _ in draws])
    assert 0.935 <= covered <= 0.97


def test_bad_counts_and_levels_are_refused():
    with pytest.raises(DataError, match="lost \\+ gained"):
        paired_score_upper(5, 6, 10)
    with pytest.raises(InvalidParameterError, match="range"):
        paired_score_upper(1, 1, 10, 0.3)
    with pytest.raises(DataError, match="Got 3 of 0"):
        wilson(3, 0)
    with pytest.raises(DataError, match="one shape"):
        paired_bootstrap_upper(Accuracy(), np.ones((4, 1)), np.ones((5, 1)))
    with pytest.raises(DataError, match="at least one sample"):
        bootstrap_interval(Accuracy(), np.ones((0, 1)))


def test_paired_bootstrap_respects_the_direction_of_the_score():
    rng = np.random.default_rng(0)
    base = rng.lognormal(size=(400, 1))
    worse = base + rng.normal(0.1, 0.05, (400, 1))
    drop, upper = paired_bootstrap_upper(MeanError(), base, worse, resamples=300)
    assert drop == pytest.approx(float((worse - base).mean()))
    assert drop < upper < drop + 0.02
    drop, upper = paired_bootstrap_upper(MeanError(), worse, base, resamples=300)
    assert drop < upper < 0


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(size=(2_000, 1))
    low, high = bootstrap_interval(MeanError(), values, resamples=2_000)
    half = 1.96 * values.std() / np.sqrt(2_000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_bootstrap_agrees_with_scipys_bca():
    rng = np.random.default_rng(3)
    values = rng.lognormal(size=150)
    expected = stats.bootstrap((values,), np.mean, n_resamples=9_999, method="BCa", rng=rng).confidence_interval
    low, high = bootstrap_interval(MeanError(), values.reshape(-1, 1), resamples=9_999)
    width = expected.high - expected.low
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.05 * width)


def test_same_seed_same_bound():
    rng = np.random.default_rng(2)
    base, other = (rng.random((300, 1)) < 0.9).astype(float), (rng.random((300, 1)) < 0.88).astype(float)
    first = paired_bootstrap_upper(Accuracy(), base, other, resamples=200, seed=4)
    assert first == paired_bootstrap_upper(Accuracy(), base, other, resamples=200, seed=4)
    b, c = int(((base == 1) & (other == 0)).sum()), int(((base == 0) & (other == 1)).sum())
    assert first[1] == pytest.approx(paired_score_upper(b, c, 300), abs=0.01)
