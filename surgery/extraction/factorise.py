# SPDX-License-Identifier: Apache-2.0
"""Factorise differences, one matrix per thread, into a scratch file: memory holds no more than the matrices being worked on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from surgery.extraction.stream.scratch import ScratchFile, ScratchSlot
from surgery.extraction.targets import LowRankTarget
from surgery_formats.dtypes import DType

if TYPE_CHECKING:
    import torch

    from surgery_formats.linalg.matrix import MatrixSource

__all__ = ["Criterion", "FactorisedMatrix", "StoredFactorSpec", "TargetFactors", "factorise"]

_FINE = 1e-3
"""Relative residual below which float32 cannot measure it."""
_MUCH = 0.05
"""Relative residual above which ``||D||^2 - 2 <D, BA> + ||BA||^2`` is right to a few 1e-5 of it."""
MOST = 256
"""Most singular values looked at where the rank is to be found (budget, auto): beyond, an adapter is no smaller than what it replaces."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """How the rank of a matrix is found; exactly one is set.

    Attributes:
        rank: So many, less where the matrix is smaller.
        energy: Until this share of ``||D||_F^2`` is held.
        max_error: Until ``||D - BA||_F / ||D||_F`` is at most this.
        most: Look at so many and decide later (budget, auto).
        numbers: Most numbers the whole adapter may hold, which limits `most`.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    most: int | None = None
    numbers: int | None = None

    def limit(self, cost: int) -> int | None:
        """Directions of a target of which each costs `cost` numbers; None for no limit of its own."""
        if self.most is None or self.numbers is None:
            return self.most if self.rank is None else self.rank
        return max(1, min(self.most, self.numbers // cost))


@dataclass(frozen=True, slots=True)
class StoredFactorSpec:
    """How the factors of a matrix will be written, where it is known when they are made.

    Attributes:
        rank: Directions that are kept; None for all that the criterion finds.
        fold: What each factor is multiplied by, so that the format's scale changes nothing.
        dtype: Type they are rounded to.
    """

    rank: int | None
    fold: float
    dtype: DType

    def stored(self, factor: torch.Tensor) -> torch.Tensor:
        """The values that will be written, float32, of all directions ``(k, n)``."""
        import torch

        return (factor[: self.rank] * self.fold).to(self.dtype.torch).to(torch.float32)


@dataclass(frozen=True, slots=True)
class FactorisedMatrix:
    """One factorised matrix ``D ~ left^T right / fold^2``, the square root of every singular value on either side.

    Attributes:
        left: ``(k, out)``, one direction per row; of `left_energy`'s factors where that is known.
        right: ``(k, in)``.
        values: Singular values, descending.
        total: ``||D||_F^2``.
        rest: What all `k` leave of it.
        bound: The error is at most this many times the least possible.
        edge: Largest singular value that rounding noise alone would have.
        fold: What either side was multiplied by.
        left_energy: ``||D - left^T right / fold^2||_F^2``, measured, of each tensor that the matrix is made of; None where the factors
            are not yet those that will be written.
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

    @property
    def signal(self) -> int:
        """Directions above the noise."""
        from surgery_formats.linalg.noise import signal_count

        return signal_count(self.values, self.edge)

    def residual(self, rank: int) -> float:
        """``||D - D_rank||_F^2``."""
        return self.rest + math.fsum(value * value for value in self.values[rank:])


@dataclass(frozen=True, slots=True)
class TargetFactors:
    """A target and its factorised matrices."""

    target: LowRankTarget
    matrices: tuple[FactorisedMatrix, ...]

    @property
    def rank(self) -> int:
        """Most directions that any of its matrices has."""
        return max(len(piece.values) for piece in self.matrices)

    @property
    def energy(self) -> float:
        """Of all its matrices."""
        return math.fsum(piece.total for piece in self.matrices)

    @property
    def spectrum(self) -> list[float]:
        """Root of the energy that each further direction holds, in all matrices together."""
        columns = zip_longest(*(piece.values for piece in self.matrices), fillvalue=0.0)
        return [math.hypot(*column) for column in columns]

    def residual(self, rank: int) -> float:
        """Energy that is left at `rank`."""
        return math.fsum(piece.residual(rank) for piece in self.matrices)

    def factors(self, index: int, rank: int, fold: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """``(left (out, rank), right (rank, in))`` of one matrix, each times `fold`; directions that it lacks are zeros."""
        import torch

        matrix, sides = self.matrices[index], []
        for slot in (matrix.left, matrix.right):
            whole = slot.read()[:rank]
            if fold != matrix.fold:
                whole *= fold / matrix.fold
            sides.append(torch.nn.functional.pad(whole, (0, 0, 0, rank - len(whole))))
        return sides[0].T, sides[1]


def factorise(
    matrix: torch.Tensor | MatrixSource,
    criterion: Criterion,
    rank: int | None,
    strips: Sequence[int],
    scratch: ScratchFile,
    device: torch.device,
    *,
    energies: Sequence[float],
    moved: bool,
    edge: float,
    plan: StoredFactorSpec | None,
    transposed: bool,
) -> FactorisedMatrix:
    """Factors of one matrix, and what is left of it beside what will be written of them.

    Args:
        matrix: As stored.
        criterion: How the rank is found.
        rank: Most directions, where the criterion has a number.
        strips: Heights of the tensors that it is made of.
        scratch: Where the factors go.
        device: Where to compute.
        energies: ``||D||_F^2`` of each of them; zeros where they are too small for who summed them.
        moved: Whether anything in them differs.
        edge: See `Piece`.
        plan: How the factors will be written; None where that is decided later.
        transposed: Whether the logical matrix is the transpose.
    """
    import torch

    from surgery_formats.linalg.svd import left_over, truncated_svd

    energy = math.fsum(energies)
    total = math.sqrt(energy) if energy or not moved else None
    svd = truncated_svd(
        matrix,
        rank=None if rank is None else min(rank, *matrix.shape),
        energy=criterion.energy,
        max_error=criterion.max_error,
        device=device,
        total=total,
    )
    roots, left_energy, fold = svd.S.sqrt(), None, 1.0
    left, right = ((side * roots).T.to(torch.float32) for side in (svd.U, svd.V))
    if plan is not None:
        fold = plan.fold
        left, right = (plan.stored(side) for side in (left, right))
        # What is left of almost nothing must be measured finely, what is left of much follows from one product.
        how: Literal["fine", "plain", "sums"] = "plain"
        if svd.relative < _FINE and plan.dtype is DType.F32:
            how = "fine"
        elif svd.relative > _MUCH and total:
            how = "sums"
        rows = left_over(matrix, left.T / fold, right / fold, total=total, how=how, device=device)
        parts = [part.sum() for part in torch.split(rows, list(strips))]
        known = energies if how == "sums" else [0.0] * len(strips)
        left_energy = tuple(own + part for own, part in zip(known, torch.stack(parts).tolist(), strict=True))
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
