# SPDX-License-Identifier: Apache-2.0
"""TinyLoRA: ``W' = W + B (sum_i v_i P_i) A``, P random, A and B from the base's decomposition, v shared (arXiv:2602.04118)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA

__all__ = ["TinyLoRA"]


@dataclass(frozen=True, slots=True)
class TinyLoRA:
    """A few trained numbers between factors that are stored with them.

    Attributes:
        v: ``(u,)``, trained; modules may share it.
        P: ``tinylora_P``, ``(u, rank, rank)``.
        A: ``tinylora_A``, ``(rank, in)``.
        B: ``tinylora_B``, ``(out, rank)``.
        scale: Factor on the addition.
    """

    kind: ClassVar[str] = "TinyLoRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    alpha: ClassVar[None] = None

    v: Factor
    P: Factor
    A: Factor
    B: Factor
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
        """Those of v, then those that were not trained."""
        return (*self.v.tensors, *self.untrained)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """Those of P, A and B."""
        return (*self.P.tensors, *self.A.tensors, *self.B.tensors)

    def scaled(self, weight: float) -> TinyLoRA:
        """The same directions, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def factors(self) -> dict[str, Factor]:
        """``v``, ``P``, ``A`` and ``B``."""
        return {"v": self.v, "P": self.P, "A": self.A, "B": self.B}

    def low_rank(self) -> LoRA:
        """A, and B with what is between them multiplied in."""

        def inner(b: Array, p: Array, v: Array) -> Array:
            return b @ (v @ p.reshape(len(v), -1)).reshape(p.shape[1:])

        return LoRA(self.A, Factor.computed((self.B, self.P, self.v), self.B.shape, inner), self.scale)

    def parts(self) -> tuple[tuple[int, TinyLoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """As the LoRA that it is."""
        return self.low_rank().prepare(weight)
