"""The bounds of a certificate against closed forms, brute force and published figures."""

import math

import numpy as np
import pytest
from scipy import stats

from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.measure.intervals import paired_bootstrap_upper, paired_score_upper
from trimpoint.score import F1, MeanSquaredError
from trimpoint.trust.bounds import (
    exact_paired_p_value,
    exact_paired_upper,
    label_free_upper,
    resampled_upper,
    samples_needed,
)


def brute_force_p_value(lost, gained, n, drop):
    """The unconditional p-value by summing over every table, without restricting the nuisance parameter."""

    def statistic(b, c):
        # Tango's statistic with the restricted estimate found by maximising the likelihood itself on a fine grid.
        q = np.linspace(max(0, -drop), (1 - drop) / 2, 20_001)[1:-1]
        like = b * np.log(q + drop) + c * np.log(q) + (n - b - c) * np.log1p(-2 * q - drop)
        best = q[like.argmax()]
        return (b - c - n * drop) / math.sqrt(n * (2 * best + drop * (1 - drop)))

    tables = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    values = np.array([statistic(b, c) for b, c in tables])
    extreme = [table for table, value in zip(tables, values, strict=True) if value <= statistic(lost, gained) + 1e-3]
    grid = np.linspace(max(0, -drop), (1 - drop) / 2, 400)
    total = np.zeros(len(grid))
    for b, c in extreme:
        cells = np.stack([grid + drop, grid, 1 - 2 * grid - drop], axis=1).clip(0, 1)
        total += stats.multinomial.pmf([b, c, n - b - c], n, cells)
    return total.max()


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (0, 2), (2, 3), (4, 1)])
def test_p_value_against_the_sum_over_all_tables(lost, gained):
    n, drop = 14, 0.25
    exact = brute_force_p_value(lost, gained, n, drop)
    restricted = exact_paired_p_value(lost, gained, n, drop)
    # Restricting the nuisance parameter can only lower the maximum, and costs 1 % of the error.
    assert restricted <= exact + 0.0005 + 2e-3
    assert restricted >= 0.3 * exact


@pytest.mark.parametrize("n", [50, 300, 3_000])
def test_without_discordant_samples_it_is_the_rule_of_three(n):
    clopper_pearson = 1 - 0.05 ** (1 / n)
    upper = exact_paired_upper(0, 0, n)
    assert clopper_pearson <= upper <= clopper_pearson * 1.01


