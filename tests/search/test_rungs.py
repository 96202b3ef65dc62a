import pytest

from tests.search.trials import BASELINE, trial
from trimpoint.search.rungs import LEARNING, effort_for, outlook, promote, widths
from trimpoint.target import Goal


@pytest.mark.parametrize("trials", range(1, 20))
def test_widths_keep_to_the_number_of_trials(trials):
    rounds = widths(None, trials)
    assert 1 <= sum(rounds) <= trials
    assert list(rounds) == sorted(rounds, reverse=True)


def test_little_time_means_few_candidates():
    assert sum(widths(30.0, None)) < sum(widths(600.0, None))


def test_effort_fills_the_time_and_never_more():
    effort = effort_for(100.0, 2, full_seconds=400.0, before=0.05, overhead=10.0)
    assert effort == pytest.approx(0.05 + 40 / 400)
    assert effort_for(1e6, 1, full_seconds=10.0, before=0.0, overhead=0.0) == 1.0


def test_effort_always_grows():
    assert effort_for(0.0, 4, full_seconds=100.0, before=0.1, overhead=10.0) > 0.1


def test_promotion_prefers_merit_among_the_promising():
    bold = trial(1, ratio=8.0, size=500.0, drop=0.012, upper=0.015)
    mild = trial(2, ratio=4.0, size=900.0, drop=0.006, upper=0.011)
    hopeless = trial(3, ratio=16.0, size=200.0, drop=0.2, upper=0.21)
    rising = promote([bold, mild, hopeless], BASELINE, Goal(max_drop=0.01), 2, growth=16.0)
    assert [t.number for t in rising] == [1, 2]


def test_the_safe_choice_keeps_a_place():
    bold = [trial(i, ratio=8.0 + i, size=500.0, drop=0.01, upper=0.013) for i in (1, 2)]
    safe = trial(3, ratio=2.0, size=2000.0, drop=0.001, upper=0.004)
    rising = promote([*bold, safe], BASELINE, Goal(max_drop=0.01), 2, growth=4.0)
    assert [t.number for t in rising] == [2, 3]


def test_what_breaks_a_limit_rises_only_after_the_others():
    goal = Goal(max_drop=0.01, limits={"file_bytes": "0.2x"})
    large = trial(1, ratio=8.0, size=900.0, drop=0.001, upper=0.002)
    small = trial(2, ratio=2.0, size=700.0, drop=0.02, upper=0.03)
    assert [t.number for t in promote([large, small], BASELINE, goal, 2, growth=2.0)] == [2, 1]


def test_the_outlook_falls_with_training_and_keeps_room_for_the_certificate():
    sure, noisy = trial(1, drop=0.02, upper=0.02), trial(2, drop=0.02, upper=0.025, forecast=0.03)
    assert outlook(sure, 1.0) == pytest.approx(0.02)
    assert outlook(sure, 8.0) == pytest.approx(0.02 * 8**-LEARNING)
    assert outlook(noisy, 8.0) == pytest.approx(0.02 * 8**-LEARNING + 0.01 * 8 ** (-LEARNING / 2))
    assert outlook(trial(3), 2.0) == float("inf")


def test_failures_do_not_rise():
    failed = trial(1, ratio=9.0, state="failed", drop=0.0, upper=0.0)
    assert promote([failed], BASELINE, Goal(), 2, growth=4.0) == []
