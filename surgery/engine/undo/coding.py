# SPDX-License-Identifier: Apache-2.0
"""Whole numbers in few bytes: byte planes, each packed by deflate without a search for repetitions.

The numbers have few values with uneven frequencies, for which Huffman's code is within a few per cent of the entropy;
looking for repeated strings in noise takes longer and saves nothing.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from surgery_formats.errors import MalformedError

if TYPE_CHECKING:
    from surgery_formats.arrays import Array

__all__ = ["Packer", "Unpacker", "pack_bytes", "unpack_bytes"]

_RAW, _DEFLATED = 0, 1
_LIMIT = 1 << 31  # bytes of one plane


def pack_bytes(data: bytes | memoryview, *, repeats: bool = False) -> bytes:
    """`data` after a byte that says how it is packed; as it is, where packing saves nothing.

    Args:
        data: Any bytes.
        repeats: Whether to look for repeated strings: text has them, weights do not.
    """
    strategy = zlib.Z_DEFAULT_STRATEGY if repeats else zlib.Z_RLE  # runs of zeros, which Huffman alone gives a bit each
    packer = zlib.compressobj(6 if repeats else 1, zlib.DEFLATED, -15, 9, strategy)
    packed = packer.compress(data) + packer.flush()
    return bytes([_DEFLATED]) + packed if len(packed) < len(data) else bytes([_RAW]) + bytes(data)


def unpack_bytes(data: bytes | bytearray | memoryview, nbytes: int) -> bytes:
    """The `nbytes` bytes that `pack_bytes` packed.

    Raises:
        MalformedError: it is not what was packed.
    """
    view = memoryview(data)
    if not 0 <= nbytes < _LIMIT or not len(view):
        raise MalformedError("a part of it is empty or too long")
    if view[0] == _RAW:
        plain = bytes(view[1:])
    elif view[0] == _DEFLATED:
        unpacker = zlib.decompressobj(-15)
        try:
            plain = unpacker.decompress(view[1:], nbytes + 1)
        except zlib.error as error:
            raise MalformedError("a part of it is damaged") from error
    else:
        raise MalformedError("a part of it is packed in a way that is not known")
    if len(plain) != nbytes:
        raise MalformedError("a part of it has another length than what it was packed from")
    return plain


class Packer:
    """Collects arrays of whole numbers."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(self, numbers: Array) -> None:
        """Unsigned numbers of any size, flat: only the bytes that some of them need are kept."""
        import numpy

        wide = numpy.ascontiguousarray(numbers, dtype="<u8" if numbers.dtype.itemsize == 8 else "<u4").reshape(-1)
        largest = int(wide.max()) if wide.size else 0
        width = (largest.bit_length() + 7) // 8
        planes = wide.view(numpy.uint8).reshape(-1, wide.dtype.itemsize)
        self._parts.append(bytes([width]) + len(wide).to_bytes(4, "little"))
        for plane in range(width):
            self.add_bytes(planes[:, plane].tobytes())

    def add_bytes(self, data: bytes | memoryview) -> None:
        """Bytes whose number the reader knows."""
        packed = pack_bytes(data)
        self._parts.append(len(packed).to_bytes(4, "little") + packed)

    def data(self) -> bytes:
        """All of it."""
        return b"".join(self._parts)


class Unpacker:
    """Takes apart what a `Packer` made, in the same order. Every method raises MalformedError where it is not that."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    def take(self, most: int) -> Array:
        """The next array, of at most `most` numbers, as uint64."""
        import numpy

        width, count = self._raw(1)[0], int.from_bytes(self._raw(4), "little")
        if width > 8 or count > most:
            raise MalformedError("a part of it has more numbers than there are")
        planes = numpy.zeros((count, 8), numpy.uint8)
        for plane in range(width):
            planes[:, plane] = numpy.frombuffer(self.take_bytes(count), numpy.uint8)
        return planes.view("<u8").reshape(-1)

    def take_bytes(self, nbytes: int) -> bytes:
        """The next `nbytes` bytes."""
        return unpack_bytes(self._raw(int.from_bytes(self._raw(4), "little")), nbytes)

    def end(self) -> None:
        """Nothing is left."""
        if self._at != len(self._data):
            raise MalformedError("a part of it is longer than what it is for")

    def _raw(self, nbytes: int) -> memoryview:
        if self._at + nbytes > len(self._data):
            raise MalformedError("a part of it ends early")
        self._at += nbytes
        return self._data[self._at - nbytes : self._at]
