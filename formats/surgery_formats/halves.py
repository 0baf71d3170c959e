# SPDX-License-Identifier: Apache-2.0
"""float16 and bfloat16 on the bits of whole arrays: numpy goes value by value, several times slower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery_formats.fast_casts import fast_cast

if TYPE_CHECKING:
    import numpy

__all__ = ["are_finite", "narrow", "widen"]

_PIECE = 1 << 18  # elements; smaller pieces gain nothing, and threads wait for each other between their steps
_INF = 0x7C00
_SIGN = 0x8000
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
    cast = fast_cast("widen", values.size)
    if cast is not None:
        cast(values, out)
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

    cast = fast_cast("narrow", values.size)
    if cast is not None:
        cast(values, out)
        if are_finite(out):  # a NaN would have another payload
            return
    np.copyto(out, values, casting="unsafe")
