# SPDX-License-Identifier: Apache-2.0
"""The part of a difference that is rounding: what storing TUNED in 16 bits adds to the change, as a norm.

Rounding to nearest adds independent errors of variance ``ulp^2 / 12``. The largest singular value of such a matrix is at most about
``max_i sqrt(sum_j var_ij) + max_j sqrt(sum_i var_ij)`` (Bandeira and van Handel 2016, arXiv:1408.6185): directions above it are change.
"""

from __future__ import annotations

import math

from surgery.deltas import BLOCK_ELEMENTS, Delta, spacing

__all__ = ["noise_edge"]


def noise_edge(delta: Delta) -> float:
    """Largest singular value that TUNED's rounding alone would have."""
    import torch

    cols = torch.zeros(delta.stored_shape[1], dtype=torch.float64)
    largest = 0.0
    height = max(1, BLOCK_ELEMENTS // max(delta.stored_shape[1], 1))
    for strip in delta.strips:
        for start in range(strip.first, strip.last, height):
            stop = min(start + height, strip.last)
            values = strip.tuned.get(start, stop)
            variance = spacing(values, strip.tuned.tensor.dtype).square() / 12
            cols += variance.sum(dim=0, dtype=torch.float64)
            largest = max(largest, float(variance.sum(dim=1, dtype=torch.float64).max()))
    return math.sqrt(largest) + math.sqrt(float(cols.max()))
