# SPDX-License-Identifier: Apache-2.0
"""C3A: ``W' = W + C``, C made of circulant blocks ``C[p, q] = k[(q - p) mod b] / in`` (Chen et al. 2024, arXiv:2407.19342)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, namespace
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Weight

__all__ = ["C3A"]


@dataclass(frozen=True, slots=True)
class C3A:
    """A matrix of blocks, each of which one row tells whole.

    Attributes:
        kernels: ``k``, ``(out / b, in / b, b)``.
        scale: Factor on the addition, beside the width it is divided by.
    """

    kind: ClassVar[str] = "C3A"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    kernels: Factor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        high, wide, block = self.kernels.shape
        return high * block, wide * block

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The kernels'."""
        return self.kernels.tensors

    def scaled(self, weight: float) -> C3A:
        """The same addition, `weight` times as far."""
        return replace(self, scale=self.scale * weight)

    def factors(self) -> dict[str, Factor]:
        """``kernels``."""
        return {"kernels": self.kernels}

    def low_rank(self) -> None:
        """None: a circulant block has full rank."""

    def parts(self) -> tuple[tuple[int, C3A], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the kernels once, each twice in a row: what a block adds to a row is then a window of them."""
        kernels = self.kernels.load(weight.dtype, weight.device) * (self.scale / self.shape[1])
        xp, size = namespace(kernels), kernels.shape[2]
        along = xp.concat([kernels, kernels], axis=2)  # window b - p has the row p of every block
        down = xp.flip(along, axis=2)  # window b - 1 - q has the column q

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            if len(rows) <= len(cols):
                for i, (band, p) in _places(rows, size):
                    row = along[band, :, size - p : 2 * size - p].reshape(-1)
                    block[i] += positions(row, 0, cols)
            else:
                for i, (band, q) in _places(cols, size):
                    column = down[:, band, size - 1 - q : 2 * size - 1 - q].reshape(-1)
                    block[:, i] += positions(column, 0, rows)
            return block

        return apply


def _places(index: Index, size: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """``(position in the block, (band of blocks, position inside))``."""
    return enumerate(divmod(at, size) for at in index)
