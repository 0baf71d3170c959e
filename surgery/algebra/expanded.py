# SPDX-License-Identifier: Apache-2.0
"""The change that a chain of updates makes to one weight, as what a LoRA is to stand for.

Its factors come from the updates where they say them (`surgery_formats.updates.expanded`), else from an SVD of the change
formed in full. Either way it is compared with what the updates' own equations make of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy

from surgery.algebra.dense_change import change_in_turn
from surgery.algebra.group import Contribution
from surgery.algebra.sums import CombineOptions, Compared, DenseDelta, LowRankSum, Solved
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.models.names import WeightSlice
from surgery_formats.updates import Update

__all__ = ["ExpandedChange", "break_even", "formed_change"]


def formed_change(site: Site, updates: Sequence[Update], places: Sequence[WeightSlice]) -> DenseDelta:
    """What `updates`, of one adapter, do to a weight, as a merge applies them, formed where it is needed.

    `places` are where the base holds the weight; none if no update looks at it.
    """
    shares = [Contribution(0, site, update, 1.0) for update in updates]
    before = partial(_values, updates[0].shape, places)
    # Ranks are those of the factors, 0 without low-rank ones; the change itself may have a higher one.
    ranks = tuple(update.rank or 0 for update in updates)
    return DenseDelta(updates[0].shape, ranks, partial(change_in_turn, before, shares), seed=0)


def _values(shape: tuple[int, int], places: Sequence[WeightSlice]) -> Array:
    """The weight, put together of its places; zeros without any."""
    values = numpy.zeros(shape)
    for place in places:
        view = place.parameter.view
        at = slice(view.row_origin, view.row_origin + view.shape[0])
        beside = slice(view.col_origin, view.col_origin + view.shape[1])
        values[at, beside] = place.parameter.get(DType.F64)
    return values


@dataclass(frozen=True)
class ExpandedChange:
    """A change whose factors are known.

    Attributes:
        factors: What the updates say they are.
        change: What their equations make of the weight.
    """

    factors: LowRankSum
    change: DenseDelta

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

    def least(self, options: CombineOptions) -> int:
        """The least rank that keeps what `options` asks for."""
        return self.factors.least(options)

    def solve(self, rank: int) -> Solved:
        """The best factors of that rank, by QR of the factors."""
        return self.factors.solve(rank)

    def compare(self, B: Array, A: Array) -> Compared:
        """With the change itself, not with the factors that were worked out from it."""
        return self.change.compare(B, A)


def break_even(shape: Sequence[int]) -> int:
    """The greatest rank whose factors hold no more numbers than the matrix."""
    return max(1, shape[0] * shape[1] // (shape[0] + shape[1]))
