"""Every example in a docstring runs and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import trimpoint

MODULES = sorted(
    info.name for info in pkgutil.walk_packages(trimpoint.__path__, "trimpoint.") if info.name != "trimpoint.__main__"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail"


def test_examples_are_found() -> None:
    assert sum(
        doctest.testmod(importlib.import_module(name)).attempted for name in ("trimpoint.plan", "trimpoint.budget")
    )
