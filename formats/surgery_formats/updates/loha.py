# SPDX-License-Identifier: Apache-2.0
"""LoHa: ``W' = W + s (A1 B1) * (A2 B2)``, the product of the pairs by element (Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array
from surgery_formats.products import product
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA

__all__ = ["LoHa"]


@dataclass(frozen=True, slots=True)
class LoHa:
    """Two low-rank matrices, multiplied by element: rank up to ``r * r`` from ``2 r`` rows and columns.

    Attributes:
        A1: ``(out, rank)``.
        B1: ``(rank, in)``; of a convolution flattened, a core in CP form multiplied in by the reader.
        A2: As A1.
        B2: As B1.
        scale: ``alpha / rank``.
        alpha: As written in the file.
        noted: Stored tensors that `scale` was read from.
    """

    kind: ClassVar[str] = "LoHa"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"

    A1: Factor
    B1: Factor
    A2: Factor
    B2: Factor
    scale: float
    alpha: float | None = None
    noted: tuple[Tensor, ...] = ()

    @property
    def rank(self) -> int:
        """Inner size of each of the two products."""
        return self.A1.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.A1.shape[0], self.B1.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all four factors."""
        tensors = (*self.A1.tensors, *self.B1.tensors, *self.A2.tensors, *self.B2.tensors, *self.noted)
        return tuple(dict.fromkeys(tensors))

    def scaled(self, weight: float) -> LoHa:
        """The same addition, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """What the scale was read from."""
        return self.noted

    def factors(self) -> dict[str, Factor]:
        """``A1``, ``B1``, ``A2``, ``B2``."""
        return {"A1": self.A1, "B1": self.B1, "A2": self.A2, "B2": self.B2}

    def low_rank(self) -> None:
        """None: its rank is the square of the pairs', rarely low; see `expanded`."""

    def expanded(self) -> LoRA | None:
        """Row by row every column of A1 times every one of A2, and so the rows of B1 and B2: the Khatri-Rao products."""
        rank = self.A1.shape[1] * self.A2.shape[1]
        if rank > min(self.shape):
            return None
        out, inputs = self.shape
        B = Factor.computed((self.A1, self.A2), (out, rank), lambda a, c: a[:, :, None] * c[:, None, :])
        A = Factor.computed((self.B1, self.B2), (rank, inputs), lambda b, d: b[:, None, :] * d[None, :, :])
        return LoRA(A, B, self.scale)

    def parts(self) -> tuple[tuple[int, LoHa], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the factors once; each block costs two rank-r products and one by element."""
        A1 = self.A1.load(weight.dtype, weight.device) * self.scale
        B1, A2, B2 = (factor.load(weight.dtype, weight.device) for factor in (self.B1, self.A2, self.B2))

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            delta = product(positions(A1, 0, rows), positions(B1, 1, cols))
            delta *= product(positions(A2, 0, rows), positions(B2, 1, cols), slot=1)
            block += delta
            return block

        return apply
