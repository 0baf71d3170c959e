# SPDX-License-Identifier: Apache-2.0
"""The delta that a combination makes of one weight, and its best factors of a given rank.

A sum of low-rank terms is never formed: its norm, spectrum and best factors come from QR of its stacked factors and an
SVD of the small core between them, exactly, in float64. A delta merged by TIES, DARE or pruning has full rank and is
formed when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy

from surgery.algebra.ties_and_dare import merge_deltas
from surgery.rank import Rank
from surgery_formats.adapters.writing import zero_padded
from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.factored import concatenated, factored_norm, rerank, singular_values
from surgery_formats.linalg.svd import truncated_svd
from surgery_formats.threads import one_thread
from surgery_formats.updates import LoRA

__all__ = [
    "CombineOptions",
    "Compared",
    "DeltaTarget",
    "DenseDelta",
    "LowRankSum",
    "Solved",
    "Term",
    "merged_delta",
    "rank_for",
    "stacked",
]


class Solved(NamedTuple):
    """Factors for a delta.

    Attributes:
        B: ``(out, rank)``, float64, scale multiplied in.
        A: ``(rank, in)``, float64.
        lost: Frobenius norm of what the factors leave out; 0 where nothing was left out.
    """

    B: Array
    A: Array
    lost: float = 0.0


class Compared(NamedTuple):
    """A delta and factors that stand for it.

    Attributes:
        norm: ``||target||_F``.
        error: ``||target - B A||_F``.
        size: What rounding is measured against: the terms' norms added up, since terms may cancel in the sum.
    """

    norm: float
    error: float
    size: float


_ACCURACY = 1.0001
"""Greatest error of a dense delta's factors over the best of their rank."""
_LOSSLESS = 1e-8
"""Residual, relative to the sum, that is no loss: float32 factors differ from what was meant by more."""


@dataclass(frozen=True, slots=True)
class CombineOptions:
    """How deltas are combined, and what rank the result may have.

    Attributes:
        method: ``exact``, ``svd``, or one of `surgery.algebra.ties_and_dare.DENSE_METHODS`.
        rank: Greatest rank of a module.
        energy: Least share of each module's energy ``||.||_F^2`` that is kept.
        max_error: Greatest error of a module, relative, Frobenius.
        density: Share of values kept, for the dense methods.
        seed: Of random drops.
        majority: What elects the signs of TIES: one of `surgery.algebra.ties_and_dare.MAJORITIES`.
    """

    method: str = "exact"
    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    density: float = 1.0
    seed: int = 0
    majority: str = "total"

    @classmethod
    def of(
        cls, method: str, rank: Rank, density: float = 1.0, seed: int = 0, majority: str = "total"
    ) -> CombineOptions:
        """The options that cut to `rank`.

        Raises:
            FitError: a way to choose ranks that only an extraction has.
        """
        if rank.patterns or not set(rank.choices) <= {"rank", "energy", "error"}:
            raise FitError(f"{rank!r} is for extractions", hint="give a rank, an energy or an error")
        return cls(method, rank.number, rank.least_energy, rank.most_error, density, seed, majority)

    @property
    def by_spectrum(self) -> bool:
        """Whether ranks depend on singular values."""
        return self.energy is not None or self.max_error is not None or (self.method == "svd" and self.rank is None)

    @property
    def truncates(self) -> bool:
        """Whether a module may lose directions."""
        return self.rank is not None or self.energy is not None or self.max_error is not None


class DeltaTarget(Protocol):
    """A delta to be approximated by factors."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """One per term."""

    @property
    def full_rank(self) -> int:
        """The rank at which nothing is lost."""

    def least(self, options: CombineOptions) -> int:
        """The least rank, at least 1, that keeps what `options` asks for."""

    def solve(self, rank: int) -> Solved:
        """The best factors of that rank."""

    def compare(self, B: Array, A: Array) -> Compared:
        """Compare ``B A`` with this delta."""


@dataclass(frozen=True)
class LowRankSum:
    """``sum_i s_i B_i A_i``.

    Attributes:
        terms: What is added up.
        orthogonal: Whether factors are those of an SVD even where nothing has to be dropped.

    Raises:
        FitError: the weight has no values, or no term a direction.
    """

    terms: tuple[LoRA, ...]
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if not self.full_rank:
            first = self.terms[0].tensors[0]
            raise FitError(
                f"a change of a weight of {list(self.shape)} has no values", file=first.path, tensor=first.name
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.terms[0].shape

    @property
    def ranks(self) -> tuple[int, ...]:
        """One per term."""
        return tuple(term.rank for term in self.terms)

    @property
    def full_rank(self) -> int:
        """All ranks together, but no more than the matrix has."""
        return min(sum(self.ranks), *self.shape)

    def spectrum(self) -> Array:
        """All ``full_rank`` singular values, float64, descending."""
        return singular_values(*stacked(self.terms))[: self.full_rank]

    def least(self, options: CombineOptions) -> int:
        """The least rank, from all singular values."""
        return rank_for(options, self.spectrum(), self.full_rank)

    def solve(self, rank: int) -> Solved:
        """The stacked factors themselves where the rank allows, else the optimum by Eckart and Young."""
        B, A = stacked(self.terms)
        if rank == A.shape[0] and not self.orthogonal:
            return Solved(B, A)
        return Solved(*rerank(B, A, rank))

    def compare(self, B: Array, A: Array) -> Compared:
        """Neither matrix is formed."""
        mine, theirs = stacked(self.terms)
        error = factored_norm(numpy.hstack([mine, -B]), numpy.vstack([theirs, A]))
        size = sum(factored_norm(*stacked((term,))) for term in self.terms)
        return Compared(factored_norm(mine, theirs), error, size)


class Term(Protocol):
    """Something with a dense delta."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""

    @property
    def rank(self) -> int:
        """Directions that were trained; the delta itself may have more."""

    def delta(self, dtype: DType) -> Array:
        """A fresh array of `shape`."""


