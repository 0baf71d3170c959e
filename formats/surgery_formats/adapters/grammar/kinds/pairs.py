# SPDX-License-Identifier: Apache-2.0
"""Shared by LoHa and LoKr: pairs of low-rank factors, perhaps with a core between them (CP form of a kernel)."""

from __future__ import annotations

import math

from surgery_formats.adapters.grammar.kinds.kind import LeafWriter
from surgery_formats.adapters.grammar.module import ModuleTensors, malformed
from surgery_formats.arrays import Array
from surgery_formats.updates import Factor

__all__ = ["has_core", "low_rank_pair", "put_pair"]


def low_rank_pair(module: ModuleTensors, a: str, b: str, core: str, beside: str) -> tuple[Factor, Factor]:
    """The factors ``(out, rank)`` and ``(rank, in)``; with a core, they are stored as ``(rank, out)``, ``(rank, in)``."""
    left, right = module.matrix(a, beside), module.matrix(b, beside)
    middle = module.parts.get(core)
    if middle is None:
        if left.matrix[1] != right.matrix[0]:
            raise malformed(right, f"'{a}' is {list(left.shape)}")
        return Factor((left,), left.matrix), Factor((right,), right.matrix)
    rank = left.shape[0]
    flat = len(left.shape) == len(right.shape) == 2
    if not flat or len(middle.shape) < 3 or middle.shape[:2] != (rank, right.shape[0]) or not middle.numel:
        raise malformed(middle, f"a core between {list(left.shape)} and {list(right.shape)}")
    inputs, kernel = right.shape[1], math.prod(middle.shape[2:])

    def joined(t: Array, w: Array) -> Array:
        flat = t.reshape(rank, right.shape[0], kernel)
        return (flat.transpose(0, 2, 1) @ w).transpose(0, 2, 1)  # sum over j of t[i, j, k] w[j, in]

    A = Factor((left,), (left.shape[1], rank), lambda t: t.T)
    return A, Factor.computed((Factor.of(middle), Factor.of(right)), (rank, inputs * kernel), joined)


def has_core(B: Factor) -> bool:
    """Whether the second of a pair was computed from a core."""
    return len(B.terms) == 2 and len(B.terms[0].shape) > 2


def put_pair(writer: LeafWriter, a: str, b: str, core: str, pair: tuple[Factor, ...], times: float = 1.0) -> None:
    """Store the two factors that `low_rank_pair` reads."""
    A, B = pair
    if has_core(B):
        middle, right = B.terms
        writer.put(core, middle)
        writer.put(a, A, (A.shape[1], A.shape[0]), lambda t: t.T, times=times)
        writer.put(b, right)
        return
    writer.put(a, A, times=times)
    writer.put(b, B)
