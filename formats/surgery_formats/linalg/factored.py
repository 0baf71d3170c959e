# SPDX-License-Identifier: Apache-2.0
"""Exact algebra of products ``B A`` without forming them: sums, norms, singular values, and the best lower rank.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, ``B A = Q_B (R_B R_A^T) Q_A^T``: a small core between two orthonormal bases.
Norms of the core do not suffer from cancellation, as ``tr(B^T B A A^T)`` does for nearly equal matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from surgery_formats.errors import FitError
from surgery_formats.linalg.matrix import one_thread

__all__ = ["concatenated", "factored_inner", "factored_norm", "relative_error", "rerank", "singular_values"]


class LowRankProduct(NamedTuple):
    """The best approximation ``B A`` of a given rank.

    Attributes:
        B: ``(m, r)``.
        A: ``(r, n)``; each factor holds the square root of every singular value.
        lost: ``||B_0 A_0 - B A||_F``, the least possible at this rank.
    """

    B: torch.Tensor
    A: torch.Tensor
    lost: float


def concatenated(
    terms: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: Sequence[float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_i w_i B_i A_i`` as one exact product: ``[w_1 B_1, w_2 B_2, ...]`` and ``[A_1; A_2; ...]``, same dtype.

    Terms are ``(B_i (m, r_i), A_i (r_i, n))``, of any ranks; weights, one per term, of either sign, are 1 by default.

    Raises:
        ValueError: no terms, or not one weight per term.
        FitError: the terms' shapes differ.
    """
    weights = [1.0] * len(terms) if weights is None else weights
    if not terms or len(weights) != len(terms):
        raise ValueError("at least one term and one weight per term are needed")
    shapes = {_shape(B, A) for B, A in terms}
    if len(shapes) > 1:
        raise FitError(f"matrices of different shapes cannot be added: {sorted(shapes)}")
    left = torch.cat([B * weight for (B, _), weight in zip(terms, weights, strict=True)], dim=1)
    return left, torch.cat([A for _, A in terms], dim=0)


def singular_values(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Singular values of ``B A``, ``(min(m, n, r),)``, float64, descending."""
    with torch.no_grad(), one_thread():
        values: torch.Tensor = torch.linalg.svdvals(_core(B, A)[1])
        return values


def factored_norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """``||B A||_F``."""
    with torch.no_grad(), one_thread():
        return float(torch.linalg.matrix_norm(_core(B, A)[1]))


def factored_inner(B: torch.Tensor, A: torch.Tensor, other_B: torch.Tensor, other_A: torch.Tensor) -> float:
    """``<B A, B' A'>_F = sum_ij (B^T B')_ij (A A'^T)_ij``, in float64.

    Raises:
        FitError: the matrices' shapes differ.
    """
    if _shape(B, A) != _shape(other_B, other_A):
        raise FitError(f"matrices of shapes {_shape(B, A)} and {_shape(other_B, other_A)} have no inner product")
    with torch.no_grad(), one_thread():
        return float(((B.double().T @ other_B.double()) * (A.double() @ other_A.double().T)).sum())


def relative_error(exact: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> float:
    """``||B A - B' A'||_F / ||B A||_F`` of ``exact = (B, A)`` and ``other = (B', A')``, in float64; infinite if only B A is zero.

    Raises:
        FitError: the matrices' shapes differ.
    """
    error = factored_norm(*concatenated([(B.double(), A.double()) for B, A in (exact, other)], [1.0, -1.0]))
    size = factored_norm(*exact)
    return error / size if size else math.inf if error else 0.0


def rerank(B: torch.Tensor, A: torch.Tensor, rank: int) -> LowRankProduct:
    """Return the product nearest to ``B (m, r)`` times ``A (r, n)`` (Eckart and Young).

    Its rank is `rank`, capped at ``min(m, n, r)``; the factors, in the inputs' dtype, are computed in float64.

    Raises:
        ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is not positive")
    with torch.no_grad(), one_thread():
        left, core, right = _core(B, A)
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        root = s[:rank].sqrt()
        product = left @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ right.T
        flip = torch.where(product[0].gather(0, product[0].abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
        lost = math.sqrt(float(s[rank:].square().sum()))
        return LowRankProduct((product[0] * flip).to(B.dtype), (product[1] * flip.T).to(A.dtype), lost)


def _core(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(Q_B, R_B R_A^T, Q_A)``, float64."""
    _shape(B, A)
    if not bool(torch.isfinite(B).all()) or not bool(torch.isfinite(A).all()):
        raise FitError("a factor holds NaN or infinity")
    left, upper = torch.linalg.qr(B.double())
    right, lower = torch.linalg.qr(A.double().T)
    return left, upper @ lower.T, right


def _shape(B: torch.Tensor, A: torch.Tensor) -> tuple[int, int]:
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise FitError(f"factors of shapes {list(B.shape)} and {list(A.shape)} have no product")
    return B.shape[0], A.shape[1]
