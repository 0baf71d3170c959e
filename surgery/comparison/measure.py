# SPDX-License-Identifier: Apache-2.0
"""How far the values of two storages of one shape lie apart, and how well codes stand for the values beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from surgery.comparison.entries import Values
from surgery_formats.arrays import Array, cast, energy
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Storage, is_contiguous, read_block
from surgery_formats.storage.quantised import Quantised, is_coded, is_quantised

__all__ = ["CodeTotals", "measure"]

_CACHED = 1 << 16  # elements that are compared at a time: every pass over them is one over the cache


@dataclass(slots=True)
class CodeTotals:
    """Sums over weights that one side stores as codes and the other does not; norms are of the other side's values.

    Attributes:
        weights: How many.
        numel: Numbers in them.
        error: ``||coded - other||_F``.
        rounding: ``||nearest - other||_F``, with the nearest codes on the scales that are stored.
        norm: ``||other||_F``.
        nearest: Numbers whose code is the nearest.
    """

    weights: int = 0
    numel: int = 0
    error: float = 0.0
    rounding: float = 0.0
    norm: float = 0.0
    nearest: int = 0

    def plus(self, more: CodeTotals) -> CodeTotals:
        """The sums of both."""
        return CodeTotals(
            self.weights + more.weights,
            self.numel + more.numel,
            math.hypot(self.error, more.error),
            math.hypot(self.rounding, more.rounding),
            math.hypot(self.norm, more.norm),
            self.nearest + more.nearest,
        )


def measure(mine: Storage, theirs: Storage, codes: CodeTotals) -> Values:
    """One pass over both, in float32 where that holds every value of the types, sums in float64.

    `codes` gets the sums of the side that is stored as codes, if just one is.
    """
    import numpy

    half = (DType.BF16, DType.F16, DType.F8_E4M3, DType.F8_E5M2)
    dtype = DType.F32 if mine.dtype in half and theirs.dtype in half else DType.F64
    greatest = difference = norm = 0.0
    moved = strange = rows = 0
    coded = _coded(mine, theirs)
    for start, left, right in _blocks(mine, theirs, dtype):
        differs = left != right
        size = _norm(left)
        if not (math.isfinite(size) and math.isfinite(_norm(right))):
            finite = numpy.isfinite(left) & numpy.isfinite(right)
            differs &= ~(numpy.isnan(left) & numpy.isnan(right))
            strange += finite.size - int(numpy.count_nonzero(finite))
            left, right = numpy.where(finite, left, 0.0), numpy.where(finite, right, 0.0)
            size = _norm(left)
        moved += int(numpy.count_nonzero(differs))
        rows += int(numpy.count_nonzero(differs.any(axis=1)))
        apart = right - left
        if apart.size:
            greatest = max(greatest, float(apart.max()), -float(apart.min()))
        difference, norm = math.hypot(difference, _norm(apart)), math.hypot(norm, size)
        if coded is not None:
            values = right if coded is mine else left
            _note_codes(codes, coded, start, values, _norm(apart))
    relative = difference / norm if norm else (0.0 if difference == 0 else math.inf)
    numel = math.prod(mine.shape)
    found = Values(greatest, relative, moved / numel if numel else 0.0, strange, difference, norm, rows=rows)
    if coded is None or not codes.numel:
        return found
    codes.weights = 1
    rounding = codes.rounding / norm if norm else 0.0
    return Values(
        greatest, relative, found.moved, strange, difference, norm, None, rounding, codes.nearest / codes.numel, rows
    )


def _blocks(mine: Storage, theirs: Storage, dtype: DType) -> Iterator[tuple[int, Array, Array]]:
    rows, width = mine.shape
    step = max(1, _CACHED // max(width, 1))
    kept = [None if is_contiguous(side) else read_block(side, 0, rows) for side in (mine, theirs)]
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        left, right = (
            cast(read_block(side, start, stop) if whole is None else whole[start:stop], dtype)
            for side, whole in zip((mine, theirs), kept, strict=True)
        )
        yield start, left, right


def _coded(mine: Storage, theirs: Storage) -> Quantised | None:
    """The side that is stored as codes, if the other is stored as elements."""
    for one, other in ((mine, theirs), (theirs, mine)):
        if is_quantised(one) and not is_coded(other) and other.is_float:
            return one
    return None


def _note_codes(totals: CodeTotals, coded: Quantised, start: int, values: Array, error: float) -> None:
    import numpy

    stop = start + len(values)
    grid, codes = coded.grid(start, stop), coded.codes(start, stop)
    wanted = cast(values, DType.F32)
    best = grid.values(grid.nearest(wanted))
    own = grid.values(codes)
    totals.numel += values.size
    totals.error = math.hypot(totals.error, error)
    totals.norm = math.hypot(totals.norm, _norm(values))
    totals.rounding = math.hypot(totals.rounding, _norm(cast(best, DType.F64) - values))
    totals.nearest += int(numpy.count_nonzero(abs(own - wanted) <= abs(best - wanted)))


def _norm(values: Array) -> float:
    return math.sqrt(energy(cast(values, DType.F64)))
