"""Reading a coded file: in bounded memory, and nothing is believed before it is checked."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from trimpoint.coding.container import MAGIC, VERSION, Contents, Digest, Piece, Step, read_head
from trimpoint.coding.entropy import DAMAGED
from trimpoint.coding.tensors import KINDS, decode
from trimpoint.errors import ArtifactError

DEFAULT_MOST_BYTES = 1 << 32
_CHECKED_FROM = len(MAGIC) + 1 + 4
_BLOCK = 1 << 20


def read_coded(
    source: Path,
    directory: Path | None,
    *,
    max_bytes: int = DEFAULT_MOST_BYTES,
    on_step: Step = lambda _done, _total: None,
) -> Contents:
    """Restore the files of a coded file, and check that they are those that were written.

    Memory stays bounded, whatever the file says: `MOST_TEXT` for the head, `MOST_POOLED` for small tensors, and one
    piece of at most `MOST_BYTES`.

    Args:
        source: the coded file.
        directory: where the files go: exists and is empty. Believe them only when this function returns. `None` only
            checks.
        max_bytes: that all files may have together.
        on_step: told of the progress.

    Raises:
        ArtifactError: if it is no coded file, cut off, changed, too large or of a later version.
        MissingDependencyError: if the entropy coder is not installed.
    """
    with source.open("rb") as file:
        expected = _check(file)
        head = read_head(file)
        contents = Contents(about=head.about, files=head.files, digest=expected)
        if contents.bytes > max_bytes:
            raise ArtifactError(
                f"The files of a coded file must have at most {max_bytes} bytes together. Got {contents.bytes}.",
                "if you trust where it comes from, allow more: `max_bytes`, or `--max-bytes`",
            )
        digest = Digest(head.about)
        pools = [_decoded(file, pool) for pool in head.pools]
        taken, position, done = [0] * len(pools), 0, 0
        for (name, size), pieces in zip(head.files.items(), head.pieces, strict=True):
            digest.begin(name, size)
            with _created(directory, name) as out:
                for piece in pieces:
                    part = head.text[position : position + piece.gap]
                    position += piece.gap
                    if piece.pool:
                        start = taken[piece.pool - 1]
                        part += pools[piece.pool - 1][start : start + piece.size]
                        taken[piece.pool - 1] += piece.size
                    elif piece.size:
                        part += _decoded(file, piece)
                    out.write(part)
                    digest.update(part)
                    done += len(part)
                    on_step(done, contents.bytes)
        if file.read(1):
            raise ArtifactError("The coded file is damaged: something follows its end.", DAMAGED)
    if digest.hexdigest() != expected:
        raise ArtifactError("The coded file does not restore what was written: its SHA-256 is another.", DAMAGED)
    return contents


def read_about(source: Path) -> Contents:
    """Return what a coded file says it holds, without restoring it.

    Raises:
        ArtifactError: if it is no coded file, cut off or changed.
    """
    with source.open("rb") as file:
        expected = _check(file)
        head = read_head(file)
    return Contents(about=head.about, files=head.files, digest=expected)


def is_coded(path: Path) -> bool:
    """Return whether a path is a file that begins like a coded one."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class _Out(Protocol):
    def write(self, data: bytes, /) -> object: ...


class _Nowhere:
    def write(self, data: bytes) -> None:
        """Leave it."""


def _check(file: BinaryIO) -> str:
    """Check the beginning and the checksum, and return the digest; the head is next."""
    front = file.read(_CHECKED_FROM)
    if front[: len(MAGIC)] != MAGIC:
        raise ArtifactError(
            "This is no coded file of trimpoint: it does not begin like one.", "give a file that `trimpoint pack` wrote"
        )
    if len(front) == _CHECKED_FROM and front[4] != VERSION:
        raise ArtifactError(
            f"A coded file must have the format {VERSION}. Got {front[4]}.",
            "a newer trimpoint wrote it: update with `pip install -U trimpoint`",
        )
    check = 0
    while block := file.read(_BLOCK):
        check = zlib.crc32(block, check)
    if len(front) < _CHECKED_FROM or check != int.from_bytes(front[5:], "little"):
        raise ArtifactError("The coded file is cut off or was changed: it does not have its own checksum.", DAMAGED)
    file.seek(_CHECKED_FROM)
    digest = file.read(32)
    if len(digest) < 32:
        raise ArtifactError("The coded file is cut off.", DAMAGED)
    return digest.hex()


def _decoded(file: BinaryIO, piece: Piece) -> bytes:
    return decode(piece.scheme, file.read(piece.coded), KINDS[piece.kind], piece.size)


@contextmanager
def _created(directory: Path | None, name: str) -> Iterator[_Out]:
    if directory is None:
        yield _Nowhere()
        return
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        yield file
