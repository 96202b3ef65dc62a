"""The level of the bounds: how often they pass an artifact whose true drop is exactly the margin.

For proportions the rate is not drawn but summed over every table of counts. For the bootstrap it is simulated.
"""

import numpy as np
import pytest
from scipy import stats

from trimpoint.measure.intervals import paired_bootstrap_upper, paired_score_upper
from trimpoint.score import F1, MeanSquaredError, RocAuc
from trimpoint.trust.bounds import exact_paired_p_value, resampled_upper

LEVEL = 0.95


def false_pass_rates(n, margin, discordance, passes):
    """The exact rates of `passes(lost, gained)` when the true drop is the margin, for each share of discordance."""
    gain = np.array([(share - margin) / 2 for share in discordance])
    high = gain.max()
    spread = 5 * np.sqrt(n * high * (1 - high)) + 5
    gained = np.arange(max(0, int(n * gain.min() - spread)), min(n, int(n * high + spread)) + 1)
    most = np.full(len(gained), -1)
    for i, count in enumerate(gained):
        low, up = -1, min(n - count, count + int(n * margin)) + 1  # above that the estimate itself exceeds the margin
        while up - low > 1:
            middle = (low + up) // 2
            low, up = (middle, up) if passes(middle, int(count)) else (low, middle)
        most[i] = low
    tails = stats.binom.cdf(most, n - gained, ((gain + margin) / (1 - gain))[:, None])
    return (stats.binom.pmf(gained, n, gain[:, None]) * tails).sum(axis=1)


@pytest.mark.parametrize(
    ("n", "margin", "discordance"),
    [
        (100, 0.01, (0.01, 0.02, 0.05)),
        (100, 0.05, (0.05, 0.1, 0.2)),
        (269, 0.01, (0.01, 0.02, 0.05)),  # the worst of the score bound
        (300, 0.02, (0.02, 0.03, 0.05)),
        (1_000, 0.005, (0.005, 0.01, 0.02)),
        (1_000, 0.01, (0.01, 0.02, 0.05)),
        (10_000, 0.005, (0.005,)),
    ],
)
def test_the_exact_bound_holds_its_level(n, margin, discordance):
    rates = false_pass_rates(
        n, margin, discordance, lambda lost, gained: exact_paired_p_value(lost, gained, n, margin, LEVEL) <= 1 - LEVEL
    )
    assert rates.max() <= 1 - LEVEL + 1e-9
    if n >= 1_000:  # and is not bought by never passing anything
        assert rates.max() >= 0.03


def test_the_score_bound_alone_would_not():
    rates = false_pass_rates(
        269, 0.01, (0.01,), lambda lost, gained: paired_score_upper(lost, gained, 269, LEVEL) <= 0.01
    )
    assert 0.065 < rates[0] < 0.07


def mse(rng, size, changed):
    error = rng.normal(size=size)
    other = error + (rng.random(size) < changed) * 2 * rng.normal(size=size)
    return MeanSquaredError(), error[:, None] ** 2, other[:, None] ** 2


def f1(rng, size, changed):
    labels = (rng.random(size) < 0.2).astype(int)
    before = np.where(rng.random(size) < 0.1, rng.integers(0, 2, size), labels)
    after = np.where(rng.random(size) < changed, rng.integers(0, 2, size), before)
    return F1(), np.stack([before, labels], 1).astype(float), np.stack([after, labels], 1).astype(float)


def auc(rng, size, changed):
    labels = (rng.random(size) < 0.3).astype(float)
    before = rng.normal(size=size) + 1.5 * labels
    return RocAuc(), np.stack([before, labels], 1), np.stack([before + changed * rng.normal(size=size), labels], 1)


@pytest.mark.parametrize(
    ("make", "n", "changed"),
    [
        (mse, 100, 0.02),
        (mse, 300, 0.05),
        (mse, 300, 1.0),
        (f1, 100, 0.02),
        (f1, 300, 0.2),
        (f1, 1_000, 0.2),
        (auc, 100, 0.5),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_level_of_the_bootstrap(make, n, changed):
    rng = np.random.default_rng(7)
    score, before, after = make(rng, 100_000, changed)
    drop = score.aggregate(before) - score.aggregate(after)
    drop = drop if score.better == "higher" else -drop
    draws, passed = 200, 0
    for seed in range(draws):
        chosen = rng.integers(0, len(before), n)
        upper = resampled_upper(score, before[chosen], after[chosen], resamples=250, seed=seed)[1]
        passed += upper <= drop
    assert passed <= stats.binom.ppf(0.999, draws, 1 - LEVEL)


def test_heavy_tails_pass_no_more_often_where_the_bootstrap_alone_does():
    """Every squared error changes, by noise of five degrees of freedom; the true drop is known: 4 · 5 / 3."""
    rng, draws, passed, passed_alone = np.random.default_rng(11), 600, 0, 0
    for seed in range(draws):
        error = rng.normal(size=100)
        before, after = error[:, None] ** 2, (error + 2 * rng.standard_t(5, size=100))[:, None] ** 2
        options = {"level": LEVEL, "resamples": 250, "seed": seed}
        passed += resampled_upper(MeanSquaredError(), before, after, **options)[1] <= 20 / 3
        passed_alone += paired_bootstrap_upper(MeanSquaredError(), before, after, **options)[1] <= 20 / 3
    limit = stats.binom.ppf(0.99, draws, 1 - LEVEL)
    assert passed <= limit < passed_alone