@pytest.mark.parametrize(("lost", "gained", "n"), [(30, 20, 2_000), (150, 100, 10_000), (60, 80, 5_000)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_it_agrees_with_the_score_bound_where_there_are_many(lost, gained, n, level):
    assert exact_paired_upper(lost, gained, n, level) == pytest.approx(
        paired_score_upper(lost, gained, n, level), abs=1.5e-4
    )


def test_it_grows_with_what_was_lost_and_with_the_level():
    bounds = [exact_paired_upper(lost, 10, 1_000) for lost in (5, 10, 20, 40)]
    assert bounds == sorted(bounds)
    levels = [exact_paired_upper(10, 10, 1_000, level) for level in (0.9, 0.95, 0.99, 0.999)]
    assert levels == sorted(levels)
    assert exact_paired_upper(50, 50, 50 + 50) > 0
    assert exact_paired_upper(7, 0, 7) == 1.0
    assert -1 < exact_paired_upper(0, 100, 100) < -0.9


@pytest.mark.parametrize(("changed", "n"), [(0, 10), (3, 40), (17, 1_000)])
def test_label_free_bound_is_the_binomial_tail(changed, n):
    upper = label_free_upper(changed, n)
    assert stats.binom.cdf(changed, n, upper) == pytest.approx(0.05, abs=1e-9)


def test_label_free_bound_covers_the_drop_of_any_labels():
    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 5, 500), rng.integers(0, 5, 500)
    after = np.where(rng.random(500) < 0.9, before, after)
    changed = int((before != after).sum())
    assert label_free_upper(changed, 500) > changed / 500
    for labels in (before, after, rng.integers(0, 5, 500)):
        assert ((before == labels).mean() - (after == labels).mean()) <= changed / 500 + 1e-12
    assert label_free_upper(5, 5) == 1.0


def test_samples_needed_is_what_was_measured_before():
    for discordant, needed in ((0.02, 1_240), (0.05, 3_100), (0.10, 6_200)):
        assert samples_needed(discordant, 0.01) == pytest.approx(needed, rel=0.005)


@pytest.mark.parametrize(("discordant", "drop"), [(0.02, 0.0), (0.05, 0.0), (0.05, 0.004), (0.1, -0.005)])
def test_so_many_samples_do_have_the_power(discordant, drop):
    n = samples_needed(discordant, 0.01, drop)
    rng = np.random.default_rng(1)
    tables = rng.multinomial(n, [(discordant + drop) / 2, (discordant - drop) / 2, 1 - discordant], size=400)
    passed = np.mean([paired_score_upper(int(lost), int(gained), n) <= 0.01 for lost, gained, _ in tables])
    assert 0.72 <= passed <= 0.9  # the approximation is good to a few points; 400 draws to two


def test_samples_needed_at_its_ends():
    assert samples_needed(0.02, 0.01, drop=0.01) is None
    assert samples_needed(0.0, 0.0) is None
    assert samples_needed(0.0, 0.01) == 299  # the smallest n with 0.99 ** n <= 0.05
    assert exact_paired_upper(0, 0, 302) <= 0.01
    assert samples_needed(0.05, 0.01, level=0.99) > samples_needed(0.05, 0.01)
    assert samples_needed(0.05, 0.01, power=0.9) > samples_needed(0.05, 0.01)


def squared_errors(n, changed, seed=0):
    rng = np.random.default_rng(seed)
    before = rng.normal(size=n) ** 2
    after = before.copy()
    after[:changed] += rng.random(changed)
    return before[:, None], after[:, None]


def test_resampled_bound_allows_for_the_worst_by_the_effective_number_of_changes():
    score = MeanSquaredError()
    before, after = squared_errors(400, 60)
    drop, upper = resampled_upper(score, before, after, resamples=300)[:2]
    plain = paired_bootstrap_upper(score, before, after, resamples=300)
    changes = (after - before)[:, 0]
    centred = changes - changes.mean()
    effective = (centred**2).sum() ** 2 / (centred**4).sum()
    assert 6 < effective < 60
    assert drop == plain[0]
    assert upper - plain[1] == pytest.approx(-math.log(0.05) * 6 / effective * centred.max() / 401, rel=1e-6)
    after[0] = 1_000.0  # one change carries the drop: it counts in full
    upper = resampled_upper(score, before, after, resamples=300)[1]
    plain = paired_bootstrap_upper(score, before, after, resamples=300)
    assert upper - plain[1] == pytest.approx(-math.log(0.05) * 1_000 / 400, rel=0.02)


def test_resampled_bound_of_many_normal_changes_is_the_bootstrap():
    rng = np.random.default_rng(3)
    before = 10 + rng.random((5_000, 1))
    after = before + rng.normal(size=(5_000, 1))
    drop, upper = resampled_upper(MeanSquaredError(), before, after, resamples=300)[:2]
    plain = paired_bootstrap_upper(MeanSquaredError(), before, after, resamples=300)[1]
    assert plain - drop < upper - drop < 1.02 * (plain - drop)


def test_resampled_bound_allows_for_what_was_not_seen():
    score = MeanSquaredError()
    before, after = squared_errors(400, 20)
    drop, upper = resampled_upper(score, before, after, resamples=300)[:2]
    plain = paired_bootstrap_upper(score, before, after, resamples=300)
    worst = (after - before).max() / 400
    assert drop == plain[0]
    assert upper == pytest.approx(plain[1] + -math.log(0.05) * worst, rel=0.05)
    drop, upper = resampled_upper(score, before, before.copy(), resamples=300)[:2]
    assert drop == 0
    assert upper == pytest.approx(-math.log(0.05) * np.ptp(before) / 400, rel=0.2)


def test_resampled_bound_of_a_score_that_points_upwards():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 300)
    before = np.stack([labels, labels], axis=1).astype(float)
    after = before.copy()
    after[:5, 0] = 1 - after[:5, 0]
    drop, upper = resampled_upper(F1(), before, after, resamples=300)[:2]
    assert 0 < drop < upper
    better, bound = resampled_upper(F1(), after, before, resamples=300)[:2]
    assert better == -drop
    assert better < bound < upper


@pytest.mark.parametrize(
    "call",
    [
        lambda: exact_paired_upper(5, 6, 10),
        lambda: exact_paired_upper(0, 0, 0),
        lambda: label_free_upper(11, 10),
        lambda: label_free_upper(0, 0),
        lambda: resampled_upper(MeanSquaredError(), np.zeros((3, 1)), np.zeros((4, 1))),
    ],
)
def test_counts_that_do_not_fit(call):
    with pytest.raises(DataError, match="Got"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: exact_paired_upper(1, 1, 10, 1.0),
        lambda: label_free_upper(1, 10, 0.5),
        lambda: samples_needed(0.01, 0.1, drop=0.02),
        lambda: samples_needed(0.01, 0.1, power=1.0),
        lambda: samples_needed(0.01, 0.1, level=0.2),
        lambda: resampled_upper(MeanSquaredError(), np.zeros((3, 1)), np.zeros((3, 1)), level=0.2),
    ],
)
def test_parameters_out_of_range(call):
    with pytest.raises(InvalidParameterError, match="Got"):
        call()
