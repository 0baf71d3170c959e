# SPDX-License-Identifier: Apache-2.0
"""Codes in place of floating-point factors: symmetric integers with one scale per group, rounded to keep the product.

A value is ``code * scale``; ``-128`` and ``-8`` are not used, so that the range is symmetric. A bfloat16 scale times an
8-bit code is exact in float32: every decoder gets the same numbers, and only the encoder has choices. It makes four for
a product ``B A``, each measured to help (docs/compact.md):

- Singular values are split evenly, so that an error in either factor costs the same (`factored.rerank`).
- Directions are mixed by an orthogonal matrix. ``B A`` is unchanged, but every direction now has the mean of the
  singular values, and the squared rounding error falls from ``sum s_k^2`` to ``(sum s_k)^2 / r`` (Cauchy and Schwarz).
- When a direction is rounded, later ones compensate, as far as the other factor cannot distinguish them (the error
  feedback of GPTQ, Frantar et al. 2022, arXiv:2210.17323, with the other factor in place of the inputs).
- Each factor in turn is solved again, by least squares, against the rounded other one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from surgery_formats.arrays import Array, cast, namespace
from surgery_formats.dtypes import DType
from surgery_formats.linalg.coding import Coding
from surgery_formats.linalg.factored import relative_error, rerank
from surgery_formats.linalg.panel import squares
from surgery_formats.threads import one_thread

__all__ = ["CodedProduct", "Codes", "dequantise", "quantise", "quantise_product"]

_ROUNDS = 4  # more rounds reduce the error by less than 3 %
_CHUNK = 1 << 16  # values per step of the search: they stay in the cache
_DAMPING = 1e-3  # relative to the mean diagonal: otherwise missing directions would compensate for anything


class Codes(NamedTuple):
    """Codes and scales, in row-major order.

    Attributes:
        values: int8, in the shape of the coded tensor.
        scales: bfloat16, ``(ceil(numel / group),)``; 0 for a group of zeros.
    """

    values: Array
    scales: Array


class CodedProduct(NamedTuple):
    """A product ``B A`` as codes.

    Attributes:
        B: ``(out, rank)``.
        A: The transpose of A, ``(in, rank)``: a group runs over directions, all on the scale of one row of the weight.
        error: ``||B A - decoded|| / ||B A||``, Frobenius.
    """

    B: Codes
    A: Codes
    error: float


def quantise(values: Array, coding: Coding) -> Codes:
    """Nearest codes, under the scales of least squared error.

    Values that are not clipped are within half a step of their code; clipping is used where it helps the rest of the
    group. Coding decoded values again gives the same numbers. `values` are finite, of any shape.
    """
    with one_thread():
        flat = _exact(values).reshape(-1)
        scales = _scales(flat, coding, _candidates(coding, thorough=True))
        codes = _nearest(flat, _each(scales, flat.shape[0], coding), coding)
        return Codes(cast(codes, DType.I8).reshape(values.shape), cast(scales, DType.BF16))


def dequantise(codes: Codes, coding: Coding) -> Array:
    """Decode exactly, to float32."""
    flat = cast(codes.values, DType.F32).reshape(-1)
    return (flat * _each(cast(codes.scales, DType.F32), flat.shape[0], coding)).reshape(codes.values.shape)


def quantise_product(B: Array, A: Array, coding: Coding) -> CodedProduct:
    """Codes whose product is near ``B A``, with `B` ``(out, rank)`` and `A` ``(rank, in)``.

    The factors change, and redundant directions are dropped.

    Raises:
        FitError: a value is not finite.
    """
    with one_thread():
        B, A = _exact(B), _exact(A)
        even = rerank(B, A, B.shape[1])
        factors = (B, A) if even.B.shape[1] == B.shape[1] else (even.B, even.A)
        # codes of decoded values stay the same
        best = quantise(factors[0], coding), quantise(factors[1].T, coding)
        left = _distance(even.B, even.A, best, coding)
        for pair in _rounds(even.B, even.A, coding) if left > 1e-14 else ():
            if (distance := _distance(even.B, even.A, pair, coding)) < left:
                best, left = pair, distance
        return CodedProduct(*best, relative_error((B, A), _decoded(best, coding)))


def _rounds(B: Array, A: Array, coding: Coding) -> Iterator[tuple[Codes, Codes]]:
    """Yield pairs of coded factors, each solved against the one before. Inside, directions are rows."""
    mix = _mixing(B.shape[1], B)
    left, right = mix @ B.T, mix @ A
    if not bool(namespace(left).any(left != 0)):
        return
    coded = _fed_back(left, right, coding)
    rounded = _rows(coded, coding)
    for number in range(_ROUNDS):
        solved = _solved(rounded, left, right)
        coded_right = _fed_back(solved, rounded, coding)
        yield coded, coded_right
        if number + 1 < _ROUNDS:
            rounded_right = _rows(coded_right, coding)
            coded = _fed_back(_solved(rounded_right, right, left), rounded_right, coding)
            rounded = _rows(coded, coding)


def _mixing(rank: int, like: Array) -> Array:
    """Hartley's matrix: orthogonal, symmetric, all squares close to ``1 / rank``, for any rank."""
    xp = namespace(like)
    steps = xp.arange(rank, dtype=xp.float64, device=like.device)
    angles = steps[:, None] * steps % rank * (2 * math.pi / rank)
    return (xp.cos(angles) + xp.sin(angles)) / math.sqrt(rank)


