# SPDX-License-Identifier: Apache-2.0
"""The numbers that codes stand for where a group of inputs shares a scale and a zero point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from surgery_formats.arrays import Array, cast, empty
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["GroupedGrid", "finite_scales", "groups_of"]


@dataclass(frozen=True, slots=True)
class GroupedGrid:
    """``(code - zero) * scale + bias``, in float32.

    With integer zeros, and scales of 16 bits, the numbers are exact: nothing is rounded.

    Attributes:
        scales: float32 ``(groups, columns)`` where groups are of rows, ``(rows, groups)`` where they are of columns.
        zeros: float32 in the same shape, whole numbers; None if all are 0.
        biases: float32 in the same shape; None if all are 0.
        size: Rows, or columns, of a group.
        axis: 0 where groups are of rows, else 1.
        origin: Place of the first row within its group; 0 where groups are of columns.
        largest: The largest code.
        index: Group of each row, or column, where those of a group are not together.
        fitted: Whether it was chosen anew, so that what is stored has to be written.
    """

    scales: Array
    zeros: Array | None
    biases: Array | None
    size: int
    axis: int
    largest: int
    origin: int = 0
    index: Array | None = None
    fitted: bool = False

    def values(self, codes: Array, first: int = 0) -> Array:
        """See `Grid.values`; what overflows is infinite."""
        values = empty(codes.shape, DType.F32)
        self.values_into(values, codes, first)
        return values

    def values_into(self, values: Array, codes: Array, first: int = 0) -> None:
        """The same, into float32 of the shape of `codes`."""
        import numpy as np

        values[...] = codes
        with np.errstate(over="ignore", invalid="ignore"):
            for part in self._parts(values, first):
                if part.zero is not None:
                    part.values[...] -= part.zero
                part.values[...] *= part.scale
                if part.bias is not None:
                    part.values[...] += part.bias

    def nearest(self, values: Array, first: int = 0) -> Array:
        """See `Grid.nearest`; uint8. All codes of a scale of 0 are the same number: the zero point is taken."""
        import numpy as np

        steps = np.array(values, np.float32, order="C")
        with np.errstate(over="ignore"):  # beyond the ends of the grid anyway
            for part in self._parts(steps, first):
                if part.bias is not None:
                    part.values[...] -= part.bias
                part.values[...] /= np.where(part.scale == 0, np.float32(np.inf), part.scale)
                np.rint(part.values, out=part.values)
                if part.zero is not None:
                    part.values[...] += part.zero
        np.clip(steps, 0, self.largest, out=steps)
        return steps.astype(np.uint8)

    def _parts(self, block: Array, first: int) -> Iterator[_Part]:
        """Pieces of a block whose groups are complete, or that lie in one group: with no more than three steps."""
        rows, columns = block.shape
        across = slice(first, first + columns)
        if self.index is not None:
            own = (self.index, across) if self.axis == 0 else (slice(None), self.index[across])
            yield _Part(block, *(None if each is None else each[own] for each in self._each))
            return
        if self.axis == 0:
            for start, stop, group, count in _runs(self.origin, rows, self.size):
                of = slice(group, group + count)
                yield _Part(
                    block[start:stop].reshape(count, (stop - start) // count, columns),
                    *(None if each is None else each[of, None, across] for each in self._each),
                )
            return
        for start, stop, group, count in _runs(first, columns, self.size):
            of = slice(group, group + count)
            yield _Part(
                block[:, start:stop].reshape(rows, count, (stop - start) // count),
                *(None if each is None else each[:, of, None] for each in self._each),
            )

    @property
    def _each(self) -> tuple[Array, Array | None, Array | None]:
        return self.scales, self.zeros, self.biases


class _Part(NamedTuple):
    values: Array
    scale: Any
    zero: Array | None
    bias: Array | None


def _runs(origin: int, count: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """``(start, stop, first group, groups)`` of `count` places from the place `origin` on, in groups of `size`."""
    start, end = origin, origin + count
    while start < end:
        if start % size or end - start < size:
            stop = min((start // size + 1) * size, end)
        else:
            stop = end // size * size
        yield start - origin, stop - origin, start // size, -(-stop // size) - start // size
        start = stop


def groups_of(values: Array, size: int) -> Iterator[Array]:
    """`values` by whole groups of rows, ``(groups, size, columns)``, and then what is left of the last group."""
    count = len(values)
    whole = count // size * size
    for start, stop in ((0, whole), (whole, count)):
        if start < stop:
            yield values[start:stop].reshape(-1, min(size, stop - start), values.shape[1])


def finite_scales(tensor: StoredTensor, start: int, stop: int) -> Array:
    """Rows of scales or biases in float32.

    Raises:
        MalformedError: one is NaN or infinite.
    """
    import numpy as np

    scales = cast(tensor.read(start, stop), DType.F32)
    if not np.isfinite(scales).all():
        raise MalformedError("a scale is NaN or infinite", file=tensor.path, tensor=tensor.name)
    return scales
