# SPDX-License-Identifier: Apache-2.0
"""Tensors: a name, a type, a shape, and values that are read on request.

A function that needs values takes a `Tensor`. A function that needs bytes on disk takes a `StoredTensor`, the only
tensor with a file and an offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from surgery_formats.arrays import Array, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.raw import File

__all__ = ["StoredTensor", "Tensor", "as_bytes", "matrix_of", "origin"]


class Tensor(Protocol):
    """Values under a name.

    Attributes:
        name: Key in its file, or the name it will have in one; untrusted text.
        dtype: Element type.
        shape: Sizes; ``()`` for a scalar.
        sources: The stored tensors its values come from; empty if they come from none.
        path: The file to name in messages, or None.
        stored_type: Name of the type on disk, for people.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def sources(self) -> tuple[StoredTensor, ...]: ...
    @property
    def path(self) -> Path | None: ...
    @property
    def stored_type(self) -> str: ...

    @property
    def numel(self) -> int:
        """Number of elements."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values as they are stored; of values that are stored nowhere, the bytes they would take."""

    @property
    def matrix(self) -> tuple[int, int]:
        """``(rows, cols)``, see `matrix_of`."""

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        """Elements ``[start:stop]`` of the first axis, in memory of the caller's own.

        Returns:
            A numpy array of shape ``(stop - start, *shape[1:])``; a scalar keeps its shape ``()``. Its type is `dtype`, or a
            wider one where values are computed, so that storing rounds them only once.

        Raises:
            MalformedError: the file is shorter than its header says.
            FitError: neither numpy nor ml_dtypes has such an element type.
        """


_TOO_LARGE = 1 << 60  # elements: numpy counts bytes of up to 8 an element in 63 bits, and a size of 0 as 1


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(rows, cols)`` when flattened after the first axis; vectors are one column, scalars one element."""
    if len(shape) == 2:
        return shape
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def origin(tensor: Tensor) -> tuple[object, ...]:
    """The identity of a tensor across files: its name, and the files its values come from."""
    return (tensor.name, *dict.fromkeys(source.file.identity for source in tensor.sources))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor whose bytes lie in a file.

    Attributes:
        name: Key in its file; untrusted text.
        dtype: Element type.
        shape: Sizes; ``()`` for a scalar.
        file: The open file.
        offset: Absolute position of the first byte.
        nbytes: Length of the byte range. For a contiguous tensor exactly ``numel * bits / 8``.
        strides: In elements, for tensors a pickle stored transposed or expanded; None means C order, contiguous.
        packed_as: The container's own name of the type (``Q4_K``), for containers whose types are not all element types;
            then a tensor of blocks is one of bytes, with those of a row on its last axis.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: File
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    packed_as: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """``(rows, cols)``, see `matrix_of`."""
        return matrix_of(self.shape)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """Itself."""
        return (self,)

    @property
    def path(self) -> Path:
        """The file's."""
        return self.file.path

    @property
    def stored_type(self) -> str:
        """Name of its type."""
        return self.packed_as or self.dtype.label

    @property
    def place(self) -> tuple[int, int, int, int]:
        """``(device, inode, offset, nbytes)``: equal for two names of the same bytes (ties)."""
        return (*self.file.identity[:2], self.offset, self.nbytes)

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        """Elements ``[start:stop]`` of the first axis, in the stored dtype, in memory of the caller's own.

        Returns:
            Shape ``(stop - start, *shape[1:])``; a scalar keeps its shape ``()``.

        Raises:
            MalformedError: the file is shorter than its header says, or sizes beside a 0 are too large for any array.
            FitError: neither numpy nor ml_dtypes has such an element type.
        """
        import numpy

        try:
            dtype = self.dtype.numpy
        except TypeError as error:
            raise FitError(
                f"values of type {self.dtype.label} cannot be read", file=self.file.path, tensor=self.name
            ) from error
        if not self.nbytes and math.prod(max(size, 1) for size in self.shape) >= _TOO_LARGE:
            raise MalformedError(f"its sizes {list(self.shape)} overflow", file=self.file.path, tensor=self.name)
        if self.strides is not None:
            steps = [stride * dtype.itemsize for stride in self.strides]
            whole = numpy.ndarray(self.shape, dtype, self.file.read(self.offset, self.nbytes), strides=steps)
            return whole[start:stop].copy()
        if not self.shape:
            return numpy.ndarray((), dtype, self.file.read(self.offset, self.nbytes))
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        rows = max(stop - start, 0)
        raw = self.file.read(self.offset + start * row, rows * row)
        return numpy.ndarray((rows, *self.shape[1:]), dtype, raw)


def as_bytes(values: Array) -> memoryview:
    """The bytes of a contiguous array on the CPU, without a copy; writing to them writes to the array."""
    import numpy

    flat = to_cpu(values).reshape(-1)
    # numpy arrays have the buffer protocol, which their stubs do not declare.
    return memoryview(flat.view(numpy.uint8)) if flat.size else memoryview(b"")  # type: ignore[arg-type]
