"""What static int8 reads from calibration data, in every runtime: samples without their padding."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from trimpoint.padding import kept_positions, padding_mask

Feed = dict[str, np.ndarray]
Dims = Mapping[str, Sequence[str]]
"""Input name → the names of its dimensions, empty where a dimension is fixed."""


def batch_axes(dims: Dims) -> dict[str, int]:
    """Return input name → the dimension of its samples, for all inputs that have one."""
    batch = next((names[0] for names in dims.values() if names and names[0]), "")
    return {name: list(names).index(batch) for name, names in dims.items() if batch and batch in names}


def unpadded(feed: Feed, dims: Dims, axes: Mapping[str, int]) -> Iterator[tuple[Feed, Feed]]:
    """Yield the samples of a batch, those of one length together: without the positions of padding, and with them.

    Args:
        feed: input name → array.
        dims: of the inputs.
        axes: see `batch_axes`.
    """
    name = padding_mask(feed)
    if name is None or axes.get(name) != 0 or not dims[name][1]:
        yield feed, feed
        return
    kept, length = kept_positions(feed), dims[name][1]
    for pattern in np.unique(kept, axis=0):
        if not pattern.any():
            continue
        padded = samples(feed, axes, np.flatnonzero((kept == pattern).all(axis=1)))
        piece = dict(padded)
        for key, names in dims.items():
            for axis, dim in enumerate(names):
                if dim == length and key in piece:
                    piece[key] = np.compress(pattern, piece[key], axis=axis)
        yield piece, padded


def samples(feed: Feed, axes: Mapping[str, int], which: Sequence[int] | np.ndarray) -> Feed:
    """Return some samples of a batch; an input that does not grow with it is in all of them."""
    return {key: np.take(array, which, axis=axes[key]) if key in axes else array for key, array in feed.items()}
