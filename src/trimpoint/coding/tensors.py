"""The numbers of one tensor in few bytes, and back bit for bit.

A tensor is taken apart into symbols and what they leave open. Integers are their own symbols. Floats of which there are
few distinct ones (clustered, on a grid, mostly zero) are written once, in a table, and their ranks are the symbols. Of
other floats the exponent is the symbol; sign and mantissa follow byte by byte. Which of these is smallest, which way a
matrix is turned, and what predicts its symbols is tried out and stored.
"""

import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trimpoint.coding.contexts import Settings, code_matrix
from trimpoint.coding.entropy import DAMAGED, MOST_LANES, Coder, Reader, Symbols, Writer, least_lanes
from trimpoint.coding.integers import Cursor, packed
from trimpoint.errors import ArtifactError

Words = NDArray[np.unsignedinteger]

RAW, LZMA, INTEGERS, TABLE, FLOATS = range(5)
MOST_ELEMENTS = 1 << 21
MOST_BYTES = 8 * MOST_ELEMENTS
_MOST_SYMBOLS = 4096
_SAMPLE = 1 << 15
_OFTEN = 0.2
_FILTERS = [
    {"id": lzma.FILTER_LZMA1, "dict_size": 1 << 23, "lc": 3, "lp": 0, "pb": 0, "preset": 9 | lzma.PRESET_EXTREME}
]
_SIGNED, _UNSIGNED = "int", "uint"


@dataclass(frozen=True)
class Kind:
    """A number format.

    Args:
        name: of the family: `"int"`, `"uint"`, `"float"`, or `""` for bytes without a meaning.
        bits: of one number.
        mantissa: how many of them are the mantissa's, for floats.
    """

    name: str
    bits: int
    mantissa: int = 0


KINDS = (
    Kind("", 8),
    Kind("float", 32, 23),
    Kind("float", 16, 10),
    Kind("float", 16, 7),
    Kind("float", 64, 52),
    *(Kind("int", bits) for bits in (4, 8, 16, 32, 64)),
    *(Kind("uint", bits) for bits in (4, 8, 16, 32, 64)),
)
"""Their positions are part of the file format."""


def encode(data: bytes, kind: Kind, dims: Sequence[int] = ()) -> tuple[int, bytes]:
    """Return the scheme and the coded bytes of a tensor, whatever scheme is smallest.

    Args:
        data: its elements as they lie in the file, little-endian; at most `MOST_BYTES` of them.
        kind: of number.
        dims: of the tensor; they only help.
    """
    best = (RAW, data)
    for scheme, coded in _candidates(data, kind, dims):
        best = min(best, (scheme, coded), key=lambda candidate: len(candidate[1]))
    return best


def decode(scheme: int, coded: bytes, kind: Kind, size: int) -> bytes:
    """Return the bytes of a tensor.

    Args:
        scheme: one of the five.
        coded: bytes.
        kind: of number.
        size: of the result in bytes, at most `MOST_BYTES`.

    Raises:
        ArtifactError: if the coded bytes do not stand for so many.
    """
    if size > MOST_BYTES:
        raise ArtifactError(f"A coded tensor must have at most {MOST_BYTES} bytes at once. Got {size}.", DAMAGED)
    if scheme == RAW:
        data = coded
    elif scheme == LZMA:
        data = expand(coded, size)
    elif scheme in (INTEGERS, TABLE, FLOATS) and kind.name:
        data = _from_symbols(scheme, coded, kind, size)
    else:
        raise ArtifactError(f"A coded tensor is stored in a way ({scheme}) that is not known here.", DAMAGED)
    if len(data) != size:
        raise ArtifactError(f"A coded tensor must have {size} bytes. Got {len(data)}.", DAMAGED)
    return data


def compress(data: bytes) -> bytes:
    """Return bytes without a meaning by LZMA."""
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_FILTERS)


def expand(coded: bytes, size: int) -> bytes:
    """Return what LZMA made of `size` bytes, without ever making more.

    Raises:
        ArtifactError: if it is something else.
    """
    try:
        machine = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_FILTERS)
        data = machine.decompress(coded, max_length=size)
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise ArtifactError(f"The coded file is damaged: {error}.", DAMAGED) from error
    if len(data) != size:
        raise ArtifactError(f"The coded file is damaged: {size} bytes must follow. Got {len(data)}.", DAMAGED)
    return data


