# SPDX-License-Identifier: Apache-2.0
"""Figures of an extraction: of each tensor, of like-named layers together, and of ranks that were not chosen.

Imported without numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from surgery.extraction.findings import CalibrationFacts, Signal, six_digits
from surgery.extraction.recovery import TextScore
from surgery.reports.targets import pattern_of

__all__ = ["AS_AUTO", "ExtractClass", "ExtractRow", "Layers", "RankChoice", "layers_of"]

AS_AUTO = "auto"
"""The layers of the choice that `Rank.auto` would make: all, each with its directions above the noise."""

ExtractClass = Literal[
    "low-rank", "dense", "rows", "new rows", "unchanged", "alias", "derivable", "corrected", "dropped"
]


@dataclass(frozen=True, slots=True)
class ExtractRow:
    """One tensor of TUNED.

    Attributes:
        name: TUNED's name for it.
        kind: Its class.
        form: How the adapter holds it: ``LoRA``, ``DoRA``, ``modules_to_save``, ``bias``, ``token rows``, ``resized``;
            empty if it does not.
        shape: TUNED's shape.
        rank: Rank of the factors; 0 if there are none.
        energy: ``||TUNED - BASE||_F^2``.
        share: Share of the energy of all tensors.
        residual: ``||TUNED - (BASE + adapter)|| / ||TUNED - BASE||``, measured on what was written (dry run: computed
            from the spectrum).
        bound: The residual is at most this many times the least that any matrix of that rank leaves.
        moved: Share of values that differ from BASE.
        rms_ulp: Root mean square of the change, in units of TUNED's median spacing.
        noise: Storage rounding expected in the change, relative to its norm.
        parameters: Number of values stored for it.
        nbytes: Their size. Experts that share a pair of factors share its cost evenly.
        signal: Directions above the rounding noise, for factors.
        calibration: Effect of calibration inputs, for factors.
        why: Remark.
    """

    name: str
    kind: ExtractClass
    form: str = ""
    shape: tuple[int, ...] = ()
    rank: int = 0
    energy: float = 0.0
    share: float = 0.0
    residual: float = 0.0
    bound: float = 1.0
    moved: float = 0.0
    rms_ulp: float = 0.0
    noise: float = 0.0
    parameters: int = 0
    nbytes: int = 0
    signal: Signal | None = None
    calibration: CalibrationFacts | None = None
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        """The row as plain values, for ``--json`` and the manifest."""
        row: dict[str, Any] = {"class": self.kind, "shape": list(self.shape)}
        if self.form:
            row |= {"form": self.form, "parameters": self.parameters, "nbytes": self.nbytes}
        if self.energy or self.kind in ("low-rank", "dense", "rows", "new rows", "dropped"):
            row |= {
                "energy": self.energy,
                "energy_share": self.share,
                "residual": self.residual,
                "moved": self.moved,
                "rms_ulp": self.rms_ulp,
                "storage_noise": self.noise,
            }
        if self.rank:
            row |= {"rank": self.rank, "bound": self.bound}
        if self.signal is not None:
            row |= self.signal.as_json()
        if self.calibration is not None:
            row["calibration"] = self.calibration.as_json()
        return six_digits(row | ({"why": self.why} if self.why else {}))


@dataclass(frozen=True, slots=True)
class RankChoice:
    """What one rank for some of the layers would cost and leave; dense tensors are stored in any case.

    Attributes:
        rank: Rank of every matrix, or less where the matrix has less.
        layers: ``attention``, ``mlp`` (experts included), ``all``; or ``auto``: all, each with its directions above the noise,
            `rank` being the greatest number of these.
        residual: ``||TUNED - (BASE + adapter)|| / ||TUNED - BASE||`` over the whole model.
        parameters: Number of values in the adapter.
        nbytes: Their size.
        score: How well it predicts the text; None where that was not measured.
        recovered: Share of TUNED's gain that it has on the text; None where that is not defined either.
    """

    rank: int
    layers: str
    residual: float
    parameters: int
    nbytes: int
    score: TextScore | None = None
    recovered: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The choice as plain values, for ``--json`` and the manifest."""
        figures = {name: getattr(self, name) for name in ("rank", "layers", "residual", "parameters", "nbytes")}
        if self.score is None:
            return six_digits(figures)
        return six_digits(figures) | self.score.as_json() | six_digits({"recovered": self.recovered})


@dataclass(frozen=True, slots=True)
class Layers:
    """Rows whose names differ only in layer numbers.

    Attributes:
        pattern: ``model.layers.*.mlp.up_proj``.
        rows: The grouped rows; never empty.
    """

    pattern: str
    rows: tuple[ExtractRow, ...]

    @property
    def kind(self) -> str:
        """The class of the rows."""
        return self.rows[0].kind

    @property
    def energy(self) -> float:
        """``||TUNED - BASE||_F^2`` of all rows."""
        return math.fsum(row.energy for row in self.rows)

    @property
    def share(self) -> float:
        """Share of the energy of the model."""
        return math.fsum(row.share for row in self.rows)

    @property
    def residual(self) -> float:
        """The residual of all their changes, relative to its norm."""
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
        signals = [row.signal for row in self.rows if row.signal is not None]
        if not signals:
            return ""
        least = "" if all(signal.complete for signal in signals) else ">="
        return f"{least}{_spread([signal.count for signal in signals])}/{_spread([signal.of for signal in signals])}"

    @property
    def survival(self) -> float:
        """Share of the factors' update that a merge would keep, weighted by energy; NaN without factors."""
        survivals = [(row.energy, row.signal.survival) for row in self.rows if row.signal is not None]
        survivals = [(energy, value) for energy, value in survivals if not math.isnan(value)]
        total = math.fsum(energy for energy, _ in survivals)
        return math.fsum(energy * value for energy, value in survivals) / total if total > 0 else math.nan

    @property
    def why(self) -> str:
        """Their common remark; if there are several, the first one and the number of others."""
        notes = list(dict.fromkeys(row.why for row in self.rows if row.why))
        return notes[0] + (f" (and {len(notes) - 1} other remarks)" if len(notes) > 1 else "") if notes else ""

    def _norm(self, parts: list[float]) -> float:
        left = math.fsum(row.energy * part**2 for row, part in zip(self.rows, parts, strict=True))
        return math.sqrt(left / self.energy) if self.energy > 0 else 0.0


def layers_of(rows: Iterable[ExtractRow], *, apart: bool = False) -> tuple[Layers, ...]:
    """Group rows by pattern and class, in order of first appearance; `apart` keeps every row by itself."""
    groups: dict[tuple[str, str], list[ExtractRow]] = {}
    for row in rows:
        groups.setdefault((row.name if apart else pattern_of(row.name), row.kind), []).append(row)
    return tuple(Layers(pattern, tuple(members)) for (pattern, _), members in groups.items())


def _spread(numbers: list[int]) -> str:
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"
