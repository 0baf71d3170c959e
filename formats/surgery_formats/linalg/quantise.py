# SPDX-License-Identifier: Apache-2.0
"""Whole numbers in the place of factors: symmetric codes with one scale per group, and products rounded for the product's sake.

A value is ``code * scale``; ``-128`` and ``-8`` are no codes, so that the range is symmetric. A bfloat16 scale times a code of 8 bits
fits float32 exactly: everybody who decodes a file gets the same numbers, and only the encoder has choices. It has four for a product
``B A``, each measured to gain (docs/compact.md):

- The singular values are split evenly, so that an error in either factor costs the same (`factored.rerank`).
- The directions are mixed by an orthogonal matrix. ``B A`` stays, but every direction now has the mean of the singular values, and the
  squared error of rounding falls from ``sum s_k^2`` to ``(sum s_k)^2 / r`` (Cauchy and Schwarz).
- When one direction is rounded, those that follow make up for it, as far as the other factor cannot tell them apart (the error feedback
  of GPTQ, Frantar et al. 2022, arXiv:2210.17323, with the other factor in the place of the inputs).
- Each factor in turn is solved anew, by least squares, for the other one as it was rounded.
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

_ROUNDS = 4  # more gain less than 3 % of the error
_CHUNK = 1 << 15  # groups looked at together: bounds the memory of the search
_DAMPING = 1e-3  # of the mean diagonal: directions that are not there would make up for anything


class Codes(NamedTuple):
    """Numbers in row-major order.

    Attributes:
        values: int8, of the numbers' shape.
        scales: bfloat16, ``(ceil(numel / group),)``; 0 for a group of zeros.
    """

    values: torch.Tensor
    scales: torch.Tensor


class CodedProduct(NamedTuple):
    """A product ``B A`` as codes.

    Attributes:
        B: ``(out, rank)``.
        A: The transpose of A, ``(in, rank)``: groups run over directions, which alike have the size of their row of the weight.
        error: ``||B A - decoded|| / ||B A||``, Frobenius.
    """

    B: Codes
    A: Codes
    error: float


def quantise(values: torch.Tensor, coding: Coding) -> Codes:
    """Nearest codes under scales of least squared error.

    Where no value was clipped, none is further from its code than half a step; a clipped one made the others better. Codes of decoded codes
    are the same numbers.

    Args:
        values: Any shape, finite.
        coding: How.
    """
    with torch.no_grad(), one_thread():
        flat = values.double().reshape(-1)
        scales = _scales(flat, coding, _candidates(coding, thorough=True))
        codes = _nearest(flat, _each(scales, flat.numel(), coding), coding)
        return Codes(codes.to(torch.int8).reshape(values.shape), scales.bfloat16())


def dequantise(codes: Codes, coding: Coding) -> torch.Tensor:
    """The numbers, float32, exactly."""
    flat = codes.values.reshape(-1).float()
    return (flat * _each(codes.scales.float(), flat.numel(), coding)).reshape(codes.values.shape)


def quantise_product(B: torch.Tensor, A: torch.Tensor, coding: Coding) -> CodedProduct:
    """Codes whose product is near ``B A``. The factors are others than those given, and of no more rows or columns than they can fill.

    Args:
        B: ``(out, rank)``.
        A: ``(rank, in)``.
        coding: Of both.

    Raises:
        FitError: a value is not finite.
    """
    with torch.no_grad(), one_thread():
        B, A = B.double(), A.double()
        even = rerank(B, A, B.shape[1])
        given = (B, A) if even.B.shape[1] == B.shape[1] else (even.B, even.A)
        best = (
            quantise(given[0], coding),
            quantise(given[1].T.contiguous(), coding),
        )  # what codes decode to becomes them again
        left = _distance(even.B, even.A, best, coding)
        for pair in _rounds(even.B, even.A, coding) if left > 1e-14 else ():
            if (found := _distance(even.B, even.A, pair, coding)) < left:
                best, left = pair, found
        decoded = dequantise(best[0], coding).double(), dequantise(best[1], coding).double().T
        return CodedProduct(*best, relative_error((B, A), decoded))


def _rounds(B: torch.Tensor, A: torch.Tensor, coding: Coding) -> Iterator[tuple[Codes, Codes]]:
    """Pairs of factors, each solved for the one before. Inside, directions are rows."""
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
    """Hartley's matrix: orthogonal, symmetric, all squares near ``1 / rank``, for any rank."""
    steps = torch.arange(rank, dtype=torch.float64)
    angles = torch.outer(steps, steps).remainder(rank) * (2 * math.pi / rank)
    return (angles.cos() + angles.sin()) / math.sqrt(rank)


