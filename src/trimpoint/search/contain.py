"""The edge between the search and what it tries: whatever a candidate raises must not end the search."""

from collections.abc import Callable
from typing import TypeVar

from trimpoint.errors import StorageError

T = TypeVar("T")


def contained(run: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Run something of the user's, of a method's or of a runtime's; return its result, or what it raised.

    Raises:
        StorageError: nothing can be recorded any more, so the search must end.
        OSError: the same, from where it was not yet said so clearly.
    """
    try:
        return run(), None
    except (StorageError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - runtimes and models raise what they like; it is recorded.
        return None, error


def words(error: Exception) -> str:
    """Return what was raised in one line."""
    return f"{type(error).__name__}: {error}"
