# SPDX-License-Identifier: Apache-2.0
"""Rounding noise in differences of stored weights: its energy, its largest singular value, and what survives a merge.

Rounding to nearest, with a spacing `ulp` between stored neighbours, adds an error of variance ``ulp^2 / 12`` that is
independent across values unless the change is much smaller than `ulp`; below about one `ulp` the quantiser has a dead
zone, the error correlates with the change, and survival falls. The largest singular value of a matrix of independent
errors is at most about ``max_i sqrt(sum_j var_ij) + max_j sqrt(sum_i var_ij)`` (Bandeira and van Handel 2016,
arXiv:1408.6185): singular values above that edge are signal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surgery_formats.dtypes import DType
from surgery_formats.linalg.survival import Survival

__all__ = ["MANTISSA", "NoiseTally", "measure_survival", "signal_count", "survival"]

MANTISSA = {DType.BF16: (7, -126), DType.F16: (10, -14), DType.F32: (23, -126), DType.F64: (52, -1022)}
"""Stored fraction bits, and the exponent of the smallest normal number, below which the spacing is constant."""
_RELATIVE = 2.0**-20
"""Singular values below this share of the first are arithmetic noise: products are computed in float32."""


class NoiseTally:
    """Rounding noise of one matrix, collected block by block; no device synchronisation until the figures are read."""

    def __init__(self) -> None:
        self._cols: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []

    def add_sums(self, rows: torch.Tensor, cols: torch.Tensor) -> None:
        """Add rows by their variances: the sum of each row, and of each column over these rows; float64."""
        if len(rows):
            self._cols = cols if self._cols is None else self._cols + cols
            self._rows.append(torch.stack([rows.max(), rows.sum()]))

    @property
    def energy(self) -> float:
        """Expected ``||noise||_F^2`` of the rows so far."""
        return float(torch.stack(self._rows)[:, 1].sum()) if self._rows else 0.0

    @property
    def edge(self) -> float:
        """The largest singular value that rounding alone would have."""
        if self._cols is None or not len(self._cols):
            return 0.0
        row, col = torch.stack([torch.stack(self._rows)[:, 0].max(), self._cols.max()]).tolist()
        return math.sqrt(row) + math.sqrt(col)


def signal_count(values: Sequence[float], edge: float) -> int:
    """Count the singular `values` (descending) above the noise of the arithmetic and of storage (`NoiseTally.edge`)."""
    least = max(edge, values[0] * _RELATIVE) if values else edge
    return sum(value > least for value in values)


def measure_survival(exact: torch.Tensor, stored: torch.Tensor) -> Survival:
    """Compare an update with its stored version, of equal shape and type; overwrites `stored`."""
    target, rest = exact.flatten(), stored.flatten()
    update, inner = float(torch.dot(target, target)), float(torch.dot(rest, target))
    miss = rest.sub_(target)
    return Survival(update, inner, float(torch.dot(miss, miss)))


def survival(base: torch.Tensor, delta: torch.Tensor, dtype: DType) -> Survival:
    """Measure what survives when `delta` is added to `base`, both float32 or float64, and the sum is rounded once to `dtype`."""
    exact = torch.promote_types(base.dtype, delta.dtype)
    before, update = base.to(exact), delta.to(exact)
    return measure_survival(update, (before + update).to(dtype.torch).to(exact).sub_(before))
