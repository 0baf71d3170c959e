# SPDX-License-Identifier: Apache-2.0
"""What storing numbers in few bits does to a difference: how much of it is rounding, which directions are, and what survives a merge.

Rounding to nearest a value whose neighbours in the stored type lie `ulp` apart adds an error of variance ``ulp^2 / 12``, independent of
other values as long as the change is not much smaller than `ulp`; below about one `ulp` the quantiser has a dead zone, the error is
correlated with the change, and survival falls. The largest singular value of a matrix of independent errors is at most about
``max_i sqrt(sum_j var_ij) + max_j sqrt(sum_i var_ij)`` (Bandeira and van Handel 2016, arXiv:1408.6185): singular values above that edge
are change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surgery_formats.dtypes import DType
from surgery_formats.linalg.survival import Survival

__all__ = ["MANTISSA", "NoiseTally", "Side", "kept", "noise_energy", "signal_count", "spacing", "survival", "variance"]

MANTISSA = {DType.BF16: (7, -126), DType.F16: (10, -14), DType.F32: (23, -126), DType.F64: (52, -1022)}
"""Stored bits of the fraction; exponent of the smallest normal number, below which the spacing stays."""
_POWER = {torch.float32: (torch.int32, 0x7F800000, -126), torch.float64: (torch.int64, 0x7FF0000000000000, -1022)}
"""Type of the bits, those of the exponent, smallest normal exponent."""
_RELATIVE = 2.0**-20
"""Singular values smaller than this share of the first are arithmetic, not change: products are made in float32."""

Side = tuple[torch.Tensor, DType]
"""Stored values and the type they are stored in (the tensor may be wider)."""


def spacing(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Distance of the neighbours of each value in `dtype`, of the same shape: ``2^(floor(log2 |x|) - bits)``.

    Args:
        values: Of any floating dtype; the answer is float64 for float64, else float32, which has no spacing below its smallest normal.
        dtype: BF16, F16, F32 or F64.
    """
    bits, smallest = MANTISSA[dtype]
    wide = values if values.dtype in _POWER else values.float()
    integer, mask, lowest = _POWER[wide.dtype]
    power = wide.view(integer).bitwise_and(mask).view(wide.dtype)  # the exponent alone: 2^floor(log2 |x|)
    # never below what the arithmetic's own type can hold
    return power.clamp_(min=2.0 ** max(smallest, lowest + bits)).mul_(2.0**-bits)


def variance(*sides: Side) -> torch.Tensor:
    """Of the rounding error of each element of a difference.

    Args:
        sides: The stored values of equal shape that were rounded, each from something finer: TUNED's alone where tuning began at BASE as
            stored, both where BASE was rounded from the same parent.
    """
    made = spacing(*sides[0]).square_()
    for values, dtype in sides[1:]:
        made += spacing(values, dtype).square_()
    return made.div_(12)


def noise_energy(*sides: Side) -> float:
    """Expected squared Frobenius norm of the rounding error of a difference; `sides` as in `variance`."""
    return float(variance(*sides).sum(dtype=torch.float64))


class NoiseTally:
    """Rounding noise of one matrix, whose stored rows come block by block. Nothing waits for a device before the figures are asked for."""

    def __init__(self) -> None:
        self._cols: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []

    def add(self, *sides: Side) -> None:
        """Further rows, ``(rows, cols)``; `sides` as in `variance`."""
        found = variance(*sides)
        self.add_sums(found.sum(dim=1).double(), found.sum(dim=0).double())

    def add_sums(self, rows: torch.Tensor, cols: torch.Tensor) -> None:
        """Variances of further rows: the sum of each row, and of all of them by columns; float64."""
        if len(rows):
            self._cols = cols if self._cols is None else self._cols + cols
            self._rows.append(torch.stack([rows.max(), rows.sum()]))

    @property
    def energy(self) -> float:
        """Expected ``||noise||_F^2`` of the rows so far."""
        return float(torch.stack(self._rows)[:, 1].sum()) if self._rows else 0.0

    @property
    def edge(self) -> float:
        """Largest singular value that rounding alone would have."""
        if self._cols is None or not len(self._cols):
            return 0.0
        row, col = torch.stack([torch.stack(self._rows)[:, 0].max(), self._cols.max()]).tolist()
        return math.sqrt(row) + math.sqrt(col)


def signal_count(values: Sequence[float], edge: float) -> int:
    """How many singular values are above the rounding of storage, and of the arithmetic that found them.

    Args:
        values: Descending.
        edge: Of storage (`NoiseTally.edge`).
    """
    least = max(edge, values[0] * _RELATIVE) if values else edge
    return sum(value > least for value in values)


def kept(wanted: torch.Tensor, stored: torch.Tensor) -> Survival:
    """Of an update and of what was stored of it, both flat or of equal shape and type; `stored` is used up."""
    one, other = wanted.flatten(), stored.flatten()
    update, both = float(torch.dot(one, one)), float(torch.dot(other, one))
    miss = other.sub_(one)
    return Survival(update, both, float(torch.dot(miss, miss)))


def survival(base: torch.Tensor, delta: torch.Tensor, dtype: DType) -> Survival:
    """What is kept when `delta` is added to `base` and the sum rounded once to `dtype`, in the values at hand.

    Args:
        base: As stored, in float32 or float64.
        delta: The exact update, likewise.
        dtype: The stored type.
    """
    exact = torch.promote_types(base.dtype, delta.dtype)
    before, wanted = base.to(exact), delta.to(exact)
    return kept(wanted, (before + wanted).to(dtype.torch).to(exact).sub_(before))
