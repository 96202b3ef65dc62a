import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from trimpoint.errors import InvalidParameterError, MeasurementError, UnknownNameError
from trimpoint.measure import child, latency
from trimpoint.measure.latency import measure_latency, median_interval
from trimpoint.measure.process import ArtifactFiles, measuring, run_child
from trimpoint.target import Target

INPUTS = {"": np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)}


def test_a_candidate_is_compared_with_the_baseline(small, large):
    results = measure_latency(
        {"large": large, "small": small, "again": large},
        Target(),
        INPUTS | {"many": np.zeros((500, 64), np.float32)},
        baseline="large",
        rounds=7,
        turn_ms=15,
    )
    assert list(results) == ["large", "small", "again"]
    base, fast, again = (results[name][""] for name in results)
    assert (base.ratio, base.ratio_low, base.ratio_high) == (1, 1, 1)
    assert fast.ratio_low > 1.3
    assert fast.ratio_low <= fast.ratio <= fast.ratio_high
    assert 0.6 < again.ratio < 1.6
    assert fast.low_ms <= fast.median_ms <= fast.high_ms
    assert fast.median_ms <= fast.p95_ms
    assert fast.calls > base.calls > 7 * 3
    assert "7 rounds" in base.how or base.notes
    many = results["large"]["many"]
    assert many.median_ms > 5 * base.median_ms
    assert many.throughput_per_s > base.throughput_per_s


def test_figures_follow_from_the_times_of_the_calls():
    turns = [np.full(10, 2_000_000), np.full(10, 4_000_000), np.array([3_000_000] * 9 + [9_000_000])]
    result = latency._summary(turns, [turn * 3 for turn in turns], 8, 2, ())
    assert (result.median_ms, result.ratio, result.rounds, result.calls) == (3, 3, 3, 30)
    assert result.throughput_per_s == pytest.approx(8 * 10 / 0.036)
    assert result.p95_ms == 4
    assert result.spread_ms == 2
    assert result.ratio_low == pytest.approx(3)
    assert "batch 8, 2 threads" in result.how


@pytest.mark.parametrize("n", [6, 7, 9, 12, 20, 27, 61])
def test_the_order_statistic_interval_is_the_narrowest_that_covers(n):
    _, low, high = median_interval(np.arange(1.0, n + 1))
    covers = 1 - 2 * stats.binom.cdf(low - 1, n, 0.5)
    narrower = 1 - 2 * stats.binom.cdf(low, n, 0.5)
    assert covers >= 0.95 > narrower
    assert low + high == n + 1


def test_few_rounds_use_students_t_of_the_logarithms():
    values = np.array([1.0, 1.2, 1.1])
    middle, low, high = median_interval(values)
    expected = stats.t.interval(0.95, 2, np.log(values).mean(), stats.sem(np.log(values)))
    assert (middle, low, high) == pytest.approx((1.1, *np.exp(expected)), rel=1e-6)


class FakeSession:
    """Takes a scripted time for each turn."""

    signature = None

    def flat_inputs(self, inputs):
        return [inputs]


@pytest.mark.parametrize(
    ("turns", "used"),
    [
        ([100, 101, 99], [0, 1, 2]),
        ([100, 150, 101, 103], [0, 2, 3]),
        ([150, 151, 100, 104, 103], [2, 3, 4]),
        ([100, 200, 300, 400, 500, 600, 700, 800, 900], list(range(9))),
    ],
)
def test_disturbed_rounds_are_repeated_up_to_a_limit(monkeypatch, tmp_path, turns, used):
    times = iter(turns)
    monkeypatch.setattr(child, "_open", lambda *_: FakeSession())
    monkeypatch.setattr(child, "_inputs", lambda *_: {"": None})
    monkeypatch.setattr(child, "_calls", lambda *_: 5)
    monkeypatch.setattr(child, "_turn", lambda *_: np.full(5, next(times)))
    job = {"artifacts": {"a": {}}, "inputs": {"": {}}, "threads": 1, "seed": 0, "turn_ms": 1, "baseline": "a"}
    result, arrays = child.run_latency(job | {"rounds": 3, "max_rounds": 9, "tolerance": 0.1}, tmp_path)
    assert result["used"][""] == used
    assert len(arrays) == len(turns)


