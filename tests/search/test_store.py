import errno
import os

import pytest

from trimpoint.errors import StorageError
from trimpoint.search.store import Store


def write(text):
    return lambda directory: (directory / "file").write_text(text)


def test_an_entry_is_written_once(tmp_path):
    store = Store(tmp_path / "store")
    assert store.get("key") is None
    first = store.put("key", write("one"))
    assert store.put("key", write("two")) == first
    assert (first / "file").read_text() == "one"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_leaves_nothing_behind(tmp_path, code):
    store = Store(tmp_path / "store")

    def fail(directory):
        (directory / "file").write_text("half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(StorageError, match="resume"):
        store.put("key", fail)
    assert list((tmp_path / "store").iterdir()) == []


def test_a_bug_in_what_writes_is_not_hidden(tmp_path):
    store = Store(tmp_path / "store")
    with pytest.raises(KeyError):
        store.put("key", lambda directory: {}["missing"])
    assert list((tmp_path / "store").iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".new-abc").mkdir()
    (tmp_path / ".new-abc" / "file").write_text("half")
    Store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_trim_removes_what_was_used_longest_ago(tmp_path):
    store = Store(tmp_path, limit_bytes=250)
    for age, key in enumerate(["old", "kept", "new"]):
        path = store.put(key, write("x" * 100))
        os.utime(path, (1_000 + age, 1_000 + age))
    assert store.trim(keep=frozenset({"kept"})) == 100
    assert {p.name for p in tmp_path.iterdir()} == {"kept", "new"}
