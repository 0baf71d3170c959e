# SPDX-License-Identifier: Apache-2.0
"""Tensors that a merge replaced, resized or dropped: their bytes, as the difference to what took their place if it fits."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.engine.undo.coding import Packer, Unpacker
from surgery_formats.arrays import Array, to_cpu
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["comparable", "original_bytes", "pack_original", "unpack_original"]

_PIECE = 4 << 20  # a multiple of every element's size


def comparable(tensor: StoredTensor, other: StoredTensor | None) -> StoredTensor | None:
    """`other`, if its bytes mean the same numbers at the same places."""
    alike = other is not None and (other.dtype, other.shape) == (tensor.dtype, tensor.shape) and other.strides is None
    return other if alike else None


def original_bytes(tensor: StoredTensor) -> Iterator[memoryview]:
    """The bytes of a tensor in C order, in pieces."""
    if tensor.strides is None:
        yield from tensor.file.blocks(tensor.offset, tensor.nbytes, _PIECE)
        return
    data = memoryview(to_cpu(tensor.read()).tobytes())
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]


def pack_original(tensor: StoredTensor, now: StoredTensor | None) -> Iterator[bytes]:
    """The bytes of a tensor, piece by piece; `now` is what `comparable` gave for it."""
    import numpy

    width = max(tensor.dtype.bits // 8, 1)
    at = 0
    for piece in original_bytes(tensor):
        values = numpy.frombuffer(piece, numpy.uint8)
        if now is not None:
            values = values ^ numpy.frombuffer(now.file.read(now.offset + at, len(piece)), numpy.uint8)
        packer = Packer()
        for plane in _planes(values, width):
            packer.add_bytes(plane.tobytes())
        at += len(piece)
        yield packer.data()


def unpack_original(data: bytes | bytearray, at: int, nbytes: int, width: int, now: StoredTensor | None) -> bytes:
    """The piece that begins at byte `at` of a tensor of `nbytes` bytes, whose elements have `width`.

    Raises:
        MalformedError: `data` is of another piece.
    """
    import numpy

    size = min(_PIECE, nbytes - at)
    values = numpy.empty(size, numpy.uint8)
    unpacker = Unpacker(data)
    for plane in _planes(values, width):
        plane[...] = numpy.frombuffer(unpacker.take_bytes(plane.size), numpy.uint8)
    unpacker.end()
    if now is not None:
        values ^= numpy.frombuffer(now.file.read(now.offset + at, size), numpy.uint8)
    return values.tobytes()


def _planes(values: Array, width: int) -> Iterator[Array]:
    for plane in range(width):
        yield values[plane::width]
