# SPDX-License-Identifier: Apache-2.0
"""LoRA: ``W' = W + s B A`` (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, is_torch
from surgery_formats.dtypes import DType
from surgery_formats.products import add_product, same_in_pieces
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Weight

__all__ = ["LoRA"]


@dataclass(frozen=True, slots=True)
class LoRA:
    """A low-rank addition.

    Attributes:
        A: ``(rank, in)``; for convolutions the kernel axes are flattened into ``in``.
        B: ``(out, rank)``.
        scale: ``alpha / rank``, ``alpha / sqrt(rank)`` for rsLoRA (arXiv:2312.03732), or as the file's format has it.
        alpha: As written in the file, for writers that need it; None where the format has none.
        noted: Stored tensors that `scale` was read from (kohya's ``alpha``).
    """

    kind: ClassVar[str] = "LoRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"

    A: Factor
    B: Factor
    scale: float
    alpha: float | None = None
    noted: tuple[Tensor, ...] = ()

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """A's, B's, then those the scale came from."""
        return (*self.A.tensors, *self.B.tensors, *self.noted)

    def scaled(self, weight: float) -> LoRA:
        """The same directions, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def transpose(self) -> LoRA:
        """The LoRA of the transposed weight, ``s A^T B^T``: the same tensors, each in the other's place."""
        A, B = self.A, self.B
        down = Factor(B.tensors, (self.rank, B.shape[0]), lambda *stored: B.show(stored).T)
        up = Factor(A.tensors, (A.shape[1], self.rank), lambda *stored: A.show(stored).T)
        return replace(self, A=down, B=up)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """What the scale was read from."""
        return self.noted

    def factors(self) -> dict[str, Factor]:
        """``A`` and ``B``."""
        return {"A": self.A, "B": self.B}

    def low_rank(self) -> LoRA:
        """Itself."""
        return self

    def parts(self) -> tuple[tuple[int, LoRA], ...]:
        """Itself."""
        return ((0, self),)

    def delta(self, dtype: DType) -> Array:
        """``s B A``, shape `shape`, in `dtype`."""
        return (self.B.load(dtype) * self.scale) @ self.A.load(dtype)

    def prepare(self, weight: Weight) -> Apply:
        """Load A and ``s B`` once; each block costs one rank-r product."""
        A = self.A.load(weight.dtype, weight.device)
        B = self.B.load(weight.dtype, weight.device) * self.scale
        in_pieces = not is_torch(A) and same_in_pieces(B, A)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            return add_product(block, positions(B, 0, rows), positions(A, 1, cols), in_pieces=in_pieces)

        return apply
