# SPDX-License-Identifier: Apache-2.0
"""SuperTuning: ``W' = W + S``, S zero but at the weight's largest (or smallest) elements (arXiv:2607.09287)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import to_cpu
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.sparse import adding_at, check_places

__all__ = ["SuperTuning"]


@dataclass(frozen=True, slots=True)
class SuperTuning:
    """Numbers that are added to single elements of a weight.

    Attributes:
        values: ``(n,)``.
        places: ``(n,)``, positions in the weight as one row; stored, and not trained.
        scale: Factor on the values.
        outputs: Rows of the weight; 0 until `fitted`.
        inputs: Its columns; 0 until `fitted`.
    """

    kind: ClassVar[str] = "SuperTuning"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None

    values: Factor
    places: Tensor
    scale: float = 1.0
    outputs: int = 0
    inputs: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.outputs, self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The values', then the places."""
        return (*self.values.tensors, self.places)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """The places."""
        return (self.places,)

    def scaled(self, weight: float) -> SuperTuning:
        """The same places, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def fitted(self, fit: Fit) -> SuperTuning:
        """The sizes of the weight."""
        return replace(self, outputs=fit.shape[0], inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``values``."""
        return {"values": self.values}

    def low_rank(self) -> None:
        """None: what is sparse has no low rank."""

    def parts(self) -> tuple[tuple[int, SuperTuning], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the values once.

        Raises:
            FitError: a place is outside of the weight.
        """
        rows, cols = divmod(to_cpu(self.places.read()), self.inputs)
        check_places(rows, cols, self.shape, self.places)
        return adding_at(rows, cols, self.values.load(weight.dtype, weight.device) * self.scale)
