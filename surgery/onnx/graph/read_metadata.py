# SPDX-License-Identifier: Apache-2.0
"""``metadata_props`` of an ONNX file and shapes of its initializers, read without the onnx package.

An ONNX file is one protobuf message (onnx.proto3, ``ModelProto``) of varints and length-prefixed bytes. Field 14 is
``metadata_props``, each ``{1: key, 2: value}``. The graph (field 7) is skipped by its length, so this costs a page of
I/O. In the graph, field 5 is an initializer (``TensorProto``) with its sizes in field 1, one by one or packed, and its
name in field 8.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File, open_file

__all__ = ["initializer_shapes", "read_metadata"]

_GRAPH, _METADATA, _KEY, _VALUE = 7, 14, 1, 2
_INITIALIZER, _DIMENSIONS, _NAME = 5, 1, 8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LIMIT = 64 << 20  # bytes per entry
_FIELDS = 100_000  # fields of the model; real files have a few dozen
_LONGEST_VARINT = 10
_AXES = 64


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata strings of the ONNX file `path`.

    Raises:
        NotFoundError: no such file.
        MalformedError: not a protobuf message, an entry too large, not UTF-8, or a repeated key.
    """
    file = open_file(path)
    metadata: dict[str, str] = {}
    try:
        for number, begin, end in _chunks(file, 0, file.size):
            if number != _METADATA:
                continue
            if end - begin > _LIMIT:
                raise MalformedError(f"a metadata entry has {end - begin} bytes", file=path)
            entry = {inner: bytes(file.read(at, until - at)).decode() for inner, at, until in _chunks(file, begin, end)}
            key = entry.get(_KEY, "")
            if key in metadata:
                raise MalformedError("two metadata entries have the same key", file=path)
            metadata[key] = entry.get(_VALUE, "")
    except UnicodeDecodeError as error:
        raise MalformedError("the metadata is not UTF-8", file=path) from error
    return metadata


def initializer_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Read the shapes of all initializers of the ONNX file `path`, by name.

    Raises:
        NotFoundError: no such file.
        MalformedError: not a protobuf message, or a name that is not UTF-8.
    """
    file = open_file(path)
    shapes: dict[str, tuple[int, ...]] = {}
    for number, begin, end in _chunks(file, 0, file.size):
        if number == _GRAPH:
            for inner, at, until in _chunks(file, begin, end):
                if inner == _INITIALIZER:
                    name, shape = _parse_initializer(file, at, until)
                    shapes[name] = shape
    return shapes


def _parse_initializer(file: File, begin: int, end: int) -> tuple[str, tuple[int, ...]]:
    name, sizes = "", list[int]()
    for number, wire, at, until in _fields(file, begin, end):
        if number == _NAME and wire == _BYTES:
            if until - at > _LIMIT:
                raise MalformedError(f"a name has {until - at} bytes", file=file.path)
            try:
                name = bytes(file.read(at, until - at)).decode()
            except UnicodeDecodeError as error:
                raise MalformedError("the name of an initializer is not UTF-8", file=file.path) from error
        elif number == _DIMENSIONS and wire in (_VARINT, _BYTES):
            while at < until:
                size, at = _varint(file, at, until)
                sizes.append(size)
                if len(sizes) > _AXES:
                    raise MalformedError("an initializer has too many axes", file=file.path)
    return name, tuple(sizes)


def _chunks(file: File, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, begin and end of every length-prefixed field between `begin` and `end`."""
    for number, wire, at, until in _fields(file, begin, end):
        if wire == _BYTES:
            yield number, at, until


def _fields(file: File, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, wire type, and begin and end of the value of every field between `begin` and `end`."""
    at, count = begin, 0
    while at < end:
        count += 1
        if count > _FIELDS:
            raise MalformedError("not an ONNX file (too many fields)", file=file.path)
        tag, at = _varint(file, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, until = _varint(file, at, end)
        elif wire in (_FIXED64, _FIXED32):
            until = at + (8 if wire == _FIXED64 else 4)
        elif wire == _BYTES:
            size, at = _varint(file, at, end)
            if size > end - at:
                raise MalformedError("not an ONNX file (a field ends after the file)", file=file.path)
            until = at + size
        else:
            raise MalformedError("not an ONNX file", file=file.path)
        yield number, wire, at, until
        at = until
    if at != end:
        raise MalformedError("not an ONNX file (it ends inside a field)", file=file.path)


def _varint(file: File, at: int, end: int) -> tuple[int, int]:
    raw = file.read(at, min(_LONGEST_VARINT, end - at))
    value = 0
    for position, byte in enumerate(raw):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, at + position + 1
    raise MalformedError("not an ONNX file (an unterminated number)", file=file.path)
