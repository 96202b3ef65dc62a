"""Which range of values an integer format covers, by what was counted: min-max, percentile, entropy, squared error.

Every range holds zero, so that zeros (padding, what ReLU cuts off) are exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trimpoint.quantization.histogram import Histogram
from trimpoint.values import Format

Range = tuple[float, float]
BINS = 2048
"""Of the linear histogram that the entropy is taken of, as in the talk of its author."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The integers that a range is mapped to.

    Args:
        count: how many there are, 2 or more.
        symmetric: whether as much of the range lies below zero as above it.
    """

    count: int
    symmetric: bool = False

    def grid(self, low: float, high: float) -> tuple[float, float, float]:
        """Return the step, the least and the greatest value of the grid for a range that holds zero.

        One grid point is zero. The step of a range without width is 0.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        if self.symmetric:
            high = max(-low, high)
            step = 2 * high / (self.count - 1)
            return step, -high, high
        step = (high - low) / (self.count - 1)
        zero = float(np.round(-low / step)) if step else 0.0
        return step, -zero * step, (self.count - 1 - zero) * step


def minmax(histogram: Histogram) -> Range:
    """Return the range of all values."""
    return min(histogram.low, 0.0), max(histogram.high, 0.0)


def percentile(histogram: Histogram, kept: float) -> Range:
    """Return the range without the outermost values, as many of them below as above.

    Args:
        histogram: of the values.
        kept: share of the values in the range, in (0, 1].
    """
    lower, upper, counts = histogram.cells()
    if not len(counts):
        return minmax(histogram)
    ends = np.cumsum(counts)
    cut = (1.0 - kept) / 2.0 * ends[-1]

    def below(number: float) -> float:
        cell = min(int(np.searchsorted(ends, number)), len(ends) - 1)
        inside = (number - (ends[cell] - counts[cell])) / counts[cell]
        return float(lower[cell] + np.clip(inside, 0.0, 1.0) * (upper[cell] - lower[cell]))

    return min(below(cut), 0.0), max(below(ends[-1] - cut), 0.0)