def _solved(fixed: Array, target: Array, other: Array) -> Array:
    """``argmin_X ||target^T other - fixed^T X||``, with directions as rows."""
    return namespace(fixed).linalg.solve(_gram(fixed), (fixed @ target.T) @ other)


def _gram(rows: Array) -> Array:
    xp, gram = namespace(rows), rows @ rows.T
    damping = _DAMPING * float(xp.linalg.trace(gram)) / len(rows) or 1.0
    return gram + damping * xp.eye(len(rows), dtype=xp.float64, device=rows.device)


def _fed_back(rows: Array, other: Array, coding: Coding) -> Codes:
    """Codes of ``rows^T``: each row's error, as seen through `other`, is fed into the rows that follow."""
    xp, flat = namespace(rows), rows.T.reshape(-1)
    scales = _scales(flat, coding, _candidates(coding, thorough=False))
    each = xp.asarray(_each(scales, flat.shape[0], coding).reshape(rows.T.shape).T, copy=True)
    upper = xp.linalg.cholesky(xp.linalg.inv(_gram(other)), upper=True)
    rows, codes = xp.asarray(rows, copy=True), []
    for row in range(len(rows)):
        nearest = _nearest(rows[row], each[row], coding)
        codes.append(cast(nearest, DType.I8))
        error = (rows[row] - nearest * each[row]) / upper[row, row]
        rows[row + 1 :] -= upper[row, row + 1 :, None] * error
    return Codes(xp.stack(codes, axis=1), cast(scales, DType.BF16))


def _rows(codes: Codes, coding: Coding) -> Array:
    return _exact(dequantise(codes, coding)).T


def _decoded(pair: tuple[Codes, Codes], coding: Coding) -> tuple[Array, Array]:
    """The factors ``B`` and ``A``, float64."""
    return _rows(pair[0], coding).T, _rows(pair[1], coding)


def _exact(values: Array) -> Array:
    return cast(values, DType.F64)


def _distance(B: Array, A: Array, pair: tuple[Codes, Codes], coding: Coding) -> float:
    """Squared relative error, by inner products; not accurate near 0."""
    left, right = _decoded(pair, coding)
    size = float(((B.T @ B) * (A @ A.T)).sum())
    inner = float(((B.T @ left) * (A @ right.T)).sum())
    coded = float(((left.T @ left) * (right @ right.T)).sum())
    return max(size - 2 * inner + coded, 0.0) / size if size else coded


def _candidates(coding: Coding, *, thorough: bool) -> list[float]:
    """Codes to try for the largest value of a group; those beyond the largest code clip it in favour of the others."""
    largest = coding.largest
    if coding.bits == 4:
        clipped = [largest + half / 2 for half in range(-4, 9)]
        return [*map(float, range(1, largest - 2)), *clipped] if thorough else clipped
    clipped = [largest * (1 + step / 40) for step in range(4)]
    return [*map(float, range(largest // 2, largest)), *clipped] if thorough else clipped


def _scales(flat: Array, coding: Coding, candidates: list[float]) -> Array:
    """One scale per group of `flat`: float64 values that bfloat16 represents exactly."""
    xp, short = namespace(flat), -flat.shape[0] % coding.group
    groups = xp.concat([flat, xp.zeros(short, dtype=xp.float64, device=flat.device)]).reshape(-1, coding.group)
    if not len(groups):
        return flat
    step = _CHUNK // coding.group
    chunks = (groups[at : at + step] for at in range(0, len(groups), step))
    return xp.concat([_search(chunk, coding, candidates) for chunk in chunks])


def _search(groups: Array, coding: Coding, candidates: list[float]) -> Array:
    xp = namespace(groups)
    largest = xp.max(xp.abs(groups), axis=1)
    best, least = xp.zeros_like(largest), squares(groups)
    for candidate in candidates:
        scale = _exact(cast(largest / candidate, DType.BF16))
        # rounding a scale to bfloat16 changes it by 1/256 at most: only the largest candidates are clipped
        missed = _nearest(groups, scale[:, None], coding if candidate * (1 + 2**-8) >= coding.largest + 0.5 else None)
        missed *= scale[:, None]
        missed -= groups
        error = squares(missed)
        better = error < least
        best, least = xp.where(better, scale, best), xp.where(better, error, least)
    return best


def _nearest(values: Array, scales: Array, clipped: Coding | None) -> Array:
    """Codes as float64, clipped to the range of a coding; 0 where the scale is 0."""
    xp = namespace(values)
    codes = xp.round(values / xp.where(scales == 0, math.inf, scales))
    return codes.clip(-clipped.largest, clipped.largest) if clipped else codes


def _each(scales: Array, numel: int, coding: Coding) -> Array:
    """The scale of each value."""
    return namespace(scales).repeat(scales, coding.group)[:numel]
