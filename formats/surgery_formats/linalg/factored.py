# SPDX-License-Identifier: Apache-2.0
"""Exact algebra of products ``B A`` without forming them: sums, norms, singular values, and the best lower rank.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, ``B A = Q_B (R_B R_A^T) Q_A^T``: a small core between two orthonormal bases.
Norms of the core do not suffer from cancellation, as ``tr(B^T B A A^T)`` does for nearly equal matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy

from surgery_formats.arrays import Array, all_finite, array_of, cast, dtype_of, namespace, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.panel import positive
from surgery_formats.threads import one_thread

__all__ = ["concatenated", "factored_inner", "factored_norm", "relative_error", "rerank", "singular_values"]


class LowRankProduct(NamedTuple):
    """The best approximation ``B A`` of a given rank.

    Attributes:
        B: ``(m, r)``.
        A: ``(r, n)``; each factor holds the square root of every singular value.
        lost: ``||B_0 A_0 - B A||_F``, the least possible at this rank.
    """

    B: Array
    A: Array
    lost: float


def concatenated(terms: Sequence[tuple[Array, Array]], weights: Sequence[float] | None = None) -> tuple[Array, Array]:
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
    xp = namespace(*terms[0])
    left = xp.concat([B * weight for (B, _), weight in zip(terms, weights, strict=True)], axis=1)
    return left, xp.concat([A for _, A in terms], axis=0)


def singular_values(B: Array, A: Array) -> numpy.ndarray:
    """Singular values of ``B A``, ``(min(m, n, r),)``, float64, descending, on the CPU."""
    with one_thread():
        return numpy.linalg.svdvals(_core(B, A)[1])


def factored_norm(B: Array, A: Array) -> float:
    """``||B A||_F``."""
    with one_thread():
        return float(numpy.linalg.norm(_core(B, A)[1]))


def factored_inner(B: Array, A: Array, other_B: Array, other_A: Array) -> float:
    """``<B A, B' A'>_F = sum_ij (B^T B')_ij (A A'^T)_ij``, in float64.

    Raises:
        FitError: the matrices' shapes differ.
    """
    if _shape(B, A) != _shape(other_B, other_A):
        raise FitError(f"matrices of shapes {_shape(B, A)} and {_shape(other_B, other_A)} have no inner product")
    with one_thread():
        B, A, other_B, other_A = (cast(factor, DType.F64) for factor in (B, A, other_B, other_A))
        return float(((B.T @ other_B) * (A @ other_A.T)).sum())


def relative_error(exact: tuple[Array, Array], other: tuple[Array, Array]) -> float:
    """``||B A - B' A'||_F / ||B A||_F`` of ``exact = (B, A)`` and ``other = (B', A')``, in float64; infinite if only B A is zero.

    Raises:
        FitError: the matrices' shapes differ.
    """
    error = factored_norm(
        *concatenated([(cast(B, DType.F64), cast(A, DType.F64)) for B, A in (exact, other)], [1.0, -1.0])
    )
    size = factored_norm(*exact)
    return error / size if size else math.inf if error else 0.0


def rerank(B: Array, A: Array, rank: int) -> LowRankProduct:
    """Return the product nearest to ``B (m, r)`` times ``A (r, n)`` (Eckart and Young).

    Its rank is `rank`, capped at ``min(m, n, r)``; the factors, in the inputs' dtype, are computed in float64.

    Raises:
        ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is not positive")
    with one_thread():
        left, core, right = _core(B, A)
        u, s, vh = numpy.linalg.svd(core, full_matrices=False)
        root = numpy.sqrt(s[:rank])
        turn, back = (array_of(side, DType.F64, B) for side in (u[:, :rank] * root, root[:, None] * vh[:rank]))
        product_B, product_A = left @ turn, back @ right.T
        flip = positive(product_B.T)
        lost = math.sqrt(float(numpy.sum(s[rank:] ** 2)))
        return LowRankProduct(cast(product_B * flip.T, dtype_of(B)), cast(product_A * flip, dtype_of(A)), lost)


def _core(B: Array, A: Array) -> tuple[Array, numpy.ndarray, Array]:
    """``(Q_B, R_B R_A^T, Q_A)``, float64; the core on the CPU, where small decompositions are right and fast."""
    _shape(B, A)
    if not all_finite(B) or not all_finite(A):
        raise FitError("a factor holds NaN or infinity")
    xp = namespace(B, A)
    left, upper = xp.linalg.qr(cast(B, DType.F64))
    right, lower = xp.linalg.qr(cast(A, DType.F64).T)
    return left, to_cpu(upper @ lower.T), right


def _shape(B: Array, A: Array) -> tuple[int, int]:
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise FitError(f"factors of shapes {list(B.shape)} and {list(A.shape)} have no product")
    return B.shape[0], A.shape[1]
