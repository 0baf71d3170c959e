# SPDX-License-Identifier: Apache-2.0
"""(IA)^3: ``W' = diag(l) W``, or ``W diag(l)`` where l acts on the inputs (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, namespace
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight

__all__ = ["IA3"]


@dataclass(frozen=True, slots=True)
class IA3:
    """A vector that stretches the outputs of a layer (their bias too, as an update of its own), or its inputs.

    Attributes:
        vector: ``l``: one value per logical row, ``(out,)``, or per input channel, ``(in,)``.
        per_row: Whether `vector` belongs to rows (PEFT's default) or to columns (PEFT's ``feedforward_modules``).
        other: Size of the other axis; 0 until `fitted`.
        kernel: Columns that share one input channel's value.
        noted: Stored tensors that say where `vector` acts.
    """

    kind: ClassVar[str] = "IA3"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None

    vector: Factor
    per_row: bool
    other: int = 0
    kernel: int = 1
    noted: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        size = self.vector.shape[0]
        return (size, self.other) if self.per_row else (self.other, size * self.kernel)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The vector's, then those that say where it acts."""
        return (*self.vector.tensors, *self.noted)

    def fitted(self, fit: Fit) -> IA3:
        """The update with the size of its other axis and of a convolution's kernel."""
        return replace(self, other=fit.shape[1 if self.per_row else 0], kernel=1 if self.per_row else fit.kernel)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """What says where the vector acts."""
        return self.noted

    def factors(self) -> dict[str, Factor]:
        """``vector``."""
        return {"vector": self.vector}

    def low_rank(self) -> None:
        """None: it multiplies the weight."""

    def parts(self) -> tuple[tuple[int, IA3], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the vector once."""
        gain = self._gain(weight)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            block *= self._along(gain, rows, cols)
            return block

        return apply

    def lost(self, weight: Weight) -> None:
        """Nothing, unless a factor is 0."""

    def inverse(self, weight: Weight, share: float, lost: Array | None) -> Apply:
        """``W' / (1 + w (l - 1))``."""
        gain = 1 + share * (self._gain(weight) - 1)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            block /= self._along(gain, rows, cols)
            return block

        return apply

    def _gain(self, weight: Weight) -> Array:
        vector = self.vector.load(weight.dtype, weight.device)
        return namespace(vector).repeat(vector, self.kernel)

    def _along(self, gain: Array, rows: Index, cols: Index) -> Array:
        """The factors of a block, of a shape that multiplies it."""
        return positions(gain, 0, rows)[:, None] if self.per_row else positions(gain, 0, cols)[None, :]
