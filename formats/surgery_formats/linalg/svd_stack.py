# SPDX-License-Identifier: Apache-2.0
"""Truncated SVDs of many matrices of one shape at once, as a GPU wants them: few calls, each with much to do.

The arithmetic is that of `surgery_formats.linalg.svd`, with a leading axis over the matrices: block Krylov from the same
start block, the same certificate for each matrix, and one wait per step for all of them. Matrices that need something
of their own (zeros, extreme norms, spectra that converge late) are handed to `truncated_svd` one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy

from surgery_formats.arrays import Array, array_of, cast, device_of, empty, namespace, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.linalg.certificate import Convergence, outside_norm, ratio_bound
from surgery_formats.linalg.krylov import LOOK, ROUNDING, block_size, missed_energy, next_panel
from surgery_formats.linalg.matrix import SAFE, scale_of
from surgery_formats.linalg.panel import noise, orthonormal, positive, within, without
from surgery_formats.linalg.rank_criteria import checked_rank
from surgery_formats.linalg.svd import FINE, MEASURED, NOTHING, SHARE, SKEW, SLACK, SMALL, left_over, truncated_svd
from surgery_formats.threads import one_thread

__all__ = ["SVDStack", "energy_left", "truncated_svds"]

_EPS = float(numpy.finfo(numpy.float32).eps)
_THREADS = 8
_MOST_STEPS = 6
"""Krylov steps that all matrices take together; those that need more take them alone."""


class SVDStack(NamedTuple):
    """``D_i ~ U_i diag(S_i) V_i^T``; see `surgery_formats.linalg.svd.TruncatedSVD`.

    Attributes:
        U: ``(count, m, r)``, float32, on the device of the matrices.
        S: ``(count, r)``, float32, likewise.
        V: ``(count, n, r)``, float32, likewise.
        residual: ``||D_i - U_i diag(S_i) V_i^T||_F``.
        total: ``||D_i||_F``.
        bound: `residual` is at most this many times the least possible.
        alone: Numbers of the matrices that were factorised one by one.
    """

    U: Array
    S: Array
    V: Array
    residual: list[float]
    total: list[float]
    bound: list[float]
    alone: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Bases:
    """A certified basis of every matrix: `left` ``(count, r, short)``, `right` ``(count, r, long)``, `excess` of each."""

    left: Array
    right: Array
    excess: dict[int, float]


class _Matrices:
    """The matrices ``M_i``: each ``D_i``, transposed if `turned` so that its rows are the short side, over ``scale_i``."""

    def __init__(self, stack: Array, totals: Sequence[float]) -> None:
        _, m, n = stack.shape
        self.turned = m > n
        self.short, self.long = min(m, n), max(m, n)
        self.rows = stack.mT if self.turned else stack
        self.scales = [scale_of(total**2) if SAFE[0] < total**2 < SAFE[1] else 1.0 for total in totals]
        self.norm2 = [(total / scale) ** 2 for total, scale in zip(totals, self.scales, strict=True)]
        self._inverse = array_of([[[1 / scale]] for scale in self.scales], DType.F32, stack)

    def times(self, rows: Array) -> Array:
        """``(M x)^T``, ``(count, b, short)``, for vectors ``x^T`` as `rows`, ``(count or 1, b, long)``."""
        return (self.rows @ (rows * self._inverse).mT).mT

    def adjoint(self, rows: Array) -> Array:
        """``(M^T y)^T``, ``(count, b, long)``, for vectors ``y^T`` as `rows`, ``(count, b, short)``."""
        return (rows * self._inverse) @ self.rows


def truncated_svds(
    stack: Array, *, rank: int, totals: Sequence[float], accuracy: float = 1.001, seed: int = 0
) -> SVDStack:
    """The leading `rank` singular vectors of every matrix.

    Args:
        stack: ``(count, m, n)``, float32, finite.
        rank: Directions to compute of each; at most ``min(m, n)``.
        totals: ``||D_i||_F``; 0 for a matrix of zeros.
        accuracy: The greatest acceptable `SVDStack.bound`.
        seed: As in `truncated_svd`.

    Returns:
        Factors on the device of `stack`; equal inputs and seeds give equal bits, for any number of threads.

    Raises:
        ValueError: `rank` is not a positive integer.
        FitError: a matrix holds NaN or infinity.
    """
    with one_thread():
        return _factorised(stack, rank, totals, accuracy, seed)


def _factorised(stack: Array, rank: int, totals: Sequence[float], accuracy: float, seed: int) -> SVDStack:
    count, m, n = stack.shape
    rank = checked_rank(rank, (m, n))[0]
    known = [i for i, total in enumerate(totals) if SAFE[0] < total**2 < SAFE[1]]
    block = block_size(rank)
    result = None
    if known and min(m, n) > SMALL * block:
        matrices = _Matrices(stack, totals)
        bases = _krylov(matrices, known, rank, block, 1 + SHARE * (accuracy - 1), seed)
        result = _finished(stack, matrices, bases, seed) if bases.excess else None
    if result is None:
        U, S, V = (
            empty(shape, DType.F32, device_of(stack)) for shape in ((count, m, rank), (count, rank), (count, n, rank))
        )
        result = SVDStack(U, S, V, [0.0] * count, [0.0] * count, [math.inf] * count, tuple(range(count)))
    for i in result.alone:
        svd = truncated_svd(stack[i], rank=rank, accuracy=accuracy, seed=seed, total=totals[i])
        result.U[i, ...], result.S[i, ...], result.V[i, ...] = svd.U, svd.S, svd.V
        result.residual[i], result.total[i], result.bound[i] = svd.residual, svd.total, svd.bound
    return result


def energy_left(stack: Array, left: Array, right: Array) -> Array:
    """``||row of D_i - row of left_i right_i||^2 - ||row of D_i||^2``, ``(count, m)``, float64, from one product.

    `left` is ``(count, m, r)``, `right` ``(count, r, n)``, both float32. Right to a few 1e-5 of what is left, if that
    is more than a twentieth of the norm; see `surgery_formats.linalg.svd.left_over`.
    """
    with one_thread():
        product = cast(stack @ right.mT, DType.F64)
        wide, exact = cast(left, DType.F64), cast(right, DType.F64)
        return namespace(stack).sum(wide * (wide @ (exact @ exact.mT) - 2 * product), axis=-1)


def _krylov(matrices: _Matrices, known: Sequence[int], rank: int, block: int, target: float, seed: int) -> _Bases:
    """Extend all bases together until each is certified, or for `_MOST_STEPS`; `_Bases.excess` has those that are."""
    xp = namespace(matrices.rows)
    filler = noise((block, matrices.short), seed + 1, DType.F32, matrices.rows)
    fresh = matrices.times(noise((block, matrices.long), seed, DType.F32, matrices.rows)[None, ...])
    support = xp.any(fresh != 0, axis=-2)  # zero rows are part of no direction
    count = len(fresh)
    basis, image = fresh[:, :0, :], matrices.rows[:, :0, :]
    small = numpy.zeros((count, 0, 0))
    rounding = (ROUNDING * _EPS) ** 2
    progress = {i: Convergence() for i in known}
    chosen: dict[int, numpy.ndarray] = {}
    excess: dict[int, float] = {}
    for step in range(1, min(_MOST_STEPS, matrices.short // 2 // block) + 1):
        panel = cast(next_panel(fresh, basis, xp.roll(filler, step, axis=-1)), DType.F32)
        basis = xp.concat([basis, panel], axis=1)
        latest = matrices.adjoint(panel)
        image = xp.concat([image, latest], axis=1)
        fresh = without(matrices.times(latest), basis)
        size, wide = step * block, cast(fresh, DType.F64)
        products = xp.concat([cast(latest, DType.F64) @ cast(image, DType.F64).mT, wide @ wide.mT], axis=-1)
        new, beyond = numpy.split(to_cpu(products), [size], axis=-1)  # the only wait of a step
        small = numpy.pad(small, ((0, 0), (0, block), (0, block)))
        small[:, -block:], small[:, :, -block:] = new, new.mT
        if size < rank + block:
            continue  # too few to tell how the spectrum goes on
        waiting = [i for i in known if i not in chosen]
        near = small[waiting, -2 * block :, -2 * block :]
        edges = outside_norm(near, beyond[waiting])
        for i, edge, (ritz, vectors) in zip(waiting, edges, _eigenvectors(small[waiting]), strict=True):
            norm2 = matrices.norm2[i]
            rest = norm2 - float(ritz[:rank].sum())
            if rest < LOOK * norm2:
                continue  # nearly of this rank: what is left must be measured
            room, outside = rounding * norm2, edge.item
            missed = missed_energy(beyond[i], ritz, vectors, rank, rest, target, room, progress[i], outside)
            if ratio_bound(rest, missed) <= target:
                chosen[i], excess[i] = vectors[:, :rank].T, missed
        if len(chosen) == len(known):
            break
    padded = numpy.zeros((count, rank, basis.shape[1]), numpy.float32)
    for i, vectors in chosen.items():
        padded[i, :, : vectors.shape[1]] = vectors
    turn = array_of(padded, DType.F32, basis)
    return _Bases(within(turn @ basis, support), turn @ image, excess)


def _eigenvectors(small: numpy.ndarray) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """Of symmetric matrices: eigenvalues, descending and not negative, and eigenvectors, one per column.

    In threads, because on a GPU they take longer than on one core.
    """

    def of(matrix: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        values, vectors = numpy.linalg.eigh(matrix)
        return values[::-1].clip(min=0), numpy.ascontiguousarray(vectors[:, ::-1])

    return list(_pool().map(of, small))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads that stay: to start them takes as long as what they do."""
    return ThreadPoolExecutor(_THREADS, "surgery-eigen")


