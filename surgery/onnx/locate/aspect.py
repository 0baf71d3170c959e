# SPDX-License-Identifier: Apache-2.0
"""A matrix of a graph as it is or transposed: weights lie in it one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.onnx.locate.matrix import MatrixSide
from surgery.onnx.locate.wanted import KEY, Wanted
from surgery_formats.arrays import cast
from surgery_formats.dtypes import DType

if TYPE_CHECKING:
    import numpy

__all__ = ["Aspect", "bits", "differing", "head_of", "key_of", "rounded_bits"]

_BLOCK = 1 << 21  # elements that are read in order to take a few of every row
_RAISED = 2  # bits of 1e-7 in float16
_BITS = {8: "u1", 16: "u2", 32: "u4", 64: "u8"}


@dataclass(frozen=True, slots=True)
class Aspect:
    """One of the two ways to see a matrix.

    Attributes:
        side: The matrix.
        turned: Whether its columns are the rows.
    """

    side: MatrixSide
    turned: bool

    @property
    def rows(self) -> int:
        """Rows, as seen."""
        return self.side.cols if self.turned else self.side.rows

    @property
    def width(self) -> int:
        """Columns, as seen."""
        return self.side.rows if self.turned else self.side.cols

    def points(self, rows: Sequence[int], cols: Sequence[int]) -> numpy.ndarray:
        """Elements, as seen."""
        return self.side.points(cols, rows).T if self.turned else self.side.points(rows, cols)

    def heads(self) -> numpy.ndarray:
        """The first `KEY` elements of every row, as seen."""
        import numpy

        if self.turned:
            return self.side.block(0, min(KEY, self.side.rows)).T
        height = max(1, _BLOCK // max(self.side.cols, 1))
        starts = range(0, self.side.rows, height)
        return numpy.concatenate(
            [self.side.block(at, min(at + height, self.side.rows))[:, :KEY].copy() for at in starts]
        )


def bits(values: numpy.ndarray, dtype: DType) -> numpy.ndarray:
    """The bits of contiguous values, which are compared: NaN equals itself, and zeros have signs."""
    return values.view(_BITS[dtype.bits])


def rounded_bits(values: numpy.ndarray, dtype: DType) -> numpy.ndarray:
    """The bits of values once they are stored as `dtype`."""
    import numpy

    return bits(cast(numpy.ascontiguousarray(values), dtype), dtype)


def differing(mine: numpy.ndarray, there: numpy.ndarray, dtype: DType) -> numpy.ndarray:
    """Where bits differ. onnxruntime's converter to float16 raises what is less than 1e-7 to that: this is no difference."""
    wrong: numpy.ndarray = mine != there
    if dtype is DType.F16 and wrong.any():
        sizes = (mine & 0x7FFF, there & 0x7FFF)
        wrong &= ~((sizes[0] < _RAISED) & (sizes[1] == _RAISED) & ((mine ^ there) < 0x8000))
    return wrong


def head_of(weight: Wanted, *, flipped: bool) -> numpy.ndarray:
    """The beginning of a weight's first row, or of its first column."""
    values: numpy.ndarray = weight.corner[:, 0] if flipped else weight.corner[0]
    return values


def key_of(values: numpy.ndarray, dtype: DType) -> bytes:
    """What the beginning of a row is looked up by, among tensors of `dtype`."""
    return rounded_bits(values, dtype).tobytes()
