# SPDX-License-Identifier: Apache-2.0
"""DoHa and DoKr: ``W' = m / ||V|| * V`` with ``V = W + delta``, delta a LoHa or a LoKr (LyCORIS; after arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from surgery_formats.arrays import Array
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.dora import DoRA
from surgery_formats.updates.loha import LoHa
from surgery_formats.updates.lokr import LoKr
from surgery_formats.updates.lora import LoRA

__all__ = ["Decomposed"]


@dataclass(frozen=True, slots=True)
class Decomposed:
    """An addition that is no single product of two factors, after which rows (or columns) get lengths.

    Attributes:
        delta: The addition.
        magnitude: As a DoRA's.
        per_row: As a DoRA's.
    """

    kinds: ClassVar[tuple[str, ...]] = ("DoHa", "DoKr")
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "maps"
    of_base: ClassVar[bool] = True

    delta: LoHa | LoKr
    magnitude: Factor
    per_row: bool = True

    @property
    def kind(self) -> str:
        """Of `kinds`, by the addition."""
        return self.kinds[isinstance(self.delta, LoKr)]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.delta.shape

    @property
    def rank(self) -> int | None:
        """The addition's."""
        return self.delta.rank

    @property
    def alpha(self) -> float | None:
        """As written in the file."""
        return self.delta.alpha

    @property
    def scale(self) -> float:
        """On the addition, before rows get their lengths."""
        return self.delta.scale

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The addition's, then the magnitude's."""
        return (*self.delta.tensors, *self.magnitude.tensors)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """What the scale was read from."""
        return self.delta.untrained

    def factors(self) -> dict[str, Factor]:
        """Those of the addition, and ``magnitude``."""
        return {**self.delta.factors(), "magnitude": self.magnitude}

    def low_rank(self) -> None:
        """None: the lengths of its rows depend on the weight."""

    def parts(self) -> tuple[tuple[int, Decomposed], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """As a DoRA: one pass over the weight for the norms of V, then row blocks."""
        return self._as_dora().prepare(weight)

    def lost(self, weight: Weight) -> Array:
        """The lengths of V, in float64."""
        return self._as_dora().lost(weight)

    def inverse(self, weight: Weight, share: float, lost: Array | None) -> Apply:
        """As a DoRA's."""
        return self._as_dora().inverse(weight, share, lost)

    def _as_dora(self) -> DoRA:
        # Of its direction a DoRA's arithmetic asks only for `prepare`.
        return DoRA(cast(LoRA, self.delta), self.magnitude, self.per_row)
