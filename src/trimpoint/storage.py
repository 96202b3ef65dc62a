"""Writing so that a reader sees the old or the new, never half of it."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from trimpoint.errors import ArtifactError

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def is_plain_path(name: str) -> bool:
    """Return whether a name is that of a file below a directory, on Linux, macOS and Windows alike.

    Example:
        >>> is_plain_path("extra/labels.txt"), is_plain_path("../labels.txt")
        (True, False)
    """
    path = PurePosixPath(name)
    is_below = name == path.as_posix() and not path.is_absolute() and bool(path.parts)
    return is_below and all(map(_is_portable, path.parts))


def _is_portable(part: str) -> bool:
    fits = part.isprintable() and not set(part) & set('\\:*?"<>|') and len(part.encode()) <= 255
    return fits and not part.endswith((".", " ")) and not _RESERVED.fullmatch(part)


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
