# SPDX-License-Identifier: Apache-2.0
"""Factors of a merged update, beyond the rounding of the merge.

A value that was stored says more than its number: the exact sum lies in its cell, between the middles to its neighbours.
The factors of least squares miss many cells. Here rows of one factor and columns of the other are solved for in turn, each
by least squares over the cells that are missed alone (Newton's method for the distance to the cells), in units of their
widths, until hardly any is missed. With enough values for each number of the factors what is left is far below rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy

from surgery.engine.undo.residue import LINE
from surgery.extraction.factorise import FactorisedMatrix, TargetFactors, row_lengths
from surgery.extraction.pairing import BLOCK_ELEMENTS, Delta
from surgery.extraction.storage_plan import StoragePlan
from surgery.extraction.stream.lanes import in_threads
from surgery.extraction.stream.scratch import Workspace
from surgery.extraction.targets import LowRankTarget
from surgery_formats.arrays import Array, cast, energy
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import read_block, read_values

__all__ = ["Refinement", "refine"]

_SWEEPS = 20
_ENOUGH = 1e-4  # further cells that a sweep must reach
_SHRUNK = 0.93  # of a cell's half width: what only just reaches a cell is pushed out by the next step
_RIDGE = 1e-3  # of the mean curvature: where few cells are missed, little is known


@dataclass(frozen=True, slots=True)
class Refinement:
    """What came of it.

    Attributes:
        factored: The better factors, by target path.
        plain: Share of TUNED's values that BASE with the plain factors rounds to.
        refined: The same with the better ones.
    """

    factored: Mapping[str, TargetFactors]
    plain: float
    refined: float


def refine(
    storage: StoragePlan, factored: Mapping[str, TargetFactors], ranks: Mapping[str, int], workspace: Workspace
) -> Refinement:
    """Fit the factors of every target that is stored in 16 bits to the cells of TUNED's values.

    Args:
        storage: Of the extraction.
        factored: The plain factors, by target path.
        ranks: By target path.
        workspace: Where factors are computed and kept.
    """
    targets = [target for target in storage.targets if ranks[target.path] and all(map(_has_cells, target.deltas))]

    def better(target: LowRankTarget) -> tuple[TargetFactors, float, float, int]:
        return _better(factored[target.path], ranks[target.path], workspace)

    found = in_threads(better, targets, workspace.workers)
    count = sum(numel for *_, numel in found)
    plain = sum(inside * numel for _, inside, _, numel in found) / count if count else 0.0
    refined = sum(inside * numel for _, _, inside, numel in found) / count if count else 0.0
    return Refinement({target.path: one for target, (one, *_) in zip(targets, found, strict=True)}, plain, refined)


def _has_cells(delta: Delta) -> bool:
    return all(
        strip.tuned.elements is not None and strip.tuned.dtype in (DType.BF16, DType.F16) and strip.base.is_float
        for strip in delta.strips
    )


def _better(plain: TargetFactors, rank: int, workspace: Workspace) -> tuple[TargetFactors, float, float, int]:
    """The factors of a target; the shares of its cells that were and are reached, and their number."""
    matrices: list[FactorisedMatrix] = []
    before = after = 0.0
    total = 0
    for index, (delta, matrix) in enumerate(zip(plain.target.deltas, plain.matrices, strict=True)):
        left, right = (numpy.ascontiguousarray(side) for side in plain.factors(index, rank))
        sides = (right.T, left.T) if delta.transposed else (left, right)
        fitted = _fit(delta, *(cast(numpy.ascontiguousarray(side), DType.F64) for side in sides))
        before, after, total = (
            before + fitted.first * delta.numel,
            after + fitted.reached * delta.numel,
            total + delta.numel,
        )
        rows, cols = cast(fitted.rows, DType.F32), cast(fitted.cols, DType.F32)
        out_side, in_side = (cols, rows.T) if delta.transposed else (rows.T, cols)
        matrices.append(
            replace(
                matrix,
                left=workspace.scratch.put(numpy.ascontiguousarray(out_side)),
                right=workspace.scratch.put(numpy.ascontiguousarray(in_side)),
                values=tuple(sorted(row_lengths(rows.T, cols), reverse=True)),
                rest=fitted.left_energy,
                bound=max(
                    matrix.bound, (fitted.left_energy / least) ** 0.5 if (least := matrix.residual(rank)) > 0 else 1.0
                ),
                fold=1.0,
                left_energy=None,
                sample=None,
            )
        )
    return TargetFactors(plain.target, tuple(matrices)), before / max(total, 1), after / max(total, 1), total


@dataclass(frozen=True, slots=True)
class _Fitted:
    """Factors ``rows @ cols`` of a stored matrix, and the shares of its cells that the first and these reach."""

    rows: Array
    cols: Array
    first: float
    reached: float
    left_energy: float


@dataclass(frozen=True, slots=True)
class _Cells:
    """Some rows: the values before, and the cells of those after as centres and half widths, all float32."""

    at: slice
    before: Array
    centre: Array
    half: Array


def _fit(delta: Delta, rows: Array, cols: Array) -> _Fitted:
    """Fit ``rows (m, r) @ cols (r, n)``, float64."""
    unit = _typical(delta)
    best, first, reached = (rows, cols), 0.0, -1.0
    for sweep in range(_SWEEPS + 1):
        count, sums = 0, _FactorSums(cols.shape)
        solved = numpy.empty_like(rows)
        for cells in _cells(delta):
            missed, weights, hit = _missed(cells, rows, cols, unit)
            count += hit
            solved[cells.at] = rows[cells.at] + _solve(weights, missed, cols)
        share = count / delta.numel
        first = share if not sweep else first
        gained = share - reached
        if gained > 0:
            best, reached = (rows, cols), share
        if sweep == _SWEEPS or gained < _ENOUGH:
            break
        basis, mixed = numpy.linalg.qr(solved)
        rows, cols = basis, mixed @ cols
        for cells in _cells(delta):
            missed, weights, _ = _missed(cells, rows, cols, unit)
            sums.add(weights, missed, rows[cells.at])
        cols = cols + sums.solution()
    left, mixed = numpy.linalg.qr(best[0])
    inner, values, right = numpy.linalg.svd(mixed @ best[1], full_matrices=False)
    roots = numpy.sqrt(values)
    rows, cols = (left @ inner) * roots, roots[:, None] * right
    rest = sum(energy(delta.rows(c.at.start, c.at.stop) - rows[c.at] @ cols) for c in _cells(delta))
    return _Fitted(rows, cols, first, reached, rest)


def _typical(delta: Delta) -> float:
    """The width of the cells in the first rows: weights are in its unit."""
    return float(numpy.median(next(_cells(delta)).half)) or 1.0


def _cells(delta: Delta) -> Iterator[_Cells]:
    """Blocks of stored rows."""
    at = 0
    for strip in delta.strips:
        line, dtype = LINE(strip.tuned.dtype), strip.tuned.dtype
        step = max(1, BLOCK_ELEMENTS // max(strip.tuned.shape[1], 1))
        for start in range(strip.first, strip.last, step):
            stop = min(start + step, strip.last)
            stored = read_block(strip.tuned, start, stop)
            order = line.order(stored.view(line.unsigned))
            value = cast(stored, DType.F32)
            low, high = ((value + cast(line.bits(order + side).view(dtype.numpy), DType.F32)) / 2 for side in (-1, 1))
            low, high = (numpy.where(numpy.isfinite(edge), edge, value) for edge in (low, high))
            before = read_values(strip.base, start, stop, DType.F32)
            yield _Cells(slice(at, at + stop - start), before, (low + high) / 2, (high - low) / 2)
            at += stop - start


def _missed(cells: _Cells, rows: Array, cols: Array, unit: float) -> tuple[Array, Array, int]:
    """How far to go to each cell, the weights of those that are missed, and how many are reached."""
    away = rows[cells.at].astype(numpy.float32) @ cols.astype(numpy.float32)
    away += cells.before
    away -= cells.centre
    reached = int((abs(away) <= cells.half).sum())
    inner = cells.half * numpy.float32(_SHRUNK)
    missed = numpy.clip(away, -inner, inner) - away
    weights = numpy.float32(unit) / numpy.maximum(cells.half, numpy.float32(unit * 1e-2))
    weights *= missed != 0
    return missed, weights, reached


def _pairs(side: Array) -> Array:
    """Products of every two of the r directions of ``(r, n)``, as ``(r (r + 1) / 2, n)`` in float32."""
    first, second = numpy.triu_indices(len(side))
    products: Array = (side[first] * side[second]).astype(numpy.float32)
    return products


def _solve(weights: Array, missed: Array, cols: Array) -> Array:
    """For each row x of a block, the step of least ``sum_j w_j (x . cols_j - missed_j)^2``."""
    return _solved(weights @ _pairs(cols).T, (weights * missed) @ cols.T.astype(numpy.float32), len(cols))


class _FactorSums:
    """The same for columns, whose sums run over all blocks."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._rank, n = shape
        self._curvature = numpy.zeros((n, self._rank * (self._rank + 1) // 2))
        self._slope = numpy.zeros((n, self._rank))

    def add(self, weights: Array, missed: Array, rows: Array) -> None:
        """A block, and the rows of the other factor."""
        self._curvature += weights.T @ _pairs(rows.T).T
        self._slope += (weights * missed).T @ rows.astype(numpy.float32)

    def solution(self) -> Array:
        """The step of the factor, ``(r, n)``."""
        return _solved(self._curvature, self._slope, self._rank).T


def _solved(curvature: Array, slope: Array, rank: int) -> Array:
    first, second = numpy.triu_indices(rank)
    full = numpy.zeros((len(curvature), rank, rank))
    full[:, first, second] = full[:, second, first] = curvature
    mean = float(numpy.trace(full, axis1=1, axis2=2).mean()) / rank
    full += (_RIDGE * mean or 1.0) * numpy.eye(rank)
    steps: Array = numpy.linalg.solve(full, slope[..., None].astype(numpy.float64))[..., 0]
    return steps
