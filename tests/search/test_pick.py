from dataclasses import replace

import pytest

from tests.search.trials import BASELINE, INT8, trial
from trimpoint.search.pick import choose, nearest, standing, verdict
from trimpoint.target import Goal
from trimpoint.values import Measurement, Profile


def test_merit_is_the_geometric_mean_of_the_ratios():
    small = trial(2, latency=1.0, size=1000.0, ratio=4.0, drop=0.0, upper=0.005)
    assert standing(small, BASELINE, Goal()).merit == pytest.approx((0.25 * 0.25) ** 0.5)


def test_the_interleaved_ratio_counts_not_the_quotient_of_two_times():
    disturbed = trial(2, latency=9.0, size=4000.0, ratio=2.0, drop=0.0, upper=0.005)
    assert standing(disturbed, BASELINE, Goal(minimize=("latency_ms",))).merit == pytest.approx(0.5)


def test_the_upper_bound_of_the_drop_decides():
    goal = Goal(max_drop=0.01)
    assert standing(trial(2, drop=0.002, upper=0.0099), BASELINE, goal).feasible
    held = standing(trial(2, drop=0.002, upper=0.0101), BASELINE, goal)
    assert not held.feasible
    assert "drop of accuracy" in held.limit


def test_what_a_certificate_will_likely_prove_goes_before_what_is_better():
    better = trial(2, ratio=8.0, size=400.0, drop=0.005, upper=0.009, forecast=0.0101)
    likely = trial(3, ratio=4.0, size=900.0, drop=0.004, upper=0.008, forecast=0.0099)
    likelier = trial(4, ratio=2.0, size=900.0, drop=0.002, upper=0.005, forecast=0.007)
    assert choose([BASELINE, better, likely, likelier], BASELINE, Goal(max_drop=0.01)).number == 3


def test_where_nothing_is_likely_to_be_proven_the_likeliest_is_handed_over():
    goal = Goal(max_drop=0.01, limits={"file_bytes": "0.5x"})
    better = trial(2, ratio=8.0, size=400.0, drop=0.005, upper=0.0099, forecast=0.012)
    likelier = trial(3, ratio=2.0, size=900.0, drop=0.0049, upper=0.0098, forecast=0.011)
    assert choose([BASELINE, better, likelier], BASELINE, goal).number == 3


def test_the_unmodified_model_does_not_go_before_a_feasible_doubtful_one():
    doubtful = trial(2, ratio=8.0, size=400.0, drop=0.005, upper=0.0099, forecast=0.012)
    assert choose([BASELINE, doubtful], BASELINE, Goal(max_drop=0.01)).number == 2
    slower = trial(3, ratio=0.5, size=4000.0, drop=0.0, upper=0.0)
    assert choose([BASELINE, slower], BASELINE, Goal(max_drop=0.01)).number == 0


def test_a_limit_relative_to_what_was_not_measured_cannot_be_judged():
    macs = {**BASELINE.profile.metrics, "macs": Measurement(value=0.0, unit="1")}
    for baseline in (BASELINE, replace(BASELINE, profile=Profile(macs))):
        held = standing(trial(2, drop=0.0, upper=0.0), baseline, Goal(limits={"macs": "0.5x"}))
        assert not held.feasible
        assert "cannot be judged" in held.limit


def test_limits_apply_to_the_worse_end_of_the_interval():
    goal = Goal(limits={"latency_ms": 1.01}, max_drop=0.1)
    assert not standing(trial(2, latency=1.0, drop=0.0, upper=0.0), BASELINE, goal).feasible
    assert standing(trial(2, latency=0.99, drop=0.0, upper=0.0), BASELINE, goal).feasible


def test_limits_as_ratios_are_of_the_baseline():
    goal = Goal(limits={"file_bytes": "0.25x"}, max_drop=0.1)
    assert standing(trial(2, size=1000.0, drop=0.0, upper=0.0), BASELINE, goal).feasible
    assert not standing(trial(2, size=1001.0, drop=0.0, upper=0.0), BASELINE, goal).feasible


def test_a_relative_limit_on_latency_is_judged_by_the_interleaved_ratio():
    disturbed = trial(2, latency=9.0, ratio=2.5, drop=0.0, upper=0.0)
    assert standing(disturbed, BASELINE, Goal(limits={"latency_ms": "0.5x"})).feasible
    assert not standing(disturbed, BASELINE, Goal(limits={"latency_ms": "0.39x"})).feasible
    assert not standing(disturbed, BASELINE, Goal(limits={"latency_ms": 2.0})).feasible


def test_choose_takes_the_best_feasible():
    bold = trial(2, latency=0.5, size=300.0, ratio=8.0, drop=0.02, upper=0.03)
    good = trial(3, latency=1.0, size=500.0, ratio=4.0, drop=0.004, upper=0.009)
    assert choose([BASELINE, INT8, bold, good], BASELINE, Goal()).number == 3
    assert choose([BASELINE, INT8, bold], BASELINE, Goal()).number == 1


def test_nothing_feasible_names_the_nearest_and_the_limit():
    goal = Goal(limits={"latency_ms": "0.1x"})
    assert choose([BASELINE, INT8], BASELINE, goal) is None
    near = nearest([BASELINE, INT8], BASELINE, goal)
    assert near.number == 1
    assert "misses latency_ms ≤ 0.4" in verdict(None, near, BASELINE, INT8, goal)


def test_verdict_says_what_the_search_added():
    best = trial(3, latency=1.0, size=500.0, ratio=4.0, drop=0.004, upper=0.009)
    text = verdict(best, None, BASELINE, INT8, Goal())
    assert "4.00× faster and 8.00× smaller than the unmodified model" in text
    assert "against the one-line int8 it is 2.00× faster and 2.20× smaller" in text
    assert "loses 0.40 points" in text


def test_verdict_admits_that_nothing_was_added():
    assert "found nothing better" in verdict(INT8, None, BASELINE, INT8, Goal())
    assert "unmodified model is the best" in verdict(BASELINE, None, BASELINE, INT8, Goal())
