# SPDX-License-Identifier: Apache-2.0
"""float16 and bfloat16 on the bits of whole arrays: numpy goes value by value, several times slower."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

__all__ = ["are_finite", "narrow", "widen"]

_PIECE = 1 << 18  # elements; smaller pieces gain nothing, and threads wait for each other between their steps
_LARGEST = 65504.0
_INF = 0x7C00
_SIGN = 0x8000
_EXPONENT, _SMALLEST = 0x7F800000, 0x38800000  # of float32: the mask, and 2^-14
_BIASES = 2.0**112  # the exponents of the two types differ by 112


def are_finite(values: numpy.ndarray, inf: int = _INF) -> bool:
    """Whether a flat array of float16 holds neither NaN nor Inf; with `inf` of ``0x7F80``, one of bfloat16.

    Either has all bits of the exponent: it is the greatest of its sign, and the greatest of two signs are two passes.
    """
    import numpy as np

    if not values.size:
        return True
    return bool(values.view(np.int16).max() < inf and values.view(np.uint16).max() < _SIGN + inf)


def widen(values: numpy.ndarray, out: numpy.ndarray) -> None:
    """float16 into float32, exactly; both flat and contiguous."""
    import numpy as np

    if not values.size:
        return
    if not are_finite(values):
        np.copyto(out, values)
        return
    for start in range(0, values.size, _PIECE):
        piece = out[start : start + _PIECE]
        bits = piece.view(np.int32)
        np.copyto(bits, values[start : start + _PIECE].view(np.int16))  # the sign fills the upper half
        bits <<= 13
        bits &= ~0x70000000  # between the sign and the five bits of the exponent
        piece *= np.float32(_BIASES)  # subnormal numbers too, exactly


def narrow(values: numpy.ndarray, out: numpy.ndarray) -> None:
    """float32 into float16, rounded to nearest even; both flat and contiguous."""
    import numpy as np

    if not float(np.dot(values, values)) < _LARGEST**2:  # some value may overflow, or be no number
        np.copyto(out, values, casting="unsafe")
        return
    size = min(_PIECE, values.size)
    power, rounded = np.empty(size, np.uint32), np.empty(size, np.float32)
    sign, smallest = np.empty(size, np.uint16), np.full(size, _SMALLEST, np.uint32)
    for start in range(0, values.size, _PIECE):
        piece, target = values[start : start + _PIECE], out[start : start + _PIECE].view(np.uint16)
        count = piece.size
        bits, big, near = piece.view(np.uint32), power[:count], rounded[:count]
        # Adding 1.5 * 2^(e + 13) to a number of exponent e pushes out the 13 bits that float16 lacks; the processor
        # rounds to nearest even. Below 2^-14, where float16 is subnormal, e stays -14.
        np.bitwise_and(bits, _EXPONENT, out=big)
        np.maximum(big, smallest[:count], out=big)
        big += (13 << 23) + (1 << 22)
        np.add(piece, big.view(np.float32), out=near)
        near -= big.view(np.float32)
        near *= np.float32(1 / _BIASES)
        exact = near.view(np.uint32)
        exact >>= 13
        np.copyto(target, exact, casting="unsafe")
        np.right_shift(bits, 16, out=big)
        np.copyto(sign[:count], big, casting="unsafe")
        sign &= _SIGN
        target |= sign[:count]