def _solved(fixed: torch.Tensor, wanted: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``argmin_X ||wanted^T other - fixed^T X||``, directions being rows."""
    found: torch.Tensor = torch.linalg.solve(_gram(fixed), (fixed @ wanted.T) @ other)
    return found


def _gram(rows: torch.Tensor) -> torch.Tensor:
    gram = rows @ rows.T
    gram.diagonal().add_(_DAMPING * float(gram.diagonal().mean()) or 1.0)
    return gram


def _fed_back(rows: torch.Tensor, other: torch.Tensor, coding: Coding) -> Codes:
    """Codes of ``rows^T``: row by row, the rows that follow take over what `other` sees of each row's error."""
    flat = rows.T.reshape(-1)
    scales = _scales(flat, coding, _candidates(coding, thorough=False))
    each = _each(scales, flat.numel(), coding).reshape(rows.T.shape).T.contiguous()
    upper = torch.linalg.cholesky(torch.linalg.inv(_gram(other)), upper=True)
    rows, codes = rows.clone(), torch.empty(rows.shape, dtype=torch.int8)
    for at in range(len(rows)):
        found = _nearest(rows[at], each[at], coding)
        codes[at] = found.to(torch.int8)
        error = (rows[at] - found * each[at]) / upper[at, at]
        rows[at + 1 :] -= upper[at, at + 1 :, None] * error
    return Codes(codes.T.contiguous(), scales.bfloat16())


def _rows(codes: Codes, coding: Coding) -> torch.Tensor:
    return dequantise(codes, coding).double().T


def _distance(B: torch.Tensor, A: torch.Tensor, pair: tuple[Codes, Codes], coding: Coding) -> float:
    """Squared relative error, by inner products; near 0 it is only known to be near 0."""
    left, right = dequantise(pair[0], coding).double(), dequantise(pair[1], coding).double().T
    size = float(((B.T @ B) * (A @ A.T)).sum())
    both = float(((B.T @ left) * (A @ right.T)).sum())
    found = float(((left.T @ left) * (right @ right.T)).sum())
    return max(size - 2 * both + found, 0.0) / size if size else found


def _candidates(coding: Coding, *, thorough: bool) -> list[float]:
    """Codes that the greatest value of a group may get; one beyond the largest code is clipped, for the others' sake."""
    largest = coding.largest
    if coding.bits == 4:
        clipped = [largest + half / 2 for half in range(-4, 9)]
        return [*map(float, range(1, largest - 2)), *clipped] if thorough else clipped
    clipped = [largest * (1 + step / 40) for step in range(4)]
    return [*map(float, range(largest // 2, largest)), *clipped] if thorough else clipped


def _scales(flat: torch.Tensor, coding: Coding, candidates: list[float]) -> torch.Tensor:
    """One scale per group of `flat`, float64 values that bfloat16 has."""
    short = -flat.numel() % coding.group
    groups = torch.nn.functional.pad(flat, (0, short)).reshape(-1, coding.group)
    return (
        torch.cat([_search(chunk, coding, candidates) for chunk in torch.split(groups, _CHUNK)])
        if len(groups)
        else flat
    )


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
    """Codes as float64; 0 under a scale of 0."""
    steps = torch.where(scales == 0, torch.inf, scales)
    return (values / steps).round_().clamp_(-coding.largest, coding.largest)


def _each(scales: torch.Tensor, numel: int, coding: Coding) -> torch.Tensor:
    """The scale of each number."""
    return scales.repeat_interleave(coding.group)[:numel]
