# SPDX-License-Identifier: Apache-2.0
"""Adaptive block Krylov: the leading singular vectors of a matrix from a few products with it.

Block Golub-Kahan with full re-orthogonalisation and Rayleigh-Ritz on the whole basis (Musco and Musco,
arXiv:1504.05477; block sizes after Meyer, Musco and Musco, arXiv:2305.02535). A new block is orthogonalised against the
basis before *and after* it is normalised: on a difference of low rank, such as a merged LoRA, the remainder is rounding
noise, and normalising amplifies its overlap with the basis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy

from surgery_formats.arrays import Array, array_of, cast, dtype_of, namespace, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.linalg.certificate import Convergence, allowed_excess, excess_energy, outside_norm, ratio_bound
from surgery_formats.linalg.matrix import Operator
from surgery_formats.linalg.panel import noise, orthonormal, within, without

__all__ = ["LOOK", "ROUNDING", "CertifiedBasis", "block_size", "krylov", "missed_energy", "next_panel"]

_EXACT = 5e-7
"""Residual, relative to the norm, below which a matrix has exactly the requested rank."""
ROUNDING = 16.0
"""Units in the last place, relative to the norm, that products and orthogonalisation may lose."""
LOOK = 1e-6
"""Share of the energy below which the residual is measured, because the difference of energies is rounding noise."""


@dataclass(frozen=True, slots=True)
class CertifiedBasis:
    """A basis with its error bound, for ``M`` of the `Operator`.

    Attributes:
        left: ``(r, short)``, rows orthonormal to rounding.
        right: ``left M``, ``(r, long)``.
        excess: Bound on the energy missed, see `surgery_formats.linalg.certificate`.
        steps: Blocks in the basis.
    """

    left: Array
    right: Array
    excess: float
    steps: int


def block_size(rank: int | None) -> int:
    """Columns per block: one block for a small rank; for a large one, smaller blocks need fewer products in total."""
    if rank is None:
        return 32
    return rank + 8 if rank <= 32 else min(128, max(40, (rank // 2 + 7) // 8 * 8))


def krylov(
    op: Operator,
    choose: Callable[[numpy.ndarray, float], int | None],
    block: int,
    most: int,
    target: float,
    seed: int,
) -> CertifiedBasis | None:
    """Extend a basis by `block` columns per step until it is certified; None if `most` columns were not enough.

    `choose` maps ``(theta^2 descending, ||M||_F^2)`` to the number to keep, None if the basis holds too few. `target` is the
    greatest acceptable ratio to the optimum; if float32 is too coarse for it, float64 is used.
    """
    filler = noise((block, op.short), seed + 1, op.dtype, op.like)
    fresh = op.times(noise((block, op.long), seed, op.dtype, op.like))
    xp, room = namespace(fresh), min(most, 8 * block) + block
    rounding = (ROUNDING * float(xp.finfo(fresh.dtype).eps)) ** 2 * op.norm2
    support = xp.any(fresh != 0, axis=-2)  # non-zero rows of M: zero rows are part of no direction
    basis = xp.empty((room, op.short), dtype=fresh.dtype, device=fresh.device)  # rows are vectors
    image = xp.empty((room, op.long), dtype=fresh.dtype, device=fresh.device)
    small = numpy.zeros((room, room))
    size, steps, next_check, progress = 0, 0, 0, Convergence()
    while size + block <= most:
        if size + block > len(basis):
            basis, image = _grown(basis), _grown(image)
            small = numpy.pad(small, (0, len(small)))
        old, at, size, steps = size, slice(size, size + block), size + block, steps + 1
        basis[at] = next_panel(fresh, basis[:old], xp.roll(filler, steps, axis=-1))
        image[at] = op.adjoint(basis[at])
        fresh = without(op.times(image[at]), basis[:size])
        images, wide = cast(image[:size], DType.F64), cast(fresh, DType.F64)
        seen = to_cpu(xp.concat([images[at] @ images.mT, wide @ wide.mT], axis=-1))  # the only wait of a step
        new, beyond = seen[:, :size], seen[:, size:]
        small[at, :size], small[:size, at] = new, new.T
        if size < next_check:
            continue
        next_check = int(size * 1.12)  # the eigenvectors of a large basis cost more than a step
        ritz, vectors = numpy.linalg.eigh(small[:size, :size])
        ritz, vectors = ritz[::-1].clip(min=0), numpy.ascontiguousarray(vectors[:, ::-1])
        keep = choose(ritz, op.norm2)
        if keep is None:
            if _hopeless(ritz, op.norm2, choose, most):
                return None
            continue
        if keep >= size:
            continue
        rest = op.norm2 - float(ritz[:keep].sum())
        near = small[max(0, old - block) : size, max(0, old - block) : size]
        outside = partial(outside_norm, near, beyond)
        excess = missed_energy(beyond, ritz, vectors, keep, rest, target, rounding, progress, outside)
        best = None
        if rest < LOOK * op.norm2:
            best = _ritz_vectors(basis[:size], image[:size], vectors[:, :keep], support, excess, steps)
            rest = residual(op, best) ** 2
            if rest <= _EXACT**2 * op.norm2:
                return best
            if ratio_bound(rest, rounding) > target and op.dtype is DType.F32:
                return krylov(op.in_float64(), choose, block, most, target, seed)
        if ratio_bound(rest, excess) <= target:
            return best or _ritz_vectors(basis[:size], image[:size], vectors[:, :keep], support, excess, steps)
    return None


def missed_energy(
    beyond: numpy.ndarray,
    ritz: numpy.ndarray,
    vectors: numpy.ndarray,
    keep: int,
    rest: float,
    target: float,
    rounding: float,
    progress: Convergence,
    outside: Callable[[], numpy.ndarray],
) -> float:
    """Bound on the energy that the first `keep` Ritz vectors miss, see `surgery_formats.linalg.certificate`.

    Args:
        beyond: ``W^T W``, ``(block, block)``, of what the next product adds outside the basis.
        ritz: Eigenvalues of ``K^T M M^T K`` of the basis, descending.
        vectors: Its eigenvectors, one per column.
        keep: Number of vectors to keep.
        rest: Energy outside them.
        target: The greatest acceptable ratio to the optimum; a bound good enough for it is not improved further.
        rounding: Energy that rounding may hide; part of the result.
        progress: The matrix's own; is updated.
        outside: Called for `outside_norm` if it is needed.
    """
    enough = allowed_excess(rest, target) - rounding
    excess = progress.expected(keep, len(ritz), float(ritz[:keep].sum()))
    if excess > enough:  # cheap bounds first
        last = vectors[-len(beyond) :]
        excess = min(excess, excess_energy(ritz, last.T @ (beyond @ last), keep, float(outside()), enough))
    return excess + rounding


def next_panel(products: Array, basis: Array, filler: Array) -> Array:
    """Orthonormal rows ``(..., b, n)``, float64, that extend `basis` ``(..., size, n)`` towards `products`."""
    panel = orthonormal(products, filler)
    return orthonormal(without(cast(panel, dtype_of(basis)), basis), filler) if basis.shape[-2] else panel


def residual(op: Operator, approximation: CertifiedBasis) -> float:
    """``||M - left^T right||_F``, formed element by element."""
    left, right = (approximation.right, approximation.left) if op.turned else (approximation.left, approximation.right)
    return math.sqrt(float(namespace(left).sum(op.left_over(left.T, right, op.dtype))))


def _hopeless(
    ritz: numpy.ndarray, norm2: float, choose: Callable[[numpy.ndarray, float], int | None], most: int
) -> bool:
    """Whether even `most` columns, all as large as the smallest converged value so far, would hold too little."""
    typical = float(ritz[len(ritz) // 2])
    imagined = numpy.concat([ritz, numpy.full(max(0, most - len(ritz)), typical)])
    return choose(imagined, norm2) is None


def _ritz_vectors(
    basis: Array, image: Array, vectors: numpy.ndarray, support: Array, excess: float, steps: int
) -> CertifiedBasis:
    chosen = array_of(vectors.T, dtype_of(basis), basis)
    return CertifiedBasis(within(chosen @ basis, support), chosen @ image, excess, steps)


def _grown(rows: Array) -> Array:
    return namespace(rows).concat([rows, namespace(rows).empty_like(rows)])
