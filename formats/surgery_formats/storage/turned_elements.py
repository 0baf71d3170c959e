# SPDX-License-Identifier: Apache-2.0
"""A matrix as one tensor of elements with its axes exchanged: how MatMul takes a weight."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.arrays import Array, assign
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.tensors.tensor import as_bytes

__all__ = ["ACROSS", "TurnedElements"]

ACROSS = ".transposed"
"""What the tensor is called behind the weight's name."""


@dataclass(frozen=True, slots=True)
class TurnedElements:
    """The encoding; a matrix is put whole.

    Attributes:
        sizes: ``(out, in)``, of the values that are put; the tensor has ``(in, out)``.
        dtype: Element type.
    """

    sizes: tuple[int, ...]
    dtype: DType

    @property
    def shape(self) -> tuple[int, int]:
        """As the values are put."""
        return self.sizes[0], self.sizes[1]

    @property
    def group(self) -> int:
        """All rows."""
        return max(self.sizes[0], 1)

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """One tensor, with a name of its own."""
        return (StoredPart(f"{name}{ACROSS}", self.dtype, self.sizes[::-1]),)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Encoding.put`."""
        import numpy as np

        assign(rounded, block)
        return (PartBytes(0, 0, as_bytes(np.ascontiguousarray(rounded.T))),)
