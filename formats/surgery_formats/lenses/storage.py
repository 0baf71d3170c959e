# SPDX-License-Identifier: Apache-2.0
"""The matrix on disk that views look into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery_formats.dtypes import DType
from surgery_formats.tensors import StoredTensor

if TYPE_CHECKING:
    import torch

__all__ = ["Plain"]


@dataclass(frozen=True, slots=True)
class Plain:
    """One stored tensor as a matrix of floats.

    Attributes:
        tensor: Its bytes.
        shape: ``(rows, cols)``; a 3-D expert tensor is ``(E * rows, cols)``, a convolution ``(out, in * k...)``, a vector ``(n, 1)``.
    """

    tensor: StoredTensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, tensor: StoredTensor, *, stacked: bool = False) -> Plain:
        """`tensor` flattened after its first axis, or after its second if it is `stacked` (E, rows, cols)."""
        if stacked and len(tensor.shape) == 3:
            return cls(tensor, (tensor.shape[0] * tensor.shape[1], tensor.shape[2]))
        return cls(tensor, tensor.matrix)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """Stored tensors this matrix is made of."""
        return (self.tensor,)

    def stored(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` in the stored type, in memory of the caller's own."""
        import torch

        stop = min(stop, self.shape[0])
        if self.tensor.strides is not None or not self.tensor.shape:
            return self.tensor.read().reshape(self.shape)[start:stop]
        row = self.tensor.nbytes // self.shape[0] if self.shape[0] else 0
        nbytes = max(stop - start, 0) * row
        if nbytes == 0:
            return torch.empty((max(stop - start, 0), self.shape[1]), dtype=self.tensor.dtype.torch)
        raw = self.tensor.file.read(self.tensor.offset + start * row, nbytes)
        return torch.frombuffer(raw, dtype=self.tensor.dtype.torch).reshape(stop - start, self.shape[1])

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
        import torch

        kept = dtype or self.tensor.dtype
        rounded = block.to(kept.torch).contiguous()
        raw = memoryview(rounded.view(torch.uint8).numpy()) if rounded.numel() else memoryview(b"")
        return start * self.shape[1] * kept.bits // 8, raw.cast("B") if raw.nbytes else raw
