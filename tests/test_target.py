"""Target and Goal: what they accept and how limits are read."""

import pytest

from trimpoint.errors import InvalidParameterError, UnknownNameError
from trimpoint.target import METRICS, Goal, Target


def test_target_keeps_lengths_as_tuples():
    assert Target(lengths={"length": [8, 16]}).lengths == {"length": (8, 16)}
    assert Target() == Target(runtime="onnxruntime", threads=1, batch=1)


@pytest.mark.parametrize("name", ["threads", "batch"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_target_out_of_range(name, value):
    with pytest.raises(InvalidParameterError, match=f"'{name}' parameter of Target must be a whole number"):
        Target(**{name: value})


def test_limits_are_absolute_or_relative():
    goal = Goal(limits={"latency_ms": "0.5x", "file_bytes": 1_000})
    assert goal.limit("latency_ms", 8.0) == 4.0
    assert goal.limit("file_bytes", 8.0) == 1_000


@pytest.mark.parametrize("limit", ["0.5", "x", "half", 0, -1, "-1x", float("nan"), float("inf"), True, None])
def test_limits_that_are_none(limit):
    with pytest.raises(InvalidParameterError, match="The limit on 'latency_ms'") as caught:
        Goal(limits={"latency_ms": limit})
    assert "0.5x" in caught.value.hint


def test_allowed_drop_is_absolute_or_a_share_of_the_baseline():
    assert Goal(max_drop=0.02).allowed_drop(0.9) == 0.02
    assert Goal(max_drop="1%").allowed_drop(80.0) == pytest.approx(0.8)
    assert Goal(max_drop="1%").allowed_drop(-80.0) == pytest.approx(0.8)
    assert Goal(max_drop=0).allowed_drop(0.9) == 0


@pytest.mark.parametrize("drop", [-0.1, "1", "%", "x%", "-1%", float("nan"), True, None])
def test_drops_that_are_none(drop):
    with pytest.raises(InvalidParameterError, match="'max_drop' parameter of Goal") as caught:
        Goal(max_drop=drop)
    assert "1%" in caught.value.hint


@pytest.mark.parametrize("more", [{"minimize": ("latency",)}, {"limits": {"latency": 1}}])
def test_unknown_metrics_are_suggested(more):
    with pytest.raises(UnknownNameError, match="no metric 'latency'") as caught:
        Goal(**more)
    assert "latency_ms" in caught.value.hint


def test_nothing_to_minimize():
    with pytest.raises(InvalidParameterError, match="at least one metric"):
        Goal(minimize=())


def test_every_metric_has_a_direction():
    assert set(METRICS.values()) <= {"lower", "higher", "neither"}
