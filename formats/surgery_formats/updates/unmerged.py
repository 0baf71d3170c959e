# SPDX-License-Identifier: Apache-2.0
"""What was trained for a module in a way that no weight can hold, or that its files do not tell: read, shown, and refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NoReturn

from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight

__all__ = ["Unmerged"]


@dataclass(frozen=True, slots=True)
class Unmerged:
    """Trained tensors that cannot become a weight.

    Attributes:
        kind: Name in the field.
        held: The tensors, by their names after the module's path.
        why: Why no weight can hold them.
        instead: What to do.
        shape: Logical ``(out, in)`` where the tensors tell; else 0.
        rank: Inner size, where they have one.
    """

    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    kind: str
    held: tuple[tuple[str, Factor], ...]
    why: str
    instead: str
    shape: tuple[int, int] = (0, 0)
    rank: int | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return tuple(tensor for _, factor in self.held for tensor in factor.tensors)

    def fitted(self, fit: Fit) -> Unmerged:
        """The sizes of the weight where the tensors do not tell."""
        return replace(self, shape=(self.shape[0] or fit.shape[0], self.shape[1] or fit.shape[1]))

    def factors(self) -> dict[str, Factor]:
        """The tensors by their names in the file."""
        return dict(self.held)

    def low_rank(self) -> None:
        """None."""

    def parts(self) -> tuple[tuple[int, Unmerged], ...]:
        """Itself."""
        return ((0, self),)

    def refuse(self) -> NoReturn:
        """Say why, and what to do.

        Raises:
            FitError: always.
        """
        tensor = self.tensors[0]
        raise FitError(f"{self.kind}: {self.why}", file=tensor.path, tensor=tensor.name, hint=self.instead)

    def prepare(self, weight: Weight) -> Apply:
        """See `refuse`."""
        self.refuse()
