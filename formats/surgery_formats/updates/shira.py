# SPDX-License-Identifier: Apache-2.0
"""SHiRA: ``W' = W + S``, S zero but for a percent or two of its elements (Bhardwaj et al. 2024, arXiv:2406.13175)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.sparse import adding_at, check_places

__all__ = ["SHiRA"]


@dataclass(frozen=True, slots=True)
class SHiRA:
    """Numbers that are added to single weights.

    Attributes:
        values: ``(n,)``.
        places: ``(2, n)``, the row and the column of each; stored, and not trained.
        scale: Factor on the values.
        outputs: Rows of the weight; 0 until `fitted`.
        inputs: Its columns; 0 until `fitted`.
    """

    kind: ClassVar[str] = "SHiRA"
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
        """The values', then the indices."""
        return (*self.values.tensors, self.places)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """The indices."""
        return (self.places,)

    def scaled(self, weight: float) -> SHiRA:
        """The same places, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def fitted(self, fit: Fit) -> SHiRA:
        """The sizes of the weight."""
        return replace(self, outputs=fit.shape[0], inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``values``."""
        return {"values": self.values}

    def low_rank(self) -> None:
        """None: what is sparse has no low rank."""

    def parts(self) -> tuple[tuple[int, SHiRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the values once.

        Raises:
            FitError: a place is outside of the weight.
        """
        rows, cols = self.places.read()
        check_places(rows, cols, self.shape, self.places)
        return adding_at(rows, cols, self.values.load(weight.dtype, weight.device) * self.scale)
