# SPDX-License-Identifier: Apache-2.0
"""What a merge lost of a quantised weight that keeps its format: the stored bytes before, given a guess of the codes.

The codes nearest to the estimate are packed with the scales of the merged weight. What differs from the bytes before it is
kept, which is nothing wherever the codec rounds to nearest on an even grid.
"""

from __future__ import annotations

from surgery.engine.undo.coding import Packer, Unpacker
from surgery_formats.arrays import Array
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import PartBytes
from surgery_formats.storage.quantised import Quantised

__all__ = ["decode_codes", "encode_codes", "stored_parts"]


def stored_parts(weight: Quantised, start: int, stop: int) -> list[tuple[int, int, bytes]]:
    """The stored bytes of some rows, as ``(part, offset, bytes)``."""
    return _held(weight.pack(start, weight.codes(start, stop), weight.grid(start, stop)))


def _held(chunks: tuple[PartBytes, ...]) -> list[tuple[int, int, bytes]]:
    return [(chunk.part, chunk.offset, bytes(chunk.data)) for chunk in chunks]


def encode_codes(
    before: list[tuple[int, int, bytes]], after: Quantised, start: int, estimate: Array, margin: float
) -> bytes | None:
    """What `decode_codes` needs to find the bytes `before`; None where the two do not lie alike.

    Args:
        before: See `stored_parts`.
        after: The merged weight.
        start: First row.
        estimate: Of the values before, float64 ``(rows, columns)``.
        margin: See `residue.encode`.
    """
    import numpy

    grid = after.grid(start, start + len(estimate))
    low = grid.nearest((estimate - margin).astype(numpy.float32))
    high = grid.nearest((estimate + margin).astype(numpy.float32))
    unsure = numpy.flatnonzero(low != high)
    guessed = _guess(after, start, estimate, unsure)
    if [(part, at, len(data)) for part, at, data in guessed] != [(part, at, len(data)) for part, at, data in before]:
        return None
    packer = Packer()
    packer.add(numpy.diff(unsure, prepend=0).astype(numpy.uint32))
    for (_, _, guess), (_, _, stored) in zip(guessed, before, strict=True):
        packer.add_bytes(_xor(guess, stored))
    return packer.data()


def decode_codes(
    data: bytes | bytearray, after: Quantised, start: int, estimate: Array
) -> list[tuple[int, int, bytes]]:
    """The bytes before the merge; see `encode_codes`.

    Raises:
        MalformedError: `data` was made for other rows.
    """
    import numpy

    unpacker = Unpacker(data)
    unsure = numpy.cumsum(unpacker.take(estimate.size).astype(numpy.int64))
    if unsure.size and not 0 <= int(unsure.min()) <= int(unsure[-1]) < estimate.size:
        raise MalformedError("a place lies outside of its block")
    guessed = _guess(after, start, estimate, unsure)
    found = [(part, at, _xor(guess, unpacker.take_bytes(len(guess)))) for part, at, guess in guessed]
    unpacker.end()
    return found


def _guess(after: Quantised, start: int, estimate: Array, unsure: Array) -> list[tuple[int, int, bytes]]:
    """The bytes of the codes nearest to the estimate; of those that are not sure on every processor, as they are now."""
    import numpy

    stop = start + len(estimate)
    grid, now = after.grid(start, stop), after.codes(start, stop)
    codes = numpy.ascontiguousarray(grid.nearest(estimate.astype(numpy.float32)).astype(now.dtype))
    codes.reshape(-1)[unsure] = now.reshape(-1)[unsure]
    return _held(after.pack(start, codes, grid))


def _xor(left: bytes, right: bytes) -> bytes:
    import numpy

    both = numpy.frombuffer(left, numpy.uint8) ^ numpy.frombuffer(right, numpy.uint8)
    return bytes(both)
