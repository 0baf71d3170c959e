# SPDX-License-Identifier: Apache-2.0
"""Measures pairs of tensors while their differences are computed, on the same device.

The rounding in a difference is estimated as in `surgery_formats.linalg.noise`, from the rows that differ; equal rows
contain none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from surgery.extraction.pairing import not_finite
from surgery_formats.arrays import Array, assign, cast, dtype_of, is_torch, namespace, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.linalg.noise import MANTISSA, NoiseTally
from surgery_formats.linalg.panel import squares
from surgery_formats.storage.base import Storage
from surgery_formats.storage.quantised import is_coded

__all__ = ["MEASURED", "PairMeasure", "Tally", "measure_stack", "same_bits"]

MEASURED = 1 << 26
"""Elements of a stack that are measured at a time: what is worked out from them takes four times their memory."""
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
        ulp: Median of TUNED's spacing; 0 where it is stored as codes.
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
        self._sides, self._limit = (base, tuned), row_limit
        self._step = _sampling(rows * tuned.shape[1])
        self._numel = self._told = 0
        self._sums: list[Array] = []
        self._exponents: Array | None = None
        self._hit: list[Array] = []

    def subtract(self, first: int, old: Array, new: Array, difference: Array, noise: NoiseTally | None) -> None:
        """Fill `difference`, float32 or float64, with ``new - old``, and add it to the sums.

        `old` and `new` are rows as stored, from row `first` of the tensor; `noise` is the tally of the matrix that they
        are part of.
        """
        self._numel += math.prod(new.shape)
        if not is_torch(new) and same_bits(old, new):
            assign(difference, new)
            with numpy.errstate(invalid="ignore"):
                difference -= difference  # zeros, or NaN where there is one
            self._equal(difference)
            return
        sums = _subtract(old, new, difference, self._sides[1].dtype, slice(-first % self._step, None, self._step))
        counted = _histogram(sums.exponents[None, ...], difference)[0, ...]
        self._exponents = counted if self._exponents is None else self._exponents + counted
        self._sums.append(sums.totals)
        if noise is not None:
            noise.add_sums(sums.rows / 12, sums.cols / 12)
        if self._limit:
            self._hit.append(sums.moved)

    def _equal(self, zeros: Array) -> None:
        if not math.isfinite(float(zeros.sum())):
            raise not_finite(*self._sides)
        if self._limit:
            self._hit.append(numpy.zeros(len(zeros), numpy.bool_))

    def news(self) -> tuple[float, bool]:
        """``(||D||_F^2, whether any value differs)`` of the blocks since the last call; waits for the device.

        Raises:
            FitError: NaN or Inf on one side.
        """
        fresh, self._told = self._sums[self._told :], len(self._sums)
        if not fresh:
            return 0.0, False
        energy, moved, _ = _total(fresh)
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
        named: tuple[int, ...] = ()
        if self._limit:
            numbers = numpy.nonzero(numpy.concatenate([to_cpu(hit) for hit in self._hit]))[0]
            named = tuple(numbers.tolist()) if len(numbers) <= self._limit else ()
        return _measure(self._sides, self._numel, _total(self._sums), to_cpu(self._exponents), named)


def measure_stack(
    base: Array, tuned: Array, difference: Array, sides: Sequence[tuple[Storage, Storage]]
) -> tuple[list[PairMeasure], list[float]]:
    """Fill `difference` with ``tuned - base``, and measure every matrix of the stacks ``(count, n, cols)``; waits once.

    `sides` are BASE's and TUNED's weights, of one stored type. The second list has the largest singular value that
    rounding alone would have, as `NoiseTally.edge`.

    Raises:
        FitError: NaN or Inf on one side.
    """
    count, rows, cols = tuned.shape
    xp, step = namespace(difference), max(1, MEASURED // (rows * cols))
    found = []
    for at in range(0, count, step):
        part = slice(at, at + step)
        sampled = slice(None, None, _sampling(rows * cols))
        sums = _subtract(base[part, ...], tuned[part, ...], difference[part, ...], sides[0][1].dtype, sampled)
        largest = [xp.max(variances, axis=-1) / 12 for variances in (sums.rows, sums.cols)]
        counted = cast(_histogram(sums.exponents, difference), DType.F64)
        found.append(xp.concat([sums.totals, xp.stack(largest, axis=-1), counted], axis=-1))
    figures = to_cpu(xp.concat(found))
    edges = numpy.sqrt(figures[:, 3:5]).sum(axis=1).tolist()
    measures = [
        _measure(pair, rows * cols, own[:3].tolist(), own[5:]) for pair, own in zip(sides, figures, strict=True)
    ]
    return measures, edges


class _Sums(NamedTuple):
    """Sums over rows ``(..., n, cols)`` of a difference, float64.

    Attributes:
        totals: ``(..., 3)``: ``||D||_F^2``, the number of values that differ, and the sum of `rows`.
        moved: Whether each row differs, ``(..., n)``.
        rows: Sum of TUNED's squared spacings in each row that differs, ``(..., n)``.
        cols: The same of each column, ``(..., cols)``.
        exponents: Biased binary exponents of TUNED's spacing, ``(..., k, cols)``, in a sample of the rows; 0 in those
            that do not differ.
    """

    totals: Array
    moved: Array
    rows: Array
    cols: Array
    exponents: Array


_INTEGER = {DType.F32: ("int32", 0x7F800000, 23, 127), DType.F64: ("int64", 0x7FF0000000000000, 52, 1023)}
"""Type of the same width, mask of the exponent, number of bits below it, bias."""


def _subtract(old: Array, new: Array, difference: Array, dtype: DType, sampled: slice) -> _Sums:
    """Fill `difference` with ``new - old``, and sum; `dtype` is the stored type of `new`."""
    xp, exact = namespace(difference), dtype_of(difference)
    integer, mask, below, bias = _INTEGER[exact]
    bits, smallest = MANTISSA[dtype]
    lowest = max(smallest, 1 - bias + bits)  # the least power of two whose spacing is a normal number
    with numpy.errstate(over="ignore", invalid="ignore"):  # seen in the sums
        assign(difference, new)
        powers = difference.view(getattr(xp, integer)) & mask  # the exponent alone: 2^floor(log2 |x|)
        if 2 * lowest > 1 - bias - below:  # of float16; smaller squares vanish, and clipping takes long
            powers = powers.clip(min=(lowest + bias) << below)
        difference -= cast(old, exact)
        differs = difference != 0
        moved = xp.any(differs, axis=-1)
        exponents = (powers[..., sampled, :] >> below).clip(min=lowest + bias) * moved[..., sampled, None]
        spacings, scale = powers.view(difference.dtype), 4.0**-bits
        rows = cast(squares(spacings), DType.F64) * moved * scale
        spacings *= spacings
        cols = cast((cast(moved, exact)[..., None, :] @ spacings)[..., 0, :], DType.F64) * scale
        energy = xp.sum(cast(squares(difference), DType.F64), axis=-1)
        count = cast(_count(differs), DType.F64)
        return _Sums(xp.stack([energy, count, xp.sum(rows, axis=-1)], axis=-1), moved, rows, cols, exponents)


def _count(flags: Array) -> Array:
    """Number of true values among the last two axes."""
    if flags.ndim == 2 and not is_torch(flags):
        return numpy.asarray(numpy.count_nonzero(flags))  # numpy's own is many times faster over a whole array
    return namespace(flags).count_nonzero(flags, axis=(-2, -1))


def _histogram(exponents: Array, difference: Array) -> Array:
    """How often each biased exponent occurs in every matrix, ``(count, bins)``."""
    count, bins = len(exponents), 2 * _INTEGER[dtype_of(difference)][3] + 2
    if is_torch(exponents):
        import torch  # the standard has no bincount

        first = torch.arange(count, device=exponents.device, dtype=exponents.dtype) * bins
        numbered = exponents + first[:, None, None]
        return torch.bincount(numbered.reshape(-1), minlength=count * bins).reshape(count, bins)
    return numpy.stack([numpy.bincount(own.reshape(-1), minlength=bins) for own in exponents])


def _sampling(numel: int) -> int:
    return _SAMPLE if numel > _LARGE else 1


def _total(sums: Sequence[Array]) -> list[float]:
    xp = namespace(*sums)
    totals: list[float] = xp.sum(xp.stack(sums), axis=0).tolist()
    return totals


def _measure(
    sides: tuple[Storage, Storage],
    numel: int,
    totals: Sequence[float],
    exponents: numpy.ndarray,
    named: tuple[int, ...] = (),
) -> PairMeasure:
    energy, moved, noise = totals
    if not (math.isfinite(energy) and math.isfinite(noise)):  # squares of values beyond 1e19
        raise not_finite(*sides)
    counts = exponents.copy()
    counts[0] = 0  # rows that do not differ
    middle = int((counts.cumsum() * 2 < counts.sum()).sum())
    power = middle - (len(counts) - 2) // 2 - MANTISSA[sides[1].dtype][0]
    coded = is_coded(sides[1])  # its spacing is not that of its type
    ulp = math.ldexp(1.0, power) if counts.any() and not coded else 0.0
    return PairMeasure(moved > 0, energy, named, numel, int(moved), ulp, noise / 12)


def same_bits(old: numpy.ndarray, new: numpy.ndarray) -> bool:
    """Whether two arrays of one shape have one type and the same bits, of NaN too."""
    bits = f"u{old.itemsize}"
    return old.dtype == new.dtype and numpy.array_equal(old.view(bits), new.view(bits))
