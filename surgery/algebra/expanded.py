# SPDX-License-Identifier: Apache-2.0
"""The change that a chain of updates makes to one weight, as what a LoRA is to stand for.

Its factors come from the updates where they say them (`surgery_formats.updates.expanded`), else from an SVD of the change
formed in full. Either way it is compared with what the updates' own equations make of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from surgery.algebra.sums import Compared, LowRankSum, MergedDelta, Recipe, Solved
from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.models.names import WeightSlice
from surgery_formats.updates import Update
from surgery_formats.updates.weights import HeldWeight

__all__ = ["ChainChange", "ExpandedChange", "break_even", "formed_change"]


@dataclass(frozen=True)
class ChainChange:
    """What updates do to a weight one after the other, as a merge applies them.

    Attributes:
        updates: In order, all of one shape.
        places: Where the base holds the weight; empty if none of the updates looks at it.
    """

    updates: tuple[Update, ...]
    places: tuple[WeightSlice, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.updates[0].shape

    @property
    def rank(self) -> int:
        """Rank of the updates' factors, 0 without low-rank factors; the change itself may have a higher one."""
        return sum(update.rank or 0 for update in self.updates)

    def delta(self, dtype: DType) -> Array:
        """The change, dense."""
        before = self._weight(dtype)
        rows, cols = (range(size) for size in self.shape)
        after = before
        for update in self.updates:
            apply = update.prepare(HeldWeight(after))
            after = apply(after.copy(), rows, cols)
        return after - before

    def _weight(self, dtype: DType) -> Array:
        values = numpy.zeros(self.shape, dtype.numpy)
        for place in self.places:
            view = place.parameter.view
            at = slice(view.row_origin, view.row_origin + view.shape[0])
            beside = slice(view.col_origin, view.col_origin + view.shape[1])
            values[at, beside] = place.parameter.get(dtype)
        return values


def formed_change(change: ChainChange, name: str) -> MergedDelta:
    """A change as a delta that is formed where it is needed."""
    return MergedDelta(
        (change,), (1.0,), (0,), Recipe("dare-linear"), name
    )  # a sum of one term, of which nothing drops


@dataclass(frozen=True)
class ExpandedChange:
    """A change whose factors are known.

    Attributes:
        factors: What the updates say they are.
        change: What their equations make of the weight.
    """

    factors: LowRankSum
    change: MergedDelta

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.factors.shape

    @property
    def ranks(self) -> tuple[int, ...]:
        """As the updates state them."""
        return self.change.ranks

    @property
    def full_rank(self) -> int:
        """The rank at which nothing is lost."""
        return self.factors.full_rank

    def least(self, recipe: Recipe) -> int:
        """The least rank that keeps what `recipe` asks for."""
        return self.factors.least(recipe)

    def solve(self, rank: int) -> Solved:
        """The best factors of that rank, by QR of the factors."""
        return self.factors.solve(rank)

    def compare(self, B: Array, A: Array) -> Compared:
        """With the change itself, not with the factors that were worked out from it."""
        return self.change.compare(B, A)


def break_even(shape: Sequence[int]) -> int:
    """The greatest rank whose factors hold no more numbers than the matrix."""
    return max(1, shape[0] * shape[1] // (shape[0] + shape[1]))
