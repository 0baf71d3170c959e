# SPDX-License-Identifier: Apache-2.0
"""A parameter trained in full: ``W' = V`` (PEFT's ``modules_to_save``, ``bias="all"``, LN tuning; a resized vocabulary)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery_formats.arrays import Array, namespace
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, take
from surgery_formats.updates.base import Apply, Effect, Factor, Weight

__all__ = ["Held", "Replacement"]


Held = Literal["in place", "copy", "resized", "carried"]
"""Where the new values live while the adapter is attached.

``in place``
    In the base's own parameter.
``copy``
    In a trained copy of a whole module, whose original stays.
``resized``
    In place of a weight with another number of rows: a vocabulary that grew.
``carried``
    Nowhere: the file merely brings the base's values along, untrained.
"""


@dataclass(frozen=True, slots=True)
class Replacement:
    """The whole new value, oriented like the stored parameter. Its first axis may grow (more vocabulary rows).

    Attributes:
        value: Any shape; ``value.tensors`` has exactly one tensor.
        held: Where the values live while the adapter is attached.
    """

    kind: ClassVar[str] = "replacement"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "sets"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None

    value: Factor
    held: Held = "in place"

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

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """Nothing: every stored number was trained."""
        return ()

    def factors(self) -> dict[str, Factor]:
        """``value``."""
        return {"value": self.value}

    def low_rank(self) -> None:
        """None: it adds nothing."""

    def parts(self) -> tuple[tuple[int, Replacement], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Values are read whole: what is replaced is a head, an embedding or a norm."""
        value = self.value.load(weight.dtype, weight.device).reshape(self.shape)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            return namespace(value).asarray(take(value, rows, cols), copy=True)

        return apply
