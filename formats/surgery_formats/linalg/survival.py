# SPDX-License-Identifier: Apache-2.0
"""How much of an update stored values keep, as three sums: no torch, since plans and ledgers hold them too."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Survival"]


class Survival(NamedTuple):
    """With T the exact update of some values and D the stored one (rounded result minus what was stored before).

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
        """Share of the update that the stored values keep, ``<D, T> / <T, T>``: 1 is all of it, 0 is rounded away."""
        return self.stored / self.update if self.update > 0 else math.nan

    @property
    def rounding(self) -> float:
        """Rounding noise relative to the update, ``||D - T|| / ||T||``."""
        return math.sqrt(self.noise / self.update) if self.update > 0 else math.nan

    @classmethod
    def total(cls, parts: Iterable[Survival]) -> Survival:
        """Of all together."""
        every = list(parts)
        return cls(sum(p.update for p in every), sum(p.stored for p in every), sum(p.noise for p in every))
