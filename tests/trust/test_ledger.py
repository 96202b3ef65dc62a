"""The ledger: what counts as a look, and what it survives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trimpoint.errors import InvalidParameterError, StorageError
from trimpoint.trust.ledger import Ledger, state_directory


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "state" / "ledger.jsonl")


def test_each_artifact_is_a_look(ledger):
    assert ledger.entries() == []
    assert [ledger.record("data", artifact, "accuracy") for artifact in "abc"] == [1, 2, 3]
    assert [look.artifact for look in ledger.entries("data")] == ["a", "b", "c"]
    assert ledger.record("other data", "a", "accuracy") == 1


def test_the_same_artifact_again_is_no_further_look(ledger):
    assert [ledger.record("data", artifact, "accuracy") for artifact in "abab"] == [1, 2, 1, 2]
    assert len(ledger.entries()) == 2
    assert ledger.record("data", "c", "accuracy") == 3


def test_another_score_of_the_same_artifact_is_another_look(ledger):
    assert [ledger.record("data", "a", score) for score in ("accuracy", "f1", "accuracy")] == [1, 2, 1]


def test_finalists_of_one_declaration_are_counted_once_and_alike(ledger):
    counts = [ledger.record("data", artifact, "accuracy", finalists=3, batch="study") for artifact in "abc"]
    assert counts == [3, 3, 3]
    assert ledger.record("data", "later", "accuracy") == 4


def test_finalists_without_a_batch_are_a_declaration_each(ledger):
    assert [ledger.record("data", artifact, "accuracy", finalists=3) for artifact in "ab"] == [3, 6]


def test_more_finalists_than_were_declared_are_counted(ledger):
    counts = [ledger.record("data", artifact, "accuracy", finalists=1, batch="study") for artifact in "abc"]
    assert counts == [1, 2, 3]
    assert ledger.record("data", "a", "accuracy", finalists=5, batch="study") == 5


def test_torn_and_foreign_lines_are_passed_over(ledger):
    ledger.record("data", "a", "accuracy")
    with ledger.path.open("ab") as file:
        file.write(b'{"artifact": "b", "data": "da')
    assert ledger.record("data", "c", "accuracy") == 2
    with ledger.path.open("ab") as file:
        file.write(b'[1]\n\xff\xfe\n{"artifact": 3}\n\n')
    assert ledger.record("data", "d", "accuracy") == 3
    assert [look.artifact for look in ledger.entries()] == ["a", "c", "d"]


def test_lines_are_only_ever_appended(ledger):
    ledger.record("data", "a", "accuracy")
    before = ledger.path.read_bytes()
    ledger.record("data", "b", "accuracy", finalists=2)
    assert ledger.path.read_bytes().startswith(before)
    entry = json.loads(ledger.path.read_text(encoding="utf-8").splitlines()[-1])
    assert entry["looks"] == 3
    assert entry["opened"].endswith("+00:00")


WRITER = """
import sys
from trimpoint.trust.ledger import Ledger
for index in range(20):
    Ledger(sys.argv[1]).record("data", f"{sys.argv[2]}-{index}", "accuracy")
"""


def test_concurrent_writers(ledger):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(ledger.path), name]) for name in "xy"]
    assert [writer.wait() for writer in writers] == [0, 0]
    looks = ledger.entries("data")
    assert len({look.artifact for look in looks}) == 40
    assert [look.looks for look in looks] == list(range(1, 41))


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMPOINT_STATE", str(tmp_path))
    assert Ledger().path == tmp_path / "ledger.jsonl"
    monkeypatch.delenv("TRIMPOINT_STATE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_directory() == tmp_path / "xdg" / "trimpoint"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_directory() == Path.home() / ".local" / "state" / "trimpoint"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert state_directory() == tmp_path / "local" / "trimpoint"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert state_directory().parts[-3:] == ("Library", "Application Support", "trimpoint")


def test_a_ledger_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used") as caught:
        Ledger(tmp_path / "file" / "ledger.jsonl").record("data", "a", "accuracy")
    assert "TRIMPOINT_STATE" in caught.value.hint


def test_a_full_disk(ledger, monkeypatch):
    ledger.record("data", "a", "accuracy")

    def full(entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger, "_append", full)
    with pytest.raises(StorageError, match="No space left"):
        ledger.record("data", "b", "accuracy")
    assert len(ledger.entries()) == 1


@pytest.mark.parametrize("finalists", [0, -1, 1.5, True])
def test_finalists_out_of_range(ledger, finalists):
    with pytest.raises(InvalidParameterError, match="finalists"):
        ledger.record("data", "a", "accuracy", finalists=finalists)


@pytest.mark.parametrize(("data", "artifact"), [("", "a"), ("data", "")])
def test_looks_without_hashes(ledger, data, artifact):
    with pytest.raises(InvalidParameterError, match="hashes"):
        ledger.record(data, artifact, "accuracy")
