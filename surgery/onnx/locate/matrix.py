# SPDX-License-Identifier: Apache-2.0
"""Tensors of a graph as matrices that may hold a weight: flattened at each axis, or one matrix of a stack."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

if TYPE_CHECKING:
    import numpy

__all__ = ["FLOATS", "Matrix", "MatrixSide", "float_matrices"]

FLOATS = (DType.F32, DType.F16, DType.BF16, DType.F64)
_SMALL = 1 << 16  # elements; a tensor that is read whole for a few of them
_STACK = 1024  # matrices of a stack that are looked at one by one


class MatrixSide(Protocol):
    """A matrix of which some elements, or all, can be read."""

    @property
    def name(self) -> str:
        """Of the tensor."""

    @property
    def rows(self) -> int:
        """Rows."""

    @property
    def cols(self) -> int:
        """Columns."""

    @property
    def dtype(self) -> DType:
        """Of the values that are read."""

    def block(self, start: int, stop: int) -> numpy.ndarray:
        """Rows ``[start, stop)``."""

    def columns(self, start: int, stop: int) -> numpy.ndarray:
        """Columns ``[start, stop)``, of all rows."""

    def points(self, rows: Sequence[int], cols: Sequence[int]) -> numpy.ndarray:
        """The elements where some rows and some columns meet."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Some elements of a tensor, in their order, as a matrix.

    Attributes:
        name: Of the tensor.
        tensor: Where it lies; None if its values are written one by one.
        dtype: Its type.
        start: Elements in front.
        rows: Rows.
        cols: Columns.
        values: Of a tensor without a place: all of it, flat.
    """

    name: str
    tensor: StoredTensor | None
    dtype: DType
    start: int
    rows: int
    cols: int
    values: numpy.ndarray | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    def flat(self, first: int, stop: int) -> numpy.ndarray:
        """Elements ``[first, stop)`` of the matrix, flat."""
        import numpy

        if self.values is not None:
            return self.values[self.start + first : self.start + stop]
        assert self.tensor is not None
        elements = numpy.empty(stop - first, self.dtype.numpy)
        if elements.size:
            offset = self.tensor.offset + (self.start + first) * self.dtype.bits // 8
            self.tensor.file.read_into(as_bytes(elements), offset)
        return elements

    def block(self, start: int, stop: int) -> numpy.ndarray:
        """See `MatrixSide.block`."""
        return self.flat(start * self.cols, stop * self.cols).reshape(stop - start, self.cols)

    def columns(self, start: int, stop: int) -> numpy.ndarray:
        """See `MatrixSide.columns`."""
        import numpy

        if stop - start == self.cols or self.numel <= _SMALL:
            return self.block(0, self.rows)[:, start:stop]
        strip = numpy.empty((self.rows, stop - start), self.dtype.numpy)
        for row in range(self.rows):
            strip[row] = self.flat(row * self.cols + start, row * self.cols + stop)
        return strip

    def points(self, rows: Sequence[int], cols: Sequence[int]) -> numpy.ndarray:
        """See `MatrixSide.points`."""
        import numpy

        if self.numel <= _SMALL:
            return self.block(0, self.rows)[numpy.ix_(rows, cols)]
        found = numpy.empty((len(rows), len(cols)), self.dtype.numpy)
        for i, row in enumerate(rows):
            for j, col in enumerate(cols):
                found[i, j] = self.flat(row * self.cols + col, row * self.cols + col + 1)[0]
        return found


def float_matrices(graph: OnnxGraph, least: int = 2) -> Iterator[tuple[str, tuple[Matrix, ...]]]:
    """Every tensor of numbers with the matrices that it may be; vectors have one of a single column.

    Args:
        graph: The graph.
        least: Elements of a tensor that is looked at.
    """
    for name, tensor in graph.tensors.items():
        if tensor.dtype in FLOATS and not tensor.packed_as and tensor.numel >= least:
            yield name, _matrices(name, tensor, tensor.dtype, tensor.shape, None)
    for name in graph.small:
        shape = graph.small.shape(name)
        if least <= math.prod(shape) <= _SMALL * 64 and graph.small.label(name) in {dtype.label for dtype in FLOATS}:
            values = graph.small[name]
            yield name, _matrices(name, None, DType.of(values.dtype), shape, values.reshape(-1))


def _matrices(
    name: str, tensor: StoredTensor | None, dtype: DType, shape: tuple[int, ...], values: numpy.ndarray | None
) -> tuple[Matrix, ...]:
    numel = math.prod(shape)
    if numel == max(shape, default=1):
        return (Matrix(name, tensor, dtype, 0, numel, 1, values),)
    splits = {math.prod(shape[:axis]) for axis in range(1, len(shape))} - {1, numel}
    found = [Matrix(name, tensor, dtype, 0, rows, numel // rows, values) for rows in sorted(splits)]
    stack = math.prod(shape[:-2])
    if len(shape) > 2 and 1 < stack <= _STACK and min(shape[-2:]) > 1:
        rows, cols = shape[-2:]
        found += [Matrix(name, tensor, dtype, i * rows * cols, rows, cols, values) for i in range(stack)]
    return tuple(found)
