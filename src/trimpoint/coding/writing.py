"""Writing a coded file."""

import mmap
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from trimpoint.coding.container import MAGIC, VERSION, Contents, Digest, Head, Piece, Step, head_bytes
from trimpoint.coding.layout import Span, spans
from trimpoint.coding.reading import read_coded
from trimpoint.coding.tensors import KINDS, MOST_ELEMENTS, Kind, encode
from trimpoint.errors import ArtifactError

_LONGEST_GAP = 1 << 16
_POOLED, _POOLED_VECTOR = 256, 4096
_BLOCK = 1 << 20


def write_coded(
    destination: Path, about: bytes, files: Mapping[str, Path], on_step: Step = lambda _done, _total: None
) -> Contents:
    """Write files into one coded file and read it again to see that each comes back bit for bit.

    Args:
        destination: of the coded file; what is there is overwritten.
        about: description that goes along.
        files: name → file.
        on_step: told of the progress.

    Raises:
        ArtifactError: if there are too many files, or they did not come back as they were.
        MissingDependencyError: if the entropy coder is not installed.
    """
    digest, head = Digest(about), Head(about=about)
    pools = _pooled(files)
    total = sum(path.stat().st_size for path in files.values())
    with destination.open("wb+") as body:
        head.pools, starts = _write_pools(body, pools)
        done = 0
        for name, path in files.items():
            with _mapped(path) as data:
                digest.begin(name, len(data))
                head.files[name] = len(data)
                pieces: list[Piece] = []
                for piece, text in _write_pieces(body, data, spans(path, data), starts):
                    pieces.append(piece)
                    head.text += text
                    on_step(done + min(len(data), sum(p.gap + p.size for p in pieces)), total)
                head.pieces.append(pieces)
                for start in range(0, len(data), _BLOCK):
                    digest.update(data[start : start + _BLOCK])
                done += len(data)
        body.seek(0)
        coded = body.read()
    table = head_bytes(head)
    front = bytes.fromhex(digest.hexdigest()) + table
    check = zlib.crc32(coded, zlib.crc32(front))
    destination.write_bytes(MAGIC + bytes([VERSION]) + check.to_bytes(4, "little") + front + coded)
    found = read_coded(destination, None, max_bytes=max(1, total))
    if dict(found.files) != head.files or found.digest != digest.hexdigest():
        raise ArtifactError("The coded file does not hold what was to be written.", "please report this")
    return found


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    if path.stat().st_size == 0:
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _pooled(files: Mapping[str, Path]) -> dict[int, bytearray]:
    """Return kind → the small tensors of all files, end to end."""
    pools: dict[int, bytearray] = {}
    for path in files.values():
        with _mapped(path) as data:
            for span in spans(path, data):
                if _is_small(span):
                    pools.setdefault(KINDS.index(span.kind), bytearray()).extend(
                        data[span.offset : span.offset + span.size]
                    )
    most = MOST_ELEMENTS // 2
    return {kind: pool for kind, pool in pools.items() if len(pool) * 8 // KINDS[kind].bits <= most}


def _is_small(span: Span) -> bool:
    size = _POOLED_VECTOR if max((*span.dims, 1)) * span.kind.bits >= 8 * span.size else _POOLED
    return span.size <= size and span.kind.bits != 4


def _write_pools(body: BinaryIO, pools: Mapping[int, bytearray]) -> tuple[list[Piece], dict[int, int]]:
    entries, numbers = [], {}
    for number, (kind, pool) in enumerate(pools.items(), 1):
        entries.append(_coded(body, bytes(pool), KINDS[kind], ()))
        numbers[kind] = number
    return entries, numbers


def _write_pieces(
    body: BinaryIO, data: Any, found: list[Span], pools: Mapping[int, int]
) -> Iterator[tuple[Piece, bytes]]:
    """Write the larger tensors of a file, and yield its pieces with the text before each."""
    position = 0
    for span in (*found, Span(len(data), 0, KINDS[0], ())):
        gap = data[position : span.offset]
        if len(gap) > _LONGEST_GAP:
            for start in range(0, len(gap), MOST_ELEMENTS):
                yield _coded(body, gap[start : start + MOST_ELEMENTS], KINDS[0], ()), b""
            gap = b""
        number = pools.get(KINDS.index(span.kind), 0) if _is_small(span) else 0
        if number or not span.size:
            yield Piece(gap=len(gap), pool=number, size=span.size), gap
        else:
            for part, dims in _parts(span):
                piece = _coded(body, data[part.start : part.stop], span.kind, dims)
                piece.gap = len(gap)
                yield piece, gap
                gap = b""
        position = span.offset + span.size


def _parts(span: Span) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Yield the rows of a tensor, so many at a time that their number stays within bounds."""
    most = MOST_ELEMENTS * span.kind.bits // 8
    row = span.size // span.dims[0] if span.dims and span.dims[0] and span.size % span.dims[0] == 0 else 0
    step = most // row * row if 0 < row <= most and row * 8 % span.kind.bits == 0 else most
    for start in range(0, span.size, step):
        size = min(step, span.size - start)
        dims = (size // row, *span.dims[1:]) if row and step % row == 0 else ()
        yield slice(span.offset + start, span.offset + start + size), dims


def _coded(body: BinaryIO, data: bytes, kind: Kind, dims: tuple[int, ...]) -> Piece:
    scheme, coded = encode(data, kind, dims)
    body.write(coded)
    return Piece(gap=0, size=len(data), kind=KINDS.index(kind), scheme=scheme, coded=len(coded))
