# SPDX-License-Identifier: Apache-2.0
"""The ledger's rows with like-named layers taken together: a model of eighty layers in a dozen lines."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from surgery.extraction.ledger import ExtractRow
from surgery.reports.targets import pattern_of

__all__ = ["Layers", "layers_of"]


@dataclass(frozen=True, slots=True)
class Layers:
    """Rows that differ in their numbers only.

    Attributes:
        pattern: ``model.layers.*.mlp.up_proj``.
        rows: They, at least one.
    """

    pattern: str
    rows: tuple[ExtractRow, ...]

    @property
    def kind(self) -> str:
        """Their class."""
        return self.rows[0].kind

    @property
    def energy(self) -> float:
        """Of all."""
        return math.fsum(row.energy for row in self.rows)

    @property
    def share(self) -> float:
        """Of the energy of the model."""
        return math.fsum(row.share for row in self.rows)

    @property
    def residual(self) -> float:
        """What is missing of their change, relative to its norm."""
        return self._norm([row.residual for row in self.rows])

    @property
    def noise(self) -> float:
        """Storage rounding in their change, relative to its norm."""
        return self._norm([row.noise for row in self.rows])

    @property
    def moved(self) -> float:
        """Share of their values that differ from BASE."""
        sizes = [math.prod(row.shape) for row in self.rows]
        return sum(size * row.moved for size, row in zip(sizes, self.rows, strict=True)) / max(sum(sizes), 1)

    @property
    def rms_ulp(self) -> float:
        """Root mean square of the change in spacings of the stored type, as the mean of the layers."""
        return math.fsum(row.rms_ulp for row in self.rows) / len(self.rows)

    @property
    def ranks(self) -> str:
        """``16``, or ``4-16``."""
        return _spread([row.rank for row in self.rows if row.rank])

    @property
    def signal(self) -> str:
        """Directions that stand out of rounding noise, of how many: ``50/384``, ``33-203/384``, ``>=16/384``."""
        found = [row.signal for row in self.rows if row.signal is not None]
        if not found:
            return ""
        least = "" if all(one.complete for one in found) else ">="
        return f"{least}{_spread([one.count for one in found])}/{_spread([one.of for one in found])}"

    @property
    def survival(self) -> float:
        """Share of their factors' update that a merge would keep, weighted by energy; NaN where there are no factors."""
        found = [(row.energy, row.signal.survival) for row in self.rows if row.signal is not None]
        found = [(energy, value) for energy, value in found if not math.isnan(value)]
        total = math.fsum(energy for energy, _ in found)
        return math.fsum(energy * value for energy, value in found) / total if total > 0 else math.nan

    @property
    def why(self) -> str:
        """The remark all of them have; the first one, and how many others there are."""
        notes = list(dict.fromkeys(row.why for row in self.rows if row.why))
        return notes[0] + (f" (and {len(notes) - 1} other remarks)" if len(notes) > 1 else "") if notes else ""

    def _norm(self, parts: list[float]) -> float:
        left = math.fsum(row.energy * part**2 for row, part in zip(self.rows, parts, strict=True))
        return math.sqrt(left / self.energy) if self.energy > 0 else 0.0


def layers_of(rows: Iterable[ExtractRow], *, apart: bool = False) -> tuple[Layers, ...]:
    """Group by pattern and class, in order of first appearance.

    Args:
        rows: Of a ledger.
        apart: Every row by itself, under its own name.
    """
    groups: dict[tuple[str, str], list[ExtractRow]] = {}
    for row in rows:
        groups.setdefault((row.name if apart else pattern_of(row.name), row.kind), []).append(row)
    return tuple(Layers(pattern, tuple(found)) for (pattern, _), found in groups.items())


def _spread(numbers: list[int]) -> str:
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"
