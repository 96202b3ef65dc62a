"""Splitting, hashing and checking data sets of samples."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, Subset

from trimpoint.errors import DataError, InvalidParameterError
from trimpoint.signature import flatten

_POOL = 32
"""Batches of samples of different length that are sorted together, at most."""
_POOL_NUMBERS = 1 << 24
"""Numbers that they hold together, at most: 64 MB in float32."""


def check_indexable(data: Any, name: str) -> None:
    """Check that data has a length and items.

    Raises:
        DataError: if it has not, such as a `DataLoader`, an `IterableDataset` or a generator.
    """
    streams = isinstance(data, (DataLoader, IterableDataset))
    if streams or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        hint = "give the loader's `.dataset`" if isinstance(data, DataLoader) else "give a list or a map-style data set"
        raise DataError(f"{name} must have a length and items by index. Got a {type(data).__name__}.", hint)


def random_split(data: Any, sizes: Mapping[str, float], seed: int, rest: str = "train") -> dict[str, Any]:
    """Split `data` by a seeded permutation; what `sizes` leaves becomes `rest`.

    Args:
        data: anything with a length and items.
        sizes: name → number of samples, or their share where below 1; zero is left out.
        seed: of the permutation.
        rest: name of what is left.

    Raises:
        DataError: if nothing would be left, a share is less than one sample, or the data has no length and items.
        InvalidParameterError: if a size is neither a whole number nor a share below 1.
    """
    check_indexable(data, "Data to be split")
    total = len(data)
    order = np.random.default_rng(seed).permutation(total).tolist()
    parts, start = {}, 0
    for name, size in sizes.items():
        if not size >= 0 or (size >= 1 and size != int(size)) or (size == 1 and isinstance(size, float)):
            raise InvalidParameterError(
                f"The size of `{name}` must be a number of samples, or a share in [0, 1). Got {size!r}."
            )
        count = round(size * total) if 0 < size < 1 else int(size)
        if size and not count:
            raise DataError(f"A share of {size:g} of {total} samples leaves none for `{name}`.", "give more samples")
        if count:
            parts[name] = Subset(data, order[start : start + count])
        start += count
    if start >= total:
        raise DataError(f"A split into {dict(sizes)} leaves nothing of {total} samples for `{rest}`.", "ask for less")
    return parts | {rest: Subset(data, order[start:])}


def shuffled_batches(data: Any, size: int, generator: torch.Generator) -> Iterator[list[Any]]:
    """Yield the samples of one epoch in random batches of `size`; what is left at the end is dropped.

    Where the samples of a batch differ in length, up to 32 batches are drawn at once and sorted by length before they
    are cut, and come in random order: batches of queries then hold little padding, and still differ in each epoch.
    Large samples, such as images, are not read ahead.

    Args:
        data: anything with a length and items.
        size: of a batch.
        generator: of the order.
    """
    order = iter(torch.randperm(len(data), generator=generator).tolist()[: len(data) // size * size])
    while samples := [data[index] for index in islice(order, size)]:
        lengths = [_length(sample) for sample in samples]
        if len(set(lengths)) > 1:
            batches = max(1, min(_POOL, _POOL_NUMBERS // sum(lengths)))
            samples += [data[index] for index in islice(order, size * (batches - 1))]
            samples.sort(key=_length)
        for turn in torch.randperm(len(samples) // size, generator=generator).tolist() if len(samples) > size else [0]:
            yield samples[turn * size : (turn + 1) * size]


def _length(sample: Any) -> int:
    """Return the number of elements of a sample's inputs, as far as they tell."""
    inputs = sample[0] if isinstance(sample, (tuple, list)) and sample else sample
    return sum(map(_items, flatten(inputs)))


def _items(leaf: Any) -> int:
    try:
        return math.prod(leaf.shape) if hasattr(leaf, "shape") else len(leaf) if hasattr(leaf, "__len__") else 1
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return 1


def sample_digest(sample: Any) -> bytes:
    """Return a 16-byte hash of a sample's content: types, shapes and bytes."""
    return _digest(_arrays(sample))


def hash_samples(data: Any) -> str:
    """Return the SHA-256 over all samples in their order."""
    digest = hashlib.sha256()
    for index in range(len(data)):
        digest.update(sample_digest(data[index]))
    return digest.hexdigest()


def _arrays(sample: Any) -> list[NDArray[Any]]:
    return [np.asarray(as_numpy(leaf) if isinstance(leaf, torch.Tensor) else leaf) for leaf in flatten(sample)]


def _digest(arrays: list[NDArray[Any]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(str(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
    return digest.digest()


def _source(data: Any, index: int) -> tuple[int, int]:
    while isinstance(data, Subset):
        data, index = data.dataset, int(data.indices[index])
    return id(data), index


def _not_finite(arrays: list[NDArray[Any]]) -> bool:
    return any(array.dtype.kind in "fc" and not np.isfinite(array).all() for array in arrays)


def check_roles(roles: Mapping[str, Any]) -> list[str]:
    """Check that no sample has two roles and that every value is finite.

    Args:
        roles: role → data set.

    Returns:
        A warning for each pair of roles that have samples of equal content from different places.

    Raises:
        DataError: if one item of one source has two roles, or a value is not finite.
    """
    places: dict[tuple[int, int], str] = {}
    contents: dict[str, set[bytes]] = {}
    for role, data in roles.items():
        digests = set()
        for index in range(len(data)):
            place = _source(data, index)
            other = places.setdefault(place, role)
            if other != role:
                raise DataError(
                    f"Item {place[1]} of one data set is both in `{other}` and in `{role}`.",
                    "split it with `Task.split`, or give disjoint subsets",
                )
            arrays = _arrays(data[index])
            if _not_finite(arrays):
                raise DataError(f"Sample {index} of `{role}` has a value that is not finite.", "clean the data first")
            digests.add(_digest(arrays))
        contents[role] = digests
    names = list(contents)
    return [
        f"{shared:,} distinct samples of `{first}` also occur, with equal content, in `{second}`."
        for i, first in enumerate(names)
        for second in names[i + 1 :]
        if (shared := len(contents[first] & contents[second]))
    ]


def as_numpy(value: Any) -> Any:
    """Return a nested value with every tensor as a NumPy array; bfloat16 becomes float32."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(value, Mapping):
        return {key: as_numpy(item) for key, item in value.items()}
    return tuple(as_numpy(item) for item in value) if isinstance(value, (tuple, list)) else value


def as_tensors(value: Any) -> Any:
    """Return a nested value with every NumPy array as a tensor."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        return {key: as_tensors(item) for key, item in value.items()}
    return tuple(as_tensors(item) for item in cast(Any, value)) if isinstance(value, (tuple, list)) else value
