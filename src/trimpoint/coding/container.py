r"""One file that holds others, coded: written whole, read in pieces, checked before anything is believed.

    4 bytes    \x89TPZ
    1 byte     version of the format
    4 bytes    CRC-32 of all that follows
    32 bytes   SHA-256 of what is restored: the description, and every file's name, size and content
    head       mode, length, coded length, coded: tables of files, pools and pieces, and all text
    pools      small tensors of one format, end to end
    pieces     larger tensors, each at most 2 million numbers

A file is text with holes, and each hole takes bytes from a pool or is a piece of its own. All integers are LEB128, or
little-endian. Reading takes at most `MOST_TEXT` for the head and `MOST_POOLED` for the pools, then one piece at a time.
"""

import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from trimpoint.coding.entropy import DAMAGED
from trimpoint.coding.integers import Cursor, packed
from trimpoint.coding.tensors import KINDS, MOST_BYTES, compress, expand
from trimpoint.coding.vocabulary import VOCABULARY
from trimpoint.errors import ArtifactError
from trimpoint.storage import contradiction, is_plain_path

MAGIC, VERSION = b"\x89TPZ", 1
MOST_TEXT, MOST_FILES, MOST_PIECES = 1 << 24, 1 << 12, 1 << 16
MOST_POOLED = 1 << 26
"""Bytes of all pools: more than a writer fills."""
_LZMA, _DEFLATE = 0, 1

Step = Callable[[int, int], None]
"""Told how many bytes of how many are done."""


@dataclass(frozen=True)
class Contents:
    """What a coded file holds.

    Args:
        about: description.
        files: name → size in bytes.
        digest: SHA-256 of what is restored.
    """

    about: bytes
    files: Mapping[str, int]
    digest: str

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())


@dataclass
class Piece:
    """Bytes of a file: `gap` from the text, then `size` from a pool, or coded on their own if `pool` is zero."""

    gap: int
    pool: int = 0
    size: int = 0
    kind: int = 0
    scheme: int = 0
    coded: int = 0


@dataclass
class Head:
    """Everything but the coded tensors.

    Args:
        about: description.
        files: name → size in bytes.
        pools: small tensors of one format, end to end; that of a piece is given by its number, from 1.
        pieces: of each file.
        text: what lies between the tensors, of all files.
    """

    about: bytes = b""
    files: dict[str, int] = field(default_factory=dict)
    pools: list[Piece] = field(default_factory=list)
    pieces: list[list[Piece]] = field(default_factory=list)
    text: bytes = b""


class Digest:
    """SHA-256 of a description and of files, one after another.

    Args:
        about: description.
    """

    def __init__(self, about: bytes) -> None:
        self._hash = hashlib.sha256(packed(len(about)) + about)

    def begin(self, name: str, size: int) -> None:
        """Go on with the next file."""
        encoded = name.encode()
        self._hash.update(packed(len(encoded)) + encoded + packed(size))

    def update(self, data: bytes) -> None:
        """Go on with its content."""
        self._hash.update(data)

    def hexdigest(self) -> str:
        """Return the digest, 64 hexadecimal digits."""
        return self._hash.hexdigest()


def head_bytes(head: Head) -> bytes:
    """Return a head as it is stored.

    Raises:
        ArtifactError: if it is too large.
    """
    table = packed(len(head.about)) + head.about + packed(len(head.pools))
    for pool in head.pools:
        table += packed(pool.size, pool.kind, pool.scheme, pool.coded)
    table += packed(len(head.files))
    for (name, size), pieces in zip(head.files.items(), head.pieces, strict=True):
        table += packed(len(name.encode())) + name.encode() + packed(size, len(pieces))
        for piece in pieces:
            table += packed(piece.gap, piece.size)
            if piece.size:
                table += packed(piece.pool) + (b"" if piece.pool else packed(piece.kind, piece.scheme, piece.coded))
    content = table + head.text
    if len(content) > MOST_TEXT or len(head.files) > MOST_FILES or sum(map(len, head.pieces)) > MOST_PIECES:
        raise ArtifactError(
            f"One coded file holds at most {MOST_FILES} files with {MOST_PIECES} tensors and {MOST_TEXT} bytes of "
            f"text. Got {len(head.files)}, {sum(map(len, head.pieces))} and {len(content)}."
        )
    machine = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=VOCABULARY)
    ways = [(_LZMA, compress(content)), (_DEFLATE, machine.compress(content) + machine.flush())]
    mode, coded = min(ways, key=lambda way: len(way[1]))
    return packed(mode, len(content), len(coded)) + coded


