"""Scratch directories beside what they become: removed at the end, and by the next process after a kill."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimpoint.storage import scratch_beside

HOLD = """
import sys, time
from pathlib import Path
from trimpoint.storage import scratch_beside
with scratch_beside(Path(sys.argv[1])) as scratch:
    (scratch / "half").write_bytes(b"half")
    print(scratch, flush=True)
    time.sleep(60)
"""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs locks on directories")


def left(path):
    """Return the scratch directories beside a path, whoever they belong to."""
    return [each for each in path.parent.iterdir() if each.is_dir()]


def age(directory):
    """Make a directory look as if nothing had been written to it for an hour."""
    os.utime(directory, (time.time() - 3600,) * 2)


@pytest.fixture
def writer(tmp_path):
    """A process that is writing, and its scratch directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "model[1].tpz")], stdout=subprocess.PIPE, text=True
    )
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()
    process.stdout.close()


def test_nothing_is_left_at_the_end(tmp_path):
    with scratch_beside(tmp_path / "a") as scratch:
        assert left(tmp_path / "a") == [scratch]
        assert not any(scratch.iterdir())
    with pytest.raises(RuntimeError), scratch_beside(tmp_path / "a"):
        raise RuntimeError
    assert left(tmp_path / "a") == []


def test_what_a_killed_process_has_left_goes_with_the_next(tmp_path, writer):
    process, scratch = writer
    assert (scratch / "half").exists()
    process.kill()
    process.wait()
    age(scratch)
    with scratch_beside(tmp_path / "other"):
        assert scratch.exists()
    with scratch_beside(tmp_path / "model[1].tpz") as own:
        assert left(tmp_path / "a") == [own]


def test_what_a_living_process_writes_stays(tmp_path, writer):
    _, scratch = writer
    age(scratch)
    with scratch_beside(tmp_path / "model[1].tpz") as own:
        assert sorted(left(tmp_path / "a")) == sorted([own, scratch])
    assert (scratch / "half").exists()


def test_what_is_too_young_to_be_locked_yet_and_files_of_others_stay(tmp_path):
    young, file = tmp_path / ".a-trimpoint-abcdefgh", tmp_path / ".a-trimpoint-ijklmnop"
    young.mkdir()
    file.write_text("somebody's")
    os.utime(file, (0, 0))
    with scratch_beside(tmp_path / "a"):
        assert young.exists()
        assert file.exists()
