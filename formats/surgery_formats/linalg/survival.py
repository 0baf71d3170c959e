# SPDX-License-Identifier: Apache-2.0
"""How much of an update the stored values keep, as three sums; imports no numpy, because plans and ledgers hold them too."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from surgery_formats.arrays import Array, cast, inner
from surgery_formats.dtypes import DType

__all__ = ["Survival"]


class Survival(NamedTuple):
    """Sums over the exact update T and the stored update D (rounded result minus previously stored values).

    Attributes:
        update: ``sum(T * T)``.
        stored: ``sum(D * T)``.
        noise: ``sum((D - T) ** 2)``.
    """

    update: float = 0.0
    stored: float = 0.0
    noise: float = 0.0

    @property
    def survival(self) -> float:
        """Share of the update that the stored values keep, ``<D, T> / <T, T>``: 1 is all, 0 is rounded away."""
        return self.stored / self.update if self.update > 0 else math.nan

    @property
    def rounding(self) -> float:
        """Rounding noise relative to the update, ``||D - T|| / ||T||``."""
        return math.sqrt(self.noise / self.update) if self.update > 0 else math.nan

    @property
    def correlation(self) -> float:
        """Cosine of the angle between the stored update and the exact one; 0 if nothing was stored."""
        size = self.update * (self.noise + 2 * self.stored - self.update)  # <T, T> <D, D>
        if not self.update > 0:
            return math.nan
        return min(1.0, self.stored / math.sqrt(size)) if size > 0 else 0.0

    @classmethod
    def of(cls, update: Array, stored: Array) -> Survival:
        """Compare an update with its stored version, of equal shape and type; overwrites `stored`."""
        product = _inner(stored, update)
        stored -= update
        return cls(_inner(update, update), product, _inner(stored, stored))

    @classmethod
    def total(cls, parts: Iterable[Survival]) -> Survival:
        """Add up several records."""
        terms = list(parts)
        return cls(sum(p.update for p in terms), sum(p.stored for p in terms), sum(p.noise for p in terms))

    def plus(self, other: Survival) -> Survival:
        """Add up two; for every block of a merge, `total` takes its time."""
        return Survival(self.update + other.update, self.stored + other.stored, self.noise + other.noise)


def _inner(left: Array, right: Array) -> float:
    """Their inner product; values beyond 1e19 have products that only float64 holds."""
    product = inner(left, right)
    return product if math.isfinite(product) else inner(cast(left, DType.F64), cast(right, DType.F64))
