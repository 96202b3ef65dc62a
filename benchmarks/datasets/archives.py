"""Where the archives are, whether they are the right ones, and what is kept of them once decoded."""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimpoint.demo.files import VARIABLE, cache_directory
from trimpoint.errors import DataError

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Source:
    """A ZIP archive of data.

    Args:
        name: of the file.
        digest: SHA-256 of its content (see `content_digest`), however it was packed.
        holds: its members, in a few words.
        origin: where what is in it comes from.
    """

    name: str
    digest: str
    holds: str
    origin: str

    @property
    def by_hand(self) -> str:
        """What to do where the file is missing."""
        return f"put {self.name} ({self.holds}; from {self.origin}) into a directory and set {VARIABLE} to it"


def find(source: Source) -> Path:
    """Return the path of an archive: in `$TRIMPOINT_DATA`, else in the cache directory.

    Raises:
        DataError: if it is in neither; with what to put where.
    """
    given = os.environ.get(VARIABLE)
    places = [Path(given)] if given else []
    places.append(cache())
    for place in places:
        if (place / source.name).is_file():
            return place / source.name
    where = " or ".join(str(place) for place in places)
    raise DataError(f"{source.name} must lie in {where}. There is none.", source.by_hand)


def cache() -> Path:
    """Return the directory for decoded data, outside of the repository; it need not exist."""
    return cache_directory().parent / "benchmarks"


def read(source: Source) -> dict[str, bytes]:
    """Return the members of an archive, name → content, sorted by name.

    Raises:
        DataError: if the archive is missing, damaged or another one.
    """
    path = find(source)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in sorted(archive.namelist()) if not name.endswith("/")}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}.", source.by_hand) from error
    if (found := content_digest(members)) != source.digest:
        raise DataError(
            f"{path} holds something else: the SHA-256 of its content must be {source.digest}. Got {found}.",
            source.by_hand,
        )
    return members


def content_digest(members: dict[str, bytes]) -> str:
    """Return the SHA-256 over names, sizes and contents, in the order of the names.

    Example:
        >>> content_digest({"b": b"2", "a": b"1"}) == content_digest({"a": b"1", "b": b"2"})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(members):
        digest.update(f"{name}\0{len(members[name])}\0".encode())
        digest.update(members[name])
    return digest.hexdigest()


def decoded(source: Source, decode: Callable[[dict[str, bytes]], Arrays]) -> Arrays:
    """Return the arrays that `decode` makes of an archive's members; they are made once and kept.

    They are kept under the archive's digest with a digest of their own; a file that is damaged is made again.
    """
    path = cache() / f"{Path(source.name).stem}-{source.digest[:16]}.npz"
    kept = _load(path)
    if kept is not None:
        return kept
    arrays = decode(read(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="decode-") as scratch:
        part = Path(scratch) / path.name
        np.savez(part, digest=np.array(_digest(arrays)), **arrays)  # type: ignore[arg-type]
        part.replace(path)
    return arrays


def _load(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError):
        return None
    expected = arrays.pop("digest", None)
    return arrays if expected is not None and str(expected) == _digest(arrays) else None


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype.str}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
