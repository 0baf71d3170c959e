# SPDX-License-Identifier: Apache-2.0
"""PVeRA: ``W' = W + diag(b) B diag(mean d) A``, a VeRA whose d are drawn (Leitner et al. 2025, arXiv:2512.07703)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.lora import LoRA
from surgery_formats.updates.vera import Seed, VeRA

__all__ = ["PVeRA"]


@dataclass(frozen=True, slots=True)
class PVeRA:
    """A VeRA for the means, and factors of the variances, which have a part in training alone.

    Attributes:
        b: ``pvera_lambda_b``, ``(out,)``.
        d: ``pvera_lambda_d``, ``(2 rank,)``: of the means, then of the variances.
        projections: ``pvera_A`` ``(2 rank, widest in)`` and ``pvera_B`` ``(widest out, rank)``, or how to draw them.
        scale: Factor on the addition.
        inputs: Columns of the weight; 0 until `fitted`.
    """

    kind: ClassVar[str] = "PVeRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    alpha: ClassVar[None] = None

    b: Factor
    d: Factor
    projections: tuple[Factor, Factor] | Seed
    scale: float = 1.0
    inputs: int = 0

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.d.shape[0] // 2

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.b.shape[0], self.inputs

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """The random projections, where they are stored."""
        if isinstance(self.projections, Seed):
            return ()
        return tuple(tensor for factor in self.projections for tensor in factor.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The vectors', then the projections'."""
        return (*self.b.tensors, *self.d.tensors, *self.untrained)

    @property
    def mean(self) -> VeRA:
        """The VeRA of the means."""
        rank = self.rank
        d = Factor(self.d.tensors, (rank,), lambda *stored: self.d.show(stored)[:rank])
        if isinstance(self.projections, Seed):
            return VeRA(self.b, d, self.projections, self.scale, self.inputs)
        whole, B = self.projections
        A = Factor(whole.tensors, (rank, whole.shape[1]), lambda *stored: whole.show(stored)[:rank])
        return VeRA(self.b, d, (A, B), self.scale, self.inputs)

    def scaled(self, weight: float) -> PVeRA:
        """The same directions, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def fitted(self, fit: Fit) -> PVeRA:
        """The width of the weight; where projections are drawn, their sizes."""
        fitted = self.mean.fitted(fit)
        drawn = fitted.projections if isinstance(fitted.projections, Seed) else self.projections
        return replace(self, projections=drawn, inputs=fitted.inputs)

    def factors(self) -> dict[str, Factor]:
        """``b`` and ``d``; the projections ``A`` and ``B`` where the file has them."""
        stored = () if isinstance(self.projections, Seed) else self.projections
        return {"b": self.b, "d": self.d, **dict(zip("AB", stored, strict=False))}

    def low_rank(self) -> LoRA | None:
        """The means' projections with both vectors multiplied in; None until the sizes are known."""
        return self.mean.low_rank()

    def parts(self) -> tuple[tuple[int, PVeRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """As the VeRA of the means."""
        return self.mean.prepare(weight)
