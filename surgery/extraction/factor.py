# SPDX-License-Identifier: Apache-2.0
"""Factorise differences, one matrix per thread, into a scratch file: memory holds no more than the matrices being worked on."""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import xxhash

from surgery.extraction.sites import LowRankTarget
from surgery_formats.dtypes import DType
from surgery_formats.errors import ResourceError
from surgery_formats.tensors.tensor import as_bytes

if TYPE_CHECKING:
    import torch

    from surgery_formats.linalg.matrix import MatrixSource

__all__ = ["Criterion", "Factored", "Piece", "ScratchFile", "StoredFactorSpec", "digest", "factorise"]

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
        """Directions of a unit of which each costs `cost` numbers; None for no limit of its own."""
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


class ScratchFile:
    """Float32 matrices in a nameless file beside the output: the kernel removes it whatever happens. Any thread may use it."""

    def __init__(self, folder: Path | None) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as this object
        except OSError as error:
            raise ResourceError(
                f"no temporary file can be made here ({error.strerror or error})", file=folder
            ) from error
        self._end = 0
        self._lock = threading.Lock()

    def put(self, values: torch.Tensor) -> ScratchSlot:
        """Store a matrix."""
        import torch

        kept = values.to("cpu", torch.float32).contiguous()
        raw = as_bytes(kept)
        with self._lock:
            at, self._end = self._end, self._end + len(raw)
        done = 0
        while done < len(raw):
            done += os.pwrite(self._file.fileno(), raw[done:], at + done)
        return ScratchSlot(self, at, (kept.shape[0], kept.shape[1]), digest(kept))

    def get(self, place: ScratchSlot) -> torch.Tensor:
        """Read it back."""
        import torch

        made = torch.empty(place.shape, dtype=torch.float32)
        raw, done = as_bytes(made), 0
        while done < len(raw):
            done += os.preadv(self._file.fileno(), [raw[done:]], place.offset + done)
        return made

    def close(self) -> None:
        """Give the space back."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class ScratchSlot:
    """Where a matrix lies in the scratch file.

    Attributes:
        scratch: The file.
        offset: In it.
        shape: Of the matrix, float32.
        digest: Of its values when they were put there.
    """

    scratch: ScratchFile
    offset: int
    shape: tuple[int, int]
    digest: str


def digest(values: torch.Tensor) -> str:
    """Of a contiguous float32 matrix in memory."""
    return xxhash.xxh3_128_hexdigest(as_bytes(values))


@dataclass(frozen=True, slots=True)
class Piece:
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
class Factored:
    """A unit and its factorised matrices."""

    unit: LowRankTarget
    pieces: tuple[Piece, ...]

    @property
    def rank(self) -> int:
        """Most directions that any of its matrices has."""
        return max(len(piece.values) for piece in self.pieces)

    @property
    def energy(self) -> float:
        """Of all its matrices."""
        return math.fsum(piece.total for piece in self.pieces)

    @property
    def spectrum(self) -> list[float]:
        """Root of the energy that each further direction holds, in all matrices together."""
        columns = zip_longest(*(piece.values for piece in self.pieces), fillvalue=0.0)
        return [math.hypot(*column) for column in columns]

    def residual(self, rank: int) -> float:
        """Energy that is left at `rank`."""
        return math.fsum(piece.residual(rank) for piece in self.pieces)

    def factors(self, index: int, rank: int, fold: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """``(left (out, rank), right (rank, in))`` of one matrix, each times `fold`; directions that it lacks are zeros."""
        import torch

        piece, found = self.pieces[index], []
        for place in (piece.left, piece.right):
            whole = place.scratch.get(place)[:rank]
            if fold != piece.fold:
                whole *= fold / piece.fold
            found.append(torch.nn.functional.pad(whole, (0, 0, 0, rank - len(whole))))
        return found[0].T, found[1]


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
) -> Piece:
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
    found = truncated_svd(
        matrix,
        rank=None if rank is None else min(rank, *matrix.shape),
        energy=criterion.energy,
        max_error=criterion.max_error,
        device=device,
        total=total,
    )
    root, left_energy, fold = found.S.sqrt(), None, 1.0
    left, right = ((side * root).T.to(torch.float32) for side in (found.U, found.V))
    if plan is not None:
        fold = plan.fold
        left, right = (plan.stored(side) for side in (left, right))
        # What is left of almost nothing must be measured finely, what is left of much follows from one product.
        how: Literal["fine", "plain", "sums"] = "plain"
        if found.relative < _FINE and plan.dtype is DType.F32:
            how = "fine"
        elif found.relative > _MUCH and total:
            how = "sums"
        rows = left_over(matrix, left.T / fold, right / fold, total=total, how=how, device=device)
        parts = [part.sum() for part in torch.split(rows, list(strips))]
        known = energies if how == "sums" else [0.0] * len(strips)
        left_energy = tuple(own + part for own, part in zip(known, torch.stack(parts).tolist(), strict=True))
    one, other = (right, left) if transposed else (left, right)
    return Piece(
        scratch.put(one),
        scratch.put(other),
        tuple(found.S.tolist()),
        float(found.total) ** 2,
        float(found.residual) ** 2,
        float(found.bound),
        edge,
        fold,
        left_energy,
    )
