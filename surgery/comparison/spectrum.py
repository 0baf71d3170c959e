# SPDX-License-Identifier: Apache-2.0
"""How the difference of two stored matrices spreads over directions.

Memory does not grow with the long side of the matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from surgery.comparison.additive import SHARES
from surgery.comparison.entries import Profile
from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.svd import truncated_svd
from surgery_formats.storage.base import Storage, is_contiguous, read_block, read_values

__all__ = ["LOOKED_AT", "blocks", "profile_of_difference"]

_BLOCK = 1 << 21  # elements: 16 MB of float64 per side
_SLAB = 1 << 25  # elements of a wide matrix that are held at a time: 256 MB of float64
_SHORT_SIDE = 8192  # greatest short side whose Gram matrix (512 MB) is formed; beyond, block Krylov
LOOKED_AT = 256
"""Directions found where the Gram matrix would be too large."""
_ACCURACY = 1.01  # of the error of those; a count of directions needs no more


def blocks(weight: Storage, dtype: DType, elements: int = _BLOCK) -> Iterator[Array]:
    """Rows as `dtype`, each block at most that many elements where rows allow."""
    rows, width = weight.shape
    step = max(1, elements // max(width, 1))
    whole = None if is_contiguous(weight) else read_block(weight, 0, rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield cast(read_block(weight, start, stop) if whole is None else whole[start:stop], dtype)


def profile_of_difference(mine: Storage, theirs: Storage) -> tuple[Profile | None, str]:
    """Ranks of ``theirs - mine``, and a note where something cannot be told."""
    short = min(mine.shape)
    if short > _SHORT_SIDE:
        return _by_krylov(_Difference(mine, theirs))
    gram = _gram(mine, theirs)
    if not numpy.isfinite(gram).all():
        return None, "no spectrum: NaN or Inf"
    energies = numpy.linalg.eigvalsh(gram)[::-1].clip(min=0.0)
    return _profile(energies, float(energies.sum()), short), ""


@dataclass(frozen=True)
class _Difference:
    """``theirs - mine``, read when it is asked for."""

    mine: Storage
    theirs: Storage

    @property
    def shape(self) -> tuple[int, int]:
        return self.mine.shape

    def rows(self, start: int, stop: int) -> Array:
        left, right = (read_values(weight, start, stop, DType.F64) for weight in (self.mine, self.theirs))
        return right - left


def _gram(mine: Storage, theirs: Storage) -> Array:
    """The Gram matrix of the difference's short side in float64, summed over blocks of the long one."""
    rows, cols = mine.shape
    short = min(rows, cols)
    gram = numpy.zeros((short, short))
    if rows >= cols:
        for left, right in zip(blocks(mine, DType.F64), blocks(theirs, DType.F64), strict=True):
            apart = right - left
            gram += apart.T @ apart
        return gram
    width = max(1, _SLAB // rows)  # all rows of some columns: the file is read once for each slab
    for first in range(0, cols, width):
        part = slice(first, min(first + width, cols))
        sides = zip(blocks(mine, DType.F64), blocks(theirs, DType.F64), strict=True)
        slab = numpy.concat([right[:, part] - left[:, part] for left, right in sides])
        gram += slab @ slab.T
    return gram


def _by_krylov(difference: _Difference) -> tuple[Profile | None, str]:
    try:
        svd = truncated_svd(difference, rank=LOOKED_AT, energy=max(SHARES), accuracy=_ACCURACY)
    except FitError:
        return None, "no spectrum: NaN or Inf"
    return _profile(cast(svd.S, DType.F64) ** 2, svd.total**2, LOOKED_AT), ""


def _profile(energies: Array, whole: float, most: int) -> Profile:
    """Counts of directions; None for a share that more than `most` of them hold."""
    held = energies.cumsum()

    def needed(share: float) -> int | None:
        count = int((held < share * whole * (1 - 1e-12)).sum()) + 1
        return count if count <= min(most, len(energies)) else None

    return Profile(whole / float(energies[0]), {f"{share:g}": needed(share) for share in SHARES})
