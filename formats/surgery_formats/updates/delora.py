# SPDX-License-Identifier: Apache-2.0
"""DeLoRA: ``W' = W + B diag(l / (r |b_i| |a_i|)) A diag(n)``, n the lengths of W's columns (Bini et al. 2025, arXiv:2503.18225)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, namespace
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA

__all__ = ["DeLoRA"]

_SHORTEST = 1e-4  # what PEFT divides by at least (tuners/delora/layer.py)


@dataclass(frozen=True, slots=True)
class DeLoRA:
    """A low-rank addition of directions of length 1, whose strength is a number of its own.

    Attributes:
        A: ``(rank, in)``.
        B: ``(out, rank)``.
        strength: ``l``, ``(1,)``.
        lengths: ``n``, ``(in,)``, of the base's columns when training began; stored, and not trained.
        scale: Factor on the addition.
    """

    kind: ClassVar[str] = "DeLoRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    alpha: ClassVar[None] = None

    A: Factor
    B: Factor
    strength: Factor
    lengths: Factor
    scale: float = 1.0

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
        """Those of all four factors."""
        return (*self.A.tensors, *self.B.tensors, *self.strength.tensors, *self.lengths.tensors)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """The lengths."""
        return self.lengths.tensors

    def scaled(self, weight: float) -> DeLoRA:
        """The same directions, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def factors(self) -> dict[str, Factor]:
        """``A``, ``B``, ``strength`` and ``lengths``."""
        return {"A": self.A, "B": self.B, "strength": self.strength, "lengths": self.lengths}

    def low_rank(self) -> LoRA:
        """Directions of length 1, the base's lengths multiplied into A and the strength into B."""

        def even(factor: Array, axis: int) -> Array:
            xp = namespace(factor)
            return factor / xp.clip(xp.linalg.vector_norm(factor, axis=axis, keepdims=True), _SHORTEST, None)

        A = Factor.computed((self.A, self.lengths), self.A.shape, lambda a, n: even(a, 1) * n)
        B = Factor.computed((self.B, self.strength), self.B.shape, lambda b, strength: even(b, 0) * strength)
        return LoRA(A, B, self.scale / self.rank)

    def parts(self) -> tuple[tuple[int, DeLoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """As its LoRA."""
        return self.low_rank().prepare(weight)
