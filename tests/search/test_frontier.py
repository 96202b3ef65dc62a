import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.search.trials import BASELINE, INT8, trial
from trimpoint.errors import InvalidParameterError, UnknownNameError
from trimpoint.search.frontier import SCORE, Frontier, hypervolume, non_dominated

POINTS = arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=st.integers(0, 6).map(float))


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


@given(POINTS)
@settings(deadline=None)
def test_non_dominated_agrees_with_the_definition(points):
    kept = non_dominated(points)
    for i, row in enumerate(points.tolist()):
        beaten = any(dominates(other, row) for other in points.tolist())
        repeated = row in points[:i].tolist()
        assert kept[i] == (not beaten and not repeated)


@given(POINTS)
@settings(deadline=None)
def test_hypervolume_agrees_with_counting_cells(points):
    k = points.shape[1]
    grid = np.stack(np.meshgrid(*[np.arange(6) + 0.5] * k, indexing="ij"), -1).reshape(-1, k)
    covered = (points[None] <= grid[:, None]).all(-1).any(1).sum()
    assert hypervolume(points, [6.0] * k) == pytest.approx(covered)


def test_frontier_leaves_out_what_is_dominated_or_unfinished():
    worse = trial(2, latency=3.0, size=2000.0, score=0.93)
    best = trial(3, latency=1.0, size=500.0, score=0.935)
    failed = trial(4, latency=0.1, size=10.0, score=0.99, state="failed")
    frontier = Frontier.of([BASELINE, INT8, worse, best, failed], ("latency_ms", "file_bytes", SCORE))
    assert [t.number for t in frontier] == [3, 1, 0]


def test_hypervolume_of_a_frontier_takes_the_reference_in_natural_units():
    frontier = Frontier.of([trial(1, latency=1.0, size=100.0, score=0.9)], ("latency_ms", SCORE))
    assert frontier.hypervolume({"latency_ms": 3.0, SCORE: 0.5}) == pytest.approx(2.0 * 0.4)


def test_knee_is_the_bend_of_the_curve():
    trials = [
        trial(i, latency=x, score=y) for i, (x, y) in enumerate([(1.0, 0.1), (1.2, 0.8), (3.0, 0.85), (9.0, 0.9)])
    ]
    assert Frontier.of(trials, ("latency_ms", SCORE)).knee().number == 1


def test_pick_takes_the_best_score_within_limits():
    frontier = Frontier.of([BASELINE, INT8, trial(2, latency=1.0, score=0.92)], ("latency_ms", SCORE))
    assert frontier.pick(latency_ms=2.5).number == 1
    assert frontier.pick(score=0.93, latency_ms=10).number == 0


def test_pick_names_the_nearest_when_nothing_fits():
    frontier = Frontier.of([BASELINE, INT8], ("latency_ms", SCORE))
    with pytest.raises(InvalidParameterError, match=r"trial 1 .* comes nearest"):
        frontier.pick(latency_ms=1.9)


def test_pick_refuses_an_unknown_metric():
    with pytest.raises(UnknownNameError, match="latency_ms"):
        Frontier.of([BASELINE], ("latency_ms",)).pick(latency=1.0)


def test_an_empty_frontier_has_no_knee():
    with pytest.raises(InvalidParameterError):
        Frontier((), ("latency_ms",)).knee()
