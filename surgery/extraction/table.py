# SPDX-License-Identifier: Apache-2.0
"""What other ranks, and fewer layers, would have cost and left out: from spectra that are there anyway."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.extraction.factor import Factored
from surgery.extraction.plan import StoragePlan
from surgery.extraction.tally import PairMeasure
from surgery_formats.dtypes import DType
from surgery_formats.linalg.coding import Coding
from surgery_formats.models.families.family import role_of

__all__ = ["TABLE_RANKS", "Choice", "choices"]

TABLE_RANKS = (4, 8, 16, 32, 64)
_LAYERS: Mapping[str, tuple[str, ...]] = {"attention": ("attention",), "mlp": ("mlp", "expert"), "all": ()}


@dataclass(frozen=True, slots=True)
class Choice:
    """One rank for some of the layers; what is stored whole is stored in any case.

    Attributes:
        rank: Of every matrix that has so many directions.
        layers: ``attention``, ``mlp`` (experts included) or ``all``.
        residual: ``||TUNED - (BASE + adapter)|| / ||TUNED - BASE||`` over the whole model.
        parameters: Numbers in the adapter.
        nbytes: Their bytes.
    """

    rank: int
    layers: str
    residual: float
    parameters: int
    nbytes: int

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and the manifest."""
        residual = float(f"{self.residual:.6g}")
        return {
            "rank": self.rank,
            "layers": self.layers,
            "residual": residual,
            "parameters": self.parameters,
            "nbytes": self.nbytes,
        }


def choices(
    forms: StoragePlan,
    factored: Mapping[str, Factored],
    measures: Mapping[str, PairMeasure],
    stored: tuple[int, int],
    dtype: DType | Coding,
    ranks: Iterable[int] = TABLE_RANKS,
) -> tuple[Choice, ...]:
    """Every rank for every group of layers.

    Args:
        forms: What becomes factors.
        factored: Spectra, known up to the largest of `ranks`.
        measures: Of every tensor.
        stored: ``(numbers, bytes)`` that are stored whole.
        dtype: Of the factors.
        ranks: To tabulate.
    """
    total = math.fsum(found.energy for found in measures.values())
    dropped = math.fsum(measures[name].energy for name in forms.dropped)
    made = []
    for rank in ranks:
        for layers, roles in _LAYERS.items():
            left, numbers = dropped, 0
            for unit in forms.units:
                found = factored[unit.path]
                if roles and role_of(unit.path) not in roles:
                    left += found.energy
                    continue
                left += found.residual(rank)
                numbers += unit.cost * min(rank, found.rank)
            residual = math.sqrt(left / total) if total else 0.0
            nbytes = dtype.nbytes(numbers) + stored[1]
            made.append(Choice(rank, layers, residual, numbers + stored[0], nbytes))
    return tuple(made)
