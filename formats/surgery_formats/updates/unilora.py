# SPDX-License-Identifier: Apache-2.0
"""Uni-LoRA: ``W' = W + B A``, every element of which is one of a shared vector's, ``theta[i] s`` (Li et al. 2025, arXiv:2506.00799)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, array_of, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA

__all__ = ["UniLoRA"]


@dataclass(frozen=True, slots=True)
class UniLoRA:
    """A LoRA whose factors are drawn from one trained vector.

    Attributes:
        theta: ``unilora_theta_d``, ``(d,)``, of the whole adapter.
        places: Which element of theta each element of A ``(rank, in)`` and B ``(out, rank)`` is.
        scales: What that element is multiplied by, of the same shapes; not trained.
        scale: Factor on the addition.
    """

    kind: ClassVar[str] = "Uni-LoRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    alpha: ClassVar[None] = None

    theta: Factor
    places: tuple[Tensor, Tensor]
    scales: tuple[Factor, Factor]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return self.places[0].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.places[1].shape[0], self.places[0].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Theta's, then those that were not trained."""
        return (*self.theta.tensors, *self.untrained)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """The places and the scales."""
        return (*self.places, *(tensor for factor in self.scales for tensor in factor.tensors))

    def scaled(self, weight: float) -> UniLoRA:
        """The same directions, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def factors(self) -> dict[str, Factor]:
        """``theta``, and the scales of ``A`` and ``B``."""
        return {"theta": self.theta, "scales_A": self.scales[0], "scales_B": self.scales[1]}

    def low_rank(self) -> LoRA:
        """The factors with every element in its place."""
        A, B = (self._drawn(at, factor) for at, factor in zip(self.places, self.scales, strict=True))
        return LoRA(A, B, self.scale)

    def _drawn(self, stored: Tensor, scales: Factor) -> Factor:
        """The elements of theta at the stored places, times their scales."""
        size = self.theta.shape[0]

        def draw(theta: Array, times: Array) -> Array:
            at = to_cpu(stored.read())
            if at.min() < 0 or at.max() >= size:
                raise FitError(f"an index outside of a vector of {size}", file=stored.path, tensor=stored.name)
            return theta[array_of(at, DType.I64, theta)] * times

        return Factor.computed((self.theta, scales), stored.shape, draw)

    def parts(self) -> tuple[tuple[int, UniLoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """As the LoRA that it is."""
        return self.low_rank().prepare(weight)
