# SPDX-License-Identifier: Apache-2.0
"""HDF5 files as h5py writes them by default: groups and plain datasets, as byte ranges.

Superblock version 0, groups of symbol tables, object headers of version 1, datasets that lie in one piece (HDF5 File Format
Specification 3.0, sections II.A, III.A to III.D, IV.A). That is all that Keras writes. Links to other places or files, chunks, filters and
external data are refused by name, so that nothing outside the file is read and nothing is unpacked.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from surgery_formats.containers.base import MAX_DIMS, is_size
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["SIGNATURE", "datasets"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNDEFINED = (1 << 64) - 1
_OBJECTS = 100_000
_DEPTH = 32
_PATH_LIMIT = 1024
_BLOCKS = 64  # of one object header
_HEADER_LIMIT = 1 << 20
_METADATA_LIMIT = 64 << 20  # of a file, all that is no array
_SPACE, _TYPE, _EXTERNAL, _LAYOUT, _FILTERS, _CONTINUED, _TABLE = 0x01, 0x03, 0x07, 0x08, 0x0B, 0x10, 0x11
_ONCE = (_SPACE, _TYPE, _EXTERNAL, _LAYOUT, _FILTERS, _TABLE)
_SHARED = 0x02  # a flag: the message lies elsewhere
_NEW_GROUPS = (0x02, 0x06, 0x0A)  # messages of links, of newer files
_FLOATS = {  # size and properties: offset, precision, exponent at, its bits, mantissa at, its bits, bias
    (2, 0, 16, 10, 5, 0, 10, 15): DType.F16,
    (4, 0, 32, 23, 8, 0, 23, 127): DType.F32,
    (8, 0, 64, 52, 11, 0, 52, 1023): DType.F64,
}
_INTEGERS = {
    (1, True): DType.I8,
    (4, True): DType.I32,
    (8, True): DType.I64,
    (1, False): DType.U8,
    (4, False): DType.U32,
    (8, False): DType.U64,
}


def datasets(file: File) -> tuple[StoredTensor, ...]:
    """Every dataset by its path without a leading ``/``, in order of groups and names.

    Raises:
        MalformedError: not such a file, or something in it that is not read.
    """
    return tuple(_Walk(file).walk())


@dataclass(frozen=True, slots=True)
class _Message:
    kind: int
    at: int
    data: bytes


class _Walk:
    """One file, with the objects that were seen."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.seen: set[int] = set()
        self.left = _METADATA_LIMIT

    def fail(self, what: str, tensor: str | None = None) -> MalformedError:
        return MalformedError(what, file=self.file.path, tensor=tensor)

    def take(self, at: int, nbytes: int) -> bytes:
        self.left -= nbytes
        if at + nbytes > self.file.size or self.left < 0:
            raise self.fail("a part of it lies beyond its end" if self.left >= 0 else "too much in it is no array")
        return bytes(self.file.read(at, nbytes))

    def walk(self) -> Iterator[StoredTensor]:
        head = self.take(0, 96)
        if not head.startswith(SIGNATURE):
            raise self.fail("not an HDF5 file")
        if head[8] != 0 or head[13:15] != b"\x08\x08" or head[24:32] != bytes(8):
            raise MalformedError(
                "an HDF5 file of a newer layout, which is not read",
                file=self.file.path,
                hint="write it again with h5py's libver='earliest'",
            )
        yield from self.object(struct.unpack_from("<Q", head, 64)[0], "", 0)

    def object(self, at: int, path: str, depth: int) -> Iterator[StoredTensor]:
        """The datasets below an object, or itself."""
        if at in self.seen or depth > _DEPTH or len(self.seen) >= _OBJECTS:
            raise self.fail(f"'{show(path)}' is linked twice, or too much is in the file")
        self.seen.add(at)
        messages: dict[int, _Message] = {}
        for message in self.messages(at):
            if message.kind in _ONCE and message.kind in messages:
                raise self.fail(f"'{show(path)}' is described twice")
            messages[message.kind] = message
        if _TABLE in messages:
            tree, heap = struct.unpack("<2Q", self.exactly(messages[_TABLE].data, 16))
            names = self.heap(heap)
            for name_at, child in self.entries(tree, 0):
                name = self.name(names, name_at)
                below = f"{path}/{name}" if path else name
                if len(below) > _PATH_LIMIT:
                    raise self.fail("the names of a group are longer than any that a program gives")
                yield from self.object(child, below, depth + 1)
        elif _LAYOUT in messages:
            yield self.dataset(path, messages)
        elif any(kind in messages for kind in _NEW_GROUPS):
            raise self.fail(f"'{show(path)}' is a group of a newer layout, which is not read")
        else:
            raise self.fail(f"'{show(path)}' is neither a group nor a dataset")

    def exactly(self, data: bytes, nbytes: int) -> bytes:
        if len(data) < nbytes:
            raise self.fail("a message of an object header is cut short")
        return data[:nbytes]

    def messages(self, at: int) -> Iterator[_Message]:
        """The messages of an object header, those of its continuations too."""
        version, _, count, _, nbytes = struct.unpack("<BBHII", self.take(at, 12))
        if version != 1:
            raise self.fail("an object header of a newer layout, which is not read")
        blocks = [(at + 16, nbytes)]
        while blocks and count:
            begin, length = blocks.pop(0)
            if length > _HEADER_LIMIT or len(blocks) > _BLOCKS:
                raise self.fail(f"an object header of {length} bytes")
            raw, here = self.take(begin, length), 0
            while here + 8 <= length and count:
                kind, size, flags = struct.unpack_from("<HHB", raw, here)
                data = raw[here + 8 : here + 8 + size]
                if len(data) < size:
                    raise self.fail("a message of an object header is cut short")
                if kind in _ONCE and flags & _SHARED:
                    raise self.fail("a type or sizes that lie elsewhere, which are not read")
                if kind == _CONTINUED:
                    blocks.append(struct.unpack("<2Q", self.exactly(data, 16)))
                yield _Message(kind, begin + here + 8, data)
                here += 8 + size
                count -= 1

    def heap(self, at: int) -> bytes:
        """The names of a group's entries."""
        magic, version, nbytes, _, data = struct.unpack("<4sB3xQQQ", self.take(at, 32))
        if magic != b"HEAP" or version != 0:
            raise self.fail("the names of a group are damaged")
        return self.take(data, nbytes)

    def name(self, heap: bytes, at: int) -> str:
        end = heap.find(b"\x00", at, at + _PATH_LIMIT)
        try:
            name = heap[at:end].decode() if 0 <= at < end else ""
        except UnicodeDecodeError as error:
            raise self.fail("a name is not UTF-8") from error
        if not name or "/" in name:
            raise self.fail("the names of a group are damaged")
        return name

    def entries(self, at: int, depth: int) -> Iterator[tuple[int, int]]:
        """Place of the name and object header of every entry below a node of a group's tree."""
        magic, kind, level, used = struct.unpack("<4sBBH", self.take(at, 8))
        if magic != b"TREE" or kind != 0 or depth > _DEPTH or at in self.seen or len(self.seen) >= _OBJECTS:
            raise self.fail("the tree of a group is damaged")
        self.seen.add(at)
        raw = self.take(at + 24, 8 + 16 * used)
        for number in range(used):
            (child,) = struct.unpack_from("<Q", raw, 8 + 16 * number)
            if level:
                yield from self.entries(child, depth + 1)
                continue
            magic, version, count = struct.unpack("<4sBxH", self.take(child, 8))
            if magic != b"SNOD" or version != 1:
                raise self.fail("the table of a group is damaged")
            table = self.take(child + 8, 40 * count)
            for place in range(count):
                name, header, cached = struct.unpack_from("<QQI", table, 40 * place)
                if cached > 1:
                    raise self.fail("a link to another place, which is not followed")
                yield name, header

    def dataset(self, path: str, messages: dict[int, _Message]) -> StoredTensor:
        for kind, what in ((_FILTERS, "is compressed"), (_EXTERNAL, "lies in another file")):
            if kind in messages:
                raise self.fail(f"{what}, which is not read", path)
        if _SPACE not in messages or _TYPE not in messages:
            raise self.fail("has no type or no sizes", path)
        dtype, shape = self.type(messages[_TYPE].data, path), self.space(messages[_SPACE].data, path)
        layout = messages[_LAYOUT].data
        nbytes = dtype.nbytes(math.prod(shape))
        if layout[:2] == b"\x03\x01" and len(layout) >= 18:
            at, size = struct.unpack_from("<2Q", layout, 2)
        elif layout[:2] == b"\x03\x00" and len(layout) >= 4:
            at, size = messages[_LAYOUT].at + 4, struct.unpack_from("<H", layout, 2)[0]
            size = size if size <= len(layout) - 4 else -1
        else:
            raise self.fail("lies in pieces, or in a layout that is not read", path)
        if at == _UNDEFINED or size != nbytes or at + size > self.file.size:
            raise self.fail(f"has no {nbytes} bytes for the sizes {list(shape)}", path)
        return StoredTensor(path, dtype, shape, self.file, at, size)

    def space(self, data: bytes, path: str) -> tuple[int, ...]:
        version, rank, flags = struct.unpack("<3B", self.exactly(data, 3))
        begin = {1: 8, 2: 4}.get(version)
        if begin is None or rank > MAX_DIMS or flags & ~1 or (version == 2 and data[3:4] == b"\x02"):
            raise self.fail("has sizes of an unknown form", path)
        shape = struct.unpack_from(f"<{rank}Q", self.exactly(data, begin + 8 * rank), begin)
        if not all(map(is_size, shape)):
            raise self.fail("has sizes that no array has", path)
        return shape

    def type(self, data: bytes, path: str) -> DType:
        """The element type; two opaque bytes are a bfloat16, for which HDF5 has no type."""
        kind, bits, nbytes = data[0] & 15 if data else -1, data[1:4], int.from_bytes(data[4:8], "little")
        found = None
        if (
            len(data) >= 12
            and kind == 0
            and bits[0] in (0, 8)
            and struct.unpack_from("<HH", data, 8) == (0, 8 * nbytes)
        ):
            found = _INTEGERS.get((nbytes, bool(bits[0] & 8)))
        elif len(data) >= 20 and kind == 1 and bits == bytes((0x20, 8 * nbytes - 1 & 0xFF, 0)):  # the sign on top
            found = _FLOATS.get((nbytes, *struct.unpack_from("<HHBBBBI", data, 8)))
        elif kind == 5 and nbytes == 2:
            found = DType.BF16
        if found is None:
            raise self.fail("holds values of a type that is not read", path)
        return found
