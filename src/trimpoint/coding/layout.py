"""Where the numbers lie in a file: bytes that are a tensor, their format and dimensions. Nothing is parsed but that.

What is not understood is no error: a file without known tensors is coded as bytes.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimpoint.coding.tensors import KINDS, Kind


@dataclass(frozen=True)
class Span:
    """A tensor in a file.

    Args:
        offset: of its first byte.
        size: in bytes.
        kind: of number.
        dims: of the tensor.
    """

    offset: int
    size: int
    kind: Kind
    dims: tuple[int, ...]


def spans(path: Path, data: Any) -> list[Span]:
    """Return the tensors of a file in the order in which they lie there, without overlaps.

    Args:
        path: its name says what it is: `.onnx`, `.safetensors`, or the `.bin` beside an OpenVINO `.xml`.
        data: its content: bytes, or a memory map.
    """
    readers = {".onnx": _onnx, ".safetensors": _safetensors, ".bin": _openvino}
    try:
        found = list(readers.get(path.suffix, _nothing)(path, data))
    except (ValueError, LookupError, TypeError, OSError, RecursionError):
        return []
    kept: list[Span] = []
    end = 0
    for span in sorted(found, key=lambda span: (span.offset, span.size)):
        if span.size > 0 and span.offset >= end and span.offset + span.size <= len(data):
            kept.append(span)
            end = span.offset + span.size
    return kept


def _nothing(_path: Path, _data: Any) -> Iterator[Span]:
    return iter(())


def _span(offset: int, size: int, kind: Kind | None, dims: tuple[int, ...]) -> Span:
    """Return a span, of plain bytes where the size is not that of so many numbers."""
    fits = kind is not None and size == -(-math.prod(dims) * kind.bits // 8)
    return Span(offset, size, kind if kind is not None and fits else KINDS[0], dims)


def _kind(name: str, bits: int, mantissa: int = 0) -> Kind:
    return KINDS[KINDS.index(Kind(name, bits, mantissa))]


_F32, _F16, _BF16, _F64 = _kind("float", 32, 23), _kind("float", 16, 10), _kind("float", 16, 7), _kind("float", 64, 52)
_I4, _I8, _I16, _I32, _I64 = (_kind("int", bits) for bits in (4, 8, 16, 32, 64))
_U4, _U8, _U16, _U32, _U64 = (_kind("uint", bits) for bits in (4, 8, 16, 32, 64))

# ONNX: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, https://protobuf.dev/programming-guides/encoding

_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_ONNX_KINDS: dict[int, Kind] = {
    **{1: _F32, 2: _U8, 3: _I8, 4: _U16, 5: _I16, 6: _I32, 7: _I64, 9: _U8, 10: _F16, 11: _F64, 12: _U32, 13: _U64},
    **{16: _BF16, 17: _U8, 18: _U8, 19: _U8, 20: _U8, 21: _U4, 22: _I4},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _onnx(_path: Path, data: Any) -> Iterator[Span]:
    yield from _message("model", data, 0, len(data))


def _message(name: str, data: Any, start: int, end: int) -> Iterator[Span]:
    if name == "tensor":
        yield from _tensor(data, start, end)
        return
    for field, wire, offset, size in _fields(data, start, end):
        if wire == _BYTES and field in _FIELDS[name]:
            yield from _message(_FIELDS[name][field], data, offset, offset + size)


def _tensor(data: Any, start: int, end: int) -> Iterator[Span]:
    dims: list[int] = []
    kind, raw = 0, (0, 0)
    for field, wire, offset, size in _fields(data, start, end):
        if field == 1 and wire == _VARINT:
            dims.append(_varint(data, offset, end)[0])
        elif field == 1 and wire == _BYTES:
            position = offset
            while position < offset + size:
                value, position = _varint(data, position, offset + size)
                dims.append(value)
        elif field == 2 and wire == _VARINT:
            kind = _varint(data, offset, end)[0]
        elif field == 9 and wire == _BYTES:
            raw = (offset, size)
    if raw[1]:
        yield _span(*raw, _ONNX_KINDS.get(kind), tuple(dims))


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, wire type, offset and size of each field of a message."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        wire = tag & 7
        if wire == _VARINT:
            offset, position = position, _varint(data, position, end)[1]
        elif wire == _BYTES:
            size, offset = _varint(data, position, end)
            position = offset + size
        elif wire in (_FIXED64, _FIXED32):
            offset, position = position, position + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError("no field of a message")
        if position > end:
            raise ValueError("a field goes beyond its message")
        yield tag >> 3, wire, offset, position - offset


def _varint(data: Any, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("no number")


# OpenVINO: constants are listed in the .xml, https://docs.openvino.ai (intermediate representation, opset)

_CONSTANT = re.compile(r"<data\b[^<>]*>")
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
_OPENVINO_KINDS = {
    **{"f32": _F32, "f16": _F16, "bf16": _BF16, "f64": _F64, "boolean": _U8},
    **{"i4": _I4, "i8": _I8, "i16": _I16, "i32": _I32, "i64": _I64},
    **{"u4": _U4, "u8": _U8, "u16": _U16, "u32": _U32, "u64": _U64},
}


def _openvino(path: Path, _data: Any) -> Iterator[Span]:
    for match in _CONSTANT.finditer(path.with_suffix(".xml").read_text(encoding="utf-8")):
        found = dict(_ATTRIBUTE.findall(match.group()))
        if {"offset", "size", "element_type"} <= set(found):
            dims = tuple(int(size) for size in found.get("shape", "").replace(" ", "").split(",") if size)
            kind = _OPENVINO_KINDS.get(found["element_type"])
            yield _span(int(found["offset"]), int(found["size"]), kind, dims)


# safetensors: https://github.com/huggingface/safetensors#format

_SAFE_KINDS = {
    **{"F32": _F32, "F16": _F16, "BF16": _BF16, "F64": _F64, "BOOL": _U8},
    **{"I8": _I8, "I16": _I16, "I32": _I32, "I64": _I64, "U8": _U8, "U16": _U16, "U32": _U32, "U64": _U64},
}


def _safetensors(_path: Path, data: Any) -> Iterator[Span]:
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start].decode("utf-8")).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield _span(start + first, last - first, _SAFE_KINDS.get(entry["dtype"]), tuple(entry["shape"]))
