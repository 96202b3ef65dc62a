"""Splitting, hashing and checking samples."""

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from trimpoint.data import (
    as_numpy,
    as_tensors,
    check_roles,
    hash_samples,
    random_split,
    sample_digest,
    shuffled_batches,
)
from trimpoint.errors import DataError, InvalidParameterError


def samples(n=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 3, generator=generator), torch.arange(n) % 4)


def drawn(data, size, seed):
    return list(shuffled_batches(data, size, torch.Generator().manual_seed(seed)))


def test_shuffled_batches_hold_every_sample_once_and_drop_the_rest():
    data = [(torch.zeros(3), index) for index in range(103)]
    orders = [[[target for _, target in batch] for batch in drawn(data, 10, seed)] for seed in (0, 0, 1)]
    seen = [target for batch in orders[0] for target in batch]
    assert [len(batch) for batch in orders[0]] == [10] * 10
    assert len(set(seen)) == 100
    assert seen != sorted(seen)
    assert orders[0] == orders[1] != orders[2]


def test_samples_of_equal_length_and_large_ones_are_not_read_ahead():
    class Counted(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    for shapes in ([3], [2_000_000, 2_000_001]):  # of one length; of different lengths, but large
        data = Counted([(torch.zeros(()).expand(shapes[i % len(shapes)]), 0) for i in range(100)])
        next(shuffled_batches(data, 10, torch.Generator()))
        assert data.read == 10


class Odd:
    """What a collate of one's own may understand, and nobody else."""

    def __init__(self, shape):
        self.shape = shape


@pytest.mark.parametrize("leaf", [Odd(None), Odd((3, None)), Odd(len)])
def test_samples_that_tell_no_length_are_drawn_all_the_same(leaf):
    data = [({"odd": leaf, "ids": [0] * (1 + index % 7)}, index) for index in range(50)]
    assert sorted(index for batch in drawn(data, 5, 0) for _, index in batch) == list(range(50))


@pytest.mark.parametrize(
    "kind",
    [torch.zeros, "a".__mul__, lambda n: {"ids": np.zeros(n), "mask": [1] * n, "kind": torch.tensor(1), "at": 3}],
)
def test_samples_of_different_length_come_with_their_like(kind):
    lengths = torch.randint(1, 65, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    data = [(kind(length), index) for index, length in enumerate(lengths)]
    batches = [[lengths[index] for _, index in batch] for batch in drawn(data, 10, 0)]
    padded = sum(max(batch) * len(batch) for batch in batches) / sum(lengths)
    assert sorted(length for batch in batches for length in batch) == sorted(lengths)
    assert padded < 1.15  # 1.8 in random order
    means = [sum(batch) / len(batch) for batch in batches]
    assert means != sorted(means)


def test_split_is_a_reproducible_partition():
    data = list(range(100))
    parts = random_split(data, {"select": 0.25, "calibrate": 10, "certify": 0}, seed=3)
    assert {name: len(part) for name, part in parts.items()} == {"select": 25, "calibrate": 10, "train": 65}
    assert sorted(item for part in parts.values() for item in part) == data
    again = random_split(data, {"select": 0.25, "calibrate": 10}, seed=3)
    assert all(list(parts[name]) == list(again[name]) for name in parts)
    assert list(random_split(data, {"select": 0.25}, seed=4)["select"]) != list(parts["select"])


@pytest.mark.parametrize("sizes", [{"select": 20}, {"select": 15, "certify": 10}])
def test_split_that_leaves_nothing(sizes):
    with pytest.raises(DataError, match="leaves nothing of 20 samples for `train`") as caught:
        random_split(samples(), sizes, seed=0)
    assert caught.value.hint


def test_split_with_too_small_a_share():
    with pytest.raises(DataError, match="leaves none for `certify`"):
        random_split(samples(3), {"certify": 0.1}, seed=0)


@pytest.mark.parametrize("size", [-1, -0.5, 1.0, 2.5, float("nan")])
def test_split_with_sizes_that_are_none(size):
    with pytest.raises(InvalidParameterError, match="number of samples, or a share"):
        random_split(samples(), {"select": size}, seed=0)


def test_hashes_depend_on_content_type_shape_and_order():
    x = np.arange(6, dtype=np.float32)
    base = sample_digest((x, 1))
    assert sample_digest((torch.from_numpy(x.copy()), 1)) == base
    assert sample_digest((x.reshape(2, 3), 1)) != base
    assert sample_digest((x.astype(np.float64), 1)) != base
    assert sample_digest((x, 2)) != base
    assert sample_digest((x[::-1], 1)) != base
    assert sample_digest((np.asfortranarray(x.reshape(2, 3)), 1)) == sample_digest((x.reshape(2, 3), 1))
    data = samples()
    assert hash_samples(data) == hash_samples(samples())
    assert hash_samples(data) != hash_samples(Subset(data, list(range(20))[::-1]))
    assert len(hash_samples(data)) == 64


@pytest.mark.parametrize(
    "sample",
    [
        ({"ids": torch.tensor([1, 2]), "mask": torch.ones(2)}, 0),
        ((torch.ones(2), None), np.float32(0.5)),
        (torch.ones(2, dtype=torch.bfloat16), 0),
        (torch.zeros(0, 3), 0),
        ("a text", "label"),
        (np.array(["a", None], dtype=object), 0),
        (torch.ones(2, requires_grad=True), 0),
    ],
)
def test_hashes_of_all_kinds_of_samples(sample):
    assert sample_digest(sample) == sample_digest(sample)
    assert len(sample_digest(sample)) == 16
    assert check_roles({"train": [sample]}) == []


def test_disjoint_roles_pass():
    data = samples()
    assert check_roles(random_split(data, {"select": 5, "certify": 5}, seed=0)) == []


@pytest.mark.parametrize("nested", [False, True])
def test_one_item_in_two_roles_is_an_error(nested):
    data = samples()
    second = Subset(Subset(data, [9, 4, 7]), [1]) if nested else Subset(data, torch.tensor([4]))
    with pytest.raises(DataError, match="Item 4 of one data set is both in `train` and in `select`") as caught:
        check_roles({"train": Subset(data, [1, 4]), "select": second})
    assert "Task.split" in caught.value.hint


def test_the_same_data_set_in_two_roles_is_an_error():
    data = samples()
    with pytest.raises(DataError, match="Item 0 of one data set"):
        check_roles({"calibrate": data, "train": data})


def test_equal_content_is_counted_and_warned():
    first = samples(20)
    second = TensorDataset(first.tensors[0][:8].clone(), first.tensors[1][:8].clone())
    second.tensors[0][:3] += 1
    warnings = check_roles({"train": first, "select": second, "certify": samples(6, seed=9)})
    assert warnings == ["5 distinct samples of `train` also occur, with equal content, in `select`."]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["tensor", "array", "target", "dict"])
def test_values_that_are_not_finite_are_named(value, where):
    good = (torch.ones(3), 0)
    bad = {
        "tensor": (torch.tensor([1.0, value]), 0),
        "array": (np.array([1.0, value]), 0),
        "target": (torch.ones(2), value),
        "dict": ({"x": torch.ones(2), "y": torch.tensor(value)}, 0),
    }[where]
    with pytest.raises(DataError, match="Sample 2 of `select` has a value that is not finite") as caught:
        check_roles({"train": [good], "select": [good, good, bad]})
    assert caught.value.hint


def test_conversion_there_and_back():
    value = {"x": torch.arange(3), "y": (torch.ones(2, dtype=torch.bfloat16), None, "text")}
    arrays = as_numpy(value)
    assert arrays["x"].dtype == np.int64
    assert arrays["y"][0].dtype == np.float32
    assert arrays["y"][1:] == (None, "text")
    tensors = as_tensors(arrays)
    assert torch.equal(tensors["x"], value["x"])
    assert torch.equal(tensors["y"][0], torch.ones(2))
    assert as_tensors([np.ones(2)[::-1]])[0].tolist() == [1, 1]
