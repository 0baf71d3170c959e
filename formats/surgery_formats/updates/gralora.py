# SPDX-License-Identifier: Apache-2.0
"""GraLoRA: ``W'ij = Wij + s Bij Aji``, a LoRA for each of k x k blocks, of shared factors (Jung et al. 2025, arXiv:2505.20355)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, namespace
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA

__all__ = ["GraLoRA"]


@dataclass(frozen=True, slots=True)
class GraLoRA:
    """``W'[m, n] = W[m, n] + s B[m, n]^T A[n, m]^T``: block (m, n) has the m-th k-th of A_n's columns, the n-th of B_m's rows.

    Attributes:
        A: ``(k, in / k, rank)``.
        B: ``(k, rank, out / k)``.
        scale: ``alpha / (rank + rank of the general LoRA)``.
        general: A and B of a LoRA of the whole weight, with the same scale (hybrid GraLoRA); or nothing.
        alpha: As written in the file.
    """

    kind: ClassVar[str] = "GraLoRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    untrained: ClassVar[tuple[()]] = ()

    A: Factor
    B: Factor
    scale: float
    general: tuple[Factor, Factor] | tuple[()] = ()
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Inner size of all blocks together, and of the general LoRA."""
        k, _, rank = self.A.shape
        return k * rank + (self.general[0].shape[0] if self.general else 0)

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.B.shape[0] * self.B.shape[2], self.A.shape[0] * self.A.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all factors."""
        return tuple(tensor for factor in self.factors().values() for tensor in factor.tensors)

    def scaled(self, weight: float) -> GraLoRA:
        """The same addition, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def factors(self) -> dict[str, Factor]:
        """``A`` and ``B``, and those of the general LoRA."""
        return {"A": self.A, "B": self.B, **dict(zip(("general A", "general B"), self.general, strict=False))}

    def low_rank(self) -> LoRA | None:
        """The factors of all blocks beside each other, A's as a block diagonal; None where that is no lower rank."""
        return self._whole() if self.rank <= min(self.shape) else None

    def _whole(self) -> LoRA:
        k, width, rank = self.A.shape
        (out, inputs), height, share = self.shape, self.B.shape[2], rank // k

        def columns(a: Array, *general: Array) -> Array:
            whole = namespace(a).zeros((self.rank, inputs), dtype=a.dtype, device=a.device)
            for n in range(k):
                whole[n * rank : (n + 1) * rank, n * width : (n + 1) * width] = a[n].T
            if general:
                whole[k * rank :] = general[0]
            return whole

        def rows(b: Array, *general: Array) -> Array:
            whole = namespace(b).zeros((out, self.rank), dtype=b.dtype, device=b.device)
            for n in range(k):
                for m in range(k):
                    at = n * rank + m * share
                    part = b[m][n * share : (n + 1) * share]
                    whole[m * height : (m + 1) * height, at : at + share] = part.T
            if general:
                whole[:, k * rank :] = general[0]
            return whole

        A = Factor.computed((self.A, *self.general[:1]), (self.rank, inputs), columns)
        B = Factor.computed((self.B, *self.general[1:]), (out, self.rank), rows)
        return LoRA(A, B, self.scale)

    def parts(self) -> tuple[tuple[int, GraLoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """As its LoRA, whatever the rank."""
        return self._whole().prepare(weight)