def read_head(file: BinaryIO) -> Head:
    """Read a head, and leave the file where the coded tensors begin.

    Raises:
        ArtifactError: if it is not one, or exceeds a limit.
    """
    start = file.tell()
    lengths = Cursor(file.read(32))
    mode = lengths.integer(1, "mode")
    size = lengths.integer(MOST_TEXT, "length")
    length = lengths.integer(2 * MOST_TEXT, "length")
    file.seek(start + lengths.position)
    coded = file.read(length)
    content = expand(coded, size) if mode == _LZMA else _inflated(coded, size)
    cursor = Cursor(content)
    head = Head(about=cursor.take(cursor.integer(len(content), "length")))
    head.pools = [_read_coded_piece(cursor, cursor.integer(MOST_BYTES, "size")) for _ in _times(cursor, len(KINDS))]
    if sum(pool.size for pool in head.pools) > MOST_POOLED:
        raise ArtifactError(f"The coded file is damaged: its pools must have at most {MOST_POOLED} bytes.", DAMAGED)
    taken = [0] * len(head.pools)
    names: list[str] = []
    gaps = count = 0
    for _ in _times(cursor, MOST_FILES):
        names.append(name := _name(cursor))
        size = cursor.integer(what="size")
        pieces = [_read_piece(cursor, taken) for _ in _times(cursor, MOST_PIECES - count)]
        if sum(piece.gap + piece.size for piece in pieces) != size:
            raise ArtifactError(f"The coded file is damaged: the pieces of {name} are not {size} bytes.", DAMAGED)
        head.files[name] = size
        head.pieces.append(pieces)
        gaps += sum(piece.gap for piece in pieces)
        count += len(pieces)
    if (twice := contradiction(names)) is not None:
        raise ArtifactError(
            f"The files of a coded file must be others on every system, and no directories as well. Got {twice!r}.",
            DAMAGED,
        )
    head.text = cursor.rest()
    if gaps != len(head.text) or taken != [pool.size for pool in head.pools]:
        raise ArtifactError("The coded file is damaged: its tables do not fit its text.", DAMAGED)
    return head


def _times(cursor: Cursor, most: int) -> range:
    return range(cursor.integer(max(0, most), "number of entries"))


def _name(cursor: Cursor) -> str:
    try:
        name = cursor.take(cursor.integer(1024, "length")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError("The coded file is damaged: a name is no text.", DAMAGED) from error
    if not is_plain_path(name):
        raise ArtifactError(f"The files of a coded file must have plain paths. Got {name!r}.", DAMAGED)
    return name


def _read_piece(cursor: Cursor, taken: list[int]) -> Piece:
    gap = cursor.integer(MOST_TEXT, "length")
    size = cursor.integer(MOST_BYTES, "size")
    pool = cursor.integer(len(taken), "pool") if size else 0
    if pool:
        taken[pool - 1] += size
        return Piece(gap=gap, size=size, pool=pool)
    if not size:
        return Piece(gap=gap)
    piece = _read_coded_piece(cursor, size)
    piece.gap = gap
    return piece


def _read_coded_piece(cursor: Cursor, size: int) -> Piece:
    kind, scheme = cursor.integer(len(KINDS) - 1, "format"), cursor.integer(255, "scheme")
    return Piece(gap=0, size=size, kind=kind, scheme=scheme, coded=cursor.integer(size, "length"))


def _inflated(coded: bytes, size: int) -> bytes:
    try:
        machine = zlib.decompressobj(-15, zdict=VOCABULARY)
        data = machine.decompress(coded, size + 1)
    except zlib.error as error:
        raise ArtifactError(f"The coded file is damaged: {error}.", DAMAGED) from error
    if len(data) != size or not machine.eof:
        raise ArtifactError(f"The coded file is damaged: {size} bytes must follow. Got {len(data)}.", DAMAGED)
    return data
