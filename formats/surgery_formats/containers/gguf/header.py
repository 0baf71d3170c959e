# SPDX-License-Identifier: Apache-2.0
"""A bounded parser of GGUF headers, versions 2 and 3, little endian.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): ``GGUF``, a version, the numbers of tensors and of
key-values; the key-values; name, sizes (the innermost first), type and offset of every tensor; padding; the data.

It accepts what llama.cpp's reader accepts (``gguf.cpp``), so that no file means two things: no key and no name twice, an
alignment that is a power of two, tensors in order without holes. Every count is checked against the bytes that are left
before anything is made of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery_formats.containers.base import CUT_OFF
from surgery_formats.containers.gguf.constants import ALIGNMENT, ALIGNMENT_KEY, MAGIC, NAME_LIMIT
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File
from surgery_formats.tensors.ggml import BY_NUMBER, GgmlType
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["Header", "KeyValue", "read_header"]

_VERSIONS = (2, 3)
_DIMS = 4  # GGML_MAX_DIMS
_KEY_LIMIT = 65535
_KEYS_LIMIT, _TENSORS_LIMIT = 1 << 16, 1 << 20
_TEXT_KEPT, _ITEMS_KEPT = 1 << 10, 1 << 10  # longer values are skipped: templates, vocabularies
_CHUNK = 1 << 20
_ARRAY, _STRING, _BOOL = 9, 8, 7
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_LENGTH = struct.Struct("<Q")
_LEAST_KEY_VALUE = 8 + 1 + 4 + 1  # a key of one letter with one byte
_LEAST_TENSOR = 8 + 4 + 4 + 8


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key-value.

    Attributes:
        key: The key.
        value: A number, a truth value, a text, or a tuple of numbers; None of one that is not kept.
        offset: Of its first byte in the file.
        nbytes: Key, type and value together.
    """

    key: str
    value: Any
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything before the data.

    Attributes:
        file: The file.
        version: 2 or 3.
        entries: Key-values by key, in order.
        alignment: Of every tensor.
        tensors: In order of position.
        begin: Where the data begins.
    """

    file: File
    version: int
    entries: Mapping[str, KeyValue]
    alignment: int
    tensors: tuple[StoredTensor, ...]
    begin: int

    def value(self, key: str) -> Any:
        """The value of `key`; None if it is not there, or was not kept."""
        entry = self.entries.get(key)
        return None if entry is None else entry.value


class _Cursor:
    """Reads forward through a file, a piece at a time."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.at = 0
        self._start = 0
        self._piece = b""

    @property
    def left(self) -> int:
        """Bytes behind the cursor."""
        return self.file.size - self.at

    def fault(self, what: str, tensor: str | None = None, hint: str | None = None) -> MalformedError:
        """The error to raise."""
        return MalformedError(what, file=self.file.path, tensor=tensor, hint=hint)

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        begin = self.at - self._start
        if begin + nbytes > len(self._piece):
            if nbytes > self.left:
                raise self.fault(f"the header ends at byte {self.file.size}, within a value")
            self._piece = bytes(self.file.read(self.at, min(max(nbytes, _CHUNK), self.left)))
            self._start, begin = self.at, 0
        self.at += nbytes
        return self._piece[begin : begin + nbytes]

    def skip(self, nbytes: int) -> None:
        """Pass over bytes."""
        if nbytes > self.left:
            raise self.fault(f"a value of {nbytes} bytes, of which {self.left} are there")
        self.at += nbytes
        if self.at - self._start > len(self._piece):
            self._start, self._piece = self.at, b""

    def skip_texts(self, count: int) -> None:
        """Pass over texts with their lengths in front: half a million of a large vocabulary, in one loop."""
        while count:
            if self.left < 8:
                raise self.fault(f"the header ends at byte {self.file.size}, within a value")
            self._start, self._piece = self.at, bytes(self.file.read(self.at, min(_CHUNK, self.left)))
            piece, at, last = self._piece, 0, len(self._piece) - 8
            while count and at <= last:
                at += 8 + _LENGTH.unpack_from(piece, at)[0]
                count -= 1
            if at > self.left:
                raise self.fault(f"a text ends {at - self.left} bytes behind the file")
            self.at += at

    def number(self, form: str) -> Any:
        """A number of a `struct` format."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self, limit: int, what: str) -> str:
        """A text with its length in front."""
        size = self.number("Q")
        if size > limit:
            raise self.fault(f"{what} of {size} bytes (at most {limit} are read)")
        raw = self.take(size)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"{what} is not UTF-8: '{show(raw.decode(errors='replace'), 40)}'") from error


def read_header(file: File) -> Header:
    """Parse and check the whole header of an open file.

    Raises:
        MalformedError: any rule of the format is broken; the message names the file and, where there is one, the tensor.
    """
    cursor = _Cursor(file)
    if file.size < 24 or cursor.take(4) != MAGIC:
        raise cursor.fault("is no GGUF: it does not begin with 'GGUF' and two counts")
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise cursor.fault("is big endian: only little-endian GGUF is read")
    if version not in _VERSIONS:
        raise cursor.fault(f"is GGUF of version {version}: versions 2 and 3 are read")
    tensor_count, entry_count = cursor.number("Q"), cursor.number("Q")
    if entry_count > min(_KEYS_LIMIT, cursor.left // _LEAST_KEY_VALUE):
        raise cursor.fault(f"{entry_count} key-values in {cursor.left} bytes (at most {_KEYS_LIMIT} are read)")
    if tensor_count > min(_TENSORS_LIMIT, cursor.left // _LEAST_TENSOR):
        raise cursor.fault(f"{tensor_count} tensors in {cursor.left} bytes (at most {_TENSORS_LIMIT} are read)")
    entries: dict[str, KeyValue] = {}
    for _ in range(entry_count):
        entry = _key_value(cursor)
        if entries.setdefault(entry.key, entry) is not entry:
            raise cursor.fault(f"the key '{show(entry.key)}' appears twice")
    alignment = entries[ALIGNMENT_KEY].value if ALIGNMENT_KEY in entries else ALIGNMENT
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fault(f"{ALIGNMENT_KEY} is {show(alignment, 40)}, which is no power of two")
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    begin = -(-cursor.at // alignment) * alignment
    return Header(file, version, entries, alignment, _placed(cursor, infos, alignment, begin), begin)


def _key_value(cursor: _Cursor) -> KeyValue:
    offset = cursor.at
    key = cursor.text(_KEY_LIMIT, "a key")
    if not key:
        raise cursor.fault("a key is empty")
    value = _value(cursor, key, cursor.number("I"))
    return KeyValue(key, value, offset, cursor.at - offset)


def _value(cursor: _Cursor, key: str, type_: int) -> Any:
    if type_ == _ARRAY:
        item, count = cursor.number("I"), cursor.number("Q")
        return _array(cursor, key, item, count)
    if type_ == _STRING:
        size = cursor.number("Q")
        if size > _TEXT_KEPT:
            return cursor.skip(size)
        return cursor.take(size).decode(errors="replace")
    if type_ not in _FORMATS:
        raise cursor.fault(f"the key '{show(key)}' has the unknown type {type_}")
    value = cursor.number(_FORMATS[type_])
    return bool(value) if type_ == _BOOL else value


def _array(cursor: _Cursor, key: str, item: int, count: int) -> Any:
    if item != _STRING and item not in _FORMATS:
        raise cursor.fault(f"the key '{show(key)}' is an array of the type {item}, which is none of simple values")
    size = 8 if item == _STRING else struct.calcsize(f"<{_FORMATS[item]}")
    if count > cursor.left // size:
        raise cursor.fault(f"the key '{show(key)}' is an array of {count} values, in {cursor.left} bytes")
    if item == _STRING:
        return cursor.skip_texts(count)
    if count > _ITEMS_KEPT:
        return cursor.skip(count * size)
    values = struct.unpack(f"<{count}{_FORMATS[item]}", cursor.take(count * size))
    return tuple(map(bool, values)) if item == _BOOL else values


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    sizes: tuple[int, ...]
    type: GgmlType
    offset: int


def _tensor_info(cursor: _Cursor) -> _TensorInfo:
    name = cursor.text(NAME_LIMIT, "a tensor's name")
    dims = cursor.number("I")
    if dims > _DIMS:
        raise cursor.fault(f"{dims} axes, of at most {_DIMS}", name)
    sizes = struct.unpack(f"<{dims}Q", cursor.take(8 * dims))[::-1]
    number, offset = cursor.number("I"), cursor.number("Q")
    type_ = BY_NUMBER.get(number)
    if type_ is None:
        raise cursor.fault(f"the type {number} is not known", name)
    if any(size >= 1 << 63 for size in sizes) or math.prod(max(size, 1) for size in sizes) >= 1 << 63:
        raise cursor.fault(f"its sizes {list(sizes)} overflow", name)
    if type_.dtype is None and (not sizes or sizes[-1] % type_.block):
        raise cursor.fault(f"rows of {sizes[-1] if sizes else 1} values are not whole blocks of {type_.name}", name)
    return _TensorInfo(name, sizes, type_, offset)


def _placed(cursor: _Cursor, infos: list[_TensorInfo], alignment: int, begin: int) -> tuple[StoredTensor, ...]:
    from surgery_formats.dtypes import DType

    tensors: dict[str, StoredTensor] = {}
    at = 0
    for info in infos:
        nbytes = info.type.size(info.sizes)
        if info.offset != at:
            raise cursor.fault(f"lies at {info.offset} of the data, not at {at} behind the tensor before it", info.name)
        if begin + at + nbytes > cursor.file.size:
            raise cursor.fault("its bytes are not inside the file", info.name, CUT_OFF)
        if info.name in tensors:
            raise cursor.fault("the name appears twice", info.name)
        dtype, shape = info.type.dtype or DType.U8, info.type.shape(info.sizes)
        tensors[info.name] = StoredTensor(
            info.name, dtype, shape, cursor.file, begin + at, nbytes, packed_as=info.type.name
        )
        at += -(-nbytes // alignment) * alignment
    return tuple(tensors.values())
