"""What values a tensor takes, counted as they stream by, in memory that does not grow with their number."""

import numpy as np

from trimpoint.errors import DataError

_SHIFT = 15
_SIGN = 1 << (31 - _SHIFT)
_CELLS = 2 * _SIGN
_FULL = 1 << 18


class Histogram:
    """Counts of values in cells as wide as 2⁻⁸ of their power of two, for both signs and all magnitudes.

    A cell is what the first 17 bits of a float32 have in common: sign, exponent and eight bits of the mantissa. So
    nothing has to be known of the range before, an outlier of 10⁶ costs no resolution elsewhere, and the counts of two
    streams add up to those of both, in any order. It takes 1 MiB.

    Attributes:
        count: values so far.
        low: the least of them, infinity before the first.
        high: the greatest, minus infinity before the first.
    """

    def __init__(self) -> None:
        self.count, self.low, self.high = 0, np.inf, -np.inf
        self._counts = np.zeros(_CELLS, dtype=np.int64)
        self._waiting: list[np.ndarray] = []
        self._waits = 0

    def add(self, values: np.ndarray) -> None:
        """Count the values of an array of any shape.

        Raises:
            DataError: if one of them is not finite.
        """
        values = np.ascontiguousarray(values, dtype=np.float32).ravel()
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = int((~np.isfinite(values)).sum())
            raise DataError(f"{bad:,} of {values.size:,} values are not finite.")
        self.count += values.size
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._waiting.append(values.view(np.uint32) >> _SHIFT)
        self._waits += values.size
        if self._waits >= _FULL:
            self._settle()

    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the cells that hold values, in ascending order: lower edges, upper edges and counts, float64.

        What is smaller than 2⁻¹²⁵ counts as zero; its cell has no width.
        """
        self._settle()
        held = np.flatnonzero(self._counts)
        magnitude = held & (_SIGN - 1)
        inner = (magnitude << _SHIFT).astype(np.uint32).view(np.float32).astype(np.float64)
        outer = ((magnitude + 1) << _SHIFT).astype(np.uint32).view(np.float32).astype(np.float64)
        tiny = outer < 2.0**-125
        inner[tiny] = outer[tiny] = 0.0
        negative = held >= _SIGN
        lower, upper = np.where(negative, -outer, inner), np.where(negative, -inner, outer)
        lower, upper = np.clip(lower, self.low, self.high), np.clip(upper, self.low, self.high)
        counts = self._counts[held].astype(np.float64)
        lower = np.where((counts == 1) & (upper == self.high), self.high, lower)  # the one value there is known
        upper = np.where((counts == 1) & (lower == self.low), self.low, upper)
        order = np.argsort(lower + upper, kind="stable")
        return lower[order], upper[order], counts[order]

    def _settle(self) -> None:
        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting), minlength=_CELLS)
            self._waiting, self._waits = [], 0
