# SPDX-License-Identifier: Apache-2.0
"""Single rows of an embedding, trained in full: ``W'[i] = v_i`` (PEFT's trainable tokens)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery_formats.arrays import Array
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Weight

__all__ = ["TokenRows"]


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Absolute new values of some rows.

    Attributes:
        value: ``(len(indices), dim)``.
        indices: Token ids, distinct.
        vocabulary: Rows of the weight it fits, or 0 for "at least ``max(indices) + 1``".
    """

    kind: ClassVar[str] = "token rows"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "sets"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None

    value: Factor
    indices: tuple[int, ...]
    vocabulary: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """``(vocabulary, dim)``; the first is a lower bound if `vocabulary` is 0."""
        return self.vocabulary or max(self.indices, default=-1) + 1, self.value.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The rows'."""
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

    def parts(self) -> tuple[tuple[int, TokenRows], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the rows once; blocks without one of them pass unchanged."""
        value = self.value.load(weight.dtype, weight.device)
        place = {token: i for i, token in enumerate(self.indices)}

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            inside = rows if isinstance(rows, range) else set(rows)
            for at, row in enumerate(rows) if any(token in inside for token in place) else ():
                if row in place:
                    block[at] = positions(value[place[row]], 0, cols)
            return block

        return apply
