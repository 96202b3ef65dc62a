"""A content-addressed store of files: each entry is a directory named by the hash of what made it."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from trimpoint.errors import StorageError

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""What the system answers where a disk is full or must not be written."""


def cannot_write(path: Path, error: Exception) -> StorageError:
    """Return the error that says so and what to do."""
    return StorageError(
        f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.",
        "free some space, or see to the permissions, and go on with `trimpoint resume`: what was finished is kept",
    )


def remove_tree(path: Path) -> None:
    """Remove a directory if it exists, by renaming it first, so that a kill never leaves half of it under its name."""
    if not path.exists():
        return
    grave = Path(tempfile.mkdtemp(dir=path.parent, prefix=".old-"))
    path.replace(grave / path.name)
    shutil.rmtree(grave, ignore_errors=True)


class Store:
    """Entries that are written once, whole or not at all, and never changed.

    Args:
        root: the directory; made if it is not there.
        limit_bytes: what `trim` cuts the store down to, oldest use first.
    """

    def __init__(self, root: Path, limit_bytes: int = 2 << 30) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        root.mkdir(parents=True, exist_ok=True)
        for leftover in (*root.glob(".new-*"), *root.glob(".old-*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def get(self, key: str) -> Path | None:
        """Return the directory of an entry, or `None`."""
        path = self.root / key
        if not path.is_dir():
            return None
        os.utime(path)
        return path

    def put(self, key: str, write: Callable[[Path], None]) -> Path:
        """Return the directory of an entry, made by `write(empty directory)` if it is not there yet.

        Raises:
            StorageError: if it cannot be written; nothing of it is left.
        """
        if (path := self.get(key)) is not None:
            return path
        fresh = Path(tempfile.mkdtemp(dir=self.root, prefix=".new-"))
        try:
            write(fresh)
            fresh.replace(self.root / key)
        except SafetensorError as error:  # Wraps what the system answers; whatever is written here is sound.
            raise cannot_write(self.root, error) from error
        except OSError as error:
            if isinstance(error, StorageError) or error.errno not in (*NOT_WRITABLE, errno.EIO):
                raise
            raise cannot_write(self.root, error) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return self.root / key

    def trim(self, keep: frozenset[str] = frozenset()) -> int:
        """Remove the entries used longest ago until the store is within its limit.

        Args:
            keep: entries that stay in any case.

        Returns:
            The number of bytes removed.
        """
        entries = sorted((p for p in self.root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
        sizes = {p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in entries}
        excess, removed = sum(sizes.values()) - self.limit_bytes, 0
        for path in entries:
            if removed >= excess:
                break
            if path.name not in keep:
                remove_tree(path)
                removed += sizes[path]
        return removed
