# SPDX-License-Identifier: Apache-2.0
"""``metadata_props`` of an ONNX file, read without the graph and without the onnx package.

An ONNX file is one protobuf message (onnx.proto3, ``ModelProto``): fields of varints and of length-prefixed bytes. Field 14 is
``metadata_props``, each ``{1: key, 2: value}``. The graph (field 7) is stepped over by its length, so this costs a page of I/O.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File, open_file

__all__ = ["read_metadata"]

_METADATA, _KEY, _VALUE = 14, 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LIMIT = 64 << 20  # bytes of one entry
_FIELDS = 100_000  # of the model's own; real files have a few dozen
_LONGEST_VARINT = 10


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata strings of the ONNX file `path`.

    Raises:
        NotFoundError: no such file.
        MalformedError: not a protobuf message, an entry too large, not UTF-8, a key twice.
    """
    file = open_file(path)
    found: dict[str, str] = {}
    try:
        for number, begin, end in _fields(file, 0, file.size):
            if number != _METADATA:
                continue
            if end - begin > _LIMIT:
                raise MalformedError(f"an entry of metadata has {end - begin} bytes", file=path)
            entry = {inner: bytes(file.read(at, until - at)).decode() for inner, at, until in _fields(file, begin, end)}
            key = entry.get(_KEY, "")
            if key in found:
                raise MalformedError("two entries of metadata have one name", file=path)
            found[key] = entry.get(_VALUE, "")
    except UnicodeDecodeError as error:
        raise MalformedError("metadata that is not UTF-8", file=path) from error
    return found


def _fields(file: File, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of every length-prefixed field between `begin` and `end`."""
    at, count = begin, 0
    while at < end:
        count += 1
        if count > _FIELDS:
            raise MalformedError("not an ONNX file (too many fields)", file=file.path)
        tag, at = _varint(file, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, at = _varint(file, at, end)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            size, at = _varint(file, at, end)
            if size > end - at:
                raise MalformedError("not an ONNX file (a field ends behind the file)", file=file.path)
            yield number, at, at + size
            at += size
        else:
            raise MalformedError("not an ONNX file", file=file.path)
    if at != end:
        raise MalformedError("not an ONNX file (it ends within a field)", file=file.path)


def _varint(file: File, at: int, end: int) -> tuple[int, int]:
    raw = file.read(at, min(_LONGEST_VARINT, end - at))
    value = 0
    for position, byte in enumerate(raw):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, at + position + 1
    raise MalformedError("not an ONNX file (a number without end)", file=file.path)
