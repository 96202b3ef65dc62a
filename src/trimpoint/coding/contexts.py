"""A model of the symbols of a weight matrix: where it is zero, and which values it has elsewhere.

The matrix is coded in batches: some rows at a time, and of these every `stripes`-th column at a time. Whatever has been
coded predicts the rest: how often a column, a row, and the neighbours within the row were zero, and how large their
values were. Each prediction is a logarithm of odds (of a ratio, for magnitudes); their sum, with weights that are
learnt on the way, selects an adaptive probability. Everything within a batch is one call of NumPy, so Python costs
little per weight.

Encoder and decoder must compute the same numbers on different processors. So all that is learnt is counted in
integers, logarithms are piecewise linear (`frexp`), and what is floating point consists of single additions, products
and quotients, which IEEE 754 rounds in one way only.

References:
    The scheme follows context-adaptive arithmetic coding as DeepCABAC (Wiedemann et al. 2020, now ISO/IEC 15938-17)
    applies it to weights, and the mixing of log-odds of Mahoney's PAQ (2005), batch by batch instead of bit by bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from trimpoint.coding.entropy import Bits, Coder, Floats, Ints, Symbols

Number = TypeVar("Number", Floats, Ints)

_SMALLEST_BATCH, _BATCHES = 96, 1024
_MOST_STRIPES = 16
_STEPS, _BINS, _MIDDLE = 4, 129, 64
_SCALES, _SIDES = 17, 5
_SHRINK_COLUMN, _SHRINK_ROW, _SHRINK_NEAR = 8.0, 16.0, 3.0
_RATE = 0.02
_BACKOFF = 16.0
_UNIT, _PRIOR = 32, 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a matrix is read; chosen by the encoder, stored beside the symbols.

    Args:
        zeros: code first where symbol `center` is, then the others.
        near: predict from neighbours within the row, too.
        period: distance of further neighbours within the row, such as the width of an image; 0 for none.
        sides: predict the side of `center` on which a value lies from its neighbours.
        spread: mean magnitude to expect of the values.
    """

    zeros: bool = True
    near: bool = False
    period: int = 0
    sides: bool = False
    spread: int = 1


def code_matrix(
    coder: Coder, shape: tuple[int, ...], size: int, center: int, settings: Settings, matrix: Symbols | None
) -> Symbols:
    """Code the symbols of a matrix and return them.

    Args:
        coder: a `Writer`, with the matrix, or a `Reader`, without.
        shape: of the matrix, `(rows, columns)`.
        size: of the alphabet: symbols are at least 0 and less than this.
        center: the symbol that stands for zero; the distance from it is a symbol's magnitude.
        settings: how.
        matrix: `[rows, columns]`, or `None` for a reader.
    """
    rows, columns = shape
    result = np.zeros((rows, columns), np.int32) if matrix is None else matrix
    model = _Model(rows, columns, size, center, settings)
    for batch in model.batches():
        known = None if matrix is None else matrix[batch.rows, batch.columns]
        flags = model.code_flags(coder, batch, known)
        values = model.code_values(coder, batch, flags, known)
        if matrix is None:
            result[batch.rows, batch.columns] = values
        model.learn(batch, flags, values)
    return result


@dataclass
class _Batch:
    rows: slice
    columns: slice
    shape: tuple[int, int]
    first: bool
    last: bool


