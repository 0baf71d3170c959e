# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA: ``W' = W + B A``, mixed from one bank of vectors that all weights share (Li et al. 2024, arXiv:2405.15179)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, array_of, namespace
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA

__all__ = ["VBLoRA"]


@dataclass(frozen=True, slots=True)
class VBLoRA:
    """Each piece of both factors is the mean of a few vectors of a bank, weighted by the softmax of their logits.

    Attributes:
        A: Logits, ``(rank, in / length, vectors)``; or the weights of the chosen vectors but the last, which is what is
            left to 1, ``(rank, in / length, chosen - 1)``.
        B: As A, ``(out / length, rank, ...)``.
        bank: ``(vectors, length)``.
        chosen: How many of the greatest logits count.
        picks: Which vectors those weights belong to, of A and of B, with one more on the last axis; nothing where the
            file has all logits.
        scale: Factor on the addition.
    """

    kind: ClassVar[str] = "VB-LoRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    alpha: ClassVar[None] = None

    A: Factor
    B: Factor
    bank: Factor
    chosen: int
    picks: tuple[Tensor, Tensor] | tuple[()] = ()
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        length = self.bank.shape[1]
        return self.B.shape[0] * length, self.A.shape[1] * length

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The logits' or weights', the bank's, the indices."""
        return (*self.A.tensors, *self.B.tensors, *self.bank.tensors, *self.picks)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """The indices."""
        return self.picks

    def scaled(self, weight: float) -> VBLoRA:
        """The same directions, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def factors(self) -> dict[str, Factor]:
        """``A``, ``B`` and ``bank``."""
        return {"A": self.A, "B": self.B, "bank": self.bank}

    def low_rank(self) -> LoRA:
        """The mixed factors."""
        (out, inputs), rank = self.shape, self.rank
        index_a, index_b = self.picks or (None, None)

        def columns(logits: Array, bank: Array) -> Array:
            return self._mixed(logits, bank, index_a).reshape(rank, inputs)

        def rows(logits: Array, bank: Array) -> Array:
            return self._mixed(logits, bank, index_b).mT.reshape(out, rank)

        A = Factor.computed((self.A, self.bank), (rank, inputs), columns)
        return LoRA(A, Factor.computed((self.B, self.bank), (out, rank), rows), self.scale)

    def _mixed(self, logits: Array, bank: Array, index: Tensor | None) -> Array:
        """The vectors of every piece, ``(..., length)``."""
        xp = namespace(logits)
        if index is None:
            lines = logits.reshape(-1, logits.shape[-1])
            chosen = xp.argsort(-lines, axis=1)[:, : self.chosen]
            greatest = lines[array_of(list(range(len(lines))), DType.I64, lines)[:, None], chosen]
            weights = xp.exp(greatest - greatest[:, :1])
            weights = weights / xp.sum(weights, axis=1, keepdims=True)
            chosen, weights = (part.reshape(*logits.shape[:-1], -1) for part in (chosen, weights))
        else:
            chosen = array_of(index.read(), DType.I64, logits)
            weights = xp.concat([logits, 1 - xp.sum(logits, axis=-1, keepdims=True)], axis=-1)
        return sum(weights[..., k, None] * bank[chosen[..., k]] for k in range(self.chosen))

    def parts(self) -> tuple[tuple[int, VBLoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """As its LoRA."""
        return self.low_rank().prepare(weight)
