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

import torch

from surgery_formats.linalg.coding import Coding
from surgery_formats.linalg.factored import relative_error, rerank
from surgery_formats.linalg.matrix import one_thread

__all__ = ["CodedProduct", "Codes", "dequantise", "quantise", "quantise_product"]

_ROUNDS = 4  # more rounds reduce the error by less than 3 %
_CHUNK = 1 << 15  # groups per step: bounds the memory of the search
_DAMPING = 1e-3  # relative to the mean diagonal: otherwise missing directions would compensate for anything


class Codes(NamedTuple):
    """Codes and scales, in row-major order.

    Attributes:
        values: int8, in the shape of the coded tensor.
        scales: bfloat16, ``(ceil(numel / group),)``; 0 for a group of zeros.
    """

    values: torch.Tensor
    scales: torch.Tensor


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


def quantise(values: torch.Tensor, coding: Coding) -> Codes:
    """Nearest codes, under the scales of least squared error.

    Values that are not clipped are within half a step of their code; clipping is used where it helps the rest of the
    group. Coding decoded values again gives the same numbers. `values` are finite, of any shape.
    """
    with torch.no_grad(), one_thread():
        flat = values.double().reshape(-1)
        scales = _scales(flat, coding, _candidates(coding, thorough=True))
        codes = _nearest(flat, _each(scales, flat.numel(), coding), coding)
        return Codes(codes.to(torch.int8).reshape(values.shape), scales.bfloat16())


def dequantise(codes: Codes, coding: Coding) -> torch.Tensor:
    """Decode exactly, to float32."""
    flat = codes.values.reshape(-1).float()
    return (flat * _each(codes.scales.float(), flat.numel(), coding)).reshape(codes.values.shape)


def quantise_product(B: torch.Tensor, A: torch.Tensor, coding: Coding) -> CodedProduct:
    """Codes whose product is near ``B A``, with `B` ``(out, rank)`` and `A` ``(rank, in)``.

    The factors change, and redundant directions are dropped.

    Raises:
        FitError: a value is not finite.
    """
    with torch.no_grad(), one_thread():
        B, A = B.double(), A.double()
        even = rerank(B, A, B.shape[1])
        factors = (B, A) if even.B.shape[1] == B.shape[1] else (even.B, even.A)
        # codes of decoded values stay the same
        best = quantise(factors[0], coding), quantise(factors[1].T.contiguous(), coding)
        left = _distance(even.B, even.A, best, coding)
        for pair in _rounds(even.B, even.A, coding) if left > 1e-14 else ():
            if (distance := _distance(even.B, even.A, pair, coding)) < left:
                best, left = pair, distance
        decoded = dequantise(best[0], coding).double(), dequantise(best[1], coding).double().T
        return CodedProduct(*best, relative_error((B, A), decoded))


def _rounds(B: torch.Tensor, A: torch.Tensor, coding: Coding) -> Iterator[tuple[Codes, Codes]]:
    """Yield pairs of coded factors, each solved against the one before. Inside, directions are rows."""
    mix = _mixing(B.shape[1])
    left, right = mix @ B.T, mix @ A
    if not bool(left.any()):
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


def _mixing(rank: int) -> torch.Tensor:
    """Hartley's matrix: orthogonal, symmetric, all squares close to ``1 / rank``, for any rank."""
    steps = torch.arange(rank, dtype=torch.float64)
    angles = torch.outer(steps, steps).remainder(rank) * (2 * math.pi / rank)
    return (angles.cos() + angles.sin()) / math.sqrt(rank)


def _solved(fixed: torch.Tensor, target: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``argmin_X ||target^T other - fixed^T X||``, with directions as rows."""
    solution: torch.Tensor = torch.linalg.solve(_gram(fixed), (fixed @ target.T) @ other)
    return solution


def _gram(rows: torch.Tensor) -> torch.Tensor:
    gram = rows @ rows.T
    gram.diagonal().add_(_DAMPING * float(gram.diagonal().mean()) or 1.0)
    return gram


def _fed_back(rows: torch.Tensor, other: torch.Tensor, coding: Coding) -> Codes:
    """Codes of ``rows^T``: each row's error, as seen through `other`, is fed into the rows that follow."""
    flat = rows.T.reshape(-1)
    scales = _scales(flat, coding, _candidates(coding, thorough=False))
    each = _each(scales, flat.numel(), coding).reshape(rows.T.shape).T.contiguous()
    upper = torch.linalg.cholesky(torch.linalg.inv(_gram(other)), upper=True)
    rows, codes = rows.clone(), torch.empty(rows.shape, dtype=torch.int8)
    for row in range(len(rows)):
        nearest = _nearest(rows[row], each[row], coding)
        codes[row] = nearest.to(torch.int8)
        error = (rows[row] - nearest * each[row]) / upper[row, row]
        rows[row + 1 :] -= upper[row, row + 1 :, None] * error
    return Codes(codes.T.contiguous(), scales.bfloat16())


def _rows(codes: Codes, coding: Coding) -> torch.Tensor:
    return dequantise(codes, coding).double().T


def _distance(B: torch.Tensor, A: torch.Tensor, pair: tuple[Codes, Codes], coding: Coding) -> float:
    """Squared relative error, by inner products; not accurate near 0."""
    left, right = dequantise(pair[0], coding).double(), dequantise(pair[1], coding).double().T
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


def _scales(flat: torch.Tensor, coding: Coding, candidates: list[float]) -> torch.Tensor:
    """One scale per group of `flat`: float64 values that bfloat16 represents exactly."""
    short = -flat.numel() % coding.group
    groups = torch.nn.functional.pad(flat, (0, short)).reshape(-1, coding.group)
    if not len(groups):
        return flat
    return torch.cat([_search(chunk, coding, candidates) for chunk in torch.split(groups, _CHUNK)])


def _search(groups: torch.Tensor, coding: Coding, candidates: list[float]) -> torch.Tensor:
    largest = groups.abs().amax(dim=1)
    best, least = torch.zeros_like(largest), groups.square().sum(dim=1)
    for candidate in candidates:
        scale = (largest / candidate).bfloat16().double()
        error = (_nearest(groups, scale[:, None], coding) * scale[:, None]).sub_(groups).square_().sum(dim=1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _nearest(values: torch.Tensor, scales: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Codes as float64; 0 where the scale is 0."""
    steps = torch.where(scales == 0, torch.inf, scales)
    return (values / steps).round_().clamp_(-coding.largest, coding.largest)


def _each(scales: torch.Tensor, numel: int, coding: Coding) -> torch.Tensor:
    """The scale of each value."""
    return scales.repeat_interleave(coding.group)[:numel]
