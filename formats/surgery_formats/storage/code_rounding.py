# SPDX-License-Identifier: Apache-2.0
"""What rounding to codes may have done to values: the expected squared error of each, from the grid alone.

A value that became a code lay somewhere between the midpoints to the neighbouring numbers. Taken as equally likely
anywhere there, its error has the variance ``(a^3 + b^3) / 3 (a + b)`` for half distances ``a`` and ``b`` to the two
neighbours, which is ``step^2 / 12`` on an even grid (Bennett 1948, "Spectra of Quantized Signals").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery_formats.arrays import Array
from surgery_formats.storage.quantised import Quantised

if TYPE_CHECKING:
    import numpy

__all__ = ["rounding_variance"]

_PLACES = 16  # rows where the order of the codes is looked for; a block of zeros tells nothing


def rounding_variance(weight: Quantised, start: int, stop: int) -> Array:
    """Expected squared error of rows ``[start, stop)`` of the matrix: float32 ``(rows, columns)``.

    Raises:
        MalformedError, FitError: see `Quantised.codes` and `Quantised.grid`.
    """
    import numpy as np

    codes, grid = weight.codes(start, stop), weight.grid(start, stop)
    first, below, above = _neighbours(weight, codes.dtype)
    numbers = np.clip(codes.astype(np.int32) - first, 0, len(below) - 1)
    values = grid.values(codes)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        lower = abs(values - grid.values(below[numbers])) / 2
        upper = abs(grid.values(above[numbers]) - values) / 2
        at_an_end = (lower == 0) | (upper == 0)  # whatever lay beyond is taken to have been no farther
        lower, upper = np.where(at_an_end, lower + upper, lower), np.where(at_an_end, lower + upper, upper)
        variance = (lower**3 + upper**3) / (3 * (lower + upper))
    found: Array = np.where(np.isfinite(variance), variance, 0).astype(np.float32)
    return found


def _neighbours(weight: Quantised, dtype: numpy.dtype[numpy.generic]) -> tuple[int, numpy.ndarray, numpy.ndarray]:
    """The lowest code, and by code the one of the next lower and of the next higher number; itself at an end.

    The order is that of one block's numbers. A negative scale would turn it round, which changes no distance.
    """
    import numpy as np

    # A signed type may hold codes that are none.
    signed = np.issubdtype(dtype, np.signedinteger) and any(
        (weight.codes(row, row + 1) < 0).any() for row in _rows(weight)
    )
    first = -(1 << (weight.bits - 1)) if signed else 0
    codes = np.arange(first, first + (1 << weight.bits)).astype(dtype)
    values = max((_numbers(weight, codes, row) for row in _rows(weight)), key=lambda numbers: len(np.unique(numbers)))
    finite = np.flatnonzero(np.isfinite(values))
    distinct, kept = np.unique(values[finite], return_index=True)
    below, above = codes.copy(), codes.copy()
    if len(distinct):
        representative, place = codes[finite][kept], np.searchsorted(distinct, values[finite])
        below[finite] = representative[np.maximum(place - 1, 0)]
        above[finite] = representative[np.minimum(place + 1, len(distinct) - 1)]
    return first, below, above


def _rows(weight: Quantised) -> list[int]:
    count = weight.shape[0]
    return sorted({number * count // _PLACES for number in range(_PLACES)})


def _numbers(weight: Quantised, codes: numpy.ndarray, row: int) -> numpy.ndarray:
    """What all codes stand for at the first column of a row."""
    import numpy as np

    grid, width = weight.grid(row, row + 1), max(min(weight.block[1], weight.shape[1]), 1)
    with np.errstate(all="ignore"):
        return np.concatenate(
            [grid.values(codes[None, at : at + width])[0] for at in range(0, len(codes), width)]
        )  # never more at a time than share a scale
