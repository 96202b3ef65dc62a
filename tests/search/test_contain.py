import pytest

from trimpoint.errors import StorageError
from trimpoint.search.contain import contained, words


def test_a_result_comes_without_an_error():
    assert contained(lambda: 3) == (3, None)


@pytest.mark.parametrize("error", [RuntimeError("a"), AssertionError("b"), MemoryError("c"), Exception("d")])
def test_whatever_is_raised_is_returned(error):
    def run():
        raise error

    assert contained(run) == (None, error)
    assert words(error) == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "error", [StorageError("disk full"), OSError(28, "no space"), KeyboardInterrupt(), SystemExit(1)]
)
def test_what_must_end_the_search_passes(error):
    def run():
        raise error

    with pytest.raises(type(error)):
        contained(run)
