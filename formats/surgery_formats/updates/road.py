# SPDX-License-Identifier: Apache-2.0
"""RoAd: ``W' = R W``, R turning and stretching outputs in pairs (Liao et al. 2024, arXiv:2409.00119)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from surgery_formats.arrays import Array, array_of, empty, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions, take
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight

__all__ = ["RoAd"]


@dataclass(frozen=True, slots=True)
class RoAd:
    """Rotations of pairs of outputs: in each group the first half of the rows is paired with the second.

    Of a pair ``(x, y)`` the outputs are ``a_x x - b_x y`` and ``a_y y + b_y x``, with ``a = alpha cos(theta)`` and
    ``b = alpha sin(theta)``. It turns what a layer gives, its bias too (as an update of its own).

    Attributes:
        angles: theta: ``(out / 2,)`` where a pair has one (variant 1), ``(out,)`` where each output has (2), ``(2 out,)``
            where cosine and sine have their own (4): per group those of the cosines, then those of the sines.
        lengths: alpha, as `angles`.
        variant: 1, 2 or 4.
        rows_in_group: Rows in a group.
        inputs: Columns of the weight; 0 until `fitted`.
    """

    kind: ClassVar[str] = "RoAd"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "maps"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    angles: Factor
    lengths: Factor
    variant: Literal[1, 2, 4]
    rows_in_group: int
    inputs: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.angles.shape[0] * 2 // self.variant, self.inputs

    @property
    def held_numbers(self) -> int:
        """The weight: a block of rows may lack the other rows of its pairs."""
        return self.shape[0] * self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The angles', then the lengths'."""
        return (*self.angles.tensors, *self.lengths.tensors)

    def fitted(self, fit: Fit) -> RoAd:
        """The columns of the weight; 1 of a bias."""
        return replace(self, inputs=fit.shape[1])

    def factors(self) -> dict[str, Factor]:
        """``angles`` and ``lengths``."""
        return {"angles": self.angles, "lengths": self.lengths}

    def low_rank(self) -> None:
        """None: it rotates the weight."""

    def parts(self) -> tuple[tuple[int, RoAd], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Read the weight once, and keep it; each block costs two multiplications per element.

        Raises:
            FitError: the rows of a pair are in two weights.
        """
        kept, seen = empty(weight.shape, weight.dtype, weight.device), set[int]()
        for block, rows, cols in weight.blocks():
            kept[_grid(rows, cols, kept)] = block
            seen |= set(rows)
        if not seen.issuperset(map(self._partner, seen)):
            stored = self.angles.tensors[0]
            raise FitError("the base holds the rows of a pair in two weights", file=stored.path, tensor=stored.name)
        own, other = self._coefficients(weight)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            block *= positions(own, 0, rows)[:, None]
            block += positions(other, 0, rows)[:, None] * take(kept, tuple(map(self._partner, rows)), cols)
            return block

        return apply

    def _partner(self, row: int) -> int:
        half = self.rows_in_group // 2
        return row + half if row % self.rows_in_group < half else row - half

    def _coefficients(self, weight: Weight) -> tuple[Array, Array]:
        """``(out,)`` each: on the row itself, and on the other row of its pair, with its sign."""
        angles, lengths = (factor.load(weight.dtype, weight.device) for factor in (self.angles, self.lengths))
        xp, size = namespace(angles), self.rows_in_group
        half = size // 2
        if self.variant == 1:
            angles, lengths = (
                xp.reshape(xp.stack([v.reshape(-1, half)] * 2, axis=1), (-1,)) for v in (angles, lengths)
            )
        if self.variant == 4:
            angles, lengths = angles.reshape(-1, 2, size), lengths.reshape(-1, 2, size)
            own, other = lengths[:, 0] * xp.cos(angles[:, 0]), lengths[:, 1] * xp.sin(angles[:, 1])
        else:
            own, other = lengths * xp.cos(angles), lengths * xp.sin(angles)
        signs = array_of([-1.0] * half + [1.0] * half, weight.dtype, angles)
        return own.reshape(-1), (other.reshape(-1, size) * signs).reshape(-1)


def _grid(rows: Index, cols: Index, like: Array) -> tuple[Array, ...]:
    at, beside = (array_of(list(index), DType.I64, like) for index in (rows, cols))
    return at[:, None], beside[None, :]
