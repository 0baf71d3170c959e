# SPDX-License-Identifier: Apache-2.0
"""Blocks that are counted through all elements of a matrix, so that a block may begin in one row and end in another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

__all__ = ["FlatBlocks", "rows_of_whole_blocks"]


def rows_of_whole_blocks(columns: int, size: int) -> int:
    """The fewest rows that are whole blocks of `size` elements."""
    return size // math.gcd(columns, size)


@dataclass(frozen=True, slots=True)
class FlatBlocks:
    """Some rows of a matrix, cut into blocks.

    Attributes:
        start: Row.
        rows: How many of them.
        columns: Of the matrix.
        size: Elements of a block.
    """

    start: int
    rows: int
    columns: int
    size: int

    @property
    def first(self) -> int:
        """The block of the first element."""
        return self.start * self.columns // self.size

    @property
    def stop(self) -> int:
        """Behind the block of the last element."""
        return -(-(self.start + self.rows) * self.columns // self.size)

    def multiply(self, values: numpy.ndarray, scales: numpy.ndarray, column: int = 0) -> None:
        """Multiply each value by the scale of its block, in place.

        Args:
            values: float32 ``(rows, n)``, contiguous: the columns from `column` on.
            scales: float32, of the blocks from `first` to `stop`.
            column: Of the first value.
        """
        import numpy as np

        width, lead = values.shape[1], self.start * self.columns % self.size
        if width == self.columns:
            _multiply(values.reshape(1, -1), scales.reshape(1, -1), lead, self.size)
        elif self.columns % self.size == 0:
            blocks = slice(column // self.size, -(-(column + width) // self.size))
            _multiply(values, scales.reshape(self.rows, -1)[:, blocks], column % self.size, self.size)
        else:
            every = np.repeat(scales, self.size)[lead : lead + self.rows * self.columns]
            values *= every.reshape(self.rows, self.columns)[:, column : column + width]

    def largest(self, values: numpy.ndarray) -> numpy.ndarray:
        """The greatest absolute value of each block of rows that begin with a block, float32."""
        import numpy as np

        flat = abs(values.reshape(-1))
        whole = flat.size // self.size
        found = np.empty(-(-flat.size // self.size), np.float32)
        np.max(flat[: whole * self.size].reshape(whole, self.size), axis=1, out=found[:whole])
        if whole < found.size:
            found[whole] = flat[whole * self.size :].max()
        return found


def _multiply(values: numpy.ndarray, scales: numpy.ndarray, lead: int, size: int) -> None:
    """Each row's values, the first of them `lead` elements within its block, by the scales of the row."""
    rows, width = values.shape
    head = min(-lead % size, width)
    if head:
        values[:, :head] *= scales[:, :1]
    first = 1 if head else 0
    whole = (width - head) // size
    end = head + whole * size
    body = values[:, head:end].reshape(rows, whole, size)
    body *= scales[:, first : first + whole, None]
    if end < width:
        values[:, end:] *= scales[:, first + whole :]
