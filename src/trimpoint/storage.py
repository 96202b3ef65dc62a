"""Writing so that a reader sees the old or the new, never half of it."""

import glob
import os
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from trimpoint.errors import ArtifactError

_LONGEST_NAME = 255
"""Bytes of one part of a path, on the file systems of Linux, macOS and Windows."""
_PORTS = (f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³")
_DEVICES = frozenset(("con", "prn", "aux", "nul", "conin$", "conout$", *_PORTS))
"""https://learn.microsoft.com/windows/win32/fileio/naming-a-file"""
_FRESH_SECONDS = 60
"""A directory as young as this may not be locked yet by the process that has made it."""


def is_plain_path(name: str) -> bool:
    """Return whether a file's name is a plain path that stays below its directory, on every system.

    Example:
        >>> is_plain_path("extra/labels.txt"), is_plain_path("../labels.txt"), is_plain_path("aux.txt")
        (True, False, False)
    """
    path = PurePosixPath(name)
    is_below = name == path.as_posix() and not path.is_absolute() and ".." not in path.parts and bool(path.parts)
    return is_below and all(map(_is_plain_part, path.parts))


def _is_plain_part(part: str) -> bool:
    try:
        size = len(part.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may hold it
        return False
    is_text = part.isprintable() and not any(letter in part for letter in '\\:*?"<>|')
    is_device = part.split(".")[0].rstrip().casefold() in _DEVICES
    return is_text and size <= _LONGEST_NAME and not part.endswith((".", " ")) and not is_device


def contradiction(names: Iterable[str]) -> str | None:
    """Return the first path that cannot lie beside those before it, `None` where there is none.

    It is there already, as systems see it that do not tell case or ways to write an accent apart; or it is a directory
    of another one, or below one.

    Example:
        >>> contradiction(["a", "b/c", "B"]), contradiction(["a", "b"])
        ('B', None)
    """
    files: set[str] = set()
    directories: set[str] = set()
    for name in names:
        path = PurePosixPath(unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()))
        above = {parent.as_posix() for parent in path.parents} - {"."}
        if path.as_posix() in files | directories or above & files:
            return name
        files.add(path.as_posix())
        directories |= above
    return None


def sync(path: Path) -> None:
    """Have the system write a file to the disk now."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Have the system write a directory's entries to the disk now, where it can (Windows cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Give an empty directory beside `path`, on its file system, that is removed at the end.

    What killed processes have left of theirs for the same path is removed first. A process holds a lock on its
    directory as long as it lives; where the system has no such locks (Windows), leftovers stay.

    Raises:
        OSError: if the system refuses.
    """
    prefix = f".{path.name}-trimpoint-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError), _locked(left) as free:
            if free and time.time() - left.stat().st_mtime > _FRESH_SECONDS:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as made, _locked(Path(made)):
        yield Path(made)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold the lock of a directory; give whether nobody else has it."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def put_in_place(work: Path, directory: Path, *, replaceable: Callable[[Path], bool]) -> None:
    """Move a finished directory to its destination on the same file system.

    What is there is moved aside first, put back if the second move fails, and deleted at the end.

    Args:
        work: the finished directory.
        directory: where it is to lie.
        replaceable: whether a directory that is there already may be replaced; an empty one always may.

    Raises:
        ArtifactError: if what is there must not be replaced.
        OSError: if the system refuses.
    """
    if not directory.exists() and not directory.is_symlink():
        work.rename(directory)
        sync_directory(directory.parent)
        return
    if not directory.is_dir() or directory.is_symlink() or (any(directory.iterdir()) and not replaceable(directory)):
        raise ArtifactError(
            f"{directory.name!r} must be new, empty or an artifact. It is something else and was left alone.",
            "choose another directory",
        )
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    old = aside / directory.name
    try:
        directory.rename(old)
        try:
            work.rename(directory)
        except OSError:
            old.rename(directory)
            raise
    finally:
        with suppress(OSError):
            shutil.rmtree(aside)
    sync_directory(directory.parent)
