"""Ranges of integer formats: against brute force on the values themselves, and against ONNX Runtime's calibrator."""

import numpy as np
import pytest

from trimpoint.errors import DataError
from trimpoint.quantization.histogram import Histogram
from trimpoint.quantization.ranges import Levels, entropy, least_squares, minmax, percentile, squared_error

EIGHT, FOUR = Levels(count=256), Levels(count=16)


def drawn(kind: str, n: int = 200_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "gauss":
        return rng.normal(0.3, 1.0, n).astype(np.float32)
    if kind == "relu":
        return np.maximum(rng.normal(0.0, 2.0, n), 0.0).astype(np.float32)
    if kind == "laplace":
        return rng.laplace(0.0, 0.01, n).astype(np.float32)
    if kind == "outlier":
        return np.append(rng.normal(0.0, 1.0, n), [1e6]).astype(np.float32)
    if kind == "few":
        return rng.choice(np.float32([-1.5, 0.0, 0.25, 2.0]), n)
    raise ValueError(kind)


def counted(values: np.ndarray, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in np.array_split(values, parts):
        histogram.add(part)
    return histogram


def error_of(values: np.ndarray, low: float, high: float, levels: Levels) -> float:
    step, least, greatest = levels.grid(low, high)
    values = values.astype(np.float64)
    return float(np.mean((np.clip(np.round(values / step) * step, least, greatest) - values) ** 2))


KINDS = ("gauss", "relu", "laplace", "outlier", "few")


@pytest.mark.parametrize("kind", KINDS)
def test_counts_do_not_depend_on_how_the_values_are_split(kind):
    values = drawn(kind)
    whole, parts = counted(values), counted(np.random.default_rng(1).permutation(values), 97)
    assert whole.count == parts.count == len(values)
    assert (whole.low, whole.high) == (parts.low, parts.high) == (values.min(), values.max())
    for one, other in zip(whole.cells(), parts.cells(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_hold_their_values(kind):
    values = np.sort(drawn(kind).astype(np.float64))
    lower, upper, counts = counted(drawn(kind)).cells()
    assert counts.sum() == len(values)
    assert (lower <= upper).all()
    assert (upper[:-1] <= lower[1:]).all()
    ends = np.cumsum(counts).astype(int)
    for first, last, low, high in zip(np.append(0, ends[:-1]), ends - 1, lower, upper, strict=True):
        assert low <= values[first] <= values[last] <= high
    magnitude = np.maximum(abs(lower), abs(upper))
    assert ((upper - lower) <= magnitude / 128).all()


@pytest.mark.parametrize("levels", [EIGHT, FOUR, Levels(count=255, symmetric=True), Levels(count=15, symmetric=True)])
@pytest.mark.parametrize("kind", ["gauss", "relu", "laplace", "outlier"])
@pytest.mark.parametrize("share", [1.0, 0.7, 0.3])
def test_the_squared_error_is_that_of_the_values(kind, levels, share):
    values = drawn(kind)
    low, high = share * min(values.min(), 0.0), share * values.max()
    expected = error_of(values, low, high, levels)
    assert squared_error(counted(values).cells(), low, high, levels) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("levels", [EIGHT, FOUR, Levels(count=15, symmetric=True)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_range_on_a_grid_of_ranges_has_a_smaller_squared_error(kind, levels):
    values = drawn(kind, 10_000)
    low, high = least_squares(counted(values), levels)
    assert min(values.min(), 0.0) <= low <= 0.0 <= high <= values.max()
    found = error_of(values, low, high, levels)
    shares = 2.0 ** -np.linspace(0, 22, 67)
    ends = [(min(values.min(), 0.0) * a, values.max() * b) for a in shares for b in shares]
    if levels.symmetric:
        ends = [(-t, t) for t in abs(values).max() * 2.0 ** -np.linspace(0, 22, 400)]
    best = min(error_of(values, *pair, levels) for pair in ends if pair[1] > 0)
    assert found <= best * 1.1


@pytest.mark.parametrize("kind", ["gauss", "relu", "laplace", "outlier"])
@pytest.mark.parametrize("kept", [1.0, 0.9999, 0.99])
def test_percentiles_are_those_of_the_values(kind, kept):
    values = drawn(kind)
    low, high = percentile(counted(values), kept)
    cut = (1.0 - kept) / 2.0
    assert low == pytest.approx(min(np.quantile(values, cut, method="inverted_cdf"), 0.0), rel=0.01, abs=1e-6)
    if not (kind == "outlier" and kept == 1.0):
        assert high == pytest.approx(np.quantile(values, 1.0 - cut, method="inverted_cdf"), rel=0.01)
    assert minmax(counted(values)) == (min(values.min(), 0.0), values.max())


@pytest.mark.parametrize("kind", ["gauss", "laplace"])
def test_entropy_agrees_with_the_calibrator_of_onnx_runtime(kind):
    from onnxruntime.quantization.calibrate import HistogramCollector

    values = drawn(kind)
    collector = HistogramCollector("entropy", True, 2047, 128, None, "same")
    counts, edges = np.histogram(values, 2047, range=(-abs(values).max(), abs(values).max()))
    reference = collector.get_entropy_threshold((counts, edges, values.min(), values.max(), abs(values).max()), 128)
    low, high = entropy(counted(values), Levels(count=255, symmetric=True))
    assert high == pytest.approx(float(reference[1]), rel=0.35)
    assert low == pytest.approx(float(reference[0]), rel=0.35)


def test_an_outlier_does_not_hide_the_others():
    values = drawn("outlier")
    for low, high in (
        percentile(counted(values), 0.9999),
        least_squares(counted(values[:-1]), FOUR),
    ):
        assert -6.0 < low < -1.0
        assert 1.0 < high < 6.0
    # One value of 10⁶ weighs 10¹² squared: cutting it off costs more than all the others together.
    assert least_squares(counted(values), EIGHT)[1] > 1e5


@pytest.mark.parametrize(
    "rule", [minmax, lambda h: percentile(h, 0.999), lambda h: entropy(h, EIGHT), lambda h: least_squares(h, EIGHT)]
)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-30])
def test_constants_get_a_range_that_holds_them_and_zero(rule, value):
    histogram = counted(np.full(1000, value, dtype=np.float32))
    low, high = rule(histogram)
    assert low <= 0.0 <= high
    assert low <= value * 0.99 <= high or abs(value) < 1e-20


@pytest.mark.parametrize("levels", [EIGHT, Levels(count=255, symmetric=True)])
@pytest.mark.parametrize("values", [[0.0, 1.0], [-1.0, 1.0], [-1.0, 0.5, 1.0], [5.0]])
def test_entropy_keeps_values_that_lie_at_the_ends(levels, values):
    histogram = counted(np.random.default_rng(0).choice(np.float32(values), 10_000))
    assert entropy(histogram, levels) == (min(0.0, *values, 0.0), max(values))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(DataError, match=r"2 of 10 values are not finite"):
        counted(np.array([bad, bad] + [1.0] * 8, dtype=np.float32))


def test_the_range_of_no_values_is_empty():
    assert percentile(Histogram(), 0.999) == minmax(Histogram()) == (0.0, 0.0)