@dataclass(frozen=True)
class DenseDelta:
    """A delta of full rank: several merged by TIES, DARE or pruning, or what updates that map a weight do to it in turn.

    Attributes:
        shape: ``(out, in)``.
        ranks: One per term.
        formed: The dense delta, float64.
        seed: Of the truncated SVD.
    """

    shape: tuple[int, int]
    ranks: tuple[int, ...]
    formed: Callable[[], Array]
    seed: int

    @property
    def full_rank(self) -> int:
        """The matrix's."""
        return min(self.shape)

    def least(self, options: CombineOptions) -> int:
        """The least rank, by a truncated SVD that stops where the request is met."""
        if (options.energy or 0.0) >= 1.0:
            return self.full_rank
        svd = truncated_svd(
            self.formed(),
            rank=options.rank,
            energy=options.energy,
            max_error=options.max_error,
            accuracy=_ACCURACY,
            seed=options.seed,
        )
        return max(1, svd.rank)

    def solve(self, rank: int) -> Solved:
        """Factors by truncated SVD, its singular values shared evenly.

        Zeros fill up where the delta has fewer directions than were asked for.
        """
        svd = truncated_svd(self.formed(), rank=rank, accuracy=_ACCURACY, seed=self.seed)
        B, A = svd.factors()
        return Solved(zero_padded(B, 1, rank), zero_padded(A, 0, rank), svd.residual)

    def compare(self, B: Array, A: Array) -> Compared:
        """The delta is formed once more; nothing cancels after that."""
        with one_thread():
            delta = self.formed()
            norm = float(numpy.linalg.norm(delta))
            return Compared(norm, float(numpy.linalg.norm(delta - B @ A)), norm)


def merged_delta(
    terms: Sequence[Term], weights: Sequence[float], owners: Sequence[int], options: CombineOptions, name: str
) -> DenseDelta:
    """Several deltas merged by TIES, DARE or pruning (`surgery.algebra.ties_and_dare`).

    Args:
        terms: The deltas, without their weights.
        weights: One per term.
        owners: Number of each term's adapter.
        options: Method, density and seed.
        name: Of the weight.
    """

    def formed() -> Array:
        with one_thread():
            return merge_deltas(
                [partial(term.delta, DType.F64) for term in terms],
                weights,
                method=options.method,
                density=options.density,
                seed=options.seed,
                name=name,
                owners=owners,
                majority=options.majority,
            )

    return DenseDelta(terms[0].shape, tuple(term.rank for term in terms), formed, options.seed)


def stacked(terms: Sequence[LoRA]) -> tuple[Array, Array]:
    """``[s_1 B_1, s_2 B_2, ...]`` and ``[A_1; A_2; ...]``, float64: the sum of `terms` as one product, exactly."""
    factors = [(term.B.load(DType.F64), term.A.load(DType.F64)) for term in terms]
    return concatenated(factors, [term.scale for term in terms])


def rank_for(options: CombineOptions, spectrum: Array, full_rank: int) -> int:
    """The least rank, at least 1, that keeps what `options` asks for; at `full_rank` nothing is lost.

    Rank, energy and greatest error all hold if given, the rank being the upper limit.
    """
    allowed = []
    if options.energy is not None:
        allowed.append(1.0 - options.energy)
    if options.max_error is not None:
        allowed.append(options.max_error**2)
    if not allowed and options.method == "svd" and options.rank is None:
        allowed.append(_LOSSLESS**2)
    rank = full_rank
    if allowed:
        tails = (spectrum**2)[::-1].cumsum()[::-1]  # tails[r]: what rank r loses; small ones are summed first
        rank = int((tails > min(allowed) * tails[0]).sum()) if len(tails) else 1
    return max(1, min(rank, full_rank, options.rank or full_rank))