def entropy(histogram: Histogram, levels: Levels) -> Range:
    """Return the range whose quantised values tell most about the distribution of the values.

    Of the thresholds for the magnitude, the one with the smallest Kullback-Leibler divergence between the values
    clipped there and the same values in as many levels as one sign has. It is looked for in 2,048 equal bins up to the
    greatest magnitude, so it is blind where a few outliers take up nearly all of them. Zeros are left out: they are
    exact on every grid, and after a ReLU they would outweigh everything else.

    References:
        Migacz, "8-bit inference with TensorRT", GPU Technology Conference (2017).
    """
    low, high = minmax(histogram)
    lower, upper, counts = histogram.cells()
    inner, outer = np.minimum(abs(lower), abs(upper)), np.maximum(abs(lower), abs(upper))
    inner[(lower < 0) & (upper > 0)] = 0.0
    one_sided = not levels.symmetric and (low == 0.0 or high == 0.0)
    wanted = levels.count if one_sided else max(2, levels.count // 2)
    top = max(-low, high)
    if top > 0.0:
        linear = _linear(inner, outer, np.where(outer == 0.0, 0.0, counts), top)
        sizes = np.array([*range(wanted, BINS, max(1, wanted // 16)), BINS])
        divergences = [_divergence(linear, int(size), wanted) for size in sizes]
        if np.isfinite(divergences).any():  # else all values are at the ends of the range
            top *= sizes[int(np.argmin(divergences))] / BINS
    return max(low, -float(top)), min(high, float(top))


def least_squares(histogram: Histogram, levels: Levels) -> Range:
    """Return the range with the smallest mean squared error of the quantised values, rounding and clipping together.

    Both ends are looked for in turns, on a scale of powers of two down from the extreme, then between the neighbours of
    the best.

    References:
        Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks" (2019), for the trade
        between the two errors; theirs is for Laplace's and Gauss's distributions, this is of the counts themselves.
    """
    cells = histogram.cells()
    low, high = minmax(histogram)
    if levels.symmetric:
        top = _descend(lambda t: squared_error(cells, -t, t, levels), max(-low, high))
        return max(low, -top), min(high, top)
    for _ in range(3):
        before = low, high
        high = _descend(lambda t, low=low: squared_error(cells, low, t, levels), minmax(histogram)[1])  # type: ignore[misc]
        low = -_descend(lambda t, high=high: squared_error(cells, -t, high, levels), -minmax(histogram)[0])  # type: ignore[misc]
        if (low, high) == before:
            break
    return low, high


def squared_error(cells: tuple[np.ndarray, np.ndarray, np.ndarray], low: float, high: float, levels: Levels) -> float:
    """Return the mean squared error of values in a grid: the exact mean if values lie evenly within each cell.

    Args:
        cells: lower edges, upper edges and counts, see `Histogram.cells`.
        low: lower end of the range.
        high: its upper end.
        levels: of the grid.
    """
    lower, upper, counts = cells
    step, least, greatest = levels.grid(low, high)
    width = upper - lower
    point = width == 0.0
    if step == 0.0:
        total = (upper**3 - lower**3) / 3.0
    else:
        a, b = np.clip(lower, least, greatest), np.clip(upper, least, greatest)
        rounding = _rounding(a, b, step)
        above = (np.maximum(upper - greatest, 0.0) ** 3 - np.maximum(lower - greatest, 0.0) ** 3) / 3.0
        below = (np.maximum(least - lower, 0.0) ** 3 - np.maximum(least - upper, 0.0) ** 3) / 3.0
        total = rounding + above + below
    value = lower[point]
    single = np.clip(np.round(value / step) * step, least, greatest) - value if step else -value
    errors = np.empty_like(counts)
    errors[point] = single**2
    errors[~point] = total[~point] / width[~point]
    return float((errors * counts).sum() / counts.sum())


def _rounding(start: np.ndarray, end: np.ndarray, step: float) -> np.ndarray:
    """Return the integral of the squared rounding error from `start` to `end`."""
    periods = [np.floor(x / step + 0.5) for x in (start, end)]
    first, last = start - periods[0] * step, end - periods[1] * step
    return np.asarray((periods[1] - periods[0]) * step**3 / 12.0 + (last**3 - first**3) / 3.0)


def _descend(error: Callable[[float], float], extreme: float) -> float:
    """Return the best end of a range at or below its extreme."""
    if extreme <= 0.0:
        return 0.0
    best, at = error(extreme), 0.0
    worse = 0
    # The error has one valley in practice; outliers make a plateau before it, of as many powers of two as they are far.
    for quarter in range(1, 4 * 40):
        now = error(extreme * 2.0 ** (-quarter / 4))
        if now < best:
            best, at, worse = now, quarter / 4, 0
        elif now > best * 2.0:
            worse += 1
            if worse == 4:
                break
    fine = [(error(extreme * 2.0**-shift), shift) for shift in np.linspace(max(0.0, at - 0.25), at + 0.25, 17)]
    return float(extreme * 2.0 ** -min(fine)[1])


def _linear(inner: np.ndarray, outer: np.ndarray, counts: np.ndarray, top: float) -> np.ndarray:
    """Return the counts of magnitudes up to `top` in equal bins; those above are left out."""
    edges = np.linspace(0.0, top, BINS + 1)
    points = inner == outer
    spread = np.zeros(BINS)
    if (~points).any():
        starts, ends, numbers = inner[~points], outer[~points], counts[~points]
        order = np.argsort(starts, kind="stable")
        spread = np.diff(_below(edges, starts[order], ends[order], numbers[order]))
    index = np.minimum((inner[points] / top * BINS).astype(np.int64), BINS - 1)
    np.add.at(spread, index[inner[points] <= top], counts[points][inner[points] <= top])
    return spread


def _below(edges: np.ndarray, starts: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return how many values lie below each edge, where they lie evenly between starts and ends.

    The density rises at starts and falls at ends; its integral is piecewise linear in between.
    """
    density = counts / (ends - starts)
    knots = np.concatenate([starts, ends])
    slopes = np.concatenate([density, -density])
    order = np.argsort(knots, kind="stable")
    knots, slopes = knots[order], np.cumsum(slopes[order])
    total = np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(knots))])
    return np.asarray(np.interp(edges, knots, total, left=0.0, right=float(counts.sum())))


def _divergence(linear: np.ndarray, size: int, levels: int) -> float:
    """Return the divergence of the first bins, with what lies above added to the last, from their levels."""
    clipped = linear[:size].copy()
    reference = clipped.copy()
    reference[-1] += linear[size:].sum()
    starts = np.arange(levels) * size // levels
    held = (clipped > 0).astype(np.float64)
    sums, filled = np.add.reduceat(clipped, starts), np.add.reduceat(held, starts)
    level = np.repeat(np.divide(sums, filled, out=np.zeros(levels), where=filled > 0), np.diff([*starts, size]))
    quantised = level * held
    if reference.sum() <= 0 or quantised.sum() <= 0:
        return np.inf
    p, q = reference / reference.sum(), quantised / quantised.sum()
    if (p[q == 0] > 0).any():
        q = (q + 1e-7) / (q + 1e-7).sum()
    inside = p > 0
    return float((p[inside] * np.log(p[inside] / q[inside])).sum())


def range_of(histogram: Histogram, kind: Format) -> Range:
    """Return the range of a tensor for a format, by the format's rule."""
    levels = Levels(count=2**kind.bits - (1 if kind.symmetric else 0), symmetric=kind.symmetric)
    if kind.observer == "percentile":
        return percentile(histogram, kind.percentile / 100.0)
    if kind.observer == "entropy":
        return entropy(histogram, levels)
    return least_squares(histogram, levels) if kind.observer == "mse" else minmax(histogram)
