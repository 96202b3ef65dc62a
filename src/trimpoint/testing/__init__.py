"""The conformance harness and the zoo of awkward models: what every compression method is tested by.

A package with its own method needs one line in its tests:

    test_method = parametrize_with_checks([MyMethod()])
"""

from trimpoint.testing.conformance import Check, all_checks, parametrize_with_checks
from trimpoint.testing.failure import ConformanceFailure
from trimpoint.testing.known_failures import KNOWN_FAILURES, KnownFailure
from trimpoint.testing.zoo import ZooEntry, zoo

__all__ = [
    "KNOWN_FAILURES",
    "Check",
    "ConformanceFailure",
    "KnownFailure",
    "ZooEntry",
    "all_checks",
    "parametrize_with_checks",
    "zoo",
]
