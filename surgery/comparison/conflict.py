# SPDX-License-Identifier: Apache-2.0
"""The conflict of two low-rank deltas, from QR of their factors in float64; no delta is formed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from surgery.algebra.sums import stacked
from surgery.comparison.additive import Chain, blocks_of
from surgery.reports.conflict import Conflict
from surgery_formats.arrays import Array
from surgery_formats.updates import LoRA

__all__ = ["conflict_of"]

_NOTHING = 1e-10  # of the first singular value: below, a direction is none


def conflict_of(mine: Chain, theirs: Chain, weights: tuple[float, float] = (1.0, 1.0)) -> Conflict | None:
    """The conflict of what two adapters add to one weight; None where either adds nothing of low rank.

    Of stacked experts it is the mean over them, and angles are those of the first.
    """
    if mine[0].shape != theirs[0].shape:
        return None
    blocks, others = blocks_of(mine), blocks_of(theirs)
    pairs = [(block, other) for block, other in zip(blocks, others, strict=False) if block and other]
    found = [conflict for block, other in pairs if (conflict := _of_block(block, other, weights)) is not None]
    if not found:
        return None
    count = len(found)
    return Conflict(
        sum(each.inputs for each in found) / count,
        sum(each.outputs for each in found) / count,
        max(each.chance for each in found),
        (max(each.spikes[0] for each in found), max(each.spikes[1] for each in found)),
        max(each.growth for each in found),
        found[0].input_cosines,
        found[0].output_cosines,
    )


def _of_block(block: Sequence[LoRA], other: Sequence[LoRA], weights: tuple[float, float]) -> Conflict | None:
    (B, A), (D, C) = stacked(block), stacked(other)
    B, D = B * weights[0], D * weights[1]
    (left, values, right), (left_other, values_other, right_other) = _svd(B, A), _svd(D, C)
    if not len(values) or not len(values_other):
        return None
    inputs, outputs = _cosines(right, right_other), _cosines(left, left_other)
    ranks = sorted((len(values), len(values_other)))
    _, both, _ = _svd(numpy.hstack([B, D]), numpy.vstack([A, C]))
    spikes = tuple(float(each[0] ** 2 / (each**2).sum()) for each in (values, values_other))
    largest = float(both[0]) if len(both) else 0.0
    return Conflict(
        float((inputs**2).sum()) / ranks[0],
        float((outputs**2).sum()) / ranks[0],
        min(1.0, ranks[1] / min(A.shape[1], B.shape[0])),
        (spikes[0], spikes[1]),
        largest / max(float(values[0]), float(values_other[0])),
        tuple(map(float, inputs)),
        tuple(map(float, outputs)),
    )


def _svd(B: Array, A: Array) -> tuple[Array, Array, Array]:
    """``B A`` as left vectors (columns), singular values above nothing, and right vectors (columns)."""
    Q, R = numpy.linalg.qr(B)
    P, S = numpy.linalg.qr(A.T)
    U, values, V = numpy.linalg.svd(R @ S.T)
    count = int((values > _NOTHING * values[0]).sum()) if len(values) and values[0] > 0 else 0
    return Q @ U[:, :count], values[:count], P @ V[:count].T


def _cosines(one: Array, other: Array) -> Array:
    """Of the principal angles between the spans of orthonormal columns (Bjorck and Golub 1973), descending."""
    cosines: Array = numpy.linalg.svd(one.T @ other, compute_uv=False).clip(max=1.0)
    return cosines
