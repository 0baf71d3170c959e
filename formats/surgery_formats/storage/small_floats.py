# SPDX-License-Identifier: Apache-2.0
"""Floating-point numbers of 4 to 8 bits: what their codes stand for, and the nearest code, by tables.

The conversions of ``ml_dtypes`` go value by value, ten times slower. Sources: OCP Microscaling Formats 1.0 (E2M1, E2M3,
E8M0), OCP OFP8 1.0 (E4M3 and E5M2), arXiv 2206.02915 (FNUZ: no infinities, no negative zero).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

__all__ = ["E2M1", "E2M3", "E4M3", "E4M3_FNUZ", "E5M2", "E5M2_FNUZ", "E8M0", "SmallFloat", "decode_pairs"]

_PIECE = 1 << 16  # elements whose intermediate results stay in the cache


@dataclass(frozen=True, slots=True)
class SmallFloat:
    """A type of numbers.

    Attributes:
        label: As papers call it.
        bits: Of a code, which lies in the low bits of a byte.
        largest: The greatest finite number.
        type_name: Of the scalar type of ``ml_dtypes``.
        fraction: Bits of it, if the rest is laid out as in types of IEEE 754 (of E4M3, only the code 127 differs).
    """

    label: str
    bits: int
    largest: float
    type_name: str
    fraction: int | None = None

    @property
    def signs_zero(self) -> bool:
        """Whether zero has two codes."""
        return not self.type_name.endswith("uz") and self.type_name != "float8_e8m0fnu"

    def decode(self, codes: numpy.ndarray, out: numpy.ndarray | None = None) -> numpy.ndarray:
        """What `codes`, uint8 below ``2 ** bits``, stand for: float32 of their shape, in `out` (contiguous) if given."""
        import numpy as np

        out = np.empty(codes.shape, np.float32) if out is None else out
        flat, target = np.ascontiguousarray(codes).reshape(-1), out.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            piece, numbers = flat[start : start + _PIECE], target[start : start + _PIECE]
            if not self._shift(piece, numbers):
                np.take(_values(self), piece, out=numbers, mode="clip")
        return out

    def _shift(self, codes: numpy.ndarray, out: numpy.ndarray) -> bool:
        """`decode` by moving bits, where a code has the layout of a float32: thrice as fast as a table."""
        import numpy as np

        if self.fraction is None:
            return False
        no_number = 0x7F if self.fraction == 3 else 0x7C
        if (codes & 0x7F).max(initial=0) >= no_number:
            return False
        bits = out.view(np.int32)
        np.copyto(bits, codes.view(np.int8))  # the sign fills the upper bits
        bits <<= 23 - self.fraction
        bits &= (1 << (30 - self.fraction)) - 1 - (1 << 31)
        out *= np.float32(
            2.0 ** (120 if self.fraction == 3 else 112)
        )  # the exponents of the two types differ by so much
        return True

    def nearest(self, values: numpy.ndarray) -> numpy.ndarray:
        """The uint8 codes of the nearest numbers to float32 `values`; ties go to the even code.

        What lies beyond the range becomes the greatest number, never Inf or NaN.
        """
        import numpy as np

        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        codes = np.empty(flat.shape, np.uint8)
        table, bits = _nearest(self), flat.view(np.uint32)
        rest = np.empty(min(flat.size, _PIECE), np.uint32)
        for start in range(0, flat.size, _PIECE):
            piece, target = bits[start : start + _PIECE], codes[start : start + _PIECE]
            index = rest[: piece.size]
            # The upper half of a number, with its last bit set if the lower half is not zero: rounding that once more is
            # rounding the number once, because no type here has more than 3 of the 7 bits of that fraction.
            np.bitwise_and(piece, 0xFFFF, out=index)
            index += 0xFFFF
            index |= piece
            index >>= 16
            np.take(table, index, out=target, mode="clip")
        return codes.reshape(values.shape)

    def rounded(self, values: numpy.ndarray) -> numpy.ndarray:
        """The nearest numbers to `values`, float32."""
        return self.decode(self.nearest(values))


E2M1 = SmallFloat("E2M1", 4, 6.0, "float4_e2m1fn")
E2M3 = SmallFloat("E2M3", 6, 7.5, "float6_e2m3fn")
E4M3 = SmallFloat("E4M3", 8, 448.0, "float8_e4m3fn", 3)
E5M2 = SmallFloat("E5M2", 8, 57344.0, "float8_e5m2", 2)
E4M3_FNUZ = SmallFloat("E4M3FNUZ", 8, 240.0, "float8_e4m3fnuz")
E5M2_FNUZ = SmallFloat("E5M2FNUZ", 8, 57344.0, "float8_e5m2fnuz")
E8M0 = SmallFloat("E8M0", 8, 2.0**127, "float8_e8m0fnu")


def decode_pairs(kind: SmallFloat, packed: numpy.ndarray, out: numpy.ndarray | None = None) -> numpy.ndarray:
    """Two numbers of four bits a byte, the first in the low half: uint8 ``(..., n)`` to float32 ``(..., 2 n)``.

    They are written into `out`, contiguous, if given.
    """
    import numpy as np

    pairs = None if out is None else out.view(np.complex64)
    return np.take(_pairs(kind), np.ascontiguousarray(packed), out=pairs, mode="clip").view(np.float32)


@functools.cache
def _values(kind: SmallFloat) -> numpy.ndarray:
    """Of every code."""
    import ml_dtypes
    import numpy as np

    codes = np.arange(1 << kind.bits, dtype=np.uint8)
    values: numpy.ndarray = codes.view(getattr(ml_dtypes, kind.type_name)).astype(np.float32)
    return values


@functools.cache
def _nearest(kind: SmallFloat) -> numpy.ndarray:
    """The code for every upper half of a float32."""
    import ml_dtypes
    import numpy as np

    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return values.clip(-kind.largest, kind.largest).astype(getattr(ml_dtypes, kind.type_name)).view(np.uint8)


@functools.cache
def _pairs(kind: SmallFloat) -> numpy.ndarray:
    """The two numbers of every byte as one element of eight bytes."""
    import numpy as np

    values, byte = _values(kind), np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], axis=-1).view(np.complex64)[:, 0]
