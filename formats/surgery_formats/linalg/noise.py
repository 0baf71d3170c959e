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

from surgery_formats.arrays import Array, cast, dtype_of, namespace
from surgery_formats.dtypes import DType
from surgery_formats.linalg.panel import squares
from surgery_formats.linalg.survival import Survival

__all__ = ["MANTISSA", "NoiseTally", "signal_count", "survival", "survival_sums"]

MANTISSA = {DType.BF16: (7, -126), DType.F16: (10, -14), DType.F32: (23, -126), DType.F64: (52, -1022)}
"""Stored fraction bits, and the exponent of the smallest normal number, below which the spacing is constant."""
_RELATIVE = 2.0**-20
"""Singular values below this share of the first are arithmetic noise: products are computed in float32."""


class NoiseTally:
    """Rounding noise of one matrix, collected block by block; no device synchronisation until the figures are read."""

    def __init__(self) -> None:
        self._cols: Array | None = None
        self._rows: list[Array] = []

    def add_sums(self, rows: Array, cols: Array) -> None:
        """Add rows by their variances: the sum of each row, and of each column over these rows; float64."""
        if len(rows):
            self._cols = cols if self._cols is None else self._cols + cols
            self._rows.append(namespace(rows).stack([rows.max(), rows.sum()]))

    @property
    def energy(self) -> float:
        """Expected ``||noise||_F^2`` of the rows so far."""
        return float(namespace(self._cols).stack(self._rows)[:, 1].sum()) if self._rows else 0.0

    @property
    def edge(self) -> float:
        """The largest singular value that rounding alone would have."""
        if self._cols is None or not len(self._cols):
            return 0.0
        xp = namespace(self._cols)
        row, col = xp.stack([xp.stack(self._rows)[:, 0].max(), self._cols.max()]).tolist()
        return math.sqrt(row) + math.sqrt(col)


def signal_count(values: Sequence[float], edge: float) -> int:
    """Count the singular `values` (descending) above the noise of the arithmetic and of storage (`NoiseTally.edge`)."""
    least = max(edge, values[0] * _RELATIVE) if values else edge
    return sum(value > least for value in values)


def survival(base: Array, delta: Array, dtype: DType) -> Survival:
    """Measure what survives when `delta` is added to `base`, both float32 or float64, and the sum is rounded once to `dtype`."""
    return Survival(*survival_sums(base, delta, dtype).tolist())


def survival_sums(base: Array, delta: Array, dtype: DType) -> Array:
    """The three sums of `survival`, ``(..., 3)``, of stacks ``(..., rows, cols)``; waits for no device."""
    total, xp = base + delta, namespace(base)
    exact = dtype_of(total)
    update = cast(delta, exact)
    stored = cast(cast(total, dtype), exact)
    stored -= base
    inner = xp.linalg.vecdot(stored, update)
    stored -= update
    sums = (cast(part, DType.F64) for part in (squares(update), inner, squares(stored)))
    return xp.stack([xp.sum(part, axis=-1) for part in sums], axis=-1)
