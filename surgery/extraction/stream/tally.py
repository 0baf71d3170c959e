# SPDX-License-Identifier: Apache-2.0
"""Measures a pair of tensors while their difference is computed, on the same device.

The rounding in the difference is estimated as in `surgery_formats.linalg.noise`, from the rows that differ; equal rows
contain none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from surgery.extraction.pairing import not_finite
from surgery_formats.linalg.noise import MANTISSA, NoiseTally
from surgery_formats.storage.base import Storage

__all__ = ["PairMeasure", "Tally"]

_SAMPLE = 8  # of a large tensor one row of eight is looked at for the median spacing
_LARGE = 1 << 19  # elements


@dataclass(frozen=True, slots=True)
class PairMeasure:
    """Measurements of one pair, over the rows that both sides have.

    Attributes:
        changed: Whether any value differs.
        energy: ``||D||_F^2``.
        rows: Numbers of the rows that differ; empty if there are more than the limit, or if they were not requested.
        numel: Values compared.
        moved: Number of values that differ.
        ulp: Median of TUNED's spacing.
        noise: Expected energy of storage rounding, ``sum ulp^2 / 12``.
    """

    changed: bool
    energy: float = 0.0
    rows: tuple[int, ...] = ()
    numel: int = 0
    moved: int = 0
    ulp: float = 0.0
    noise: float = 0.0

    @property
    def rms_ulp(self) -> float:
        """Root mean square of the change in units of TUNED's median spacing."""
        return math.sqrt(self.energy / self.numel) / self.ulp if self.numel and self.ulp else 0.0

    @property
    def moved_share(self) -> float:
        """Share of values that differ."""
        return self.moved / self.numel if self.numel else 0.0


class Tally:
    """Sums over the blocks of one pair. Only `news` and `result` wait for a GPU.

    Args:
        base: BASE's tensor as a matrix.
        tuned: TUNED's tensor as a matrix.
        rows: Number of stored rows that both have.
        row_limit: Greatest number of differing rows to name; 0 names none.
    """

    def __init__(self, base: Storage, tuned: Storage, rows: int, row_limit: int = 0) -> None:
        self._sides, self._rows, self._limit = (base, tuned), rows, row_limit
        self._dtype = tuned.dtype
        self._step = _SAMPLE if rows * tuned.shape[1] > _LARGE else 1
        self._numel = self._told = 0
        self._sums: list[torch.Tensor] = []
        self._exponents: torch.Tensor | None = None
        self._hit: list[torch.Tensor] = []

    def subtract(
        self, first: int, old: torch.Tensor, new: torch.Tensor, difference: torch.Tensor, noise: NoiseTally | None
    ) -> None:
        """Fill `difference`, float32 or float64, with ``new - old``, and add it to the sums.

        `old` and `new` are rows as stored, from row `first` of the tensor; `noise` is the tally of the matrix that they
        are part of.
        """
        self._numel += new.numel()
        if old.dtype == new.dtype and old.device.type == "cpu" and torch.equal(_bits(old), _bits(new)):
            difference.copy_(new).sub_(difference)  # zeros, or NaN where there is one
            self._equal(new, difference)
            return
        difference.copy_(new)
        powers = _exponent_bits(difference)
        spacings = powers.view(difference.dtype)
        sampled = slice(-first % self._step, None, self._step)
        exponents = powers[sampled] >> _FRACTION[difference.element_size()]
        difference.sub_(old.to(difference.dtype))
        norms = torch.linalg.vector_norm(difference, dim=1)
        differing = difference.sign().abs_().sum(1)  # twice as fast as count_nonzero
        moved = differing > 0  # not the norm, which is 0 below 1e-23
        bits, smallest = MANTISSA[self._dtype]
        lowest = max(smallest, -126 + bits) if difference.dtype == torch.float32 else smallest
        bias = 127 if difference.dtype == torch.float32 else 1023
        exponents = exponents.clamp_(min=lowest + bias).mul_(moved[sampled, None])
        counted = torch.bincount(exponents.flatten(), minlength=2 * bias + 2)
        self._exponents = counted if self._exponents is None else self._exponents + counted
        spacings.clamp_(min=2.0**lowest).square_()
        rows = spacings.sum(1).double().mul_(moved).mul_(4.0**-bits)
        if noise is not None:
            noise.add_sums(rows / 12, (moved.to(spacings.dtype) @ spacings).double().mul_(4.0**-bits / 12))
        energy = norms.double().square_().sum()
        self._sums.append(torch.stack([energy, differing.double().sum(), rows.sum()]))
        if self._limit:
            self._hit.append(moved)

    def _equal(self, new: torch.Tensor, zeros: torch.Tensor) -> None:
        if new.numel() and not math.isfinite(float(zeros.sum())):
            raise not_finite(*self._sides)
        if self._limit:
            self._hit.append(torch.zeros(len(new), dtype=torch.bool))

    def news(self) -> tuple[float, bool]:
        """``(||D||_F^2, whether any value differs)`` of the blocks since the last call; waits for the device.

        Raises:
            FitError: NaN or Inf on one side.
        """
        fresh, self._told = self._sums[self._told :], len(self._sums)
        if not fresh:
            return 0.0, False
        energy, moved, _ = torch.stack(fresh).sum(0).tolist()
        if not math.isfinite(energy):
            raise not_finite(*self._sides)
        return energy, moved > 0

    def result(self) -> PairMeasure:
        """All measurements, after the last block.

        Raises:
            FitError: NaN or Inf on one side.
        """
        if not self._sums:
            return PairMeasure(False, numel=self._numel)
        energy, moved, noise = torch.stack(self._sums).sum(0).tolist()
        if not (math.isfinite(energy) and math.isfinite(noise)):  # squares of values beyond 1e19
            raise not_finite(*self._sides)
        named: tuple[int, ...] = ()
        if self._limit:
            numbers = torch.nonzero(torch.cat(self._hit).cpu()).flatten()
            named = tuple(numbers.tolist()) if len(numbers) <= self._limit else ()
        return PairMeasure(moved > 0, energy, named, self._numel, int(moved), self._ulp(), noise / 12)

    def _ulp(self) -> float:
        assert self._exponents is not None
        counts = self._exponents.cpu()
        counts[0] = 0  # rows that do not differ
        middle = int((counts.cumsum(0) * 2 < counts.sum()).sum())
        bias = 127 if len(counts) == 256 else 1023
        return math.ldexp(1.0, middle - bias - MANTISSA[self._dtype][0]) if int(counts.sum()) else 0.0


_FRACTION = {4: 23, 8: 52}
_EXPONENT = {4: 0x7F800000, 8: 0x7FF0000000000000}


def _exponent_bits(values: torch.Tensor) -> torch.Tensor:
    """The exponent's bits alone; seen as numbers, ``2^floor(log2 |x|)``."""
    return _bits(values) & _EXPONENT[values.element_size()]


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
