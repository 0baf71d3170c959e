# SPDX-License-Identifier: Apache-2.0
"""Numbers that share a scale in blocks of rows and columns: what most formats of quantised weights have in common.

A code stands for ``(number - zero) * scale``, computed in float32. Scale and zero belong to a block; a matrix of them,
a row for every row of blocks, is small beside the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy

__all__ = ["Integers", "Numbers", "ScaledGrid", "extremes"]

_TAME = 2.0**-90, 2.0**90
"""Products and quotients with scales between these are exact to a rounding: nothing underflows or overflows."""


class Numbers(Protocol):
    """What codes stand for before they are scaled, such as `SmallFloat`.

    Attributes:
        label: For people.
        bits: Of a code.
        largest: The greatest number; the lowest is its negative or, of integers, one below that.
        signs_zero: Whether zero has two codes.
    """

    @property
    def label(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def largest(self) -> float: ...
    @property
    def signs_zero(self) -> bool: ...

    def decode(self, codes: numpy.ndarray, out: numpy.ndarray | None = None) -> numpy.ndarray:
        """The numbers of codes, float32 of their shape, in `out` if given."""

    def nearest(self, values: numpy.ndarray) -> numpy.ndarray:
        """The codes of the nearest numbers to float32 `values`; what lies beyond the range gets the code at its end."""


@dataclass(frozen=True, slots=True)
class Integers:
    """Signed integers of `bits` bits, each stored with `offset` added.

    Attributes:
        bits: Of a code.
        offset: ``2 ** (bits - 1)`` where codes are unsigned, or 0.
    """

    bits: int
    offset: int = 0

    @property
    def label(self) -> str:
        """``INT4``."""
        return f"INT{self.bits}"

    @property
    def signs_zero(self) -> bool:
        """Zero is one code."""
        return False

    @property
    def largest(self) -> float:
        """The greatest."""
        return 2.0 ** (self.bits - 1) - 1

    def decode(self, codes: numpy.ndarray, out: numpy.ndarray | None = None) -> numpy.ndarray:
        """See `Numbers.decode`; `codes` are uint8 with an offset, int8 without."""
        import numpy as np

        out = np.empty(codes.shape, np.float32) if out is None else out
        np.copyto(out, codes)
        if self.offset:
            out -= np.float32(self.offset)
        return out

    def nearest(self, values: numpy.ndarray) -> numpy.ndarray:
        """See `Numbers.nearest`."""
        import numpy as np

        codes = np.rint(values)
        np.clip(codes, -self.largest - 1, self.largest, out=codes)
        codes += np.float32(self.offset)
        narrow: numpy.ndarray = codes.astype(np.uint8 if self.offset else np.int8)
        return narrow


@dataclass(frozen=True, slots=True, eq=False)
class ScaledGrid:
    """The grid of some rows, see `surgery_formats.storage.quantised.Grid`.

    Attributes:
        numbers: What codes stand for.
        scales: float32 ``(rows of blocks, blocks of a row)``, none negative; None if all are 1.
        zeros: float32 of the same shape, or None.
        rows: The row of blocks that each row lies in; None if each row has its own, or there is one.
        width: Columns of a block; the last may have fewer.
        order: The block of every column, where they are not neighbours; or None.
        stored: Scales and zeros as files have them, a row for every row of blocks; only whole ones are written.
    """

    numbers: Numbers
    scales: numpy.ndarray | None
    zeros: numpy.ndarray | None
    rows: numpy.ndarray | None
    width: int
    order: numpy.ndarray | None = None
    stored: tuple[numpy.ndarray, ...] = ()

    @property
    def keeps_codes(self) -> bool:
        """Whether the nearest code of a code's value is that code, so that it need not be looked up."""
        if self.scales is None or not self.scales.size:
            return True
        low, high = float(self.scales.min()), float(self.scales.max())
        return _TAME[0] < low and high < _TAME[1]

    def values(self, codes: numpy.ndarray, first: int = 0) -> numpy.ndarray:
        """See `Grid.values`."""
        return self.scaled(self.numbers.decode(codes), first)

    def nearest(self, values: numpy.ndarray, first: int = 0) -> numpy.ndarray:
        """See `Grid.nearest`. Where a scale is 0, every code stands for 0."""
        import numpy as np

        if self.scales is None:
            return self.numbers.nearest(values)
        steps = self.scales if self.scales.all() else np.where(self.scales == 0, np.float32(np.inf), self.scales)
        numbers = np.empty(values.shape, np.float32)
        self._broadcast(np.divide, values, steps, first, numbers)
        if self.zeros is not None:
            self._broadcast(np.add, numbers, self.zeros, first, numbers)
        return self.numbers.nearest(numbers)

    def scaled(self, numbers: numpy.ndarray, first: int = 0) -> numpy.ndarray:
        """Contiguous `numbers` of the columns from `first`, made values in place."""
        import numpy as np

        if self.zeros is not None:
            self._broadcast(np.subtract, numbers, self.zeros, first, numbers)
        if self.scales is not None:
            self._broadcast(np.multiply, numbers, self.scales, first, numbers)
        return numbers

    def _broadcast(
        self,
        operation: Callable[..., object],
        block: numpy.ndarray,
        matrix: numpy.ndarray,
        first: int,
        out: numpy.ndarray,
    ) -> None:
        """``out = operation(block, matrix)``, an element of `matrix` for every block."""
        import numpy as np

        if self.rows is not None:
            matrix = matrix[self.rows]
        with np.errstate(over="ignore", invalid="ignore"):  # callers look for Inf and NaN themselves
            if self.order is not None:
                operation(block, matrix[:, self.order[first : first + block.shape[1]]], out=out)
            elif matrix.shape[1] == 1:
                operation(block, matrix, out=out)
            else:
                self._by_blocks(operation, block, matrix, first, out)

    def _by_blocks(
        self,
        operation: Callable[..., object],
        block: numpy.ndarray,
        matrix: numpy.ndarray,
        first: int,
        out: numpy.ndarray,
    ) -> None:
        """`_broadcast` to blocks of neighbouring columns, the first and the last of which may be cut."""
        width, count = self.width, block.shape[1]
        head = min(-first % width, count)
        whole = (count - head) // width
        body = head + whole * width
        at = first // width  # the block of the first column
        if head:
            operation(block[:, :head], matrix[:, at : at + 1], out=out[:, :head])
            at += 1
        if whole:
            shape = len(block), whole, width  # views: an axis is only split
            part, target = block[:, head:body].reshape(shape), out[:, head:body].reshape(shape)
            operation(part, matrix[:, at : at + whole, None], out=target)
        if body < count:
            operation(block[:, body:], matrix[:, at + whole : at + whole + 1], out=out[:, body:])


def extremes(values: numpy.ndarray, starts: numpy.ndarray, width: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The lowest and the greatest value of every block, float32 ``(rows of blocks, blocks of a row)``.

    Args:
        values: float32 ``(rows, columns)``.
        starts: The first row of every row of blocks, rising from 0.
        width: Columns of a block; the last may have fewer.
    """
    import numpy as np

    columns = np.arange(0, values.shape[1], width)
    low = np.minimum.reduceat(np.minimum.reduceat(values, columns, axis=1), starts, axis=0)
    high = np.maximum.reduceat(np.maximum.reduceat(values, columns, axis=1), starts, axis=0)
    return low, high
