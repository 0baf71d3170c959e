# SPDX-License-Identifier: Apache-2.0
"""``.onnx_adapter`` files: named arrays that replace inputs with a default, used for LoRA factors and soft prompts.

The container is onnxruntime's (core/session/lora_adapters, ``adapter_schema.fbs``), a flatbuffer:

    Adapter    {format_version: int32; adapter_version: int32; model_version: int32; parameters: [Parameter]}   file id
    "TORT" Parameter  {name: string; dims: [int64]; data_type: int32 (TensorProto.DataType); raw_data: [uint8]}

onnxruntime writes the file but keeps only the addresses of the arrays: if they are freed too early, it silently writes
garbage. So they are kept alive here, and the file is read back by an independent reader.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.ports import element
from surgery_formats.errors import FitError, MalformedError, ProofError
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

__all__ = ["read_adapter_file", "write_adapter_file"]

Array = npt.NDArray[Any]

_IDENTIFIER = b"TORT"
_FORMAT_VERSION = 1
_LIMIT = (1 << 31) - 1  # bytes of a flatbuffer: its offsets are signed 32-bit integers
_PARAMETERS = 1_000_000
_DIMENSIONS = 64


def write_adapter_file(path: str | os.PathLike[str], arrays: Mapping[str, Array]) -> int:
    """Write `arrays`, by the name of the input they replace, to the new file `path`, and read them back; returns the bytes written.

    The file is written in place; write it to a staging folder to make it appear atomically.

    Raises:
        FitError: no arrays, a type that ONNX lacks, or more data than a flatbuffer holds.
        FileExistsError: the file exists.
        ProofError: the arrays read back differ.
    """
    import onnxruntime

    if not arrays:
        raise FitError("the adapter has no arrays", file=path)
    contiguous = {
        name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)
    }  # alive until the file is written
    if sum(array.nbytes + len(name.encode()) + 256 for name, array in contiguous.items()) > _LIMIT:
        raise FitError("more than 2 GB do not fit into an .onnx_adapter file", file=path)
    values = {}
    for name, array in contiguous.items():
        raw = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, element(array.dtype))
        values[name] = value
    writer = onnxruntime.AdapterFormat()
    writer.set_adapter_version(1)
    writer.set_model_version(1)
    writer.set_parameters(values)
    with open(path, "xb"):
        pass  # reserves the name: onnxruntime itself would overwrite an existing file
    writer.export_adapter(os.fspath(path))
    written = read_adapter_file(path)
    if list(written) != list(contiguous):
        raise ProofError("the adapter read back has other names than were written", file=path)
    for name, array in contiguous.items():
        copy = written[name]
        if copy.dtype != array.dtype or copy.shape != array.shape or copy.tobytes() != array.tobytes():
            raise ProofError("the array read back differs from what was written", file=path, tensor=name)
    return Path(path).stat().st_size


def read_adapter_file(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read the arrays of an ``.onnx_adapter`` file, in file order.

    Raises:
        NotFoundError: no such file.
        MalformedError: not such a file, an offset outside the file, sizes that do not fit, or a repeated name.
    """
    file = open_file(path)
    if file.size > _LIMIT:
        raise MalformedError("larger than a flatbuffer can be", file=path)
    reader = _Flatbuffer(bytes(file.read(0, file.size)), path)
    if file.size < 8 or reader.data[4:8] != _IDENTIFIER:
        raise MalformedError("not an .onnx_adapter file", file=path)
    root = reader.follow(0)
    if (version := reader.number(root, 0, "<i")) != _FORMAT_VERSION:
        raise MalformedError(f"format version {version} is not supported", file=path)
    arrays: dict[str, Array] = {}
    for table in reader.tables(root, 3, _PARAMETERS):
        name, array = _parameter(reader, table)
        if name in arrays:
            raise MalformedError("this name appears twice", file=path, tensor=name)
        arrays[name] = array
    if not arrays:
        raise MalformedError("the adapter has no arrays", file=path)
    return arrays


def _parameter(reader: _Flatbuffer, table: int) -> tuple[str, Array]:
    import ml_dtypes

    try:
        name = bytes(reader.vector(table, 0, 1)).decode()
    except UnicodeDecodeError as error:
        raise MalformedError("a name is not UTF-8", file=reader.path) from error
    dims = tuple(int(size) for size in np.frombuffer(reader.vector(table, 1, 8), "<i8"))
    kinds: dict[int, Any] = {element(np.dtype(kind)): np.dtype(kind) for kind in _KINDS}
    kinds[element(np.dtype(ml_dtypes.bfloat16))] = np.dtype(ml_dtypes.bfloat16)
    number = reader.number(table, 2, "<i")
    if number not in kinds:
        raise MalformedError(f"type {number} is not supported", file=reader.path, tensor=name)
    raw = reader.vector(table, 3, 1)
    if len(dims) > _DIMENSIONS or any(size < 0 for size in dims):
        raise MalformedError("the shape is invalid", file=reader.path, tensor=name)
    expected = kinds[number].itemsize
    for size in dims:
        expected *= size
    if expected != len(raw):
        raise MalformedError(f"has {len(raw)} bytes for the shape {list(dims)}", file=reader.path, tensor=name)
    return name, np.frombuffer(raw, kinds[number]).reshape(dims)


_KINDS = (np.float32, np.float16, np.float64, np.int64, np.int32, np.int8, np.uint8, np.bool_)


class _Flatbuffer:
    """Tables and vectors of a flatbuffer (flatbuffers.dev, "Internals"), with every offset checked."""

    def __init__(self, data: bytes, path: str | os.PathLike[str]) -> None:
        self.data, self.path = memoryview(data), path

    def read(self, at: int, form: str) -> int:
        size = struct.calcsize(form)
        if at < 0 or at + size > len(self.data):
            raise MalformedError("an offset points outside the file", file=self.path)
        number: int = struct.unpack_from(form, self.data, at)[0]
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

    def vector(self, table: int, index: int, size: int) -> memoryview:
        """The bytes of a vector of elements of `size` bytes, or of a string."""
        at = self.field(table, index)
        if not at:
            return self.data[:0]
        begin = self.follow(at)
        nbytes = self.read(begin, "<I") * size
        if begin + 4 + nbytes > len(self.data):
            raise MalformedError("a vector ends after the file", file=self.path)
        return self.data[begin + 4 : begin + 4 + nbytes]

    def tables(self, table: int, index: int, limit: int) -> list[int]:
        """Offsets of the tables in a vector."""
        at = self.field(table, index)
        if not at:
            return []
        begin = self.follow(at)
        count = len(self.vector(table, index, 4)) // 4
        if count > limit:
            raise MalformedError(f"has {show(count)} arrays", file=self.path)
        return [self.follow(begin + 4 + 4 * position) for position in range(count)]
