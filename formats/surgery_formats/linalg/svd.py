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

import torch

from surgery_formats.errors import FitError
from surgery_formats.linalg.certificate import ratio_bound
from surgery_formats.linalg.krylov import CertifiedBasis, block_size, krylov
from surgery_formats.linalg.matrix import MatrixSource, Operator, one_thread
from surgery_formats.linalg.panel import noise, orthonormal, within
from surgery_formats.linalg.rank_criteria import checked_rank, rank_holding

__all__ = ["TruncatedSVD", "left_over", "truncated_svd"]

_SMALL = 10
"""Short sides of at most this many blocks: all eigenvectors are as cheap as a Krylov basis."""
_SHARE = 0.8
"""Share of the permitted excess error used by the basis; rounding takes the rest."""
_MEASURED = 0.05
"""Relative residual below which it is measured on the matrix; above, ``||D||^2 - sum S^2`` is right to 1e-4 of it."""
_FINE = 1e-3
"""Relative residual below which float32 cannot measure it."""
_SKEW = 1e-5  # of products of unit vectors that ought to be orthogonal; float32 bases come within a few units of 1e-7
_SLACK = 1e-4  # added to the bound for the rounding of float32 bases
_NOTHING = 1e-6
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

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor
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

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``B (m, r)`` and ``A (r, n)``, with the square root of `S` in each, so that neither underflows in 16 bits."""
        root = self.S.sqrt()
        return self.U * root, (self.V * root).T


def truncated_svd(
    matrix: torch.Tensor | MatrixSource,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    accuracy: float = 1.001,
    seed: int = 0,
    device: torch.device | str | None = None,
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
    fine = (energy is not None and 1 - energy < _FINE**2) or (max_error is not None and max_error < _FINE)
    target = None if device is None else torch.device(device)
    with torch.no_grad(), one_thread():
        op = Operator(matrix, target, None, total)
        result = torch.float64 if isinstance(matrix, torch.Tensor) and matrix.dtype == torch.float64 else torch.float32
        if op.norm2 == 0:
            return _zero(op, rank if energy is None and max_error is None else 0, result)
        basis = _solve(op.in_float64() if fine else op, choose, block_size(rank), 1 + _SHARE * (accuracy - 1), seed)
        return _finished(op, basis, result, seed)


def left_over(
    matrix: torch.Tensor | MatrixSource,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    total: float | None = None,
    how: Literal["plain", "fine", "sums"] = "plain",
    device: torch.device | str | None = None,
) -> torch.Tensor:
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
    with torch.no_grad(), one_thread():
        op = Operator(matrix, None if device is None else torch.device(device), None, total)
        if how == "sums":
            return op.change_of_energy(left / op.scale, right) * op.scale**2
        dtype = torch.float64 if how == "fine" else op.dtype
        return op.left_over(left.to(dtype) / op.scale, right, dtype) * op.scale**2


def _criterion(
    shape: tuple[int, ...], rank: int | None, energy: float | None, max_error: float | None
) -> Callable[[torch.Tensor, float], int | None]:
    limit = checked_rank(rank, shape)[0] if rank is not None else min(shape)
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy {energy} is not in (0, 1]")
    if max_error is not None and not 0 <= max_error < 1:
        raise ValueError(f"max_error {max_error} is not in [0, 1)")
    if rank is None and energy is None and max_error is None:
        raise ValueError("one of rank, energy and max_error is needed")
    share = min(1.0 if energy is None else 1 - energy, 1.0 if max_error is None else max_error**2)

    def choose(squares: torch.Tensor, norm2: float) -> int | None:
        if energy is None and max_error is None:
            return limit if len(squares) >= limit else None
        rank_needed = rank_holding(squares, norm2, share)
        if rank_needed is None:
            return limit if len(squares) >= limit else None
        return min(rank_needed, limit)

    return choose


def _solve(
    op: Operator, choose: Callable[[torch.Tensor, float], int | None], block: int, target: float, seed: int
) -> CertifiedBasis:
    if op.short <= _SMALL * block:
        return _all_eigenvectors(op, choose)
    basis = krylov(op, choose, block, op.short // 2, target, seed)
    return _all_eigenvectors(op, choose) if basis is None else basis


def _all_eigenvectors(op: Operator, choose: Callable[[torch.Tensor, float], int | None]) -> CertifiedBasis:
    gram = op.gram()
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    known = squares.cpu()
    keep = choose(known, float(known.sum()))
    left = within(vectors[:, : op.short if keep is None else keep].T.contiguous(), gram.diagonal() != 0)
    exact = op if op.dtype == torch.float64 else op.in_float64()
    return CertifiedBasis(left, exact.adjoint(left), 0.0, 0)


def _finished(op: Operator, certified: CertifiedBasis, dtype: torch.dtype, seed: int) -> TruncatedSVD:
    """Make both sides orthonormal by a small SVD in float64, fix the signs, and measure the residual."""
    basis = orthonormal(certified.right, noise((len(certified.right), op.long), seed, op.dtype, op.device))
    turn, values, back = torch.linalg.svd((certified.right.double() @ basis.T).cpu())
    left = _straight(turn.T.to(op.device) @ certified.left.double(), seed)
    right = within(back.to(op.device) @ basis, (certified.right != 0).any(0))
    if op.turned:
        left, right = right, left
    flip = torch.where(left.gather(1, left.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    left, right, values = (left * flip).to(dtype), (right * flip).to(dtype), values.to(dtype)
    rest = op.norm2 - float(values.double().square().sum())
    on_device = values.to(op.device)
    if rest < _MEASURED**2 * op.norm2:
        fine = torch.float64 if rest < _FINE**2 * op.norm2 else op.dtype
        rest = float(op.left_over(left.T.to(fine) * on_device.to(fine), right, fine).sum())
    rounding = torch.finfo(dtype).eps ** 2 * op.norm2
    bound = 1.0 if rest <= _NOTHING**2 * op.norm2 else ratio_bound(rest, certified.excess + rounding) * (1 + _SLACK)
    total = math.sqrt(op.norm2) * op.scale
    return TruncatedSVD(
        left.T, on_device * op.scale, right.T, math.sqrt(rest) * op.scale, total, bound, certified.steps
    )


def _straight(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Make `rows` orthonormal, first to last, if they are not: directions without any weight can come out skew."""
    gram = rows @ rows.T
    gram.diagonal().sub_(1)
    if float(gram.abs().max()) <= _SKEW:
        return rows
    return orthonormal(rows, noise((len(rows), rows.shape[1]), seed, torch.float32, rows.device) * (rows != 0).any(0))


def _zero(op: Operator, rank: int | None, dtype: torch.dtype) -> TruncatedSVD:
    """Decompose a matrix of zeros, with arbitrary orthonormal vectors."""
    m, n = op.shape
    keep = min(rank or 0, m, n)
    left = torch.eye(m, keep, dtype=dtype, device=op.device)
    right = torch.eye(n, keep, dtype=dtype, device=op.device)
    return TruncatedSVD(left, left.new_zeros(keep), right, 0.0, 0.0, 1.0, 0)
