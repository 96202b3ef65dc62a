"""Entropy coding of flags and symbols by interleaved range asymmetric numeral systems (rANS), the same calls for both.

Whoever models data writes one function that asks for the next values; a `Writer` is handed them and returns them, a
`Reader` finds them. So both sides see the same state by construction.

Many states ("lanes") take turns on one stream of 16-bit words, so that NumPy codes as many symbols in one step as there
are lanes. Probabilities are integers of 2⁻¹⁶, and nothing depends on the rounding of a processor.

References:
    Duda, "Asymmetric numeral systems" (2013), https://arxiv.org/abs/1311.2540; Giesen, "Interleaved entropy coders"
    (2014), https://arxiv.org/abs/1402.3392.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trimpoint.errors import ArtifactError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]
Symbols = NDArray[np.int32]

DAMAGED = "get the file again from where it came from"
MOST_LANES = 256
_BYTES_OF_LANE = 512
_PRECISION = 16
_ONE = 1 << _PRECISION
_LOWEST, _SHIFT, _MASK = 1 << 16, 16, 0xFFFF


class Coder(Protocol):
    """What a model of data needs: the next flags and the next symbols."""

    def flags(self, chances: Floats, values: Bits | None) -> Bits:
        """Code flags of which `chances` are the probabilities to be set, `[n]` both."""

    def symbols(self, weights: Floats, classes: Ints, values: Symbols | None) -> Symbols:
        """Code symbols, `[n]`, which have probabilities in proportion to `weights[class]`, `[classes, size]`."""


def least_lanes(symbols: int) -> int:
    """Return the number of lanes that so many symbols must have: reading takes time for each turn of the lanes."""
    return min(MOST_LANES, symbols >> 14)


class Writer:
    """Notes what it is given, and codes it at the end: what is written last is read first."""

    def __init__(self) -> None:
        self._starts: list[Ints] = []
        self._widths: list[Ints] = []

    def flags(self, chances: Floats, values: Bits | None) -> Bits:
        """Note flags and return them."""
        if values is None:
            raise TypeError("a writer needs the values")
        width = _parts(chances)
        self._note(np.where(values, 0, width), np.where(values, width, _ONE - width))
        return values

    def symbols(self, weights: Floats, classes: Ints, values: Symbols | None) -> Symbols:
        """Note symbols and return them."""
        if values is None:
            raise TypeError("a writer needs the values")
        if weights.shape[1] > 1 and len(values):
            bounds = _bounds(weights)
            starts = bounds[classes, values]
            self._note(starts, bounds[classes, values + 1] - starts)
        return values

    def _note(self, starts: Ints, widths: Ints) -> None:
        self._starts.append(starts)
        self._widths.append(widths)

    def cost(self) -> float:
        """Return how many bytes all of it will take, but for the lanes."""
        return float(sum((_PRECISION - np.log2(widths)).sum() for widths in self._widths)) / 8

    @property
    def lanes(self) -> int:
        """How many states are worth it: each costs three bytes, and saves time."""
        wanted = max(int(self.cost()) // _BYTES_OF_LANE, least_lanes(sum(map(len, self._starts))))
        return min(MOST_LANES, max(2, 1 << wanted.bit_length() >> 1))

    def content(self) -> bytes:
        """Return everything, coded: the states in 32 bits each, then the words, little-endian."""
        lanes = self.lanes
        state = np.full(lanes, _LOWEST, np.int64)
        words: list[Ints] = []
        for starts, widths in zip(reversed(self._starts), reversed(self._widths), strict=True):
            last = (len(starts) - 1) // lanes * lanes
            for first in range(last, -1, -lanes):
                start, width = starts[first : first + lanes], widths[first : first + lanes]
                x = state[: len(start)]
                full = x >= width << _SHIFT
                words.append(x[full] & _MASK)
                quotient, rest = np.divmod(np.where(full, x >> _SHIFT, x), width)
                state[: len(start)] = (quotient << _SHIFT) + rest + start
        stream = np.concatenate(words[::-1]) if words else np.zeros(0, np.int64)
        return state.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


class Reader:
    """Reads what a `Writer` wrote. Bytes that none wrote give other values, or an error, and no more than that.

    Args:
        content: as written.
        lanes: number of states.

    Raises:
        ArtifactError: if the content is too short for them.
    """

    def __init__(self, content: bytes, lanes: int) -> None:
        if not 0 < lanes <= MOST_LANES or len(content) < 4 * lanes or len(content) % 2:
            raise ArtifactError("A coded tensor is damaged: its beginning is missing.", DAMAGED)
        self._lanes = lanes
        self._state = np.frombuffer(content, "<u4", lanes).astype(np.int64)
        self._words = np.frombuffer(content, "<u2", offset=4 * lanes).astype(np.int64)
        self._position = 0

    def flags(self, chances: Floats, values: Bits | None = None) -> Bits:  # noqa: ARG002 - as a writer has it
        """Return the next flags.

        Raises:
            ArtifactError: if the content ends before.
        """
        widths = _parts(chances)
        found = np.empty(len(widths), np.bool_)
        for first in range(0, len(widths), self._lanes):
            width = widths[first : first + self._lanes]
            slot = self._state[: len(width)] & _MASK
            is_set = slot < width
            found[first : first + self._lanes] = is_set
            self._advance(np.where(is_set, slot, slot - width), np.where(is_set, width, _ONE - width))
        return found

    def symbols(self, weights: Floats, classes: Ints, values: Symbols | None = None) -> Symbols:  # noqa: ARG002
        """Return the next symbols.

        Raises:
            ArtifactError: if the content ends before.
        """
        size = weights.shape[1]
        found = np.zeros(len(classes), np.int32)
        if size <= 1:
            return found
        bounds = _bounds(weights)
        begins, widths = bounds[:, :-1].ravel(), np.diff(bounds, axis=1).ravel()
        # One sorted row of all intervals of all classes: the search is one call for all lanes.
        ends = (bounds[:, 1:] + _ONE * np.arange(len(bounds))[:, None]).ravel()
        for first in range(0, len(classes), self._lanes):
            kind = classes[first : first + self._lanes]
            slot = self._state[: len(kind)] & _MASK
            index = ends.searchsorted(slot + _ONE * kind, "right")
            found[first : first + self._lanes] = index - size * kind
            self._advance(slot - begins[index], widths[index])
        return found

    def _advance(self, offset: Ints, width: Ints) -> None:
        x = width * (self._state[: len(width)] >> _SHIFT) + offset
        empty = np.flatnonzero(x < _LOWEST)
        if len(empty):
            words = self._words[self._position : self._position + len(empty)]
            if len(words) < len(empty):
                raise ArtifactError("A coded tensor is damaged: it ends too early.", DAMAGED)
            x[empty] = (x[empty] << _SHIFT) | words
            self._position += len(empty)
        self._state[: len(width)] = x

    def close(self) -> None:
        """Check that everything was read, and that the states are those that writing began with.

        Raises:
            ArtifactError: if not.
        """
        if self._position != len(self._words) or bool((self._state != _LOWEST).any()):
            raise ArtifactError("A coded tensor is damaged: its symbols do not come out even.", DAMAGED)


def _parts(chances: Floats) -> Ints:
    return np.clip(np.rint(chances * _ONE), 1, _ONE - 1).astype(np.int64)


def _bounds(weights: Floats) -> Ints:
    """Return where the interval of each symbol begins, and the end, `[classes, size + 1]`; none is empty."""
    size = weights.shape[1]
    sums = np.cumsum(weights, 1)
    shares = np.floor(sums / sums[:, -1:] * (_ONE - size)).astype(np.int64) + np.arange(1, size + 1)
    return np.concatenate([np.zeros((len(weights), 1), np.int64), shares], 1)
