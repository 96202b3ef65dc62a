import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimpoint.coding.entropy import Reader, Writer
from trimpoint.errors import ArtifactError


def written(seed: int, calls: int, most: int = 400):
    """Return a writer after random calls, and the calls."""
    rng = np.random.default_rng(seed)
    writer, made = Writer(), []
    for _ in range(calls):
        count = int(rng.integers(0, most))
        if rng.random() < 0.5:
            chances = rng.random(count) ** 4
            values = rng.random(count) < chances
            writer.flags(chances, values)
        else:
            size, classes = int(rng.integers(1, 40)), rng.integers(0, 3, count)
            chances = rng.random((3, size)) ** 3
            values = rng.integers(0, size, count).astype(np.int32)
            writer.symbols(chances, classes, values)
        made.append((chances, None if values.dtype == bool else classes, values))
    return writer, made


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), calls=st.integers(0, 12))
def test_what_is_written_is_read(seed: int, calls: int) -> None:
    writer, made = written(seed, calls)
    reader = Reader(writer.content(), writer.lanes)
    for chances, classes, values in made:
        found = reader.flags(chances) if classes is None else reader.symbols(chances, classes)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)
    reader.close()


def test_many_symbols_of_few_distributions_are_read() -> None:
    rng = np.random.default_rng(3)
    weights, classes = rng.random((2, 300)), rng.integers(0, 2, 20_000)
    values = rng.integers(0, 300, 20_000).astype(np.int32)
    writer = Writer()
    writer.symbols(weights, classes, values)
    np.testing.assert_array_equal(Reader(writer.content(), writer.lanes).symbols(weights, classes), values)


@pytest.mark.parametrize("chance", [0.5, 0.1, 0.003])
def test_flags_take_their_entropy(chance: float) -> None:
    values = np.random.default_rng(0).random(200_000) < chance
    writer = Writer()
    writer.flags(np.full(len(values), chance), values)
    share = values.mean()
    bound = -(share * np.log2(chance) + (1 - share) * np.log2(1 - chance)) * len(values) / 8
    assert writer.cost() == pytest.approx(bound, rel=1e-3)
    assert bound - 1 < len(writer.content()) < 1.01 * bound + 4 * writer.lanes


def test_symbols_take_their_entropy() -> None:
    weights = np.array([[5.0, 1.0, 0.0, 2.0]])
    drawn = np.random.default_rng(0).choice(4, 100_000, p=weights[0] / 8).astype(np.int32)
    writer = Writer()
    writer.symbols(weights, np.zeros(len(drawn), np.int64), drawn)
    shares = np.bincount(drawn)[[0, 1, 3]] / len(drawn)
    bound = -(shares * np.log2(shares)).sum() * len(drawn) / 8
    assert bound - 1 < len(writer.content()) < 1.01 * bound


@pytest.mark.parametrize(
    ("content", "lanes"), [(b"", 2), (b"1234567", 2), (b"12345678" * 9, 0), (b"1" * 4000, 257), (b"123456789", 2)]
)
def test_a_content_that_cannot_be_one_is_refused(content: bytes, lanes: int) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        Reader(content, lanes)


def test_a_content_that_ends_early_or_goes_on_is_refused() -> None:
    writer, made = written(1, 6)
    content = writer.content()
    for changed in (content[:-2], content + b"\0\0"):
        reader = Reader(changed, writer.lanes)
        with pytest.raises(ArtifactError, match="damaged"):  # noqa: PT012 - where it is found out depends
            for chances, classes, _ in made:
                _ = reader.flags(chances) if classes is None else reader.symbols(chances, classes)
            reader.close()
