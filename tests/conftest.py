import gc
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share a fixture of their file on one worker: what it makes is made once."""
    for item in items:
        fixtures = getattr(item, "_fixtureinfo", None)
        scopes = [each.scope for given in (fixtures.name2fixturedefs if fixtures else {}).values() for each in given]
        if "module" in scopes and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute on one thread: the networks of the tests are small, and threads that wait for each other cost more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def seldom_collected() -> None:
    """Look for garbage less often: exports make millions of objects that stay, beside those of all modules."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Start each test at the same random state, whichever tests ran before it in the same process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Paths of new directories; `mktemp` would look through all there are at each of 10,000 tests."""
    directory = tmp_path_factory.mktemp("states")
    return (directory / str(number) for number in count())


@pytest.fixture(autouse=True)
def own_state(states: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what outlives a study, the ledger above all, away from that of whoever runs the tests."""
    directory = next(states)
    directory.mkdir()
    monkeypatch.setenv("TRIMPOINT_STATE", str(directory))
    return directory
