# SPDX-License-Identifier: Apache-2.0
"""The matrix on disk that views look into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import StoredTensor, Tensor, as_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["Plain"]


@dataclass(frozen=True, slots=True)
class Plain:
    """One tensor as a matrix of floats.

    Attributes:
        tensor: Its values.
        shape: ``(rows, cols)``; a 3-D expert tensor is ``(E * rows, cols)``, a convolution ``(out, in * k...)``, a vector ``(n, 1)``.
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
    def sources(self) -> tuple[StoredTensor, ...]:
        """Stored tensors this matrix is made of."""
        return self.tensor.sources

    def read_into(self, block: torch.Tensor, start: int) -> None:
        """Fill `block` ``(n, cols)``, contiguous and of the stored type, with the rows from `start`.

        Raises:
            MalformedError: the file ends before.
        """
        tensor = self.tensor
        if not isinstance(tensor, StoredTensor) or tensor.strides is not None or not tensor.shape:
            block.copy_(tensor.read().reshape(self.shape)[start : start + len(block)])
        elif block.numel():
            row = tensor.nbytes // self.shape[0]
            tensor.file.read_into(as_bytes(block), tensor.offset + start * row)

    def stored(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` in the stored type, in memory of the caller's own."""
        import torch

        block = torch.empty((max(min(stop, self.shape[0]) - start, 0), self.shape[1]), dtype=self.tensor.dtype.torch)
        self.read_into(block, start)
        return block

    def get(self, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``[start, stop)`` in `dtype`: float32, or float64 where stored so, unless another is asked for."""
        import torch

        exact = torch.float64 if self.tensor.dtype is DType.F64 else torch.float32
        return self.stored(start, stop).to(dtype or exact)

    def put(self, start: int, block: torch.Tensor, dtype: DType | None = None) -> tuple[int, memoryview]:
        """Rows from `start`, rounded once to the stored type (or `dtype`).

        Returns:
            ``(offset from the tensor's first byte, bytes)``.
        """
        kept = dtype or self.tensor.dtype
        return start * self.shape[1] * kept.bits // 8, as_bytes(block.to(kept.torch).contiguous())
