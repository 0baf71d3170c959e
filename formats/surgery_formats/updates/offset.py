# SPDX-License-Identifier: Apache-2.0
"""A vector or full matrix that is added: ``b' = b + s d`` (PEFT's ``lora_bias``, LyCORIS ``diff`` and ``diff_b``)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, take
from surgery_formats.updates.base import Apply, Effect, Factor, Weight

__all__ = ["Offset"]


@dataclass(frozen=True, slots=True)
class Offset:
    """An addition stored in full.

    Attributes:
        value: ``(n,)`` for a bias, ``(out, in)`` for a weight.
        scale: Factor on `value`.
    """

    kind: ClassVar[str] = "offset"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None

    value: Factor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, 1)`` or ``(out, in)``."""
        return (self.value.shape[0], 1) if len(self.value.shape) == 1 else (self.value.shape[0], self.value.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The value's."""
        return self.value.tensors

    def scaled(self, weight: float) -> Offset:
        """`weight` times as far."""
        return replace(self, scale=self.scale * weight)

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """Nothing: every stored number was trained."""
        return ()

    def factors(self) -> dict[str, Factor]:
        """``value``."""
        return {"value": self.value}

    def low_rank(self) -> None:
        """None: it is stored in full."""

    def in_full(self) -> Offset:
        """Itself."""
        return self

    def parts(self) -> tuple[tuple[int, Offset], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the value once."""
        value = self.value.load(weight.dtype, weight.device).reshape(self.shape)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            part = take(value, rows, cols)
            block += part if self.scale == 1.0 else part * self.scale
            return block

        return apply
