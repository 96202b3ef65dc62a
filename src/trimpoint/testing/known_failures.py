"""What is known not to conform, as data with reasons. Strict: an entry that no longer fails must be deleted."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownFailure:
    """One check that a method is known to fail on one model.

    Args:
        method: name of the method.
        check: name of the check, without `check_`.
        entry: name of the model in the zoo.
        reason: why, and what would have to change.
    """

    method: str
    check: str
    entry: str
    reason: str


KNOWN_FAILURES: tuple[KnownFailure, ...] = ()
