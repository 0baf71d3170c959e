# SPDX-License-Identifier: Apache-2.0
"""GLoRA of LyCORIS: ``W' = W + s (W A1 A2 + B1 B2)`` (Chavan et al. 2023, arXiv:2306.07967, with A as a product).

PEFT's GLoRA multiplies by element instead (`surgery_formats.updates.glora`): the two have a paper and a name in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery_formats.arrays import Array, namespace
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.groups import in_groups

__all__ = ["ProductGLoRA"]


@dataclass(frozen=True, slots=True)
class ProductGLoRA:
    """A weight multiplied by a low-rank matrix on the side of its inputs, and added to.

    Attributes:
        A1: ``(channels, rank)``: of a convolution one row for all of a channel's columns.
        A2: ``(rank, channels)``.
        B1: ``(out, rank)``.
        B2: ``(rank, in)``; of a convolution flattened.
        scale: ``alpha / rank``, on both.
        alpha: As written in the file.
        noted: Stored tensors that `scale` was read from.
    """

    kind: ClassVar[str] = "GLoRA of LyCORIS"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"

    A1: Factor
    A2: Factor
    B1: Factor
    B2: Factor
    scale: float
    alpha: float | None = None
    noted: tuple[Tensor, ...] = ()

    @property
    def rank(self) -> int:
        """Inner size of the products."""
        return self.B1.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.B1.shape[0], self.B2.shape[1]

    @property
    def group(self) -> int:
        """All columns: each becomes a mixture of all."""
        return self.B2.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the four factors, then those the scale came from."""
        stored = (*self.A1.tensors, *self.A2.tensors, *self.B1.tensors, *self.B2.tensors, *self.noted)
        return tuple(dict.fromkeys(stored))

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """What the scale was read from."""
        return self.noted

    def factors(self) -> dict[str, Factor]:
        """``A1``, ``A2``, ``B1``, ``B2``."""
        return {"A1": self.A1, "A2": self.A2, "B1": self.B1, "B2": self.B2}

    def low_rank(self) -> None:
        """None: what it adds depends on the weight."""

    def parts(self) -> tuple[tuple[int, ProductGLoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the factors once; each block costs three rank-r products."""
        A1, A2, B1, B2 = (f.load(weight.dtype, weight.device) for f in (self.A1, self.A2, self.B1, self.B2))
        channels = A1.shape[0]
        kernel = self.shape[1] // channels

        def mix(block: Array, rows: Index, cols: Index) -> Array:
            xp = namespace(block)
            mixed = xp.permute_dims(block.reshape(len(block), channels, kernel), (0, 2, 1)) @ A1 @ A2
            mixed = xp.permute_dims(mixed, (0, 2, 1)).reshape(block.shape)
            return block + self.scale * (mixed + positions(B1, 0, rows) @ B2)

        return in_groups(self.group, mix)
