# SPDX-License-Identifier: Apache-2.0
"""HiRA: ``W' = W + W * (B A)``, the products by element (Huang et al. 2025, ICLR, openreview.net/forum?id=TwJrTz9cRS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery_formats.arrays import Array
from surgery_formats.products import product
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Weight

__all__ = ["HiRA"]


@dataclass(frozen=True, slots=True)
class HiRA:
    """A low-rank matrix that says how much of each weight is added to it.

    Attributes:
        A: ``(rank, in)``; for convolutions the kernel axes are flattened into ``in``.
        B: ``(out, rank)``.
    """

    kind: ClassVar[str] = "HiRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    together: ClassVar[bool] = True
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    A: Factor
    B: Factor

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
        """A's, then B's."""
        return (*self.A.tensors, *self.B.tensors)

    def factors(self) -> dict[str, Factor]:
        """``A`` and ``B``."""
        return {"A": self.A, "B": self.B}

    def low_rank(self) -> None:
        """None: it multiplies the weight."""

    def parts(self) -> tuple[tuple[int, HiRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load both factors once; each block costs one rank-r product and one by element."""
        A, B = self._loaded(weight)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            times = product(positions(B, 0, rows), positions(A, 1, cols))
            times *= block
            block += times
            return block

        return apply

    def lost(self, weight: Weight) -> None:
        """Nothing, unless a factor is 0."""

    def inverse(self, weight: Weight, share: float, lost: Array | None) -> Apply:
        """``W' / (1 + w B A)``."""
        A, B = self._loaded(weight)
        B = B * share

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            times = product(positions(B, 0, rows), positions(A, 1, cols))
            times += 1
            block /= times
            return block

        return apply

    def _loaded(self, weight: Weight) -> tuple[Array, Array]:
        return self.A.load(weight.dtype, weight.device), self.B.load(weight.dtype, weight.device)
