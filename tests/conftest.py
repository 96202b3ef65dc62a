from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what outlives a study, the ledger above all, away from that of whoever runs the tests."""
    directory = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("TRIMPOINT_STATE", str(directory))
    return directory
