"""What static int8 reads from calibration data, in every runtime: samples without their padding, ranges by a rule."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from trimpoint.quantization.histogram import Histogram
from trimpoint.quantization.ranges import Levels, Range, entropy, least_squares, minmax, percentile
from trimpoint.values import Format

MASKS = ("attention_mask",)

Feed = dict[str, np.ndarray]


def range_of(histogram: Histogram, kind: Format) -> Range:
    """Return the range of a tensor for a format, by the format's rule."""
    levels = Levels(count=2**kind.bits - (1 if kind.symmetric else 0), symmetric=kind.symmetric)
    if kind.observer == "percentile":
        return percentile(histogram, kind.percentile / 100.0)
    if kind.observer == "entropy":
        return entropy(histogram, levels)
    return least_squares(histogram, levels) if kind.observer == "mse" else minmax(histogram)


def unpadded(feed: Feed, dims: Mapping[str, Sequence[str]]) -> Iterator[Feed]:
    """Yield the samples of a batch, those of one length together, without the positions that a mask excludes.

    Args:
        feed: input name → array.
        dims: input name → the names of its dimensions, empty where a dimension is fixed.
    """
    name = next((n for n in MASKS if n in feed and feed[n].ndim == 2 and dims[n][1]), None)
    if name is None or not np.isin(feed[name], (0, 1)).all():
        yield feed
        return
    kept, length = feed[name] != 0, dims[name][1]
    for pattern in np.unique(kept, axis=0):
        rows, columns = np.flatnonzero((kept == pattern).all(axis=1)), np.flatnonzero(pattern)
        if len(columns) == 0:
            continue
        cut = {key: array[rows] for key, array in feed.items()}
        for key, names in dims.items():
            for axis, dim in enumerate(names):
                if dim == length and key in cut:
                    cut[key] = np.take(cut[key], columns, axis=axis)
        yield cut
