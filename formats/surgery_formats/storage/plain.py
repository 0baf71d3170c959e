# SPDX-License-Identifier: Apache-2.0
"""The storage of most weights: one tensor, whose elements are the weight's."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.arrays import Array, assign
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.tensors.tensor import StoredTensor, Tensor, as_bytes

__all__ = ["Elements", "Plain"]


@dataclass(frozen=True, slots=True)
class Elements:
    """The encoding of a weight as one tensor of elements.

    Attributes:
        sizes: Shape of the weight, and of the tensor.
        shape: ``(rows, cols)``: ``(E * rows, cols)`` for a 3-D expert tensor, ``(out, in * k...)`` for a convolution,
            ``(n, 1)`` for a vector.
        dtype: Element type.
    """

    sizes: tuple[int, ...]
    shape: tuple[int, int]
    dtype: DType

    @property
    def group(self) -> int:
        """Every row is on its own."""
        return 1

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """One tensor of the weight's name."""
        return (StoredPart(name, self.dtype, self.sizes),)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """The rows rounded to `dtype`: `rounded` is their bytes."""
        assign(rounded, block)
        return (PartBytes(0, start * self.shape[1] * self.dtype.bits // 8, as_bytes(rounded)),)


@dataclass(frozen=True, slots=True)
class Plain:
    """One tensor as a matrix.

    Attributes:
        tensor: Its values.
        shape: See `Elements.shape`.
    """

    tensor: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, tensor: Tensor, *, stacked: bool = False) -> Plain:
        """`tensor` flattened after its first axis, or after its second if it is `stacked` (E, rows, cols)."""
        if stacked and len(tensor.shape) == 3:
            return cls(tensor, (tensor.shape[0] * tensor.shape[1], tensor.shape[2]))
        return cls(tensor, tensor.matrix)

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.tensor.name

    @property
    def sizes(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.tensor.shape

    @property
    def dtype(self) -> DType:
        """The tensor's."""
        return self.tensor.dtype

    @property
    def kind(self) -> str:
        """Name of the element type."""
        return self.tensor.dtype.label

    @property
    def group(self) -> int:
        """Every row is on its own."""
        return 1

    @property
    def elements(self) -> Tensor:
        """The tensor."""
        return self.tensor

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.tensor.dtype.is_float

    @property
    def transposed(self) -> bool:
        """A tensor lies as it is."""
        return False

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The tensor, if it is stored."""
        return self.tensor.sources

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """One tensor of the weight's name."""
        return (StoredPart(name, self.dtype, self.sizes),)

    def read_into(self, block: Array, start: int) -> None:
        """Fill `block` ``(n, cols)``, contiguous and of `dtype`, with the rows from `start`.

        Raises:
            MalformedError: the file ends before.
        """
        tensor = self.tensor
        if not isinstance(tensor, StoredTensor) or tensor.strides is not None or not tensor.shape:
            assign(block, tensor.read().reshape(self.shape)[start : start + len(block)])
        elif block.size:
            row = tensor.nbytes // self.shape[0]
            tensor.file.read_into(as_bytes(block), tensor.offset + start * row)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Elements.put`."""
        return Elements(self.sizes, self.shape, self.dtype).put(start, block, rounded)
