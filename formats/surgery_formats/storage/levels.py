# SPDX-License-Identifier: Apache-2.0
"""Codes that stand for the numbers of a table: reading bytes of two codes, and the nearest number.

A byte is looked up as a pair of numbers. The nearest code is the number of midpoints below a value: sixteen levels take
fifteen comparisons, which are faster than any search because they run over many values at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

__all__ = ["Levels", "join_nibbles", "split_nibbles"]

_PIECE = 1 << 16  # elements whose intermediate results stay in the cache
_FEW = 16


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """The numbers that codes stand for.

    Attributes:
        values: float32, by code.
        order: uint8, the codes in the order of their values.
        bounds: float32, the midpoints between neighbours in that order; a value that is one belongs below it.
        pairs: complex64 by byte, of 16 levels: the numbers of its high and its low half, as two floats.
    """

    values: numpy.ndarray
    order: numpy.ndarray
    bounds: numpy.ndarray
    pairs: numpy.ndarray | None

    @classmethod
    def of(cls, values: Sequence[float] | numpy.ndarray, order: Sequence[int] = ()) -> Levels:
        """Levels of up to 256 numbers.

        Args:
            values: By code.
            order: Of the codes, where equal numbers have several; by default the lower code is first.
        """
        import numpy as np

        table = np.asarray(values, np.float32)
        ranks = np.asarray(order, np.uint8) if order else np.argsort(table, kind="stable").astype(np.uint8)
        ordered = table[ranks]
        pairs = None
        if len(table) == _FEW:
            both = np.stack([np.repeat(table, _FEW), np.tile(table, _FEW)], axis=-1)
            pairs = both.view(np.complex64).reshape(-1)
        return cls(table, ranks, (ordered[:-1] + ordered[1:]) / np.float32(2), pairs)

    def decode(self, codes: numpy.ndarray) -> numpy.ndarray:
        """float32, of the shape of `codes`."""
        import numpy as np

        return np.take(self.values, codes, mode="clip")

    def decode_bytes(self, packed: numpy.ndarray, out: numpy.ndarray) -> None:
        """Fill `out`, float32 and contiguous, with the two numbers of each byte, the high half first."""
        import numpy as np

        assert self.pairs is not None
        np.take(self.pairs, packed, out=out.view(np.complex64), mode="clip")

    def nearest(self, values: numpy.ndarray) -> numpy.ndarray:
        """The uint8 codes of the nearest levels; NaN has the code of the lowest."""
        import numpy as np

        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if len(self.values) > _FEW:
            return np.take(self.order, np.searchsorted(self.bounds, flat)).reshape(values.shape)
        ranks = np.zeros(flat.shape, np.uint8)
        above = np.empty(min(flat.size, _PIECE), np.bool_)
        for start in range(0, flat.size, _PIECE):
            piece, counted = flat[start : start + _PIECE], ranks[start : start + _PIECE]
            exceeds = above[: piece.size]
            for bound in self.bounds:
                np.greater(piece, bound, out=exceeds)
                counted += exceeds.view(np.uint8)
        ascending = bool((self.order[:-1] < self.order[1:]).all())
        return (ranks if ascending else np.take(self.order, ranks, mode="clip")).reshape(values.shape)


def split_nibbles(packed: numpy.ndarray) -> numpy.ndarray:
    """The uint8 codes of flat bytes, the high half of each first."""
    import numpy as np

    codes = np.empty((packed.size, 2), np.uint8)
    np.right_shift(packed, 4, out=codes[:, 0])
    np.bitwise_and(packed, 15, out=codes[:, 1])
    return codes.reshape(-1)


def join_nibbles(codes: numpy.ndarray) -> numpy.ndarray:
    """The bytes of flat uint8 codes, an even number of them."""
    import numpy as np

    both = np.ascontiguousarray(codes).view("<u2")
    packed = np.empty(both.shape, np.uint8)
    np.copyto(packed, (both << 4) | (both >> 8), casting="unsafe")
    return packed
