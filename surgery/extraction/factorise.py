# SPDX-License-Identifier: Apache-2.0
"""Factorise differences, one matrix or a stack of one shape, and measure what the factors leave of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Literal

import numpy

from surgery.extraction.sampling import at_rows, sample_runs
from surgery.extraction.stream.scratch import ScratchFile, ScratchSlot
from surgery.extraction.targets import LowRankTarget
from surgery.rank import Rank
from surgery_formats.arrays import Array, cast, dtype_of, namespace, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.linalg.fit_dora import row_share
from surgery_formats.linalg.matrix import MatrixSource
from surgery_formats.linalg.noise import signal_count, survival_sums
from surgery_formats.linalg.survival import Survival
from surgery_formats.linalg.svd import TruncatedSVD, left_over, truncated_svd
from surgery_formats.linalg.svd_stack import SVDStack, energy_left, truncated_svds

__all__ = [
    "FactorisedMatrix",
    "FactorisedStack",
    "RowSample",
    "StoredFactorSpec",
    "TargetFactors",
    "factorise",
    "factorise_stack",
    "row_lengths",
]

_FINE = 1e-3
"""Relative residual below which float32 cannot measure it."""
_MUCH = 0.05
"""Relative residual above which ``||D||^2 - 2 <D, BA> + ||BA||^2`` is right to a few 1e-5 of it."""


@dataclass(frozen=True, slots=True)
class StoredFactorSpec:
    """How the factors of a matrix will be stored, where that is known when they are computed.

    Attributes:
        rank: Directions to keep; None keeps all that the criterion finds.
        fold: Number that either factor is multiplied by, so that the format's scale changes no delta.
        dtype: Stored type.
    """

    rank: int | None
    fold: float
    dtype: DType

    def stored(self, factor: Array) -> Array:
        """The values as they will be stored, in float32, of directions ``(..., k, n)``."""
        return cast(cast(factor[..., : self.rank, :] * self.fold, self.dtype), DType.F32)

    def way(self, relative: float, total: float | None) -> Literal["fine", "plain", "sums"]:
        """How to measure what the stored factors leave: finely of almost nothing; of much it follows from one product."""
        if relative < _FINE and self.dtype is DType.F32:
            return "fine"
        return "sums" if relative > _MUCH and total else "plain"


@dataclass(frozen=True, slots=True)
class RowSample:
    """What factors leave in the rows of `surgery.extraction.sampling.sample_runs`.

    Attributes:
        along: Energy of it that rescaling rows would take away, see `surgery_formats.linalg.fit_dora.row_share`.
        energy: All of it.
        survival: What a merge of the factors would keep.
    """

    along: float
    energy: float
    survival: Survival

    @property
    def share(self) -> float:
        """``along / energy``."""
        return self.along / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True, slots=True)
class FactorisedMatrix:
    """One factorised matrix ``D ~ left^T right / fold^2``; either side has the square roots of the singular values.

    Attributes:
        left: ``(k, out)``, one direction per row. As they will be stored, where `left_energy` is known.
        right: ``(k, in)``, likewise.
        values: Singular values, descending.
        total: ``||D||_F^2``.
        rest: ``||D - D_k||_F^2``, what all `k` directions leave.
        bound: The error is at most this many times the least possible one.
        edge: Largest singular value that rounding alone would have.
        fold: Number that either side was multiplied by.
        left_energy: ``||D - left^T right / fold^2||_F^2``, measured for each tensor of the matrix; None where the
            factors are not yet those that will be stored.
        sample: What the stored factors leave in some rows, where that was measured with them.
    """

    left: ScratchSlot
    right: ScratchSlot
    values: tuple[float, ...]
    total: float
    rest: float
    bound: float
    edge: float = 0.0
    fold: float = 1.0
    left_energy: tuple[float, ...] | None = None
    sample: RowSample | None = None

    @property
    def signal(self) -> int:
        """Number of singular values above the noise."""
        return signal_count(self.values, self.edge)

    def residual(self, rank: int) -> float:
        """``||D - D_rank||_F^2``."""
        return self.rest + math.fsum(value * value for value in self.values[rank:])


@dataclass(frozen=True, slots=True)
class TargetFactors:
    """The factors of a target.

    Attributes:
        target: The weight.
        matrices: One per difference of the target.
    """

    target: LowRankTarget
    matrices: tuple[FactorisedMatrix, ...]

    @property
    def rank(self) -> int:
        """Greatest number of directions of any of its matrices."""
        return max(len(piece.values) for piece in self.matrices)

    @property
    def energy(self) -> float:
        """``||D||_F^2`` of all matrices together."""
        return math.fsum(piece.total for piece in self.matrices)

    @property
    def spectrum(self) -> list[float]:
        """Square root of the energy that each further direction holds, in all matrices together."""
        columns = zip_longest(*(piece.values for piece in self.matrices), fillvalue=0.0)
        return [math.hypot(*column) for column in columns]

    def residual(self, rank: int) -> float:
        """Energy that factors of `rank` leave."""
        return math.fsum(piece.residual(rank) for piece in self.matrices)

    def factors(self, index: int, rank: int, fold: float = 1.0) -> tuple[Array, Array]:
        """``(left (out, rank), right (rank, in))`` of one matrix, either times `fold`; missing directions are zeros."""
        return self.side("left", index, rank, fold), self.side("right", index, rank, fold)

    def side(self, which: Literal["left", "right"], index: int, rank: int, fold: float = 1.0) -> Array:
        """One of `factors`."""
        matrix = self.matrices[index]
        whole = (matrix.left if which == "left" else matrix.right).read()[:rank]
        if fold != matrix.fold:
            whole *= fold / matrix.fold
        whole = numpy.pad(whole, ((0, rank - len(whole)), (0, 0))) if len(whole) < rank else whole
        return whole.T if which == "left" else whole


def factorise(
    matrix: Array | MatrixSource,
    wanted: Rank,
    rank: int | None,
    strips: Sequence[int],
    scratch: ScratchFile,
    device: str,
    *,
    energies: Sequence[float],
    moved: bool,
    edge: float,
    plan: StoredFactorSpec | None,
    transposed: bool,
) -> FactorisedMatrix:
    """Factorise one matrix and measure what the stored factors will leave of it.

    `matrix` is the difference in its stored orientation, the transpose of the logical one if `transposed`; `strips` are
    the numbers of rows of each tensor in it, and `energies` their ``||D||_F^2``, zero where it is below what the sum
    can show (`moved` tells whether any value differs). `rank` limits what `wanted` finds; `plan` is None if the
    stored form of the factors is decided later.
    """
    energy = math.fsum(energies)
    total = math.sqrt(energy) if energy or not moved else None
    svd = truncated_svd(
        matrix,
        rank=None if rank is None else min(rank, *matrix.shape),
        energy=wanted.least_energy,
        max_error=wanted.most_error,
        device=device,
        total=total,
    )
    (left, right), left_energy, fold = _directions(svd), None, 1.0
    if plan is not None:
        fold = plan.fold
        left, right = plan.stored(left), plan.stored(right)
        how = plan.way(svd.relative, total)
        rows = left_over(matrix, left.T / fold, right / fold, total=total, how=how, device=device)
        ends = list(accumulate(strips))
        parts = [rows[end - height : end].sum() for height, end in zip(strips, ends, strict=True)]
        known = energies if how == "sums" else [0.0] * len(strips)
        left_energy = tuple(own + part for own, part in zip(known, namespace(rows).stack(parts).tolist(), strict=True))
    out_side, in_side = (right, left) if transposed else (left, right)
    return FactorisedMatrix(
        scratch.put(out_side),
        scratch.put(in_side),
        tuple(svd.S.tolist()),
        float(svd.total) ** 2,
        float(svd.residual) ** 2,
        float(svd.bound),
        edge,
        fold,
        left_energy,
    )


@dataclass(frozen=True, slots=True)
class FactorisedStack:
    """Matrices factorised together, with their factors in memory: `left` ``(count, k, out)``, `right` ``(count, k, in)``.

    The lists are as the attributes of `FactorisedMatrix`.
    """

    left: numpy.ndarray
    right: numpy.ndarray
    values: list[list[float]]
    totals: list[float]
    rests: list[float]
    bounds: list[float]
    edges: Sequence[float]
    fold: float
    left_energies: list[float]
    samples: list[RowSample | None]

    def kept(self, scratch: ScratchFile) -> list[FactorisedMatrix]:
        """The matrices, with their factors in the scratch file."""
        return [
            FactorisedMatrix(
                scratch.put(self.left[i]),
                scratch.put(self.right[i]),
                tuple(self.values[i]),
                self.totals[i] ** 2,
                self.rests[i] ** 2,
                self.bounds[i],
                self.edges[i],
                self.fold,
                (self.left_energies[i],),
                self.samples[i],
            )
            for i in range(len(self.left))
        ]


def factorise_stack(
    stack: Array,
    rank: int,
    *,
    energies: Sequence[float],
    edges: Sequence[float],
    plan: StoredFactorSpec,
    transposed: bool,
    base: Array | None = None,
) -> FactorisedStack:
    """As `factorise`, of the matrices of a stack ``(count, m, n)``, float32: all that changed, one strip each.

    `base` are the rows of BASE, as stored, that `sample_runs` chooses, ``(count, rows, n)``; without them nothing is
    sampled.
    """
    totals = [math.sqrt(energy) for energy in energies]
    svd = truncated_svds(stack, rank=min(rank, *stack.shape[1:]), totals=totals)
    left, right = (plan.stored(side) for side in _directions(svd))
    ways = [
        plan.way(rest / whole if whole else 0.0, total)
        for rest, whole, total in zip(svd.residual, svd.total, totals, strict=True)
    ]
    B, A = left.mT / plan.fold, right / plan.fold
    sums = to_cpu(energy_left(stack, B, A).sum(-1)).tolist() if "sums" in ways else []
    out_side, in_side = (to_cpu(side) for side in ((right, left) if transposed else (left, right)))
    values = to_cpu(svd.S).tolist()
    samples: list[RowSample | None] = [None] * len(stack) if base is None else _samples(stack, B, A, base)
    left_energies = [
        energy + sums[i]
        if how == "sums"
        else float(left_over(stack[i], B[i], A[i], total=totals[i] or None, how=how).sum())
        for i, (how, energy) in enumerate(zip(ways, energies, strict=True))
    ]
    return FactorisedStack(
        out_side,
        in_side,
        values,
        svd.total,
        svd.residual,
        svd.bound,
        edges,
        plan.fold,
        left_energies,
        samples,
    )


def _samples(stack: Array, B: Array, A: Array, base: Array) -> list[RowSample | None]:
    """What ``B A`` leaves of a stack in the rows of `base`; waits once."""
    xp, runs = namespace(stack), list(sample_runs(*stack.shape[1:]))
    before = cast(base, DType.F32)
    change = at_rows(B, runs) @ A
    shares = xp.stack(row_share(at_rows(stack, runs) - change, before + change), axis=-1)
    figures = to_cpu(xp.concat([shares, survival_sums(before, change, dtype_of(base))], axis=-1))
    return [RowSample(along, energy, Survival(*sums)) for along, energy, *sums in figures.tolist()]


def _directions(svd: TruncatedSVD | SVDStack) -> tuple[Array, Array]:
    """``left (..., k, m)`` and ``right (..., k, n)``, float32, with the square roots of the singular values in either."""
    roots = namespace(svd.S).sqrt(svd.S)[..., None]
    left, right = (cast(side.mT * roots, DType.F32) for side in (svd.U, svd.V))
    return left, right


def row_lengths(left: Array, right: Array) -> tuple[float, ...]:
    """Products of the norms of the rows of two matrices ``(k, m)`` and ``(k, n)``."""
    norms = [namespace(side).linalg.vector_norm(side, axis=1) for side in (left, right)]
    return tuple((norms[0] * norms[1]).tolist())