def _candidates(data: bytes, kind: Kind, dims: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    count = len(data) * 8 // kind.bits
    symbols: bytes | None = None
    if kind.name and data and (kind.bits == 4 or len(data) * 8 == count * kind.bits) and count <= MOST_ELEMENTS:
        scheme, symbols = _to_symbols(data, kind, _columns(count, dims))
        yield scheme, symbols
    # LZMA is slow where there is nothing to find: a sample tells whether to go on.
    sample = data[: _SAMPLE // 2]
    if symbols is None or len(data) <= len(sample) or len(compress(sample)) / len(sample) < len(symbols) / len(data):
        yield LZMA, compress(data)


def _columns(count: int, dims: Sequence[int]) -> int:
    """Return the number of columns of a tensor seen as a matrix: the first dimension of more than two is its rows."""
    rows = 1
    for size in dims[:-1]:
        rows *= max(1, int(size))
        if size > 2:
            break
    return count // rows if 0 < rows <= count and count % rows == 0 else count


def _to_symbols(data: bytes, kind: Kind, columns: int) -> tuple[int, bytes]:
    words = _words(data, kind)
    if kind.name != "float" and kind.bits <= 8:
        values = words.astype(np.int32) if kind.name == _UNSIGNED else _signed(words, kind.bits)
        lowest = int(values.min())
        head = packed(lowest + (1 << kind.bits - 1))
        return INTEGERS, head + _matrix(values - lowest, int(values.max()) - lowest + 1, columns, 0 - lowest)
    table, ranks = np.unique(words, return_inverse=True)
    if len(table) <= min(_MOST_SYMBOLS, max(2, len(words) // 4)):
        order = np.argsort(_ordered(table, kind), kind="stable")
        place = np.empty(len(table), np.int32)
        place[order] = np.arange(len(table), dtype=np.int32)
        zero = np.flatnonzero(table[order] == 0)
        head = packed(len(table)) + table[order].tobytes()
        return TABLE, head + _matrix(place[ranks.ravel()], len(table), columns, int(zero[0]) if len(zero) else -1)
    if kind.name == "float":
        return FLOATS, _floats(words, kind, columns)
    return RAW, data


def _floats(words: Words, kind: Kind, columns: int) -> bytes:
    wide = words.astype(np.uint64)
    exponents = ((wide >> kind.mantissa) & ((1 << kind.bits - 1 - kind.mantissa) - 1)).astype(np.int32)
    filled = words != 0
    lowest = int(exponents[filled].min()) if filled.any() else 0
    symbols = np.where(filled, exponents - lowest + 1, 0).astype(np.int32)
    head = packed(lowest) + _matrix(symbols, int(symbols.max()) + 1, columns, 0, after=_rest(wide[filled], kind))
    return head


def _rest(wide: NDArray[np.uint64], kind: Kind) -> list[NDArray[np.uint8]]:
    """Return sign and mantissa as planes of bytes, the lowest first."""
    sign = wide >> (kind.bits - 1)
    left = (sign << kind.mantissa) | (wide & ((1 << kind.mantissa) - 1))
    return [((left >> (8 * plane)) & 255).astype(np.uint8) for plane in range(_planes(kind))]


def _planes(kind: Kind) -> int:
    return (kind.mantissa + 8) // 8


def _matrix(symbols: Symbols, size: int, columns: int, zero: int, after: Sequence[NDArray[np.uint8]] = ()) -> bytes:
    """Return symbols, and planes of bytes after them, with all that is needed to read them."""
    counts = np.bincount(symbols, minlength=size)
    often = 0 if after else int(counts.argmax())
    is_often = size > 1 and counts[often] >= _OFTEN * len(symbols)
    middle = int(np.searchsorted(np.cumsum(counts), len(symbols) / 2))
    center = often if is_often else zero if 0 <= zero < size else middle
    matrix = symbols.astype(np.int32).reshape(-1, columns)
    distance = np.abs(symbols[symbols != center] - center)
    spread = max(1, round(float(distance.mean()))) if len(distance) else 1
    turned, settings = False, Settings(zeros=bool(is_often), spread=spread)
    if is_often or not after:  # neighbours tell little of the exponents of dense floats
        turned, settings = _chosen(matrix, size, center, settings)
    flags = turned | settings.zeros << 1 | settings.near << 2 | settings.sides << 3
    writer = Writer()
    matrix = np.ascontiguousarray(matrix.T) if turned else matrix
    code_matrix(writer, matrix.shape, size, center, settings, matrix)
    is_coded = [_entropy(plane) < 0.995 * len(plane) - 64 for plane in after]
    for plane, coded in zip(after, is_coded, strict=True):
        if coded:
            code_bytes(writer, len(plane), plane)
    plain = [plane.tobytes() for plane, coded in zip(after, is_coded, strict=True) if not coded]
    content = writer.content()
    head = packed(columns, flags, settings.period, size, center, spread, writer.lanes, *is_coded)
    return head + (packed(len(content)) if after else b"") + content + b"".join(plain)


def _chosen(matrix: Symbols, size: int, center: int, settings: Settings) -> tuple[bool, Settings]:
    """Return whether to turn a matrix over, and the settings, as a part of it suggests."""

    def cost(turned: bool, candidate: Settings) -> float:
        rows = max(1, _SAMPLE // matrix.shape[1])
        part = np.ascontiguousarray(matrix[:rows].T if turned else matrix[:rows])
        if candidate.period >= part.shape[1]:
            return float(part.size * 8)
        writer = Writer()
        code_matrix(writer, part.shape, size, center, candidate, part)
        return writer.cost()

    found, turned = cost(False, settings), False
    if min(matrix.shape) > 1 and (other := cost(True, settings)) < found:
        found, turned = other, True
    near = replace(settings, near=settings.zeros, sides=True)
    trials = [(turned, near), (not turned, near)] if min(matrix.shape) > 1 else [(False, near)]
    for way, candidate in trials:
        for more in (candidate, *(replace(candidate, period=p) for p in _periods(matrix, center, way))):
            if (price := cost(way, more)) < found:
                found, turned, settings = price, way, more
    return turned, settings


def _periods(matrix: Symbols, center: int, turned: bool) -> list[int]:
    """Return the distance at which values within a row agree most, if they do: such as the width of an image."""
    rows = (matrix.T if turned else matrix)[: max(1, _SAMPLE // matrix.shape[1])]
    if rows.shape[1] < 8:
        return []
    marks = np.sign(rows - center).astype(np.float32)
    length = 1 << (2 * rows.shape[1] - 1).bit_length()
    power = np.abs(np.fft.rfft(marks, length)) ** 2
    agreement = np.fft.irfft(power.sum(0), length)[: rows.shape[1] // 2 + 1]
    if agreement[0] <= 0 or len(agreement) < 5:
        return []
    period = 3 + int(agreement[3:].argmax())
    return [period] if agreement[period] > 0.02 * agreement[0] else []


def code_bytes(coder: Coder, count: int, plane: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """Code bytes by how often each of them was met before."""
    result = np.zeros(count, np.uint8)
    counts = np.ones(256)
    start, step = 0, 256
    while start < count:
        part = None if plane is None else plane[start : start + step].astype(np.int32)
        classes = np.zeros(min(step, count - start), np.int64)
        found = coder.symbols(counts[None, :], classes, part)
        result[start : start + step] = found
        counts = counts + 2.0 * np.bincount(found, minlength=256)
        start, step = start + step, min(2 * step, 1 << 16)
    return result


def _entropy(plane: NDArray[np.uint8]) -> float:
    counts = np.bincount(plane)
    shares = counts[counts > 0] / max(1, len(plane))
    return float(-(shares * np.log2(shares)).sum() * len(plane) / 8)


def _from_symbols(scheme: int, coded: bytes, kind: Kind, size: int) -> bytes:
    count = size * 8 // kind.bits
    if count > MOST_ELEMENTS or count == 0 or count * kind.bits != size * 8:
        raise ArtifactError(f"A coded tensor must have 1 to {MOST_ELEMENTS} elements. Got {count}.", DAMAGED)
    cursor = Cursor(coded)
    if scheme == INTEGERS:
        if kind.bits > 8 or kind.name == "float":
            raise ArtifactError("A coded tensor is damaged: its numbers are no small integers.", DAMAGED)
        lowest = cursor.integer((1 << kind.bits + 1) - 1, "number") - (1 << kind.bits - 1)
        values, _ = _read_matrix(cursor, count, 1 << kind.bits, 0)
        return _bytes((values + lowest).astype(np.uint64), kind)
    if scheme == TABLE:
        length = cursor.integer(_MOST_SYMBOLS, "table")
        table = np.frombuffer(cursor.take(length * kind.bits // 8), _dtype(kind))
        ranks, _ = _read_matrix(cursor, count, max(1, length), 0)
        if length == 0 or kind.bits == 4:
            raise ArtifactError("A coded tensor is damaged: it has no table.", DAMAGED)
        return bytes(table[ranks].tobytes())
    if kind.name != "float":
        raise ArtifactError("A coded tensor is damaged: its numbers have no exponent.", DAMAGED)
    most = (1 << kind.bits - 1 - kind.mantissa) - 1
    lowest = cursor.integer(most, "exponent")
    symbols, planes = _read_matrix(cursor, count, most + 2 - lowest, _planes(kind))
    filled = symbols > 0
    left = np.zeros(int(filled.sum()), np.uint64)
    for position, plane in enumerate(planes):
        left |= plane.astype(np.uint64) << (8 * position)
    exponents = (symbols[filled] - 1 + lowest).astype(np.uint64)
    mantissa = left & ((1 << kind.mantissa) - 1)
    words = np.zeros(count, np.uint64)
    words[filled] = (left >> kind.mantissa) << (kind.bits - 1) | exponents << kind.mantissa | mantissa
    return _bytes(words, kind)


def _read_matrix(cursor: Cursor, count: int, most: int, planes: int) -> tuple[Symbols, list[NDArray[np.uint8]]]:
    columns = cursor.integer(count, "number of columns")
    flags = cursor.integer(15, "number")
    period = cursor.integer(count, "period")
    size = cursor.integer(min(most, _MOST_SYMBOLS), "number of symbols")
    center, spread = cursor.integer(max(0, size - 1), "symbol"), cursor.integer(_MOST_SYMBOLS, "spread")
    lanes = cursor.integer(MOST_LANES, "number of lanes")
    if (size > 1 and 2 * lanes < least_lanes(count)) or columns == 0 or count % columns or size == 0 or spread == 0:
        raise ArtifactError("A coded tensor is damaged: its dimensions do not fit.", DAMAGED)
    rows, turned = count // columns, bool(flags & 1)
    settings = Settings(
        zeros=bool(flags & 2), near=bool(flags & 4), sides=bool(flags & 8), period=period, spread=spread
    )
    is_coded = [bool(cursor.integer(1, "number")) for _ in range(planes)]
    reader = Reader(cursor.take(cursor.integer(MOST_BYTES, "length")) if planes else cursor.rest(), lanes)
    shape = (columns, rows) if turned else (rows, columns)
    matrix = code_matrix(reader, shape, size, center, settings, None)
    symbols = (np.ascontiguousarray(matrix.T) if turned else matrix).ravel()
    filled = int((symbols > 0).sum()) if planes else 0
    parts = []
    for coded in is_coded:
        found = code_bytes(reader, filled, None) if coded else np.frombuffer(cursor.take(filled), np.uint8)
        parts.append(found)
    reader.close()
    return symbols, parts


def _dtype(kind: Kind) -> np.dtype[np.unsignedinteger]:
    return np.dtype(f"<u{max(1, kind.bits // 8)}")


def _words(data: bytes, kind: Kind) -> Words:
    words = np.frombuffer(data, _dtype(kind))
    return np.stack([words & 15, words >> 4], 1).ravel() if kind.bits == 4 else words


def _bytes(words: NDArray[np.uint64], kind: Kind) -> bytes:
    if kind.bits == 4:
        pairs = (words & 15).astype(np.uint8).reshape(-1, 2)
        return bytes((pairs[:, 0] | pairs[:, 1] << 4).tobytes())
    return bytes(words.astype(_dtype(kind)).tobytes())


def _signed(words: Words, bits: int) -> Symbols:
    half = 1 << bits - 1
    return ((words.astype(np.int32) + half) % (2 * half)) - half


def _ordered(table: Words, kind: Kind) -> NDArray[np.int64]:
    """Return keys that sort words by the value they stand for, the sign of zero included."""
    keys = table.astype(np.int64)
    if kind.name == _UNSIGNED:
        return table.astype(np.uint64).view(np.int64) ^ np.int64(-(2**63)) if kind.bits == 64 else keys
    half = 1 << kind.bits - 1
    keys = keys if kind.bits == 64 else np.where(keys >= half, keys - 2 * half, keys)
    return keys if kind.name == _SIGNED else np.where(keys < 0, (-half) - keys - 1, keys)
