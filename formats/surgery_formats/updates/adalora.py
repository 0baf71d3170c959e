# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: ``W' = W + s B diag(e) A``, a rank that training pruned (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA

__all__ = ["AdaLoRA"]


@dataclass(frozen=True, slots=True)
class AdaLoRA:
    """A low-rank addition in the form of a singular value decomposition.

    Attributes:
        A: ``(rank, in)``, the right singular vectors; of a convolution flattened.
        B: ``(out, rank)``, the left ones.
        values: ``e``, ``(rank, 1)``.
        scale: ``alpha / (initial rank + 1e-5)``: pruning does not change it.
        alpha: As written in the file.
    """

    kind: ClassVar[str] = "AdaLoRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    untrained: ClassVar[tuple[()]] = ()

    A: Factor
    B: Factor
    values: Factor
    scale: float
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """What pruning left of the initial rank."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all three factors."""
        return (*self.A.tensors, *self.B.tensors, *self.values.tensors)

    def scaled(self, weight: float) -> AdaLoRA:
        """The same directions, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def factors(self) -> dict[str, Factor]:
        """``A``, ``B`` and ``values``."""
        return {"A": self.A, "B": self.B, "values": self.values}

    def low_rank(self) -> LoRA:
        """The values multiplied into A."""
        A = Factor.computed((self.A, self.values), self.A.shape, lambda a, e: a * e)
        return LoRA(A, self.B, self.scale, self.alpha)

    def parts(self) -> tuple[tuple[int, AdaLoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """As its LoRA."""
        return self.low_rank().prepare(weight)
