# SPDX-License-Identifier: Apache-2.0
"""Truncated singular value decomposition with a measured residual and a bound on its ratio to the optimum.

``||D - U S V^T||_F`` is least among matrices of the same rank (Eckart and Young, 1936) up to a factor of at most
`TruncatedSVD.bound`. Large matrices go through block Krylov (`surgery_formats.linalg.krylov`); small ones, and those
that need a large part of the spectrum, through all eigenvectors of the short side's Gram matrix, in float64. One
implementation serves CPU and CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy

from surgery_formats.arrays import Array, array_of, cast, dtype_of, namespace, to_cpu, wide
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.certificate import ratio_bound
from surgery_formats.linalg.krylov import CertifiedBasis, block_size, krylov
from surgery_formats.linalg.matrix import MatrixSource, Operator
from surgery_formats.linalg.panel import noise, orthonormal, positive, within
from surgery_formats.linalg.rank_criteria import checked_rank, rank_holding
from surgery_formats.threads import one_thread

__all__ = [
    "FINE",
    "MEASURED",
    "NOTHING",
    "SHARE",
    "SKEW",
    "SLACK",
    "SMALL",
    "TruncatedSVD",
    "left_over",
    "truncated_svd",
]

SMALL = 10
"""Short sides of at most this many blocks: all eigenvectors are as cheap as a Krylov basis."""
SHARE = 0.8
"""Share of the permitted excess error used by the basis; rounding takes the rest."""
MEASURED = 0.05
"""Relative residual below which it is measured on the matrix; above, ``||D||^2 - sum S^2`` is right to 1e-4 of it."""
FINE = 1e-3
"""Relative residual below which float32 cannot measure it."""
SKEW = 1e-5  # of products of unit vectors that ought to be orthogonal; float32 bases come within a few units of 1e-7
SLACK = 1e-4  # added to the bound for the rounding of float32 bases
NOTHING = 1e-6
"""Relative residual below which the matrix has exactly this rank, up to rounding."""


class TruncatedSVD(NamedTuple):
    """``D ~ U diag(S) V^T``.

    Attributes:
        U: ``(m, r)``, orthonormal columns; the element of largest magnitude in each is positive.
        S: ``(r,)``, descending.
        V: ``(n, r)``, orthonormal columns.
        residual: ``||D - U diag(S) V^T||_F``, measured, not estimated.
        total: ``||D||_F``.
        bound: `residual` is at most this many times the least possible at this rank; 1 below 1e-6 of `total`, where
            the matrix has this rank. `surgery_formats.linalg.certificate` states the premise.
        iterations: Block Krylov steps; 0 if all eigenvectors were computed.
    """

    U: Array
    S: Array
    V: Array
    residual: float
    total: float
    bound: float
    iterations: int

    @property
    def rank(self) -> int:
        """Number of columns."""
        return len(self.S)

    @property
    def relative(self) -> float:
        """``residual / total``; 0 for a matrix of zeros."""
        return self.residual / self.total if self.total else 0.0

    def factors(self) -> tuple[Array, Array]:
        """``B (m, r)`` and ``A (r, n)``, with the square root of `S` in each, so that neither underflows in 16 bits."""
        root = namespace(self.S).sqrt(self.S)
        return self.U * root, (self.V * root).T


def truncated_svd(
    matrix: Array | MatrixSource,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    accuracy: float = 1.001,
    seed: int = 0,
    device: str | None = None,
    total: float | None = None,
) -> TruncatedSVD:
    """Compute the leading singular vectors of a matrix.

    Args:
        matrix: ``(m, n)``. A tensor of any floating dtype is converted once, to float32 (float64 stays); a source is
            read block by block, once per product.
        rank: This rank; with another criterion, at most this rank. Capped at ``min(m, n)``.
        energy: The least rank that holds this share of ``||D||_F^2``, in (0, 1].
        max_error: The least rank with ``residual <= max_error * total``, in [0, 1).
        accuracy: The greatest acceptable `TruncatedSVD.bound`. Ranks that reach into noise are several times cheaper
            at 1.01.
        seed: Seed of the start block; equal inputs and seeds give equal bits, for any number of threads.
        device: Where to compute; the matrix's device by default. The result stays there.
        total: ``||D||_F`` if already known (float64 and finite), which saves a pass.

    Returns:
        Factors in float32 (float64 for a float64 tensor).

    Raises:
        ValueError: no criterion, or one out of range.
        FitError: not a matrix, or it contains NaN or infinity.
    """
    shape = tuple(matrix.shape)
    if len(shape) != 2 or min(shape) < 1:
        raise FitError(f"expected a matrix, found a tensor of shape {list(shape)}")
    if not accuracy > 1:
        raise ValueError(f"accuracy {accuracy} is not above 1")
    choose = _criterion(shape, rank, energy, max_error)
    fine = (energy is not None and 1 - energy < FINE**2) or (max_error is not None and max_error < FINE)
    with one_thread():
        op = Operator(matrix, device, total)
        result = wide(dtype_of(op.like))
        if op.norm2 == 0:
            return _zero(op, rank if energy is None and max_error is None else 0, result)
        basis = _solve(op.in_float64() if fine else op, choose, block_size(rank), 1 + SHARE * (accuracy - 1), seed)
        return _finished(op, basis, result, seed)


def left_over(
    matrix: Array | MatrixSource,
    left: Array,
    right: Array,
    *,
    total: float | None = None,
    how: Literal["plain", "fine", "sums"] = "plain",
    device: str | None = None,
) -> Array:
    """``||row of D - row of left right||^2`` for every row, ``(m,)``, float64.

    Args:
        matrix: ``(m, n)``, as in `truncated_svd`.
        left: ``(m, r)``.
        right: ``(r, n)``.
        total: As in `truncated_svd`.
        how: ``plain`` forms each element in float32; ``fine`` in float64, needed below a thousandth of the norm;
            ``sums`` forms none and returns ``||row of D - row of left right||^2 - ||row of D||^2`` from one product.
        device: Where to compute.
    """
    with one_thread():
        op = Operator(matrix, device, total)
        if how == "sums":
            return op.change_of_energy(left / op.scale, right) * op.scale**2
        dtype = DType.F64 if how == "fine" else op.dtype
        return op.left_over(cast(left, dtype) / op.scale, right, dtype) * op.scale**2


def _criterion(
    shape: tuple[int, ...], rank: int | None, energy: float | None, max_error: float | None
) -> Callable[[numpy.ndarray, float], int | None]:
    limit = checked_rank(rank, shape)[0] if rank is not None else min(shape)
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy {energy} is not in (0, 1]")
    if max_error is not None and not 0 <= max_error < 1:
        raise ValueError(f"max_error {max_error} is not in [0, 1)")
    if rank is None and energy is None and max_error is None:
        raise ValueError("one of rank, energy and max_error is needed")
    share = min(1.0 if energy is None else 1 - energy, 1.0 if max_error is None else max_error**2)

    def choose(squares: numpy.ndarray, norm2: float) -> int | None:
        if energy is None and max_error is None:
            return limit if len(squares) >= limit else None
        rank_needed = rank_holding(squares, norm2, share)
        if rank_needed is None:
            return limit if len(squares) >= limit else None
        return min(rank_needed, limit)

    return choose


def _solve(
    op: Operator, choose: Callable[[numpy.ndarray, float], int | None], block: int, target: float, seed: int
) -> CertifiedBasis:
    if op.short <= SMALL * block:
        return _all_eigenvectors(op, choose)
    basis = krylov(op, choose, block, op.short // 2, target, seed)
    return _all_eigenvectors(op, choose) if basis is None else basis


def _all_eigenvectors(op: Operator, choose: Callable[[numpy.ndarray, float], int | None]) -> CertifiedBasis:
    gram, xp = op.gram(), namespace(op.like)
    ascending, vectors = xp.linalg.eigh(gram)
    known = to_cpu(ascending)[::-1].clip(min=0)
    keep = choose(known, float(known.sum()))
    leading = xp.flip(vectors.T, axis=0)[: op.short if keep is None else keep]
    left = within(leading, xp.linalg.diagonal(gram) != 0)
    exact = op if op.dtype is DType.F64 else op.in_float64()
    return CertifiedBasis(left, exact.adjoint(left), 0.0, 0)


def _finished(op: Operator, certified: CertifiedBasis, dtype: DType, seed: int) -> TruncatedSVD:
    """Make both sides orthonormal by a small SVD in float64, fix the signs, and measure the residual."""
    xp, like = namespace(op.like), op.like
    basis = orthonormal(certified.right, noise((len(certified.right), op.long), seed, op.dtype, like))
    # on the CPU: the drivers of GPUs are off by 1e-4, or slow
    turn, values, back = numpy.linalg.svd(to_cpu(cast(certified.right, DType.F64) @ basis.T))
    left = _straight(array_of(turn.T, DType.F64, like) @ cast(certified.left, DType.F64), seed)
    right = within(array_of(back, DType.F64, like) @ basis, xp.any(certified.right != 0, axis=0))
    if op.turned:
        left, right = right, left
    flip = positive(left)
    left, right, values = cast(left * flip, dtype), cast(right * flip, dtype), values.astype(dtype.numpy)
    rest = op.norm2 - float(numpy.sum(values.astype(numpy.float64) ** 2))
    singular = array_of(values, dtype, like)
    if rest < MEASURED**2 * op.norm2:
        fine = DType.F64 if rest < FINE**2 * op.norm2 else op.dtype
        rest = float(xp.sum(op.left_over(cast(left.T, fine) * cast(singular, fine), right, fine)))
    rounding = float(xp.finfo(left.dtype).eps) ** 2 * op.norm2
    bound = 1.0 if rest <= NOTHING**2 * op.norm2 else ratio_bound(rest, certified.excess + rounding) * (1 + SLACK)
    total = math.sqrt(op.norm2) * op.scale
    return TruncatedSVD(left.T, singular * op.scale, right.T, math.sqrt(rest) * op.scale, total, bound, certified.steps)


def _straight(rows: Array, seed: int) -> Array:
    """Make `rows` orthonormal, first to last, if they are not: directions without any weight can come out skew."""
    xp = namespace(rows)
    gram = rows @ rows.T - xp.eye(len(rows), dtype=xp.float64, device=rows.device)
    if float(xp.max(xp.abs(gram))) <= SKEW:
        return rows
    return orthonormal(rows, noise(tuple(rows.shape), seed, DType.F32, rows) * xp.any(rows != 0, axis=0))


def _zero(op: Operator, rank: int | None, dtype: DType) -> TruncatedSVD:
    """Decompose a matrix of zeros, with arbitrary orthonormal vectors."""
    xp, (m, n) = namespace(op.like), op.shape
    keep = min(rank or 0, m, n)
    left, right = (cast(xp.eye(side, keep, device=op.like.device), dtype) for side in (m, n))
    return TruncatedSVD(left, array_of([0.0] * keep, dtype, op.like), right, 0.0, 0.0, 1.0, 0)
