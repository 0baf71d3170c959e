# SPDX-License-Identifier: Apache-2.0
"""``metadata_props`` of an ONNX file and shapes of its initializers, read without the onnx package.

Field 14 of the file's message (onnx.proto3, ``ModelProto``) is ``metadata_props``, each ``{1: key, 2: value}``. The graph
(field 7) is skipped by its length, so this costs a page of I/O. In the graph, field 5 is an initializer. Weights in other
files need not be there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from surgery_formats.containers.onnx.tensor_proto import FoundTensor, find_tensor
from surgery_formats.containers.onnx.wire import BYTES, WireReader
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import open_file

__all__ = ["external_files", "initializer_shapes", "read_metadata"]

_GRAPH, _METADATA, _KEY, _VALUE, _INITIALIZER = 7, 14, 1, 2, 5
_LIMIT = 64 << 20  # bytes per entry


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata strings of the ONNX file `path`.

    Raises:
        NotFoundError: no such file.
        MalformedError: not a protobuf message, an entry too large, not UTF-8, or a repeated key.
    """
    file = open_file(path)
    reader, metadata = WireReader(file), dict[str, str]()
    for field in reader.fields(0, file.size):
        if field.number != _METADATA or field.wire != BYTES:
            continue
        if field.end - field.begin > _LIMIT:
            raise MalformedError(f"a metadata entry has {field.end - field.begin} bytes", file=path)
        parts = {part.number: (part.begin, part.end) for part in reader.fields(field.begin, field.end)}
        try:
            entry = {number: reader.between(*parts[number]).decode() for number in (_KEY, _VALUE) if number in parts}
        except UnicodeDecodeError as error:
            raise MalformedError("the metadata is not UTF-8", file=path) from error
        if (key := entry.get(_KEY, "")) in metadata:
            raise MalformedError("two metadata entries have the same key", file=path)
        metadata[key] = entry.get(_VALUE, "")
    return metadata


def initializer_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Read the shapes of all initializers of the ONNX file `path`, by name.

    Raises:
        NotFoundError: no such file.
        MalformedError: not a protobuf message, or no tensor among them.
    """
    return {found.key: found.shape for found in _initializers(path)}


def external_files(path: str | os.PathLike[str]) -> frozenset[str]:
    """Names of the files that initializers of the ONNX file `path` lie in; none where all are inside.

    Raises:
        NotFoundError: no such file.
        MalformedError: not a protobuf message, or no tensor among them.
    """
    return frozenset(found.external.get("location", "") for found in _initializers(path) if found.external)


def _initializers(path: str | os.PathLike[str]) -> Iterator[FoundTensor]:
    file = open_file(path)
    reader = WireReader(file)
    for field in reader.fields(0, file.size):
        if field.number != _GRAPH or field.wire != BYTES:
            continue
        for inner in reader.fields(field.begin, field.end):
            if inner.number == _INITIALIZER:
                yield find_tensor(reader, inner, "initializer", "")[0]
