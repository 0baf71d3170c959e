# SPDX-License-Identifier: Apache-2.0
"""``.onnx_adapter`` files: named arrays that replace inputs of a graph with a default, for LoRA factors and soft prompts.

The container is onnxruntime's (core/session/lora_adapters, ``adapter_schema.fbs``), a flatbuffer:

    Adapter    {format_version: int32; adapter_version: int32; model_version: int32; parameters: [Parameter]}   file id
    "TORT" Parameter  {name: string; dims: [int64]; data_type: int32 (TensorProto.DataType); raw_data: [uint8]}

It holds no model, so it is none of the containers of base models. Every offset of a file is checked; what lies between them is not read.
"""

from __future__ import annotations

import math
import os
import struct

from surgery_formats.containers.base import MAX_DIMS, Shard
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File, first_bytes, open_file
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = [
    "ELEMENTS",
    "FORMAT_VERSION",
    "IDENTIFIER",
    "LIMIT",
    "NAME_LIMIT",
    "arrays_of",
    "is_onnx_adapter",
    "open_onnx_adapter",
]

IDENTIFIER = b"TORT"
LIMIT = (1 << 31) - 1
"""Bytes of a flatbuffer: its offsets are signed 32-bit integers."""
ELEMENTS = {
    DType.F32: 1,
    DType.U8: 2,
    DType.I8: 3,
    DType.I32: 6,
    DType.I64: 7,
    DType.BOOL: 9,
    DType.F16: 10,
    DType.F64: 11,
    DType.BF16: 16,
}
"""``TensorProto.DataType`` by element type."""
_BY_NUMBER = {number: dtype for dtype, number in ELEMENTS.items()}
FORMAT_VERSION = 1
_PARAMETERS = 1_000_000
NAME_LIMIT = 1 << 16  # bytes


def is_onnx_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a file has the identifier of such files."""
    return (first_bytes(path, 8) or b"")[4:8] == IDENTIFIER


def open_onnx_adapter(path: str | os.PathLike[str]) -> Shard:
    """The arrays of a file, in its order; only names, types and sizes are read.

    Raises:
        NotFoundError: no such file.
        MalformedError: not such a file, an offset outside the file, sizes that do not fit, a repeated name, or more
            values than the file has bytes for.
    """
    return arrays_of(open_file(path))


def arrays_of(file: File) -> Shard:
    """The arrays of an open file, see `open_onnx_adapter`."""
    path = file.path
    if file.size > LIMIT:
        raise MalformedError("larger than a flatbuffer can be", file=path)
    if file.size < 8 or bytes(file.read(4, 4)) != IDENTIFIER:
        raise MalformedError("not an .onnx_adapter file", file=path)
    reader = _Flatbuffer(file)
    root = reader.follow(0)
    if (version := reader.number(root, 0, "<i")) != FORMAT_VERSION:
        raise MalformedError(f"format version {version} is not supported", file=path)
    tensors: dict[str, StoredTensor] = {}
    for table in reader.tables(root, 3, _PARAMETERS):
        tensor = _parameter(reader, table)
        if tensor.name in tensors:
            raise MalformedError("this name appears twice", file=path, tensor=tensor.name)
        tensors[tensor.name] = tensor
    if not tensors:
        raise MalformedError("the adapter has no arrays", file=path)
    if (total := sum(tensor.nbytes for tensor in tensors.values())) > file.size:
        raise MalformedError(f"its arrays share bytes: they take {total} of {file.size}", file=path)
    return Shard(file.path, "onnx_adapter", file, tuple(tensors.values()))


def _parameter(reader: _Flatbuffer, table: int) -> StoredTensor:
    file = reader.file
    begin, nbytes = reader.vector(table, 0, 1)
    if nbytes > NAME_LIMIT:
        raise MalformedError(f"a name of {nbytes} bytes (at most {NAME_LIMIT} are read)", file=file.path)
    try:
        name = bytes(file.read(begin, nbytes)).decode()
    except UnicodeDecodeError as error:
        raise MalformedError("a name is not UTF-8", file=file.path) from error
    begin, nbytes = reader.vector(table, 1, 8)
    if nbytes > 8 * MAX_DIMS:
        raise MalformedError("the shape is invalid", file=file.path, tensor=name)
    sizes: tuple[int, ...] = struct.unpack(f"<{nbytes // 8}q", file.read(begin, nbytes))
    number = reader.number(table, 2, "<i")
    if number not in _BY_NUMBER:
        raise MalformedError(f"type {number} is not supported", file=file.path, tensor=name)
    begin, nbytes = reader.vector(table, 3, 1)
    if any(size < 0 for size in sizes):
        raise MalformedError("the shape is invalid", file=file.path, tensor=name)
    dtype = _BY_NUMBER[number]
    if math.prod(sizes) * dtype.bits // 8 != nbytes:
        raise MalformedError(f"has {nbytes} bytes for the shape {list(sizes)}", file=file.path, tensor=name)
    return StoredTensor(name, dtype, sizes, file, begin, nbytes)


class _Flatbuffer:
    """Tables and vectors of a flatbuffer (flatbuffers.dev, "Internals"), with every offset checked."""

    def __init__(self, file: File) -> None:
        self.file = file

    def read(self, at: int, form: str) -> int:
        size = struct.calcsize(form)
        if at < 0 or at + size > self.file.size:
            raise MalformedError("an offset points outside the file", file=self.file.path)
        number: int = struct.unpack(form, self.file.read(at, size))[0]
        return number

    def follow(self, at: int) -> int:
        """Follow the offset stored at `at`."""
        return at + self.read(at, "<I")

    def field(self, table: int, index: int) -> int:
        """Offset of field `index` of a table; 0 if it is absent."""
        vtable = table - self.read(table, "<i")
        if 4 + 2 * index + 2 > self.read(vtable, "<H"):
            return 0
        offset = self.read(vtable + 4 + 2 * index, "<H")
        return table + offset if offset else 0

    def number(self, table: int, index: int, form: str) -> int:
        at = self.field(table, index)
        return self.read(at, form) if at else 0

    def vector(self, table: int, index: int, size: int) -> tuple[int, int]:
        """``(offset, nbytes)`` of a vector of elements of `size` bytes, or of a string."""
        at = self.field(table, index)
        if not at:
            return 0, 0
        begin = self.follow(at)
        nbytes = self.read(begin, "<I") * size
        if begin + 4 + nbytes > self.file.size:
            raise MalformedError("a vector ends after the file", file=self.file.path)
        return begin + 4, nbytes

    def tables(self, table: int, index: int, limit: int) -> list[int]:
        """Offsets of the tables in a vector."""
        begin, nbytes = self.vector(table, index, 4)
        if nbytes // 4 > limit:
            raise MalformedError(f"has {show(nbytes // 4)} arrays", file=self.file.path)
        return [self.follow(at) for at in range(begin, begin + nbytes, 4)]
