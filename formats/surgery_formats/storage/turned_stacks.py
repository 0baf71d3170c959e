# SPDX-License-Identifier: Apache-2.0
"""Matrices that lie under each other, ``(out, in)`` each or turned, ``(in, out)``, for encodings whose codes are of outputs."""

from __future__ import annotations

from surgery_formats.arrays import Array

__all__ = ["across", "by_outputs", "rows_at_once"]


def rows_at_once(sizes: tuple[int, ...], count: int, turned: bool) -> int:
    """Rows that are put together: all of a matrix where outputs are columns, else one."""
    return max(sizes[0] // count, 1) if turned else 1


def by_outputs(sizes: tuple[int, ...], count: int, turned: bool) -> tuple[int, int]:
    """``(out, in)`` of `count` matrices that are stored as `sizes`, with the outputs of all of them."""
    rows, columns = sizes
    return (columns * count, rows // count) if turned else (rows, columns)


def across(values: Array, rows: int) -> Array:
    """``(count * rows, columns)`` to ``(count * columns, rows)``: the axes of every matrix of `rows` rows exchanged."""
    import numpy as np

    found: Array = np.ascontiguousarray(values.reshape(-1, rows, values.shape[1]).mT).reshape(-1, rows)
    return found