class _Model:
    def __init__(self, rows: int, columns: int, size: int, center: int, settings: Settings) -> None:
        self.rows, self.columns, self.size, self.center, self.settings = rows, columns, size, center, settings
        self.flag_of_column = np.zeros(columns, np.int64)
        self.level_of_column = np.zeros(columns, np.int64)
        self.done = 0
        # Odds of a flag: a prior worth two observations for each bin of the summed log-odds.
        centers = np.ldexp(1.0, np.minimum(np.abs(np.arange(_BINS) - _MIDDLE) // _STEPS, 30))
        chance = np.where(np.arange(_BINS) < _MIDDLE, 1 / (1 + centers), centers / (1 + centers))
        self.set_, self.unset = 2 * chance + 0.02, 2 * (1 - chance) + 0.02
        self.flags, self.seen, self.levels = 0, 0, 0
        inputs = 2 + settings.near + (settings.period > 0)
        self.mix = np.array([1.0, 1.0, 0.4, 0.4][:inputs])
        classes = _SCALES * (_SIDES if settings.sides else 1)
        self.counts = np.zeros((classes, size), np.int64)
        self.total = _prior(size, center, settings.spread)

    def batches(self) -> Iterator[_Batch]:
        """Yield what is coded together; the odd columns come after the even ones, so that they see both sides."""
        # Where few are zero there is less to learn from neighbours: larger batches are faster.
        coarse = 1 if self.settings.zeros else 4
        elements = coarse * max(self.rows * self.columns // _BATCHES, _SMALLEST_BATCH)
        stripes = min(_MOST_STRIPES, max(1, self.columns // 8))
        height = max(1, elements * stripes // self.columns)
        order = sorted(range(stripes), key=lambda stripe: f"{stripe:08b}"[::-1])
        for start in range(0, self.rows, height):
            count = min(height, self.rows - start)
            self._begin_rows(count)
            for position, stripe in enumerate(order):
                columns = slice(stripe, None, stripes)
                width = len(range(stripe, self.columns, stripes))
                yield _Batch(
                    slice(start, start + count), columns, (count, width), position == 0, position == stripes - 1
                )

    def _begin_rows(self, count: int) -> None:
        self.flag_of_row = np.zeros((count, 1), np.int64)
        self.level_of_row = np.zeros((count, 1), np.int64)
        self.seen_of_row = 0
        shape = (count, self.columns)
        self.row_flags = np.zeros(shape, np.int64) if self.settings.near or self.settings.period else None
        self.row_sides = np.zeros(shape, np.int64) if self.settings.sides else None
        self.row_known = np.zeros(self.columns, np.int64)

    def code_flags(self, coder: Coder, batch: _Batch, known: Symbols | None) -> Bits:
        if not self.settings.zeros:
            return np.ones(batch.shape, np.bool_)
        inputs, base = self._log_odds(batch)
        z = np.full(batch.shape, base)
        for weight, values in zip(self.mix, inputs, strict=True):
            z = z + weight * values
        bins = np.clip(np.floor(z * _STEPS + 0.5), -_MIDDLE, _MIDDLE).astype(np.int64) + _MIDDLE
        chances = (self.set_ / (self.set_ + self.unset))[bins]
        bits = None if known is None else (known != self.center).ravel()
        flags = coder.flags(chances.ravel(), bits).reshape(batch.shape)
        hits = np.bincount(bins[flags], minlength=_BINS)
        self.set_ += hits
        self.unset += np.bincount(bins.ravel(), minlength=_BINS) - hits
        # One step of gradient descent; sums of integers do not depend on their order.
        error = np.rint((flags - chances) * 4096).astype(np.int64)
        for position, values in enumerate(inputs):
            slope = int((error * np.rint(values * 16).astype(np.int64)).sum())
            self.mix[position] += _RATE * slope / (65536 * np.sqrt(float(flags.size)))
        return flags

    def _log_odds(self, batch: _Batch) -> tuple[list[Floats], float]:
        share = (self.flags + 0.5) / (self.seen + 1.0)
        base = float(_odds(share))
        expected = (self.flag_of_column + _SHRINK_COLUMN * share) / (self.done + _SHRINK_COLUMN)
        column = expected[batch.columns]
        row = (self.flag_of_row + _SHRINK_ROW * share) / (self.seen_of_row + _SHRINK_ROW)
        inputs = [_odds(column) - base, _odds(row) - base]
        if self.row_flags is not None:
            prior = _SHRINK_NEAR * share
            likely = self.row_known * expected
            for offsets in self._neighbourhoods():
                found = _around(self.row_flags, offsets)[:, batch.columns]
                chance = _around(likely[None, :], offsets)[:, batch.columns]
                inputs.append(_log2((found + prior) / (chance + prior)))
        return [np.broadcast_to(value, batch.shape) for value in inputs], base

    def _neighbourhoods(self) -> list[tuple[int, ...]]:
        period = self.settings.period
        return [(1, 2)] * self.settings.near + ([(period,)] if period else [])

    def code_values(self, coder: Coder, batch: _Batch, flags: Bits, known: Symbols | None) -> Symbols:
        if self.settings.zeros and self.size == 2:
            return np.where(flags, 1 - self.center, self.center).astype(np.int32)
        values = np.full(batch.shape, self.center, np.int32)
        where = np.flatnonzero(flags)
        classes = self._classes(batch).ravel()[where]
        given = None if known is None else known.ravel()[where]
        present, numbers = np.unique(classes, return_inverse=True)
        backoff = (_BACKOFF + self.size) * (self.total / float(self.total.sum()))
        weights = self.counts[present] + backoff
        if self.settings.zeros:
            weights[:, self.center] = 0.0
        found = coder.symbols(weights, numbers, given)
        np.add.at(self.counts, (classes, found), 1)
        self.total += _UNIT * np.bincount(found, minlength=self.size)
        values.reshape(-1)[where] = found
        return values

    def _classes(self, batch: _Batch) -> Ints:
        mean = (self.levels + 1.0) / (self.flags + 1.0)
        column = (self.level_of_column[batch.columns] + _SHRINK_COLUMN * mean) / (
            self.flag_of_column[batch.columns] + _SHRINK_COLUMN
        )
        row = (self.level_of_row + _SHRINK_ROW * mean) / (self.flag_of_row + _SHRINK_ROW)
        z = _log2(column / mean) + _log2(row / mean)
        half = _SCALES // 2
        classes = np.clip(np.floor(z * _STEPS + 0.5), -half, half).astype(np.int64) + half
        classes = np.broadcast_to(classes, batch.shape)
        if self.row_sides is not None:
            sides = np.zeros(batch.shape, np.int64)
            for offsets in ((1, 2), *self._neighbourhoods()[1:]):
                sides = sides + _around(self.row_sides, offsets)[:, batch.columns]
            classes = classes * _SIDES + np.clip(sides, -2, 2) + 2
        return classes

    def learn(self, batch: _Batch, flags: Bits, values: Symbols) -> None:
        levels = np.abs(values.astype(np.int64) - self.center)
        self.flag_of_column[batch.columns] += flags.sum(0)
        self.level_of_column[batch.columns] += levels.sum(0)
        self.flag_of_row += flags.sum(1, keepdims=True)
        self.level_of_row += levels.sum(1, keepdims=True)
        self.seen_of_row += batch.shape[1]
        self.flags += int(flags.sum())
        self.seen += flags.size
        self.levels += int(levels.sum())
        if self.row_flags is not None:
            self.row_flags[:, batch.columns] = flags
            self.row_known[batch.columns] = 1
        if self.row_sides is not None:
            self.row_sides[:, batch.columns] = np.sign(values - self.center)
        if batch.last:
            self.done += batch.shape[0]


def _prior(size: int, center: int, spread: int) -> Ints:
    """Return what a Student-t distribution with five degrees of freedom expects, in units of `1 / _UNIT` counts."""
    distance = (np.arange(size) - center) / (2.0 * spread)
    density = 1 / (1 + distance * distance)
    shape = np.rint(2.0**20 * (density * density * density)).astype(np.int64)
    return 1 + _UNIT * _PRIOR * size * shape // max(1, int(shape.sum()))


def _odds(chance: ArrayLike) -> Floats:
    """Return the logarithm of the odds of a probability."""
    return _log2(chance) - _log2(1 - np.asarray(chance))


def _log2(x: ArrayLike) -> Floats:
    """Return a piecewise linear logarithm, exact at the powers of two and within 0.09 between."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.asarray(exponent + 2 * mantissa - 2, np.float64)


def _around(values: Number, offsets: tuple[int, ...]) -> Number:
    """Return the sum of the neighbours at these distances to the left and right, `[rows, columns]`."""
    total = np.zeros_like(values)
    for offset in offsets:
        if offset < values.shape[1]:
            total[:, offset:] += values[:, :-offset]
            total[:, :-offset] += values[:, offset:]
    return total
