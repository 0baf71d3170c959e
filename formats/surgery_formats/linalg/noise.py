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

from surgery_formats.arrays import Array, cast, dtype_of, namespace, wide
from surgery_formats.dtypes import DType
from surgery_formats.linalg.survival import Survival

__all__ = [
    "MANTISSA",
    "NoiseTally",
    "Side",
    "noise_energy",
    "signal_count",
    "spacing",
    "survival",
    "variance",
]

MANTISSA = {DType.BF16: (7, -126), DType.F16: (10, -14), DType.F32: (23, -126), DType.F64: (52, -1022)}
"""Stored fraction bits, and the exponent of the smallest normal number, below which the spacing is constant."""
_POWER = {DType.F32: ("int32", 0x7F800000, -126), DType.F64: ("int64", 0x7FF0000000000000, -1022)}
"""Integer type of the same width, exponent mask, smallest normal exponent."""
_RELATIVE = 2.0**-20
"""Singular values below this share of the first are arithmetic noise: products are computed in float32."""

Side = tuple[Array, DType]
"""Stored values and their stored type (the tensor may be wider)."""


def spacing(values: Array, dtype: DType) -> Array:
    """Distance between each value and its neighbours in `dtype`: ``2^(floor(log2 |x|) - bits)``, in the same shape.

    The result is float64 for float64 values, otherwise float32, limited to its normal range; `dtype` is a float of 16 bits
    or more.
    """
    bits, smallest = MANTISSA[dtype]
    exact = cast(values, wide(dtype_of(values)))
    integer, mask, lowest = _POWER[dtype_of(exact)]
    exponents = exact.view(getattr(namespace(exact), integer)) & mask  # all other bits 0: 2^floor(log2 |x|)
    # never below the normal range of the arithmetic's own type
    least = max(smallest, lowest + bits) - lowest + 1
    spacings = exponents.clip(min=least << MANTISSA[dtype_of(exact)][0]).view(exact.dtype)
    spacings *= 2.0**-bits
    return spacings


def variance(*sides: Side) -> Array:
    """Variance of the rounding error of each element of a difference.

    `sides` are the rounded values, of equal shape: only those of TUNED if tuning started from BASE as stored; both if BASE
    was rounded from the same parent.
    """
    total: Array = 0.0
    for values, dtype in sides:
        total = total + spacing(values, dtype) ** 2
    total /= 12
    return total


def noise_energy(*sides: Side) -> float:
    """Expected squared Frobenius norm of the rounding error of a difference; `sides` as in `variance`."""
    variances = variance(*sides)
    xp = namespace(variances)
    return float(xp.sum(variances, dtype=xp.float64))


class NoiseTally:
    """Rounding noise of one matrix, collected block by block; no device synchronisation until the figures are read."""

    def __init__(self) -> None:
        self._cols: Array | None = None
        self._rows: list[Array] = []

    def add(self, *sides: Side) -> None:
        """Add rows, ``(rows, cols)``; `sides` as in `variance`."""
        variances = variance(*sides)
        xp = namespace(variances)
        self.add_sums(*(cast(xp.sum(variances, axis=axis), DType.F64) for axis in (1, 0)))

    def add_sums(self, rows: Array, cols: Array) -> None:
        """Add rows by their variances: the sum of each row, and of each column over these rows; float64."""
        if len(rows):
            self._cols = cols if self._cols is None else self._cols + cols
            self._rows.append(namespace(rows).stack([rows.max(), rows.sum()]))

    @property
    def energy(self) -> float:
        """Expected ``||noise||_F^2`` of the rows so far."""
        return math.fsum(self._figures(1))

    @property
    def edge(self) -> float:
        """The largest singular value that rounding alone would have."""
        if self._cols is None or not len(self._cols):
            return 0.0
        return math.sqrt(max(self._figures(0))) + math.sqrt(float(self._cols.max()))

    def _figures(self, which: int) -> list[float]:
        """The largest (0) or the sum (1) of the rows' variances in each block; waits for the device once."""
        figures: list[float] = namespace(*self._rows).stack(self._rows)[:, which].tolist() if self._rows else []
        return figures


def signal_count(values: Sequence[float], edge: float) -> int:
    """Count the singular `values` (descending) above the noise of the arithmetic and of storage (`NoiseTally.edge`)."""
    least = max(edge, values[0] * _RELATIVE) if values else edge
    return sum(value > least for value in values)


def survival(base: Array, delta: Array, dtype: DType) -> Survival:
    """Measure what survives when `delta` is added to `base`, both float32 or float64, and the sum is rounded once to `dtype`."""
    total = base + delta
    exact = dtype_of(total)
    stored = cast(cast(total, dtype), exact)
    stored -= base
    return Survival.of(cast(delta, exact), stored)
