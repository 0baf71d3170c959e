# SPDX-License-Identifier: Apache-2.0
"""Intruder directions: strong directions of a tuned matrix that resemble none of the matrix it was tuned from.

Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv:2410.21228): left singular vectors
of B, among the first `LOOKED_AT`, whose cosine with every left singular vector of A is below `ALIKE`; both numbers are
those of PEFT's ``reduce_intruder_dimension``. Products of the matrices are formed on their short side, in float64, so
that memory does not grow with the long side of tall ones.
"""

from __future__ import annotations

import numpy

from surgery.comparison.spectrum import blocks
from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Storage

__all__ = ["ALIKE", "LOOKED_AT", "intruders_of"]

LOOKED_AT, ALIKE = 10, 0.5
_SHORT_SIDE = 8192  # greatest short side whose products are formed: three of 512 MB
_NOTHING = 1e-6  # of the largest singular value: below, a left vector is not told from arithmetic noise
_SLAB = 1 << 25  # elements of a wide matrix that are held at a time


def intruders_of(mine: Storage, theirs: Storage) -> tuple[int | None, str]:
    """How many of B's first directions resemble none of A's, and a note where that cannot be told."""
    if min(mine.shape) > _SHORT_SIDE:
        return None, f"no intruder directions: more than {_SHORT_SIDE} rows and columns"
    tall = mine.shape[0] > mine.shape[1]
    own, cross, other = _products_of_columns(mine, theirs) if tall else _products_of_rows(mine, theirs)
    if not (numpy.isfinite(own).all() and numpy.isfinite(other).all()):
        return None, "no intruder directions: NaN or Inf"
    energies, vectors = numpy.linalg.eigh(own)
    kept = energies > _NOTHING**2 * energies[-1]
    strengths, strong = numpy.linalg.eigh(other)
    strengths, strong = strengths[: -LOOKED_AT - 1 : -1], strong[:, : -LOOKED_AT - 1 : -1]
    known = strengths > _NOTHING**2 * max(strengths[0], 1e-300)
    cosines = strong[:, known].T @ (cross @ vectors[:, kept] if tall else vectors[:, kept])
    if tall:  # u = W v / s, on either side
        cosines /= numpy.sqrt(numpy.outer(strengths[known], energies[kept]))
    return int((abs(cosines).max(axis=1, initial=0.0) < ALIKE).sum()), ""


def _products_of_columns(mine: Storage, theirs: Storage) -> tuple[Array, Array, Array]:
    """``A^T A``, ``B^T A`` and ``B^T B`` of tall matrices, block of rows by block."""
    size = mine.shape[1]
    own, cross, other = (numpy.zeros((size, size)) for _ in range(3))
    for left, right in zip(blocks(mine, DType.F64), blocks(theirs, DType.F64), strict=True):
        own += left.T @ left
        cross += right.T @ left
        other += right.T @ right
    return own, cross, other


def _products_of_rows(mine: Storage, theirs: Storage) -> tuple[Array, Array, Array]:
    """``A A^T``, nothing, and ``B B^T`` of wide matrices, whose left vectors need no product of both."""
    return _outer(mine), numpy.zeros((0, 0)), _outer(theirs)


def _outer(matrix: Storage) -> Array:
    rows, cols = matrix.shape
    product = numpy.zeros((rows, rows))
    width = max(1, _SLAB // max(rows, 1))
    for first in range(0, cols, width):
        slab = numpy.concat([block[:, first : first + width] for block in blocks(matrix, DType.F64)])
        product += slab @ slab.T
    return product