def _finished(stack: Array, matrices: _Matrices, bases: _Bases, seed: int) -> SVDStack:
    """Make both sides orthonormal, fix the signs, and measure what is left; what is not certified is left to do."""
    xp, rank = namespace(stack), bases.right.shape[1]
    basis = orthonormal(bases.right, noise((rank, matrices.long), seed, DType.F32, stack))
    turn, values, back = numpy.linalg.svd(to_cpu(cast(bases.right, DType.F64) @ basis.mT))
    left = array_of(turn.mT, DType.F64, stack) @ cast(bases.left, DType.F64)
    gram = left @ left.mT - xp.eye(rank, dtype=left.dtype, device=left.device)
    skew = to_cpu(xp.max(xp.reshape(xp.abs(gram), (len(stack), -1)), axis=1))
    right = within(array_of(back, DType.F64, stack) @ basis, xp.any(bases.right != 0, axis=-2))
    left, right = (right, left) if matrices.turned else (left, right)
    sign = positive(left)
    left, right = cast(left * sign, DType.F32), cast(right * sign, DType.F32)
    values = values.astype(numpy.float32)
    kept = numpy.sum(values.astype(numpy.float64) ** 2, axis=1).tolist()
    singular = array_of(values * numpy.asarray(matrices.scales, numpy.float32)[:, None], DType.F32, stack)
    alone = tuple(i for i in range(len(stack)) if i not in bases.excess or skew[i] > SKEW)
    result = SVDStack(left.mT, singular, right.mT, [], [], [], alone)
    for i, (norm2, scale) in enumerate(zip(matrices.norm2, matrices.scales, strict=True)):
        total, rest = math.sqrt(norm2) * scale, norm2 - kept[i]
        if i not in alone and rest < MEASURED**2 * norm2:
            how: Literal["fine", "plain"] = "fine" if rest < FINE**2 * norm2 else "plain"
            rows = left_over(stack[i, ...], result.U[i, ...] * singular[i, ...], right[i, ...], total=total, how=how)
            rest = float(xp.sum(rows)) / scale**2
        excess = bases.excess.get(i, math.inf) + _EPS**2 * norm2
        result.residual.append(math.sqrt(max(rest, 0.0)) * scale)
        result.total.append(total)
        result.bound.append(1.0 if rest <= NOTHING**2 * norm2 else ratio_bound(rest, excess) * (1 + SLACK))
    return result
