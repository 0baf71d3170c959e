# SPDX-License-Identifier: Apache-2.0
"""A parameter trained in full: ``W' = V`` (PEFT's ``modules_to_save``, ``bias="all"``, LN tuning; a resized vocabulary)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, take
from surgery_formats.updates.base import Apply, Factor, Weight

if TYPE_CHECKING:
    import torch

__all__ = ["Replacement"]


@dataclass(frozen=True, slots=True)
class Replacement:
    """The whole new value, in the orientation of the stored parameter. It may change the first axis (more vocabulary rows).

    Attributes:
        value: Any shape; ``value.tensors`` has exactly one tensor.
    """

    kind: ClassVar[str] = "replacement"
    needs_weight: ClassVar[bool] = False

    value: Factor

    @property
    def stored(self) -> Tensor:
        """The tensor that takes the parameter's place."""
        return self.value.tensors[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and flattened columns."""
        return self.stored.matrix

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The one stored tensor."""
        return self.value.tensors

    def parts(self) -> tuple[tuple[int, Replacement], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Values are read whole: what is replaced is a head, an embedding or a norm."""
        value = self.value.load(weight.dtype, weight.device).reshape(self.shape)

        def apply(block: torch.Tensor, rows: Index, cols: Index) -> torch.Tensor:
            return take(value, rows, cols).clone()

        return apply