def test_a_disturbed_machine_is_reported():
    turns = [np.full(5, 100 * factor) for factor in (1, 2, 3)]
    (note,) = latency._notes(turns, 0.1)
    assert "differ by 200% after 3 rounds" in note
    assert latency._notes(turns[:1], 0.1) == ()


def test_every_round_has_its_own_order(monkeypatch, tmp_path):
    order = []
    monkeypatch.setattr(child, "_open", lambda entry, _: entry)
    monkeypatch.setattr(child, "_inputs", lambda *_: {"": None})
    monkeypatch.setattr(child, "_calls", lambda *_: 1)
    monkeypatch.setattr(child, "_turn", lambda session, *_: order.append(session.name) or np.ones(1))

    class Named(FakeSession):
        def __init__(self, name):
            self.name = name

    job = {"inputs": {"": {}}, "threads": 1, "seed": 0, "turn_ms": 1, "baseline": "a", "tolerance": 0.1}
    job |= {"artifacts": {name: Named(name) for name in "abc"}, "rounds": 12, "max_rounds": 12}
    child.run_latency(job, tmp_path)
    rounds = [tuple(order[start : start + 3]) for start in range(0, 36, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) > 3


def test_bad_arguments_are_refused(small):
    with pytest.raises(InvalidParameterError, match="at least 3"):
        measure_latency({"a": small}, Target(), INPUTS, baseline="a", rounds=2)
    with pytest.raises(UnknownNameError, match="no candidate 'b'"):
        measure_latency({"a": small}, Target(), INPUTS, baseline="b")
    with pytest.raises(InvalidParameterError, match="at least one shape"):
        measure_latency({"a": small}, Target(), {}, baseline="a")


def test_a_process_that_takes_too_long_is_ended(small):
    with pytest.raises(MeasurementError, match=r"must end within 0\.05 s"):
        measure_latency({"a": small}, Target(), INPUTS, baseline="a", timeout=0.05)


def test_an_error_in_the_process_arrives_with_its_message(small, tmp_path):
    wrong = {"": np.zeros((1, 65), np.float32)}
    with pytest.raises(MeasurementError, match=r"failed: The input 'input' must be float32 of shape \['batch', 64\]"):
        measure_latency({"a": small}, Target(), wrong, baseline="a")
    (tmp_path / "model.onnx").write_bytes(b"no model")
    broken = ArtifactFiles(directory=tmp_path, lowered=small.lowered)
    with pytest.raises(MeasurementError, match=r"cannot open 'model\.onnx'"):
        measure_latency({"a": broken}, Target(), INPUTS, baseline="a")


def test_a_crash_of_the_process_is_reported(small):
    with pytest.raises(MeasurementError, match="ended with exit code 1: KeyError: 'nonsense'"):
        run_child("nonsense", {"main": small}, INPUTS, threads=1, timeout=60)


def test_the_process_runs_without_torch_and_gives_the_right_answers(small):
    result, arrays = run_child("outputs", {"main": small}, {"x": INPUTS[""]}, threads=1, timeout=60)
    assert result["modules"] == []
    from trimpoint.runtimes import get_runtime

    session = get_runtime("onnxruntime").open(small.directory, small.lowered)
    np.testing.assert_array_equal(arrays["x_0"], session(INPUTS[""]))


def test_measuring_is_exclusive_on_the_machine():
    code = (
        "import sys; from trimpoint.measure.process import measuring\n"
        "with measuring(lambda message: (print(message, flush=True), sys.exit(0))): print('free')"
    )
    with measuring(), measuring():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "waiting: another process is measuring on this machine"
    assert done.stderr == ""
