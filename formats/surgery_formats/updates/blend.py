# SPDX-License-Identifier: Apache-2.0
"""A share of an update that is not linear in its factors: ``W' = W + w (U(W) - W)``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery_formats.lenses.view import Index
from surgery_formats.tensors import StoredTensor
from surgery_formats.updates.base import Apply, Update, Weight

if TYPE_CHECKING:
    import torch

__all__ = ["Blend"]


@dataclass(frozen=True, slots=True)
class Blend:
    """`weight` of the way from the base to what `whole` makes of it."""

    whole: Update
    weight: float

    @property
    def kind(self) -> str:
        """The kind of the whole update."""
        return self.whole.kind

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.whole.shape

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Those of the whole update."""
        return self.whole.tensors

    @property
    def needs_weight(self) -> bool:
        """As the whole update."""
        return self.whole.needs_weight

    def scaled(self, weight: float) -> Blend:
        """A share of this share."""
        return replace(self, weight=self.weight * weight)

    def parts(self) -> tuple[tuple[int, Update], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """The whole update's equation, then a step back towards the block it began with."""
        full = self.whole.prepare(weight)

        def apply(block: torch.Tensor, rows: Index, cols: Index) -> torch.Tensor:
            before = block.clone()
            return before.lerp_(full(block, rows, cols), self.weight)

        return apply
